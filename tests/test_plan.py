import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmdrop import DropPlan, ImportanceScores, drop_order, plan, plan_drop
from llmdrop.plan import as_plan

indices = st.sets(st.integers(0, 39))


def scores_of(attn, mlp, block=None, gap=None):
    attn, mlp = np.array(attn, float), np.array(mlp, float)
    block = attn + mlp if block is None else np.array(block, float)
    kinds = {"attn": attn, "mlp": mlp, "block": block}
    return ImportanceScores(**kinds, stderr=kinds, magnitude={k: v[::-1] for k, v in kinds.items()}, gap=gap)


@given(indices, indices)
def test_round_trips(attn, mlp):
    p = DropPlan(attn, mlp, n_layers=40)
    assert DropPlan.from_json(p.to_json()) == p and DropPlan.from_json(p.to_json()).n_layers == 40
    assert DropPlan.from_llm_drop(p.to_llm_drop()) == p
    booleans = {f"drop_{k}_list": [i in s for i in range(40)] for k, s in (("attn", attn), ("mlp", mlp))}
    assert DropPlan.from_llm_drop(json.loads(json.dumps(booleans)), 40) == p
    assert p.attn == tuple(sorted(attn)) and p.blocks == tuple(sorted(attn & mlp)) and len(p) == len(attn) + len(mlp)


@given(indices, indices)
def test_overlap(a, b):
    assert DropPlan(a).overlap(DropPlan(a)) == 1
    assert DropPlan(a).overlap(DropPlan(b)) == DropPlan(b).overlap(DropPlan(a))
    assert DropPlan(attn=a).overlap(DropPlan(mlp=a)) == (0 if a else 1)


def test_labels_are_the_papers():
    plans = [DropPlan(), DropPlan([1]), DropPlan(mlp=[1, 2]), DropPlan([1], [1]), DropPlan([1], [2])]
    assert [p.label for p in plans] == ["Baseline", "Attn-1", "MLP-2", "Block-1", "Joint-2"]


@pytest.mark.parametrize(
    "attn, message",
    [
        ([-1], "-1 is out of range"),
        ([40], "40 is out of range; expected 0-based layer indices below 40"),
        ([1, 1], "repeats an index"),
        ([True, False], "holds booleans.*from_llm_drop"),
        ([1.5], "1.5 is not a whole number"),
        (["3"], "'3' is not a whole number"),
        (3, "attn=3 is no list of layers"),
        (None, "attn=None is no list of layers"),
        ("12", "attn='12' is no list of layers"),
    ],
)
def test_malformed_plans(attn, message):
    with pytest.raises(ValueError, match=message):
        DropPlan(attn, n_layers=40)


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "3", "null", '"attn"', '{"attention": [1]}', '{"attn": [true]}', '{"attn": null}', '{"mlp": 3}'),
        *('{"attn": "12"}', '{"attn": {"1": 2}}', '{"attn": [1], "n_layers": "4"}', '{"n_layers": 0}'),
    ],
)
def test_malformed_json(text):
    with pytest.raises(ValueError):
        DropPlan.from_json(text)
    with pytest.raises(ValueError, match="holds 2 booleans for a model of 3 layers"):
        DropPlan.from_llm_drop({"drop_attn_list": [True, False]}, 3)


def test_lowest_scores_first_and_ties_by_index():
    s = scores_of([0.3, 0.1, 0.1, 0.2], [0.15, 0.5, np.nan, 0.1])
    assert drop_order(s, "attn") == [1, 2, 3, 0]
    assert drop_order(s, "mlp") == [3, 0, 1]
    assert drop_order(s, "joint")[:4] == [("attn", 1), ("attn", 2), ("mlp", 3), ("mlp", 0)]
    assert plan_drop(s, "joint", 3) == DropPlan([1, 2], [3])
    assert plan_drop(s, "block", 1) == DropPlan([3], [3])
    assert plan_drop(s, "attn", 2, plan.reverse_order) == DropPlan([2, 3])
    assert plan_drop(s, "attn", 1, plan.relative_magnitude) == DropPlan([1])
    random_plans = {plan_drop(s, "attn", 2, plan.random(seed)) for seed in range(20)}
    assert len(random_plans) > 1 and plan_drop(s, "attn", 2, plan.random(3)) == plan_drop(s, "attn", 2, plan.random(3))


