"""Tables that compare contenders item by item: what they lose, answer and save, beside the paper's method.

All are computed from the rows of `quality`, in which the whole model is called BASELINE.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import combinations

import numpy as np
import pandas as pd
import scipy
from torch import nn

from ..compress.search import Sublayer, agreement
from ..compress.shortened_llama import removed
from ..compress.variant import Variant
from .estimate import UNKNOWN, Estimate
from .selectors import Contender
from .statistics import combined, difference, items, mean_of, remaining_loss, speed_ratio

BASELINE = "Baseline"  # the whole model
PAPER = "cosine"  # the selector of the paper's method, which puts nothing in place of what it drops


def papers(contenders: Iterable[Contender]) -> dict[int, Contender]:
    """The paper's method at every n. Raises ValueError where it is not among the contenders."""
    contenders = list(contenders)
    of_paper = [contender for contender in contenders if contender.choice == PAPER and contender.variant.is_plan_only]
    by_n = {contender.n: contender for contender in of_paper}
    absent = sorted({contender.n for contender in contenders} - set(by_n))
    if absent:
        raise ValueError(f"nothing to compare with at n={absent}: {PAPER!r} with nothing in place must be there, too")
    return by_n


def texts_of(rows: pd.DataFrame) -> list[str]:
    """Names of the texts that were measured on."""
    return list(rows.loc[rows["metric"] == "nats", "where"].unique())


def losses(rows: pd.DataFrame, contenders: Sequence[Contender]) -> pd.DataFrame:
    """What every contender loses on the texts: one row each.

    Columns: choice, setting, n; left, low, high (the share of the paper's loss at n that it leaves, with its interval);
    lost_<text> and their mean, lost, with its interval (_low, _high): nats per token more than the whole model's.
    """
    paper = papers(contenders)
    texts = texts_of(rows)
    table = []
    for contender in contenders:
        share = remaining_loss(rows, contender.name, BASELINE, paper[contender.n].name, texts)
        lost = {f"lost_{text}": difference(rows, contender.name, BASELINE, text).value for text in texts}
        row = {"choice": contender.choice, "setting": contender.setting, "n": contender.n}
        row |= {"left": share.value, "low": share.low, "high": share.high}
        table.append(row | lost | difference(rows, contender.name, BASELINE, texts).columns("lost"))
    return pd.DataFrame(table)


def percent(rows: pd.DataFrame, variant: str, where: Iterable[str]) -> list[float]:
    """Percent right of each task or set of questions."""
    return [100 * items(rows, variant, name)["value"].mean() for name in where]


def _sizes(variant: Variant) -> dict[str, int]:
    """Numbers of dropped attention layers and MLPs and of windows."""
    n_windows = 0 if variant.windows is None else len(variant.windows.layers)
    return {"attn": len(variant.plan.attn), "mlp": len(variant.plan.mlp), "windowed": n_windows}


def leaderboard(rows: pd.DataFrame, contenders: Sequence[Contender]) -> pd.DataFrame:
    """One row per choice and n, in the order of the contenders; those that are reconstructed join the row of theirs.

    Columns: selector, n, plan, attn, mlp, passes (what choosing cost), overlap (share of the attention layers of the
    paper's method at n), and lost, against (lost, less what the paper's method lost) and reconstructed (lost, where
    reconstructed): nats per token, mean over the texts, each with _low and _high.
    """
    paper = papers(contenders)
    texts = texts_of(rows)
    remade = [contender for contender in contenders if contender.variant.reconstruction is not None]
    lost_after = {(other.choice, other.n): difference(rows, other.name, BASELINE, texts) for other in remade}
    table = []
    for contender in contenders:
        if contender in remade:
            continue
        n = contender.n
        plan = contender.variant.plan
        layers = set(paper[n].variant.plan.attn)
        row = {"selector": contender.choice, "n": n, "plan": plan.label, "attn": list(plan.attn), "mlp": list(plan.mlp)}
        row |= {"passes": contender.passes, "overlap": len(layers & set(plan.attn)) / len(layers)}
        row |= difference(rows, contender.name, BASELINE, texts).columns("lost")
        row |= difference(rows, contender.name, paper[n].name, texts).columns("against")
        row |= lost_after.get((contender.choice, n), UNKNOWN).columns("reconstructed")
        table.append(row)
    return pd.DataFrame(table)


