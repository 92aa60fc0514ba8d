"""Dropped checkpoints in transformers: by the file they bring, without llmdrop, and refused where neither is."""

import importlib.util
import json
import re
import subprocess
import sys

import pytest
import torch
from exports import MIXED, TOKENIZER, logits
from tiny import random_ids, tiny
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import llmdrop
from llmdrop import Calibration, DropPlan, apply_plan, load_model, save_model
from llmdrop.compress.reconstruction import fit, reconstruct


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


@pytest.mark.parametrize(
    "plan", [DropPlan([0, 3]), MIXED, DropPlan([1, 3], [3])], ids=["attn", "mixed", "with a block"]
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_transformers_own_words_stand_beside_the_record(family, plan, tmp_path):
    """Which of the two the installed transformers reads: the record, and `per_layer_config` where it builds from it."""
    model, ids = apply_plan(tiny(family), plan), random_ids(2, 9)
    path = save_model(model, TOKENIZER, tmp_path / "m")
    config = json.loads((path / "config.json").read_text())
    assert "per_layer_config" not in config, "Trainer reads the config by a class that checks it against the depth"
    own_words = config["llmdrop"]["per_layer_config"]
    skip = {int(i): layer["skip"] for i, layer in own_words.items()}
    for kind, name in (("attn", "attention"), ("mlp", "mlp")):
        assert tuple(i for i in sorted(skip) if name in skip[i]) == getattr(plan, kind)
    for loaded in (
        load_model(path, device="cpu")[0],
        AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, attn_implementation="eager"),
    ):
        torch.testing.assert_close(logits(loaded, ids), logits(model, ids), atol=1e-5, rtol=0)
        assert not getattr(loaded.config, "is_heterogeneous", False), "or layers would be taken out twice"
        loaded.save_pretrained(tmp_path / "again")
        again = json.loads((tmp_path / "again" / "config.json").read_text())
        assert again["llmdrop"]["per_layer_config"] == own_words

    with pytest.raises(Exception, match="num_hidden_layers"):  # whatever it reads, it does not get so far
        type(model).from_pretrained(path)
    # what to change by hand, once stock classes build layers from per_layer_config
    for setting in ("auto_map", "llmdrop"):
        del config[setting]
    config |= {"num_hidden_layers": 5, "model_type": model.config.model_type, "per_layer_config": own_words}
    (path / "config.json").write_text(json.dumps(config))
    stock, info = type(model).from_pretrained(path, attn_implementation="eager", output_loading_info=True)
    if info["missing_keys"]:
        assert (
            not importlib.util.find_spec("transformers.integrations.heterogeneity.modeling_utils") or family != "llama"
        )
        left_out = {i for kind in ("attn", "mlp") for i in getattr(plan, kind)}
        assert {int(re.search(r"layers\.(\d+)\.", name)[1]) for name in info["missing_keys"]} == left_out
    else:
        torch.testing.assert_close(logits(stock, ids), logits(model, ids), atol=1e-5, rtol=0)


def test_what_per_layer_config_cannot_say_is_not_in_it(tmp_path):
    """Biases that make up for what is gone; and blocks alone are an ordinary checkpoint, with nothing to say."""
    model = apply_plan(tiny("llama"), DropPlan([1], [1]))
    path = save_model(model, TOKENIZER, tmp_path / "blocks")
    assert "per_layer_config" not in (path / "config.json").read_text()
    model = tiny("llama")
    reconstruct(model, DropPlan([1]), fit(model, DropPlan([1]), Calibration(random_ids(4, 12)), "mean"))
    path = save_model(model, TOKENIZER, tmp_path / "biases")
    assert "per_layer_config" not in (path / "config.json").read_text()