def test_consecutive_uses_the_gap_of_exactly_n_blocks():
    gap = np.full((4, 4), np.nan)
    gap[np.triu_indices(4)] = [0.1, 0.5, 0.9, 0.9, 0.2, 0.3, 0.1, 0.3, 0.6, 0.05]
    s = scores_of([0.1] * 4, [0.1] * 4, gap=gap)
    assert plan_drop(s, "consecutive", 2) == DropPlan([1, 2], [1, 2])
    assert plan_drop(s, "consecutive", 3) == DropPlan([1, 2, 3], [1, 2, 3])
    assert plan_drop(s, "consecutive", 1) == DropPlan([3], [3])
    with pytest.raises(ValueError, match="gap=True"):
        plan_drop(scores_of([1], [1]), "consecutive", 1)


def test_counts_and_targets_are_checked():
    s = scores_of([0.3, 0.1], [0.2, 0.4])
    for n in (-1, 3, True, 1.5, "2", None):
        with pytest.raises(ValueError, match="n must be between 0 and 2"):
            plan_drop(s, "attn", n)
    for n in (0.0, 1.0, 2.0, 8.0, -0.4, float("nan"), "0%", "100%", "140%", "%", "40", "0.4"):
        with pytest.raises(ValueError, match=f"n={re.escape(repr(n))} of 2 attn.*a whole number, or a share.*'40%'"):
            plan_drop(s, "attn", n)
    with pytest.raises(ValueError, match="'layer' is not one of attn, mlp, block, joint, consecutive"):
        plan_drop(s, "layer", 1)


@given(indices, indices, st.sampled_from([None, 40, 41]), st.sampled_from([None, 40, 41]))
def test_plans_of_different_depth_do_not_mix(attn, mlp, first, second):
    one, other = DropPlan(attn, n_layers=first), DropPlan(mlp=mlp, n_layers=second)
    if None not in (first, second) and first != second:
        for combine in (lambda: one | other, lambda: one.for_depth(second), lambda: one.overlap(other)):
            with pytest.raises(ValueError, match=f"made for a model of {second}|made for a model of {first}"):
                combine()
    else:
        both = one | other
        assert both == DropPlan(attn, mlp) and both.n_layers == (first or second)
        assert one.for_depth(second).n_layers == second


def test_consecutive_passes_over_dropped_blocks():
    gap = np.full((4, 4), np.nan)
    gap[np.triu_indices(4)] = [0.4, np.nan, 0.9, 0.9, np.nan, np.nan, np.nan, 0.3, 0.6, 0.5]
    s = scores_of([0.1, np.nan, 0.1, 0.1], [0.1, np.nan, 0.1, 0.1], gap=gap)
    assert plan_drop(s, "consecutive", 1) == DropPlan([2], [2])
    assert plan_drop(s, "consecutive", 2) == DropPlan([2, 3], [2, 3])
    with pytest.raises(ValueError, match="no 3 blocks in a row are left"):
        plan_drop(s, "consecutive", 3)
    with pytest.raises(ValueError, match="n must be between 0 and 3"):
        plan_drop(s, "consecutive", 4)
    assert plan_drop(s, "consecutive", 0) == DropPlan()


@given(st.integers(1, 60), st.floats(0.001, 0.999), st.sampled_from(["attn", "mlp", "block", "joint", "consecutive"]))
def test_a_share_is_the_nearest_count(n_layers, share, target):
    values = np.arange(n_layers) / 100
    s = scores_of(values, values[::-1], gap=np.full((n_layers, n_layers), 0.5))
    available = 2 * n_layers if target == "joint" else n_layers
    got = plan_drop(s, target, share)
    count = len(got) // (2 if target in ("block", "consecutive") else 1)
    assert abs(count - share * available) <= 0.5 + 1e-9
    assert got == plan_drop(s, target, count) == plan_drop(s, target, f"{100 * share!r}%")


