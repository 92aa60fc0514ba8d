"""Speedups side by side, row by row: as published in Tables 1 to 3, as bytes and FLOPs allow, and as measured here."""

from collections.abc import Iterable, Mapping
from functools import partial
from itertools import product
from types import MappingProxyType

import numpy as np
import pandas as pd
import torch
from torch import nn

from ..anatomy import find_anatomy
from ..checkpoints.load import check_device, load_model
from ..compress.variant import Variant
from ..plan import DropPlan
from ..prune import apply_plan
from ..speed import roofline
from ..speed.geometry import GEOMETRIES, Int4Linear, geometry_model, shape_of
from ..speed.measure import is_out_of_memory, measure_speed
from ..speed.roofline import (
    HARDWARE,
    implied_batch,
    largest_batch,
    measure_hardware,
    memory_needed,
    predict_speedups,
    sized_plans,
)
from .estimate import Estimate
from .paper import table
from .provenance import provenance, speed_key
from .store import Store
from .timing import speedups, timing

PUBLISHED_BITS = {"Llama-3-70B": 4.125, "Llama-2-70B": 4.125}  # 4 bits and a 16-bit scale per 128; the others 16
# headings of the tables, and digits after the point
SAME = ("published", "predicted", "ceiling", "decoding", "batch", "status", "seconds", "spread", "speedup", "limit")
NAMES = {column: column.capitalize() for column in SAME} | {
    "weight_bits": "Bits",
    "fits": "Largest batch that fits",
    "error_at_fits": "Error at it",
    "implied": "Implied batch",
    "error": "Its error",
    "needed_gb": "It needs (GB)",
    "times": "Implied / fits",
    "error_no_cache": "Error without cache",
    "prefill_speedup": "Prefill",
    "decode_speedup": "Decode",
    "at_fits": "At the batch that fits",
    "no_cache": "Without cache",
    "limit_seconds": "At least",
    "ratio": "Speedup / limit",
    "limit_prefill": "Prefill limit",
    "limit_decode": "Decode limit",
}
OF_3_DIGITS = ("error", "error_at_fits", "error_no_cache", "spread", "weight_bits", "seconds", "limit_seconds")
LIMITS = {  # what of `predict_speedups` stands beside measured columns, and by what names
    "speedup": "limit",
    "prefill_speedup": "limit_prefill",
    "decode_speedup": "limit_decode",
    "seconds": "limit_seconds",
}
DIGITS = dict.fromkeys(NAMES, 2) | dict.fromkeys(OF_3_DIGITS, 3) | {"needed_gb": 0}


def published_speedups() -> pd.DataFrame:
    """Every SpeedUp of Tables 1 to 3 as printed: table, model, method, n_dropped, published."""
    tables = {f"Table {k}": table(f"table{k:02d}") for k in (1, 2, 3)}
    rows = pd.concat(tables, names=["table"]).reset_index("table").rename(columns={"speedup": "published"})
    rows["n_dropped"] = n_dropped(rows["method"])
    return rows[["table", "model", "method", "n_dropped", "published"]].reset_index(drop=True)


def n_dropped(methods: pd.Series) -> pd.Series:
    """The numbers in row labels: "Attn-8" -> 8, "Baseline" -> 0."""
    return methods.str.extract(r"-(\d+)", expand=False).astype(float).fillna(0).astype(int)


