"""Tables of contenders say what their rows say, paired with the paper's method; their figures show it."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from tiny import random_ids, tiny

from llmdrop import Calibration, DropPlan, dropped
from llmdrop.compress.healing import Healing
from llmdrop.compress.reconstruction import METHODS, Reconstruction
from llmdrop.compress.variant import Variant
from llmdrop.compress.windows import Windows
from llmdrop.repro import comparison_figures as figures
from llmdrop.repro import style
from llmdrop.repro.comparisons import (
    BASELINE,
    as_fast_as_timed,
    frontier,
    frontier_gain,
    leaderboard,
    leaderboard_to_print,
    losses,
    measured_speed,
    papers,
    percent,
    remaining_as_timed,
    stability,
    trade_offs,
)
from llmdrop.repro.selectors import Contender
from llmdrop.repro.statistics import against

TEXT = Calibration(random_ids(8, 24))
SPEED = {"prompt_len": 64, "new_tokens": 8}


def rows(values: dict[str, list], where="text", metric="nats", n=1) -> pd.DataFrame:
    """As from `quality`: {variant: values}."""
    frames = [
        pd.DataFrame(
            {"variant": name, "where": where, "metric": metric, "item": range(len(items)), "value": items, "n": n}
        )
        for name, items in values.items()
    ]
    return pd.concat(frames, ignore_index=True)


def plain(choice: str, n: int, layers: list[int] | None = None, passes: float = 1.0) -> Contender:
    return Contender(choice, "none", n, Variant(DropPlan(attn=range(n) if layers is None else layers)), passes)


COSINE = plain("cosine", 2, [1, 2])
WINDOWS = Contender("window 4", "as fast for 1", 2, Variant(windows=Windows((1, 2, 3), 4)))


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_losses_and_their_share_of_the_paper_s():
    other = plain("greedy", 2, [0, 3]).reconstructed(Reconstruction(TEXT))
    measured = pd.concat(
        [
            rows({BASELINE: [1.0, 1.0], COSINE.name: [3.0, 3.0], other.name: [2.0, 6.0]}, n=[1, 1]),
            rows({BASELINE: [0.0, 0.0], COSINE.name: [2.0, 2.0], other.name: [1.0, 0.5]}, "new", n=[1, 3]),
        ]
    )
    table = losses(measured, [COSINE, other])
    columns = [
        "choice",
        "setting",
        "n",
        "left",
        "low",
        "high",
        "lost_text",
        "lost_new",
        "lost",
        "lost_low",
        "lost_high",
    ]
    assert list(table.columns) == columns
    assert table.iloc[0].tolist() == ["cosine", "none", 2, 1, 1, 1, 2, 2, 2, 2, 2]
    shares = (1 + 5) / (2 + 2), (1 + 1.5) / (2 + 6)  # weighted by tokens, then the mean of the texts
    assert table["left"][1] == pytest.approx(np.mean(shares))
    assert (table["lost_text"][1], table["lost_new"][1]) == (3, 0.75) and table["lost"][1] == 1.875
    assert table["low"][1] <= table["left"][1] <= table["high"][1] and table["setting"][1] == "least squares"
    assert table["lost_low"][1] < table["lost"][1] < table["lost_high"][1]


def test_the_paper_s_method_must_be_there_at_every_n():
    assert papers([COSINE, WINDOWS]) == {2: COSINE}
    reconstructed = COSINE.reconstructed(Reconstruction(TEXT))
    healed = replace(COSINE, setting="healed", variant=replace(COSINE.variant, healing=Healing(TEXT)))
    assert papers([COSINE, reconstructed, healed]) == {2: COSINE}
    for absent in ([WINDOWS], [reconstructed], [healed], [COSINE, plain("greedy", 3)]):
        with pytest.raises(ValueError, match="nothing to compare with at n="):
            papers(absent)


def leaderboard_rows() -> tuple[pd.DataFrame, list[Contender]]:
    names = ["cosine", "KL greedy", "random 0", "random 1"]
    contenders = [plain(name, 8, passes=k) for k, name in enumerate(names)]
    reconstructed = contenders[1].reconstructed(Reconstruction(TEXT))
    values = {contender.name: [3.0, 5.0] for contender in contenders}
    values |= {BASELINE: [1.0, 2.0], contenders[1].name: [2.0, 3.5], reconstructed.name: [1.0, 2.0]}
    values["random 1: none, 8"] = [4.0, 6.0]
    return pd.concat([rows(values), rows(values, "new")]), [*contenders, reconstructed]


def test_leaderboard():
    measured, contenders = leaderboard_rows()
    table = leaderboard(measured, contenders)
    assert list(table["selector"]) == ["cosine", "KL greedy", "random 0", "random 1"]
    assert list(table["lost"]) == [2.5, 1.25, 2.5, 3.5] and list(table["against"]) == [0, -1.25, 0, 1]
    assert table["reconstructed"].isna().tolist() == [True, False, True, True] and table["reconstructed"][1] == 0
    assert list(table["passes"]) == [0, 1, 2, 3] and (table["overlap"] == 1).all()
    assert (table["lost_low"] <= table["lost"]).all() and (table["lost"] <= table["lost_high"]).all()
    printed = leaderboard_to_print(table).set_index("selector")
    assert list(printed.index) == ["KL greedy", "cosine", "random, 2 seeds"]
    assert list(printed["against_8"]) == ["less", "same", "more"]
    assert printed.loc["random, 2 seeds", "lost_8"] == 3 and printed.loc["random, 2 seeds", "passes"] == 2.5
    half_width = printed.loc["random, 2 seeds", "lost_8_high"] - 3
    assert half_width > 12.706 * 0.5, "Student's t of one degree of freedom times the standard error"
    columns = [f"{name}{ending}" for name in ("lost_8", "reconstructed_8") for ending in ("", "_low", "_high")]
    assert list(printed.columns) == [*columns[:3], "against_8", *columns[3:], "overlap", "passes"]


def test_overlap_is_with_the_paper_s_layers():
    contenders = [plain("cosine", 2, [1, 2]), plain("KL greedy", 2, [2, 4])]
    measured = rows({BASELINE: [0.0, 0], **{contender.name: [1.0, 2.0] for contender in contenders}})
    assert list(leaderboard(measured, contenders)["overlap"]) == [1, 0.5]


def test_stability():
    orders = {("cosine", "seed", k): order for k, order in enumerate(([0, 1, 2, 3], [1, 0, 2, 3], [0, 1, 2, 3]))}
    orders |= {("reverse order", "seed", k): [3, 2, 1, 0] for k in range(2)}
    table = stability(orders, 1).set_index("selector")
    assert table["pairs"]["cosine"] == 3 and table["overlap"]["cosine"] == pytest.approx(1 / 3)
    assert table["overlap_low"]["cosine"] == 0 and table["tau"]["cosine"] == pytest.approx((2 / 3 + 1 + 2 / 3) / 3)
    assert table["tau_low"]["cosine"] == pytest.approx(2 / 3) and table["tau"]["reverse order"] == 1
    _, axes = plt.subplots(1, 2)
    figures.plot_stability(table.reset_index(), axes, 0.25)
    assert [tick.get_text() for tick in axes[0].get_yticklabels()] == ["cosine", "reverse order"]


def trade_off_rows() -> pd.DataFrame:
    return pd.concat(
        [
            rows({BASELINE: [1.0, 2.0], COSINE.name: [2.0, 3.0], WINDOWS.name: [1.1, 2.1]}),
            rows({BASELINE: [1, 1, 1, 1], COSINE.name: [0, 0, 1, 0], WINDOWS.name: [1, 0, 1, 1]}, "facts", "match"),
            rows({BASELINE: [1, 1], COSINE.name: [1, 0], WINDOWS.name: [1, 1]}, "piqa", "acc"),
        ]
    )


def test_trade_offs_pair_questions_with_the_paper_s():
    model = tiny("llama")
    contenders = [COSINE, WINDOWS]
    measured = trade_off_rows()
    table = trade_offs(model, measured, contenders, [1, 16], **SPEED)
    assert table["left"].tolist() == pytest.approx([1, 0.1]) and table["windowed"].tolist() == [0, 3]
    assert table["attn"].tolist() == [2, 0] and table["plan"].tolist() == ["Attn-2", "3 windows of 4"]
    assert table["facts"].tolist() == [25, 75] and table["piqa"].tolist() == [50, 100]
    for b in (1, 16):
        expected = [contender.variant.predicted_speedup(model, batch_size=b, **SPEED) for contender in contenders]
        assert table[f"at_{b}"].tolist() == expected
    assert percent(measured, BASELINE, ["facts", "piqa"]) == [100, 100]

    _, axes = plt.subplots(1, 4)
    figures.plot_trade_offs(model, measured, table, contenders, {"facts": 64}, axes, **SPEED)
    drawn = [[container.lines[0] for container in ax.containers] for ax in axes]
    assert [list(line.get_ydata()) for line in drawn[2]] == [[100], [25], [75]]
    assert len(axes[3].get_lines()) == 2 and axes[1].get_ylabel().startswith("Share")
    assert [line.get_color() for line in drawn[2][1:]] == [line.get_color() for line in drawn[0]]


def test_frontier_counts_what_is_saved():
    model = tiny("llama")
    contenders = [
        COSINE,
        Contender("MLP Drop", "none", 2, Variant(DropPlan(mlp=[3]))).reconstructed(Reconstruction(TEXT)),
        Contender("window 7", "as fast for 1", 2, Variant(windows=Windows((0, 1), 7, 1))),
    ]
    lost = [[2.0, 3.0], [1.5, 2.5], [1.0, 2.1]]
    names = [contender.name for contender in contenders]
    measured = rows({BASELINE: [1.0, 2.0]} | dict(zip(names, lost, strict=True)))
    table = frontier(model, measured, contenders, **SPEED)
    assert list(table["method"]) == ["cosine", "MLP Drop: least squares", "window 7"]
    assert table["lost"].tolist() == pytest.approx([1.0, 0.5, 0.05])
    one = 2 * model.config.num_key_value_heads * model.config.head_dim * 2 / 1e6  # MB per token and layer, 16 bits
    assert table["kv"].tolist() == pytest.approx([one * 3 * 72, one * 5 * 72, one * (3 * 72 + 2 * 8)])
    for n_parameters, contender in zip(table["parameters"], contenders, strict=True):
        with dropped(model, contender.variant.plan):
            assert n_parameters == sum(p.numel() for p in model.parameters()) / 1e6
    assert (table["predicted_speedup"] > 1).all() and list(table["windowed"]) == [0, 0, 2]
    _, axes = plt.subplots(1, 2)
    figures.plot_frontier(table, axes, {"predicted_speedup": "Speedup", "kv": "KV"})
    assert len(axes[0].containers) == 3


def timed(seconds: dict[str, list[float]]) -> pd.DataFrame:
    """As from `timing`: {variant: seconds of every round}, a third of them for the prompt."""
    frames = []
    for name, values in seconds.items():
        frame = pd.DataFrame({"variant": name, "round": range(len(values)), "seconds": values, "kv_bytes": 2e6})
        frames.append(frame.assign(prefill_seconds=frame["seconds"] / 3, decode_seconds=2 * frame["seconds"] / 3))
    return pd.concat(frames, ignore_index=True)


def test_measured_speed_is_joined_in_the_order_of_the_contenders():
    rounds = timed({BASELINE: [4.0, 5.0, 4.5], WINDOWS.name: [2.0, 2.5, 2.2], COSINE.name: [4.0, 5.0, 4.5]})
    table = measured_speed(rounds, [COSINE, WINDOWS])
    assert table["speedup"].tolist() == pytest.approx([1, 2.015], rel=1e-3) and table["kv"].tolist() == [2, 2]
    assert table["prefill"].tolist() == pytest.approx(table["decode"].tolist())
    assert table["speedup_low"][1] < table["speedup"][1] < table["speedup_high"][1]


def test_remaining_as_timed():
    """Where the clock does not say what is as fast as the paper's method, the interval holds both answers."""
    drops = Contender("drops and windows", "as fast for 1", 2, Variant(DropPlan(attn=[1]), windows=Windows((2, 3), 4)))
    contenders = [COSINE, WINDOWS, drops]
    names = [contender.name for contender in contenders]
    lost = [[2.0, 2.2, 2.1], [0.2, 0.25, 0.2], [0.5, 0.6, 0.55]]
    whole = [1.0, 2.0, 1.5]
    measured = rows({BASELINE: whole} | {name: list(np.add(whole, row)) for name, row in zip(names, lost, strict=True)})
    seconds = {BASELINE: [2.0, 2.1, 2.05], COSINE.name: [1.0, 1.1, 1.05], drops.name: [0.9, 0.98, 0.95]}
    sure = timed(seconds | {WINDOWS.name: [1.2, 1.3, 1.25]})
    share = remaining_as_timed(measured, sure, contenders, [2])
    assert share.value == pytest.approx(0.55 / 2.1) and share.low < share.value < share.high < 0.35
    assert share.over == "samples and rounds"

    unsure = timed(seconds | {WINDOWS.name: [0.8, 1.3, 1.0]})
    assert as_fast_as_timed(unsure, contenders, 2) == [drops]
    assert as_fast_as_timed(unsure, contenders, 2, "high") == [WINDOWS, drops]
    both = remaining_as_timed(measured, unsure, contenders, [2])
    assert both.value == pytest.approx(0.65 / 6.3) and both.low < both.value and both.high == share.high

    perhaps = timed(seconds | {WINDOWS.name: [1.2, 1.3, 1.25], drops.name: [0.8, 1.3, 1.0]})
    share = remaining_as_timed(measured, perhaps, contenders, [2])
    assert share.value == pytest.approx(0.55 / 2.1) and share.high == 1
    slow = timed(seconds | {WINDOWS.name: [1.2, 1.3, 1.25], drops.name: [1.2, 1.3, 1.25]})
    share = remaining_as_timed(measured, slow, contenders, [2])
    assert (share.value, share.low, share.high) == (1, 1, 1)


