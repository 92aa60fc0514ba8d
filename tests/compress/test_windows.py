"""A windowed layer sees what its window says, its cache holds no more, and what is measured is what was asked for."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_ids, tiny

from llmdrop import Calibration, DropPlan, apply_plan, dropped, predict_speed
from llmdrop.compress import windows
from llmdrop.compress.windows import WindowLayer, Windows, as_fast, score_windows, windowed
from llmdrop.evaluation.sweep import Item, loglikelihoods
from llmdrop.speed.measure import measure_speed


def reference(n: int, window: int, sinks: int) -> torch.Tensor:
    """[n, n]: which tokens each may see, pair by pair."""
    return torch.tensor([[k <= q and (q - k < window or k < sinks) for k in range(n)] for q in range(n)])


def with_mask(model, ids, layers, allowed):
    """Logits with this mask in these layers, by hand."""

    def put(module, args, kwargs):
        return args, kwargs | {"attention_mask": allowed[None, None]}

    handles = [model.model.layers[i].self_attn.register_forward_pre_hook(put, with_kwargs=True) for i in layers]
    try:
        return model(ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
@settings(max_examples=15, deadline=None)
@given(
    window=st.integers(1, 9),
    sinks=st.integers(0, 5),
    layers=st.sets(st.integers(0, 3), min_size=1),
    cuts=st.lists(st.integers(1, 23), max_size=4),
    block=st.sampled_from([1, 5, 12, 128]),
)
def test_cached_steps_of_any_size_equal_the_mask(window, sinks, layers, cuts, block):
    model, n = tiny("llama", "sdpa"), 24
    ids = random_ids(2, n)
    with patch.object(windows, "BLOCK", block), windowed(model, layers, window, sinks):
        whole, cache, parts = model(ids, use_cache=False).logits, None, []
        ends = [*sorted(set(cuts)), n]
        for start, end in zip([0, *ends], ends, strict=False):
            out = model(ids[:, start:end], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    torch.testing.assert_close(whole, with_mask(model, ids, layers, reference(n, window, sinks)))
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-4)
    for i, layer in enumerate(cache.layers):
        assert layer.keys.shape[-2] == (min(n, sinks + window - 1) if i in layers else n)
        assert layer.get_seq_length() == n


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt2", "opt", "gpt_neox", "olmo2"])
def test_every_family_with_full_attention(family, monkeypatch):
    """The same with a cache and without, and no block of queries meets keys that all of it cannot see."""
    model, sdpa, keys = tiny(family, "sdpa"), torch.nn.functional.scaled_dot_product_attention, []

    def spy(query, key, *args, **kwargs):
        keys.append(key.shape[2])
        return sdpa(query, key, *args, **kwargs)

    ids = random_ids(1, 20)
    plain = model(ids, use_cache=False).logits
    monkeypatch.setattr(windows, "BLOCK", 4)
    with windowed(model, [0, 2], 3, 1):
        with monkeypatch.context() as patched:
            patched.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
            masked = model(ids, use_cache=False).logits
        first = model(ids[:, :12], use_cache=True)
        rest = model(ids[:, 12:], past_key_values=first.past_key_values, use_cache=True)
    one = [4, 7, 7, 7, 7]  # of a windowed layer: the block's own 4, the 2 before them, the sink
    assert keys == [*one, 20, *one, *[20] * (len(model(ids, output_hidden_states=True).hidden_states) - 4)]
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), masked, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(masked[:, :3], plain[:, :3])  # nothing is hidden from the first three
    assert not torch.allclose(masked[:, 8:], plain[:, 8:])
    torch.testing.assert_close(model(ids, use_cache=False).logits, plain)  # restored


@torch.no_grad()
def test_eager_attention_gives_the_same():
    one, two = tiny("llama", "sdpa"), tiny("llama", "eager")
    ids = random_ids(2, 20)
    with windowed(one, [1, 3], 4, 2), windowed(two, [1, 3], 4, 2):
        torch.testing.assert_close(one(ids).logits, two(ids).logits, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_window_of_the_whole_text_changes_nothing():
    model = tiny("llama", "sdpa")
    ids = random_ids(2, 20)
    with windowed(model, range(5), 20, 0):
        assert torch.equal(model(ids).logits, model(ids, use_cache=False).logits)
        inside = model(ids).logits
    assert torch.equal(inside, model(ids).logits)


@torch.no_grad()
def test_generate_runs_and_beside_dropped_layers():
    model = tiny("llama", "sdpa")
    ids = random_ids(1, 10)
    how = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with dropped(model, DropPlan(attn=[1], mlp=[1, 2])), windowed(model, [0, 3], 3, 1):
        out = model.generate(ids, **how)
        for _ in range(12):  # without any cache
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert out.tolist() == ids.tolist()


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_without_a_cache_hides_nothing_else(attention, monkeypatch):
    monkeypatch.setattr(windows, "BLOCK", 5)
    model, ids = tiny("llama", attention), random_ids(1, 12)
    with windowed(model, [0, 2, 4], 3, 1):
        alone = model(ids, use_cache=False).logits
        for left, right in ((5, 0), (0, 4)):
            padded = torch.nn.functional.pad(ids, (left, right), value=1)
            mask = torch.nn.functional.pad(torch.ones_like(ids), (left, right))
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            out = model(padded, attention_mask=mask, position_ids=positions, use_cache=False).logits
            torch.testing.assert_close(out[:, left : left + 12], alone, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt2", "opt", "gpt_neox", "olmo2"])
def test_the_sweep_of_a_windowed_model(family):
    model, text = tiny(family, "sdpa"), Calibration(random_ids(5, 30))
    items = [Item(tuple(ids[: 12 + 3 * k]), 4) for k, ids in enumerate(text.input_ids.tolist() * 2)]
    items += [Item((*item.tokens[:-1], 7), 2) for item in items]  # what shares a context shares a row
    with windowed(model, [1, 3], 4, 2):
        sums = loglikelihoods(model, [DropPlan(), DropPlan(attn=[0])], items, progress=False)[0]
        for plan, found in zip([DropPlan(), DropPlan(attn=[0])], sums, strict=True):
            with dropped(model, plan):
                for item, total in zip(items, found, strict=True):
                    ids = torch.tensor([item.tokens])
                    logits = model(ids, use_cache=False).logits[0].log_softmax(-1)
                    each = logits[:-1].gather(-1, ids[0, 1:, None])[-item.n_scored :]
                    assert float(total) == pytest.approx(float(each.sum()), abs=1e-4)


@torch.no_grad()
def test_what_is_refused_says_why():
    model = tiny("llama", "sdpa")
    ids = random_ids(2, 12)
    with pytest.raises(ValueError, match="at least 1"), windowed(model, [0], 0):
        pass
    with pytest.raises(ValueError, match=r"no attention in layers \[1, 9\]"):
        with dropped(model, DropPlan(attn=[1])), windowed(model, [0, 1, 9]):
            pass
    with windowed(tiny("mistral"), []):
        pass  # nothing is asked of it
    with pytest.raises(ValueError, match="windows of its own"), windowed(tiny("mistral"), [0]):
        pass
    padded = torch.ones_like(ids)
    padded[0, :3] = 0
    with windowed(model, [0], 4, 1):
        with pytest.raises(ValueError, match="padded"):
            model(ids, attention_mask=padded, use_cache=True)
        cache = model(ids).past_key_values
        with pytest.raises(ValueError, match="cannot be cut back"):
            cache.crop(-2)
    filled = model(ids).past_key_values
    with windowed(model, [0], 4, 1), pytest.raises(ValueError, match="fresh dynamic cache"):
        model(ids[:, :1], past_key_values=filled)
    with pytest.raises(ValueError, match="longer ones"):
        score_windows(model, Calibration(ids), window=8, sinks=4)


@torch.no_grad()
def test_scores_are_one_minus_the_cosine_beyond_the_window():
    model = tiny("llama", "sdpa")
    ids = random_ids(3, 16)
    scores = score_windows(model, Calibration(ids), window=4, sinks=1, batch_size=2)
    assert len(scores) == 5 and all(0 < s < 2 for s in scores)
    seen = {}
    layer = model.model.layers[2]
    hooks = [layer.register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))]
    hooks.append(layer.self_attn.register_forward_hook(lambda m, args, out: seen.update(f=out[0])))
    model(ids)
    whole = seen["x"] + seen["f"]
    with windowed(model, [2], 4, 1):
        model(ids)
    for hook in hooks:
        hook.remove()
    similar = torch.cosine_similarity(whole.double(), (seen["x"] + seen["f"]).double(), dim=-1)[:, 5:]
    assert scores[2] == pytest.approx(1 - float(similar.mean()), rel=1e-4)
    apply_plan(model, DropPlan(attn=[1]))
    assert [i for i, s in enumerate(score_windows(model, Calibration(ids), 4, 1)) if s != s] == [1]


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("left, right", [(0, 7), (7, 0), (3, 9)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_scores_leave_padding_out(attention, left, right, batch_size):
    """Samples of 16, 12 and 9 tokens, padded to one length on either side, score as by themselves."""
    model = tiny("llama", attention)
    samples = [random_ids(1, n, seed=n) for n in (16, 12, 9)]
    alone = [score_windows(model, Calibration(ids), window=4, sinks=1) for ids in samples]
    counts = [ids.shape[1] - 5 for ids in samples]  # tokens after window + sinks
    expected = torch.tensor(counts, dtype=torch.double) @ torch.tensor(alone, dtype=torch.double) / sum(counts)
    ids, mask = [], []
    for sample in samples:
        short = 16 - sample.shape[1]
        around = (left + short, right) if left else (left, right + short)
        ids.append(torch.nn.functional.pad(sample, around, value=3))
        mask.append(torch.nn.functional.pad(torch.ones_like(sample), around))
    text = Calibration(torch.cat(ids), attention_mask=torch.cat(mask))
    scores = score_windows(model, text, window=4, sinks=1, batch_size=batch_size)
    assert scores == pytest.approx(expected.tolist(), rel=1e-4)
    with pytest.raises(ValueError, match="samples of 16 tokens show nothing of a window of 12 and 4 sinks"):
        score_windows(model, text, window=12, sinks=4)


def test_what_windows_are_called_and_keyed_by():
    narrow = Windows(range(3, 0, -1), window=256)
    assert narrow == Windows((1, 2, 3), 256, 4) and narrow.label == "3 windows of 256"
    assert narrow.key == {"layers": [1, 2, 3], "window": 256, "sinks": 4, "version": windows.VERSION}
    model, ids = tiny("llama", "sdpa"), random_ids(1, 20)
    with torch.no_grad():
        with windowed(model, [1, 3], 5, 2):
            expected = model(ids).logits
        with Windows((3, 1), 5, 2).applied(model):
            assert torch.equal(model(ids).logits, expected)


def test_as_fast_is_the_fewest_layers():
    model = tiny("llama", "sdpa")
    speed = {"batch_size": 64, "prompt_len": 4096, "new_tokens": 64}
    k = as_fast(model, 2, 16, 4, **speed)
    target = predict_speed(model, DropPlan(attn=[0, 1]), **speed).seconds
    assert predict_speed(model, windowed=k, window=20, **speed).seconds <= target * (1 + 1e-9)
    assert predict_speed(model, windowed=k - 1, window=20, **speed).seconds > target
    assert as_fast(model, 2, 16, 4, batch_size=1, prompt_len=16, new_tokens=1) is None


def test_predicted_bytes_of_windows():
    model = tiny("llama", "sdpa")
    some = predict_speed(model, windowed=3, window=10, batch_size=2, prompt_len=100, new_tokens=5)
    none = predict_speed(model, batch_size=2, prompt_len=100, new_tokens=5)
    one = none.kv_bytes / 5 / 105
    assert some.kv_bytes == pytest.approx(one * (2 * 105 + 3 * 10))
    assert none.bytes - some.bytes == pytest.approx(one * 3 * (90 + sum(range(91, 96))))
    assert some.weight_bytes == none.weight_bytes
    with pytest.raises(ValueError, match="windowed=6 of 5"):
        predict_speed(model, windowed=6, window=4)
    with pytest.raises(ValueError, match="window=0"):
        predict_speed(model, windowed=1)


def test_the_cache_layer_by_itself():
    layer = WindowLayer(window=3, sinks=1)
    for start, n in ((0, 2), (2, 4), (6, 1)):
        positions = torch.arange(start, start + n, dtype=torch.float)[None, None, :, None]
        before = layer.held()
        keys, _ = layer.update(positions, positions)
        assert keys.flatten().tolist() == [*before.tolist(), *range(start, start + n)]
        assert layer.keys.flatten().tolist() == layer.held().tolist()
    assert layer.held().tolist() == [0, 5, 6]
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.held().tolist() == []


@pytest.mark.parametrize("prefill", [True, False])
@pytest.mark.parametrize("prompt_len", [4, 30])  # shorter and longer than a window
def test_timing_skips_on_in_windows(prompt_len, prefill):
    model, seen = tiny("llama", "sdpa", num_hidden_layers=3), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["past_key_values"].get_seq_length(1)), with_kwargs=True
    )
    size = dict(prompt_len=prompt_len, new_tokens=32, repeats=1, warm_up=False)
    with windowed(model, [0, 1], 8, 2):
        every = measure_speed(model, **size)["kv_bytes"]
        del seen[:]
        assert measure_speed(model, **size, prefill=prefill, timed_steps=4)["kv_bytes"] == every
    assert seen == [0, *(prompt_len + 32 * k // 8 for k in (1, 3, 5, 7))]
