"""The paper's figures from tidy data: plot_*(df, ax) draw, save_figure writes PDF, PNG, caption, numbers, provenance.

A frame without the columns a figure needs is refused by name. Values with `source == "paper"` are hollow markers.
"""

import io
import os
from collections.abc import Mapping, Sequence
from itertools import cycle
from types import SimpleNamespace

import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import QuadMesh
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Patch, Rectangle

from ..plan import DropPlan
from . import style
from .estimate import NORMAL_QUANTILE
from .statistics import shares
from .tables import write_output

_DROPPED = {"facecolor": "#F4F4F4", "edgecolor": "#ABABAB", "linewidth": 0.5, "hatch": "//////"}


def plot_importance(df: pd.DataFrame, axes: Sequence[Axes], rows: str = "calibration") -> None:
    """Figures 2 and 3: heat maps of importance, one column a layer and one row a calibration set, dark = important.

    df: kind, layer, score and the column named by `rows`. axes: one per kind: block, MLP, attention. All share one log
    scale, since layer 0 and the last MLP are far above the rest; the top 6 % share the darkest color.
    """
    _need(df, "plot_importance", "kind", "layer", "score", rows)
    kinds = _by_kind(df)
    axes = np.atleast_1d(axes).ravel()
    if len(axes) != len(kinds):
        raise ValueError(f"plot_importance: {len(axes)} Axes for {len(kinds)} kinds ({', '.join(kinds)}); one each")
    norm = _log_norm(df["score"], 0, 0.94)
    for axis, (kind, part) in zip(axes, kinds.items(), strict=True):
        grid = part.pivot_table("score", rows, "layer", sort=False)
        grid = grid.reindex(columns=range(grid.columns.min(), grid.columns.max() + 1))  # a dropped layer stays white
        mesh = _heat_map(grid, axis, norm)
        axis.set_title(style.KINDS[kind])
        axis.set_yticks(np.arange(len(grid)) + 0.5, grid.index)
        axis.set_xticks(*_whole_ticks(grid.columns))
        axis.tick_params(axis="x", length=2.5, labelbottom=axis is axes[-1])
    axes[-1].set_xlabel("Layer")
    _log_colorbar(mesh, axes, "Importance\n(1 − cosine)", extend="max", aspect=25)


def plot_sample_size(df: pd.DataFrame, axes: Sequence[Axes]) -> None:
    """Figure 10: importance for growing calibration sets, with each row's rank correlation against the largest.

    df: kind, n_samples, layer, score. axes: one per kind, as for plot_importance.
    """
    _need(df, "plot_sample_size", "kind", "n_samples", "layer", "score")
    df = df.sort_values("n_samples")
    plot_importance(df, axes, rows="n_samples")
    for axis, part in zip(np.atleast_1d(axes).flat, _by_kind(df).values(), strict=True):
        by_size = part.pivot_table("score", "layer", "n_samples")
        for row, rho in enumerate(by_size.corr("spearman").iloc[-1, :-1]):
            axis.text(len(by_size) + 0.3, row + 0.5, f"ρ = {rho:.3f}", va="center", fontsize=6.5)
        axis.set_ylabel("Samples")


