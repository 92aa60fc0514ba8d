"""What cuts of a model lose against what they save: tables and figures of `cuts.measure`."""

from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from .cuts import Cut, percent
from .figures import _plain_log_ticks
from .leaderboard import losses, paired, plot_lost


def table(
    model,
    models: Mapping[tuple[str, str, int], Cut],
    found: Mapping[tuple[str, str, int], pd.DataFrame],
    whole: pd.DataFrame,
    texts: Iterable[str],
    questions: Sequence[str],
    tasks: Sequence[str],
    sequences: Iterable[int],
    **speed,
) -> pd.DataFrame:
    """`leaderboard.losses` of the cuts, with what they answer and save; one row a key (choice, how, n) of `models`.

    Adds plan (a label), attn, mlp, windowed (numbers of sublayers), the percent answered of each set of questions and
    each benchmark, more (how many points above cosine at n, paired by question, mean over the sets of questions,
    benchmarks apart) with half its 95 % interval (_stderr), and at_<b>: the speedup that `predict_speed` allows for b
    sequences.
    """
    out = losses(found, whole, texts)
    out["plan"] = [cut.label for cut in models.values()]
    sizes = [(len(cut.plan.attn), len(cut.plan.mlp), len(cut.layers)) for cut in models.values()]
    out[["attn", "mlp", "windowed"]] = sizes
    out[[*questions, *tasks]] = [percent(found[key], [*questions, *tasks]) for key in models]
    more = [paired(found[key], found["cosine", "none", key[2]], questions) for key in models]
    out["more"], out["more_stderr"] = zip(*[(100 * mean, 50 * (high - low)) for mean, low, high in more], strict=True)
    for b in sequences:
        out[f"at_{b}"] = [cut.speedup(model, batch_size=b, **speed) for cut in models.values()]
    return out


def left_as_timed(rows: pd.DataFrame, counts: Iterable[int]) -> dict[int, float]:
    """{n: share of cosine's loss at n that the best of the others leaves, of those measured to be as fast or faster}.

    rows: from `table`, with a column speedup. 1 where no other is as fast.
    """
    theirs, ours = rows[rows["choice"] == "cosine"].set_index("n"), rows[rows["choice"] != "cosine"]
    left = {}
    for n, row in theirs.loc[sorted(counts)].iterrows():
        fast = ours.loc[ours["speedup"] >= row["speedup"], "lost"]
        left[n] = float(min(fast, default=row["lost"]) / row["lost"])
    return left


def plot(model, rows: pd.DataFrame, models: Mapping, whole: pd.DataFrame, tokens: Mapping, axes, **speed) -> None:
    """Four panels: nats lost, the share left of the paper's loss, questions answered, predicted speedup by sequences.

    rows: from `table`; tokens: {set of questions: tokens of their context}. The last two panels show the smallest n, of
    windows those of the first kind of "as fast".
    """
    plot_lost(rows, axes[:2])
    kinds = list(dict.fromkeys(how for _, how, _ in models))[:2]
    n, at_a_time = int(rows["n"].min()), [1, 2, 4, 8, 16, 32, 64]
    axes[2].plot(tokens.values(), percent(whole, tokens), color="0.6", label="whole model")
    for line, (choice, how) in zip(axes[0].get_lines(), dict.fromkeys(key[:2] for key in models), strict=True):
        if how in kinds and (choice, how, n) in models:
            look = {"color": line.get_color(), "marker": line.get_marker()}
            mine = rows[(rows["choice"] == choice) & (rows["compensation"] == how) & (rows["n"] == n)]
            axes[2].plot(tokens.values(), mine[list(tokens)].iloc[0], **look)
            speedups = [models[choice, how, n].speedup(model, batch_size=b, **speed) for b in at_a_time]
            axes[3].plot(at_a_time, speedups, **look)
    for ax in axes[:2]:
        ax.set_xlabel("As fast as without n layers")
    axes[2].set(xlabel="Tokens of context", ylabel=f"Facts found (%), n = {n}", ylim=(-2, 102))
    axes[3].set(xscale="log", xlabel="Sequences at a time", ylabel=f"Predicted speedup, n = {n}")
    axes[3].set_xticks([1, 4, 16, 64], ["1", "4", "16", "64"])
    axes[3].minorticks_off()


def frontier(
    model,
    models: Mapping[tuple[str, str, int], Cut],
    found: Mapping[tuple[str, str, int], pd.DataFrame],
    whole: pd.DataFrame,
    texts: Sequence[str],
    **speed,
) -> pd.DataFrame:
    """One row per key (choice, compensation, n) of `models`: what is lost on the texts, and what is saved.

    speed: settings of `predict_speed`. Columns: method, choice, compensation, n, attn, mlp, windowed (numbers of
    sublayers), lost with _low, _high (95 %) and _stderr, predicted_speedup, kv (megabytes of the cache at the end, by
    prediction), parameters (millions).
    """
    rows = []
    for (how, method, n), cut in models.items():
        name = how if method == "none" or cut.layers else f"{how}: {method}"
        row = {"method": name, "choice": how, "compensation": method, "n": n}
        row |= {"attn": len(cut.plan.attn), "mlp": len(cut.plan.mlp), "windowed": len(cut.layers)}
        row["lost"], row["lost_low"], row["lost_high"] = paired(found[how, method, n], whole, texts)
        row["lost_stderr"] = (row["lost_high"] - row["lost_low"]) / 3.92
        row["predicted_speedup"] = cut.speedup(model, **speed)
        row["kv"] = cut.limit(model, **speed).kv_bytes / 1e6
        with cut.of(model):
            row["parameters"] = sum(p.numel() for p in model.parameters()) / 1e6
        rows.append(row)
    return pd.DataFrame(rows)


def plot_pareto(table: pd.DataFrame, axes, x: Mapping[str, str], y: str = "lost") -> None:
    """Nats lost against several costs: one line a method through its sizes, intervals, and the frontier in grey.

    `table`: method, <y>, <y>_low, <y>_high and the columns that are keys of x. x: {column: label}, one Axes each;
    columns whose name ends in "speedup" are better when larger, others when smaller.
    """
    methods = list(dict.fromkeys(table["method"]))
    for ax, (column, label) in zip(axes, x.items(), strict=True):
        rising = column.endswith("speedup")
        front = table.dropna(subset=[column]).sort_values([column, y], ascending=[not rising, True])
        front = front[front[y].cummin() == front[y]]
        ax.step(front[column], front[y], where="post", color="0.75", lw=3, zorder=0)
        for k, method in enumerate(methods):
            part = table[table["method"] == method].sort_values(y)
            error = [part[y] - part[f"{y}_low"], part[f"{y}_high"] - part[y]]
            look = {"color": f"C{k % 6}", "marker": "osv^DP*X<>"[k % 10], "label": method}
            ax.errorbar(part[column], part[y], yerr=error, lw=0.7, ms=3.5, **look | ({"mfc": "white"} if k > 5 else {}))
        ax.set(xlabel=label, yscale="log")
        _plain_log_ticks(ax.yaxis)
