"""A windowed layer sees what its window says, its cache holds no more, and what is measured is what was asked for."""

import json
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_ids, tiny

from llmdrop import (
    Calibration,
    DropPlan,
    Store,
    apply_plan,
    cuts,
    dropped,
    evaluate,
    perplexity,
    predict_speed,
    tradeoffs,
    windows,
)
from llmdrop.compensate import compensated, fit
from llmdrop.cuts import Cut, compare_speed, measure, order, percent
from llmdrop.questions import retrieval
from llmdrop.speed import measure_speed
from llmdrop.sweep import Item, loglikelihoods
from llmdrop.tradeoffs import frontier
from llmdrop.windows import WindowLayer, as_fast, score_windows, windowed


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


def test_measured_rows_are_stored_and_right(smollm2, tmp_path):
    model, tokenizer = smollm2
    store = Store(tmp_path)
    text = Calibration(torch.tensor([tokenizer("The river runs past the mill and the old bridge. " * 6)["input_ids"]]))
    asked = {"facts": retrieval(tokenizer, 256, 4)}
    rows = measure(store, model, tokenizer, Cut(), {"text": text}, asked)
    with torch.no_grad():
        loss = float(model(text.input_ids, labels=text.input_ids).loss)
    assert rows.query("where == 'text'")["value"].tolist() == pytest.approx([loss], rel=1e-4)
    narrow = Cut(layers=range(30), window=8, sinks=4)
    cut = measure(store, model, tokenizer, narrow, {"text": text}, asked)
    for found, window in ((rows, 300), (cut, 8)):  # by whole passes with the mask, and no cache
        right = []
        for prompt, target in zip(*asked["facts"], strict=True):
            before, after = (tokenizer(part)["input_ids"] for part in (prompt, target))
            ids = torch.tensor([before + after])
            with torch.no_grad():
                logits = with_mask(model, ids, range(30), reference(ids.shape[1], window, 4))
            right.append(float(logits[0, len(before) - 1 : -1].argmax(-1).tolist() == after))
        assert found.query("where == 'facts'")["value"].tolist() == right
    assert percent(rows, asked)[0] > percent(cut, asked)[0] == 0
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    assert measure(store, model, tokenizer, narrow, {"text": text}, asked).equals(cut)
    assert kept == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}


def test_lm_eval_of_a_windowed_model(smollm2, tmp_path):
    """Real questions: a window longer than they are changes nothing, a short one does; what is stored is the same."""
    model, tokenizer = smollm2
    results, answered, store = {}, {}, Store(tmp_path)
    for window in (None, 256, 4):
        cut = Cut(layers=range(30), window=window, sinks=2) if window else Cut()
        with cut.of(model):
            table = evaluate(model, tokenizer, ["piqa"], limit=12)
        results[window] = table[table["metric"].str.startswith("acc")].set_index("metric")["value"]
        rows = measure(store, model, tokenizer, cut, {}, tasks=["piqa"], limit=12)
        assert percent(rows, ["piqa", "facts"])[0] == pytest.approx(100 * results[window]["acc_norm"])
        answered[window] = rows["value"].tolist()
    assert results[256].equals(results[None]) and not results[4].equals(results[None])
    assert answered[256] == answered[None] and len(answered[4]) == 12


def test_order_and_speed_are_stored(tmp_path):
    model, store = tiny("llama", "sdpa"), Store(tmp_path)
    text = Calibration(random_ids(2, 16))
    scores = score_windows(model, text, 4, 1)
    assert order(store, model, text, 4, 1) == sorted(range(5), key=lambda i: scores[i])
    narrow = Cut(layers=[1, 2], window=4, sinks=1)  # 3 + 1 tokens stay
    three = [Cut(DropPlan(attn=[0])), narrow, Cut(DropPlan(attn=[3]))]
    table = compare_speed(store, model, three, rounds=2, batch_size=1, prompt_len=32, new_tokens=4)
    one = 2 * model.config.num_key_value_heads * model.config.head_dim * 4 / 1e6  # MB per token and layer
    assert table["kv"].tolist() == pytest.approx([one * 4 * 36, one * (3 * 36 + 2 * 4), one * 4 * 36])
    assert table.iloc[0].equals(table.iloc[2])  # of one shape, timed once
    assert (table[["speedup", "prefill", "decode"]] > 0).all(axis=None) and len(list(tmp_path.rglob("*.json"))) == 2


