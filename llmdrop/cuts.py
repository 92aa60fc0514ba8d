"""Cut a model down, by dropping sublayers or by windows, and measure what is lost, what is found, what it takes."""

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from os.path import commonprefix
from types import MappingProxyType

import pandas as pd
import torch
from torch import nn

from . import beyond, windows
from .anatomy import anatomy
from .calibration import Calibration
from .compensate import Changes, combined, compensated, corrections, shared_or_fit
from .fingerprint import model_key, provenance, speed_key, tokenizer_digest, version
from .generation import check_length
from .plan import DropPlan
from .results import Store, _name, _plan_key
from .roofline import SpeedLimit, predict_speed
from .speed import measure_speed, over_rounds
from .tasks import task_digest
from .windows import SINKS, WINDOW, score_windows, windowed


@dataclass(frozen=True)
class Cut:
    """What is done to a model: sublayers dropped, and attention layers windowed. Cut() is the whole model.

    method: what makes up for the plan, one of `compensate.METHODS`; `of` takes the changes that it gave.
    """

    plan: DropPlan = DropPlan()
    layers: Sequence[int] = ()
    window: int = WINDOW
    sinks: int = SINKS
    method: str = "none"

    @contextmanager
    def of(self, model: nn.Module, changes: Changes = MappingProxyType({})) -> Iterator[nn.Module]:
        """`model` so cut, for the length of a `with` block."""
        with compensated(model, self.plan, changes), windowed(model, self.layers, self.window, self.sinks):
            yield model

    @property
    def key(self) -> dict:
        """What tells it from other cuts."""
        narrow = {"layers": sorted(self.layers), "window": self.window, "sinks": self.sinks} if self.layers else {}
        return _plan_key(self.plan) | narrow | ({"method": self.method} if self.method != "none" else {})

    @property
    def label(self) -> str:
        return f"{self.plan.label}-{len(self.layers)}x{self.window}" if self.layers else self.plan.label

    @property
    def shape(self) -> str:
        """What its speed depends on: how many sublayers of each kind go, how many windows there are, and how wide."""
        narrow = f", {len(self.layers)} windows of {self.window} + {self.sinks}" if self.layers else ""
        return f"{len(self.plan.attn)} attn, {len(self.plan.mlp)} mlp{narrow}"

    def limit(self, model, **speed) -> SpeedLimit:
        """`predict_speed` of `model` so cut, with these settings."""
        return predict_speed(model, self.plan, windowed=len(self.layers), window=self.window + self.sinks, **speed)

    def speedup(self, model, **speed) -> float:
        """Over the whole model, by `predict_speed` with these settings."""
        return predict_speed(model, **speed).seconds / self.limit(model, **speed).seconds


def order(
    store: Store, model: nn.Module, calibration: Calibration, window: int = WINDOW, sinks: int = SINKS
) -> list[int]:
    """The attention layers, those first that can best do with a window by `score_windows`, stored."""
    key = model_key(model, 1, "windows", "compensate", "sweep", "prune", "anatomy")
    key |= {"text": calibration.digest, "window": window, "sinks": sinks}
    slug = f"{_name(model)}-{window}-{sinks}"
    compute = partial(score_windows, model, calibration, window, sinks)
    scores = store.get("window-scores", key, compute, slug, lambda: provenance(model, calibration))
    return sorted(anatomy(model).live("attn"), key=lambda i: scores[i])


