"""nemotron-nas checkpoints say layer by layer what is there, and have all that vLLM expects."""

import json
from contextlib import ExitStack
from importlib.metadata import entry_points

import pytest
import torch
from exports import MIXED, TOKENIZER, logits, record, with_biases
from safetensors.torch import load_file
from tiny import random_ids, tiny
from transformers import AutoConfig

import llmdrop
from llmdrop import DropPlan, apply_plan, load_model, save_model
from llmdrop.checkpoints.blocks import renumber


@pytest.mark.parametrize("plan", [DropPlan(), MIXED, DropPlan([0, 2], [0, 2, 4])], ids=lambda p: p.label)
def test_nemotron_nas_says_what_is_there(plan, tmp_path):
    model, ids = apply_plan(tiny("llama", intermediate_size=512, hidden_size=96), plan), random_ids(1, 7)
    path = save_model(model, TOKENIZER, tmp_path / "m", format="nemotron-nas")
    config = AutoConfig.from_pretrained(path, trust_remote_code=True)
    assert config.architectures == ["DeciLMForCausalLM"] and config.model_type == "nemotron-nas"
    assert len(config.block_configs) == config.num_hidden_layers == 5 - len(plan.blocks)
    assert not config.attention_bias and not config.mlp_bias and not hasattr(config, "qkv_bias")
    json.loads(config.to_json_string())
    kept = [i for i in range(5) if i not in plan.blocks]
    tensors = set(load_file(path / "model.safetensors"))
    for slot, (i, block) in enumerate(zip(kept, config.block_configs, strict=True)):
        assert block.attention.no_op == (i in plan.attn) and block.ffn.no_op == (i in plan.mlp)
        assert (f"model.layers.{slot}.self_attn.q_proj.weight" in tensors) != block.attention.no_op
        assert (f"model.layers.{slot}.mlp.up_proj.weight" in tensors) != block.ffn.no_op
        assert block.attention.n_heads_in_group == (None if block.attention.no_op else 2)
        if not block.ffn.no_op:  # as DeciLM computes it
            assert -(-int(2 * block.ffn.ffn_mult * config.hidden_size / 3) // 256) * 256 == 512
    loaded = load_model(path, device="cpu")[0]
    assert llmdrop.find_anatomy(loaded).plan == plan
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["mixed", "blocks"])  # with o_proj's biases, and with down_proj's alone
def test_nemotron_nas_has_a_bias_wherever_vllm_expects_one(name, tmp_path):
    model, ids = with_biases(name, intermediate_size=512), random_ids(1, 7)
    before = model.state_dict()
    path = save_model(model, TOKENIZER, tmp_path / "m", format="nemotron-nas")
    assert model.state_dict().keys() == before.keys() and not model.config.mlp_bias, "the zeros are in the file alone"
    config, tensors = json.loads((path / "config.json").read_text()), load_file(path / "model.safetensors")
    assert config["mlp_bias"] and config["attention_bias"] == (name == "mixed") and not config["qkv_bias"]
    wanted = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"} | ({"self_attn.o_proj"} if name == "mixed" else set())
    with ExitStack() as undo:  # as the engine counts layers
        renumber(undo, model)
        counted = model.state_dict()
    biased = {key.replace(".weight", ".bias") for key in counted if any(matrix in key for matrix in wanted)}
    assert tensors.keys() == counted.keys() | biased
    assert all(torch.equal(tensors[key], counted[key]) for key in counted)
    assert not any(tensors[key].any() for key in tensors.keys() - counted.keys())
    live = [block["ffn"] for block in config["block_configs"] if not block["ffn"]["no_op"]]
    assert all(ffn["intermediate_size"] == 512 and "ffn_mult" not in ffn for ffn in live), "no engine but vLLM runs it"
    loaded = load_model(path, device="cpu")[0]
    assert record(loaded) == record(model) and loaded.state_dict().keys() == before.keys()
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), atol=1e-5, rtol=0)
    again = save_model(loaded, TOKENIZER, tmp_path / "again", format="nemotron-nas")
    assert (again / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()


def test_vllm_finds_the_config_without_remote_code():
    (plugin,) = entry_points(group="vllm.general_plugins", name="llmdrop") or [None]
    if plugin is None:
        pytest.skip("installed before the entry point was added: pip install -e .")
    plugin.load()()
    assert AutoConfig.for_model("nemotron-nas").block_configs == []


def test_a_failed_export_leaves_no_zeros_behind(tmp_path, monkeypatch):
    model = with_biases("mixed", intermediate_size=512)
    before = model.state_dict()
    monkeypatch.setattr("llmdrop.checkpoints.nemotron_nas.stock_save_pretrained", full_disk)
    with pytest.raises(OSError, match="full"):
        save_model(model, TOKENIZER, tmp_path / "m", format="nemotron-nas")
    assert model.state_dict().keys() == before.keys() and not list(tmp_path.iterdir())


def full_disk(*args, **kwargs):
    raise OSError(28, "full")
