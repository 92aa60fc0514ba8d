"""Dropping equals zeroing a branch; caches, nesting, saving and loading keep it so."""

import contextlib
import copy
import inspect
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from decoders import tiny_decoder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, random_ids, tiny
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import llmdrop
from llmdrop import DropPlan, apply_plan, dropped, prune
from llmdrop.anatomy import find_anatomy as anatomy

PLANS = [
    DropPlan(attn=[0]),
    DropPlan(attn=[4]),
    DropPlan(attn=[0, 2, 4]),
    DropPlan(attn=range(5)),
    DropPlan(mlp=[0]),
    DropPlan(mlp=[1, 4]),
    DropPlan(mlp=range(5)),
    DropPlan([0], [0]),
    DropPlan([3, 4], [3, 4]),
    DropPlan([0, 1, 3], [1, 2]),
]


@contextlib.contextmanager
def zeroed(model, plan):
    """The independent reference: the untouched model, with the outputs of the plan's branches multiplied by zero."""
    parts = anatomy(model)
    handles = []
    for kind in ("attn", "mlp"):
        for i in getattr(plan, kind):
            for name in parts.sublayer(kind, i).writers:
                handles.append(
                    parts.layers[i]
                    .get_submodule(name)
                    .register_forward_hook(
                        lambda m, a, out: (out[0] * 0, *out[1:]) if isinstance(out, tuple) else out * 0
                    )
                )
    yield
    for handle in handles:
        handle.remove()


def logits(model, ids, **kwargs):
    with torch.inference_mode():
        return model(ids, use_cache=False, **kwargs).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_dropped_equals_zeroed_branch(family):
    model, ids = tiny(family), random_ids(2, 12)
    dense = logits(model, ids)
    for plan in PLANS:
        with zeroed(model, plan):
            expected = logits(model, ids)
        with dropped(model, plan):
            torch.testing.assert_close(logits(model, ids), expected, atol=1e-5, rtol=0)
        assert (expected - dense).abs().max() > 1e-3, "the branch must matter, or this test shows nothing"
        assert torch.equal(logits(model, ids), dense), "not restored"
    assert getattr(model.config, "llmdrop", None) is None


def uncached(model, ids, mask, n):
    """Greedy continuation by full forward passes without any cache."""
    for _ in range(n):
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        step = logits(model, ids, attention_mask=mask, position_ids=positions)[:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, step], 1), torch.cat([mask, torch.ones_like(step)], 1)
    return ids


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_equals_uncached_generation(family, attention):
    model = tiny(family, attention)
    ids, mask = random_ids(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[1, :3], mask[2, :6] = 0, 0
    ids[mask == 0] = 0
    for attn in ([0], [0, 2, 4], [1, 3], range(5)):
        with dropped(model, DropPlan(attn=attn)):
            expected = uncached(model, ids, mask, 64)
            for cache in ("dynamic", "static"):
                out = model.generate(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=64,
                    do_sample=False,
                    cache_implementation=cache,
                    return_dict_in_generate=True,
                    disable_compile=True,
                )
                assert torch.equal(out.sequences, expected), (attn, cache)
                layers = [layer for layer in out.past_key_values.layers if layer.keys.nbytes + layer.values.nbytes]
                assert len(layers) == 5 - len(list(attn))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_cache_bytes_shrink_with_dropped_attention(family):
    model, ids = tiny(family), random_ids(2, 10)

    def nbytes(cache):
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    with torch.inference_mode():
        dense = nbytes(model(ids, use_cache=True).past_key_values)
        with dropped(model, DropPlan(attn=[0, 4])):
            assert nbytes(model(ids, use_cache=True).past_key_values) / dense == pytest.approx(3 / 5, rel=0.2)
            static = StaticCache(config=model.config, max_cache_len=32)
            model(ids, past_key_values=static, use_cache=True)
            assert nbytes(static) == sum(layer.keys.nbytes * 2 for layer in static.layers if layer.keys.nbytes)
            assert len([layer for layer in static.layers if layer.keys.nbytes]) == 3
        with dropped(model, DropPlan(attn=range(5))):
            assert nbytes(model(ids, use_cache=True).past_key_values) == 0


def test_uniform_cache_bytes_are_exact():
    model, ids = tiny("llama"), random_ids(2, 10)
    with torch.inference_mode(), dropped(model, DropPlan(attn=[0, 3])):
        cache = model(ids, use_cache=True).past_key_values
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) == 2 * 3 * 2 * 2 * 10 * 8 * 4


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_beams_and_assisted_decoding(family):
    model, ids = tiny(family, "sdpa"), random_ids(1, 9)
    with dropped(model, DropPlan(attn=[0, 1])):
        beams = model.generate(ids, max_new_tokens=8, num_beams=3, do_sample=False)
        plain = model.generate(ids, max_new_tokens=8, num_beams=3, do_sample=False, use_cache=False)
        assert torch.equal(beams, plain)
        lookup = model.generate(ids, max_new_tokens=16, prompt_lookup_num_tokens=3, do_sample=False)
        assert torch.equal(lookup, model.generate(ids, max_new_tokens=16, do_sample=False))


