"""Time, KV cache and memory of a model, dropped or not, measured honestly.

`measure_speed` times one model, `compare_speed` many plans of it in turn. What bytes and FLOPs allow is in `roofline`,
the paper's models by their shapes alone are in `geometry`.
"""

import os
import shutil
import time
from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
import torch
from transformers import DynamicCache, StaticCache

from .geometry import geometry_config, geometry_model, kv_cache_bytes
from .plan import DropPlan
from .prune import dropped

__all__ = [
    "cache_bytes",
    "compare_speed",
    "geometry_config",
    "geometry_model",
    "kv_cache_bytes",
    "measure_speed",
]


@torch.no_grad()
def measure_speed(
    model,
    batch_size: int = 1,
    prompt_len: int = 128,
    new_tokens: int = 32,
    repeats: int = 3,
    cache: str = "dynamic",
    compiled: bool | str = False,
    protocol: str = "cached",
    timed_steps: int | None = None,
    warm_up: bool = True,
    seed: int = 0,
) -> dict:
    """Time prefill and cached greedy decoding apart and together.

    Random prompts [batch_size, prompt_len]; one forward pass over them (prefill), then new_tokens single-token passes
    on a real KV cache ("dynamic" or "static"), every pass on the one before. A discarded prefill and a few steps warm
    up (warm_up=False: a run of these shapes was made just before). The clock is read after synchronising CUDA.

    compiled, with a static cache: True decodes through torch.compile(mode="reduce-overhead"), with CUDA graphs where
    there is CUDA; compiling takes a minute for a large model. "graph" records the ordinary kernels of one decode step
    in a CUDA graph, within a second: nothing is fused, but no step waits for Python.
    timed_steps: decode and time only so many steps, in four stretches evenly over the new tokens, and scale to all of
    them; in between, the cache is filled at random. Bytes, and so time, grow linearly with the context.
    protocol="reference": what the paper's repository times (benchmark_speed.py): decode steps of one token without
    context or cache, each a forward pass on its own, after one matrix product as warm-up.

    Returns seconds, prefill_seconds, decode_seconds (medians over repeats, for the whole batch), the lists of all
    repeats, spread (largest minus smallest total over the median), tokens_per_second (new tokens over decode time),
    kv_bytes (of the cache at the end), weight_bytes (read at each decode step), decode_bytes (weights and cached tokens
    that all steps must read; a static cache reads its empty rest too), decode_bandwidth (those bytes per second),
    peak_bytes (CUDA only, else None). Raises ValueError for what does not go together, torch.OutOfMemoryError as is.
    """
    device = model.get_input_embeddings().weight.device
    if min(batch_size, prompt_len, new_tokens, repeats, timed_steps or 1) < 1 or cache not in ("dynamic", "static"):
        raise ValueError(
            f"{batch_size=}, {prompt_len=}, {new_tokens=}, {repeats=} and {timed_steps=} must be at least 1, "
            f"{cache=} dynamic or static"
        )
    if protocol not in ("cached", "reference") or (protocol == "reference" and (compiled or timed_steps)):
        raise ValueError(f"{protocol=} must be 'cached', or 'reference' without compiled and timed_steps")
    check_compiled(compiled, cache, device)
    reference, cuda = protocol == "reference", device.type == "cuda"
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, model.config.vocab_size, (batch_size, prompt_len), generator=generator).to(device)
    token = torch.zeros((batch_size, 1), dtype=torch.long, device=device)  # one buffer, so that a graph can read it
    fixed = StaticCache(config=model.config, max_cache_len=prompt_len + new_tokens) if cache == "static" else None
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)

    def clock() -> float:
        if cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def empty_cache():
        if fixed is None:
            return DynamicCache(config=model.config)
        fixed.reset()
        return fixed

    def forward(ids: torch.Tensor, past) -> torch.Tensor:  # [batch, n] -> the next token [batch, 1]
        context = {} if reference else {"past_key_values": past}
        out = model(ids, **context, use_cache=True, logits_to_keep=0 if reference else 1)
        return out.logits[:, -1:].argmax(-1)

    def step(past) -> None:
        token.copy_(forward(token, past))

    if warm_up and reference:
        matrix = torch.randn((4096, 4096), device=device)
        torch.mm(matrix, matrix)
    elif warm_up or compiled:
        past = empty_cache()
        token.copy_(forward(prompt if warm_up else prompt[:, :1], past))
        if compiled == "graph":
            step = _graph(step, fixed, prompt_len, device)
        elif compiled:
            step = _compiled(forward, token)
        for _ in range(min(3, new_tokens)):
            step(past)
        del past  # a dynamic one is large

    stretches = _stretches(prompt_len, new_tokens, timed_steps or new_tokens)
    n = sum(steps for _, steps in stretches)

    def run() -> tuple[float, float, int]:
        past = empty_cache()
        start = clock()
        token.copy_(forward(prompt, past))
        prefill_seconds, decode_seconds = clock() - start, 0.0
        for position, steps in stretches:
            if n < new_tokens:
                _seek(past, position)
            start = clock()
            for _ in range(steps):
                step(past)
            decode_seconds += clock() - start
        if n < new_tokens:
            _seek(past, prompt_len + new_tokens)  # the whole cache must fit, too
        return prefill_seconds, decode_seconds * new_tokens / n, 0 if reference else cache_bytes(past)

    prefill, decode, sizes = (np.array(column) for column in zip(*(run() for _ in range(repeats)), strict=True))
    total, kv_bytes, weight_bytes = prefill + decode, int(sizes[-1]), _weights_read(model)
    decode_bytes = new_tokens * weight_bytes
    decode_bytes += new_tokens * kv_bytes * (prompt_len + (new_tokens + 1) / 2) / (prompt_len + new_tokens)
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
        "decode_bytes": float(decode_bytes),
        "decode_bandwidth": float(decode_bytes / np.median(decode)),
        "peak_bytes": torch.cuda.max_memory_allocated(device) if cuda else None,
    }