def test_frontier_gain_is_that_of_the_size_with_the_least():
    contenders = []
    lost = {BASELINE: [1.0, 1.0]}
    for n, (paper, block, ours) in {2: (2.0, 3.0, 1.4), 3: (3.0, 2.5, 2.2)}.items():
        made_up = plain("KL greedy", n).reconstructed(Reconstruction(TEXT))
        for contender, nats in [(plain("cosine", n), paper), (plain("Block Drop", n), block), (made_up, ours)]:
            contenders.append(contender)
            lost[contender.name] = [nats, nats + 0.1]
    gain = frontier_gain(rows(lost), contenders)
    assert gain.value == pytest.approx(0.3) and gain.over == "samples"


def test_every_contender_has_a_look_of_its_own():
    looks = list(style.CONTENDERS.values())
    assert len({look["color"] for look in looks}) == len(looks)
    assert style.contender("cosine: none") == style.contender("cosine") == style.CONTENDERS["cosine"]
    assert style.contender("window 256: as fast for 16") == style.CONTENDERS["window 256"]
    assert style.contender("cosine")["color"] == style.method("Attention")["color"]
    table = pd.DataFrame({"choice": ["window 64"] * 2, "setting": ["as fast for 16", "as fast for 1"]})
    assert ["mfc" in look for look in figures.looks(table).values()] == [False, True]