def test_nested_and_exceptions_restore_everything():
    model, ids = tiny("llama"), random_ids(2, 8)
    dense, keys = logits(model, ids), list(model.state_dict())
    hooks = len(model.base_model._forward_pre_hooks)
    with pytest.raises(RuntimeError, match="inside"), dropped(model, DropPlan(attn=[1])):
        with dropped(model, DropPlan(attn=[1, 2], mlp=[1])):
            assert anatomy(model).plan == DropPlan([1, 2], [1])
            inner = logits(model, ids)
        with zeroed(model, DropPlan()):
            pass
        once = logits(model, ids)
        assert anatomy(model).plan == DropPlan([1])
        raise RuntimeError("inside")
    assert torch.equal(logits(model, ids), dense) and list(model.state_dict()) == keys
    assert len(model.base_model._forward_pre_hooks) == hooks
    both = apply_plan(apply_plan(model, DropPlan(attn=[1])), DropPlan([2], [1]))
    torch.testing.assert_close(logits(both, ids), inner, atol=1e-6, rtol=0)
    assert not torch.equal(once, inner)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sets(st.integers(0, 4)), st.sets(st.integers(0, 4)), st.sampled_from(FAMILIES))
def test_any_plan_frees_its_parameters_and_restores(attn, mlp, family):
    if len(attn) + len(mlp) == 10:
        return
    model, ids, plan = tiny(family), random_ids(1, 6), DropPlan(attn, mlp)
    parts = anatomy(model)
    size = sum(p.numel() for p in model.parameters())
    gone = sum(
        p.numel()
        for kind in ("attn", "mlp")
        for i in getattr(plan, kind)
        for name in parts.sublayer(kind, i).stubs
        for p in parts.layers[i].get_submodule(name).parameters()
    )
    with zeroed(model, plan):
        expected = logits(model, ids)
    with dropped(model, plan):
        assert sum(p.numel() for p in model.parameters()) == size - gone
        torch.testing.assert_close(logits(model, ids), expected, atol=1e-5, rtol=0)
    assert sum(p.numel() for p in model.parameters()) == size


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plan", [DropPlan([0, 3], [1]), DropPlan([0, 4], [0, 4]), DropPlan([1, 2, 3], [2, 4])])
def test_save_load_round_trip(family, plan, tmp_path):
    model, ids = tiny(family), random_ids(2, 9)
    llmdrop.save_model(model, None, tmp_path / "dense")
    expected = logits(apply_plan(model, plan), ids)
    llmdrop.save_model(model, None, tmp_path / "dropped")
    loaded = llmdrop.checkpoints.load.load_weights(str(tmp_path / "dropped"), dtype=torch.float32)
    torch.testing.assert_close(logits(loaded.eval(), ids), expected, atol=1e-5, rtol=0)
    assert anatomy(loaded).plan == plan
    weights = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("dense", "dropped")]
    parameters = sum({p.data_ptr(): p.nbytes for p in model.parameters()}.values())
    assert weights[1] < weights[0] and weights[1] == pytest.approx(parameters, rel=0.1)
    if plan.attn == plan.mlp:
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dropped")
        torch.testing.assert_close(logits(stock.eval(), ids), expected, atol=1e-5, rtol=0)
    else:
        with pytest.raises((ValueError, KeyError)):
            AutoModelForCausalLM.from_pretrained(tmp_path / "dropped")
        with pytest.raises(Exception, match="llmdrop.load_model"):
            type(model).from_pretrained(tmp_path / "dropped")


