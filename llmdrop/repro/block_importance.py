"""Importance of whole blocks as Shortened LLaMA takes it, by perplexity or by gradients, stored (Table 8)."""

import numpy as np
from torch import nn

from ..anatomy import find_anatomy
from ..calibration import Calibration
from ..compress import shortened_llama
from ..compress.variant import Variant
from ..plan import DropPlan
from .provenance import model_key, model_name, provenance, text_name
from .quality import quality
from .store import Store


def by_perplexity(model: nn.Module, calibration: Calibration, store: Store | None = None) -> np.ndarray:
    """The loss in nats per token without each block of an undropped model, [n_layers].

    Stored block by block, and measured in one sweep, which takes about half as long as a pass for each.
    """
    variants = {str(i): Variant(DropPlan([i], [i])) for i in range(find_anatomy(model).n_layers)}
    rows = quality(model, None, variants, {"blocks": calibration}, store=store)
    rows["nats"] = rows["value"] * rows["n"]
    sums = rows.groupby("variant", sort=False)[["nats", "n"]].sum()
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
