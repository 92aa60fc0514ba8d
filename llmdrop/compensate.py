"""Lose less at the same speed: closed-form compensation for dropped sublayers, without training.

A dropped sublayer leaves a gap in what is written to the residual stream. `refit` lets the weight matrix just before
the gap (W, that ends the live sublayer there: h -> W h) write what is missing, as far as that can be told from h, what
it reads: W becomes W + D, with D the ridge regression

    D = argmin  sum_t w_t || D h_t - f_t ||^2 + ridge ||D||^2        w_t = 1 / ||r_t||^2

over calibration tokens t; f_t: what the gap's sublayers add in the undropped model; r_t: its stream after them. The
ridge is chosen per row of D on every fourth sample, which the regression did not see; where none helps there, the row
of W stays. An MLP's h is wide (1536 numbers a token in SmolLM2, for a stream of 576): about half of what an attention
layer adds can be told from it. Shapes do not change: the model is as fast as without, every format that holds the
dropped model holds this one, and there is nothing to load besides.

"mean" takes from the text only what is missing on average, sum_t w_t f_t / sum_t w_t, and adds that vector to the same
matrix's bias. A matrix that has none is given one: a model of a few numbers more, which formats must have room for
(those of `save_model` have).

The other methods stand here to be compared with: "refit in turn" and "mean in turn" fit each gap in the model with the
gaps above it dropped and fitted, "refit all" brings every later matrix's output back to the undropped model's stream
too; a `Fill`, which no checkpoint holds, puts something small where a sublayer was: its mean output with the first
tokens' apart (attention sinks), a diagonal, a linear map of the stream.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from .anatomy import Anatomy, anatomy
from .calibration import Calibration
from .hooks import batches
from .plan import DropPlan
from .prune import NoAttention, apply_plan, dropped, give_biases
from .sweep import layer_calls, run_layer

MEANS = ("mean", "mean in turn")
FILLS = ("sink mean", "diagonal", "linear")
REFITS = ("refit", "refit in turn", "refit all")
METHODS = ("none", *MEANS, *FILLS, *REFITS)
ALONE = ("mean", "refit")  # fit every gap on its own, in the undropped model
OUTPUTS = ("o_proj", "out_proj", "down_proj", "dense", "dense_4h_to_h", "c_proj", "fc2")  # a sublayer's last matrix
SINKS = 4  # first tokens of a sample that "sink mean" keeps apart, each with a mean of its own
STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0)  # of the ridge, in units of the mean of h_t^2
HELD_OUT = 4  # every fourth sample chooses the strength

# (kind, layer) -> what to add to W [C, H] or to its bias [C], or what fills the gap
Changes = dict[tuple[str, int], torch.Tensor | nn.Module]


def compensate(model: nn.Module, plan: DropPlan, changes: Changes) -> nn.Module:
    """`apply_plan`, with the changes that `fit` gave for the same model and plan, in place; returns the model.

    Raises ValueError for a `Fill`, which no checkpoint holds: changed weights (of a refit) are saved and loaded like
    any other model's, and biases (of a mean) that the architecture has not are listed in `model.config.llmdrop`.
    """
    if any(isinstance(change, nn.Module) for change in changes.values()):
        raise ValueError(
            f"these changes add modules ({', '.join(FILLS)}), which checkpoints do not hold; fit with one of "
            f"{', '.join(MEANS + REFITS)}, or try these with `compensated`"
        )
    apply_plan(model, plan)
    _put(model, changes)
    return model


@contextmanager
def compensated(model: nn.Module, plan: DropPlan, changes: Changes) -> Iterator[nn.Module]:
    """`dropped`, with the changes that `fit` gave for the same model and plan; everything is restored afterwards."""
    with dropped(model, plan):
        undo = _put(model, changes)
        try:
            yield model
        finally:
            for owner, name, value in reversed(undo):
                setattr(owner, name, value)


def _put(model: nn.Module, changes: Changes) -> list[tuple]:
    """Make the changes; returns the undo log: (owner, attribute, former value), to be put back last first."""
    parts = anatomy(model)
    vectors = [(kind, i) for (kind, i), change in changes.items() if _is_vector(change)]
    without = [(kind, i) for kind, i in vectors if _output(parts, i, kind).bias is None]
    undo = give_biases(model, [(i, _output_name(parts, i, kind)) for kind, i in without])
    for (kind, i), change in changes.items():
        layer, layout = parts.layers[i], parts.layout
        if isinstance(change, nn.Module):
            core = layout.attn_core if kind == "attn" else layout.mlp_core
            undo.append((layer, core, getattr(layer, core)))
            setattr(layer, core, change)
        elif _is_vector(change):
            bias = _output(parts, i, kind).bias
            undo.append((bias, "data", bias.data))
            bias.data = (bias.data.float() + change.to(bias.device)).to(bias.dtype)
        else:
            weight = _output(parts, i, kind).weight
            undo.append((weight, "data", weight.data))
            weight.data = (weight.data.float() + _like(weight, change, parts, i, kind)).to(weight.dtype)
    return undo


def _like(weight: torch.Tensor, change: torch.Tensor, parts: Anatomy, i: int, kind: str) -> torch.Tensor:
    transposed = not isinstance(_output(parts, i, kind), nn.Linear)  # GPT-2's Conv1D keeps [in, out]
    return (change.T if transposed else change).to(weight.device)


def _is_vector(change: torch.Tensor | nn.Module) -> bool:
    return isinstance(change, torch.Tensor) and change.dim() == 1


def _output(parts: Anatomy, i: int, kind: str) -> nn.Module:
    return parts.layers[i].get_submodule(_output_name(parts, i, kind))


def _output_name(parts: Anatomy, i: int, kind: str) -> str:
    """The matrix that ends a sublayer, by its name in the layer ("mlp.down_proj").

    Raises ValueError where something follows it, or the stream is not one path.
    """
    layout = parts.layout
    core, last = (layout.attn_core, layout.attn[-1]) if kind == "attn" else (layout.mlp_core, layout.mlp[-1])
    module = getattr(parts.layers[i], core)
    found = core if core in OUTPUTS else next((f"{core}.{n}" for n in OUTPUTS if hasattr(module, n)), None)
    if found is None or core != last or parts.parallel:
        why = "attention and MLP run in parallel" if parts.parallel else f"{last} follows its last matrix"
        raise ValueError(
            f"cannot refit layer {i}'s {kind} sublayer, nor add a mean there: {why}; that needs sublayers one after "
            "the other, each ending in a matrix (Llama, Mistral, Qwen, Phi-3, GPT-2, OPT). Drop without compensation"
        )
    return found


class Fill(nn.Module):
    """Stands where a sublayer was and adds a little of its own: the mean of the first tokens, then a map of x.

    x: [B, T, C] -> first[t] for positions t < len(first), else mean + x * diagonal + linear(x). Positions are counted
    from the start of the input, so it is for scoring whole texts; a cached decoding step is taken as a later token.
    """

    def __init__(self, mean, first=None, diagonal=None, linear=None):
        super().__init__()
        for name, value in (("mean", mean), ("first", first), ("diagonal", diagonal), ("linear", linear)):
            self.register_parameter(name, None if value is None else nn.Parameter(value, requires_grad=False))

    def added(self, x: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        out = self.mean.expand_as(x)
        if self.diagonal is not None:
            out = out + x * self.diagonal
        if self.linear is not None:
            out = out + x @ self.linear.T
        if self.first is not None:
            place = torch.arange(x.shape[1], device=x.device)[None] if positions is None else positions
            early = self.first[place.clamp_max(len(self.first) - 1)]
            out = torch.where((place < len(self.first))[..., None], early, out)
        return out


class FillAttention(Fill, NoAttention):
    def forward(self, hidden_states, *args, position_ids=None, **kwargs):
        NoAttention.forward(self, hidden_states, *args, **kwargs)  # keeps counting tokens where it has to
        return self.added(hidden_states, position_ids), None


class FillMLP(Fill):
    def forward(self, hidden_states):
        return self.added(hidden_states)


# ---- fitting


@torch.no_grad()
def fit(
    model: nn.Module,
    plan: DropPlan,
    calibration: Calibration,
    method: str = "refit",
    batch_size: int = 8,
    strengths: Sequence[float] = STRENGTHS,
) -> Changes:
    """What `method` changes in, or puts into, `model` without the plan's sublayers, from one pass over `calibration`.

    model: undropped, and unchanged afterwards. method: one of METHODS, see above. Calibration text of several kinds
    carries over best to text of another. Takes the time of one forward pass ("refit", "mean") or two, and the memory of
    the residual streams of all of the calibration text, of one or both models, and (refits) of one matrix's inputs.

    Raises ValueError for an unknown method, layers dropped already, or an architecture that the method cannot serve.
    """
    parts = anatomy(model)
    gone = {(kind, i) for kind in ("attn", "mlp") for i in getattr(plan, kind)}
    _check(parts, plan, method)
    if method in FILLS:
        kinds = [kind for kind in ("attn", "mlp") if getattr(plan, kind)]
        return combined(corrections(model, calibration, kinds, method, batch_size, strengths), plan)
    if method == "none":
        return {}
    sublayers = [(kind, i) for i in range(parts.n_layers) for kind in ("attn", "mlp")]
    run = _Walk(model, parts, calibration, batch_size)
    whole, rest = run.start, run.start  # streams of the undropped and the dropped model, equal up to the first gap
    mean, changes = method in MEANS, {}
    at = 0
    while at < len(sublayers):
        kind, i = sublayers[at]
        end = at + 1
        while end < len(sublayers) and sublayers[end] in gone:
            end += 1  # the gap behind this sublayer
        shared = rest is whole
        if sublayers[at] in gone:  # nothing live stands before it
            whole = run.through(whole, kind, i)
            rest, end = whole if method in ALONE else rest, at + 1
        elif shared and end == at + 1:
            rest = whole = run.through(whole, kind, i)
        else:
            read: list[torch.Tensor] = []
            rest = run.through(rest, kind, i, None if mean else read)
            whole = rest if shared else run.through(whole, kind, i)
            for k in range(at + 1, end):
                whole = run.through(whole, *sublayers[k])
            if method == "refit all" or end > at + 1:
                state = rest, whole, run.weights
                change = _mean(*state) if mean else _ridge(read, *state, strengths)
                if change is not None:
                    changes[kind, i] = change
                    added = [change] * len(rest) if mean else [h @ change.T.to(h.dtype) for h in read]
                    rest = [y + a.to(y) for y, a in zip(rest, added, strict=True)]
            if method in ALONE:
                rest = whole
        at = end
    return changes


@torch.no_grad()
def corrections(
    model: nn.Module,
    calibration: Calibration,
    kinds: Sequence[str] = ("attn",),
    method: str = "refit",
    batch_size: int = 8,
    strengths: Sequence[float] = STRENGTHS,
    layers: Sequence[int] | None = None,
) -> dict[tuple[str, int], Changes]:
    """For each sublayer of these kinds, in these layers (None: all), what `method` would change for it alone.

    method: "refit", "mean" or a fill.

    From one pass over the undropped model, whatever is dropped later: for a plan of attention layers alone (or of MLPs
    alone), `combined` of these is what `fit` gives. It is what `selection.greedy` needs to choose with compensation in
    mind. Layer 0's attention has nothing before it to refit, or to add its mean to.
    """
    if method not in ALONE + FILLS:
        raise ValueError(f"method {method!r} does not fit layers one by one; those that do: {', '.join(ALONE + FILLS)}")
    parts = anatomy(model)
    _check(parts, DropPlan(mlp=[0]) if "mlp" in kinds else DropPlan(), method)
    run = _Walk(model, parts, calibration, batch_size)
    x, before, read_before, found = run.start, None, [], {}
    for at in ((kind, i) for i in range(parts.n_layers) for kind in ("attn", "mlp")):
        read: list[torch.Tensor] = []
        y = run.through(x, at[0], at[1], read if method == "refit" else None)
        wanted = at[0] in kinds and (layers is None or at[1] in layers)
        if wanted and method in FILLS:
            found[at] = {at: _fill(at[0], method, x, y, run.weights, strengths)}
        elif wanted and before is not None:
            state = x, y, run.weights
            change = _mean(*state) if method == "mean" else _ridge(read_before, *state, strengths)
            if change is not None:
                found[at] = {before: change}
        x, before, read_before = y, at, read
    return found


def combined(found: dict[tuple[str, int], Changes], plan: DropPlan) -> Changes:
    """Of `corrections`, those of the plan's sublayers, but for matrices that are dropped themselves."""
    gone = [(kind, i) for kind in ("attn", "mlp") for i in getattr(plan, kind)]
    each = ((at, change) for item in gone for at, change in found.get(item, {}).items())
    return {at: change for at, change in each if at not in gone or isinstance(change, nn.Module)}


