"""Answers are read as people read them, and whatever cannot be read is wrong, never left out."""

import math

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmdrop import questions

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
    rounds, queries = questions.labelled("kinds", 10, 3)
    assert len(queries) == 10 and [len(examples) for examples in rounds] == [len(questions.KINDS)] * 3
    shown = {text for examples in rounds for text, _ in examples}
    assert not shown & {text for text, _ in queries}
    short, long = (questions.label_prompts(rounds, queries, shots)[0][0] for shots in (1, 3))
    shared = short[: -len(f"text: {queries[0][0]}\nkind:")]
    assert long.startswith(shared) and long.count("kind:") == 3 * len(questions.KINDS) + 1
    with pytest.raises(ValueError, match="there are kinds"):
        questions.labelled("cats", 10, 1)


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


def test_wilson():
    assert questions.wilson(0, 10)[0] == 0 and questions.wilson(10, 10)[1] == 1
    low, high = questions.wilson(50, 100)
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-4)  # Wilson (1927)


def test_shares_and_their_figure(tmp_path):
    rows = pd.DataFrame({"plan": ["Baseline"] * 4 + ["MLP-8"] * 4, "tokens": [512, 512, 1024, 1024] * 2})
    rows["right"] = [1, 1, 1, 0, 0, 0, 0, 1]
    table = questions.shares(rows, "plan", "tokens")
    assert table["value"].tolist() == [100, 50, 0, 50] and table["n"].tolist() == [2] * 4
    assert (table["low"] <= table["value"]).all() and (table["value"] <= table["high"]).all()
    summed = questions.shares(pd.DataFrame({"plan": ["a"], "right": [12], "n": [48]}), "plan")
    assert summed["value"].item() == 25 and summed["n_right"].item() == 12
    tasks = [rows.assign(task="kinds", item=[0, 1] * 4, shots=rows["tokens"] / 512), rows.assign(task="retrieval")]
    table = questions.context_table(pd.concat(tasks), {"kinds": 12.5, "retrieval": 6.25}).set_index("method")
    assert table.loc["Baseline", ["1: 0.5k", "2: 1.0k", "avg", "found"]].tolist() == [100, 50, 75, 75]
    assert table.loc["Guessing", ["1: 0.5k", "avg", "found"]].tolist() == [12.5, 12.5, 6.25]
    assert table.loc["Baseline", "avg_stderr"] == pytest.approx(25)  # over two queries: 100 and 50
    fig, ax = plt.subplots()
    questions.plot_by_length(rows, ax, 12.5, "Right (%)")
    fig.savefig(tmp_path / "figure.png")
    assert [line.get_label() for line in ax.lines] == ["Baseline", "MLP-8", "Guessing"]
    plt.close("all")