def leaderboard_to_print(table: pd.DataFrame) -> pd.DataFrame:
    """`leaderboard` with one row a selector, best first: lost_<n>, against_<n>, reconstructed_<n>, overlap, passes.

    against: "less", "more" or "same" as what the paper's method lost, by the paired interval. overlap is that of the
    smallest n, passes those of the largest. Random seeds become one row, their mean with its interval over seeds.
    """
    counts = sorted(set(table["n"]))
    numbers = table.drop(columns=["plan", "attn", "mlp"]).pivot(index="selector", columns="n")
    numbers = numbers.loc[table["selector"].unique()].astype(float)
    is_random = numbers.index.str.startswith("random ")
    seeds = numbers[is_random]
    if len(seeds):
        average = seeds.mean()
        for n in counts:
            over_seeds = mean_of(seeds["lost", n], "seeds")
            average["lost_low", n] = over_seeds.low
            average["lost_high", n] = over_seeds.high
        numbers = numbers[~is_random]
        numbers.loc[f"random, {len(seeds)} seeds"] = average
    columns = {}
    for name in ("lost", "against", "reconstructed"):
        for n in counts:
            columns[f"{name}_{n}"] = numbers[name, n]
            if name == "against":
                verdicts = [numbers["against_high", n] < 0, numbers["against_low", n] > 0]
                columns[f"against_{n}"] = np.select(verdicts, ["less", "more"], "same")
            else:
                columns[f"{name}_{n}_low"] = numbers[f"{name}_low", n]
                columns[f"{name}_{n}_high"] = numbers[f"{name}_high", n]
    columns["overlap"] = numbers["overlap", counts[0]]
    columns["passes"] = numbers["passes", counts[-1]]
    first = numbers[[("lost", counts[0]), ("reconstructed", counts[0])]]
    return pd.DataFrame(columns).loc[first.min(axis=1).sort_values().index].reset_index()


def stability(orders: Mapping[tuple[str, str, object], Sequence[Sublayer]], n: int) -> pd.DataFrame:
    """How alike a selector's orders are when one thing about its text or its numbers changes.

    orders: {(selector, what changes, to what): order of all layers}. One row per (selector, what changes): pairs, the
    number of pairs of orders; overlap, the mean share of the first n layers that two of them have in common, and tau,
    Kendall's rank correlation, each with the lowest pair (_low).
    """
    pairs = []
    for (place, order), (other_place, other) in combinations(orders.items(), 2):
        if place[:2] == other_place[:2]:
            ranks = [list(other).index(sublayer) for sublayer in order]
            tau = scipy.stats.kendalltau(range(len(ranks)), ranks).statistic
            pairs.append((*place[:2], agreement([order, other], n), tau))
    by_change = pd.DataFrame(pairs, columns=["selector", "change", "overlap", "tau"]).groupby(
        ["selector", "change"], sort=False
    )
    table = []
    for (name, change), group in by_change:
        row = {"selector": name, "change": change, "pairs": len(group)}
        for column in ("overlap", "tau"):
            row |= {column: group[column].mean(), f"{column}_low": group[column].min()}
        table.append(row)
    return pd.DataFrame(table)


def trade_offs(
    model: nn.Module, rows: pd.DataFrame, contenders: Sequence[Contender], sequences: Iterable[int], **speed
) -> pd.DataFrame:
    """`losses` with what the contenders answer and save, one row each.

    Adds plan (a label), attn, mlp, windowed (numbers of sublayers), the percent right of every set of questions and
    task, and at_<b>: the speedup that `predict_speed` allows for b sequences with the settings `speed`.
    """
    variants = [contender.variant for contender in contenders]
    table = losses(rows, contenders)
    table["plan"] = [variant.label for variant in variants]
    table = table.join(pd.DataFrame(map(_sizes, variants)))
    for name in rows.loc[rows["metric"] != "nats", "where"].unique():
        table[name] = [percent(rows, contender.name, [name])[0] for contender in contenders]
    for b in sequences:
        settings = speed | {"batch_size": b}
        table[f"at_{b}"] = [variant.predicted_speedup(model, **settings) for variant in variants]
    return table


