"""Cut a model down, by dropping sublayers or by windows, and measure what is lost, what is found, what it takes."""

import copy
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from os.path import commonprefix
from types import MappingProxyType

import pandas as pd
import torch
from torch import nn

from . import beyond, windows
from .anatomy import anatomy
from .calibration import Calibration
from .fingerprint import model_key, provenance, speed_key, tokenizer_digest, version
from .generation import check_length
from .leaderboard import losses, paired, plot_lost
from .plan import DropPlan
from .prune import dropped
from .results import Store, _name, _plan_key
from .roofline import SpeedLimit, predict_speed
from .speed import measure_speed, over_rounds
from .tasks import task_digest
from .windows import SINKS, WINDOW, score_windows, windowed


@dataclass(frozen=True)
class Cut:
    """What is done to a model: sublayers dropped, and attention layers windowed. Cut() is the whole model."""

    plan: DropPlan = DropPlan()
    layers: Sequence[int] = ()
    window: int = WINDOW
    sinks: int = SINKS

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[nn.Module]:
        """`model` so cut, for the length of a `with` block."""
        with dropped(model, self.plan), windowed(model, self.layers, self.window, self.sinks):
            yield model

    @property
    def key(self) -> dict:
        """What tells it from other cuts."""
        narrow = {"layers": sorted(self.layers), "window": self.window, "sinks": self.sinks} if self.layers else {}
        return _plan_key(self.plan) | narrow

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
) -> pd.DataFrame:
    """What is left of the model: rows as of `beyond.measure`, of texts, questions and tasks.

    One row per sample of a text (mean negative log-likelihood per token, in nats), per question (1: the answer's
    tokens come, taken greedily, else 0), and per question of a benchmark (1: right). questions: prompts and targets by
    name, as from `questions.retrieval`. limit, data_dir, batch_size: of the benchmarks. Every text, set of questions
    and benchmark is stored on its own; of a model without windows, `beyond.measure` stores texts and benchmarks.
    """
    modules = ("cuts", "windows", "beyond", "sweep", "harness", "tasks", "prune", "anatomy")
    rows, key = [], model_key(model, batch_size, *modules) | cut.key
    whats = {name: {"asked": [list(part) for part in asked]} for name, asked in questions.items()}
    if not cut.layers:
        settings = None, texts, tasks, limit, data_dir, None, batch_size
        rows = beyond.measure(store, model, tokenizer, cut.plan, "none", *settings).to_dict("records")
    else:
        whats |= {name: {"text": text.digest} for name, text in texts.items()}
        for name in tasks:
            whats[name] = {"task": task_digest(name, data_dir), "limit": limit, "lm_eval": version("lm_eval")}
    digest = tokenizer_digest(tokenizer)

    def compute(name: str) -> list[dict]:
        with cut.of(model):
            if name in texts:
                return beyond.text_rows(model, [DropPlan()], {name: texts[name]})[0]
            if name in tasks:
                return beyond._task_rows(model, tokenizer, name, limit, data_dir, batch_size)
            values = _answered(model, tokenizer, *questions[name])
        return [{"where": name, "item": k, "value": value, "n": 1} for k, value in enumerate(values)]

    for name, what in whats.items():
        one = key | what | ({} if name in texts else {"tokenizer": digest})
        slug = f"{_name(model)}-{cut.label}-{name}"
        rows += store.get("windows", one, partial(compute, name), slug, lambda: provenance(model))
    return pd.DataFrame(rows)


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


