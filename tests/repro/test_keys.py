"""Keys of the results store: nothing in them but what is listed here, so that moving or renaming code voids nothing."""

import ast
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from tiny import random_ids, tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import llmdrop
from llmdrop import Calibration, DropPlan, save_model
from llmdrop.compress.four_bits import FourBits
from llmdrop.compress.healing import Healing
from llmdrop.compress.reconstruction import Reconstruction
from llmdrop.compress.variant import Variant
from llmdrop.compress.wanda import WandaMask
from llmdrop.compress.windows import Windows
from llmdrop.repro import block_importance, speedups
from llmdrop.repro.quality import Questions, answers, quality
from llmdrop.repro.selectors import Chooser
from llmdrop.repro.store import Store
from llmdrop.repro.timing import timing
from llmdrop.repro.training import Recipe, pretrain
from llmdrop.repro.training_checkpoints import score_checkpoints
from llmdrop.repro.training_text import TrainingText

MODEL = {"model_type", "dtype", "device_type", "attention", "torch", "transformers", "weights", "batch_size"}
MACHINE = {"model_type", "dtype", "device_type", "attention", "torch", "transformers", "shapes", "device", "threads"}
RECIPE = {"n_layers", "width", "head_size", "steps", "batch_size", "lr"}
RECIPE |= {"n_checkpoints", "n_late_checkpoints", "bfloat16"}
# the entries of a key, by kind of measurement
DOCUMENTED = {
    "score": MODEL | {"version", "calibration", "with_residual", "gap"},
    "sample-scores": MODEL | {"version", "calibration"},
    "losses": MODEL | {"version", "text", "variant"},
    "questions": MODEL | {"version", "tokenizer", "lm_eval", "task", "task_digest", "limit", "seed", "variant"},
    "matches": MODEL | {"version", "tokenizer", "questions", "variant"},
    "answers": MODEL | {"version", "tokenizer", "prompts", "stop", "max_new_tokens", "variant"},
    "timing": MACHINE | {"version", "rounds", "settings", "shapes_timed"},
    "hardware": MACHINE | {"version"},
    "choices": MODEL
    | {"version", "search", "target", "loss", "text", "every", "n", "width", "seconds", "reconstruction"},
    "window-scores": MODEL | {"version", "text", "window", "sinks"},
    "block-taylor": MODEL | {"version", "text"},
    "pretrain": MODEL | RECIPE | {"version", "text", "seed"},
    "checkpoint": {"model", "dtype", "device", "calibration", "torch", "transformers", "version", "batch_size"}
    | {"revision", "place"},
}
# and those of what is done to a model
VARIANT = {
    "attn": None,
    "mlp": None,
    "reconstruction": {"method", "text", "version", "one_by_one"},
    "windows": {"layers", "window", "sinks", "version"},
    "mask": {"share", "sequential", "text", "version"},
    "four_bits": {"algorithm", "group_size", "exact", "unpacked", "text", "library", "version"},
    "healing": {"text", "loss", "rank", "learning_rate", "batch_size", "seed", "version", "peft"},
}


