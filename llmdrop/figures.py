"""The paper's figures from tidy data: plot_*(df, ax) draw, save_figure writes PDF, PNG, caption, numbers, provenance.

Nothing here measures. A frame without the columns a figure needs is refused by name. Rows with `source == "paper"`
are published values, drawn as hollow markers. Tables are in `tables.py`, also reachable from here.
"""

import io

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Patch, Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

from . import style
from .paper import write_atomic
from .tables import (
    CHANCE,
    NAMES,
    by_plan,
    compare,
    format_table,
    provenance_json,
    published_drops,
    record_worst,
    save_table,
)

__all__ = [
    "CHANCE",
    "NAMES",
    "by_plan",
    "compare",
    "format_table",
    "legend_above",
    "plot_bars",
    "plot_checkpoints",
    "plot_drop_curves",
    "plot_dropping_order",
    "plot_importance",
    "plot_losses",
    "plot_over_training",
    "plot_sample_size",
    "plot_schematic",
    "plot_scores",
    "published_drops",
    "record_worst",
    "save_figure",
    "save_table",
    "training_axis",
]


def plot_importance(df: pd.DataFrame, ax, rows: str = "calibration", notes: dict | None = None) -> None:
    """Figures 2 and 3: heat maps of importance, one column a layer and one row a calibration set, dark = important.

    `df`: `kind` ("block", "mlp", "attn"), `layer`, `score` and the column named by `rows`. `ax`: one Axes per kind,
    in the order block, MLP, attention. All share one log scale, since layer 0 and the last MLP are far above the
    rest; the top 6 % share the darkest colour. `notes`: {(kind, row): text} printed right of a row.
    """
    _need(df, "plot_importance", "kind", "layer", "score", rows)
    kinds = [k for k in ("block", "mlp", "attn") if k in set(df["kind"])]
    axes = list(np.atleast_1d(ax).flat)
    if len(axes) != len(kinds):
        raise ValueError(
            f"plot_importance: {len(axes)} Axes for {len(kinds)} kinds ({', '.join(kinds)}); give one each"
        )
    positive = df.loc[df["score"] > 0, "score"]
    low, high = positive.min(), positive.quantile(0.94)
    norm = LogNorm(low, max(high, low * 1.01), clip=True)
    for axis, kind in zip(axes, kinds, strict=True):
        grid = df[df["kind"] == kind].pivot_table("score", rows, "layer", sort=False).sort_index(axis=1)
        edges = np.append(grid.columns, grid.columns[-1] + 1) - 0.5
        mesh = axis.pcolormesh(
            edges,
            np.arange(len(grid) + 1) - 0.5,
            np.maximum(grid, low),  # NaN (a dropped layer) stays NaN and shows as white
            norm=norm,
            cmap="YlGnBu",
            edgecolors="white",
            linewidth=0.3,
        )
        axis.set(title=style.KINDS[kind], yticks=range(len(grid)), yticklabels=grid.index)
        axis.invert_yaxis()
        axis.tick_params(length=0, axis="y")
        axis.spines[:].set_visible(False)
        axis.grid(False)
        axis.xaxis.set_major_locator(_whole())
        axis.tick_params(labelbottom=axis is axes[-1])
        for y, row in enumerate(grid.index):
            if notes and (kind, row) in notes:
                axis.text(edges[-1] + 0.3, y, notes[kind, row], va="center", fontsize=6.5)
    axes[-1].set_xlabel("Layer")
    bar = axes[0].figure.colorbar(mesh, ax=axes, label="Importance\n(1 − cosine)", extend="max", pad=0.02, aspect=25)
    _plain_log_ticks(bar.ax.yaxis)


def plot_sample_size(df: pd.DataFrame, ax) -> None:
    """Figure 10: importance for growing calibration sets, with each row's rank correlation against the largest.

    `df`: `kind`, `n_samples`, `layer`, `score`. `ax`: one Axes per kind, as for plot_importance.
    """
    _need(df, "plot_sample_size", "kind", "n_samples", "layer", "score")
    df = df.sort_values("n_samples")
    notes = {}
    for kind, rows in df.groupby("kind"):
        by_size = rows.pivot_table("score", "layer", "n_samples").corr("spearman").iloc[-1]
        notes |= {(kind, n): f"ρ = {rho:.3f}" for n, rho in by_size.iloc[:-1].items()}
    plot_importance(df, ax, rows="n_samples", notes=notes)
    for axis in np.atleast_1d(ax).flat:
        axis.set_ylabel("Samples")


