"""Packed, shared evaluation equals one plain forward pass per sequence and plan."""

import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from decoders import tiny_decoder
from hypothesis import given
from hypothesis import strategies as st
from test_generation import Numbers
from tiny import FAMILIES, random_ids, tiny

from llmdrop import (
    Calibration,
    DropPlan,
    apply_plan,
    dropped,
    find_anatomy,
    load_model,
    perplexity,
    perplexity_sweep,
)
from llmdrop.evaluation import sweep
from llmdrop.evaluation.generation import generate, greedy_matches
from llmdrop.evaluation.sweep import Item, loglikelihoods, pack
from llmdrop.sublayers import head_logits

PLANS = [
    DropPlan(),
    DropPlan([4]),
    DropPlan([4, 1]),
    DropPlan([4, 1, 0]),
    DropPlan(mlp=[2]),
    DropPlan([1, 2], [2, 3]),
    DropPlan(range(5)),
    DropPlan([0, 4], [0, 4]),
]


def items_of(seed=0):
    """Questions with shared contexts, a shared few-shot prefix, repeats, one-token and long continuations."""
    shot, contexts = random_ids(1, 9, seed)[0].tolist(), random_ids(6, 7, seed + 1).tolist()
    items = []
    for k, context in enumerate(contexts):
        for j, n in enumerate((1, 3, 12)):
            continuation = random_ids(1, n, seed + 10 * k + j)[0].tolist()
            items.append(Item(tuple((shot if k % 2 else []) + context + continuation), n))
    return items + items[:2]


def reference(model, items):
    sums, greedy = [], []
    for item in items:
        with torch.inference_mode():
            logits = model(torch.tensor([item.tokens[:-1]]), use_cache=False).logits[0, -item.n_scored :].double()
        target = torch.tensor(item.tokens[-item.n_scored :])
        sums.append(logits.log_softmax(-1).gather(1, target[:, None]).sum().item())
        greedy.append((logits.argmax(-1) == target).all().item())
    return np.array(sums), np.array(greedy)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_plain_forward_passes(family, attention):
    model, items = tiny(family, attention), items_of()
    sums, greedy = loglikelihoods(model, PLANS, items, row_tokens=40, progress=False)
    for k, plan in enumerate(PLANS):
        with dropped(model, plan):
            expected, best = reference(model, items)
        np.testing.assert_allclose(sums[k], expected, atol=1e-4)
        assert (greedy[k] == best).all()
    assert np.ptp(sums, axis=0).min() > 1e-3, "plans must differ, or this test shows nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "shares"), [("llama", True), ("gpt_oss", True), ("bloom", False), ("mamba2", False)])
def test_whether_texts_share_rows_does_not_depend_on_rounding(kind, shares, dtype):
    model = tiny_decoder(kind).to(dtype)
    with nullcontext() if shares else pytest.warns(UserWarning, match="cannot share rows"):
        sums, _ = loglikelihoods(model, [DropPlan()], [Item((5, 6, 7), 1), Item((5, 6, 8), 1)], progress=False)
    logp = model(torch.tensor([[5, 6]]), use_cache=False).logits[0, -1].float().log_softmax(-1)
    np.testing.assert_allclose(sums[0], [logp[7].item(), logp[8].item()], atol=0.1 if dtype.itemsize == 2 else 1e-4)