def check_compiled(compiled: bool | str, cache: str, device: torch.device) -> None:
    """Raises ValueError where `compiled` cannot be had, saying why."""
    if compiled not in (False, True, "graph"):
        raise ValueError(f"{compiled=} is not one of False, True (torch.compile), 'graph' (a CUDA graph)")
    if compiled and cache != "static":
        raise ValueError(f"{compiled=} decoding needs addresses that stay: pass cache='static', not {cache!r}")
    if compiled == "graph" and device.type != "cuda":
        raise ValueError(f"compiled='graph' is a CUDA graph and the model is on {device}; use compiled=False or True")
    if compiled and device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise ValueError("torch.compile for the CPU needs a C++ compiler (g++, or name one in CXX); none was found")


def _compiled(forward: Callable, token: torch.Tensor) -> Callable:
    """A decode step through torch.compile."""
    torch.compiler.reset()  # else plan after plan recompiles one function, and torch gives up at the eighth
    fast = torch.compile(forward, mode="reduce-overhead", dynamic=False)

    def step(past) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        token.copy_(fast(token, past))

    return step


def _graph(step: Callable, cache, position: int, device: torch.device) -> Callable:
    """A decode step as the replay of one CUDA graph; the cache's length lives on the device and moves on by itself."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # libraries allocate their workspaces before the capture, as torch asks
        for _ in range(3):
            _seek(cache, position)
            step(cache)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        step(cache)
    _seek(cache, position)
    return lambda past: graph.replay()


def _stretches(prompt_len: int, new_tokens: int, n: int) -> list[tuple[int, int]]:
    """At least n steps as (context at the start, steps): all in one, or four alike, each in the middle of a quarter."""
    steps, share = -(-n // 4), new_tokens / 4
    if 4 * steps >= new_tokens:
        return [(prompt_len, new_tokens)]
    return [(prompt_len + round(share * (k + 0.5) - steps / 2), steps) for k in range(4)]


def _seek(cache, position: int) -> None:
    """Make the cache as long as after `position` tokens; what a dynamic one lacks is random."""
    for layer in cache.layers:
        if layer.is_sliding:
            raise ValueError("timed_steps and CUDA graphs skip in the cache, which a model's own windows forbid")
        length = position
        if hasattr(layer, "held"):  # a window's
            layer.seen = position
            length = len(layer.held())
        if hasattr(layer, "max_cache_len"):
            layer.cumulative_length.fill_(position)
        elif length > layer.keys.shape[-2]:
            for name in ("keys", "values"):  # one at a time, and the old one freed first: they are large
                like = getattr(layer, name)[..., :1, :].clone()
                setattr(layer, name, None)
                size = (*like.shape[:2], length, like.shape[-1])
                setattr(layer, name, torch.empty(size, dtype=like.dtype, device=like.device).normal_())


def cache_bytes(cache) -> int:
    """Bytes of keys and values that a transformers cache holds."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized)


