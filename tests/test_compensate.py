"""Compensation brings the dropped model nearer to the whole one, is restored, saved and loaded like any weights."""

import numpy as np
import pytest
import torch
from tiny import FAMILIES, random_ids, tiny
from transformers import AutoModelForCausalLM

import llmdrop
from llmdrop import Calibration, DropPlan, apply_plan, dropped
from llmdrop.compensate import (
    FILLS,
    MEANS,
    REFITS,
    Fill,
    combined,
    compensate,
    compensated,
    corrections,
    fit,
    shared_or_fit,
)
from llmdrop.shards import open_checkpoint
from llmdrop.slim import drop_checkpoint
from llmdrop.stream import score_checkpoint

REFUSED = {"gpt_neox", "gemma2", "gemma3_text", "olmo2"}  # parallel, or a norm after the last matrix
SERVED = [family for family in FAMILIES if family not in REFUSED]
PLAN, WHOLE_BLOCK = DropPlan(attn=[1, 3]), DropPlan(attn=[2, 3], mlp=[3])
GAPS = {"attn": PLAN, "mlp": DropPlan(mlp=[2]), "block": WHOLE_BLOCK, "blocks": DropPlan([1, 2], [1, 2])}
BIASED = {"gpt2", "gpt_neox_sequential", "opt"}  # have a bias in every matrix
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


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("method", MEANS)
def test_constant_sublayers_are_replaced_exactly_by_their_mean(method, gap):
    model, plan = tiny("opt"), GAPS[gap]
    for i, layer in enumerate(model.model.decoder.layers):
        for matrix in [layer.self_attn.out_proj] * (i in plan.attn) + [layer.fc2] * (i in plan.mlp):
            matrix.weight.data.zero_()  # its bias is all it adds
    dense = logits(model)
    with compensated(model, plan, fit(model, plan, CALIBRATION, method)):
        torch.testing.assert_close(logits(model), dense, atol=1e-4, rtol=0)


def streams_after(model, i: int) -> torch.Tensor:
    """[B, T, C] on the calibration text: what the first layer that is left from layer i on reads."""
    layer = next(layer for layer in llmdrop.anatomy(model).layers[i:] if layer is not None)
    found = []
    handle = layer.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    logits(model, CALIBRATION.input_ids)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("plan", [DropPlan(attn=[1, 3], mlp=[3]), GAPS["blocks"]], ids=["two gaps", "one"])
@pytest.mark.parametrize("family", SERVED)
def test_means_bring_back_the_mean_of_the_stream(family, plan):
    model, end = tiny(family), max(plan.blocks) + 1  # where the last gap ends
    whole = streams_after(model, end)
    weight = 1 / whole.square().mean(-1, keepdim=True)

    def lacks(changes) -> float:
        with compensated(model, plan, changes):
            return float((weight * (whole - streams_after(model, end))).mean((0, 1)).norm() / weight.mean())

    plain, left = lacks({}), {}
    for method in MEANS:
        changes = fit(model, plan, CALIBRATION, method)
        assert {change.shape for change in changes.values()} == {(32,)}
        left[method] = lacks(changes)
    assert left["mean in turn"] < 1e-4 * plain
    one = len(changes) == 1  # with more, "mean" does not see what the gaps above did to the last one's input
    assert (left["mean"] < 1e-4 * plain) == one, f"{left} of {plain}"


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("family", SERVED)
def test_means_are_restored_saved_and_loaded(family, gap, tmp_path):
    model, plan, former = tiny(family), GAPS[gap], tiny(family)
    dense, changes = logits(model), fit(model, plan, CALIBRATION, "mean in turn")
    with compensated(model, plan, changes):
        expected = logits(model)
        llmdrop.save_model(model, None, tmp_path / "within")
    assert torch.equal(logits(model), dense) and not hasattr(model.config, "llmdrop")
    for mine, stock in zip(model.modules(), former.modules(), strict=True):
        assert mine._parameters.keys() == stock._parameters.keys()
        assert [p is None for p in mine._parameters.values()] == [p is None for p in stock._parameters.values()]
    compensate(model, plan, changes)
    assert torch.equal(logits(model), expected)
    record = model.config.llmdrop.get("biases", [])
    assert len(record) == (0 if family in BIASED else len(changes))
    assert len(model.state_dict()) == len(apply_plan(former, plan).state_dict()) + len(record)
    llmdrop.save_model(model, None, tmp_path / "after")
    for parameter in model.parameters():  # nothing of the files may depend on the model in memory
        parameter.data.zero_()
    for path in (tmp_path / "within", tmp_path / "after"):
        theirs = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, attn_implementation="eager")
        for loaded in (theirs.eval(), load(path)):
            torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=0)
            assert loaded.config.llmdrop.get("biases", []) == record
    if record:  # also where only whole blocks are gone
        with pytest.raises(Exception, match="llmdrop.load_model"):
            type(model).from_pretrained(tmp_path / "after")


