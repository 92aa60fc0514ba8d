"""Wanda zeroes what its formula says, in every family, and nothing is left of it afterwards."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, random_ids, tiny

from llmdrop import Calibration, DropPlan, Store, apply_plan, dropped, load_calibration, perplexity, weights_digest
from llmdrop.anatomy import anatomy
from llmdrop.geometry import Int4Linear
from llmdrop.wanda import (
    _rows,
    linears,
    lowest,
    measure,
    removed_share,
    rounded_share,
    speeds,
    wanda,
    zeroed,
)


def inputs_of(model, calibration, name) -> np.ndarray:
    """What one linear layer reads in a stock forward pass, [tokens, inputs], float64."""
    seen, module = [], linears(anatomy(model))[name]
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
            weight = linears(anatomy(model))[name].weight.detach().double().numpy()
            with zeroed(model, zeros):
                gone = (linears(anatomy(model))[name].weight == 0).numpy()
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
    modules = linears(anatomy(model))
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
    return linears(anatomy(model)).items()


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
    with pytest.raises(ValueError, match=r"2\.self_attn\.q_proj reads .* not finite.*bfloat16"):
        wanda(model, text, 0.1)
    model = tiny("llama")
    assert weights_digest(model) == before
    model.model.layers[3].mlp.up_proj = Int4Linear(128, 64, "cpu")
    with pytest.raises(ValueError, match="layer 3's mlp.up_proj is a Int4Linear .* not quantized"):
        wanda(model, text, 0.1)


def test_measured_once(tmp_path, smollm2):
    _, tokenizer = smollm2
    model, store, text = tiny("llama", "sdpa"), Store(tmp_path), Calibration(random_ids(2, 12))
    held_out, searched = [Calibration(random_ids(1, 20, seed=k)) for k in (7, 8)], []

    def find(share):
        searched.append(share)
        return wanda(model, text, share)

    for _ in range(2):
        rows, losses = measure(store, model, tokenizer, {"a": 0.3, "b": 0.0}, text, held_out, [], find=find)
        assert rows.empty and len(losses) == 2 and list(losses[0]["plan"]) == ["a", "b"]
        plain = perplexity(model, held_out[1], progress=False)["log_perplexity"]
        assert losses[1]["log_perplexity"][1] == pytest.approx(plain) != losses[1]["log_perplexity"][0]
        timed = speeds(store, model, {"Baseline": DropPlan()}, {"a": 0.3}, find, 2, prompt_len=8, new_tokens=2)
        assert list(timed["plan"]) == ["Baseline", "a"] and timed["speedup"][0] == 1
        assert (timed["speedup_low"] <= timed["speedup"]).all() and (timed["speedup"] <= timed["speedup_high"]).all()
        n_searched, searched = len(searched), []
    assert not n_searched
