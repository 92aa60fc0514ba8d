"""What the measurements of `beyond` say: shares and differences with intervals, leaderboards, and their figures."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.stats import kendalltau

from .calibration import Calibration
from .compensate import compensated, fit
from .figures import _plain_log_ticks
from .plan import DropPlan
from .prune import dropped
from .selection import agreement
from .writing import plot_percent


def share_left(
    rows: pd.DataFrame, whole: pd.DataFrame, paper: pd.DataFrame, where: Sequence[str], rounds: int = 2000
) -> tuple[float, float, float]:
    """What is left of a loss: (loss - whole's) / (paper's - whole's), with a 95 % interval from a paired bootstrap.

    rows, whole, paper: as from `measure`. The value is the mean over the texts and tasks named by `where`; samples of
    every text are drawn with replacement, the same for all three. 1: nothing gained; 0: as good as the whole model.
    """
    random, shares = np.random.default_rng(0), []
    for name in where:
        mine, base, other = (frame[frame["where"] == name].sort_values("item") for frame in (rows, whole, paper))
        weight = np.asarray(base["n"], dtype=float)
        pick = _draws(random, len(base), rounds)
        lost, most = ((np.asarray(f["value"]) - np.asarray(base["value"])) * weight for f in (mine, other))
        with np.errstate(divide="ignore", invalid="ignore"):
            shares.append(lost[pick].sum(1) / most[pick].sum(1))
    mean = np.mean(shares, axis=0)
    low, high = np.nanquantile(mean[1:], [0.025, 0.975])
    return float(mean[0]), float(min(low, mean[0])), float(max(high, mean[0]))  # equal ones differ by rounding


def paired(
    rows: pd.DataFrame, other: pd.DataFrame, where: str | Sequence[str], rounds: int = 2000
) -> tuple[float, float, float]:
    """Mean of rows' values less other's over the items, and a 95 % interval from a paired bootstrap.

    where: a text or task, or several: then the mean of their means, the items of each drawn on their own.
    """
    random, means = np.random.default_rng(0), []
    for name in [where] if isinstance(where, str) else where:
        mine, theirs = (frame[frame["where"] == name].sort_values("item") for frame in (rows, other))
        difference = np.asarray(mine["value"]) - np.asarray(theirs["value"])
        pick = _draws(random, len(difference), rounds)
        means.append(difference[pick].mean(1))
    mean = np.mean(means, axis=0)
    low, high = np.quantile(mean[1:], [0.025, 0.975])
    return float(mean[0]), float(low), float(high)


def _draws(random: np.random.Generator, n: int, rounds: int) -> np.ndarray:
    """[1 + rounds, n]: all n items, then n of them drawn with replacement in every round."""
    return np.vstack([np.arange(n), random.integers(n, size=(rounds, n))])


def losses(found: Mapping[tuple[str, str, int], pd.DataFrame], whole: pd.DataFrame, texts) -> pd.DataFrame:
    """One row per (choice, compensation, n): what `measure` gave, against the whole model and the paper's method.

    found needs ("cosine", "none", n) for every n. Columns: left, low, high (`share_left` on the texts), lost (mean over
    the texts, nats per token) and lost_<text>.
    """
    rows = []
    for (how, method, n), each in found.items():
        paper = found["cosine", "none", n]
        row = {"choice": how, "compensation": method, "n": n}
        row["left"], row["low"], row["high"] = share_left(each, whole, paper, list(texts))
        row |= {f"lost_{name}": paired(each, whole, name)[0] for name in texts}
        row["lost"] = np.mean([row[f"lost_{name}"] for name in texts])
        rows.append(row)
    return pd.DataFrame(rows)


def leaderboard(
    plans: Mapping[tuple[str, int], DropPlan],
    passes: Mapping[str, float],
    plain: Mapping,
    fixed: Mapping[tuple[str, int], pd.DataFrame],
    where: Sequence[str],
) -> pd.DataFrame:
    """One row per (selector, n), the keys of `plans`, which hold ("cosine", n) for every n.

    passes: what choosing cost. plain: as from `measure_plain` for the plans and "whole". fixed: what `measure` gave
    with corrections, for some. Columns: selector, n, plan, attn, mlp, passes, overlap (share of the layers of "cosine"
    at n), and lost, refitted (nats per token, mean over the texts `where`) and against (lost, less what "cosine" at n
    lost), each with _low, _high (95 %, paired bootstrap over samples) and _stderr.
    """
    rows = []
    for (how, n), plan in plans.items():
        base = plans["cosine", n]
        row = {"selector": how, "n": n, "plan": plan.label, "attn": list(plan.attn), "mlp": list(plan.mlp)}
        row |= {"passes": passes[how], "overlap": len(set(plan.attn) & set(base.attn)) / max(len(base), 1)}
        pairs = {"lost": (plain[how, n], plain["whole"]), "against": (plain[how, n], plain["cosine", n])}
        pairs |= {"refitted": (fixed.get((how, n)), plain["whole"])}
        for name, (mine, other) in pairs.items():
            value, low, high = (np.nan,) * 3 if mine is None else paired(mine, other, where)
            row |= {name: value, f"{name}_stderr": (high - low) / 3.92, f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return pd.DataFrame(rows)


def wide(table: pd.DataFrame) -> pd.DataFrame:
    """`leaderboard` for print, one row a selector, best first: lost_<n>, against_<n>, refitted_<n>, overlap, passes.

    against: "less", "more" or "same" as what cosine lost, by the paired interval. Random seeds become one row, their
    mean with its error over seeds.
    """
    blind, parts = table["selector"].str.startswith("random "), []
    for n, part in table.groupby("n"):
        drawn, part = part[blind[part.index]], part[~blind[part.index]]
        seeds = drawn.mean(numeric_only=True).dropna().to_frame().T.assign(lost_stderr=drawn["lost"].sem())
        seeds["selector"] = f"random, {len(drawn)} seeds"
        part = pd.concat([part, seeds] if len(drawn) else [part]).set_index("selector")
        part["against"] = np.where(part["against_high"] < 0, "less", np.where(part["against_low"] > 0, "more", "same"))
        kept = part[["lost", "lost_stderr", "against", "refitted", "refitted_stderr", "overlap", "passes"]]
        parts.append(kept.rename(columns={c: f"{c.removesuffix('_stderr')}_{n}{c[len(c.removesuffix('_stderr')):]}"
                                          for c in kept}))  # fmt: skip
    out, first = pd.concat(parts, axis=1), min(table["n"])
    out = out.rename(columns={f"overlap_{first}": "overlap", f"passes_{max(table['n'])}": "passes"})
    starts = ("lost_", "against_", "refitted_")
    columns = [column for start in starts for column in out if column.startswith(start)]
    best = out[[f"lost_{first}", f"refitted_{first}"]].astype(float).min(axis=1).sort_values().index
    return out.loc[best, [*columns, "overlap", "passes"]].reset_index()


def added_tensors(model, plan: DropPlan, text: Calibration) -> tuple[list[str], str]:
    """Names of the tensors that a refit (on `text`) adds to the dropped model or gives another shape; a summary."""
    with dropped(model, plan):
        plain = {name: value.shape for name, value in model.state_dict().items()}
    with compensated(model, plan, fit(model, plan, text)):
        added = [name for name, value in model.state_dict().items() if plain.get(name) != value.shape]
    return added, f"{plan.label}: {len(plain)} tensors"


def plot_lost(table: pd.DataFrame, axes) -> None:
    """Nats lost, and the share left of the paper's loss with its interval, against layers dropped; from `losses`."""
    groups = list(table.groupby(["choice", "compensation"], sort=False))
    for k, ((how, method), part) in enumerate(groups):
        look = {"label": f"{how}: {method}", "color": f"C{k}", "marker": "osv^DPX*<"[k % 9]}
        beside = part["n"] + 0.25 * (k - (len(groups) - 1) / 2)  # or intervals would cover each other
        axes[0].plot(part["n"] if len(part) > 1 else beside, part["lost"], **look)
        error = [part["left"] - part["low"], part["high"] - part["left"]]
        axes[1].errorbar(beside, part["left"], error, linestyle="", **look)
    axes[1].axhline(1 / 3, color="black", lw=0.7, ls=":")
    for ax, label in zip(axes, ("Lost (nats per token)", "Share of the paper’s loss left"), strict=True):
        ax.set(xlabel="Dropped attention layers", ylabel=label, xticks=sorted(set(table["n"])))
        ax.set_ylim(0, 1.02 * ax.get_ylim()[1])


def plot_answers(table: pd.DataFrame, axes) -> None:
    """One panel a measure of `writing.against`: percent against n, a line a method, 95 % intervals, the baseline grey.

    Models are named "Baseline" and "<method>, <n>".
    """
    named = table["model"].str.extract(r"^(?P<method>.*), (?P<layers>\d+)$")
    for ax, (measure, rows) in zip(axes, table.join(named).groupby("measure", sort=False), strict=True):
        rest = rows.dropna(subset="method").astype({"layers": int})
        lines = dict(iter(rest.groupby("method", sort=False)))
        plot_percent(ax, rows[rows["model"] == "Baseline"].iloc[0], lines, apart=0.2, label="whole model")
        ax.set(title=measure, xlabel="As fast as without n layers")
    axes[0].set_ylabel("Right (%)")


def plot_leaderboard(table: pd.DataFrame, axes) -> None:
    """One row a selector, best at the smallest n on top: nats lost at each n with 95 % intervals, and what it cost.

    `table`: from `leaderboard`, with a fact `passes`. `axes`: one for each n, and one for the cost. Filled: nothing
    makes up for the layers; hollow: refitted. Selectors named "random <seed>" share a row.
    """
    table = table.assign(row=table["selector"].str.replace(r"^random \d+$", "random", regex=True))
    counts = sorted(set(table["n"]))
    best = table[table["n"] == counts[0]].groupby("row")[["lost", "refitted"]].mean().min(axis=1).sort_values()
    place = {row: k for k, row in enumerate(best.index)}
    for ax, n in zip(axes, counts, strict=False):
        part = table[table["n"] == n]
        for column, look in (("lost", {"color": "#0072B2"}), ("refitted", {"color": "#D55E00", "mfc": "white"})):
            here = part.dropna(subset=column)
            error = [here[column] - here[f"{column}_low"], here[f"{column}_high"] - here[column]]
            label = {"lost": "as dropped", "refitted": "refitted"}[column]
            ax.errorbar(here[column], here["row"].map(place), xerr=error, fmt="o", ms=3.5, lw=0.9, label=label, **look)
        ax.set(xscale="log", xlabel=f"Lost at {n} (nats)", yticks=range(len(place)), yticklabels=[])
        _plain_log_ticks(ax.xaxis)
    axes[0].set(yticklabels=list(place))
    cost = table[table["n"] == counts[-1]].groupby("row")["passes"].mean().reindex(list(place))
    axes[-1].barh(range(len(place)), cost, height=0.6, color="#7F7F7F")
    axes[-1].set(xlabel="Cost (passes)", yticks=range(len(place)), yticklabels=[])
    for ax in axes:
        ax.set_ylim(len(place) - 0.5, -0.5)
        ax.grid(axis="y", lw=0.3)


def stability(orders: Mapping[tuple[str, str, str], list], n: int) -> pd.DataFrame:
    """How alike a selector's orders are when one thing about its text or its numbers changes.

    orders: {(selector, what changes, to what): order of all layers}. One row per (selector, what changes): overlap,
    the mean share of the first n layers that two orders have in common, and tau, Kendall's rank correlation, each over
    all pairs, with the lowest pair (_low), and pairs, their number.
    """
    groups: dict[tuple[str, str], list] = {}
    for (how, change, _), order in orders.items():
        groups.setdefault((how, change), []).append(list(order))
    rows = []
    for (how, change), found in groups.items():
        pairs = [(a, b) for k, a in enumerate(found) for b in found[k + 1 :]]
        shares = [agreement(pair, n) for pair in pairs]
        taus = [float(kendalltau(range(len(a)), [b.index(item) for item in a]).statistic) for a, b in pairs]
        row = {"selector": how, "change": change, "pairs": len(pairs)}
        for name, values in (("overlap", shares), ("tau", taus)):
            row |= {name: np.mean(values), f"{name}_low": min(values)}
        rows.append(row)
    return pd.DataFrame(rows)


def plot_stability(table: pd.DataFrame, axes, chance: float) -> None:
    """Overlap and rank correlation (from `stability`), one row a selector, one marker a change, a line to the lowest.

    `axes`: two. chance: the overlap of random orders.
    """
    selectors, changes = list(dict.fromkeys(table["selector"])), list(dict.fromkeys(table["change"]))
    for ax, name, label in zip(axes, ("overlap", "tau"), ("Overlap", "Kendall’s τ"), strict=True):
        for k, change in enumerate(changes):
            part = table[table["change"] == change]
            y = part["selector"].map(selectors.index) + 0.16 * (k - (len(changes) - 1) / 2)
            error = [part[name] - part[f"{name}_low"], 0 * part[name]]
            ax.errorbar(part[name], y, xerr=error, fmt="osv^D"[k % 5], ms=3.5, lw=0.7, color=f"C{k}", label=change)
        ax.set(xlabel=label, yticks=range(len(selectors)), yticklabels=[], xlim=(None, 1.02))
        ax.set_ylim(len(selectors) - 0.5, -0.5)
    axes[0].set_yticklabels(selectors)
    axes[0].axvline(chance, color="black", lw=0.7, ls=":")
