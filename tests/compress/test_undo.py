"""Each part's context manager restores the model on every path: wherever entering fails, inside, and nested."""

import copy
import itertools

import pytest
import torch
from test_variant import IN_4_BITS, PLAN, TEXT, assert_same, logits, state
from tiny import tiny

from llmdrop import DropPlan, dropped, prune
from llmdrop.checkpoints import four_bits as rounding
from llmdrop.compress import awq, four_bits, reconstruction, wanda, windows
from llmdrop.compress.four_bits import FourBits
from llmdrop.compress.healing import Healing
from llmdrop.compress.reconstruction import fit, reconstruct, reconstructed
from llmdrop.compress.wanda import zeroed
from llmdrop.compress.windows import windowed


def build(name: str, model):
    """A function that enters the context manager; what is fitted, found or trained for it is ready."""
    if name in ("least squares", "mean"):
        changes = fit(model, PLAN, TEXT, name)
        return lambda: reconstructed(model, PLAN, changes)
    if name == "windows":
        return lambda: windowed(model, [0, 4], 4, 1)
    if name == "mask":
        zeros = wanda.wanda(model, TEXT, 0.4)
        return lambda: zeroed(model, zeros)
    if name == "healing":
        pytest.importorskip("peft")
        healing, changes = Healing(TEXT), fit(model, PLAN, TEXT, "mean")
        healing.losses(model, PLAN, changes)  # trains
        return lambda: healing.applied(model, PLAN, changes)
    if name == "AWQ":
        return lambda: FourBits("awq", calibration=TEXT, tokenizer=object()).applied(model)
    pytest.importorskip("bitsandbytes")
    return lambda: FourBits(unpacked=name == "4 bits, unpacked").applied(model)


EACH = ["least squares", "mean", "windows", "mask", "healing", "AWQ", "4 bits", "4 bits, unpacked"]
# every function that changes something, as the parts call it, and says how to undo it
STEPS = [
    *((module, "put") for module in (prune, reconstruction, windows, four_bits, rounding)),
    (wanda, "_zero"),
]
HOOK = (torch.nn.Module, "register_forward_pre_hook")  # returns what undoes it: nothing fails just after


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMDROP_BUILD", str(tmp_path))
    model = tiny("llama", "sdpa", **IN_4_BITS)
    rounded = tiny("llama", "sdpa", seed=1, **IN_4_BITS)  # for what `awq_once` would read
    rounded.config.quantized_by = "llmcompressor"
    monkeypatch.setattr(awq, "awq_once", lambda *settings: copy.deepcopy(rounded))
    return model


def failing_at(monkeypatch, n: int, late: bool) -> itertools.count:
    """Make the n-th step fail just before it is done, or just after; returns what counts the steps."""
    steps = itertools.count()

    def wrapped(original):
        def step(*args, **kwargs):
            fails = next(steps) == n
            if fails and not late:
                raise InterruptedError
            out = original(*args, **kwargs)
            if fails:
                raise InterruptedError
            return out

        return step

    for owner, name in STEPS if late else [*STEPS, HOOK]:
        monkeypatch.setattr(owner, name, wrapped(getattr(owner, name)))
    return steps


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", EACH)
def test_restored_wherever_entering_fails(name, late, model, monkeypatch):
    enter = build(name, model)
    before = state(model)
    for n in itertools.count():
        with monkeypatch.context() as patch:
            failing_at(patch, n, late)
            try:
                with enter():
                    failed = False
                    logits(model)
            except InterruptedError:
                failed = True
        assert_same(before, state(model))
        if not failed:
            break
    assert n > 1, "no step was made to fail"


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("method", ["least squares", "mean"])
def test_reconstruction_in_place_is_whole_or_not_at_all(method, late, model, monkeypatch):
    changes = fit(model, PLAN, TEXT, method)
    with reconstructed(model, PLAN, changes):
        expected = logits(model)
    before = state(model)
    for n in itertools.count():
        with monkeypatch.context() as patch:
            failing_at(patch, n, late)
            try:
                reconstruct(model, PLAN, changes)
                break
            except InterruptedError:
                pass
        assert_same(before, state(model))
    assert n > 1 and torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", EACH)
def test_restored_when_the_block_fails(name, model):
    enter = build(name, model)
    before, whole = state(model), logits(model)
    with pytest.raises(KeyError, match="inside"), enter():
        assert not torch.equal(logits(model), whole)
        raise KeyError("inside")
    assert_same(before, state(model))


@pytest.mark.parametrize("inner, outer", list(itertools.permutations(["drop", "windows", "mask", "least squares"], 2)))
def test_nested_they_come_off_one_by_one(inner, outer, model):
    ready = {
        "drop": lambda: dropped(model, DropPlan(mlp=[4])),
        "least squares": build("least squares", model),
        "windows": build("windows", model),
        "mask": build("mask", model),
    }
    before = state(model)
    with ready[outer]():
        between = state(model)
        with pytest.raises(KeyError), ready[inner]():
            raise KeyError
        assert_same(between, state(model))
        with ready[inner]():
            logits(model)
        assert_same(between, state(model))
    assert_same(before, state(model))
