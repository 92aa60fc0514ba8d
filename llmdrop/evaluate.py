"""Quality of dropped models: lm-eval benchmarks and perplexity, many plans at a time."""

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from lm_eval import evaluate as lm_evaluate
from lm_eval.models.huggingface import HFLM

from .calibration import Calibration
from .plan import DropPlan
from .prune import dropped
from .sweep import Item, loglikelihoods
from .tasks import load_tasks, pool


class SweepLM(HFLM):
    """An lm-eval model that answers log-likelihood requests for a whole sweep of drop plans at once.

    Tokenisation, truncation and metrics are lm-eval's. Requests that repeat are answered once. `current` names the
    plan whose answers are given; text generation runs on the model as it stands.
    """

    def __init__(self, model, tokenizer, plans: Mapping[str, DropPlan], batch_size: int = 8, progress: bool = True):
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        self.plans, self.current, self.progress = dict(plans), next(iter(plans)), progress
        self.answers: dict[tuple, list[tuple[float, bool]]] = {}  # (tokens, number scored) -> one answer per plan

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs) -> list[tuple[float, bool]]:
        keys = []
        for _, context, continuation in requests:
            tokens = tuple((context + continuation)[-(self.max_length + 1) :])  # too long: cut from the left
            keys.append((tokens, len(continuation)))
        missing = [key for key in dict.fromkeys(keys) if key not in self.answers]
        if missing:
            items = [Item(*key) for key in missing]
            sums, greedy = loglikelihoods(self.model, list(self.plans.values()), items, progress=self.progress)
            for k, key in enumerate(missing):
                self.answers[key] = list(zip(sums[:, k].tolist(), greedy[:, k].tolist(), strict=True))
        place = list(self.plans).index(self.current)
        return [self.answers[key][place] for key in keys]


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
    rows = []
    for name, parts in load_tasks(tasks, data_dir, num_fewshot).items():
        lm = SweepLM(model, tokenizer, plans, batch_size, progress and f"{name}")
        for plan_name, plan in plans.items():
            lm.current = plan_name
            generates = any(task.OUTPUT_TYPE == "generate_until" for task in parts.values())
            if generates:
                with dropped(model, plan):
                    results = _run(lm, parts, limit)
            else:
                results = _run(lm, parts, limit)
            rows += [{"plan": plan_name, "task": name} | row for row in _rows(results, parts)]
    return pd.DataFrame(rows)


def _run(lm: SweepLM, parts: dict, limit: int | None) -> dict:
    """lm_eval.evaluate without its log lines; standard errors by formula or 100 bootstrap rounds."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return lm_evaluate(lm, parts, limit=limit, bootstrap_iters=100, log_samples=False)
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


def perplexity(model, calibration: Calibration, progress: bool = True) -> dict:
    """Token-level next-token perplexity of one model: see `perplexity_sweep`."""
    frame = perplexity_sweep(model, {"": DropPlan()}, calibration, progress)
    return frame.drop(columns="plan").iloc[0].to_dict()


def perplexity_sweep(
    model, plans: Mapping[str, DropPlan], calibration: Calibration, progress: bool = True
) -> pd.DataFrame:
    """Perplexity of many plans of one model on the samples of `calibration` (each token but a sample's first).

    Returns one row per plan: plan, perplexity = exp(log_perplexity), log_perplexity (mean negative log-likelihood per
    token, nats), stderr and log_stderr (of either, over samples; NaN for a single sample), n_tokens. Padding is left
    out. Raises ValueError for samples of fewer than two tokens.
    """
    ids, mask = calibration.input_ids, calibration.attention_mask
    samples = [row if mask is None else row[mask[k].bool()] for k, row in enumerate(ids)]
    if min(map(len, samples)) < 2:
        raise ValueError("perplexity needs at least two tokens in every sample; the shortest has one")
    items = [Item(tuple(sample.tolist()), len(sample) - 1) for sample in samples]
    sums, _ = loglikelihoods(model, list(plans.values()), items, progress=progress and "perplexity")
    counts = np.array([item.n_scored for item in items])
    log_ppl = -sums.sum(1) / counts.sum()
    n = len(items)
    spread = -sums - log_ppl[:, None] * counts  # ratio estimator: samples may differ in length
    log_stderr = np.sqrt((spread**2).sum(1) * n / max(n - 1, 1)) / counts.sum() if n > 1 else np.full(len(sums), np.nan)
    return pd.DataFrame(
        {
            "plan": list(plans),
            "perplexity": np.exp(log_ppl),
            "stderr": np.exp(log_ppl) * log_stderr,
            "log_perplexity": log_ppl,
            "log_stderr": log_stderr,
            "n_tokens": int(counts.sum()),
        }
    )
