"""Ways to choose what to drop that run the model to find out: by its loss, or by gradients.

Those that need only scores (cosine, relative magnitude, reverse, random) are in `plan`.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations

import numpy as np
import torch
from torch import nn

from ..anatomy import find_anatomy, unwrapped
from ..calibration import Calibration, batches, read_by
from ..plan import DropPlan, plan_of
from ..proof import first_tensor, with_first
from ..prune import eval_mode, put
from ..scoring import score
from ..sublayers import NOT_FINITE, SublayerRun, head_logits, in_float64, run_layer
from .reconstruction import Changes, Sublayer, combined, put_changes

VERSION = 1  # of the choices: raised when they change
LOSSES = ("kl", "perplexity")
KINDS = {"attn": ("attn",), "mlp": ("mlp",), "joint": ("attn", "mlp")}  # of sublayers, by target


@dataclass
class Choice:
    """order: sublayers, first to go first. losses: what it was chosen by. tokens: what finding it cost.

    Cost is counted in tokens that went through the whole model: a pass through half of the layers counts half a token,
    a backward pass two.
    """

    order: list[Sublayer]
    tokens: float
    losses: dict[str, float] = field(default_factory=dict)

    def plan(self, n: int) -> DropPlan:
        """The plan of the first n."""
        return plan_of(self.order[:n])


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
    items = _sublayers(model, target)
    search = _Search(model, calibration, loss, batch_size, {}, every)
    found = search.losses_without([], items)
    losses = {f"{kind} {i}": value for (kind, i), value in found.items()}
    return Choice(sorted(found, key=found.get), search.tokens, losses)


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
    corrections: of `reconstruction.corrections`, each applied while its sublayer is gone. seconds: that one sublayer of
    each kind takes ({"attn": ..., "mlp": ...}); the added loss is then counted per second saved (latency-aware search).
    width: a step tries so many sublayers at a time (None: all), those first that added least when last tried, until the
    best of all has been tried beside what is gone by now. every: the loss is taken at each `every`-th token only, since
    the head of a large vocabulary costs as much as many layers.

    Raises ValueError for an unknown loss or target, n beyond what there is, activations of the whole model that are not
    finite, naming the layer, and a loss that is not finite.
    """
    items = _sublayers(model, target)
    if not 0 <= n <= len(items):
        raise ValueError(f"cannot choose n={n} of {len(items)} sublayers")
    search = _Search(model, calibration, loss, batch_size, corrections or {}, every)
    worth = seconds or dict.fromkeys(("attn", "mlp"), 1.0)
    order: list[Sublayer] = []
    base = search.loss([], search.run.start)
    losses = {"0": base}
    added: dict[Sublayer, float] = {}  # to the loss, by each that is left, when it was last tried
    ranked = items  # what is left, the best first
    while len(order) < n:
        fresh: set[Sublayer] = set()  # tried beside all that is gone by now
        while ranked[0] not in fresh:
            tried = [item for item in ranked if item not in fresh][: width if order else None]
            for item, value in search.losses_without(order, tried).items():
                added[item] = value - base
            fresh.update(tried)
            ranked = sorted(added, key=lambda item: added[item] / worth[item[0]])
        best = ranked.pop(0)
        base += added.pop(best)
        order.append(best)
        losses[str(len(order))] = base
    return Choice(order, search.tokens, losses)


def taylor(model: nn.Module, calibration: Calibration, target: str = "attn", batch_size: int = 2) -> Choice:
    """Least first-order change of the loss first: |dL/da| of a sublayer's output a f(x), at a = 1.

    (Shortened LLaMA sums |weight x gradient|; the sum over the last matrix, without the absolute value inside, is this
    derivative.) L is the mean next-token loss of a batch; padding does not count. Raises ValueError for an unknown
    target, and for a loss or gradients that are not finite.
    """
    model = unwrapped(model)
    calibration = read_by(model, calibration)
    parts = find_anatomy(model)
    items = _sublayers(model, target)
    device = model.get_input_embeddings().weight.device
    totals = dict.fromkeys(items, 0.0)
    scales = [torch.ones((), device=device, requires_grad=True) for _ in items]
    with frozen(model), ExitStack() as hooks:
        for (kind, i), scale in zip(items, scales, strict=True):
            for name in parts.sublayer(kind, i).writers:
                writer = parts.layers[i].get_submodule(name)
                hooks.callback(writer.register_forward_hook(partial(_scaled, scale)).remove)
        for _, inputs in batches(calibration, batch_size, device):
            with torch.enable_grad():
                loss = model(**inputs, labels=next_tokens(inputs), use_cache=False).loss
                if not loss.isfinite():
                    score(model, calibration, batch_size, progress=False)  # raises naming the layer, if it is one
                    raise ValueError(_not_finite("the loss of the whole model", model))
                gradients = torch.autograd.grad(loss, scales)
            for item, gradient in zip(items, gradients, strict=True):
                totals[item] += abs(float(gradient))
    if not all(map(math.isfinite, totals.values())):  # before the one at fault all are
        raise ValueError(_not_finite("the derivative of the loss", model))
    return Choice(sorted(totals, key=totals.get), 3.0 * calibration.n_tokens)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter takes gradients, and the model is in evaluation mode; both are restored, and gradients kept."""
    with ExitStack() as undo:
        undo.enter_context(eval_mode(model))
        for parameter in model.parameters():
            put(undo, parameter, "grad", None)
            put(undo, parameter, "requires_grad", False)
        yield


def _scaled(scale: torch.Tensor, module: nn.Module, args: tuple, out):
    """Forward hook: what the module gives, times `scale`."""
    first = first_tensor(out)
    return with_first(out, first * scale.to(first.device))


def next_tokens(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Labels [B, T] for the loss of transformers: the tokens, but -100 for padding and what is predicted from it."""
    labels = inputs["input_ids"].clone()
    mask = inputs.get("attention_mask")
    if mask is not None:
        labels[mask == 0] = -100
        labels[:, 1:][mask[:, :-1] == 0] = -100
    return labels


