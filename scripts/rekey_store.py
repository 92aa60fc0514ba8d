"""Carry the results of release 0.1.0 over, so that they are not measured again: python scripts/rekey_store.py [STORE]

Release 0.1.0 stored measurements under keys with digests of source code; now keys hold the VERSION of the measuring
modules. For every entry that 0.1.0 itself wrote, and whose new key and value follow from it exactly, this writes the
new entry beside the old one, and says of the others why they are measured again. Old entries stay. Run it once; this
script goes with the next release. STORE: by default that of `llmdrop.Store()`.

The digest of weights is another now, too, so the models are loaded to take both: --model names them, as for
`llmdrop.load_model`; those trained here (Figure 7) are made again.
"""

import argparse
import contextlib
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from llmdrop import load_model, weights_digest
from llmdrop.repro.selectors import SELECTORS
from llmdrop.repro.store import Entry, Store

VERSION = 1  # of every measuring module: the numbers of 0.1.0 are those of VERSION 1
WIDTH = 4  # sublayers that a step of its greedy searches tried at a time
EVERY = 4  # its searches took the loss at every fourth token
# digests of 0.1.0's modules, as its keys hold them
CODE = {
    "anatomy": "acb9450436025b42",
    "beyond": "d6121ed6e13c5fdc",
    "compensate": "a868b3c83fb33cc4",
    "cuts": "095b9585c95a7ec9",
    "generation": "e1dee8f69b6c6896",
    "harness": "f4a67d67218ec630",
    "healing": "8c97de84939d1db0",
    "hooks": "b77dc087590f6373",
    "models": "30f743193873e199",
    "pretrain": "9f6a59ba9cf54934",
    "prune": "adbbf9edd767878a",
    "roofline": "b0e93a59a6252cc5",
    "scoring": "d0535b7ee1c379c4",
    "selection": "273fe4084a20dbcc",
    "shortened": "3857cbed3f3b8cd5",
    "sweep": "31a3078b40311a11",
    "tasks": "7ff8386401515451",
    "windows": "e267f087210cf95e",
}
METHODS = {"mean": "mean", "refit": "least squares", "refit in turn": "sequential least squares"}
SELECTOR_NAMES = {
    "Taylor": "Taylor",
    "perplexity one-shot": "perplexity one-shot",
    "KL one-shot": "KL one-shot",
    "perplexity greedy": "perplexity greedy",
    "KL greedy": "KL greedy",
    "compensated KL greedy": "KL greedy, reconstructed",
    "perplexity greedy, all": "perplexity greedy, all sublayers",
    "KL greedy, per second": "KL greedy, latency-aware",
    "compensated KL greedy, per second": "KL greedy, reconstructed, latency-aware",
}
# kinds of which nothing can be carried over
MEASURED_AGAIN = {
    "perplexity": "a mean over samples; the loss of every sample is kept now",
    "evaluate": "means over questions; the log-likelihoods of every question are kept now",
    "pretrain": "trained in other ways, with more measured at every checkpoint",
    "wanda": "means; the log-likelihoods of every question and the loss of every sample are kept now",
    "greedy": "its key names the questions by their tokens; now by their text",
    "mixed": "means over samples; the loss of every sample is kept now",
    "speed": "medians over rounds; every round is kept now",
    "wanda-speed": "timed by another protocol now",
    "window-speed": "timed by another protocol now",
    "quantized_speed": "timed by another protocol now",
    "serving": "timed by another protocol now",
    "serving-exact": "its key has the plan in another spelling, and it takes seconds",
}
MODEL = ("attention", "device_type", "dtype", "model_type", "torch", "transformers", "weights")  # entries of every key


class NotCarriedOver(Exception):
    """Why an entry has to be measured again."""


@dataclass(frozen=True)
class NewEntry:
    """What an old entry becomes."""

    kind: str
    key: dict
    value: object
    slug: str


def same_key(version: int | list[int]) -> Callable[[str, dict, object, str], Iterator[NewEntry]]:
    """For kinds whose key changes in nothing but that a version stands for the code."""

    def convert(kind: str, key: dict, value: object, slug: str) -> Iterator[NewEntry]:
        new_key = {name: entry for name, entry in key.items() if name != "code"}
        yield NewEntry(kind, new_key | {"version": version}, value, slug)

    return convert


def losses_of_plain(kind: str, key: dict, value: list[dict], slug: str) -> Iterator[NewEntry]:
    yield from losses(key, variant_key(key), key["texts"], value, slug)


def losses_of_compensated(kind: str, key: dict, value: list[dict], slug: str) -> Iterator[NewEntry]:
    if "text" not in key:
        raise NotCarriedOver("right or wrong for every question of a task; their log-likelihoods are kept now")
    yield from losses(key, variant_key(key), {key["where"]: key["text"]}, value, slug)


