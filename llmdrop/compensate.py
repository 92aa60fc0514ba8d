"""Lose less at the same speed: closed-form compensation for dropped sublayers, without training.

After a drop, the layers that stay read a residual stream that the missing ones no longer write to. `refit` lets the
weights that stay make up for it: walking down the model, the output matrix W of every live sublayer (h -> W h, the
last thing it does) becomes W + D, where D is the ridge regression of what the residual stream lacks against the
undropped model,

    D = argmin  sum_t w_t || s_t + D h_t - r_t ||^2 + ridge ||D||^2        w_t = 1 / ||r_t||^2

h_t: what W reads at token t; s_t: the dropped model's stream after this sublayer, all earlier corrections included;
r_t: the undropped model's stream at the same place, or, if the next sublayers are dropped, after those. The strength
of the ridge is chosen per matrix on every fourth sample, which the regression did not see; where no strength helps on
those, the matrix stays. Last, one factor on the final norm gives predictions their sharpness back. Shapes do not
change: the model is as fast as without, every format that holds the dropped model holds this one, and there is
nothing to load besides.

The other methods put something small where a sublayer was, and stand here to be compared with: its mean output (one
vector), the mean apart for a sample's first tokens (attention sinks), a diagonal, a linear map of the stream.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from .anatomy import Anatomy, anatomy
from .calibration import Calibration
from .plan import DropPlan
from .prune import NoAttention, apply_plan, dropped, stub_sublayer

METHODS = ("none", "mean", "sink mean", "diagonal", "linear", "refit before", "refit")
OUTPUTS = ("o_proj", "out_proj", "down_proj", "dense", "dense_4h_to_h", "c_proj", "fc2")  # a sublayer's last matrix
SINKS = 4  # first tokens of a sample that "sink mean" keeps apart, each with a mean of its own
STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # of the ridge, in units of the mean of h_t^2
HELD_OUT = 4  # every fourth sample chooses the strength
SKETCH = 64  # random sums of dimensions on which it is chosen

Changes = dict[tuple[str, int], torch.Tensor | nn.Module]  # (kind, layer) -> what to add to W, or what fills the gap


def compensate(model: nn.Module, plan: DropPlan, calibration: Calibration, method: str = "refit", **settings):
    """`apply_plan`, then compensate by `method` (see `fit`) in place; returns the model, ready for `save_model`.

    Only methods that change weights and add nothing ("none", "refit", "refit before") end in a model that can be saved.
    """
    if method not in ("none", "refit", "refit before"):
        raise ValueError(
            f"method={method!r} adds modules that checkpoints do not hold; compensate for good with 'refit' or "
            "'refit before', or try it with `compensated`"
        )
    changes = fit(model, plan, calibration, method, **settings)
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
            for owner, name, value in undo:
                setattr(owner, name, value)


def _put(model: nn.Module, changes: Changes) -> list[tuple]:
    parts, undo = anatomy(model), []
    for (kind, i), change in changes.items():
        if kind == "final":
            for parameter in parts.decoder.get_submodule(parts.layout.final).parameters():  # a norm's weight, and bias
                undo.append((parameter, "data", parameter.data))
                parameter.data = (parameter.data.float() * float(change)).to(parameter.dtype)
            continue
        layer, layout = parts.layers[i], parts.layout
        if isinstance(change, nn.Module):
            core = layout.attn_core if kind == "attn" else layout.mlp_core
            undo.append((layer, core, getattr(layer, core)))
            setattr(layer, core, change)
        else:
            weight = _output(parts, i, kind).weight
            undo.append((weight, "data", weight.data))
            weight.data = (weight.data.float() + _like(weight, change, parts, i, kind)).to(weight.dtype)
    return undo


def _like(weight: torch.Tensor, change: torch.Tensor, parts: Anatomy, i: int, kind: str) -> torch.Tensor:
    transposed = not isinstance(_output(parts, i, kind), nn.Linear)  # GPT-2's Conv1D keeps [in, out]
    return (change.T if transposed else change).to(weight.device)


def _output(parts: Anatomy, i: int, kind: str) -> nn.Module:
    """The matrix that ends a sublayer. Raises ValueError where something follows it, or the stream is not one path."""
    layout = parts.layout
    core, last = (layout.attn_core, layout.attn[-1]) if kind == "attn" else (layout.mlp_core, layout.mlp[-1])
    module = getattr(parts.layers[i], core)
    found = module if core in OUTPUTS else next((getattr(module, n) for n in OUTPUTS if hasattr(module, n)), None)
    if found is None or core != last or parts.parallel:
        why = "attention and MLP run in parallel" if parts.parallel else f"{last} follows its last matrix"
        raise ValueError(
            f"cannot refit layer {i}'s {kind} sublayer: {why}; refit needs sublayers one after the other, each ending "
            "in a matrix (Llama, Mistral, Qwen, Phi-3, GPT-2, OPT). Drop without compensation there"
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

    model: undropped, and unchanged afterwards. method: "none"; "mean", "sink mean", "diagonal", "linear": a `Fill`
    where each sublayer was, fitted one after the other, each in the model with those before it; "refit before":
    changes of the last matrix before each gap; "refit": of every matrix after the first gap too. Calibration text of
    several kinds carries over best to text of another. Takes the time of two forward passes, and the memory of both
    models' residual streams and of one matrix's inputs over all of the calibration text.

    Raises ValueError for an unknown method, layers dropped already, or an architecture that the method cannot serve.
    """
    parts = anatomy(model)
    gone = {(kind, i) for kind in ("attn", "mlp") for i in getattr(plan, kind)}
    _check(parts, plan, method)
    sublayers = [(kind, i) for i in range(parts.n_layers) for kind in ("attn", "mlp")]
    run = _Walk(model, parts, calibration, batch_size)
    whole, rest = run.start, run.start  # streams of the undropped and the dropped model, equal up to the first gap
    changes: Changes = {}
    at = 0
    while at < len(sublayers):
        kind, i = sublayers[at]
        end = at + 1
        while end < len(sublayers) and sublayers[end] in gone:
            end += 1  # the gap behind this sublayer
        if sublayers[at] in gone or method not in ("refit", "refit before"):
            end = at + 1
        shared = rest is whole
        if sublayers[at] in gone:
            whole = run.through(whole, kind, i)
            if method in ("mean", "sink mean", "diagonal", "linear"):
                changes[kind, i] = fill = _fill(kind, method, rest, whole, run.weights, strengths)
                rest = [x + fill.added(x) for x in rest]
        elif shared and end == at + 1:
            rest = whole = run.through(whole, kind, i)
        else:
            read: list[torch.Tensor] = []
            rest = run.through(rest, kind, i, read)
            for k in range(at, end):
                whole = run.through(whole, *sublayers[k])
            if method == "refit" or (method == "refit before" and end > at + 1):
                change = _ridge(read, rest, whole, run.weights, strengths)
                if change is not None:
                    changes[kind, i] = change
                    rest = [y + h @ change.T.to(h.dtype) for y, h in zip(rest, read, strict=True)]
        at = end
    if method == "refit" and changes:
        changes["final", parts.n_layers] = _sharpness(model, parts, whole, rest, run.weights)
    return changes


