"""Choices are those of the core and the searches, stored with what they cost; contenders are as fast as they say."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from tiny import random_ids, tiny

from llmdrop import Calibration, DropPlan, Store, perplexity, plan_drop, predict_speed, score
from llmdrop import plan as orders
from llmdrop.compress import search, windows
from llmdrop.compress.reconstruction import Reconstruction, combined, corrections, fit, reconstructed
from llmdrop.compress.search import Choice
from llmdrop.compress.variant import Variant
from llmdrop.compress.windows import score_windows, windowed
from llmdrop.repro import selectors
from llmdrop.repro.quality import quality
from llmdrop.repro.selectors import (
    SELECTORS,
    Chooser,
    Contender,
    named,
    selector,
)

TEXT = Calibration(random_ids(8, 24))
SHORT = Calibration(random_ids(2, 12, seed=4))
LONG = Calibration(random_ids(8, 40, seed=40))
SECONDS = {"attn": 1.0, "mlp": 1e-9}
SPEED = {"prompt_len": 64, "new_tokens": 8}
NAMES = [*SELECTORS, "random 1"]


def count(store: Store) -> int:
    return len(list(store.root.rglob("*.json")))


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path)


@pytest.fixture
def chooser(store) -> Chooser:
    return Chooser(tiny("llama"), TEXT, SHORT, LONG, speed=SPEED, store=store)


# ---- choices


@pytest.mark.parametrize("name", NAMES)
def test_every_choice_is_stored_with_what_it_cost(chooser, store, name):
    choice = chooser.choose(name, 2, SECONDS)
    kept = count(store)
    assert chooser.choose(name, 2, SECONDS) == choice
    assert count(store) == kept == 1
    assert len(choice.order) >= 2 and {kind for kind, _ in choice.order} <= {"attn", "mlp"}
    assert (choice.tokens > 0) == (name not in ("random 1", "reverse order"))
    if selector(name).target == "attn":
        assert {kind for kind, _ in choice.order} == {"attn"}


def test_the_paper_s_method_scores_on_its_own_text(chooser, store):
    """And no other selector does, so that it is the same baseline whatever the others see."""
    apart = replace(chooser, paper_text=LONG)
    alone = replace(chooser, text=LONG)
    assert apart.choose("cosine", 2) == alone.choose("cosine", 2)
    for name in ("relative magnitude", "MLP Drop", "Block Drop"):
        assert apart.choose(name, 2) == chooser.choose(name, 2)


def test_choices_by_scores_are_those_of_the_core(chooser):
    model = chooser.model
    scores = score(model, TEXT, gap=True, progress=False)
    plain = score(model, TEXT, with_residual=False, progress=False)
    expected = {
        "cosine": plan_drop(scores, "attn", 2),
        "cosine without residual": plan_drop(plain, "attn", 2),
        "relative magnitude": plan_drop(scores, "attn", 2, orders.relative_magnitude),
        "reverse order": plan_drop(scores, "attn", 2, orders.reverse_order),
        "random 3": plan_drop(scores, "attn", 2, orders.random(3)),
        "MLP Drop": plan_drop(scores, "mlp", 2),
        "Joint Drop": plan_drop(scores, "joint", 2),
        "Block Drop": plan_drop(scores, "block", 1),
        "consecutive blocks": plan_drop(scores, "consecutive", 1),
    }
    for name, plan in expected.items():
        n = 1 if selector(name).target == "consecutive" else 2
        choice = chooser.choose(name, n)
        assert choice.plan(2) == plan, name
        assert choice.tokens == (0 if name in ("reverse order", "random 3") else TEXT.n_tokens)


def test_choices_by_search_are_those_of_the_searches(chooser):
    model = chooser.model
    found = corrections(model, TEXT, ("attn", "mlp"))
    common = {"width": selectors.WIDTH, "every": selectors.EVERY}
    expected = {
        "Taylor": search.taylor(model, SHORT),
        "KL one-shot": search.one_shot(model, SHORT, "attn", "kl", selectors.EVERY),
        "perplexity one-shot": search.one_shot(model, SHORT, "attn", "perplexity", selectors.EVERY),
        "KL greedy": search.greedy(model, SHORT, "attn", 3, "kl", **common),
        "perplexity greedy, all sublayers": search.greedy(model, SHORT, "joint", 3, "perplexity", **common),
        "KL greedy, reconstructed": search.greedy(model, SHORT, "attn", 3, "kl", found, **common),
        "KL greedy, latency-aware": search.greedy(model, SHORT, "joint", 3, "kl", None, SECONDS, **common),
        "KL greedy, reconstructed, latency-aware": search.greedy(
            model, SHORT, "joint", 3, "kl", found, SECONDS, **common
        ),
    }
    for name, choice in expected.items():
        measured = chooser.choose(name, 3, SECONDS)
        assert measured.order == choice.order and measured.losses == pytest.approx(choice.losses), name
        cost = TEXT.n_tokens if selector(name).with_reconstruction else 0  # one pass, to fit
        assert measured.tokens == pytest.approx(choice.tokens + cost)
    assert not chooser.choose("KL greedy, latency-aware", 3, SECONDS).plan(3).mlp


def test_latency_aware_searches_count_what_dropping_saves_by_prediction(chooser):
    seconds = chooser.seconds_saved()
    whole = predict_speed(chooser.model, **SPEED).seconds
    for kind, plan in {"attn": DropPlan(attn=[2]), "mlp": DropPlan(mlp=[2])}.items():
        assert seconds[kind] == whole - predict_speed(chooser.model, plan, **SPEED).seconds > 0
    name = "KL greedy, latency-aware"
    assert chooser.choose(name, 2) == chooser.choose(name, 2, seconds)
    assert count(chooser.store) == 1
    beside_windows = chooser.seconds_saved(4)
    all_narrow = Variant(windows=windows.Windows(range(5), 4)).speed_limit(chooser.model, **SPEED).seconds
    others_narrow = Variant(DropPlan(attn=[0]), windows=windows.Windows(range(1, 5), 4))
    assert beside_windows["attn"] == all_narrow - others_narrow.speed_limit(chooser.model, **SPEED).seconds
    assert 0 < beside_windows["attn"] < seconds["attn"]


def test_keys_of_choices_differ_by_what_matters_and_nothing_else(store):
    model = tiny("llama")
    other = Calibration(random_ids(8, 24, seed=9))
    greedy = "KL greedy, reconstructed, latency-aware"
    distinct = [
        ("KL greedy", 2, TEXT, SHORT, SECONDS),
        ("KL greedy", 3, TEXT, SHORT, SECONDS),
        ("KL greedy", 2, TEXT, LONG, SECONDS),
        ("perplexity greedy", 2, TEXT, SHORT, SECONDS),
        ("KL greedy, reconstructed", 2, TEXT, SHORT, SECONDS),
        ("KL greedy, reconstructed", 2, other, SHORT, SECONDS),
        (greedy, 2, TEXT, SHORT, SECONDS),
        (greedy, 2, TEXT, SHORT, {"attn": 2.0, "mlp": 1.0}),
        ("KL one-shot", 2, TEXT, SHORT, SECONDS),
    ]
    for k, (name, n, text, short, seconds) in enumerate(distinct):
        Chooser(model, text, short, speed=SPEED, store=store).choose(name, n, seconds)
        assert count(store) == k + 1, name
    same = [
        ("KL greedy", 2, other, SHORT, None),  # nothing is scored or fitted
        ("KL one-shot", 3, TEXT, SHORT, None),  # the whole order either way
        ("KL greedy, reconstructed", 2, TEXT, SHORT, None),
    ]
    for name, n, text, short, seconds in same:
        Chooser(model, text, short, batch_size=3, store=store).choose(name, n, seconds)
        assert count(store) == len(distinct), name


def test_a_reconstruction_is_fitted_once_for_all_that_share_it(store, monkeypatch):
    model = tiny("llama", "sdpa")
    passes = []
    from llmdrop.compress import reconstruction as module

    original = module.corrections
    monkeypatch.setattr(module, "corrections", lambda *a, **k: passes.append(a[2]) or original(*a, **k))
    chooser = Chooser(model, TEXT, SHORT, speed=SPEED, store=store)
    for name in ("KL greedy, reconstructed", "KL greedy, reconstructed, latency-aware"):
        chooser.choose(name, 2, SECONDS)
    contenders = chooser.dropped(["cosine"], [1, 2])
    contenders = [contender.reconstructed(chooser.reconstructions["least squares"]) for contender in contenders]
    quality(model, None, named(contenders), {"short": SHORT}, store=store)
    assert passes == [("attn", "mlp")]


def test_refusals(chooser, store):
    with pytest.raises(ValueError, match="selector 'best' is not one of .* or 'random <seed>'"):
        chooser.choose("best", 3)
    for name in ("random", "random x", "random -1"):
        with pytest.raises(ValueError, match="is not one of"):
            selector(name)
    with pytest.raises(ValueError, match="save less time than 4"):
        chooser.as_fast(Choice([("attn", 0)], 0), 4)
    assert count(store) == 0


# ---- contenders


def test_dropped_contenders_are_as_fast_as_without_attention_layers(chooser):
    model = chooser.model
    names = ["cosine", "KL greedy", "MLP Drop", "Joint Drop", "Block Drop", "consecutive blocks"]
    names += ["perplexity greedy, all sublayers", "KL greedy, latency-aware"]
    contenders = chooser.dropped(names, [1, 2])
    assert [(contender.choice, contender.n) for contender in contenders] == list(itertools.product(names, [1, 2]))
    for contender in contenders:
        plan = contender.variant.plan
        limit = predict_speed(model, DropPlan(attn=range(contender.n)), **SPEED).seconds * (1 + 1e-9)
        assert predict_speed(model, plan, **SPEED).seconds <= limit, contender.name
        assert contender.setting == "none" and contender.variant.is_plan_only
        if selector(contender.choice).target == "attn":
            assert len(plan.attn) == contender.n and not plan.mlp
            assert contender.passes == chooser.choose(contender.choice, 2).tokens / 192
    by_name = named(contenders)
    assert by_name["Block Drop: none, 2"].plan.blocks == by_name["Block Drop: none, 2"].plan.attn
    blocks = by_name["consecutive blocks: none, 2"].plan.blocks
    assert list(blocks) == list(range(blocks[0], blocks[0] + len(blocks)))


def test_reconstructed_contenders_keep_their_layers():
    contender = Contender("cosine", "none", 2, Variant(DropPlan([1, 2])), 1.0)
    reconstruction = Reconstruction(TEXT, "sequential least squares")
    other = contender.reconstructed(reconstruction)
    assert other.name == "cosine: sequential least squares, 2" and other.variant.reconstruction is reconstruction
    assert other.variant.plan == contender.variant.plan and other.passes == 1
    assert other.reconstructed(None).name == contender.name == "cosine: none, 2"


def test_window_order_is_stored(store):
    model = tiny("llama", "sdpa")
    scores = score_windows(model, SHORT, 4, windows.SINKS)
    chooser = Chooser(model, TEXT, long_text=SHORT, store=store)
    for _ in range(2):
        assert chooser.window_order(4) == sorted(range(5), key=lambda i: scores[i])
    assert count(store) == 1
    chooser.window_order(5)
    replace(chooser, long_text=LONG).window_order(4)
    assert count(store) == 3


def test_windowed_contenders_are_as_fast_with_the_fewest_windows(store):
    model = tiny("llama", "sdpa")
    speed = {"prompt_len": 2048, "new_tokens": 256}
    chooser = Chooser(model, TEXT, long_text=LONG, speed=speed, store=store)
    order = chooser.window_order(4)
    contenders = chooser.windowed([4], [1, 3], [64, 1])
    by_place = {(int(c.setting.split()[-1]), c.n): c.variant for c in contenders}
    assert by_place and {contender.choice for contender in contenders} == {"window 4"}
    assert (64, 1) in by_place
    for (b, n), variant in by_place.items():
        k = len(variant.windows.layers)
        assert variant.windows.layers == tuple(sorted(order[:k])) and variant.windows.window == 4
        dropping = Variant(DropPlan(attn=range(n))).predicted_speedup(model, batch_size=b, **speed)
        assert variant.predicted_speedup(model, batch_size=b, **speed) >= dropping * (1 - 1e-9)
        fewer = Variant(windows=windows.Windows(variant.windows.layers[1:], 4))
        assert fewer.predicted_speedup(model, batch_size=b, **speed) < dropping
    for b, n in set(itertools.product((64, 1), (1, 3))) - set(by_place):
        assert windows.as_fast(model, n, 4, batch_size=b, **speed) is None


def test_drops_and_windows_together(store):
    """As fast as asked, the best k of those tried, stored; measured with reconstruction and windows in place."""
    model = tiny("llama", "sdpa")
    text, short = Calibration(random_ids(8, 24, seed=24)), Calibration(random_ids(8, 12, seed=12))
    speed = {"prompt_len": 512, "new_tokens": 64}
    chooser = Chooser(model, text, short, LONG, speed=speed, store=store)
    least_squares = chooser.reconstructions["least squares"]
    contenders = chooser.mixed([2, 3], 5, 4, least_squares)
    assert [(c.choice, c.setting, c.n) for c in contenders] == [
        ("drops and windows", "as fast for 1", n) for n in (2, 3)
    ]
    for contender in contenders:
        variant = contender.variant
        assert not set(variant.plan.attn) & set(variant.windows.layers) and variant.windows.window == 4
        dropping = Variant(DropPlan(attn=range(contender.n))).predicted_speedup(model, **speed)
        assert variant.predicted_speedup(model, **speed) >= dropping * (1 - 1e-9)
        assert variant.reconstruction is (least_squares if variant.plan else None)
    kept = {path: path.stat().st_mtime_ns for path in store.root.rglob("*.json")}
    again = chooser.mixed([2, 3], 5, 4, least_squares)
    assert [contender.variant.key for contender in again] == [contender.variant.key for contender in contenders]
    assert kept == {path: path.stat().st_mtime_ns for path in store.root.rglob("*.json")}

    variant = contenders[1].variant
    changes = fit(model, variant.plan, text)
    assert variant.plan and variant.windows.layers and changes
    measured = quality(model, None, {"mixed": variant}, {"long": LONG}, store=store)["value"].mean()
    with reconstructed(model, variant.plan, changes), windowed(model, variant.windows.layers, 4):
        assert measured == pytest.approx(np.log(perplexity(model, LONG, progress=False)["perplexity"]), rel=1e-4)
    with reconstructed(model, variant.plan, changes):
        assert measured != pytest.approx(np.log(perplexity(model, LONG, progress=False)["perplexity"]), rel=1e-4)


def test_k_goes_up_only_while_the_loss_falls(store, monkeypatch):
    """Against trying every k by hand, every dropped sublayer reconstructed by itself."""
    model = tiny("llama", "sdpa")
    speed = {"prompt_len": 512, "new_tokens": 64}
    found = corrections(model, TEXT, ("attn", "mlp"))
    tried = []
    original = selectors.quality

    def noted(model, tokenizer, some, *arguments, **settings):
        tried.append(some[""])
        return original(model, tokenizer, some, *arguments, **settings)

    monkeypatch.setattr(selectors, "quality", noted)
    chooser = Chooser(model, TEXT, SHORT, LONG, speed=speed, store=store)
    (contender,) = chooser.mixed([3], 5, 4, Reconstruction(TEXT))
    losses = []
    for variant in tried:
        changes = combined(found, variant.plan)
        layers = variant.windows.layers if variant.windows else ()
        with reconstructed(model, variant.plan, changes), windowed(model, layers, 4):
            losses.append(perplexity(model, LONG, progress=False)["log_perplexity"])
    sizes = [len(variant.plan) for variant in tried]
    assert sizes == list(range(sizes[0], sizes[0] + len(sizes))) and len(sizes) > 1
    assert losses[:-1] == sorted(losses[:-1], reverse=True)
    best = tried[int(np.argmin(losses))]
    assert contender.variant.plan == best.plan and contender.variant.windows == best.windows


def test_drops_and_windows_without_reconstruction_and_too_few(store):
    model = tiny("llama", "sdpa")
    speed = {"prompt_len": 512, "new_tokens": 64}
    chooser = Chooser(model, TEXT, SHORT, LONG, speed=speed, store=store)
    (contender,) = chooser.mixed([3], 5, 4)
    assert contender.variant.reconstruction is None
    with pytest.raises(ValueError, match="most=1 sublayers save less time than 5"):
        chooser.mixed([5], 1, 4)


def test_methods_are_a_selector_and_what_makes_up_for_its_layers(store):
    chooser = Chooser(tiny("llama"), TEXT, SHORT, speed=SPEED, store=store)
    methods = ["cosine: none", "KL greedy, reconstructed: least squares", "cosine: mean"]
    found = [(contender.method, contender.n) for contender in chooser.contenders(methods, [1, 2])]
    assert found == [
        ("cosine: none", 1),
        ("cosine: mean", 1),
        ("cosine: none", 2),
        ("cosine: mean", 2),
        ("KL greedy, reconstructed: least squares", 1),
        ("KL greedy, reconstructed: least squares", 2),
    ]
    for method in ("cosine", "cosine: magic"):
        with pytest.raises(ValueError, match=f"method '{method}' is not .*least squares"):
            chooser.contenders([method], [1])
