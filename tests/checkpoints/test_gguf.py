"""GGUF files: written, read back, dropped from, refused and never half-written. (In llama.cpp: tests/serving.)"""

import importlib.util
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
import torch
from exports import MIXED, N_TOKENS, PLANS, ROOT, TOKENIZER, logits, record, wide, with_biases
from tiny import byte_tokenizer, random_ids, tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import llmdrop
from llmdrop import DropPlan, apply_plan, dropped, load_model, save_model
from llmdrop.checkpoints.embedded import EMBEDDED
from llmdrop.checkpoints.gguf_format import drop_gguf
from llmdrop.checkpoints.gguf_tokenizer import tokenizer_facts
from llmdrop.checkpoints.nemotron_nas import check_llama
from llmdrop.prune import give_biases


@pytest.mark.parametrize("name", ["dense", "scattered", "mixed", "blocks", "no attention"])
def test_gguf_round_trip(name, tmp_path):
    model, ids = wide(PLANS[name]), random_ids(1, 7)
    path = save_model(model, TOKENIZER, tmp_path / "m.gguf", format="gguf", weights="f32")
    loaded, again = load_model(path, device="cpu")
    assert llmdrop.find_anatomy(loaded).plan == PLANS[name] and loaded.config.vocab_size == N_TOKENS
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), atol=1e-5, rtol=0)
    cached = loaded.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=4, do_sample=False))
    text = "it's 12345 <|im_start|>user\n naïve"
    assert again(text).input_ids == TOKENIZER(text).input_ids and again.chat_template == TOKENIZER.chat_template
    assert again.special_tokens_map == TOKENIZER.special_tokens_map


