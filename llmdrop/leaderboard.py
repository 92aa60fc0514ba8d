"""What the measurements of `beyond` say: shares and differences with intervals, leaderboards, and their figures."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from .figures import _plain_log_ticks
from .plan import DropPlan
from .roofline import predict_speed
from .selection import Choice


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
        pick = np.vstack([np.arange(len(base)), random.integers(len(base), size=(rounds, len(base)))])
        lost, most = ((np.asarray(f["value"]) - np.asarray(base["value"])) * weight for f in (mine, other))
        with np.errstate(divide="ignore", invalid="ignore"):
            shares.append(lost[pick].sum(1) / most[pick].sum(1))
    mean = np.mean(shares, axis=0)
    low, high = np.nanquantile(mean[1:], [0.025, 0.975])
    return float(mean[0]), float(low), float(high)


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
        pick = np.vstack([np.arange(len(difference)), random.integers(len(difference), size=(rounds, len(difference)))])
        means.append(difference[pick].mean(1))
    mean = np.mean(means, axis=0)
    low, high = np.quantile(mean[1:], [0.025, 0.975])
    return float(mean[0]), float(low), float(high)


def losses(found: Mapping[tuple[str, str, int], pd.DataFrame], whole: pd.DataFrame, texts, tasks) -> pd.DataFrame:
    """One row per (choice, compensation, n): what `measure` gave, against the whole model and the paper's method.

    found needs ("cosine", "none", n) for every n. Columns: left, low, high (`share_left` on the texts), lost (mean over
    the texts, nats per token), lost_<text>, and gain_<task> with gain_<task>_stderr (points of accuracy over the
    paper's method, paired).
    """
    rows = []
    for (how, method, n), each in found.items():
        paper = found["cosine", "none", n]
        row = {"choice": how, "compensation": method, "n": n}
        row["left"], row["low"], row["high"] = share_left(each, whole, paper, list(texts))
        row |= {f"lost_{name}": paired(each, whole, name)[0] for name in texts}
        row["lost"] = np.mean([row[f"lost_{name}"] for name in texts])
        for task in tasks:
            gain, low, high = paired(each, paper, task)
            row[f"gain_{task}"], row[f"gain_{task}_stderr"] = 100 * gain, 100 * (high - low) / 3.92
        rows.append(row)
    return pd.DataFrame(rows)


def leaderboard(found: Mapping[tuple[str, int], dict], whole: pd.DataFrame, where: Sequence[str]) -> pd.DataFrame:
    """One row per (selector, n): the facts in `found`, and what was lost on the texts `where`.

    found: {(selector, n): {"plain": as from `measure_plain`, "refitted": as from `measure` or None, and facts}}, with
    ("cosine", n) for every n. Columns: selector, n, the facts, and lost, refitted (nats per token, mean over the texts)
    and against (lost, less what "cosine" at n lost), each with _low, _high (95 %, paired bootstrap over samples) and
    _stderr.
    """
    rows = []
    for (how, n), each in found.items():
        row = {"selector": how, "n": n} | {k: v for k, v in each.items() if k not in ("plain", "refitted")}
        pairs = {"lost": (each["plain"], whole), "against": (each["plain"], found["cosine", n]["plain"])}
        pairs |= {"refitted": (each.get("refitted"), whole)}
        for name, (mine, other) in pairs.items():
            value, low, high = (np.nan,) * 3 if mine is None else paired(mine, other, where)
            row |= {name: value, f"{name}_stderr": (high - low) / 3.92, f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return pd.DataFrame(rows)


def seconds_saved(model, **speed) -> dict[str, float]:
    """What dropping one sublayer of each kind saves by `predict_speed` with these settings: {"attn": s, "mlp": s}."""
    whole = predict_speed(model, **speed).seconds
    one = {"attn": DropPlan(attn=[0]), "mlp": DropPlan(mlp=[0])}
    return {kind: whole - predict_speed(model, plan, **speed).seconds for kind, plan in one.items()}


def as_fast(model, choice: Choice, n: int, step: int = 1, **speed) -> DropPlan:
    """The shortest plan of `choice`, in steps of so many sublayers, that is as fast as without n attention layers.

    By `predict_speed` with the settings `speed`. Raises ValueError where the choice is too short.
    """
    limit = predict_speed(model, DropPlan(attn=range(n)), **speed).seconds * (1 + 1e-9)
    for k in range(step, len(choice.order) + 1, step):
        if predict_speed(model, choice.plan(k), **speed).seconds <= limit:
            return choice.plan(k)
    raise ValueError(f"all {len(choice.order)} sublayers of this choice save less time than {n} attention layers")


def plot_lost(table: pd.DataFrame, axes) -> None:
    """Nats lost, and the share left of the paper's loss with its interval, against layers dropped; from `losses`."""
    groups = list(table.groupby(["choice", "compensation"], sort=False))
    for k, ((how, method), part) in enumerate(groups):
        look = {"label": f"{how}: {method}", "color": f"C{k}", "marker": "osv^DPX*"[k % 8]}
        axes[0].plot(part["n"], part["lost"], **look)
        error = [part["left"] - part["low"], part["high"] - part["left"]]
        axes[1].errorbar(part["n"] + 0.25 * (k - (len(groups) - 1) / 2), part["left"], error, linestyle="", **look)
    axes[1].axhline(1 / 3, color="black", lw=0.7, ls=":")
    for ax, label in zip(axes, ("Lost (nats per token)", "Share of the paper’s loss left"), strict=True):
        ax.set(xlabel="Dropped attention layers", ylabel=label, xticks=sorted(set(table["n"])), ylim=(0, None))


def plot_choices(table: pd.DataFrame, axes) -> None:
    """Loss at the smallest n against the cost of choosing, hollow where refitted; and loss against speedup.

    `table`: selector, n, tokens, lost, refitted, speedup. Selectors named "random ..." look alike.
    """
    for k, (how, part) in enumerate(table.groupby("selector", sort=False)):
        blind = how.startswith("random")
        look = {"color": "#7F7F7F" if blind else f"C{k % 6}", "marker": "x" if blind else "osv^DP*<>hdp"[k % 12]}
        look["label"] = "random" if blind else how
        cost = part["tokens"].clip(lower=100) / 1000  # a log axis has no zero
        axes[0].plot(cost.head(1), part["lost"].head(1), linestyle="", **look)
        axes[0].plot(cost.head(1), part["refitted"].head(1), linestyle="", mfc="white", **look | {"label": "_"})
        axes[1].plot(part["speedup"], part["lost"], lw=0.7, ms=3, **look)
    lowest = table["n"].min()
    axes[0].set(xscale="log", xlabel="Cost of choosing (thousand tokens)", ylabel=f"Lost at {lowest} layers (nats)")
    axes[1].set(yscale="log", xlabel="Predicted speedup", ylabel="Lost (nats per token)")
    _plain_log_ticks(axes[1].yaxis)
