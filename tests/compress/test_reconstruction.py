"""Reconstruction brings the dropped model nearer to the whole one, is restored, saved and loaded like any weights."""

import numpy as np
import pytest
import torch
from exports import record
from tiny import FAMILIES, random_ids, tiny
from transformers import AutoModelForCausalLM

import llmdrop
from llmdrop import Calibration, DropPlan, apply_plan, dropped, find_anatomy
from llmdrop.checkpoints import four_bits
from llmdrop.checkpoints.load import load_weights
from llmdrop.compress import reconstruction
from llmdrop.compress.reconstruction import (
    METHODS,
    Change,
    Reconstruction,
    combined,
    corrections,
    fit,
    reconstruct,
    reconstructed,
)
from llmdrop.streaming.drop import drop_checkpoint
from llmdrop.streaming.score import score_checkpoint
from llmdrop.streaming.shards import open_checkpoint

LEAST_SQUARES = ("least squares", "sequential least squares")
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
def test_least_squares_change_what_is_predicted_and_are_restored(family, plan):
    model = tiny(family)
    dense, state = logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    with dropped(model, plan):
        plain = divergence(dense, logits(model))
    left = {}
    for method in LEAST_SQUARES:
        changes = fit(model, plan, CALIBRATION, method)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items()), "fit changed it"
        with reconstructed(model, plan, changes):
            left[method] = divergence(dense, logits(model))
        assert torch.equal(logits(model), dense), "not restored"
    # nearer to the stream at a gap, see below, need not be nearer to a random model's predictions
    assert left["least squares"] != plain != left["sequential least squares"]


@pytest.mark.parametrize("method, gaps", [("least squares", [4]), ("sequential least squares", [2, 4])])
@pytest.mark.parametrize("family", SERVED)
def test_least_squares_fill_the_gap(family, method, gaps):
    model, plan = tiny(family), DropPlan(attn=gaps)
    ids = CALIBRATION.input_ids  # random text: little of an attention layer can be told from the MLP before it
    changes, streams = fit(model, plan, CALIBRATION, method), []
    parts = find_anatomy(model)
    last = parts.layers[4].get_submodule(next(iter(parts.sublayer("mlp", 4).stubs)))  # reads the stream after the gap
    handle = last.register_forward_pre_hook(lambda module, args: streams.append(args[0].reshape(-1, args[0].shape[-1])))
    logits(model, ids)
    with dropped(model, plan):
        logits(model, ids)
    with reconstructed(model, plan, changes):
        logits(model, ids)
    handle.remove()
    whole, plain, rebuilt = streams
    assert (rebuilt - whole).square().mean() < 0.99 * (plain - whole).square().mean()


@pytest.mark.parametrize("gap", GAPS)
def test_constant_sublayers_are_replaced_exactly_by_their_mean(gap):
    model, plan = tiny("opt"), GAPS[gap]
    for i, layer in enumerate(model.model.decoder.layers):
        for matrix in [layer.self_attn.out_proj] * (i in plan.attn) + [layer.fc2] * (i in plan.mlp):
            matrix.weight.data.zero_()  # its bias is all it adds
    dense = logits(model)
    with reconstructed(model, plan, fit(model, plan, CALIBRATION, "mean")):
        torch.testing.assert_close(logits(model), dense, atol=1e-4, rtol=0)


def streams_after(model, i: int) -> torch.Tensor:
    """[B, T, C] on the calibration text: what the first layer that is left from layer i on reads."""
    layer = next(layer for layer in find_anatomy(model).layers[i:] if layer is not None)
    found = []
    handle = layer.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    logits(model, CALIBRATION.input_ids)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("plan", [DropPlan(attn=[1, 3], mlp=[3]), GAPS["blocks"]], ids=["two gaps", "one"])
