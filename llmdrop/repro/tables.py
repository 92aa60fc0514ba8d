"""Tables as Markdown, LaTeX and CSV from one frame; every cell is measured, published, or says why it is empty."""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd

from ..files import write_atomic
from ..speed.geometry import GEOMETRIES
from . import style
from .estimate import Estimate
from .paper import claim, record_claim, verdict
from .paper import table as printed_table
from .statistics import above_unread, combined, difference, headline, kept, speed_ratio

NAMES = {
    "model": "Model",
    "method": "Method",
    "source": "Source",
    "arc_challenge": "ARC-C",
    "arc_easy": "ARC-E",
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
    "nats": "Nats lost",
}
# percent right by guessing
CHANCE = dict.fromkeys(("boolq", "piqa", "rte", "winogrande"), 50)
CHANCE |= dict.fromkeys(("arc_challenge", "arc_easy", "hellaswag", "logiqa", "mmlu", "openbookqa"), 25)
CHANCE |= {"commonsense_qa": 20, "social_iqa": 100 / 3}
DIGITS = {"speedup": 2, "gamma": 2, "nats": 2, "perplexity": 2, "ppl_ratio": 2}  # the others 1, as in the paper
# what pandas leaves as it is and LaTeX, without further packages, cannot print
_LATEX = {"γ": r"$\gamma$", "ρ": r"$\rho$", "±": r"$\pm$", "−": "$-$", "×": r"$\times$", "∞": r"$\infty$"}
_LATEX |= {"≥": r"$\geq$", "≤": r"$\leq$", "<": "$<$", ">": "$>$", "|": "$|$", "–": "--", "’": "'"}


def published_drops() -> pd.DataFrame:
    """Tables 1 to 3 without their baselines, as `plot_drop_curves` takes them: `method` ("Attention"), `n_dropped`.

    Beside the printed columns: `row` (as printed, "Attn-8"), `share` (percent of the model's layers), `percent` (avg in
    percent of the baseline's) and `source` ("paper").
    """
    rows = pd.concat([printed_table(name) for name in ("table01", "table02", "table03")], ignore_index=True)
    rows = rows.rename(columns={"method": "row"})
    baseline = rows["model"].map(rows[rows["row"] == "Baseline"].set_index("model")["avg"])
    depth = rows["model"].map({model: shape.layers for model, shape in GEOMETRIES.items()})
    rows["n_dropped"] = rows["row"].str.extract(r"-(\d+)")[0].astype(float)
    rows["share"] = 100 * rows["n_dropped"] / depth
    rows["percent"] = 100 * rows["avg"] / baseline
    rows["method"] = rows["row"].map(style.name)
    rows["source"] = "paper"
    return rows.dropna(subset="n_dropped")


def by_variant(rows: pd.DataFrame) -> pd.DataFrame:
    """Means of what `quality` measured, one row a variant, the first being the baseline.

    Benchmarks and sets of questions give a column each, percent right by their headline metric, their mean `avg`, and
    `percent`: avg in percent of the baseline's. Texts give `perplexity` and `ppl_ratio`, relative to the baseline's.
    Intervals are from `with_intervals` and `against_baseline`. Raises ValueError without rows, and for a task that has
    no headline metric.
    """
    if rows.empty:
        raise ValueError("by_variant: no rows; measure at least one variant with `quality` on a text or a task")
    shown = headline(rows)
    of_text = shown[shown["metric"] == "nats"]
    answers = shown[shown["metric"] != "nats"]
    table = pd.DataFrame(index=rows["variant"].unique())
    for task, of_task in answers.groupby("where", sort=False):
        table[task] = 100 * of_task.groupby("variant")["value"].mean()
    if len(table.columns):
        table["avg"] = table.mean(axis=1, skipna=False)  # never over fewer tasks than the baseline's
        table["percent"] = 100 * table["avg"] / table["avg"].iloc[0]
    if len(of_text):
        nats = (of_text["value"] * of_text["n"]).groupby(of_text["variant"]).sum()
        table["perplexity"] = np.exp(nats / of_text.groupby("variant")["n"].sum())
        table["ppl_ratio"] = table["perplexity"] / table["perplexity"].iloc[0]
    return table