def table(
    model,
    models: Mapping[tuple[str, str, int], Cut],
    found: Mapping[tuple[str, str, int], pd.DataFrame],
    whole: pd.DataFrame,
    texts: Iterable[str],
    questions: Sequence[str],
    tasks: Sequence[str],
    sequences: Iterable[int],
    **speed,
) -> pd.DataFrame:
    """`leaderboard.losses` of the cuts, with what they answer and save; one row a key (choice, how, n) of `models`.

    Adds windowed (layers), the percent answered of each set of questions and each benchmark, more (how many points
    above cosine at n, paired by question, mean over the sets of questions, benchmarks apart) with half its 95 %
    interval (_stderr), and at_<b>: the speedup that `predict_speed` allows for b sequences.
    """
    out = losses(found, whole, texts)
    out["windowed"] = [len(cut.layers) for cut in models.values()]
    out[[*questions, *tasks]] = [percent(found[key], [*questions, *tasks]) for key in models]
    more = [paired(found[key], found["cosine", "none", key[2]], questions) for key in models]
    out["more"], out["more_stderr"] = zip(*[(100 * mean, 50 * (high - low)) for mean, low, high in more], strict=True)
    for b in sequences:
        out[f"at_{b}"] = [cut.speedup(model, batch_size=b, **speed) for cut in models.values()]
    return out


def plot(model, rows: pd.DataFrame, models: Mapping, whole: pd.DataFrame, tokens: Mapping, axes, **speed) -> None:
    """Four panels: nats lost, the share left of the paper's loss, questions answered, predicted speedup by sequences.

    rows: from `table`; tokens: {set of questions: tokens of their context}. The last two panels show the smallest n, of
    windows those of the first kind of "as fast".
    """
    plot_lost(rows, axes[:2])
    kinds = list(dict.fromkeys(how for _, how, _ in models))[:2]
    n, at_a_time = int(rows["n"].min()), [1, 2, 4, 8, 16, 32, 64]
    axes[2].plot(tokens.values(), percent(whole, tokens), color="0.6", label="whole model")
    for line, (choice, how) in zip(axes[0].get_lines(), dict.fromkeys(key[:2] for key in models), strict=True):
        if how in kinds and (choice, how, n) in models:
            look = {"color": line.get_color(), "marker": line.get_marker()}
            mine = rows[(rows["choice"] == choice) & (rows["compensation"] == how) & (rows["n"] == n)]
            axes[2].plot(tokens.values(), mine[list(tokens)].iloc[0], **look)
            speedups = [models[choice, how, n].speedup(model, batch_size=b, **speed) for b in at_a_time]
            axes[3].plot(at_a_time, speedups, **look)
    for ax in axes[:2]:
        ax.set_xlabel("As fast as without n layers")
    axes[2].set(xlabel="Tokens of context", ylabel=f"Facts found (%), n = {n}", ylim=(-2, 102))
    axes[3].set(xscale="log", xlabel="Sequences at a time", ylabel=f"Predicted speedup, n = {n}")
    axes[3].set_xticks([1, 4, 16, 64], ["1", "4", "16", "64"])
    axes[3].minorticks_off()


def frontier(
    model,
    models: Mapping[tuple[str, str, int], Cut],
    found: Mapping[tuple[str, str, int], pd.DataFrame],
    whole: pd.DataFrame,
    texts: Sequence[str],
    **speed,
) -> pd.DataFrame:
    """One row per key (choice, compensation, n) of `models`: what is lost on the texts, and what is saved.

    speed: settings of `predict_speed`. Columns: method, choice, compensation, n, attn, mlp, windowed (numbers of
    sublayers), lost with _low, _high (95 %) and _stderr, predicted_speedup, kv (megabytes of the cache at the end, by
    prediction), parameters (millions).
    """
    rows = []
    for (how, method, n), cut in models.items():
        row = {"method": how if method == "none" else f"{how}: {method}", "choice": how, "compensation": method, "n": n}
        row |= {"attn": len(cut.plan.attn), "mlp": len(cut.plan.mlp), "windowed": len(cut.layers)}
        row["lost"], row["lost_low"], row["lost_high"] = paired(found[how, method, n], whole, texts)
        row["lost_stderr"] = (row["lost_high"] - row["lost_low"]) / 3.92
        row["predicted_speedup"] = cut.speedup(model, **speed)
        row["kv"] = cut.limit(model, **speed).kv_bytes / 1e6
        with cut.of(model):
            row["parameters"] = sum(p.numel() for p in model.parameters()) / 1e6
        rows.append(row)
    return pd.DataFrame(rows)
