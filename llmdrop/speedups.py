"""Speedups side by side: as published in Tables 1 to 3, as bytes and FLOPs allow, and as measured here.

The prediction is `roofline.predict_speed`, the measurement `speed.compare_speed`; this module lines them up by row
("Attn-8", "MLP-4", ...) and draws them. A machine that only measures needs no drawing library: imported late.
"""

from collections.abc import Iterable, Mapping

import pandas as pd
import torch

from .anatomy import anatomy
from .fingerprint import provenance, speed_key
from .geometry import Int4Linear, geometry_model
from .models import GEOMETRIES, check_device, load_model
from .paper import table
from .plan import DropPlan
from .prune import apply_plan
from .roofline import (
    HARDWARE,
    implied_batch,
    largest_batch,
    measure_hardware,
    memory_needed,
    predict_speedups,
    shapes,
    sized_plan,
)
from .speed import that_fits

PUBLISHED_BITS = {"Llama-3-70B": 4.125, "Llama-2-70B": 4.125}  # 4 bits and a 16-bit scale per 128; the others 16
NAMES = {
    "weight_bits": "Bits",
    "fits": "Largest batch that fits",
    "error_at_fits": "Error at it",
    "implied": "Implied batch",
    "error": "Its error",
    "needed_gb": "It needs (GB)",
    "times": "Implied / fits",
    "error_no_cache": "Error without cache",
    "published": "Published",
    "predicted": "Predicted",
    "prefill_speedup": "Prefill",
    "decode_speedup": "Decode",
    "at_fits": "At the batch that fits",
    "no_cache": "Without cache",
    "ceiling": "Ceiling",
    "decoding": "Decoding",
    "batch": "Batch",
    "status": "Status",
    "seconds": "Seconds",
    "limit_seconds": "At least",
    "spread": "Spread",
    "speedup": "Speedup",
    "limit": "Limit",
    "ratio": "Speedup / limit",
    "limit_prefill": "Prefill limit",
    "limit_decode": "Decode limit",
}
DIGITS = dict.fromkeys(NAMES, 2) | dict.fromkeys(["error", "error_at_fits", "error_no_cache", "spread"], 3)
DIGITS |= {"weight_bits": 3, "needed_gb": 0, "seconds": 3, "limit_seconds": 3}


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
    if hardware not in HARDWARE:
        raise ValueError(f"unknown hardware {hardware!r}; known: {', '.join(HARDWARE)}")
    rows, models = [], []
    for name, group in published_speedups().groupby("model", sort=False):
        printed, bits = group.set_index("method")["published"], PUBLISHED_BITS.get(name, 16)
        options = {"hardware": hardware, "weight_bits": bits}
        fits = largest_batch(name, memory=HARDWARE[hardware][2], weight_bits=bits)
        implied, error = implied_batch(name, printed, **options)
        limit = predict_speedups(name, printed.index, batch_size=implied, **options).filter(like="speedup")
        limit["at_fits"] = predict_speedups(name, printed.index, batch_size=fits, **options)["speedup"]
        options |= {"batch_size": fits, "prompt_len": 1, "new_tokens": 0}
        limit["no_cache"] = predict_speedups(name, printed.index, **options)["speedup"]
        limit["ceiling"] = shapes(name)[0] / (shapes(name)[0] - group.set_index("method")["n_dropped"])
        rows.append(group.assign(batch=implied).join(limit.rename(columns={"speedup": "predicted"}), on="method"))
        misses = limit[["at_fits", "no_cache"]].sub(printed, axis=0).abs().max()
        needed = memory_needed(name, batch_size=implied, weight_bits=bits) / 1e9
        models.append((name, bits, fits, misses["at_fits"], implied, error, needed, implied / fits, misses["no_cache"]))
    columns = ["model", "weight_bits", "fits", "error_at_fits", "implied", "error", "needed_gb", "times"]
    return pd.concat(rows, ignore_index=True), pd.DataFrame(models, columns=[*columns, "error_no_cache"])


