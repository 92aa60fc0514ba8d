"""The study of one's own model: text that is kept apart, what is saved, and the plan that a limit asks for."""

import numpy as np
import pytest
import torch
from exports import TOKENIZER, wide
from tiny import byte_tokenizer, random_ids, tiny

import llmdrop
from llmdrop import Calibration, DropPlan
from llmdrop.compress.variant import Variant
from llmdrop.compress.windows import Windows
from llmdrop.evaluation.perplexity import perplexity
from llmdrop.repro import own_model
from llmdrop.repro.own_model import DROPS, RECONSTRUCTED, WINDOWED

SPEED = {"batch_size": 2, "prompt_len": 92, "new_tokens": 8}
TEXT = " ".join(f"Sentence {k} says that {k * k} is the square of {k}." for k in range(2000))


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    """Measurements of tiny models are of no use to anyone."""
    data = llmdrop.build_dir() / "data"
    monkeypatch.setenv("LLMDROP_BUILD", str(tmp_path / "build"))
    (tmp_path / "build").mkdir()
    (tmp_path / "build/data").symlink_to(data)


@pytest.fixture(scope="module")
def llama():
    return tiny("llama", "sdpa")


@pytest.fixture(scope="module")
def scores(llama):
    return llmdrop.score(llama, Calibration(random_ids(4, 96)), progress=False)


@pytest.fixture(scope="module")
def choice(llama):
    """Text that the whole model finds likely, since it wrote it: every layer less costs something."""
    torch.manual_seed(0)
    return {"its own": Calibration(llama.generate(random_ids(4, 4, seed=1), max_new_tokens=60, do_sample=True))}


def loss(model, variant: Variant, choice: dict[str, Calibration]) -> float:
    (text,) = choice.values()
    whole = perplexity(model, text, progress=False)["log_perplexity"]
    with variant.applied(model):
        return perplexity(model, text, progress=False)["log_perplexity"] - whole


def test_a_share_of_the_cache_or_a_speedup_asks_for_the_fewest_layers_that_give_it(llama, scores, choice):
    ways = own_model.drops(llama, scores)
    limits = own_model.check_limits(llama, ways, None, None, 0.6, **SPEED)
    asked = own_model.ask(llama, ways, choice, limits, **SPEED)
    assert asked.is_met and asked.variants["Attention Drop"].plan == llmdrop.plan_drop(scores, "attn", 2)  # 3 of 5 left
    assert "MLP Drop" not in asked.variants and "too little" in asked.missing["MLP Drop"]
    assert asked.best == min(asked.variants, key=lambda way: loss(llama, asked.variants[way], choice))

    limits = own_model.check_limits(llama, ways, None, 1.2, None, **SPEED)
    asked = own_model.ask(llama, ways, choice, limits, **SPEED)
    whole = own_model.savings(llama, Variant(), **SPEED)
    for way, variant in asked.variants.items():
        n = next(n for n, other in ways[way].items() if other is variant)
        before = ways[way].get(n - 1, Variant())
        faster = own_model.speedup(whole, own_model.savings(llama, variant, **SPEED))
        assert own_model.speedup(whole, own_model.savings(llama, before, **SPEED)) < 1.2 <= faster


def test_a_loss_asks_for_as_much_as_it_allows(llama, scores, choice):
    ways = own_model.drops(llama, scores)
    attn = [loss(llama, variant, choice) for variant in ways["Attention Drop"].values()]
    allowed = max(attn[:2]) + 1e-3  # at least two attention layers may go
    limits = own_model.check_limits(llama, ways, allowed, None, None, **SPEED)
    asked = own_model.ask(llama, {"Attention Drop": ways["Attention Drop"]}, choice, limits, **SPEED)
    n = len(asked.variant.plan.attn)
    assert asked.is_met and asked.target == "attn" and asked.n == n and n >= 1
    assert attn[n - 1] <= allowed and (n == len(attn) or attn[n] > allowed)


