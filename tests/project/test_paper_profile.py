"""Every notebook with PROFILE=paper, offline: tiny local Llama and Mistral for the paper's models, data from a mirror.

The mirror of the hub's datasets is the directory LLMDROP_TEST_DATA, else ../shared/data beside the repository; without
one the tests skip. The cells run in this process: kernels of their own would take longer than the measurements.
"""

import gzip
import os
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import pytest
import yaml
from IPython.display import display
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from llmdrop import save_model

ROOT = Path(__file__).resolve().parent.parent.parent
MIRROR = Path(os.environ.get("LLMDROP_TEST_DATA") or ROOT.parent / "shared" / "data")
PROFILE = yaml.safe_load((ROOT / "notebooks/profiles/paper.yaml").read_text())
NAMES = [name for name in PROFILE if name not in ("about", "common", "needs")]
ROWS = 40  # of every split: enough for 25 shots
TEXTS = ("c4", "lima", "CodeAlpaca", "MathInstruct", "wikitext")  # not benchmarks
LAYERS = 12  # as many as the claims need: they ask for Attn-12
# The sizes shrink; tasks, shots, metrics, calibration sets and everything else are the profile's.
SMALL = {
    "DEVICE": "cpu",
    "DTYPE": "float32",
    "BATCH_SIZE": 8,
    "N_SAMPLES": 2,
    "SEQ_LEN": 48,
    "SET_SIZES": [1, 2],
    "LIMIT": 1,
    "N_SEEDS": 2,
    "TIMED": {"batch_size": 1, "prompt_len": 8, "new_tokens": 2, "rounds": 1},
    "CACHED": {"batch_size": 2, "tokens": 32},
    "ANSWER_LEN": 4,
    "N_PROMPTS": 1,
}
SMALL_SETTINGS = {
    "dtype": "float32",
    "batch_size": 8,
    "n_samples": 2,
    "seq_len": 48,
    "held_out_samples": 2,
    "held_out_len": 48,
    "fit_samples": 1,
    "contexts": [256],
    "n_facts": 4,
}
OWN = {  # where one notebook needs another size
    "fig05_drop_curves": {"PLANS": {"attn": [4], "mlp": [4], "block": [4]}},
    "fig07_checkpoints": {"SCORED": PROFILE["fig07_checkpoints"]["SCORED"] | {"n_samples": 2, "seq_len": 48}},
    "fig08_joint": {"COUNTS": [4, 8]},
    "fig12_gsm8k": {"MODEL": "meta-math/MetaMath-Mistral-7B", "COUNTS": [4]},  # answers have 256 tokens
    "tab12_long_context": {"N_QUERIES": 2, "COUNTS": [2, 8]},
    "speedups": {"BATCH_SIZES": {}, "TIMED": {"prompt_len": 40, "new_tokens": 2, "rounds": 2}},
    "tab04_kv_cache": {"N_DROPPED": 6},
    "tab05_settings": {"LIMIT": 2},  # questions of each subject: one has no standard error
    "serving": {
        "PLANS": {"attn": [4]},
        "TIMED": {"prompt_len": 40, "new_tokens": 2, "rounds": 1, "threads": 1, "weights": "q8_0"},
    },
    "tab08_shortened_llama": {"COUNTS": [4]},
}
pytestmark = pytest.mark.skipif(
    not MIRROR.is_dir(), reason="no mirror of the hub's datasets: set LLMDROP_TEST_DATA to its directory"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A few rows of every split of the mirror: of benchmarks the shortest, since 25 shots are long enough."""
    root = tmp_path_factory.mktemp("data")
    for source in MIRROR.rglob("*.jsonl*"):
        target = root / source.relative_to(MIRROR)
        target.parent.mkdir(parents=True, exist_ok=True)
        opener = gzip.open if source.suffix == ".gz" else open
        with opener(source, "rt") as lines, opener(target, "wt") as out:
            rows = list(lines)
            rows = rows if any(name in str(source) for name in TEXTS) else sorted(rows, key=len)
            out.writelines(rows[:ROWS])
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory, smollm2) -> Path:
    """A tiny checkpoint under the name of each of the paper's models, with a real tokenizer."""
    root, tokenizer = tmp_path_factory.mktemp("models"), smollm2[1]
    shape = dict(hidden_size=64, intermediate_size=128, num_attention_heads=2, num_key_value_heads=1)
    shape |= dict(num_hidden_layers=LAYERS, vocab_size=len(tokenizer), max_position_embeddings=8192)
    for section in ("common", *NAMES):
        values = PROFILE[section] or {}
        for name in (one.split("@")[0] for one in values.get("MODEL", "").split(",") if one):
            for revision in list(values.get("REVISIONS", {}))[:2] or [""]:
                if "istral" in name:
                    model = MistralForCausalLM(MistralConfig(tie_word_embeddings=True, **shape))
                else:
                    model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **shape))
                save_model(model.eval(), tokenizer, root / name / revision, overwrite=True)
    return root


@pytest.mark.parametrize("name", NAMES)
def test_runs_offline_with_the_papers_settings(name, data, models, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT / "notebooks")
    monkeypatch.setenv("LLMDROP_BUILD", str(models / "build"))
    (out := tmp_path / "out").mkdir()
    values = PROFILE["common"] | (PROFILE[name] or {}) | SMALL | OWN.get(name, {})
    values |= {"DATA_DIR": str(data), "OUT": str(out)}
    settings = PROFILE["common"]["SETTINGS"] | (PROFILE[name] or {}).get("SETTINGS", {})
    values["SETTINGS"] = settings | SMALL_SETTINGS
    values["MODEL"] = ",".join(str(models / one.split("@")[0]) for one in values["MODEL"].split(","))
    values["REVISIONS"] = dict(list(values.get("REVISIONS", {}).items())[:2])
    if "mmlu" in values.get("TASKS", []) and name != "tab05_settings":  # 57 subjects take long: once is enough
        values["TASKS"] = [task for task in values["TASKS"] if task != "mmlu"]
    space = {"display": display, "__name__": "__main__"}
    with matplotlib.rc_context({"backend": "agg"}):
        for cell in nbformat.read(f"{name}.ipynb", as_version=4).cells:
            if cell.cell_type == "code":
                exec(compile(cell.source, f"{name}.ipynb, cell {cell.id}", "exec"), space)
                if "parameters" in cell.metadata.get("tags", []):
                    space |= {key: value for key, value in values.items() if key in space}
        plt.close("all")
    assert list(out.glob("*.csv")), "no output"