def agreement(orders: Iterable[Sequence[Sublayer]], n: int) -> float:
    """Mean share of the first n sublayers that two of the orders have in common; NaN for fewer than two orders."""
    sets = [set(order[:n]) for order in orders]
    shares = [len(a & b) / n for a, b in combinations(sets, 2)]
    return float(np.mean(shares)) if shares else float("nan")


def _sublayers(model: nn.Module, target: str) -> list[Sublayer]:
    if target not in KINDS:
        raise ValueError(f"target {target!r} is not one of {', '.join(KINDS)}")
    parts = find_anatomy(model)
    return [(kind, i) for kind in KINDS[target] for i in parts.live(kind)]


def _not_finite(what: str, model: nn.Module) -> str:
    return f"{what} is not finite in {model.dtype}. {NOT_FINITE}"


class _Search:
    """The model's loss without any set of sublayers; streams before the first difference are shared."""

    def __init__(self, model, calibration: Calibration, loss: str, batch_size: int, corrections: Mapping, every: int):
        if loss not in LOSSES:
            raise ValueError(f"loss {loss!r} is not one of {', '.join(LOSSES)}")
        if every < 1:
            raise ValueError(f"every={every}; the loss is taken at each 1st, 2nd, 3rd, ... token")
        self.model = model = unwrapped(model)
        calibration = read_by(model, calibration)
        self.parts = find_anatomy(model)
        self.corrections = corrections
        self.n_tokens = calibration.n_tokens
        self.tokens = 0.0  # that went through the whole model
        self.run = SublayerRun(model, self.parts, calibration, batch_size)
        self.taken: list[torch.Tensor] = []  # [B, T] per batch: where the loss is taken
        for mask in self.run.masks:
            taken = mask.bool() & ((mask.cumsum(1) - 1) % every == 0)
            if loss == "perplexity":  # nothing is known to follow the last token
                taken[:, -1] = False
                taken[:, :-1] &= mask[:, 1:].bool()
            self.taken.append(taken)
        self.n_taken = sum(int(taken.sum()) for taken in self.taken)
        if not self.n_taken:
            raise ValueError("every sample has one token only, which no next token follows; use longer samples")
        # next tokens [n] per batch; for "kl", the whole model's predictions [n, vocabulary]
        if loss == "perplexity":
            pairs = zip(calibration.input_ids.split(batch_size), self.taken, strict=True)
            self.targets = [ids.to(taken.device).roll(-1, 1)[taken] for ids, taken in pairs]
        else:
            self.targets = list(self._predictions(self._through(self.run.start, 0, [])))

    def losses_without(self, gone: list[Sublayer], items: Iterable[Sublayer]) -> dict[Sublayer, float]:
        """The loss without `gone` and, in turn, one more sublayer."""
        before: list[list[torch.Tensor]] = []  # streams before each layer
        self._through(self.run.start, 0, gone, before)
        losses = {}
        for item in items:
            changed = [i for _, i in self.corrections.get(item, ())]
            first = min([item[1], *changed])  # where the run first differs
            losses[item] = self.loss([*gone, item], before[first], first)
        return losses

    def loss(self, gone: list[Sublayer], streams: list[torch.Tensor], first: int = 0) -> float:
        """The loss without `gone`, from the streams before layer `first`, [B, T, C] per batch."""
        total = 0.0
        predictions = self._predictions(self._through(streams, first, gone))
        for predicted, target in zip(predictions, self.targets, strict=True):
            target = target.to(predicted.device)
            if target.ndim == 1:
                losses = -predicted.gather(-1, target[:, None])
            else:
                losses = (target.exp() * (target - predicted)).sum(-1)
            total += float(in_float64(losses).sum())
        if not math.isfinite(total):
            names = ", ".join(f"{kind} {i}" for kind, i in gone)
            what = f"the loss without {names}" if names else "the loss of the whole model"
            raise ValueError(_not_finite(what, self.model))
        return total / self.n_taken

    def _through(
        self, streams: list[torch.Tensor], first: int, gone: list[Sublayer], before: list | None = None
    ) -> list[torch.Tensor]:
        """The streams after the last layer, from those before layer `first`; before: collects those before each."""
        with ExitStack() as undo:
            undo.enter_context(eval_mode(self.model))
            put_changes(undo, self.model, combined(self.corrections, plan_of(gone)))
            for i in range(first, self.parts.n_layers):
                if before is not None:
                    before.append(streams)
                without = [kind for kind in ("attn", "mlp") if (kind, i) in gone]
                if self.parts.layers[i] is None or len(without) == 2:
                    continue
                pairs = zip(streams, self.run.calls, strict=True)
                streams = [run_layer(self.parts, i, x, calls[i], without) for x, calls in pairs]
                if not gone:  # else `loss` names what is
                    self.run.check_finite(streams, "block", i)
                self.tokens += self.n_tokens / self.parts.n_layers
        return streams

    def _predictions(self, final: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Log-probabilities [n, vocabulary], batch after batch, of the tokens where the loss is taken."""
        for x, taken in zip(final, self.taken, strict=True):
            yield head_logits(self.model, self.parts, x[taken.to(x.device)]).log_softmax(-1)
