"""Exports run in the programs they are for, and give the transformers model's numbers there."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import random_ids, tiny
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

import llmdrop
from llmdrop import DropPlan, apply_plan, dropped, load_model, save_model, serving_vllm
from llmdrop.compensate import compensate, compensated, fit
from llmdrop.gguf_export import drop_gguf
from llmdrop.gguf_tokenizer import tokenizer_facts
from llmdrop.serving import serve
from llmdrop.serving_checks import check_export, compare, compare_serving

needs_engine = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="llama.cpp is not here: pip install llmdrop[serve]"
)
needs_vllm = pytest.mark.skipif(serving_vllm.installed() is None, reason=f"no vllm here: {serving_vllm.INSTALL}")
N_TOKENS = 400
TEXTS = ["Layers that change little", "1, 2, 3, go", "The", "a b c d e f g", "Permission is hereby granted, free of",
         "it's 12345", "<|im_start|>user", "software", "ABC and", "WITHOUT WARRANTY OF ANY KIND"]  # fmt: skip
MIXED = DropPlan([1, 3, 4], [2, 3])
PLANS = {
    "dense": DropPlan(),
    "first attention": DropPlan([0]),
    "first attentions": DropPlan([0, 1, 2]),
    "last attention": DropPlan([4]),
    "last MLP": DropPlan([], [4]),
    "scattered": DropPlan([0, 2, 4], [1, 3]),
    "mixed": MIXED,
    "first block": DropPlan([0], [0]),
    "blocks": DropPlan([1, 2], [1, 2]),
    "no attention": DropPlan(range(5)),
    "no MLP": DropPlan([], range(5)),
}


@pytest.fixture(scope="session")
def tokenizer():
    """A small byte-level BPE that splits text as SmolLM's does, with a chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=N_TOKENS, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator([Path(__file__).parent.with_name("LICENSE").read_text()], trainer)
    out = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=special[1], eos_token=special[2])
    out.chat_template = "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
    return out


def wide(plan: DropPlan = DropPlan(), **overrides):
    """A tiny Llama with that tokenizer's vocabulary, dropped from."""
    return apply_plan(tiny("llama", vocab_size=N_TOKENS, **overrides), plan)


def with_means(plan: DropPlan, **overrides):
    """A dropped model with the biases of "mean in turn", ten times as large so that they matter to a tiny model."""
    model = wide(**overrides)
    changes = fit(model, plan, llmdrop.Calibration(random_ids(8, 24)), "mean in turn")
    return compensate(model, plan, {at: 10 * change for at, change in changes.items()})


def logits(model, ids):
    with torch.inference_mode():
        return model(ids, use_cache=False).logits


# -- transformers -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("plan", [DropPlan([0, 3]), MIXED, DropPlan(range(5))], ids=["attn", "mixed", "no attention"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "qwen2"])
def test_transformers_reads_it_with_the_file_it_brings(family, plan, tmp_path, tokenizer):
    model, ids = apply_plan(tiny(family), plan), random_ids(2, 9)
    save_model(model, tokenizer, tmp_path / "m")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m", trust_remote_code=True, attn_implementation="eager")
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), atol=1e-5, rtol=0)
    assert len(loaded(ids).past_key_values.layers) == max(1, 5 - len(plan.attn))  # without any, one counts tokens
    mask, how = torch.ones_like(ids), dict(max_new_tokens=8, do_sample=False)
    cached = loaded.generate(ids, attention_mask=mask, **how)
    assert torch.equal(cached, loaded.generate(ids, attention_mask=mask, use_cache=False, **how))
    assert torch.equal(cached, model.generate(ids, attention_mask=mask, **how))
    loaded.save_pretrained(tmp_path / "again")  # by transformers alone
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    torch.testing.assert_close(logits(again, ids), logits(model, ids), atol=1e-5, rtol=0)
    save_model(loaded, tokenizer, tmp_path / "third")
    assert llmdrop.anatomy(load_model(tmp_path / "third", device="cpu")[0]).plan == plan