def frontier(model: nn.Module, rows: pd.DataFrame, contenders: Sequence[Contender], **speed) -> pd.DataFrame:
    """What every contender loses on the texts and what it saves, one row each.

    speed: settings of `predict_speed`. Columns: method, choice, setting, n, attn, mlp, windowed (numbers of sublayers),
    lost with _low and _high, predicted_speedup, kv (megabytes of the cache at the end, by prediction),
    parameters (millions).
    """
    texts = texts_of(rows)
    table = []
    for contender in contenders:
        variant = contender.variant
        is_plain = variant.reconstruction is None or variant.windows is not None
        row = {"method": contender.choice if is_plain else contender.method}
        row |= {"choice": contender.choice, "setting": contender.setting, "n": contender.n} | _sizes(variant)
        row |= difference(rows, contender.name, BASELINE, texts).columns("lost")
        row["predicted_speedup"] = variant.predicted_speedup(model, **speed)
        row["kv"] = variant.speed_limit(model, **speed).kv_bytes / 1e6
        row["parameters"] = (model.num_parameters() - removed(model, variant.plan)) / 1e6
        table.append(row)
    return pd.DataFrame(table)


def frontier_gain(rows: pd.DataFrame, contenders: Sequence[Contender]) -> Estimate:
    """How much less the best of the others loses than the best that puts nothing in place of what it drops.

    The smallest over the sizes, in nats, mean over the texts; the best are found anew in every draw.
    """
    names = [contender.name for contender in contenders]
    counts = np.array([contender.n for contender in contenders])
    is_plain = np.array([contender.setting == "none" for contender in contenders])

    def statistic(means: list[np.ndarray]) -> float:
        nats = np.mean(means, axis=0)
        gains = [nats[is_plain & (counts == n)].min() - nats[~is_plain & (counts == n)].min() for n in set(counts)]
        return float(min(gains))

    return combined(statistic, rows, names, texts_of(rows))


def measured_speed(rounds: pd.DataFrame, contenders: Sequence[Contender]) -> pd.DataFrame:
    """What `timing` says of the contenders, one row each, to join their other columns.

    Columns: speedup, prefill and decode over BASELINE, with their intervals over rounds (_low, _high); kv, megabytes of
    the cache at the end.
    """
    table = []
    for contender in contenders:
        row = {}
        for name, column in {"speedup": "seconds", "prefill": "prefill_seconds", "decode": "decode_seconds"}.items():
            row |= speed_ratio(rounds, contender.name, BASELINE, column).columns(name)
        row["kv"] = rounds.loc[rounds["variant"] == contender.name, "kv_bytes"].iloc[0] / 1e6
        table.append(row)
    return pd.DataFrame(table)


def as_fast_as_timed(
    rounds: pd.DataFrame, contenders: Sequence[Contender], n: int, bound: str = "low"
) -> list[Contender]:
    """Those that were faster here than the paper's method at n.

    bound: "low": surely, for the whole interval of the speedup over rounds is above 1; "value": on average; "high":
    perhaps.
    """
    paper = papers(contenders)[n]
    others = [contender for contender in contenders if contender.n == n and contender is not paper]
    return [other for other in others if getattr(speed_ratio(rounds, other.name, paper.name), bound) > 1]


def remaining_as_timed(
    rows: pd.DataFrame, rounds: pd.DataFrame, contenders: Sequence[Contender], counts: Iterable[int]
) -> Estimate:
    """The share of the paper's loss that the best of `as_fast_as_timed` leaves, the largest over counts.

    Mean over the texts; the best are found anew in every draw. 1 where none is as fast. The interval goes from what is
    left if all that are perhaps as fast count, to what is left if only those do that surely are.
    """
    paper = papers(contenders)
    names = [BASELINE, *(contender.name for contender in contenders)]
    of_paper = {n: names.index(paper[n].name) for n in counts}
    estimates = {}
    for bound in ("low", "value", "high"):
        as_fast = {}
        for n in of_paper:
            as_fast[n] = [names.index(other.name) for other in as_fast_as_timed(rounds, contenders, n, bound)]
        largest = partial(_largest_share, as_fast=as_fast, of_paper=of_paper)
        estimates[bound] = combined(largest, rows, names, texts_of(rows))
    average = estimates["value"]
    low = min(estimate.low for estimate in estimates.values())
    high = max(estimate.high for estimate in estimates.values())
    return Estimate(average.value, low, high, average.n, f"{average.over} and rounds", average.method)


def _largest_share(means: list[np.ndarray], as_fast: Mapping[int, list[int]], of_paper: Mapping[int, int]) -> float:
    """Of the paper's loss at n that the best of `as_fast` leaves; means: of each text, the whole model's first."""
    left = []
    for n, others in as_fast.items():
        shares = np.mean([(nats - nats[0]) / (nats[of_paper[n]] - nats[0]) for nats in means], axis=0)
        left.append(shares[others].min() if others else 1.0)
    return float(max(left))
