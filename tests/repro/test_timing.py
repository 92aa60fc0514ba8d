"""Variants are timed in turn, once a shape, stored together; weights do not matter, shapes and settings do."""

import itertools

import numpy as np
import pandas as pd
import pytest
from tiny import random_ids, tiny

from llmdrop import Calibration, DropPlan, Store, measure_speed
from llmdrop.compress.four_bits import FourBits
from llmdrop.compress.reconstruction import Reconstruction
from llmdrop.compress.variant import Variant
from llmdrop.compress.wanda import WandaMask
from llmdrop.compress.windows import Windows
from llmdrop.repro import timing as timing_module
from llmdrop.repro.timing import speedups, timing
from llmdrop.speed import measure

SETTINGS = {"batch_size": 1, "prompt_len": 32, "new_tokens": 4}
FIT = Calibration(random_ids(8, 24))
VARIANTS = {
    "whole": Variant(),
    "one": Variant(DropPlan(attn=[0])),
    "windows": Variant(windows=Windows((1, 2), 4, 1)),
    "other": Variant(DropPlan(attn=[3])),
    "mask": Variant(mask=WandaMask(0.3, FIT)),
    "both": Variant(DropPlan([1]), windows=Windows((0,), 4)),
}


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path)


@pytest.fixture
def timed(monkeypatch) -> list:
    """The names of all models that were timed, in turn."""
    names: list[str] = []
    original = timing_module.time_rounds

    def noted(models, rounds, **settings):
        names.extend(models)
        return original(models, rounds, **settings)

    monkeypatch.setattr(timing_module, "time_rounds", noted)
    return names


def count(store: Store) -> int:
    return len(list(store.root.rglob("*.json")))


def test_a_row_for_each_variant_and_round(store, timed):
    model = tiny("llama", "sdpa")
    rows = timing(model, VARIANTS, rounds=3, store=store, **SETTINGS)
    assert list(zip(rows["variant"], rows["round"], strict=True)) == list(itertools.product(VARIANTS, range(3)))
    assert len(timed) == 5  # "one" and "other" are of one shape
    numbers = ["seconds", "prefill_seconds", "decode_seconds", "kv_bytes", "weight_bytes"]
    assert (rows[numbers] > 0).all(axis=None) and (rows["status"] == "ok").all()
    by_variant = dict(tuple(rows.drop(columns="variant").groupby(rows["variant"])))
    assert by_variant["one"].reset_index(drop=True).equals(by_variant["other"].reset_index(drop=True))
    token = 2 * model.config.num_key_value_heads * model.config.head_dim * 4  # bytes of a layer's token
    kv = {name: set(part["kv_bytes"]) for name, part in by_variant.items()}
    assert kv["whole"] == kv["mask"] == {token * 5 * 36} and kv["one"] == {token * 4 * 36}
    assert kv["windows"] == {token * (3 * 36 + 2 * 4)}  # 3 + 1 tokens stay
    assert kv["both"] == {token * (3 * 36 + 7)}


def test_rounds_are_in_turn(store, monkeypatch):
    """A machine that drifts hits all variants alike: round by round, not variant by variant."""
    order = []
    applied = Variant.applied

    def noted(variant, model):
        order.append(variant.label)
        return applied(variant, model)

    monkeypatch.setattr(Variant, "applied", noted)
    some = {name: VARIANTS[name] for name in ("whole", "one", "windows")}
    timing(tiny("llama", "sdpa"), some, rounds=2, store=store, **SETTINGS)
    assert order == ["Baseline", "Attn-1", "2 windows of 4"] * 2


def test_nothing_is_fitted_to_be_timed(store, monkeypatch):
    """A reconstruction changes no shape: it is timed as dropped."""
    monkeypatch.setattr(Reconstruction, "changes", lambda *arguments: pytest.fail("fitted"))
    plan = DropPlan(attn=[1], mlp=[2])
    some = {"whole": Variant(), "made up": Variant(plan, Reconstruction(FIT)), "plain": Variant(plan)}
    rows = timing(tiny("llama", "sdpa"), some, rounds=1, store=store, **SETTINGS)
    assert set(rows["variant"]) == set(some) and rows["seconds"][1] == rows["seconds"][2]


