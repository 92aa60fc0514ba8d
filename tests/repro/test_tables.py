"""Tables: numbers from the items that were measured, no cell blank, the same in Markdown, LaTeX and CSV."""

import json
import re
import shutil
import subprocess
import tempfile

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import random_ids, tiny

import llmdrop
from llmdrop.compress.variant import Variant
from llmdrop.repro import paper, statistics, tables
from llmdrop.repro.estimate import Estimate
from llmdrop.repro.quality import quality


def beside() -> pd.DataFrame:
    """Measured rows with holes next to the paper's, as in the notebooks."""
    printed = paper.table("tab01").query("model == 'Mistral-7B'").assign(source="paper")
    ours = printed.assign(
        model="smollm2_135m", source="measured", rte=np.nan, gamma=np.nan, avg_low=60.0, avg_high=61.5
    )
    ours.loc[ours["method"] != "Baseline", "speedup"] = np.nan
    return pd.concat([ours, printed], ignore_index=True)


def test_published_drops():
    rows = tables.published_drops()
    assert len(rows) == sum(len(paper.table(f"tab0{k}")) for k in (1, 2, 3)) - 5  # five models, a baseline each
    assert set(rows["method"]) == {"Attention", "MLP", "Block"} and set(rows["source"]) == {"paper"}
    row = rows[(rows["model"] == "Llama-2-70B") & (rows["row"] == "Attn-40")].iloc[0]
    assert row["n_dropped"] == 40 and row["share"] == 50 and np.isclose(row["percent"], 100 * 71.5 / 73.9)


def right(variant: str, where: str, metric: str, values) -> pd.DataFrame:
    """Rows as from `quality`: a variant's values on a task or text, item by item."""
    rows = {"variant": variant, "where": where, "metric": metric, "item": range(len(values)), "value": values, "n": 1}
    return pd.DataFrame(rows)


def measured() -> pd.DataFrame:
    """Two variants on two tasks and a text, by numbers made up so that they can be checked by hand."""
    parts = []
    for variant, piqa, boolq, losses in (
        ("Baseline", [1, 1, 1, 0, 0], [1, 1, 0, 0], (3.0, 3.1)),
        ("Attn-8", [1, 1, 0, 0, 0], [1, 1, 0, 0], (4.0, 4.3)),
    ):
        parts += [right(variant, "xsum", "nats", losses), right(variant, "piqa", "acc", [1] * 5)]
        parts += [right(variant, "piqa", "acc_norm", piqa), right(variant, "piqa", "choice", [-0.5] * 5)]
        parts += [right(variant, "boolq", "acc", boolq)]  # it has no acc_norm, so its acc is what counts
    return pd.concat(parts, ignore_index=True)


def test_by_variant():
    table = tables.by_variant(measured())
    assert list(table.index) == ["Baseline", "Attn-8"]
    assert list(table) == ["piqa", "boolq", "avg", "percent", "perplexity", "ppl_ratio"]
    row = table.loc["Attn-8"]
    assert np.isclose(row["piqa"], 40) and np.isclose(row["avg"], 45) and np.isclose(row["percent"], 100 * 45 / 55)
    assert np.isclose(row["perplexity"], np.exp(4.15)) and np.isclose(row["ppl_ratio"], np.exp(1.1))


def test_against_baseline():
    table = tables.against_baseline(measured()).set_index(["variant", "panel"])
    assert list(table.loc["Attn-8"].index) == ["xsum", "ppl_ratio", "piqa", "boolq", "percent"]
    ratio = table.loc[("Attn-8", "ppl_ratio")]
    assert ratio["value"] == pytest.approx(np.exp(1.1)) and ratio["low"] < ratio["value"] < ratio["high"]
    assert table.loc[("Attn-8", "xsum")].tolist() == ratio.tolist()  # the only text
    assert table.loc[("Attn-8", "piqa"), "value"] == 40
    assert table.loc[("Attn-8", "percent"), "value"] == pytest.approx(100 * 45 / 55)
    assert table.loc[("Baseline", "ppl_ratio")].tolist() == [1, 1, 1]
    texts = measured().query("metric == 'nats'")
    assert set(tables.against_baseline(texts)["panel"]) == {"xsum", "ppl_ratio"}
    assert np.isnan(tables.random_guess(tables.by_variant(texts), [], 1000)["percent"])


def test_by_variant_takes_texts_or_tasks_alone():
    rows = measured()
    assert list(tables.by_variant(rows[rows["metric"] != "nats"])) == ["piqa", "boolq", "avg", "percent"]
    assert list(tables.by_variant(rows[rows["metric"] == "nats"])) == ["perplexity", "ppl_ratio"]


