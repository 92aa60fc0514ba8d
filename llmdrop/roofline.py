"""The speed that bytes and FLOPs allow: prefill and decode of any plan on named hardware.

Every pass through the model takes at least the time to read its bytes (weights once, and in decoding the KV cache) and
at least the time to do its FLOPs; the longer of the two is the limit. There is no fitted constant: the published
speedups follow from the shapes, the hardware's data sheet, and the batch size.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from .models import GEOMETRIES
from .plan import DropPlan

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


def shapes(model) -> tuple[int, int, int, int, int, int]:
    """(layers, width, heads, KV heads, MLP width, vocabulary) of a geometry's name or a Llama-shaped model."""
    if isinstance(model, str):
        if model not in GEOMETRIES:
            raise ValueError(f"unknown geometry {model!r}; known: {', '.join(GEOMETRIES)}")
        return GEOMETRIES[model]
    config = model.config
    if not hasattr(config, "num_key_value_heads") or not hasattr(config, "intermediate_size"):
        raise ValueError(f"predict_speed counts gated-MLP layers (Llama shapes); {config.model_type!r} has others")
    n_layers = (getattr(config, "llmdrop", None) or {}).get("n_layers", config.num_hidden_layers)
    kv = config.num_key_value_heads
    return n_layers, config.hidden_size, config.num_attention_heads, kv, config.intermediate_size, config.vocab_size


