"""Least-squares (ridge) reconstruction of what dropped sublayers would have added: closed form, no training.

A dropped sublayer leaves a gap in what is written to the residual stream; the matrix that ends the live sublayer just
before it is changed to write what is missing. Shapes stay, and with them speed and formats; only "mean" adds biases.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..anatomy import Anatomy, find_anatomy, output_matrix, output_name, unwrapped
from ..calibration import Calibration
from ..checkpoints.digest import weights_digest
from ..plan import DropPlan
from ..prune import apply_plan, dropped, give_biases, put
from ..sublayers import SublayerRun, in_float64

VERSION = 1  # of the fits: raised when their numbers change
METHODS = ("mean", "least squares", "sequential least squares")
ALONE = ("mean", "least squares")  # fit every gap by itself, in the undropped model
STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0)  # of the ridge, in units of the mean of h_t^2
HELD_OUT = 4  # every fourth sample chooses the strength

Sublayer = tuple[str, int]  # ("attn" | "mlp", layer of the undropped model)


@dataclass(frozen=True, eq=False)
class Change:
    """What is added to a sublayer's last matrix: to its weight, [C, H], and to its bias, [C]; None: nothing."""

    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None


Changes = dict[Sublayer, Change]


@dataclass(frozen=True)
class Reconstruction:
    """What makes up for dropped sublayers: a method, one of METHODS, and the text that it is fitted on.

    Text of several kinds carries over best to text of another.
    """

    calibration: Calibration
    method: str = "least squares"
    batch_size: int = 8
    # by model: what its passes found, by weights and kinds; and its last fit, after weights and plan
    _passes: WeakKeyDictionary = field(default_factory=WeakKeyDictionary, init=False, repr=False, compare=False)
    _last: WeakKeyDictionary = field(default_factory=WeakKeyDictionary, init=False, repr=False, compare=False)

    def __post_init__(self):
        _check_method(self.method)

    @property
    def label(self) -> str:
        return self.method

    @property
    def key(self) -> dict:
        """What tells it from others, as plain JSON."""
        return {"method": self.method, "text": self.calibration.digest, "version": VERSION}

    def changes(self, model: nn.Module, plan: DropPlan) -> Changes:
        """What to change in `model` (undropped, without windows) where the plan's sublayers go.

        One pass over the text serves all plans of attention layers, but for "sequential least squares"; of other fits
        the last is remembered. Raises what `fit` raises.
        """
        _undropped(model, plan)
        if self.method in ALONE and not plan.mlp:
            return combined(self.corrections(model), plan)
        fitted_for = weights_digest(model), plan
        if model not in self._last or self._last[model][0] != fitted_for:
            changes = fit(model, plan, self.calibration, self.method, self.batch_size)
            self._last[model] = fitted_for, changes
        return self._last[model][1]

    def corrections(self, model: nn.Module, kinds: Sequence[str] = ("attn",)) -> dict[Sublayer, Changes]:
        """`corrections` of these kinds of sublayers, at least, remembered for as long as the model and its weights."""
        passes = self._passes.setdefault(model, {})
        digest = weights_digest(model)
        for (of_weights, of_kinds), found in passes.items():
            if of_weights == digest and of_kinds >= set(kinds):
                return found
        found = corrections(model, self.calibration, kinds, self.method, self.batch_size)
        passes[digest, frozenset(kinds)] = found
        return found


# ---- changing a model


def reconstruct(model: nn.Module, plan: DropPlan, changes: Changes) -> nn.Module:
    """`apply_plan`, with the changes that `fit` gave for the same model and plan, in place; returns the model.

    Biases that the architecture does not have are recorded with the plan. Raises ValueError for changes of
    another plan or model, weights packed in 4 bits, and what `apply_plan` refuses; the model is unchanged then.
    """
    _check_changes(model, plan, changes)
    with ExitStack() as undo:
        put_changes(undo, model, changes)
        apply_plan(model, plan)
        undo.pop_all()  # nothing is undone
    return model


