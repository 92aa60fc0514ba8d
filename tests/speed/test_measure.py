"""KV-cache formula against real caches, timings that hang together, and the paper's models by shape."""

import math
from contextlib import contextmanager
from functools import partial

import pandas as pd
import pytest
import torch
from tiny import FAMILIES, random_ids, tiny

from llmdrop import DropPlan, apply_plan, dropped, kv_cache_bytes, measure_speed
from llmdrop.speed import measure as speed_module
from llmdrop.speed.geometry import GEOMETRIES, Shape, geometry_model
from llmdrop.speed.measure import cache_bytes, compare_speed, in_rounds, speedups, time_rounds

SIZES = dict(batch_size=2, prompt_len=16, new_tokens=8)


@pytest.fixture
def tiny_geometry(monkeypatch):
    monkeypatch.setitem(GEOMETRIES, "Tiny", Shape(4, 256, 4, 2, 64, 512, 100))


@pytest.mark.parametrize("family", FAMILIES)
def test_formula_equals_the_real_cache(family):
    model, ids = tiny(family), random_ids(3, 17)
    for plan in (DropPlan(), DropPlan([0, 3]), DropPlan([1, 2], [1]), DropPlan(range(5))):
        expected = kv_cache_bytes(model, 3, 17, plan)
        with dropped(model, plan), torch.inference_mode():
            assert cache_bytes(model(ids, use_cache=True).past_key_values) == expected == kv_cache_bytes(model, 3, 17)


@pytest.mark.parametrize("bits, dtype", [(16, "float16"), (4, "bfloat16")])
def test_paper_geometry_on_the_meta_device(bits, dtype):
    model = geometry_model("Llama-3-8B", dtype=dtype, bits=bits)
    assert kv_cache_bytes("Llama-3-8B", 64, 2048) == 16 * 2**30  # Table 4
    half = DropPlan(attn=range(12, 32))
    ids = torch.zeros((2, 64), dtype=torch.long, device="meta")
    with torch.inference_mode():
        cache = apply_plan(model, half)(ids, use_cache=True).past_key_values
    assert cache_bytes(cache) == kv_cache_bytes("Llama-3-8B", 2, 64, half) and len(cache.layers) == 12


def test_seventy_billion_fit_one_gpu_in_four_bits():
    whole, small = geometry_model("Llama-2-70B"), geometry_model("Llama-2-70B", dtype="bfloat16", bits=4)
    matrices = 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    sizes = [sum(p.nbytes for p in model.parameters()) for model in (whole, small)]
    assert sizes[0] - sizes[1] == matrices * (16 - 4.25) / 8 and sizes[1] < 38e9


@pytest.mark.parametrize("bits", [4, 16])
def test_geometry_on_a_device(tiny_geometry, bits):
    model = geometry_model("Tiny", "cpu", "bfloat16", bits)
    out = model(random_ids(2, 40), use_cache=True)  # more rows than the 4-bit kernel takes, then few
    out = model(random_ids(2, 1), past_key_values=out.past_key_values)
    assert out.logits.shape == (2, 1, 100) and out.logits.isfinite().all() and out.logits.std() > 0
    reference = type(model)(model.config).model.rotary_emb.inv_freq
    assert torch.equal(model.model.rotary_emb.inv_freq, reference)
    assert measure_speed(model, **SIZES)["kv_bytes"] == kv_cache_bytes(model, 2, 24)
    with dropped(model, DropPlan([1], [0, 2])):
        assert measure_speed(model, **SIZES)["kv_bytes"] == kv_cache_bytes("Tiny", 2, 24, DropPlan([1]))


def test_four_bit_kernel_computes_what_its_16_bit_copy_does(tiny_geometry):
    linear = geometry_model("Tiny", "cpu", "bfloat16", 4).model.layers[0].mlp.up_proj
    linear.codes.fill_(0x9B - 0x02)  # every weight the same code: the kernel's order of them does not matter
    x = torch.randn(3, 5, 256, dtype=torch.bfloat16)
    by_kernel, linear.rows = linear(x), 0
    assert by_kernel.shape == (3, 5, 512) and torch.allclose(by_kernel, linear(x), atol=0.05)
    expected = linear.scales[..., 0].float().repeat_interleave(128, 0) + linear.scales[
        ..., 1
    ].float().repeat_interleave(128, 0)
    assert torch.allclose(by_kernel.float(), x.float() @ expected, atol=0.05)


