"""What 4-bit weights leave of a model, whole and dropped: quality, bytes and speed, the rows of Table 11."""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec

import pandas as pd
from torch import nn
from transformers import BitsAndBytesConfig

from ..calibration import Calibration
from ..checkpoints import four_bits as quantize
from ..compress import awq
from ..plan import DropPlan
from ..speed.measure import compare_speed, over_rounds
from ..speed.roofline import predict_speed, shapes, sized_plan
from .provenance import provenance, speed_key, version
from .store import Store
from .tables import by_plan

LIBRARIES = {"nf4": "bitsandbytes", "fp4": "bitsandbytes", "awq": "llmcompressor"}


INSTALL = {"bitsandbytes": quantize.INSTALL, "llmcompressor": awq.INSTALL}


def here(algorithms: str) -> list[str]:
    """Those of the algorithms, named by comma, whose library is installed. ValueError for one that is unknown."""
    names = algorithms.split(",")
    if unknown := set(names) - set(LIBRARIES):
        raise ValueError(f"algorithm {', '.join(sorted(unknown))} is not one of {', '.join(LIBRARIES)}")
    return [name for name in names if find_spec(LIBRARIES[name])]


def library(algorithm: str) -> str:
    """What quantizes by this algorithm, with its version, or the line that installs it."""
    name = LIBRARIES[algorithm]
    return f"{name} {version(name)}" if version(name) else f"{name}, which is missing (`{INSTALL[name]}`)"


def measure(
    store: Store,
    load: Callable,
    plans: Mapping[str, DropPlan],
    text: Calibration,
    tasks: Sequence[str],
    algorithm: str = "nf4",
    group_size: int = 64,
    calibration: Calibration | None = None,
    speed: Mapping | None = None,
    geometry: str = "Llama-2-13B",
    predict: Mapping | None = None,
    **settings,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What every plan leaves of a model, unquantized and in 4 bits, and the losses behind it.

    load: gives (model, tokenizer), afresh. plans: the baseline first, named as `sized_plan` knows them. text: of two
    samples or more. calibration: for "awq". speed: of `time_versions`. predict: of `predict_speed` for this geometry.
    settings: of `Store.evaluate` (limit, data_dir, num_fewshot, batch_size).

    Returns a table as from `tables.by_plan`, a row for "<plan>|16" (of whatever type the unquantized weights are) and
    one for "<plan>|4", with `method` and `bits`, `mb` (megabytes of all weights), `here` (speedup over the first row,
    its error half the range) and `predicted` (from 16 bits); and nats per token [row, sample]. Quality is that of the
    rounded weights, unpacked; of "awq" there are no others, so no bytes and no speed here. Without the algorithm's
    library the 4-bit rows have no more than a prediction.
    """
    whole, tokenizer = load()
    models, rows, texts, sizes = {"16": whole}, [], [], {}
    if algorithm in here("awq"):
        models["4"] = awq.awq_once(load()[0], tokenizer, calibration, group_size)
    elif algorithm in here("nf4,fp4"):
        models["4"] = quantize.quantize(load()[0], algorithm, group_size)
    packed = {bits: model for bits, model in models.items() if bits == "16" or algorithm != "awq"}
    samples = [Calibration(ids[None], text.source) for ids in text.input_ids]
    for bits, model in models.items():
        if bits in packed:
            sizes |= {f"{name}|{bits}": quantize.size(model, plan)["bytes"] / 1e6 for name, plan in plans.items()}
        if bits == "4" and bits in packed:
            model = quantize.dequantize(copy.deepcopy(model))
        named = {f"{name}|{bits}": plan for name, plan in plans.items()}
        rows.append(store.evaluate(model, tokenizer, named, tasks, **settings))
        texts.append([store.perplexity(model, named, sample) for sample in samples])
        del model  # three may not fit
    each = [pd.concat(same) for same in zip(*texts, strict=True)]
    table = by_plan(pd.concat(rows), each)
    timed = time_versions(store, packed, plans, **(speed or {}))
    table["mb"], table["here"] = pd.Series(sizes), timed["speedup"]
    table["here_stderr"] = (timed["speedup_high"] - timed["speedup_low"]) / 2
    names = [(name, bits) for name in plans for bits in (16, 4)]
    table = table.reindex([f"{name}|{bits}" for name, bits in names])
    table["method"], table["bits"] = zip(*names, strict=True)
    scale = 20 if algorithm == "awq" else 32  # bits beside each group: 16-bit scale and 4-bit zero point, or float32
    width, depth = {16: 16, 4: 4 + scale / group_size}, shapes(geometry)[0]
    limits = [
        predict_speed(geometry, sized_plan(name, depth), weight_bits=width[bits], **(predict or {})).seconds
        for name, bits in names
    ]
    table["predicted"] = [limits[0] / limit for limit in limits]
    nats = pd.DataFrame({k: one.set_index("plan")["log_perplexity"] for k, one in enumerate(each)})
    return table, nats.reindex(table.index)


def time_versions(
    store: Store, models: Mapping[str, nn.Module], plans: Mapping[str, DropPlan], rounds: int = 3, **settings
) -> pd.DataFrame:
    """`compare_speed` of several versions of one model in turn, round after round, stored.

    models: versions by their name, of which "4" has weights of `quantize`; it is timed as bitsandbytes likes best, and
    must be thrown away after that (see `arithmetic`). settings: as for measure_speed. Returns seconds, speedup over the
    first plan of the first version, speedup_low and speedup_high: medians and extremes over the rounds, indexed by
    "<plan>|<version>".
    """

    def compute() -> list[dict]:
        timed = []
        for turn in range(rounds):
            for name, model in models.items():
                model = quantize.arithmetic(model, exact=False) if name == "4" else model
                one = compare_speed(model, plans, rounds=1, **settings)
                timed.append(pd.DataFrame({"plan": one["plan"] + f"|{name}", "round": turn, "seconds": one["seconds"]}))
        return pd.concat(timed).to_dict("records")

    first = models[next(iter(models))]
    modules = ("quantize", "speed", "prune", "anatomy")
    key = {name: speed_key(model, *modules) for name, model in models.items()}
    key |= {"plans": [(name, plan.key) for name, plan in plans.items()]}
    key |= {"settings": settings, "rounds": rounds, "bitsandbytes": version("bitsandbytes")}
    facts = partial(provenance, first, **settings)
    rows = pd.DataFrame(store.get("quantized_speed", key, compute, f"{model_name(first)}-{'-'.join(plans)}", facts))
    return over_rounds(rows, rows["plan"].iloc[0])


def by_transformers(
    store: Store, load: Callable, text: Calibration, algorithm: str = "nf4", group_size: int = 64
) -> float:
    """Perplexity on `text` of the 4-bit model that transformers makes while loading, in bitsandbytes' own arithmetic.

    load: takes arguments of from_pretrained and gives (model, tokenizer). NaN without bitsandbytes, for
    other algorithms than its own, and for groups of other sizes than 64, all that transformers can do.
    """
    if algorithm not in here("nf4,fp4") or group_size != 64:
        return float("nan")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=algorithm)
    model = quantize.arithmetic(load(quantization_config=config)[0], exact=False)
    return float(store.perplexity(model, {"": DropPlan()}, text)["perplexity"].iloc[0])