def test_gpt2_with_depth_scaled_attention_keeps_its_scale(tmp_path):
    model, ids, plan = tiny("gpt2", scale_attn_by_inverse_layer_idx=True), random_ids(2, 9), DropPlan([1], [1])
    expected = logits(apply_plan(model, plan), ids)
    llmdrop.save_model(model, None, tmp_path / "m")
    loaded = llmdrop.checkpoints.load.load_weights(str(tmp_path / "m"), dtype=torch.float32)
    torch.testing.assert_close(logits(loaded.eval(), ids), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "plan, message",
    [
        (DropPlan(attn=[5]), "out of range.*below 5"),
        (DropPlan(range(5), range(5)), "drops all 5 attention and all 5 MLP"),
        (DropPlan(attn=[1], n_layers=40), "made for a model of 40 layers, this model has 5"),
    ],
)
def test_impossible_plans_leave_the_model_unchanged(plan, message):
    model, ids = tiny("llama"), random_ids(1, 5)
    before = logits(model, ids)
    with pytest.raises(ValueError, match=message):
        apply_plan(model, plan)
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("plan", [None, 8, [1], [("attn", 1), 2], "Attn-8"])
def test_what_is_no_plan_is_refused(plan):
    with pytest.raises(TypeError, match=f"a {type(plan).__name__} is no plan; give a llmdrop.DropPlan"):
        apply_plan(tiny("llama"), plan)


def test_unknown_architectures_are_refused_by_name():
    with pytest.raises(ValueError, match="a Linear is no transformers model"):
        anatomy(torch.nn.Linear(2, 2))
    model = tiny("llama")
    model.model.layers[1].adapter = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="layer 1 .*has adapter besides"):
        anatomy(model)
    with pytest.raises(ValueError, match="'opt' model can be proven: layer 0 .*normalizes"):
        anatomy(tiny("opt", do_layer_norm_before=False))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kept_mlp", [0, 2, 4])
def test_one_block_left_without_attention_still_counts_tokens(family, kept_mlp):
    model, ids, mask = tiny(family), random_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    plan = DropPlan(range(5), [i for i in range(5) if i != kept_mlp])
    with dropped(model, plan), torch.inference_mode():
        whole = model(ids, use_cache=False).logits
        past = None
        for k in range(9):  # token by token: each step's position is told by the cache alone
            out = model(ids[:, k : k + 1], past_key_values=past, use_cache=True)
            past = out.past_key_values
            assert past.get_seq_length() == k + 1
            torch.testing.assert_close(out.logits[:, 0], whole[:, k], atol=1e-5, rtol=0)
        expected = uncached(model, ids, mask, 8)
        assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False), expected)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("plan", [DropPlan([1, 3]), DropPlan([0, 4], [0, 4]), DropPlan(range(5), [1])])
def test_dropping_that_fails_half_way_restores_the_model(family, plan, monkeypatch):
    model, ids = tiny(family), random_ids(2, 8)
    dense, config, keys = logits(model, ids), model.config.to_dict(), list(model.state_dict())
    hooks = len(anatomy(model).decoder._forward_pre_hooks)
    put = prune.put
    with dropped(model, plan):
        pass
    steps = 0
    while True:
        calls = iter(range(steps + 1))

        def failing(undo, owner, name, value, calls=calls, steps=steps):
            if next(calls) == steps:
                raise RuntimeError(f"cannot set {name}")
            put(undo, owner, name, value)

        monkeypatch.setattr(prune, "put", failing)
        try:
            with dropped(model, plan):
                break  # no step is left to fail
        except RuntimeError:
            pass
        monkeypatch.setattr(prune, "put", put)
        assert torch.equal(logits(model, ids), dense), steps
        assert model.config.to_dict() == config and list(model.state_dict()) == keys, steps
        assert len(anatomy(model).decoder._forward_pre_hooks) == hooks, steps
        steps += 1
    assert steps > 5


@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_leaves_the_config_alone(family):
    """It describes the architecture, from which others make models of their own."""
    model = tiny(family)
    before = model.config.to_dict()
    apply_plan(model, DropPlan([0, 1, 3], [1, 2]))
    assert model.config.to_dict() == before


