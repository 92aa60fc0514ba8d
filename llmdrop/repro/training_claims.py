"""What Figure 7 says of a training run, as estimates: how soon its final order of layers is there, and how it comes.

Layer 0 stands apart in that figure, and is left out of all but the claim about it. With MANY_RUNS or more runs, a claim
on scores is about their mean, with an interval over them (seeds): what another run would show. Fewer runs have an
interval over their own layers. What is said of losses has intervals over windows of held-out text.
"""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from .estimate import Estimate
from .statistics import mean_of, ratio, resampled, wilson

SETTLED = 0.8  # rank correlation with the final order from which on an order counts as the final one
FEWEST_RUNS = 3  # of which it is said how alike they are
MANY_RUNS = 5  # enough to say what another one would show: three may well agree by chance
KINDS = ("attn", "mlp", "block")


class Finding(NamedTuple):
    """What was measured for a claim, None where it could not be, and where it comes from."""

    estimate: Estimate | None
    detail: str


def consistency(scores: pd.DataFrame, n: int, since: float) -> dict[str, Finding]:
    """Figure 7's claims, by id, on one or several runs with the same checkpoints.

    scores: run, tokens, kind, layer, score. n: how many layers are dropped. since: training tokens from which on a
    checkpoint is late, as all of the paper's are. Raises ValueError where fewer than two checkpoints are late.
    """
    tokens = np.sort(scores["tokens"].unique())
    late = tokens >= max(since, 1)
    if late.sum() < 2:
        raise ValueError(f"{late.sum()} checkpoints from {since:g} tokens on; a slope needs two")
    runs = [_by_layer(of_run, tokens) for _, of_run in scores.groupby("run", sort=False)]
    but_layer_0 = [run[1:] for run in runs]
    late_runs = [run[:, :, late] for run in but_layer_0]
    return (
        _levels(late_runs, np.log10(tokens[late]))
        | _module_0([run[:, :, late] for run in runs])
        | _orders([run[:, 0] for run in but_layer_0], tokens, late, n)
    )


def agreement(scores: pd.DataFrame, n: int) -> pd.DataFrame:
    """How much each checkpoint's order of layers is that of its run's last one.

    Returns run, kind, tokens, rank_correlation (Spearman), overlap (share of the n layers dropped first that they have
    in common).
    """
    rows = []
    for (run, kind), part in _but_layer_0(scores).groupby(["run", "kind"], sort=False):
        by_tokens = part.pivot(index="layer", columns="tokens", values="score")
        for tokens in by_tokens:
            alike = _alike(by_tokens[tokens], by_tokens.iloc[:, -1], n)
            rows.append({"run": run, "kind": kind, "tokens": tokens} | alike)
    return pd.DataFrame(rows)


def between_runs(scores: pd.DataFrame, n: int) -> pd.DataFrame:
    """The same of the last checkpoints of each two runs: kind, first, second, rank_correlation, overlap."""
    last = scores[scores["tokens"] == scores["tokens"].max()]
    rows = []
    for kind, part in _but_layer_0(last).groupby("kind", sort=False):
        by_run = part.pivot(index="layer", columns="run", values="score")
        for first, second in combinations(by_run, 2):
            alike = _alike(by_run[first], by_run[second], n)
            rows.append({"kind": kind, "first": first, "second": second} | alike)
    return pd.DataFrame(rows, columns=["kind", "first", "second", "rank_correlation", "overlap"])


def _but_layer_0(scores: pd.DataFrame) -> pd.DataFrame:
    return scores[scores["layer"] > 0]


def _by_layer(scores: pd.DataFrame, tokens: np.ndarray) -> np.ndarray:
    """One run's scores as [n_layers, kinds, n_tokens]."""
    table = scores.pivot(index="layer", columns=["kind", "tokens"], values="score")
    return np.stack([table[kind][tokens].to_numpy(float) for kind in KINDS], axis=1)


def _alike(first: pd.Series, second: pd.Series, n: int) -> dict[str, float]:
    common = set(first.nsmallest(n).index) & set(second.nsmallest(n).index)
    return {"rank_correlation": float(first.corr(second, method="spearman")), "overlap": len(common) / n}


