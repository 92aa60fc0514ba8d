"""Cut a model's attention, by dropping or by windows, and measure what is lost, what is found, what it takes."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from os.path import commonprefix

import pandas as pd
import torch
from torch import nn

from .anatomy import anatomy
from .beyond import text_rows
from .calibration import Calibration
from .fingerprint import model_key, provenance, speed_key, tokenizer_digest
from .generation import check_length
from .leaderboard import losses, plot_lost
from .plan import DropPlan
from .prune import dropped
from .results import Store, _name, _plan_key
from .roofline import predict_speed
from .speed import measure_speed
from .windows import SINKS, WINDOW, score_windows, windowed


@dataclass(frozen=True)
class Cut:
    """What is done to a model's attention: sublayers dropped, and layers windowed. Cut() is the whole model."""

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
        windows = {"layers": sorted(self.layers), "window": self.window, "sinks": self.sinks} if self.layers else {}
        return _plan_key(self.plan) | windows

    @property
    def label(self) -> str:
        return f"{self.plan.label}-{len(self.layers)}x{self.window}" if self.layers else self.plan.label

    def speedup(self, model, **speed) -> float:
        """Over the whole model, by `predict_speed` with these settings."""
        n, held = len(self.layers), self.window + self.sinks
        mine = predict_speed(model, self.plan, windowed=n, window=held, **speed)
        return predict_speed(model, **speed).seconds / mine.seconds


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
    questions: Mapping[str, tuple[Sequence[str], Sequence[str]]],
) -> pd.DataFrame:
    """What is left of the model: rows as of `beyond.measure`.

    One row per sample of a text (mean negative log-likelihood per token, in nats) and per question (1: the answer's
    tokens come, taken greedily, else 0). questions: prompts and targets by name, as from `questions.retrieval`. Every
    text and set of questions is stored on its own.
    """
    key = model_key(model, 1, "cuts", "windows", "beyond", "sweep", "prune", "anatomy") | cut.key
    whats = {name: {"text": text.digest} for name, text in texts.items()}
    for name, asked in questions.items():
        whats[name] = {"asked": [list(part) for part in asked], "tokenizer": tokenizer_digest(tokenizer)}

    def compute(name: str) -> list[dict]:
        with cut.of(model):
            if name in texts:
                return text_rows(model, [DropPlan()], {name: texts[name]})[0]
            values = _answered(model, tokenizer, *questions[name])
        return [{"where": name, "item": k, "value": value, "n": 1} for k, value in enumerate(values)]

    rows = []
    for name, what in whats.items():
        slug = f"{_name(model)}-{cut.label}-{name}"
        rows += store.get("windows", key | what, partial(compute, name), slug, lambda: provenance(model))
    return pd.DataFrame(rows)


def percent(rows: pd.DataFrame, questions: Iterable[str]) -> list[float]:
    """Percent answered of each set of questions, from `measure`."""
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

    One row a cut: prefill and decode, the speedups over the whole model, medians over rounds, each with half its range
    (_stderr); kv, megabytes of the cache at the end. Cuts of one shape are timed once.
    """
    cuts = list(cuts)
    shapes = {cut.label: cut for cut in (Cut(), *cuts)}
    key = speed_key(model, "cuts", "windows", "speed", "prune", "anatomy") | {"rounds": rounds, "settings": settings}
    key["cuts"] = [cut.key for cut in shapes.values()]

    def compute() -> list[dict]:
        rows = []
        for turn in range(rounds):
            for name, cut in shapes.items():
                with cut.of(model):
                    one = measure_speed(model, repeats=1, warm_up=turn == 0, **settings)
                kept = {k: one[k] for k in ("prefill_seconds", "decode_seconds", "kv_bytes")}
                rows.append({"cut": name, "round": turn} | kept)
        return rows

    slug = f"{_name(model)}-{len(shapes)}-cuts"
    rows = pd.DataFrame(store.get("window-speed", key, compute, slug, lambda: provenance(model, **settings)))
    base, found = rows[rows["cut"] == Cut().label].set_index("round"), {}
    for part in ("prefill", "decode"):
        times = rows[f"{part}_seconds"]
        speedups = (rows["round"].map(base[times.name]) / times).groupby(rows["cut"])
        found |= {part: speedups.median(), f"{part}_stderr": (speedups.max() - speedups.min()) / 2}
    found["kv"] = rows.groupby("cut")["kv_bytes"].first() / 1e6
    return pd.DataFrame(found).loc[[cut.label for cut in cuts]].reset_index(drop=True)


# ---- for the notebook


def table(
    model,
    models: Mapping[tuple[str, str, int], Cut],
    found: Mapping[tuple[str, str, int], pd.DataFrame],
    whole: pd.DataFrame,
    texts: Iterable[str],
    questions: Iterable[str],
    sequences: Iterable[int],
    **speed,
) -> pd.DataFrame:
    """`leaderboard.losses` of the cuts, with what they find and save; one row a key (choice, how, n) of `models`.

    Adds windowed (layers), the percent answered of each set of questions, and at_<b>: the speedup that `predict_speed`
    allows for b sequences.
    """
    out = losses(found, whole, texts)
    out["windowed"] = [len(cut.layers) for cut in models.values()]
    out[list(questions)] = [percent(found[key], questions) for key in models]
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