def speedup_grid(
    model: str, label: str, batches: Iterable[int], contexts: Iterable[int], hardware: str = "RTX 6000 Ada"
) -> pd.DataFrame:
    """Predicted speedup of one row over batch and context (half prompt, half generated).

    Columns model, method, batch_size, context, speedup, fits: whether the whole model and its cache fit the hardware.
    """
    bits, rows = PUBLISHED_BITS.get(model, 16), []
    for batch in batches:
        for context in contexts:
            sizes = {"batch_size": batch, "prompt_len": context // 2, "new_tokens": context - context // 2}
            speedup = predict_speedups(model, [label], hardware=hardware, weight_bits=bits, **sizes)["speedup"].item()
            fits = memory_needed(model, DropPlan(), batch, context, bits) <= HARDWARE[hardware][2]
            rows.append((model, label, batch, context, speedup, fits))
    return pd.DataFrame(rows, columns=["model", "method", "batch_size", "context", "speedup", "fits"])


def measure_beside_limit(store, model, labels: Iterable[str], **settings) -> pd.DataFrame:
    """Measured speed of the rows named by `labels` beside what this machine's own bytes/s and FLOP/s allow.

    settings as for `compare_speed`. Both measurements go through `store`. Returns one row per label: method, n_dropped,
    the columns of `compare_speed`; limit, limit_prefill, limit_decode (speedups predicted for this cache, batch and
    context) and limit_seconds; ratio, measured over predicted speedup; bandwidth and rate, the machine's bytes/s and
    FLOP/s as found by `measure_hardware`.
    """
    labels, dtype = list(labels), str(model.dtype).removeprefix("torch.")
    plans = {label: sized_plan(label, shapes(model)[0]) for label in labels}
    measured = store.speed(model, plans, **settings).set_index("plan")
    device = str(model.get_input_embeddings().weight.device)
    key, slug = speed_key(model, "roofline"), f"{device}-{dtype}"
    found = store.get("hardware", key, lambda: measure_hardware(device, dtype), slug, lambda: provenance(model))
    bits = torch.finfo(model.dtype).bits
    sizes = {"batch_size": 1, "prompt_len": 128, "new_tokens": 32, "cache": "dynamic"}  # as measure_speed has them
    sizes |= {name: settings[name] for name in sizes if name in settings}
    sizes["weight_bits"] = Int4Linear.bits if any(isinstance(m, Int4Linear) for m in model.modules()) else bits
    limit = predict_speedups(model, labels, hardware=tuple(found), cache_bits=bits, **sizes)
    names = {"speedup": "limit", "prefill_speedup": "limit_prefill", "decode_speedup": "limit_decode"}
    names |= {"seconds": "limit_seconds"}
    out = measured.join(limit[list(names)].rename(columns=names)).rename_axis("method").reset_index()
    out["ratio"], out["bandwidth"], out["rate"] = out["speedup"] / out["limit"], found[0], found[1]
    out.insert(1, "n_dropped", n_dropped(out["method"]))
    return out


def measure_models(
    store,
    names: Iterable[str],
    dtype: str = "float32",
    device: str = "auto",
    batch_size: int | Mapping[str, int] = 1,
    cache: str = "dynamic",
    compiled: bool | str = False,
    **settings,
) -> tuple[pd.DataFrame, dict]:
    """`measure_beside_limit` of several models, one after the other; (rows, provenance of the last model).

    names: of `load_model`, measured by the rows of Table 1, or keys of GEOMETRIES (random weights; 4-bit where the
    paper's are), measured by their own published rows. batch_size: one for all, or by name without revision (others 1).
    Where decoding is compiled, the baseline and the deepest Attention Drop are measured eagerly with a dynamic cache
    too. Columns in front: model, decoding ("eager", "graph", "compiled"), batch.
    """
    published, frames, facts = published_speedups(), [], {}
    for name in names:
        shape = name in GEOMETRIES
        if shape:
            model = geometry_model(name, check_device(device), dtype, 4 if name in PUBLISHED_BITS else 16)
        else:
            model, _ = load_model(name, dtype, device)
        rows = published[published["model"].eq(name) if shape else published["table"].eq("Table 1")]
        rows = rows[rows["n_dropped"] < anatomy(model).n_layers]  # a model of few layers has not all of them
        batch = batch_size if isinstance(batch_size, int) else batch_size.get(name.split("@")[0], 1)
        deepest = rows[rows["method"].str.startswith("Attn")].sort_values("n_dropped")["method"].iloc[-1]
        runs = {"compiled" if compiled is True else compiled or "eager": (rows["method"].unique(), cache, compiled)}
        runs |= {"eager": (["Baseline", deepest], "dynamic", False)} if compiled else {}
        for decoding, (labels, kind, how) in runs.items():
            options = {"batch_size": batch, "cache": kind, "compiled": how} | settings
            frame = measure_beside_limit(store, model, labels, **options)
            frames.append(frame.assign(batch=batch, decoding=decoding, model=name))
        facts = provenance(model)
        del model  # the next one may not fit beside it
    out = pd.concat(frames, ignore_index=True)
    front = ["model", "decoding", "batch"]
    return out[front + [column for column in out if column not in front]], facts


def largest_batches(published: pd.DataFrame, memory: float = 48e9, device: str | None = None) -> pd.DataFrame:
    """Table 4's models: the largest batch before and after its drops, at its sequence length.

    published: the rows of Table 4. Columns model, weight_bits, tokens, dropped; fits_before, fits_after: weights and
    cache within `memory` bytes; measured_before, measured_after: what a prefill and the generation of one token really
    run with on `device`, to 5 % (None without one): activations and the allocator take their part of its memory.
    """
    rows = []
    for name, tokens, n_layers, n_left in published[
        ["model", "sequence_length", "layers_before", "layers_after"]
    ].itertuples(index=False):
        bits, plan = PUBLISHED_BITS.get(name, 16), DropPlan(attn=range(n_left, n_layers))
        fits = [largest_batch(name, p, tokens, memory, bits) for p in (DropPlan(), plan)]
        found = [None, None]
        if device is not None:
            model = geometry_model(name, device, "bfloat16", 4 if name in PUBLISHED_BITS else 16)
            total = torch.cuda.get_device_properties(device).total_memory
            for k, part in enumerate((DropPlan(), plan)):
                at_most = largest_batch(name, part, tokens, total, bits)
                found[k] = largest_measured_batch(apply_plan(model, part), tokens, at_most)
            del model
        rows.append((name, bits, tokens, n_layers - n_left, *fits, *found))
    columns = ["model", "weight_bits", "tokens", "dropped", "fits_before", "fits_after"]
    return pd.DataFrame(rows, columns=[*columns, "measured_before", "measured_after"])


def largest_measured_batch(model, tokens: int, at_most: int) -> int:
    """Largest batch up to at_most, to 5 %, with which a prefill of tokens - 1 and one generated token fit in memory."""
    fits, too_many, batch = 0, at_most + 1, at_most
    while batch > fits:
        _, largest = that_fits(model, batch, prompt_len=tokens - 1, new_tokens=1, repeats=1, warm_up=False)
        fits = max(fits, largest)
        while batch > largest:  # this failed, and each of its halves down to the one that fits
            too_many, batch = batch, batch // 2
        batch = (fits + too_many) // 2 if too_many - fits > max(1, 0.05 * fits) else fits
    return fits


def panels(published: pd.DataFrame, measured: pd.DataFrame) -> pd.DataFrame:
    """What `plot_speedups` draws, in one frame: the rows of `explain_published` and of `measure_models`.

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


def plot_speedups(df: pd.DataFrame, ax) -> None:
    """Speedup against the number of dropped modules: limits as lines, published values hollow, measured ones filled.

    `df`: `method`, `n_dropped`, `value`, `source` ("limit", "paper" or "measured"); measured rows may have `low` and
    `high`, the ends of their error bar, and `decoding`: eager ones, where there are others, are drawn small.
    """
    from . import style
    from .figures import plot_drop_curves

    measured = df[(df["source"] == "measured") & (df["n_dropped"] > 0)].dropna(subset="value")
    drawn = df[(df["source"] == "limit") | ((df["source"] == "paper") & (df["n_dropped"] > 0))]
    plot_drop_curves(drawn.assign(method=drawn["method"].map(style.name)), ax, "Speedup", legend=False)
    for line in ax.lines:
        if line.get_linestyle() != "None":
            line.set_marker("")
    for row in measured.to_dict("records"):
        low, high = (row["value"] - row.get("low", row["value"])), (row.get("high", row["value"]) - row["value"])
        small = row.get("decoding") == "eager" and measured["decoding"].nunique() > 1
        look = style.method(row["method"]) | {"linestyle": "", "markersize": 2 if small else 4}
        ax.errorbar(row["n_dropped"], row["value"], yerr=[[low], [high]], lw=0.8, **look)
    if len(measured):
        ax.plot([], [], "o", color=style.PAPER_EDGE, label="Measured")


def plot_grid(df: pd.DataFrame, ax) -> None:
    """Heat map of `speedup_grid`; what does not fit the hardware's memory is hatched."""
    import seaborn as sns
    from matplotlib.patches import Rectangle

    wide = df.pivot(index="batch_size", columns="context", values="speedup").iloc[::-1]
    fits = df.pivot(index="batch_size", columns="context", values="fits").iloc[::-1].to_numpy(bool)
    sns.heatmap(wide, vmin=1, vmax=2, cmap="YlGnBu", annot=True, fmt=".2f", annot_kws={"size": 5}, cbar=False, ax=ax)
    for y, x in zip(*(~fits).nonzero(), strict=True):
        ax.add_patch(Rectangle((x, y), 1, 1, fill=False, hatch="////", lw=0, ec="#888888", alpha=0.6))
    ax.set(title=f"{df['model'].iloc[0]}, {df['method'].iloc[0]}", xlabel="Context (tokens)", ylabel="Batch")
    ax.set_xticklabels([f"{c // 1024}k" if c >= 1024 else c for c in wide.columns], rotation=0)
    ax.set_yticklabels(wide.index, rotation=0)
    ax.tick_params(length=0)