def _correlations(scores: np.ndarray) -> np.ndarray:
    """Spearman's correlations of the columns of [n_layers, n], each with each."""
    ranks = stats.rankdata(scores, axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):  # one layer drawn over and over
        return np.corrcoef(ranks, rowvar=False)


def _of_runs(
    of_run: Callable[[np.ndarray], float],
    runs: Sequence[np.ndarray],
    of_few: Callable[[Sequence[float]], float] = np.mean,
    positive: bool = False,
) -> Estimate:
    """A number of each run: its mean, with an interval over seeds; of fewer than MANY_RUNS, `of_few` over layers.

    runs: [n_layers, ...] each. positive: a ratio above 0, taken in logarithms.
    """
    if len(runs) >= MANY_RUNS:
        values = [of_run(run) for run in runs]
        return mean_of(np.log(values), "seeds").exp() if positive else mean_of(values, "seeds")
    interval = ratio if positive else resampled
    return interval(lambda drawn: float(of_few([of_run(run) for run in drawn])), runs, "layers")


def _levels(runs: list[np.ndarray], log_tokens: np.ndarray) -> dict[str, Finding]:
    """The claims on how high late scores are. runs: [n_layers, kinds, n_late] each."""

    def highest_ratio(run: np.ndarray, other: str) -> float:
        means = run.mean(axis=0)
        return float((means[0] / means[KINDS.index(other)]).max())

    def percent_below(run: np.ndarray) -> float:
        return 100 * float((run[:, 0] < run[:, 1]).mean())

    centered = log_tokens - log_tokens.mean()

    def slope(run: np.ndarray, kind: str) -> float:
        return float(run[:, KINDS.index(kind)].mean(axis=0) @ centered / (centered @ centered))

    ratios = ", ".join(f"{highest_ratio(run, 'mlp'):.2f}" for run in runs)
    share = 100 * np.mean([(run[:, 0] < run[:, 1]).mean(axis=0) for run in runs], axis=0)
    by_tokens = ", ".join(f"{10**log:,.0f} {percent:.0f} %" for log, percent in zip(log_tokens, share, strict=True))
    since = f"from {10 ** log_tokens[0]:,.0f} tokens on"
    return {
        "fig07-attn-low-always": Finding(
            _of_runs(lambda run: highest_ratio(run, "mlp"), runs, np.max, positive=True), f"by run: {ratios}"
        ),
        "fig07-attn-stays-low": Finding(_of_runs(lambda run: highest_ratio(run, "block"), runs, positive=True), since),
        "fig07-attn-low-share": Finding(_of_runs(percent_below, runs), f"by tokens: {by_tokens}"),
        "fig07-mlp-rises": Finding(_of_runs(lambda run: slope(run, "mlp"), runs), since),
        "fig07-block-rises": Finding(_of_runs(lambda run: slope(run, "block"), runs), since),
    }


def _module_0(runs: list[np.ndarray]) -> dict[str, Finding]:
    """How far module 0 stands above the highest between the first and the last. runs: with layer 0, late."""
    others = [run[1:-1] / run[0] for run in runs]
    estimate = _of_runs(lambda run: float(1 / run.max()), others, np.min, positive=True)
    return {"fig07-module0-apart": Finding(estimate, f"{len(runs)} runs")}


