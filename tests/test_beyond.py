"""Item-wise measurements pair up, intervals are right, choices are stored with what they cost."""

import numpy as np
import pandas as pd
import pytest
from tiny import random_ids, tiny

from llmdrop import Calibration, DropPlan, Store, dropped, perplexity, plan_drop
from llmdrop.beyond import (
    COMPETING,
    SCORED,
    SEARCHED,
    WIDER,
    as_fast,
    choose,
    measure,
    measure_plain,
    mixture,
    plans_of,
)
from llmdrop.compensate import compensated, corrections, fit
from llmdrop.leaderboard import (
    added_tensors,
    leaderboard,
    losses,
    paired,
    plot_answers,
    plot_leaderboard,
    plot_lost,
    plot_stability,
    share_left,
    stability,
    wide,
)
from llmdrop.roofline import predict_speed
from llmdrop.selection import Choice
from llmdrop.tradeoffs import plot_pareto
from llmdrop.writing import against


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
    table = losses(found, whole, held_out)
    assert list(table["compensation"]) == ["none", "refit", "refit all"] and table["left"][0] == 1
    more = held_out | {"other": Calibration(random_ids(2, 20, seed=5))}
    again = measure(store, model, tokenizer, plan, "refit", text, more, shared=None)  # only the new text is measured
    pd.testing.assert_frame_equal(again[again["where"] == "new"], found["cosine", "refit", 2])
    assert len(list((tmp_path / "compensated").glob("*-refit-[no]*"))) == 2  # not those of "refit all"
    assert list(again["where"].unique()) == ["new", "other"]


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


def test_choose_among_all_sublayers(tmp_path):
    model, store = tiny("llama"), Store(tmp_path)
    text, search = Calibration(random_ids(8, 24)), Calibration(random_ids(2, 12, seed=4))
    seconds = {"attn": 1.0, "mlp": 1e-9}
    found = {
        how: choose(store, model, how, text, search, 2, seconds=seconds)
        for how in [*WIDER, "consecutive blocks", *COMPETING]
    }
    scores = store.score(model, text, gap=True)
    assert found["Block Drop"].plan(4) == plan_drop(scores, "block", 2)
    assert found["MLP Drop"].plan(2) == plan_drop(scores, "mlp", 2)
    assert found["Joint Drop"].plan(3) == plan_drop(scores, "joint", 3)
    assert found["consecutive blocks"].plan(4) == plan_drop(scores, "consecutive", 2)
    for how in COMPETING:
        assert len(found[how].order) == 2 and found[how].tokens > 0
        assert not how.endswith("per second") or not found[how].plan(2).mlp, "an MLP saves next to nothing here"
    with pytest.raises(ValueError, match="needs seconds"):
        choose(store, model, COMPETING[-1], text, search, 2)


def test_measure_plain_is_measure(tmp_path, smollm2):
    _, tokenizer = smollm2
    model, store = tiny("llama", "sdpa"), Store(tmp_path)
    held_out = {name: Calibration(random_ids(3, 20, seed=k)) for k, name in enumerate(("one", "two"))}
    plans = {"whole": DropPlan(), "some": DropPlan(attn=[1, 3]), "both": DropPlan([1], [2])}
    found = measure_plain(store, model, plans, held_out)
    for name, plan in plans.items():
        alone = measure(store, model, tokenizer, plan, "none", held_out["one"], held_out)
        assert list(found[name]["where"]) == list(alone["where"])
        np.testing.assert_allclose(found[name]["value"], alone["value"], atol=1e-5)


def test_plans_are_as_fast_as_without_attention_layers(tmp_path):
    model, store = tiny("llama"), Store(tmp_path)
    text, search = Calibration(random_ids(8, 24)), Calibration(random_ids(2, 12, seed=4))
    speed, selectors = {"prompt_len": 64, "new_tokens": 8}, ["cosine", "KL greedy", *WIDER, "consecutive blocks"]
    plans, passes = plans_of(store, model, [*selectors, COMPETING[0]], [1, 2], text, search, **speed)
    for (how, n), plan in plans.items():
        limit = predict_speed(model, DropPlan(attn=range(n)), **speed).seconds
        assert predict_speed(model, plan, **speed).seconds <= limit * (1 + 1e-9), (how, n)
        if how in ("cosine", "KL greedy"):
            assert len(plan.attn) == n and not plan.mlp
    assert passes["cosine"] == 1 and passes["KL greedy"] > 0
    assert plans["Block Drop", 2].blocks == plans["Block Drop", 2].attn
    with pytest.raises(ValueError, match="save less time than 4"):
        as_fast(model, Choice([("attn", 0)], 0), 4, **speed)


