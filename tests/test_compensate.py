"""Compensation brings the dropped model nearer to the whole one, is restored, saved and loaded like any weights."""

import pytest
import torch
from tiny import FAMILIES, random_ids, tiny

import llmdrop
from llmdrop import Calibration, DropPlan, dropped
from llmdrop.compensate import FILLS, REFITS, Fill, combined, compensate, compensated, corrections, fit

REFUSED = {"gpt_neox", "gemma2", "gemma3_text", "olmo2"}  # parallel, or a norm after the last matrix
SERVED = [family for family in FAMILIES if family not in REFUSED]
PLAN, WHOLE_BLOCK = DropPlan(attn=[1, 3]), DropPlan(attn=[2, 3], mlp=[3])
NEW = random_ids(8, 20, seed=5)
CALIBRATION = Calibration(random_ids(32, 24))


@torch.no_grad()
def logits(model, ids=NEW):
    return model(ids, use_cache=False).logits.log_softmax(-1)


def divergence(dense, other) -> float:
    return float((dense.exp() * (dense - other)).sum(-1).mean())


@pytest.mark.parametrize("plan", [PLAN, WHOLE_BLOCK], ids=["attn", "block"])
@pytest.mark.parametrize("family", SERVED)
def test_refit_comes_nearer_on_new_text_and_is_restored(family, plan):
    model = tiny(family)
    dense, state = logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    with dropped(model, plan):
        plain = divergence(dense, logits(model))
    left = {}
    for method in REFITS:
        changes = fit(model, plan, CALIBRATION, method)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items()), "fit changed it"
        with compensated(model, plan, changes):
            left[method] = divergence(dense, logits(model))
        assert torch.equal(logits(model), dense), "not restored"
    assert left["refit all"] < 0.8 * plain, f"{left} of {plain}"  # of the others, see below: nearer to the stream at
    assert left["refit"] != plain != left["refit in turn"]  # a gap need not be nearer to a random model's predictions


@pytest.mark.parametrize("family", SERVED)
def test_refit_fills_the_gap(family):
    model, plan = tiny(family), DropPlan(attn=[4])
    ids = CALIBRATION.input_ids  # random text: little of an attention layer can be told from the MLP before it
    changes, streams = fit(model, plan, CALIBRATION), []
    parts = llmdrop.anatomy(model)
    last = parts.layers[4].get_submodule(parts.layout.mlp[0])  # reads the stream after the gap
    handle = last.register_forward_pre_hook(lambda module, args: streams.append(args[0].reshape(-1, args[0].shape[-1])))
    logits(model, ids)
    with dropped(model, plan):
        logits(model, ids)
    with compensated(model, plan, changes):
        logits(model, ids)
    handle.remove()
    whole, plain, refitted = streams
    assert (refitted - whole).square().mean() < 0.99 * (plain - whole).square().mean()


@pytest.mark.parametrize("method", FILLS)
def test_fills_come_nearer_where_they_were_fitted_and_are_restored(method):
    model, ids = tiny("llama"), CALIBRATION.input_ids  # random text has no mean that carries over to other text
    dense = logits(model, ids)
    plan = DropPlan(attn=[4])  # deeper down, what is nearer to the stream need not be nearer to random predictions
    with dropped(model, plan):
        plain = divergence(dense, logits(model, ids))
    changes = fit(model, plan, CALIBRATION, method)
    assert set(changes) == {("attn", 4)} and isinstance(changes["attn", 4], Fill)
    with compensated(model, plan, changes):
        assert divergence(dense, logits(model, ids)) < plain
    assert torch.equal(logits(model, ids), dense)


def test_constant_sublayers_are_replaced_exactly_by_their_mean():
    model = tiny("opt")
    for i in PLAN.attn:
        model.model.decoder.layers[i].self_attn.out_proj.weight.data.zero_()  # its bias is all it adds
    dense = logits(model)
    with compensated(model, PLAN, fit(model, PLAN, CALIBRATION, "mean")):
        torch.testing.assert_close(logits(model), dense, atol=1e-4, rtol=0)