def test_geometry_errors(tiny_geometry):
    with pytest.raises(ValueError, match="unknown geometry 'Llama-9'; known: Llama-2-7B"):
        kv_cache_bytes("Llama-9", 1, 1)
    for arguments in ({"bits": 8}, {"bits": 4}):
        with pytest.raises(ValueError, match="bits is 16, or 4 with dtype='bfloat16'"):
            geometry_model("Tiny", **arguments)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_measure_speed(cache):
    model = tiny("llama", "sdpa")
    out = measure_speed(model, batch_size=2, prompt_len=16, new_tokens=4, repeats=3, cache=cache)
    assert out["seconds"] > 0 and len(out["all_decode_seconds"]) == 3
    assert out["kv_bytes"] == kv_cache_bytes(model, 2, 20)
    assert out["tokens_per_second"] == pytest.approx(2 * 4 / out["decode_seconds"])
    per_token = kv_cache_bytes(model, 2, 1)
    assert out["decode_bytes"] == 4 * out["weight_bytes"] + per_token * (17 + 18 + 19 + 20)
    assert out["decode_bandwidth"] == pytest.approx(out["decode_bytes"] / out["decode_seconds"])
    embedding = model.get_input_embeddings().weight.nbytes
    assert out["weight_bytes"] == sum(p.nbytes for p in model.parameters()) - embedding


def calls(model, **settings) -> list[tuple]:
    """(tokens in, tokens before, first token in) of every forward pass that measure_speed makes."""
    seen, forward = [], model.forward

    def spy(ids, past_key_values=None, **options):
        before = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        seen.append((ids.shape[1], before, ids[0, 0].item()))
        return forward(ids, past_key_values=past_key_values, **options)

    model.forward = spy
    measure_speed(model, **SIZES, **settings)
    del model.forward
    return seen


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_what_is_timed_is_greedy_generation(cache):
    model = tiny("llama", "sdpa")
    seen = calls(model, cache=cache, repeats=1)
    assert [c[:2] for c in seen[:4]] == [(16, 0), (1, 16), (1, 17), (1, 18)]  # warm-up
    assert [c[:2] for c in seen[4:]] == [(16, 0)] + [(1, 16 + k) for k in range(8)]
    prompt = torch.randint(0, 97, (2, 16), generator=torch.Generator().manual_seed(0))
    written = model.generate(prompt, max_new_tokens=9, do_sample=False, pad_token_id=0)[0, 16:]
    assert [c[2] for c in seen[5:]] == written[:8].tolist()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_timed_steps_lie_evenly_over_the_context(cache):
    model = tiny("llama", "sdpa")
    seen = calls(model, cache=cache, repeats=1, warm_up=False, timed_steps=4)
    assert [c[:2] for c in seen] == [(16, 0), (1, 16), (1, 18), (1, 20), (1, 22)]
    assert measure_speed(model, **SIZES, cache=cache, timed_steps=2)["kv_bytes"] == kv_cache_bytes(model, 2, 24)
    assert calls(model, cache=cache, repeats=1, warm_up=False, timed_steps=7) == calls(
        model, cache=cache, repeats=1, warm_up=False
    )
    contexts = [start + k for start, steps in speed_module._stretches(2048, 2048, 30) for k in range(steps)]
    assert len(contexts) == 32 and sum(contexts) / 32 == 2048 + 2047 / 2


@pytest.mark.parametrize("warm_up", [True, False])
def test_positions_under_a_graph(monkeypatch, warm_up):
    """All of the CUDA-graph path but the graph: what is captured once must find the cache in the right state."""

    def graph(step, cache, position, device):
        for _ in range(3):
            speed_module._seek(cache, position)
            step(cache)
        speed_module._seek(cache, position)
        return step

    monkeypatch.setattr(speed_module, "_graph", graph)
    monkeypatch.setattr(speed_module, "check_decoding", lambda *arguments: None)
    settings = dict(cache="static", decoding="graph", repeats=2, warm_up=warm_up)
    seen = calls(tiny("llama", "sdpa"), **settings)
    first, ready = (16 if warm_up else 1, 0), [(1, 16)] * 3 + [(1, 16), (1, 17), (1, 18)]
    assert [c[:2] for c in seen] == [first, *ready] + 2 * ([(16, 0)] + [(1, 16 + k) for k in range(8)])
    assert seen[7:16] == seen[16:]  # the second repeat generates the same tokens
    assert [c[2] for c in seen[16:]] == [c[2] for c in calls(tiny("llama", "sdpa"), repeats=1)[-9:]]
    seen = calls(tiny("llama", "sdpa"), **settings, timed_steps=4)
    assert [c[:2] for c in seen[7:12]] == [(16, 0), (1, 16), (1, 18), (1, 20), (1, 22)]
    assert compare_speed(tiny("llama"), PLANS, 2, **SIZES, cache="static", decoding="graph")["speedup"].notna().all()


