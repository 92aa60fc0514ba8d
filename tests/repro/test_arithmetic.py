"""Written answers to school arithmetic are those the variant generates, judged by the number they give."""

import pandas as pd
import pytest
from tiny import byte_tokenizer, tiny

from llmdrop import DropPlan, Store, dropped
from llmdrop.compress.variant import Variant
from llmdrop.evaluation.generation import generate
from llmdrop.evaluation.questions import arithmetic, arithmetic_prompt, follows, number, right
from llmdrop.repro import arithmetic as module
from llmdrop.repro.arithmetic import solve

PROBLEMS = [("If 3 cars come to 2 cars, how many are there?", 5.0), ("What is 7 - 4?", 3.0)]


@pytest.mark.parametrize("prompt, stop", [("shots", ["\n"]), ("metamath", [])])
def test_solve_is_what_each_variant_generates(tmp_path, prompt, stop):
    model = tiny("llama", "sdpa", vocab_size=300, max_position_embeddings=1024)
    tokenizer = byte_tokenizer()
    plan = DropPlan(attn=[1, 3])
    variants = {"Baseline": Variant(), "Attn-2": Variant(plan)}
    rows = solve(model, tokenizer, variants, PROBLEMS, 6, prompt, store=Store(tmp_path))
    assert rows["variant"].tolist() == ["Baseline", "Baseline", "Attn-2", "Attn-2"]
    assert rows["question"].tolist() == [PROBLEMS[0][0], PROBLEMS[1][0]] * 2 and rows["expected"].tolist() == [5, 3] * 2
    prompts = [arithmetic_prompt(question, prompt) for question, _ in PROBLEMS]
    with dropped(model, plan):
        expected = generate(model, tokenizer, prompts, 6, stop)
    assert rows["answer"].tolist()[2:] == expected != rows["answer"].tolist()[:2]


def test_answers_are_judged(monkeypatch):
    written = ["2 + 3 = 5. The answer is 5.", "7 - 4 = 3", "no idea", "The answer is 4."]

    def answers(model, tokenizer, variants, prompts, *rest):
        return pd.DataFrame({"variant": ["a", "a", "b", "b"], "item": [0, 1, 0, 1], "answer": written})

    monkeypatch.setattr(module, "answers", answers)
    rows = solve(None, None, {"a": Variant(), "b": Variant()}, PROBLEMS)
    assert rows["right"].tolist() == [1, 1, 0, 0]
    assert rows["format"].tolist() == [1, 0, 0, 1]
    assert rows["unparsable"].tolist() == [0, 0, 1, 0]


def test_the_real_model_solves_some(smollm2, tmp_path):
    model, tokenizer = smollm2
    rows = solve(model, tokenizer, {"Baseline": Variant()}, arithmetic(6), 20, store=Store(tmp_path))
    for row in rows.itertuples():
        assert row.right == right(row.answer, row.expected) and row.format == follows(row.answer)
        assert row.unparsable == (number(row.answer) is None)
    assert 0 < rows["right"].sum() <= 6 and rows["format"].mean() > 0.5
