"""Batched answers are those of one prompt at a time, of the dropped model, and are kept plan by plan."""

import pytest
import torch
from tiny import random_ids, tiny

from llmdrop import Calibration, DropPlan, Store, apply_plan, dropped
from llmdrop.compensate import compensated, fit
from llmdrop.generation import _batches, answers, chat, check_length, generate, greedy_matches

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


class Digest(Numbers):  # the store asks what the tokenizer does with words
    def __call__(self, text, **_):
        return {"input_ids": [int(word) for word in text.split() if word.isdigit() and int(word) < 97]}


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


def test_generation_of_a_plan_is_the_dropped_models(tmp_path):
    model, tokenizer = tiny("llama", "sdpa"), Digest()
    found = answers(Store(tmp_path), model, tokenizer, PLANS, prompts(), 6)
    for name, plan in PLANS.items():
        alone = apply_plan(tiny("llama", "sdpa"), plan)
        out = alone.generate(torch.tensor([tokenizer(prompts()[0])["input_ids"]]), max_new_tokens=6, do_sample=False)
        row = found[(found["plan"] == name) & (found["item"] == 0)]
        assert row["answer"].item() == tokenizer.batch_decode(out[:, -6:])[0]
    assert found.groupby("plan")["answer"].first().nunique() == 3


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    import llmdrop.generation as module

    model, tokenizer, store, calls = tiny("llama", "sdpa"), Digest(), Store(tmp_path), []

    def stops(model, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(model, *arguments)

    monkeypatch.setattr(module, "generate", stops)
    with pytest.raises(KeyboardInterrupt):
        answers(store, model, tokenizer, PLANS, prompts()[:2], 4)
    answers(store, model, tokenizer, PLANS, prompts()[:2], 4)
    assert len(calls) == 4  # two plans were kept; the third ran again
    answers(store, model, tokenizer, PLANS, prompts()[:2], 5)
    assert len(calls) == 7  # another length is another measurement


def test_greedy_matches_is_what_generation_writes(tmp_path):
    model, tokenizer, store = tiny("llama", "sdpa"), Digest(), Store(tmp_path)
    for name, plan in PLANS.items():
        with dropped(model, plan):
            written = generate(model, tokenizer, prompts(), 2)
        targets = [f" {w}" if k % 2 else f" {w} 5 5" for k, w in enumerate(written)]
        found = greedy_matches(store, model, tokenizer, {name: plan}, prompts(), targets)
        with dropped(model, plan):
            longer = generate(model, tokenizer, prompts(), 4)
        expected = [int(k % 2 or w.endswith(" 5 5")) for k, w in enumerate(longer)]
        assert found["right"].tolist() == expected and 0 < sum(expected)


def test_refitted_plans(tmp_path):
    model, tokenizer, store = tiny("llama", "sdpa"), Digest(), Store(tmp_path)
    calibration, plan = Calibration(random_ids(8, 24)), PLANS["Attn-2"]
    found = answers(store, model, tokenizer, PLANS, prompts()[:3], 6, fitted=calibration)
    with compensated(model, plan, fit(model, plan, calibration)):
        expected = generate(model, tokenizer, prompts()[:3], 6)
    assert found.loc[found["plan"] == "Attn-2", "answer"].tolist() == expected
    right = greedy_matches(store, model, tokenizer, PLANS, prompts()[:3], expected, fitted=calibration)
    assert right.loc[right["plan"] == "Attn-2", "right"].tolist() == [1, 1, 1]


def test_nothing_is_cut_off(tmp_path):
    model, tokenizer = tiny("llama", "sdpa"), Digest()
    long = text(255, 4)
    assert len(generate(model, tokenizer, [long], 1)[0].split()) == 1
    for call in (
        lambda: generate(model, tokenizer, ["5 6", long], 2),
        lambda: answers(Store(tmp_path), model, tokenizer, PLANS, ["5 6", long], 2),
        lambda: greedy_matches(Store(tmp_path), model, tokenizer, PLANS, ["5 6", long], [" 7", " 7 8"]),
    ):
        with pytest.raises(ValueError, match="prompt 1 has 255 tokens, with 2 new ones more than the 256 positions"):
            call()
    with pytest.raises(ValueError, match="an empty prompt"):
        check_length(model, [(1,), ()], 1)
    with pytest.raises(ValueError, match="no prompts"):
        generate(model, tokenizer, [])
    assert not list(tmp_path.glob("generate/*.json"))


def test_answers_end_at_the_stop_string(smollm2):
    model, tokenizer = smollm2
    prompts = [chat(tokenizer, question) for question in ("What is the capital of France?", "Say hello.")]
    whole = generate(model, tokenizer, prompts, 8)
    cut = generate(model, tokenizer, prompts, 8, [whole[0][3:6]])
    assert cut[0] == whole[0][:3] and "<|im_end|>" not in whole[1]
    with pytest.raises(ValueError, match="no chat template"):
        chat(Numbers(), "Hello")
