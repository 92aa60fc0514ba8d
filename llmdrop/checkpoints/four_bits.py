"""4-bit weights for a model, dropped or not (the paper's Table 11), by a library: bitsandbytes, on CPUs and CUDA.

Every matrix of the decoder layers becomes 4-bit numbers with one scale for each group of weights in a row; embedding,
head and norms stay as they are. A matrix is rounded by its own weights alone, so the order of quantizing and dropping
makes no difference.
"""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

from ..anatomy import find_layers, unwrapped
from ..proof import is_gone
from ..prune import put
from .extras import import_extra

ALGORITHMS = ("nf4", "fp4")  # quantiles of a normal distribution (Dettmers et al. 2023); 4-bit floating point
GROUPS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
INSTALL = "pip install bitsandbytes==0.50.2"


@contextmanager
def quantized(
    model: nn.Module, algorithm: str = "nf4", group_size: int = 64, exact: bool = True, unpacked: bool = False
) -> Iterator[nn.Module]:
    """`quantize` for the length of a `with` block; modules and config are as before afterwards, on every path.

    unpacked: plain matrices that hold the rounded weights: the results of exact=True at the speed and size of the
    unquantized model. Can be nested with `dropped`, either way round. Raises what `quantize` raises.
    """
    with _quantized(model, algorithm, group_size, exact, unpacked):
        yield model


def quantize(model: nn.Module, algorithm: str = "nf4", group_size: int = 64, exact: bool = True) -> nn.Module:
    """Replace the matrices of the decoder layers by 4-bit ones, in place, and return the model.

    model: whole or dropped (but not inside of `dropped`, which could not put it back). algorithm: one of ALGORITHMS.
    group_size: weights to a float32 scale, one of GROUPS that divides the width of every matrix; 64 make 4.5 bits a
    weight. exact: see `arithmetic`. `save_model` and `load_model` take the result, with or without dropped layers.

    Raises ImportError without bitsandbytes; ValueError for an unknown algorithm, a group size that does not fit, and a
    model that is quantized already or cannot be. The model is unchanged then.
    """
    _quantized(model, algorithm, group_size, exact, unpacked=False)
    return model


def _quantized(model: nn.Module, algorithm: str, group_size: int, exact: bool, unpacked: bool) -> ExitStack:
    """Quantize, and return what restores the model when it is closed. Where that fails, the model is restored."""
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm {algorithm!r} is not one of {', '.join(ALGORITHMS)}")
    model = unwrapped(model, with_adapters=False)
    bnb = library()
    matrices = [place for place in _modules(model) if _is_matrix(place[2])]
    _check(model, [_weight(matrix) for *_, matrix in matrices], group_size, bnb)
    with ExitStack() as undo:
        for owner in (model, model.config):  # attributes are what they were, and no others
            undo.callback(vars(owner).update, dict(vars(owner)))
            undo.callback(vars(owner).clear)  # runs first
        for layer, name, former in matrices:
            parent, _, child = name.rpartition(".")
            new = _packed(bnb, former, model.dtype, algorithm, group_size)
            put(undo, layer.get_submodule(parent), child, new)
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=algorithm,
            bnb_4bit_compute_dtype=model.dtype,
            # what transformers must leave alone when it loads, also in 4 bits: the matrices outside of the layers
            llm_int8_skip_modules=[name for name, module in model.named_modules() if _is_matrix(module)],
        )
        model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
        model.hf_quantizer.postprocess_model(model)  # from here on transformers takes the model for what it is
        model.config.quantized_by = f"bitsandbytes {version('bitsandbytes')}, {algorithm}, groups of {group_size}"
        if unpacked:
            dequantize(model)
        else:
            arithmetic(model, exact)
        return undo.pop_all()


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
    return import_extra("bitsandbytes", "four-bits")


def _is_matrix(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, Conv1D)


def _is_packed(module: nn.Module) -> bool:
    return hasattr(getattr(module, "weight", None), "quant_state")