def rows(values, where="text") -> pd.DataFrame:
    return pd.DataFrame({"where": where, "item": range(len(values)), "value": values, "n": 1})


def test_cuts_as_fast():
    model, speed = tiny("llama"), {"prompt_len": 2048, "new_tokens": 256}
    found = cuts.as_fast(model, {4: [3, 1, 0, 4, 2]}, [1, 3], [64, 1], **speed)
    for (choice, how, n), cut in found.items():
        b = int(how.split()[-1])
        assert choice == "window 4" and cut.layers == [3, 1, 0, 4, 2][: len(cut.layers)] and cut.window == 4
        dropping = Cut(DropPlan(attn=range(n))).speedup(model, batch_size=b, **speed)
        assert cut.speedup(model, batch_size=b, **speed) >= dropping * (1 - 1e-9)
        fewer = Cut(layers=cut.layers[1:], window=4)
        assert fewer.speedup(model, batch_size=b, **speed) < dropping
    missing = {(b, n) for b in (64, 1) for n in (1, 3)} - {(int(how.split()[-1]), n) for _, how, n in found}
    assert ("window 4", "as fast for 64", 1) in found
    assert all(as_fast(model, n, 4, batch_size=b, **speed) is None for b, n in missing)


def test_table_pairs_questions_with_those_of_cosine():
    model, whole = tiny("llama"), rows([1.0, 2.0])
    models = {("cosine", "none", 2): Cut(DropPlan(attn=[1, 2])), ("window 4", "w", 2): Cut(layers=[1, 2, 3], window=4)}
    found = {
        ("cosine", "none", 2): pd.concat([rows([2.0, 3.0]), rows([0, 0, 1, 0], "facts"), rows([1, 0], "piqa")]),
        ("window 4", "w", 2): pd.concat([rows([1.1, 2.1]), rows([1, 0, 1, 1], "facts")]),
    }
    speed = {"prompt_len": 64, "new_tokens": 8}
    table = tradeoffs.table(model, models, found, whole, ["text"], ["facts"], ["piqa"], [1], **speed)
    assert table["left"].tolist() == pytest.approx([1, 0.1]) and table["windowed"].tolist() == [0, 3]
    assert table["facts"].tolist() == [25, 75] and table["more"].tolist() == [0, 50]
    assert table["more_stderr"][0] == 0 < table["more_stderr"][1] and table["piqa"][0] == 50
    assert table["piqa"].isna()[1]  # not asked
    assert table["at_1"][0] > 1


def test_frontier_counts_what_is_saved():
    model, speed = tiny("llama"), {"prompt_len": 64, "new_tokens": 8}
    models = {
        ("cosine", "none", 2): Cut(DropPlan(attn=[1, 2])),
        ("MLP Drop", "refit", 2): Cut(DropPlan(mlp=[3])),
        ("window 7", "as fast", 2): Cut(layers=[0, 1], window=7, sinks=1),
    }
    found = dict(zip(models, (rows([2.0, 3.0]), rows([1.5, 2.5]), rows([1.0, 2.1])), strict=True))
    table = frontier(model, models, found, rows([1.0, 2.0]), ["text"], **speed)
    assert list(table["method"]) == ["cosine", "MLP Drop: refit", "window 7"]
    assert table["lost"].tolist() == pytest.approx([1.0, 0.5, 0.05])
    one = 2 * model.config.num_key_value_heads * model.config.head_dim * 2 / 1e6  # MB per token and layer, 16 bits
    assert table["kv"].tolist() == pytest.approx([one * 3 * 72, one * 5 * 72, one * (3 * 72 + 2 * 8)])
    for row, cut in zip(table["parameters"], models.values(), strict=True):
        with dropped(model, cut.plan):
            assert row == sum(p.numel() for p in model.parameters()) / 1e6
    assert (table["predicted_speedup"] > 1).all() and list(table["windowed"]) == [0, 0, 2]


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


