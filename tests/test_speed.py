"""KV-cache formula against real caches, and timings that hang together."""

import pytest
import torch
from tiny import FAMILIES, random_ids, tiny

from llmdrop import DropPlan, apply_plan, dropped, kv_cache_bytes, measure_speed
from llmdrop.speed import cache_bytes, compare_speed, geometry_model


@pytest.mark.parametrize("family", FAMILIES)
def test_formula_equals_the_real_cache(family):
    model, ids = tiny(family), random_ids(3, 17)
    for plan in (DropPlan(), DropPlan([0, 3]), DropPlan([1, 2], [1]), DropPlan(range(5))):
        expected = kv_cache_bytes(model, 3, 17, plan)
        with dropped(model, plan), torch.inference_mode():
            assert cache_bytes(model(ids, use_cache=True).past_key_values) == expected == kv_cache_bytes(model, 3, 17)


def test_paper_geometry_on_the_meta_device():
    model = geometry_model("Llama-3-8B")
    assert kv_cache_bytes("Llama-3-8B", 64, 2048) == 16 * 2**30  # Table 4
    half = DropPlan(attn=range(12, 32))
    ids = torch.zeros((2, 64), dtype=torch.long, device="meta")
    with torch.inference_mode():
        cache = apply_plan(model, half)(ids, use_cache=True).past_key_values
    assert cache_bytes(cache) == kv_cache_bytes("Llama-3-8B", 2, 64, half) and len(cache.layers) == 12


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_measure_speed(cache):
    model = tiny("llama", "sdpa")
    out = measure_speed(model, batch_size=2, prompt_len=16, new_tokens=4, repeats=3, cache=cache)
    assert out["seconds"] > 0 and len(out["all_decode_seconds"]) == 3
    assert out["kv_bytes"] == kv_cache_bytes(model, 2, 20)
    assert out["tokens_per_second"] == pytest.approx(2 * 4 / out["decode_seconds"])
    with pytest.raises(ValueError, match="batch_size=0"):
        measure_speed(model, batch_size=0)


def test_compare_speed_alternates():
    frame = compare_speed(
        tiny("llama"), {"Baseline": DropPlan(), "Attn-4": DropPlan([0, 1, 2, 3])}, prompt_len=8, new_tokens=2
    )
    assert frame["plan"].tolist() == ["Baseline", "Attn-4"] and frame["speedup"][0] == 1
    assert frame["kv_bytes"][1] * 5 == frame["kv_bytes"][0] and (frame["speedup_low"] <= frame["speedup_high"]).all()


def test_unknown_geometry():
    with pytest.raises(ValueError, match="unknown geometry 'Llama-9'; known: Llama-2-7B"):
        kv_cache_bytes("Llama-9", 1, 1)