def explain_published(hardware: str = "RTX 6000 Ada") -> tuple[pd.DataFrame, pd.DataFrame]:
    """(rows, models): the published speedups beside what bytes and FLOPs allow, and the batch sizes they imply.

    rows: those of `published_speedups`; batch: the model's implied one; predicted, with its prefill and decode parts,
    there; at_fits: predicted at the largest batch whose weights and cache fit the hardware; no_cache: by the protocol
    of the paper's repository, single tokens without context; ceiling: L / (L - n), the most that dropping n of L whole
    blocks can give.
    models: weight_bits, fits, its largest error; implied, its largest error; the gigabytes it needs; times: implied
    over fits, which is also how often each cached byte must move at the batch that fits; error_no_cache.
    """
    rows = []
    models = []
    for name, group in published_speedups().groupby("model", sort=False):
        printed = group.set_index("method")["published"]
        bits = PUBLISHED_BITS.get(name, 16)
        allowed = partial(predict_speedups, name, printed.index, hardware=hardware, weight_bits=bits)
        implied, error = implied_batch(name, printed, hardware=hardware, weight_bits=bits)
        fits = largest_batch(name, memory=HARDWARE[hardware][2], weight_bits=bits)

        limit = allowed(batch_size=implied).filter(like="speedup").rename(columns={"speedup": "predicted"})
        limit["at_fits"] = allowed(batch_size=fits)["speedup"]
        limit["no_cache"] = allowed(batch_size=fits, prompt_len=1, new_tokens=0)["speedup"]
        depth = shape_of(name).layers
        limit["ceiling"] = depth / (depth - group.set_index("method")["n_dropped"])
        rows.append(group.assign(batch=implied).join(limit, on="method"))

        errors = limit[["at_fits", "no_cache"]].sub(printed, axis=0).abs().max()
        models.append(
            {
                "model": name,
                "weight_bits": bits,
                "fits": fits,
                "error_at_fits": errors["at_fits"],
                "implied": implied,
                "error": error,
                "needed_gb": memory_needed(name, batch_size=implied, weight_bits=bits) / 1e9,
                "times": implied / fits,
                "error_no_cache": errors["no_cache"],
            }
        )
    return pd.concat(rows, ignore_index=True), pd.DataFrame(models)


