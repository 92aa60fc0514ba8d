"""What notebooks/my_model.ipynb is made of: text, savings, and the plan that a limit asks for.

Limits have the names of the notebook's parameters: MAX_LOSS (nats per token), SPEEDUP (of a new token, as predicted)
and KV (the share of the KV cache that is left).
"""

import json
import os
import time
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, log2, nan
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..anatomy import find_anatomy, unwrapped
from ..calibration import SOURCES, Calibration, load_calibration
from ..checkpoints.embedded import short_name
from ..compress.shortened_llama import removed
from ..compress.variant import Variant
from ..compress.windows import WINDOW, Windows
from ..data.texts import HELD_OUT, available_sources, held_out_texts, mixture
from ..plan import DropPlan, drop_order, plan_drop
from ..prune import dropped
from ..scoring import ImportanceScores
from ..speed.geometry import has_tied_head, kv_cache_bytes
from ..speed.measure import synchronize
from ..speed.roofline import HARDWARE, predict_speed
from .quality import quality
from .selectors import Chooser
from .statistics import difference, mean_of, speed_ratio
from .store import Store

SCORED_LEN = 512  # tokens of a sample that layers are scored on, or that a reconstruction is fitted on
READ_LEN = 256  # of one that a plan is chosen or measured on
NEW_TOKENS = 8  # that are timed, at the end of the context
TASK_TOKENS = 120  # of a question with its answers, about
WHOLE = "Whole model"
# ways to make a model smaller, by name: `target` of `plan_drop`, and two that change attention layers otherwise
DROPS = {"Attention Drop": "attn", "MLP Drop": "mlp", "Block Drop": "block", "Joint Drop": "joint"}
RECONSTRUCTED = "Attention Drop, reconstructed"
WINDOWED = f"Windows of {WINDOW}"
Ways = dict[str, dict[int, Variant]]  # of each way, by the number of layers or sublayers: in growing order
Speed = Mapping[str, int]  # batch_size, prompt_len, new_tokens: settings of `predict_speed` and `measure_speed`


# ---- text


@dataclass(frozen=True)
class Texts:
    """Text to score on, to fit on, to choose plans on, and held-out text to measure on, which shares no document.

    judged: names of the held-out texts by which plans are judged. notes: what could not be had, for people.
    """

    calibration: Calibration
    fit: Calibration
    choice: dict[str, Calibration]
    held_out: dict[str, Calibration]
    judged: list[str]
    notes: list[str]


