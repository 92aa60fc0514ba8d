"""A variant does what its parts do, together; and whatever happens, the model is restored bit for bit."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import random_ids, tiny

from llmdrop import Calibration, DropPlan, dropped, predict_speed
from llmdrop import prune as prune_module
from llmdrop.compress import reconstruction as reconstruction_module
from llmdrop.compress import windows as windows_module
from llmdrop.compress.four_bits import FourBits
from llmdrop.compress.healing import Healing
from llmdrop.compress.reconstruction import Reconstruction, fit, reconstructed
from llmdrop.compress.variant import Variant
from llmdrop.compress.wanda import WandaMask, wanda, zeroed
from llmdrop.compress.windows import Windows, windowed

TEXT = Calibration(random_ids(8, 24))
OTHER = Calibration(random_ids(8, 24, seed=1))
PLAN = DropPlan(attn=[1, 3], mlp=[2])
IDS = random_ids(2, 20, seed=5)
IN_4_BITS = {"hidden_size": 64, "intermediate_size": 64}  # whole groups of 64 weights


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def state(model) -> tuple:
    """Everything of a model that a variant might change: modules, their attributes and hooks, every bit, the config."""
    modules = {}
    for name, module in model.named_modules():
        attributes = {key: id(value) for key, value in vars(module).items() if not key.startswith("_")}
        hooks = [len(module._forward_pre_hooks), len(module._forward_hooks)]
        modules[name] = (id(module), module.training, getattr(module, "layer_idx", None), attributes, hooks)
    parameters = {
        name: (id(value), value.data_ptr(), value.requires_grad, value.detach().clone().view(torch.uint8))
        for name, value in model.state_dict(keep_vars=True).items()
    }
    return modules, parameters, json.dumps(model.config.to_dict(), default=str), sorted(vars(model.config))


def assert_same(before: tuple, after: tuple) -> None:
    assert before[0] == after[0]
    assert before[1].keys() == after[1].keys()
    for name, (*facts, bits) in before[1].items():
        assert facts == list(after[1][name][:-1]), name
        assert bits.equal(after[1][name][-1]), name
    assert before[2:] == after[2:]


def variants() -> dict[str, Variant]:
    """Every part alone, and those that go together."""
    windows = Windows((0, 4), window=4, sinks=1)
    least_squares = Reconstruction(TEXT)
    return {
        "whole": Variant(),
        "plan": Variant(PLAN),
        "blocks": Variant(DropPlan([1], [1])),
        "least squares": Variant(PLAN, least_squares),
        "sequential": Variant(PLAN, Reconstruction(TEXT, "sequential least squares")),
        "mean": Variant(PLAN, Reconstruction(TEXT, "mean")),
        "windows": Variant(windows=windows),
        "mask": Variant(mask=WandaMask(0.4, TEXT)),
        "plan, windows": Variant(PLAN, windows=windows),
        "reconstructed, windows": Variant(PLAN, least_squares, windows),
        "plan, mask, windows": Variant(PLAN, windows=windows, mask=WandaMask(0.4, TEXT)),
    }


EACH = sorted(variants())


# ---- what is applied


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "opt", "olmo2", "gemma2", "gpt_neox"])
def test_parts_are_applied_and_undone_in_every_family(family):
    model = tiny(family, "sdpa")
    before = state(model)
    whole = logits(model)
    mask = WandaMask(0.4, TEXT)
    with Variant(PLAN, mask=mask).applied(model) as masked:
        both = logits(masked)
    assert_same(before, state(model))
    with zeroed(model, wanda(model, TEXT, 0.4)), dropped(model, PLAN):
        assert both.equal(logits(model))
    with Variant(PLAN).applied(model):
        plain = logits(model)
    with dropped(model, PLAN):
        assert plain.equal(logits(model))
    assert len({value.sum().item() for value in (whole, both, plain)}) == 3
    with Variant().applied(model):
        assert whole.equal(logits(model))
    assert_same(before, state(model))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "opt"])
@pytest.mark.parametrize("method", reconstruction_module.METHODS)
def test_reconstruction_and_windows_together(family, method):
    model = tiny(family, "sdpa")
    before = state(model)
    windows = Windows((0, 4), window=4, sinks=1)
    with Variant(PLAN, Reconstruction(TEXT, method), windows).applied(model):
        both = logits(model)
    assert_same(before, state(model))
    with reconstructed(model, PLAN, fit(model, PLAN, TEXT, method)):
        alone = logits(model)
        with windowed(model, [0, 4], 4, 1):
            torch.testing.assert_close(both, logits(model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(both, alone, atol=1e-3)


def test_a_plan_of_4_bits():
    pytest.importorskip("bitsandbytes")
    model = tiny("llama", "sdpa", **IN_4_BITS)
    before = state(model)
    whole = logits(model)
    four_bits = FourBits()
    with four_bits.applied(model):
        rounded = logits(model)
        with dropped(model, PLAN):
            expected = logits(model)
    with Variant(PLAN, four_bits=four_bits).applied(model):
        assert logits(model).equal(expected)
    with Variant(PLAN, four_bits=four_bits, windows=Windows((0,), 4)).applied(model):
        assert not logits(model).equal(expected)
    assert not rounded.equal(whole)
    assert_same(before, state(model))


def test_healing_starts_from_the_reconstruction(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setenv("LLMDROP_BUILD", str(tmp_path))
    model = tiny("llama", "sdpa")
    before = state(model)
    healing = Healing(TEXT, learning_rate=1e-2)
    with Variant(PLAN, healing=healing).applied(model):
        healed = logits(model)
    with Variant(PLAN, Reconstruction(TEXT), healing=healing).applied(model):
        both = logits(model)
    with dropped(model, PLAN):
        plain = logits(model)
    assert len({value.sum().item() for value in (healed, both, plain)}) == 3
    assert_same(before, state(model))
    kept = len(list((tmp_path / "healed").iterdir()))
    with Variant(PLAN, healing=healing).applied(model):  # trained once
        torch.testing.assert_close(logits(model), healed)
    assert kept == len(list((tmp_path / "healed").iterdir())) == 2


@pytest.mark.parametrize("name", EACH)
def test_generation_inside_and_after(name):
    """A variant's cache has its own slots; the whole model's generation is what it was."""
    model = tiny("llama", "sdpa")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    before = model.generate(IDS, **options)
    with Variant(**parts(variants()[name])).applied(model):
        cached = model.generate(IDS[:1], **options)
        uncached = model.generate(IDS[:1], use_cache=False, **options)
        assert cached.equal(uncached)
    assert model.generate(IDS, **options).equal(before)


# ---- what is restored


def parts(variant: Variant) -> dict:
    return {field.name: getattr(variant, field.name) for field in dataclasses.fields(variant)}


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_restored_when_the_block_fails(family, name):
    model = tiny(family, "sdpa")
    before = state(model)
    variant = variants()[name]
    with pytest.raises(KeyError, match="inside"), variant.applied(model):
        raise KeyError("inside")
    assert_same(before, state(model))
    with variant.applied(model), variant.applied(model) if variant.is_plan_only else Variant().applied(model):
        logits(model)
    assert_same(before, state(model))


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_restored_wherever_entering_fails(family, name, monkeypatch):
    """Every single step of a change is made to fail, one after the other, just before it is done and just after."""
    model = tiny(family, "sdpa")
    variant = variants()[name]
    with variant.applied(model):
        pass  # what is fitted is remembered
    before = state(model)
    original = prune_module.put
    for failing, late in ((k // 2, k % 2 == 1) for k in itertools.count()):
        steps = itertools.count()

        def failing_put(undo, owner, attribute, value, steps=steps, failing=failing, late=late):
            fails = next(steps) == failing
            if fails and not late:
                raise InterruptedError
            original(undo, owner, attribute, value)
            if fails:
                raise InterruptedError

        with monkeypatch.context() as patch:
            for module in (prune_module, reconstruction_module, windows_module):
                patch.setattr(module, "put", failing_put)
            try:
                with variant.applied(model):
                    logits(model)
                failed = False
            except InterruptedError:
                failed = True
        assert_same(before, state(model))
        if not failed:
            break
    assert next(steps) <= failing
    assert failing > 0 or name in ("whole", "mask")


@pytest.mark.parametrize("part", ["four_bits", "mask", "windows", "reconstruction", "plan"])
def test_restored_when_a_later_part_refuses(part):
    """The parts before it are in place when it refuses."""
    model = tiny("llama", "sdpa")
    before = state(model)
    refusing = {
        "four_bits": Variant(four_bits=FourBits()),  # widths that are no whole groups
        "mask": Variant(mask=WandaMask(0.3, Calibration(torch.full((1, 4), 10**6)))),
        "windows": Variant(PLAN, Reconstruction(TEXT), Windows((1,), 4)),  # of a dropped layer
        "reconstruction": Variant(PLAN, Reconstruction(Calibration(random_ids(2, 8)))),  # too few samples
        "plan": Variant(DropPlan(range(5), range(5)), mask=WandaMask(0.3, TEXT)),
    }
    if part == "four_bits":
        pytest.importorskip("bitsandbytes")
    with pytest.raises((ValueError, IndexError)), refusing[part].applied(model):
        pass
    assert_same(before, state(model))


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_nested_in_any_order_and_undone(data):
    """Variants that go together, one inside the other, in both orders of entering: the same model, and restored."""
    model = tiny("llama", "sdpa")
    layers = st.sets(st.integers(0, 4), max_size=2)
    plan = DropPlan(data.draw(layers), data.draw(layers))
    windows = Windows(tuple(data.draw(layers) - set(plan.attn)), window=data.draw(st.integers(1, 8)))
    mask = WandaMask(data.draw(st.floats(0, 0.6)), TEXT) if data.draw(st.booleans()) else None
    before = state(model)
    with Variant(plan, windows=windows, mask=mask).applied(model):
        together = logits(model)
    with Variant(mask=mask).applied(model), Variant(plan).applied(model), Variant(windows=windows).applied(model):
        assert together.equal(logits(model))
    assert_same(before, state(model))


# ---- names, keys, speed


def test_keys_tell_variants_apart_and_are_plain_json():
    windows = Windows((0, 4), 4)
    distinct = [
        *variants().values(),
        Variant(PLAN, Reconstruction(OTHER)),
        Variant(windows=Windows((0, 4), 8, 1)),
        Variant(windows=Windows((0, 4), 4, 2)),
        Variant(windows=Windows((0, 3), 4, 1)),
        Variant(mask=WandaMask(0.5, TEXT)),
        Variant(mask=WandaMask(0.4, OTHER)),
        Variant(mask=WandaMask(0.4, TEXT, sequential=False)),
        Variant(four_bits=FourBits()),
        Variant(four_bits=FourBits(group_size=128)),
        Variant(four_bits=FourBits(unpacked=True)),
        Variant(PLAN, four_bits=FourBits()),
        Variant(DropPlan(attn=[1, 3])),
        Variant(DropPlan(mlp=[1, 3])),
    ]
    keys = [json.dumps(variant.key, sort_keys=True) for variant in distinct]
    assert len(set(keys)) == len(distinct)
    same = {
        "name": (Variant(PLAN, name="ours"), Variant(PLAN)),
        "depth": (Variant(DropPlan([1], n_layers=5)), Variant(DropPlan([1]))),
        "order": (Variant(windows=Windows((4, 0), 4)), Variant(windows=windows)),
        "source": (
            Variant(PLAN, Reconstruction(dataclasses.replace(TEXT, source="another name"))),
            Variant(PLAN, Reconstruction(TEXT)),
        ),
    }
    for what, (one, other) in same.items():
        assert one.key == other.key, what


def test_healing_has_a_key_of_its_own():
    pytest.importorskip("peft")
    healings = [Healing(TEXT), Healing(OTHER), Healing(TEXT, rank=4), Healing(TEXT, loss="perplexity")]
    keys = {json.dumps(Variant(PLAN, healing=healing).key, sort_keys=True) for healing in healings}
    assert len(keys) == 4


def test_labels():
    assert Variant().label == "Baseline" and Variant(PLAN).label == "Joint-3"
    assert Variant(PLAN, name="ours").label == "ours"
    assert Variant(PLAN, Reconstruction(TEXT), Windows((0, 4), 4)).label == "Joint-3, least squares, 2 windows of 4"
    assert Variant(windows=Windows((0, 4), 4)).label == "2 windows of 4"
    assert Variant(mask=WandaMask(0.4, TEXT)).label == "Wanda 40 %"


def test_parts_that_exclude_each_other_are_refused():
    for wrong in (
        {"four_bits": FourBits(), "reconstruction": Reconstruction(TEXT), "plan": PLAN},
        {"four_bits": FourBits(), "mask": WandaMask(0.4, TEXT)},
        {"mask": WandaMask(0.4, TEXT), "reconstruction": Reconstruction(TEXT), "plan": PLAN},
        {"reconstruction": Reconstruction(TEXT)},
        {"healing": Healing(TEXT)},
    ):
        with pytest.raises(ValueError, match="cannot be|drops none|fill"):
            Variant(**wrong)


def test_is_plan_only():
    assert [name for name, variant in sorted(variants().items()) if variant.is_plan_only] == ["blocks", "plan", "whole"]
    assert not Variant(four_bits=FourBits()).is_plan_only and not Variant(PLAN, healing=Healing(TEXT)).is_plan_only


def test_predicted_speed_is_that_of_what_is_done():
    model = tiny("llama")
    speed = {"batch_size": 4, "prompt_len": 64, "new_tokens": 8}
    whole = predict_speed(model, **speed)
    assert Variant().speed_limit(model, **speed) == whole and Variant().predicted_speedup(model, **speed) == 1
    assert Variant(PLAN).speed_limit(model, **speed) == predict_speed(model, PLAN, **speed)
    windows = Windows((0, 4), window=6, sinks=2)
    expected = predict_speed(model, PLAN, windowed=2, window=8, **speed)
    assert Variant(PLAN, Reconstruction(TEXT), windows).speed_limit(model, **speed) == expected
    assert Variant(mask=WandaMask(0.4, TEXT)).speed_limit(model, **speed) == whole
    four_bits = Variant(four_bits=FourBits())
    assert four_bits.speed_limit(model, **speed) == predict_speed(model, weight_bits=4.5, **speed)
    assert four_bits.predicted_speedup(model, **speed) == whole.seconds / four_bits.speed_limit(model, **speed).seconds


def test_shape_is_what_speed_depends_on():
    same = [Variant(DropPlan([0], [1])), Variant(DropPlan([3], [2])), Variant(DropPlan([3], [2]), Reconstruction(TEXT))]
    assert len({str(variant.shape) for variant in same}) == 1
    others = [Variant(DropPlan([3], [3])), Variant(DropPlan([3])), Variant(windows=Windows((1,), 4)), Variant()]
    others += [Variant(windows=Windows((1, 2), 4)), Variant(windows=Windows((1,), 5)), Variant(four_bits=FourBits())]
    assert len({str(variant.shape) for variant in [*same, *others]}) == 1 + len(others)


def test_numbers_of_numpy_make_the_same_key():
    layers = np.argsort([0.2, 0.1, 0.3])[:2]
    numpy_windows = Windows(tuple(layers), np.int64(3), np.int32(1))
    assert json.dumps(Variant(windows=numpy_windows).key) == json.dumps(Variant(windows=Windows((0, 1), 3, 1)).key)
    text = Calibration(random_ids(4, 9))
    masks = [Variant(mask=WandaMask(share, text)) for share in (np.float64(0.5), 0.5)]
    assert json.dumps(masks[0].key) == json.dumps(masks[1].key)


@pytest.mark.parametrize("layers", [("a",), (1.5,), (-1,), (True,)])
def test_windows_of_no_layers_are_refused(layers):
    with pytest.raises(ValueError, match="expected 0-based layer indices"):
        Windows(layers)


@pytest.mark.parametrize("window, sinks", [(0, 4), (-3, 4), (2.5, 4), (3, -1), (3, None)])
def test_windows_of_no_size_are_refused(window, sinks):
    with pytest.raises(ValueError, match="must be at least 1 token"):
        Windows((1,), window, sinks)
