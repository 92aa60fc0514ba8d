"""Moved out of `evaluation` verbatim: statistics, plotting and `solve`, to be taken apart by `repro`'s rewrite."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import stats

from ..evaluation.questions import arithmetic_prompt, follows, number, right
from . import style
from .answers import answers
from .store import Store


def wilson(n_right: int, n: int) -> tuple[float, float]:
    """95 % interval of a share right, by Wilson's score."""
    interval = stats.binomtest(int(n_right), int(n)).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def shares(rows: pd.DataFrame, *by: str) -> pd.DataFrame:
    """Percent right with its 95 % interval, by the columns named: n_right, n, value, low, high.

    rows: one per answer, `right` 0 or 1 (or, of several answers at once, `right` of `n`).
    """
    n = rows["n"] if "n" in rows else 1
    table = rows.assign(n_right=rows["right"], n=n).groupby(list(by), sort=False)[["n_right", "n"]].sum().reset_index()
    table["value"] = 100 * table["n_right"] / table["n"]
    both = [wilson(*pair) for pair in table[["n_right", "n"]].itertuples(index=False)]
    return table.assign(low=[100 * low for low, _ in both], high=[100 * high for _, high in both])


def context_table(rows: pd.DataFrame, chance: Mapping[str, float]) -> pd.DataFrame:
    """Table 12: percent right by examples a label, their mean, and facts found; one row a plan, the last for guessing.

    rows: task ("retrieval" or the name of the labels), plan, item, tokens, right, and for labels shots. chance: percent
    by guessing, by task. Columns: method, "1: 0.3k" (examples a label: tokens) ..., avg with its error over queries,
    found with its error over facts, in the contexts that every plan was given.
    """
    labels, facts = rows[rows["task"] != "retrieval"], rows[rows["task"] == "retrieval"]
    tokens = labels.groupby("shots")["tokens"].first()
    wide = 100 * labels.groupby(["plan", "shots"], sort=False)["right"].mean().unstack()
    wide.columns = [f"{shots:.0f}: {n / 1000:.1f}k" for shots, n in tokens.items()]
    each = 100 * labels.groupby(["plan", "item"], sort=False)["right"].mean().unstack("plan")  # over examples a label
    table = wide.assign(avg=each.mean(), avg_stderr=each.sem())
    everyone = facts.groupby("tokens")["plan"].nunique() == len(table)
    found = shares(facts[facts["tokens"].isin(everyone[everyone].index)], "plan").set_index("plan")
    table["found"], table["found_stderr"] = found["value"], (found["high"] - found["low"]) / 3.92  # never 0 ± 0
    guess = dict.fromkeys([*wide, "avg"], chance[labels["task"].iloc[0]]) | {"found": chance["retrieval"]}
    return pd.concat([table, pd.DataFrame(guess, index=["Guessing"])]).rename_axis("method").reset_index()


def against(rows: pd.DataFrame, base: str = "Baseline", rounds: int = 2000) -> pd.DataFrame:
    """Mean of `value` per model and measure, and its difference to the base model's, paired by item.

    rows: model, measure, item, value. Returns model, measure, n, value, low, high, lost, lost_low, lost_high (95 %
    intervals of a bootstrap over items; low and high are Wilson's where every value is 0 or 1) and p: how often, were
    the two alike, a mean difference as large would come about by chance (signs of the differences drawn anew,
    two-sided; NaN for the base model).
    """
    random, found = np.random.default_rng(0), []
    for (measure, model), group in rows.groupby(["measure", "model"], sort=False):
        mine = group.set_index("item")["value"]
        theirs = rows[(rows["measure"] == measure) & (rows["model"] == base)].set_index("item")["value"]
        lost = (theirs - mine).to_numpy(float)
        pick = random.integers(len(mine), size=(rounds, len(mine)))
        low, high = np.quantile(mine.to_numpy(float)[pick].mean(1), [0.025, 0.975])
        if mine.isin([0, 1]).all():
            low, high = wilson(mine.sum(), len(mine))  # none right of 48 is not none for sure
        lost_low, lost_high = np.quantile(lost[pick].mean(1), [0.025, 0.975])
        signs = random.choice([-1.0, 1.0], size=(rounds, len(mine)))
        as_large = (np.abs((signs * lost).mean(1)) >= abs(lost.mean()) - 1e-12).sum()
        row = {"model": model, "measure": measure, "n": len(mine), "value": mine.mean(), "low": low, "high": high}
        row |= {"lost": lost.mean(), "lost_low": lost_low, "lost_high": lost_high}
        found.append(row | {"p": float("nan") if model == base else (1 + as_large) / (1 + rounds)})
    return pd.DataFrame(found)


def side_by_side(table: pd.DataFrame, digits: int = 0) -> pd.DataFrame:
    """`against` as a table, one row a model and one column a measure: "31 [22, 41] *" in percent, * where p < 0.05."""
    percent = 100 * table[["value", "low", "high"]]
    cells = [
        f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]{' *' * (p < 0.05)}"
        for (value, low, high), p in zip(percent.to_numpy(), table["p"], strict=True)
    ]
    wide = table.assign(cell=cells).pivot(index="model", columns="measure", values="cell")
    return wide.loc[table["model"].unique(), table["measure"].unique()].rename_axis(columns=None).reset_index()


