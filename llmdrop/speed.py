"""Time, KV cache and memory of a model, dropped or not, measured honestly."""

import time
from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

from .anatomy import anatomy
from .models import GEOMETRIES
from .plan import DropPlan
from .prune import dropped


@torch.inference_mode()
def measure_speed(
    model,
    batch_size: int = 1,
    prompt_len: int = 128,
    new_tokens: int = 32,
    repeats: int = 3,
    cache: str = "dynamic",
    seed: int = 0,
) -> dict:
    """Time prefill and cached greedy decoding apart and together.

    Random prompts [batch_size, prompt_len]; one forward pass over them (prefill), then new_tokens single-token passes
    on a real KV cache ("dynamic" or "static"), every pass on the one before. One run warms up and is discarded; CUDA is
    synchronised before each clock reading. Returns seconds, prefill_seconds, decode_seconds (medians over repeats, for
    the whole batch), the lists of all repeats, spread (largest minus smallest total over the median),
    tokens_per_second (new tokens over decode time), kv_bytes (of the cache at the end), weight_bytes (read at each
    decode step), decode_bandwidth (bytes of weights and cache read per second), peak_bytes (CUDA only, else None).
    Raises ValueError for sizes below 1, and torch.OutOfMemoryError as it comes.
    """
    if min(batch_size, prompt_len, new_tokens, repeats) < 1 or cache not in ("dynamic", "static"):
        raise ValueError(
            f"{batch_size=}, {prompt_len=}, {new_tokens=}, {repeats=} must be at least 1, {cache=} dynamic or static"
        )
    device = model.get_input_embeddings().weight.device
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, model.config.vocab_size, (batch_size, prompt_len), generator=generator).to(device)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)

    def clock() -> float:
        if cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def run() -> tuple[float, float, int]:
        static = StaticCache(config=model.config, max_cache_len=prompt_len + new_tokens) if cache == "static" else None
        past = DynamicCache(config=model.config) if static is None else static
        start = clock()
        out = model(prompt, past_key_values=past, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        middle = clock()
        for _ in range(new_tokens):
            out = model(token, past_key_values=past, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
        return middle - start, clock() - middle, cache_bytes(past)

    run()
    prefill, decode, sizes = (np.array(column) for column in zip(*(run() for _ in range(repeats)), strict=True))
    total, kv_bytes = prefill + decode, int(sizes[-1])
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    unread = 0 if tied else model.get_input_embeddings().weight.nbytes  # only a few rows of the embedding are read
    weight_bytes = sum(p.nbytes for p in model.parameters()) - unread
    step_bytes = weight_bytes + kv_bytes * (prompt_len + new_tokens / 2) / (prompt_len + new_tokens)
    return {
        "seconds": float(np.median(total)),
        "prefill_seconds": float(np.median(prefill)),
        "decode_seconds": float(np.median(decode)),
        "all_prefill_seconds": prefill.tolist(),
        "all_decode_seconds": decode.tolist(),
        "spread": float(np.ptp(total) / np.median(total)),
        "tokens_per_second": float(batch_size * new_tokens / np.median(decode)),
        "kv_bytes": kv_bytes,
        "weight_bytes": weight_bytes,
        "decode_bandwidth": float(step_bytes * new_tokens / np.median(decode)),
        "peak_bytes": torch.cuda.max_memory_allocated(device) if cuda else None,
    }


def compare_speed(model, plans: Mapping[str, DropPlan], rounds: int = 3, **settings) -> pd.DataFrame:
    """`measure_speed` of many plans of one model, in turn, `rounds` times over: a drifting machine hits all alike.

    Returns one row per plan: plan, the medians over rounds of seconds, prefill_seconds, decode_seconds and
    tokens_per_second, speedup (median over rounds of the first plan's seconds over this one's, each from one round),
    speedup_low and speedup_high (its smallest and largest), kv_bytes, weight_bytes.
    """
    rows = []
    for k in range(rounds):
        for name, plan in plans.items():
            with dropped(model, plan):
                rows.append({"round": k, "plan": name} | measure_speed(model, repeats=1, **settings))
    frame = pd.DataFrame(rows)
    first = frame[frame["plan"] == next(iter(plans))].set_index("round")["seconds"]
    frame["speedup"] = frame["round"].map(first) / frame["seconds"]
    columns = ["seconds", "prefill_seconds", "decode_seconds", "tokens_per_second", "kv_bytes", "weight_bytes"]
    groups = frame.groupby("plan", sort=False)
    out = groups[columns].median().join(groups["speedup"].agg(speedup="median", speedup_low="min", speedup_high="max"))
    return out.reset_index()


def cache_bytes(cache) -> int:
    """Bytes of keys and values that a transformers cache holds."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized)


def kv_cache_bytes(model, batch_size: int, seq_len: int, plan: DropPlan = DropPlan(), dtype: str = "float16") -> int:
    """KV-cache bytes by formula: 2 x remaining attention layers x KV heads x head width x bytes x tokens x sequences.

    model: a model (its own dtype and drops count; `plan` adds to them) or the name of one of the paper's geometries, in
    `dtype`. Layers with sliding-window attention hold at most their window (less the current token).
    """
    config = geometry_config(model) if isinstance(model, str) else model.config
    width = torch.finfo(getattr(torch, dtype) if isinstance(model, str) else model.dtype).bits // 8
    if isinstance(model, str):
        live, types = [i for i in range(config.num_hidden_layers) if i not in plan.attn], None
    else:
        parts = anatomy(model)
        gone = set(plan.attn) | set(parts.plan.attn)
        live = [i for i in range(parts.n_layers) if i not in gone]
        kept = [i for i in range(parts.n_layers) if parts.layers[i] is not None]
        types = getattr(config, "layer_types", None) and dict(zip(kept, config.layer_types, strict=True))
    window = getattr(config, "sliding_window", None)
    tokens = 0
    for i in live:
        slides = window is not None and (types is None or types[i] == "sliding_attention")
        tokens += min(seq_len, window - 1) if slides else seq_len
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * heads * head_dim * width * tokens * batch_size


def geometry_config(name: str):
    """transformers config with the shapes of one of the paper's models. Raises ValueError for an unknown name."""
    if name not in GEOMETRIES:
        raise ValueError(f"unknown geometry {name!r}; known: {', '.join(GEOMETRIES)}")
    layers, width, heads, kv_heads, mlp_width, vocabulary = GEOMETRIES[name]
    return AutoConfig.for_model(
        "llama",  # Mistral-7B has Llama's shapes; its window of 4,096 is beyond the paper's contexts
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=mlp_width,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )


def geometry_model(name: str, device: str = "meta", dtype: str = "float16"):
    """One of the paper's models by shape. On "meta" it needs no memory: shapes, caches and bytes are real.

    On another device its weights are random: speed and memory are real, quality is nobody's.
    """
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(geometry_config(name), dtype=getattr(torch, dtype))
    return model.eval()
