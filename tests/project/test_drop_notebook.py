"""`make drop`: the notebook scores, drops the union of what was asked for, saves, and the result loads again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny

import llmdrop

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = ("N_SAMPLES=2", "SEQ_LEN=32", "PPL_SAMPLES=2", "PPL_LEN=32", "PPL_SKIP=4", "DEVICE=cpu")


def run(tmp_path, *settings: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "notebooks/run.py", "run", "notebooks/drop.ipynb", tmp_path / "drop.ipynb"]
    for setting in (*SMALL, *settings):
        command += ["--set", setting]
    environment = os.environ | {"LLMDROP_BUILD": str(tmp_path / "build")}  # these measurements are of no use to anyone
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_drop_notebook(tmp_path, smollm2):
    pytest.importorskip("papermill")
    _, tokenizer = smollm2
    calibration = llmdrop.load_calibration("xsum", tokenizer, n_samples=2, seq_len=32)
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "data").symlink_to(llmdrop.build_dir() / "data")  # packaged text
    llmdrop.save_model(tiny("llama", "sdpa", vocab_size=len(tokenizer)), tokenizer, tmp_path / "whole")
    model, rest = f"MODEL={tmp_path / 'whole'}", tmp_path / "rest"
    done = run(tmp_path, model, f"DEST={rest}", "ATTN=1", "MLP=2", "BLOCK=1")
    assert done.returncode == 0, done.stderr
    assert "loads with equal logits" in done.stdout and "perplexity" in done.stdout
    plan = llmdrop.find_anatomy(llmdrop.load_model(rest, device="cpu")[0]).plan
    whole, _ = llmdrop.load_model(tmp_path / "whole", device="cpu")
    scores = llmdrop.score(whole, calibration, progress=False)
    wanted = [llmdrop.plan_drop(scores, kind, n) for kind, n in (("attn", 1), ("mlp", 2), ("block", 1))]
    assert plan == wanted[0] | wanted[1] | wanted[2]

    done = run(tmp_path, model, f"DEST={tmp_path / 'reconstructed'}", "ATTN=1", "COMPENSATE=1", "REFIT_SAMPLES=1")
    assert done.returncode == 0, done.stderr
    assert "reconstructed: perplexity" in done.stdout and "loads with equal logits" in done.stdout
    reconstructed, _ = llmdrop.load_model(tmp_path / "reconstructed", device="cpu")
    i = wanted[0].attn[0]
    before = [part.layers[i - 1].mlp.down_proj.weight for part in map(llmdrop.find_anatomy, (whole, reconstructed))]
    assert i == 0 or not before[0].equal(before[1])

    done = run(tmp_path, model, f"DEST={rest}", "ATTN=0")
    assert done.returncode == 1 and "nothing to drop" in done.stderr and rest.is_dir()


def test_a_bfloat16_checkpoint_stays_one_and_nothing_of_others_is_overwritten(tmp_path, smollm2):
    pytest.importorskip("papermill")
    _, tokenizer = smollm2
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "data").symlink_to(llmdrop.build_dir() / "data")
    model = tiny("llama", "sdpa", vocab_size=len(tokenizer)).to(torch.bfloat16)
    llmdrop.save_model(model, tokenizer, tmp_path / "whole")
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "mine.txt").write_text("mine")
    done = run(tmp_path, f"MODEL={tmp_path / 'whole'}", f"DEST={notes}", "ATTN=1")
    assert done.returncode == 1 and "mine.txt, which save_model does not write" in done.stderr
    assert [file.name for file in notes.iterdir()] == ["mine.txt"]
    done = run(tmp_path, f"MODEL={tmp_path / 'whole'}", f"DEST={tmp_path / 'rest'}", "ATTN=40%", "KEEP=0,4")
    assert done.returncode == 0, done.stderr
    assert "bfloat16" in done.stdout
    rest, _ = llmdrop.load_model(tmp_path / "rest", "auto", "cpu")
    assert rest.dtype == torch.bfloat16
    plan = llmdrop.find_anatomy(rest).plan
    assert len(plan.attn) == 2 and not {0, 4} & set(plan.attn)
