"""Reconstruct, in closed form and without training, what dropped sublayers would have added: `Reconstruction`.

A dropped sublayer leaves a gap in what is written to the residual stream. Least-squares reconstruction lets the weight
matrix just before the gap (W, that ends the live sublayer there: h -> W h) write what is missing, as far as that can be
told from h, what it reads: W becomes W + D, with D the ridge regression

    D = argmin  sum_t w_t || D h_t - f_t ||^2 + ridge ||D||^2        w_t = 1 / ||r_t||^2

over calibration tokens t; f_t: what the gap's sublayers add in the undropped model; r_t: its stream after them. The
ridge is chosen per row of D on every fourth sample, which the regression did not see; where none helps there, the row
of W stays. An MLP's h is wide (1536 numbers a token in SmolLM2, for a stream of 576): about half of what an attention
layer adds can be told from it. Shapes do not change: the model is as fast as without, every format that holds the
dropped model holds this one, and there is nothing to load besides.

"sequential least squares" fits each gap in the model with the gaps above it dropped and reconstructed. "mean" takes
from the text only what is missing on average, sum_t w_t f_t / sum_t w_t, and adds that vector to the same matrix's
bias. A matrix that has none is given one: a model of a few numbers more, which formats must have room for (those of
`save_model` have).
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..anatomy import Anatomy, find_anatomy, output_matrix, output_name
from ..calibration import Calibration
from ..checkpoints.digest import weights_digest
from ..plan import DropPlan
from ..prune import apply_plan, dropped, give_biases, put
from ..sublayers import SublayerRun

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
        _check_method(self.method, METHODS)

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
        _check(find_anatomy(model), plan)
        if self.method in ALONE and not plan.mlp:
            return combined(self.corrections(model), plan) if plan else {}
        digest = weights_digest(model)
        last = self._last.get(model)
        if last is None or last[:2] != (digest, plan):
            last = digest, plan, fit(model, plan, self.calibration, self.method, self.batch_size)
            self._last[model] = last
        return last[2]

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

    Changed weights are saved and loaded like any other model's; biases that the architecture does not have are listed
    in `model.config.llmdrop`. Raises ValueError for changes of another plan or model, weights that are packed in 4
    bits, and what `apply_plan` refuses; the model is unchanged then.
    """
    with ExitStack() as undo:
        _put_checked(undo, model, plan, changes)
        apply_plan(model, plan)
        undo.pop_all()  # nothing is undone
    return model


@contextmanager
def reconstructed(model: nn.Module, plan: DropPlan, changes: Changes) -> Iterator[nn.Module]:
    """`dropped`, with the changes that `fit` gave for the same model and plan; everything is restored afterwards.

    Raises what `reconstruct` raises.
    """
    with ExitStack() as undo:
        _put_checked(undo, model, plan, changes)
        undo.enter_context(dropped(model, plan))
        yield model


def _put_checked(undo: ExitStack, model: nn.Module, plan: DropPlan, changes: Changes) -> None:
    """The changes, before the plan's sublayers go: what fails later is undone either way."""
    parts = find_anatomy(model)
    _check_changes(parts, plan, changes)
    if getattr(model.config, "llmdrop", None) is None:  # a record, for `give_biases` to list them in
        put(undo, model.config, "llmdrop", {"n_layers": parts.n_layers} | parts.plan.key)
    put_changes(undo, model, changes)


def put_changes(undo: ExitStack, model: nn.Module, changes: Changes) -> None:
    """Make the changes, whatever is dropped; `undo` takes them back."""
    parts = find_anatomy(model)
    with_bias = [(kind, i) for (kind, i), change in changes.items() if change.bias is not None]
    without_room = [(kind, i) for kind, i in with_bias if output_matrix(parts, i, kind).bias is None]
    give_biases(undo, model, [(i, output_name(parts, i, kind)) for kind, i in without_room])
    for (kind, i), change in changes.items():
        matrix = output_matrix(parts, i, kind)
        if change.bias is not None:
            _add(undo, matrix.bias, change.bias)
        if change.weight is not None:
            _add(undo, matrix.weight, change.weight.T if isinstance(matrix, Conv1D) else change.weight)


