"""Wanda zeroes what its formula says, in every family, and nothing is left of it afterwards."""

import gc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, random_ids, tiny

from llmdrop import Calibration, DropPlan, apply_plan, dropped, load_calibration, weights_digest
from llmdrop.anatomy import find_anatomy
from llmdrop.compress.wanda import (
    VERSION,
    WandaMask,
    _rows,
    linears,
    lowest,
    removed_share,
    rounded_share,
    wanda,
    zeroed,
)
from llmdrop.speed.geometry import Int4Linear


def inputs_of(model, calibration, name) -> np.ndarray:
    """What one linear layer reads in a stock forward pass, [tokens, inputs], float64."""
    seen, module = [], linears(find_anatomy(model))[name]
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(calibration.input_ids)
    handle.remove()
    return torch.cat(seen).double().numpy()


def by_formula(weight: np.ndarray, read: np.ndarray, share: float) -> np.ndarray:
    """The mask of Wanda, written without llmdrop: True where |W_ij| ||x_j|| is among a row's lowest."""
    score = np.abs(weight) * np.sqrt((read**2).sum(0))
    mask = np.zeros(weight.shape, dtype=bool)
    for row, order in zip(mask, np.argsort(score, axis=1, kind="stable"), strict=True):
        row[order[: round(share * weight.shape[1])]] = True
    return mask


FOUR = DropPlan(range(4, 30), range(4, 30))  # the first layers of SmolLM2 are enough


@pytest.mark.parametrize("sequential", [True, False])
def test_masks_of_a_real_model_are_the_formulas(smollm2, sequential):
    """Each layer's on the model whose layers before it, if sequential, are pruned already, and itself is not."""
    (model, tokenizer), before = smollm2, weights_digest(smollm2[0])
    text = load_calibration("xsum", tokenizer, 2, 48)
    with dropped(model, FOUR):
        zeros = wanda(model, text, 1 / 15, batch_size=1, sequential=sequential)
        assert len(zeros) == 7 * 4
        for name in ("0.self_attn.q_proj", "0.mlp.down_proj", "3.self_attn.o_proj", "3.mlp.up_proj", "3.mlp.down_proj"):
            with zeroed(model, {n: z if sequential and n[0] < name[0] else z[:, :0] for n, z in zeros.items()}):
                read = inputs_of(model, text, name)
            weight = linears(find_anatomy(model))[name].weight.detach().double().numpy()
            with zeroed(model, zeros):
                gone = (linears(find_anatomy(model))[name].weight == 0).numpy()
            assert (gone.sum(1) == round(weight.shape[1] / 15)).all()
            wrong = gone != by_formula(weight, read, 1 / 15)
            assert wrong.mean() < 1e-5, name  # float32 may order two nearly equal scores the other way
    assert weights_digest(model) == before