@pytest.mark.parametrize("family", SERVED)
def test_a_mean_brings_back_the_mean_of_the_stream(family, plan):
    model, end = tiny(family), max(plan.blocks) + 1  # where the last gap ends
    whole = streams_after(model, end)
    weight = 1 / whole.square().mean(-1, keepdim=True)

    def lacks(changes) -> float:
        with reconstructed(model, plan, changes):
            return float((weight * (whole - streams_after(model, end))).mean((0, 1)).norm() / weight.mean())

    changes = fit(model, plan, CALIBRATION, "mean")
    assert {change.bias.shape for change in changes.values()} == {(32,)}
    assert all(change.weight is None for change in changes.values())
    plain, left = lacks({}), lacks(changes)
    one = len(changes) == 1  # with more, it does not see what the gaps above did to the last one's input
    assert (left < 1e-4 * plain) == one, f"{left} of {plain}"


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("family", SERVED)
def test_means_are_restored_saved_and_loaded(family, gap, tmp_path):
    model, plan, former = tiny(family), GAPS[gap], tiny(family)
    dense, changes = logits(model), fit(model, plan, CALIBRATION, "mean")
    with reconstructed(model, plan, changes):
        expected = logits(model)
        llmdrop.save_model(model, None, tmp_path / "within")
    assert torch.equal(logits(model), dense) and record(model) == record(former)
    for mine, stock in zip(model.modules(), former.modules(), strict=True):
        assert mine._parameters.keys() == stock._parameters.keys()
        assert [p is None for p in mine._parameters.values()] == [p is None for p in stock._parameters.values()]
    reconstruct(model, plan, changes)
    assert torch.equal(logits(model), expected)
    biases = record(model).get("biases", [])
    assert len(biases) == (0 if family in BIASED else len(changes))
    assert len(model.state_dict()) == len(apply_plan(former, plan).state_dict()) + len(biases)
    llmdrop.save_model(model, None, tmp_path / "after")
    for parameter in model.parameters():  # nothing of the files may depend on the model in memory
        parameter.data.zero_()
    for path in (tmp_path / "within", tmp_path / "after"):
        theirs = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, attn_implementation="eager")
        for loaded in (theirs.eval(), load(path)):
            torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=0)
            assert record(loaded).get("biases", []) == biases
    if biases:  # also where only whole blocks are gone
        with pytest.raises(Exception, match="llmdrop.load_model"):
            type(model).from_pretrained(tmp_path / "after")


def load(path):
    return load_weights(path, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.mark.parametrize("by", ["memory", "transformers", "disk"])
def test_dropping_more_keeps_the_biases_of_what_stays(by, tmp_path):
    model, more = tiny("llama"), DropPlan(attn=[4], mlp=[2])
    reconstruct(model, PLAN, fit(model, PLAN, CALIBRATION, "mean"))
    assert record(model)["biases"] == [[0, "mlp.down_proj"], [2, "mlp.down_proj"]]
    with dropped(model, more):
        expected = logits(model)
        assert record(model)["biases"] == [[0, "mlp.down_proj"]]
    assert len(record(model)["biases"]) == 2
    llmdrop.save_model(model, None, tmp_path / "once")
    if by == "disk":
        path = drop_checkpoint(tmp_path / "once", more, tmp_path / "twice", progress=False)
    else:
        if by == "transformers":
            model = AutoModelForCausalLM.from_pretrained(tmp_path / "once", trust_remote_code=True)
        path = llmdrop.save_model(apply_plan(model, more), None, tmp_path / "twice")
    loaded = load(path)
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=0)
    assert record(loaded)["biases"] == [[0, "mlp.down_proj"]] and find_anatomy(loaded).plan == PLAN | more
    assert llmdrop.weights_digest(loaded) != llmdrop.weights_digest(apply_plan(tiny("llama"), PLAN | more))


