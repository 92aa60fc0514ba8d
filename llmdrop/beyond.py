"""Measure what a selector and a compensation leave of a model, item by item, so that methods can be paired."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial

import pandas as pd
import torch

from . import plan as plans
from .calibration import Calibration, load_calibration
from .compensate import compensated, corrections, shared_or_fit
from .evaluate import _quiet
from .fingerprint import model_key, provenance, tokenizer_digest, version
from .plan import DropPlan, drop_order
from .results import Store, _name, _plan_key
from .roofline import predict_speed
from .selection import Choice, greedy, one_shot, taylor
from .sweep import loglikelihoods, text_items
from .tasks import load_tasks, task_digest

SCORED = {  # selectors of attention layers that need one scoring pass and no more
    "cosine": plans.cosine,
    "cosine without residual": plans.cosine,
    "relative magnitude": plans.relative_magnitude,
    "last first": plans.reverse_order,
}
WIDER = {"Block Drop": "block", "MLP Drop": "mlp", "Joint Drop": "joint"}  # cosine, among other sublayers
SEARCHED = ("perplexity one-shot", "KL one-shot", "perplexity greedy", "KL greedy", "Taylor", "compensated KL greedy")
COMPETING = ("perplexity greedy, all", "KL greedy, per second", "compensated KL greedy, per second")  # both kinds
WIDTH, EVERY = 4, 4  # a search tries four layers a step, and takes the loss at every fourth token


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
    seconds: Mapping[str, float] | None = None,
) -> Choice:
    """The first n sublayers to drop by the selector `how`, stored; `tokens` of it is what choosing cost.

    how: a key of SCORED, "random <seed>" or one of SEARCHED for attention layers; a key of WIDER, "consecutive blocks"
    (n blocks, the run whose input and output are most alike) or one of COMPETING for others. text: for scoring passes
    and corrections. search: the (shorter) text on which dropped models are run. shared("refit"): gives
    `corrections(model, text)`, of both kinds of sublayers if both compete, where they serve several measurements.
    seconds: what a sublayer of each kind takes, {"attn": ..., "mlp": ...}, for a choice "per second". Raises ValueError
    for another name, or without seconds.
    """
    known = [*SCORED, *WIDER, "consecutive blocks", *SEARCHED, *COMPETING]
    if how not in known and not how.startswith("random "):
        raise ValueError(f"selector {how!r} is not one of {'; '.join(known)}; or 'random <seed>'")
    if how.endswith("per second") and seconds is None:
        raise ValueError(f"selector {how!r} needs seconds={{'attn': ..., 'mlp': ...}}, what dropping each kind saves")
    if how not in SEARCHED + COMPETING:
        return _by_scores(store, model, how, text, n, batch_size)
    kinds, compensates = ("attn",) if how in SEARCHED else ("attn", "mlp"), how.startswith("compensated")

    def compute() -> dict:
        loss, target = "kl" if "KL" in how else "perplexity", "joint" if how in COMPETING else "attn"
        if how == "Taylor":
            found = taylor(model, search)
        elif how.endswith("one-shot"):
            found = one_shot(model, search, "attn", loss, EVERY, batch_size)
        else:
            extra = shared("refit") if compensates and shared is not None else {}
            if compensates and not {kind for kind, _ in extra} >= set(kinds):
                extra = corrections(model, text, kinds, batch_size=batch_size)
            paid = seconds if how.endswith("per second") else None
            found = greedy(model, search, target, n, loss, extra, paid, WIDTH, EVERY, batch_size)
            found.tokens += text.n_tokens if extra else 0
        return {"order": found.order, "tokens": found.tokens, "losses": found.losses}

    modules = ("selection", "compensate", "sweep", "hooks", "prune", "anatomy")
    key = model_key(model, batch_size, *modules) | {"how": how, "n": n}
    key |= {"text": text.digest if compensates else None, "search": search.digest}
    key |= {"seconds": dict(seconds)} if how.endswith("per second") else {}
    value = store.get("selector", key, compute, f"{_name(model)}-{how}", lambda: provenance(model, search))
    return Choice([tuple(item) for item in value["order"]], value["tokens"], value["losses"])


def _by_scores(store: Store, model, how: str, text: Calibration, n: int, batch_size: int) -> Choice:
    """A choice that follows from one scoring pass, or from none."""
    settings = {"with_residual": False} if how == "cosine without residual" else {}
    settings |= {"gap": True} if how == "consecutive blocks" else {}
    scores, cost = store.score(model, text, batch_size, **settings), float(text.n_tokens)
    if how == "last first" or how.startswith("random "):
        cost = 0.0
    if how == "Joint Drop":
        return Choice(drop_order(scores, "joint"), cost)
    if how == "Block Drop" or how == "consecutive blocks":
        blocks = drop_order(scores, "block") if how == "Block Drop" else plans.plan_drop(scores, "consecutive", n).attn
        return Choice([(kind, i) for i in blocks for kind in ("attn", "mlp")], cost)
    kind = WIDER.get(how, "attn")
    select = plans.random(int(how.split()[1])) if how.startswith("random ") else SCORED.get(how, plans.cosine)
    return Choice([(kind, i) for i in drop_order(scores, kind, select)], cost)


def plans_of(
    store: Store,
    model,
    selectors: Sequence[str],
    counts: Sequence[int],
    text: Calibration,
    search: Calibration,
    shared: Callable[[str], dict] | None = None,
    batch_size: int = 8,
    **speed,
) -> tuple[dict[tuple[str, int], DropPlan], dict[str, float]]:
    """For every selector (see `choose`) and n: its plan, and by selector, what choosing cost in passes over `text`.

    A selector of attention layers drops n of them; the others drop as much as it takes to be as fast by
    `predict_speed` with the settings `speed`.
    """
    plans, tokens, whole = {}, {}, predict_speed(model, **speed).seconds
    single = {"attn": DropPlan(attn=[0]), "mlp": DropPlan(mlp=[0])}
    seconds = {kind: whole - predict_speed(model, plan, **speed).seconds for kind, plan in single.items()}
    saved = {n: n * seconds["attn"] / (seconds["attn"] + seconds["mlp"]) for n in counts}  # in blocks
    for how in selectors:
        wider = how in WIDER or how in COMPETING
        enough = math.ceil(max(counts) * seconds["attn"] / min(seconds.values()) - 1e-6) if wider else max(counts)
        for n in counts:
            length = math.ceil(saved[n] - 1e-6) if how == "consecutive blocks" else enough
            choice = choose(store, model, how, text, search, length, shared, batch_size, seconds)
            tokens[how] = choice.tokens / text.n_tokens
            blocks = how in ("Block Drop", "consecutive blocks")
            fast = as_fast(model, choice, n, 1 + blocks, **speed) if blocks or wider else None
            plans[how, n] = fast or choice.plan(n)
    return plans, tokens


def as_fast(model, choice: Choice, n: int, step: int = 1, **speed) -> DropPlan:
    """The shortest plan of `choice`, in steps of so many sublayers, that is as fast as without n attention layers.

    By `predict_speed` with the settings `speed`. Raises ValueError where the choice is too short.
    """
    limit = predict_speed(model, DropPlan(attn=range(n)), **speed).seconds * (1 + 1e-9)
    for k in range(step, len(choice.order) + 1, step):
        if predict_speed(model, choice.plan(k), **speed).seconds <= limit:
            return choice.plan(k)
    raise ValueError(f"all {len(choice.order)} sublayers of this choice save less time than {n} attention layers")


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
    `corrections(model, fitted, method=method)`, which serves all plans of attention layers. Every text and task is
    stored on its own; nothing is fitted where all of them are stored.
    """
    changes = cache(lambda: shared_or_fit(model, plan, fitted, method, shared, batch_size))
    modules = ("beyond", "compensate", "sweep", "hooks", "harness", "tasks", "prune", "anatomy")
    key = model_key(model, batch_size, *modules) | _plan_key(plan) | {"method": method}
    key |= {"fitted": None if method == "none" else fitted.digest}
    whats = {name: {"text": each.digest} for name, each in texts.items()}
    settings = {"limit": limit, "lm_eval": version("lm_eval")}
    settings |= {"tokenizer": tokenizer_digest(tokenizer)} if tasks else {}
    whats |= {name: {"task": task_digest(name, data_dir)} | settings for name in tasks}

    def compute(name: str) -> list[dict]:
        with compensated(model, plan, changes()):
            if name in texts:
                return text_rows(model, [DropPlan()], {name: texts[name]})[0]
            return _task_rows(model, tokenizer, name, limit, data_dir, batch_size)

    rows = []
    for name, what in whats.items():
        slug = f"{_name(model)}-{plan.label}-{method}-{name}"
        one = key | {"where": name} | what
        rows += store.get("compensated", one, partial(compute, name), slug, lambda: provenance(model, fitted))
    return pd.DataFrame(rows)


