"""The published speedups from bytes and FLOPs."""

import pandas as pd
import pytest
import torch
from tiny import random_ids, tiny

from llmdrop import DropPlan, apply_plan, dropped, kv_cache_bytes
from llmdrop.repro import paper
from llmdrop.speed.geometry import GEOMETRIES, geometry_config, shape_of
from llmdrop.speed.measure import cache_bytes
from llmdrop.speed.roofline import (
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
        bound = pd.Series({label: shape.layers / (shape.layers - int(label.split("-")[1])) for label in labels})
        for batch in (1, 64, 4096):
            assert (predict_speedups(model, labels, batch_size=batch)["speedup"] < bound).all()
        rows = published(model).drop("Baseline", errors="ignore")
        most = [shape.layers / (shape.layers - int(label.split("-")[1])) for label in rows.index]
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


GATED = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2"]
PLANS = [DropPlan(), DropPlan(attn=[1, 3]), DropPlan(mlp=[0]), DropPlan([0, 2], [2, 4])]


def wide(family: str, **settings):
    """A tiny model whose heads together are wider than its hidden state, as those of Qwen3 and Gemma."""
    return tiny(family, head_dim=24, **settings)


def matrix_weights(model) -> int:
    """Numbers in the matrices of a model, the embedding's left out, and a head that is the embedding counted."""
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    inner = [p.numel() for p in model.parameters() if p.dim() > 1 and p is not embedding and p is not head]
    return sum(inner) + head.numel()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", GATED)
def test_bytes_of_every_gated_family(family, tied):
    model = wide(family, tie_word_embeddings=tied)
    options = dict(batch_size=3, prompt_len=13, new_tokens=4, weight_bits=32, cache_bits=32)  # beyond the windows of 6
    for plan in PLANS:
        limit = predict_speed(model, plan, **options)
        with dropped(model, plan), torch.inference_mode():
            cache = cache_bytes(model(random_ids(3, 17), use_cache=True).past_key_values)
            assert limit.weight_bytes == 4 * matrix_weights(model)
            everything = 4 * sum(p.numel() for p in model.parameters() if p.dim() > 1)
        assert limit.kv_bytes == cache == kv_cache_bytes(model, 3, 17, plan)
        settings = dict(seq_len=17, weight_bits=32, cache_bits=32)
        assert memory_needed(model, plan, 3, **settings) == everything + cache
        assert largest_batch(model, plan, memory=everything + cache, **settings) == 3
        assert largest_batch(model, plan, memory=everything + cache - 1, **settings) == 2


def test_a_step_reads_no_more_of_a_layer_than_its_window_holds():
    options = dict(prompt_len=16, hardware=(1.0, 1e30), weight_bits=32, cache_bits=32)
    for family in ("llama", "gemma2"):  # of gemma2's layers three keep 5 tokens, two all
        model = tiny(family)
        short, long = (predict_speed(model, new_tokens=n, **options).decode_seconds for n in (1, 2))
        assert long - short == predict_speed(model, new_tokens=1, **options).weight_bytes + kv_cache_bytes(model, 1, 18)


def test_names_are_counted_like_models():
    for name in GEOMETRIES:
        config = geometry_config(name)
        assert config.head_dim * config.num_attention_heads == config.hidden_size and not shape_of(name).tied


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_what_is_dropped_in_the_model_counts(family):
    for first, second in ((DropPlan([1, 3]), DropPlan([0], [2])), (DropPlan([4], [4]), DropPlan([2, 4]))):
        model, whole = apply_plan(tiny(family), first), tiny(family)
        assert predict_speed(model) == predict_speed(whole, first) != predict_speed(whole)
        assert predict_speed(model, second) == predict_speed(whole, first | second)
        assert memory_needed(model, second) == memory_needed(whole, first | second) < memory_needed(whole)
        assert kv_cache_bytes(model, 2, 30, second) == kv_cache_bytes(whole, 2, 30, first | second)
        sizes = dict(memory=2e8)
        assert largest_batch(model, **sizes) == largest_batch(whole, first, **sizes) > largest_batch(whole, **sizes)


def test_rows_of_a_dropped_model_drop_as_many_more():
    model, whole = apply_plan(tiny("llama"), DropPlan([2, 3], [0])), tiny("llama")
    rows = predict_speedups(model, ["Baseline", "Attn-1", "MLP-2"])
    assert rows.loc["Baseline", "speedup"] == 1
    for label, plan in (("Attn-1", DropPlan([1, 2, 3], [0])), ("MLP-2", DropPlan([2, 3], [0, 2, 3]))):
        assert rows.loc[label, "seconds"] == predict_speed(whole, plan).seconds
    with pytest.raises(ValueError, match="with n below 3"):
        predict_speedups(model, ["Attn-3"])  # 0 and 1 are left, and the last


@pytest.mark.parametrize("model", ["Llama-2-7B", "tiny"])
def test_a_plan_of_another_depth_is_refused(model):
    model = tiny("llama") if model == "tiny" else model
    plan = DropPlan([1], n_layers=40)
    for function, arguments in (
        (predict_speed, (model, plan)),
        (memory_needed, (model, plan)),
        (largest_batch, (model, plan)),
        (kv_cache_bytes, (model, 1, 8, plan)),
    ):
        with pytest.raises(ValueError, match="made for a model of 40 layers"):
            function(*arguments)


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
        ({"model": tiny("gemma2"), "windowed": 1, "window": 4}, "windows of its own"),
        ({"model": tiny("gpt2")}, "this model has others"),
    ):
        with pytest.raises(ValueError, match=message):
            predict_speed(**arguments)