def load_texts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    calibration: str,
    samples: int = 16,
    data_dir: str | os.PathLike | None = None,
) -> Texts:
    """`samples` of the calibration text (see `llmdrop.load_calibration`), and text of the sources of HELD_OUT.

    Of a text of one's own samples are held out, too, and plans are chosen and judged by these. Raises what
    `load_calibration` raises, and ValueError for fewer than 4 samples and where there is no text to measure on.
    """
    if samples < 4:
        raise ValueError(f"SAMPLES={samples}: give at least 4, which are shared among several texts")
    long = min(SCORED_LEN, positions(model) or SCORED_LEN)
    short = min(READ_LEN, long)
    scored = load_calibration(calibration, tokenizer, samples, long, data_dir=data_dir)
    named = [name for name in HELD_OUT if name in available_sources(data_dir)]
    n = samples // 4
    n_choice = max(1, n // 2)
    fit = scored
    choice: dict[str, Calibration] = {}
    held_out: dict[str, Calibration] = {}
    notes = []
    if named:
        fit = mixture(named, tokenizer, n, long, data_dir=data_dir)
        choice["several texts"] = mixture(named, tokenizer, n_choice, short, data_dir=data_dir, skip=2 * n)
        held_out = held_out_texts(tokenizer, 2 * n, short, named, data_dir=data_dir)
    else:
        notes.append("None of the named texts is here (DATA_DIR names a mirror of them), so your own has to do.")
    judged = list(held_out)
    if calibration not in SOURCES:
        try:
            rest = load_calibration(calibration, tokenizer, n_choice + n, long, data_dir=data_dir, skip=samples)
        except ValueError as error:
            notes.append(f"None of your text is left to measure on: {error}.")
        else:
            own = f"{Path(calibration).name}, held out"
            choice = {own: replace(rest, input_ids=rest.input_ids[:n_choice])}
            held_out[own] = replace(rest, input_ids=rest.input_ids[n_choice:])
            judged = [own]
    if not held_out:
        raise ValueError(f"there is no text to measure on. {' '.join(notes)}")
    return Texts(scored, fit, choice, held_out, judged, notes)


def positions(model: nn.Module) -> int | None:
    """The longest text that the model was made for, in tokens; None where its config does not say."""
    return getattr(unwrapped(model).config.get_text_config(), "max_position_embeddings", None)


# ---- what the study takes


@torch.inference_mode()
def expected_minutes(
    model: nn.Module, texts: Texts, n_variants: int, context_tokens: int, n_questions: int = 0
) -> float:
    """How long the notebook takes on this machine, about, from the time of a forward pass over one sample.

    n_variants: in the drop curves. context_tokens: of the batch that is timed. n_questions: of all tasks.
    """
    ids = texts.fit.input_ids[:1].to(model.get_input_embeddings().weight.device)
    for _ in range(2):  # the first one warms up
        start = time.perf_counter()
        model(ids, use_cache=False)
        synchronize(ids.device)
        seconds = (time.perf_counter() - start) / ids.numel()
    of_all = sum(text.n_tokens for text in texts.held_out.values())
    of_choice = sum(text.n_tokens for text in texts.choice.values())
    halvings = ceil(log2(2 * find_anatomy(model).n_layers))
    tokens = 4 * texts.calibration.n_tokens + 8 * texts.fit.n_tokens + 24 * context_tokens
    tokens += (0.8 * n_variants + 10) * of_all + 6 * halvings * of_choice  # plans share layers
    tokens += 0.8 * n_variants * n_questions * TASK_TOKENS
    return seconds * tokens / 60


# ---- what a variant saves


def at_context(model: nn.Module, batch: int, context: int) -> dict[str, int]:
    """Settings of `predict_speed` and `measure_speed`: NEW_TOKENS at the end of so many tokens of context.

    Raises ValueError for a context longer than the model's, or of hardly a token.
    """
    limit = positions(model)
    if batch < 1 or context <= NEW_TOKENS or (limit is not None and context > limit):
        most = f" and at most {limit:,}, the positions of this model" if limit is not None else ""
        raise ValueError(f"BATCH={batch}, CONTEXT={context}: give at least 1, and more than {NEW_TOKENS} tokens{most}")
    return {"batch_size": batch, "prompt_len": context - NEW_TOKENS, "new_tokens": NEW_TOKENS}


def why_not_predicted(model: nn.Module) -> str:
    """Why `predict_speed` cannot say how long this model takes; "" where it can."""
    try:
        predict_speed(model)
    except ValueError as error:
        return f"No times are predicted: {error}."
    return ""


def savings(model: nn.Module, variant: Variant, **speed: int) -> dict[str, float]:
    """weights and kv, of the full cache: megabytes that are left, in the model's own dtype.

    And, where it can be predicted, milliseconds for a new token of every sequence, in 16 bits, by the name of hardware.
    """
    tokens = speed["prompt_len"] + speed["new_tokens"]
    kv = kv_cache_bytes(model, speed["batch_size"], tokens, variant.plan)
    if variant.windows is not None:  # given to layers of full attention alone, which are alike
        held = min(1.0, (variant.windows.window + variant.windows.sinks) / tokens)
        kv *= 1 - (1 - held) * len(variant.windows.layers) / len(find_anatomy(model).live("attn"))
    n_weights = model.num_parameters() - removed(model, variant.plan)
    saved = {"weights": n_weights * model.dtype.itemsize / 1e6, "kv": kv / 1e6}
    if not why_not_predicted(model):
        for hardware in HARDWARE:
            decoding = variant.speed_limit(model, hardware=hardware, **speed).decode_seconds
            saved[hardware] = 1000 * decoding / speed["new_tokens"]
    return saved


def speedup(whole: Mapping[str, float], saved: Mapping[str, float]) -> float:
    """The least over named hardware, from two `savings`; NaN where no times were predicted."""
    return min((whole[hardware] / saved[hardware] for hardware in HARDWARE if hardware in saved), default=nan)


def read_parts(model: nn.Module, **speed: int) -> dict[str, float]:
    """Megabytes that a new token reads, by what they are."""
    parts = find_anatomy(model)
    weights = {
        "Attention": removed(model, DropPlan(attn=parts.live("attn"))),
        "MLPs": removed(model, DropPlan(mlp=parts.live("mlp"))),
    }
    rest = model.num_parameters() - sum(weights.values())
    if not has_tied_head(model):  # of the embedding a row is read
        rest -= model.get_input_embeddings().weight.numel()
    megabytes = {kind: n * model.dtype.itemsize / 1e6 for kind, n in (weights | {"Head, norms": rest}).items()}
    return megabytes | {"KV cache": savings(model, Variant(), **speed)["kv"]}


def measured(rounds: pd.DataFrame) -> pd.DataFrame:
    """From `timing`, one row a variant: ms (for a new token) and here (times as fast as the first), with intervals.

    NaN for what did not fit into memory.
    """
    table = {}
    names = rounds["variant"].unique()
    for name in names:
        steps = rounds.loc[rounds["variant"] == name, "decode_seconds"] * 1000 / NEW_TOKENS
        row = mean_of(steps, "rounds").columns("ms") | {"here": nan}
        if rounds.loc[rounds["variant"].isin([name, names[0]]), "status"].eq("ok").all():
            row |= speed_ratio(rounds, name, names[0], "decode_seconds").columns("here")
        table[name] = row
    return pd.DataFrame.from_dict(table, orient="index")


# ---- the plan that a limit asks for


@dataclass(frozen=True)
class Asked:
    """variants: of each way the one that the limits ask for. best: the way to take, of those that can be saved.

    is_met: whether MAX_LOSS is kept on the text to choose on; if not, the variants are the smallest that save enough.
    missing: ways that have none, and why.
    """

    variants: dict[str, Variant]
    best: str
    is_met: bool
    missing: dict[str, str]

    @property
    def variant(self) -> Variant:
        """The one to take."""
        return self.variants[self.best]

    @property
    def target(self) -> str:
        """Of `plan_drop`, for the plan to take."""
        return DROPS.get(self.best, "attn")

    @property
    def n(self) -> int:
        """The same."""
        plan = self.variant.plan
        return len(plan) if self.target == "joint" else max(len(plan.attn), len(plan.mlp))


def drops(model: nn.Module, scores: ImportanceScores) -> Ways:
    """Those of DROPS: the layers that score lowest go first, and one stays. Without plans that the model refuses."""
    ways = {}
    for name, target in DROPS.items():
        sizes = range(1, len(drop_order(scores, target)))
        plans = {n: plan_drop(scores, target, n) for n in sizes}
        ways[name] = {n: Variant(plan) for n, plan in plans.items() if _is_allowed(model, plan)}
    return {name: variants for name, variants in ways.items() if variants}


def _is_allowed(model: nn.Module, plan: DropPlan) -> bool:
    try:
        with dropped(model, plan):
            return True
    except ValueError:  # other layers read what the attention of one gives them
        return False


def other_ways(model: nn.Module, ways: Ways, fit: Calibration) -> tuple[Ways, dict[str, str]]:
    """RECONSTRUCTED and WINDOWED, fitted and chosen on `fit`; and why one of them is not possible, where so.

    ways: from `drops`.
    """
    chooser = Chooser(model, fit)
    reconstruction = chooser.reconstructions["least squares"]
    others = {}
    impossible = {}
    try:
        reconstruction.corrections(model)
        plain = ways["Attention Drop"]
        others[RECONSTRUCTED] = {n: replace(variant, reconstruction=reconstruction) for n, variant in plain.items()}
    except ValueError as error:
        impossible[RECONSTRUCTED] = str(error)
    try:
        order = chooser.window_order(WINDOW)
        others[WINDOWED] = {n: Variant(windows=Windows(tuple(order[:n]), WINDOW)) for n in range(1, len(order) + 1)}
    except ValueError as error:
        impossible[WINDOWED] = str(error)
    return others, impossible


def check_limits(
    model: nn.Module,
    ways: Ways,
    max_loss: float | None,
    min_speedup: float | None,
    kv: float | None,
    **speed: int,
) -> dict[str, float]:
    """The limits that are given, MAX_LOSS=0.05 where none is, known to be possible as far as shapes tell.

    Raises ValueError for a limit that is none, or that no way reaches, and for a SPEEDUP that cannot be predicted.
    """
    given = {"MAX_LOSS": max_loss, "SPEEDUP": min_speedup, "KV": kv}
    limits = {name: float(value) for name, value in given.items() if value is not None} or {"MAX_LOSS": 0.05}
    if limits.get("MAX_LOSS", 1) <= 0 or limits.get("SPEEDUP", 2) <= 1 or not 0 < limits.get("KV", 0.5) < 1:
        raise ValueError(f"{limits}: MAX_LOSS is above 0 nats, SPEEDUP above 1, and KV a share between 0 and 1")
    if "SPEEDUP" in limits and why_not_predicted(model):
        raise ValueError(f"SPEEDUP asks for a prediction. {why_not_predicted(model)} Give MAX_LOSS or KV instead")
    whole = savings(model, Variant(), **speed)
    most = [savings(model, variants[max(variants)], **speed) for variants in ways.values()]
    if not any(_is_enough(whole, saved, limits) for saved in most):
        share = min(saved["kv"] for saved in most) / whole["kv"]
        fastest = max(speedup(whole, saved) for saved in most)
        raise ValueError(
            f"no plan reaches {', '.join(f'{name}={value:g}' for name, value in limits.items())}: with one layer of a "
            f"kind left, there is a share of {share:.2f} of the KV cache, and a speedup of {fastest:.2f}; ask for less"
        )
    return limits


def _is_enough(whole: Mapping[str, float], saved: Mapping[str, float], limits: Mapping[str, float]) -> bool:
    """Whether what is left (see `savings`) is as little as SPEEDUP and KV ask for."""
    kv = limits.get("KV", 1.0)
    return saved["kv"] <= kv * whole["kv"] * (1 + 1e-9) and not speedup(whole, saved) < limits.get("SPEEDUP", 0)


def ask(
    model: nn.Module, ways: Ways, choice: Mapping[str, Calibration], limits: Mapping[str, float], **speed: int
) -> Asked:
    """Of every way the variant that the limits (of `check_limits`) ask for, chosen on the texts `choice`.

    Without MAX_LOSS a way stops as soon as it saves enough, and the best is what loses least. With it a way goes on as
    far as MAX_LOSS allows, which is found by halving, as if every next layer lost more; the best is what leaves the
    fewest bytes of weights and cache to read, and of several such what loses least.
    """

    def loss(variant: Variant) -> float:
        rows = quality(model, None, {WHOLE: Variant(), "this": variant}, choice)
        return difference(rows, "this", WHOLE, list(choice)).value

    whole = savings(model, Variant(), **speed)
    chosen: dict[str, Variant] = {}
    smallest: dict[str, Variant] = {}
    missing: dict[str, str] = {}
    for name, by_size in ways.items():
        variants = list(by_size.values())
        first = bisect_left(variants, True, key=lambda v: _is_enough(whole, savings(model, v, **speed), limits))
        if first == len(variants):
            missing[name] = "saves too little in however many layers"
            continue
        smallest[name] = variants[first]
        if "MAX_LOSS" in limits:
            end = bisect_right(variants, limits["MAX_LOSS"], lo=first, key=loss)
            if end == first:
                missing[name] = "the fewest layers that are enough lose more than MAX_LOSS"
                continue
            first = end - 1
        chosen[name] = variants[first]
    is_met = bool(chosen.keys() - {WINDOWED})
    if not is_met:
        chosen = smallest
        missing = {name: reason for name, reason in missing.items() if name not in smallest}

    def rank(name: str) -> tuple[float, float]:
        if "MAX_LOSS" not in limits or not is_met:
            return 0, loss(chosen[name])
        saved = savings(model, chosen[name], **speed)
        return saved["weights"] + saved["kv"], loss(chosen[name])

    best = min((name for name in chosen if name != WINDOWED), key=rank)
    return Asked(chosen, best, is_met, missing)


# ---- how sure one can be


def plans_on_other_texts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    asked: Asked,
    calibration: str,
    samples: int,
    data_dir: str | os.PathLike | None = None,
) -> dict[str, DropPlan]:
    """As many sublayers, chosen on two other texts than `calibration`, by the text's name; {} where there are none."""
    others = [name for name in ("stdlib", *HELD_OUT) if name != calibration and name in available_sources(data_dir)]
    length = min(SCORED_LEN, positions(model) or SCORED_LEN)
    plans = {}
    for name in list(dict.fromkeys(others))[:2]:
        text = load_calibration(name, tokenizer, samples, length, data_dir=data_dir)
        plans[name] = plan_drop(Store().score(model, text), asked.target, asked.n)
    return plans


