"""Figures show the numbers they are given, at their final size, readable and byte for byte the same each time."""

import io
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from llmdrop.repro import figures, paper, statistics, style

matplotlib.use("Agg")
KINDS = ("block", "mlp", "attn")
PLAN = SimpleNamespace(attn=(17, 19, 20, 22, 23, 24, 25, 26), mlp=(20, 21))


@pytest.fixture(autouse=True)
def _style():
    with style.use():
        yield
    plt.close("all")


def scores(n_layers=30, **columns) -> pd.DataFrame:
    """Scores with the embedded model's shape: layer 0 and the last MLP far above the rest."""
    noise = np.random.default_rng(0)
    base = {"attn": np.linspace(0.02, 0.006, n_layers), "mlp": np.linspace(0.05, 0.02, n_layers)}
    base["attn"][0], base["mlp"][0], base["mlp"][-1] = 0.25, 0.6, 0.4
    base["block"] = base["attn"] + base["mlp"]
    return pd.concat(
        pd.DataFrame({"kind": k, "layer": range(n_layers), "score": v * noise.uniform(0.9, 1.1, n_layers)}).assign(
            stderr=0.1 * v, **columns
        )
        for k, v in base.items()
    )


def four_sets():
    return pd.concat(scores(calibration=c) for c in ("XSum (news)", "Python code", "ASDiv (math)", "QuAC (dialogue)"))


def curves():
    """Llama-2-13B's published averages against the number dropped, once as ours and once as the paper's."""
    rows = paper.table("tab01").query("model == 'Llama-2-13B'")
    split = rows["method"].str.split("-", expand=True)
    method = split[0].replace("Attn", "Attention")
    ours = pd.DataFrame({"method": method, "n_dropped": split[1].fillna("0").astype(int), "value": rows["avg"]})
    joint = pd.DataFrame(
        {"method": "Joint", "n_dropped": range(5), "value": 68.0, "step": [None, "attn", "attn", "mlp", "mlp"]}
    )
    return pd.concat(
        [
            ours.assign(source="measured", low=ours["value"] - 1.2, high=ours["value"] + 1.2),
            joint,
            ours[method != "Baseline"].assign(source="paper"),
        ],
        ignore_index=True,
    )


def order():
    published = paper.drop_lists()["Mistral-7B-v0.1"]["attn-8"]["attn"]
    rest = [i for i in range(31, -1, -1) if i not in published]
    frame = pd.DataFrame({"layer": published + rest, "step": range(1, 33)})
    return frame.assign(published_step=frame["layer"].map({layer: i + 1 for i, layer in enumerate(published)}))


def bars():
    frame = paper.table("fig09").drop(columns="model").melt(["method", "strategy"], var_name="task")
    return frame.assign(value=frame["value"] - 20, stderr=1.1)


def training():
    """Scores at log-spaced checkpoints of two runs: attention falls, the MLPs rise."""
    tokens = [0, 512, 2048, 8192, 32768, 131072, 409600]
    return pd.concat(
        scores(12, run=run, tokens=n).assign(score=lambda d, i=i: d["score"] * (1 + i * (d["kind"] == "mlp")))
        for run in ("seed 0", "seed 1")
        for i, n in enumerate(tokens)
    )


def losses():
    curve = training()[["run", "tokens"]].drop_duplicates(ignore_index=True)
    loss = 7.6 - 0.4 * np.log2(1 + curve["tokens"] / 5000)
    return curve.assign(valid_loss=loss, valid_stderr=0.03, train_loss=loss.where(curve["tokens"] > 0) + 0.05)


def found():
    """Facts found in contexts of several lengths, fewer the more is dropped and the longer the context."""
    random = np.random.default_rng(0)
    chance = {"Baseline": 0.95, "Attention-2": 0.8, "Attention-8": 0.3, "MLP-2": 0.7, "MLP-8": 0.2}
    rows = [
        (variant, k, tokens, int(random.random() < p - tokens / 20000))
        for variant, p in chance.items()
        for tokens in (512, 1024, 2048, 4096)
        for k in range(16)
    ]
    return pd.DataFrame(rows, columns=["variant", "item", "tokens", "right"])