def test_where_every_step_loses_more_the_smallest_steps_are_given_and_it_is_said(llama, scores, choice):
    ways = own_model.drops(llama, scores)
    least = min(loss(llama, variants[1], choice) for variants in ways.values())
    assert least > 0
    limits = own_model.check_limits(llama, ways, least / 1000, None, None, **SPEED)
    asked = own_model.ask(llama, ways, choice, limits, **SPEED)
    assert not asked.is_met and asked.variants == {way: variants[1] for way, variants in ways.items()}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((0, None, None), "MAX_LOSS is above 0"),
        ((None, 0.9, None), "SPEEDUP above 1"),
        ((None, None, 1.5), "KV a share between 0 and 1"),
        ((None, None, 0.01), "no plan reaches KV=0.01: with one layer of a kind left, there is a share of 0.20"),
        ((None, 50, None), "no plan reaches SPEEDUP=50"),
    ],
)
def test_limits_that_no_plan_can_keep_are_refused_before_the_long_part(llama, scores, given, says):
    with pytest.raises(ValueError, match=says):
        own_model.check_limits(llama, own_model.drops(llama, scores), *given, **SPEED)


def test_without_any_limit_a_twentieth_of_a_nat_may_be_lost(llama, scores):
    assert own_model.check_limits(llama, own_model.drops(llama, scores), None, None, None, **SPEED) == {
        "MAX_LOSS": 0.05
    }


def test_a_speedup_of_a_model_without_gated_mlps_cannot_be_promised_and_the_rest_can():
    model = tiny("gpt_neox", "sdpa")
    ways = own_model.drops(model, llmdrop.score(model, Calibration(random_ids(2, 32)), progress=False))
    with pytest.raises(ValueError, match="SPEEDUP asks for a prediction.*gated MLPs.*MAX_LOSS or KV instead"):
        own_model.check_limits(model, ways, None, 1.2, None, **SPEED)
    assert own_model.check_limits(model, ways, None, None, 0.5, **SPEED) == {"KV": 0.5}
    assert set(own_model.savings(model, Variant(), **SPEED)) == {"weights", "kv"}
    assert "gated MLPs" in own_model.why_not_predicted(model)


def test_what_cannot_be_done_to_a_model_says_why():
    model = tiny("mistral", "sdpa")  # has windows of its own
    fit = Calibration(random_ids(4, 96))
    ways, impossible = own_model.other_ways(
        model, own_model.drops(model, llmdrop.score(model, fit, progress=False)), fit
    )
    assert set(ways) == {RECONSTRUCTED} and "windows of its own" in impossible[WINDOWED]


@pytest.mark.parametrize(
    "variant",
    [Variant(), Variant(DropPlan(attn=[0, 3])), Variant(DropPlan([1], [1, 2])), Variant(windows=Windows((1, 2), 8, 4))],
    ids=lambda variant: variant.label,
)
def test_savings_are_those_of_the_model_so_changed(llama, variant):
    saved = own_model.savings(llama, variant, **SPEED)
    with variant.applied(llama):
        found = llmdrop.measure_speed(llama, **SPEED, repeats=1)
        weights = sum(parameter.nbytes for parameter in llama.parameters())
    assert saved["weights"] == pytest.approx(weights / 1e6)
    # a window holds the own token only while it is read
    assert saved["kv"] == pytest.approx(found["kv_bytes"] / 1e6, rel=0 if variant.windows is None else 0.02)


def test_the_parts_that_a_token_reads_are_all_of_the_model(llama):
    parts = own_model.read_parts(llama, **SPEED)
    embedding = llama.get_input_embeddings().weight.nbytes
    weights = sum(parameter.nbytes for parameter in llama.parameters()) - embedding
    assert sum(parts.values()) - parts["KV cache"] == pytest.approx(weights / 1e6)


def test_a_context_longer_than_the_models_is_refused(llama):
    assert own_model.at_context(llama, 2, 100) == SPEED
    with pytest.raises(ValueError, match="CONTEXT=257.*at most 256, the positions of this model"):
        own_model.at_context(llama, 1, 257)
    with pytest.raises(ValueError, match="more than 8 tokens"):
        own_model.at_context(llama, 1, 8)


def windows_of(text: Calibration) -> set[tuple]:
    """All runs of 64 tokens."""
    return {tuple(run) for row in text.input_ids.tolist() for run in zip(*(row[k:] for k in range(64)), strict=False)}


def test_own_text_is_scored_chosen_and_judged_on_different_parts(tmp_path):
    model = tiny("llama", vocab_size=257)
    file = tmp_path / "own.txt"
    file.write_text(TEXT)
    texts = own_model.load_texts(model, byte_tokenizer(), str(file), samples=8)
    assert texts.judged == ["own.txt, held out"] and set(texts.held_out) > set(texts.judged) and not texts.notes
    own = [texts.calibration, texts.choice["own.txt, held out"], texts.held_out["own.txt, held out"]]
    assert {text.input_ids.shape[1] for text in own} == {256}  # the model's positions
    for k, text in enumerate(own):
        for other in own[k + 1 :]:
            assert not windows_of(text) & windows_of(other)