def plot_checkpoints(df: pd.DataFrame, ax) -> None:
    """Figure 7: heat maps of importance, one column a checkpoint of a training run and one row a layer.

    `df`: `kind`, `tokens` (seen in training), `layer`, `score`. `ax`: two rows of Axes, one column per kind in the
    order block, MLP, attention: layer 0 is far above all others, so the lower row shows it apart, on its own scale.
    """
    _need(df, "plot_checkpoints", "kind", "tokens", "layer", "score")
    kinds, axes = [k for k in ("block", "mlp", "attn") if k in set(df["kind"])], np.asarray(ax)
    if axes.shape != (2, len(kinds)):
        raise ValueError(
            f"plot_checkpoints: Axes of shape {axes.shape} for {len(kinds)} kinds ({', '.join(kinds)}); "
            f"give 2 rows of {len(kinds)}, as from plt.subplots(2, {len(kinds)})"
        )
    apart = df["layer"] == 0
    low, high = df.loc[~apart & (df["score"] > 0), "score"].quantile([0.02, 0.99])
    log = {"norm": LogNorm(low, max(high, low * 1.01), clip=True), "cmap": "YlGnBu"}
    linear = {"vmin": 0, "vmax": max(1, df.loc[apart, "score"].max()), "cmap": "YlOrBr"}
    for kind, (upper, lower) in zip(kinds, axes.T, strict=True):
        for axis, part, look in ((upper, df[~apart], log), (lower, df[apart], linear)):
            grid = part[part["kind"] == kind].pivot(index="layer", columns="tokens", values="score")
            edges = np.append(grid.index, grid.index[-1] + 1) - 0.5
            values = np.maximum(grid, low if axis is upper else 0)
            columns = np.arange(grid.shape[1] + 1) - 0.5
            mesh = axis.pcolormesh(columns, edges, values, edgecolors="white", linewidth=0.3, **look)
            axis.grid(False)
            axis.spines[:].set_visible(False)
            axis.invert_yaxis()
            every = -(-grid.shape[1] // 5)  # so many columns are named, the last one always
            at = range((grid.shape[1] - 1) % every, grid.shape[1], every)
            axis.set_xticks(at, [_tokens(grid.columns[i]) for i in at])
            axis.tick_params(length=0, labelbottom=axis is lower, labelleft=kind == kinds[0])
            if kind == kinds[-1]:
                row, aspect = (axes[0], 20) if axis is upper else (axes[1], 3)
                bar = upper.figure.colorbar(mesh, ax=list(row), pad=0.02, fraction=0.05, aspect=aspect)
                if axis is upper:
                    bar.set_label("Importance (1 − cosine)")
                    _plain_log_ticks(bar.ax.yaxis)
        upper.set_title(style.KINDS[kind])
        upper.yaxis.set_major_locator(_whole())
        lower.set_yticks([0])
    axes[0, 0].set_ylabel("Layer")
    axes[1, len(kinds) // 2].set_xlabel("Training tokens")


def plot_over_training(df: pd.DataFrame, ax, value: str, ylabel: str, log: bool = False, levels=None) -> None:
    """A number against training tokens, one line a kind: its mean, with a band from the 10 % to the 90 % quantile.

    `df`: `kind`, `tokens` and the column named by `value`, one row per layer, run or both. Step 0 stands left of the
    log axis. `levels`: {kind: value} to compare with, dotted.
    """
    _need(df, "plot_over_training", "kind", "tokens", value)
    for kind in [k for k in ("block", "mlp", "attn") if k in set(df["kind"])]:
        by_tokens, look = df[df["kind"] == kind].groupby("tokens")[value], style.method(kind)
        low, high = by_tokens.quantile(0.1), by_tokens.quantile(0.9)
        ax.fill_between(low.index, low, high, color=look["color"], alpha=0.16, linewidth=0)
        ax.plot(low.index, by_tokens.mean(), label=style.KINDS[kind], **look)
        if levels is not None and kind in levels:
            ax.axhline(levels[kind], color=look["color"], lw=0.8, ls=":")
    training_axis(ax, df["tokens"])
    ax.set(ylabel=ylabel)
    if log:
        ax.set_yscale("log")
        _plain_log_ticks(ax.yaxis)
        low, high = ax.get_ylim()
        if high > 100 * low:  # decades are labels enough
            ax.yaxis.set_major_locator(LogLocator())


def plot_losses(df: pd.DataFrame, ax, baselines: dict[str, float]) -> None:
    """Validation loss of each run against training tokens, with its standard error, and the losses it has to beat.

    `df`: `run`, `tokens`, `valid_loss`, `valid_stderr`, optionally `train_loss`. `baselines`: {name: loss}.
    """
    _need(df, "plot_losses", "run", "tokens", "valid_loss", "valid_stderr")
    for i, (_, rows) in enumerate(df.groupby("run", sort=False)):
        label = ["Validation", "Training"] if i == 0 else ["_", "_"]
        if "train_loss" in rows:
            ax.plot(rows["tokens"], rows["train_loss"], ":", color="#7F7F7F", lw=0.9, label=label[1])
        ax.plot(rows["tokens"], rows["valid_loss"], "o-", color="black", ms=2.5, lw=0.9, label=label[0])
        _band(ax, rows["tokens"], rows["valid_loss"], rows["valid_stderr"], "black")
    training_axis(ax, df["tokens"])
    for name, loss in baselines.items():
        ax.axhline(loss, color="0.35", lw=0.8, ls=(0, (4, 2)))
        ax.annotate(name, (0.01, loss), (0, -1), xycoords=("axes fraction", "data"), textcoords="offset points",
                    va="top", fontsize=6.5)  # fmt: skip
    ax.set(ylabel="Loss (nats per token)")


def training_axis(ax, tokens) -> None:
    """Make x a log axis of training tokens on which step 0 has a place."""
    first = min(n for n in tokens if n > 0)
    if min(tokens) == 0:
        ax.set_xscale("symlog", linthresh=first, linscale=0.5)
    else:
        ax.set_xscale("log")
    decades = [10.0**i for i in range(1, 15) if first <= 10.0**i <= max(tokens)]
    ax.set_xticks([0] * (min(tokens) == 0) + decades, minor=False)
    ax.xaxis.set_major_formatter(lambda value, position: _tokens(value))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set(xlabel="Training tokens", xlim=(-0.2 * first if min(tokens) == 0 else first / 1.3, 1.3 * max(tokens)))


def plot_scores(df: pd.DataFrame, ax, log: bool = True) -> None:
    """Importance against depth, one line a kind. `df`: `kind`, `layer`, `score`; `stderr` draws a band."""
    _need(df, "plot_scores", "kind", "layer", "score")
    for kind in [k for k in ("block", "mlp", "attn") if k in set(df["kind"])]:
        rows, look = df[df["kind"] == kind].sort_values("layer"), style.method(kind)
        ax.plot(rows["layer"], rows["score"], label=style.KINDS[kind], **look)
        _band(ax, rows["layer"], rows["score"], rows.get("stderr"), look["color"], log)
    ax.set(xlabel="Layer", ylabel="Importance (1 − cosine)")
    ax.xaxis.set_major_locator(_whole())
    if log:
        ax.set_yscale("log")
        _plain_log_ticks(ax.yaxis)
    _legend_above(ax, 3)


def plot_drop_curves(
    df: pd.DataFrame, ax, ylabel: str = "Accuracy", chance: float | None = None, log: bool = False, legend: bool = True
) -> None:
    """Figures 5 and 8: a measurement against the number of dropped modules, one curve a method.

    `df`: `method`, `n_dropped`, `value`. Optional: `stderr` (a band), `source` ("paper" rows become hollow markers),
    `step` ("attn" or "mlp": what a Joint step dropped, drawn as a square or a star). Rows of method "Baseline" give
    the dashed baseline, `chance` the dotted line of random guessing.
    """
    _need(df, "plot_drop_curves", "method", "n_dropped", "value")
    paper = df.get("source", pd.Series("", index=df.index)) == "paper"
    base = df[(df["method"] == "Baseline") & ~paper]
    if len(base):
        look = style.METHODS["Baseline"]
        ax.axhline(base["value"].iloc[0], color=look["color"], linestyle=look["linestyle"], lw=0.8, label="Baseline")
    if chance is not None:
        look = style.METHODS["Random"]
        ax.axhline(chance, color=look["color"], linestyle=look["linestyle"], lw=1, label="Random guess")
    for method in sorted(set(df["method"]) - {"Baseline"}, key=lambda m: list(style.METHODS).index(style.name(m))):
        look = style.method(method)
        rows = df[(df["method"] == method) & ~paper].sort_values("n_dropped")
        if len(base) and len(rows) and rows["n_dropped"].min() > 0:  # nothing dropped is where every curve starts
            rows = pd.concat([base.head(1).assign(n_dropped=0), rows])
        steps = rows["step"].isin(["attn", "mlp"]) if "step" in rows else pd.Series(False, index=rows.index)
        line = look | {"marker": ""} if steps.any() else look
        if len(rows):
            ax.plot(rows["n_dropped"], rows["value"], label=method, markevery=max(1, len(rows) // 16), **line)
            _band(ax, rows["n_dropped"], rows["value"], rows.get("stderr"), look["color"], log)
        for kind, marker, size in (("attn", "s", 3.2), ("mlp", "*", 6)):
            at = rows[steps & (rows.get("step") == kind)] if steps.any() else rows[:0]
            if len(at):
                name = f"{method}: {style.KINDS[kind]} step"
                ax.plot(at["n_dropped"], at["value"], marker, ms=size, mew=0, color=look["color"], label=name)
        printed = df[(df["method"] == method) & paper]
        hollow = {"linestyle": "", "markerfacecolor": "white", "zorder": 3, "label": "_"}
        ax.plot(printed["n_dropped"], printed["value"], color=look["color"], marker=look["marker"], **hollow)
    if paper.any():
        ax.plot([], [], "o", color=style.PAPER_EDGE, markerfacecolor="white", label="Published")
    if log:
        ax.set_yscale("log")
        _plain_log_ticks(ax.yaxis)
    ax.set(xlabel="Dropped modules", ylabel=ylabel)
    ax.xaxis.set_major_locator(_whole())
    if legend:
        _legend_above(ax, 3)


def plot_dropping_order(df: pd.DataFrame, ax, n_layers: int, legend: bool = True) -> None:
    """Figures 6 and 11: which layers are retained (yellow) and dropped (red) as more of them go.

    `df`: `layer`, `step` (1 = dropped first; NaN or no row = never). An optional `published_step` is the step at which
    the authors dropped that layer, marked by a circle.
    """
    _need(df, "plot_dropping_order", "layer", "step")
    if df["step"].isna().all():
        raise ValueError("plot_dropping_order: no layer has a step; give the drop order as steps 1, 2, ...")
    n_steps = int(df["step"].max())
    first = df.set_index("layer")["step"].reindex(range(n_layers)).fillna(np.inf).to_numpy()
    gone = first[:, None] <= np.arange(1, n_steps + 1)  # [layer, number dropped]
    ax.pcolormesh(
        np.arange(n_steps + 1) + 0.5,
        np.arange(n_layers + 1) - 0.5,
        gone,
        cmap=ListedColormap([style.RETAINED, style.DROPPED]),
        vmin=0,
        vmax=1,
        edgecolors="white",
        linewidth=0.25,
    )
    for color, name in ((style.RETAINED, "Retained"), (style.DROPPED, "Dropped")):
        ax.plot([], [], "s", ms=6, color=color, mec=color, label=name)
    if "published_step" in df and df["published_step"].notna().any():
        circle = {"ms": 3, "mfc": "white", "mec": style.PAPER_EDGE, "mew": 0.6}
        ax.plot(df["published_step"], df["layer"], "o", **circle, label="Published step")
    ax.set(xlabel="Number dropped", ylabel="Layer")
    ax.grid(False)
    ax.spines[:].set_visible(False)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(_whole())
    ax.set(xlim=(0.5, n_steps + 0.5), ylim=(-0.5, n_layers - 0.5))
    if legend:
        _legend_above(ax, 3)


def plot_bars(
    df: pd.DataFrame, ax, x: str = "task", hue: str = "strategy", ylabel: str = "Accuracy", legend: bool = True
) -> None:
    """Figure 9: bars in groups, with error bars, their values, and published values as hollow markers.

    `df`: the columns named by `x` and `hue`, `value`; optional `stderr` and `source`. Order is that of appearance.
    """
    _need(df, "plot_bars", x, hue, "value")
    paper = df.get("source", pd.Series("", index=df.index)) == "paper"
    groups, hues = list(df[x].unique()), list(df[hue].unique())
    width = 0.8 / len(hues)
    colors = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    for i, name in enumerate(hues):
        try:
            color = style.method(name)["color"]
        except ValueError:  # not a method: a strategy, a metric, a calibration set
            color = [colors[0], colors[5], *colors[1:5]][i % 6]
        at = {g: j + (i - (len(hues) - 1) / 2) * width for j, g in enumerate(groups)}
        rows, printed = df[(df[hue] == name) & ~paper], df[(df[hue] == name) & paper]
        if len(rows):
            where, error = rows[x].map(at), rows.get("stderr")
            ax.bar(where, rows["value"], width * 0.92, yerr=error, color=color, label=name, error_kw={"lw": 0.7})
            tops = rows["value"] + (0 if error is None else error.fillna(0))
            for left, top, value in zip(where, tops, rows["value"], strict=True):
                label = f"{value:.1f}" if df["value"].max() > 2 else f"{value:.{2 if len(hues) > 3 else 3}f}"
                ax.annotate(label, (left, top), (0, 1.5), textcoords="offset points", ha="center", fontsize=6)
        hollow = {"marker": "D", "ms": 3.2, "mfc": "white", "mec": style.PAPER_EDGE, "linestyle": ""}
        ax.plot(printed[x].map(at), printed["value"], label="_", **hollow)
    if paper.any():
        ax.errorbar([], [], label="Published", **hollow)  # an errorbar, so that legends name it after the bars
    ax.set(xticks=range(len(groups)), xticklabels=groups, ylabel=ylabel)
    ax.tick_params(axis="x", length=0)
    if legend:
        _legend_above(ax, len(hues) + 1)


def plot_schematic(plan, n_layers: int, ax, per_row: int = 40, legend: bool = True) -> None:
    """Figures 1 and 4: the model's modules along the residual stream, drawn from a plan; its dropped ones are ghosts.

    `plan` has `.attn` and `.mlp`, 0-based indices below `n_layers`. A branch leaves the stream, passes its norm (dark
    foot) and its module, and returns; a dropped branch is gone with its norm, and the stream runs straight on. Deep
    models take several rows of `per_row` layers: allow 0.7 inches of height for each.
    """
    for kind in ("attn", "mlp"):
        beyond = [i for i in getattr(plan, kind) if not 0 <= i < n_layers]
        if beyond:
            raise ValueError(f"plot_schematic: the plan drops {kind} {beyond}, but the model has {n_layers} layers")
    ghost = {"facecolor": "#F4F4F4", "edgecolor": "#ABABAB", "linewidth": 0.5, "hatch": "//////"}
    for layer in range(n_layers):
        row, column = divmod(layer, per_row)
        floor = -2.3 * row  # the height of this row's stream
        both = layer in plan.attn and layer in plan.mlp
        outline = {"facecolor": "none", "edgecolor": "#777777" if both else "#D5D5D5", "linewidth": 0.6}
        box = FancyBboxPatch((column + 0.07, floor - 0.25), 0.86, 1.65, boxstyle="round,pad=0,rounding_size=0.1")
        box.set(**outline, linestyle=(0, (2, 1.5)) if both else "-")
        ax.add_patch(box)
        for left, kind in ((column + 0.13, "attn"), (column + 0.52, "mlp")):
            color = style.method(kind)["color"]
            if layer in getattr(plan, kind):
                ax.add_patch(Rectangle((left, floor + 0.3), 0.35, 0.92, **ghost))
                continue
            for edge in (left + 0.08, left + 0.27):  # leave the stream, and return to it
                ax.plot([edge, edge], [floor, floor + 0.3], color=color, lw=0.7)
            ax.add_patch(Rectangle((left, floor + 0.3), 0.35, 0.92, facecolor=color, linewidth=0))
            ax.add_patch(Rectangle((left, floor + 0.3), 0.35, 0.14, facecolor="black", alpha=0.45, linewidth=0))
        if n_layers <= 12 or layer % 5 == 0 or column == 0:
            ax.text(column + 0.5, floor - 0.35, layer, ha="center", va="top", fontsize=7)
        if column == 0:
            end = min(per_row, n_layers - layer)
            arrow = {"arrowstyle": "-|>", "lw": 1, "shrinkA": 0, "shrinkB": 0, "color": "black"}
            ax.annotate("", (end + 0.5, floor), (-0.4, floor), arrowprops=arrow)
    ax.set(xlim=(-0.5, min(per_row, n_layers) + 0.6), ylim=(floor - 0.8, 1.5))
    ax.set_axis_off()
    if legend:
        color = [style.method(kind)["color"] for kind in ("attn", "mlp")]
        handles = [Patch(color=color[0], label="Attention"), Patch(color=color[1], label="MLP")]
        handles += [Patch(color="#555555", label="Norm"), Patch(label="Dropped", **ghost)]
        handles += [Line2D([], [], color="black", lw=1, label="Residual stream")]
        ncols = 5 if ax.figure.get_figwidth() > 5 else 3
        ax.legend(handles=handles, ncols=ncols, loc="lower center", bbox_to_anchor=(0.5, 1.0), handlelength=1.2)


def legend_above(fig, ncols: int = 6) -> None:
    """One legend for all panels, above them, in which every label stands once."""
    handles = {text: line for ax in fig.axes for line, text in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=ncols)


def save_figure(fig, name: str, caption: str, df: pd.DataFrame, out_dir, provenance: dict) -> None:
    """Write `<out_dir>/<name>` as .pdf, .png (300 dpi), .txt (caption), .csv (the numbers drawn), .json (provenance).

    The same figure gives the same bytes: no date is written. All five appear, or on an error none changes. Line breaks
    in the caption become spaces.
    """
    files = {"csv": df.to_csv(index=False, lineterminator="\n"), "txt": " ".join(caption.split()) + "\n"}
    files["json"] = provenance_json(name, provenance)
    with style.use():
        for kind, metadata in (("pdf", {"CreationDate": None}), ("png", {"Software": None})):
            fig.savefig(buffer := io.BytesIO(), format=kind, dpi=300, metadata=metadata)
            files[kind] = buffer.getvalue()
    write_atomic({f"{out_dir}/{name}.{kind}": content for kind, content in files.items()})


def _need(df: pd.DataFrame, what: str, *columns: str) -> None:
    absent = [c for c in columns if c not in df.columns]
    if absent or df.empty:
        problem = f"has no column {', '.join(map(repr, absent))}" if absent else "has no rows"
        raise ValueError(f"{what}: the frame {problem}; needed: {', '.join(columns)}; it has: {', '.join(df.columns)}")


def _band(ax, x, y, stderr, color, log: bool = False) -> None:
    if stderr is not None:
        # on a log axis as wide below as above, so that it never reaches zero
        low, high = (y / np.exp(stderr / y), y * np.exp(stderr / y)) if log else (y - stderr, y + stderr)
        ax.fill_between(x, low, high, color=color, alpha=0.16, linewidth=0)


def _tokens(n: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.0f}{unit}" if n >= 10 * size else f"{n / size:.1f}".removesuffix(".0") + unit
    return f"{n:g}"


def _whole() -> MaxNLocator:
    return MaxNLocator(integer=True, steps=[1, 2, 5, 10])


def _plain_log_ticks(axis) -> None:
    """Log axes labelled 0.02, 0.05 and 100, not 2 x 10^-2: these scales span one or two decades."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, position: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def _legend_above(ax, ncols: int) -> None:
    ax.legend(ncols=ncols, loc="lower center", bbox_to_anchor=(0.5, 1.0))