def test_shares_by_hand():
    s = scores_of(np.arange(30), np.arange(30))
    assert plan_drop(s, "attn", 0.4) == plan_drop(s, "attn", "40%") == plan_drop(s, "attn", 12)
    assert plan_drop(s, "joint", np.float64(0.25)) == plan_drop(s, "joint", np.int64(15))
    half = scores_of([0.1, np.nan, 0.3, 0.2], [0.1] * 4)  # of those that are left
    assert plan_drop(half, "attn", "67%") == DropPlan([0, 3])


@given(indices, indices)
def test_every_form_is_read_as_the_plan(attn, mlp):
    p = DropPlan(attn, mlp, n_layers=40)
    booleans = {f"drop_{k}_list": [i in s for i in range(40)] for k, s in (("attn", attn), ("mlp", mlp))}
    pairs = [("attn", i) for i in attn] + [["mlp", i] for i in mlp]
    for form in (p, p.key, json.loads(p.to_json()), p.to_llm_drop() | {"model_type": "llama"}, booleans, pairs):
        assert as_plan(form, 40) == p


def test_what_is_no_plan_is_named(tmp_path):
    for wrong in (None, 8, [25, 26], ["attn"], [("block", 3)], "Attn-8", '{"attn": [1]}', {25, 26}, np.arange(3)):
        with pytest.raises(
            TypeError, match=rf"a {type(wrong).__name__} is no plan; give a llmdrop.DropPlan.*attn=\[25"
        ):
            as_plan(wrong)
    with pytest.raises(FileNotFoundError, match="no plan in .*none.json"):
        as_plan(tmp_path / "none.json")
    for text, message in (("{", "is no JSON"), ("[1]", "holds no drop plan"), ('{"layers": 3}', "not a drop plan")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=f'{message}.*expected an object {{"attn"'):
            as_plan(str(tmp_path / "bad.json"))
    with pytest.raises(ValueError, match="not a drop plan.*attention"):
        as_plan({"attention": [1]})
    with pytest.raises(ValueError, match="2 booleans for a model of 3 layers"):
        as_plan({"drop_attn_list": [True, False]}, 3)


@given(
    st.permutations(range(12)),
    st.sets(st.integers(0, 11), max_size=6),
    st.integers(0, 12),
    st.sampled_from(["attn", "mlp", "block", "joint", "consecutive"]),
)
def test_kept_layers_are_never_dropped(order, keep, n, target):
    gap = np.add.outer(order, order) / 10
    s = scores_of(order, order[::-1], gap=gap)
    try:
        p = plan_drop(s, target, n, keep=keep)
    except ValueError as error:
        available = 24 if target == "joint" else 12
        n_kept = 2 * len(keep) if target == "joint" else len(keep)
        assert n > available - n_kept or (target == "consecutive" and "blocks to keep" in str(error))
        assert n <= available - n_kept or f"{n_kept} of them kept; n must be between 0 and {available - n_kept}" in str(
            error
        )
        return
    assert not keep & (set(p.attn) | set(p.mlp))
    assert len(p) == n * (2 if target in ("block", "consecutive") else 1)
    if target in ("attn", "mlp", "block"):
        (dropped,) = {p.attn, p.mlp} - {()} or {()}
        values = getattr(s, target)
        rest = set(range(12)) - set(dropped) - keep
        assert all(values[i] <= values[j] for i in dropped for j in rest)


def test_a_share_is_of_all_layers_kept_ones_included():
    s = scores_of(np.arange(30), np.arange(30))
    assert plan_drop(s, "attn", "40%", keep=[0, 29]) == DropPlan(range(1, 13))
    with pytest.raises(ValueError, match=r"n='90%' of 30 attn layers, 4 of them kept; n must be between 0 and 26"):
        plan_drop(s, "attn", "90%", keep=range(4))
    for keep, message in (([30], "keep index 30 is out of range.*below 30"), (3, "keep=3 is no list of layers")):
        with pytest.raises(ValueError, match=message):
            plan_drop(s, "attn", 3, keep=keep)
