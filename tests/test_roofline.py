"""The published speedups from bytes and FLOPs."""

import pandas as pd
import pytest
from tiny import tiny

from llmdrop import DropPlan, kv_cache_bytes, paper
from llmdrop.models import GEOMETRIES
from llmdrop.roofline import largest_batch, predict_speed


def plan_of(label: str, n_layers: int) -> DropPlan:
    kind, _, n = label.partition("-")
    some = range(int(n or 0))  # which layers does not matter to speed
    return DropPlan(some if kind in ("Attn", "Block") else (), some if kind in ("MLP", "Block") else (), n_layers)


def errors(model: str, batch_size: int) -> pd.Series:
    rows = pd.concat([paper.table(name) for name in ("table01", "table02", "table03")]).query("model == @model")
    base = predict_speed(model, DropPlan(), batch_size).seconds
    plans = {label: plan_of(label, GEOMETRIES[model][0]) for label in rows["method"]}
    predicted = rows["method"].map(
        {k: base / predict_speed(model, plan, batch_size).seconds for k, plan in plans.items()}
    )
    return (predicted - rows["speedup"]).abs()


def test_published_speedups_follow_from_the_shapes():
    assert largest_batch("Llama-2-13B", memory=48e9) == 6
    assert errors("Llama-2-13B", 6).max() <= 0.02
    assert errors("Llama-3-8B", 32).max() <= 0.03


def test_bytes_and_flops_of_a_decode_step():
    one = predict_speed("Llama-2-7B", batch_size=2, prompt_len=10, new_tokens=1, hardware=(1.0, 1e30))
    weights = sum(p for p in (32 * (4 * 4096**2 + 3 * 4096 * 11008), 4096 * 32000)) * 2
    assert one.weight_bytes == weights
    assert one.decode_seconds == weights + kv_cache_bytes("Llama-2-7B", 2, 11)
    assert one.kv_bytes == kv_cache_bytes("Llama-2-7B", 2, 11)
    slow = predict_speed("Llama-2-7B", batch_size=2, prompt_len=10, new_tokens=1, hardware=(1e30, 1.0))
    assert slow.decode_seconds == 2 * (weights + 4 * 4096 * 32 * 11)


def test_a_models_own_shapes_and_drops():
    model = tiny("llama")
    whole, half = predict_speed(model, batch_size=1), predict_speed(model, DropPlan([0, 1]), batch_size=1)
    assert half.seconds < whole.seconds and half.kv_bytes / whole.kv_bytes == pytest.approx(3 / 5)
    assert largest_batch("Mistral-7B", DropPlan(range(8))) > largest_batch("Mistral-7B")


def test_errors():
    for arguments, message in (
        ({"model": "Llama-9"}, "unknown geometry 'Llama-9'"),
        ({"model": "Mistral-7B", "hardware": "TPU"}, "unknown hardware 'TPU'; known: RTX 6000 Ada"),
        ({"model": "Mistral-7B", "batch_size": 0}, "batch_size=0"),
        ({"model": "Mistral-7B", "plan": DropPlan([40])}, "out of range"),
        ({"model": tiny("gpt2")}, "'gpt2' has others"),
    ):
        with pytest.raises(ValueError, match=message):
            predict_speed(**arguments)