@contextmanager
def reconstructed(model: nn.Module, plan: DropPlan, changes: Changes) -> Iterator[nn.Module]:
    """`reconstruct` for the length of a `with` block; everything is restored afterwards, on every path."""
    _check_changes(model, plan, changes)
    with ExitStack() as undo:
        put_changes(undo, model, changes)
        undo.enter_context(dropped(model, plan))
        yield model


def put_changes(undo: ExitStack, model: nn.Module, changes: Changes) -> None:
    """Make the changes, whatever is dropped; `undo` takes them back."""
    model = unwrapped(model)
    parts = find_anatomy(model)
    with_bias = [(kind, i) for (kind, i), change in changes.items() if change.bias is not None]
    places = [(i, output_name(parts, i, kind)) for kind, i in with_bias if output_matrix(parts, i, kind).bias is None]
    give_biases(undo, model, places)
    for (kind, i), change in changes.items():
        matrix = output_matrix(parts, i, kind)
        for name in ("bias", "weight"):
            added = getattr(change, name)
            if added is None:
                continue
            parameter = getattr(matrix, name)
            added = added.T if name == "weight" and isinstance(matrix, Conv1D) else added
            put(undo, parameter, "data", (parameter.data.float() + added.to(parameter.device)).to(parameter.dtype))


def put_weights(undo: ExitStack, model: nn.Module, other: nn.Module) -> None:
    """Give `model` the weights of `other`, a model of the same parameters; `undo` gives it its own back."""
    weights = dict(other.named_parameters())
    for name, parameter in unwrapped(model).named_parameters():
        put(undo, parameter, "data", weights[name].data)


def _check_changes(model: nn.Module, plan: DropPlan, changes: Changes) -> None:
    """ValueError unless each change is of a matrix right before a gap of the plan, and of its shape."""
    model = unwrapped(model, with_adapters=False)
    parts = find_anatomy(model)
    gone = _dropped(parts.whole_plan(plan))
    before_gaps = [live for live, after in pairwise(_sublayers(parts)) if live not in gone and after in gone]
    stray = [f"{kind} {i}" for kind, i in changes if (kind, i) not in before_gaps]
    if stray:
        allowed = ", ".join(f"{kind} {i}" for kind, i in before_gaps) or "nothing"
        raise ValueError(
            f"these changes are of another plan or model: they change {', '.join(stray)}, and before the gaps of "
            f"{plan.label} stands {allowed}; fit changes for this model and plan"
        )
    for (kind, i), change in changes.items():
        matrix = output_matrix(parts, i, kind)
        if change.weight is not None and not matrix.weight.is_floating_point():
            raise ValueError(
                f"the matrix of {kind} {i} is packed ({matrix.weight.dtype}), and nothing can be added to it; "
                "reconstruct first and quantize afterwards, or use the method 'mean'"
            )
        weight = matrix.weight.T if isinstance(matrix, Conv1D) else matrix.weight
        expected = {"weight": tuple(weight.shape), "bias": (model.config.hidden_size,)}
        for name, shape in expected.items():
            value = getattr(change, name)
            if value is not None and value.shape != shape:
                raise ValueError(
                    f"these changes are of another model: that of {kind} {i}'s {name} is {tuple(value.shape)}, "
                    f"and {shape} fits; fit changes for this model and plan"
                )


def _sublayers(parts: Anatomy) -> list[Sublayer]:
    """All, as they run."""
    return [(kind, i) for i in range(parts.n_layers) for kind in ("attn", "mlp")]


def _dropped(plan: DropPlan) -> list[Sublayer]:
    return [(kind, i) for kind in ("attn", "mlp") for i in getattr(plan, kind)]


# ---- fitting


