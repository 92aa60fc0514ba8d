"""Measure what a selector and a compensation leave of a model, item by item, so that methods can be paired."""

import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch

from . import plan as plans
from .calibration import Calibration, load_calibration
from .compensate import FILLS, combined, compensated, corrections, fit
from .evaluate import _quiet
from .figures import _plain_log_ticks
from .fingerprint import model_key, provenance, tokenizer_digest, version
from .plan import DropPlan, drop_order
from .results import Store, _name, _plan_key
from .roofline import predict_speed
from .selection import Choice, agreement, greedy, one_shot, taylor
from .sweep import loglikelihoods, text_items
from .tasks import load_tasks, task_digest

SCORED = {  # selectors that need one scoring pass and no more
    "cosine": plans.cosine,
    "cosine without residual": plans.cosine,
    "relative magnitude": plans.relative_magnitude,
    "last first": plans.reverse_order,
}
WIDTH, EVERY = 4, 4  # a search tries four layers a step, and takes the loss at every fourth token
SEARCHED = ("perplexity one-shot", "KL one-shot", "perplexity greedy", "KL greedy", "Taylor", "compensated KL greedy")


def mixture(
    names: Sequence[str],
    tokenizer,
    n_samples: int,
    seq_len: int,
    seed: int = 0,
    data_dir: str | os.PathLike | None = None,
    skip: int = 0,
) -> Calibration:
    """n_samples of every named source, taken in turn: text of several kinds (see `load_calibration`)."""
    parts = [load_calibration(name, tokenizer, n_samples, seq_len, seed, data_dir, skip).input_ids for name in names]
    ids = torch.stack(parts, 1).flatten(0, 1)
    return Calibration(ids, f"{'+'.join(names)}, {n_samples} each, seed {seed}, skip {skip}")


def choose(
    store: Store,
    model,
    how: str,
    text: Calibration,
    search: Calibration,
    n: int,
    shared: Callable[[str], dict] | None = None,
    batch_size: int = 8,
) -> Choice:
    """The first n attention layers to drop by the selector `how`, stored; `tokens` of it is what choosing cost.

    how: a key of SCORED, "random <seed>", or one of SEARCHED. text: for scoring passes and corrections. search: the
    (shorter) text on which dropped models are run. shared("refit"): gives `corrections(model, text)`, where they serve
    several measurements. Raises ValueError for another name.
    """
    if how in SCORED or how.startswith("random "):
        settings = {"with_residual": False} if how == "cosine without residual" else {}
        scores = store.score(model, text, batch_size, **settings)
        select = SCORED[how] if how in SCORED else plans.random(int(how.split()[1]))
        needed = 0.0 if how == "last first" or how.startswith("random ") else float(text.n_tokens)
        return Choice([("attn", i) for i in drop_order(scores, "attn", select)], needed)
    if how not in SEARCHED:
        raise ValueError(f"selector {how!r} is not one of {', '.join([*SCORED, *SEARCHED])}, or 'random <seed>'")

    def compute() -> dict:
        loss = "kl" if "KL" in how else "perplexity"
        if how == "Taylor":
            found = taylor(model, search)
        elif how.endswith("one-shot"):
            found = one_shot(model, search, "attn", loss, EVERY, batch_size)
        else:
            extra = {}
            if how.startswith("compensated"):
                extra = shared("refit") if shared else corrections(model, text, batch_size=batch_size)
            found = greedy(model, search, "attn", n, loss, extra, None, WIDTH, EVERY, batch_size)
            found.tokens += text.n_tokens if extra else 0
        return {"order": found.order, "tokens": found.tokens, "losses": found.losses}

    modules = ("selection", "compensate", "sweep", "hooks", "prune", "anatomy")
    key = model_key(model, batch_size, *modules) | {"how": how, "n": n}
    key |= {"text": text.digest if how.startswith("compensated") else None, "search": search.digest}
    value = store.get("selector", key, compute, f"{_name(model)}-{how}", lambda: provenance(model, search))
    return Choice([tuple(item) for item in value["order"]], value["tokens"], value["losses"])


