"""Perplexity of a model, or of many drop plans of it at once."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from torch import nn

from ..calibration import Calibration, TokenIds
from ..plan import DropPlan
from .sweep import Item, loglikelihoods


def text_items(calibration: Calibration | TokenIds) -> list[Item]:
    """Each sample without its padding, every token but the first to be scored. ValueError for less than two tokens."""
    if not isinstance(calibration, Calibration):
        calibration = Calibration(calibration)
    ids = calibration.input_ids
    mask = calibration.attention_mask
    samples = list(ids) if mask is None else [row[mask[k].bool()] for k, row in enumerate(ids)]
    if min(map(len, samples)) < 2:
        raise ValueError("perplexity needs at least two tokens in every sample; the shortest has one")
    return [Item(tuple(sample.tolist()), len(sample) - 1) for sample in samples]


def perplexity(model: nn.Module, calibration: Calibration | TokenIds, progress: bool = True) -> dict:
    """Token-level next-token perplexity of one model: see `perplexity_sweep`."""
    frame = perplexity_sweep(model, {"": DropPlan()}, calibration, progress)
    return frame.drop(columns="plan").to_dict("records")[0]


def perplexity_sweep(
    model: nn.Module,
    plans: Mapping[str, DropPlan],
    calibration: Calibration | TokenIds,
    progress: bool = True,
) -> pd.DataFrame:
    """Perplexity of many plans of one model on the samples of `calibration` (each token but a sample's first).

    Returns one row per plan: plan, perplexity = exp(log_perplexity), log_perplexity (mean negative log-likelihood per
    token, nats), stderr and log_stderr (of either, over samples; NaN for a single sample), n_tokens. Padding is left
    out. Raises ValueError without plans, for a plan of another depth, and for samples of fewer than two tokens.
    """
    items = text_items(calibration)
    sums, _ = loglikelihoods(model, list(plans.values()), items, progress=progress, label="perplexity")
    counts = np.array([item.n_scored for item in items])
    log_ppl = -sums.sum(1) / counts.sum()
    n = len(items)
    log_stderr = np.full(len(sums), np.nan)
    if n > 1:
        spread = -sums - log_ppl[:, None] * counts  # ratio estimator: samples may differ in length
        log_stderr = np.sqrt((spread**2).sum(1) * n / (n - 1)) / counts.sum()
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
