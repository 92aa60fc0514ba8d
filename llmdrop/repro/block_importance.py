"""Table 8: blocks as Shortened LLaMA ranks them, by perplexity or by gradients, stored; and what compares with them."""

import numpy as np
from torch import nn

from ..anatomy import find_anatomy
from ..calibration import Calibration
from ..compress import shortened_llama
from ..compress.shortened_llama import joint_plan, removed
from ..compress.variant import Variant
from ..plan import DropPlan
from ..scoring import ImportanceScores
from ..speed.roofline import predict_speed
from .provenance import model_key, model_name, provenance, text_name
from .quality import quality
from .store import Store


def by_perplexity(model: nn.Module, calibration: Calibration, store: Store | None = None) -> np.ndarray:
    """The loss in nats per token without each block of an undropped model, [n_layers].

    Stored block by block, and measured in one sweep, which takes about half as long as a pass for each.
    """
    variants = {str(i): Variant(DropPlan([i], [i])) for i in range(find_anatomy(model).n_layers)}
    rows = quality(model, None, variants, {"blocks": calibration}, store=store)
    sums = rows.assign(nats=rows["value"] * rows["n"]).groupby("variant", sort=False)[["nats", "n"]].sum()
    return (sums["nats"] / sums["n"]).to_numpy()


def by_taylor(model: nn.Module, calibration: Calibration, store: Store | None = None) -> np.ndarray:
    """`llmdrop.compress.shortened_llama.block_taylor`, [n_layers], stored."""
    value = (store or Store()).get(
        "block-taylor",
        model_key(model, 1) | {"version": shortened_llama.VERSION, "text": calibration.digest},
        lambda: shortened_llama.block_taylor(model, calibration).tolist(),
        f"{model_name(model)}-{text_name(calibration)}",
        lambda: provenance(model, calibration),
    )
    return np.array(value)


def joint_as_small(model: nn.Module, scores: ImportanceScores, blocks: DropPlan) -> DropPlan:
    """The shortest Joint Layer Drop that removes at least as many parameters of `model` as this plan of blocks."""
    budget = removed(model, blocks)
    return joint_plan(scores, lambda plan: removed(model, plan) >= budget)


def joint_as_fast(model: nn.Module, scores: ImportanceScores, blocks: DropPlan, **settings) -> DropPlan:
    """The shortest Joint Layer Drop that is as fast as this plan of blocks, by `predict_speed` with these settings."""
    limit = predict_speed(model, blocks, **settings).seconds
    return joint_plan(scores, lambda plan: predict_speed(model, plan, **settings).seconds <= limit)
