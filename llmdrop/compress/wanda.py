"""Wanda (Sun et al. 2023, arXiv 2306.11695): zero the single weights that matter least, to compare dropping with.

Nothing is retrained. The matrices keep their shapes, so that dense kernels take as long as before.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..anatomy import Anatomy, find_anatomy, unwrapped
from ..calibration import Calibration
from ..checkpoints.digest import weights_digest
from ..plan import DropPlan
from ..prune import dropped, eval_mode
from ..sublayers import SublayerRun, in_float64, not_finite, run_layer

VERSION = 1  # of the zeros: raised when others are found

Zeros = dict[str, torch.Tensor]  # "<layer>.<linear>" -> the inputs that each row loses, int32 [rows, k]


@dataclass(frozen=True)
class WandaMask:
    """Sparsity by Wanda: the share of the weights of every row to zero, and the text that says which."""

    share: float
    calibration: Calibration
    sequential: bool = True
    batch_size: int = 8
    _found: WeakKeyDictionary = field(default_factory=WeakKeyDictionary, init=False, repr=False, compare=False)

    def __post_init__(self):
        _check_share(self.share)
        object.__setattr__(self, "share", float(self.share))  # of numpy's, too: the key is JSON

    @property
    def label(self) -> str:
        return f"Wanda {100 * self.share:.3g} %"

    @property
    def key(self) -> dict:
        """What tells it from others, as plain JSON."""
        settings = {"share": self.share, "sequential": self.sequential}
        return settings | {"text": self.calibration.digest, "version": VERSION}

    def zeros(self, model: nn.Module) -> Zeros:
        """`wanda` of this model, remembered for as long as the model and its weights."""
        of_weights = self._found.setdefault(model, {})
        digest = weights_digest(model)
        if digest not in of_weights:
            of_weights[digest] = wanda(model, self.calibration, self.share, self.batch_size, self.sequential)
        return of_weights[digest]

    def applied(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """`zeroed` with this model's zeros. Raises what `wanda` raises."""
        return zeroed(model, self.zeros(model))


def lowest(weight: torch.Tensor, norms: torch.Tensor, share: float) -> torch.Tensor:
    """Which weights of each row score lowest: int32 [rows, k], k = round(share * inputs), from weight [rows, inputs].

    norms: ||x_j|| of each input, [inputs]. Of equal scores the first inputs go. (The authors round k down.)
    """
    k = round(share * weight.shape[1])
    score = weight.abs().float() * norms
    found = score.topk(min(k + 1, weight.shape[1]), largest=False)
    index = found.indices[:, :k]
    if 0 < k < weight.shape[1]:
        tied = found.values[:, k - 1] == found.values[:, k]  # topk says nothing about which of them it takes
        index[tied] = score[tied].sort(dim=1, stable=True).indices[:, :k]
    return index.int()


@torch.inference_mode()
def wanda(
    model: nn.Module, calibration: Calibration, share: float, batch_size: int = 8, sequential: bool = True
) -> Zeros:
    """Find the `share` (from 0 to below 1) of the weights of every row that Wanda zeroes. The model is not changed.

    The score of a weight is |W_ij| ||x_j||_2, where x_j is what its input j reads over all calibration tokens. In every
    row of every linear layer of the decoder's live layers those that score lowest go. As in the authors' code, the
    norms of a layer are taken with the layers before it pruned; sequential=False takes all norms in the unpruned model.
    Takes two forward passes over the calibration text, and besides the model the memory of its residual streams.

    Raises ValueError for a share out of range, an unknown architecture, weights that are no plain matrices (quantized
    ones), or activations that are not finite, naming the layer.
    """
    _check_share(share)
    model = unwrapped(model, with_adapters=False)
    parts = find_anatomy(model)
    matrices = linears(parts)
    zeros: Zeros = {}
    with ExitStack() as undo:
        undo.enter_context(eval_mode(model))
        run = SublayerRun(model, parts, calibration, batch_size)
        streams = run.start
        for i, layer in enumerate(parts.layers):
            if layer is None:
                continue
            of_layer = {name: module for name, module in matrices.items() if name.startswith(f"{i}.")}
            after, norms = _through_layer(run, i, streams, of_layer)
            for name, module in of_layer.items():
                if not norms[name].isfinite().all():
                    raise ValueError(not_finite("block", i))
                zeros[name] = lowest(_rows(module), norms[name], share)
                if sequential:
                    _zero(undo, module, zeros[name])
            streams = _through_layer(run, i, streams, {})[0] if sequential else after
    return zeros


