"""Answers are read as people read them, and whatever cannot be read is wrong, never left out."""

import hashlib
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmdrop.evaluation import questions

words = st.text(st.characters(blacklist_categories=("Nd", "Cs"), blacklist_characters="#-"), max_size=40)
numbers = st.integers(-10_000, 1_000_000)


@given(words, numbers, st.booleans())
def test_the_number_after_the_answer_is_counts(before, value, commas):
    written = f"{value:,}" if commas else str(value)
    for text in (f"{before} 3 + 4 = 7. The answer is {written}.", f"{before} 12 #### {written}", f"{before} {written}"):
        assert questions.number(text) == value and questions.right(text, value), text
        assert not questions.right(text, value + 1)


@given(words)
def test_an_unparsable_answer_is_wrong(text):
    assert questions.number(text) is None
    assert not any(questions.right(text, value) for value in (0, 1, -1, math.nan))


@given(st.text(max_size=60))
def test_any_text_is_judged(text):
    assert questions.number(text) is None or questions.right(text, questions.number(text))
    assert questions.follows(text) in (True, False)


@pytest.mark.parametrize(
    "text, expected",
    [
        (" 3 + 2 = 5. The answer is 5.", True),
        ("The answer is: 18", True),
        ("so he has 18.\n#### 18", True),
        ("The answer is $18 apples.", True),
        ("The answer is 5. Then he had 7.", False),
        ("He has 5.", False),
        ("", False),
    ],
)
def test_follows_the_format(text, expected):
    assert questions.follows(text) is expected


def test_arithmetic_is_one_easy_step():
    problems = questions.arithmetic(20)
    assert len(set(problems)) == 20 and problems == questions.arithmetic(30)[:20]
    assert problems != questions.arithmetic(20, seed=1)
    assert 60 < len(questions.arithmetic(None)) < len(questions.arithmetic(None, largest=1000))
    prompt = questions.arithmetic_prompt(problems[0][0])
    assert prompt.endswith(f"Question: {problems[0][0]}\nAnswer:") and questions.right(prompt, 5)  # the last example's
    with pytest.raises(ValueError, match="there are .* such problems"):
        questions.arithmetic(100_000)


def test_labels_are_shown_before_they_are_asked():
    rounds, queries = questions.labeled("kinds", 10, 3)
    assert len(queries) == 10 and [len(examples) for examples in rounds] == [len(questions.KINDS)] * 3
    shown = {text for examples in rounds for text, _ in examples}
    assert not shown & {text for text, _ in queries}
    short, long = (questions.label_prompts(rounds, queries, shots)[0][0] for shots in (1, 3))
    shared = short[: -len(f"text: {queries[0][0]}\nkind:")]
    assert long.startswith(shared) and long.count("kind:") == 3 * len(questions.KINDS) + 1
    with pytest.raises(ValueError, match="there are kinds"):
        questions.labeled("cats", 10, 1)


def test_retrieval_fills_the_context(smollm2):
    _, tokenizer = smollm2
    for n_tokens in (512, 2048):
        prompts, targets = questions.retrieval(tokenizer, n_tokens, 8)
        sizes = [len(tokenizer(prompt)["input_ids"]) for prompt in prompts]
        assert len(prompts) == 8 and n_tokens - 48 <= min(sizes) <= max(sizes) <= n_tokens
        for prompt, target in zip(prompts, targets, strict=True):
            fact = prompt[prompt.rindex("The secret word of") :] + target + "."
            assert prompt.count(fact) == 1 and prompt.index(fact) < prompt.index("Question:")
    with pytest.raises(ValueError, match="at least 20 tokens for each"):
        questions.retrieval(tokenizer, 100, 16)


class Characters:
    """A tokenizer of single characters."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": list(text)}


def test_retrieval_works_for_every_seed_and_number_of_facts():
    """There were fewer words than names: 12 of 40 seeds had no word for one of the names."""
    names, words = questions.NAMES, questions.WORDS
    assert len(names) == len(set(names)) == len(words) == len(set(words))
    for n_facts in (16, len(names)):
        for seed in range(40):
            prompts, targets = questions.retrieval(Characters(), 12_000, n_facts, seed)
            assert len(set(targets)) == n_facts
            for prompt, target in zip(prompts, targets, strict=True):
                assert prompt[prompt.rindex("The secret word of") :] + target + "." in prompt
    with pytest.raises(ValueError, match="at most 64 facts"):
        questions.retrieval(Characters(), 12_000, len(names) + 1)


def test_prompts_stay_as_they_were():
    """What results stores hold was measured on these: digests from before there were as many words as names."""
    found = [questions.retrieval(Characters(), 3000, 16, seed) for seed in (0, 2)] + [questions.arithmetic(20)]
    digests = [hashlib.sha256(json.dumps(part).encode()).hexdigest()[:12] for part in found]
    assert digests == ["24bbc423044d", "895770586ec8", "4f472cfc0871"]
