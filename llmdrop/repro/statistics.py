"""Estimates with 95 % intervals from what `quality` and `timing` measured, item by item; resampling is scipy's.

Differences are paired: every variant read the same samples, answered the same questions and ran in the same rounds.
Intervals are those of `resampled`; those of `counted` are percentiles, and those of `wilson` Wilson's.
`tests/repro/test_coverage.py` simulates data with a known truth.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
import scipy  # scipy.stats, which takes a third of a second, comes with its first use

from .estimate import Estimate

RESAMPLES = 2000
DRAWS_AT_A_TIME = 4_000_000  # item numbers in memory, or values of items: 32 MB
MOST_UNDEFINED = 0.05  # share of the resamples in which a statistic may be undefined (γ without a speedup)
# of the metrics of one text, task or set of questions, the one that is shown: the first that is there
HEADLINE_METRICS = ("nats", "acc_norm", "acc", "exact_match", "exact_match,strict-match", "match")

Statistic = Callable[[list[np.ndarray]], float]
StatisticOfDraws = Callable[[list[np.ndarray]], np.ndarray]  # the same, of all draws together: a number each


def resampled(
    statistic: Statistic,
    strata: Sequence[np.ndarray],
    over: str,
    value: float | None = None,
    freedom: int | None = None,
) -> Estimate:
    """A statistic with its interval: Student's t around it, with the standard error of a bootstrap.

    strata: arrays [n_units, ...], each drawn on its own with replacement: the samples of each text, the questions of
    each task, the rounds. statistic: of the list of the drawn arrays. value: where it is not the statistic of these
    strata. freedom: degrees of it (None: of all units), where a few units have most of the spread.

    Percentiles of a bootstrap are too narrow below twenty units and end at the extremes of three; its standard error is
    low by sqrt((n - 1) / n), which is put right by the smallest stratum, and a skewed one makes the interval wider. NaN
    for a stratum of one unit, and where the statistic is undefined in more than MOST_UNDEFINED of the draws.
    """
    strata = [np.asarray(stratum, float) for stratum in strata]
    if value is None:
        value = float(statistic(strata))
    return _estimate(_of_each(statistic), strata, over, value, freedom)


def _estimate(
    statistic: StatisticOfDraws, strata: Sequence[np.ndarray], over: str, value: float, freedom: int | None
) -> Estimate:
    """The value with the interval that `resampled` describes."""
    sizes = [len(stratum) for stratum in strata]
    if min(sizes) < 2:
        return Estimate(value, np.nan, np.nan, sum(sizes), over)

    drawn = _bootstrap(statistic, strata)
    defined = drawn[np.isfinite(drawn)]
    if len(defined) < (1 - MOST_UNDEFINED) * RESAMPLES:
        return Estimate(value, np.nan, np.nan, sum(sizes), over)
    stderr = defined.std(ddof=1) * np.sqrt(min(sizes) / (min(sizes) - 1))
    quantile = scipy.stats.t.ppf(0.975, freedom or sum(sizes) - len(sizes))
    if stderr > 1e-12 * abs(value):  # Hall 1992: how far a long tail moves the quantiles of t; here to both sides
        quantile += abs(scipy.stats.skew(defined)) * (2 * quantile**2 + 1) / 6
    half_width = float(quantile * stderr)
    return Estimate(value, value - half_width, value + half_width, sum(sizes), over, "bootstrap")


def _bootstrap(statistic: StatisticOfDraws, strata: Sequence[np.ndarray]) -> np.ndarray:
    """The statistic of RESAMPLES draws of every stratum, the same draws every time. statistic: of [draws, n, ...]."""
    sizes = [len(stratum) for stratum in strata]
    at_a_time = max(1, DRAWS_AT_A_TIME // sum(stratum.size for stratum in strata))

    def of_drawn(*numbers: np.ndarray, axis: int) -> np.ndarray:
        draws = [of_stratum.astype(int).reshape(-1, of_stratum.shape[axis]) for of_stratum in numbers]
        found = [
            statistic([stratum[units[i : i + at_a_time]] for stratum, units in zip(strata, draws, strict=True)])
            for i in range(0, len(draws[0]), at_a_time)
        ]
        return np.concatenate(found).reshape(numbers[0].shape[:-1])

    numbers = [np.arange(size) for size in sizes]
    options = {"n_resamples": RESAMPLES, "batch": max(1, DRAWS_AT_A_TIME // sum(sizes)), "vectorized": True}
    with warnings.catch_warnings():  # of a statistic that is undefined in some draws
        warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)
        result = scipy.stats.bootstrap(numbers, of_drawn, **options, method="percentile", rng=np.random.default_rng(0))
    return result.bootstrap_distribution


def _of_each(statistic: Statistic) -> StatisticOfDraws:
    """A statistic of one draw, as one of many."""
    return lambda drawn: np.array([statistic(list(draw)) for draw in zip(*drawn, strict=True)], float)


def ratio(statistic: Statistic, strata: Sequence[np.ndarray], over: str) -> Estimate:
    """`resampled` of a statistic above 0, in logarithms: half as much is as far from 1 as twice as much."""

    def logarithm(drawn: list[np.ndarray]) -> float:
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(np.log(statistic(drawn)))

    return resampled(logarithm, strata, over).exp()


def of_means(
    statistic: Statistic | StatisticOfDraws,
    strata: Sequence[np.ndarray],
    over: str,
    value: float | None = None,
    freedom: int | None = None,
    at_once: bool = False,
) -> Estimate:
    """`resampled` of what depends on the means over units only: statistic gets the list of these, [...] each.

    at_once: whether it takes those of all draws together, [draws, ...] each, too, and gives a number for each draw,
    which is many times as fast.
    """
    strata = [np.asarray(stratum, float) for stratum in strata]
    if value is None:
        value = _at_means(statistic, strata)
    return _estimate(_of_unit_means(statistic if at_once else _of_each(statistic)), strata, over, value, freedom)


def _at_means(statistic: Statistic | StatisticOfDraws, strata: Sequence[np.ndarray]) -> float:
    """The statistic of the means over all units."""
    return float(statistic([stratum.mean(axis=0) for stratum in strata]))


def _of_unit_means(statistic: StatisticOfDraws) -> StatisticOfDraws:
    """A statistic of means over units, as one of the units, [draws, n, ...] each."""
    return lambda drawn: statistic([units.mean(axis=1) for units in drawn])


def counted(statistic: Statistic, strata: Sequence[np.ndarray], over: str) -> Estimate:
    """A whole number that follows from means over units, as how many of the layers that score lowest are deep.

    The interval's ends are whole numbers, too: percentiles of the bootstrap. (What is nearly always the same has a
    spread and a skew that mean nothing to Student's t.)
    """
    strata = [np.asarray(stratum, float) for stratum in strata]
    value = _at_means(statistic, strata)
    drawn = _bootstrap(_of_unit_means(_of_each(statistic)), strata)
    low, high = np.percentile(drawn, [2.5, 97.5], method="closest_observation")
    n = sum(len(stratum) for stratum in strata)
    return Estimate(value, min(float(low), value), max(float(high), value), n, over, "percentiles of a bootstrap")


def mean_of(values: Sequence[float] | np.ndarray | pd.Series, over: str) -> Estimate:
    """The mean of one number per seed, run, draw or layer."""
    return of_means(lambda means: means[0], [np.asarray(values, float)], over, at_once=True)


def headline(rows: pd.DataFrame) -> pd.DataFrame:
    """Of `quality`'s rows, those of one metric for each text, task and set of questions (see HEADLINE_METRICS).

    Raises ValueError for a task that has none of them.
    """
    metrics = rows.groupby("where", sort=False)["metric"].unique()
    chosen = {where: _headline_metric(where, measured) for where, measured in metrics.items()}
    return rows[rows["metric"] == rows["where"].map(chosen)]


def _headline_metric(where: str, measured: Iterable[str]) -> str:
    for metric in HEADLINE_METRICS:
        if metric in measured:
            return metric
    raise ValueError(
        f"{where} is measured by {', '.join(sorted(measured))}; averages and tables take one of "
        f"{', '.join(HEADLINE_METRICS)}. Leave it out, or show it by its own metric"
    )


def items(rows: pd.DataFrame, variant: str, where: str, metric: str | None = None) -> pd.DataFrame:
    """One variant's items of one text, task or set of questions, in order: value, n. metric: None for the headline's.

    Raises ValueError for a variant that was not measured there, or not by that metric.
    """
    part = rows[(rows["variant"] == variant) & (rows["where"] == where)]
    if len(part):
        part = part[part["metric"] == (metric or _headline_metric(where, part["metric"].unique()))]
    if part.empty:
        by = "" if metric is None else f" by {metric!r}"
        measured = ", ".join(dict.fromkeys(rows["variant"]))
        raise ValueError(f"{variant!r} was not measured on {where!r}{by}; measured: {measured}")
    return part.sort_values("item").set_index("item")[["value", "n"]]


def _paired(rows: pd.DataFrame, variants: Sequence[str], where: str | Sequence[str], metric: str | None) -> tuple:
    """(strata, strata with doubt, what they are over): of each name in `where` an array [n_items, n_variants].

    Right and wrong answers get doubt: made-up items, one for each variant that it alone has right, so that no agreement
    on a few questions is taken for certain (Bonett and Price 2012, Agresti and Min 2005).
    Where rows have a column "cluster" (a document, a prompt), clusters are drawn instead of items.
    """
    strata = []
    doubtful = []
    over = "questions"
    for name in [where] if isinstance(where, str) else where:
        part = rows[(rows["where"] == name) & rows["variant"].isin(variants)]
        metrics = part["metric"].unique()
        if len(part):
            part = part[part["metric"] == (metric or _headline_metric(name, metrics))]
        by_item = part.pivot(index="item", columns="variant", values="value")
        for variant in variants:
            if variant not in by_item:
                items(rows, variant, name, metric)  # which says what was measured
        if len(part) < by_item.size:
            raise ValueError(
                f"{', '.join(variants)} were measured on other items of {name!r}; measure them in one call"
            )
        stratum = by_item[list(variants)].to_numpy(float)
        over = "samples" if "nats" in metrics else over
        if "cluster" in rows:
            cluster = part.drop_duplicates("item").sort_values("item")["cluster"].to_numpy()
            sums = pd.DataFrame(stratum).groupby(cluster).sum().to_numpy()
            stratum = sums * len(sums) / len(stratum)  # their mean is that of the items
        strata.append(stratum)
        has_doubt = len(set(variants)) == len(variants) > 1 and np.isin(stratum, (0, 1)).all()
        made_up = np.eye(len(variants)) if has_doubt else stratum[:0]
        doubtful.append(np.concatenate([stratum, made_up]))
    return strata, doubtful, over


def combined(
    statistic: Statistic | StatisticOfDraws,
    rows: pd.DataFrame,
    variants: Sequence[str],
    where: str | Sequence[str],
    metric: str | None = None,
    at_once: bool = False,
) -> Estimate:
    """A number made of several variants' means on the same items: of each name in `where` an array [n_variants].

    What a claim compares beyond a difference: the largest over some sizes, a difference of differences. at_once: as of
    `of_means`; variants are the last axis then.
    """
    strata, doubtful, over = _paired(rows, variants, where, metric)
    value = _at_means(statistic, strata)
    estimate = of_means(statistic, doubtful, over, value, at_once=at_once)
    method = "paired bootstrap" if len(variants) > 1 else "bootstrap"
    return Estimate(value, estimate.low, estimate.high, sum(map(len, strata)), over, method)


def difference(
    rows: pd.DataFrame, variant: str, baseline: str, where: str | Sequence[str], metric: str | None = None
) -> Estimate:
    """Mean of a variant's values less the baseline's, paired item by item.

    where: a text, task or set of questions, or several: then the mean of their means. metric: None for the headline's;
    "choice" moves long before accuracy does.
    """
    return differences(rows, [(variant, baseline)], where, metric=metric)


def differences(
    rows: pd.DataFrame,
    pairs: Sequence[tuple[str, str]],
    where: str | Sequence[str],
    reduce: Callable[..., np.ndarray] = np.mean,
    metric: str | None = None,
) -> Estimate:
    """One number of the `difference` of several pairs (variant, baseline): of one method less another at many sizes.

    reduce: their mean, or np.max, np.min.
    """
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    variants, baselines = np.transpose([[names.index(name) for name in pair] for pair in pairs])

    def statistic(means: list[np.ndarray]) -> np.ndarray:
        of_all = np.mean(means, axis=0)
        return reduce(of_all[..., variants] - of_all[..., baselines], axis=-1)

    return combined(statistic, rows, names, where, metric, at_once=True)


def kept(rows: pd.DataFrame, variant: str, baseline: str, where: Sequence[str]) -> Estimate:
    """Percent of the baseline's mean accuracy over tasks that a variant keeps; NaN where the baseline has none."""

    def statistic(means: list[np.ndarray]) -> np.ndarray:
        of_variant, of_baseline = np.moveaxis(np.mean(means, axis=0), -1, 0)
        return 100 * of_variant / np.where(of_baseline > 0, of_baseline, np.nan)

    return combined(statistic, rows, [variant, baseline], where, at_once=True)