def test_padding_does_not_count():
    model = tiny("llama")
    plain = fit(model, PLAN, CALIBRATION)
    ids = torch.nn.functional.pad(CALIBRATION.input_ids, (0, 5), value=7)
    mask = torch.nn.functional.pad(torch.ones_like(CALIBRATION.input_ids), (0, 5))
    padded = fit(model, PLAN, Calibration(ids, attention_mask=mask))
    assert plain.keys() == padded.keys()
    for key in plain:
        torch.testing.assert_close(plain[key], padded[key], atol=1e-4, rtol=1e-3)


def test_nothing_dropped_nothing_changed():
    assert fit(tiny("llama"), DropPlan(), CALIBRATION) == {}
    assert fit(tiny("llama"), PLAN, CALIBRATION, "none") == {}


def test_corrections_of_single_layers_add_up():
    model = tiny("llama")
    found = corrections(model, CALIBRATION, ("attn", "mlp"))
    assert set(found["mlp", 2]) == {("attn", 2)} and ("attn", 0) not in found
    for plan in (DropPlan(attn=[0, 1, 3]), DropPlan(mlp=[2, 4])):
        changes, expected = combined(found, plan), fit(model, plan, CALIBRATION)
        assert changes.keys() == expected.keys() and changes
        for at, change in changes.items():
            torch.testing.assert_close(change, expected[at])
    some = corrections(model, CALIBRATION, layers=[1, 3])
    assert some.keys() == {("attn", 1), ("attn", 3)}
    for at, changes in some.items():
        torch.testing.assert_close(changes, found[at])


def test_a_sublayer_that_adds_nothing_needs_no_change():
    model = tiny("llama")
    model.model.layers[3].self_attn.o_proj.weight.data.zero_()
    changes = fit(model, DropPlan(attn=[3]), CALIBRATION)
    assert all(change.abs().max() < 1e-5 for change in changes.values())


def test_compensated_checkpoint_loads_as_any_other(tmp_path):
    model = tiny("llama")
    changes = fit(model, PLAN, CALIBRATION)
    with compensated(model, PLAN, changes):
        expected = logits(model)
    compensate(model, PLAN, changes)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)
    llmdrop.save_model(model, None, tmp_path / "model")
    for parameter in model.parameters():  # nothing of the file may depend on the model in memory
        parameter.data.zero_()
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    torch.testing.assert_close(logits(again), expected, atol=1e-5, rtol=0)


def test_a_fill_is_not_saved(tmp_path):
    model, plan = tiny("llama"), DropPlan(attn=[2])
    with compensated(model, plan, fit(model, plan, CALIBRATION, "mean")):
        with pytest.raises(ValueError, match="no checkpoint holds it"):
            llmdrop.save_model(model, None, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_architectures_that_refit_cannot_serve(family):
    with pytest.raises(ValueError, match="cannot refit layer 0"):
        fit(tiny(family), PLAN, CALIBRATION)


def test_errors():
    model = tiny("llama")
    with pytest.raises(ValueError, match="not one of none, mean"):
        fit(model, PLAN, CALIBRATION, "average")
    with pytest.raises(ValueError, match="add modules"):
        compensate(model, PLAN, fit(model, PLAN, CALIBRATION, "mean"))
    with pytest.raises(ValueError, match="fills gaps of single sublayers"):
        fit(model, WHOLE_BLOCK, CALIBRATION, "linear")
    with pytest.raises(ValueError, match="out of range"):
        fit(model, DropPlan(attn=[9]), CALIBRATION)
    with pytest.raises(ValueError, match="at least 4 calibration samples"):
        fit(model, PLAN, Calibration(random_ids(3, 8)))
    with dropped(model, PLAN), pytest.raises(ValueError, match="dropped already"):
        fit(model, PLAN, CALIBRATION)
