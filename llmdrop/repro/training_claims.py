"""What Figure 7 says of a training run, as numbers: how soon its final order of layers is there, and how it gets there.

Layer 0 stands apart in that figure, and is left out of all but the claim about it.
"""

import math
from dataclasses import astuple, dataclass
from itertools import combinations

import pandas as pd
from scipy import stats

SETTLED = 0.8  # rank correlation with the final order from which on an order counts as the final one


@dataclass(frozen=True)
class Finding:
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
    by_layer = scores[scores["layer"] > 0].pivot(index=["tokens", "run"], columns=["kind", "layer"], values="score")
    means = by_layer.T.groupby(level="kind").mean().T.unstack("run")  # means["attn"]: [tokens, run]
    attention = scores[scores["kind"] == "attn"]
    order = agreement(attention, n)
    correlation = order.pivot(index="tokens", columns="run", values="rank_correlation")
    overlap = order.pivot(index="tokens", columns="run", values="overlap")
    findings = {
        "fig07-attn-low-always": _attention_below_mlps(means["attn"] / means["mlp"], since),
        "fig07-attn-low-share": _share_of_layers_below(by_layer, since),
        "fig07-mlp-grows": _growth(means),
        **_late_slopes(scores, since),
        "fig07-module0-apart": _layer_0_apart(scores, since),
        "fig07-attn-ranking-stable": _lowest_correlation(correlation, since),
        "fig07-order-early": _settling(correlation),
        "fig07-top-n-overlap": _smallest_overlap(overlap, since, n, scores["layer"].max()),
        **_seeds_against_training(attention, correlation, since, n),
    }
    rows = {id: astuple(finding) for id, finding in findings.items()}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["measured", "error", "detail"])


def agreement(scores: pd.DataFrame, n: int) -> pd.DataFrame:
    """How much each checkpoint's order of layers is that of its run's last one.

    Returns run, kind, tokens, rank_correlation (Spearman), overlap (share of the n layers dropped first that they have
    in common).
    """
    rows = []
    for (run, kind), part in scores[scores["layer"] > 0].groupby(["run", "kind"], sort=False):
        by_tokens = part.pivot(index="layer", columns="tokens", values="score")
        last = by_tokens.iloc[:, -1]
        for tokens in by_tokens:
            rows.append({"run": run, "kind": kind, "tokens": tokens} | _alike(by_tokens[tokens], last, n))
    return pd.DataFrame(rows)


def between_runs(scores: pd.DataFrame, n: int) -> pd.DataFrame:
    """The same of the last checkpoints of each two runs: kind, first, second, rank_correlation, overlap."""
    last = scores[(scores["layer"] > 0) & (scores["tokens"] == scores["tokens"].max())]
    rows = []
    for kind, part in last.groupby("kind", sort=False):
        by_run = part.pivot(index="layer", columns="run", values="score")
        for first, second in combinations(by_run, 2):
            alike = _alike(by_run[first], by_run[second], n)
            rows.append({"kind": kind, "first": first, "second": second} | alike)
    return pd.DataFrame(rows, columns=["kind", "first", "second", "rank_correlation", "overlap"])


def _alike(first: pd.Series, second: pd.Series, n: int) -> dict[str, float]:
    common = set(first.nsmallest(n).index) & set(second.nsmallest(n).index)
    return {"rank_correlation": float(first.corr(second, method="spearman")), "overlap": len(common) / n}


def slopes(scores: pd.DataFrame, since: float) -> pd.DataFrame:
    """Change of the mean score per tenfold training tokens from `since` tokens on: kind (index), slope, halfwidth.

    A least-squares line per layer and run; halfwidth is of the 95 % t interval of their mean, layers and runs taken
    for independent. Raises ValueError where fewer than two checkpoints are left.
    """
    late = scores[(scores["layer"] > 0) & (scores["tokens"] >= max(since, 1))]
    n_late = late["tokens"].nunique()
    if n_late < 2:
        raise ValueError(f"{n_late} checkpoints from {since:g} tokens on; a slope needs two")
    rows = []
    for kind, part in late.groupby("kind", sort=False):
        by_tokens = part.pivot(index="tokens", columns=["run", "layer"], values="score")
        x = pd.Series(by_tokens.index, by_tokens.index).map(math.log10)
        centered = x - x.mean()
        of_layers = by_tokens.mul(centered, axis=0).sum() / (centered**2).sum()  # [run and layer]
        halfwidth = stats.t.ppf(0.975, len(of_layers) - 1) * of_layers.sem()
        rows.append({"kind": kind, "slope": of_layers.mean(), "halfwidth": halfwidth})
    return pd.DataFrame(rows).set_index("kind")


# -- one function per claim; tables are [tokens, run] ---------------------------------------------------------------


