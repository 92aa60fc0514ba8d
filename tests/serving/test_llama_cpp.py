"""Exports in llama.cpp give the transformers model's numbers, and its cache shrinks with them."""

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import urllib.request

import pytest
import torch
from exports import MIXED, N_TOKENS, PLANS, PROMPTS, ROOT, TOKENIZER, logits, wide, with_biases
from safetensors.torch import load_file
from tiny import random_ids, tiny
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import llmdrop
from llmdrop import DropPlan, dropped, load_model, save_model
from llmdrop.compress.reconstruction import fit, reconstructed
from llmdrop.serving.checks import check_export, compare
from llmdrop.serving.llama_cpp import installed, serve

needs_engine = pytest.mark.skipif(installed() is None, reason="llama.cpp is not here: pip install llmdrop[serve]")


@needs_engine
@pytest.mark.parametrize("name", PLANS)
def test_llama_cpp_gives_the_same_numbers(name):
    out, default = check_export("llama.cpp", wide(), TOKENIZER, PLANS[name], PROMPTS, 64)
    assert out["n_tokens"] == 640 and out["n_equal"] >= 639, "all but a tie"
    assert out["max_difference"] < 2e-3 and out["max_loss"] < 2e-3
    assert default["max_loss"] <= 2 * default["max_difference"] < 0.5, "a float16 cache turns near ties"


@needs_engine
def test_a_vocabulary_with_more_rows_than_tokens():
    """As of models whose embedding was padded to a multiple of 64; the rows may be answers, as in transformers."""
    model = wide()
    model.resize_token_embeddings(N_TOKENS + 48, mean_resizing=False)
    model.model.embed_tokens.weight.data[N_TOKENS:].normal_()
    model.lm_head.weight.data[N_TOKENS:].normal_()
    out, _ = check_export("llama.cpp", model, TOKENIZER, MIXED, PROMPTS, 64)
    assert out["n_equal"] >= out["n_tokens"] - 1 and out["max_difference"] < 2e-3


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
        (out,) = engine.complete([[1, 2, 3]], 5)
        assert len(out["tokens"]) == 5


@needs_engine
def test_refitted_weights_are_ordinary_ones(tmp_path):
    model = wide()
    plain = model.model.layers[2].self_attn.o_proj.weight.clone()
    changes = fit(model, MIXED, llmdrop.Calibration(random_ids(8, 24)), "sequential least squares")
    with reconstructed(model, MIXED, changes):
        refitted = model.model.layers[2].self_attn.o_proj.weight.clone()
        assert not torch.equal(refitted, plain), "the matrix before a gap"
        nas = save_model(model, TOKENIZER, tmp_path / "nas", format="nemotron-nas")
        path = save_model(model, TOKENIZER, tmp_path / "m.gguf", format="gguf", weights="f32")
        with serve(path, exact=True) as engine:
            out = compare(engine, model, PROMPTS, 16)
        again = load_model(path, device="cpu")[0]
        torch.testing.assert_close(logits(again, random_ids(1, 7)), logits(model, random_ids(1, 7)), atol=1e-5, rtol=0)
    assert out["n_equal"] >= out["n_tokens"] - 1 and out["max_difference"] < 2e-3
    assert any(torch.equal(tensor, refitted) for tensor in load_file(nas / "model.safetensors").values())


@needs_engine
@pytest.mark.parametrize("name", ["mixed", "blocks"])  # in llama.cpp's "deci" and "llama"
def test_llama_cpp_adds_the_means(name, tmp_path):
    model, ids = with_biases(name), random_ids(1, 7)
    assert (logits(model, ids) - logits(wide(PLANS[name]), ids)).abs().max() > 0.1
    path = save_model(model, TOKENIZER, tmp_path / "m.gguf", format="gguf", weights="f32")
    with serve(path, exact=True) as engine:
        out = compare(engine, model, PROMPTS, 32)
    assert out["n_equal"] >= out["n_tokens"] - 1 and out["max_difference"] < 2e-3 and out["max_loss"] < 2e-3


@needs_engine
def test_the_cache_shrinks_with_the_layers(tmp_path):
    sizes = {}
    for n in (0, 2, 4):
        path = save_model(wide(DropPlan(range(5 - n, 5))), TOKENIZER, tmp_path / f"{n}.gguf", format="gguf")
        with serve(path, context=8192) as engine:
            sizes[n] = engine.kv_bytes
    assert sizes[0] == 5 * 2 * 2 * 8 * 2 * 8192  # layers, K and V, heads, width, bytes, tokens
    assert sizes[2] == sizes[0] * 3 / 5 and sizes[4] == sizes[0] / 5


@needs_engine
@pytest.mark.parametrize("newer", [False, True], ids=["normalizer", "metaspace"])
def test_sentencepiece_tokenizers_split_alike_in_llama_cpp(newer, tmp_path):
    special, byte = ["<unk>", "<s>", "</s>"], [f"<0x{i:02X}>" for i in range(256)]
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if newer:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always", split=False)
    else:
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    lines = (ROOT / "README.md").read_text().split()
    bpe.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=700, special_tokens=special + byte))
    like_llama_2 = PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    path = save_model(tiny("llama", vocab_size=704), like_llama_2, tmp_path / "m.gguf", format="gguf")
    with serve(path) as engine:
        # (a space in front of all is one token more in the engine than to Metaspace)
        for text in ("a dropped model in the engines", "two  spaces", "naïve  你好\n\n\tx=1 🙂", "it's 12345"):
            assert engine.tokenize(text) == like_llama_2(text, add_special_tokens=False).input_ids, text
    assert load_model(path, device="cpu")[1]("layer 7").input_ids == like_llama_2("layer 7").input_ids


def test_serving_without_an_engine_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install llmdrop\[serve\]"):
        with serve(tmp_path / "m.gguf"):
            pass


@needs_engine
def test_what_llama_cpp_does_not_load_is_said(tmp_path):
    path = save_model(wide(), TOKENIZER, tmp_path / "m.gguf", format="gguf")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="llama.cpp does not load .*m.gguf: .*"):
        with serve(path):
            pass


@needs_engine
def test_llmdrop_serve_is_that_server(tmp_path):
    path = save_model(wide(), TOKENIZER, tmp_path / "m.gguf", format="gguf")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "llmdrop_cli", "serve", str(path), "--port", str(port)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            printed = next(line for line in server.stdout if line.startswith("curl "))
            address = next(line for line in server.stdout if line.startswith("serving at ")).split()[-1]
            assert f" {address}/v1/chat/completions" in printed and address.endswith(f":{port}")
            data = re.search("-d '(.*)'", printed)[1].encode()
            asked = urllib.request.Request(f"{address}/v1/chat/completions", data, {"Content-Type": "application/json"})
            with urllib.request.urlopen(asked, timeout=60) as answer:
                assert 0 < json.load(answer)["usage"]["completion_tokens"] <= 64
        finally:
            server.kill()