def test_stored_together_by_shape(store, timed):
    model = tiny("llama", "sdpa")
    rows = timing(model, VARIANTS, rounds=2, store=store, **SETTINGS)
    n_timed = len(timed)
    again = timing(tiny("llama", "sdpa", seed=1), VARIANTS, rounds=2, store=store, **SETTINGS)  # other weights
    pd.testing.assert_frame_equal(again, rows)
    renamed = {name.upper(): variant for name, variant in VARIANTS.items()} | {"ONE": Variant(DropPlan(attn=[2]))}
    assert list(timing(model, renamed, rounds=2, store=store, **SETTINGS)["seconds"]) == list(rows["seconds"])
    assert len(timed) == n_timed and count(store) == 1


@pytest.mark.parametrize("what", ["rounds", "batch_size", "prompt_len", "timed_steps", "variants", "version", "shapes"])
def test_keys_differ_by_what_matters(store, timed, monkeypatch, what):
    model = tiny("llama", "sdpa")
    some = {name: VARIANTS[name] for name in ("whole", "one")}
    timing(model, some, rounds=1, store=store, **SETTINGS)
    rounds = 1
    settings = dict(SETTINGS)
    if what == "rounds":
        rounds = 2
    elif what == "variants":
        some["windows"] = VARIANTS["windows"]
    elif what == "version":
        monkeypatch.setattr(measure, "VERSION", measure.VERSION + 1)
    elif what == "shapes":
        model = tiny("llama", "sdpa", intermediate_size=64)
    else:
        settings[what] = 2
    timing(model, some, rounds=rounds, store=store, **settings)
    assert count(store) == 2 and len(timed) > 2


def test_4_bits_have_a_shape_of_their_own(store):
    pytest.importorskip("bitsandbytes")
    model = tiny("llama", "sdpa", hidden_size=64, intermediate_size=64)
    some = {"whole": Variant(), "packed": Variant(four_bits=FourBits())}
    rows = timing(model, some, rounds=1, store=store, **SETTINGS).set_index("variant")
    assert rows.loc["packed", "weight_bytes"] < rows.loc["whole", "weight_bytes"]


def test_speedups_are_of_one_round_each():
    rows = pd.DataFrame(
        {
            "variant": ["whole", "half"] * 3,
            "round": [0, 0, 1, 1, 2, 2],
            "seconds": [2.0, 1.0, 6.0, 2.0, 4.0, 2.0],
            "prefill_seconds": [1.0, 1.0] * 3,
            "decode_seconds": [1.0, 0.5] * 3,
            "kv_bytes": [10, 5] * 3,
        }
    )
    table = speedups(rows)
    assert table.index.name == "variant" and list(table.index) == ["whole", "half"]
    assert list(table["speedup"]) == [1, 2] and list(table["kv_bytes"]) == [10, 5]
    assert table.loc["half", "speedup_low"] <= 2 <= table.loc["half", "speedup_high"]
    assert table.loc["half", "prefill_speedup"] == 1 and table.loc["half", "decode_speedup"] == 2
    assert np.isclose(speedups(rows, "half").loc["whole", "speedup"], 0.5)
    with pytest.raises(ValueError, match="baseline 'absent'"):
        speedups(rows, "absent")


def test_the_model_is_restored_where_timing_fails(store):
    model = tiny("llama", "sdpa")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="out of range"):
        timing(model, {"whole": Variant(), "wrong": Variant(DropPlan([8]))}, rounds=1, store=store, **SETTINGS)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items()) and count(store) == 0


def test_layers_of_another_attention_type_are_another_shape(tmp_path):
    """Gemma-2's sliding layers hold a window, its full ones the whole context."""
    model = tiny("gemma2")
    types = model.config.layer_types
    variants = {"whole": Variant()}
    for kind in ("sliding_attention", "full_attention"):
        variants[kind] = Variant(DropPlan([types.index(kind)]))
    rows = timing(model, variants, rounds=1, store=Store(tmp_path), prompt_len=20, new_tokens=3)
    for name, variant in variants.items():
        with variant.applied(model):
            expected = measure_speed(model, prompt_len=20, new_tokens=3, repeats=1)["kv_bytes"]
        assert rows.loc[rows["variant"] == name, "kv_bytes"].tolist() == [expected]