def above_unread(rows: pd.DataFrame, variant: str, where: str, unread: float) -> Estimate:
    """Chance-corrected accuracy in percent: 0 for what needs no reading, 100 for all right."""
    return combined(
        lambda means: 100 * (means[0][..., 0] - unread) / (1 - unread), rows, [variant], where, at_once=True
    )


def remaining_loss(rows: pd.DataFrame, variant: str, whole: str, paper: str, where: Sequence[str]) -> Estimate:
    """The share of the paper's loss that a variant leaves: (loss - whole's) / (paper's - whole's).

    The mean over the texts named by `where`. 1: nothing gained; 0: as good as the whole model.
    """
    strata = []
    for name in where:
        base = items(rows, whole, name)
        lost = (items(rows, variant, name)["value"] - base["value"]) * base["n"]
        most = (items(rows, paper, name)["value"] - base["value"]) * base["n"]
        strata.append(np.stack([lost.to_numpy(float), most.to_numpy(float)], axis=1))

    def statistic(means: list[np.ndarray]) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.mean([of_text[..., 0] / of_text[..., 1] for of_text in means], axis=0)

    return of_means(statistic, strata, "samples", at_once=True)


def speed_ratio(rounds: pd.DataFrame, variant: str, baseline: str, column: str = "seconds") -> Estimate:
    """How many times as fast as the baseline a variant is: the geometric mean over rounds, paired by round.

    rounds: from `llmdrop.repro.timing.timing`. column: or "prefill_seconds", "decode_seconds". Raises ValueError for
    what was not timed, or ran out of memory.
    """
    log_ratio = log_seconds(rounds, baseline, column) - log_seconds(rounds, variant, column)
    return mean_of(log_ratio, "rounds").exp()


