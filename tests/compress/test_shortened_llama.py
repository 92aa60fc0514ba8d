"""Shortened LLaMA's Taylor importance against its definition, its kept ends, and budgets that are equal."""

import numpy as np
import pytest
import torch
from tiny import FAMILIES, random_ids, tiny

from llmdrop import Calibration, DropPlan, dropped, score, weights_digest
from llmdrop.anatomy import find_anatomy
from llmdrop.compress.shortened_llama import block_plan, block_taylor, joint_plan, removed


@pytest.mark.parametrize("family", FAMILIES)
def test_taylor_is_the_definition(family):
    model, ids = tiny(family), random_ids(3, 12)
    before = weights_digest(model)
    model.lm_head.weight.requires_grad_(False)
    former = [p.requires_grad for p in model.parameters()]
    found = block_taylor(model, Calibration(ids))
    assert weights_digest(model) == before and [p.requires_grad for p in model.parameters()] == former
    assert all(p.grad is None for p in model.parameters())
    for i in (0, 4):
        named = [p for n, p in find_anatomy(model).layers[i].named_parameters() if n.endswith("weight")]
        total = [0.0] * len(named)
        for row in ids:
            logits = model(row[None]).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, row[1:])
            grads = torch.autograd.grad(loss, named, allow_unused=True)
            total = [t + (0 if g is None else g) for t, g in zip(total, grads, strict=True)]
        expected = sum(float((p.detach() * g).abs().double().sum()) for p, g in zip(named, total, strict=True))
        assert found[i] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("side", [(0, 4), (4, 0)], ids=["right", "left"])
def test_taylor_leaves_padding_out_and_keeps_gradients(side):
    model, ids = tiny("llama", "sdpa"), random_ids(2, 12)
    mask = torch.nn.functional.pad(torch.ones_like(ids), side)
    around = torch.where(mask == 1, torch.nn.functional.pad(ids, side), random_ids(2, 16, seed=3))
    kept = model.model.layers[0].mlp.up_proj.weight
    kept.grad = torch.ones_like(kept)
    padded = block_taylor(model, Calibration(around, attention_mask=mask))
    assert padded == pytest.approx(block_taylor(model, Calibration(ids)), rel=1e-4)
    assert (kept.grad == 1).all()
    with pytest.raises(ValueError, match="dropped already"), dropped(model, DropPlan(attn=[1])):
        block_taylor(model, Calibration(ids))
    model.model.layers[2].input_layernorm.weight.data.mul_(float("inf"))
    with pytest.raises(ValueError, match="layer 2's attn gives values that are not finite"):
        block_taylor(model, Calibration(ids))


def test_ends_are_kept():
    importance = np.array([0.0, 0.1, 0.2, 0.3, 9, 5, 8, 6, 7, 0.1, 0.0])  # the ends are the least important
    assert block_plan(importance, 3) == DropPlan([5, 7, 8], [5, 7, 8], 11)
    assert block_plan(importance, 2, kept=(0, 0)).blocks == (0, 10)
    assert not block_plan(importance, 0)
    with pytest.raises(ValueError, match="cannot drop 6 of 11 blocks and keep the first 4 and the last 2"):
        block_plan(importance, 6)


def test_budgets_are_equal():
    model = tiny("llama")
    scores = score(model, Calibration(random_ids(2, 16)), progress=False)
    block = removed(model, DropPlan([2], [2]))
    assert block == sum(p.numel() for p in model.model.layers[2].parameters())
    one = removed(model, DropPlan([1]))
    for n in (1, 2, 3):
        plan = joint_plan(scores, lambda plan, n=n: removed(model, plan) >= n * block)
        assert n * block <= removed(model, plan) < (n + 1) * block
    assert len(joint_plan(scores, bool)) == 1 and not joint_plan(scores, lambda plan: True)
    assert one < block
    with pytest.raises(ValueError, match="up to 9 sublayers is enough"):
        joint_plan(scores, lambda plan: False)
