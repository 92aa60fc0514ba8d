"""Selectors that run the model agree with dropping and measuring, restore the model, and count what they cost."""

import pytest
import torch
from tiny import random_ids, tiny

from llmdrop import Calibration, DropPlan, dropped
from llmdrop.compress.reconstruction import Change, corrections, reconstructed
from llmdrop.compress.search import agreement, greedy, next_tokens, one_shot, taylor
from llmdrop.evaluation.perplexity import perplexity_sweep

TEXT = Calibration(random_ids(4, 12))


def padded(calibration: Calibration, left: int, right: int) -> Calibration:
    """The same text with other tokens around it that do not count."""
    ids = torch.nn.functional.pad(calibration.input_ids, (left, right), value=7)
    mask = torch.nn.functional.pad(torch.ones_like(calibration.input_ids), (left, right))
    return Calibration(ids, attention_mask=mask)


PADDINGS = pytest.mark.parametrize("left, right", [(0, 4), (5, 0), (3, 2)])


def loss(model, plan: DropPlan, kind: str, dense=None) -> float:
    """The reference: drop, run, measure."""
    with torch.no_grad():
        whole = model(TEXT.input_ids, use_cache=False).logits.log_softmax(-1)
        with dropped(model, plan):
            found = model(TEXT.input_ids, use_cache=False).logits.log_softmax(-1)
    if kind == "kl":
        return float((whole.exp() * (whole - found)).sum(-1).mean())
    return float(-found[:, :-1].gather(-1, TEXT.input_ids[:, 1:, None]).mean())


