"""`make study`: the notebook runs on any local checkpoint, and its page needs no other file and no network."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import byte_tokenizer, tiny

import llmdrop
from llmdrop.repro.study import write_page

pytest.importorskip("papermill")
ROOT = Path(__file__).resolve().parent.parent.parent
QUESTIONS = [
    "How long does this take?",
    "Which layers does the model hardly use?",
    "What does dropping them cost?",
    "Where do memory and time go?",
    "Which plan keeps within my limit?",
    "What does it write, before and after?",
    "How sure is this?",
    "How do I save and serve this plan?",
]


def run(tmp_path: Path, family: str, *settings: str) -> subprocess.CompletedProcess:
    tokenizer = byte_tokenizer()
    model = tiny(family, "sdpa", vocab_size=len(tokenizer), max_position_embeddings=512)
    llmdrop.save_model(model, tokenizer, tmp_path / "whole")
    (tmp_path / "build").mkdir()
    (tmp_path / "build/data").symlink_to(llmdrop.build_dir() / "data")
    small = (f"MODEL={tmp_path / 'whole'}", f"OUT={tmp_path / 'out'}", "SAMPLES=4", "CONTEXT=64", "DEVICE=cpu")
    command = [sys.executable, "notebooks/run.py", "run", "notebooks/my_model.ipynb", tmp_path / "my_model.ipynb"]
    for setting in (*small, *settings):
        command += ["--set", setting]
    environment = os.environ | {"LLMDROP_BUILD": str(tmp_path / "build"), "MPLBACKEND": "agg"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_a_model_whose_time_cannot_be_predicted(tmp_path):
    done = run(tmp_path, "gpt_neox", "KV=0.6", "TASKS=openbookqa")
    assert done.returncode == 0, done.stderr
    plan = llmdrop.DropPlan.from_json((tmp_path / "out/my_model_plan.json").read_text())
    assert len(plan.attn) == 2  # 3 of 5 attention layers are left

    assert write_page(tmp_path / "my_model.ipynb", tmp_path / "page.html") == tmp_path / "page.html"
    html = (tmp_path / "page.html").read_text()
    assert re.findall(r"<h2[^>]*>([^<]+)<", html) == QUESTIONS
    assert html.count('src="data:image/png;base64,') >= 6 and "<script" not in html
    assert set(re.findall(r'(?:src|href)="(?!data:|#)([^"]*)"', html)) == {"https://arxiv.org/abs/2406.15786"}
    assert "import matplotlib" not in html and "measuring" not in html  # what was found, not how
    assert "No times are predicted" in html and "gated MLPs" in html
    assert f"llmdrop.DropPlan(attn={list(plan.attn)}, mlp={list(plan.mlp)})" in re.sub("<[^>]+>", "", html)


@pytest.mark.parametrize(
    ("setting", "says"),
    [("CONTEXT=513", "at most 512, the positions of this model"), ("KV=0.01", "no plan reaches KV=0.01")],
)
def test_what_is_impossible_is_said_before_the_long_part(tmp_path, setting, says):
    done = run(tmp_path, "llama", setting)
    assert done.returncode == 1 and says in done.stderr and "measuring losses" not in done.stdout
