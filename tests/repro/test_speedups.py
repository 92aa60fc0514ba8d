"""Published, predicted and measured speedups, lined up by row."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from tiny import tiny

from llmdrop import DropPlan, Store
from llmdrop.repro import paper, speedup_figures, speedups
from llmdrop.repro.statistics import speed_ratio
from llmdrop.speed.geometry import GEOMETRIES, Shape
from llmdrop.speed.roofline import predict_speed

SIZES = dict(batch_size=2, prompt_len=8, new_tokens=4, rounds=2)


@pytest.fixture(autouse=True)
def known_machine(monkeypatch):
    """measure_hardware itself is tested with the roofline; here it would take most of the time."""
    monkeypatch.setattr(speedups, "measure_hardware", lambda device, dtype: (2e10, 3e11))


@pytest.fixture(scope="module")
def explained():
    return speedups.explain_published()


def test_every_published_row_is_explained(explained):
    rows, found = explained
    assert len(rows) == sum(len(paper.table(t)) for t in ("table01", "table02", "table03")) == 45
    assert rows.notna().all().all()
    assert (rows["predicted"] <= rows["ceiling"] + 1e-9).all()
    assert found["model"].tolist() == list(rows["model"].unique())
    by_model = found.set_index("model")
    assert by_model.loc["Llama-2-13B", ["fits", "implied"]].tolist() == [6, 6]
    assert (by_model["error"] <= by_model["error_at_fits"]).all()
    assert (by_model["needed_gb"] > 48).tolist() == (by_model["times"] > 1).tolist()
    off = (rows["predicted"] - rows["published"]).abs().groupby(rows["model"]).max()
    assert np.allclose(off[by_model.index], by_model["error"])


def test_the_repositorys_protocol_is_not_what_was_published(explained):
    rows, found = explained
    assert (found["error_no_cache"] > 10 * found["error"]).sum() >= 3 and found["error_no_cache"].min() > 0.2
    attn = rows["method"].str.startswith("Attn")
    assert (rows["no_cache"] < rows["published"] - 0.01)[attn].all()  # without a cache, attention hardly pays


def test_grid():
    grid = speedups.speedup_grid("Llama-2-13B", "Attn-20", [1, 8], [512, 4096], "RTX 6000 Ada")
    wide = grid.pivot(index="batch_size", columns="context", values="speedup")
    assert (wide.loc[8] > wide.loc[1]).all() and (wide[4096] > wide[512]).all()
    assert grid["fits"].tolist() == [True, True, True, False]


def test_measured_beside_the_limit_of_this_machine(tmp_path, capsys):
    store, model = Store(tmp_path), tiny("llama")
    rows, timed = speedups.measure_beside_limit(store, model, ["Baseline", "Attn-2"], **SIZES)
    assert rows["method"].tolist() == ["Baseline", "Attn-2"] and rows["n_dropped"].tolist() == [0, 2]
    assert (rows.loc[0, ["speedup", "limit", "ratio"]] == 1).all()
    named = {"model": "tiny", "decoding": "eager"}
    intervals = speedups.with_intervals(rows.assign(**named), timed.assign(**named))
    ratio = speed_ratio(timed, "Attn-2", "Baseline")
    assert rows["speedup"][1] == pytest.approx(ratio.value)
    assert intervals["speedup_low"].tolist() == [1, ratio.low] and intervals["speedup_high"].tolist() == [1, ratio.high]
    assert len(timed) == 2 * SIZES["rounds"] and set(timed["limit"]) == set(rows["limit"])
    assert (rows["bandwidth"] == 2e10).all() and (rows["rate"] == 3e11).all()
    limit = predict_speed(model, DropPlan([2, 3]), 2, 8, 4, (2e10, 3e11), weight_bits=32, cache_bits=32)
    assert rows["limit_seconds"][1] == pytest.approx(limit.seconds)
    assert rows["ratio"][1] == rows["speedup"][1] / rows["limit"][1]
    capsys.readouterr()
    again, timed_again = speedups.measure_beside_limit(store, model, ["Baseline", "Attn-2"], **SIZES)
    assert again.equals(rows) and timed_again.equals(timed)
    assert "measuring" not in capsys.readouterr().out


def test_least_of_limit():
    """Two models of known ratios, of which a variant that did not fit is left out; the interval is over rounds."""
    noise = np.random.default_rng(0).normal(0, 0.01, 20)
    parts = []
    for model, speedup in {"fast": 2.0, "slow": 1.1}.items():
        seconds = {"Baseline": np.ones(20), "Attn-2": np.exp(noise) / speedup, "Attn-4": np.full(20, np.nan)}
        for variant, values in seconds.items():
            row = {"model": model, "decoding": "eager", "variant": variant, "round": range(20), "seconds": values}
            parts.append(pd.DataFrame(row | {"limit": 1.0 if variant == "Baseline" else 1.25}))
    found = speedups.least_of_limit(pd.concat(parts))
    assert found.low < 1.1 / 1.25 < found.high and found.high - found.low < 0.02
    assert found.over == "rounds" and found.value == pytest.approx(1.1 / 1.25 * np.exp(-noise.mean()))


@pytest.fixture
def two_shapes(monkeypatch):
    """Two models of the paper at tiny shapes, the second in 4 bits."""
    for name in ("Llama-3-8B", "Llama-3-70B"):
        monkeypatch.setitem(GEOMETRIES, name, Shape(50, 128, 2, 1, 64, 128, 100))


def test_models_by_shape(tmp_path, two_shapes):
    names = ["Llama-3-8B", "Llama-3-70B"]
    sizes = dict(prompt_len=4, new_tokens=2, rounds=1)
    rows, _, facts = speedups.measure_models(Store(tmp_path), names, "bfloat16", "cpu", {"Llama-3-8B": 3}, **sizes)
    assert rows["model"].unique().tolist() == names and rows["batch"].unique().tolist() == [3, 1]
    printed = paper.table("table02")
    assert rows["method"].tolist() == printed["method"].tolist() and (rows["decoding"] == "eager").all()
    assert facts["dtype"] == "bfloat16" and facts["model"] == "Llama-3-70B-4bit"
    assert rows["kv_bytes"][0] == 2 * 2 * 50 * 64 * 3 * 6
    whole, small = rows.loc[rows["method"] == "Baseline", "weight_bytes"]
    assert small < 0.35 * whole


@pytest.mark.parametrize("name", ["Llama-2-7B", "tiny"])
def test_models_without_published_speedups_are_measured_by_table_1(name, tmp_path, monkeypatch):
    if name == "tiny":  # of fewer layers than some rows drop
        monkeypatch.setattr(speedups, "load_model", lambda *arguments: (tiny("llama"), None))
        expected = {"Baseline", "Block-4", "MLP-4", "Attn-4"}
    else:
        monkeypatch.setitem(GEOMETRIES, name, Shape(32, 128, 2, 1, 64, 128, 100))
        expected = {"Baseline", *paper.table("table01")["method"]}
    sizes = dict(prompt_len=4, new_tokens=2, rounds=1)
    rows, _, _ = speedups.measure_models(
        Store(tmp_path), [name], "bfloat16" if name != "tiny" else "float32", "cpu", **sizes
    )
    assert set(rows["method"]) == expected and len(rows) == len(expected)
    assert rows["method"][0] == "Baseline" and rows["ratio"].notna().all()


def test_rows_to_measure_are_never_missing():
    for name in [*GEOMETRIES, "some/model"]:
        rows = speedups.rows_to_measure(name, 80)
        assert rows[0] == "Baseline" and len(rows) == len(set(rows)) > 5
    assert speedups.rows_to_measure("some/model", 2) == ["Baseline"]


def test_compiled_runs_have_an_eager_one_beside(tmp_path, two_shapes, monkeypatch):
    asked = []

    def spy(store, model, labels, rounds, **settings):
        asked.append((list(labels), settings["cache"], settings["decoding"]))
        return measure(store, model, labels, rounds, **(settings | {"decoding": "eager"}))

    measure = speedups.measure_beside_limit
    monkeypatch.setattr(speedups, "measure_beside_limit", spy)
    sizes = dict(cache="static", decoding="graph", prompt_len=4, new_tokens=2, rounds=1)
    rows, _, _ = speedups.measure_models(Store(tmp_path), ["Llama-3-8B"], "bfloat16", "cpu", **sizes)
    assert [how[1:] for how in asked] == [("static", "graph"), ("dynamic", "eager")]
    assert asked[1][0] == ["Baseline", "Attn-20"] and rows["decoding"].tolist() == ["graph"] * 6 + ["eager"] * 2


def test_plots(tmp_path, two_shapes, explained):
    rows, rounds, _ = speedups.measure_models(
        Store(tmp_path), ["Llama-3-8B"], "bfloat16", "cpu", prompt_len=4, new_tokens=2, rounds=2
    )
    rows.loc[1, "speedup"] = np.nan  # did not fit
    rows = speedups.with_intervals(rows, rounds)
    assert rows["speedup_low"].isna().tolist() == [k == 1 for k in range(len(rows))]
    drawn = speedups.panels(explained[0], rows)
    assert drawn["panel"].nunique() == 6 and "Llama-3-8B here, batch 1" in set(drawn["panel"])
    fig, axes = plt.subplots(1, 3)
    for ax, panel in zip(axes, ["Llama-2-13B, batch 6", "Llama-3-8B here, batch 1"], strict=False):
        speedup_figures.plot_speedups(drawn[drawn["panel"] == panel], ax)
    hollow = [line for line in axes[0].lines if line.get_markerfacecolor() == "white" and len(line.get_xdata())]
    assert sum(len(line.get_xdata()) for line in hollow) == 8  # the rows of Table 1
    assert len(axes[1].containers) == 4 and "Measured" in axes[1].get_legend_handles_labels()[1]
    speedup_figures.plot_grid(speedups.speedup_grid("Llama-2-13B", "Attn-20", [1, 8], [512, 4096]), axes[2])
    assert len(axes[2].patches) == 1 and [t.get_text() for t in axes[2].get_xticklabels()] == ["512", "4k"]
    plt.close(fig)


def test_largest_batches_by_formula():
    rows = speedups.largest_batches(paper.table("table04")).set_index("model")
    assert rows.loc["Llama-2-13B", ["fits_before", "fits_after"]].tolist() == [13, 31]
    assert (rows["fits_after"] > 1.5 * rows["fits_before"]).all()
    assert rows[["measured_before", "measured_after"]].isna().all().all()


@pytest.mark.parametrize("limit", [0, 1, 2, 7, 100, 1000, 2000])
@pytest.mark.parametrize("wasted", [0, 40])
def test_largest_measured_batch(monkeypatch, limit, wasted):
    """Of a GPU with room for `limit` sequences, and less by what fragments of free memory waste of many."""
    tried = []
    weights = 5000
    bytes_each = 300

    def run(model, batch, **sizes):
        tried.append(batch)
        peak = weights + bytes_each * batch
        if peak + wasted * (batch > 2) > weights + bytes_each * limit:
            raise torch.AcceleratorError("CUDA error: out of memory") if batch > 2 else torch.OutOfMemoryError("CUDA")
        return {"peak_bytes": peak}

    monkeypatch.setattr(speedups, "measure_speed", run)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (bytes_each * limit, 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: weights)
    found = speedups.largest_measured_batch(tiny("llama"), 2048, 1000)
    assert 0.94 * (min(limit, 1000) - 1) <= found <= limit and (wasted or found == min(limit, 1000))
    assert len(tried) <= 3 + bool(wasted)
