"""Run a model layer by layer: how the decoder calls its layers, one layer or sublayer at a time, and the head."""

from collections.abc import Sequence
from contextlib import ExitStack
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .anatomy import Anatomy, exclusive, output_matrix, unwrapped
from .calibration import Calibration, batches, read_by
from .proof import Call, StandIn, as_output
from .prune import eval_mode, put, put_stubs

NOT_FINITE = (  # what to do about it
    "Either weights hold NaN or infinity (load the checkpoint again) or float16 overflows (load the model with "
    "dtype='bfloat16' or 'float32')"
)


class _Recorder(StandIn):
    """Keeps what a decoder layer was called with and passes the residual stream on."""

    def __init__(self, layer: nn.Module, n_outputs: int):
        super().__init__(layer)
        self.n_outputs = n_outputs

    def forward(self, *args, **kwargs):
        self.hidden = args[0] if args else kwargs.pop("hidden_states")
        self.call = args[1:], kwargs
        return as_output(self.hidden, self.n_outputs)


def layer_calls(parts: Anatomy, **inputs) -> tuple[torch.Tensor, dict[int, Call]]:
    """The residual stream before the first layer, [B, T, C], and how the decoder calls each layer i.

    inputs: of the decoder. The layers themselves do not run.
    """
    running = {i: layer for i, layer in enumerate(parts.layers) if parts.splits[i] is not None}
    recorders = {i: _Recorder(layer, parts.splits[i].n_outputs) for i, layer in running.items()}
    with exclusive(parts.decoder), ExitStack() as undo:
        for i, recorder in recorders.items():
            put(undo, parts.layer_list, str(parts.places[i]), recorder)
        parts.decoder(**inputs, use_cache=False)
    first = next(iter(recorders.values()))
    return vars(first)["hidden"], {i: vars(recorder)["call"] for i, recorder in recorders.items()}


def run_layer(parts: Anatomy, i: int, hidden: torch.Tensor, call: Call, without: Sequence[str] = ()) -> torch.Tensor:
    """The residual stream after layer i, [B, T, C], its live sublayers named in `without` ("attn", "mlp") left out."""
    args, kwargs = call
    with exclusive(parts.decoder), ExitStack() as undo:
        for kind in without:
            if parts.has(kind, i):
                put_stubs(undo, parts.layers[i], parts.sublayer(kind, i))
        out = parts.layers[i](hidden, *args, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def runs_by_layer(model: nn.Module, parts: Anatomy) -> bool:
    """Whether layers run one by one give what the model gives: they hand each other the stream, and no more."""
    ids = torch.arange(8, device=model.get_input_embeddings().weight.device)[None] + 3
    try:
        hidden, calls = layer_calls(parts, input_ids=ids)
        for i, split in enumerate(parts.splits):
            if split is not None:
                hidden = run_layer(parts, i, hidden, calls[i])
        by_layer = head_logits(model, parts, hidden)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError):
        return False
    logits = model(input_ids=ids, use_cache=False).logits
    return not logits.isfinite().all() or is_close(by_layer, logits, model.dtype)  # others refuse what is not finite