@pytest.mark.parametrize("method", METHODS)
def test_reconstruction_by_least_squares_adds_no_tensors(method):
    model = tiny("llama")
    variant = Variant(DropPlan(attn=[1, 3]), Reconstruction(TEXT, method))
    with dropped(model, variant.plan):
        plain = {name: value.shape for name, value in model.state_dict().items()}
    with variant.applied(model):
        added = [name for name, value in model.state_dict().items() if plain.get(name) != value.shape]
    assert added == (["model.layers.0.mlp.down_proj.bias", "model.layers.2.mlp.down_proj.bias"] * (method == "mean"))


def test_figures_of_losses_and_of_the_leaderboard():
    _, axes = plt.subplots(1, 2)
    base = {"choice": "cosine", "n": 8, "left": 1.0, "low": 1.0, "high": 1.0}
    base |= {"lost": 0.4, "lost_low": 0.3, "lost_high": 0.5}
    better = base | {"setting": "least squares", "left": 0.5, "low": 0.4}
    figures.plot_losses(pd.DataFrame([base | {"setting": "none"}, better]), axes)
    assert axes[0].get_legend_handles_labels()[1] == ["cosine: none", "cosine: least squares"]
    measured, contenders = leaderboard_rows()
    _, axes = plt.subplots(1, 2)
    figures.plot_leaderboard(leaderboard(measured, contenders), axes)
    assert [tick.get_text() for tick in axes[0].get_yticklabels()] == ["KL greedy", "cosine", "random"]
    assert [bar.get_width() for bar in axes[1].patches] == [1, 0, 2.5]


