"""What Figure 7 says of a training run, as numbers: how soon its final order of layers is there, and how it gets there.

Layer 0 stands apart in that figure, and is left out of all but the claim about it.
"""

import math
from itertools import combinations
from typing import NamedTuple

import pandas as pd
from scipy import stats

SETTLED = 0.8  # rank correlation with the final order from which on an order counts as the final one
SLOPE_CLAIMS = {"attn": "fig07-attn-stays-low", "mlp": "fig07-mlp-rises", "block": "fig07-block-rises"}


class Finding(NamedTuple):
    """What was measured for a claim, with its error (NaN where it is not known), and where it comes from."""

    measured: float
    error: float
    detail: str


def consistency(scores: pd.DataFrame, n: int, since: float) -> pd.DataFrame:
    """Figure 7's claims on one or several runs with the same checkpoints: id (index), measured, error, detail.

    scores: run, tokens, kind, layer, score. n: how many layers are dropped. since: training tokens from which on a
    checkpoint is late, as all of the paper's are. error: standard deviation over runs (of slopes: half the 95 %
    interval), NaN where there is only one.
    """
    findings = _levels(scores, since) | _orders(scores, n, since)
    for kind, row in slopes(scores, since).iterrows():
        low = row["slope"] - row["halfwidth"]
        high = row["slope"] + row["halfwidth"]
        detail = f"95 % interval {low:.4f} to {high:.4f}, from {since:,.0f} tokens on"
        findings[SLOPE_CLAIMS[kind]] = Finding(row["slope"], row["halfwidth"], detail)
    return pd.DataFrame(findings.values(), index=list(findings))


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


def slopes(scores: pd.DataFrame, since: float) -> pd.DataFrame:
    """Change of the mean score per tenfold training tokens from `since` tokens on: kind (index), slope, halfwidth.

    A least-squares line per layer and run; halfwidth is of the 95 % t interval of their mean, layers and runs taken
    for independent. Raises ValueError where fewer than two checkpoints are left.
    """
    late = scores[scores["tokens"] >= max(since, 1)]
    n_late = late["tokens"].nunique()
    if n_late < 2:
        raise ValueError(f"{n_late} checkpoints from {since:g} tokens on; a slope needs two")
    rows = {}
    for kind, part in _but_layer_0(late).groupby("kind", sort=False):
        by_tokens = part.pivot(index="tokens", columns=["run", "layer"], values="score")
        x = by_tokens.index.to_series().map(math.log10)
        centered = x - x.mean()
        of_layers = by_tokens.mul(centered, axis=0).sum() / (centered**2).sum()
        halfwidth = stats.t.ppf(0.975, len(of_layers) - 1) * of_layers.sem()
        rows[kind] = {"slope": of_layers.mean(), "halfwidth": halfwidth}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("kind")


def _but_layer_0(scores: pd.DataFrame) -> pd.DataFrame:
    return scores[scores["layer"] > 0]


def _alike(first: pd.Series, second: pd.Series, n: int) -> dict[str, float]:
    common = set(first.nsmallest(n).index) & set(second.nsmallest(n).index)
    return {"rank_correlation": float(first.corr(second, method="spearman")), "overlap": len(common) / n}


def _levels(scores: pd.DataFrame, since: float) -> dict[str, Finding]:
    """The claims on how high scores are. Tables are [tokens, run]."""
    findings = {}
    by_layer = _but_layer_0(scores).pivot(index=["tokens", "run"], columns=["kind", "layer"], values="score")
    means = by_layer.T.groupby(level="kind").mean().T.unstack("run")  # means["attn"]: [tokens, run]

    ratio = means["attn"] / means["mlp"]
    below_for_good = ratio[::-1].cummax()[::-1] < 1  # there and ever after
    first_below = below_for_good.idxmax().where(below_for_good.any())
    places = ", ".join("never" if math.isnan(tokens) else f"{tokens:,.0f}" for tokens in first_below)
    detail = f"below 1 for good from {places} tokens on; late at most {ratio.loc[since:].max().max():.2f}"
    findings["fig07-attn-low-always"] = Finding(ratio.max().max(), ratio.max().std(), detail)

    share = 100 * (by_layer["attn"] < by_layer["mlp"]).mean(axis=1).unstack()  # percent of layers
    late = share.loc[since:].mean()
    by_tokens = ", ".join(f"{tokens:,.0f} {value:.0f} %" for tokens, value in share.mean(axis=1).items())
    findings["fig07-attn-low-share"] = Finding(late.mean(), late.std(), f"by tokens: {by_tokens}")

    change = (means.iloc[-1] - means.iloc[0]).unstack()  # [kind, run], from the first checkpoint to the last
    growth = change.loc["mlp"] - change.loc["attn"]
    by_kind = ", ".join(f"{kind} {value:+.4f}" for kind, value in change.mean(axis=1).items())
    findings["fig07-mlp-grows"] = Finding(growth.mean(), growth.std(), f"first to last: {by_kind}")

    with_layer_0 = scores.pivot(index=["tokens", "kind", "run"], columns="layer", values="score")
    apart = with_layer_0[0] / with_layer_0.iloc[:, 1:-1].max(axis=1)  # over the highest between the first and the last
    tokens, kind, _ = apart.idxmin()
    detail = f"least at {tokens:,.0f} tokens, {kind}; late {apart.loc[since:].min():.2f}"
    findings["fig07-module0-apart"] = Finding(apart.min(), apart.groupby("run").min().std(), detail)
    return findings


def _orders(scores: pd.DataFrame, n: int, since: float) -> dict[str, Finding]:
    """The claims on the order of the attention layers. Tables are [tokens, run]."""
    findings = {}
    attention = scores[scores["kind"] == "attn"]
    with_last = agreement(attention, n).pivot(index="tokens", columns="run")
    correlation = with_last["rank_correlation"]
    late = correlation.loc[since:].iloc[:-1]  # the last agrees with itself

    lowest_at = correlation.min(axis=1).idxmin()
    detail = f"lowest at {lowest_at:,.0f} tokens; late at least {late.min().min():.2f}"
    findings["fig07-attn-ranking-stable"] = Finding(correlation.min().min(), correlation.min().std(), detail)

    settled = correlation[::-1].cummin()[::-1] >= SETTLED  # there and ever after
    percent = 100 * settled.idxmax() / correlation.index.max()
    by_run = ", ".join(f"{value:.2f} %" for value in percent)
    findings["fig07-order-early"] = Finding(percent.mean(), percent.std(), f"by run: {by_run}")

    overlap = 100 * with_last["overlap"].loc[since:].min()
    by_run = ", ".join(f"{value:.0f} %" for value in overlap)
    detail = f"{n} of {scores['layer'].max()} layers; by run: {by_run}"
    findings["fig07-top-n-overlap"] = Finding(overlap.min(), overlap.std(), detail)

    across = between_runs(attention, n)["rank_correlation"]
    within = late.mean().mean()
    detail = "one run; several SEEDS are needed"
    if len(across):
        detail = f"{len(across)} pairs, {across.min():.2f} to {across.max():.2f}; within runs, late: {within:.2f}"
    findings["fig07-seeds-agree"] = Finding(across.mean(), across.std(), detail)
    findings["fig07-seeds-as-training"] = Finding(within - across.mean(), across.std(), detail)
    return findings