def is_close(logits: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether logits are the same but for the rounding of a model's type."""
    expected = expected.to(logits.device).float()
    off = (logits.float() - expected).square().mean().sqrt()
    return bool(off <= max(1e-4, 4 * torch.finfo(dtype).eps) * expected.std())


class _Given(StandIn):
    """Gives a residual stream, whatever it is called with."""

    def __init__(self, layer: nn.Module, hidden: torch.Tensor, n_outputs: int):
        super().__init__(layer)
        self.output = as_output(hidden, n_outputs)

    def forward(self, *args, **kwargs):
        return self.output


_FINAL: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()  # by model, the name of its final norm


def head_logits(model: nn.Module, parts: Anatomy, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [..., vocabulary] in float32 from the residual stream after the last layer, [..., C].

    By the final norm and the output matrix where these are all that the model does, which is tried once; else by the
    model's own forward pass, so that scales and caps are its own.
    """
    if model not in _FINAL:
        rows = torch.randn(3, hidden.shape[-1], generator=torch.Generator().manual_seed(0)).to(hidden)
        expected = _logits_by_forward(model, parts, rows)
        norms = [name for name, child in parts.decoder.named_children() if getattr(child, "weight", None) is not None]
        _FINAL[model] = None
        for name in norms:
            try:  # in the shape in which the model does it
                logits = model.get_output_embeddings()(parts.decoder.get_submodule(name)(rows[:, None]))[:, 0].float()
            except (RuntimeError, TypeError, ValueError, IndexError):
                continue
            # to the bit: a soft cap is less than the rounding of bfloat16
            if torch.equal(logits, expected.to(logits.device)):
                _FINAL[model] = name
    if _FINAL[model] is None:
        return _logits_by_forward(model, parts, hidden)
    return model.get_output_embeddings()(parts.decoder.get_submodule(_FINAL[model])(hidden)).float()


def _logits_by_forward(model: nn.Module, parts: Anatomy, hidden: torch.Tensor) -> torch.Tensor:
    """Logits as the model makes them, of layers that give this stream."""
    rows = hidden.reshape(-1, 1, hidden.shape[-1])  # texts of one token
    with exclusive(parts.decoder), ExitStack() as undo:
        for i, split in enumerate(parts.splits):
            if split is not None:
                put(undo, parts.layer_list, str(parts.places[i]), _Given(parts.layers[i], rows, split.n_outputs))
        ids = torch.zeros(rows.shape[:2], dtype=torch.long, device=model.get_input_embeddings().weight.device)
        logits = model(input_ids=ids, use_cache=False).logits
    return logits.reshape(*hidden.shape[:-1], -1).float()


def in_float64(x: torch.Tensor) -> torch.Tensor:
    """The tensor in float64; on the CPU where its device has none (Apple's MPS)."""
    return x.cpu().double() if x.device.type == "mps" else x.double()


def not_finite(kind: str, i: int) -> str:
    """The complaint about the "attn", "mlp" or "block" of layer i."""
    return f"layer {i}'s {kind} gives values that are not finite on this text. {NOT_FINITE}"


class SublayerRun:
    """Takes the residual streams of a whole calibration set through one sublayer after the other, without dropout.

    Raises ValueError for a model whose layers hand each other more than the residual stream.

    start: streams before the first layer, one per batch, each [B, T, C]. masks: [B, T] per batch, 0 for padding.
    """

    def __init__(self, model: nn.Module, parts: Anatomy, calibration: Calibration, batch_size: int):
        self.parts = parts
        self.start: list[torch.Tensor] = []
        self.calls: list[dict[int, Call]] = []
        self.masks: list[torch.Tensor] = []
        model = unwrapped(model)
        calibration = read_by(model, calibration)
        with eval_mode(model):
            if not runs_by_layer(model, parts):
                raise ValueError(
                    f"the layers of this {model.config.model_type!r} model hand each other more than the residual "
                    "stream, so that they cannot be run one by one, as this needs; score and drop work, and evaluation"
                )
            for _, inputs in batches(calibration, batch_size, model.get_input_embeddings().weight.device):
                hidden, calls = layer_calls(parts, **inputs)
                self.start.append(hidden)
                self.calls.append(calls)
                self.masks.append(inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])))

    def through(
        self, streams: list[torch.Tensor], kind: str, i: int, read: list[torch.Tensor] | None = None
    ) -> list[torch.Tensor]:
        """The streams after the "attn" or "mlp" sublayer of layer i.

        read: a list that collects, per batch, what the sublayer's last matrix reads, [B, T, H]. Raises ValueError
        naming the sublayer where the streams after it are not finite.
        """
        if self.parts.splits[i].carry != 1:
            raise ValueError(
                f"layer {i} scales the residual stream, so that its attention and MLP cannot be run apart, as this "
                "needs; score and drop work, and evaluation"
            )
        other = "mlp" if kind == "attn" else "attn"
        with ExitStack() as undo:
            undo.enter_context(eval_mode(self.parts.layers[i]))
            if read is not None:
                last = output_matrix(self.parts, i, kind)
                handle = last.register_forward_pre_hook(lambda module, args: read.append(args[0]))
                undo.callback(handle.remove)
            pairs = zip(streams, self.calls, strict=True)
            out = [run_layer(self.parts, i, x, calls[i], [other]) for x, calls in pairs]
        self.check_finite(out, kind, i)
        if read is not None:  # OPT flattens [B, T, C] before its MLP
            read[:] = [h.view(*x.shape[:2], -1) for h, x in zip(read, streams, strict=True)]
        return out

    def check_finite(self, streams: list[torch.Tensor], kind: str, i: int) -> None:
        """ValueError unless these streams, after a sublayer or block, are finite at all tokens but padding."""
        for x, mask in zip(streams, self.masks, strict=True):
            if not x[mask.bool().to(x.device)].isfinite().all():
                raise ValueError(not_finite(kind, i))