def test_real_weights_in_16_bits_share_rows():
    """Whose predictions on made-up text rounding alone moves by more than their own size."""
    model, tokenizer = load_model("smollm2-135m", torch.bfloat16, "cpu")
    items = [Item(tuple(tokenizer(text)["input_ids"]), 1) for text in ("The sky is blue", "The sky is clear")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loglikelihoods(model, [DropPlan()], items, progress=False)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rotary_settings_that_change_with_length_are_those_of_each_text(kind):
    rope = {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": 16, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0, 8.0, 16.0, 32.0]}
    settings = {"rope_parameters": rope, "max_position_embeddings": 64 if kind == "longrope" else 16}
    if kind == "longrope":
        settings["original_max_position_embeddings"] = 16
    model = tiny_decoder("phi3" if kind == "longrope" else "llama", **settings)
    items = [Item(tuple(random_ids(1, n, n)[0].tolist()), 4) for n in (12, 40, 14, 30)]
    sums, _ = loglikelihoods(model, [DropPlan()], items, progress=False)
    for k, item in enumerate(items):
        ids = torch.tensor([item.tokens])
        with torch.no_grad():
            logp = model(ids[:, :-1], use_cache=False).logits[0, -4:].log_softmax(-1)
        expected = logp.gather(-1, ids[0, -4:, None]).sum().item()
        assert sums[0, k] == pytest.approx(expected, abs=1e-4)


def test_on_a_model_that_is_already_dropped():
    model, items = tiny("qwen2"), items_of()
    apply_plan(model, DropPlan([0, 1], [1, 2]))
    sums, _ = loglikelihoods(model, [DropPlan(), DropPlan([3], [0])], items, progress=False)
    np.testing.assert_allclose(sums[0], reference(model, items)[0], atol=1e-4)
    np.testing.assert_allclose(sums[1], reference(apply_plan(model, DropPlan([3], [0])), items)[0], atol=1e-4)


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("gemma3", {"text_config": {"sliding_window": 24}}),
        ("gemma3_text", {"sliding_window": 24}),
        ("gpt_neo", {"window_size": 24}),
        ("llama4_text", {"attention_chunk_size": 24}),
    ],
)
def test_windows_and_chunks_longer_than_short_texts(kind, settings):
    model = tiny_decoder(kind, **settings)
    few_shot = [Item((*range(3, 13), *row), 4) for row in random_ids(6, 10).tolist()]
    one_long = [Item(tuple(random_ids(1, n, n)[0].tolist()), 4) for n in (60, 30)]  # beside which no other fits a row
    alike = [[Item(tuple(row), 4) for row in random_ids(3, n).tolist()] for n in (20, 60, 40)]
    for items in (few_shot, one_long, *alike):
        sums, _ = loglikelihoods(model, [DropPlan()], items, progress=False)
        np.testing.assert_allclose(sums[0], reference(model, items)[0], atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cap_on_logits_is_the_models_own_in_every_type(dtype):
    model = tiny_decoder("gemma2", final_logit_softcapping=30.0).to(dtype)
    rows = model.get_output_embeddings().weight
    with torch.no_grad():
        rows *= 2 / 32**0.5 / rows.std()  # so that a cap changes what is random by less than the rounding of 16 bits
        model.model.norm.weight.zero_()
        hidden = rows[:5].clone()  # of the largest logits there are
        hidden_of_unit = hidden.float() / hidden.float().square().mean(-1, keepdim=True).sqrt()
        plain = hidden_of_unit @ rows.float().T
        logits = head_logits(model, find_anatomy(model), hidden)
    assert plain.max() > 11
    torch.testing.assert_close(logits, 30 * (plain / 30).tanh(), atol=0.3, rtol=0)


sequences = st.tuples(st.lists(st.integers(0, 2), min_size=2, max_size=8), st.integers(1, 7))


@given(st.lists(sequences, min_size=1, max_size=12), st.integers(4, 30))
def test_rows_hold_every_item_once_and_share_every_prefix(sequences, row_tokens):
    items = [Item(tuple(tokens), min(n, len(tokens) - 1)) for tokens, n in sequences]
    rows, seen = list(pack(items, row_tokens)), []
    for row in rows:
        for k, nodes, tokens in row.targets:
            path, node = [], nodes[-1]
            while node >= 0:
                path.append(row.ids[node])
                node = row.parent[node]
            assert tuple(path[::-1]) == items[k].tokens[:-1] and tuple(tokens) == items[k].tokens[-items[k].n_scored :]
            seen.append(k)
        prefixes = {items[k].tokens[:n] for k, _, _ in row.targets for n in range(1, len(items[k].tokens))}
        assert len(row.ids) == len(prefixes), "a prefix was computed twice"
    assert sorted(seen) == list(range(len(items)))


def test_few_shot_examples_are_computed_for_many_questions_at_once():
    shots = tuple(range(2, 302))
    items = [Item((*shots, *range(400 + 20 * k, 420 + 20 * k), 1), 1) for k in range(40)]
    lengths = [len(row.ids) for row in pack(items, 256, pairs_per_token=3456)]
    assert sum(lengths) == 300 + 40 * 20, "one row was enough"
    assert len(list(pack(items, 256))) == 3, "rows of twice the prefix, where attention is all that costs"
    apart = [Item(tuple(range(30 * k, 30 * k + 30)), 1) for k in range(40)]
    assert max(len(row.ids) for row in pack(apart, 256, pairs_per_token=3456)) <= 256, "nothing to share"


def test_a_context_longer_than_a_row_is_run_once():
    """A 25-shot context for all its answers, a 5-shot prefix for several questions; unrelated ones stay apart."""
    shots, other = tuple(range(900)), tuple(range(1000, 1900))
    answers = [Item((*shots, 950, k, k), 2) for k in range(4)]
    assert [len(row.ids) for row in pack(answers, 256, 3456)] == [900 + 1 + 4]
    questions = [Item((*shots, *range(2000 + 100 * q, 2050 + 100 * q), k), 1) for q in range(30) for k in range(4)]
    assert [len(row.ids) for row in pack(questions, 256, 3456)] == [900 + 30 * 50]
    assert [len(row.ids) for row in pack([*answers, Item((*other, 5), 1)], 256, 3456)] == [905, 900]


def test_one_long_context_is_tried_once():
    """Whether texts can share rows is tried by one text as long as it, in a row and alone; not by a second one."""
    model = tiny("llama", max_position_embeddings=512)
    context = random_ids(1, 300)[0].tolist()
    items = [Item((*context, *ending), 2) for ending in random_ids(3, 12, seed=1).tolist()]
    n_read = []
    model.get_input_embeddings().register_forward_hook(lambda module, ids, out: n_read.append(ids[0].numel()))
    loglikelihoods(model, [DropPlan()], items, progress=False)
    n_measured = 300 + 3 * 11
    assert sum(n_read) < n_measured + 3 * 312


def test_nothing_is_computed_twice():
    model, calls = tiny("llama"), []
    items = [Item((2, 3, 4, 5), 1)]
    loglikelihoods(model, [DropPlan()], items, progress=False)  # once per model it is tried whether texts can be packed
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda m, a, o, i=i: calls.append(i))
    loglikelihoods(model, [DropPlan(), DropPlan([4]), DropPlan([4, 3]), DropPlan([4])], items, progress=False)
    assert sorted(calls) == [0, 1, 2, 3, 3, 4, 4, 4]


