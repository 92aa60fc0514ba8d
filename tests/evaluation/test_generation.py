"""Batched answers are those of one prompt at a time, of the dropped model; greedy matches are what it would write."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import byte_tokenizer, random_ids, tiny

from llmdrop import DropPlan, apply_plan, dropped
from llmdrop.evaluation import generation
from llmdrop.evaluation.generation import _batches, chat, check_length, generate, greedy_matches

PLANS = {"Baseline": DropPlan(), "Attn-2": DropPlan(attn=[0, 2]), "MLP-1": DropPlan(mlp=[3])}


class Numbers:
    """A tokenizer whose text is its token ids."""

    pad_token_id, eos_token_id, bos_token, chat_template = 0, None, "<s>", None

    def __call__(self, text, **_):
        return {"input_ids": [int(word) for word in text.split()]}

    def batch_decode(self, rows, **_):
        return [" ".join(map(str, row.tolist())) for row in rows]

    def get_vocab(self):
        return {str(k): k for k in range(97)}


def text(n: int, seed: int) -> str:
    return " ".join(str(token) for token in random_ids(1, n, seed)[0].tolist())


def prompts() -> list[str]:
    """Long beginnings in common, one of them the beginning of another, and prompts that share nothing."""
    first, more, other = text(100, 1), text(80, 2), text(90, 3)
    stretches = [(first, (4, 9, 6)), (f"{first} {more}", (3, 5)), (other, (4, 8)), ("", (3, 9, 5))]
    return [f"{start} {text(n, 10 * k + n)}" for k, (start, sizes) in enumerate(stretches) for n in sizes]


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_neox", "gemma2", "gpt2"])
def test_batches_give_what_each_prompt_gives_alone(family):
    model, tokenizer = tiny(family, "sdpa"), Numbers()
    for plan in (DropPlan(), DropPlan(attn=[0, 2]), DropPlan(attn=range(5))):
        with dropped(model, plan):
            alone = [generate(model, tokenizer, [prompt], 6)[0] for prompt in prompts()]
            assert generate(model, tokenizer, prompts(), 6) == alone, plan.label
            assert generate(model, tokenizer, prompts(), 6, batch_size=2) == alone, plan.label


def test_common_beginnings_are_run_apart():
    ids = [tuple(Numbers()(prompt)["input_ids"]) for prompt in prompts()]
    batches = list(_batches(ids, 2))
    assert [start for _, start in batches] == [100, 100, 180, 90, 0, 0]
    assert sorted(k for batch, _ in batches for k in batch) == list(range(len(ids)))


@given(st.lists(st.integers(1, 300), min_size=1, max_size=12), st.integers(1, 5))
def test_a_long_group_leaves_the_others_their_batches(lengths, batch_size):
    """Every group fills its batches as if it were alone, whatever stands before it."""
    ids = []
    for k, length in enumerate(lengths):  # groups of 6 that share their first `length` tokens and nothing with others
        ids += [(*[k] * (100 + length), 90 + j) for j in range(6)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "CACHED", 600)
        for k, length in enumerate(lengths):
            own = [batch for batch, _ in _batches(ids, batch_size) if batch[0] // 6 == k]
            fits = max(1, min(batch_size, 600 // (101 + length)))
            assert [len(batch) for batch in own] == [fits] * (6 // fits) + [6 % fits] * (6 % fits > 0)


@given(st.lists(st.integers(2, 300), min_size=1, max_size=30), st.integers(1, 8))
def test_a_long_prompt_leaves_the_others_their_batches(lengths, batch_size):
    """In one group, too: only the batch that holds it is smaller."""
    ids = [(5,) * length for length in lengths]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "CACHED", 600)
        patch.setattr(generation, "SHARED", 1000)  # one group, whatever they share
        batches = [batch for batch, _ in _batches(ids, batch_size)]
    assert sorted(k for batch in batches for k in batch) == list(range(len(ids)))
    for batch, following in zip(batches, batches[1:], strict=False):
        assert len(batch) == 1 or len(batch) * max(lengths[k] for k in batch) <= 600
        full = (len(batch) + 1) * lengths[following[0]] > 600
        assert len(batch) == batch_size or full, "closed for no reason"


def test_generation_of_a_plan_is_the_dropped_models():
    model, tokenizer = tiny("llama", "sdpa"), Numbers()
    answers = []
    for plan in PLANS.values():
        alone = apply_plan(tiny("llama", "sdpa"), plan)
        out = alone.generate(torch.tensor([tokenizer(prompts()[0])["input_ids"]]), max_new_tokens=6, do_sample=False)
        with dropped(model, plan):
            answers.append(generate(model, tokenizer, prompts()[:1], 6)[0])
        assert answers[-1] == tokenizer.batch_decode(out[:, -6:])[0]
    assert len(set(answers)) == 3


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_greedy_matches_is_what_generation_writes(family):
    model, tokenizer = tiny(family, "sdpa"), Numbers()
    written = []
    for plan in PLANS.values():
        with dropped(model, plan):
            written.append(generate(model, tokenizer, prompts(), 4))
    for answers in written:  # of one plan, spoilt every other time
        targets = [f" {a}" if k % 2 else f" {' '.join(a.split()[:2])} 5 5" for k, a in enumerate(answers)]
        expected = [
            [int(f" {other}".startswith(target)) for other, target in zip(others, targets, strict=True)]
            for others in written
        ]
        assert greedy_matches(model, tokenizer, list(PLANS.values()), prompts(), targets, progress=False) == expected
        assert [int(k % 2) for k in range(len(targets))] in expected


def test_greedy_matches_of_a_windowed_model():
    from llmdrop.compress.windows import windowed

    model, tokenizer = tiny("llama", "sdpa"), Numbers()
    plans = list(PLANS.values())
    whole = [generate(model, tokenizer, [prompt], 4)[0] for prompt in prompts()]
    with windowed(model, [1, 3], window=4, sinks=2):
        for k, plan in enumerate(plans):
            with dropped(model, plan):
                written = [generate(model, tokenizer, [prompt], 4)[0] for prompt in prompts()]
            targets = [f" {answer}" for answer in written]
            assert greedy_matches(model, tokenizer, plans, prompts(), targets, progress=False)[k] == [1] * len(written)
            assert written != whole, "windows must matter, or this test shows nothing"
        others = greedy_matches(model, tokenizer, [DropPlan()], prompts(), [f" {answer}" for answer in whole])[0]
        assert 0 in others


def test_nothing_is_cut_off():
    model, tokenizer = tiny("llama", "sdpa"), Numbers()
    long = text(255, 4)
    assert len(generate(model, tokenizer, [long], 1)[0].split()) == 1
    plans = list(PLANS.values())
    for call in (
        lambda: generate(model, tokenizer, ["5 6", long], 2),
        lambda: greedy_matches(model, tokenizer, plans, ["5 6", long], [" 7", " 7 8"]),
    ):
        with pytest.raises(ValueError, match="prompt 1 has 255 tokens, with 2 new ones more than the 256 positions"):
            call()
    with pytest.raises(ValueError, match="an empty prompt"):
        check_length(model, [(1,), ()], 1)
    for call in (lambda: generate(model, tokenizer, []), lambda: greedy_matches(model, tokenizer, plans, [], [])):
        with pytest.raises(ValueError, match="no prompts"):
            call()
    with pytest.raises(ValueError, match="2 prompts and 1 targets"):
        greedy_matches(model, tokenizer, plans, ["5", "6"], [" 7"])
    with pytest.raises(ValueError, match="scores 0 of 2 tokens"):
        greedy_matches(model, tokenizer, plans, ["5 6"], [""])


def test_stored_answers_change_only_with_the_version():
    """Raise `generation.VERSION` where this fails for a good reason, and write down what is written then."""
    model, tokenizer = tiny("llama", "sdpa"), Numbers()
    assert generation.VERSION == 1
    assert generate(model, tokenizer, [text(9, 5), text(5, 6)], 6) == ["96 47 47 47 96 47", "91 91 91 91 91 91"]


def test_answers_end_at_the_stop_string(smollm2):
    model, tokenizer = smollm2
    prompts = [chat(tokenizer, question) for question in ("What is the capital of France?", "Say hello.")]
    whole = generate(model, tokenizer, prompts, 8)
    cut = generate(model, tokenizer, prompts, 8, [whole[0][3:6]])
    assert cut[0] == whole[0][:3] and "<|im_end|>" not in whole[1]
    with pytest.raises(ValueError, match="no chat template"):
        chat(Numbers(), "Hello")


def test_what_the_model_cannot_read_is_refused():
    model = tiny("llama")
    for use in (
        lambda m: generate(m, byte_tokenizer(), ["a \u00e9"], 2),
        lambda m: greedy_matches(m, byte_tokenizer(), [DropPlan()], ["a"], [" b"], progress=False),
    ):
        with pytest.raises(ValueError, match=r"token id \d+ is beyond the model's vocabulary of 97"):
            use(model)
        with pytest.raises(ValueError, match="on the meta device"):
            use(tiny("llama", vocab_size=257).to("meta"))
