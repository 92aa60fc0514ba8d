"""The speed that bytes and FLOPs allow: prefill and decode of any plan on named hardware.

Every pass through the model takes at least the time to read its bytes (weights once, and in decoding the KV cache) and
at least the time to do its FLOPs; the longer of the two is the limit. There is no fitted constant: the published
speedups follow from the shapes, the hardware's data sheet, and the batch size.
"""

from dataclasses import dataclass

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
) -> SpeedLimit:
    """Least time for one batch: a prefill of prompt_len tokens and new_tokens decode steps, after dropping `plan`.

    model: a name in GEOMETRIES or a model with Llama shapes. hardware: a name in HARDWARE, or (bytes/s, FLOP/s).
    weight_bits: of attention and MLP matrices (4-bit with one 16-bit scale per 128 weights is 4.125); the head stays in
    16 bits, or weight_bits if that is more. Raises ValueError for unknown names, sizes below 1 and unknown indices.
    """
    if min(batch_size, prompt_len) < 1 or new_tokens < 0:
        raise ValueError(f"{batch_size=} and {prompt_len=} must be at least 1, {new_tokens=} at least 0")
    if isinstance(hardware, str) and hardware not in HARDWARE:
        raise ValueError(f"unknown hardware {hardware!r}; known: {', '.join(HARDWARE)}, or (bytes/s, FLOP/s)")
    bandwidth, rate = HARDWARE[hardware][:2] if isinstance(hardware, str) else hardware
    layers, width, heads, kv_heads, mlp_width, vocabulary = shapes(model)
    plan = DropPlan(plan.attn, plan.mlp, layers)
    n_attn, n_mlp = layers - len(plan.attn), layers - len(plan.mlp)
    kv_width = width // heads * kv_heads
    body = n_attn * (2 * width * width + 2 * width * kv_width) + n_mlp * 3 * width * mlp_width  # weights per token
    head = width * vocabulary
    weight_bytes = body * weight_bits / 8 + head * max(weight_bits, 16) / 8
    kv_token = 2 * n_attn * kv_width * cache_bits / 8  # bytes per token of one sequence

    def attention_flops(pairs: float) -> float:  # (query, key) pairs of one sequence: scores and weighted sum
        return 4 * width * n_attn * pairs

    prefill_flops = batch_size * (2 * body * prompt_len + 2 * head + attention_flops(prompt_len * (prompt_len + 1) / 2))
    prefill_bytes = weight_bytes + batch_size * prompt_len * kv_token
    prefill = max(prefill_flops / rate, prefill_bytes / bandwidth)
    decode = total_bytes = total_flops = 0.0
    for step in range(new_tokens):
        context = prompt_len + step + 1
        step_bytes = weight_bytes + batch_size * context * kv_token
        step_flops = batch_size * (2 * (body + head) + attention_flops(context))
        decode += max(step_bytes / bandwidth, step_flops / rate)
        total_bytes, total_flops = total_bytes + step_bytes, total_flops + step_flops
    return SpeedLimit(
        seconds=prefill + decode,
        prefill_seconds=prefill,
        decode_seconds=decode,
        bytes=prefill_bytes + total_bytes,
        flops=prefill_flops + total_flops,
        kv_bytes=batch_size * (prompt_len + new_tokens) * kv_token,
        weight_bytes=weight_bytes,
    )


def largest_batch(
    model, plan: DropPlan = DropPlan(), seq_len: int = 4096, memory: float = 48e9, weight_bits: float = 16
) -> int:
    """Largest batch whose weights and KV cache at seq_len tokens fit `memory` bytes (0 if not even one does)."""
    one = predict_speed(model, plan, 1, seq_len, 0, weight_bits=weight_bits)
    embedding = shapes(model)[1] * shapes(model)[5] * 2
    return max(int((memory - one.weight_bytes - embedding) // one.kv_bytes), 0) if one.kv_bytes else 0