def test_by_variant_averages_nothing_but_headline_metrics():
    """wikitext's perplexities once made an average of 1032 %."""
    parts = [measured()]
    for variant in ("Baseline", "Attn-8"):
        parts += [right(variant, "wikitext", metric, [20.6]) for metric in ("bits_per_byte", "word_perplexity")]
    with pytest.raises(ValueError, match=r"wikitext is measured by bits_per_byte, word_perplexity; averages.*acc_norm"):
        tables.by_variant(pd.concat(parts))
    kept = tables.by_variant(pd.concat(parts).query("where != 'wikitext'"))
    assert kept["avg"].between(0, 100).all()


def test_by_variant_averages_the_same_tasks_for_all():
    rows = measured()
    table = tables.by_variant(rows[(rows["variant"] == "Baseline") | (rows["where"] != "boolq")])
    assert np.isnan(table.loc["Attn-8", "boolq"]) and np.isnan(table.loc["Attn-8", "avg"])


@pytest.mark.parametrize("speedup", [0.89, 1.0, np.nan])
def test_gamma_needs_a_speedup(speedup):
    """MLP-4 at 0.89x once got -0.16, as if losing accuracy and speed were the best of all."""
    gamma = [statistics.gamma(62.0, 60.0, factor) for factor in (1.0, speedup)]
    shown = pd.DataFrame({"method": ["Baseline", "MLP-4"], "avg": [62.0, 60.0], "speedup": [1.0, speedup]})
    row = tables.format_table(shown.assign(gamma=gamma), missing="needs a GPU").splitlines()[3]
    assert row.split(" | ")[-1] == ("needs a GPU |" if np.isnan(speedup) else "– |")


def test_by_variant_says_what_is_not_there():
    with pytest.raises(ValueError, match="no rows; measure at least one variant"):
        tables.by_variant(measured().head(0))


def test_guessing():
    table = tables.by_variant(measured())
    guess = tables.random_guess(table, ["piqa", "mmlu"], vocabulary=1000)
    assert guess["piqa"] == 50 and guess["mmlu"] == 25 and guess["avg"] == 37.5
    assert np.isclose(guess["percent"], 100 * 37.5 / 55) and np.isclose(guess["ppl_ratio"], 1000 / np.exp(3.05))


def test_with_intervals():
    rounds = pd.DataFrame(
        {"variant": ["Baseline", "Attn-8"] * 3, "round": [0, 0, 1, 1, 2, 2], "seconds": [2.2, 2, 1.1, 1, 3.4, 3]}
    )
    table = tables.with_intervals(measured(), ["xsum"], ["piqa", "boolq"], rounds)
    whole = table.loc["Baseline"]
    assert whole["nats"] == whole["nats_low"] == whole["nats_high"] == 0 and whole["speedup"] == 1
    row = table.loc["Attn-8"]
    assert np.isclose(row["nats"], 1.1) and np.isclose(row["avg"], 45)
    assert np.isclose(row["speedup"], np.prod([1.1, 1.1, 3.4 / 3]) ** (1 / 3))
    for column in ("nats", "avg", "speedup"):
        assert row[f"{column}_low"] < row[column] < row[f"{column}_high"]
    assert list(tables.with_intervals(measured(), tasks=["piqa"])) == ["avg", "avg_low", "avg_high"]
    with pytest.raises(ValueError, match="seconds of every round"):
        tables.with_intervals(measured(), rounds=rounds.query("variant == 'Baseline'"))


def test_cells_with_intervals():
    df = pd.DataFrame({"nats": [0.452, 0.0], "nats_low": [0.41, 0.0], "nats_high": [0.49, 0.0], "low": [1.0, 2.0]})
    rows = tables.format_table(df).splitlines()
    assert rows[0] == "| Nats lost | low |" and rows[2:] == ["| 0.45 [0.41, 0.49] | 1.0 |", "| 0.00 | 2.0 |"]
    assert tables.format_table(df, "csv").splitlines()[1] == "0.452,0.41,0.49,1.0"


