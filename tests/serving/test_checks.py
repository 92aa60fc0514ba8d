"""Engines are timed side by side, and an export is compared with its model."""

import pytest
import transformers
from exports import MIXED, PLANS, PROMPTS, TOKENIZER, wide

from llmdrop import DropPlan
from llmdrop.serving import llama_cpp
from llmdrop.serving.checks import check_export, commands, compare, compare_serving, engines

COLUMNS = ["engine", "plan", "round", "prefill_seconds", "decode_seconds", "kv_bytes", "file_bytes"]
HERE = [
    "transformers",
    pytest.param("llama.cpp", marks=pytest.mark.skipif(not llama_cpp.installed(), reason="missing")),
]


@pytest.mark.parametrize("engine", HERE)
def test_speed_is_compared_in_every_engine(engine):
    plans = {"Baseline": DropPlan(), "Attn-2": DropPlan([2, 3])}
    rows = compare_serving(engine, wide(), TOKENIZER, plans, list(range(9)), 5, rounds=2, weights="f16")
    assert [(row["plan"], row["round"]) for row in rows] == [(plan, turn) for turn in range(2) for plan in plans]
    assert all(list(row) == COLUMNS and row["engine"] == engine for row in rows)
    assert all(row[column] > 0 for row in rows for column in COLUMNS[3:])
    whole, dropped = rows[:2]
    assert dropped["kv_bytes"] / whole["kv_bytes"] == pytest.approx(3 / 5, rel=0.05), "of a few KiB, which it rounds"
    assert dropped["file_bytes"] < whole["file_bytes"]


@pytest.mark.parametrize("name", ["mixed", "no attention", "blocks"])
def test_transformers_alone_gives_the_same_numbers(name):
    (row,) = check_export("transformers", wide(), TOKENIZER, PLANS[name], PROMPTS, 16)
    assert row["n_tokens"] == 160 == row["n_equal"] and row["max_difference"] < 1e-4


def test_another_model_is_told_apart(monkeypatch):
    """The comparison itself: of a plan with the model of another plan."""
    from llmdrop.serving import checks

    monkeypatch.setattr(checks, "compare", lambda engine, model, *rest: compare(engine, wide(PLANS["last MLP"]), *rest))
    (row,) = check_export("transformers", wide(), TOKENIZER, MIXED, PROMPTS, 16)
    assert row["n_equal"] < 120 and row["max_difference"] > 0.5 and row["max_loss"] > 0.5


def test_an_engine_that_cannot_have_a_plan_says_so():
    (row,) = check_export("vLLM", wide(), TOKENIZER, DropPlan([0]), PROMPTS, 4)
    assert "layer 0 would be the first and has no attention" in row["refused"]


def test_commands_name_every_engine_that_may_be_here():
    names = " ".join(row["engine"] for row in commands("m"))
    assert all(engine in names for engine in ("transformers", "llama.cpp", "vLLM", "Ollama", *engines()))
    assert engines()["transformers"] == transformers.__version__
    assert "llmdrop serve m.gguf --port 8080" in [row["command"] for row in commands("m")]