def test_a_checkpoint_with_biases_is_scored_layer_by_layer(tmp_path):
    model = tiny("llama")
    reconstruct(model, PLAN, fit(model, PLAN, CALIBRATION, "mean"))
    llmdrop.save_model(model, None, tmp_path / "model")
    settings = {"progress": False, "work_dir": tmp_path / "work", "device": "cpu"}
    streamed = score_checkpoint(tmp_path / "model", CALIBRATION, **settings)
    expected = llmdrop.score(model, CALIBRATION, progress=False)
    for kind in ("attn", "mlp"):
        np.testing.assert_allclose(getattr(streamed, kind), getattr(expected, kind), atol=1e-6)


@pytest.mark.parametrize("first", ["mean", "4 bits"])
def test_biases_and_4_bits(first, tmp_path):
    pytest.importorskip("bitsandbytes")
    model = tiny("llama", hidden_size=64, intermediate_size=128)
    changes = fit(model, PLAN, CALIBRATION, "mean")
    if first == "4 bits":
        four_bits.quantize(model)
    reconstruct(model, PLAN, changes)
    if first == "mean":
        four_bits.quantize(model)
    expected = logits(model)
    llmdrop.save_model(model, None, tmp_path / "model")
    loaded = load(tmp_path / "model")
    four_bits.settle(loaded)  # as load_model does
    assert torch.equal(logits(loaded), expected) and len(record(loaded)["biases"]) == 2
    assert torch.allclose(logits(four_bits.dequantize(loaded)), expected, atol=1e-5)


def assert_same(one: Change, other: Change, **tolerances) -> None:
    for name in ("weight", "bias"):
        mine, theirs = getattr(one, name), getattr(other, name)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, **tolerances)


@pytest.mark.parametrize("side", [(0, 5), (5, 0)], ids=["right", "left"])
@pytest.mark.parametrize("method", METHODS)
def test_padding_does_not_count(method, side):
    model = tiny("llama")
    plain = fit(model, PLAN, CALIBRATION, method)
    ids = torch.nn.functional.pad(CALIBRATION.input_ids, side, value=7)
    mask = torch.nn.functional.pad(torch.ones_like(CALIBRATION.input_ids), side)
    padded = fit(model, PLAN, Calibration(ids, attention_mask=mask), method)
    assert plain.keys() == padded.keys()
    for place in plain:
        assert_same(plain[place], padded[place], atol=1e-4, rtol=1e-3)


def test_nothing_dropped_nothing_changed():
    assert fit(tiny("llama"), DropPlan(), CALIBRATION) == {}
    assert Reconstruction(CALIBRATION).changes(tiny("llama"), DropPlan()) == {}


@pytest.mark.parametrize("method", ["least squares", "mean"])
def test_corrections_of_single_layers_add_up(method):
    model = tiny("llama")
    found = corrections(model, CALIBRATION, ("attn", "mlp"), method)
    assert set(found["mlp", 2]) == {("attn", 2)} and ("attn", 0) not in found
    for plan in (DropPlan(attn=[0, 1, 3]), DropPlan(mlp=[2, 4])):
        changes, expected = combined(found, plan), fit(model, plan, CALIBRATION, method)
        assert changes.keys() == expected.keys() and changes
        for place, change in changes.items():
            assert_same(change, expected[place])
    some = corrections(model, CALIBRATION, method=method)
    assert some.keys() == {("attn", i) for i in range(1, 5)}
    for sublayer, changes in some.items():
        for place, change in changes.items():
            assert_same(change, found[sublayer][place])


@pytest.fixture
def passes(monkeypatch) -> list:
    """The kinds of sublayers of every pass of `corrections`, in order."""
    kinds = []

    def counted(model, calibration, kinds_, *settings):
        kinds.append(tuple(kinds_))
        return corrections(model, calibration, kinds_, *settings)

    monkeypatch.setattr(reconstruction, "corrections", counted)
    return kinds