def test_the_worst_model_is_recorded(tmp_path):
    def estimate(value, width, over="questions"):
        return Estimate(value, value - width, value + width, 100, over, "paired bootstrap")

    results = [
        ("tab01-attn8-keeps-95", "a", estimate(99, 1)),  # above 95
        ("tab01-attn8-keeps-95", "b", estimate(97, 1)),
        ("tab01-mlp8-below-95", "a", estimate(90, 9)),  # below 95: less, and not decided
        ("tab01-mlp8-below-95", "b", estimate(93, 1)),
        ("tab07-close-at-4-reverse", "a", estimate(0.01, 0.02, "samples")),  # within 0.05
        ("tab07-close-at-4-reverse", "b", estimate(-0.2, 0.02, "samples")),
        ("tab01-speedup-attn8", "a", None),
        ("tab01-speedup-attn8", "b", estimate(1.1, 0.05, "rounds")),
        ("tab03-speedup-half", "a", None),
    ]
    tables.record_worst(tmp_path, results, "a test")
    claims = paper.joined_claims(tmp_path).set_index("id")
    assert claims["verdict"].to_dict() == {
        "tab01-attn8-keeps-95": "holds",
        "tab01-mlp8-below-95": "undecided",
        "tab07-close-at-4-reverse": "differs",
        "tab01-speedup-attn8": "holds",
        "tab03-speedup-half": "not run",
    }
    assert claims["detail"].to_dict() == {
        "tab01-attn8-keeps-95": "b: a test",
        "tab01-mlp8-below-95": "a: a test",
        "tab07-close-at-4-reverse": "b: a test",
        "tab01-speedup-attn8": "b: a test",
        "tab03-speedup-half": "a test",
    }
    assert claims.loc["tab01-attn8-keeps-95", "value"] == 97


@pytest.mark.parametrize("fmt", ["markdown", "latex", "csv"])
def test_no_cell_is_blank(fmt):
    df = beside()
    df.loc[9, "piqa"] = np.nan  # as if the paper had not printed it
    text = tables.format_table(df, fmt, missing_in={"speedup": "needs a GPU"}, note="Run it: make reproduce.")
    cells = text.replace("\\\\", "")
    assert "nan" not in text.lower() and not re.search(r"\| *\||& *&|,,", cells)
    assert text.count("needs a GPU") == 7 and text.count("not in the paper") >= 1
    assert text.count("not run") == 8 + 7  # RTE of 8 measured rows; γ of all but the Baseline
    assert ("Run it: make reproduce." in text) == (fmt != "csv")


def test_grey_rows_are_those_below_95_percent():
    df = paper.table("tab01").assign(source="paper")
    expected = []
    for _, rows in df.groupby("model", sort=False):
        base = rows["avg"].iloc[0]
        expected += [f"{m} {a}" for m, a in zip(rows["method"], rows["avg"], strict=True) if a / base < 0.95]
    marked = [line for line in tables.format_table(df).splitlines() if "▽ " in line or "▽*" in line]
    assert [
        f"{m} {a}" for m, a in (re.findall(r"\*(\S+?-\d+)\*.*\*([\d.]+) ▽", line)[0] for line in marked)
    ] == expected
    assert tables.format_table(df, "latex").count(r"\rowcolor") == len(expected) == 4


def test_cells():
    df = pd.DataFrame(
        {
            "method": ["Attn-4", "a|b_c"],
            "avg": [68.25, -0.01],
            "avg_low": [67.6, np.nan],
            "avg_high": [68.9, np.nan],
            "gamma": [-0.05, 0.3],
            "n": [7, 8],
        }
    )
    rows = tables.format_table(df, digits={"avg": 1}).splitlines()
    assert rows[0] == "| Method | Avg. | γ | n |" and rows[1] == "| --- | ---: | ---: | ---: |"
    assert rows[2:] == ["| Attn-4 | 68.2 [67.6, 68.9] | −0.05 | 7 |", r"| a\|b_c | 0.0 | 0.30 | 8 |"]
    with pytest.raises(ValueError, match="markdown, latex, csv"):
        tables.format_table(df, "html")


def test_save_table_writes_five_files(tmp_path):
    options = {"note": "Speed: run on CUDA."}
    shown = tables.save_table(beside(), "tab01", "Table 1, 95 % & more.", tmp_path, {"commit": "abc"}, **options)
    assert shown == (tmp_path / "tab01.md").read_text() and shown.startswith("Table 1, 95 % & more.\n\n| Model |")
    assert {p.name for p in tmp_path.iterdir()} == {f"tab01.{k}" for k in ("md", "tex", "csv", "txt", "json")}
    back = pd.read_csv(tmp_path / "tab01.csv")
    assert back["avg"].tolist() == beside()["avg"].tolist()  # all digits
    assert json.loads((tmp_path / "tab01.json").read_text())["commit"] == "abc"