def test_figure_of_training():
    _, ax = plt.subplots()
    figures.plot_training({8: [4.0, 2.0, 3.0, 3.0, 3.0, 9.0], 16: [5.0, 5.0, 5.0]}, ax, n_tokens=6000, color="C0")
    np.testing.assert_allclose(ax.get_lines()[0].get_xydata(), [[1, 4], [2, 3], [3, 3], [4, 3], [5, 3], [6, 4]])
    assert [text.get_text() for text in ax.texts] == ["8", "16"]


def test_figures_of_answers():
    right = {BASELINE: [1, 1, 1, 0], "a: none, 2": [1, 0, 0, 0], "a: none, 4": [0, 0, 0, 0]}
    right |= {"b, c: least squares, 4": [1, 1, 0, 0]}
    contenders = [plain("a", 2), plain("a", 4), plain("b, c", 4).reconstructed(Reconstruction(TEXT))]
    measured = pd.concat([rows(right, task, "acc") for task in "xy"]).astype({"value": float})
    table = against(measured.rename(columns={"variant": "model", "where": "measure"}))
    _, axes = plt.subplots(1, 2)
    methods = {}
    for contender in contenders:
        methods.setdefault(contender.method, {})[contender.name] = contender.n
    figures.plot_answers(table, methods, axes, apart=0.2, label="whole model")
    assert axes[0].get_legend_handles_labels()[1] == ["whole model", "a: none", "b, c: least squares"]
    np.testing.assert_allclose(axes[1].containers[0].lines[0].get_xydata(), [[1.9, 25], [3.9, 0]])

    _, axes = plt.subplots(1, 3)
    methods = {"Dropped": {"a: none, 2": 2, "a: none, 4": 4}, "Dropped, reconstructed": {contenders[2].name: 4}}
    figures.plot_answers(table, methods, axes, {"x": 50}, apart=0.6)
    assert axes[0].get_legend_handles_labels()[1] == ["Baseline", "Guessing", "Dropped", "Dropped, reconstructed"]
    np.testing.assert_allclose(axes[1].containers[1].lines[0].get_xydata(), [[4.3, 50]])
    assert not axes[2].axison