def shared_or_fit(
    model: nn.Module,
    plan: DropPlan,
    calibration: Calibration,
    method: str = "refit",
    shared: Callable[[str], dict] | None = None,
    batch_size: int = 8,
) -> Changes:
    """What `fit` gives, from one pass that serves several plans where it can: shared(method) is `corrections` of it.

    It can for plans of attention layers, and methods that fit layers one by one. shared=None: always `fit`.
    """
    alone = shared is not None and method in ALONE + FILLS and not plan.mlp
    return combined(shared(method), plan) if alone else fit(model, plan, calibration, method, batch_size)


def _check(parts: Anatomy, plan: DropPlan, method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")
    if parts.plan:
        raise ValueError(f"this model has {parts.plan.label} dropped already; fit on the undropped model")
    DropPlan(plan.attn, plan.mlp, parts.n_layers)  # raises for indices the model does not have
    if method in REFITS + MEANS:
        for i in range(parts.n_layers):
            _output(parts, i, "attn"), _output(parts, i, "mlp")
    elif method != "none" and (parts.parallel or plan.blocks or (method == "sink mean" and plan.mlp)):
        raise ValueError(
            f"method {method!r} fills gaps of single sublayers, one after the other ('sink mean': of attention only); "
            f"this plan drops blocks {plan.blocks} and MLPs {plan.mlp}. Use 'refit'"
        )


class _Walk:
    """Runs sublayers one at a time on the residual streams of all batches, each [B, T, C]."""

    def __init__(self, model, parts: Anatomy, calibration: Calibration, batch_size: int):
        self.parts, self.start, self.calls, self.weights = parts, [], [], []
        for _, inputs in batches(calibration, batch_size, model.get_input_embeddings().weight.device):
            hidden, calls = layer_calls(parts, **inputs)
            self.start.append(hidden)
            self.calls.append(calls)
            self.weights.append(inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])))

    def through(self, streams: list, kind: str, i: int, read: list | None = None) -> list:
        """The streams after one sublayer; `read` collects what its last matrix reads, [B, T, H]."""
        handle, other = None, "mlp" if kind == "attn" else "attn"
        if read is not None:
            last = _output(self.parts, i, kind)
            handle = last.register_forward_pre_hook(lambda module, args: read.append(args[0]))
        try:
            out = [run_layer(self.parts, i, x, call[i], [other]) for x, call in zip(streams, self.calls, strict=True)]
        finally:
            if handle is not None:
                handle.remove()
        if read is not None:  # OPT flattens [B, T, C] before its MLP
            read[:] = [h.view(*x.shape[:2], -1) for h, x in zip(read, streams, strict=True)]
        return out