@pytest.mark.slow
def test_compiled_on_the_cpu():
    model = tiny("llama", "sdpa", num_hidden_layers=2)
    with dropped(model, DropPlan([1])):
        out = measure_speed(model, **SIZES, repeats=2, cache="static", decoding="compiled")
        assert out["kv_bytes"] == kv_cache_bytes(model, 2, 24) and len(out["all_decode_seconds"]) == 2


def test_refuses(monkeypatch):
    model = tiny("llama", "sdpa")
    monkeypatch.setenv("CXX", "no-such-compiler")
    for arguments, message in (
        ({"batch_size": 0}, "batch_size=0"),
        ({"timed_steps": -1}, "timed_steps=-1 must be at least 1"),
        ({"timed_steps": 0}, "timed_steps=0 must be at least 1, or None"),
        ({"cache": "paged"}, "cache='paged' dynamic or static"),
        ({"decoding": "compiled"}, "pass cache='static', not 'dynamic'"),
        ({"decoding": "fast", "cache": "static"}, "decoding='fast' is not one of 'eager', 'compiled'"),
        ({"decoding": True, "cache": "static"}, "decoding=True is not one of 'eager', 'compiled'"),
        ({"decoding": "graph", "cache": "static"}, "a CUDA graph and the model is on cpu"),
        ({"decoding": "compiled", "cache": "static"}, "needs a C\\+\\+ compiler"),
    ):
        with pytest.raises(ValueError, match=message):
            measure_speed(model, **arguments)
    with pytest.raises(ValueError, match="own windows forbid"):
        measure_speed(tiny("mistral"), **SIZES, timed_steps=2)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_in_the_mode_it_was_in(fails, monkeypatch):
    model = tiny("gpt2").train()
    model.transformer.h[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    seen = []

    def spy(*args, **kwargs):
        seen.append(any(module.training for module in model.modules()))
        if fails and len(seen) == 3:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    forward = model.forward
    monkeypatch.setattr(model, "forward", spy)
    if fails:
        with pytest.raises(KeyboardInterrupt):
            measure_speed(model, **SIZES)
    else:
        measure_speed(model, **SIZES)
    assert seen and not any(seen), "dropout is not timed"
    assert {name: module.training for name, module in model.named_modules()} == before


def test_rounds_take_turns():
    calls = []

    def run(name):
        return lambda turn: calls.append((name, turn)) or {"seconds": turn + len(name)}

    rows = in_rounds({"a": run("a"), "bb": run("bb")}, 3)
    assert calls == [(name, turn) for turn in range(3) for name in ("a", "bb")]
    assert rows.to_dict("list") == {
        "name": ["a", "bb"] * 3,
        "round": [0, 0, 1, 1, 2, 2],
        "seconds": [1, 2, 2, 3, 3, 4],
    }
    for runs, rounds in (({"a": run("a")}, 0), ({}, 1)):
        with pytest.raises(ValueError, match="at least 1 round and 1 run"):
            in_rounds(runs, rounds)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_decoding_alone_is_timed_at_the_same_contexts(cache):
    model = tiny("llama", "sdpa")
    seen = calls(model, cache=cache, repeats=1, warm_up=False, prefill=False)
    assert [c[:2] for c in seen] == [(1, 0)] + [(1, 16 + k) for k in range(8)]
    seen = calls(model, cache=cache, repeats=1, warm_up=False, prefill=False, timed_steps=4)
    assert [c[:2] for c in seen] == [(1, 0), (1, 16), (1, 18), (1, 20), (1, 22)]
    alone = measure_speed(model, **SIZES, cache=cache, prefill=False)
    assert math.isnan(alone["seconds"]) and math.isnan(alone["prefill_seconds"]) and alone["decode_seconds"] > 0
    with_prefill = measure_speed(model, **SIZES, cache=cache)
    for fact in ("kv_bytes", "decode_bytes", "weight_bytes", "generated_tokens"):
        assert alone[fact] == with_prefill[fact]


def test_prefills_in_some_rounds(monkeypatch):
    """Each is taken over by the rounds after it; what decoding takes is of each round."""
    told = []

    def measured(model, batch_size, **settings):
        told.append((settings["prefill"], settings["warm_up"]))
        prefill = 100.0 * len(told) if settings["prefill"] else float("nan")
        seconds = {"all_prefill_seconds": [prefill], "all_decode_seconds": [float(len(told))]}
        return dict.fromkeys(speed_module.MEASURED, 1) | seconds

    monkeypatch.setattr(speed_module, "measure_speed", measured)
    models = {
        "whole": partial(dropped, tiny("llama"), DropPlan()),
        "half": partial(dropped, tiny("llama"), DropPlan([1])),
    }
    rows = time_rounds(models, 5, prefills=2)
    assert told == [(turn in (0, 2), turn == 0) for turn in range(5) for _ in models]
    assert rows["prefill_seconds"].tolist() == [100, 200, 100, 200, 500, 600, 500, 600, 500, 600]
    assert rows["decode_seconds"].tolist() == list(range(1, 11))
    assert (rows["seconds"] == rows["prefill_seconds"] + rows["decode_seconds"]).all()
    told.clear()
    rows = time_rounds(models, 3, prefills=3)
    assert all(prefill for prefill, _ in told) and rows["prefill_seconds"].tolist() == [100, 200, 300, 400, 500, 600]
    for prefills, settings in ((0, {}), (6, {}), (2, {"cache": "static", "decoding": "compiled"})):
        with pytest.raises(ValueError, match=f"prefills={prefills} must be at least 1 and at most the 5 rounds"):
            time_rounds(models, 5, prefills, **settings)


def test_speedups_are_of_one_round():
    seconds = {"whole": [4.0, 8.0, 2.0], "half": [2.0, 2.0, 4.0]}
    rows = pd.DataFrame(
        [
            {"name": name, "round": k, "seconds": values[k], "decode_seconds": 1.0, "kv_bytes": 7}
            for k in range(3)
            for name, values in seconds.items()
        ]
    )
    table = speedups(rows)
    assert list(table.index) == ["whole", "half"] and table.index.name == "name"
    half = table.loc["half"]
    assert half[["speedup", "speedup_low", "speedup_high", "seconds", "spread"]].tolist() == [2.0, 0.5, 4.0, 2.0, 1.0]
    assert half[["decode_speedup", "decode_seconds", "kv_bytes"]].tolist() == [1, 1, 7]
    assert "tokens_per_second" not in table and "prefill_seconds" not in table
    assert speedups(rows, "half").loc["whole", "speedup"] == 0.5
    with pytest.raises(ValueError, match="no rows of the baseline 'none'; there are whole, half"):
        speedups(rows, "none")


def test_rows_of_any_models_in_turn():
    """A row per model and round; each model exists only while it is timed, and rounds of compiled ones come at once."""
    model, events = tiny("llama"), []

    @contextmanager
    def applied(name, plan):
        events.append(name)
        with dropped(model, plan):
            yield model
        events.append("restored")

    models = {"whole": partial(applied, "whole", DropPlan()), "less": partial(applied, "less", DropPlan([1, 2]))}
    rows = time_rounds(models, rounds=2, **SIZES)
    assert events == ["whole", "restored", "less", "restored"] * 2
    assert rows[["name", "round"]].to_numpy().tolist() == [["whole", 0], ["less", 0], ["whole", 1], ["less", 1]]
    assert (rows["seconds"] == rows["prefill_seconds"] + rows["decode_seconds"]).all() and (rows["seconds"] > 0).all()
    assert (rows["status"] == "ok").all() and (rows["largest_batch"] == 2).all()
    assert (
        rows["kv_bytes"].tolist() == [kv_cache_bytes(model, 2, 24), kv_cache_bytes(model, 2, 24, DropPlan([1, 2]))] * 2
    )
    less = apply_plan(tiny("llama"), DropPlan([1, 2]))
    assert rows["weight_bytes"][1] == measure_speed(less, **SIZES)["weight_bytes"] < rows["weight_bytes"][0]
    assert rows["decode_bytes"][1] == measure_speed(less, **SIZES)["decode_bytes"]
    assert (rows["generated_tokens"] == 16).all()


def test_what_fails_in_a_later_round_failed(monkeypatch):
    measure, calls = speed_module.measure_speed, []

    def scarce(model, batch_size=1, **settings):
        calls.append(batch_size)
        if len(calls) >= 4 and batch_size > 1:  # the fourth: the second model in the second round
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return measure(model, batch_size, **settings)

    monkeypatch.setattr(speed_module, "measure_speed", scarce)
    frame = compare_speed(tiny("llama"), {"Baseline": DropPlan(), "Attn-1": DropPlan([1])}, 2, **SIZES)
    assert calls == [2, 2, 2, 2, 1]
    assert frame["status"].tolist() == ["ok", "out of memory"] and frame["largest_batch"].tolist() == [2, 1]
    assert frame["seconds"].isna().tolist() == frame["kv_bytes"].isna().tolist() == [False, True]


def test_compare_speed_alternates():
    frame = compare_speed(
        tiny("llama"), {"Baseline": DropPlan(), "Attn-4": DropPlan([0, 1, 2, 3])}, prompt_len=8, new_tokens=2
    )
    assert frame["plan"].tolist() == ["Baseline", "Attn-4"] and frame["speedup"][0] == 1
    assert frame["kv_bytes"][1] * 5 == frame["kv_bytes"][0] and (frame["speedup_low"] <= frame["speedup_high"]).all()
    assert (frame["status"] == "ok").all() and (frame["largest_batch"] == 1).all()
    assert frame["decode_speedup"][0] == frame["prefill_speedup"][0] == 1 and (frame["spread"] > 0).all()


def short_of_memory(monkeypatch, fits, error) -> None:
    """measure_speed fails where fits(remaining attention layers, batch size) is not true."""
    measure = speed_module.measure_speed

    def scarce(model, batch_size=1, **settings):
        if not fits(kv_cache_bytes(model, 1, 1) // kv_cache_bytes(model, 1, 1, DropPlan(range(1, 5))), batch_size):
            raise error
        return measure(model, batch_size, **settings)

    monkeypatch.setattr(speed_module, "measure_speed", scarce)


PLANS = {"Baseline": DropPlan(), "Attn-4": DropPlan([1, 2, 3, 4]), "MLP-1": DropPlan(mlp=[2])}


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_out_of_memory_is_a_row_and_the_rest_goes_on(monkeypatch, error):
    short_of_memory(monkeypatch, lambda layers, batch: layers * batch <= 12, error)
    frame = compare_speed(tiny("llama"), PLANS, rounds=2, batch_size=8, prompt_len=8, new_tokens=2).set_index("plan")
    assert frame["status"].tolist() == ["out of memory", "ok", "out of memory"]
    assert frame["largest_batch"].tolist() == [2, 8, 2]
    assert frame.loc["Attn-4", "seconds"] > 0 and frame.loc["MLP-1", ["seconds", "spread", "kv_bytes"]].isna().all()
    assert frame["speedup"].isna().all()  # of what? the baseline did not fit
    short_of_memory(monkeypatch, lambda layers, batch: False, error)
    frame = compare_speed(tiny("llama"), PLANS, rounds=2, batch_size=8, prompt_len=8, new_tokens=2)
    assert (frame["largest_batch"] == 0).all() and frame["seconds"].isna().all()


def test_other_errors_are_not_taken_for_lack_of_memory(monkeypatch):
    short_of_memory(monkeypatch, lambda layers, batch: False, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        compare_speed(tiny("llama"), PLANS, rounds=1)


def test_a_model_without_weights_is_not_timed():
    with pytest.raises(ValueError, match="on the meta device, so it has shapes and no weights"):
        measure_speed(tiny("llama").to("meta"), prompt_len=2, new_tokens=2)


def test_the_clock_waits_for_any_accelerator(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    for name in ("cuda:1", "mps", "xpu", "cpu"):
        speed_module.synchronize(torch.device(name))
    assert [str(device) for device in waited] == ["cuda:1", "mps", "xpu"]
