"""The speed that bytes and FLOPs allow, without a fitted constant: of any plan, on named hardware, at any batch size.

Every pass through the model takes at least the time to read its bytes (weights once, and in decoding the KV cache) and
at least the time to do its FLOPs; the longer of the two is the limit.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import nn

from ..plan import DropPlan
from .geometry import shape_of, whole_plan
from .measure import TIMES, synchronize

VERSION = 1  # of `measure_hardware`: raised when its numbers change
# Data sheets: memory bandwidth (bytes/s), dense 16-bit tensor rate (FLOP/s), memory (bytes)
HARDWARE = {
    "RTX 6000 Ada": (960e9, 364e12, 48e9),
    "A100": (2039e9, 312e12, 80e9),
    "H100": (3350e9, 989e12, 80e9),
    "H200": (4800e9, 989e12, 141e9),
}


@dataclass(frozen=True)
class SpeedLimit:
    """Least time in seconds, and what it is made of. bytes and flops are totals over prefill and decoding."""

    seconds: float
    prefill_seconds: float
    decode_seconds: float
    bytes: float
    flops: float
    kv_bytes: float  # of the full cache at the end
    weight_bytes: float  # of what is left of the model


def predict_speed(
    model: nn.Module | str,
    plan: DropPlan = DropPlan(),
    batch_size: int = 1,
    prompt_len: int = 2048,
    new_tokens: int = 2048,
    hardware: str | tuple[float, float] = "RTX 6000 Ada",
    weight_bits: float = 16,
    cache_bits: float = 16,
    cache: str = "dynamic",
    cache_traffic: float = 1.0,
    windowed: int = 0,
    window: int = 0,
) -> SpeedLimit:
    """Least time for one batch: a prefill of prompt_len tokens and new_tokens decode steps, after dropping `plan`.

    model: a name in GEOMETRIES or a model with gated MLPs; what is dropped from it already counts, `plan` adds to it.
    hardware: a name in HARDWARE, or (bytes/s, FLOP/s). weight_bits: of attention and MLP matrices (4-bit with one
    16-bit scale per 128 weights is 4.125); the head stays in 16 bits, or weight_bits if that is more. Norms and biases
    are not counted. cache="static": every step reads the whole allocation, also what is still empty. cache_traffic: how
    often a step moves each cached byte (software that appends by copying the cache reads, writes and reads it: 3).
    windowed: how many attention layers keep no more than the last `window` tokens, sinks included
    (`llmdrop.compress.windows`); the model's own windows count by themselves. A prefill is taken to compute what
    windows hide, as stock kernels do.

    Raises ValueError for unknown names, sizes below 1, a plan that does not fit, MLPs that are not gated, more windows
    than layers, and windows for a model that has its own.
    """
    if min(batch_size, prompt_len) < 1 or new_tokens < 0 or cache not in ("dynamic", "static"):
        raise ValueError(
            f"{batch_size=} and {prompt_len=} must be at least 1, {new_tokens=} at least 0, {cache=} dynamic or static"
        )
    if isinstance(hardware, str) and hardware not in HARDWARE:
        raise ValueError(f"unknown hardware {hardware!r}; known: {', '.join(HARDWARE)}, or (bytes/s, FLOP/s)")
    bandwidth, rate = HARDWARE[hardware][:2] if isinstance(hardware, str) else hardware
    shape = shape_of(model)
    plan = whole_plan(model, plan)
    n_attn = shape.layers - len(plan.attn)
    n_mlp = shape.layers - len(plan.mlp)
    if not 0 <= windowed <= n_attn or (windowed and (window < 1 or cache == "static")):
        raise ValueError(
            f"{windowed=} of {n_attn} attention layers, with {window=}: give 1 token or more, and a dynamic cache"
        )
    if windowed and shape.windows:
        raise ValueError(f"{windowed=}: this model has windows of its own; leave windowed at 0")
    body = n_attn * shape.attn_weights + n_mlp * shape.mlp_weights  # weights that every token needs
    head = shape.head_weights
    weight_bytes = body * weight_bits / 8 + head * max(weight_bits, 16) / 8
    kv_token = shape.kv_values * cache_bits / 8  # bytes per token of one sequence, in one layer
    pair_flops = 4 * shape.heads * shape.head_dim  # per (query, key) pair, in one layer: its score, its weighted value

    def cached(n: int | np.ndarray) -> int | np.ndarray:
        """Tokens that the caches of all layers hold after n."""
        return shape.cached_tokens(plan, n) - windowed * (n - np.minimum(n, window))

    prefill_pairs = n_attn * prompt_len * (prompt_len + 1) / 2
    prefill_flops = batch_size * (2 * body * prompt_len + 2 * head + pair_flops * prefill_pairs)
    prefill_bytes = weight_bytes + batch_size * kv_token * float(cached(prompt_len))
    prefill = max(prefill_flops / rate, prefill_bytes / bandwidth)

    context = prompt_len + np.arange(1, new_tokens + 1)  # tokens each step attends to
    moved = np.full(new_tokens, prompt_len + new_tokens) if cache == "static" else context
    step_bytes = weight_bytes + batch_size * kv_token * cache_traffic * cached(moved)
    step_flops = batch_size * (2.0 * (body + head) + pair_flops * cached(context))
    decode = float(np.maximum(step_bytes / bandwidth, step_flops / rate).sum())
    return SpeedLimit(
        seconds=prefill + decode,
        prefill_seconds=prefill,
        decode_seconds=decode,
        bytes=prefill_bytes + float(step_bytes.sum()),
        flops=prefill_flops + float(step_flops.sum()),
        kv_bytes=batch_size * kv_token * float(cached(prompt_len + new_tokens)),
        weight_bytes=weight_bytes,
    )


def sized_plan(label: str, n_layers: int, gone: DropPlan = DropPlan()) -> DropPlan:
    """A plan of the size that a row's label says ("Attn-8", "MLP-4", "Block-4", "Baseline"), for speed.

    Which layers go does not matter to it; here the deepest but the last, without those that are `gone` already. Raises
    ValueError for other labels.
    """
    if label == "Baseline":
        return DropPlan((), (), n_layers)
    kind, _, size = label.partition("-")
    taken = {"Attn": gone.attn, "MLP": gone.mlp, "Block": gone.attn + gone.mlp}.get(kind, ())
    available = [i for i in range(n_layers - 1) if i not in taken]
    if kind not in ("Attn", "MLP", "Block") or not size.isdigit() or int(size) > len(available):
        raise ValueError(f"row {label!r} is not Baseline, Attn-n, MLP-n or Block-n with n below {len(available) + 1}")
    layers = available[len(available) - int(size) :]
    return DropPlan(layers if kind != "MLP" else (), layers if kind != "Attn" else (), n_layers)


def sized_plans(model: nn.Module | str, labels: Iterable[str]) -> dict[str, DropPlan]:
    """{label: `sized_plan`} for a model as it is, or for one of the paper's by name."""
    gone = whole_plan(model, DropPlan())
    return {label: sized_plan(label, gone.n_layers, gone) for label in labels}