def load(path):
    settings = {"dtype": torch.float32, "attn_implementation": "eager"}
    return llmdrop.models._load_weights(str(path), {}, settings).eval()  # `load_model` without the tokenizer


@pytest.mark.parametrize("by", ["memory", "transformers", "disk"])
def test_dropping_more_keeps_the_biases_of_what_stays(by, tmp_path):
    model, more = tiny("llama"), DropPlan(attn=[4], mlp=[2])
    compensate(model, PLAN, fit(model, PLAN, CALIBRATION, "mean"))
    assert model.config.llmdrop["biases"] == [[0, "mlp.down_proj"], [2, "mlp.down_proj"]]
    with dropped(model, more):
        expected = logits(model)
        assert model.config.llmdrop["biases"] == [[0, "mlp.down_proj"]]
    assert len(model.config.llmdrop["biases"]) == 2
    llmdrop.save_model(model, None, tmp_path / "once")
    if by == "disk":
        path = drop_checkpoint(tmp_path / "once", more, tmp_path / "twice", progress=False)
    else:
        if by == "transformers":
            model = AutoModelForCausalLM.from_pretrained(tmp_path / "once", trust_remote_code=True)
        path = llmdrop.save_model(apply_plan(model, more), None, tmp_path / "twice")
    loaded = load(path)
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=0)
    assert loaded.config.llmdrop["biases"] == [[0, "mlp.down_proj"]] and llmdrop.anatomy(loaded).plan == PLAN | more
    assert llmdrop.weights_digest(loaded) != llmdrop.weights_digest(apply_plan(tiny("llama"), PLAN | more))


def test_a_checkpoint_with_biases_is_scored_layer_by_layer(tmp_path):
    model = tiny("llama")
    compensate(model, PLAN, fit(model, PLAN, CALIBRATION, "mean"))
    llmdrop.save_model(model, None, tmp_path / "model")
    settings = {"progress": False, "work_dir": tmp_path / "work", "device": "cpu"}
    streamed = score_checkpoint(tmp_path / "model", CALIBRATION, **settings)
    expected = llmdrop.score(model, CALIBRATION, progress=False)
    for kind in ("attn", "mlp"):
        np.testing.assert_allclose(getattr(streamed, kind), getattr(expected, kind), atol=1e-6)


@pytest.mark.parametrize("first", ["mean", "4 bits"])
def test_biases_and_4_bits(first, tmp_path):
    pytest.importorskip("bitsandbytes")
    from llmdrop import quantize

    model = tiny("llama", hidden_size=64, intermediate_size=128)
    changes = fit(model, PLAN, CALIBRATION, "mean")
    if first == "4 bits":
        quantize.quantize(model)
    compensate(model, PLAN, changes)
    if first == "mean":
        quantize.quantize(model)
    expected = logits(model)
    llmdrop.save_model(model, None, tmp_path / "model")
    loaded = load(tmp_path / "model")
    quantize.settle(loaded)  # as load_model does
    assert torch.equal(logits(loaded), expected) and len(loaded.config.llmdrop["biases"]) == 2
    assert torch.allclose(logits(quantize.dequantize(loaded)), expected, atol=1e-5)