def test_the_module_is_not_hidden_by_a_function():
    """llmdrop.anatomy is a module, and its function another name."""
    assert llmdrop.anatomy.Anatomy is not None and llmdrop.find_anatomy is anatomy
    for name in vars(llmdrop):
        if isinstance(vars(llmdrop)[name], types.ModuleType):
            assert vars(llmdrop)[name].__name__ == f"llmdrop.{name}"


def test_a_plan_in_any_form_is_applied(tmp_path):
    plan, ids = DropPlan([1, 3], [3], 5), random_ids(2, 8)
    expected = logits(apply_plan(tiny("llama"), plan), ids)
    (tmp_path / "plan.json").write_text(plan.to_json())
    booleans = {"drop_attn_list": [i in (1, 3) for i in range(5)], "drop_mlp_list": [i == 3 for i in range(5)]}
    pairs = [("attn", 1), ("mlp", 3), ["attn", 3]]
    for form in (str(tmp_path / "plan.json"), tmp_path / "plan.json", plan.key, plan.to_llm_drop(), booleans, pairs):
        assert torch.equal(logits(apply_plan(tiny("llama"), form), ids), expected)
        with dropped(tiny("llama"), form) as model:
            assert torch.equal(logits(model, ids), expected)
        sizes = [llmdrop.kv_cache_bytes(tiny("llama"), 1, 8, one) for one in (form, plan)]
        assert sizes[0] == sizes[1]
        swept = llmdrop.perplexity_sweep(tiny("llama"), {"form": form, "plan": plan}, ids, progress=False)
        assert swept["perplexity"].nunique() == 1


# ---- caches and the models that filled them


def filled(model, ids, cache=None):
    with torch.inference_mode():
        name = "cache_params" if "cache_params" in inspect.signature(model.forward).parameters else "past_key_values"
        return model(ids, use_cache=True, **{name: cache})[name]


KINDS_OF_CACHE = {
    "made by the model": lambda model: None,
    "growing": lambda model: DynamicCache(),
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=32),
}
OF_ANOTHER = "this KV cache was .* while .*layers were dropped.*fresh one"


@pytest.mark.parametrize("kind", KINDS_OF_CACHE)
@pytest.mark.parametrize("plan", [DropPlan([0]), DropPlan(mlp=[1]), DropPlan([2], [2]), DropPlan(range(5), [1])])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_cache_of_another_model_is_refused(family, plan, kind):
    model, ids, new = tiny(family), random_ids(1, 6), KINDS_OF_CACHE[kind]
    whole = filled(model, ids, new(model))
    with dropped(model, plan):
        with pytest.raises(ValueError, match=OF_ANOTHER):  # filled before the drop
            filled(model, ids, whole)
        inside = filled(model, ids, new(model))
        filled(model, ids[:, :2], inside)
        with dropped(model, DropPlan(mlp=[4])):
            with pytest.raises(ValueError, match=OF_ANOTHER):
                filled(model, ids, inside)
            deeper = filled(model, ids, new(model))
        with pytest.raises(ValueError, match=OF_ANOTHER):  # filled under more than is dropped now
            filled(model, ids, deeper)
        filled(model, ids[:, :2], inside)  # and the own one still serves
    bytes_inside = sum(layer.keys.nbytes for layer in inside.layers)
    for cache in (inside, copy.deepcopy(inside)):
        with pytest.raises(ValueError, match=OF_ANOTHER):
            filled(model, ids, cache)
    assert sum(layer.keys.nbytes for layer in inside.layers) == bytes_inside, "it can be looked at"
    filled(model, ids[:, :2], whole)  # as before
    with pytest.raises(ValueError, match=OF_ANOTHER):
        filled(apply_plan(model, plan), ids, whole)


@pytest.mark.parametrize("kind", ["mamba2", "falcon_mamba", "jamba", "qwen3_next"])
def test_states_of_another_model_are_refused(kind):
    """A cache of a Mamba alone has no length by which it would be known as filled."""
    model, ids = tiny_decoder(kind), random_ids(1, 6)
    whole = filled(model, ids)
    with dropped(model, DropPlan([0])):
        with pytest.raises(ValueError, match=OF_ANOTHER):
            filled(model, ids[:, :1], whole)
        inside = filled(model, ids)
        filled(model, ids[:, :1], inside)
        with dropped(model, DropPlan([5])), pytest.raises(ValueError, match=OF_ANOTHER):
            filled(model, ids[:, :1], inside)
    for cache in (inside, copy.deepcopy(inside)):
        with pytest.raises(ValueError, match=OF_ANOTHER):
            filled(model, ids[:, :1], cache)
    filled(model, ids[:, :1], whole)