def written():
    """Answers judged right or wrong, of five models."""
    random = np.random.default_rng(1)
    chance = {"Baseline": 0.7, "Attn-4": 0.5, "Attn-8": 0.2, "Attn-4, filled": 0.6, "Attn-8, filled": 0.4}
    rows = [(model, "facts", k, int(random.random() < p)) for model, p in chance.items() for k in range(48)]
    return pd.DataFrame(rows, columns=["model", "measure", "item", "value"])


def draw(name):
    """A figure as a notebook would draw it, and its data."""
    panels = {"importance": 3, "sample_size": 3}.get(name, 1)
    size = {"importance": (style.PAGE, 3), "sample_size": (style.PAGE, 3.2), "schematic": (style.PAGE, 0.95)}
    fig, ax = plt.subplots(panels, 1, figsize=size.get(name, (style.COLUMN, 2.6)), sharex=panels > 1)
    if name == "importance":
        figures.plot_importance(df := four_sets(), ax)
    elif name == "scores":
        figures.plot_scores(df := scores(), ax)
    elif name == "sample_size":
        figures.plot_sample_size(df := pd.concat(scores(n_samples=n) for n in (4, 16, 64, 256, 1024)), ax)
    elif name == "drop_curves":
        figures.plot_drop_curves(df := curves(), ax, "Accuracy", chance=50)
    elif name == "perplexity":
        df = curves().query("source != 'paper'").assign(value=lambda d: 2.0 ** (75 - d["value"]))
        df = df.assign(low=0.8 * df["value"], high=1.25 * df["value"])
        figures.plot_drop_curves(df, ax, ylabel="Perplexity", log=True)
    elif name == "dropping_order":
        figures.plot_dropping_order(df := order(), ax, 32)
    elif name == "bars":
        names = {"hellaswag": "HellaSwag", "mmlu": "MMLU", "openbookqa": "OBQA", "winogrande": "WinoG.", "avg": "Avg."}
        df = bars().query("method == 'Attn-8'").replace({"task": names})
        figures.plot_bars(df, ax)
    elif name == "checkpoints":
        plt.close(fig)
        fig, ax = plt.subplots(2, 3, figsize=(style.PAGE, 2.6), height_ratios=(11, 1.2))
        df = training()
        figures.plot_checkpoints(df[df["run"] == "seed 0"], ax)
    elif name == "over_training":
        df = training().query("layer > 0")
        figures.plot_over_training(df, ax, "score", "Importance", log=True, levels={"attn": 0.02})
        figures.legend_above(fig)
    elif name == "losses":
        figures.plot_losses(df := losses(), ax, {"uniform": 7.62, "unigram": 6.54, "bigram": 4.84})
        figures.legend_above(fig)
    elif name == "by_length":
        figures.plot_by_length(df := found(), ax, 6.25, "Retrieval (%)")
        figures.legend_above(fig, 3)
    elif name == "percent":
        df = statistics.against(written()).assign(layers=[0, 4, 8, 4, 8])
        lines = {"Dropped": df[1:3], "Dropped, reconstructed": df[3:]}
        figures.plot_percent(ax, df.iloc[0], lines, apart=0.6)
        ax.set(xlabel="Dropped layers", ylabel="Right (%)")
        figures.legend_above(fig, 2)
    else:
        figures.plot_schematic(PLAN, 30, ax)
        df = pd.DataFrame({"kind": "attn", "layer": PLAN.attn})
    return fig, df


ALL = ["importance", "scores", "sample_size", "drop_curves", "perplexity", "dropping_order", "bars", "schematic"]
ALL += ["checkpoints", "over_training", "losses", "by_length", "percent"]