def put_weights(undo: ExitStack, model: nn.Module, other: nn.Module) -> None:
    """Give `model` the weights of `other`, a model of the same parameters; `undo` gives it its own back."""
    weights = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        put(undo, parameter, "data", weights[name].data)


def _add(undo: ExitStack, parameter: nn.Parameter, change: torch.Tensor) -> None:
    put(undo, parameter, "data", (parameter.data.float() + change.to(parameter.device)).to(parameter.dtype))


def _check_changes(parts: Anatomy, plan: DropPlan, changes: Changes) -> None:
    """ValueError unless each change is of a matrix right before a gap of the plan, and of its shape."""
    before_gaps = [live for live, gap in _gaps(parts, parts.whole_plan(plan)) if gap and live is not None]
    stray = [f"{kind} {i}" for kind, i in changes if (kind, i) not in before_gaps]
    if stray:
        allowed = ", ".join(f"{kind} {i}" for kind, i in before_gaps) or "nothing"
        raise ValueError(
            f"these changes are of another plan or model: they change {', '.join(stray)}, and before the gaps of "
            f"{plan.label} stands {allowed}; fit changes for this model and plan"
        )
    for (kind, i), change in changes.items():
        matrix = output_matrix(parts, i, kind)
        rows, columns = matrix.weight.T.shape if isinstance(matrix, Conv1D) else _shape(matrix)
        if change.weight is not None and not matrix.weight.is_floating_point():
            raise ValueError(
                f"the matrix of {kind} {i} is packed ({matrix.weight.dtype}), and nothing can be added to it; "
                "reconstruct first and quantize afterwards, or use the method 'mean'"
            )
        for name, value, expected in (("weight", change.weight, (rows, columns)), ("bias", change.bias, (rows,))):
            if value is not None and tuple(value.shape) != expected:
                raise ValueError(
                    f"these changes are of another model: that of {kind} {i}'s {name} is {tuple(value.shape)}, "
                    f"and {expected} fits; fit changes for this model and plan"
                )


def _shape(matrix: nn.Linear) -> tuple[int, int]:
    """[outputs, inputs], of packed weights too."""
    return matrix.out_features, matrix.in_features


def _gaps(parts: Anatomy, plan: DropPlan) -> Iterator[tuple[Sublayer | None, list[Sublayer]]]:
    """(a live sublayer, the dropped ones between it and the next live one), as they run; None: before the first."""
    live: Sublayer | None = None
    gap: list[Sublayer] = []
    for kind, i in _sublayers(parts):
        if i in getattr(plan, kind):
            gap.append((kind, i))
        else:
            yield live, gap
            live, gap = (kind, i), []
    yield live, gap


def _sublayers(parts: Anatomy) -> list[Sublayer]:
    return [(kind, i) for i in range(parts.n_layers) for kind in ("attn", "mlp")]


# ---- fitting