def test_a_cache_made_before_the_drop_is_cut():
    """While nothing is in it: its slots are then of the types of the layers that are left."""
    model, ids = tiny("gemma2"), random_ids(1, 12)
    early = DynamicCache(config=model.config)
    with dropped(model, DropPlan([0], [0])):
        expected = logits(model, ids)
        filled(model, ids[:, :9], early)
        kinds = [type(layer) for layer in DynamicCache(config=model.config).layers[1:]]
        assert [type(layer) for layer in early.layers] == kinds
        with torch.inference_mode():
            out = model(ids[:, 9:], past_key_values=early).logits
        torch.testing.assert_close(out, expected[:, 9:], atol=1e-5, rtol=0)


def test_a_cache_serves_where_nothing_is_dropped():
    model, ids = tiny("llama"), random_ids(1, 6)
    cache = filled(model, ids)
    with dropped(model, DropPlan()):
        filled(model, ids[:, :2], cache)
    filled(model, ids[:, :2], cache)
    with dropped(model, DropPlan([1])):
        inside = filled(model, ids)
        with dropped(model, DropPlan([1])):
            filled(model, ids[:, :2], inside)
        filled(model, ids[:, :2], inside)
        inside.reset()
        torch.testing.assert_close(filled(model, ids, inside).layers[0].keys, filled(model, ids).layers[0].keys)


def test_what_is_dropped_from_a_checkpoints_own_class_still_generates(tmp_path):
    path = llmdrop.save_model(apply_plan(tiny("llama"), DropPlan([1])), None, tmp_path / "m")
    ids = random_ids(1, 6)
    stock = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
    expected = uncached(apply_plan(tiny("llama"), DropPlan([0, 1])), ids, torch.ones_like(ids), 8)
    apply_plan(stock, DropPlan([0, 1]))
    assert torch.equal(stock.generate(ids, max_new_tokens=8, do_sample=False), expected)


def test_apply_plan_inside_of_dropped_is_refused():
    """It would outlast the model that it was made for."""
    model, ids = tiny("llama"), random_ids(1, 7)
    dense = logits(model, ids)
    with dropped(model, DropPlan([0, 3])):
        with pytest.raises(ValueError, match="nest `dropped` instead"):
            apply_plan(model, DropPlan([1]))
        copied = apply_plan(copy.deepcopy(model), DropPlan([1]))
    assert torch.equal(logits(model, ids), dense) and not anatomy(model).plan
    assert anatomy(copied).plan == DropPlan([0, 1, 3])


def test_blocks_that_end_in_another_order_say_so():
    model = tiny("llama")
    first, second = dropped(model, DropPlan([0])), dropped(model, DropPlan([1]))
    first.__enter__()
    second.__enter__()
    with pytest.raises(RuntimeError, match="nest them"):
        first.__exit__(None, None, None)


def test_a_model_that_shares_the_config_is_left_alone():
    """As a teacher and its student do."""
    teacher, ids = tiny("llama"), random_ids(1, 7)
    student = type(teacher)(teacher.config)
    expected = logits(teacher, ids)
    apply_plan(student, DropPlan([1, 3], [1, 3]))
    assert torch.equal(logits(teacher, ids), expected) and anatomy(teacher).n_layers == 5


def test_threads_that_run_layers_one_by_one_wait_for_each_other():
    model, ids = tiny("llama"), random_ids(1, 9)
    expected = logits(model, ids)
    texts = [random_ids(8, 32, seed=seed) for seed in range(4)]
    alone = [llmdrop.perplexity(model, text, progress=False)["perplexity"] for text in texts]
    for _ in range(3):
        with ThreadPoolExecutor(4) as threads:
            jobs = [threads.submit(llmdrop.perplexity, model, text, progress=False) for text in texts]
            assert [job.result()["perplexity"] for job in jobs] == alone
    assert torch.equal(logits(model, ids), expected)