def plot_by_length(rows: pd.DataFrame, ax, chance: float, ylabel: str) -> None:
    """Percent right against tokens of context, one line a plan; the more of a kind is dropped, the stronger its color.

    rows: plan ("Baseline", "Attention-8"), tokens, right. chance: percent right by guessing. Bands, 95 %: of the
    baseline and of the plans that drop most.
    """
    table = shares(rows, "plan", "tokens")
    dropped = table["plan"].str.extract(r"-(\d+)")[0].fillna("0").astype(int)
    for (n, plan), line in table.groupby([dropped, "plan"]):
        look, strength = style.method(plan), 1.0 if n == 0 else 0.3 + 0.7 * n / dropped.max()
        ax.plot(line["tokens"], line["value"], label=plan, alpha=strength, **look)
        if n in (0, dropped.max()):
            ax.fill_between(line["tokens"], line["low"], line["high"], color=look["color"], alpha=0.1, linewidth=0)
    ax.axhline(chance, label="Guessing", **style.METHODS["Random"] | {"marker": ""})
    ticks = sorted(set(rows["tokens"]))
    ax.set(xscale="log", xlabel="Tokens of context", ylabel=ylabel, ylim=(0, 102))
    ax.set_xticks(ticks, [f"{n / 1000:.1f}k" for n in ticks])
    ax.minorticks_off()


def plot_measures(table: pd.DataFrame, axes, chance: Mapping[str, float]) -> None:
    """One panel a measure: percent against attention layers dropped, plain and refitted, 95 % intervals; the baseline.

    table: as from `against`, models named "Baseline", "Attn-8", "Attn-8 refitted". chance: percent by guessing, where
    a measure has that.
    """
    axes = list(axes)
    for ax in axes[table["measure"].nunique() :]:
        ax.set_axis_off()
    for ax, (measure, rows) in zip(axes, table.groupby("measure", sort=False), strict=False):
        rest = rows[rows["model"] != "Baseline"]
        rest = rest.assign(layers=rest["model"].str.extract(r"-(\d+)")[0].astype(int))
        refitted = rest["model"].str.endswith("refitted")
        lines = {"Dropped": rest[~refitted], "Dropped, refitted": rest[refitted]}
        plot_percent(ax, rows[rows["model"] == "Baseline"].iloc[0], lines, apart=0.6)
        if measure in chance:
            ax.axhline(chance[measure], color="0.5", ls=":", lw=1, label="Guessing")
        ax.set(title=measure, ylim=(-2, 102), xlabel="Dropped layers")


def plot_percent(ax, base: pd.Series, lines: Mapping[str, pd.DataFrame], apart: float, label: str = "Baseline") -> None:
    """Percent against layers, a line a method with 95 % intervals, side by side; the base model's, and its interval.

    base: a row of `against`, lines: rows of it with `layers`, both by name. apart: layers between two methods' markers.
    """
    look = style.METHODS["Baseline"]
    value, low, high = (100 * base[name] for name in ("value", "low", "high"))
    ax.axhline(value, color=look["color"], linestyle=look["linestyle"], lw=0.8, label=label)
    ax.axhspan(low, high, color=look["color"], alpha=0.07, linewidth=0)
    for k, (name, rows) in enumerate(lines.items()):
        x = rows["layers"] + apart * (k - (len(lines) - 1) / 2)
        error = [100 * (rows["value"] - rows["low"]), 100 * (rows["high"] - rows["value"])]
        how = {"fmt": "osv^"[k % 4] + "-", "color": ("#0072B2", "#E69F00", "#009E73", "#CC79A7")[k % 4]}
        ax.errorbar(x, 100 * rows["value"], error, capsize=1.5, ms=3, label=name, **how)
    ax.set_xticks(sorted({n for rows in lines.values() for n in rows["layers"]}))


def solve(
    store: Store, model, tokenizer, plans: Mapping, problems: Sequence[tuple[str, float]], max_new_tokens: int = 20,
    prompt: str = "shots", **how
) -> pd.DataFrame:  # fmt: skip
    """Every plan's written answer to every problem, and what it is worth.

    prompt: as in `arithmetic_prompt`; after worked examples an answer is one line. how: further settings of
    `generation.answers`. Returns plan, item, question, expected, answer, and, each 0 or 1: right, format (the asked
    one), unparsable (no number in it: then it is wrong).
    """
    prompts, stop = [arithmetic_prompt(question, prompt) for question, _ in problems], ["\n"] * (prompt == "shots")
    rows = answers(store, model, tokenizer, plans, prompts, max_new_tokens, stop, name="arithmetic", **how)
    rows["question"], rows["expected"] = zip(*(problems[k] for k in rows["item"]), strict=True)
    rows["right"] = [int(right(*pair)) for pair in zip(rows["answer"], rows["expected"], strict=True)]
    rows["format"] = rows["answer"].map(follows).astype(int)
    return rows.assign(unparsable=rows["answer"].map(number).isna().astype(int))
