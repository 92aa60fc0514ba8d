"""Watch the residual stream of a stock model layer by layer, keeping nothing."""

import threading
from collections.abc import Callable
from contextlib import ExitStack
from weakref import WeakKeyDictionary

import torch

from .anatomy import find_anatomy

_LOCKS: WeakKeyDictionary[torch.nn.Module, threading.RLock] = WeakKeyDictionary()  # one for each decoder


class ResidualTap:
    """Calls `on_layer(i, x, m, y, f_attn, f_mlp)` as each decoder layer i finishes.

    x: residual stream entering the layer; m: between its attention and its MLP (None if they are parallel); y: leaving
    it; f_attn, f_mlp: what the two sublayers add (None where dropped). All [B, T, C], in the model's dtype, on the
    layer's device, and only alive during the call. Hooks are removed on exit, also after an exception. Threads tap a
    model one after the other; what another thread runs meanwhile is not seen.

        with ResidualTap(model, lambda i, x, m, y, f_attn, f_mlp: print(i, x.norm())):
            model(input_ids)
    """

    def __init__(self, model: torch.nn.Module, on_layer: Callable):
        self.parts = find_anatomy(model)
        self.on_layer = on_layer
        self.hooks = ExitStack()
        self.seen: dict[str, torch.Tensor] = {}  # of the layer that is running

    def __enter__(self) -> "ResidualTap":
        layout = self.parts.layout
        with ExitStack() as hooks:
            hooks.enter_context(_LOCKS.setdefault(self.parts.decoder, threading.RLock()))
            self.thread = threading.get_ident()
            for i, layer in enumerate(self.parts.layers):
                if layer is None:
                    continue
                mlp_in = layer.get_submodule(layout.mlp[0])
                attn_out = layer.get_submodule(layout.attn[-1])
                mlp_out = layer.get_submodule(layout.mlp[-1])
                handles = [
                    layer.register_forward_pre_hook(self._keep_input("x"), with_kwargs=True),
                    mlp_in.register_forward_pre_hook(self._keep_input("m"), with_kwargs=True),
                    attn_out.register_forward_hook(self._keep_output("f_attn")),
                    mlp_out.register_forward_hook(self._keep_output("f_mlp")),
                    layer.register_forward_hook(self._finish(i)),
                ]
                for handle in handles:
                    hooks.callback(handle.remove)
            self.hooks = hooks.pop_all()
        return self

    def __exit__(self, *exc) -> None:
        self.hooks.close()
        self.seen = {}

    def _keep_input(self, name: str) -> Callable:
        def hook(module, args, kwargs):
            if threading.get_ident() == self.thread:
                self.seen[name] = args[0] if args else kwargs["hidden_states"]

        return hook

    def _keep_output(self, name: str) -> Callable:
        def hook(module, args, output):
            if threading.get_ident() == self.thread:
                self.seen[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def _finish(self, i: int) -> Callable:
        plan, parallel = self.parts.plan, self.parts.parallel

        def hook(module, args, output):
            if threading.get_ident() != self.thread:
                return
            seen, self.seen = self.seen, {}
            y = output[0] if isinstance(output, tuple) else output
            x = seen["x"].to(y.device)  # of a model over several GPUs accelerate moves it inside the layer
            m = None if parallel else seen["m"].view_as(x)  # OPT flattens [B, T, C] to [B * T, C] before its MLP
            f_attn = None if i in plan.attn else seen["f_attn"].view_as(x)
            f_mlp = None if i in plan.mlp else seen["f_mlp"].view_as(x)
            self.on_layer(i, x, m, y, f_attn, f_mlp)

        return hook