def _orders(runs: list[np.ndarray], tokens: np.ndarray, late: np.ndarray, n: int) -> dict[str, Finding]:
    """The claims on the order of the attention layers. runs: [n_layers, n_tokens] each, layer 0 left out."""
    findings = {}
    is_late = np.flatnonzero(late)[:-1]  # the last agrees with itself

    def with_last(run: np.ndarray) -> np.ndarray:
        return _correlations(run)[-1]

    def lowest(run: np.ndarray) -> float:
        return float(with_last(run)[is_late].min())

    def settled(run: np.ndarray) -> float:
        """Percent of the tokens at the first checkpoint from which on all agree with the last."""
        unlike = np.flatnonzero(~(with_last(run) >= SETTLED))
        first = tokens[min(unlike[-1] + 1, len(tokens) - 1)] if len(unlike) else tokens[0]
        return 100 * float(first) / tokens[-1]

    by_run = ", ".join(f"{lowest(run):.2f}" for run in runs)
    findings["fig07-attn-ranking-stable"] = Finding(
        _of_runs(lowest, runs, np.min).clipped(-1, 1), f"lowest by run: {by_run}"
    )
    by_run = ", ".join(f"{settled(run):.1f} %" for run in runs)
    findings["fig07-order-early"] = Finding(_of_runs(settled, runs), f"by run: {by_run}")

    fewest = []
    for run in runs:
        first = [set(run[:, k].argsort()[:n]) for k in (*is_late, -1)]
        fewest.append(min(len(layers & first[-1]) for layers in first[:-1]))
    share = wilson(sum(fewest), n * len(runs))  # of the layers dropped first, each still there or not
    overlap = Estimate(share.value, share.low, share.high, n * len(runs), "layers", "Wilson").times(100)
    findings["fig07-top-n-overlap"] = Finding(overlap, f"by run: {', '.join(map(str, fewest))} of {n}")

    if len(runs) < FEWEST_RUNS:
        too_few = Finding(None, f"runs: {len(runs)}; to compare them, {FEWEST_RUNS} SEEDS are needed")
        return findings | dict.fromkeys(("fig07-seeds-agree", "fig07-seeds-as-training"), too_few)
    together = np.stack(runs, axis=2)  # [n_layers, n_tokens, n_runs]
    pairs = np.triu_indices(len(runs), 1)

    def across(drawn: list[np.ndarray]) -> float:
        return float(_correlations(drawn[0][:, -1])[pairs].mean())

    def within_less_across(drawn: list[np.ndarray]) -> float:
        of_runs = [drawn[0][:, :, k] for k in range(len(runs))]
        return float(np.mean([with_last(run)[is_late].mean() for run in of_runs])) - across(drawn)

    values = _correlations(together[:, -1])[pairs]
    detail = f"{len(values)} pairs, {values.min():.2f} to {values.max():.2f}"
    findings["fig07-seeds-agree"] = Finding(resampled(across, [together], "layers").clipped(-1, 1), detail)
    findings["fig07-seeds-as-training"] = Finding(resampled(within_less_across, [together], "layers"), detail)
    return findings


def learning(losses: pd.DataFrame, count_losses: np.ndarray) -> dict[str, Finding]:
    """How far the loss of each run's last checkpoint is below that of what only counts, paired by window.

    losses: of `training.TrainingRuns`. count_losses: of the training text, [n_windows].
    """
    last = losses[losses["tokens"] == losses["tokens"].max()]
    by_run = last.pivot(index="window", columns="run", values="nats").to_numpy()
    below = count_losses[:, None] - by_run  # [n_windows, n_runs]
    estimate = resampled(lambda drawn: float(drawn[0].mean(axis=0).min()), [below], "samples")
    detail = "by run: " + ", ".join(f"{nats:.2f}" for nats in below.mean(axis=0))
    return {"fig07-below-5-gram": Finding(estimate, detail)}


def dropping(costs: pd.DataFrame, n: int, since: float) -> dict[str, Finding]:
    """What dropping n layers of a kind costs at late checkpoints, paired by window.

    costs: of `training.TrainingRuns`. since: training tokens from which on a checkpoint is late.
    """
    late = costs[(costs["n"] == n) & (costs["tokens"] >= since)]

    def nats(kind: str, chosen: str) -> np.ndarray:
        """[n_windows, n_late, n_runs]"""
        part = late[(late["kind"] == kind) & (late["chosen"] == chosen)]
        by_window = part.set_index(["window", "tokens", "run"])["nats"].sort_index()
        return by_window.to_numpy().reshape([level.nunique() for level in by_window.index.levels])

    def largest(drawn: list[np.ndarray]) -> float:
        return float(drawn[0].mean(axis=0).max())

    def largest_of_mean(drawn: list[np.ndarray]) -> float:
        return float(drawn[0].mean(axis=(0, 2)).max())

    more_than_mlp = nats("attn", "now") - nats("mlp", "now")
    more_than_own = nats("attn", "at the end") - nats("attn", "now")
    detail = f"{n} layers, {late['tokens'].nunique()} checkpoints, {late['run'].nunique()} runs"
    return {
        "fig07-cost-attn-below-mlp": Finding(resampled(largest, [more_than_mlp], "samples"), detail),
        "fig07-cost-final-plan": Finding(resampled(largest_of_mean, [more_than_own], "samples"), detail),
    }