def _attention_below_mlps(ratio: pd.DataFrame, since: float) -> Finding:
    """ratio: attention's mean score over the MLPs'."""
    below_for_good = ratio[::-1].cummax()[::-1] < 1  # there and ever after
    places = []
    for run in below_for_good:
        ever = below_for_good[run].any()
        places.append(f"{below_for_good[run].idxmax():,.0f}" if ever else "never")
    late = ratio[ratio.index >= since].max().max()
    detail = f"below 1 for good from {', '.join(places)} tokens on; late at most {late:.2f}"
    return Finding(ratio.max().max(), ratio.max().std(), detail)


def _share_of_layers_below(by_layer: pd.DataFrame, since: float) -> Finding:
    """Percent of layers whose attention scores below their MLP, late in training."""
    below = by_layer["attn"] < by_layer["mlp"]
    share = 100 * below.mean(axis=1).unstack()
    late = share[share.index >= since].mean()
    by_tokens = ", ".join(f"{tokens:,.0f} {value:.0f} %" for tokens, value in share.mean(axis=1).items())
    return Finding(late.mean(), late.std(), f"by tokens: {by_tokens}")


def _growth(means: pd.DataFrame) -> Finding:
    """How much more the MLPs' mean score grows than attention's, from the first checkpoint to the last."""
    change = (means.iloc[-1] - means.iloc[0]).unstack()  # [kind, run]
    growth = change.loc["mlp"] - change.loc["attn"]
    by_kind = ", ".join(f"{kind} {value:+.4f}" for kind, value in change.mean(axis=1).items())
    return Finding(growth.mean(), growth.std(), f"first to last: {by_kind}")


def _late_slopes(scores: pd.DataFrame, since: float) -> dict[str, Finding]:
    ids = {"attn": "fig07-attn-stays-low", "mlp": "fig07-mlp-rises", "block": "fig07-block-rises"}
    findings = {}
    for kind, row in slopes(scores, since).iterrows():
        low = row["slope"] - row["halfwidth"]
        high = row["slope"] + row["halfwidth"]
        detail = f"95 % interval {low:.4f} to {high:.4f}, from {since:,.0f} tokens on"
        findings[ids[kind]] = Finding(row["slope"], row["halfwidth"], detail)
    return findings


def _layer_0_apart(scores: pd.DataFrame, since: float) -> Finding:
    """Layer 0's score over the highest of the layers between the first and the last, where it is least."""
    by_layer = scores.pivot(index=["tokens", "kind", "run"], columns="layer", values="score")
    last_layer = by_layer.columns[-1]
    apart = by_layer[0] / by_layer.loc[:, 1 : last_layer - 1].max(axis=1)
    late = apart[apart.index.get_level_values("tokens") >= since].min()
    tokens, kind, _ = apart.idxmin()
    detail = f"least at {tokens:,.0f} tokens, {kind}; late {late:.2f}"
    return Finding(apart.min(), apart.groupby("run").min().std(), detail)


def _late_before_last(table: pd.DataFrame, since: float) -> pd.DataFrame:
    return table[(table.index >= since) & (table.index < table.index.max())]


def _lowest_correlation(correlation: pd.DataFrame, since: float) -> Finding:
    late = _late_before_last(correlation, since).min().min()
    detail = f"lowest at {correlation.min(axis=1).idxmin():,.0f} tokens; late at least {late:.2f}"
    return Finding(correlation.min().min(), correlation.min().std(), detail)


def _settling(correlation: pd.DataFrame) -> Finding:
    """Percent of training after which the order is the final one, and stays it."""
    settled = correlation[::-1].cummin()[::-1] >= SETTLED
    percent = 100 * settled.idxmax() / correlation.index.max()
    by_run = ", ".join(f"{value:.2f} %" for value in percent)
    return Finding(percent.mean(), percent.std(), f"by run: {by_run}")


def _smallest_overlap(overlap: pd.DataFrame, since: float, n: int, n_candidates: int) -> Finding:
    percent = 100 * overlap[overlap.index >= since].min()
    by_run = ", ".join(f"{value:.0f} %" for value in percent)
    return Finding(percent.min(), percent.std(), f"{n} of {n_candidates} layers; by run: {by_run}")


def _seeds_against_training(
    attention: pd.DataFrame, correlation: pd.DataFrame, since: float, n: int
) -> dict[str, Finding]:
    """Whether runs agree with each other as checkpoints of one run do with its last."""
    across = between_runs(attention, n)["rank_correlation"]
    within = _late_before_last(correlation, since).mean().mean()
    if across.empty:
        detail = "one run; several SEEDS are needed"
    else:
        pairs = f"{len(across)} pairs, {across.min():.2f} to {across.max():.2f}"
        detail = f"{pairs}; within runs, late: {within:.2f}"
    return {
        "fig07-seeds-agree": Finding(across.mean(), across.std(), detail),
        "fig07-seeds-as-training": Finding(within - across.mean(), across.std(), detail),
    }
