"""Dropped checkpoints in transformers: by the file they bring, without llmdrop, and refused where neither is."""

import json
import subprocess
import sys

import pytest
import torch
from exports import MIXED, TOKENIZER, logits
from tiny import random_ids, tiny
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import llmdrop
from llmdrop import DropPlan, apply_plan, load_model, save_model


@pytest.mark.parametrize("plan", [DropPlan([0, 3]), MIXED, DropPlan(range(5))], ids=["attn", "mixed", "no attention"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "qwen2"])
def test_transformers_reads_it_with_the_file_it_brings(family, plan, tmp_path):
    model, ids = apply_plan(tiny(family), plan), random_ids(2, 9)
    save_model(model, TOKENIZER, tmp_path / "m")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m", trust_remote_code=True, attn_implementation="eager")
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), atol=1e-5, rtol=0)
    assert len([layer for layer in loaded(ids).past_key_values.layers if layer.keys.nbytes]) == 5 - len(plan.attn)
    mask, how = torch.ones_like(ids), dict(max_new_tokens=8, do_sample=False)
    cached = loaded.generate(ids, attention_mask=mask, **how)
    assert torch.equal(cached, loaded.generate(ids, attention_mask=mask, use_cache=False, **how))
    assert torch.equal(cached, model.generate(ids, attention_mask=mask, **how))
    loaded.save_pretrained(tmp_path / "again")  # by transformers alone
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    torch.testing.assert_close(logits(again, ids), logits(model, ids), atol=1e-5, rtol=0)
    save_model(loaded, TOKENIZER, tmp_path / "third")
    assert llmdrop.find_anatomy(load_model(tmp_path / "third", device="cpu")[0]).plan == plan


def test_it_needs_no_llmdrop(tmp_path):
    path, ids = save_model(apply_plan(tiny("llama"), MIXED), TOKENIZER, tmp_path / "m"), random_ids(1, 7)
    source = (path / "modeling_llmdrop.py").read_text()
    assert "from llmdrop" not in source and "import llmdrop" not in source
    assert len(source.splitlines()) < 250, "one small file"
    code = f"""
import sys; sys.modules["llmdrop"] = None
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained({str(path)!r}, trust_remote_code=True)
print(model(torch.tensor({ids.tolist()}), use_cache=False).logits[0, -1, :3].tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = logits(load_model(path, device="cpu")[0], ids)[0, -1, :3]
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), expected, atol=1e-5, rtol=0)


def test_stock_classes_refuse_it(tmp_path):
    path = save_model(apply_plan(tiny("llama"), MIXED), TOKENIZER, tmp_path / "m")
    with pytest.raises(Exception, match="num_hidden_layers"):
        LlamaForCausalLM.from_pretrained(path)
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False)


def test_blocks_alone_are_an_ordinary_checkpoint(tmp_path):
    plan, ids = DropPlan([0, 3], [0, 3]), random_ids(1, 7)
    model = apply_plan(tiny("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5}), plan)
    path = save_model(model, TOKENIZER, tmp_path / "m")
    assert not list(path.glob("*.py")) and "auto_map" not in (path / "config.json").read_text()
    torch.testing.assert_close(logits(LlamaForCausalLM.from_pretrained(path), ids), logits(model, ids))
    config = json.loads((path / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e5, "transformers 4 reads the first"
    kind = json.loads((path / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert kind == "PreTrainedTokenizerFast", "transformers 4 knows no TokenizersBackend"