def losses_of_windows(kind: str, key: dict, value: list[dict], slug: str) -> Iterator[NewEntry]:
    if "text" in key:
        yield from losses(key, variant_key(key), {value[0]["where"]: key["text"]}, value, slug)
    elif "asked" in key:
        prompts, targets = key["asked"]
        new_key = model_key(key) | {
            "version": [VERSION, VERSION],
            "tokenizer": key["tokenizer"],
            "questions": hashlib.sha256(json.dumps([prompts, targets]).encode()).hexdigest(),
            "variant": variant_key(key),
        }
        yield NewEntry("matches", new_key, [int(row["value"]) for row in value], slug)
    else:
        raise NotCarriedOver("right or wrong for every question of a task; their log-likelihoods are kept now")


def losses_of_healed(kind: str, key: dict, value: dict, slug: str) -> Iterator[NewEntry]:
    settings = {"loss": "kl", "rank": 8, "learning_rate": 1e-3, "batch_size": 2, "seed": 0} | key["settings"]
    healing = settings | {"text": key["text"], "version": VERSION, "peft": key["peft"]}
    yield from losses(key, variant_key(key) | {"healing": healing}, key["texts"], value["rows"], slug)


def losses(key: dict, variant: dict, texts: dict[str, str], rows: list[dict], slug: str) -> Iterator[NewEntry]:
    """texts: digests by name. rows: where, item, value (nats per token), n (tokens), of all of these texts."""
    for name, digest in texts.items():
        samples = sorted((row for row in rows if row["where"] == name), key=lambda row: row["item"])
        value = {
            "nats": [row["value"] * row["n"] for row in samples],
            "tokens": [row["n"] for row in samples],
        }
        new_key = model_key(key) | {"version": VERSION, "text": digest, "variant": variant}
        yield NewEntry("losses", new_key, value, slug if slug.endswith(name) else f"{slug}-{name}")


def answers(kind: str, key: dict, value: list[str], slug: str) -> Iterator[NewEntry]:
    new_key = model_key(key) | {"batch_size": key["batch_size"], "version": VERSION, "variant": variant_key(key)}
    new_key |= {name: key[name] for name in ("tokenizer", "prompts", "stop", "max_new_tokens")}
    yield NewEntry("answers", new_key, value, slug)


def choices(kind: str, key: dict, value, slug: str) -> Iterator[NewEntry]:
    if "how" not in key:  # Taylor importances of blocks
        yield NewEntry(
            "block-taylor",
            model_key(key) | {"batch_size": key["batch_size"], "version": VERSION, "text": key["calibration"]},
            value,
            slug,
        )
        return
    if key["how"] not in SELECTOR_NAMES:
        raise NotCarriedOver(f"there is no selector {key['how']!r} any more")
    name = SELECTOR_NAMES[key["how"]]
    selector = SELECTORS[name]
    new_key = model_key(key) | {
        "batch_size": key["batch_size"],
        "version": VERSION,
        "search": selector.search.__name__,
        "target": selector.target,
        "loss": selector.loss,
        "text": key["search"],
        "every": EVERY,
    }
    if selector.search.__name__ == "greedy":
        new_key |= {"n": key["n"], "width": WIDTH}
    if selector.latency_aware:
        new_key["seconds"] = key["seconds"]
    if not selector.with_reconstruction:
        yield NewEntry("choices", new_key, value, slug)
        return
    reconstruction = reconstruction_key("refit", key["text"])
    yield NewEntry("choices", new_key | {"reconstruction": reconstruction}, value, slug)
    if selector.latency_aware:  # sought beside windows, where every sublayer is made up for by itself
        one_by_one = reconstruction | {"one_by_one": True}
        yield NewEntry("choices", new_key | {"reconstruction": one_by_one}, value, slug)


CONVERTERS = {
    "score": same_key(VERSION),
    "checkpoint": same_key(VERSION),
    "window-scores": same_key(VERSION),
    "hardware": same_key(VERSION),
    "plain": losses_of_plain,
    "compensated": losses_of_compensated,
    "windows": losses_of_windows,
    "healed": losses_of_healed,
    "generate": answers,
    "selector": choices,
}


def model_key(key: dict) -> dict:
    """What a new key says of the model, for what does not depend on the batch size."""
    return {name: key[name] for name in MODEL} | {"batch_size": None}


def variant_key(key: dict) -> dict:
    """`Variant.key` of what an old key measured."""
    variant: dict = {"attn": key["attn"], "mlp": key["mlp"]}
    method = key.get("method", "none")
    if method != "none" and (key["attn"] or key["mlp"]):
        if method not in METHODS:
            raise NotCarriedOver(f"there is no method {method!r} any more")
        if key["dtype"] != "float32":
            raise NotCarriedOver("a fit in 16 bits depends on the batch size, which its new key leaves out")
        variant["reconstruction"] = reconstruction_key(method, key["fitted"])
    if "layers" in key:
        windows = {name: key[name] for name in ("layers", "window", "sinks")}
        variant["windows"] = windows | {"version": VERSION}
    return variant