def against_baseline(rows: pd.DataFrame) -> pd.DataFrame:
    """What each variant leaves of the first, the baseline, with 95 % intervals: variant, panel, value, low, high.

    rows: from `quality`. panel: a text (perplexity as a multiple of the baseline's), "ppl_ratio" (of all texts), a task
    (percent right), "percent" (mean accuracy over the tasks, in percent of the baseline's). Paired item by item.
    """
    shown = headline(rows).drop_duplicates("where")
    is_text = shown["metric"] == "nats"
    texts = list(shown.loc[is_text, "where"])
    tasks = list(shown.loc[~is_text, "where"])
    panels = {text: [text] for text in texts} | ({"ppl_ratio": texts} if texts else {})
    variants = rows["variant"].unique()
    found = []
    for variant in variants:
        for panel, where in panels.items():
            ratio = difference(rows, variant, variants[0], where).exp()
            found.append((variant, panel, ratio.value, ratio.low, ratio.high))
        for task in tasks:
            right = above_unread(rows, variant, task, unread=0)
            found.append((variant, task, right.value, right.low, right.high))
        if tasks:
            left = kept(rows, variant, variants[0], tasks)
            found.append((variant, "percent", left.value, left.low, left.high))
    return pd.DataFrame(found, columns=["variant", "panel", "value", "low", "high"])


def with_intervals(
    rows: pd.DataFrame,
    texts: Sequence[str] = (),
    tasks: Sequence[str] = (),
    rounds: pd.DataFrame | None = None,
    baseline: str = "Baseline",
) -> pd.DataFrame:
    """One row a variant of `quality`'s rows; each column x with its 95 % interval, x_low and x_high.

    texts: gives `nats`, lost per token over the baseline, paired by sample, mean over the texts. tasks: gives `avg`,
    percent right, mean over the tasks. rounds: from `timing`; gives `speedup`, times as fast as the baseline, paired by
    round. What is not given has no column. Raises ValueError for a variant that was not measured or timed.
    """
    table = {}
    for variant in rows["variant"].unique():
        cells = {}
        if texts:
            cells |= difference(rows, variant, baseline, texts).columns("nats")
        if tasks:
            right = combined(lambda means: float(np.mean(means)), rows, [variant], tasks).times(100)
            cells |= right.columns("avg")
        if rounds is not None:
            cells |= speed_ratio(rounds, variant, baseline).columns("speedup")
        table[variant] = cells
    return pd.DataFrame.from_dict(table, orient="index")


def random_guess(table: pd.DataFrame, tasks: Iterable[str], vocabulary: int) -> dict[str, float]:
    """What guessing would give in the columns of a table from `by_variant`, whose first row is the baseline.

    Percent right of each task, avg of these tasks, percent of the baseline's; ppl_ratio: where all tokens are alike.
    """
    baseline = table.iloc[0]
    average = pd.Series(CHANCE).reindex(list(tasks)).mean()
    guess = {"avg": average, "percent": 100 * average / baseline.get("avg", np.nan)}
    return CHANCE | guess | {"ppl_ratio": vocabulary / baseline["perplexity"]}


def record_worst(
    out_dir: str | os.PathLike, results: Iterable[tuple[str, str, Estimate | None]], detail: str = ""
) -> None:
    """`record_claim` for each claim with the model that speaks most against it.

    results: (claim id, model, estimate), one for each claim and model; None for what a model cannot say. "differs"
    speaks against a claim more than "undecided", and of equal verdicts the one that is less on the claim's side.
    """
    by_claim: dict[str, list[tuple[str, Estimate]]] = {}
    for id, model, estimate in results:
        by_claim.setdefault(id, []).extend([(model, estimate)] if estimate is not None else [])
    against = ["differs", "undecided", "holds"]
    for id, estimates in by_claim.items():
        row = claim(id)
        if not estimates:
            record_claim(out_dir, id, None, detail)
            continue

        def side(found: tuple[str, Estimate], test: str = row["test"], limit: float = row["limit"]) -> tuple:
            value = found[1].value
            on_side = value if test in ("above", "at least") else -abs(value) if test == "within" else -value
            return against.index(verdict(test, limit, found[1])), on_side

        model, worst = min(estimates, key=side)
        record_claim(out_dir, id, worst, ": ".join(filter(None, (model, detail))))


