"""Quality of dropped models on lm-eval's benchmarks, many plans at a time: tidy rows, or question by question."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import groupby
from math import nan

import pandas as pd

from ..plan import DropPlan
from ..prune import dropped
from .sweep import eval_mode, whole_plans
from .tasks import FEWSHOT_SEED, Data, Shots, load_tasks, pool, quiet, right_choice

VERSION = 1  # raised when the numbers change


def evaluate(
    model,
    tokenizer,
    tasks: Sequence[str],
    limit: int | None = None,
    data_dir: Data = None,
    num_fewshot: Shots = None,
    batch_size: int = 8,
    progress: bool = True,
) -> pd.DataFrame:
    """Evaluate one model with lm-eval's own task definitions, in process.

    Returns tidy rows: task, metric, value, stderr, n (questions), num_fewshot, version (of the task). limit: the first
    so many questions of each task (of each subject for MMLU), None for all. data_dir: a mirror, None for packaged data
    (else the hub), "hub". num_fewshot: one number, or a number by task; None is lm-eval's default. Raises ValueError
    for unknown tasks, FileNotFoundError for missing data.
    """
    return evaluate_sweep(
        model, tokenizer, {"": DropPlan()}, tasks, limit, data_dir, num_fewshot, batch_size, progress
    ).drop(columns="plan")


def evaluate_sweep(
    model,
    tokenizer,
    plans: Mapping[str, DropPlan],
    tasks: Sequence[str],
    limit: int | None = None,
    data_dir: Data = None,
    num_fewshot: Shots = None,
    batch_size: int = 8,
    progress: bool = True,
) -> pd.DataFrame:
    """`evaluate` for many plans of one model, sharing all that they have in common (see `llmdrop.evaluation.sweep`).

    Rows as in `evaluate`, with a column plan (the keys of `plans`). The numbers equal those of each plan evaluated
    alone. Memory beyond the model: one residual stream of a row of tokens per layer at which plans part. Raises what
    `evaluate` raises, and ValueError without plans and for a plan of another depth.
    """
    if not tasks:
        raise ValueError("no tasks to evaluate; give at least one")
    _check(model, list(plans.values()), limit)
    rows = []
    for name, parts in load_tasks(tasks, data_dir, num_fewshot).items():
        with _sweep(model, tokenizer, plans, batch_size, progress, name) as lm:
            for plan in plans:
                results = _results(lm, plan, parts, limit)
                rows += [{"plan": plan, "task": name} | row for row in _rows(results, parts)]
    return pd.DataFrame(rows)


def ask(
    model,
    tokenizer,
    plans: Sequence[DropPlan],
    task: str,
    limit: int | None = None,
    data_dir: Data = None,
    num_fewshot: Shots = None,
    batch_size: int = 8,
    progress: bool = True,
) -> list[list[dict]]:
    """What every plan of a model makes of every question of a task: all that its metrics are made of.

    The sweep of `evaluate_sweep`, with its settings. Returns for each plan one record per question, in order:

        task            lm-eval's name of the part the question is in (MMLU has 57)
        item            the question's number in that part
        metrics         lm-eval's own value of each of its metrics, a float; word_perplexity and the like, which are no
                        means over questions, are left out
        loglikelihoods  of each choice, in nats; of the one answer where there is no choice; [] of generated answers
        bytes           UTF-8 bytes of what each of these scores
        tokens          tokens of it
        gold            index of the right choice; None where there is no choice

    Raises what `evaluate_sweep` raises.
    """
    _check(model, plans, limit)
    named = {str(k): plan for k, plan in enumerate(plans)}
    parts = load_tasks([task], data_dir, num_fewshot)[task]
    records = []
    with _sweep(model, tokenizer, named, batch_size, progress, task) as lm:
        for name in named:
            samples = _results(lm, name, parts, limit, log_samples=True)["samples"]
            records.append([record for part in parts for record in _records(lm, part, parts[part], samples[part])])
    return records


def _check(model, plans: Sequence[DropPlan], limit: int | None) -> None:
    """ValueError, before anything is loaded."""
    if limit is not None and (isinstance(limit, bool) or limit < 1):
        raise ValueError(f"limit={limit}; give a number of questions per task, at least 1, or None for all")
    whole_plans(model, plans)


@contextmanager
def _sweep(model, tokenizer, plans: Mapping[str, DropPlan], batch_size: int, progress: bool, label: str) -> Iterator:
    """A `SweepLM` for the length of a `with` block; the model then has its training mode again."""
    from .lm_eval_models import SweepLM  # lm-eval takes seconds to import, and the rest of the library does without it

    with eval_mode(model):
        with quiet():
            lm = SweepLM(model, tokenizer, plans, batch_size, progress, label)
        yield lm


def _results(lm, plan: str, parts: dict, limit: int | None, log_samples: bool = False) -> dict:
    """`lm_eval.evaluate` of one plan of the sweep; standard errors by formula or 100 bootstrap rounds."""
    from lm_eval import evaluate as lm_evaluate

    lm.current = plan
    for task in parts.values():  # every plan gets the same examples, as if it were alone
        task.set_fewshot_seed(FEWSHOT_SEED)
    with ExitStack() as stack:
        stack.enter_context(quiet())
        if any(task.OUTPUT_TYPE == "generate_until" for task in parts.values()):
            stack.enter_context(dropped(lm.model, lm.plans[plan]))
        return lm_evaluate(lm, parts, limit=limit, bootstrap_iters=100, log_samples=log_samples)


def _metric(name: str, filter_name: str) -> str:
    return name if filter_name == "none" else f"{name},{filter_name}"


def _rows(results: dict, parts: dict) -> list[dict]:
    """One row per metric; the subjects of MMLU are averaged weighted by their size."""
    names = list(parts)
    sizes = [results["n-samples"][name]["effective"] for name in names]
    rows = []
    for key in results["results"][names[0]]:
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        values = [results["results"][name][key] for name in names]
        stderrs = [results["results"][name].get(f"{metric}_stderr,{filter_name}") for name in names]
        stderrs = [stderr if isinstance(stderr, float) else nan for stderr in stderrs]  # else "N/A"
        value, stderr = pool(values, stderrs, sizes)
        rows.append(
            {
                "metric": _metric(metric, filter_name),
                "value": float(value),
                "stderr": float(stderr),
                "n": sum(sizes),
                "num_fewshot": results["n-shot"].get(names[0], 0),
                "version": str(results["versions"].get(names[0])),
            }
        )
    return rows


def _records(lm, part: str, task, samples: list[dict]) -> Iterator[dict]:
    """The records of `ask`, from what lm-eval logged: per filter of answers, one sample per question."""
    in_order = sorted(samples, key=lambda sample: sample["doc_id"])
    for item, filtered in groupby(in_order, key=lambda sample: sample["doc_id"]):
        filtered = list(filtered)
        metrics = {}
        for sample in filtered:
            for name in sample["metrics"]:
                if not isinstance(sample[name], tuple):
                    metrics[_metric(name, sample["filter"])] = float(sample[name])
        first = filtered[0]
        loglikelihoods: list[float] = []
        scored: list[str] = []
        tokens: list[int] = []
        if task.OUTPUT_TYPE == "loglikelihood_rolling":
            loglikelihoods = first["filtered_resps"]
            scored = [text for (text,) in first["arguments"]]
            tokens = [len(lm.tok_encode(text)) for text in scored]
        elif task.OUTPUT_TYPE != "generate_until":
            loglikelihoods = [value for value, _ in first["filtered_resps"]]
            scored = [continuation for _, continuation in first["arguments"]]
            tokens = [lm.n_scored[texts] for texts in first["arguments"]]
        yield {
            "task": part,
            "item": item,
            "metrics": metrics,
            "loglikelihoods": loglikelihoods,
            "bytes": [len(text.encode()) for text in scored],
            "tokens": tokens,
            "gold": right_choice(task, first["doc"]),
        }