@pytest.mark.parametrize("kind", ["kl", "perplexity"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2", "gpt_neox"])
def test_one_shot_is_drop_and_measure(family, kind):
    model = tiny(family)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    choice = one_shot(model, TEXT, "joint", kind, batch_size=3)
    for name, found in choice.losses.items():
        where, i = name.split()
        assert found == pytest.approx(loss(model, DropPlan(**{where: [int(i)]}), kind), abs=1e-5)
    assert len(choice.order) == 10
    assert choice.losses["{} {}".format(*choice.order[0])] == min(choice.losses.values())
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_perplexity_is_that_of_the_sweep():
    model = tiny("llama")
    choice = one_shot(model, TEXT, "attn", "perplexity")
    frame = perplexity_sweep(model, {"": DropPlan(attn=[2])}, TEXT, progress=False)
    assert choice.losses["attn 2"] == pytest.approx(frame["log_perplexity"][0], abs=1e-5)


@pytest.mark.parametrize("kind", ["kl", "perplexity"])
def test_loss_at_every_third_token(kind):
    model = tiny("llama")
    with torch.no_grad():
        whole = model(TEXT.input_ids, use_cache=False).logits.log_softmax(-1)
        with dropped(model, DropPlan(mlp=[1])):
            found = model(TEXT.input_ids, use_cache=False).logits.log_softmax(-1)
    each = (whole.exp() * (whole - found)).sum(-1)
    if kind == "perplexity":
        each = -found[:, :-1].gather(-1, TEXT.input_ids[:, 1:, None])[..., 0]
    assert one_shot(model, TEXT, "mlp", kind, 3).losses["mlp 1"] == pytest.approx(float(each[:, ::3].mean()), abs=1e-5)


def test_greedy_takes_the_best_next_step():
    model = tiny("llama")
    choice = greedy(model, TEXT, "attn", 3, width=None)
    gone: list[int] = []
    for kind, i in choice.order:
        rest = {j: loss(model, DropPlan(attn=[*gone, j]), "kl") for j in range(5) if j not in gone}
        assert kind == "attn" and i == min(rest, key=rest.get)
        gone.append(i)
        assert choice.losses[str(len(gone))] == pytest.approx(rest[i], abs=1e-5)
    assert choice.plan(2) == DropPlan(attn=gone[:2])
    narrow = greedy(model, TEXT, "attn", 3, width=1)
    assert narrow.tokens < choice.tokens and narrow.order[0] == choice.order[0]


@pytest.mark.parametrize("width", [1, 2])
def test_a_narrow_greedy_never_takes_what_it_has_not_just_tried(width):
    model = tiny("llama")
    choice = greedy(model, TEXT, "joint", 7, width=width)
    for n in range(1, 8):
        assert choice.losses[str(n)] == pytest.approx(loss(model, choice.plan(n), "kl"), abs=1e-5)


def test_greedy_with_corrections_measures_the_reconstructed_model():
    model, text = tiny("llama"), Calibration(random_ids(16, 24, seed=3))
    found = corrections(model, text)
    assert set(found) == {("attn", i) for i in range(1, 5)} and set(found["attn", 3]) == {("mlp", 2)}
    choice = greedy(model, TEXT, "attn", 2, corrections=found, width=None)
    plan = choice.plan(2)
    changes = {at: change for i in plan.attn for at, change in found.get(("attn", i), {}).items()}
    with torch.no_grad():
        whole = model(TEXT.input_ids, use_cache=False).logits.log_softmax(-1)
        with reconstructed(model, plan, changes):
            rest = model(TEXT.input_ids, use_cache=False).logits.log_softmax(-1)
    assert choice.losses["2"] == pytest.approx(float((whole.exp() * (whole - rest)).sum(-1).mean()), abs=1e-5)


def test_cost_of_time_decides_between_kinds():
    model = tiny("llama")
    assert {kind for kind, _ in greedy(model, TEXT, "joint", 3, seconds={"attn": 1e9, "mlp": 1e-9}).order} == {"attn"}
    assert {kind for kind, _ in greedy(model, TEXT, "joint", 3, seconds={"attn": 1e-9, "mlp": 1e9}).order} == {"mlp"}


def test_taylor_is_the_derivative():
    model = tiny("llama")
    before = [parameter.requires_grad for parameter in model.parameters()]
    choice = taylor(model, Calibration(TEXT.input_ids[:1]))
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    changes, step = {}, 1e-3
    for i in range(5):
        weight, losses = model.model.layers[i].self_attn.o_proj.weight.data, []
        for sign in (1, -1):
            weight.mul_(1 + sign * step)
            losses.append(perplexity_sweep(model, {"": DropPlan()}, Calibration(TEXT.input_ids[:1]), progress=False))
            weight.div_(1 + sign * step)
        changes[i] = abs(losses[0]["log_perplexity"][0] - losses[1]["log_perplexity"][0])
    assert [i for _, i in choice.order][-1] == max(changes, key=changes.get)


@PADDINGS
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_taylor_leaves_padding_out(family, left, right, monkeypatch):
    model = tiny(family)
    gradients, derivatives = [], torch.autograd.grad

    def spy(loss, scales):
        found = derivatives(loss, scales)
        gradients.append(torch.stack(found))
        return found

    monkeypatch.setattr(torch.autograd, "grad", spy)
    plain, other = (taylor(model, text, "joint") for text in (TEXT, padded(TEXT, left, right)))
    assert plain.order == other.order and plain.tokens == other.tokens
    half = len(gradients) // 2
    for mine, theirs in zip(gradients[:half], gradients[half:], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


def test_what_is_predicted_from_padding_has_no_label():
    inputs = {"input_ids": torch.arange(1, 7)[None], "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 0]])}
    assert next_tokens(inputs).tolist() == [[-100, -100, -100, 4, 5, -100]]
    assert inputs["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6]]


@PADDINGS
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("kind", ["kl", "perplexity"])
def test_losses_leave_padding_out(kind, every, left, right):
    model = tiny("llama")
    plain, other = (one_shot(model, text, "joint", kind, every) for text in (TEXT, padded(TEXT, left, right)))
    assert plain.order == other.order and plain.tokens == other.tokens
    assert plain.losses == pytest.approx(other.losses, abs=1e-5)


@pytest.mark.parametrize("where", ["whole", "one layer"])
def test_losses_that_are_not_finite_are_refused(where):
    model = tiny("llama")
    former = [p.requires_grad for p in model.parameters()]
    layer = model.model.layers[2]
    layer.input_layernorm.weight.data.mul_(float("inf") if where == "whole" else 1)
    if where == "whole":
        for kind in ("kl", "perplexity"):
            with pytest.raises(ValueError, match="layer 2's block gives values that are not finite.*bfloat16"):
                greedy(model, TEXT, "attn", 2, kind)
        with pytest.raises(ValueError, match="layer 2's attn gives values that are not finite.*bfloat16"):
            taylor(model, TEXT)
    else:  # only without layer 2's attention
        found = {("attn", 2): {("mlp", 1): Change(bias=torch.full((32,), float("nan")))}}
        with pytest.raises(ValueError, match="the loss without attn 2 is not finite"):
            greedy(model, TEXT, "attn", 2, corrections=found)
    assert [p.requires_grad for p in model.parameters()] == former


def test_agreement():
    assert agreement([[1, 2, 3], [2, 1, 4]], 2) == 1
    assert agreement([[1, 2], [3, 4], [1, 3]], 2) == pytest.approx(1 / 3)


def test_errors():
    model = tiny("llama")
    with pytest.raises(ValueError, match="not one of attn, mlp, joint"):
        one_shot(model, TEXT, "block")
    with pytest.raises(ValueError, match="not one of kl, perplexity"):
        greedy(model, TEXT, n=2, loss="mse")
    with pytest.raises(ValueError, match="n=6 of 5"):
        greedy(model, TEXT, n=6)
    with pytest.raises(ValueError, match="every=0"):
        one_shot(model, TEXT, every=0)
    with pytest.raises(ValueError, match="one token only"):
        one_shot(model, Calibration(random_ids(2, 1)), loss="perplexity")