def test_it_needs_no_llmdrop(tmp_path, tokenizer):
    path, ids = save_model(apply_plan(tiny("llama"), MIXED), tokenizer, tmp_path / "m"), random_ids(1, 7)
    source = (path / "modeling_llmdrop.py").read_text()
    assert "from llmdrop" not in source and "import llmdrop" not in source
    assert len(source.splitlines()) < 180, "one small file"
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


def test_stock_classes_refuse_it(tmp_path, tokenizer):
    path = save_model(apply_plan(tiny("llama"), MIXED), tokenizer, tmp_path / "m")
    with pytest.raises(Exception, match="num_hidden_layers"):
        LlamaForCausalLM.from_pretrained(path)
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False)


def test_blocks_alone_are_an_ordinary_checkpoint(tmp_path, tokenizer):
    plan, ids = DropPlan([0, 3], [0, 3]), random_ids(1, 7)
    model = apply_plan(tiny("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5}), plan)
    path = save_model(model, tokenizer, tmp_path / "m")
    assert not list(path.glob("*.py")) and "auto_map" not in (path / "config.json").read_text()
    torch.testing.assert_close(logits(LlamaForCausalLM.from_pretrained(path), ids), logits(model, ids))
    config = json.loads((path / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e5, "transformers 4 reads the first"
    kind = json.loads((path / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert kind == "PreTrainedTokenizerFast", "transformers 4 knows no TokenizersBackend"


# -- nemotron-nas -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("plan", [DropPlan(), MIXED, DropPlan([0, 2], [0, 2, 4])], ids=lambda p: p.label)
def test_nemotron_nas_says_what_is_there(plan, tmp_path, tokenizer):
    model, ids = apply_plan(tiny("llama", intermediate_size=512, hidden_size=96), plan), random_ids(1, 7)
    path = save_model(model, tokenizer, tmp_path / "m", format="nemotron-nas")
    config = AutoConfig.from_pretrained(path, trust_remote_code=True)
    assert config.architectures == ["DeciLMForCausalLM"] and config.model_type == "nemotron-nas"
    assert len(config.block_configs) == config.num_hidden_layers == 5 - len(plan.blocks)
    assert not config.attention_bias and not config.mlp_bias and not hasattr(config, "qkv_bias")
    json.loads(config.to_json_string())
    kept = [i for i in range(5) if i not in plan.blocks]
    tensors = set(model.state_dict())
    for slot, (i, block) in enumerate(zip(kept, config.block_configs, strict=True)):
        assert block.attention.no_op == (i in plan.attn) and block.ffn.no_op == (i in plan.mlp)
        assert (f"model.layers.{slot}.self_attn.q_proj.weight" in tensors) != block.attention.no_op
        assert (f"model.layers.{slot}.mlp.up_proj.weight" in tensors) != block.ffn.no_op
        assert block.attention.n_heads_in_group == (None if block.attention.no_op else 2)
        if not block.ffn.no_op:  # as DeciLM computes it
            assert -(-int(2 * block.ffn.ffn_mult * config.hidden_size / 3) // 256) * 256 == 512
    loaded = load_model(path, device="cpu")[0]
    assert llmdrop.anatomy(loaded).plan == plan
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["mixed", "blocks"])  # with o_proj's biases, and with down_proj's alone
def test_nemotron_nas_has_a_bias_wherever_vllm_expects_one(name, tmp_path, tokenizer):
    model, ids = with_means(PLANS[name], intermediate_size=512), random_ids(1, 7)
    before = model.state_dict()
    path = save_model(model, tokenizer, tmp_path / "m", format="nemotron-nas")
    assert model.state_dict().keys() == before.keys() and not model.config.mlp_bias, "the zeros are in the file alone"
    config, tensors = json.loads((path / "config.json").read_text()), load_file(path / "model.safetensors")
    assert config["mlp_bias"] and config["attention_bias"] == (name == "mixed") and not config["qkv_bias"]
    wanted = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"} | ({"self_attn.o_proj"} if name == "mixed" else set())
    biased = {key.replace(".weight", ".bias") for key in before if any(matrix in key for matrix in wanted)}
    assert tensors.keys() == before.keys() | biased
    assert all(torch.equal(tensors[key], before[key]) for key in before)
    assert not any(tensors[key].any() for key in tensors.keys() - before.keys())
    live = [block["ffn"] for block in config["block_configs"] if not block["ffn"]["no_op"]]
    assert all(ffn["intermediate_size"] == 512 and "ffn_mult" not in ffn for ffn in live), "no engine but vLLM runs it"
    loaded = load_model(path, device="cpu")[0]
    assert loaded.config.llmdrop == model.config.llmdrop and loaded.state_dict().keys() == before.keys()
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), atol=1e-5, rtol=0)
    again = save_model(loaded, tokenizer, tmp_path / "again", format="nemotron-nas")
    assert (again / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()


def test_vllm_finds_the_config_without_remote_code():
    from importlib.metadata import entry_points

    (plugin,) = entry_points(group="vllm.general_plugins", name="llmdrop") or [None]
    if plugin is None:
        pytest.skip("installed before the entry point was added: pip install -e .")
    plugin.load()()
    assert AutoConfig.for_model("nemotron-nas").block_configs == []


@needs_vllm
@pytest.mark.slow
def test_vllm_gives_the_same_numbers(tokenizer):
    model, prompts = wide(hidden_size=128, intermediate_size=512), [tokenizer(text).input_ids for text in TEXTS]
    (out,) = check_export("vLLM", model, tokenizer, DropPlan([2, 3, 4], [1, 3, 4]), prompts, 64)
    assert out["n_equal"] >= 639 and out["max_difference"] < 2e-3 and out["max_loss"] < 2e-3
    assert "first" in check_export("vLLM", model, tokenizer, DropPlan([0]), prompts, 4)[0]["refused"]


@needs_vllm
@pytest.mark.slow
def test_vllm_adds_the_means(tokenizer):
    shape, prompts = dict(hidden_size=128, intermediate_size=512), [tokenizer(text).input_ids for text in TEXTS]
    model, ids = with_means(MIXED, **shape), random_ids(4, 32)
    assert model.config.llmdrop["biases"] == [[0, "mlp.down_proj"], [2, "self_attn.o_proj"]]
    equal = logits(model, ids).argmax(-1) == logits(wide(MIXED, **shape), ids).argmax(-1)
    assert equal.float().mean() < 0.5, "biases that matter to greedy text"
    (out,) = check_export("vLLM", model, tokenizer, MIXED, prompts, 64)
    assert out["n_equal"] >= 639 and out["max_difference"] < 2e-3 and out["max_loss"] < 2e-3


# -- llama.cpp --------------------------------------------------------------------------------------------------------
@needs_engine
@pytest.mark.parametrize("name", PLANS)
def test_llama_cpp_gives_the_same_numbers(name, tokenizer):
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    out, default = check_export("llama.cpp", wide(), tokenizer, PLANS[name], prompts, 64)
    assert out["n_tokens"] == 640 and out["n_equal"] >= 639, "all but a tie"
    assert out["max_difference"] < 2e-3 and out["max_loss"] < 2e-3
    assert default["max_loss"] <= 2 * default["max_difference"] < 0.5, "a float16 cache turns near ties"


@needs_engine
@pytest.mark.slow
def test_the_embedded_model_in_llama_cpp(smollm2, tmp_path):
    (model, tokenizer), plan, sizes = smollm2, DropPlan([0, 5, 20, 21, 29], [3, 29]), {}
    prompts = [tokenizer(text).input_ids for text in ("The capital of France is", "In 1995, a dog")]
    for weights in ("f32", "q8_0"):
        with dropped(model, plan):
            path = save_model(model, tokenizer, tmp_path / f"{weights}.gguf", format="gguf", weights=weights)
            sizes[weights] = path.stat().st_size
            if weights == "f32":  # 8-bit engines round activations too, so that numbers say little
                with serve(path, exact=True) as engine:
                    out = compare(engine, model, prompts, 16)
    assert out["max_difference"] < 2e-3 and out["max_loss"] < 2e-3 and out["n_equal"] >= 31
    assert sizes["q8_0"] < 0.3 * sizes["f32"]
    with serve(path) as engine:
        # float16, 1,024 tokens; one head of three stays in layer 0; layer 29 is gone whole
        assert engine.kv_bytes == pytest.approx((25 * 3 + 1) * 2 * 64 * 2 * 1024, rel=0.01)
        for text in ("it's 12345 <|im_start|>user\n", "naïve  你好\n\n\tx=1 🙂"):
            assert engine.tokenize(text) == tokenizer(text).input_ids
        assert len(engine.complete([1, 2, 3], 5)["tokens"]) == 5


@needs_engine
def test_refitted_weights_are_ordinary_ones(tmp_path, tokenizer):
    model, prompts = wide(), [tokenizer(text).input_ids for text in TEXTS]
    plain = model.model.layers[2].self_attn.o_proj.weight.clone()
    with compensated(model, MIXED, fit(model, MIXED, llmdrop.Calibration(random_ids(8, 24)), "refit in turn")):
        refitted = model.model.layers[2].self_attn.o_proj.weight.clone()
        assert not torch.equal(refitted, plain), "the matrix before a gap"
        nas = save_model(model, tokenizer, tmp_path / "nas", format="nemotron-nas")
        path = save_model(model, tokenizer, tmp_path / "m.gguf", format="gguf", weights="f32")
        with serve(path, exact=True) as engine:
            out = compare(engine, model, prompts, 16)
        again = load_model(path, device="cpu")[0]
        torch.testing.assert_close(logits(again, random_ids(1, 7)), logits(model, random_ids(1, 7)), atol=1e-5, rtol=0)
    assert out["n_equal"] >= out["n_tokens"] - 1 and out["max_difference"] < 2e-3
    assert any(torch.equal(tensor, refitted) for tensor in load_file(nas / "model.safetensors").values())


@needs_engine
@pytest.mark.parametrize("name", ["mixed", "blocks"])  # in llama.cpp's "deci" and "llama"
def test_llama_cpp_adds_the_means(name, tmp_path, tokenizer):
    model, prompts, ids = with_means(PLANS[name]), [tokenizer(text).input_ids for text in TEXTS], random_ids(1, 7)
    record = model.config.llmdrop["biases"]
    assert {place for _, place in record} == {"mlp.down_proj"} | ({"self_attn.o_proj"} if name == "mixed" else set())
    assert (logits(model, ids) - logits(wide(PLANS[name]), ids)).abs().max() > 0.1
    path = save_model(model, tokenizer, tmp_path / "m.gguf", format="gguf", weights="f32")
    with serve(path, exact=True) as engine:
        out = compare(engine, model, prompts, 32)
    assert out["n_equal"] >= out["n_tokens"] - 1 and out["max_difference"] < 2e-3 and out["max_loss"] < 2e-3


@needs_engine
def test_the_cache_shrinks_with_the_layers(tmp_path, tokenizer):
    sizes = {}
    for n in (0, 2, 4):
        path = save_model(wide(DropPlan(range(5 - n, 5))), tokenizer, tmp_path / f"{n}.gguf", format="gguf")
        with serve(path, context=8192) as engine:
            sizes[n] = engine.kv_bytes
    assert sizes[0] == 5 * 2 * 2 * 8 * 2 * 8192  # layers, K and V, heads, width, bytes, tokens
    assert sizes[2] == sizes[0] * 3 / 5 and sizes[4] == sizes[0] / 5


@needs_engine
def test_speed_is_compared_in_every_engine(tokenizer):
    plans = {"Baseline": DropPlan(), "Attn-2": DropPlan([2, 3])}
    for engine in ("transformers", "llama.cpp"):
        rows = compare_serving(engine, wide(), tokenizer, plans, list(range(9)), 5, rounds=2, weights="f16")
        assert [row["plan"] for row in rows] == list(plans) and rows[0]["decode_speedup"] == 1
        assert all(value > 0 for row in rows for value in row.values() if not isinstance(value, str))
        assert rows[1]["kv_share"] == pytest.approx(3 / 5, rel=0.05), "of a few KiB, which llama.cpp rounds"
        assert rows[1]["file_share"] < 1


@pytest.mark.parametrize("name", ["dense", "scattered", "mixed", "blocks", "no attention"])
def test_gguf_round_trip(name, tmp_path, tokenizer):
    model, ids = wide(PLANS[name]), random_ids(1, 7)
    path = save_model(model, tokenizer, tmp_path / "m.gguf", format="gguf", weights="f32")
    loaded, again = load_model(path, device="cpu")
    assert llmdrop.anatomy(loaded).plan == PLANS[name] and loaded.config.vocab_size == N_TOKENS
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), atol=1e-5, rtol=0)
    cached = loaded.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=4, do_sample=False))
    text = "it's 12345 <|im_start|>user\n naïve"
    assert again(text).input_ids == tokenizer(text).input_ids and again.chat_template == tokenizer.chat_template
    assert again.special_tokens_map == tokenizer.special_tokens_map


@pytest.mark.parametrize("weights", ["f32", "q4_0"])
def test_biases_in_a_gguf(weights, tmp_path, tokenizer):
    import gguf

    plan, ids = PLANS["mixed"], random_ids(1, 7)
    model = with_means(plan)
    path = save_model(model, tokenizer, tmp_path / "m.gguf", format="gguf", weights=weights)
    biases = {t.name: t for t in gguf.GGUFReader(path).tensors if t.name.endswith(".bias")}
    assert biases.keys() == {"blk.0.ffn_down.bias", "blk.2.attn_output.bias"}
    assert {t.tensor_type for t in biases.values()} == {gguf.GGMLQuantizationType.F32}
    loaded = load_model(path, device="cpu")[0]
    assert loaded.config.llmdrop == model.config.llmdrop
    bias = loaded.model.layers[2].self_attn.o_proj.bias
    assert torch.equal(bias, model.model.layers[2].self_attn.o_proj.bias) and bias.abs().max() > 0
    if weights == "f32":
        torch.testing.assert_close(logits(loaded, ids), logits(model, ids), atol=1e-5, rtol=0)


def test_dropping_from_a_gguf_keeps_the_biases_of_what_stays(tmp_path, tokenizer):
    model, more, ids = wide(), DropPlan([1, 3], [1]), random_ids(1, 7)
    places = [("mlp", 0), ("mlp", 1), ("attn", 2), ("attn", 3), ("mlp", 3)]
    compensate(model, DropPlan(), {at: torch.full([32], 0.5 + k) for k, at in enumerate(places)})
    whole = save_model(model, tokenizer, tmp_path / "whole.gguf", format="gguf", weights="f32")
    loaded = load_model(drop_gguf(whole, more, tmp_path / "dropped.gguf"), device="cpu")[0]
    torch.testing.assert_close(logits(loaded, ids), logits(apply_plan(model, more), ids), atol=1e-5, rtol=0)
    assert loaded.config.llmdrop == model.config.llmdrop
    assert [[0, "mlp.down_proj"], [2, "self_attn.o_proj"], [3, "mlp.down_proj"]] == loaded.config.llmdrop["biases"]


def test_dropping_from_a_gguf_copies_what_stays(tmp_path, tokenizer):
    import gguf

    dense = save_model(wide(hidden_size=64), tokenizer, tmp_path / "dense.gguf", format="gguf", weights="q4_0")
    path, ids = drop_gguf(dense, MIXED, tmp_path / "dropped.gguf"), random_ids(1, 7)
    loaded, _ = load_model(path, device="cpu")
    expected = apply_plan(load_model(dense, device="cpu")[0], MIXED)
    torch.testing.assert_close(logits(loaded, ids), logits(expected, ids), atol=1e-5, rtol=0)
    before = {t.name: t for t in gguf.GGUFReader(dense).tensors}
    after = {t.name: t for t in gguf.GGUFReader(path).tensors}
    assert after["blk.3.ffn_up.weight"].data.tobytes() == before["blk.4.ffn_up.weight"].data.tobytes()
    with pytest.raises(ValueError, match="holds a 'deci' model"):
        drop_gguf(path, MIXED, tmp_path / "twice.gguf")
    with pytest.raises(ValueError, match="made for 9 layers"):
        drop_gguf(dense, DropPlan([1], n_layers=9), tmp_path / "x.gguf")
    with pytest.raises(ValueError, match="keep at least one"):
        drop_gguf(dense, DropPlan(range(5), range(5)), tmp_path / "x.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense.gguf", "dropped.gguf"], "nothing half-written is left"


# -- refusals ---------------------------------------------------------------------------------------------------------
def test_what_a_format_cannot_hold_is_refused(tmp_path, tokenizer):
    half = wide().half()
    half.lm_head.float()
    cases = [
        (tiny("gemma2"), "nemotron-nas", {}, "llama and mistral models, not 'gemma2'"),
        (tiny("gemma2"), "gguf", {}, "llama and mistral models, not 'gemma2'"),
        (half, "nemotron-nas", {}, "mixed or integer types .*float16.*float32"),
        (half, "gguf", {}, "mixed or integer types"),
        (wide(DropPlan([0])), "nemotron-nas", {}, "layer 0 would be the first and has no attention.*format='gguf'"),
        (wide(DropPlan([0, 1], [0])), "nemotron-nas", {}, "layer 1 would be the first"),
        (wide(attention_bias=True), "gguf", {}, "no biases"),
        (tiny("llama"), "gguf", {}, "400 tokens, the model 97"),
        (wide(), "gguf", {"weights": "q3"}, "weights='q3' is not one of f32, f16"),
        (wide(), "hf", {"weights": "f16"}, "without settings"),
        (wide(), "onnx", {}, "format='onnx'"),
    ]
    for model, format, settings, message in cases:
        with pytest.raises(ValueError, match=message):
            save_model(model, tokenizer, tmp_path / "out.gguf", format=format, **settings)
    large = wide()
    large.model.layers[2].mlp.up_proj.weight.data[0, 0] = 1e5
    with pytest.raises(ValueError, match="float16 ends at 65504"):
        save_model(large, tokenizer, tmp_path / "out.gguf", format="gguf")
    with pytest.raises(ValueError, match="end in .gguf"):
        save_model(wide(), tokenizer, tmp_path / "out", format="gguf")
    assert not list(tmp_path.iterdir()), "nothing is left of what failed"
    save_model(wide(), tokenizer, tmp_path / "out.gguf", format="gguf")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_model(wide(), tokenizer, tmp_path / "out.gguf", format="gguf")


def test_tokenizers_without_a_form_in_llama_cpp_are_refused():
    words = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="(?s)no known form of this tokenizer .WordLevel.*drop_gguf"):
        tokenizer_facts(PreTrainedTokenizerFast(tokenizer_object=words), 97)
    with pytest.raises(ValueError, match="needs a fast tokenizer"):
        tokenizer_facts(None, 97)


