"""AWQ runs only where llm-compressor is installed, in an environment of its own; its refusals are tested anywhere."""

import copy
from importlib.util import find_spec

import pytest
import torch
from tiny import random_ids, tiny

from llmdrop import Calibration, DropPlan, apply_plan
from llmdrop.compress import awq

TEXT = Calibration(random_ids(4, 16), "random")
here = pytest.mark.skipif(not find_spec("llmcompressor"), reason=f"AWQ, in an environment of its own: {awq.INSTALL}")


def wide():
    return tiny("llama", hidden_size=64, intermediate_size=128)


@here
def test_weights_of_a_group_take_16_values_and_the_model_stays_near(smollm2):
    whole, ids = wide(), random_ids(2, 9)
    model = awq.awq(copy.deepcopy(whole), smollm2[1], TEXT, group_size=32)
    for layer in model.model.layers:
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
            module = layer.get_submodule(name)
            assert type(module) is torch.nn.Linear
            assert max(len(group.unique()) for group in module.weight.reshape(-1, 32)) <= 16
    plan = DropPlan(attn=(1, 2))
    with torch.inference_mode():
        for one, other in ((model, whole), (apply_plan(model, plan), apply_plan(whole, plan))):
            assert 0 < (one(ids).logits - other(ids).logits).norm() / other(ids).logits.norm() < 0.3


@here
def test_is_made_once(smollm2, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMDROP_BUILD", str(tmp_path))
    monkeypatch.setattr(awq, "load_model", lambda folder, *where: (folder, None))
    folder = awq.awq_once(wide(), smollm2[1], TEXT, 32)
    monkeypatch.setattr(awq, "awq", None)
    assert awq.awq_once(wide(), smollm2[1], TEXT, 32) == folder and (folder / "model.safetensors").is_file()


def test_refusals(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(awq, "find_spec", lambda name: None)
        with pytest.raises(ImportError, match="pip install llmcompressor=="):
            awq.awq(wide(), None, TEXT)
    monkeypatch.setattr(awq, "find_spec", lambda name: True)
    with pytest.raises(ValueError, match="Attn-1 is dropped; quantize first, drop afterwards"):
        awq.awq(apply_plan(wide(), DropPlan(attn=(1,))), None, TEXT)
    with pytest.raises(ValueError, match=r"groups of 128 weights do not divide .* widths \[64, 128\]"):
        awq.awq(wide(), None, TEXT)
    monkeypatch.setattr(awq, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install llmcompressor=="):
        awq.awq_once(wide(), None, TEXT)