def test_leaderboard():
    whole, cosine, mine = (pd.concat([rows(values), rows(values, "new")]) for values in ([1, 2], [3, 5], [2, 3.5]))
    names = ("cosine", "ours", "random 0", "random 1")
    plans, plain = {(how, 8): DropPlan(attn=range(8)) for how in names}, {"whole": whole, ("ours", 8): mine}
    plain = {(how, 8): cosine for how in names} | plain
    table = leaderboard(plans, dict.fromkeys(names, 1.0), plain, {("ours", 8): whole}, ["text", "new"])
    each = table.set_index("selector")
    assert list(each["lost"][:2]) == [2.5, 1.25] and list(each["against"][:2]) == [0, -1.25]
    assert np.isnan(each["refitted"]["cosine"]) and each["refitted"]["ours"] == 0 and each["overlap"]["ours"] == 1
    assert (each["lost_low"] <= each["lost"]).all() and (each["lost"] <= each["lost_high"]).all()
    board = wide(table).set_index("selector")
    assert list(board.index) == ["ours", "cosine", "random, 2 seeds"]
    assert list(board["against_8"][:2]) == ["less", "same"]
    assert board["lost_8"]["random, 2 seeds"] == 2.5 and board["lost_8_stderr"]["random, 2 seeds"] == 0


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
    plot_lost(pd.DataFrame([base | {"compensation": "none"}, better]), axes)
    assert len(axes[0].lines) == 2 and axes[1].get_ylabel().startswith("Share")
    fig, axes = plt.subplots(1, 3)
    columns = [f"{name}{end}" for name in ("lost", "refitted") for end in ("", "_low", "_high")]
    base = {"n": 8, "passes": 1.0} | dict.fromkeys(columns, 0.4)
    names = ("random 0", "random 1", "cosine")
    plot_leaderboard(pd.DataFrame([base | {"selector": how, "n": n} for how in names for n in (8, 16)]), axes)
    fig.savefig(tmp_path / "figure.png")
    assert [tick.get_text() for tick in axes[0].get_yticklabels()] == ["cosine", "random"]
    fig, axes = plt.subplots(1, 2)
    plot_pareto(pd.DataFrame([base | {"method": how, "speedup": 1.1, "bytes": 3} for how in names]), axes,
                {"speedup": "Speedup", "bytes": "Bytes"})  # fmt: skip
    fig.savefig(tmp_path / "figure.png")
    assert len(axes[0].containers) == 3
    plt.close("all")


def test_stability(tmp_path):
    import matplotlib.pyplot as plt

    orders = {("cosine", "seed", k): order for k, order in enumerate(([0, 1, 2, 3], [1, 0, 2, 3], [0, 1, 2, 3]))}
    orders |= {("last first", "seed", k): [3, 2, 1, 0] for k in range(2)}
    table = stability(orders, 1).set_index("selector")
    assert table["pairs"]["cosine"] == 3 and table["overlap"]["cosine"] == pytest.approx(1 / 3)
    assert table["tau_low"]["cosine"] == pytest.approx(2 / 3) and table["tau"]["last first"] == 1
    fig, axes = plt.subplots(1, 2)
    plot_stability(table.reset_index(), axes, 0.25)
    fig.savefig(tmp_path / "figure.png")
    plt.close("all")


def test_a_refit_adds_no_tensors():
    text, plan = Calibration(random_ids(8, 24)), DropPlan(attn=[1, 3])
    with dropped(tiny("llama"), plan) as model:
        total = len(model.state_dict())
    assert added_tensors(tiny("llama"), plan, text) == ([], f"Attn-2: {total} tensors")


def test_answers_are_drawn_by_method_and_layers():
    import matplotlib.pyplot as plt

    right = {"Baseline": [1, 1, 1, 0], "a: none, 2": [1, 0, 0, 0], "a: none, 4": [0, 0, 0, 0]}
    right |= {"b, c: refit, 4": [1, 1, 0, 0]}
    parts = [rows(np.array(value, float), task).assign(model=name) for name, value in right.items() for task in "xy"]
    table = against(pd.concat(parts).rename(columns={"where": "measure"}))
    fig, axes = plt.subplots(1, 2)
    plot_answers(table, axes)
    assert axes[0].get_legend_handles_labels()[1] == ["whole model", "a: none", "b, c: refit"]
    line = axes[1].containers[0].lines[0]
    np.testing.assert_allclose(line.get_xydata(), [[1.9, 25], [3.9, 0]])
    plt.close(fig)
