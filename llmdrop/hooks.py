"""Watch the residual stream of a stock model layer by layer, keeping nothing; and the text it runs on, in batches."""

from collections.abc import Callable, Iterator

import torch

from .anatomy import anatomy


class ResidualTap:
    """Calls `on_layer(i, x, m, y, f_attn, f_mlp)` as each decoder layer i finishes.

    x: residual stream entering the layer; m: between its attention and its MLP (None if they are parallel); y: leaving
    it; f_attn, f_mlp: what the two sublayers add (None where dropped). All [B, T, C], in the model's dtype, on the
    layer's device, and only alive during the call. Hooks are removed on exit, also after an exception.

        with ResidualTap(model, lambda i, x, m, y, f_attn, f_mlp: print(i, x.norm())):
            model(input_ids)
    """

    def __init__(self, model: torch.nn.Module, on_layer: Callable):
        self.parts, self.on_layer = anatomy(model), on_layer
        self.handles, self.seen = [], {}

    def __enter__(self) -> "ResidualTap":
        parts = self.parts
        for i, layer in enumerate(parts.layers):
            if layer is None:
                continue
            attn_in, attn_out = (layer.get_submodule(parts.layout.attn[k]) for k in (0, -1))
            mlp_in, mlp_out = (layer.get_submodule(parts.layout.mlp[k]) for k in (0, -1))
            self.handles += [
                layer.register_forward_pre_hook(self._keep_input("x"), with_kwargs=True),
                mlp_in.register_forward_pre_hook(self._keep_input("m"), with_kwargs=True),
                attn_out.register_forward_hook(self._keep_output("f_attn")),
                mlp_out.register_forward_hook(self._keep_output("f_mlp")),
                layer.register_forward_hook(self._finish(i)),
            ]
            assert attn_in is not mlp_in
        return self

    def __exit__(self, *exc) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles, self.seen = [], {}

    def _keep_input(self, name: str) -> Callable:
        def hook(module, args, kwargs):
            self.seen[name] = args[0] if args else kwargs["hidden_states"]

        return hook

    def _keep_output(self, name: str) -> Callable:
        def hook(module, args, output):
            self.seen[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def _finish(self, i: int) -> Callable:
        plan, parallel = self.parts.plan, self.parts.parallel

        def hook(module, args, output):
            seen, self.seen = self.seen, {}
            x = seen["x"]
            y = output[0] if isinstance(output, tuple) else output
            m = None if parallel else seen["m"].view_as(x)  # OPT flattens [B, T, C] to [B * T, C] before its MLP
            f_attn = None if i in plan.attn else seen["f_attn"].view_as(x)
            f_mlp = None if i in plan.mlp else seen["f_mlp"].view_as(x)
            self.on_layer(i, x, m, y, f_attn, f_mlp)

        return hook


def batches(calibration, batch_size: int, device) -> Iterator[tuple[slice, dict[str, torch.Tensor]]]:
    """(which samples, a decoder's inputs on `device`), in turn: input_ids [B, T]; where there is padding, on either
    side, also attention_mask and the position_ids that leave it out."""
    for start in range(0, len(calibration.input_ids), batch_size):
        rows = slice(start, start + batch_size)
        inputs = {"input_ids": calibration.input_ids[rows].to(device)}
        if calibration.attention_mask is not None:
            mask = calibration.attention_mask[rows].to(device).long()
            inputs |= {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
        yield rows, inputs
