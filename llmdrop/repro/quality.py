"""Quality: what is left of a model, item by item, so that variants can be paired; stored and never measured twice.

Every sample of a text, every question of a benchmark and every prompt is kept with its own numbers. Averages,
differences and intervals are computed from these later, without the model (`llmdrop.repro.statistics`).
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..calibration import Calibration
from ..compress.variant import Variant
from ..evaluation import evaluate, generation, sweep
from ..evaluation.evaluate import ask
from ..evaluation.generation import check_length, encode, generate, greedy_matches
from ..evaluation.perplexity import text_items
from ..evaluation.sweep import loglikelihoods
from ..evaluation.tasks import task_digest
from ..plan import DropPlan
from .provenance import model_key, model_name, provenance, tokenizer_digest, version
from .store import Entry, Store

COLUMNS = ["variant", "where", "metric", "item", "value", "n"]


@dataclass(frozen=True)
class Questions:
    """Prompts and the answers that should follow them, to be written greedily, token for token."""

    prompts: Sequence[str]
    targets: Sequence[str]

    @property
    def digest(self) -> str:
        return _digest([list(self.prompts), list(self.targets)])


def quality(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    variants: Mapping[str, Variant],
    texts: Mapping[str, Calibration] | None = None,
    tasks: Sequence[str] = (),
    questions: Mapping[str, Questions] | None = None,
    limit: int | None = None,
    data_dir: str | os.PathLike | None = None,
    num_fewshot: int | Mapping[str, int] | None = None,
    batch_size: int = 8,
    store: Store | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """What is left of `model` in every variant, on texts, benchmarks and questions: one row per item and metric.

    model: undropped. texts: held-out text by name; metric "nats", a sample's mean negative log-likelihood per token.
    tasks: lm-eval's benchmarks, limit, seed, data_dir and num_fewshot as of `llmdrop.evaluate`; metrics are lm-eval's
    own per question ("acc", "acc_norm", "exact_match", ...) and `choice`. questions: prompts with answers; metric
    "match", 1 where greedy decoding writes the answer.

    Returns columns variant, where (a text, task or set of questions), metric, item (its number), value, n (tokens of a
    text sample, else 1). Items are the same for every variant, so that differences can be paired. Every variant and
    text, task or set is stored on its own; nothing is applied, fitted or found for what is stored.

    Raises what `Variant.applied`, `llmdrop.perplexity` and `llmdrop.evaluate` raise; ValueError without variants, for
    one name of two things to measure on, and for a task whose questions have no number of their own (wikitext).
    """
    texts = texts or {}
    questions = questions or {}
    if not variants:
        raise ValueError("no variants to measure; Variant() is the whole model")
    names = [*texts, *tasks, *questions]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} names several of texts, tasks and questions; give each a name of its own")
    shots = num_fewshot if isinstance(num_fewshot, Mapping) else dict.fromkeys(tasks, num_fewshot)
    # every task is known to be there before anything runs
    task_digests = {task: task_digest(task, data_dir, shots.get(task)) for task in tasks}
    of_model = model_key(model, batch_size)
    of_pass = of_model | {"batch_size": None}  # a sweep's numbers do not depend on it
    of_tokenizer = {"tokenizer": tokenizer_digest(tokenizer)} if tasks or questions else {}
    places: list[_Place] = []

    for name, text in texts.items():
        items = text_items(text)
        counts = [item.n_scored for item in items]

        def losses(plans: Sequence[DropPlan], items=items, counts=counts, name=name) -> list[dict]:
            sums, _ = loglikelihoods(model, plans, items, label=name)
            return [{"nats": (-row).tolist(), "tokens": counts} for row in sums]

        key = of_pass | {"version": sweep.VERSION, "text": text.digest}
        places.append(_Place(name, "losses", key, name, losses, _text_rows))

    for task in tasks:

        def answered(plans: Sequence[DropPlan], task=task) -> list[list[dict]]:
            return ask(model, tokenizer, plans, task, limit, data_dir, shots.get(task), batch_size, seed=seed)

        key = of_model | of_tokenizer
        key |= {
            "version": [sweep.VERSION, evaluate.VERSION],
            "lm_eval": version("lm_eval"),
            "task": task,
            "task_digest": task_digests[task],
            "limit": limit,
            "seed": None if limit is None else seed,
        }
        slug = task if limit is None else f"{task}-{limit}"
        places.append(_Place(task, "questions", key, slug, answered, partial(_question_rows, task)))

    for name, asked in questions.items():

        def matches(plans: Sequence[DropPlan], asked=asked) -> list[list[int]]:
            return greedy_matches(model, tokenizer, plans, asked.prompts, asked.targets)

        key = of_pass | of_tokenizer | {"version": [sweep.VERSION, generation.VERSION], "questions": asked.digest}
        places.append(_Place(name, "matches", key, name, matches, _match_rows))

    measured = _measured(store or Store(), model, variants, places)
    rows = [
        (variant, place.name, *row) for place in places for variant in variants for row in measured[place.name, variant]
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def _text_rows(loss: Mapping) -> list[tuple]:
    """(metric, item, value, n) of every sample."""
    samples = zip(loss["nats"], loss["tokens"], strict=True)
    return [("nats", item, nats / n, n) for item, (nats, n) in enumerate(samples)]


def _question_rows(task: str, records: Sequence[Mapping]) -> list[tuple]:
    """(metric, item, value, n) of every question and metric."""
    rows = []
    for item, record in enumerate(records):
        metrics = dict(record["metrics"])
        if record["gold"] is not None and record["loglikelihoods"]:
            metrics["choice"] = choice(record)
        if not metrics:
            raise ValueError(f"{task} has no metric of a single question; measure it with llmdrop.evaluate")
        rows += [(metric, item, value, 1) for metric, value in metrics.items()]
    return rows


def _match_rows(values: Sequence[int]) -> list[tuple]:
    """(metric, item, value, n) of every prompt."""
    return [("match", item, value, 1) for item, value in enumerate(values)]


def choice(question: Mapping) -> float:
    """Log of the probability of the right answer among the choices, each choice's log-likelihood taken per byte.

    question: a record of `llmdrop.evaluation.evaluate.ask`.
    """
    per_byte = np.array(question["loglikelihoods"]) / np.array(question["bytes"])
    return float(per_byte[question["gold"]] - np.logaddexp.reduce(per_byte))


def answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    variants: Mapping[str, Variant],
    prompts: Sequence[str],
    name: str,
    max_new_tokens: int = 48,
    stop: Sequence[str] = (),
    batch_size: int = 16,
    store: Store | None = None,
) -> pd.DataFrame:
    """What every variant writes after each prompt, greedily (`llmdrop.evaluation.generation.generate`), stored.

    name: of the set of prompts, for people. Windowed variants take one prompt at a time, whatever the batch_size: their
    KV caches have no room for padding. Returns variant, item (number of the prompt), answer. Raises ValueError for a
    prompt that with its answer is longer than the model's positions, before anything runs.
    """
    check_length(model, [encode(tokenizer, prompt) for prompt in prompts], max_new_tokens)
    key = model_key(model, batch_size) | {
        "version": generation.VERSION,
        "tokenizer": tokenizer_digest(tokenizer),
        "prompts": _digest(list(prompts)),
        "stop": list(stop),
        "max_new_tokens": max_new_tokens,
    }
    written: dict[tuple[str, str], list] = {}
    for windowed in (False, True):
        size = 1 if windowed else batch_size

        def write(plans: Sequence[DropPlan], size=size) -> list[list[str]]:
            return [generate(model, tokenizer, prompts, max_new_tokens, stop, size)]

        some = {label: variant for label, variant in variants.items() if (variant.windows is not None) == windowed}
        place = _Place(name, "answers", key, name, write, list)
        written |= _measured(store or Store(), model, some, [place], together=False)
    rows = [(variant, k, text) for variant in variants for k, text in enumerate(written[name, variant])]
    return pd.DataFrame(rows, columns=["variant", "item", "answer"])


def training_losses(model: nn.Module, variant: Variant, store: Store | None = None) -> list[float]:
    """The loss of every step of a variant's healing, stored. Raises what `Healing.losses` raises."""

    def compute() -> list[float]:
        changes = {}
        if variant.reconstruction is not None:
            changes = variant.reconstruction.changes(model, variant.plan)
        return variant.healing.losses(model, variant.plan, changes)

    key = model_key(model) | {"variant": variant.key}
    slug = f"{model_name(model)}-{variant.label}"
    facts = partial(provenance, model, variant.healing.text, weights=key["weights"])
    return (store or Store()).get("training", key, compute, slug, facts)


