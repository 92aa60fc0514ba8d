"""Quality of dropped models on lm-eval's benchmarks, many plans at a time: tidy rows, or question by question."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from math import nan
from numbers import Real
from operator import itemgetter

import numpy as np
import pandas as pd
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..anatomy import unwrapped
from ..plan import DropPlan
from ..prune import eval_mode
from .sweep import whole_plans
from .tasks import FEWSHOT_SEED, YAML, Data, Shots, load_tasks, pool, quiet, right_choice, subset

VERSION = 2  # raised when the numbers change
OPTIONS = ("apply_chat_template", "system_instruction", "fewshot_as_multiturn", "confirm_run_unsafe_code")


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    limit: int | None = None,
    data_dir: Data = None,
    num_fewshot: Shots = None,
    batch_size: int = 8,
    progress: bool = True,
    seed: int = 0,
    **options: bool | str | None,
) -> pd.DataFrame:
    """Evaluate one model with lm-eval's own task definitions, in process.

    tasks: names of lm-eval's tasks, groups and tags, or paths of YAML files that define some.
    Returns tidy rows: task, metric, value, stderr, n (questions), num_fewshot, version (of the task); of a group, rows
    of its own (where lm-eval averages it) and of each task in it, but for MMLU's subjects. limit: so many
    questions of each task (of each subject for MMLU), a random choice that seed fixes and a larger limit extends; None
    for all. data_dir: a mirror, None for packaged data (else the hub), "hub". num_fewshot: one number, or a number by
    task; None is lm-eval's default. options: lm-eval's own system_instruction=None, apply_chat_template=False (then
    also fewshot_as_multiturn, as on its command line) and confirm_run_unsafe_code=False. Raises ValueError for unknown
    tasks and without a chat template to apply, FileNotFoundError for missing data, TypeError for another option.
    """
    plans = {"": DropPlan()}
    settings = (limit, data_dir, num_fewshot, batch_size, progress, seed)
    return evaluate_sweep(model, tokenizer, plans, tasks, *settings, **options).drop(columns="plan")


def evaluate_sweep(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    plans: Mapping[str, DropPlan],
    tasks: Sequence[str],
    limit: int | None = None,
    data_dir: Data = None,
    num_fewshot: Shots = None,
    batch_size: int = 8,
    progress: bool = True,
    seed: int = 0,
    **options: bool | str | None,
) -> pd.DataFrame:
    """`evaluate` for many plans of one model, sharing all that they have in common (see `llmdrop.evaluation.sweep`).

    Rows as in `evaluate`, with a column plan (the keys of `plans`). The numbers equal those of each plan evaluated
    alone. Answers that are generated (gsm8k, ifeval, ...) share nothing: lm-eval writes them plan by plan. Raises what
    `evaluate` raises, and ValueError without plans and for a plan of another depth.
    """
    if not tasks or isinstance(tasks, str):
        raise ValueError(f'tasks={tasks!r}: no tasks to evaluate; give a list of at least one, as ["piqa"]')
    rows = []
    run = _run(model, tokenizer, plans, tasks, limit, data_dir, num_fewshot, batch_size, progress, seed, options)
    for lm, parts, results in run:
        pooled = {lm.label: list(parts)} if lm.label in YAML else {name: [name] for name in results["results"]}
        for task, names in pooled.items():
            rows += [{"plan": lm.current, "task": task} | row for row in _rows(results, names)]
    return pd.DataFrame(rows)


def ask(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    plans: Sequence[DropPlan],
    task: str,
    limit: int | None = None,
    data_dir: Data = None,
    num_fewshot: Shots = None,
    batch_size: int = 8,
    progress: bool = True,
    seed: int = 0,
) -> list[list[dict]]:
    """What every plan of a model makes of every question of a task: all that its metrics are made of.

    The sweep of `evaluate_sweep`, with its settings and errors. Returns for each plan one record per question:

        task            lm-eval's name of the part the question is in (MMLU has 57)
        item            the question's number in that part
        metrics         lm-eval's own value of each of its metrics, a float; word_perplexity and the like, which are no
                        means over questions, are left out
        loglikelihoods  of each choice, in nats; of the one answer where there is no choice; [] of generated answers
        bytes, tokens   how many of them each of these scores (UTF-8)
        gold            index of the right choice; None where there is no choice
    """
    named = {str(k): plan for k, plan in enumerate(plans)}
    run = _run(model, tokenizer, named, [task], limit, data_dir, num_fewshot, batch_size, progress, seed, {})
    return [
        [record for part in parts for record in _records(lm, part, parts[part], results["samples"][part])]
        for lm, parts, results in run
    ]


def _run(
    model,
    tokenizer,
    plans: Mapping[str, DropPlan],
    tasks,
    limit,
    data_dir,
    num_fewshot,
    batch_size,
    progress,
    seed,
    options: dict,
) -> Iterator[tuple]:
    """(`SweepLM`, parts of the task lm.label, what `lm_eval.evaluate` gives for the plan lm.current), one by one."""
    if limit is not None and (isinstance(limit, bool) or limit < 1):
        raise ValueError(f"limit={limit}; give a number of questions per task, at least 1, or None for all")
    unknown = set(options) - set(OPTIONS)
    if unknown:
        raise TypeError(f"{', '.join(sorted(unknown))}: not an option of evaluate; lm-eval's are {', '.join(OPTIONS)}")
    has_template = bool(options.get("apply_chat_template"))
    options = {"fewshot_as_multiturn": has_template} | options
    if has_template and not tokenizer.chat_template:
        raise ValueError(
            "this tokenizer has no chat template, as base models have none; leave apply_chat_template out, or set "
            "tokenizer.chat_template"
        )
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError(
            "this tokenizer has neither a begin- nor an end-of-sequence token, and lm-eval puts one before texts; name "
            "one, as tokenizer.eos_token = '<|endoftext|>'"
        )
    model = unwrapped(model)
    whole_plans(model, plans.values())
    loaded = load_tasks(tasks, data_dir, num_fewshot)
    from lm_eval import evaluate as lm_evaluate  # an optional dependency, and slow to import

    from .lm_eval_models import SweepLM

    with eval_mode(model):
        for name, parts in loaded.items():
            with quiet():
                lm = SweepLM(model, tokenizer, plans, batch_size, progress, name)
            if progress and any(task.OUTPUT_TYPE == "generate_until" for task in parts.values()):
                tqdm.write(f"{name}: lm-eval generates the answers, plan by plan; nothing is shared", file=sys.stderr)
            samples = None
            if limit is not None:
                with quiet():
                    samples = {part: subset(part, len(task.eval_docs), limit, seed) for part, task in parts.items()}
            for plan in plans:
                lm.current = plan
                for task in parts.values():  # every plan gets the same examples, as if it were alone
                    task.set_fewshot_seed(FEWSHOT_SEED)
                with quiet():  # standard errors are by formula or 100 bootstrap rounds
                    found = {"tasks": parts, "groups": parts.groups}
                    results = lm_evaluate(lm, found, samples=samples, bootstrap_iters=100, log_samples=True, **options)
                yield lm, parts, results


def _metric(name: str, filter_name: str) -> str:
    return name if filter_name == "none" else f"{name},{filter_name}"


def _size(results: dict, name: str) -> int:
    """How many questions of a task, or of all tasks in a group, were asked."""
    if name in results["n-samples"]:
        return results["n-samples"][name]["effective"]
    return sum(_size(results, child) for child in results["group_subtasks"][name])


def _rows(results: dict, names: list[str]) -> list[dict]:
    """One row per metric; of several tasks (the subjects of MMLU), averaged weighted by their size."""
    sizes = [_size(results, name) for name in names]
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
    question = itemgetter("doc_id")
    for item, group in groupby(sorted(samples, key=question), key=question):
        filtered = list(group)
        first = filtered[0]
        metrics = {}
        for sample in filtered:
            for name in sample["metrics"]:
                if isinstance(sample[name], Real | np.bool_):  # not what word_perplexity and the like are made of
                    metrics[_metric(name, sample["filter"])] = float(sample[name])
        is_text = task.OUTPUT_TYPE == "loglikelihood_rolling"
        requests = [] if task.OUTPUT_TYPE == "generate_until" else first["arguments"]
        responses = first["filtered_resps"][: len(requests)]
        scored = [request[-1] for request in requests]  # of (text,) or (context, continuation)
        yield {
            "task": part,
            "item": item,
            "metrics": metrics,
            "loglikelihoods": [response if is_text else response[0] for response in responses],
            "bytes": [len(text.encode()) for text in scored],
            "tokens": [len(lm.tok_encode(request[0])) if is_text else lm.n_scored[request] for request in requests],
            "gold": right_choice(task, first["doc"]),
        }