@torch.no_grad()
def fit(
    model: nn.Module, plan: DropPlan, calibration: Calibration, method: str = "least squares", batch_size: int = 8
) -> Changes:
    """What `method` changes in `model`, which is undropped and stays as it is, without the plan's sublayers.

    "least squares" adds to the matrix before a gap, h -> W h, the ridge regression D [C, H] of what is missing:

        D = argmin  sum_t w_t || D h_t - f_t ||^2 + ridge ||D||^2        w_t = 1 / ||r_t||^2

    over calibration tokens t; f_t: what the gap's sublayers add in the undropped model; r_t: its stream after them. The
    ridge is chosen per row of D on every fourth sample, which the regression does not see; where none helps there, the
    row of W stays. "sequential least squares": each gap in the model with the gaps above it dropped and reconstructed.
    "mean" adds sum_t w_t f_t / sum_t w_t to the matrix's bias; one that has none is given one.

    Takes one forward pass (sequential: two), and the memory of the residual streams of all of the calibration text.
    Raises ValueError for an unknown method, layers dropped already, a plan that does not fit, an architecture whose
    sublayers do not end in a matrix, activations that are not finite, naming the layer, or (least squares) fewer than
    four samples.
    """
    _check_method(method)
    parts = _undropped(model, plan)
    gone = _dropped(plan)
    order = _sublayers(parts)
    while order and order[-1] not in gone:  # what comes after the last gap need not run
        order.pop()
    run = SublayerRun(model, parts, calibration, batch_size)
    whole = run.start  # streams of the undropped model
    rest = run.start  # of the model without the gaps above, the same up to the first
    live: Sublayer | None = None  # the last one that stays, and what its matrix reads
    read: list[torch.Tensor] | None = None
    changes: Changes = {}
    for sublayer, following in pairwise([*order, None]):
        if sublayer not in gone:
            live = sublayer
            read = [] if following in gone and method != "mean" else None
            shared = rest is whole
            rest = run.through(rest, *live, read)
            whole = rest if shared else run.through(whole, *live)
            continue
        whole = run.through(whole, *sublayer)
        if following in gone:
            continue
        change = None if live is None else _regress(method, read, rest, whole, run.masks)
        if change is not None:
            changes[live] = change
        if method in ALONE:
            rest = whole
        elif change is not None:
            rest = [y + (h @ change.weight.T.to(h)).to(y) for y, h in zip(rest, read, strict=True)]
    return changes


@torch.no_grad()
def corrections(
    model: nn.Module,
    calibration: Calibration,
    kinds: Sequence[str] = ("attn",),
    method: str = "least squares",
    batch_size: int = 8,
) -> dict[Sublayer, Changes]:
    """For each sublayer of these kinds, what `method` would change for it alone.

    From one pass over the undropped model, whatever is dropped later: for a plan of attention layers alone (or of MLPs
    alone), `combined` of these is what `fit` gives. Layer 0's attention has nothing before it to change. Raises
    ValueError for "sequential least squares", which does not fit sublayers by themselves, and what `fit` raises.
    """
    if method not in ALONE:
        raise ValueError(f"{method!r} does not fit sublayers by themselves; those that do: {', '.join(ALONE)}")
    parts = _undropped(model)
    run = SublayerRun(model, parts, calibration, batch_size)
    found: dict[Sublayer, Changes] = {}
    streams = run.start
    read_before: list[torch.Tensor] | None = None
    for before, sublayer in pairwise([None, *_sublayers(parts)]):
        read: list[torch.Tensor] | None = None if method == "mean" else []
        after = run.through(streams, *sublayer, read)
        if before is not None and sublayer[0] in kinds:
            change = _regress(method, read_before, streams, after, run.masks)
            if change is not None:
                found[sublayer] = {before: change}
        streams = after
        read_before = read
    return found


def combined(found: dict[Sublayer, Changes], plan: DropPlan) -> Changes:
    """Of `corrections`, those of the plan's sublayers, but for matrices that are dropped themselves."""
    gone = _dropped(plan)
    changes: Changes = {}
    for sublayer in gone:
        changes |= found.get(sublayer, {})
    return {place: change for place, change in changes.items() if place not in gone}