def speedup_grid(
    model: str, label: str, batches: Iterable[int], contexts: Iterable[int], hardware: str = "RTX 6000 Ada"
) -> pd.DataFrame:
    """Predicted speedup of one row over batch and context (half prompt, half generated).

    Columns model, method, batch_size, context, speedup, fits: whether the whole model and its cache fit the hardware.
    """
    bits = PUBLISHED_BITS.get(model, 16)
    rows = []
    for batch, context in product(batches, contexts):
        row = {"model": model, "method": label, "batch_size": batch, "context": context}
        sizes = {"batch_size": batch, "prompt_len": context // 2, "new_tokens": context - context // 2}
        limit = predict_speedups(model, [label], hardware=hardware, weight_bits=bits, **sizes)
        row["speedup"] = limit["speedup"].item()
        row["fits"] = memory_needed(model, DropPlan(), batch, context, bits) <= HARDWARE[hardware][2]
        rows.append(row)
    return pd.DataFrame(rows)


def measure_beside_limit(
    store: Store, model: nn.Module, labels: Iterable[str], rounds: int = 3, **settings
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Measured speed of the rows named by `labels` beside what this machine's own bytes/s and FLOP/s allow.

    settings: of `measure_speed`. Both measurements go through `store`. Returns two frames. One row per label: method,
    n_dropped, the columns of `timing.speedups`, but for speedup, the geometric mean over rounds (its 95 % interval:
    `with_intervals`); limit, limit_prefill, limit_decode (speedups predicted for this cache, batch and context) and
    limit_seconds; ratio, measured over predicted speedup; bandwidth and rate, the machine's bytes/s and FLOP/s as found
    by `measure_hardware`. And a row per label and round, as from `timing`, with its limit.
    """
    plans = sized_plans(model, labels)
    variants = {label: Variant(plan=plan) for label, plan in plans.items()}
    timed = timing(model, variants, rounds=rounds, store=store, **settings)
    measured = speedups(timed).drop(columns=["speedup_low", "speedup_high"])
    log_seconds = np.log(timed.pivot(index="variant", columns="round", values="seconds"))
    measured["speedup"] = np.exp(-log_seconds.sub(log_seconds.loc[measured.index[0]]).mean(axis=1, skipna=False))
    device = str(model.get_input_embeddings().weight.device)
    dtype = str(model.dtype).removeprefix("torch.")
    bandwidth, rate = store.get(
        "hardware",
        speed_key(model) | {"version": roofline.VERSION},
        lambda: measure_hardware(device, dtype),
        f"{device}-{dtype}",
        lambda: provenance(model),
    )
    bits = torch.finfo(model.dtype).bits
    is_int4 = any(isinstance(module, Int4Linear) for module in model.modules())
    weight_bits = Int4Linear.bits if is_int4 else bits
    sizes = {"batch_size": 1, "prompt_len": 128, "new_tokens": 32, "cache": "dynamic"}  # as measure_speed has them
    sizes |= {name: settings[name] for name in sizes if name in settings}
    limit = predict_speedups(
        model, plans, hardware=(bandwidth, rate), weight_bits=weight_bits, cache_bits=bits, **sizes
    )
    limit = limit.rename(columns=LIMITS)[list(LIMITS.values())]
    out = measured.join(limit).rename_axis("method").reset_index()
    out["ratio"] = out["speedup"] / out["limit"]
    out["bandwidth"] = bandwidth
    out["rate"] = rate
    out.insert(1, "n_dropped", n_dropped(out["method"]))
    return out, timed.join(limit["limit"], on="variant")


def with_intervals(rows: pd.DataFrame, timed: pd.DataFrame) -> pd.DataFrame:
    """The rows of `measure_models` with speedup_low and speedup_high: 95 % intervals over the rounds beside them.

    Apart from measuring, because it needs scipy (`statistics.speed_ratio`). NaN for what did not fit.
    """
    from .statistics import speed_ratio

    rows = rows.copy()
    rows[["speedup_low", "speedup_high"]] = np.nan
    for (model, decoding), rounds in timed.groupby(["model", "decoding"], sort=False):
        baseline = rounds["variant"].iloc[0]
        is_here = (rows["model"] == model) & (rows["decoding"] == decoding) & rows["speedup"].notna()
        for index, label in rows.loc[is_here, "method"].items():
            ratio = speed_ratio(rounds, label, baseline)
            rows.loc[index, ["speedup_low", "speedup_high"]] = ratio.low, ratio.high
    return rows


def least_of_limit(timed: pd.DataFrame) -> Estimate:
    """The smallest measured speedup over the predicted one, with its interval over rounds.

    timed: from `measure_models`; of each model and way of decoding the first variant is the baseline. What did not fit
    is left out.
    """
    from .statistics import of_means  # needs scipy

    strata = []
    for _, rows in timed.groupby(["model", "decoding"], sort=False):
        seconds = np.log(rows.pivot(index="round", columns="variant", values="seconds")).dropna(axis=1)
        baseline = rows["variant"].iloc[0]
        limit = np.log(rows.groupby("variant")["limit"].first())
        of_dropped = seconds.drop(columns=baseline)
        strata.append((-of_dropped.sub(seconds[baseline], axis=0) - limit[of_dropped.columns]).to_numpy())
    least = of_means(lambda means: float(min(ratios.min() for ratios in means)), strata, "rounds")
    return least.exp()


def measure_models(
    store: Store,
    names: Iterable[str],
    dtype: str = "float32",
    device: str = "auto",
    batch_sizes: Mapping[str, int] = MappingProxyType({}),
    cache: str = "dynamic",
    decoding: str = "eager",
    rounds: int = 3,
    **settings,
) -> tuple[pd.DataFrame, pd.DataFrame, dict]:
    """`measure_beside_limit` of several models, one after the other; (rows, rounds, provenance of the last model).

    names: of `load_model`, or keys of GEOMETRIES (random weights; 4-bit where the paper's are). A model that the paper
    prints speedups of is measured by its own rows, any other by those of Table 1, as far as its depth allows.
    batch_sizes: by name without revision; others 1. decoding, cache, settings: of `measure_speed`. Where decoding is
    not "eager", the baseline and the deepest Attention Drop are measured eagerly with a dynamic cache too. Columns in
    front of the rows: model, decoding, batch; rounds have the first two as well.
    """
    frames = []
    frames_of_rounds = []
    facts = {}
    for name in names:
        model = _load(name, dtype, device)
        labels = rows_to_measure(name, find_anatomy(model).n_layers)
        batch = batch_sizes.get(name.split("@")[0], 1)
        runs = {decoding: (labels, cache)}
        if decoding != "eager":
            attn = sorted((label for label in labels if label.startswith("Attn")), key=lambda label: int(label[5:]))
            runs["eager"] = (["Baseline", *attn[-1:]], "dynamic")
        for how, (some, kind) in runs.items():
            options = settings | {"batch_size": batch, "cache": kind, "decoding": how}
            frame, timed = measure_beside_limit(store, model, some, rounds, **options)
            frames.append(frame.assign(batch=batch, decoding=how, model=name))
            frames_of_rounds.append(timed.assign(decoding=how, model=name))
        facts = provenance(model)
        del model  # the next one may not fit beside it
    out = pd.concat(frames, ignore_index=True)
    front = ["model", "decoding", "batch"]
    out = out[front + [column for column in out if column not in front]]
    return out, pd.concat(frames_of_rounds, ignore_index=True), facts


def _load(name: str, dtype: str, device: str) -> nn.Module:
    """A model of `load_model`, or one of GEOMETRIES with random weights, in 4 bits where the paper's is."""
    if name in GEOMETRIES:
        return geometry_model(name, check_device(device), dtype, 4 if name in PUBLISHED_BITS else 16)
    return load_model(name, dtype, device)[0]


def rows_to_measure(name: str, n_layers: int) -> list[str]:
    """The published rows to measure, "Baseline" first: the model's own, else Table 1's, of less than its depth."""
    published = published_speedups()
    own = published[published["model"] == name]
    rows = own if len(own) else published[published["table"] == "Table 1"]
    rows = rows[(rows["n_dropped"] > 0) & (rows["n_dropped"] < n_layers)]
    return ["Baseline", *rows["method"].unique()]


def largest_batches(published: pd.DataFrame, memory: float = 48e9, device: str | None = None) -> pd.DataFrame:
    """Table 4's models: the largest batch before and after its drops, at its sequence length.

    published: the rows of Table 4. Columns model, weight_bits, tokens, dropped; fits_before, fits_after: weights and
    cache within `memory` bytes; measured_before, measured_after: what a prefill and the generation of one token really
    run with on `device`, as `largest_measured_batch` finds it (None without one): activations and the allocator take
    their part of its memory.
    """
    rows = []
    for printed in published.itertuples(index=False):
        name, tokens = printed.model, printed.sequence_length
        bits = PUBLISHED_BITS.get(name, 16)
        dropped = DropPlan(attn=range(printed.layers_after, printed.layers_before))
        row = {"model": name, "weight_bits": bits, "tokens": tokens, "dropped": len(dropped)}
        plans = {"before": DropPlan(), "after": dropped}
        for when, plan in plans.items():
            row[f"fits_{when}"] = largest_batch(name, plan, tokens, memory, weight_bits=bits)
        row |= {"measured_before": None, "measured_after": None}
        if device is not None:
            model = _load(name, "bfloat16", device)
            total = torch.cuda.get_device_properties(device).total_memory
            for when, plan in plans.items():
                at_most = largest_batch(name, plan, tokens, total, weight_bits=bits)
                row[f"measured_{when}"] = largest_measured_batch(apply_plan(model, plan), tokens, at_most)
            del model  # the next one may not fit beside it
        rows.append(row)
    return pd.DataFrame(rows)


def largest_measured_batch(model: nn.Module, tokens: int, at_most: int) -> int:
    """Largest batch up to at_most with which a prefill of tokens - 1 and one generated token fit in a GPU's memory.

    Memory grows by as much with every sequence, so the peaks of one and of two say how many fit. That many are run to
    make sure, and 5 % fewer until they do.
    """
    device = model.get_input_embeddings().weight.device
    one, two = (_peak_bytes(model, batch, tokens) if batch <= at_most else None for batch in (1, 2))
    if one is None or two is None:
        return 0 if one is None else 1
    room = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - one
    batch = max(2, min(at_most, 1 + room // max(two - one, 1)))
    while batch > 2 and _peak_bytes(model, batch, tokens) is None:
        batch = max(2, int(0.95 * batch))
    return batch


def _peak_bytes(model: nn.Module, batch_size: int, tokens: int) -> int | None:
    """Memory in use at most while that runs; None where it is not enough."""
    try:
        timing = measure_speed(model, batch_size, prompt_len=tokens - 1, new_tokens=1, repeats=1, warm_up=False)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        torch.cuda.empty_cache()
        return None
    return timing["peak_bytes"]


def panels(published: pd.DataFrame, measured: pd.DataFrame) -> pd.DataFrame:
    """What `plot_speedups` draws, in one frame: the rows of `explain_published` and of `with_intervals`.

    Columns panel (model, batch, "here" where it was measured), method, n_dropped, source, value, low, high, decoding.
    """
    here = measured.assign(panel=measured["model"] + " here, batch " + measured["batch"].astype(str))
    there = published.assign(panel=published["model"] + ", batch " + published["batch"].astype(str))
    first = here["decoding"] == measured["decoding"].iloc[0]
    parts = [
        there.assign(source="limit", value=there["predicted"]),
        there.assign(source="paper", value=there["published"]),
        here[first].assign(source="limit", value=here["limit"]),
        here.assign(source="measured", value=here["speedup"], low=here["speedup_low"], high=here["speedup_high"]),
    ]
    columns = ["panel", "method", "n_dropped", "source", "value", "low", "high", "decoding"]
    return pd.concat(parts, ignore_index=True)[columns]
