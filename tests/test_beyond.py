"""Item-wise measurements pair up, intervals are right, choices are stored with what they cost."""

import numpy as np
import pandas as pd
import pytest
from tiny import random_ids, tiny

from llmdrop import Calibration, DropPlan, Store, dropped, perplexity
from llmdrop.beyond import (
    SCORED,
    SEARCHED,
    choose,
    losses,
    measure,
    mixture,
    paired,
    plot_choices,
    plot_losses,
    share_left,
)
from llmdrop.compensate import compensated, corrections, fit


def rows(values, where="text", n=1) -> pd.DataFrame:
    return pd.DataFrame({"where": where, "item": range(len(values)), "value": values, "n": n})


def test_share_left():
    random = np.random.default_rng(1)
    whole = random.normal(3, 1, 200)
    paper, mine = whole + random.normal(0.4, 0.1, 200), whole + random.normal(0.1, 0.1, 200)
    value, low, high = share_left(rows(mine), rows(whole), rows(paper), ["text"])
    assert low < value < high and value == pytest.approx(0.25, abs=0.03) and high - low < 0.12
    assert share_left(rows(paper), rows(whole), rows(paper), ["text"]) == (1, 1, 1)
    assert share_left(rows(whole), rows(whole), rows(paper), ["text"]) == (0, 0, 0)
    long = pd.concat([rows([1.0, 5.0], n=1), rows([1.0], "other", 3)])  # weighted by tokens, then the mean of the texts
    base, most = long.assign(value=0.0), long.assign(value=2.0)
    assert share_left(long, base, most, ["text", "other"])[0] == pytest.approx((6 / 4 + 1 / 2) / 2)


def test_paired():
    value, low, high = paired(rows([1.0, 0.0, 1.0, 1.0]), rows([0.0, 0.0, 1.0, 0.0]), "text")
    assert value == 0.5 and low <= value <= high and low >= 0


def test_measure_is_drop_and_measure(tmp_path, smollm2):
    _, tokenizer = smollm2
    model, store = tiny("llama", "sdpa"), Store(tmp_path)
    text, held_out = Calibration(random_ids(8, 24)), {"new": Calibration(random_ids(3, 20, seed=9))}
    plan, found = DropPlan(attn=[1, 3]), {}
    shared = {"refit": corrections(model, text)}.__getitem__
    for method in ("none", "refit", "refit all"):
        found["cosine", method, 2] = measure(
            store, model, tokenizer, plan, method, text, held_out, shared=shared if method == "refit" else None
        )
    with dropped(model, plan):
        expected = perplexity(model, held_out["new"], progress=False)["log_perplexity"]
    assert found["cosine", "none", 2]["value"].mean() == pytest.approx(expected, abs=1e-5)
    with compensated(model, plan, fit(model, plan, text)):
        expected = perplexity(model, held_out["new"], progress=False)["log_perplexity"]
    assert found["cosine", "refit", 2]["value"].mean() == pytest.approx(expected, abs=1e-4)
    whole = measure(store, model, tokenizer, DropPlan(), "none", text, held_out)
    table = losses(found, whole, held_out, [])
    assert list(table["compensation"]) == ["none", "refit", "refit all"] and table["left"][0] == 1
    again = measure(store, model, tokenizer, plan, "refit", text, held_out, shared=None)
    pd.testing.assert_frame_equal(again, found["cosine", "refit", 2])


def test_choose(tmp_path):
    model, store = tiny("llama"), Store(tmp_path)
    text, search = Calibration(random_ids(8, 24)), Calibration(random_ids(2, 12, seed=4))
    for how in [*SCORED, *SEARCHED, "random 1"]:
        choice = choose(store, model, how, text, search, 3)
        assert choice == choose(store, model, how, text, search, 3), how
        assert len(choice.plan(3).attn) == 3 and not choice.plan(3).mlp, how
        assert (choice.tokens > 0) == (not how.startswith(("random", "last"))), how
    with pytest.raises(ValueError, match="selector 'best' is not one of"):
        choose(store, model, "best", text, search, 3)


def test_mixture_takes_the_sources_in_turn(smollm2):
    _, tokenizer = smollm2
    both = mixture(["xsum", "wiki"], tokenizer, 2, 16)
    for k, name in enumerate(("xsum", "wiki")):
        assert both.input_ids[k::2].equal(mixture([name], tokenizer, 2, 16).input_ids)


def test_figures_are_drawn(tmp_path):
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2)
    base = {"choice": "cosine", "n": 8, "left": 1.0, "low": 1.0, "high": 1.0, "lost": 0.4}
    better = base | {"compensation": "refit", "left": 0.5, "low": 0.4}
    plot_losses(pd.DataFrame([base | {"compensation": "none"}, better]), axes)
    assert len(axes[0].lines) == 2 and axes[1].get_ylabel().startswith("Share")
    fig, axes = plt.subplots(1, 2)
    base = {"n": 8, "tokens": 0.0, "lost": 0.4, "refitted": 0.2, "speedup": 1.1}
    plot_choices(pd.DataFrame([base | {"selector": how} for how in ("random 0", "random 1", "cosine")]), axes)
    fig.savefig(tmp_path / "figure.png")
    assert len(axes[0].lines) == 6
    plt.close("all")
