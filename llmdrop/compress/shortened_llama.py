"""Shortened LLaMA (Kim et al. 2024, arXiv 2402.02834): whole blocks, chosen in one shot, to compare Joint Drop with.

The blocks go by the perplexity of the model without each, or by Taylor's importance, both on a few short samples (the
authors: 10 of 128 tokens). Their released models were then retrained with LoRA; here nothing is.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from ..anatomy import find_anatomy, unwrapped
from ..calibration import Calibration, batches, read_by
from ..plan import DropPlan, drop_order, plan_of
from ..prune import dropped
from ..scoring import ImportanceScores, score
from ..sublayers import NOT_FINITE, in_float64
from .search import frozen, next_tokens

VERSION = 1  # of the importances: raised when their numbers change
KEPT = (4, 2)  # blocks at the beginning and at the end that never go (in the paper: Taylor+)


def block_taylor(model: nn.Module, calibration: Calibration) -> np.ndarray:
    """Sum of |W * dL/dW| over all weights of each block, norms included and biases not, [n_layers].

    L is the mean next-token loss of a sample; its derivatives are summed over the samples before the absolute value is
    taken, as in the authors' code. Takes, besides the model, the memory of the gradients of all blocks. Raises
    ValueError for a model with dropped layers, or gradients that are not finite.
    """
    model = unwrapped(model, with_adapters=False)
    calibration = read_by(model, calibration)
    parts = find_anatomy(model)
    if parts.plan:
        raise ValueError(f"this model has {parts.plan.label} dropped already; choose blocks on the undropped model")
    weights = [[p for name, p in layer.named_parameters() if name.endswith("weight")] for layer in parts.layers]
    with frozen(model):
        for of_block in weights:
            for parameter in of_block:
                parameter.requires_grad_(True)
        for _, inputs in batches(calibration, 1, model.get_input_embeddings().weight.device):
            with torch.enable_grad():
                model(**inputs, labels=next_tokens(inputs), use_cache=False).loss.backward()
        sums = [sum(float(in_float64((p.detach() * p.grad).float().abs()).sum()) for p in block) for block in weights]
    if not np.isfinite(sums).all():
        score(model, calibration, progress=False)  # raises naming the layer, if it is one
        raise ValueError(f"the gradients are not finite in {model.dtype}. {NOT_FINITE}")
    return np.array(sums)


def block_plan(importance: Sequence[float], n: int, kept: tuple[int, int] = KEPT) -> DropPlan:
    """The plan without the n blocks of lowest importance; kept: so many first and last blocks never go.

    Raises ValueError for more blocks than may go.
    """
    n_layers = len(importance)
    free = range(kept[0], n_layers - kept[1])
    if not 0 <= n <= len(free):
        raise ValueError(f"cannot drop {n} of {n_layers} blocks and keep the first {kept[0]} and the last {kept[1]}")
    chosen = sorted(free, key=lambda i: importance[i])[:n]
    return DropPlan(chosen, chosen, n_layers)


def removed(model: nn.Module, plan: DropPlan) -> int:
    """How many parameters the plan removes."""
    whole = sum(p.numel() for p in model.parameters())
    with dropped(model, plan):
        return whole - sum(p.numel() for p in model.parameters())


def joint_plan(scores: ImportanceScores, enough: Callable[[DropPlan], bool]) -> DropPlan:
    """The shortest Joint Layer Drop, in `drop_order`'s order, that is enough: for a budget of parameters, or a speed.

    Raises ValueError where even dropping all sublayers but one is not.
    """
    order = drop_order(scores, "joint")
    for n in range(len(order)):
        plan = plan_of(order[:n])
        if enough(plan):
            return plan
    raise ValueError(f"no Joint Layer Drop of up to {len(order) - 1} sublayers is enough; ask for less")