@needs_engine
@pytest.mark.parametrize("newer", [False, True], ids=["normaliser", "metaspace"])
def test_sentencepiece_tokenizers_split_alike_in_llama_cpp(newer, tmp_path):
    special, byte = ["<unk>", "<s>", "</s>"], [f"<0x{i:02X}>" for i in range(256)]
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if newer:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always", split=False)
    else:
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    lines = [line for line in Path(__file__).parent.with_name("README.md").read_text().split() if line]
    bpe.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=700, special_tokens=special + byte))
    like_llama_2 = PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    path = save_model(tiny("llama", vocab_size=704), like_llama_2, tmp_path / "m.gguf", format="gguf")
    with serve(path) as engine:
        # (a space in front of all is one token more in the engine than to Metaspace)
        for text in ("a dropped model in the engines", "two  spaces", "naïve  你好\n\n\tx=1 🙂", "it's 12345"):
            assert engine.tokenize(text) == like_llama_2(text, add_special_tokens=False).input_ids, text
    assert load_model(path, device="cpu")[1]("layer 7").input_ids == like_llama_2("layer 7").input_ids


def test_damaged_and_foreign_gguf(tmp_path, tokenizer):
    path = save_model(wide(), tokenizer, tmp_path / "m.gguf", format="gguf")
    (tmp_path / "half.gguf").write_bytes(path.read_bytes()[:3_000])
    with pytest.raises(ValueError, match="not a readable GGUF"):
        load_model(tmp_path / "half.gguf")
    with pytest.raises(FileNotFoundError, match="no-such.gguf"):
        load_model(tmp_path / "no-such.gguf")


def test_serving_without_an_engine_says_what_to_install(monkeypatch, tmp_path):
    from llmdrop import serving

    monkeypatch.setattr(serving.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install llmdrop\[serve\]"):
        with serving.serve(tmp_path / "m.gguf"):
            pass