@dataclass(frozen=True)
class _Place:
    """Where variants are measured: a text, a task, a set of questions or of prompts.

    kind, key, slug: of the results store. measure: one value per plan of the model, as it is then. rows: what a value
    says, item by item.
    """

    name: str
    kind: str
    key: dict
    slug: str
    measure: Callable[[Sequence[DropPlan]], list]
    rows: Callable[[Any], list]

    def entry(self, model: nn.Module, variant: Variant) -> Entry:
        own = {"variant": variant.key}
        fits = [part.batch_size for part in (variant.reconstruction, variant.mask) if part is not None]
        if fits and self.key["dtype"] != "float32":  # 16-bit sums depend on it
            own["fit_batch_sizes"] = fits
        return Entry(self.key | own, f"{model_name(model)}-{variant.label}-{self.slug}")

    def facts(self, model: nn.Module) -> Callable[[], dict]:
        return partial(provenance, model, weights=self.key["weights"])


def _measured(
    store: Store, model: nn.Module, variants: Mapping[str, Variant], places: Sequence[_Place], together: bool = True
) -> dict[tuple[str, str], list]:
    """{(place, variant): its rows}, from values that are each stored under the place's key and the variant's own.

    Variants that only drop sublayers are measured in one call for each place, which shares what their plans share
    (unless together=False), and stored first. Each of the others is applied once, for all places where it was not
    measured yet: what it fits or trains may take longer than to measure it.
    """
    rows = {}
    swept = {name: variant for name, variant in variants.items() if together and variant.is_plan_only}
    plans = [variant.plan for variant in swept.values()]
    for place in places:

        def sweep_missing(missing: list[int], place=place) -> list:
            return place.measure([plans[i] for i in missing])

        entries = [place.entry(model, variant) for variant in swept.values()]
        found = store.get_many(place.kind, entries, sweep_missing, place.facts(model))
        rows |= {(place.name, name): place.rows(value) for name, value in zip(swept, found, strict=True)}
    for name in [name for name in variants if name not in swept]:
        of_places = _changed(store, model, variants[name], places)
        rows |= {(place, name): of_place for place, of_place in of_places.items()}
    return rows


def _changed(store: Store, model: nn.Module, variant: Variant, places: Sequence[_Place]) -> dict[str, list]:
    """{place: rows} of one variant, applied where the first value is missing and undone after the last place."""
    rows = {}
    with ExitStack() as undo:
        applied = False

        def measure(missing: list[int], place: _Place) -> list:
            nonlocal applied
            if not applied:
                undo.enter_context(variant.applied(model))
                applied = True
            return place.measure([DropPlan()])

        for place in places:
            entries = [place.entry(model, variant)]
            (value,) = store.get_many(place.kind, entries, partial(measure, place=place), place.facts(model))
            rows[place.name] = place.rows(value)
    return rows


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