def format_table(
    df: pd.DataFrame,
    fmt: Literal["markdown", "latex", "csv"] = "markdown",
    *,
    missing: str = "not run",
    missing_in: Mapping[str, str] | None = None,
    digits: Mapping[str, int] | None = None,
    names: Mapping[str, str] | None = None,
    keep: float = 0.95,
    note: str = "",
) -> str:
    """`df` as text: "markdown", "latex" (booktabs; needs the packages booktabs and colortbl) or "csv" (all digits).

    Columns `x_low` and `x_high` are folded into their `x`: "0.45 [0.41, 0.49]", which is left out where they are equal.
    Rows with `source == "paper"` are in italics. Rows whose `avg` is below `keep` times that of the
    `method == "Baseline"` row of the same model and source are gray (Markdown: ▽ at the average).

    No cell is blank: a missing number reads "not in the paper" in published rows, in others `missing` or what
    `missing_in` has for its column, and γ "–" for a Baseline and where there is no speedup.

    digits: after the point, by column. names: of columns, for the head (else NAMES). note: a line below. Raises
    ValueError for a frame without rows or columns, for an unknown fmt, and for two columns of one name.
    """
    if fmt not in ("markdown", "latex", "csv"):
        raise ValueError(f"format_table: format {fmt!r}; there are markdown, latex, csv")
    if df.empty:
        raise ValueError(f"format_table: {len(df)} rows and {len(df.columns)} columns; a table needs one of each")
    df = df.reset_index(drop=True)
    blank = pd.Series("", index=df.index)
    model = df.get("model", blank)
    source = df.get("source", blank)
    is_published = source == "paper"
    is_baseline = df.get("method", blank) == "Baseline"

    reasons = pd.DataFrame(missing, index=df.index, columns=df.columns, dtype=object).assign(**(missing_in or {}))
    reasons.loc[is_published] = "not in the paper"
    if "gamma" in df:
        has_no_speedup = pd.to_numeric(df.get("speedup", blank), errors="coerce") <= 1
        reasons.loc[is_baseline | has_no_speedup, "gamma"] = "–"
    if fmt == "csv":
        return df.astype(object).where(df.notna(), reasons).to_csv(index=False, lineterminator="\n")

    folded = [f"{column}{ending}" for column in df for ending in ("_low", "_high")]
    columns = [column for column in df if column not in folded]
    digits = DIGITS | dict(digits or {})
    names = NAMES | dict(names or {})
    cells = pd.DataFrame(index=df.index)
    for column in columns:
        unknown = pd.Series(np.nan, index=df.index)
        low = df.get(f"{column}_low", unknown)
        high = df.get(f"{column}_high", unknown)
        cells[column] = [
            reason if pd.isna(value) else _cell(value, *ends, digits.get(column, 1))
            for value, *ends, reason in zip(df[column], low, high, reasons[column], strict=True)
        ]
    cells.columns = [names.get(column, column) for column in columns]
    if not cells.columns.is_unique:
        twice = ", ".join(cells.columns[cells.columns.duplicated()])
        raise ValueError(f"format_table: more than one column is called {twice}; give each its own in `names`")
    align = "".join("r" if pd.api.types.is_numeric_dtype(df[column]) else "l" for column in columns)

    average = pd.to_numeric(df.get("avg", blank), errors="coerce")
    of_baseline = average.where(is_baseline).groupby([model, source], dropna=False).transform("first")
    is_weak = average < keep * of_baseline
    notes = [note] if note else []
    if is_weak.any():
        notes.append(f"{'▽' if fmt == 'markdown' else 'Gray'}: average below {100 * keep:g} % of the baseline’s.")
    if is_published.any():
        notes.append("Italics: as printed in the paper.")
    if fmt == "markdown":
        return _markdown(cells, align, is_published, is_weak, names["avg"], " ".join(notes))
    is_new_model = model.ne(model.shift()) & (df.index > 0)
    return _latex(cells, align, is_published, is_weak, is_new_model, " ".join(notes))