@pytest.mark.parametrize("name", ALL)
def test_labels_do_not_overlap_and_stay_inside(name, monkeypatch):
    drawn, draw_text = [], matplotlib.text.Text.draw
    monkeypatch.setattr(matplotlib.text.Text, "draw", lambda self, r: (drawn.append(self), draw_text(self, r)))
    fig, _ = draw(name)
    fig.canvas.draw()  # once for the layout, so that the next one draws everything in its place
    drawn.clear()
    fig.canvas.draw()
    boxes = [(t.get_text(), t.get_window_extent()) for t in drawn if t.get_visible() and t.get_text().strip()]
    assert len(boxes) >= 8
    for text, box in boxes:
        assert box.x0 > -1 and box.y0 > -1 and box.x1 < fig.bbox.x1 + 1 and box.y1 < fig.bbox.y1 + 1, f"{text!r} is cut"
    for (a, one), (b, two) in itertools.combinations(boxes, 2):
        width = min(one.x1, two.x1) - max(one.x0, two.x0)
        height = min(one.y1, two.y1) - max(one.y0, two.y0)
        assert width < 1 or height < 2, f"{a!r} and {b!r} overlap by {width:.1f} x {height:.1f} pixels"


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """All figures saved by another process, with another hash seed."""
    out = tmp_path_factory.mktemp("elsewhere")
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_figures as t\n"
        "with t.style.use():\n"
        "    for name in t.ALL:\n"
        "        fig, df = t.draw(name)\n"
        f"        t.figures.save_figure(fig, name, 'A caption.', df, {str(out)!r}, {{'seed': 0}})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=os.environ | {"PYTHONHASHSEED": "5"})
    return out


@pytest.mark.parametrize("name", ALL)
def test_same_bytes_in_the_final_size(name, tmp_path, elsewhere):
    fig, df = draw(name)
    figures.save_figure(fig, name, "A caption.", df, tmp_path, {"seed": 0})
    for kind in ("pdf", "png", "csv", "txt", "json"):
        one, two = ((folder / f"{name}.{kind}").read_bytes() for folder in (tmp_path, elsewhere))
        assert one == two and one, kind
    pdf = (tmp_path / f"{name}.pdf").read_bytes()
    assert b"CreationDate" not in pdf and b"/Type3" not in pdf  # fonttype 42 embeds TrueType
    box = [float(x) for x in re.search(rb"/MediaBox \[([^\]]*)\]", pdf)[1].split()]
    assert box[2:] == pytest.approx([72 * x for x in fig.get_size_inches()])
    image = plt.imread(tmp_path / f"{name}.png")
    assert image.shape[1::-1] == tuple(np.round(300 * fig.get_size_inches()).astype(int))
    numbers = pd.read_csv(tmp_path / f"{name}.csv")
    assert numbers.equals(pd.read_csv(io.StringIO(df.to_csv(index=False))))
    assert json.loads((tmp_path / f"{name}.json").read_text()) == {"name": name, "seed": 0}