def test_blocks_alone_are_an_ordinary_llama_file(tmp_path):
    model, ids = wide(PLANS["blocks"]), random_ids(1, 7)
    save_model(model, TOKENIZER, tmp_path / "m.gguf", format="gguf", weights="f32")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    torch.testing.assert_close(logits(theirs, ids), logits(model, ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("weights", ["f32", "q4_0"])
def test_biases_in_a_gguf(weights, tmp_path):
    model, ids = with_biases("mixed"), random_ids(1, 7)
    path = save_model(model, TOKENIZER, tmp_path / "m.gguf", format="gguf", weights=weights)
    biases = {t.name: t for t in gguf.GGUFReader(path).tensors if t.name.endswith(".bias")}
    assert biases.keys() == {"blk.0.ffn_down.bias", "blk.2.attn_output.bias"}
    assert {t.tensor_type for t in biases.values()} == {gguf.GGMLQuantizationType.F32}
    loaded = load_model(path, device="cpu")[0]
    assert record(loaded) == record(model)
    bias = loaded.model.layers[2].self_attn.o_proj.bias
    assert torch.equal(bias, model.model.layers[2].self_attn.o_proj.bias) and bias.abs().max() > 0
    if weights == "f32":
        torch.testing.assert_close(logits(loaded, ids), logits(model, ids), atol=1e-5, rtol=0)


def test_dropping_from_a_gguf_keeps_the_biases_of_what_stays(tmp_path):
    model, more, ids = wide(), DropPlan([1, 3], [1]), random_ids(1, 7)
    places = [(0, "mlp.down_proj"), (1, "mlp.down_proj"), (2, "self_attn.o_proj"), (3, "self_attn.o_proj")]
    places.append((3, "mlp.down_proj"))
    give_biases(ExitStack(), model, places)
    for k, (i, name) in enumerate(places):
        model.model.layers[i].get_submodule(name).bias.data.fill_(0.5 + k)
    whole = save_model(model, TOKENIZER, tmp_path / "whole.gguf", format="gguf", weights="f32")
    loaded = load_model(drop_gguf(whole, more, tmp_path / "dropped.gguf"), device="cpu")[0]
    torch.testing.assert_close(logits(loaded, ids), logits(apply_plan(model, more), ids), atol=1e-5, rtol=0)
    assert record(loaded) == record(model)
    assert [[0, "mlp.down_proj"], [2, "self_attn.o_proj"], [3, "mlp.down_proj"]] == record(loaded)["biases"]


def test_dropping_from_a_gguf_copies_what_stays(tmp_path):
    dense = save_model(wide(hidden_size=64), TOKENIZER, tmp_path / "dense.gguf", format="gguf", weights="q4_0")
    path, ids = drop_gguf(dense, MIXED, tmp_path / "dropped.gguf"), random_ids(1, 7)
    loaded, _ = load_model(path, device="cpu")
    expected = apply_plan(load_model(dense, device="cpu")[0], MIXED)
    torch.testing.assert_close(logits(loaded, ids), logits(expected, ids), atol=1e-5, rtol=0)
    before = {t.name: t for t in gguf.GGUFReader(dense).tensors}
    after = {t.name: t for t in gguf.GGUFReader(path).tensors}
    assert after["blk.3.ffn_up.weight"].data.tobytes() == before["blk.4.ffn_up.weight"].data.tobytes()
    with pytest.raises(ValueError, match="holds a 'deci' model"):
        drop_gguf(path, MIXED, tmp_path / "twice.gguf")
    with pytest.raises(ValueError, match="made for a model of 9 layers"):
        drop_gguf(dense, DropPlan([1], n_layers=9), tmp_path / "x.gguf")
    with pytest.raises(ValueError, match="keep at least one"):
        drop_gguf(dense, DropPlan(range(5), range(5)), tmp_path / "x.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense.gguf", "dropped.gguf"], "nothing half-written is left"


def test_what_a_format_cannot_hold_is_refused(tmp_path):
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
        (wide(family="mistral", hidden_act="gelu"), "gguf", {}, "mlp_bias=False, hidden_act='gelu'. Use format='hf'"),
        (wide(family="mistral", hidden_act="gelu"), "nemotron-nas", {}, "no activation but SiLU.*hidden_act='gelu'"),
        (wide(mlp_bias=True), "nemotron-nas", {}, "attention_bias=False, mlp_bias=True"),
        (wide(), "gguf", {"weights": "q3"}, "weights='q3' is not one of f32, f16"),
        (wide(), "hf", {"weights": "f16"}, "without settings"),
        (wide(), "onnx", {}, "format='onnx'"),
    ]
    for model, format, settings, message in cases:
        with pytest.raises(ValueError, match=message):
            save_model(model, TOKENIZER, tmp_path / "out.gguf", format=format, **settings)
    large = wide()
    large.model.layers[2].mlp.up_proj.weight.data[0, 0] = 1e5
    with pytest.raises(ValueError, match="float16 ends at 65504"):
        save_model(large, TOKENIZER, tmp_path / "out.gguf", format="gguf")
    with pytest.raises(ValueError, match="end in .gguf"):
        save_model(wide(), TOKENIZER, tmp_path / "out", format="gguf")
    assert not list(tmp_path.iterdir()), "nothing is left of what failed"
    save_model(wide(), TOKENIZER, tmp_path / "out.gguf", format="gguf")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_model(wide(), TOKENIZER, tmp_path / "out.gguf", format="gguf")


@pytest.mark.parametrize("name, value", [("attention_bias", True), ("mlp_bias", True), ("hidden_act", "gelu")])
def test_a_config_may_lack_any_setting_of_llamas(name, value):
    """Mistral's knows no attention_bias and no mlp_bias."""
    model = SimpleNamespace(config=SimpleNamespace(model_type="mistral"), parameters=wide().parameters)
    check_llama(model, "gguf")
    setattr(model.config, name, value)
    with pytest.raises(ValueError, match=f"format='gguf' has no biases.*{name}={value!r}"):
        check_llama(model, "gguf")


def test_tokenizers_without_a_form_in_llama_cpp_are_refused():
    words = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="(?s)no known form of this tokenizer .WordLevel.*drop_gguf"):
        tokenizer_facts(PreTrainedTokenizerFast(tokenizer_object=words), 97)
    with pytest.raises(ValueError, match="needs a fast tokenizer"):
        tokenizer_facts(None, 97)
    without_merges = byte_tokenizer()
    with pytest.raises(ValueError, match="without merges, and this tokenizer has none. .*drop_gguf"):
        tokenizer_facts(without_merges, len(without_merges))


def test_damaged_and_foreign_gguf(tmp_path):
    path = save_model(wide(), TOKENIZER, tmp_path / "m.gguf", format="gguf")
    (tmp_path / "half.gguf").write_bytes(path.read_bytes()[:3_000])
    with pytest.raises(ValueError, match="not a readable GGUF"):
        load_model(tmp_path / "half.gguf")
    with pytest.raises(FileNotFoundError, match="no-such.gguf"):
        load_model(tmp_path / "no-such.gguf")


def test_without_the_extra_all_but_a_gguf_is_read_and_written(monkeypatch, tmp_path):
    model, ids = wide(MIXED), random_ids(1, 7)
    path = save_model(model, TOKENIZER, tmp_path / "m.gguf", format="gguf")
    for name in ("gguf_format", "gguf_tokenizer"):
        monkeypatch.delitem(sys.modules, f"llmdrop.checkpoints.{name}")
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setenv("LLMDROP_BUILD", str(tmp_path / "build"))
    for source in (path, "smollm2-135m"):
        with pytest.raises(ImportError, match=r"this needs gguf .*: pip install 'llmdrop\[gguf\]'"):
            load_model(source, device="cpu")
    with pytest.raises(ImportError, match=r"this needs gguf .*: pip install 'llmdrop\[gguf\]'"):
        save_model(model, TOKENIZER, tmp_path / "other.gguf", format="gguf")
    loaded, _ = load_model(save_model(model, TOKENIZER, tmp_path / "m"), device="cpu")
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), atol=1e-5, rtol=0)