@pytest.mark.parametrize("prompt_len", [4, 30])  # shorter and longer than a window
def test_timing_skips_on_in_windows(prompt_len):
    model, seen = tiny("llama", "sdpa", num_hidden_layers=3), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["past_key_values"].get_seq_length(1)), with_kwargs=True
    )
    size = dict(prompt_len=prompt_len, new_tokens=32, repeats=1, warm_up=False)
    with windowed(model, [0, 1], 8, 2):
        every = measure_speed(model, **size)["kv_bytes"]
        del seen[:]
        assert measure_speed(model, **size, timed_steps=4)["kv_bytes"] == every
    assert seen == [0, *(prompt_len + 32 * k // 8 for k in (1, 3, 5, 7))]


def test_drops_and_windows_together(tmp_path):
    """As fast as asked, the best k of those tried, stored; measured with its refit and its windows both in place."""
    model, store = tiny("llama", "sdpa"), Store(tmp_path)
    text, search, long = (Calibration(random_ids(8, n, seed=n)) for n in (24, 12, 40))
    speed = {"prompt_len": 512, "new_tokens": 64}
    found = cuts.mixed(store, model, [2, 3], text, search, long, 5, 4, method="refit", **speed)
    assert list(found) == [("drops and windows", "as fast for 1", n) for n in (2, 3)]
    for (*_, n), cut in found.items():
        assert not set(cut.plan.attn) & set(cut.layers) and (cut.window, cut.method) == (4, "refit")
        assert cut.speedup(model, **speed) >= Cut(DropPlan(attn=range(n))).speedup(model, **speed) * (1 - 1e-9)
    for path in (tmp_path / "mixed").glob("*.json"):
        losses = list(json.loads(path.read_text())["value"].values())
        assert losses and losses[:-1] == sorted(losses[:-1], reverse=True)  # tried on only while it fell
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    assert cuts.mixed(store, model, [2, 3], text, search, long, 5, 4, method="refit", **speed) == found
    assert kept == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}

    cut = found["drops and windows", "as fast for 1", 3]
    changes = fit(model, cut.plan, text, "refit")
    assert cut.plan and cut.layers and changes
    measured = measure(store, model, None, cut, {"long": long}, fitted=text)["value"]
    with compensated(model, cut.plan, changes), windowed(model, cut.layers, 4):
        assert measured.mean() == pytest.approx(np.log(perplexity(model, long)["perplexity"]), rel=1e-4)
    with compensated(model, cut.plan, changes):
        assert measured.mean() != pytest.approx(np.log(perplexity(model, long)["perplexity"]), rel=1e-4)
    plain = cuts.mixed(store, model, [3], text, search, long, 5, 4, method="none", **speed)
    assert {cut.method for cut in plain.values()} == {"none"}
    with pytest.raises(ValueError, match="most=1 sublayers save less time than 5"):
        cuts.mixed(store, model, [5], text, search, long, 1, 4, method="none", **speed)
    with pytest.raises(ValueError, match="'refit' is fitted on text"):
        measure(store, model, None, cut, {"long": long})


def test_left_as_timed():
    rows = pd.DataFrame({
        "choice": ["cosine", "cosine", "windows", "drops", "drops"], "n": [8, 16, 8, 8, 16],
        "lost": [1.0, 2.0, 0.1, 0.2, 0.5], "speedup": [1.2, 1.6, 1.1, 1.2, 1.5],
    })  # fmt: skip
    assert tradeoffs.left_as_timed(rows, [8, 16]) == {8: 0.2, 16: 1.0}
