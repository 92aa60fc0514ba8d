"""Shortened LLaMA (Kim et al. 2024, arXiv 2402.02834): whole blocks, chosen in one shot, to compare Joint Drop with.

Two importances of a block, both on a few short samples (the authors: 10 of 128 tokens): the perplexity of the model
without it, and Taylor's, the first-order change of the loss summed over its weights, sum |W * dL/dW|. The least
important blocks go, all at once, but never the first four and the last two: the authors' code keeps those for both
criteria (in their paper the name is Taylor+). Their released models were then retrained with LoRA; here nothing is.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from .anatomy import anatomy
from .calibration import Calibration
from .fingerprint import model_key, provenance
from .hooks import batches
from .plan import DropPlan, drop_order
from .prune import dropped
from .results import Store, _name, _short
from .selection import Choice

KEPT = (4, 2)  # blocks at the beginning and at the end that never go


def by_perplexity(store: Store, model: nn.Module, calibration: Calibration) -> np.ndarray:
    """The log-perplexity without each block, [n_layers], stored one by one (all in half the passes, see `sweep`)."""
    plans = {str(i): DropPlan([i], [i]) for i in range(anatomy(model).n_layers)}
    return store.perplexity(model, plans, calibration)["log_perplexity"].to_numpy()


def by_taylor(store: Store, model: nn.Module, calibration: Calibration) -> np.ndarray:
    """`taylor`, stored."""
    key = model_key(model, 1, "shortened", "hooks", "anatomy") | {"calibration": calibration.digest}
    slug = f"{_name(model)}-block-taylor-{_short(calibration)}"
    value = store.get(
        "selector", key, lambda: taylor(model, calibration).tolist(), slug, lambda: provenance(model, calibration)
    )
    return np.array(value)


def taylor(model: nn.Module, calibration: Calibration) -> np.ndarray:
    """Sum of |W * dL/dW| over all weights of each block, norms included and biases not, [n_layers].

    L is the mean next-token loss of a sample; its derivatives are summed over the samples before the absolute value is
    taken, as in the authors' code. Takes a forward and a backward pass of one sample at a time and, besides the model,
    the memory of the gradients of all blocks. Raises ValueError for a model with dropped layers, or gradients that are
    not finite (float16 overflows: use bfloat16 or float32).
    """
    parts = anatomy(model)
    if parts.plan:
        raise ValueError(f"this model has {parts.plan.label} dropped already; choose blocks on the undropped model")
    weights = [[p for name, p in layer.named_parameters() if name.endswith("weight")] for layer in parts.layers]
    former = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    training = model.training
    model.eval()
    try:
        for parameter, _, _ in former:
            parameter.requires_grad_(False)
            parameter.grad = None
        for parameter in (p for block in weights for p in block):
            parameter.requires_grad_(True)
        for _, inputs in batches(calibration, 1, model.get_input_embeddings().weight.device):
            real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
            with torch.enable_grad():
                model(**inputs, labels=inputs["input_ids"].masked_fill(~real, -100), use_cache=False).loss.backward()
        sums = [sum(float((p.detach() * p.grad).float().abs().double().sum()) for p in block) for block in weights]
    finally:
        for parameter, requires, grad in former:
            parameter.requires_grad_(requires)
            parameter.grad = grad
        model.train(training)
    if not np.isfinite(sums).all():
        raise ValueError(f"the gradients are not finite in {model.dtype}; load the model in bfloat16 or float32")
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


def joint_plan(scores, enough: Callable[[DropPlan], bool]) -> DropPlan:
    """The shortest Joint Layer Drop, in `drop_order`'s order, that is enough: for a budget of parameters, or a speed.

    Raises ValueError where even dropping all sublayers but one is not.
    """
    choice = Choice(drop_order(scores, "joint"), tokens=0.0)
    for n in range(len(choice.order)):
        plan = choice.plan(n)
        if enough(plan):
            return plan
    raise ValueError(f"no Joint Layer Drop of up to {len(choice.order) - 1} sublayers is enough; ask for less")
