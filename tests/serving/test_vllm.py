"""Exports in vLLM, by its Python API: the real one where it is installed, and one that transformers computes."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from exports import MIXED, PROMPTS, ROOT, TOKENIZER, logits, wide, with_biases
from processes import all_end, is_running
from tiny import random_ids

from llmdrop import DropPlan, save_model
from llmdrop.serving import vllm_engine
from llmdrop.serving.checks import check_export, compare_serving, engines

SHAPE = {"hidden_size": 128, "intermediate_size": 512}
REAL = pytest.mark.skipif(vllm_engine.installed() is None, reason=f"no vllm here: {vllm_engine.INSTALL}")


@pytest.fixture
def stand_in(tmp_path_factory, monkeypatch):
    """An environment of its own on the PATH, in which `vllm` is vllm_on_transformers."""
    folder = tmp_path_factory.mktemp("environment")
    (folder / "lib" / "python3.11" / "site-packages" / "vllm-0.32.0.dist-info").mkdir(parents=True)
    (folder / "bin").mkdir()
    modules = f"{Path(__file__).parent / 'vllm_on_transformers'}:{ROOT}"
    for name, text in (("vllm", "exit 1"), ("python", f'PYTHONPATH={modules} exec {sys.executable} "$@"')):
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")


@pytest.fixture(params=["on transformers", pytest.param("real", marks=[REAL, pytest.mark.slow])])
def vllm(request):
    if request.param == "on transformers":
        request.getfixturevalue("stand_in")


def test_it_gives_the_same_numbers(vllm):
    plan = DropPlan([2, 3, 4], [1, 3, 4])
    (out,) = check_export("vLLM", wide(**SHAPE), TOKENIZER, plan, PROMPTS, 64)
    assert out["setting"] == "exact" and out["n_tokens"] == 640
    assert out["n_equal"] >= 639 and out["max_difference"] < 2e-3 and out["max_loss"] < 2e-3


def test_it_adds_the_means(vllm):
    model, ids = with_biases("mixed", **SHAPE), random_ids(4, 32)
    equal = logits(model, ids).argmax(-1) == logits(wide(MIXED, **SHAPE), ids).argmax(-1)
    assert equal.float().mean() < 0.5, "biases that matter to greedy text"
    (out,) = check_export("vLLM", model, TOKENIZER, MIXED, PROMPTS, 64)
    assert out["n_equal"] >= 639 and out["max_difference"] < 2e-3 and out["max_loss"] < 2e-3


def test_it_is_timed(vllm, capsys):
    plans = {"Baseline": DropPlan(), "Attn-2": DropPlan([2, 3]), "First": DropPlan([0])}
    rows = compare_serving("vLLM", wide(**SHAPE), TOKENIZER, plans, list(range(9)), 5, rounds=2)
    assert [row["plan"] for row in rows] == 2 * ["Baseline", "Attn-2"], "the engine cannot have the third"
    assert "vLLM cannot have First: layer 0 would be the first" in capsys.readouterr().out
    whole, dropped = rows[:2]
    assert dropped["kv_bytes"] / whole["kv_bytes"] == pytest.approx(3 / 5, rel=0.05)
    assert dropped["file_bytes"] < whole["file_bytes"]
    assert all(row[seconds] > 0 for row in rows for seconds in ("prefill_seconds", "decode_seconds"))


def test_what_fails_is_said_and_nothing_is_left_running(stand_in, tmp_path):
    assert engines()["vLLM"] == "vllm-0.32.0"
    path = save_model(wide(**SHAPE), TOKENIZER, tmp_path / "m", format="nemotron-nas")
    with vllm_engine.serve(path, context=64) as engine:
        others = int(re.search(r"processes (\d+)", engine.log.read_text())[1])
        assert [len(out["tokens"]) for out in engine.complete([[1, 2, 3], [4]], 5)] == [5, 5]
        with pytest.raises(
            ValueError, match="vLLM does not run .*ValueError: a prompt of 70 tokens is too long for 64"
        ):
            engine.complete([range(70)], 5)
        with pytest.raises(ValueError, match="vLLM does not run .*too long"):
            engine.complete([[1]], 5)
        assert is_running(others)
    assert engine.process.poll() is not None and all_end([others])
    (path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="vLLM does not run .*FileNotFoundError: cannot load"):
        with vllm_engine.serve(path):
            pass


def test_it_ends_with_the_process_that_started_it(stand_in, tmp_path):
    path = save_model(wide(**SHAPE), TOKENIZER, tmp_path / "m", format="nemotron-nas")
    code = f"""
import os, signal
from llmdrop.serving.vllm_engine import serve
with serve({str(path)!r}) as engine:
    print(engine.process.pid, engine.log.read_text().split("processes ")[1].split()[0], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL
    processes = [int(word) for word in done.stdout.split()]
    assert len(processes) == 2 and all_end(processes)


def test_without_vllm_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert vllm_engine.installed() is None and "vLLM" not in engines()
    with pytest.raises(ImportError, match="vLLM in an environment of its own.*pip install vllm"):
        with vllm_engine.serve(tmp_path):
            pass