def save_table(
    df: pd.DataFrame, name: str, caption: str, out_dir: str | os.PathLike, provenance: Mapping, **options
) -> str:
    """Write `<out_dir>/<name>` as .md, .tex, .csv, and as `write_output` says; options as in format_table.

    Returns what stands in the .md: caption and table.
    """
    markdown = f"{' '.join(caption.split())}\n\n{format_table(df, 'markdown', **options)}"
    contents = {"md": markdown, "tex": format_table(df, "latex", **options), "csv": format_table(df, "csv", **options)}
    write_output(out_dir, name, caption, provenance, contents)
    return markdown


def write_output(
    out_dir: str | os.PathLike, name: str, caption: str, provenance: Mapping, contents: Mapping[str, str | bytes]
) -> None:
    """Write `<out_dir>/<name>.<ending>` for {ending: content}, with .txt (caption in one line) and .json (provenance).

    All appear, or on an error none changes.
    """
    record = json.dumps({"name": name} | dict(provenance), indent=1, sort_keys=True, default=str)
    contents = contents | {"txt": " ".join(caption.split()) + "\n", "json": record + "\n"}
    write_atomic({f"{out_dir}/{name}.{ending}": content for ending, content in contents.items()})


def provenance_line(provenance: Mapping) -> str:
    """A provenance record in one line, as notebooks end with."""
    return " · ".join(f"{fact}: {value}" for fact, value in provenance.items())


def _cell(value, low: float, high: float, places: int) -> str:
    """A number with its interval, rounded: 4 digits say enough (115.2, 1083). Integers and text as they are.

    low, high: NaN where there is no interval.
    """
    if not pd.api.types.is_float(value):
        return str(value)
    if math.isfinite(value):
        places = min(places, max(0, 3 - int(np.log10(max(abs(value), 1)))))
    text = _number(value, places)
    return f"{text} [{_number(low, places)}, {_number(high, places)}]" if low < high else text


def _number(value: float, places: int) -> str:
    text = f"{round(value, places) + 0.0:.{places}f}"  # + 0.0: never "−0.0"
    return text.replace("-", "−").replace("inf", "∞")


def _markdown(
    cells: pd.DataFrame, align: str, is_published: pd.Series, is_weak: pd.Series, average: str, note: str
) -> str:
    cells = cells.replace(r"\|", r"\\|", regex=True)
    if is_weak.any():
        cells.loc[is_weak, average] += " ▽"
    cells.loc[is_published] = "*" + cells.loc[is_published] + "*"
    lines = [cells.columns, ["---:" if side == "r" else "---" for side in align], *cells.to_numpy()]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return table + (f"\n{note}\n" if note else "")


def _latex(
    cells: pd.DataFrame, align: str, is_published: pd.Series, is_weak: pd.Series, is_new_model: pd.Series, note: str
) -> str:
    """The cells by pandas' Styler, whose styles are LaTeX commands here: those of a row stand in its first cell."""
    styles = pd.DataFrame("", index=cells.index, columns=cells.columns)
    styles.loc[is_new_model, cells.columns[0]] += r"midrule:;"
    styles.loc[is_weak, cells.columns[0]] += "rowcolor:[gray]{0.88};"
    styles.loc[is_published] += "textit:--rwrap;"
    styler = cells.style.hide(axis="index").apply(lambda _: styles, axis=None)
    styler = styler.format(escape="latex").format_index(escape="latex", axis="columns")
    text = styler.to_latex(hrules=True, column_format=align)
    if note:
        paragraph = pd.DataFrame([[note]]).style.hide(axis="index").hide(axis="columns").format(escape="latex")
        width = r"@{}p{\linewidth}@{}"
        text += rf"\par\smallskip{{\footnotesize {paragraph.to_latex(column_format=width)}}}" + "\n"
    return "% needs \\usepackage{booktabs,colortbl}\n" + text.translate(str.maketrans(_LATEX))
