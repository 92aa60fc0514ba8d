"""4-bit weights of the real embedded model and of a tiny one of every kind of layer."""

import copy
import re
from contextlib import ExitStack

import pytest
import torch
from exports import ROOT
from tiny import random_ids, tiny
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import llmdrop
from llmdrop import DropPlan, apply_plan, dropped
from llmdrop.checkpoints import four_bits
from llmdrop.checkpoints.load import load_weights

bnb = pytest.importorskip("bitsandbytes", reason=f"4-bit weights: {four_bits.INSTALL}")
PLAN = DropPlan(attn=(2, 3, 27), mlp=(3, 28), n_layers=30)  # single layers and a block
KEPT = (*range(6), *range(26, 30))  # the layers of `whole`
WIDE = {"hidden_size": 64, "intermediate_size": 128}
SHAPES = {
    "gpt2": {"n_embd": 64},
    "gemma2": WIDE | {"head_dim": 16},
    "opt": {"hidden_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 64},
}


@pytest.fixture(scope="module")
def whole(smollm2):
    """The real weights of ten of the 30 layers: rounding all of them takes ten seconds."""
    return apply_plan(copy.deepcopy(smollm2[0]), DropPlan(attn=range(6, 26), mlp=range(6, 26)))


@pytest.fixture(scope="module")
def four(whole):
    return four_bits.quantize(copy.deepcopy(whole))


@pytest.fixture(scope="module")
def text(smollm2):
    return llmdrop.load_calibration([(ROOT / "README.md").read_text()], smollm2[1], 2, 128)


@torch.inference_mode()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits


def small(family: str):
    return tiny(family, **SHAPES.get(family, WIDE))


def test_quantized_and_dropped_is_saved_and_loaded_with_equal_logits(smollm2, four, text, tmp_path):
    ids = text.input_ids[:1, :32]
    model = apply_plan(copy.deepcopy(four), PLAN)
    before = logits(model, ids)
    llmdrop.save_model(model, smollm2[1], tmp_path / "four")  # after a forward pass
    loaded, _ = llmdrop.load_model(tmp_path / "four", device="cpu")
    assert torch.equal(logits(loaded, ids), before)
    assert llmdrop.weights_digest(loaded) == llmdrop.weights_digest(model)
    assert four_bits.size(loaded) == four_bits.size(model)
    on_disk = sum(file.stat().st_size for file in (tmp_path / "four").glob("*.safetensors"))
    assert on_disk == pytest.approx(four_bits.size(model)["bytes"], rel=0.01)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
@pytest.mark.parametrize("plan", [DropPlan(), DropPlan((1, 3), (1, 2))], ids=["whole", "dropped"])
@pytest.mark.parametrize("unpacked", [False, True])
@pytest.mark.parametrize("within", [False, True], ids=["dropped within", "dropped around"])
def test_quantized_for_a_while(family, plan, unpacked, within):
    model, ids = small(family), random_ids(2, 9)
    before, digest, facts = logits(model, ids), llmdrop.weights_digest(model), state(model)
    expected = logits(apply_plan(four_bits.quantize(small(family)), plan), ids)
    with ExitStack() as stack:
        both = [lambda: dropped(model, plan), lambda: four_bits.quantized(model, unpacked=unpacked)]
        for enter in both if within else both[::-1]:
            stack.enter_context(enter())
        assert torch.allclose(logits(model, ids), expected, atol=1e-5)
        assert any(isinstance(module, bnb.nn.Linear4bit) for module in model.modules()) != unpacked
        assert hasattr(model.config, "quantization_config") != unpacked
        assert "bitsandbytes" in model.config.quantized_by
    assert state(model) == facts and llmdrop.weights_digest(model) == digest
    assert torch.equal(logits(model, ids), before)


def state(model) -> tuple:
    """All that quantizing could leave changed: modules, attributes of model and config, parameters."""
    modules = [(name, id(module), module.training) for name, module in model.named_modules()]
    parameters = [(name, id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()]
    return modules, parameters, sorted(vars(model)), dict(vars(model.config))


@pytest.mark.parametrize("unpacked", [False, True])
def test_a_model_is_restored_also_where_quantizing_fails_half_way(unpacked, monkeypatch):
    model = small("llama")
    facts = state(model)
    with pytest.raises(KeyboardInterrupt):
        with four_bits.quantized(model, unpacked=unpacked):
            raise KeyboardInterrupt
    assert state(model) == facts
    packed = four_bits._packed
    for place in (3, 20, 34):
        made = []

        def out_of_memory(*args, made=made, place=place):
            made.append(packed(*args))
            if len(made) > place:
                raise torch.OutOfMemoryError
            return made[-1]

        monkeypatch.setattr(four_bits, "_packed", out_of_memory)
        for change in (four_bits.quantize, lambda model: four_bits.quantized(model, unpacked=unpacked).__enter__()):
            made.clear()
            with pytest.raises(torch.OutOfMemoryError):
                change(model)
            assert state(model) == facts
    monkeypatch.undo()
    for last in ("dequantize", "arithmetic"):
        with monkeypatch.context() as patch:
            patch.setattr(four_bits, last, lambda *args: 1 / 0)
            if (last == "dequantize") == unpacked:
                with pytest.raises(ZeroDivisionError):
                    four_bits.quantized(model, unpacked=unpacked).__enter__()
            assert state(model) == facts


@pytest.mark.parametrize("plan", [DropPlan(), PLAN], ids=["whole", "dropped"])
def test_transformers_dequantizes_to_the_bits_that_are_multiplied_by(four, plan):
    model = apply_plan(copy.deepcopy(four), plan)
    packed = {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    four_bits.dequantize(model)
    assert len(packed) == 70 - 4 * len(set(plan.attn) & set(KEPT)) - 3 * len(set(plan.mlp) & set(KEPT))
    for name, module in packed.items():
        plain = model.get_submodule(name).weight
        assert torch.equal(plain, bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state))
        assert plain.dtype == torch.float32
    assert not getattr(model, "is_quantized", False) and not getattr(model, "is_loaded_in_4bit", False)


def test_order_of_dropping_and_quantizing_does_not_matter(whole, four, text):
    ids = text.input_ids[:1, :32]
    first_dropped = four_bits.quantize(apply_plan(copy.deepcopy(whole), PLAN))
    with dropped(four, PLAN):
        assert torch.equal(logits(first_dropped, ids), logits(four, ids))


def test_dequantized_and_swept_are_the_quantized_model(four, text):
    plans = {"Baseline": DropPlan(), "dropped": PLAN}
    plain = four_bits.dequantize(copy.deepcopy(four))
    swept = llmdrop.perplexity_sweep(plain, plans, text, progress=False).set_index("plan")["log_perplexity"]
    for name, plan in plans.items():
        with dropped(four, plan), dropped(plain, plan):
            here = logits(four, text.input_ids)
            assert torch.equal(here, logits(plain, text.input_ids))
        loss = cross_entropy(here[:, :-1].flatten(0, 1), text.input_ids[:, 1:].flatten())
        assert swept[name] == pytest.approx(float(loss), abs=1e-4)
    assert "quantization_config" not in plain.config.to_dict()
    with pytest.raises(ValueError, match="no 4-bit weights"):
        four_bits.dequantize(plain)


@pytest.mark.parametrize("algorithm, settings", [("nf4", {"bnb_4bit_quant_type": "nf4"}), ("fp4", {})])
def test_the_librarys_own_path_gives_the_same_weights_and_perplexity(whole, four, text, tmp_path, algorithm, settings):
    llmdrop.save_model(whole, None, tmp_path / "whole")  # an ordinary checkpoint: whole blocks are gone
    config = BitsAndBytesConfig(load_in_4bit=True, **settings)  # fp4 is what it takes by default
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "whole", quantization_config=config, dtype=torch.float32, device_map="cpu"
    ).eval()
    ours = four if algorithm == "nf4" else four_bits.quantize(copy.deepcopy(whole), algorithm)
    for name, module in ours.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            start, number, rest = re.fullmatch(r"(.*layers\.)(\d+)(.*)", name).groups()
            other = theirs.get_submodule(f"{start}{KEPT.index(int(number))}{rest}").weight
            assert torch.equal(module.weight.data, other.data), name
            assert torch.equal(module.weight.quant_state.absmax, other.quant_state.absmax), name
    ppl = [llmdrop.perplexity(model, text, progress=False)["perplexity"] for model in (ours, theirs, whole)]
    assert ppl[0] == pytest.approx(ppl[1], rel=0.05)  # theirs in bfloat16 on some CPUs
    assert ppl[0] != pytest.approx(ppl[2], rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("plan", [DropPlan(), DropPlan((1, 3), (1, 2))], ids=["whole", "dropped"])
def test_every_kind_of_layer_is_saved_and_loaded(family, plan, tmp_path):
    whole, ids = small(family), random_ids(2, 9)
    model = apply_plan(four_bits.quantize(copy.deepcopy(whole)), plan)
    assert any(isinstance(module, bnb.nn.Linear4bit) for module in model.modules())
    assert not isinstance(model.get_output_embeddings(), bnb.nn.Linear4bit)
    before = logits(model, ids)
    plain = logits(apply_plan(whole, plan), ids)
    assert 0 < (before - plain).norm() / plain.norm() < 0.4
    llmdrop.save_model(model, None, tmp_path / "one")
    again = tmp_path / "one"
    for _ in range(2):  # a loaded one can be saved again
        settings = {"dtype": torch.float32, "attn_implementation": whole.config._attn_implementation}
        loaded = load_weights(again, **settings)
        assert torch.equal(logits(loaded, ids), before)
        again = llmdrop.save_model(loaded, None, tmp_path / "two", overwrite=True)
    assert torch.allclose(logits(four_bits.dequantize(loaded), ids), before, atol=1e-5)


def test_bytes(whole, four):
    matrices = 10 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    rest = sum(p.nbytes for p in whole.parameters()) - 4 * matrices
    packed, plain = four_bits.size(four), four_bits.size(whole)
    assert plain == {"bytes": rest + 4 * matrices, "matrix_bits": 32}
    assert packed["bytes"] == pytest.approx(rest + 4.5 / 8 * matrices, rel=1e-3)  # a float32 scale for 64 weights
    assert packed["matrix_bits"] == pytest.approx(4.5, rel=1e-3)
    one_attention = (2 * 576 * 576 + 2 * 576 * 192) * 4.5 / 8 + 4 * 576
    with dropped(four, DropPlan(attn=(3,))):
        left = packed["bytes"] - four_bits.size(four)["bytes"]
    assert left == pytest.approx(one_attention, rel=2e-3)


def test_what_bitsandbytes_would_scramble_is_not_saved(tmp_path):
    model = four_bits.quantize(small("llama"), exact=False)
    with pytest.raises(ValueError, match="not serializable"):
        llmdrop.save_model(model, None, tmp_path / "one")
    llmdrop.save_model(four_bits.arithmetic(model), None, tmp_path / "one")  # not run yet, so nothing is lost


def test_refusals_leave_the_model_as_it_was(monkeypatch):
    model = small("llama")
    digest = llmdrop.weights_digest(model)
    with pytest.raises(ValueError, match="algorithm 'int3' is not one of nf4, fp4"):
        four_bits.quantize(model, "int3")
    with pytest.raises(ValueError, match="group_size=100 is not one of 32, 64"):
        four_bits.quantize(model, group_size=100)
    with pytest.raises(ValueError, match=r"groups of 128 .* of widths \[64, 128\]; use one of 32, 64"):
        four_bits.quantize(model, group_size=128)
    with pytest.raises(ValueError, match="does not quantize on meta"):
        four_bits.quantize(copy.deepcopy(model).to("meta"))
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "bitsandbytes", None)
        with pytest.raises(ImportError, match=r"pip install 'llmdrop\[four-bits\]'"):
            four_bits.quantize(model)
    assert llmdrop.weights_digest(model) == digest
    four = four_bits.quantize(model)
    with pytest.raises(ValueError, match="is quantized already"):
        four_bits.quantize(four)
    for layer in four.model.layers:  # as another library might have left it
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"):
            assert isinstance(layer.get_submodule(name), bnb.nn.Linear4bit)
    bare = small("llama")
    for layer in bare.model.layers:
        for name, module in list(layer.named_modules()):
            if isinstance(module, torch.nn.Linear):
                layer.set_submodule(name, type("Packed", (torch.nn.Linear,), {})(1, 1))
    with pytest.raises(ValueError, match="has no matrix in its layers"):
        four_bits.quantize(bare)
