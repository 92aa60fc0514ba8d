"""Ways to choose what to drop that run the model to find out: by its loss, by gradients, one by one or all at once.

Those that need only scores (cosine, relative magnitude, reverse, random) are in `plan`. Each function here gives an
order of sublayers, ("attn" | "mlp", layer) pairs, first to go first, and what finding it cost, in tokens that went
through the whole model (a pass through half of the layers counts half a token; a backward pass counts two).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from .anatomy import anatomy
from .calibration import Calibration
from .compensate import Changes, _put, _Walk
from .plan import DropPlan
from .prune import stub_sublayer
from .sweep import head_logits, run_layer

LOSSES = ("kl", "perplexity")
Sublayer = tuple[str, int]


@dataclass
class Choice:
    """order: sublayers, first to go first. losses: what the order was chosen by. tokens: what it cost."""

    order: list[Sublayer]
    tokens: float
    losses: dict[str, float] = field(default_factory=dict)

    def plan(self, n: int) -> DropPlan:
        """The plan of the first n."""
        chosen = self.order[:n]
        return DropPlan(*([i for kind, i in chosen if kind == wanted] for wanted in ("attn", "mlp")))


@torch.no_grad()
def one_shot(
    model: nn.Module,
    calibration: Calibration,
    target: str = "attn",
    loss: str = "kl",
    every: int = 1,
    batch_size: int = 8,
) -> Choice:
    """Lowest loss first, each sublayer dropped alone. target: "attn", "mlp" or "joint"; loss, every: see `greedy`."""
    search = _Search(model, calibration, loss, batch_size, {}, every)
    found = search.without((), _sublayers(model, target))
    return Choice(sorted(found, key=found.get), search.tokens, {f"{kind} {i}": v for (kind, i), v in found.items()})


@torch.no_grad()
def greedy(
    model: nn.Module,
    calibration: Calibration,
    target: str = "attn",
    n: int = 8,
    loss: str = "kl",
    corrections: Mapping[Sublayer, Changes] | None = None,
    seconds: Mapping[str, float] | None = None,
    width: int | None = 6,
    every: int = 1,
    batch_size: int = 8,
) -> Choice:
    """Drop one sublayer at a time, always the one whose loss is lowest beside those gone before.

    loss: "perplexity", the next-token loss (as SLEB and BlockPruner choose), or "kl", the divergence of the
    predictions from the undropped model's (as FinerCut), which needs far fewer tokens for the same certainty.
    corrections: what each sublayer's own compensation would be (`compensate.corrections`), applied while it is gone, so
    that what compensation can make up for goes first. seconds: time that one sublayer of each kind takes
    ({"attn": ..., "mlp": ...}); the added loss is then counted per second saved. width: a step tries so many
    sublayers at a time, those first that added least when last tried, until the best of all has been tried beside what
    is gone by now (None: all at once). every: the loss is taken at each `every`-th token
    only, since the head of a large vocabulary costs as much as many layers. Streams before the first difference are
    shared.

    Raises ValueError for an unknown loss or target, or n beyond what there is.
    """
    left = _sublayers(model, target)
    if not 0 <= n <= len(left):
        raise ValueError(f"cannot choose n={n} of {len(left)} sublayers")
    search = _Search(model, calibration, loss, batch_size, corrections or {}, every)
    worth = {item: (seconds or {}).get(item[0], 1.0) for item in left}
    order: list[Sublayer] = []
    base = search.loss(())
    added = {item: value - base for item, value in search.without((), left).items()}
    losses = {"0": base}
    fresh = set(left)  # tried beside all that is gone by now
    while len(order) < n:
        while (ranked := sorted(added, key=lambda item: added[item] / worth[item]))[0] not in fresh:
            tried = [item for item in ranked if item not in fresh][:width]
            found = search.without(tuple(order), tried)
            added |= {item: value - base for item, value in found.items()}
            fresh |= set(found)
        base += added.pop(ranked[0])
        order.append(ranked[0])
        losses[str(len(order))] = base
        fresh.clear()
    return Choice(order, search.tokens, losses)


def taylor(model: nn.Module, calibration: Calibration, target: str = "attn", batch_size: int = 2) -> Choice:
    """Least first-order change of the loss first: |dL/da| of a sublayer's output a f(x), at a = 1 (Shortened LLaMA
    sums |weight x gradient|; the sum over the last matrix, without the absolute value inside, is this derivative)."""
    parts, total = anatomy(model), {}
    items = _sublayers(model, target)
    requires = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        for ids in calibration.input_ids.split(batch_size):
            scales, handles = {}, []
            ids = ids.to(model.get_input_embeddings().weight.device)
            for kind, i in items:
                last = parts.layers[i].get_submodule(getattr(parts.layout, kind)[-1])
                scales[kind, i] = scale = torch.ones((), device=ids.device, requires_grad=True)

                def scaled(module, args, out, scale=scale):
                    return (out[0] * scale, *out[1:]) if isinstance(out, tuple) else out * scale

                handles.append(last.register_forward_hook(scaled))
            try:
                with torch.enable_grad():
                    loss = model(ids, labels=ids, use_cache=False).loss
                    grads = torch.autograd.grad(loss, list(scales.values()))
            finally:
                for handle in handles:
                    handle.remove()
            for item, grad in zip(scales, grads, strict=True):
                total[item] = total.get(item, 0.0) + abs(float(grad))
    finally:
        for parameter, value in zip(model.parameters(), requires, strict=True):
            parameter.requires_grad_(value)
    return Choice(sorted(total, key=total.get), 3.0 * calibration.n_tokens)


def _sublayers(model, target: str) -> list[Sublayer]:
    kinds = {"attn": ("attn",), "mlp": ("mlp",), "joint": ("attn", "mlp")}
    if target not in kinds:
        raise ValueError(f"target {target!r} is not one of {', '.join(kinds)}")
    parts = anatomy(model)
    return [(kind, i) for kind in kinds[target] for i in parts.live(kind)]


class _Search:
    """The model's loss without any set of sublayers; a run starts where it first differs from the last kept one."""

    def __init__(self, model, calibration: Calibration, loss: str, batch_size: int, corrections: Mapping, every: int):
        if loss not in LOSSES:
            raise ValueError(f"loss {loss!r} is not one of {', '.join(LOSSES)}")
        self.model, self.parts, self.kind, self.corrections = model, anatomy(model), loss, corrections
        self.walk, self.tokens = _Walk(model, self.parts, calibration, batch_size), 0.0
        self.n, self.every = calibration.n_tokens, every
        device = model.get_input_embeddings().weight.device
        self.ids = [ids.to(device) for ids in calibration.input_ids.split(batch_size)]
        self.dense: list[torch.Tensor] | None = None
        if loss == "kl":
            final = self._run(self.walk.start, 0, ())[0]
            self.dense = [self._predictions(x) for x in final]

    def loss(self, gone: Iterable[Sublayer]) -> float:
        return self._loss(self._run(self.walk.start, 0, tuple(gone))[0])

    def without(self, gone: tuple, each: Iterable[Sublayer]) -> dict[Sublayer, float]:
        """The loss without `gone` and, in turn, one more sublayer."""
        _, streams = self._run(self.walk.start, 0, gone, keep=True)
        found = {}
        for item in each:
            first = min([item[1], *(i for _, i in self.corrections.get(item, ()))])  # where the run first differs
            found[item] = self._loss(self._run(streams[first], first, (*gone, item))[0])
        return found

    def _run(self, x: list, first: int, gone: tuple, keep: bool = False) -> tuple[list, list]:
        """Residual streams after the last layer, and, if wanted, before each layer; x: those before layer `first`."""
        layers, layout, streams, undo = self.parts.layers, self.parts.layout, [], []
        for kind, i in gone:
            undo += stub_sublayer(layers[i], layout, kind)
        changed = {}
        for item in gone:
            changed |= {at: c for at, c in self.corrections.get(item, {}).items() if at not in gone}
        undo += _put(self.model, changed)
        try:
            for i in range(first, len(layers)):
                if keep:
                    streams.append(x)
                if ("attn", i) in gone and ("mlp", i) in gone:
                    continue
                x = [run_layer(self.parts, i, batch, call[i]) for batch, call in zip(x, self.walk.calls, strict=True)]
                self.tokens += self.n / len(layers)
        finally:
            for owner, name, value in reversed(undo):
                setattr(owner, name, value)
        return x, streams

    def _predictions(self, x: torch.Tensor) -> torch.Tensor:
        last = None if self.kind == "kl" else -1  # nothing is known to follow the last token
        return head_logits(self.model, self.parts, x[:, : last : self.every]).log_softmax(-1)

    def _loss(self, final: list) -> float:
        total, count = 0.0, 0.0
        for k, (x, ids, real) in enumerate(zip(final, self.ids, self.walk.weights, strict=True)):
            predicted = self._predictions(x)
            if self.dense is not None:
                each, weight = (self.dense[k].exp() * (self.dense[k] - predicted)).sum(-1), real[:, :: self.every]
            else:
                each = -predicted.gather(-1, ids[:, 1 :: self.every, None])[..., 0]
                weight = (real[:, 1:] * real[:, :-1])[:, :: self.every]
            total, count = total + float((each * weight).double().sum()), count + float(weight.sum())
        return total / count


def agreement(orders: Iterable[list[Sublayer]], n: int) -> float:
    """Mean share of the first n sublayers that two of the orders have in common."""
    sets = [set(order[:n]) for order in orders]
    pairs = [(a, b) for k, a in enumerate(sets) for b in sets[k + 1 :]]
    return float(np.mean([len(a & b) / n for a, b in pairs])) if pairs else float("nan")
