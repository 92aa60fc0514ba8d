"""Time, KV cache and memory of a model, dropped or not, measured on this machine.

`measure_speed` times one model; `time_rounds` times several in turn, and `speedups` sums their rows up.
"""

import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from itertools import chain

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import Cache, DynamicCache, StaticCache

from ..anatomy import check_has_weights, unwrapped
from ..plan import DropPlan
from ..prune import dropped, eval_mode
from .geometry import has_tied_head

VERSION = 1  # of what is measured here: raised when the protocol changes, so that stored rows are measured again
TIMES = ("seconds", "prefill_seconds", "decode_seconds")
MEASURED = [*TIMES, "generated_tokens", "kv_bytes", "weight_bytes", "decode_bytes", "peak_bytes"]


@torch.no_grad()
def measure_speed(
    model: nn.Module,
    batch_size: int = 1,
    prompt_len: int = 128,
    new_tokens: int = 32,
    repeats: int = 3,
    cache: str = "dynamic",
    decoding: str = "eager",
    timed_steps: int | None = None,
    warm_up: bool = True,
    prefill: bool = True,
    seed: int = 0,
) -> dict:
    """Time prefill and cached greedy decoding, apart and together, in eval mode.

    One forward pass over random prompts [batch_size, prompt_len], then new_tokens single-token passes on a KV cache
    ("dynamic" or "static"), every pass on the one before. A discarded prefill and a few steps warm up (warm_up=False: a
    run of these shapes was made just before). The clock is read after synchronizing the device. What torch.compile made
    is timed as it is, what other wrappers hold without them.

    decoding: "eager"; or, with a static cache, "compiled" (torch.compile(mode="reduce-overhead"): a minute for a large
    model) or "graph" (the ordinary kernels of one step recorded in a CUDA graph within a second: nothing is fused, but
    no step waits for Python).
    timed_steps: decode and time only so many steps, in four stretches evenly over the new tokens, and scale to all of
    them; in between, the cache is filled at random. Bytes, and so time, grow linearly with the context. None: all.
    prefill: False fills the cache at random from the start, and times decoding alone; seconds and prefill_seconds are
    NaN.

    Returns, for the whole batch: seconds, prefill_seconds, decode_seconds (medians over repeats), all_prefill_seconds
    and all_decode_seconds (lists), spread (range of the totals over their median), generated_tokens, tokens_per_second
    (over decode time), kv_bytes (of the cache at the end), weight_bytes (read at each decode step), decode_bytes
    (weights and cached tokens that all steps must read; a static cache reads its empty rest too), decode_bandwidth
    (those per second), peak_bytes (CUDA only, else None). Raises ValueError for what does not go together and for a
    model on the meta device, torch.OutOfMemoryError as is.
    """
    if min(batch_size, prompt_len, new_tokens, repeats) < 1 or cache not in ("dynamic", "static"):
        raise ValueError(
            f"{batch_size=}, {prompt_len=}, {new_tokens=} and {repeats=} must be at least 1, {cache=} dynamic or static"
        )
    if timed_steps is not None and timed_steps < 1:
        raise ValueError(f"{timed_steps=} must be at least 1, or None to time every step")
    inside = unwrapped(model)
    timed = model if getattr(model, "_orig_mod", None) is inside else inside
    model = inside
    check_has_weights(model)
    device = model.get_input_embeddings().weight.device
    check_decoding(decoding, cache, device)
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, model.config.vocab_size, (batch_size, prompt_len), generator=generator)
    generation = _Generation(timed, prompt.to(device), new_tokens, cache)
    stretches = _stretches(prompt_len, new_tokens, timed_steps or new_tokens)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with ExitStack() as undo:
        undo.enter_context(eval_mode(model))
        generation.get_ready(decoding, warm_up)
        runs = pd.DataFrame([generation.timed(stretches, prefill) for _ in range(repeats)])

    total = runs["prefill_seconds"] + runs["decode_seconds"]
    decode_seconds = float(runs["decode_seconds"].median())
    kv_bytes = int(runs["kv_bytes"].iloc[-1])
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    if not has_tied_head(model):
        weight_bytes -= model.get_input_embeddings().weight.nbytes  # of which a step reads a few rows
    mean_context = prompt_len + (new_tokens + 1) / 2
    decode_bytes = float(new_tokens * (weight_bytes + kv_bytes * mean_context / (prompt_len + new_tokens)))
    return {
        "seconds": float(total.median()),
        "prefill_seconds": float(runs["prefill_seconds"].median()),
        "decode_seconds": decode_seconds,
        "all_prefill_seconds": runs["prefill_seconds"].tolist(),
        "all_decode_seconds": runs["decode_seconds"].tolist(),
        "spread": float((total.max() - total.min()) / total.median()),
        "generated_tokens": batch_size * new_tokens,
        "tokens_per_second": batch_size * new_tokens / decode_seconds,
        "kv_bytes": kv_bytes,
        "weight_bytes": weight_bytes,
        "decode_bytes": decode_bytes,
        "decode_bandwidth": decode_bytes / decode_seconds,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator (CUDA, MPS, XPU, ...) has done what it was told; a CPU has already."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@torch.no_grad()
def greedy_tokens(
    model: nn.Module, prompt: torch.Tensor, new_tokens: int, cache: str = "dynamic", decoding: str = "eager"
) -> torch.Tensor:
    """What the steps that `measure_speed` times write after prompts [B, T] of equal length: [B, new_tokens].

    Whatever cache and decoding, it must be the same. Raises ValueError for what does not go together.
    """
    check_decoding(decoding, cache, prompt.device)
    generation = _Generation(model, prompt, new_tokens, cache)
    written = []
    with eval_mode(model):
        generation.get_ready(decoding, warm_up=True)
        past = generation.empty_cache()
        generation.token.copy_(generation.next_token(prompt, past))
        for _ in range(new_tokens):
            written.append(generation.token.clone())
            generation.step(past)
    return torch.cat(written, 1)


def check_decoding(decoding: str, cache: str, device: torch.device) -> None:
    """Raises ValueError where `decoding` cannot be had, saying why."""
    if decoding not in ("eager", "compiled", "graph"):
        raise ValueError(f"{decoding=} is not one of 'eager', 'compiled' (torch.compile), 'graph' (a CUDA graph)")
    if decoding != "eager" and cache != "static":
        raise ValueError(f"{decoding=} needs addresses that stay: pass cache='static', not {cache!r}")
    if decoding == "graph" and device.type != "cuda":
        raise ValueError(
            f"decoding='graph' is a CUDA graph and the model is on {device}; use decoding='eager' or 'compiled'"
        )
    if decoding == "compiled" and device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise ValueError("torch.compile for the CPU needs a C++ compiler (g++, or name one in CXX); none was found")


class _Generation:
    """Greedy generation of one batch, taken apart into a prefill and decode steps."""

    def __init__(self, model: nn.Module, prompt: torch.Tensor, new_tokens: int, cache: str):
        self.model = model
        self.prompt = prompt  # [batch, T]
        self.new_tokens = new_tokens
        self.length = prompt.shape[1] + new_tokens
        self.token = torch.zeros_like(prompt[:, :1])  # stays where it is, for a graph to read
        self.static_cache = StaticCache(config=model.config, max_cache_len=self.length) if cache == "static" else None
        self.step = self.eager_step

    def empty_cache(self) -> Cache:
        if self.static_cache is None:
            return DynamicCache(config=self.model.config)
        self.static_cache.reset()
        return self.static_cache

    def next_token(self, ids: torch.Tensor, past: Cache) -> torch.Tensor:
        """[batch, n] -> [batch, 1]."""
        logits = self.model(ids, past_key_values=past, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1:].argmax(-1)

    def eager_step(self, past: Cache) -> None:
        self.token.copy_(self.next_token(self.token, past))

    def get_ready(self, decoding: str, warm_up: bool) -> None:
        """Make the decode step, and warm up."""
        if decoding == "eager" and not warm_up:
            return
        past = self.empty_cache()
        self.token.copy_(self.next_token(self.prompt if warm_up else self.prompt[:, :1], past))
        if decoding == "graph":
            self.step = _graph(self.eager_step, past, self.prompt.shape[1], self.prompt.device)
        elif decoding == "compiled":
            self.step = _compiled(self.next_token, self.token)
        for _ in range(min(3, self.new_tokens)):
            self.step(past)

    def timed(self, stretches: list[tuple[int, int]], prefill: bool) -> dict:
        """One generation: prefill_seconds (NaN without one), decode_seconds (scaled to all steps), kv_bytes."""
        past = self.empty_cache()
        n_steps = sum(steps for _, steps in stretches)
        skips = n_steps < self.new_tokens or not prefill
        start = self.clock()
        self.token.copy_(self.next_token(self.prompt if prefill else self.prompt[:, :1], past))
        prefill_seconds = self.clock() - start if prefill else np.nan
        decode_seconds = 0.0
        for position, steps in stretches:
            if skips:
                _seek(past, position)
            start = self.clock()
            for _ in range(steps):
                self.step(past)
            decode_seconds += self.clock() - start
        if skips:
            _seek(past, self.length)  # the whole cache must fit, too
        decode_seconds *= self.new_tokens / n_steps
        return {"prefill_seconds": prefill_seconds, "decode_seconds": decode_seconds, "kv_bytes": cache_bytes(past)}

    def clock(self) -> float:
        synchronize(self.prompt.device)
        return time.perf_counter()


def _compiled(next_token: Callable, token: torch.Tensor) -> Callable:
    """A decode step through torch.compile."""
    torch.compiler.reset()  # else plan after plan recompiles one function, and torch gives up at the eighth
    fast = torch.compile(next_token, mode="reduce-overhead", dynamic=False)

    def step(past: Cache) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        token.copy_(fast(token, past))

    return step


def _graph(step: Callable, cache: Cache, position: int, device: torch.device) -> Callable:
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


def _stretches(prompt_len: int, new_tokens: int, n_steps: int) -> list[tuple[int, int]]:
    """At least n_steps as (context at the start, steps): all in one, or four alike, each amid a quarter."""
    steps = -(-n_steps // 4)
    quarter = new_tokens / 4
    if 4 * steps >= new_tokens:
        return [(prompt_len, new_tokens)]
    return [(prompt_len + round(quarter * (k + 0.5) - steps / 2), steps) for k in range(4)]


def _seek(cache: Cache, position: int) -> None:
    """Make the cache as long as after `position` tokens; what a dynamic one lacks is random."""
    for layer in cache.layers:
        if layer.is_sliding:
            raise ValueError(
                "timed_steps, prefill=False and CUDA graphs skip in the cache, which a model's own windows forbid"
            )
        length = position
        if hasattr(layer, "held"):  # a window of llmdrop.compress.windows
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


def cache_bytes(cache: Cache) -> int:
    """Bytes of keys and values that a transformers cache holds."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized)


# -- several models in turn


def in_rounds(runs: Mapping[str, Callable[[int], dict]], rounds: int) -> pd.DataFrame:
    """Call every run, with the number of the round, once a round: a machine whose speed drifts hits all alike.

    Returns a row per round and name, in the order of the calls: name, round, then what the run returned. Raises
    ValueError without runs or rounds.
    """
    if rounds < 1 or not runs:
        raise ValueError(f"{rounds=} of {len(runs)} runs; give at least 1 round and 1 run")
    rows = [{"name": name, "round": turn} | run(turn) for turn in range(rounds) for name, run in runs.items()]
    return pd.DataFrame(rows)


def time_rounds(
    models: Mapping[str, Callable[[], AbstractContextManager[nn.Module]]],
    rounds: int = 3,
    prefills: int | None = None,
    **settings,
) -> pd.DataFrame:
    """`measure_speed` of several models in turn, `rounds` times over.

    models: by name, functions that give a context manager, which yields the model as it is to be timed. settings: of
    `measure_speed`, except repeats, warm_up and prefill. A model warms up in the first round. A compiled step is made
    once a model, so there the rounds of a model follow each other.
    prefills: in so many rounds, evenly spread from the first, the prefill is timed as well; the rounds after them take
    it over, and time decoding alone (None: in all). With few of many decode steps timed, nearly all of the time goes
    into prefills, which are a small part of a long generation.

    Returns a row per name and round: name, round, status ("ok" or "out of memory"), largest_batch (batch_size, or the
    largest of its halves that fits; 0 if none), then MEASURED, as from `measure_speed`, but for peak_bytes as if what
    is dropped were freed. The numbers of a model that does not fit are NaN; the others go on.
    """
    is_eager = settings.get("decoding", "eager") == "eager"
    if prefills is not None and not (1 <= prefills <= rounds and is_eager):
        raise ValueError(f"{prefills=} must be at least 1 and at most the {rounds} rounds, with decoding='eager'")
    n_prefills = prefills or rounds
    with_prefill = {k * rounds // n_prefills for k in range(n_prefills)}
    coming: dict[str, list[dict]] = {name: [] for name in models}  # rows that are measured already

    def run(name: str, turn: int) -> dict:
        if not coming[name]:
            # making a compiled step warms up all but the first
            warm_up = turn == 0 if is_eager else name == next(iter(models))
            once = {"repeats": 1, "prefill": turn in with_prefill} if is_eager else {"repeats": rounds}
            with models[name]() as model:
                rows = _timed_rows(model, warm_up=warm_up, **once, **settings)
            does_fit = rows[0]["status"] == "ok"
            coming[name] = rows if does_fit else rows * rounds  # what does not fit is not tried again
        return coming[name].pop(0)

    rows = in_rounds({name: partial(run, name) for name in models}, rounds)
    rows = rows.reindex(columns=["name", "round", "status", "largest_batch", *MEASURED])
    for name in rows.loc[rows["status"] != "ok", "name"].unique():  # where one round failed, none counts
        failed = rows["name"] == name
        rows.loc[failed, "status"] = "out of memory"
        rows.loc[failed, "largest_batch"] = rows.loc[failed, "largest_batch"].min()
        rows.loc[failed, MEASURED] = np.nan
    if prefills is not None:
        rows["prefill_seconds"] = rows.groupby("name")["prefill_seconds"].ffill()
        rows["seconds"] = rows["prefill_seconds"] + rows["decode_seconds"]
    return rows


def _timed_rows(model: nn.Module, **settings) -> list[dict]:
    """A row per repeat, or a single one that says what would fit."""
    embedding = unwrapped(model).get_input_embeddings().weight
    taken = torch.cuda.memory_allocated(embedding.device) if embedding.is_cuda else 0
    timing, largest = measure_if_fits(model, **settings)
    if timing is None:
        return [{"status": "out of memory", "largest_batch": largest}]
    row = {"status": "ok", "largest_batch": largest} | {name: timing[name] for name in MEASURED}
    if embedding.is_cuda:
        row["peak_bytes"] += sum(tensor.nbytes for tensor in chain(model.parameters(), model.buffers())) - taken
    pairs = zip(timing["all_prefill_seconds"], timing["all_decode_seconds"], strict=True)
    return [
        row | {"seconds": prefill + decode, "prefill_seconds": prefill, "decode_seconds": decode}
        for prefill, decode in pairs
    ]


def measure_if_fits(model: nn.Module, batch_size: int = 1, **settings) -> tuple[dict | None, int]:
    """(`measure_speed`, or None where memory is short; the largest of batch_size, its half, ... that fits, or 0)."""
    size = batch_size
    while size:
        try:
            timing = measure_speed(model, size, **settings)
            return (timing if size == batch_size else None), size
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if torch.accelerator.is_available():
            torch.get_device_module().empty_cache()
        size //= 2
    return None, 0


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory is short: a CPU "can't allocate memory", cuBLAS says CUBLAS_STATUS_ALLOC_FAILED."""
    text = str(error).lower()
    return isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in text or "alloc" in text


def speedups(rows: pd.DataFrame, baseline: str | None = None) -> pd.DataFrame:
    """Rows timed in turn, summed up by name, and compared with the baseline (the first name if None).

    rows: from `time_rounds`, or any with name, round, seconds, and perhaps prefill_seconds and decode_seconds.
    Returns a row per name (the index): speedup (median over rounds of the baseline's seconds over this one's, both of
    one round), speedup_low and speedup_high (smallest and largest), the same for prefill_speedup and decode_speedup;
    medians of the seconds; spread (range of seconds over their median); what else the rows have, which is one value per
    name; from `time_rounds` also tokens_per_second and decode_bandwidth. Raises ValueError for an unknown baseline.
    """
    names = rows["name"].unique()
    if baseline is None:
        baseline = names[0]
    if baseline not in names:
        raise ValueError(f"no rows of the baseline {baseline!r}; there are {', '.join(names)}")
    times = [column for column in TIMES if column in rows]
    of_baseline = rows[rows["name"] == baseline].set_index("round")
    ratios = pd.DataFrame({"name": rows["name"]})
    for column in times:
        ratios[column.replace("seconds", "speedup")] = rows["round"].map(of_baseline[column]) / rows[column]
    ratios = ratios.groupby("name", sort=False)
    seconds = rows[["name", *times]].groupby("name", sort=False)
    out = ratios.median().join(ratios.min().add_suffix("_low")).join(ratios.max().add_suffix("_high"))
    out = out.join(seconds.median())
    out["spread"] = (seconds["seconds"].max() - seconds["seconds"].min()) / out["seconds"]
    out = out.join(rows.drop(columns=["round", *times]).groupby("name", sort=False).first())
    if "generated_tokens" in out:
        out["tokens_per_second"] = out.pop("generated_tokens") / out["decode_seconds"]
    if "decode_bytes" in out:
        out["decode_bandwidth"] = out.pop("decode_bytes") / out["decode_seconds"]
    return out


def compare_speed(model: nn.Module, plans: Mapping[str, DropPlan], rounds: int = 3, **settings) -> pd.DataFrame:
    """`time_rounds` of many plans of one model, and their `speedups` over the first.

    One row per plan, in the column plan; settings: of `measure_speed`, except repeats and warm_up.
    """
    models = {name: partial(dropped, model, plan) for name, plan in plans.items()}
    return speedups(time_rounds(models, rounds, **settings)).rename_axis("plan").reset_index()