def test_stored_numbers_change_only_with_the_version():
    """Raise `sweep.VERSION` where this fails for a good reason, and write down the numbers as they are then."""
    assert sweep.VERSION == 1
    sums, greedy = loglikelihoods(tiny("llama"), PLANS[:3], items_of()[:4], progress=False)
    expected = [
        [-4.155182, -13.884817, -58.477546, -5.037666],
        [-4.025013, -13.185115, -57.947025, -5.083620],
        [-4.353786, -14.577306, -55.126736, -5.476385],
    ]
    np.testing.assert_allclose(sums, expected, atol=1e-4)
    assert not greedy.any()


class Stopped(Exception):
    pass


CALLS = {
    "loglikelihoods": lambda model: loglikelihoods(model, [DropPlan()], [Item((1, 2, 3), 1)], progress=False),
    "perplexity": lambda model: perplexity(model, Calibration(random_ids(2, 9)), progress=False),
    "generate": lambda model: generate(model, Numbers(), ["5 6", "7"], 2),
    "greedy_matches": lambda model: greedy_matches(model, Numbers(), [DropPlan()], ["5 6"], [" 7"], progress=False),
}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_every_module_has_its_training_mode_again(name, fails):
    model = tiny("llama").train()
    model.model.layers[1].eval()  # frozen by whoever trains it
    before = {part: module.training for part, module in model.named_modules()}
    during = []

    def hook(module, args, output):
        during.append(any(part.training for part in model.modules()))
        if fails:
            raise Stopped

    model.model.layers[2].register_forward_hook(hook)
    with pytest.raises(Stopped) if fails else nullcontext():
        CALLS[name](model)
    assert during and not any(during)
    assert {part: module.training for part, module in model.named_modules()} == before


def test_plans_are_of_this_model():
    """Also where every index exists: a plan's scores were another model's."""
    model, items = tiny("llama"), [Item((1, 2, 3), 1)]
    for plan in (DropPlan([1], n_layers=12), DropPlan(n_layers=4)):
        with pytest.raises(ValueError, match=f"made for a model of {plan.n_layers} layers, this model has 5"):
            loglikelihoods(model, [DropPlan(), plan], items)
        with pytest.raises(ValueError, match="this model has 5"):
            perplexity_sweep(model, {"a": plan}, Calibration(random_ids(2, 9)))
        with pytest.raises(ValueError, match="this model has 5"):
            greedy_matches(model, Numbers(), [plan], ["5"], [" 6"])
    loglikelihoods(model, [DropPlan([1], n_layers=5)], items, progress=False)
    apply_plan(model, DropPlan([0], [0]))  # 4 layers are left of 5
    loglikelihoods(model, [DropPlan([1], n_layers=5)], items, progress=False)


def test_nothing_to_measure():
    model = tiny("llama")
    for call in (
        lambda: loglikelihoods(model, [], [Item((1, 2, 3), 1)]),
        lambda: perplexity_sweep(model, {}, Calibration(random_ids(2, 9))),
        lambda: greedy_matches(model, Numbers(), [], ["5"], [" 6"]),
    ):
        with pytest.raises(ValueError, match="no plans to measure"):
            call()
    with pytest.raises(ValueError, match="no items to score"):
        loglikelihoods(model, [DropPlan()], [])


def test_errors():
    with pytest.raises(ValueError, match="scores 3 of 3 tokens"):
        loglikelihoods(tiny("llama"), [DropPlan()], [Item((1, 2, 3), 3)])
    with pytest.raises(ValueError, match="out of range"):
        loglikelihoods(tiny("llama"), [DropPlan([9])], [Item((1, 2, 3), 1)])
    model = tiny("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        loglikelihoods(model, [DropPlan()], [Item((1, 2, 3), 1)])