def test_sequential_differs_little_from_one_pass(smollm2):
    model, tokenizer = smollm2
    text = load_calibration("xsum", tokenizer, 1, 48)
    with dropped(model, FOUR):
        one, other = (wanda(model, text, 0.1, sequential=s) for s in (True, False))
    assert all(one[n].equal(other[n]) for n in one if n.startswith("0."))  # nothing is pruned before layer 0
    kept = [np.isin(a, b).mean() for n in one for a, b in zip(one[n][:4].numpy(), other[n][:4].numpy(), strict=True)]
    assert 0.9 < np.mean(kept) < 1


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 9),
    st.integers(1, 40),
    st.floats(0, 0.999),
    st.integers(0, 2**32 - 1),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_every_row_loses_the_same_number(rows, inputs, share, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, inputs, generator=generator).to(dtype)
    norms = torch.rand(inputs, generator=generator) * (torch.rand(inputs, generator=generator) < 0.7)  # some read zeros
    index = lowest(weight, norms, share).long()
    assert index.shape == (rows, round(share * inputs)) and index.dtype == torch.int64
    assert all(len(set(row.tolist())) == len(row) for row in index)
    score = (weight.abs().float() * norms).double().numpy()
    expected = np.argsort(score, axis=1, kind="stable")[:, : index.shape[1]]
    assert np.array_equal(np.sort(index.numpy(), axis=1), np.sort(expected, axis=1))


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    """All linear layers of all sublayers, the formula on the last layer's, exact zeros, bits restored, padding out."""
    model, ids = tiny(family), random_ids(3, 16)
    before = weights_digest(model)
    zeros = wanda(model, Calibration(ids), 0.25, batch_size=2, sequential=False)
    assert weights_digest(model) == before
    inside = [p for n, p in model.named_parameters() if p.ndim > 1 and ".layers." in n.replace(".h.", ".layers.")]
    modules = linears(find_anatomy(model))
    assert sum(m.weight.numel() for m in modules.values()) == sum(p.numel() for p in inside)
    name = [n for n in modules if n.startswith("4.")][-1]
    mask = by_formula(_rows(modules[name]).double().numpy(), inputs_of(model, Calibration(ids), name), 0.25)
    with zeroed(model, zeros):
        for each, module in modules.items():
            assert ((_rows(module) == 0).sum(1) == zeros[each].shape[1]).all(), each
        assert ((_rows(modules[name]) == 0).numpy() != mask).mean() < 0.005  # float32 and nearly equal scores
        assert weights_digest(model) != before
    assert weights_digest(model) == before
    mask = torch.ones(3, 24, dtype=torch.long)
    mask[:, 16:] = 0  # padding on the right, of real tokens
    padded = wanda(model, Calibration(torch.cat([ids, random_ids(3, 8, seed=5)], 1), attention_mask=mask), 0.25)
    plain = wanda(model, Calibration(ids), 0.25)
    assert np.mean([plain[n].equal(padded[n]) for n in plain]) > 0.95  # but for nearly equal scores


def test_restored_after_an_exception_and_bit_by_bit():
    model = tiny("llama").to(torch.bfloat16)
    model.model.layers[1].mlp.up_proj.weight.data[0, :5] = torch.tensor([-0.0, 0.0, 1e-40, -1e-40, float("nan")])
    before = {name: p.detach().clone().view(torch.int16) for name, p in model.state_dict().items()}
    zeros = {n: torch.arange(m.weight.shape[1] // 2).int().expand(len(m.weight), -1) for n, m in _named(model)}
    with pytest.raises(RuntimeError, match="inside"), zeroed(model, zeros):
        raise RuntimeError("inside")
    assert all(p.view(torch.int16).equal(before[name]) for name, p in model.state_dict().items())


def _named(model):
    return linears(find_anatomy(model)).items()


def held_bytes() -> int:
    """Of all tensors that Python knows of, memory that they share counted once."""
    tensors = [value for value in gc.get_objects() if type(value) in (torch.Tensor, torch.nn.Parameter)]
    return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device.type == "cpu"}.values())


def test_the_undo_takes_no_more_than_the_weights_it_puts_back():
    """Six bytes a zero in 16 bits, four of which are the zeros as they were found; 64-bit indices took 14."""
    model = tiny("llama", hidden_size=64, intermediate_size=256).to(torch.bfloat16)
    zeros = wanda(model, Calibration(random_ids(2, 8)), 0.5)
    n_zeros = sum(index.numel() for index in zeros.values())
    before = held_bytes()
    with zeroed(model, zeros):
        assert 0 < held_bytes() - before <= 2.5 * n_zeros


