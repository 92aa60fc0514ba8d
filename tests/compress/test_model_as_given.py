"""What every method finds does not depend on the model's mode, and values that are not finite are refused by layer."""

import pytest
import torch
from tiny import random_ids, tiny

from llmdrop import Calibration, DropPlan, score
from llmdrop.compress.healing import heal
from llmdrop.compress.reconstruction import METHODS, corrections, fit
from llmdrop.compress.search import greedy, one_shot, taylor
from llmdrop.compress.shortened_llama import block_taylor
from llmdrop.compress.wanda import wanda
from llmdrop.compress.windows import score_windows

TEXT = Calibration(random_ids(8, 16))
PLAN = DropPlan(attn=[1, 4])
DROPOUT = {"attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1}


def healed(model, loss: str) -> list:
    pytest.importorskip("peft")
    student, losses = heal(model, PLAN, TEXT, loss=loss, progress=False)
    assert not any(module.training for module in student.modules())
    return [losses, student.state_dict()]


FIND = {
    "score": lambda model: score(model, TEXT, progress=False).to_json(),
    "windows": lambda model: score_windows(model, TEXT, 4, 1),
    **{f"fit, {method}": lambda model, method=method: fit(model, PLAN, TEXT, method) for method in METHODS},
    "corrections": lambda model: corrections(model, TEXT),
    "corrections, MLP": lambda model: corrections(model, TEXT, ("mlp",)),
    "corrections, mean": lambda model: corrections(model, TEXT, ("attn", "mlp"), "mean"),
    "wanda": lambda model: wanda(model, TEXT, 0.4),
    "one-shot, kl": lambda model: one_shot(model, TEXT, "joint").losses,
    "one-shot, perplexity": lambda model: one_shot(model, TEXT, "joint", "perplexity").losses,
    "greedy, kl": lambda model: greedy(model, TEXT, n=2).losses,
    "greedy, perplexity": lambda model: greedy(model, TEXT, n=2, loss="perplexity").losses,
    "taylor": lambda model: taylor(model, TEXT).order,
    "block_taylor": lambda model: block_taylor(model, TEXT).tolist(),
}
TRAIN = {
    "healing, kl": lambda model: healed(model, "kl"),
    "healing, perplexity": lambda model: healed(model, "perplexity"),
}


def bits(value):
    """Nested results, comparable with ==."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: bits(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [bits(each) for each in value]
    return bits(vars(value)) if hasattr(value, "__dict__") else value


@pytest.mark.parametrize("name", [*FIND, *TRAIN])
def test_numbers_do_not_depend_on_the_mode(name):
    find = (FIND | TRAIN)[name]
    model = tiny("gpt2", "sdpa", **DROPOUT)
    expected = bits(find(model))
    assert not any(module.training for module in model.modules())
    model.train()
    model.transformer.h[2].eval()  # a mixture is given back as well
    modes = [module.training for module in model.modules()]
    assert bits(find(model)) == expected
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind, matrix", [("attn", "self_attn.o_proj"), ("mlp", "mlp.down_proj")])
@pytest.mark.parametrize("name", FIND)
def test_values_that_are_not_finite_are_refused_by_layer(name, kind, matrix, value):
    model = tiny("llama", "sdpa").train()
    model.model.layers[2].get_submodule(matrix).weight.data[0, 0] = value
    message = f"layer 2's ({kind}|block) gives values that are not finite on this text"
    with pytest.raises(ValueError, match=message + ".*load the checkpoint again.*dtype='bfloat16' or 'float32'"):
        FIND[name](model)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    "name",
    ["score", "windows", "corrections, mean", "corrections, MLP", "wanda", "one-shot, kl", "one-shot, perplexity"],
)
def test_padding_may_be_anything(name, monkeypatch):
    def spoil(module, args, out):
        return torch.cat([out[:, :16], torch.full_like(out[:, 16:], torch.nan)], 1)

    ids = torch.nn.functional.pad(TEXT.input_ids, (0, 3), value=96)
    mask = torch.nn.functional.pad(torch.ones_like(TEXT.input_ids), (0, 3))
    monkeypatch.setitem(globals(), "TEXT", Calibration(ids, attention_mask=mask))
    model = tiny("llama")
    expected = bits(FIND[name](model))
    model.model.layers[4].mlp.down_proj.register_forward_hook(spoil)  # attention would pass it on to other tokens
    assert bits(FIND[name](model)) == expected