def test_a_gguf_is_loaded_as_asked(tmp_path):
    for weights, own in (
        ("f32", torch.float32),
        ("f16", torch.float16),
        ("bf16", torch.bfloat16),
        ("q8_0", torch.float32),
    ):
        path = save_model(wide(MIXED), TOKENIZER, tmp_path / f"{weights}.gguf", format="gguf", weights=weights)
        for attention in ("eager", "sdpa"):
            model = load_model(path, dtype="auto", device="cpu", attn_implementation=attention)[0]
            assert {p.dtype for p in model.parameters()} == {own} == {model.dtype, model.config.dtype}
            assert model.config._attn_implementation == attention
    assert load_model(path, dtype="bfloat16", device="cpu")[0].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="not loaded with max_memory; allowed are dtype, one device"):
        load_model(path, device="cpu", max_memory={})


def test_a_gguf_of_others_is_read_and_dropped(smollm2, tmp_path):
    """The wheel's own file, which llama.cpp's converter wrote."""
    package, name, _ = EMBEDDED["smollm2-135m"]
    source = Path(importlib.util.find_spec(package).submodule_search_locations[0]) / name
    plan, ids = DropPlan(range(1, 30), range(2, 30)), random_ids(1, 7)
    loaded, tokenizer = load_model(drop_gguf(source, plan, tmp_path / "one.gguf"), device="cpu")
    with dropped(smollm2[0], plan):
        assert torch.equal(logits(loaded, ids), logits(smollm2[0], ids))
    assert tokenizer("it's 12345").input_ids == smollm2[1]("it's 12345").input_ids


def test_overwriting_spares_what_llmdrop_did_not_write(tmp_path):
    path = save_model(wide(), TOKENIZER, tmp_path / "m.gguf", format="gguf")
    save_model(wide(MIXED), TOKENIZER, path, format="gguf", overwrite=True)
    assert llmdrop.find_anatomy(load_model(path, device="cpu")[0]).plan == MIXED
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    (tmp_path / "text.gguf").write_text("my thesis")
    (tmp_path / "folder.gguf").mkdir()
    allowed = {"theirs": "was not written by llmdrop", "text": "was not written by llmdrop", "folder": "is a directory"}
    for name, message in allowed.items():
        with pytest.raises(FileExistsError, match=message):
            save_model(wide(), TOKENIZER, tmp_path / f"{name}.gguf", format="gguf", overwrite=True)
        with pytest.raises(FileExistsError, match=message):
            drop_gguf(path, DropPlan([0]), tmp_path / f"{name}.gguf", overwrite=True)
    with pytest.raises(FileExistsError, match="text.gguf is a file"):
        save_model(wide(), TOKENIZER, tmp_path / "text.gguf" / "m.gguf", format="gguf", overwrite=True)
    assert (tmp_path / "text.gguf").read_text() == "my thesis" and (tmp_path / "folder.gguf").is_dir()


def test_a_killed_save_leaves_nothing_that_the_next_one_does_not_remove(tmp_path):
    code = f"""
import os, signal, sys; sys.path.insert(0, {str(ROOT / "tests")!r})
import gguf
gguf.GGUFWriter.write_tensors_to_file = lambda writer: os.kill(os.getpid(), signal.SIGKILL)
from exports import TOKENIZER, wide
import llmdrop
llmdrop.save_model(wide(), TOKENIZER, {str(tmp_path / "m.gguf")!r}, format="gguf")
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert [file for folder in tmp_path.iterdir() for file in folder.glob("*.gguf")], "a part of a file, hidden"
    assert not (tmp_path / "m.gguf").exists()
    save_model(wide(), TOKENIZER, tmp_path / "m.gguf", format="gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_vocabularies_that_do_not_fit_the_tokenizer(tmp_path):
    """More rows than tokens are unused tokens; fewer, or others than the config says, an engine would misread."""
    model, ids = wide(), random_ids(1, 7)
    model.resize_token_embeddings(N_TOKENS + 48, mean_resizing=False)
    path = save_model(model, TOKENIZER, tmp_path / "padded.gguf", format="gguf", weights="f32")
    loaded, tokenizer = load_model(path, device="cpu")
    assert loaded.config.vocab_size == N_TOKENS + 48 and len(tokenizer) == N_TOKENS
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), atol=1e-5, rtol=0)
    model.config.vocab_size = N_TOKENS
    with pytest.raises(ValueError, match=f"have {N_TOKENS + 48} rows, the config says vocab_size={N_TOKENS}"):
        save_model(model, TOKENIZER, tmp_path / "m.gguf", format="gguf")
    small = wide()
    small.resize_token_embeddings(N_TOKENS - 8)
    with pytest.raises(ValueError, match=f"the tokenizer has {N_TOKENS} tokens, the model {N_TOKENS - 8}: not a pair"):
        save_model(small, TOKENIZER, tmp_path / "m.gguf", format="gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["padded.gguf"]
