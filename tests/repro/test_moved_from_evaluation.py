"""Moved out of tests/evaluation verbatim, with what they test: statistics, drawing, and answers kept plan by plan."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from tiny import random_ids, tiny

from llmdrop import Calibration, DropPlan, Store, apply_plan, dropped
from llmdrop.compress.reconstruction import compensated, fit
from llmdrop.evaluation.generation import check_length, generate
from llmdrop.repro import _moved_from_evaluation as moved
from llmdrop.repro.answers import answers, greedy_matches

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
    import llmdrop.repro.answers as module

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


def test_wilson():
    assert moved.wilson(0, 10)[0] == 0 and moved.wilson(10, 10)[1] == 1
    low, high = moved.wilson(50, 100)
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-4)  # Wilson (1927)


def test_shares_and_their_figure(tmp_path):
    rows = pd.DataFrame({"plan": ["Baseline"] * 4 + ["MLP-8"] * 4, "tokens": [512, 512, 1024, 1024] * 2})
    rows["right"] = [1, 1, 1, 0, 0, 0, 0, 1]
    table = moved.shares(rows, "plan", "tokens")
    assert table["value"].tolist() == [100, 50, 0, 50] and table["n"].tolist() == [2] * 4
    assert (table["low"] <= table["value"]).all() and (table["value"] <= table["high"]).all()
    summed = moved.shares(pd.DataFrame({"plan": ["a"], "right": [12], "n": [48]}), "plan")
    assert summed["value"].item() == 25 and summed["n_right"].item() == 12
    tasks = [rows.assign(task="kinds", item=[0, 1] * 4, shots=rows["tokens"] / 512), rows.assign(task="retrieval")]
    table = moved.context_table(pd.concat(tasks), {"kinds": 12.5, "retrieval": 6.25}).set_index("method")
    assert table.loc["Baseline", ["1: 0.5k", "2: 1.0k", "avg", "found"]].tolist() == [100, 50, 75, 75]
    assert table.loc["Guessing", ["1: 0.5k", "avg", "found"]].tolist() == [12.5, 12.5, 6.25]
    assert table.loc["Baseline", "avg_stderr"] == pytest.approx(25)  # over two queries: 100 and 50
    fig, ax = plt.subplots()
    moved.plot_by_length(rows, ax, 12.5, "Right (%)")
    fig.savefig(tmp_path / "figure.png")
    assert [line.get_label() for line in ax.lines] == ["Baseline", "MLP-8", "Guessing"]
    plt.close("all")


def test_against_is_paired(tmp_path):
    random = np.random.default_rng(0)
    whole = random.integers(2, size=200)
    worse, same = np.where(random.random(200) < 0.3, 0, whole), np.roll(whole, 1)
    models = {"Baseline": whole, "Attn-8": worse, "Attn-8 refitted": same}
    frames = [pd.DataFrame({"model": m, "measure": "x", "item": range(200), "value": v}) for m, v in models.items()]
    table = moved.against(pd.concat(frames)).set_index("model")
    assert table.loc["Baseline", "lost"] == 0 and np.isnan(table.loc["Baseline", "p"])
    assert table.loc["Attn-8", "lost"] == pytest.approx((whole - worse).mean()) and table.loc["Attn-8", "p"] < 0.01
    assert table.loc["Attn-8 refitted", "lost"] == 0 and table.loc["Attn-8 refitted", "p"] == 1
    assert (table["low"] <= table["value"]).all() and (table["value"] <= table["high"]).all()
    assert (table["lost_low"] <= table["lost"]).all() and (table["lost"] <= table["lost_high"]).all()
    shown = moved.side_by_side(table.reset_index())
    assert shown["x"].str.endswith("*").tolist() == [False, True, False]
    fig, axes = plt.subplots(1, 2)
    moved.plot_measures(table.reset_index(), axes, {"x": 50})
    fig.savefig(tmp_path / "figure.png")
    assert axes[0].get_title() == "x" and not axes[1].axison
    plt.close("all")
