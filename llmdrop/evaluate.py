"""Quality of dropped models on lm-eval's benchmarks, many plans at a time."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import pandas as pd

from .plan import DropPlan
from .prune import dropped
from .tasks import FEWSHOT_SEED, load_tasks, pool


def evaluate(
    model,
    tokenizer,
    tasks: Sequence[str],
    limit: int | None = None,
    data_dir=None,
    num_fewshot: int | Mapping[str, int] | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> pd.DataFrame:
    """Evaluate one model with lm-eval's own task definitions, in process.

    Returns tidy rows: task, metric, value, stderr, n (questions), num_fewshot, version (of the task). limit: the first
    so many questions of each task (of each subject for MMLU), None for all. data_dir: a mirror, None for packaged data
    (else the hub), "hub". Raises ValueError for unknown tasks, FileNotFoundError for missing data.
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
    data_dir=None,
    num_fewshot: int | Mapping[str, int] | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> pd.DataFrame:
    """`evaluate` for many plans of one model, sharing all that they have in common (see `llmdrop.sweep`).

    Rows as in `evaluate`, with a column plan (the keys of `plans`). The numbers equal those of each plan evaluated
    alone. Memory beyond the model: one residual stream of a row of tokens per layer at which plans part.
    """
    if limit is not None and (isinstance(limit, bool) or limit < 1):
        raise ValueError(f"limit={limit}; give a number of questions per task, at least 1, or None for all")
    from .harness import SweepLM  # lm-eval takes seconds to import, and the rest of the library does without it

    rows = []
    for name, parts in load_tasks(tasks, data_dir, num_fewshot).items():
        with _quiet():
            lm = SweepLM(model, tokenizer, plans, batch_size, progress and name)
        for plan_name, plan in plans.items():
            lm.current = plan_name
            for task in parts.values():  # every plan gets the same examples, as if it were alone
                task.set_fewshot_seed(FEWSHOT_SEED)
            generates = any(task.OUTPUT_TYPE == "generate_until" for task in parts.values())
            if generates:
                with dropped(model, plan):
                    results = _run(lm, parts, limit)
            else:
                results = _run(lm, parts, limit)
            rows += [{"plan": plan_name, "task": name} | row for row in _rows(results, parts)]
    return pd.DataFrame(rows)


def _run(lm, parts: dict, limit: int | None) -> dict:
    """lm_eval.evaluate without its log lines; standard errors by formula or 100 bootstrap rounds."""
    from lm_eval import evaluate as lm_evaluate

    with _quiet():
        return lm_evaluate(lm, parts, limit=limit, bootstrap_iters=100, log_samples=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's log lines: it warns about being given a model instead of a name, which is the point here."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


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
        known = all(isinstance(stderr, float) for stderr in stderrs)
        value, stderr = pool(values, stderrs if known else [0.0] * len(names), sizes)
        rows.append(
            {
                "metric": metric if filter_name == "none" else f"{metric},{filter_name}",
                "value": float(value),
                "stderr": float(stderr) if known else float("nan"),
                "n": sum(sizes),
                "num_fewshot": results["n-shot"].get(names[0], 0),
                "version": str(results["versions"].get(names[0])),
            }
        )
    return rows