def measure(
    store: Store,
    model,
    tokenizer,
    plan: DropPlan,
    method: str,
    fitted: Calibration,
    texts: Mapping[str, Calibration],
    tasks: Sequence[str] = (),
    limit: int | None = None,
    data_dir: str | os.PathLike | None = None,
    shared: Callable[[str], dict] | None = None,
    batch_size: int = 8,
) -> pd.DataFrame:
    """Every sample's and every question's result without the plan's layers, compensated by `method` on `fitted`.

    Returns one row per item: where (a text or a task), item (its number), value (a text sample's mean negative
    log-likelihood per token, in nats, or 1 for a right answer and 0 for a wrong one), n (tokens of the sample, or 1).
    Items are the same for every plan and method, so that differences can be paired. shared(method): gives
    `corrections(model, fitted, method=method)`, which serves all plans of attention layers. Stored as a whole; a text
    or task more is a new measurement.
    """

    def compute() -> list[dict]:
        alone = shared is not None and method in ("refit", *FILLS) and not plan.mlp
        changes = combined(shared(method), plan) if alone else fit(model, plan, fitted, method, batch_size)
        with compensated(model, plan, changes):
            rows = [row for name, text in texts.items() for row in _text_rows(model, name, text)]
            for name in tasks:
                rows += _task_rows(model, tokenizer, name, limit, data_dir, batch_size)
        return rows

    modules = ("beyond", "compensate", "sweep", "hooks", "harness", "tasks", "prune", "anatomy")
    key = model_key(model, batch_size, *modules) | _plan_key(plan) | {"method": method, "limit": limit}
    key |= {"fitted": None if method == "none" else fitted.digest, "texts": {k: t.digest for k, t in texts.items()}}
    key |= {"tasks": {name: task_digest(name, data_dir) for name in tasks}, "lm_eval": version("lm_eval")}
    key |= {"tokenizer": tokenizer_digest(tokenizer)}
    slug = f"{_name(model)}-{plan.label}-{method}"
    return pd.DataFrame(store.get("compensated", key, compute, slug, lambda: provenance(model, fitted)))


def _text_rows(model, name: str, text: Calibration) -> list[dict]:
    items = text_items(text)
    sums, _ = loglikelihoods(model, [DropPlan()], items, progress=False)
    return [
        {"where": name, "item": k, "value": -total / item.n_scored, "n": item.n_scored}
        for k, (item, total) in enumerate(zip(items, sums[0], strict=True))
    ]


def _task_rows(model, tokenizer, name: str, limit, data_dir, batch_size: int) -> list[dict]:
    """Right or wrong for every question, by acc_norm where a task has it, else acc."""
    from lm_eval import evaluate as lm_evaluate

    from .harness import SweepLM

    parts, rows = load_tasks([name], data_dir)[name], []
    with _quiet():
        lm = SweepLM(model, tokenizer, {"": DropPlan()}, batch_size, progress=False)
        samples = lm_evaluate(lm, parts, limit=limit, bootstrap_iters=0, log_samples=True)["samples"]
    for part in parts:
        for sample in samples[part]:
            right = sample.get("acc_norm", sample.get("acc"))
            rows.append({"where": name, "item": len(rows), "value": float(right), "n": 1})
    return rows


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


def paired(rows: pd.DataFrame, other: pd.DataFrame, where: str, rounds: int = 2000) -> tuple[float, float, float]:
    """Mean of rows' values less other's over the items of one text or task, and a 95 % interval, paired bootstrap."""
    mine, theirs = (frame[frame["where"] == where].sort_values("item") for frame in (rows, other))
    difference = np.asarray(mine["value"]) - np.asarray(theirs["value"])
    pick = np.random.default_rng(0).integers(len(difference), size=(rounds, len(difference)))
    low, high = np.quantile(difference[pick].mean(1), [0.025, 0.975])
    return float(difference.mean()), float(low), float(high)


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


def leaderboard(model, choices: Mapping[str, Choice], counts, plain, fixed: Mapping) -> pd.DataFrame:
    """One row per selector and number of layers: selector, n, tokens, lost, lost_stderr, refitted, speedup, overlap.

    plain: log-perplexities of one text each, indexed by "Baseline" and "<selector>|<n>". fixed: {(selector, n): what
    `measure` gave, refitted}. lost, refitted: nats per token, mean over the texts; speedup: by `predict_speed`, with
    2,048 tokens of prompt and 256 new ones; overlap: share of the first n layers in common with "cosine".
    """
    lost = pd.concat([each - each["Baseline"] for each in plain], axis=1)
    whole, rows = np.mean([each["Baseline"] for each in plain]), []
    base = predict_speed(model, prompt_len=2048, new_tokens=256).seconds
    for how, choice in choices.items():
        for n in counts:
            row = {"selector": how, "n": n, "tokens": choice.tokens, "lost": lost.loc[f"{how}|{n}"].mean()}
            row["lost_stderr"] = lost.loc[f"{how}|{n}"].sem()
            after = fixed[how, n].groupby("where")["value"].mean().mean() if (how, n) in fixed else np.nan
            row["refitted"] = after - whole
            row["speedup"] = base / predict_speed(model, choice.plan(n), 1, 2048, 256).seconds
            rows.append(row | {"overlap": agreement([choice.order, choices["cosine"].order], n)})
    return pd.DataFrame(rows)


def plot_losses(table: pd.DataFrame, axes) -> None:
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