@torch.no_grad()
def fit(
    model: nn.Module,
    plan: DropPlan,
    calibration: Calibration,
    method: str = "least squares",
    batch_size: int = 8,
    strengths: Sequence[float] = STRENGTHS,
) -> Changes:
    """What `method` changes in `model` without the plan's sublayers, from one pass over `calibration`.

    model: undropped, and unchanged afterwards. method: one of METHODS. strengths: of the ridge, to choose from. Takes
    the time of one forward pass (sequential: two), and the memory of the residual streams of all of the calibration
    text, of one or both models, and (least squares) of one matrix's inputs.

    Raises ValueError for an unknown method, layers dropped already, a plan that does not fit, an architecture whose
    sublayers do not end in a matrix, or (least squares) fewer than four samples.
    """
    parts = find_anatomy(model)
    _check_method(method, METHODS)
    _check(parts, plan)
    steps = list(_gaps(parts, plan))
    while steps and not steps[-1][1]:  # what comes after the last gap need not run
        steps.pop()
    changes: Changes = {}
    if not steps:
        return changes
    run = SublayerRun(model, parts, calibration, batch_size)
    whole = run.start  # streams of the undropped model
    rest = run.start  # of the model without the gaps above, the same up to the first
    for live, gap in steps:
        read: list[torch.Tensor] | None = [] if gap and method != "mean" else None
        if live is not None:
            shared = rest is whole
            rest = run.through(rest, *live, read)
            whole = rest if shared else run.through(whole, *live)
        for sublayer in gap:
            whole = run.through(whole, *sublayer)
        if live is not None and gap:
            change = _regress(method, read, rest, whole, run.masks, strengths)
            if change is not None:
                changes[live] = change
                if method not in ALONE:
                    rest = [y + (h @ change.weight.T.to(h.dtype)).to(y) for y, h in zip(rest, read, strict=True)]
        if method in ALONE:
            rest = whole
    return changes


@torch.no_grad()
def corrections(
    model: nn.Module,
    calibration: Calibration,
    kinds: Sequence[str] = ("attn",),
    method: str = "least squares",
    batch_size: int = 8,
    strengths: Sequence[float] = STRENGTHS,
    layers: Iterable[int] | None = None,
) -> dict[Sublayer, Changes]:
    """For each sublayer of these kinds, in these layers (None: all), what `method` would change for it alone.

    From one pass over the undropped model, whatever is dropped later: for a plan of attention layers alone (or of MLPs
    alone), `combined` of these is what `fit` gives. It is what `search.greedy` needs to choose with reconstruction in
    mind. Layer 0's attention has nothing before it to change. Raises ValueError for "sequential least squares", which
    does not fit sublayers by themselves, and what `fit` raises.
    """
    parts = find_anatomy(model)
    _check_method(method, ALONE)
    _check(parts, DropPlan())
    layers = range(parts.n_layers) if layers is None else set(layers)
    run = SublayerRun(model, parts, calibration, batch_size)
    found: dict[Sublayer, Changes] = {}
    before: Sublayer | None = None
    read_before: list[torch.Tensor] | None = None
    streams = run.start
    for kind, i in _sublayers(parts):
        read: list[torch.Tensor] | None = None if method == "mean" else []
        after = run.through(streams, kind, i, read)
        if before is not None and kind in kinds and i in layers:
            change = _regress(method, read_before, streams, after, run.masks, strengths)
            if change is not None:
                found[kind, i] = {before: change}
        streams, before, read_before = after, (kind, i), read
    return found


def combined(found: dict[Sublayer, Changes], plan: DropPlan) -> Changes:
    """Of `corrections`, those of the plan's sublayers, but for matrices that are dropped themselves."""
    gone = [(kind, i) for kind in ("attn", "mlp") for i in getattr(plan, kind)]
    changes: Changes = {}
    for sublayer in gone:
        changes |= found.get(sublayer, {})
    return {place: change for place, change in changes.items() if place not in gone}


def _check_method(method: str, allowed: Sequence[str]) -> None:
    if method in METHODS and method not in allowed:
        raise ValueError(f"method {method!r} does not fit sublayers by themselves; those that do: {', '.join(allowed)}")
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")


def _check(parts: Anatomy, plan: DropPlan) -> None:
    if parts.plan:
        raise ValueError(f"this model has {parts.plan.label} dropped already; fit on the undropped model")
    parts.whole_plan(plan)  # raises for another depth, and indices that the model does not have
    for kind, i in _sublayers(parts):
        output_name(parts, i, kind)  # raises for architectures that cannot be reconstructed