@pytest.mark.parametrize("method", METHODS)
def test_one_pass_serves_all_plans_of_attention_layers(method, passes):
    model, one = tiny("llama"), Reconstruction(CALIBRATION, method)
    for plan in (PLAN, DropPlan(attn=[2, 3, 4]), WHOLE_BLOCK):
        expected = fit(model, plan, CALIBRATION, method)
        changes = one.changes(model, plan)
        assert changes.keys() == expected.keys() and changes
        for place, change in changes.items():
            assert_same(change, expected[place])
    assert passes == ([] if method == "sequential least squares" else [("attn",)])


def test_a_remembered_pass_is_that_of_the_model_and_its_weights(passes):
    model, one = tiny("llama"), Reconstruction(CALIBRATION, "mean")
    both = one.corrections(model, ("attn", "mlp"))
    assert one.corrections(model) is both and one.corrections(model, ["mlp"]) is both
    former = one.changes(model, PLAN)
    assert passes == [("attn", "mlp")]
    model.model.layers[1].self_attn.o_proj.weight.data.mul_(2)  # nothing tells autograd of this
    changes = one.changes(model, PLAN)
    assert not torch.equal(changes["mlp", 0].bias, former["mlp", 0].bias)
    assert_same(changes["mlp", 0], fit(model, PLAN, CALIBRATION, "mean")["mlp", 0])
    other = tiny("llama", seed=1)
    assert not torch.equal(one.changes(other, PLAN)["mlp", 0].bias, former["mlp", 0].bias)
    assert len(passes) == 3 and len(one._passes) == 2
    del other
    assert len(one._passes) == 1, "a model that is gone is forgotten"


def test_the_last_fit_is_remembered_for_its_model_weights_and_plan(monkeypatch):
    fitted = []
    monkeypatch.setattr(reconstruction, "fit", lambda *settings: fitted.append(settings[:2]) or fit(*settings))
    model, one = tiny("llama"), Reconstruction(CALIBRATION, "sequential least squares")
    changes = one.changes(model, PLAN)
    assert one.changes(model, PLAN) is changes and len(fitted) == 1
    assert one.changes(model, WHOLE_BLOCK).keys() != changes.keys() and len(fitted) == 2
    model.model.layers[1].self_attn.o_proj.weight.data.mul_(2)
    again = one.changes(model, WHOLE_BLOCK)
    assert one.changes(tiny("llama", seed=1), WHOLE_BLOCK) is not again and len(fitted) == 4
    with pytest.raises(ValueError, match="made for a model of 6 layers"):
        one.changes(model, DropPlan(WHOLE_BLOCK.attn, WHOLE_BLOCK.mlp, n_layers=6))


def test_what_a_reconstruction_is_called_and_keyed_by():
    one = Reconstruction(CALIBRATION, "sequential least squares")
    assert one.label == "sequential least squares"
    assert one.key == {"method": one.label, "text": CALIBRATION.digest, "version": reconstruction.VERSION}
    with pytest.raises(ValueError, match="'refit' is not one of mean, least squares, sequential least squares"):
        Reconstruction(CALIBRATION, "refit")


def test_a_sublayer_that_adds_nothing_needs_no_change():
    model = tiny("llama")
    model.model.layers[3].self_attn.o_proj.weight.data.zero_()
    changes = fit(model, DropPlan(attn=[3]), CALIBRATION)
    assert all(change.weight.abs().max() < 1e-5 for change in changes.values())


def test_a_reconstructed_checkpoint_loads_as_any_other(tmp_path):
    model = tiny("llama")
    changes = fit(model, PLAN, CALIBRATION)
    with reconstructed(model, PLAN, changes):
        expected = logits(model)
    reconstruct(model, PLAN, changes)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)
    llmdrop.save_model(model, None, tmp_path / "model")
    for parameter in model.parameters():  # nothing of the file may depend on the model in memory
        parameter.data.zero_()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    torch.testing.assert_close(logits(again), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["least squares", "mean"])
