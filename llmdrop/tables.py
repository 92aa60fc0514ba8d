"""Tables as Markdown, LaTeX and CSV from one frame; every cell is measured, published, or says why it is empty."""

import json
from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd

from . import style
from .models import GEOMETRIES
from .paper import claims, gamma, record_claim, write_atomic
from .paper import table as printed_table

NAMES = {
    "model": "Model",
    "method": "Method",
    "source": "Source",
    "arc_challenge": "ARC-C",
    "boolq": "BoolQ",
    "commonsense_qa": "CSQA",
    "hellaswag": "HellaSwag",
    "logiqa": "LogiQA",
    "mmlu": "MMLU",
    "openbookqa": "OBQA",
    "piqa": "PIQA",
    "rte": "RTE",
    "social_iqa": "SIQA",
    "winogrande": "WinoGrande",
    "avg": "Avg.",
    "perplexity": "PPL",
    "ppl_ratio": "PPL ×",
    "speedup": "SpeedUp",
    "gamma": "γ",
}
# percent right by guessing
CHANCE = {"boolq": 50, "piqa": 50, "rte": 50, "winogrande": 50, "hellaswag": 25, "openbookqa": 25, "mmlu": 25}
CHANCE |= {"arc_challenge": 25, "arc_easy": 25, "logiqa": 25, "commonsense_qa": 20, "social_iqa": 100 / 3}
DIGITS = {"speedup": 2, "gamma": 2, "perplexity": 2, "ppl_ratio": 2}  # the others 1, as in the paper
_LATEX = {"\\": r"\textbackslash{}", "γ": r"$\gamma$", "±": r"$\pm$", "−": "$-$", "–": "--", "×": r"$\times$"}
_LATEX |= {"≥": r"$\geq$", "≤": r"$\leq$", "ρ": r"$\rho$", "’": "'"} | {c: "\\" + c for c in "&%$#_{}"}
_LATEX |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$", "|": "$|$"}


def published_drops() -> pd.DataFrame:
    """Tables 1 to 3 without their baselines, as `plot_drop_curves` takes them: `method` ("Attention"), `n_dropped`.

    Beside the printed columns: `row` (as printed, "Attn-8"), `share` (percent of the model's layers), `percent` (avg in
    percent of the baseline's) and `source` ("paper").
    """
    rows = pd.concat([printed_table(f"table{k:02d}") for k in (1, 2, 3)], ignore_index=True)
    rows = rows.rename(columns={"method": "row"})
    baseline = rows["model"].map(rows[rows["row"] == "Baseline"].set_index("model")["avg"])
    rows["n_dropped"] = rows["row"].str.extract(r"-(\d+)")[0].astype(float)
    depth = rows["model"].map({model: shape[0] for model, shape in GEOMETRIES.items()})
    rows["share"], rows["percent"] = 100 * rows["n_dropped"] / depth, 100 * rows["avg"] / baseline
    return rows.assign(method=rows["row"].map(style.name), source="paper").dropna(subset="n_dropped")


def by_plan(rows: pd.DataFrame, texts: Iterable[pd.DataFrame] = (), speed: pd.DataFrame | None = None) -> pd.DataFrame:
    """One row a plan from measurements whose first plan is the baseline; each column `x` with its `x_stderr`.

    rows: as from `evaluate_sweep`. They give a column per task and the mean `avg`, in percent right (acc_norm where a
    task has it, else acc), and `percent`: avg in percent of the baseline's. Its error takes the two as independent,
    which overstates it: all plans answer the same questions. texts: frames as from `perplexity_sweep`, one a text. They
    give `perplexity` and `ppl_ratio`, relative to the baseline's, with the error of the differences text by text.
    speed: as from `compare_speed`. Gives `speedup`, its error half the range over rounds, and the paper's `gamma`.
    """
    plans, tasks = list(dict.fromkeys(rows["plan"])), list(dict.fromkeys(rows["task"]))
    rows = rows.sort_values("metric").drop_duplicates(["plan", "task"], keep="last")  # acc before acc_norm
    wide = 100 * rows.pivot(index="plan", columns="task", values=["value", "stderr"]).loc[plans]
    table, error = wide["value"][tasks].copy(), wide["stderr"][tasks].copy()
    table["avg"], error["avg"] = table.mean(axis=1), np.sqrt((error**2).sum(axis=1)) / len(tasks)
    relative = error["avg"] / table["avg"]
    table["percent"] = 100 * table["avg"] / table["avg"].iloc[0]
    error["percent"] = table["percent"] * np.hypot(relative, relative.iloc[0])
    error.loc[plans[0], "percent"] = 0.0
    loss = pd.DataFrame({k: text.set_index("plan")["log_perplexity"] for k, text in enumerate(texts)}, index=plans)
    if len(loss.columns):
        for column, nats in (("perplexity", loss), ("ppl_ratio", loss - loss.iloc[0])):  # nats per token, [plan, text]
            table[column] = np.exp(nats.mean(axis=1))
            error[column] = table[column] * nats.sem(axis=1)
    if speed is not None:
        timed = speed.set_index("plan").loc[plans]
        table["speedup"], error["speedup"] = timed["speedup"], (timed["speedup_high"] - timed["speedup_low"]) / 2
        table["gamma"] = [
            gamma(table["avg"].iloc[0], a, s) for a, s in zip(table["avg"], timed["speedup"], strict=True)
        ]
        percent = (100 * (timed["speedup"] - 1)).abs().replace(0, np.nan)
        error["gamma"] = np.hypot(error["avg"], error["avg"].iloc[0]) / percent
    return table.join(error.add_suffix("_stderr")).rename_axis(columns=None)