def measure(
    store: Store,
    model: nn.Module,
    tokenizer,
    cut: Cut,
    texts: Mapping[str, Calibration],
    questions: Mapping[str, tuple[Sequence[str], Sequence[str]]] = MappingProxyType({}),
    tasks: Sequence[str] = (),
    limit: int | None = None,
    data_dir: str | os.PathLike | None = None,
    batch_size: int = 8,
    fitted: Calibration | None = None,
    shared: Callable[[str], dict] | None = None,
) -> pd.DataFrame:
    """What is left of the model: rows as of `beyond.measure`, of texts, questions and tasks.

    One row per sample of a text (mean negative log-likelihood per token, in nats), per question (1: the answer's
    tokens come, taken greedily, else 0), and per question of a benchmark (1: right). questions: prompts and targets by
    name, as from `questions.retrieval`. limit, data_dir, batch_size: of the benchmarks. fitted, shared: text for, and
    the corrections of, the cut's method, as for `beyond.measure`. Every text, set of questions and benchmark is stored
    on its own; of a model without windows, `beyond.measure` stores texts and benchmarks. Raises ValueError for a method
    without text to fit it on.
    """
    if cut.method != "none" and fitted is None:
        raise ValueError(f"{cut.method!r} is fitted on text: pass fitted=, or a cut with method='none'")
    changes = cache(lambda: shared_or_fit(model, cut.plan, fitted, cut.method, shared, batch_size))
    modules = ("cuts", "windows", "beyond", "compensate", "sweep", "harness", "tasks", "prune", "anatomy")
    rows, key = [], model_key(model, batch_size, *modules) | cut.key
    key |= {"fitted": fitted.digest} if cut.method != "none" else {}
    whats = {name: {"asked": [list(part) for part in asked]} for name, asked in questions.items()}
    if not cut.layers:
        settings = fitted, texts, tasks, limit, data_dir, shared, batch_size
        rows = beyond.measure(store, model, tokenizer, cut.plan, cut.method, *settings).to_dict("records")
    else:
        whats |= {name: {"text": text.digest} for name, text in texts.items()}
        for name in tasks:
            whats[name] = {"task": task_digest(name, data_dir), "limit": limit, "lm_eval": version("lm_eval")}
    digest = cache(lambda: tokenizer_digest(tokenizer))

    def compute(name: str) -> list[dict]:
        with cut.of(model, changes()):
            if name in texts:
                return beyond.text_rows(model, [DropPlan()], {name: texts[name]})[0]
            if name in tasks:
                return beyond._task_rows(model, tokenizer, name, limit, data_dir, batch_size)
            values = _answered(model, tokenizer, *questions[name])
        return [{"where": name, "item": k, "value": value, "n": 1} for k, value in enumerate(values)]

    for name, what in whats.items():
        one = key | what | ({} if name in texts else {"tokenizer": digest()})
        slug = f"{_name(model)}-{cut.label}-{name}"
        rows += store.get("windows", one, partial(compute, name), slug, lambda: provenance(model))
    return pd.DataFrame(rows)


def mixed(
    store: Store,
    model: nn.Module,
    counts: Iterable[int],
    text: Calibration,
    search: Calibration,
    long: Calibration,
    most: int,
    window: int = WINDOW,
    shared: Callable[[str], dict] | None = None,
    method: str = "refit in turn",
    batch_size: int = 8,
    **speed,
) -> dict[tuple[str, str, int], Cut]:
    """{("drops and windows", "as fast for <b>", n): the cut as fast as without n attention layers} for every n, stored.

    Sublayers are listed by loss per second saved in a model of windows alone: `most` attention layers and MLPs,
    refitted on `text`, run on `search` (as "compensated KL greedy, per second" of `beyond.choose`). A cut drops the
    first k of them, made up for by `method`, and gives windows to as many of the other attention layers as it takes to
    be as fast by `predict_speed`, those first that `order` has first. k goes up from the fewest that can be as fast,
    while the loss on `long` falls; meanwhile every gap is refitted by itself. method="none": nothing is refitted
    anywhere. shared("refit"): gives `corrections(model, text)` of both kinds. Raises ValueError where all sublayers
    listed and all windows save less time.
    """
    layers, compensates = order(store, model, long, window), method != "none"
    shared = shared or cache(lambda how: corrections(model, text, ("attn", "mlp"), how, batch_size))
    live = len(anatomy(model).live("attn"))
    took = Cut(layers=range(live), window=window).limit(model, **speed).seconds
    less = {"attn": Cut(DropPlan(attn=[0]), range(1, live), window), "mlp": Cut(DropPlan(mlp=[0]), range(live), window)}
    seconds = {kind: took - one.limit(model, **speed).seconds for kind, one in less.items()}
    how = "compensated KL greedy, per second" if compensates else "KL greedy, per second"
    choice = beyond.choose(store, model, how, text, search, most, shared, batch_size, seconds)

    def cut(k: int, n: int) -> Cut | None:
        plan = choice.plan(k)
        if (number := windows.as_fast(model, n, window, plan=plan, **speed)) is None:
            return None
        return Cut(plan, [i for i in layers if i not in plan.attn][:number], window, SINKS, method if plan else "none")

    def compute(n: int) -> dict[str, float]:
        losses: dict[str, float] = {}
        for k in range(most + 1):
            if (one := cut(k, n)) is None:
                continue
            with one.of(model, combined(shared("refit"), one.plan) if compensates and one.plan else {}):
                rows = beyond.text_rows(model, [DropPlan()], {"long": long})[0]
            losses[str(k)] = sum(row["value"] for row in rows) / len(rows)
            if losses[str(k)] > min(losses.values()) or not one.layers:
                break
        return losses

    modules = ("cuts", "windows", "beyond", "compensate", "sweep", "prune", "anatomy")
    key = model_key(model, batch_size, *modules) | {"window": window, "layers": layers, "speed": speed}
    key |= {"choice": choice.order, "text": text.digest if compensates else None, "long": long.digest}
    found = {}
    for n in counts:
        slug = f"{_name(model)}-{n}"
        losses = store.get("mixed", key | {"n": n}, partial(compute, n), slug, lambda: provenance(model, long))
        if not losses:
            raise ValueError(f"windows and {most=} sublayers save less time than {n} attention layers; raise most")
        b = speed.get("batch_size", 1)
        found["drops and windows", f"as fast for {b}", n] = cut(int(min(losses, key=losses.get)), n)
    return found


