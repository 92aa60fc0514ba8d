"""Every notebook with PROFILE=paper, offline: tiny local Llama and Mistral for the paper's models, data from a mirror.

Takes minutes and a mirror of the hub's datasets (see the README), so it runs where LLMDROP_TEST_DATA names one.
"""

import gzip
import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import yaml
from papermill import inspect_notebook
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from llmdrop import save_model

ROOT = Path(__file__).parent.parent
MIRROR = Path(os.environ.get("LLMDROP_TEST_DATA") or "LLMDROP_TEST_DATA")
PROFILE = yaml.safe_load((ROOT / "notebooks/profiles/paper.yaml").read_text())
NAMES = [name for name in PROFILE if name not in ("about", "common", "needs")]
ROWS = 40  # of every split: enough for 25 shots
# The sizes shrink; models, tasks, shots, calibration sets and everything else are the profile's.
SMALL = {
    "N_SAMPLES": 2,
    "SEQ_LEN": 48,
    "DTYPE": "float32",
    "DEVICE": "cpu",
    "LIMIT": 1,
    "SIZES": [1, 2],
    "PPL_SAMPLES": 2,
    "PPL_LEN": 48,
    "PPL_SKIP": 0,
    "SPEED": {"batch_size": 1, "prompt_len": 8, "new_tokens": 2, "rounds": 1},
    "KV_BATCH": 2,
    "KV_LEN": 32,
    "ANSWER_LEN": 4,
}
# their measurements are not the paper's models' quality; each has an offline test of its own
APART = {"speedups", "serving", "fig07_checkpoints", "tab04_kv_cache"}
pytestmark = pytest.mark.skipif(not MIRROR.is_dir(), reason="LLMDROP_TEST_DATA names no mirror of the hub's datasets")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The first rows of every split of the mirror."""
    root = tmp_path_factory.mktemp("data")
    for source in MIRROR.rglob("*.jsonl*"):
        target = root / source.relative_to(MIRROR)
        target.parent.mkdir(parents=True, exist_ok=True)
        opener = gzip.open if source.suffix == ".gz" else open
        with opener(source, "rt") as lines, opener(target, "wt") as out:
            out.writelines(islice(lines, ROWS))
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory, smollm2) -> Path:
    """A tiny checkpoint under the name of each of the paper's models, with a real tokenizer."""
    root, tokenizer = tmp_path_factory.mktemp("models"), smollm2[1]
    shape = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1)
    shape |= dict(vocab_size=len(tokenizer), max_position_embeddings=8192, tie_word_embeddings=True)
    hub = PROFILE["common"], *(PROFILE[name] or {} for name in NAMES)
    for name in {one.split("@")[0] for values in hub for one in values.get("MODEL", "").split(",") if one}:
        layers = 40 if "13b" in name else 32
        if "istral" in name:
            model = MistralForCausalLM(MistralConfig(num_hidden_layers=layers, **shape))
        else:
            model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **shape))
        save_model(model.eval(), tokenizer, root / name)
    return root


@pytest.mark.parametrize("name", [name for name in NAMES if name not in APART])
def test_runs_offline_with_the_papers_settings(name, data, models, tmp_path, monkeypatch):
    known = list(inspect_notebook(str(ROOT / f"notebooks/{name}.ipynb")))
    values = PROFILE["common"] | (PROFILE[name] or {}) | SMALL | {"DATA_DIR": str(data), "OUT": str(tmp_path / "out")}
    values = {key: value for key, value in values.items() if key in known}
    if "MODEL" in values:
        values["MODEL"] = ",".join(str(models / one.split("@")[0]) for one in values["MODEL"].split(","))
    if isinstance(values.get("N_DROPPED"), list):
        values["N_DROPPED"] = values["N_DROPPED"][:2]
    if "NUM_FEWSHOT" in values and "mmlu" in values["NUM_FEWSHOT"]:  # 57 subjects make long tests; 5 shots need no more
        values["TASKS"] = [task for task in values["TASKS"] if task != "mmlu"] + ["mmlu"] * (name == "tab05_settings")
    (tmp_path / "params.json").write_text(json.dumps(values))
    command = [sys.executable, ROOT / "notebooks/run.py", "run", ROOT / f"notebooks/{name}.ipynb"]
    command += [tmp_path / f"{name}.ipynb", "--params", tmp_path / "params.json"]
    environment = os.environ | {"LLMDROP_BUILD": str(models / "build"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert list((tmp_path / "out").glob("*.csv")), "no output"
