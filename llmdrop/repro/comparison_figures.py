"""Figures of the tables in `comparisons`: plot_*(table, axes) draw on axes that the caller made."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from torch import nn

from . import style
from .comparisons import BASELINE
from .figures import plain_log_ticks, plot_percent
from .selectors import Contender
from .statistics import items, wilson

MARKERS = "osv^"  # of what changes, in `plot_stability`
AT_A_TIME = (1, 2, 4, 8, 16, 32, 64)  # sequences


def looks(table: pd.DataFrame) -> dict[tuple[str, str], dict]:
    """{(choice, setting): label, color, marker} of every method of `losses`, in its order.

    The same in every figure. Hollow: windows at the second number of sequences for which they are as fast.
    """
    by_method: dict[tuple[str, str], dict] = {}
    for choice, setting in table[["choice", "setting"]].drop_duplicates().itertuples(index=False):
        look = style.contender(f"{choice}: {setting}") | {"label": f"{choice}: {setting}"}
        if any(look["color"] == other["color"] for other in by_method.values()):
            look["mfc"] = "white"
        by_method[choice, setting] = look
    return by_method


def plot_losses(table: pd.DataFrame, axes: Sequence[Axes]) -> None:
    """Nats lost, and the share left of the paper's loss, with 95 % intervals, against layers dropped; from `losses`.

    axes: two. A line a method; the dotted line is a third.
    """
    methods = looks(table)
    for k, ((choice, setting), look) in enumerate(methods.items()):
        part = table[(table["choice"] == choice) & (table["setting"] == setting)]
        beside = part["n"] + 0.25 * (k - (len(methods) - 1) / 2)  # or intervals would cover each other
        error = [part["lost"] - part["lost_low"], part["lost_high"] - part["lost"]]
        axes[0].errorbar(part["n"] if len(part) > 1 else beside, part["lost"], error, **look)
        error = [part["left"] - part["low"], part["high"] - part["left"]]
        axes[1].errorbar(beside, part["left"], error, linestyle="", **look)
    axes[1].axhline(1 / 3, color="black", lw=0.7, ls=":")
    for ax, label in zip(axes, ("Lost (nats per token)", "Share of the paper’s loss left"), strict=True):
        ax.set(xlabel="Dropped attention layers", ylabel=label, xticks=sorted(set(table["n"])))
        ax.set_ylim(0, 1.02 * ax.get_ylim()[1])


def plot_training(losses: Mapping[int, Sequence[float]], ax: Axes, n_tokens: int, color: str) -> None:
    """The training loss of healing, mean of five steps, against tokens: one line for each number of dropped layers.

    losses: {dropped layers: loss of every step}. n_tokens: of the whole training.
    """
    for n, steps in losses.items():
        thousands = n_tokens / 1000 * np.arange(1, len(steps) + 1) / len(steps)
        smooth = pd.Series(steps).rolling(5, min_periods=1).mean()
        ax.plot(thousands, smooth, lw=0.9, label="_", color=color)
        ax.annotate(str(n), (n_tokens / 1000, smooth.iloc[-1]), fontsize=5.5, va="center")
    ax.set(xlabel="Training (thousand tokens)", ylabel="Loss (nats)", ylim=(0, None))


def plot_leaderboard(table: pd.DataFrame, axes: Sequence[Axes]) -> None:
    """One row a selector, best at the smallest n on top: nats lost at each n with 95 % intervals, and what it cost.

    table: from `leaderboard`. axes: one for each n, and one for the cost. Filled: nothing makes up for the layers;
    hollow: reconstructed. Random seeds share a row.
    """
    table = table.assign(row=table["selector"].str.replace(r"^random .*", "random", regex=True))
    counts = sorted(set(table["n"]))
    smallest = table[table["n"] == counts[0]].groupby("row")
    names = list(smallest[["lost", "reconstructed"]].mean().min(axis=1).sort_values().index)
    series = {
        "lost": {"label": "as dropped", "color": "black"},
        "reconstructed": {"label": "reconstructed", "color": "black", "mfc": "white"},
    }
    for ax, n in zip(axes, counts, strict=False):
        for column, look in series.items():
            part = table[table["n"] == n].dropna(subset=column)
            error = [part[column] - part[f"{column}_low"], part[f"{column}_high"] - part[column]]
            ax.errorbar(part[column], part["row"].map(names.index), xerr=error, fmt="o", ms=3.5, lw=0.9, **look)
        ax.set(xscale="log", xlabel=f"Lost at {n} (nats)")
        plain_log_ticks(ax.xaxis)
    cost = table[table["n"] == counts[-1]].groupby("row")["passes"].mean().reindex(names)
    axes[-1].barh(range(len(names)), cost, height=0.6, color="#7F7F7F")
    axes[-1].set(xlabel="Cost (passes)")
    for ax in axes:
        ax.set(yticks=range(len(names)), yticklabels=names if ax is axes[0] else [], ylim=(len(names) - 0.5, -0.5))
        ax.grid(axis="y", lw=0.3)


def plot_stability(table: pd.DataFrame, axes: Sequence[Axes], chance: float) -> None:
    """Overlap and rank correlation (from `stability`), one row a selector, one marker a change, a line to the lowest.

    axes: two. chance: the overlap of random orders.
    """
    names = list(dict.fromkeys(table["selector"]))
    changes = list(dict.fromkeys(table["change"]))
    for ax, column, label in zip(axes, ("overlap", "tau"), ("Overlap", "Kendall’s τ"), strict=True):
        for k, change in enumerate(changes):
            part = table[table["change"] == change]
            y = part["selector"].map(names.index) + 0.16 * (k - (len(changes) - 1) / 2)
            to_lowest = [part[column] - part[f"{column}_low"], 0 * part[column]]
            ax.errorbar(part[column], y, xerr=to_lowest, fmt=MARKERS[k], ms=3.5, lw=0.7, color=f"C{k}", label=change)
        ax.set(xlabel=label, yticks=range(len(names)), yticklabels=[], xlim=(None, 1.02))
        ax.set_ylim(len(names) - 0.5, -0.5)
    axes[0].set_yticklabels(names)
    axes[0].axvline(chance, color="black", lw=0.7, ls=":")


def plot_trade_offs(
    model: nn.Module,
    rows: pd.DataFrame,
    table: pd.DataFrame,
    contenders: Sequence[Contender],
    context: Mapping[str, int],
    axes: Sequence[Axes],
    **speed,
) -> None:
    """Four panels: nats lost, the share left of the paper's loss, facts found, predicted speedup by sequences.

    rows: from `quality`; table: from `trade_offs`, of the same contenders. context: {set of questions: tokens of their
    context}. With 95 % intervals, of facts Wilson's. The last two panels show the smallest n, of several kinds of "as
    fast" the first. speed: settings of `predict_speed`.
    """
    plot_losses(table, axes[:2])
    for ax in axes[:2]:
        ax.set_xlabel("As fast as without n layers")
    n = int(table["n"].min())
    settings = list(dict.fromkeys(table["setting"]))[:2]  # that of the paper's method, and the first "as fast"
    whole = {"color": "0.6", "label": "whole model"}
    axes[2].errorbar(context.values(), *_facts(rows, BASELINE, context), lw=0.8, **whole)
    for contender in contenders:
        if contender.n != n or contender.setting not in settings:
            continue
        look = looks(table)[contender.choice, contender.setting]
        axes[2].errorbar(context.values(), *_facts(rows, contender.name, context), lw=0.8, **look)
        speedups = [contender.variant.predicted_speedup(model, **speed | {"batch_size": b}) for b in AT_A_TIME]
        axes[3].plot(AT_A_TIME, speedups, **look)
    axes[2].set(xlabel="Tokens of context", ylabel=f"Facts found (%), n = {n}", ylim=(-2, 102))
    axes[3].set(xscale="log", xlabel="Sequences at a time", ylabel=f"Predicted speedup, n = {n}")
    axes[3].set_xticks([1, 4, 16, 64], ["1", "4", "16", "64"])
    axes[3].minorticks_off()


def _facts(rows: pd.DataFrame, variant: str, where: Iterable[str]) -> tuple[list[float], list[list[float]]]:
    """(Percent right of each set of questions; how far Wilson's interval reaches below and above)."""
    shares = []
    for name in where:
        right = items(rows, variant, name)["value"]
        shares.append(wilson(right.sum(), len(right)).times(100))
    below = [share.value - share.low for share in shares]
    above = [share.high - share.value for share in shares]
    return [share.value for share in shares], [below, above]


def plot_frontier(table: pd.DataFrame, axes: Sequence[Axes], labels: Mapping[str, str]) -> None:
    """Nats lost against several costs: one line a method through its sizes, intervals, and the frontier in gray.

    table: from `frontier`, with the columns that are keys of labels, and perhaps <column>_low and _high. labels:
    {column: axis label}, one Axes each; columns whose name ends in "speedup" are better when larger, others smaller.
    """
    methods = list(dict.fromkeys(table["method"]))
    for ax, (column, label) in zip(axes, labels.items(), strict=True):
        best_first = table.dropna(subset=[column])
        best_first = best_first.sort_values([column, "lost"], ascending=[not column.endswith("speedup"), True])
        unbeaten = best_first[best_first["lost"] == best_first["lost"].cummin()]
        ax.step(unbeaten[column], unbeaten["lost"], where="post", color="0.75", lw=3, zorder=0)
        for method in methods:
            part = table[table["method"] == method].sort_values("lost")
            errors = {"yerr": [part["lost"] - part["lost_low"], part["lost_high"] - part["lost"]]}
            if f"{column}_low" in part:
                errors["xerr"] = [part[column] - part[f"{column}_low"], part[f"{column}_high"] - part[column]]
            ax.errorbar(part[column], part["lost"], **errors, lw=0.7, ms=3.5, label=method, **style.contender(method))
        ax.set(xlabel=label, yscale="log")
        plain_log_ticks(ax.yaxis)


def plot_answers(
    table: pd.DataFrame,
    methods: Mapping[str, Mapping[str, int]],
    axes: Iterable[Axes],
    chance: Mapping[str, float] | None = None,
    **look,
) -> None:
    """One panel a measure of `statistics.against`: percent against layers, a line a method, the whole model gray.

    methods: {label: {model: its layers}}. axes: at least one for each measure; the others are turned off. chance:
    percent by guessing, where a measure has that. look: of `plot_percent`.
    """
    axes = list(axes)
    measures = table.groupby("measure", sort=False)
    for ax in axes[measures.ngroups :]:
        ax.set_axis_off()
    for ax, (measure, rows) in zip(axes, measures, strict=False):
        lines = {}
        for label, layers in methods.items():
            part = rows[rows["model"].isin(layers)]
            lines[label] = part.assign(layers=part["model"].map(layers))
        plot_percent(ax, rows[rows["model"] == BASELINE].iloc[0], lines, **look)
        if measure in (chance or {}):
            ax.axhline(chance[measure], color="0.5", ls=":", lw=1, label="Guessing")
        ax.set_title(measure)