def log_seconds(rounds: pd.DataFrame, variant: str, column: str = "seconds") -> np.ndarray:
    """Logarithms of a variant's seconds, round by round. Raises as `speed_ratio`."""
    of_variant = rounds[rounds["variant"] == variant].sort_values("round")
    seconds = of_variant[column].to_numpy(float)
    if not len(seconds) or not np.isfinite(seconds).all():
        timed = ", ".join(dict.fromkeys(rounds["variant"]))
        raise ValueError(f"{variant!r} has no {column} of every round; timed: {timed}")
    return np.log(seconds)


def gamma(avg_baseline: float, avg: float, speedup: float) -> float:
    """The paper's γ: points of average accuracy lost per percent of speedup; NaN where there is no speedup.

    At a speedup of 1 or less γ would divide by nothing, or praise what is slower and worse.
    """
    percent = 100 * (speedup - 1)
    return (avg_baseline - avg) / percent if percent > 1e-9 else np.nan


def loss_beyond_gamma(
    rows: pd.DataFrame, rounds: pd.DataFrame, variant: str, other: str, baseline: str, where: Sequence[str]
) -> Estimate:
    """What another variant loses more than this one's γ would make it lose at its speedup: points, of texts nats.

    Above 0 where this one's γ is smaller. Unlike the other's γ it has bounds where the other is hardly faster; NaN
    where this one is not. rows: from `quality`; rounds: from `timing`. Items and rounds are drawn together, each by
    itself.
    """
    strata, doubtful, over = _paired(rows, [variant, other, baseline], where, None)
    scale = -1.0 if over == "samples" else 100.0  # what is lost: nats more, points less
    seconds = np.stack([log_seconds(rounds, name) for name in (variant, other, baseline)], axis=1)

    def statistic(means: list[np.ndarray]) -> float:
        *of_items, of_rounds = means
        average = scale * np.mean(of_items, axis=0)
        speedup = np.exp(of_rounds[2] - of_rounds)
        at_gamma = gamma(average[2], average[0], speedup[0]) * 100 * (speedup[1] - 1)
        return float(average[2] - average[1] - at_gamma)

    value = _at_means(statistic, [*strata, seconds])
    freedom = len(seconds) // 2  # rounds have most of the spread, and those that something disturbs most of theirs
    estimate = of_means(statistic, [*doubtful, seconds], f"{over} and rounds", value, freedom)
    n = sum(map(len, strata))
    return Estimate(value, estimate.low, estimate.high, n, estimate.over, "paired bootstrap")


