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
from ..compress.variant import Variant
from ..prune import dropped
from .selectors import Contender, selector
from .statistics import UNKNOWN, Estimate, difference, items, remaining_loss

BASELINE = "Baseline"  # the whole model
PAPER = "cosine"  # the selector of the paper's method, which puts nothing in place of what it drops


def papers(contenders: Iterable[Contender]) -> dict[int, Contender]:
    """The paper's method at every n. Raises ValueError where it is not among the contenders."""
    contenders = list(contenders)
    found = {
        contender.n: contender
        for contender in contenders
        if contender.choice == PAPER and contender.variant.is_plan_only
    }
    absent = sorted({contender.n for contender in contenders} - set(found))
    if absent:
        raise ValueError(f"nothing to compare with at n={absent}: {PAPER!r} with nothing in place must be there, too")
    return found


def losses(rows: pd.DataFrame, contenders: Sequence[Contender], texts: Sequence[str]) -> pd.DataFrame:
    """What every contender loses on the texts: one row each.

    Columns: choice, setting, n; left, low, high (the share of the paper's loss at n that it leaves, with its interval);
    lost_<text> and their mean, lost (nats per token more than the whole model's).
    """
    paper = papers(contenders)
    table = []
    for contender in contenders:
        share = remaining_loss(rows, contender.name, BASELINE, paper[contender.n].name, texts)
        lost = {f"lost_{text}": difference(rows, contender.name, BASELINE, text).value for text in texts}
        table.append(
            {
                "choice": contender.choice,
                "setting": contender.setting,
                "n": contender.n,
                "left": share.value,
                "low": share.low,
                "high": share.high,
            }
            | lost
            | {"lost": np.mean(list(lost.values()))}
        )
    return pd.DataFrame(table)


def percent(rows: pd.DataFrame, variant: str, where: Iterable[str]) -> list[float]:
    """Percent right of each task or set of questions."""
    return [100 * items(rows, variant, name)["value"].mean() for name in where]


def _columns(name: str, estimate: Estimate) -> dict[str, float]:
    return {
        name: estimate.value,
        f"{name}_stderr": estimate.stderr,
        f"{name}_low": estimate.low,
        f"{name}_high": estimate.high,
    }


# ---- ways to choose


def leaderboard(rows: pd.DataFrame, contenders: Sequence[Contender], texts: Sequence[str]) -> pd.DataFrame:
    """One row per choice and n, in the order of the contenders; those that are reconstructed join the row of theirs.

    Columns: selector, n, plan, attn, mlp, passes (what choosing cost), overlap (share of the attention layers of the
    paper's method at n), and lost, against (lost, less what the paper's method lost) and reconstructed (lost, where
    reconstructed): nats per token, mean over the texts, each with _stderr, _low and _high.
    """
    paper = papers(contenders)
    plain = [contender for contender in contenders if contender.variant.reconstruction is None]
    reconstructed = {
        (contender.choice, contender.n): contender.name
        for contender in contenders
        if contender.variant.reconstruction is not None
    }
    table = []
    for contender in plain:
        n = contender.n
        plan = contender.variant.plan
        layers = set(paper[n].variant.plan.attn)
        remade = reconstructed.get((contender.choice, n))
        lost_after = UNKNOWN if remade is None else difference(rows, remade, BASELINE, texts)
        table.append(
            {
                "selector": contender.choice,
                "n": n,
                "plan": plan.label,
                "attn": list(plan.attn),
                "mlp": list(plan.mlp),
                "passes": contender.passes,
                "overlap": len(layers & set(plan.attn)) / len(layers),
            }
            | _columns("lost", difference(rows, contender.name, BASELINE, texts))
            | _columns("against", difference(rows, contender.name, paper[n].name, texts))
            | _columns("reconstructed", lost_after)
        )
    return pd.DataFrame(table)


def leaderboard_to_print(table: pd.DataFrame) -> pd.DataFrame:
    """`leaderboard` with one row a selector, best first: lost_<n>, against_<n>, reconstructed_<n>, overlap, passes.

    against: "less", "more" or "same" as what the paper's method lost, by the paired interval. overlap is that of the
    smallest n, passes those of the largest. Random seeds become one row, their mean with its error over seeds.
    """
    by_n = {n: _seeds_averaged(part).set_index("selector") for n, part in table.groupby("n")}
    columns = {}
    for n, part in by_n.items():
        columns[f"lost_{n}"] = part["lost"]
        columns[f"lost_{n}_stderr"] = part["lost_stderr"]
    for n, part in by_n.items():
        verdicts = np.select([part["against_high"] < 0, part["against_low"] > 0], ["less", "more"], "same")
        columns[f"against_{n}"] = pd.Series(verdicts, part.index)
    for n, part in by_n.items():
        columns[f"reconstructed_{n}"] = part["reconstructed"]
        columns[f"reconstructed_{n}_stderr"] = part["reconstructed_stderr"]
    smallest = by_n[min(by_n)]
    columns["overlap"] = smallest["overlap"]
    columns["passes"] = by_n[max(by_n)]["passes"]
    best_first = smallest[["lost", "reconstructed"]].min(axis=1).sort_values().index
    return pd.DataFrame(columns).loc[best_first].rename_axis("selector").reset_index()