def plan_stability(
    scores: ImportanceScores,
    by_sample: Mapping[str, np.ndarray],
    target: str,
    n: int,
    sizes: Sequence[int],
    draws: int = 200,
) -> pd.DataFrame:
    """How often sublayers go when samples are drawn anew: n_samples, kind, layer, percent of the draws.

    by_sample: from `Store.sample_scores`. target, n: of `plan_drop`. sizes: samples that are drawn, with replacement.
    """
    random = np.random.default_rng(0)
    rows = []
    for size in sizes:
        gone = {"attn": np.zeros(len(scores.attn)), "mlp": np.zeros(len(scores.attn))}
        for _ in range(draws):
            drawn = random.integers(len(by_sample["attn"]), size=size)
            means = {kind: values[drawn].mean(axis=0) for kind, values in by_sample.items()}
            plan = plan_drop(replace(scores, **means), target, n)
            for kind, count in gone.items():
                count[list(getattr(plan, kind))] += 100 / draws
        for kind, count in gone.items():
            rows += [(size, kind, layer, percent) for layer, percent in enumerate(count)]
    return pd.DataFrame(rows, columns=["n_samples", "kind", "layer", "percent"])


# ---- how to keep it


def export_commands(model: nn.Module, name: str, variant: Variant, texts: Texts, calibration: str) -> str:
    """Python that saves the model `name` (as `load_model` takes it) so changed, and says how to serve it.

    A reconstruction is fitted again, on the text that it was fitted on.
    """
    plan = variant.plan
    out = f"{short_name(name)}-{plan.label}"
    quoted = partial(json.dumps, ensure_ascii=False)  # as Python writes it, too
    imports = ["import llmdrop"]
    lines = [
        f"model, tokenizer = llmdrop.load_model({quoted(name)})",
        f"plan = llmdrop.DropPlan(attn={list(plan.attn)}, mlp={list(plan.mlp)})",
    ]
    if variant.reconstruction is None:
        lines.append("llmdrop.apply_plan(model, plan)")
    else:
        imports.append("from llmdrop.compress.reconstruction import fit, reconstruct")
        n, length = texts.fit.input_ids.shape
        if texts.fit is texts.calibration:
            lines.append(f"text = llmdrop.load_calibration({quoted(calibration)}, tokenizer, {n}, {length})")
        else:
            imports.append("from llmdrop.data.texts import mixture")
            named = [source for source in texts.held_out if source in SOURCES]
            lines.append(f"text = mixture({named}, tokenizer, {n // len(named)}, {length})")
        lines.append("reconstruct(model, plan, fit(model, plan, text))")
    lines.append(f"llmdrop.save_model(model, tokenizer, {quoted(out)})  # for transformers")
    if unwrapped(model).config.model_type in ("llama", "mistral"):
        gguf = f'{quoted(f"{out}.gguf")}, format="gguf", weights="q8_0"'
        lines.append(f"llmdrop.save_model(model, tokenizer, {gguf})  # llama-server --model {out}.gguf")
        first = next(i for i in range(find_anatomy(model).n_layers) if i not in plan.blocks)
        if first not in plan.attn:  # vLLM wants attention there
            nas = f'{quoted(f"{out}-nas")}, format="nemotron-nas"'
            lines.append(f"llmdrop.save_model(model, tokenizer, {nas})  # vllm serve {out}-nas --trust-remote-code")
    return "\n".join([*imports, "", *lines])