def test_saving_is_all_or_nothing(tmp_path):
    fig, df = draw("scores")
    figures.save_figure(fig, "scores", "old", df, tmp_path, {})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert set(before) == {f"scores.{kind}" for kind in ("pdf", "png", "csv", "txt", "json")}
    fig.savefig = lambda *a, **k: (_ for _ in ()).throw(OSError("No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        figures.save_figure(fig, "scores", "new", df, tmp_path, {})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


NEEDING = ["importance", "scores", "sample_size", "drop_curves", "bars", "checkpoints"]


@pytest.mark.parametrize("name", NEEDING)
def test_a_missing_column_is_named(name):
    fig, ax = plt.subplots()
    with pytest.raises(ValueError, match=rf"plot_{name}: the frame has no column .*needed: .*it has: other"):
        more = ["Accuracy"] if name == "drop_curves" else []
        getattr(figures, f"plot_{name}")(pd.DataFrame({"other": [1]}), ax, *more)
    with pytest.raises(ValueError, match="no rows"):
        figures.plot_dropping_order(pd.DataFrame({"layer": [], "step": []}), ax, 4)


def test_other_errors_are_clear():
    fig, ax = plt.subplots()
    with pytest.raises(ValueError, match="1 Axes for 3 kinds"):
        figures.plot_importance(four_sets(), ax)
    with pytest.raises(ValueError, match=r"drops attn \[30\], but the model has 30 layers"):
        figures.plot_schematic(SimpleNamespace(attn=(3, 30), mlp=()), 30, ax)
    with pytest.raises(ValueError, match="no layer has a step"):
        figures.plot_dropping_order(pd.DataFrame({"layer": [0], "step": [np.nan]}), ax, 4)
    with pytest.raises(ValueError, match="no color for method 'Magic'; known: Attention"):
        figures.plot_drop_curves(pd.DataFrame({"method": ["Magic"], "n_dropped": [1], "value": [1.0]}), ax, "")


def test_schematic_ghosts_are_the_dropped_modules():
    fig, ax = plt.subplots(figsize=(style.PAGE, 0.95))
    figures.plot_schematic(PLAN, 30, ax, legend=False)
    ghosts = sorted(p.get_x() for p in ax.patches if p.get_hatch())
    assert ghosts == pytest.approx(sorted([i + 0.13 for i in PLAN.attn] + [i + 0.52 for i in PLAN.mlp]))
    dashed = [round(p.get_x() - 0.07) for p in ax.patches if hasattr(p, "get_boxstyle") and p.get_linestyle() != "-"]
    assert dashed == [20]  # the only block that is gone whole


def test_dropping_order_cells_and_published_marks():
    fig, _ = draw("dropping_order")
    gone = np.asarray(fig.axes[0].collections[0].get_array()).reshape(32, 32)
    assert gone.sum(axis=0).tolist() == list(range(1, 33))  # n layers are gone after n steps
    assert gone[25].all() and gone[0].tolist() == [0] * 31 + [1]
    marks = next(line for line in fig.axes[0].lines if line.get_label() == "Published step")
    assert gone[marks.get_ydata()[:8], marks.get_xdata()[:8].astype(int) - 1].all()


def test_curves_show_ours_solid_and_the_paper_hollow():
    fig, df = draw("drop_curves")
    lines = {line.get_label(): line for line in fig.axes[0].lines}
    ours = df.query("method == 'Attention' and source == 'measured'")
    assert lines["Attention"].get_xydata().tolist() == [[0, 68.2], *ours[["n_dropped", "value"]].values.tolist()]
    assert lines["Attention"].get_color() == style.METHODS["Attention"]["color"]
    assert lines["Baseline"].get_ydata()[0] == 68.2 and lines["Random guess"].get_ydata()[0] == 50
    assert lines["Joint: Attention step"].get_xdata().tolist() == [1, 2]
    assert lines["Joint: MLP step"].get_xdata().tolist() == [3, 4]
    hollow = [x for x in fig.axes[0].lines if x.get_markerfacecolor() == "white" and len(x.get_xdata())]
    assert sum(len(x.get_xdata()) for x in hollow) == len(df.query("source == 'paper'"))
    assert all(x.get_linestyle() == "None" for x in hollow)


def test_bars_have_the_values_and_errors():
    fig, df = draw("bars")
    heights = sorted(p.get_height() for p in fig.axes[0].patches)
    assert heights == pytest.approx(sorted(df["value"]))
    assert fig.axes[0].get_ylim()[0] == 0  # a bar's length is its value
    assert len([c for c in fig.axes[0].collections if hasattr(c, "get_segments") and len(c.get_segments())]) == 2


def test_checkpoints_are_columns_and_layer_0_stands_apart():
    fig, df = draw("checkpoints")
    with pytest.raises(ValueError, match=r"Axes of shape \(3,\) for 3 kinds \(block, mlp, attn\); give 2 rows of 3"):
        figures.plot_checkpoints(df, fig.axes[:3])
    run = df[df["run"] == "seed 0"]
    for column, kind in enumerate(KINDS):
        upper, lower = (fig.axes[column + 3 * row].collections[0].get_array() for row in (0, 1))
        found = np.vstack([lower, upper])  # layers from 0 on
        expected = run[run["kind"] == kind].pivot(index="layer", columns="tokens", values="score").to_numpy()
        low = run.loc[run["layer"] > 0, "score"].quantile(0.02)
        assert np.allclose(found[0], expected[0]) and np.allclose(found[1:], np.maximum(expected[1:], low))
    names = [tick.get_text() for tick in fig.axes[3].get_xticklabels()]
    assert names == ["0", "2k", "33k", "410k"]


def test_over_training_shows_mean_band_and_levels():
    fig, df = draw("over_training")
    line = next(line for line in fig.axes[0].lines if line.get_label() == "MLP")
    assert np.allclose(line.get_ydata(), df[df["kind"] == "mlp"].groupby("tokens")["score"].mean())
    assert [line.get_ydata()[0] for line in fig.axes[0].lines if line.get_linestyle() == ":"] == [0.02]
    left, right = fig.axes[0].get_xlim()
    assert left < 0 < 409600 < right  # step 0 has a place on the log axis


def test_by_length_shows_shares_bands_and_guessing():
    fig, df = draw("by_length")
    lines = {line.get_label(): line for line in fig.axes[0].lines}
    table = statistics.shares(df, "variant", "tokens").set_index("variant")
    assert lines["MLP-8"].get_ydata().tolist() == table.loc["MLP-8", "value"].tolist()
    assert lines["Guessing"].get_ydata()[0] == 6.25
    assert lines["MLP-8"].get_alpha() == lines["Baseline"].get_alpha() == 1 > lines["MLP-2"].get_alpha()
    assert len(fig.axes[0].collections) == 3  # the baseline, and the most of each kind


def test_percent_shows_each_method_with_its_intervals():
    fig, df = draw("percent")
    dropped, filled = fig.axes[0].containers
    assert (dropped.get_label(), filled.get_label()) == ("Dropped", "Dropped, reconstructed")
    assert filled.lines[0].get_ydata().tolist() == (100 * df["value"][3:]).tolist()
    assert filled.lines[0].get_xdata().tolist() == pytest.approx([4.3, 8.3])  # beside the other, not over it
    ends = filled.lines[2][0].get_segments()[1][:, 1]
    assert ends.tolist() == pytest.approx((100 * df.loc[4, ["low", "high"]]).tolist())
    baseline = fig.axes[0].lines[0]
    assert baseline.get_label() == "Baseline" and baseline.get_ydata()[0] == 100 * df["value"][0]


def test_a_dropped_layer_is_white():
    df = scores().assign(calibration="XSum (news)")
    df.loc[(df["kind"] == "attn") & (df["layer"] == 7), "score"] = np.nan
    fig, axes = plt.subplots(3, 1)
    figures.plot_importance(df, axes)
    cells = [ax.collections[0].get_array() for ax in axes]
    assert [values.shape for values in cells] == [(1, 30)] * 3  # a column each, though one has no score
    assert np.ma.getmaskarray(cells[2])[0].nonzero()[0].tolist() == [7]
    assert not np.ma.getmaskarray(cells[1]).any()


def test_sample_size_shows_the_rank_correlation():
    df = pd.concat([scores(n_samples=4), scores(n_samples=16)])
    df.loc[(df["n_samples"] == 4) & (df["kind"] == "mlp"), "score"] **= -1  # the reverse order
    fig, axes = plt.subplots(3, 1)
    figures.plot_sample_size(df, axes)
    notes = [[t.get_text() for t in ax.texts] for ax in axes]
    assert notes == [["ρ = 1.000"], ["ρ = -1.000"], ["ρ = 1.000"]]


# --- style ----------------------------------------------------------------------------------------------------------


def test_style_is_a_statement_and_a_context():
    plt.rcdefaults()
    with style.use():
        assert plt.rcParams["pdf.fonttype"] == 42 and plt.rcParams["font.size"] == 8
    assert plt.rcParams["pdf.fonttype"] == 3 and plt.rcParams["font.size"] == 10
    style.use()
    assert plt.rcParams["savefig.bbox"] is None and plt.rcParams["font.size"] == 8  # the page is exactly figsize


def test_method_by_any_of_its_names():
    for name in ("Attention", "attn", "Attn-8", "attention"):
        assert style.name(name) == "Attention" and style.method(name) == style.METHODS["Attention"]
    assert style.method("Consecutive Block-4") == style.METHODS["Consecutive Block"]
    assert len({m["marker"] for m in style.METHODS.values()}) == len({m["color"] for m in style.METHODS.values()}) == 7


# Viénot, Brettel and Mollon 1999: how dichromats see, on linear RGB.
DICHROMATS = {
    "protan": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
    "deutan": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
}


def _lab(linear):
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    f = np.cbrt(np.maximum(xyz / [0.9505, 1, 1.089], 1e-4))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", DICHROMATS)
def test_colors_differ_for_every_reader(vision):
    def seen(color):
        c = np.array(to_rgb(color))
        return _lab(np.array(DICHROMATS[vision]) @ np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4))

    colors = {name: seen(look["color"]) for name, look in style.METHODS.items()}
    for a, b in itertools.combinations(colors, 2):
        assert np.linalg.norm(colors[a] - colors[b]) > 10, (a, b)
    assert abs(seen(style.RETAINED)[0] - seen(style.DROPPED)[0]) > 40  # told apart by lightness alone
