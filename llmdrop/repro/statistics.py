"""Estimates with 95 % intervals from what `quality` measured, item by item; resampling is scipy's.

Differences are paired: every variant read the same samples and answered the same questions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

RESAMPLES = 2000
DRAWS_AT_A_TIME = 4_000_000  # item numbers in memory, 32 MB
# of the metrics of one text, task or set of questions, the one that is shown: the first that is there
HEADLINE_METRICS = ("nats", "acc_norm", "acc", "exact_match", "exact_match,strict-match", "match")


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; NaN where it is not known."""

    value: float
    low: float
    high: float

    @property
    def stderr(self) -> float:
        """The standard error of a normal distribution with an interval as wide."""
        return (self.high - self.low) / (2 * stats.norm.ppf(0.975))


UNKNOWN = Estimate(np.nan, np.nan, np.nan)


def headline(rows: pd.DataFrame) -> pd.DataFrame:
    """Of `quality`'s rows, those of one metric for each text, task and set of questions (see HEADLINE_METRICS).

    Raises ValueError for a task that has none of them.
    """
    known = rows[rows["metric"].isin(HEADLINE_METRICS)]
    absent = sorted(set(rows["where"]) - set(known["where"]))
    if absent:
        metrics = sorted(set(rows.loc[rows["where"].isin(absent), "metric"]))
        raise ValueError(
            f"{', '.join(absent)} is measured by {', '.join(metrics)}; averages and tables take one of "
            f"{', '.join(HEADLINE_METRICS)}. Leave it out, or show it by its own metric"
        )
    rank = known["metric"].map(HEADLINE_METRICS.index)
    return known[rank == rank.groupby(known["where"]).transform("min")]


def items(rows: pd.DataFrame, variant: str, where: str) -> pd.DataFrame:
    """One variant's items of one text, task or set of questions by its headline metric, in order: value, n.

    Raises ValueError for a variant that was not measured there.
    """
    part = headline(rows[(rows["variant"] == variant) & (rows["where"] == where)])
    if part.empty:
        measured = ", ".join(dict.fromkeys(rows["variant"]))
        raise ValueError(f"{variant!r} was not measured on {where!r}; measured: {measured}")
    return part.sort_values("item").set_index("item")[["value", "n"]]


def difference(rows: pd.DataFrame, variant: str, baseline: str, where: str | Sequence[str]) -> Estimate:
    """Mean of a variant's values less the baseline's, paired item by item.

    where: a text, task or set of questions, or several: then the mean of their means.
    """
    ratios = []
    for name in [where] if isinstance(where, str) else where:
        values = items(rows, variant, name)["value"] - items(rows, baseline, name)["value"]
        ratios.append((values.to_numpy(float), np.ones(len(values))))
    return _bootstrap(ratios)


def remaining_loss(rows: pd.DataFrame, variant: str, whole: str, paper: str, where: Sequence[str]) -> Estimate:
    """The share of the paper's loss that a variant leaves: (loss - whole's) / (paper's - whole's).

    The mean over the texts named by `where`. 1: nothing gained; 0: as good as the whole model.
    """
    ratios = []
    for name in where:
        base = items(rows, whole, name)
        lost = (items(rows, variant, name)["value"] - base["value"]) * base["n"]
        most = (items(rows, paper, name)["value"] - base["value"]) * base["n"]
        ratios.append((lost.to_numpy(float), most.to_numpy(float)))
    return _bootstrap(ratios)


