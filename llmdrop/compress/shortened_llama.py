"""Shortened LLaMA (Kim et al. 2024, arXiv 2402.02834): whole blocks, chosen in one shot, to compare Joint Drop with.

Two importances of a block, both on a few short samples (the authors: 10 of 128 tokens): the perplexity of the model
without it, and Taylor's, the first-order change of the loss summed over its weights, sum |W * dL/dW|. The least
important blocks go, all at once, but never the first four and the last two: the authors' code keeps those for both
criteria (in their paper the name is Taylor+). Their released models were then retrained with LoRA; here nothing is.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import numpy as np
import torch
from torch import nn

from ..anatomy import find_anatomy
from ..calibration import Calibration, batches
from ..plan import DropPlan, drop_order
from ..prune import dropped, put
from ..scoring import ImportanceScores
from .search import Choice, next_tokens

VERSION = 1  # of the importances: raised when their numbers change
KEPT = (4, 2)  # blocks at the beginning and at the end that never go


def block_taylor(model: nn.Module, calibration: Calibration) -> np.ndarray:
    """Sum of |W * dL/dW| over all weights of each block, norms included and biases not, [n_layers].

    L is the mean next-token loss of a sample, padding left out; its derivatives are summed over the samples before the
    absolute value is taken, as in the authors' code. Takes a forward and a backward pass of one sample at a time and,
    besides the model, the memory of the gradients of all blocks. Raises ValueError for a model with dropped layers, or
    gradients that are not finite (float16 overflows: use bfloat16 or float32).
    """
    parts = find_anatomy(model)
    if parts.plan:
        raise ValueError(f"this model has {parts.plan.label} dropped already; choose blocks on the undropped model")
    weights = [[p for name, p in layer.named_parameters() if name.endswith("weight")] for layer in parts.layers]
    with ExitStack() as undo:
        undo.callback(model.train, model.training)
        model.eval()
        for parameter in model.parameters():
            put(undo, parameter, "grad", None)
            put(undo, parameter, "requires_grad", False)
        for of_block in weights:
            for parameter in of_block:
                parameter.requires_grad_(True)
        for _, inputs in batches(calibration, 1, model.get_input_embeddings().weight.device):
            with torch.enable_grad():
                model(**inputs, labels=next_tokens(inputs), use_cache=False).loss.backward()
        sums = [sum(_taylor_sum(parameter) for parameter in of_block) for of_block in weights]
    if not np.isfinite(sums).all():
        raise ValueError(f"the gradients are not finite in {model.dtype}; load the model in bfloat16 or float32")
    return np.array(sums)


def _taylor_sum(parameter: nn.Parameter) -> float:
    return float((parameter.detach() * parameter.grad).float().abs().double().sum())


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
    choice = Choice(drop_order(scores, "joint"), tokens=0.0)
    for n in range(len(choice.order)):
        plan = choice.plan(n)
        if enough(plan):
            return plan
    raise ValueError(f"no Joint Layer Drop of up to {len(choice.order) - 1} sublayers is enough; ask for less")