def compare(table: pd.DataFrame, column: str, row: str, other: str | None = None) -> tuple[float, float]:
    """`column` of one row, less that of the other row if given, and the standard error as if they were independent.

    table: as from `by_plan`. NaN where it lacks one of the rows.
    """
    rows = table.reindex([row] if other is None else [row, other])
    values, errors = rows[column].to_numpy(float), rows[f"{column}_stderr"].to_numpy(float)
    return float(values[0] - values[1:].sum()), float(np.sqrt((errors**2).sum()))


def record_worst(out_dir, found: Iterable[tuple[str, str, float, float]], detail: str) -> None:
    """`record_claim` for each claim with the model that speaks most against it.

    found: (claim id, model, measured, error), one for each claim and model; NaN for what a model cannot say.
    """
    found = pd.DataFrame(found, columns=["id", "model", "measured", "error"])
    upper = claims().set_index("id")["tolerance"].str.startswith("<")  # an upper limit: the largest value is the worst
    for id, rows in found.groupby("id", sort=False):
        worst = rows.sort_values("measured", ascending=not upper[id]).iloc[0]  # NaN last
        record_claim(out_dir, id, worst["measured"], worst["error"], detail=f"{worst['model']}: {detail}")


def format_table(
    df: pd.DataFrame,
    fmt: str = "markdown",
    *,
    missing: str | Mapping[str, str] = "not run",
    digits: Mapping[str, int] | None = None,
    names: Mapping[str, str] | None = None,
    keep: float = 0.95,
    below: str = "grey",
    note: str = "",
) -> str:
    """`df` as text: "markdown", "latex" (booktabs; needs the packages booktabs and colortbl) or "csv" (all digits).

    - A column `x_stderr` is folded into its `x`: "68.2 ± 0.5".
    - Rows with `source == "paper"` are published values: in italics.
    - Rows whose `avg` is below `keep` times that of the `method == "Baseline"` row of the same model and source are
      marked: `below="grey"` shades them (Markdown has no shade: ▽ at the average), `below="bold"` makes them bold.
    - No cell is blank. A missing number reads "not in the paper" in published rows and `missing` in measured ones:
      one text, or one per column ({"speedup": "needs a GPU"}), or the name of the column that holds each row's text.
      A Baseline's γ is "–": it compares nothing. `note` is a line below the table: say there how to run what is not.
    """
    if fmt not in ("markdown", "latex", "csv"):
        raise ValueError(f"format_table: format {fmt!r}; there are markdown, latex, csv")
    if below not in ("grey", "bold"):
        raise ValueError(f"format_table: below={below!r}; there are grey, bold")
    df = df.reset_index(drop=True)
    why = df[missing] if isinstance(missing, str) and missing in df.columns else None
    df = df.drop(columns=missing) if why is not None else df
    published = df["source"].eq("paper") if "source" in df else pd.Series(False, index=df.index)
    baseline = df["method"].eq("Baseline") if "method" in df else pd.Series(False, index=df.index)

    def empty(row, column):
        if column == "gamma" and baseline[row]:
            return "–"
        if published[row]:
            return "not in the paper"
        if why is not None:
            return str(why[row])
        return missing if isinstance(missing, str) else missing.get(column, "not run")

    if fmt == "csv":
        filled = df.astype(object)
        for column in df:
            filled.loc[df[column].isna(), column] = [empty(r, column) for r in df.index[df[column].isna()]]
        return filled.to_csv(index=False, lineterminator="\n")

    columns = [c for c in df if not (c.endswith("_stderr") and c.removesuffix("_stderr") in df)]
    digits, names = DIGITS | dict(digits or {}), NAMES | dict(names or {})

    def cell(row, column):
        value = df.at[row, column]
        if pd.isna(value):
            return empty(row, column)
        if not pd.api.types.is_float(value):
            return str(value)
        places, error = digits.get(column, 1), df.at[row, f"{column}_stderr"] if f"{column}_stderr" in df else None
        places = min(places, max(0, 3 - int(np.log10(max(abs(value), 1)))))  # 4 digits say enough: 115.2, 1083
        text = f"{round(value, places) + 0.0:.{places}f}".replace("-", "−")  # + 0.0: never "−0.0"
        return text if error is None or pd.isna(error) else f"{text} ± {error:.{places}f}"

    cells = pd.DataFrame({c: [cell(r, c) for r in df.index] for c in columns}, index=df.index, dtype=object)
    cells.columns = [str(names.get(c, c)) for c in columns]
    right = [pd.api.types.is_numeric_dtype(df[c]) for c in columns]
    low = _below_baseline(df, baseline, keep)
    notes = [note] if note else []
    if low.any():
        mark = "Bold" if below == "bold" else "▽" if fmt == "markdown" else "Grey"
        notes.append(f"{mark}: average below {100 * keep:g} % of the baseline’s.")
    if published.any():
        notes.append("Italics: as printed in the paper.")
    if fmt == "markdown":
        return _markdown(cells, right, low, published, below, names["avg"], " ".join(notes))
    group = df["model"] if "model" in df else pd.Series(0, index=df.index)
    return _latex(cells, right, low, published, below, group, " ".join(notes))