def _check_method(method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")


def _undropped(model: nn.Module, plan: DropPlan = DropPlan()) -> Anatomy:
    """The parts of a model that can be reconstructed, of which nothing is dropped, and which has the plan's layers."""
    parts = find_anatomy(unwrapped(model, with_adapters=False))
    if parts.plan:
        raise ValueError(f"this model has {parts.plan.label} dropped already; fit on the undropped model")
    parts.whole_plan(plan)  # raises for another depth, and indices that the model does not have
    for kind, i in _sublayers(parts):
        output_name(parts, i, kind)  # raises for architectures that cannot be reconstructed
    return parts


def _regress(method: str, read: list | None, now: list, target: list, masks: list) -> Change | None:
    """What brings the streams `now` nearest to `target`, both [B, T, C] per batch; None where nothing helps."""
    if method == "mean":  # the regression on a constant
        ones = [torch.ones_like(y[..., :1]) for y in now]
        gram, cross, _ = _sums(_samples(ones, now, masks, target))
        return Change(bias=(cross / gram)[0].float())
    weight = _ridge(_samples(read, now, masks, target))
    return None if weight is None else Change(weight=weight)


def _samples(*by_batch: list[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
    """Sample by sample, what is given batch by batch."""
    return [sample for tensors in zip(*by_batch, strict=True) for sample in zip(*tensors, strict=True)]


def _sums(samples: list) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Over real tokens, weighted, in float64: h h' [H, H], h e' [H, C] and e^2 [C]; h: what is read, e: what lacks."""
    gram = cross = error = torch.zeros((), dtype=torch.float64)
    for *given, target in samples:
        read, now, mask = (tensor.to(target.device) for tensor in given)  # a layer before may be on another GPU
        real = mask.bool()  # padding may hold anything, also NaN
        whole = target[real].float()
        scale = (1 / whole.square().mean(-1).clamp_min(1e-12)).sqrt()[:, None]  # of a token: sqrt(w_t)
        lacks = (whole - now[real].float()) * scale
        h = read[real].float() * scale
        gram = gram + in_float64(h.T @ h)
        cross = cross + in_float64(h.T @ lacks)
        error = error + in_float64(lacks.square().sum(0))
    return gram, cross, error


def _ridge(samples: list) -> torch.Tensor | None:
    """D [C, H], or None if it helps nowhere on held-out samples.

    The strength is chosen for each dimension of the stream on its own: a few of them are so large that they would
    decide for all the others.
    """
    if len(samples) < HELD_OUT:
        raise ValueError(
            f"least squares needs at least {HELD_OUT} calibration samples, of which every {HELD_OUT}th chooses the "
            f"ridge; these are {len(samples)}"
        )
    gram, cross, _ = _sums([sample for k, sample in enumerate(samples, 1) if k % HELD_OUT])
    held_gram, held_cross, held_error = _sums(samples[HELD_OUT - 1 :: HELD_OUT])
    left = [held_error]  # of each dimension, with no change and with each strength
    for strength in STRENGTHS:
        d = _solve(gram, cross, strength)
        left.append(held_error - 2 * (d * held_cross).sum(0) + (d * (held_gram @ d)).sum(0))
    best = torch.stack(left).argmin(0)  # [C]
    if not best.any():
        return None
    out = torch.zeros_like(cross)
    for k, strength in enumerate(STRENGTHS, 1):
        columns = best == k
        if columns.any():
            out[:, columns] = _solve(gram + held_gram, (cross + held_cross)[:, columns], strength)
    return out.T.float()


def _solve(gram: torch.Tensor, cross: torch.Tensor, strength: float) -> torch.Tensor:
    """The ridge regression [H, columns of cross], its ridge `strength` times the mean of h^2."""
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor = torch.linalg.cholesky(gram + strength * gram.diagonal().mean() * eye)
    return torch.cholesky_solve(cross, factor)
