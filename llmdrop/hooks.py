"""Watch the residual stream of a stock model layer by layer, keeping nothing."""

import threading
from collections.abc import Callable
from contextlib import ExitStack

import torch

from .anatomy import exclusive, find_anatomy
from .proof import Call, Split, Sublayer, first_tensor, measured_scales

Scale = float | torch.Tensor  # a number, or [C]
Scales = tuple[Scale, list[Scale], list[Scale]]  # of x, and of the writers of attention and MLP


class ResidualTap:
    """Calls `on_layer(i, x, m, y, f_attn, f_mlp)` as each decoder layer i finishes.

    x: residual stream entering the layer; m: between its attention and its MLP (None if they are parallel); y: leaving
    it; f_attn, f_mlp: what the two sublayers add, with the layer's scales (None where there is none). All [B, T, C], in
    the model's dtype, on the layer's device, and only alive during the call. Hooks are removed on exit, also after an
    exception. In the first sample of each run y must be the sum of x and of what is added to it, to the rounding of its
    type; else the forward pass raises RuntimeError. Threads tap a model one after the other; what another thread runs
    meanwhile is not seen.

        with ResidualTap(model, lambda i, x, m, y, f_attn, f_mlp: print(i, x.norm())):
            model(input_ids)
    """

    def __init__(self, model: torch.nn.Module, on_layer: Callable):
        self.parts = find_anatomy(model)
        self.on_layer = on_layer
        self.hooks = ExitStack()
        self.seen: dict[str, torch.Tensor] = {}  # of the layer that is running, by module; "" for the layer
        self.scales: dict[int, Scales] = {}  # of the layers that have run

    def __enter__(self) -> "ResidualTap":
        with ExitStack() as hooks:
            hooks.enter_context(exclusive(self.parts.decoder))
            self.thread = threading.get_ident()

            def watch(register: Callable, hook: Callable, **options) -> None:
                hooks.callback(register(self._of_this_thread(hook), **options).remove)

            for i, split in enumerate(self.parts.splits):
                if split is None:
                    continue
                layer = self.parts.layers[i]
                watch(layer.register_forward_pre_hook, self._start(i), with_kwargs=True)
                for kind in ("attn", "mlp"):
                    for name in getattr(split, kind).writers if self.parts.has(kind, i) else ():
                        writer = layer.get_submodule(name)
                        watch(writer.register_forward_hook, self._keep_output(name, split.overwrites))
                watch(layer.register_forward_hook, self._finish(i))
            self.hooks = hooks.pop_all()
        return self

    def __exit__(self, *exc) -> None:
        self.hooks.close()
        self.seen = {}

    def carried(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """x as layer i, which has run, adds to it."""
        return _times(self.scales[i][0], x)

    def _of_this_thread(self, hook: Callable) -> Callable:
        """The hook, which sees nothing of what another thread runs."""

        def guarded(*args) -> None:
            if threading.get_ident() == self.thread:
                hook(*args)

        return guarded

    def _start(self, i: int) -> Callable:
        def hook(layer, args, kwargs):
            x = args[0] if args else kwargs["hidden_states"]
            if i not in self.scales:
                rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
                self.scales[i] = _scales(layer, self.parts.splits[i], x, (args[1:], rest))
            self.seen = {"x": x.clone() if self.parts.splits[i].overwrites else x}

        return hook

    def _keep_output(self, name: str, copied: bool) -> Callable:
        def hook(module, args, output):
            tensor = first_tensor(output)
            self.seen[name] = tensor.clone() if copied else tensor

        return hook

    def _finish(self, i: int) -> Callable:
        split = self.parts.splits[i]
        checked = False

        def hook(module, args, output):
            nonlocal checked
            seen, self.seen = self.seen, {}
            y = first_tensor(output)
            x = seen["x"].to(y.device)  # of a model over several GPUs accelerate moves it inside the layer
            carry, attn_scales, mlp_scales = self.scales[i]
            f_attn = _added(split.attn, attn_scales, seen, x)
            f_mlp = _added(split.mlp, mlp_scales, seen, x)
            if not checked:
                self._check_sum(i, x, y, carry, f_attn, f_mlp)
                checked = True
            m = None
            if not split.parallel:
                m = _times(carry, x) if f_attn is None else _times(carry, x) + f_attn
            self.on_layer(i, x, m, y, f_attn, f_mlp)

        return hook

    def _check_sum(self, i: int, x, y, carry, f_attn, f_mlp) -> None:
        """Of one sample: all of a batch would cost a few percent of a short run."""
        x, y, f_attn, f_mlp = (term if term is None else term[:1] for term in (x, y, f_attn, f_mlp))
        terms = [term.float() for term in (_times(carry, x), f_attn, f_mlp) if term is not None]
        size = sum(term.abs() for term in terms)
        off = (sum(terms) - y.float()).abs()
        rounding = max(torch.finfo(term.dtype).eps for term in (x, y, f_attn, f_mlp) if term is not None)
        if (off > 8 * rounding * size + 1e-30).any():  # what is not finite is no sum, either, and compares as False
            raise RuntimeError(
                f"layer {i} ({type(self.parts.layers[i]).__name__}) does not give the sum of its input and of what its "
                f"attention and MLP add, as a copy of it did: off by {off.nan_to_num().max():.2g}. Something changes "
                "its forward pass (an adapter, a hook, a patch); take that away first"
            )


def _added(sublayer: Sublayer | None, scales: list[Scale], seen: dict, x: torch.Tensor) -> torch.Tensor | None:
    """What a sublayer adds to the stream, [B, T, C], or None where it is dropped or the layer has none."""
    if sublayer is None or sublayer.writers[0] not in seen:
        return None
    terms = [_times(scale, seen[name].view_as(x)) for name, scale in zip(sublayer.writers, scales, strict=True)]
    return sum(terms[1:], terms[0])


def _times(scale: Scale, values: torch.Tensor) -> torch.Tensor:
    return values if isinstance(scale, float) and scale == 1 else scale * values


def _scales(layer: torch.nn.Module, split: Split, x: torch.Tensor, call: Call) -> Scales:
    """What the layer multiplies its input and each writer by. Where weights decide that, the layer runs to show it."""
    known = [split.carry, *(scale for part in (split.attn, split.mlp) if part for scale in part.scales or (None,))]
    if None in known:
        return measured_scales(layer, split, x, call)
    return split.carry, list(split.attn.scales if split.attn else ()), list(split.mlp.scales if split.mlp else ())
