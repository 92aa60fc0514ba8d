"""4-bit weights for a while are those of `quantize`, and what is not installed says how to install it."""

import json
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from tiny import random_ids, tiny

from llmdrop import Calibration, DropPlan, dropped, weights_digest
from llmdrop.checkpoints.four_bits import dequantize, quantize
from llmdrop.compress import awq, four_bits
from llmdrop.compress.four_bits import FourBits, available, library

TEXT = Calibration(random_ids(4, 16), "random")


def wide(seed: int = 0):
    return tiny("llama", hidden_size=64, intermediate_size=128, seed=seed)


@torch.no_grad()
def logits(model):
    return model(TEXT.input_ids, use_cache=False).logits


@pytest.mark.parametrize("algorithm", ["nf4", "fp4"])
@pytest.mark.parametrize("unpacked", [False, True])
def test_it_is_what_quantize_makes(algorithm, unpacked):
    pytest.importorskip("bitsandbytes")
    model, other = wide(), quantize(wide(), algorithm, 32)
    other = dequantize(other) if unpacked else other
    dense, digest = logits(model), weights_digest(model)
    with FourBits(algorithm, 32, unpacked=unpacked).applied(model), dropped(model, DropPlan(attn=[1])):
        with dropped(other, DropPlan(attn=[1])):
            torch.testing.assert_close(logits(model), logits(other))
        assert type(model.model.layers[0].mlp.up_proj) is type(other.model.layers[0].mlp.up_proj)
    assert torch.equal(logits(model), dense) and weights_digest(model) == digest


def test_awq_for_a_while(monkeypatch):
    """With another model for what `awq_once` reads; rounding is tested where llm-compressor is installed."""
    model, rounded = wide(), wide(seed=1)
    rounded.config.quantized_by = "llmcompressor"
    monkeypatch.setattr(awq, "awq_once", lambda *settings: rounded)
    dense, digest = logits(model), weights_digest(model)
    with FourBits("awq", 32, calibration=TEXT, tokenizer=object()).applied(model):
        assert torch.equal(logits(model), logits(rounded)) and model.config.quantized_by == "llmcompressor"
    assert torch.equal(logits(model), dense) and weights_digest(model) == digest


def test_what_it_is_called_and_keyed_by():
    assert FourBits().label == "NF4, groups of 64" and FourBits().bits == 4.5
    by_awq = FourBits("awq", 128, calibration=TEXT, tokenizer=object())
    assert by_awq.label == "AWQ, groups of 128" and by_awq.bits == 4 + 20 / 128
    keys = [
        FourBits(),
        FourBits("fp4"),
        FourBits(group_size=32),
        FourBits(exact=False),
        FourBits(unpacked=True),
        by_awq,
    ]
    assert len({json.dumps(each.key) for each in keys}) == 6 and by_awq.key["text"] == TEXT.digest
    with pytest.raises(ValueError, match="give calibration= and tokenizer="):
        FourBits("awq")


def test_what_is_installed(monkeypatch):
    for refuse in (lambda name: available(["nf4", name]), library, FourBits):
        with pytest.raises(ValueError, match="algorithm int3 is not one of nf4, fp4, awq"):
            refuse("int3")

    def missing(name):
        raise PackageNotFoundError

    monkeypatch.setattr(four_bits, "find_spec", lambda name: name == "bitsandbytes" or None)
    assert available(["awq", "nf4"]) == ["nf4"]
    monkeypatch.setattr(four_bits, "find_spec", lambda name: None)
    monkeypatch.setattr(four_bits, "version", missing)
    assert available(["awq", "nf4"]) == [] and "pip install bitsandbytes==" in library("nf4")
    assert (
        "which is missing (`pip install llmcompressor=="
        in FourBits("awq", 32, True, True, TEXT, object()).key["library"]
    )