@pytest.mark.parametrize("family", sorted(REFUSED))
def test_architectures_that_cannot_be_reconstructed(family, method):
    with pytest.raises(ValueError, match="cannot reconstruct at layer 0's attn sublayer.*Drop without reconstruction"):
        fit(tiny(family), PLAN, CALIBRATION, method)


def test_errors(tmp_path):
    model = tiny("llama")
    with pytest.raises(ValueError, match="'average' is not one of mean, least squares, sequential"):
        fit(model, PLAN, CALIBRATION, "average")
    with pytest.raises(ValueError, match="those that do: mean, least squares"):
        corrections(model, CALIBRATION, method="sequential least squares")
    blocks = reconstruct(tiny("llama"), GAPS["blocks"], fit(model, GAPS["blocks"], CALIBRATION, "mean"))
    blocks.save_pretrained(tmp_path)  # no ordinary checkpoint: stock classes have no room for the biases
    assert torch.equal(logits(load(tmp_path)), logits(blocks)) and open_checkpoint(tmp_path)
    one = Reconstruction(CALIBRATION)
    for refuse in (lambda plan: fit(model, plan, CALIBRATION), lambda plan: one.changes(model, plan)):
        with pytest.raises(ValueError, match="out of range"):
            refuse(DropPlan(attn=[9]))
        with pytest.raises(ValueError, match="made for a model of 6 layers, this model has 5"):
            refuse(DropPlan(attn=[1], n_layers=6))
        with pytest.raises(ValueError, match="dropped already"), dropped(model, PLAN):
            refuse(PLAN)
    with pytest.raises(ValueError, match="at least 4 calibration samples.*these are 3"):
        fit(model, PLAN, Calibration(random_ids(3, 8)))


WRONG = {
    "another plan's": (PLAN, {("mlp", 1): Change(torch.zeros(32, 48))}, "change mlp 1, and before the gaps of Attn-2"),
    "a dropped sublayer's": (DropPlan(attn=[2], mlp=[1]), {("mlp", 1): Change(torch.zeros(32, 48))}, "another plan"),
    "a deeper model's": (PLAN, {("mlp", 9): Change(torch.zeros(32, 48))}, "another plan or model"),
    "a wider model's": (PLAN, {("mlp", 0): Change(torch.zeros(32, 64))}, r"weight is \(32, 64\), and \(32, 48\) fits"),
    "a wider model's mean": (PLAN, {("mlp", 0): Change(bias=torch.zeros(64))}, r"bias is \(64,\), and \(32,\) fits"),
    "another depth's": (DropPlan([1], n_layers=6), {}, "made for a model of 6 layers"),
    "no plan's": (DropPlan(), {("mlp", 0): Change(bias=torch.zeros(32))}, "stands nothing"),
    "one right, one wrong": (PLAN, {("mlp", 0): Change(bias=torch.ones(32)), ("mlp", 3): Change()}, "change mlp 3"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_changes_of_something_else_are_refused_before_anything_is_touched(wrong):
    model, (plan, changes, message) = tiny("llama"), WRONG[wrong]
    dense, digest = logits(model), llmdrop.weights_digest(model)
    with pytest.raises(ValueError, match=message):
        reconstruct(model, plan, changes)
    with pytest.raises(ValueError, match=message), reconstructed(model, plan, changes):
        pass
    assert torch.equal(logits(model), dense) and llmdrop.weights_digest(model) == digest
    assert record(model) == record(tiny("llama"))


def test_packed_weights_take_a_mean_and_refuse_least_squares():
    pytest.importorskip("bitsandbytes")
    model = tiny("llama", hidden_size=64, intermediate_size=128)
    changes = fit(model, PLAN, CALIBRATION)
    four_bits.quantize(model)
    expected = logits(model)
    with pytest.raises(ValueError, match="the matrix of mlp 0 is packed .* reconstruct first and quantize afterwards"):
        reconstruct(model, PLAN, changes)
    assert torch.equal(logits(model), expected)
