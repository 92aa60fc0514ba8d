"""The published speedups from bytes and FLOPs."""

import pandas as pd
import pytest
from tiny import tiny

from llmdrop import DropPlan, kv_cache_bytes, paper
from llmdrop.models import GEOMETRIES
from llmdrop.roofline import (
    HARDWARE,
    implied_batch,
    largest_batch,
    measure_hardware,
    memory_needed,
    predict_speed,
    predict_speedups,
    sized_plan,
)

PUBLISHED = pd.concat([paper.table(name) for name in ("table01", "table02", "table03")])


def published(model: str) -> pd.Series:
    return PUBLISHED.query("model == @model").set_index("method")["speedup"]


def errors(model: str, batch_size: int, **settings) -> pd.Series:
    rows = published(model)
    return (predict_speedups(model, rows.index, batch_size=batch_size, **settings)["speedup"] - rows).abs()


def test_published_speedups_follow_from_the_shapes():
    assert largest_batch("Llama-2-13B", memory=HARDWARE["RTX 6000 Ada"][2]) == 6
    assert errors("Llama-2-13B", 6).max() <= 0.02
    assert errors("Llama-3-8B", 32).max() <= 0.03


def test_the_batch_that_the_published_rows_imply():
    for model, batch, error, bits in (
        ("Llama-2-13B", 6, 0.02, 16),
        ("Llama-3-8B", 32, 0.03, 16),
        ("Mistral-7B", 97, 0.02, 16),
        ("Llama-3-70B", 72, 0.04, 4.125),
        ("Llama-2-70B", 115, 0.06, 4.125),
    ):
        found, worst = implied_batch(model, published(model), weight_bits=bits)
        assert abs(found - batch) <= 0.05 * batch and worst <= error, model
        fits = memory_needed(model, batch_size=found, weight_bits=bits) <= 48e9
        assert fits == (model in ("Llama-2-13B", "Llama-3-8B"))


def test_a_cache_moved_twice_speeds_up_like_twice_the_batch():
    """Up to prefill, which does the FLOPs of the real batch."""
    options = dict(prompt_len=1, new_tokens=500, hardware=(1e12, 1e18))
    twice = predict_speed("Mistral-7B", batch_size=8, cache_traffic=2, **options).decode_seconds
    assert twice == pytest.approx(predict_speed("Mistral-7B", batch_size=16, **options).decode_seconds)


def test_no_plan_beats_its_share_of_the_layers():
    """Dropping n of L equal layers whole cannot do better than L / (L - n); five of the published 70B rows do."""
    above = []
    for model, shape in GEOMETRIES.items():
        labels = [f"{kind}-{n}" for kind in ("Attn", "MLP", "Block") for n in (1, 4, 8, 16)]
        bound = pd.Series({label: shape[0] / (shape[0] - int(label.split("-")[1])) for label in labels})
        for batch in (1, 64, 4096):
            assert (predict_speedups(model, labels, batch_size=batch)["speedup"] < bound).all()
        rows = published(model).drop("Baseline", errors="ignore")
        most = [shape[0] / (shape[0] - int(label.split("-")[1])) for label in rows.index]
        above += [(model, label) for label in rows.index[rows > pd.Series(most, rows.index) + 0.005]]
    assert above == [("Llama-2-70B", row) for row in ("Block-4", "Block-8", "Block-16", "Attn-4", "Attn-8")]


def test_bytes_and_flops_of_a_decode_step():
    one = predict_speed("Llama-2-7B", batch_size=2, prompt_len=10, new_tokens=1, hardware=(1.0, 1e30))
    weights = sum(p for p in (32 * (4 * 4096**2 + 3 * 4096 * 11008), 4096 * 32000)) * 2
    assert one.weight_bytes == weights
    assert one.decode_seconds == weights + kv_cache_bytes("Llama-2-7B", 2, 11)
    assert one.kv_bytes == kv_cache_bytes("Llama-2-7B", 2, 11)
    slow = predict_speed("Llama-2-7B", batch_size=2, prompt_len=10, new_tokens=1, hardware=(1e30, 1.0))
    assert slow.decode_seconds == 2 * (weights + 4 * 4096 * 32 * 11)
    fixed = predict_speed("Llama-2-7B", batch_size=2, prompt_len=10, new_tokens=5, hardware=(1.0, 1e30), cache="static")
    assert fixed.decode_seconds == 5 * (weights + kv_cache_bytes("Llama-2-7B", 2, 15))
    reference = predict_speed("Llama-2-7B", batch_size=2, prompt_len=1, new_tokens=0, hardware=(1.0, 1e30))
    assert reference.decode_seconds == 0 and reference.seconds == weights + kv_cache_bytes("Llama-2-7B", 2, 1)


def test_a_models_own_shapes_and_drops():
    model = tiny("llama")
    whole, half = predict_speed(model, batch_size=1), predict_speed(model, DropPlan([0, 1]), batch_size=1)
    assert half.seconds < whole.seconds and half.kv_bytes / whole.kv_bytes == pytest.approx(3 / 5)
    assert largest_batch("Mistral-7B", DropPlan(range(8))) > largest_batch("Mistral-7B")
    assert largest_batch("Llama-2-70B") == 0 and largest_batch("Llama-2-70B", weight_bits=4.125) == 8
    assert largest_batch("Mistral-7B", cache_bits=8) == pytest.approx(2 * largest_batch("Mistral-7B"), abs=1)


def test_sized_plans():
    assert sized_plan("Baseline", 32) == DropPlan()
    assert sized_plan("Attn-2", 32) == DropPlan([29, 30]) and sized_plan("Block-1", 4) == DropPlan([2], [2])
    assert sized_plan("MLP-4", 32).label == "MLP-4" and sized_plan("MLP-4", 32).attn == ()
    for label in ("Attn-32", "Attn-x", "Joint-4", "", "Attn"):
        with pytest.raises(ValueError, match="is not Baseline, Attn-n"):
            sized_plan(label, 32)


def test_speedups_of_prefill_and_decode():
    rows = predict_speedups("Llama-2-13B", ["Baseline", "Attn-20"], batch_size=6)
    assert (rows.loc["Baseline", ["speedup", "prefill_speedup", "decode_speedup"]] == 1).all()
    attn = rows.loc["Attn-20"]
    assert attn["prefill_speedup"] < attn["speedup"] < attn["decode_speedup"]
    assert attn["seconds"] == pytest.approx(attn["prefill_seconds"] + attn["decode_seconds"])


def test_this_machine():
    bandwidth, rate = measure_hardware("cpu", "float32")
    assert 1e8 < bandwidth < 1e13 and 1e8 < rate < 1e15
    assert predict_speed("Llama-2-7B", hardware=(bandwidth, rate), new_tokens=1).seconds > 0


def test_errors():
    for arguments, message in (
        ({"model": "Llama-9"}, "unknown geometry 'Llama-9'"),
        ({"model": "Mistral-7B", "hardware": "TPU"}, "unknown hardware 'TPU'; known: RTX 6000 Ada"),
        ({"model": "Mistral-7B", "batch_size": 0}, "batch_size=0"),
        ({"model": "Mistral-7B", "cache": "paged"}, "cache='paged' dynamic or static"),
        ({"model": "Mistral-7B", "plan": DropPlan([40])}, "out of range"),
        ({"model": tiny("gpt2")}, "'gpt2' has others"),
    ):
        with pytest.raises(ValueError, match=message):
            predict_speed(**arguments)
