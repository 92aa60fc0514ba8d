"""What `trust_remote_code=True` promises holds on the oldest transformers that modeling_llmdrop.py names."""

import os
import subprocess
import sys

import pytest
import torch
from exports import TOKENIZER, logits
from tiny import random_ids, tiny

from llmdrop import DropPlan, apply_plan, build_dir, save_model

OLDEST = "transformers==4.50.3"
PLANS = {"attention": DropPlan([0, 3]), "MLP": DropPlan([], [1, 4]), "mixed": DropPlan([0, 2, 3], [2, 4])}
FAMILIES = ("llama", "mistral", "phi3", "olmo2")
TOO_NEW = ("gpt2", "opt", "gemma2")  # their caches need transformers 4.56
IDS = random_ids(2, 9)

CODE = """
import json, sys, torch, transformers
assert transformers.__version__ == "4.50.3", transformers.__version__
ids = torch.load("ids")

def reading(folder):
    out = {}
    for head in ("CausalLM", "", "SequenceClassification", "TokenClassification"):
        name = "AutoModelFor" + head if head else "AutoModel"
        auto = getattr(transformers, name)
        try:
            model = auto.from_pretrained(folder, trust_remote_code=True, attn_implementation="eager").eval()
        except Exception as error:
            out[name] = f"{type(error).__name__}: {error}"
            continue
        out[name] = model.base_model(ids, use_cache=False).last_hidden_state
        if head == "CausalLM":
            out["logits"] = model(ids).logits
            how = dict(attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0)
            out["text"] = model.generate(ids, **how)
            out["uncached"] = model.generate(ids, use_cache=False, **how)
    (stock,) = json.load(open(folder + "/config.json"))["architectures"]
    for name, load in {
        "stock": lambda: getattr(transformers, stock).from_pretrained(folder),
        "no remote code": lambda: transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False),
    }.items():
        try:
            load()
        except Exception as error:
            out[name] = f"{type(error).__name__}: {error}"
    return out

with torch.no_grad():
    torch.save({folder: reading(folder) for folder in sys.argv[1:]}, "readings")
"""


@pytest.fixture(scope="module")
def oldest():
    """A folder with the old release, to stand first on the path; the other packages are this environment's."""
    folder = build_dir() / OLDEST.replace("==", "-")
    if not (folder / "transformers").exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        done = subprocess.run([*command, OLDEST, "tokenizers==0.21.4", "huggingface_hub==0.30.2"], capture_output=True)
        if done.returncode:
            pytest.skip(f"cannot install {OLDEST} here: {done.stderr.decode()[-200:]}")
    return folder


def dropped_model(family: str, plan: str):
    return apply_plan(tiny(family), PLANS[plan])


@pytest.fixture(scope="module")
def readings(oldest, tmp_path_factory):
    """{name of a checkpoint: what the old release made of it}, all in one process."""
    folder = tmp_path_factory.mktemp("old")
    names = [f"{family}-{plan}" for family in FAMILIES for plan in PLANS] + [f"{family}-mixed" for family in TOO_NEW]
    for name in names:
        save_model(dropped_model(*name.split("-")), TOKENIZER, folder / name)
    torch.save(IDS, folder / "ids")
    environment = os.environ | {"PYTHONPATH": str(oldest), "HF_MODULES_CACHE": str(folder / "modules")}
    done = subprocess.run([sys.executable, "-c", CODE, *names], cwd=folder, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return torch.load(folder / "readings")


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_oldest_release_reads_what_we_write(family, plan, readings):
    out = readings[f"{family}-{plan}"]
    model = dropped_model(family, plan)
    with torch.no_grad():
        expected = model.base_model(IDS, use_cache=False).last_hidden_state
    torch.testing.assert_close(out["logits"], logits(model, IDS), atol=1e-5, rtol=0)
    for auto in ("AutoModelForCausalLM", "AutoModel", "AutoModelForSequenceClassification"):
        if isinstance(out[auto], str):  # a head that this release did not have yet
            assert "transformers 4.50.3 has no Olmo2ForSequenceClassification" in out[auto] and family == "olmo2"
        else:
            torch.testing.assert_close(out[auto], expected, atol=1e-5, rtol=0)
    assert torch.equal(out["text"], out["uncached"])
    assert out["stock"].startswith("TypeError") and "trust_remote_code=True" in out["no remote code"]


@pytest.mark.parametrize("family", TOO_NEW)
def test_what_the_oldest_release_cannot_run_is_refused(family, readings):
    out = readings[f"{family}-mixed"]
    assert "needs transformers 4.56 or later" in out["AutoModelForCausalLM"] + out["AutoModel"]
    assert not any(isinstance(value, torch.Tensor) for value in out.values())
    assert out["stock"] and "trust_remote_code=True" in out["no remote code"]
