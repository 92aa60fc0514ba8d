"""Figures of speedups: as curves over the number of dropped modules, and as a map over batch and context."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from . import style
from .figures import plot_drop_curves


def plot_speedups(df: pd.DataFrame, ax: Axes) -> None:
    """Speedup against the number of dropped layers: limits as lines, published values hollow, measured ones filled.

    df: method, n_dropped, value, source ("limit", "paper" or "measured"); measured rows may have low and high, the ends
    of their error bar, and decoding: eager ones, where there are others, are drawn small.
    """
    measured = df[(df["source"] == "measured") & (df["n_dropped"] > 0)].dropna(subset="value")
    others = df[(df["source"] == "limit") | ((df["source"] == "paper") & (df["n_dropped"] > 0))]
    plot_drop_curves(others, ax, "Speedup", legend=False)
    ax.set_xlabel("Dropped layers")
    for line in ax.lines:
        if line.get_linestyle() != "None":
            line.set_marker("")
    for row in measured.to_dict("records"):
        below = row["value"] - row.get("low", row["value"])
        above = row.get("high", row["value"]) - row["value"]
        is_small = row.get("decoding") == "eager" and measured["decoding"].nunique() > 1
        look = style.method(row["method"]) | {"linestyle": "", "markersize": 2 if is_small else 4}
        ax.errorbar(row["n_dropped"], row["value"], yerr=[[below], [above]], lw=0.8, **look)
    if len(measured):
        ax.plot([], [], "o", color=style.PAPER_EDGE, label="Measured")


def plot_grid(df: pd.DataFrame, ax: Axes) -> None:
    """Heat map of `speedups.speedup_grid`; what does not fit the hardware's memory is hatched."""
    import seaborn as sns

    wide = df.pivot(index="batch_size", columns="context", values="speedup").iloc[::-1]
    fits = df.pivot(index="batch_size", columns="context", values="fits").iloc[::-1].to_numpy(bool)
    sns.heatmap(wide, vmin=1, vmax=2, cmap="YlGnBu", annot=True, fmt=".2f", annot_kws={"size": 5}, cbar=False, ax=ax)
    for y, x in zip(*(~fits).nonzero(), strict=True):
        ax.add_patch(plt.Rectangle((x, y), 1, 1, fill=False, hatch="////", lw=0, ec="#888888", alpha=0.6))
    ax.set(title=f"{df['model'].iloc[0]}, {df['method'].iloc[0]}", xlabel="Context (tokens)", ylabel="Batch")
    ax.set_xticklabels([f"{c // 1024}k" if c >= 1024 else c for c in wide.columns], rotation=0)
    ax.set_yticklabels(wide.index, rotation=0)
    ax.tick_params(length=0)