def _check_share(share: float) -> None:
    if not 0 <= share < 1:
        raise ValueError(f"share={share}; give the share of the weights to zero, from 0 to below 1")


def _through_layer(
    run: SublayerRun, i: int, streams: list[torch.Tensor], matrices: dict[str, nn.Module]
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """(The streams after layer i, ||x_j|| of what each matrix reads at all tokens but padding, [inputs].)"""
    squares: dict[str, torch.Tensor | float] = dict.fromkeys(matrices, 0.0)
    read: dict[str, torch.Tensor] = {}  # of the batch that runs
    after = []

    def keep(name: str, module: nn.Module, args: tuple) -> None:
        read[name] = args[0]

    with ExitStack() as hooks:
        for name, module in matrices.items():
            hooks.callback(module.register_forward_pre_hook(partial(keep, name)).remove)
        for x, calls, mask in zip(streams, run.calls, run.masks, strict=True):
            after.append(run_layer(run.parts, i, x, calls[i]))
            for name, inputs in read.items():
                real = inputs.reshape(-1, inputs.shape[-1]).float()[mask.bool().flatten().to(inputs.device)]
                squares[name] = squares[name] + in_float64(real.square().sum(0))
    run.check_finite(after, "block", i)
    return after, {name: total.sqrt().float() for name, total in squares.items()}


def linears(parts: Anatomy) -> dict[str, nn.Module]:
    """The linear layers of all live sublayers: "<layer>.<name in the layer>" -> nn.Linear or (GPT-2) Conv1D."""
    found = {}
    for i, layer in enumerate(parts.layers):
        for name, module in layer.named_modules() if layer is not None else ():
            matrices = [p for p in module.parameters(recurse=False) if p.ndim > 1]
            if not matrices:
                continue
            if not isinstance(module, nn.Linear | Conv1D) or not module.weight.is_floating_point():
                raise ValueError(
                    f"layer {i}'s {name} is a {type(module).__name__} of {matrices[0].dtype}, no plain matrix: Wanda "
                    "scores single weights, so it needs a model that is not quantized"
                )
            found[f"{i}.{name}"] = module
    return found


def _rows(module: nn.Module) -> torch.Tensor:
    """The weight as [outputs, inputs], sharing its memory."""
    return module.weight.data.T if isinstance(module, Conv1D) else module.weight.data


@contextmanager
def zeroed(model: nn.Module, zeros: Zeros) -> Iterator[nn.Module]:
    """The model with these weights zero; every bit is restored afterwards, also after an exception.

    Raises ValueError for zeros that were found in a model with other layers; the model is unchanged then.
    """
    matrices = linears(find_anatomy(model))
    for name, module in matrices.items():
        rows, inputs = _rows(module).shape
        index = zeros.get(name)
        if index is None or len(index) != rows or (index.numel() and index.max() >= inputs):
            raise ValueError(f"these zeros are of another model: none fit its {name} of {(rows, inputs)}; find its own")
    with ExitStack() as undo:
        for name, module in matrices.items():
            _zero(undo, module, zeros[name])
        yield model


@torch.no_grad()
def _zero(undo: ExitStack, module: nn.Module, index: torch.Tensor) -> None:
    rows = _rows(module)
    former = rows.gather(1, index.long())

    def put_back() -> None:
        rows.scatter_(1, index.long(), former)

    undo.callback(put_back)  # keeps the indices as they are: 64-bit ones of a whole model would be larger than it
    rows.scatter_(1, index.long(), 0)


def removed_share(model: nn.Module, plan: DropPlan) -> float:
    """The share of the weights of the layers' linear layers (no embedding, head, norms, biases) that `plan` removes."""
    whole = _n_weights(model)
    with dropped(model, plan):
        return 1 - _n_weights(model) / whole


def rounded_share(model: nn.Module, share: float) -> float:
    """The share of the same weights that Wanda zeroes when asked for `share`: it rounds in every row."""
    shapes = [_rows(module).shape for module in linears(find_anatomy(model)).values()]
    return sum(rows * round(share * inputs) for rows, inputs in shapes) / _n_weights(model)


def _n_weights(model: nn.Module) -> int:
    return sum(module.weight.numel() for module in linears(find_anatomy(model)).values())
