"""4-bit weights for a model, dropped or not (the paper's Table 11), by a library: bitsandbytes, on CPUs and CUDA.

Every matrix of the decoder layers becomes 4-bit numbers with one scale for each group of weights in a row; embedding,
head and norms stay as they are. A matrix is rounded by its own weights alone, so a dropped layer is simply not there:
quantize first and drop afterwards, or the other way round, the result is the same to the bit.
"""

import importlib
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

from ..anatomy import find_anatomy
from ..plan import DropPlan
from ..prune import dropped, put

ALGORITHMS = {
    "nf4": "16 levels at the quantiles of a normal distribution (Dettmers et al. 2023, QLoRA)",
    "fp4": "4-bit floating point, the default of transformers' BitsAndBytesConfig",
}
GROUPS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
INSTALL = "pip install bitsandbytes==0.50.2"


@contextmanager
def quantized(
    model: nn.Module, algorithm: str = "nf4", group_size: int = 64, exact: bool = True, unpacked: bool = False
) -> Iterator[nn.Module]:
    """`quantize` for the length of a `with` block; modules and config are as before afterwards, on every path.

    unpacked: no 4-bit matrices but plain ones that hold the rounded weights. Results are those of exact=True, at the
    speed and size of the unquantized model: for evaluating on CPUs, where unpacking weights at every pass takes longer
    than multiplying by them. Can be nested with `dropped`, either way round. Raises what `quantize` raises.
    """
    with _quantized(model, algorithm, group_size, exact, unpacked):
        yield model


def quantize(model: nn.Module, algorithm: str = "nf4", group_size: int = 64, exact: bool = True) -> nn.Module:
    """Replace the matrices of the decoder layers by 4-bit ones, in place, and return the model.

    model: any that llmdrop knows, whole or dropped (but not inside of `dropped`, which could not put it back).
    algorithm: a key of ALGORITHMS. group_size: weights to a scale, one of GROUPS; it must divide the width of every
    matrix. Scales are float32, so groups of 64 make 4.5 bits a weight. exact: see `arithmetic`. The result is saved by
    `save_model` and loaded by `load_model`, with or without dropped layers.

    Raises ImportError without bitsandbytes; ValueError for an unknown algorithm, a model that is quantized already, has
    nothing to quantize or is on a device that bitsandbytes does not know, and for a group size that does not fit. The
    model is unchanged then.
    """
    _quantized(model, algorithm, group_size, exact, unpacked=False)
    return model


def _quantized(model: nn.Module, algorithm: str, group_size: int, exact: bool, unpacked: bool) -> ExitStack:
    """Quantize, and return what restores the model when it is closed. Where that fails, the model is restored."""
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm {algorithm!r} is not one of {', '.join(ALGORITHMS)}")
    bnb = library()
    matrices = [place for place in _modules(model) if _is_matrix(place[2])]
    _check(model, [_weight(matrix) for *_, matrix in matrices], group_size, bnb)
    with ExitStack() as undo:
        _keep_attributes(undo, model)
        _keep_attributes(undo, model.config)
        for layer, name, former in matrices:
            parent, _, child = name.rpartition(".")
            new = _packed(bnb, former, model.dtype, algorithm, group_size)
            put(undo, layer.get_submodule(parent), child, new)
        inside = {id(module) for _, _, module in _modules(model)}
        outside = [name for name, other in model.named_modules() if _is_matrix(other) and id(other) not in inside]
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=algorithm,
            bnb_4bit_compute_dtype=model.dtype,
            llm_int8_skip_modules=outside,  # says what transformers must leave alone when it loads, also in 4 bits
        )
        model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
        model.hf_quantizer.postprocess_model(model)  # from here on transformers takes the model for what it is
        model.config.quantized_by = f"bitsandbytes {version('bitsandbytes')}, {algorithm}, groups of {group_size}"
        if unpacked:
            dequantize(model)
        else:
            arithmetic(model, exact)
        return undo.pop_all()


def _keep_attributes(undo: ExitStack, owner) -> None:
    """`undo` gives an object the attributes that it has now, and no others."""
    former = dict(vars(owner))
    undo.callback(vars(owner).update, former)
    undo.callback(vars(owner).clear)  # runs first


def _packed(bnb, former: nn.Module, dtype: torch.dtype, algorithm: str, group_size: int) -> nn.Module:
    """A matrix in 4 bits, with the bias of the former one. dtype: of what it multiplies."""
    weight = _weight(former)
    rows, width = weight.shape
    with torch.device("meta"):
        new = bnb.nn.Linear4bit(width, rows, False, dtype, False, algorithm)
    rounded = bnb.nn.Params4bit(
        weight.detach().contiguous(), blocksize=group_size, compress_statistics=False, quant_type=algorithm, module=new
    )
    new.weight = rounded.to(weight.device)
    new.bias = former.bias
    new.source_cls = type(former)
    return new.train(former.training)