def plot_checkpoints(df: pd.DataFrame, axes: np.ndarray) -> None:
    """Figure 7: heat maps of importance, one column a checkpoint of a training run and one row a layer.

    df: kind, tokens (seen in training), layer, score. axes: two rows, one column per kind: block, MLP, attention. Layer
    0 is far above all others, so the lower row shows it apart, on its own scale.
    """
    _need(df, "plot_checkpoints", "kind", "tokens", "layer", "score")
    kinds = _by_kind(df)
    axes = np.asarray(axes)
    if axes.shape != (2, len(kinds)):
        problem = f"Axes of shape {axes.shape} for {len(kinds)} kinds ({', '.join(kinds)})"
        raise ValueError(f"plot_checkpoints: {problem}; give 2 rows of {len(kinds)}")
    norm = _log_norm(df.loc[df["layer"] > 0, "score"], 0.02, 0.99)
    norm_of_first = Normalize(0, max(1, df.loc[df["layer"] == 0, "score"].max()))
    for (kind, part), (upper, lower) in zip(kinds.items(), axes.T, strict=True):
        grid = part.pivot(index="layer", columns="tokens", values="score")
        others = grid[grid.index > 0]
        mesh = _heat_map(others, upper, norm)
        mesh_of_first = _heat_map(grid[grid.index == 0], lower, norm_of_first, "YlOrBr")
        upper.set_title(style.KINDS[kind])
        upper.set_yticks(*_whole_ticks(others.index))
        lower.set_yticks([0.5], ["0"])
        every = -(-grid.shape[1] // 5)  # so many columns are named, the last one always
        named = np.arange((grid.shape[1] - 1) % every, grid.shape[1], every)
        lower.set_xticks(named + 0.5, [_tokens(n) for n in grid.columns[named]])
        for axis in (upper, lower):
            axis.tick_params(labelleft=kind == next(iter(kinds)))
    _log_colorbar(mesh, axes[0], "Importance (1 − cosine)", fraction=0.05, aspect=20)
    axes[1, 0].figure.colorbar(mesh_of_first, ax=axes[1], pad=0.02, fraction=0.05, aspect=3)
    axes[0, 0].set_ylabel("Layer")
    axes[1, len(kinds) // 2].set_xlabel("Training tokens")


def plot_over_training(
    df: pd.DataFrame, ax: Axes, value: str, ylabel: str, log: bool = False, levels: Mapping[str, float] | None = None
) -> None:
    """A number against training tokens, one line a kind: its mean, with a band from the 10 % to the 90 % quantile.

    df: kind, tokens and the column named by `value`, one row per layer, run or both. levels: {kind: value} to compare
    with, dotted.
    """
    _need(df, "plot_over_training", "kind", "tokens", value)
    for kind, part in _by_kind(df).items():
        color = _line_over_training(part, kind, ax, value, ("pi", 80))
        if levels is not None and kind in levels:
            ax.axhline(levels[kind], color=color, lw=0.8, ls=":")
    _training_axis(ax, df["tokens"])
    ax.set(ylabel=ylabel)
    if log:
        ax.set_yscale("log")
        plain_log_ticks(ax.yaxis)
        low, high = ax.get_ylim()
        if high > 100 * low:  # decades are labels enough
            ax.yaxis.set_major_locator(ticker.LogLocator())


def _line_over_training(df: pd.DataFrame, kind: str, ax: Axes, value: str, errorbar: tuple[str, float]) -> str:
    """The mean of a number against training tokens, with seaborn's band of that kind; returns the kind's color."""
    import seaborn as sns  # most figures need none of it

    look = style.method(kind)
    line = look | {"markeredgecolor": look["color"], "label": style.KINDS[kind], "legend": False}
    band = {"errorbar": errorbar, "err_kws": {"alpha": 0.16, "linewidth": 0}}
    sns.lineplot(df, x="tokens", y=value, ax=ax, **line, **band)
    return look["color"]


def plot_losses(df: pd.DataFrame, ax: Axes, baselines: Mapping[str, float]) -> None:
    """Validation loss of each run against training tokens, and the losses it has to beat.

    df: run, tokens, valid_loss, optionally train_loss. baselines: {name: loss}.
    """
    _need(df, "plot_losses", "run", "tokens", "valid_loss")
    for _, rows in df.groupby("run", sort=False):
        if "train_loss" in rows:
            ax.plot(rows["tokens"], rows["train_loss"], ":", color="#7F7F7F", lw=0.9, label="Training")
        ax.plot(rows["tokens"], rows["valid_loss"], "o-", color="black", ms=2.5, lw=0.9, label="Validation")
    _training_axis(ax, df["tokens"])
    for name, loss in baselines.items():
        ax.axhline(loss, color="0.35", lw=0.8, ls=(0, (4, 2)))
        place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "top"}
        ax.annotate(name, (0.01, loss), (0, -1), fontsize=6.5, **place)
    ax.set(ylabel="Loss (nats per token)")


def plot_by_run(df: pd.DataFrame, ax: Axes, value: str, ylabel: str) -> None:
    """A number against training tokens, one line and marker a run. df: run, tokens and the column named by `value`."""
    _need(df, "plot_by_run", "run", "tokens", value)
    for (run, rows), line in zip(df.groupby("run", sort=False), cycle(("o-", "s--", "^:", "v-.")), strict=False):
        ax.plot(rows["tokens"], rows[value], line, color="black", ms=2.5, lw=0.9, label=run)
    _training_axis(ax, df["tokens"])
    ax.set(ylabel=ylabel)


def plot_dropping_costs(df: pd.DataFrame, ax: Axes) -> None:
    """What dropping costs against training tokens, one line a kind: dotted for layers chosen at the end.

    df: kind, chosen ("now", "at the end"), tokens and nats, one row per window and run. Bands are 95 % intervals
    (normal) of the mean over windows and runs.
    """
    _need(df, "plot_dropping_costs", "kind", "chosen", "tokens", "nats")
    for kind, part in _by_kind(df).items():
        color = _line_over_training(part[part["chosen"] == "now"], kind, ax, "nats", ("se", NORMAL_QUANTILE))
        final = part[part["chosen"] == "at the end"].groupby("tokens")["nats"].mean()
        ax.plot(final.index, final, ":", color=color, lw=1.1)
    _training_axis(ax, df["tokens"])
    ax.axhline(0, color="0.6", lw=0.6)
    ax.set(ylabel="Loss added (nats per token)")


def plot_scores(df: pd.DataFrame, ax: Axes) -> None:
    """Importance against depth, on a log axis, one line a kind, its band a 95 % interval (normal).

    df: kind, layer, score, stderr.
    """
    _need(df, "plot_scores", "kind", "layer", "score", "stderr")
    for kind, rows in _by_kind(df).items():
        look = style.method(kind)
        ax.plot(rows["layer"], rows["score"], label=style.KINDS[kind], **look)
        factor = np.exp(NORMAL_QUANTILE * rows["stderr"] / rows["score"])  # as wide below as above: never down to zero
        band = {"color": look["color"], "alpha": 0.16, "linewidth": 0}
        ax.fill_between(rows["layer"], rows["score"] / factor, rows["score"] * factor, **band)
    ax.set(xlabel="Layer", ylabel="Importance (1 − cosine)", yscale="log")
    ax.xaxis.set_major_locator(_whole())
    plain_log_ticks(ax.yaxis)
    _legend_above(ax, 3)


def plot_drop_curves(
    df: pd.DataFrame, ax: Axes, ylabel: str, chance: float | None = None, log: bool = False, legend: bool = True
) -> None:
    """Figures 5 and 8: a measurement against the number of what is dropped, one curve a method.

    df: method (any name that `style.name` knows), n_dropped, value. Optional: low and high (a band), source (rows of
    "paper" become hollow markers), step ("attn" or "mlp": what a Joint step dropped, drawn as a square or a star). Rows
    of method "Baseline" give the dashed baseline, `chance` the dotted line of random guessing.
    """
    _need(df, "plot_drop_curves", "method", "n_dropped", "value")
    df = df.reindex(columns=["method", "n_dropped", "value", "low", "high", "source", "step"])
    df["method"] = pd.Categorical(df["method"].map(style.name), list(style.METHODS))
    published = df[df["source"] == "paper"]
    measured = df[df["source"] != "paper"]
    baseline = measured[measured["method"] == "Baseline"].head(1)
    if len(baseline):
        ax.axhline(baseline["value"].iloc[0], label="Baseline", **style.method("Baseline") | {"marker": "", "lw": 0.8})
    if chance is not None:
        ax.axhline(chance, label="Random guess", **style.method("Random") | {"marker": "", "lw": 1})
    for method in df.loc[df["method"] != "Baseline", "method"].sort_values().unique():
        look = style.method(method)
        rows = measured[measured["method"] == method].sort_values("n_dropped")
        if len(rows):
            if len(baseline) and rows["n_dropped"].min() > 0:  # nothing dropped is where every curve starts
                rows = pd.concat([baseline.assign(n_dropped=0), rows])
            _curve(ax, rows, method)
        printed = published[published["method"] == method]
        hollow = {"linestyle": "", "markerfacecolor": "white", "zorder": 3, "label": "_"}
        ax.plot(printed["n_dropped"], printed["value"], **look | hollow)
    if len(published):
        ax.plot([], [], "o", color=style.PAPER_EDGE, markerfacecolor="white", label="Published")
    if log:
        ax.set_yscale("log")
        plain_log_ticks(ax.yaxis)
    ax.set(xlabel="Number dropped", ylabel=ylabel)
    ax.xaxis.set_major_locator(_whole())
    if legend:
        _legend_above(ax, 3)


def _curve(ax: Axes, rows: pd.DataFrame, method: str) -> None:
    """One curve of `plot_drop_curves` with its band; where rows have steps, those are its markers."""
    look = style.method(method)
    if rows["step"].notna().any():
        look["marker"] = ""
    ax.plot(rows["n_dropped"], rows["value"], label=method, markevery=max(1, len(rows) // 16), **look)
    if rows["low"].notna().any():
        ax.fill_between(rows["n_dropped"], rows["low"], rows["high"], color=look["color"], alpha=0.16, linewidth=0)
    for kind, marker, size in (("attn", "s", 3.2), ("mlp", "*", 6)):
        steps = rows[rows["step"] == kind]
        if len(steps):
            label = f"{method}: {style.KINDS[kind]} step"
            ax.plot(steps["n_dropped"], steps["value"], marker, ms=size, mew=0, color=look["color"], label=label)


def plot_dropping_order(df: pd.DataFrame, ax: Axes, n_layers: int, legend: bool = True) -> None:
    """Figures 6 and 11: which layers are retained (yellow) and dropped (red) as more of them go.

    df: layer, step (1 = dropped first; NaN or no row = never), optionally published_step, at which the authors dropped
    that layer: marked by a circle.
    """
    _need(df, "plot_dropping_order", "layer", "step")
    if df["step"].isna().all():
        raise ValueError("plot_dropping_order: no layer has a step; give the drop order as steps 1, 2, ...")
    n_steps = int(df["step"].max())
    step_of = df.set_index("layer")["step"].reindex(range(n_layers)).to_numpy()
    is_gone = step_of[:, None] <= np.arange(1, n_steps + 1)  # [layer, number dropped]
    steps = np.arange(n_steps + 1) + 0.5
    layers = np.arange(n_layers + 1) - 0.5
    colors = ListedColormap([style.RETAINED, style.DROPPED])
    ax.pcolormesh(steps, layers, is_gone, cmap=colors, vmin=0, vmax=1, edgecolors="white", linewidth=0.25)
    for color, name in ((style.RETAINED, "Retained"), (style.DROPPED, "Dropped")):
        ax.plot([], [], "s", ms=6, color=color, mec=color, label=name)
    if "published_step" in df and df["published_step"].notna().any():
        circle = {"ms": 3, "mfc": "white", "mec": style.PAPER_EDGE, "mew": 0.6}
        ax.plot(df["published_step"], df["layer"], "o", **circle, label="Published step")
    ax.grid(False)
    ax.spines[:].set_visible(False)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(_whole())
    ax.set(xlabel="Number dropped", ylabel="Layer", xlim=steps[[0, -1]], ylim=layers[[0, -1]])
    if legend:
        _legend_above(ax, 3)


def plot_bars(
    df: pd.DataFrame, ax: Axes, x: str = "task", hue: str = "strategy", ylabel: str = "Accuracy", legend: bool = True
) -> None:
    """Figure 9: bars in groups, with error bars and their values.

    df: the columns named by `x` and `hue`, value, optionally stderr, or the interval's ends low and high. Order is that
    of appearance.
    """
    _need(df, "plot_bars", x, hue, "value")
    groups = list(df[x].unique())
    hues = list(df[hue].unique())
    width = 0.8 / len(hues)
    decimals = 3 if len(hues) < 4 else 2  # as many as fit side by side
    if df["value"].max() > 2:
        decimals = 1
    for i, name in enumerate(hues):
        rows = df[df[hue] == name]
        left = rows[x].map(groups.index) + (i - (len(hues) - 1) / 2) * width
        look = {"color": _bar_color(name, i), "label": name, "error_kw": {"lw": 0.7}}
        error = rows.get("stderr")
        if "low" in rows:
            error = [rows["value"] - rows["low"], rows["high"] - rows["value"]]
        bars = ax.bar(left, rows["value"], 0.92 * width, yerr=error, **look)
        ax.bar_label(bars, fmt=f"%.{decimals}f", padding=0.5, fontsize=6)
    ax.set(xticks=range(len(groups)), xticklabels=groups, ylabel=ylabel)
    ax.tick_params(axis="x", length=0)
    if legend:
        _legend_above(ax, len(hues) + 1)


def _bar_color(name: str, i: int) -> str:
    """A method's own color; for anything else (a strategy, a metric, a calibration set) the i-th of the cycle."""
    try:
        return style.method(name)["color"]
    except ValueError:
        return f"C{(0, 5, 1, 2, 3, 4)[i % 6]}"


def plot_by_length(rows: pd.DataFrame, ax: Axes, chance: float, ylabel: str) -> None:
    """Percent right against tokens of context, one line a variant; the more is dropped, the stronger its color.

    rows: variant ("Baseline", "Attention-8"), tokens, right. chance: percent right by guessing. Bands, 95 %: of the
    baseline and of the variants that drop most.
    """
    _need(rows, "plot_by_length", "variant", "tokens", "right")
    table = shares(rows, "variant", "tokens")
    dropped = table["variant"].str.extract(r"-(\d+)")[0].fillna("0").astype(int)
    most = dropped.max()
    for (n, variant), line in table.groupby([dropped, "variant"]):
        look = style.method(variant)
        strength = 0.3 + 0.7 * n / most if n else 1.0
        ax.plot(line["tokens"], line["value"], label=variant, alpha=strength, **look)
        if n in (0, most):
            ax.fill_between(line["tokens"], line["low"], line["high"], color=look["color"], alpha=0.1, linewidth=0)
    ax.axhline(chance, label="Guessing", **style.method("Random") | {"marker": ""})
    ticks = sorted(set(rows["tokens"]))
    ax.set(xscale="log", xlabel="Tokens of context", ylabel=ylabel, ylim=(0, 102))
    ax.set_xticks(ticks, [f"{n / 1000:.1f}k" for n in ticks])
    ax.minorticks_off()


def plot_percent(
    ax: Axes, base: pd.Series, lines: Mapping[str, pd.DataFrame], apart: float, label: str = "Baseline"
) -> None:
    """Percent against layers, a line a method with 95 % intervals, side by side; the base model's, and its interval.

    base: a row of `statistics.against`, lines: rows of it with `layers`, by a name that `style.contender` knows. apart:
    layers between two methods' markers.
    """
    look = style.method("Baseline") | {"marker": "", "lw": 0.8}
    ax.axhline(100 * base["value"], label=label, **look)
    ax.axhspan(100 * base["low"], 100 * base["high"], color=look["color"], alpha=0.07, linewidth=0)
    for k, (name, rows) in enumerate(lines.items()):
        x = rows["layers"] + apart * (k - (len(lines) - 1) / 2)
        error = [100 * (rows["value"] - rows["low"]), 100 * (rows["high"] - rows["value"])]
        ax.errorbar(x, 100 * rows["value"], error, capsize=1.5, ms=3, label=name, **style.contender(name))
    ax.set_xticks(sorted({n for rows in lines.values() for n in rows["layers"]}))


def plot_schematic(
    plan: DropPlan | SimpleNamespace, n_layers: int, ax: Axes, per_row: int = 40, legend: bool = True
) -> None:
    """Figures 1 and 4: the model's modules along the residual stream, drawn from a plan; dropped ones are hatched.

    plan: has .attn and .mlp, indices below n_layers. A dropped branch is gone with its norm (the dark foot), and the
    stream runs straight on. Deep models take several rows of per_row layers: allow 0.7 inches of height for each.
    """
    for kind in ("attn", "mlp"):
        beyond = [i for i in getattr(plan, kind) if not 0 <= i < n_layers]
        if beyond:
            raise ValueError(f"plot_schematic: the plan drops {kind} {beyond}, but the model has {n_layers} layers")
    for layer in range(n_layers):
        row, column = divmod(layer, per_row)
        floor = -2.3 * row  # the height of this row's stream
        is_gone = layer in plan.attn and layer in plan.mlp
        box = FancyBboxPatch((column + 0.07, floor - 0.25), 0.86, 1.65, boxstyle="round,pad=0,rounding_size=0.1")
        box.set(facecolor="none", linewidth=0.6)
        box.set(edgecolor="#777777" if is_gone else "#D5D5D5", linestyle=(0, (2, 1.5)) if is_gone else "-")
        ax.add_patch(box)
        for left, kind in ((column + 0.13, "attn"), (column + 0.52, "mlp")):
            _branch(ax, left, floor, style.method(kind)["color"], is_dropped=layer in getattr(plan, kind))
        if n_layers <= 12 or layer % 5 == 0 or column == 0:
            ax.text(column + 0.5, floor - 0.35, layer, ha="center", va="top", fontsize=7)
        if column == 0:
            end = min(per_row, n_layers - layer)
            arrow = {"arrowstyle": "-|>", "lw": 1, "shrinkA": 0, "shrinkB": 0, "color": "black"}
            ax.annotate("", (end + 0.5, floor), (-0.4, floor), arrowprops=arrow)
    ax.set(xlim=(-0.5, min(per_row, n_layers) + 0.6), ylim=(floor - 0.8, 1.5))
    ax.set_axis_off()
    if legend:
        handles = [Patch(color=style.method(kind)["color"], label=style.KINDS[kind]) for kind in ("attn", "mlp")]
        handles += [Patch(color="#555555", label="Norm"), Patch(label="Dropped", **_DROPPED)]
        handles += [Line2D([], [], color="black", lw=1, label="Residual stream")]
        _legend_above(ax, 5 if ax.figure.get_figwidth() > 5 else 3, handles=handles, handlelength=1.2)


def _branch(ax: Axes, left: float, floor: float, color: str, is_dropped: bool) -> None:
    """One sublayer of `plot_schematic`: hatched, or its module with the norm and the ways from and to the stream."""
    size = {"xy": (left, floor + 0.3), "width": 0.35}
    if is_dropped:
        ax.add_patch(Rectangle(**size, height=0.92, **_DROPPED))
        return
    for edge in (left + 0.08, left + 0.27):
        ax.plot([edge, edge], [floor, floor + 0.3], color=color, lw=0.7)
    ax.add_patch(Rectangle(**size, height=0.92, facecolor=color, linewidth=0))
    ax.add_patch(Rectangle(**size, height=0.14, facecolor="black", alpha=0.45, linewidth=0))


def legend_above(fig: Figure, ncols: int = 6) -> None:
    """One legend for all panels, above them, in which every label stands once."""
    handles = {}
    for ax in fig.axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles[label] = handle
    fig.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=ncols)


def save_figure(
    fig: Figure, name: str, caption: str, df: pd.DataFrame, out_dir: str | os.PathLike, provenance: Mapping
) -> None:
    """Write `<out_dir>/<name>` as .pdf, .png (300 dpi), .csv (the numbers drawn), and as `write_output` says.

    The same figure gives the same bytes: no date is written. It keeps the layout that it is saved with.
    """
    contents = {"csv": df.to_csv(index=False, lineterminator="\n")}
    with style.use():
        for kind, metadata in (("pdf", {"CreationDate": None}), ("png", {"Software": None})):
            buffer = io.BytesIO()
            fig.savefig(buffer, format=kind, dpi=300, metadata=metadata)
            fig.set_layout_engine("none")  # found once, for all pictures: that takes longest
            contents[kind] = buffer.getvalue()
    write_output(out_dir, name, caption, provenance, contents)


def plain_log_ticks(axis: Axis) -> None:
    """Log axes labeled 0.02, 0.05 and 100, not 2 x 10^-2: these scales span one or two decades."""
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, position: f"{value:g}")
    axis.set_minor_formatter(ticker.NullFormatter())


def _need(df: pd.DataFrame, what: str, *columns: str) -> None:
    absent = [column for column in columns if column not in df.columns]
    if absent or df.empty:
        problem = f"has no column {', '.join(map(repr, absent))}" if absent else "has no rows"
        raise ValueError(f"{what}: the frame {problem}; needed: {', '.join(columns)}; it has: {', '.join(df.columns)}")


def _by_kind(df: pd.DataFrame) -> dict[str, pd.DataFrame]:
    return {kind: df[df["kind"] == kind] for kind in ("block", "mlp", "attn") if kind in set(df["kind"])}


def _log_norm(scores: pd.Series, low: float, high: float) -> LogNorm:
    """A log scale of colors between two quantiles of the scores above 0."""
    least, most = scores[scores > 0].quantile([low, high])
    return LogNorm(least, max(most, least * 1.01), clip=True)


def _heat_map(grid: pd.DataFrame, ax: Axes, norm: Normalize, cmap: str = "YlGnBu") -> QuadMesh:
    """Seaborn's heat map of a frame: white lines between cells, cell k from k to k + 1, NaN white, no ticks yet."""
    import seaborn as sns

    look = {"cbar": False, "xticklabels": False, "yticklabels": False, "linewidths": 0.3, "linecolor": "white"}
    sns.heatmap(grid.clip(lower=norm.vmin), ax=ax, norm=norm, cmap=cmap, **look)
    ax.set(xlabel="", ylabel="")
    ax.grid(False)
    ax.tick_params(length=0)
    return ax.collections[0]


def _log_colorbar(mesh: QuadMesh, axes: np.ndarray, label: str, **look) -> None:
    bar = axes[0].figure.colorbar(mesh, ax=axes, label=label, pad=0.02, **look)
    plain_log_ticks(bar.ax.yaxis)


def _whole_ticks(layers: pd.Index) -> tuple[np.ndarray, list[int]]:
    """(places, labels) of some of the layers along a heat map that has them all."""
    ticks = _whole().tick_values(layers[0] - 0.5, layers[-1] + 0.5)
    labels = [int(tick) for tick in ticks if layers[0] <= tick <= layers[-1]]
    return np.array(labels) - layers[0] + 0.5, labels


def _training_axis(ax: Axes, tokens: pd.Series) -> None:
    """Make x a log axis of training tokens on which step 0 has a place."""
    first = tokens[tokens > 0].min()
    most = tokens.max()
    decades = [10.0**power for power in range(1, 15) if first <= 10.0**power <= most]
    ax.set_xscale("symlog", linthresh=first, linscale=0.5)
    ax.set_xticks([0, *decades], minor=False)
    ax.xaxis.set_major_formatter(lambda value, position: _tokens(value))
    ax.xaxis.set_minor_locator(ticker.NullLocator())
    left = -0.2 * first if tokens.min() == 0 else first / 1.3
    ax.set(xlabel="Training tokens", xlim=(left, 1.3 * most))


def _tokens(n: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.0f}{unit}" if n >= 10 * size else f"{n / size:.1f}".removesuffix(".0") + unit
    return f"{n:g}"


def _whole() -> ticker.MaxNLocator:
    return ticker.MaxNLocator(integer=True, steps=[1, 2, 5, 10])


def _legend_above(ax: Axes, ncols: int, **look) -> None:
    ax.legend(ncols=ncols, loc="lower center", bbox_to_anchor=(0.5, 1.0), **look)