def test_named_texts_share_nothing_either():
    texts = own_model.load_texts(tiny("llama", vocab_size=257), byte_tokenizer(), "xsum", samples=4)
    assert texts.judged == list(texts.held_out) and len(texts.held_out) == 4
    for held_out in texts.held_out.values():
        for text in (texts.calibration, texts.fit, texts.choice["several texts"]):
            assert not windows_of(held_out) & windows_of(text)
    assert not windows_of(texts.fit) & windows_of(texts.choice["several texts"])


def test_where_no_text_is_left_to_measure_on_it_is_said(tmp_path, monkeypatch):
    model = tiny("llama", vocab_size=257)
    short = tmp_path / "short.txt"
    short.write_text(TEXT[:1100])
    texts = own_model.load_texts(model, byte_tokenizer(), str(short), samples=4)
    assert len(texts.judged) == 4 and "None of your text is left to measure on" in texts.notes[0]
    monkeypatch.setattr(own_model, "available_sources", lambda data_dir: [])
    with pytest.raises(ValueError, match="there is no text to measure on.*None of the named texts is here"):
        own_model.load_texts(model, byte_tokenizer(), str(short), samples=4)
    with pytest.raises(ValueError, match="SAMPLES=3: give at least 4"):
        own_model.load_texts(model, byte_tokenizer(), "xsum", samples=3)


def test_plans_of_samples_that_agree_are_always_the_same_and_of_others_not(scores):
    alike = {kind: np.tile(getattr(scores, kind), (6, 1)) for kind in ("attn", "mlp", "block")}
    for target, n in (("attn", 2), ("joint", 3), ("block", 1)):
        plan = llmdrop.plan_drop(scores, target, n)
        table = own_model.plan_stability(scores, alike, target, n, [2, 6], draws=20)
        always = table[table["percent"].round(6) == 100]
        assert set(table["percent"].round(6)) == {0, 100}
        for size in (2, 6):
            found = {(row.kind, row.layer) for row in always[always["n_samples"] == size].itertuples()}
            assert found == {("attn", i) for i in plan.attn} | {("mlp", i) for i in plan.mlp}
    noisy = {kind: np.random.default_rng(0).normal(size=values.shape) for kind, values in alike.items()}
    table = own_model.plan_stability(scores, noisy, "attn", 2, [2], draws=50)
    assert table["percent"].sum() == pytest.approx(200) and table["percent"].max() < 100


@pytest.mark.parametrize("reconstructed", [False, True])
def test_the_commands_save_that_very_plan(tmp_path, monkeypatch, reconstructed):
    pytest.importorskip("gguf")
    model = wide()
    llmdrop.save_model(model, TOKENIZER, tmp_path / "whole")
    texts = own_model.load_texts(model, TOKENIZER, "xsum", samples=8)
    variant = Variant(DropPlan(attn=[1, 3], mlp=[4] if not reconstructed else []))
    if reconstructed:
        scores = llmdrop.score(model, texts.calibration, progress=False)
        ways, _ = own_model.other_ways(model, own_model.drops(model, scores), texts.fit)
        variant = Variant(variant.plan, ways[RECONSTRUCTED][1].reconstruction)
    commands = own_model.export_commands(model, str(tmp_path / "whole"), variant, texts, "xsum")
    commands = commands.replace('weights="q8_0"', 'weights="f32"')  # so that logits are those of the model
    monkeypatch.chdir(tmp_path)
    exec(commands, {})
    ids = random_ids(2, 40)
    with torch.inference_mode(), variant.applied(model):
        logits = model(ids).logits
    label = variant.plan.label
    for name in (f"whole-{label}", f"whole-{label}.gguf", f"whole-{label}-nas"):
        again, _ = llmdrop.load_model(tmp_path / name, device="cpu")
        assert llmdrop.find_anatomy(again).plan == variant.plan
        with torch.inference_mode():
            torch.testing.assert_close(again(ids).logits, logits, rtol=1e-3, atol=1e-3)


def test_drops_leave_one_layer_of_each_kind(llama, scores):
    ways = own_model.drops(llama, scores)
    assert list(ways) == list(DROPS)
    assert {way: len(variants) for way, variants in ways.items()} == {
        "Attention Drop": 4,
        "MLP Drop": 4,
        "Block Drop": 4,
        "Joint Drop": 9,
    }