def mcnemar(rows: pd.DataFrame, variant: str, baseline: str, where: str | Sequence[str]) -> float:
    """Exact two-sided p of as many questions right for one alone and for the other alone, were the two alike."""
    strata, _, _ = _paired(rows, [variant, baseline], where, None)
    answers = np.concatenate(strata)
    only_variant = int(((answers[:, 0] == 1) & (answers[:, 1] == 0)).sum())
    only_baseline = int(((answers[:, 0] == 0) & (answers[:, 1] == 1)).sum())
    if only_variant + only_baseline == 0:
        return 1.0
    return float(scipy.stats.binomtest(only_variant, only_variant + only_baseline).pvalue)


def wilson(n_right: int, n: int) -> Estimate:
    """A share right with Wilson's score interval: none right of 48 is not none for sure."""
    interval = scipy.stats.binomtest(int(n_right), int(n)).proportion_ci(method="wilson")
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
    percent by guessing, by task. Columns: method, "1: 0.3k" (examples a label: tokens) ..., avg with its interval over
    queries, and found, with Wilson's interval (_low, _high), in the contexts that every variant was given.
    """
    labels = rows[rows["task"] != "retrieval"]
    facts = rows[rows["task"] == "retrieval"]
    tokens = labels.groupby("shots")["tokens"].first()
    table = 100 * labels.groupby(["variant", "shots"], sort=False)["right"].mean().unstack().sort_index(axis=1)
    table.columns = [f"{shots:.0f}: {n / 1000:.1f}k" for shots, n in tokens.items()]
    guessing = dict.fromkeys([*table, "avg"], chance[labels["task"].iloc[0]]) | {"found": chance["retrieval"]}
    by_query = 100 * labels.groupby(["variant", "item"], sort=False)["right"].mean()
    for variant, values in by_query.groupby("variant", sort=False):
        average = mean_of(values, "questions")
        table.loc[variant, ["avg", "avg_low", "avg_high"]] = average.value, average.low, average.high
    asked_of_all = facts.groupby("tokens")["variant"].transform("nunique") == len(table)
    found = shares(facts[asked_of_all], "variant").set_index("variant")
    table["found"] = found["value"]
    table["found_low"] = found["low"]
    table["found_high"] = found["high"]
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
        mean = wilson(values.sum(), len(values)) if values.isin([0, 1]).all() else mean_of(values, "questions")
        if values.between(0, 1).all():  # shares, of which there are no more than all
            mean = mean.clipped(0, 1)
        lost = mean_of(differences, "questions")
        row = {"model": model, "measure": measure, "n": len(values)}
        row |= {"value": mean.value, "low": mean.low, "high": mean.high}
        row |= lost.columns("lost")
        row["p"] = np.nan if model == base or len(differences) < 2 else _p_of_signs(differences)
        table.append(row)
    return pd.DataFrame(table)


def _p_of_signs(differences: np.ndarray) -> float:
    """Two-sided p of the mean difference, were every item's sign a coin's."""
    batch = max(1, DRAWS_AT_A_TIME // len(differences))
    options = {"permutation_type": "samples", "n_resamples": RESAMPLES, "batch": batch}
    test = scipy.stats.permutation_test((differences,), np.mean, **options, rng=np.random.default_rng(0))
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