def _weights_read(model) -> int:
    """Bytes of the weights that a decode step reads: all of them, but of an untied embedding only a few rows."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings().weight
    tied = head is not None and head.weight is embedding
    return sum(p.nbytes for p in model.parameters()) - (0 if tied else embedding.nbytes)


def compare_speed(model, plans: Mapping[str, DropPlan], rounds: int = 3, **settings) -> pd.DataFrame:
    """`measure_speed` of many plans of one model, in turn, `rounds` times over: a drifting machine hits all alike.

    A compiled step is made once a plan, so there the rounds of a plan follow each other.
    Returns one row per plan: plan, status ("ok" or "out of memory"), largest_batch (batch_size, or the largest of its
    halves that fits; 0 if none), the medians over rounds of seconds, prefill_seconds, decode_seconds and
    tokens_per_second, spread, speedup (median over rounds of the first plan's seconds over this one's, each from one
    round) with speedup_low and speedup_high (its smallest and largest), prefill_speedup and decode_speedup, kv_bytes,
    weight_bytes, decode_bandwidth, peak_bytes (CUDA; as if what is dropped were freed). The numbers of a plan that does
    not fit are NaN; the others go on.
    """
    compiled = bool(settings.get("compiled"))
    turns, repeats = (1, rounds) if compiled else (rounds, 1)
    whole, size = sum(p.nbytes for p in model.parameters()), settings.get("batch_size", 1)
    rows, facts = [], {name: {"status": "ok", "largest_batch": size} for name in plans}
    for turn in range(turns):
        for name, plan in plans.items():
            if facts[name]["status"] != "ok":
                continue
            with dropped(model, plan):
                cold = turn == 0 and not (compiled and rows)  # making a compiled step warms up all but the first
                one, fits = that_fits(model, **(settings | {"repeats": repeats, "warm_up": cold}))
                freed = whole - sum(p.nbytes for p in model.parameters())
            if one is None:
                facts[name] = {"status": "out of memory", "largest_batch": fits}
                rows = [row for row in rows if row["plan"] != name] + [{"plan": name}]
                continue
            for k, times in enumerate(zip(one["all_prefill_seconds"], one["all_decode_seconds"], strict=True)):
                rows.append({"plan": name, "round": turn + k, "prefill_seconds": times[0], "decode_seconds": times[1]})
            facts[name] |= {key: one[key] for key in ("kv_bytes", "weight_bytes", "decode_bytes")}
            facts[name]["peak_bytes"] = one["peak_bytes"] and one["peak_bytes"] - freed
    frame = pd.DataFrame(rows, columns=["plan", "round", "prefill_seconds", "decode_seconds"])
    frame["seconds"] = frame["prefill_seconds"] + frame["decode_seconds"]
    out = over_rounds(frame, next(iter(plans))).loc[list(plans)].join(pd.DataFrame(facts).T.infer_objects())
    out["tokens_per_second"] = size * settings.get("new_tokens", 32) / out["decode_seconds"]
    out["decode_bandwidth"] = out.pop("decode_bytes") / out["decode_seconds"] if "decode_bytes" in out else np.nan
    front = ["plan", "status", "largest_batch", "speedup", "speedup_low", "speedup_high", "spread"]
    return out.reset_index().pipe(lambda table: table[front + [c for c in table if c not in front]])


def over_rounds(rows: pd.DataFrame, first: str) -> pd.DataFrame:
    """Medians by plan of rows timed in turn: plan, round, seconds, and perhaps prefill_seconds, decode_seconds.

    Adds speedup over the plan `first` (prefill_speedup, decode_speedup), each of one round, its smallest and largest
    (speedup_low, speedup_high, ...), and spread (the range of seconds over their median).
    """
    base = rows[rows["plan"] == first].set_index("round")
    timed = [column for column in rows if column.endswith("seconds")]
    speedups = {
        column.replace("seconds", "speedup"): rows["round"].map(base[column]) / rows[column] for column in timed
    }
    groups = rows.assign(**speedups).drop(columns="round").groupby("plan", sort=False)
    low, high, out = groups.min(), groups.max(), groups.median()
    out["spread"] = (high["seconds"] - low["seconds"]) / out["seconds"]
    ends = [part[list(speedups)].add_suffix(end) for part, end in ((low, "_low"), (high, "_high"))]
    return out.join(ends)


def that_fits(model, batch_size: int = 1, **settings) -> tuple[dict | None, int]:
    """(measure_speed, or None where memory is short; the largest of batch_size, its half, ... that fits, or 0)."""
    size = batch_size
    while size:
        try:
            measured = measure_speed(model, size, **settings)
            return (measured if size == batch_size else None), size
        except RuntimeError as error:
            if not isinstance(error, torch.cuda.OutOfMemoryError) and "alloc" not in str(error).lower():
                raise  # a CPU says "can't allocate memory", cuBLAS CUBLAS_STATUS_ALLOC_FAILED
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        size //= 2
    return None, 0