def predict_speedups(model: nn.Module | str, labels: Iterable[str], **settings) -> pd.DataFrame:
    """The speedup over the model as it is that `predict_speed` allows each row (indexed by label).

    Columns seconds, prefill_seconds, decode_seconds, speedup, prefill_speedup, decode_speedup; settings: batch_size,
    prompt_len, ... as for predict_speed.
    """
    base = predict_speed(model, **settings)
    limits = {label: predict_speed(model, plan, **settings) for label, plan in sized_plans(model, labels).items()}
    out = pd.DataFrame(index=list(limits))
    for time_of in TIMES:
        out[time_of] = [getattr(limit, time_of) for limit in limits.values()]
    for time_of in TIMES:
        out[time_of.replace("seconds", "speedup")] = getattr(base, time_of) / out[time_of]  # NaN without new tokens
    return out


def implied_batch(
    model: nn.Module | str, published: Mapping[str, float], batches: Iterable[int] = range(1, 129), **settings
) -> tuple[int, float]:
    """(batch size, largest error): the batch whose predicted speedups come nearest to the published {label: speedup}.

    Nearest by the largest error over the rows. The batch is the only free choice; settings as for predict_speed.
    """
    published = pd.Series(published)
    errors = {}
    for batch in batches:
        predicted = predict_speedups(model, published.index, batch_size=batch, **settings)["speedup"]
        errors[batch] = float((predicted - published).abs().max())
    best = min(errors, key=errors.get)
    return best, errors[best]


def largest_batch(
    model: nn.Module | str, plan: DropPlan = DropPlan(), seq_len: int = 4096, memory: float = 48e9, **bits: float
) -> int:
    """Largest batch of which `memory_needed` at seq_len tokens is within `memory` bytes (0 if not even one fits).

    bits: weight_bits and cache_bits, 16 where not given.
    """
    held = memory_needed(model, plan, 0, seq_len, **bits)
    one = memory_needed(model, plan, 1, seq_len, **bits) - held
    return max(int((memory - held) // one), 0) if one else 0


def memory_needed(
    model: nn.Module | str,
    plan: DropPlan = DropPlan(),
    batch_size: int = 1,
    seq_len: int = 4096,
    weight_bits: float = 16,
    cache_bits: float = 16,
) -> float:
    """Bytes of the weights, embedding and head included, and of the KV cache of batch_size x seq_len tokens."""
    one = predict_speed(model, plan, 1, seq_len, 0, weight_bits=weight_bits, cache_bits=cache_bits)
    shape = shape_of(model)
    embedding = 0 if shape.tied else shape.head_weights * max(weight_bits, 16) / 8
    return one.weight_bytes + embedding + batch_size * one.kv_bytes


def measure_hardware(device: str = "cpu", dtype: str = "float32") -> tuple[float, float]:
    """(bytes/s, FLOP/s) this device reaches now: the best of five copies and reads, and of five matrix products.

    The bytes are those of 512 MiB arrays in float32, the products of square matrices in `dtype`: what a program gets
    here, below any data sheet. Takes 2 s on two CPU cores.
    """
    is_gpu = torch.device(device).type != "cpu"
    loops = 10 if is_gpu else 1  # so that waiting for the GPU once does not count

    def best(function: Callable) -> float:
        seconds = []
        for _ in range(6):
            start = time.perf_counter()
            for _ in range(loops):
                function()
            synchronize(torch.device(device))
            seconds.append((time.perf_counter() - start) / loops)
        return min(seconds[1:])

    matrix = torch.ones(2**15, 2**12, device=device)
    vector = torch.ones(2**12, device=device)
    other = torch.empty_like(matrix)
    copied = 2 * matrix.nbytes / best(lambda: other.copy_(matrix))
    read = matrix.nbytes / best(lambda: matrix @ vector)
    width = 8192 if is_gpu else 2048
    square = torch.randn(width, width, device=device).to(getattr(torch, dtype))
    return max(copied, read), 2 * width**3 / best(lambda: square @ square)