def library():
    """bitsandbytes. ImportError with the line that installs it."""
    # on some CPUs it says that it found no kernel to download, which nobody asked for
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ImportError(f"4-bit weights are bitsandbytes', which is not here ({error}); `{INSTALL}`") from error


def _is_matrix(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, Conv1D)


def _is_packed(module: nn.Module) -> bool:
    return hasattr(getattr(module, "weight", None), "quant_state")


def _modules(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """(decoder layer, name in it, module) of every module in a decoder layer."""
    layers = [layer for layer in find_anatomy(model).layers if layer is not None]
    return [(layer, name, module) for layer in layers for name, module in layer.named_modules()]


def _weight(matrix: nn.Module) -> torch.Tensor:
    """The weight of a plain matrix, [out, in]."""
    return matrix.weight.T if isinstance(matrix, Conv1D) else matrix.weight


def _check(model: nn.Module, weights: list[torch.Tensor], group_size: int, bnb) -> None:
    former = getattr(model.config, "quantization_config", None)
    if former is not None or not weights:
        what = "is quantized already" if former is not None else "has no matrix in its layers"
        raise ValueError(
            f"this {model.config.model_type!r} model {what}; quantize one with plain weights (load_model of the "
            "original, or `dequantize` this one)"
        )
    if group_size not in GROUPS:
        raise ValueError(f"group_size={group_size} is not one of {', '.join(map(str, GROUPS))}")
    widths = sorted({weight.shape[1] for weight in weights})
    if any(width % group_size for width in widths):
        fits = [size for size in GROUPS if not any(width % size for width in widths)]
        raise ValueError(
            f"groups of {group_size} weights do not divide this model's matrices of widths {widths}; "
            + (f"use one of {', '.join(map(str, fits))}" if fits else f"none of {GROUPS} does")
        )
    unknown = {weight.device.type for weight in weights} - set(bnb.supported_torch_devices)
    if unknown:
        raise ValueError(
            f"bitsandbytes {version('bitsandbytes')} does not quantize on {', '.join(sorted(unknown))}, only on "
            f"{', '.join(sorted(bnb.supported_torch_devices))}; move the model there first"
        )


def arithmetic(model: nn.Module, exact: bool = True) -> nn.Module:
    """exact: multiply by the rounded weights in the model's own type. Not: as bitsandbytes likes it best.

    That only differs on CPUs with AVX512-BF16, where bitsandbytes repacks weights at the first forward pass, rounds
    scales to bfloat16 and multiplies in bfloat16: decoding is three times as fast, but numbers depend on the machine,
    and there is no way back: bitsandbytes 0.50.2 would save the scales in another order, so saving raises ValueError.
    `load_model` sets exact.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = not exact and library().functional.has_avx512bf16()
    vars(model.hf_quantizer).pop("is_serializable", None)
    if not exact:
        model.hf_quantizer.is_serializable = lambda: False
        model.config.arithmetic = f"bitsandbytes {version('bitsandbytes')}"  # enters the keys of the store
    elif hasattr(model.config, "arithmetic"):
        del model.config.arithmetic
    return model


def settle(model: nn.Module) -> None:
    """After transformers has loaded 4-bit weights: exact arithmetic, and a model that can be saved again."""
    arithmetic(model)
    steps = getattr(model, "_weight_conversions", None)  # transformers 5.23 cannot undo this one, and need not
    if steps:
        names = [{type(op).__name__ for op in getattr(step, "operations", ())} for step in steps]
        model._weight_conversions = [s for s, ops in zip(steps, names, strict=True) if "Bnb4bitDeserialize" not in ops]


def dequantize(model: nn.Module) -> nn.Module:
    """Put plain matrices that hold the rounded weights where the 4-bit ones are, in place, and return the model.

    `PreTrainedModel.dequantize`, in the model's own type; the results are those of `quantize(exact=True)`. ValueError
    without 4-bit weights.
    """
    if not any(_is_packed(module) for module in model.modules()):
        raise ValueError(f"this {model.config.model_type!r} model holds no 4-bit weights of bitsandbytes to dequantize")
    model.dequantize(model.dtype)
    model.is_loaded_in_4bit = False  # transformers leaves it set
    return model


def size(model: nn.Module, plan: DropPlan = DropPlan()) -> dict[str, float]:
    """What is left without the plan's layers: "bytes" of all weights, scales included, a tied head counted once, and
    "matrix_bits", bits per weight of the matrices of the decoder layers, scales included."""
    with dropped(model, plan):
        tensors = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
        matrices = [module for _, _, module in _modules(model) if _is_matrix(module) or _is_packed(module)]
    held = 0
    n_weights = 0
    for matrix in matrices:
        held += sum(tensor.nbytes for name, tensor in matrix.state_dict().items() if name.startswith("weight"))
        n_weights += (matrix.weight.quant_state if _is_packed(matrix) else matrix.weight).shape.numel()
    return {"bytes": sum(tensors.values()), "matrix_bits": 8 * held / n_weights}