def _regress(
    method: str,
    read: list[torch.Tensor] | None,
    now: list[torch.Tensor],
    target: list[torch.Tensor],
    masks: list[torch.Tensor],
    strengths: Sequence[float],
) -> Change | None:
    """What brings the streams `now` nearest to `target`, both [B, T, C] per batch; None where nothing helps."""
    if method == "mean":
        return Change(bias=_mean(now, target, masks))
    weight = _ridge(read, now, target, masks, strengths)
    return None if weight is None else Change(weight=weight)


def _lacking(now: list, target: list, masks: list) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Per sample: sqrt(w_t) [T, 1], and what its stream lacks, [T, C], so scaled; in float32."""
    for y, r, real in zip(now, target, masks, strict=True):
        for k in range(len(y)):
            wanted = r[k].float()
            scale = (real[k] / wanted.square().mean(-1).clamp_min(1e-12)).sqrt()[:, None]
            yield scale, (wanted - y[k].float()) * scale


def _mean(now: list, target: list, masks: list) -> torch.Tensor:
    """[C]: what the streams lack on average, each token with its weight."""
    weight: torch.Tensor | float = 0.0
    lacking: torch.Tensor | float = 0.0
    for scale, lacks in _lacking(now, target, masks):
        weight = weight + (scale.T @ scale).double()
        lacking = lacking + (lacks.T @ scale).double()
    return (lacking / weight)[:, 0].float()


class _Sums:
    """Sums over tokens, float64, of h h' [H, H], h e' [H, C] and e^2 [C]; h: what is read, e: what lacks."""

    def __init__(self):
        self.n_samples = 0
        self.gram: torch.Tensor | float = 0.0
        self.cross: torch.Tensor | float = 0.0
        self.error: torch.Tensor | float = 0.0

    def add(self, h: torch.Tensor, lacks: torch.Tensor) -> None:
        self.n_samples += 1
        self.gram = self.gram + (h.T @ h).double()
        self.cross = self.cross + (h.T @ lacks).double()
        self.error = self.error + lacks.square().sum(0).double()


def _ridge(read: list, now: list, target: list, masks: list, strengths: Sequence[float]) -> torch.Tensor | None:
    """D [C, H] that brings the streams `now` + D h nearest to `target`, or None if it helps nowhere on held-out.

    The strength is chosen for each dimension of the stream on its own: a few of them are so large that they would
    decide for all the others. Dimensions that no strength helps stay as they are.
    """
    fitted = _Sums()
    held = _Sums()
    samples = (h for batch in read for h in batch)
    for k, (h, (scale, lacks)) in enumerate(zip(samples, _lacking(now, target, masks), strict=True)):
        sums = held if k % HELD_OUT == HELD_OUT - 1 else fitted
        sums.add(h.float() * scale, lacks)
    if not held.n_samples:
        raise ValueError(
            f"least squares needs at least {HELD_OUT} calibration samples, of which every {HELD_OUT}th chooses the "
            f"ridge; these are {fitted.n_samples}"
        )
    left = [held.error]  # of each dimension, with no change and with each strength
    for strength in strengths:
        d = _solve(fitted.gram, fitted.cross, strength)
        left.append(held.error - 2 * (d * held.cross).sum(0) + (d * (held.gram @ d)).sum(0))
    best = torch.stack(left).argmin(0)  # [C]
    if not best.any():
        return None
    out = torch.zeros_like(fitted.cross)
    for k in best.unique().tolist():
        if k:
            columns = best == k
            cross = (fitted.cross + held.cross)[:, columns]
            out[:, columns] = _solve(fitted.gram + held.gram, cross, strengths[k - 1])
    return out.T.float()


def _solve(gram: torch.Tensor, cross: torch.Tensor, strength: float) -> torch.Tensor:
    """The ridge regression [H, columns of cross], its ridge `strength` times the mean of h^2."""
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor = torch.linalg.cholesky(gram + strength * gram.diagonal().mean() * eye)
    return torch.cholesky_solve(cross, factor)