def test_dropped_layers_are_left_out():
    model, text = tiny("llama"), Calibration(random_ids(2, 12))
    with dropped(model, DropPlan(attn=[1, 3], mlp=[3])):
        zeros = wanda(model, text, 0.2)
        assert {name.split(".")[0] for name in zeros} == set("0124")
        assert not [name for name in zeros if name.startswith("1.self_attn")]
        with zeroed(model, zeros):
            assert (model.model.layers[0].mlp.up_proj.weight == 0).any()
    with pytest.raises(ValueError, match="of another model"), zeroed(model, zeros):
        pass
    full = wanda(model, text, 0.2)
    with dropped(model, DropPlan(attn=[1])), zeroed(model, full):  # what is gone needs no zeros
        pass
    apply_plan(model, DropPlan(attn=[2]))
    assert not [name for name in wanda(model, text, 0.2) if name.startswith("2.self_attn")]


def test_zeros_of_another_width_are_refused_before_anything_is_touched():
    model, text = tiny("llama"), Calibration(random_ids(2, 12))
    before = weights_digest(model)
    zeros = wanda(model, text, 0.2)
    for name, index in (("4.mlp.down_proj", zeros["4.mlp.down_proj"] + 40), ("4.mlp.up_proj", None)):
        wrong = zeros | {name: index} if index is not None else {n: z for n, z in zeros.items() if n != name}
        with pytest.raises(ValueError, match="of another model"), zeroed(model, wrong):
            pass
        assert weights_digest(model) == before


def test_a_mask_is_found_once_per_model_and_weights(monkeypatch):
    found = []
    monkeypatch.setattr("llmdrop.compress.wanda.wanda", lambda *settings: found.append(wanda(*settings)) or found[-1])
    model, mask = tiny("llama"), WandaMask(0.25, Calibration(random_ids(2, 12)), sequential=False)
    before = weights_digest(model)
    for _ in range(2):
        with mask.applied(model):
            assert all(
                (linear.weight == 0).sum(1).eq(round(linear.in_features / 4)).all() for _, linear in _named(model)
            )
        assert weights_digest(model) == before
    assert len(found) == 1 and mask.zeros(model) is found[0]
    model.model.layers[0].mlp.up_proj.weight.data.mul_(-1e3)
    assert mask.zeros(model) is found[1]
    other = tiny("llama", seed=1)
    assert mask.zeros(other) is found[2] and len(mask._found) == 2
    del other
    assert len(mask._found) == 1, "a model that is gone is forgotten"
    assert mask.label == "Wanda 25 %"
    assert mask.key == {"share": 0.25, "sequential": False, "text": mask.calibration.digest, "version": VERSION}
    with pytest.raises(ValueError, match="from 0 to below 1"):
        WandaMask(1.0, mask.calibration)


def test_budgets():
    model = tiny("llama")
    per_layer = [m.weight.numel() for n, m in _named(model) if n.startswith("0.")]
    attention = sum(m.weight.numel() for n, m in _named(model) if n.startswith("0.self_attn"))
    assert removed_share(model, DropPlan(attn=[1, 2])) == pytest.approx(2 * attention / (5 * sum(per_layer)))
    assert removed_share(model, DropPlan()) == 0
    zeros = wanda(model, Calibration(random_ids(1, 8)), 0.13)
    n_zeros = sum(z.numel() for z in zeros.values())
    assert rounded_share(model, 0.13) == pytest.approx(n_zeros / (5 * sum(per_layer)))
    assert all(not z.numel() for z in wanda(model, Calibration(random_ids(1, 8)), 0).values())


def test_errors():
    model, text = tiny("llama"), Calibration(random_ids(2, 12))
    for share in (-0.1, 1, float("nan")):
        with pytest.raises(ValueError, match="from 0 to below 1"):
            wanda(model, text, share)
    before = weights_digest(model)
    model.model.layers[2].input_layernorm.weight.data.mul_(float("inf"))
    with pytest.raises(ValueError, match="layer 2's block .* not finite.*bfloat16"):
        wanda(model, text, 0.1)
    model = tiny("llama")
    assert weights_digest(model) == before
    model.model.layers[3].mlp.up_proj = Int4Linear(128, 64, "cpu")
    with pytest.raises(ValueError, match="layer 3's mlp.up_proj is a Int4Linear .* not quantized"):
        wanda(model, text, 0.1)