def _seeds_averaged(part: pd.DataFrame) -> pd.DataFrame:
    """Rows of one n of `leaderboard`, those of random orders made one."""
    is_random = part["selector"].map(lambda name: selector(name).seed is not None)
    seeds = part[is_random]
    if seeds.empty:
        return part
    average = seeds.mean(numeric_only=True).to_frame().T
    average["selector"] = f"random, {len(seeds)} seeds"
    average["lost_stderr"] = seeds["lost"].sem()
    return pd.concat([part[~is_random], average], ignore_index=True)


def stability(orders: Mapping[tuple[str, str, object], Sequence[Sublayer]], n: int) -> pd.DataFrame:
    """How alike a selector's orders are when one thing about its text or its numbers changes.

    orders: {(selector, what changes, to what): order of all layers}. One row per (selector, what changes): overlap,
    the mean share of the first n layers that two orders have in common, and tau, Kendall's rank correlation, each over
    all pairs, with the lowest pair (_low), and pairs, their number.
    """
    groups: dict[tuple[str, str], list[Sequence[Sublayer]]] = {}
    for (name, change, _), order in orders.items():
        groups.setdefault((name, change), []).append(list(order))
    table = []
    for (name, change), group in groups.items():
        pairs = list(combinations(group, 2))
        overlaps = [agreement(pair, n) for pair in pairs]
        taus = [_rank_correlation(*pair) for pair in pairs]
        table.append(
            {
                "selector": name,
                "change": change,
                "pairs": len(pairs),
                "overlap": np.mean(overlaps),
                "overlap_low": min(overlaps),
                "tau": np.mean(taus),
                "tau_low": min(taus),
            }
        )
    return pd.DataFrame(table)


def _rank_correlation(order: Sequence[Sublayer], other: Sequence[Sublayer]) -> float:
    """Kendall's tau of two orders of the same sublayers."""
    ranks = [other.index(sublayer) for sublayer in order]
    return float(kendalltau(range(len(ranks)), ranks).statistic)


# ---- quality against speed


def trade_offs(
    model: nn.Module,
    rows: pd.DataFrame,
    contenders: Sequence[Contender],
    texts: Sequence[str],
    questions: Sequence[str],
    tasks: Sequence[str],
    sequences: Iterable[int],
    **speed,
) -> pd.DataFrame:
    """`losses` with what the contenders answer and save, one row each.

    Adds plan (a label), attn, mlp, windowed (numbers of sublayers), the percent right of every set of questions and
    task, more (how many points more of the questions, benchmarks apart, than the paper's method at n, paired, mean
    over the sets) with half its interval (_stderr), and at_<b>: the speedup that `predict_speed` allows for b sequences
    with the settings `speed`.
    """
    paper = papers(contenders)
    table = losses(rows, contenders, texts)
    table["plan"] = [contender.variant.label for contender in contenders]
    table = table.join(_sizes(contenders))
    for name in [*questions, *tasks]:
        table[name] = [percent(rows, contender.name, [name])[0] for contender in contenders]
    more = [difference(rows, contender.name, paper[contender.n].name, questions) for contender in contenders]
    table["more"] = [100 * estimate.value for estimate in more]
    table["more_stderr"] = [100 * (estimate.high - estimate.low) / 2 for estimate in more]
    for b in sequences:
        settings = speed | {"batch_size": b}
        table[f"at_{b}"] = [contender.variant.predicted_speedup(model, **settings) for contender in contenders]
    return table


def frontier(
    model: nn.Module, rows: pd.DataFrame, contenders: Sequence[Contender], texts: Sequence[str], **speed
) -> pd.DataFrame:
    """What every contender loses on the texts and what it saves, one row each.

    speed: settings of `predict_speed`. Columns: method, choice, setting, n, attn, mlp, windowed (numbers of sublayers),
    lost with _low, _high and _stderr, predicted_speedup, kv (megabytes of the cache at the end, by prediction),
    parameters (millions).
    """
    table = []
    for contender, sizes in zip(contenders, _sizes(contenders).to_dict("records"), strict=True):
        variant = contender.variant
        is_plain = variant.reconstruction is None or variant.windows is not None
        with dropped(model, variant.plan):
            n_parameters = sum(parameter.numel() for parameter in model.parameters())
        table.append(
            {
                "method": contender.choice if is_plain else f"{contender.choice}: {contender.setting}",
                "choice": contender.choice,
                "setting": contender.setting,
                "n": contender.n,
            }
            | sizes
            | _columns("lost", difference(rows, contender.name, BASELINE, texts))
            | {
                "predicted_speedup": variant.predicted_speedup(model, **speed),
                "kv": variant.speed_limit(model, **speed).kv_bytes / 1e6,
                "parameters": n_parameters / 1e6,
            }
        )
    return pd.DataFrame(table)


def _sizes(contenders: Iterable[Contender]) -> pd.DataFrame:
    """Numbers of dropped attention layers and MLPs and of windows, one row each."""
    return pd.DataFrame(
        {
            "attn": len(contender.variant.plan.attn),
            "mlp": len(contender.variant.plan.mlp),
            "windowed": 0 if contender.variant.windows is None else len(contender.variant.windows.layers),
        }
        for contender in contenders
    )


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


def added_tensors(model: nn.Module, variant: Variant) -> list[str]:
    """Names of the tensors that `variant` has and its plan alone has not, or has in another shape."""
    with dropped(model, variant.plan):
        plain = {name: value.shape for name, value in model.state_dict().items()}
    with variant.applied(model):
        return [name for name, value in model.state_dict().items() if plain.get(name) != value.shape]