def save_table(df: pd.DataFrame, name: str, caption: str, out_dir, provenance: dict, **options) -> None:
    """Write `<out_dir>/<name>` as .md, .tex, .csv, .txt (caption), .json (provenance); options as in format_table.

    Line breaks in the caption become spaces.
    """
    caption = " ".join(caption.split())
    files = {"md": f"{caption}\n\n" + format_table(df, "markdown", **options)}
    files["tex"] = format_table(df, "latex", **options)
    files["csv"] = format_table(df, "csv", **options)
    files["txt"] = caption + "\n"
    files["json"] = provenance_json(name, provenance)
    write_atomic({f"{out_dir}/{name}.{kind}": content for kind, content in files.items()})


def provenance_json(name: str, provenance: Mapping) -> str:
    """The provenance record written beside every figure and table."""
    return json.dumps({"name": name} | dict(provenance), indent=1, sort_keys=True, default=str) + "\n"


def _below_baseline(df: pd.DataFrame, baseline: pd.Series, keep: float) -> pd.Series:
    """Rows whose average is below `keep` of that of their own model's and source's Baseline row."""
    if "avg" not in df or not baseline.any():
        return pd.Series(False, index=df.index)
    groups = [c for c in ("model", "source") if c in df]
    average = pd.to_numeric(df["avg"], errors="coerce")
    keys = df[groups].astype(str).agg("|".join, axis=1) if groups else pd.Series("", index=df.index)
    return average < keep * keys.map(average[baseline].groupby(keys[baseline]).first())


def _markdown(cells, right, low, published, below, average, note) -> str:
    lines = [list(cells.columns), ["---:" if r else "---" for r in right]]
    for row in cells.index:
        texts = [t.replace("|", r"\|") for t in cells.loc[row]]
        if low[row] and below == "grey":
            texts = [f"{t} ▽" if c == average else t for c, t in zip(cells.columns, texts, strict=True)]
        around = "*" * (int(published[row]) + 2 * int(low[row] and below == "bold"))
        lines.append([around + t + around for t in texts])
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return table + (f"\n{note}\n" if note else "")


def _latex(cells, right, low, published, below, group, note) -> str:
    lines = [" & ".join(map(_tex, cells.columns)) + r" \\", r"\midrule"]
    for i, row in enumerate(cells.index):
        if i and group[row] != group.iloc[i - 1]:
            lines.append(r"\midrule")
        texts = [_tex(t) for t in cells.loc[row]]
        texts = [rf"\textit{{{t}}}" for t in texts] if published[row] else texts
        texts = [rf"\textbf{{{t}}}" for t in texts] if low[row] and below == "bold" else texts
        shade = r"\rowcolor[gray]{0.88} " if low[row] and below == "grey" else ""
        lines.append(shade + " & ".join(texts) + r" \\")
    head = [
        "% needs \\usepackage{booktabs,colortbl}",
        rf"\begin{{tabular}}{{{''.join('lr'[r] for r in right)}}}",
        r"\toprule",
    ]
    foot = [r"\bottomrule", r"\end{tabular}"] + ([rf"\par\smallskip{{\footnotesize {_tex(note)}}}"] if note else [])
    return "\n".join(head + lines + foot) + "\n"


def _tex(text: str) -> str:
    return "".join(_LATEX.get(c, c) for c in text)