def _modules(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """(decoder layer, name in it, module) of every module in a decoder layer."""
    layers = [layer for layer in find_layers(model)[1] if not is_gone(layer)]
    return [(layer, name, module) for layer in layers for name, module in layer.named_modules()]


def _weight(matrix: nn.Module) -> torch.Tensor:
    """The weight of a plain matrix, [out, in]."""
    return matrix.weight.T if isinstance(matrix, Conv1D) else matrix.weight


def _check(model: nn.Module, weights: list[torch.Tensor], group_size: int, bnb) -> None:
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError("this model is quantized already; load_model the original, or `dequantize` this one")
    if not weights:
        raise ValueError(f"this {model.config.model_type!r} model has no matrix in its layers to quantize")
    if group_size not in GROUPS:
        raise ValueError(f"group_size={group_size} is not one of {', '.join(map(str, GROUPS))}")
    widths = sorted({weight.shape[1] for weight in weights})
    fitting = [str(size) for size in GROUPS if all(width % size == 0 for width in widths)]
    if str(group_size) not in fitting:
        raise ValueError(
            f"groups of {group_size} weights do not divide this model's matrices of widths {widths}; "
            f"use one of {', '.join(fitting) or 'none, as nothing fits'}"
        )
    devices = {weight.device.type for weight in weights}
    if not devices <= set(bnb.supported_torch_devices):
        raise ValueError(
            f"bitsandbytes does not quantize on {', '.join(sorted(devices))}; move the model to one of "
            f"{', '.join(sorted(bnb.supported_torch_devices))}"
        )


def arithmetic(model: nn.Module, exact: bool = True) -> nn.Module:
    """exact: multiply by the rounded weights in the model's own type. Not: as bitsandbytes likes it best.

    That only differs on CPUs with AVX512-BF16, where bitsandbytes repacks weights at the first forward pass and
    multiplies in bfloat16: decoding is three times as fast, but numbers depend on the machine, and there is no way
    back: bitsandbytes 0.50.2 would save the scales in another order, so saving raises ValueError.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = not exact and library().functional.has_avx512bf16()
    vars(model.hf_quantizer).pop("is_serializable", None)
    vars(model.config).pop("arithmetic", None)
    if not exact:
        model.hf_quantizer.is_serializable = lambda: False
        model.config.arithmetic = f"bitsandbytes {version('bitsandbytes')}"  # enters the keys of the store
    return model


def settle(model: nn.Module) -> None:
    """After transformers has loaded 4-bit weights: exact arithmetic, and a model that can be saved again."""
    arithmetic(model)
    for step in list(getattr(model, "_weight_conversions", None) or ()):
        operations = [type(operation).__name__ for operation in getattr(step, "operations", ())]
        if "Bnb4bitDeserialize" in operations:  # transformers 5.23 cannot undo this one, and need not
            model._weight_conversions.remove(step)


def dequantize(model: nn.Module) -> nn.Module:
    """Put plain matrices that hold the rounded weights where the 4-bit ones are, in place, and return the model.

    Results are those of `quantize(exact=True)`. ValueError without 4-bit weights.
    """
    if not any(_is_packed(module) for module in model.modules()):
        raise ValueError(f"this {model.config.model_type!r} model holds no 4-bit weights of bitsandbytes to dequantize")
    model.dequantize(model.dtype)
    model.is_loaded_in_4bit = False  # transformers leaves it set
    return model


def size(model: nn.Module) -> dict[str, float]:
    """What is left of a model: "bytes" of all weights, scales included, a tied head counted once, and "matrix_bits",
    bits per weight of the matrices of the decoder layers, scales included."""
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    matrices = [module for _, _, module in _modules(model) if _is_matrix(module) or _is_packed(module)]
    held = 0
    n_weights = 0
    for matrix in matrices:
        held += sum(tensor.nbytes for name, tensor in matrix.state_dict().items() if name.startswith("weight"))
        n_weights += (matrix.weight.quant_state if _is_packed(matrix) else matrix.weight).shape.numel()
    return {"bytes": sum(tensors.values()), "matrix_bits": 8 * held / n_weights}