def _samples(read, now, wanted, weights) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Per sample: what is read [T, H] and what lacks [T, C], both scaled by sqrt(w_t), in float32."""
    for h, y, r, real in zip(read, now, wanted, weights, strict=True):
        for k in range(len(h)):
            target = r[k].float()
            scale = (real[k] / target.square().mean(-1).clamp_min(1e-12)).sqrt()[:, None]
            yield h[k].float() * scale, (target - y[k].float()) * scale


def _ridge(read, now, wanted, weights, strengths) -> torch.Tensor | None:
    """D [C, H] that brings the streams `now` + D h nearest to `wanted`, or None if it helps nowhere on held-out.

    The strength is chosen for each dimension of the stream on its own: a few of them are so large that they would
    decide for all the others. Dimensions that no strength helps stay as they are.
    """
    sums = [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]  # of h h' [H, H], h e' [H, C] and e^2 [C]: fitted, held out
    for k, (h, lacks) in enumerate(_samples(read, now, wanted, weights)):
        held = int(k % HELD_OUT == HELD_OUT - 1)
        for total, value in zip(sums, (h.T @ h, h.T @ lacks, lacks.square().sum(0)), strict=True):
            total[held] = total[held] + value.double()
    (fitted, held), (cross, cross_held), (_, error) = sums
    if not isinstance(held, torch.Tensor):
        raise ValueError(f"refit needs at least {HELD_OUT} calibration samples: every {HELD_OUT}th chooses the ridge")
    eye = torch.eye(len(fitted), dtype=fitted.dtype, device=fitted.device)

    def solved(gram, right, strength):  # [H, columns of right]
        factor = torch.linalg.cholesky(gram + strength * gram.diagonal().mean() * eye)
        return torch.cholesky_solve(right, factor)

    left = [error]  # of each dimension, with no change and with each strength
    for strength in strengths:
        d = solved(fitted, cross, strength)
        left.append(error - 2 * (d * cross_held).sum(0) + (d * (held @ d)).sum(0))
    best = torch.stack(left).argmin(0)  # [C]
    if not best.any():
        return None
    out = torch.zeros_like(cross)
    for k in best.unique().tolist():
        if k:
            columns = best == k
            out[:, columns] = solved(fitted + held, (cross + cross_held)[:, columns], strengths[k - 1])
    return out.T.float()


def _mean(now, wanted, weights) -> torch.Tensor:
    """[C]: what the streams `now` lack of `wanted` on average, each token with its weight."""
    ones = [y.new_ones(*y.shape[:2], 1) for y in now]  # regression on a constant
    sums = [(one.T @ one, lacks.T @ one) for one, lacks in _samples(ones, now, wanted, weights)]
    weight, lacking = (sum(each.double() for each in column) for column in zip(*sums, strict=True))
    return (lacking / weight)[:, 0].float()


def _fill(kind: str, method: str, now, wanted, weights, strengths) -> Fill:
    """What stands in for a sublayer, fitted to the difference of `wanted` and `now`, both lists of [B, T, C]."""
    x, after, real = torch.cat(now).float(), torch.cat(wanted).float(), torch.cat(weights)  # [N, T, C], [N, T]
    lacks = after - x
    w = (real / after.square().mean(-1).clamp_min(1e-12))[..., None]
    late = w.clone()
    if method == "sink mean":
        late[:, :SINKS] = 0
    mean_x, mean = ((late * a).sum((0, 1)) / late.sum() for a in (x, lacks))
    extra = {}
    if method == "sink mean":
        extra["first"] = (w * lacks).sum(0)[:SINKS] / w.sum(0)[:SINKS].clamp_min(1e-12)
    elif method == "diagonal":
        centred = x - mean_x
        slope = (w * centred * (lacks - mean)).sum((0, 1)) / (w * centred.square()).sum((0, 1)).clamp_min(1e-12)
        extra["diagonal"], mean = slope, mean - slope * mean_x
    elif method == "linear":
        found = _ridge([x - mean_x], [x + mean], [after], [real], strengths)
        if found is not None:
            extra["linear"], mean = found, mean - found @ mean_x
    return (FillAttention if kind == "attn" else FillMLP)(mean, **extra)