@torch.no_grad()
def corrections(
    model: nn.Module,
    calibration: Calibration,
    kinds: Sequence[str] = ("attn",),
    batch_size: int = 8,
    strengths: Sequence[float] = STRENGTHS,
) -> dict[tuple[str, int], Changes]:
    """For each sublayer of these kinds, what "refit before" would change if only that one were dropped.

    From one pass over the undropped model. They add up where several sublayers go, as long as the matrices stay: what
    `selectors.greedy` needs to choose with compensation in mind. Layer 0's attention has nothing before it.
    """
    parts = anatomy(model)
    _check(parts, DropPlan(), "refit before")
    run = _Walk(model, parts, calibration, batch_size)
    x, before, read_before, found = run.start, None, [], {}
    for at in ((kind, i) for i in range(parts.n_layers) for kind in ("attn", "mlp")):
        read: list[torch.Tensor] = []
        y = run.through(x, at[0], at[1], read)
        if before is not None and at[0] in kinds:
            change = _ridge(read_before, x, y, run.weights, strengths)
            if change is not None:
                found[at] = {before: change}
        x, before, read_before = y, at, read
    return found


def _check(parts: Anatomy, plan: DropPlan, method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")
    if parts.plan:
        raise ValueError(f"this model has {parts.plan.label} dropped already; fit on the undropped model")
    DropPlan(plan.attn, plan.mlp, parts.n_layers)  # raises for indices the model does not have
    if method in ("refit", "refit before"):
        for i in range(parts.n_layers):
            _output(parts, i, "attn"), _output(parts, i, "mlp")
    elif method != "none" and (parts.parallel or plan.blocks or (method == "sink mean" and plan.mlp)):
        raise ValueError(
            f"method {method!r} fills gaps of single sublayers, one after the other ('sink mean': of attention only); "
            f"this plan drops blocks {plan.blocks} and MLPs {plan.mlp}. Use 'refit'"
        )


class _Record(nn.Module):
    """Stands for a decoder layer: keeps what it was called with and passes the residual stream on."""

    def forward(self, hidden: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        self.call = hidden, args, kwargs
        return hidden


class _Walk:
    """Runs sublayers one at a time on the residual streams of all batches, each [B, T, C]."""

    def __init__(self, model, parts: Anatomy, calibration: Calibration, batch_size: int):
        self.parts, self.start, self.calls, self.weights = parts, [], [], []
        device = model.get_input_embeddings().weight.device
        stock = getattr(parts.decoder, parts.layers_name)
        mask = calibration.attention_mask
        for first in range(0, len(calibration.input_ids), batch_size):
            part = slice(first, first + batch_size)
            ids = calibration.input_ids[part].to(device)
            padded = {} if mask is None else {"attention_mask": mask[part].to(device)}
            if padded:
                padded["position_ids"] = (padded["attention_mask"].cumsum(1) - 1).clamp_min(0)
            recorders = nn.ModuleList(_Record() for _ in parts.layers)
            setattr(parts.decoder, parts.layers_name, recorders)
            try:
                parts.decoder(input_ids=ids, use_cache=False, **padded)
            finally:
                setattr(parts.decoder, parts.layers_name, stock)
            self.start.append(recorders[0].call[0])
            self.calls.append([recorder.call[1:] for recorder in recorders])
            self.weights.append(torch.ones_like(ids) if mask is None else mask[part].to(device))

    def through(self, streams: list, kind: str, i: int, read: list | None = None) -> list:
        """The streams after one sublayer; `read` collects what its last matrix reads, [B, T, H]."""
        layer, layout = self.parts.layers[i], self.parts.layout
        handle = None
        if read is not None:
            last = _output(self.parts, i, kind)
            handle = last.register_forward_pre_hook(lambda module, args: read.append(args[0]))
        undo = stub_sublayer(layer, layout, "mlp" if kind == "attn" else "attn")
        try:
            out = []
            for x, calls in zip(streams, self.calls, strict=True):
                args, kwargs = calls[i]
                y = layer(x, *args, **kwargs)
                out.append(y[0] if isinstance(y, tuple) else y)
        finally:
            for owner, name, value in undo:
                setattr(owner, name, value)
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
    """D [C, H] that brings the streams `now` + D h nearest to `wanted`, or None if no strength helps on held-out."""
    width, device = now[0].shape[-1], now[0].device
    signs = torch.randint(2, (width, min(width, SKETCH)), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    signs = signs.to(device)  # strengths are compared on random sums of the stream's dimensions: far less to solve for
    sums = [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]  # of h h', h e' and |signs' e|^2: fitted, held out
    for k, (h, lacks) in enumerate(_samples(read, now, wanted, weights)):
        held = int(k % HELD_OUT == HELD_OUT - 1)
        for total, value in zip(sums, (h.T @ h, h.T @ lacks, (lacks @ signs).square().sum()), strict=True):
            total[held] = total[held] + value.double()
    (fitted, held), (cross, cross_held), (_, error) = sums
    if not isinstance(held, torch.Tensor):
        raise ValueError(f"refit needs at least {HELD_OUT} calibration samples: every {HELD_OUT}th chooses the ridge")
    eye = torch.eye(len(fitted), dtype=fitted.dtype, device=device)

    def solved(gram, right, strength):  # [H, C]
        factor = torch.linalg.cholesky(gram + strength * gram.diagonal().mean() * eye)
        return torch.cholesky_solve(right, factor)

    few, few_held, errors = cross @ signs.double(), cross_held @ signs.double(), []
    for strength in strengths:
        d = solved(fitted, few, strength)
        errors.append(float((error - 2 * (d * few_held).sum() + (d * (held @ d)).sum()) / error))
    if not min(errors) < 1:
        return None
    return solved(fitted + held, cross + cross_held, strengths[int(np.argmin(errors))]).T.float()


def _sharpness(model, parts: Anatomy, whole, rest, weights) -> torch.Tensor:
    """The factor of the final norm that brings predictions nearest to the whole model's: Newton's method on the KL."""
    norm, head = parts.decoder.get_submodule(parts.layout.final), model.get_output_embeddings()
    pairs = [(w[k], r[k], real[k]) for w, r, real in zip(whole, rest, weights, strict=True) for k in range(len(w))]
    factor = torch.ones(())
    for _ in range(3):
        slope = curvature = 0.0
        for wanted, found, real in pairs[HELD_OUT - 1 :: HELD_OUT]:
            p, z = head(norm(wanted)).float().softmax(-1), head(norm(found)).float()
            q = (factor.to(z.device) * z).softmax(-1)
            mean = (q * z).sum(-1)
            slope += float((real * (mean - (p * z).sum(-1))).sum())
            curvature += float((real * ((q * z.square()).sum(-1) - mean.square())).sum())
        factor = (factor - slope / max(curvature, 1e-12)).clamp(0.5, 2.0)
    return factor


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