def words() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1", pad_token="w0")


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> list[tuple[str, dict]]:
    """(kind, key) of one small measurement of every kind that is stored, by every part of a variant."""
    root = tmp_path_factory.mktemp("keys")
    store = Store(root / "results")
    model = tiny("llama", "sdpa", hidden_size=64, intermediate_size=128)
    tokenizer = words()
    text = Calibration(random_ids(8, 24))
    mirror = root / "mirror"
    news = mirror / "EdinburghNLP/xsum/default/test.jsonl"
    news.parent.mkdir(parents=True)
    documents = [" ".join(f"w{i}" for i in row) for row in random_ids(4, 30).tolist()]
    news.write_text("".join(json.dumps({"document": document}) + "\n" for document in documents))
    piqa = mirror / "baber/piqa/default/validation.jsonl"
    piqa.parent.mkdir(parents=True)
    piqa.write_text(json.dumps({"goal": "w2 w3", "sol1": "w4", "sol2": "w5", "label": 0}) + "\n")
    plan = DropPlan(attn=[1, 3])
    reconstruction = Reconstruction(text)
    variants = {
        "whole": Variant(),
        "plan": Variant(plan),
        "reconstruction": Variant(plan, reconstruction),
        "windows": Variant(windows=Windows((1, 2), 8, 2)),
        "mask": Variant(mask=WandaMask(0.2, text)),
    }
    if llmdrop.repro.provenance.version("bitsandbytes"):
        variants["four bits"] = Variant(four_bits=FourBits("nf4", 64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMDROP_BUILD", str(root / "build"))
        if llmdrop.repro.provenance.version("peft"):
            variants["healing"] = Variant(plan, healing=Healing(text))
        store.score(model, text)
        store.sample_scores(model, text)
        questions = {"asked": Questions(["w2 w3"], [" w4"])}
        quality(model, tokenizer, variants, {"text": text}, ["piqa"], questions, data_dir=mirror, store=store)
        answers(model, tokenizer, {"whole": Variant()}, ["w2 w3"], "prompts", 2, store=store)
        timing(model, variants, rounds=1, store=store, prompt_len=4, new_tokens=1)
        speedups.measure_beside_limit(store, model, ["Baseline", "Attn-1"], rounds=1, prompt_len=4, new_tokens=1)
        chooser = Chooser(model, text, long_text=text, store=store)
        for name in ("Taylor", "KL one-shot", "KL greedy, reconstructed, latency-aware"):
            chooser.choose(name, 2)
        chooser.window_order(8)
        block_importance.by_taylor(model, text, store)
        training_text = TrainingText(
            tokenizer, random_ids(8, 16).int().numpy(), *[Calibration(random_ids(4, 16))] * 2, {}, np.zeros(4)
        )
        pretrain(training_text, Recipe(2, 32, steps=2, batch_size=2, n_checkpoints=2), [0], "cpu", store)
        for name in ("first", "last"):
            save_model(tiny("llama", "sdpa"), tokenizer, root / "run" / name)
        revisions = {"first": 1, "last": 2}
        settings = {"n_samples": 2, "seq_len": 8, "data_dir": mirror, "device": "cpu"}
        score_checkpoints(str(root / "run"), revisions, "xsum", **settings, store=store)
    files = sorted(store.root.glob("*/*.json"))
    return [(file.parent.name, json.loads(file.read_text())["key"]) for file in files]


def test_every_kind_is_here(keys):
    assert {kind for kind, _ in keys} == set(DOCUMENTED)
    parts = {part for _, key in keys for part in key.get("variant", {})}
    assert parts >= {"attn", "mlp", "reconstruction", "windows", "mask"}


def test_keys_hold_what_is_documented_and_no_more(keys):
    for kind, key in keys:
        assert set(key) <= DOCUMENTED[kind], kind
        assert "version" in key
        for part, value in key.get("variant", {}).items():
            assert part in VARIANT
            assert VARIANT[part] is None or set(value) <= VARIANT[part]


def strings(value) -> set[str]:
    """All texts in a key, however deep."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return set().union(*map(strings, value)) if value else set()
    return {value} if isinstance(value, str) else set()


def test_no_key_holds_a_digest_of_code(keys):
    """As 0.1.0's did: of a file, or of its syntax tree, whole or the first 16 digits."""
    of_code = set()
    for file in Path(llmdrop.__file__).parent.rglob("*.py"):
        for content in (file.read_bytes(), ast.dump(ast.parse(file.read_text())).encode()):
            digest = hashlib.sha256(content).hexdigest()
            of_code |= {digest, digest[:16]}
    for kind, key in keys:
        assert not strings(key) & of_code, kind


def test_another_version_is_another_key(tmp_path, monkeypatch):
    """And the same one is found again: nothing is measured twice."""
    store = Store(tmp_path)
    model = tiny("llama")
    text = Calibration(random_ids(2, 8))
    store.score(model, text)
    store.score(model, text)
    assert len(list((tmp_path / "score").glob("*.json"))) == 1
    monkeypatch.setattr(llmdrop.scoring, "VERSION", 99)
    store.score(model, text)
    assert len(list((tmp_path / "score").glob("*.json"))) == 2


def test_digests_would_be_noticed():
    digest = hashlib.sha256(Path(llmdrop.scoring.__file__).read_bytes()).hexdigest()[:16]
    assert strings({"code": {"scoring": digest}, "layers": [1, "two"], "n": 3}) == {digest, "two"}
