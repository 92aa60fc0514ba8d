"""Tables that compare contenders item by item: what they lose, answer and save, beside the paper's method.

All are computed from the rows of `quality`, in which the whole model is called BASELINE.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from scipy.stats import kendalltau
from torch import nn

from ..compress.search import Sublayer, agreement
from ..compress.shortened_llama import removed
from ..compress.variant import Variant
from .estimate import UNKNOWN, Estimate
from .selectors import Contender
from .statistics import difference, items, remaining_loss

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
    lost_<text> and their mean, lost (nats per token more than the whole model's).
    """
    paper = papers(contenders)
    texts = texts_of(rows)
    table = []
    for contender in contenders:
        share = remaining_loss(rows, contender.name, BASELINE, paper[contender.n].name, texts)
        lost = {f"lost_{text}": difference(rows, contender.name, BASELINE, text).value for text in texts}
        row = {"choice": contender.choice, "setting": contender.setting, "n": contender.n}
        row |= {"left": share.value, "low": share.low, "high": share.high}
        table.append(row | lost | {"lost": np.mean(list(lost.values()))})
    return pd.DataFrame(table)


def percent(rows: pd.DataFrame, variant: str, where: Iterable[str]) -> list[float]:
    """Percent right of each task or set of questions."""
    return [100 * items(rows, variant, name)["value"].mean() for name in where]


def _columns(name: str, estimate: Estimate) -> dict[str, float]:
    interval = {f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return {name: estimate.value, f"{name}_stderr": estimate.stderr} | interval


def _sizes(variant: Variant) -> dict[str, int]:
    """Numbers of dropped attention layers and MLPs and of windows."""
    n_windows = 0 if variant.windows is None else len(variant.windows.layers)
    return {"attn": len(variant.plan.attn), "mlp": len(variant.plan.mlp), "windowed": n_windows}


def leaderboard(rows: pd.DataFrame, contenders: Sequence[Contender]) -> pd.DataFrame:
    """One row per choice and n, in the order of the contenders; those that are reconstructed join the row of theirs.

    Columns: selector, n, plan, attn, mlp, passes (what choosing cost), overlap (share of the attention layers of the
    paper's method at n), and lost, against (lost, less what the paper's method lost) and reconstructed (lost, where
    reconstructed): nats per token, mean over the texts, each with _stderr, _low and _high.
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
        row |= _columns("lost", difference(rows, contender.name, BASELINE, texts))
        row |= _columns("against", difference(rows, contender.name, paper[n].name, texts))
        row |= _columns("reconstructed", lost_after.get((contender.choice, n), UNKNOWN))
        table.append(row)
    return pd.DataFrame(table)


def leaderboard_to_print(table: pd.DataFrame) -> pd.DataFrame:
    """`leaderboard` with one row a selector, best first: lost_<n>, against_<n>, reconstructed_<n>, overlap, passes.

    against: "less", "more" or "same" as what the paper's method lost, by the paired interval. overlap is that of the
    smallest n, passes those of the largest. Random seeds become one row, their mean with its error over seeds.
    """
    counts = sorted(set(table["n"]))
    numbers = table.drop(columns=["plan", "attn", "mlp"]).pivot(index="selector", columns="n")
    numbers = numbers.loc[table["selector"].unique()].astype(float)
    is_random = numbers.index.str.startswith("random ")
    seeds = numbers[is_random]
    if len(seeds):
        average = seeds.mean()
        average["lost_stderr"] = seeds["lost"].sem()
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
                columns[f"{name}_{n}_stderr"] = numbers[f"{name}_stderr", n]
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
            tau = kendalltau(range(len(ranks)), ranks).statistic
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
    task, more (how many points more of the questions, benchmarks apart, than the paper's method at n, paired, mean
    over the sets) with half its interval (_stderr), and at_<b>: the speedup that `predict_speed` allows for b sequences
    with the settings `speed`.
    """
    paper = papers(contenders)
    variants = [contender.variant for contender in contenders]
    answered = rows[rows["metric"] != "nats"]
    questions = list(answered.loc[answered["metric"] == "match", "where"].unique())
    tasks = [name for name in answered["where"].unique() if name not in questions]
    table = losses(rows, contenders)
    table["plan"] = [variant.label for variant in variants]
    table = table.join(pd.DataFrame(map(_sizes, variants)))
    for name in [*questions, *tasks]:
        table[name] = [percent(rows, contender.name, [name])[0] for contender in contenders]
    more = [difference(rows, contender.name, paper[contender.n].name, questions) for contender in contenders]
    table["more"] = [100 * estimate.value for estimate in more]
    table["more_stderr"] = [100 * (estimate.high - estimate.low) / 2 for estimate in more]
    for b in sequences:
        settings = speed | {"batch_size": b}
        table[f"at_{b}"] = [variant.predicted_speedup(model, **settings) for variant in variants]
    return table


def frontier(model: nn.Module, rows: pd.DataFrame, contenders: Sequence[Contender], **speed) -> pd.DataFrame:
    """What every contender loses on the texts and what it saves, one row each.

    speed: settings of `predict_speed`. Columns: method, choice, setting, n, attn, mlp, windowed (numbers of sublayers),
    lost with _low, _high and _stderr, predicted_speedup, kv (megabytes of the cache at the end, by prediction),
    parameters (millions).
    """
    texts = texts_of(rows)
    table = []
    for contender in contenders:
        variant = contender.variant
        is_plain = variant.reconstruction is None or variant.windows is not None
        row = {"method": contender.choice if is_plain else contender.method}
        row |= {"choice": contender.choice, "setting": contender.setting, "n": contender.n} | _sizes(variant)
        row |= _columns("lost", difference(rows, contender.name, BASELINE, texts))
        row["predicted_speedup"] = variant.predicted_speedup(model, **speed)
        row["kv"] = variant.speed_limit(model, **speed).kv_bytes / 1e6
        row["parameters"] = (model.num_parameters() - removed(model, variant.plan)) / 1e6
        table.append(row)
    return pd.DataFrame(table)


def measured_speed(speedups: pd.DataFrame, contenders: Sequence[Contender]) -> pd.DataFrame:
    """What `timing.speedups` says of the contenders, one row each, to join their other columns.

    Columns: speedup, prefill and decode (over the baseline that the speedups have), each with half its interval
    (_stderr); kv, megabytes of the cache at the end.
    """
    rows = speedups.loc[[contender.name for contender in contenders]].reset_index(drop=True)
    table = pd.DataFrame(index=rows.index)
    for name, column in {"speedup": "speedup", "prefill": "prefill_speedup", "decode": "decode_speedup"}.items():
        table[name] = rows[column]
        table[f"{name}_stderr"] = (rows[f"{column}_high"] - rows[f"{column}_low"]) / 2
    table["kv"] = rows["kv_bytes"] / 1e6
    return table


def remaining_as_timed(table: pd.DataFrame, counts: Iterable[int]) -> dict[int, float]:
    """{n: share of the paper's loss at n that the best of the others leaves, of those measured to be as fast}.

    table: from `trade_offs`, with a column speedup, as measured. 1 where no other is as fast.
    """
    is_paper = table["choice"] == PAPER
    shares = {}
    for n in sorted(counts):
        paper = table[is_paper & (table["n"] == n)].iloc[0]
        as_fast = table.loc[~is_paper & (table["speedup"] >= paper["speedup"]), "lost"]
        shares[n] = float(min(as_fast, default=paper["lost"]) / paper["lost"])
    return shares