def predict_speed(
    model,
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

    model: a name in GEOMETRIES or a model with Llama shapes. hardware: a name in HARDWARE, or (bytes/s, FLOP/s).
    weight_bits: of attention and MLP matrices (4-bit with one 16-bit scale per 128 weights is 4.125); the head stays in
    16 bits, or weight_bits if that is more. cache="static": every step reads the whole allocation, also what is still
    empty. cache_traffic: how often a step moves each cached byte (1: it reads it; software that appends by copying the
    cache reads, writes and reads it, 3). windowed: how many of the attention layers keep no more than the last `window`
    tokens, sinks included (`windows`); a prefill is taken to compute what they hide, as stock kernels do. Raises
    ValueError for unknown names, sizes below 1, unknown indices, and more windows than layers.
    """
    if min(batch_size, prompt_len) < 1 or new_tokens < 0 or cache not in ("dynamic", "static"):
        raise ValueError(
            f"{batch_size=} and {prompt_len=} must be at least 1, {new_tokens=} at least 0, {cache=} dynamic or static"
        )
    if isinstance(hardware, str) and hardware not in HARDWARE:
        raise ValueError(f"unknown hardware {hardware!r}; known: {', '.join(HARDWARE)}, or (bytes/s, FLOP/s)")
    bandwidth, rate = HARDWARE[hardware][:2] if isinstance(hardware, str) else hardware
    layers, width, heads, kv_heads, mlp_width, vocabulary = shapes(model)
    plan = DropPlan(plan.attn, plan.mlp, layers)
    n_attn, n_mlp = layers - len(plan.attn), layers - len(plan.mlp)
    if not 0 <= windowed <= n_attn or (windowed and (window < 1 or cache == "static")):
        raise ValueError(
            f"{windowed=} of {n_attn} attention layers, with {window=}: give 1 token or more, and a dynamic cache"
        )
    kv_width = width // heads * kv_heads
    body = n_attn * (2 * width * width + 2 * width * kv_width) + n_mlp * 3 * width * mlp_width  # weights per token
    head = width * vocabulary
    weight_bytes = body * weight_bits / 8 + head * max(weight_bits, 16) / 8
    kv_token = 2 * kv_width * cache_bits / 8  # bytes per token of one sequence, in one layer
    pair_flops = 4 * width  # per (query, key) pair, in one layer: its score and its part of the weighted sum

    def tokens(n):  # that the caches of all layers hold after n
        return (n_attn - windowed) * n + windowed * np.minimum(n, window)

    prefill_flops = batch_size * (
        2 * body * prompt_len + 2 * head + pair_flops * n_attn * prompt_len * (prompt_len + 1) / 2
    )
    prefill_bytes = weight_bytes + batch_size * kv_token * float(tokens(prompt_len))
    prefill = max(prefill_flops / rate, prefill_bytes / bandwidth)
    context = prompt_len + np.arange(1, new_tokens + 1)  # tokens each step attends to
    moved = np.full(new_tokens, prompt_len + new_tokens) if cache == "static" else context
    step_bytes = weight_bytes + batch_size * kv_token * cache_traffic * tokens(moved)
    step_flops = batch_size * (2.0 * (body + head) + pair_flops * tokens(context))
    decode = float(np.maximum(step_bytes / bandwidth, step_flops / rate).sum())
    return SpeedLimit(
        seconds=prefill + decode,
        prefill_seconds=prefill,
        decode_seconds=decode,
        bytes=prefill_bytes + float(step_bytes.sum()),
        flops=prefill_flops + float(step_flops.sum()),
        kv_bytes=batch_size * kv_token * float(tokens(prompt_len + new_tokens)),
        weight_bytes=weight_bytes,
    )


def sized_plan(label: str, n_layers: int) -> DropPlan:
    """A plan of the size that a row's label says ("Attn-8", "MLP-4", "Block-4", "Baseline"), for speed.

    Which layers go does not matter to it; here the deepest but the last. Raises ValueError for other labels.
    """
    kind, _, n = label.partition("-")
    if (kind not in ("Attn", "MLP", "Block") or not n.isdigit() or int(n) >= n_layers) and label != "Baseline":
        raise ValueError(f"row {label!r} is not Baseline, Attn-n, MLP-n or Block-n with n below {n_layers}")
    layers = range(n_layers - 1 - int(n or 0), n_layers - 1)
    return DropPlan(layers if kind != "MLP" else (), layers if kind != "Attn" else (), n_layers)


def predict_speedups(model, labels: Iterable[str], **settings) -> pd.DataFrame:
    """The speedup over the whole model that `predict_speed` allows each row (indexed by label).

    Columns speedup, prefill_speedup, decode_speedup, seconds, prefill_seconds, decode_seconds; settings: batch_size,
    prompt_len, ... as for predict_speed.
    """
    parts, n_layers = ["", "prefill_", "decode_"], shapes(model)[0]
    base, rows = predict_speed(model, **settings), {}
    for label in labels:
        limit = predict_speed(model, sized_plan(label, n_layers), **settings)
        rows[label] = {f"{p}seconds": getattr(limit, f"{p}seconds") for p in parts}
    out = pd.DataFrame.from_dict(rows, orient="index")
    for p in parts:
        out[f"{p}speedup"] = getattr(base, f"{p}seconds") / out[f"{p}seconds"]  # NaN where there are no new tokens
    return out


def implied_batch(
    model, published: Mapping[str, float], batches: Iterable[int] = range(1, 129), **settings
) -> tuple[int, float]:
    """(batch size, largest error): the batch whose predicted speedups come nearest to the published {label: speedup}.

    Nearest by the largest error over the rows. The batch is the only free choice; settings as for predict_speed.
    """
    rows = {sized_plan(label, shapes(model)[0]): speedup for label, speedup in dict(published).items()}
    errors = {}
    for batch in batches:
        base = predict_speed(model, batch_size=batch, **settings).seconds
        predicted = [base / predict_speed(model, plan, batch_size=batch, **settings).seconds for plan in rows]
        errors[batch] = max(abs(a - b) for a, b in zip(predicted, rows.values(), strict=True))
    best = min(errors, key=errors.get)
    return best, float(errors[best])


def largest_batch(
    model,
    plan: DropPlan = DropPlan(),
    seq_len: int = 4096,
    memory: float = 48e9,
    weight_bits: float = 16,
    cache_bits: float = 16,
) -> int:
    """Largest batch whose weights and KV cache at seq_len tokens fit `memory` bytes (0 if not even one does)."""
    held = memory_needed(model, plan, 0, seq_len, weight_bits, cache_bits)
    one = memory_needed(model, plan, 1, seq_len, weight_bits, cache_bits) - held
    return max(int((memory - held) // one), 0) if one else 0


def memory_needed(
    model,
    plan: DropPlan = DropPlan(),
    batch_size: int = 1,
    seq_len: int = 4096,
    weight_bits: float = 16,
    cache_bits: float = 16,
) -> float:
    """Bytes of the weights, embedding and head included, and of the KV cache of batch_size x seq_len tokens."""
    one = predict_speed(model, plan, 1, seq_len, 0, weight_bits=weight_bits, cache_bits=cache_bits)
    _, width, _, _, _, vocabulary = shapes(model)
    return one.weight_bytes + width * vocabulary * max(weight_bits, 16) / 8 + batch_size * one.kv_bytes


def measure_hardware(device: str = "cpu", dtype: str = "float32") -> tuple[float, float]:
    """(bytes/s, FLOP/s) this device reaches now: the best of five copies and reads, and of five matrix products.

    The bytes are those of 512 MiB arrays in float32, the products of square matrices in `dtype`: what a program gets
    here, below any data sheet. Takes 2 s on two CPU cores.
    """
    cuda = torch.device(device).type == "cuda"
    loops = 10 if cuda else 1  # so that waiting for the GPU once does not count

    def best(function: Callable) -> float:
        seconds = []
        for _ in range(6):
            start = time.perf_counter()
            for _ in range(loops):
                function()
            if cuda:
                torch.cuda.synchronize(device)
            seconds.append((time.perf_counter() - start) / loops)
        return min(seconds[1:])

    matrix = torch.ones(2**15, 2**12, device=device)
    other, vector = torch.empty_like(matrix), torch.ones(2**12, device=device)
    n = 8192 if cuda else 2048
    square = torch.randn(n, n, device=device).to(getattr(torch, dtype))
    copy, read = best(lambda: other.copy_(matrix)), best(lambda: matrix @ vector)
    return max(2 * matrix.nbytes / copy, matrix.nbytes / read), 2 * n**3 / best(lambda: square @ square)