def test_infinite_cells():
    df = pd.DataFrame({"method": ["a", "b"], "ppl_ratio": [np.inf, -np.inf]})
    df = df.assign(ppl_ratio_low=[2.0, -np.inf], ppl_ratio_high=[np.inf, 1.0])
    rows = tables.format_table(df).splitlines()
    assert rows[2:] == ["| a | ∞ [2.00, ∞] |", "| b | −∞ [−∞, 1.00] |"]
    assert r"a & $\infty$ [2.00, $\infty$] \\" in tables.format_table(df, "latex")
    assert tables.format_table(df, "csv").splitlines()[1] == "a,inf,2.0,inf"


@pytest.mark.parametrize("df", [pd.DataFrame(), pd.DataFrame({"method": []}), pd.DataFrame(index=[0, 1])])
@pytest.mark.parametrize("fmt", ["markdown", "latex", "csv"])
def test_an_empty_table_is_refused_with_a_sentence(df, fmt):
    with pytest.raises(ValueError, match=rf"{len(df)} rows and {len(df.columns)} columns; a table needs"):
        tables.format_table(df, fmt)


def test_two_columns_of_one_name_are_refused():
    with pytest.raises(ValueError, match="more than one column is called Avg."):
        tables.format_table(pd.DataFrame({"avg": [1.0], "mean": [2.0]}), names={"mean": "Avg."})


def test_latex():
    """Models apart by a rule, weak rows shaded, published ones in italics, everything special escaped."""
    text = tables.format_table(beside(), "latex", names={"method": "a_b & ~^<x>|−–γρ {}"}, note="Run 100 % of it.")
    lines = text.splitlines()
    assert lines[:3] == [
        "% needs \\usepackage{booktabs,colortbl}",
        r"\begin{tabular}{lllrrrrrrrrrrr}",
        r"\toprule",
    ] or (lines[0].startswith("% needs") and lines[2] == r"\toprule")
    special = r"a\_b \& \textasciitilde \textasciicircum $<$x$>$$|$$-$--$\gamma$$\rho$ \{\}"
    assert special in lines[3]
    ruled = [line for line in lines if line.startswith(r"\midrule ")]
    assert len(ruled) == 1 and r"\midrule \textit{Mistral-7B} & \textit{Baseline}" in ruled[0]
    shaded = [line for line in lines if r"\rowcolor[gray]{0.88}" in line]
    assert [line.startswith(r"\rowcolor") for line in shaded] == [True] * len(shaded) and len(shaded) == 4
    assert text.count(r"\textit{") == len(beside()) // 2 * (len(beside().columns) - 2)
    assert r"Run 100 \% of it. Gray: average below 95 \%" in text and "\\end{tabular}" in lines


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="pdflatex is not installed")
def test_latex_compiles(tmp_path):
    frames = [beside(), *(paper.table(f"tab{i:02d}") for i in range(1, 13)), paper.claims().head(3)]
    for i, frame in enumerate(frames):
        tables.save_table(frame, f"t{i}", "A caption.", tmp_path, {}, names={"avg": "≥ ~^<x>|−–×ρ {}"})
    body = "\n\n".join(rf"\input{{t{i}.tex}}" for i in range(len(frames)))
    (tmp_path / "all.tex").write_text(
        r"\documentclass{article}\usepackage[landscape,margin=1cm]{geometry}\usepackage{booktabs,colortbl}"
        rf"\begin{{document}}\scriptsize {body}\end{{document}}"
    )
    run = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"],
        cwd=tmp_path,
        capture_output=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stdout[-2000:].decode(errors="replace")


def test_provenance_line():
    assert tables.provenance_line({"model": "smollm2", "seed": 0}) == "model: smollm2 · seed: 0"


def test_perplexity_weighs_samples_by_their_tokens():
    model = tiny("llama")
    mask = torch.ones(4, 20, dtype=torch.long)
    mask[0, 5:] = 0
    mask[1, 12:] = 0
    text = llmdrop.Calibration(random_ids(4, 20), attention_mask=mask)
    plan = llmdrop.DropPlan([1])
    with tempfile.TemporaryDirectory() as folder:
        variants = {"Baseline": Variant(), "Attn-1": Variant(plan)}
        rows = quality(model, None, variants, {"text": text}, store=llmdrop.Store(folder))
    table = tables.by_variant(rows)
    expected = llmdrop.perplexity_sweep(model, {"Baseline": llmdrop.DropPlan(), "Attn-1": plan}, text, progress=False)
    np.testing.assert_allclose(table["perplexity"], expected["perplexity"], rtol=1e-9)
    assert table["ppl_ratio"].iloc[1] == pytest.approx(expected["perplexity"][1] / expected["perplexity"][0])