@pytest.mark.parametrize("method", ["refit", "mean"])
def test_padding_does_not_count(method):
    model = tiny("llama")
    plain = fit(model, PLAN, CALIBRATION, method)
    ids = torch.nn.functional.pad(CALIBRATION.input_ids, (0, 5), value=7)
    mask = torch.nn.functional.pad(torch.ones_like(CALIBRATION.input_ids), (0, 5))
    padded = fit(model, PLAN, Calibration(ids, attention_mask=mask), method)
    assert plain.keys() == padded.keys()
    for key in plain:
        torch.testing.assert_close(plain[key], padded[key], atol=1e-4, rtol=1e-3)


def test_nothing_dropped_nothing_changed():
    assert fit(tiny("llama"), DropPlan(), CALIBRATION) == {}
    assert fit(tiny("llama"), PLAN, CALIBRATION, "none") == {}


@pytest.mark.parametrize("method", ["refit", "mean"])
def test_corrections_of_single_layers_add_up(method):
    model = tiny("llama")
    found = corrections(model, CALIBRATION, ("attn", "mlp"), method)
    assert set(found["mlp", 2]) == {("attn", 2)} and ("attn", 0) not in found
    for plan in (DropPlan(attn=[0, 1, 3]), DropPlan(mlp=[2, 4])):
        changes, expected = combined(found, plan), fit(model, plan, CALIBRATION, method)
        assert changes.keys() == expected.keys() and changes
        for at, change in changes.items():
            torch.testing.assert_close(change, expected[at])
        assert shared_or_fit(model, plan, CALIBRATION, method, {method: found}.get).keys() == expected.keys()
    some = corrections(model, CALIBRATION, method=method, layers=[1, 3])
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
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    torch.testing.assert_close(logits(again), expected, atol=1e-5, rtol=0)


def test_a_fill_is_not_saved(tmp_path):
    model, plan = tiny("llama"), DropPlan(attn=[2])
    with compensated(model, plan, fit(model, plan, CALIBRATION, "linear")):
        with pytest.raises(ValueError, match="no checkpoint holds it"):
            llmdrop.save_model(model, None, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("method", ["refit", "mean"])
@pytest.mark.parametrize("family", sorted(REFUSED))
def test_architectures_that_refit_cannot_serve(family, method):
    with pytest.raises(ValueError, match="cannot refit layer 0.*nor add a mean"):
        fit(tiny(family), PLAN, CALIBRATION, method)


def test_errors(tmp_path):
    model = tiny("llama")
    with pytest.raises(ValueError, match="not one of none, mean"):
        fit(model, PLAN, CALIBRATION, "average")
    with pytest.raises(ValueError, match="add modules"):
        compensate(model, PLAN, fit(model, PLAN, CALIBRATION, "linear"))
    with pytest.raises(ValueError, match="those that do: mean, refit, sink mean"):
        corrections(model, CALIBRATION, method="mean in turn")
    blocks = compensate(tiny("llama"), GAPS["blocks"], fit(model, GAPS["blocks"], CALIBRATION, "mean"))
    blocks.save_pretrained(tmp_path)  # an ordinary config, as far as stock classes can tell
    for read in (load, open_checkpoint):
        with pytest.raises(ValueError, match="write the model with llmdrop.save_model"):
            read(tmp_path)
    with pytest.raises(ValueError, match="fills gaps of single sublayers"):
        fit(model, WHOLE_BLOCK, CALIBRATION, "linear")
    with pytest.raises(ValueError, match="out of range"):
        fit(model, DropPlan(attn=[9]), CALIBRATION)
    with pytest.raises(ValueError, match="at least 4 calibration samples"):
        fit(model, PLAN, Calibration(random_ids(3, 8)))
    with dropped(model, PLAN), pytest.raises(ValueError, match="dropped already"):
        fit(model, PLAN, CALIBRATION)