def measure_plain(
    store: Store, model, plans: Mapping[str, DropPlan], texts: Mapping[str, Calibration]
) -> dict[str, pd.DataFrame]:
    """What `measure` gives for each plan by method "none", on texts alone: one sweep shares what the plans share."""
    names = list(plans)
    key = model_key(model, 0, "beyond", "sweep", "prune", "anatomy")
    key |= {"texts": {name: text.digest for name, text in texts.items()}}
    values = store.get_many(
        "plain",
        [(key | _plan_key(plan), f"{_name(model)}-{plan.label}") for plan in plans.values()],
        lambda missing: text_rows(model, [plans[names[k]] for k in missing], texts),
        lambda: provenance(model),
    )
    return {name: pd.DataFrame(rows) for name, rows in zip(names, values, strict=True)}


def text_rows(model, plans: Sequence[DropPlan], texts: Mapping[str, Calibration]) -> list[list[dict]]:
    """For each plan, the rows of `measure` for every sample of the texts."""
    rows: list[list[dict]] = [[] for _ in plans]
    for name, text in texts.items():
        items = text_items(text)
        sums, _ = loglikelihoods(model, plans, items, progress=False)
        for mine, totals in zip(rows, sums, strict=True):
            mine += [
                {"where": name, "item": k, "value": -float(total) / item.n_scored, "n": item.n_scored}
                for k, (item, total) in enumerate(zip(items, totals, strict=True))
            ]
    return rows


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