def percent(rows: pd.DataFrame, questions: Iterable[str]) -> list[float]:
    """Percent answered of each set of questions, from `measure`; NaN for one that was not asked."""
    return [100 * float(rows.loc[rows["where"] == name, "value"].mean()) for name in questions]


@torch.no_grad()
def _answered(model: nn.Module, tokenizer, prompts: Sequence[str], targets: Sequence[str]) -> list[float]:
    """1 for each prompt after which the target's tokens come, taken greedily, else 0.

    What the prompts begin with in common runs once, and every question goes on from a copy of its KV cache.
    """
    device = model.get_input_embeddings().weight.device
    asked = [tokenizer(text)["input_ids"] for text in prompts]
    given = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in targets]
    check_length(model, asked, max(map(len, given)))
    shared = min(len(commonprefix(asked)), min(map(len, asked)) - 1)
    cache, values = None, []
    if shared:
        before = torch.tensor([asked[0][:shared]], device=device)
        cache = model(before, use_cache=True, logits_to_keep=1).past_key_values
    for ids, target in zip(asked, given, strict=True):
        rest = torch.tensor([ids[shared:] + target[:-1]], device=device)
        out = model(rest, past_key_values=copy.deepcopy(cache), use_cache=True, logits_to_keep=len(target))
        values.append(float(out.logits[0].argmax(-1).tolist() == target))
    return values


def compare_speed(store: Store, model: nn.Module, cuts: Iterable[Cut], rounds: int = 3, **settings) -> pd.DataFrame:
    """`measure_speed` of the whole model and every cut, in turn, stored. settings: of `measure_speed`.

    One row a cut: the speedups over the whole model (speedup; prefill and decode, each by itself), medians over rounds,
    each with half its range (_stderr); kv, megabytes of the cache at the end. Cuts of one shape are timed once.
    """
    cuts = list(cuts)
    shapes = {cut.shape: cut for cut in (Cut(), *cuts)}
    key = speed_key(model, "cuts", "windows", "speed", "prune", "anatomy") | {"rounds": rounds, "settings": settings}
    key["cuts"] = [cut.key for cut in shapes.values()]

    def compute() -> list[dict]:
        rows = []
        for turn in range(rounds):
            for name, cut in shapes.items():
                with cut.of(model):
                    one = measure_speed(model, repeats=1, warm_up=turn == 0, **settings)
                kept = {k: one[k] for k in ("seconds", "prefill_seconds", "decode_seconds", "kv_bytes")}
                rows.append({"plan": name, "round": turn} | kept)
        return rows

    slug = f"{_name(model)}-{len(shapes)}-cuts"
    rows = pd.DataFrame(store.get("window-speed", key, compute, slug, lambda: provenance(model, **settings)))
    timed, found = over_rounds(rows, Cut().shape).loc[[cut.shape for cut in cuts]].reset_index(), {}
    for name, part in (("speedup", "speedup"), ("prefill", "prefill_speedup"), ("decode", "decode_speedup")):
        found |= {name: timed[part], f"{name}_stderr": (timed[f"{part}_high"] - timed[f"{part}_low"]) / 2}
    return pd.DataFrame(found | {"kv": timed["kv_bytes"] / 1e6})


# ---- for the notebooks


def as_fast(
    model, orders: Mapping[int, Sequence[int]], counts: Iterable[int], sequences: Iterable[int] = (1,), **speed
) -> dict[tuple[str, str, int], Cut]:
    """{("window <w>", "as fast for <b>", n): windows of w tokens in the fewest layers that save what n layers save}.

    orders: from `order`, by w. For b sequences, by `predict_speed` with the settings `speed`. Where windows in all
    layers save less, there is no such entry.
    """
    out = {}
    for (window, layers), b, n in product(orders.items(), sequences, counts):
        if (k := windows.as_fast(model, n, window, batch_size=b, **speed)) is not None:
            out[f"window {window}", f"as fast for {b}", n] = Cut(layers=layers[:k], window=window)
    return out