def _bootstrap(ratios: Sequence[tuple[np.ndarray, np.ndarray]]) -> Estimate:
    """The mean of several ratios of sums, and its percentile interval.

    ratios: (numerators, denominators) of n items. The items of each ratio are drawn on their own.
    """
    value = float(np.mean([_ratio(*ratio) for ratio in ratios]))
    if min(len(numerators) for numerators, _ in ratios) < 2:
        return Estimate(value, np.nan, np.nan)
    distributions = []
    for seed, ratio in enumerate(ratios):
        batch = max(1, DRAWS_AT_A_TIME // len(ratio[0]))
        options = {"paired": True, "n_resamples": RESAMPLES, "batch": batch, "method": "percentile"}
        result = stats.bootstrap(ratio, _ratio, **options, rng=np.random.default_rng(seed))
        distributions.append(result.bootstrap_distribution)
    low, high = np.nanquantile(np.mean(distributions, axis=0), [0.025, 0.975])
    return Estimate(value, min(float(low), value), max(float(high), value))  # equal ones differ by rounding


def _ratio(numerators: np.ndarray, denominators: np.ndarray, axis: int = -1) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return numerators.sum(axis) / denominators.sum(axis)


def _mean(values: np.ndarray) -> Estimate:
    return _bootstrap([(values, np.ones_like(values))])


def wilson(n_right: int, n: int) -> Estimate:
    """A share right with Wilson's score interval: none right of 48 is not none for sure."""
    interval = stats.binomtest(int(n_right), int(n)).proportion_ci(method="wilson")
    return Estimate(n_right / n, float(interval.low), float(interval.high))


def shares(rows: pd.DataFrame, *by: str) -> pd.DataFrame:
    """Percent right with its 95 % interval (Wilson's), by the columns named: n_right, n, value, low, high.

    rows: one per answer, `right` 0 or 1 (or, of several answers at once, `right` of `n`).
    """
    n = rows["n"] if "n" in rows else 1
    table = rows.assign(n_right=rows["right"], n=n).groupby(list(by), sort=False)[["n_right", "n"]].sum().reset_index()
    intervals = [wilson(row.n_right, row.n) for row in table.itertuples()]
    table["value"] = 100 * table["n_right"] / table["n"]
    table["low"] = [100 * interval.low for interval in intervals]
    table["high"] = [100 * interval.high for interval in intervals]
    return table


def context_table(rows: pd.DataFrame, chance: Mapping[str, float]) -> pd.DataFrame:
    """Table 12: percent right by examples a label, their mean, facts found; a row a variant, the last for guessing.

    rows: task ("retrieval" or the name of the labels), variant, item, tokens, right, and for labels shots. chance:
    percent by guessing, by task. Columns: method, "1: 0.3k" (examples a label: tokens) ..., avg with its error over
    queries, found with its error over facts, in the contexts that every variant was given.
    """
    labels = rows[rows["task"] != "retrieval"]
    facts = rows[rows["task"] == "retrieval"]
    tokens = labels.groupby("shots")["tokens"].first()
    table = 100 * labels.groupby(["variant", "shots"], sort=False)["right"].mean().unstack()
    table.columns = [f"{shots:.0f}: {n / 1000:.1f}k" for shots, n in tokens.items()]
    guessing = dict.fromkeys([*table, "avg"], chance[labels["task"].iloc[0]]) | {"found": chance["retrieval"]}
    by_query = 100 * labels.groupby(["variant", "item"], sort=False)["right"].mean().unstack("variant")
    table["avg"] = by_query.mean()
    table["avg_stderr"] = by_query.sem()
    asked_of_all = facts.groupby("tokens")["variant"].transform("nunique") == len(table)
    found = shares(facts[asked_of_all], "variant").set_index("variant")
    table["found"] = found["value"]
    table["found_stderr"] = (found["high"] - found["low"]) / 3.92  # from Wilson's interval: never 0 ± 0
    return pd.concat([table, pd.DataFrame(guessing, index=["Guessing"])]).rename_axis("method").reset_index()


def against(rows: pd.DataFrame, base: str = "Baseline") -> pd.DataFrame:
    """Mean of `value` per model and measure, and its difference to the base model's, paired by item.

    rows: model, measure, item, value. Returns model, measure, n, value, low, high (Wilson's where every value is 0 or
    1), lost, lost_low, lost_high and p: how often, were the two alike, a mean difference as large would come about by
    chance (signs of the differences drawn anew, two-sided; NaN for the base model and for a single item).
    """
    table = []
    for (measure, model), group in rows.groupby(["measure", "model"], sort=False):
        values = group.set_index("item")["value"].astype(float)
        base_values = rows[(rows["measure"] == measure) & (rows["model"] == base)].set_index("item")["value"]
        differences = (base_values - values).to_numpy(float)
        mean = wilson(values.sum(), len(values)) if values.isin([0, 1]).all() else _mean(values.to_numpy())
        lost = _mean(differences)
        row = {"model": model, "measure": measure, "n": len(values)}
        row |= {"value": mean.value, "low": mean.low, "high": mean.high}
        row |= {"lost": lost.value, "lost_low": lost.low, "lost_high": lost.high}
        row["p"] = np.nan if model == base or len(differences) < 2 else _p_of_signs(differences)
        table.append(row)
    return pd.DataFrame(table)


def _p_of_signs(differences: np.ndarray) -> float:
    """Two-sided p of the mean difference, were every item's sign a coin's."""
    batch = max(1, DRAWS_AT_A_TIME // len(differences))
    options = {"permutation_type": "samples", "n_resamples": RESAMPLES, "batch": batch}
    test = stats.permutation_test((differences,), np.mean, **options, rng=np.random.default_rng(0))
    return float(test.pvalue)


def side_by_side(table: pd.DataFrame, digits: int = 0) -> pd.DataFrame:
    """`against` as a table, one row a model and one column a measure: "31 [22, 41] *" in percent, * where p < 0.05."""
    cells = []
    for row in table.itertuples():
        value, low, high = (f"{100 * number:.{digits}f}" for number in (row.value, row.low, row.high))
        star = " *" if row.p < 0.05 else ""
        cells.append(f"{value} [{low}, {high}]{star}")
    wide = table.assign(cell=cells).pivot(index="model", columns="measure", values="cell")
    return wide.loc[table["model"].unique(), table["measure"].unique()].rename_axis(columns=None).reset_index()