def reconstruction_key(method: str, text: str) -> dict:
    return {"method": METHODS[method], "text": text, "version": VERSION}


# -- weights --------------------------------------------------------------------------------------------------------


def former_digest(model: nn.Module) -> str:
    """0.1.0's digest of a model's config and weights."""
    volatile = {"_name_or_path", "transformers_version", "architectures", "torch_dtype", "dtype", "use_cache"}
    config = {key: value for key, value in model.config.to_dict().items() if key not in volatile}
    state = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, parameter in sorted(model.state_dict(keep_vars=True).items()):
        bits = parameter.detach().reshape(-1).contiguous()
        bits = bits.view(integers[bits.element_size()])
        whole = len(bits) // 4096 * 4096
        rows = bits[:whole].view(-1, 4096)
        sums = [rows.sum(1, dtype=torch.int64), rows.sum(0, dtype=torch.int64), bits[whole:].long()]
        weighted = [int((s * torch.arange(1, len(s) + 1, device=s.device)).sum()) for s in sums]
        state.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {weighted}".encode())
    return state.hexdigest()


def digests_of(names: Iterable[str], dtypes: Iterable[str]) -> dict[str, str]:
    """{0.1.0's digest: today's} of these models in these types."""
    digests = {}
    for name in names:
        for dtype in dtypes:
            model, _ = load_model(name, dtype, "cpu")
            digests[former_digest(model)] = weights_digest(model)
    return digests


# -- a store --------------------------------------------------------------------------------------------------------


def read(file: Path) -> dict | None:
    """The record of an entry of 0.1.0; None for one with a key of today. Raises NotCarriedOver where it is damaged."""
    try:
        record = json.loads(file.read_bytes())
        parts = [record["key"], record["value"], record["provenance"], record["created"]]
        text = json.dumps(parts, separators=(",", ":"))
        intact = record["checksum"] == hashlib.sha256(text.encode()).hexdigest()
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise NotCarriedOver("the file is damaged")
    is_old = "code" in record["key"] or file.parent.name in MEASURED_AGAIN and "version" not in record["key"]
    return record if is_old else None


def carry_over(store: Store, file: Path, record: dict, digests: dict[str, str]) -> None:
    """Write what the entry becomes. digests: of weights, then and now. Raises NotCarriedOver where it cannot be."""
    kind = file.parent.name
    key = record["key"]
    if kind in MEASURED_AGAIN:
        raise NotCarriedOver(MEASURED_AGAIN[kind])
    if kind not in CONVERTERS:
        raise NotCarriedOver("nothing is known of this kind")
    changed = sorted(module for module, digest in key["code"].items() if CODE.get(module) != digest)
    if changed:
        raise NotCarriedOver(f"measured by other code than 0.1.0's ({', '.join(changed)})")
    if "weights" in key:
        if key["weights"] not in digests:
            raise NotCarriedOver("of other weights than those of --model, such as a dropped model's")
        key = key | {"weights": digests[key["weights"]]}
    slug = file.stem.rpartition("-")[0]
    facts = record["provenance"] | {"carried_over_from": f"{kind}/{file.name}"}
    for new in CONVERTERS[kind](kind, key, record["value"], slug):
        with contextlib.redirect_stdout(io.StringIO()):  # nothing is measured here
            store.get_many(new.kind, [Entry(new.key, new.slug)], lambda _, new=new: [new.value], lambda: facts)


def old_records(root: Path, left: Counter) -> dict[Path, dict]:
    """The records of 0.1.0 by file; counts damaged ones in `left`."""
    records = {}
    for file in sorted(root.glob("*/*.json")):
        try:
            record = read(file)
        except NotCarriedOver as reason:
            left[file.parent.name, str(reason)] += 1
            continue
        if record is not None:
            records[file] = record
    return records


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", nargs="?", type=Path, help="folder of results, such as build/results")
    parser.add_argument("--model", nargs="*", default=["smollm2-135m"], help="models that were measured")
    given = parser.parse_args(arguments)
    store = Store(given.store)
    if not store.root.is_dir():
        parser.error(f"{store.root} is not a directory; give the folder of results of release 0.1.0")
    carried: Counter[str] = Counter()
    left: Counter[tuple[str, str]] = Counter()
    records = old_records(store.root, left)
    dtypes = {record["key"]["dtype"] for record in records.values() if "weights" in record["key"]}
    digests = digests_of(given.model, sorted(dtypes))
    for file, record in records.items():
        try:
            carry_over(store, file, record, digests)
            carried[file.parent.name] += 1
        except NotCarriedOver as reason:
            left[file.parent.name, str(reason)] += 1
    for kind, n in sorted(carried.items()):
        print(f"{n:5} {kind}: carried over")
    for (kind, reason), n in sorted(left.items()):
        print(f"{n:5} {kind}: measured again when it is needed ({reason})")
    print(f"{carried.total()} entries of {store.root} carried over, {left.total()} not; old files are as they were")


if __name__ == "__main__":
    main()
