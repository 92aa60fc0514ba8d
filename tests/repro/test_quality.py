"""Item by item, a variant scores what it scores by the library's own functions; and nothing is measured twice."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import byte_tokenizer, random_ids, tiny

from llmdrop import Calibration, DropPlan, Store, evaluate, load_calibration, perplexity, weights_digest
from llmdrop.anatomy import find_anatomy
from llmdrop.compress.four_bits import FourBits
from llmdrop.compress.healing import Healing
from llmdrop.compress.reconstruction import Reconstruction
from llmdrop.compress.variant import Variant
from llmdrop.compress.wanda import WandaMask
from llmdrop.compress.windows import Windows
from llmdrop.evaluation import evaluate as evaluate_module
from llmdrop.evaluation import generation, sweep
from llmdrop.evaluation.evaluate import ask
from llmdrop.evaluation.generation import generate
from llmdrop.evaluation.questions import retrieval
from llmdrop.repro import provenance as provenance_module
from llmdrop.repro import quality as quality_module
from llmdrop.repro.quality import Questions, answers, choice, quality

FIT = Calibration(random_ids(8, 24))
PLAN = DropPlan(attn=[1, 3], mlp=[2])
TEXTS = {"one": Calibration(random_ids(3, 20, seed=7)), "other": Calibration(random_ids(2, 16, seed=8))}
PADDING = torch.tensor([[0] * k + [1] * (12 - k) for k in (0, 4, 9)])
PADDED = Calibration(random_ids(3, 12, seed=9), attention_mask=PADDING)
QUESTIONS = Questions(["The river runs past ", "The river runs past the mill. It"], ["the", " r"])


def variants() -> dict[str, Variant]:
    """Of every kind that runs on a tiny model of random weights."""
    return {
        "whole": Variant(),
        "plan": Variant(PLAN),
        "block": Variant(DropPlan([1], [1])),
        "reconstructed": Variant(PLAN, Reconstruction(FIT)),
        "windows": Variant(windows=Windows((0, 2, 4), 4, 1)),
        "mask": Variant(mask=WandaMask(0.4, FIT)),
        "plan and windows": Variant(DropPlan([1]), windows=Windows((0, 4), 4, 1)),
        "reconstructed and windows": Variant(PLAN, Reconstruction(FIT, "mean"), Windows((0, 4), 4, 1)),
    }


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path)


@pytest.fixture(scope="module")
def model():
    return tiny("llama", "sdpa", vocab_size=300, max_position_embeddings=1024)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def files(store: Store) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in store.root.rglob("*.json")}


class Spy:
    """Notes every run of the model: how many plans a sweep has, and of what."""

    def __init__(self, monkeypatch):
        self.calls: list[tuple[str, int]] = []
        self.applied: list[str] = []
        for name in ("loglikelihoods", "ask", "greedy_matches", "generate"):
            monkeypatch.setattr(quality_module, name, self._noted(name, getattr(quality_module, name)))
        applied = Variant.applied

        def noted(variant, model):
            self.applied.append(variant.label)
            return applied(variant, model)

        monkeypatch.setattr(Variant, "applied", noted)

    def _noted(self, name: str, function):
        def noted(*arguments, **settings):
            plans = [argument for argument in arguments if isinstance(argument, list) and argument]
            plans = next((each for each in plans if isinstance(each[0], DropPlan)), [DropPlan()])
            self.calls.append((name, len(plans)))
            return function(*arguments, **settings)

        return noted

    def take(self) -> list[tuple[str, int]]:
        calls, self.calls, self.applied = self.calls, [], []
        return calls


@pytest.fixture
def spy(monkeypatch) -> Spy:
    return Spy(monkeypatch)


def values(rows: pd.DataFrame, variant: str, where: str, metric: str = "nats") -> np.ndarray:
    part = rows[(rows["variant"] == variant) & (rows["where"] == where) & (rows["metric"] == metric)]
    assert list(part["item"]) == list(range(len(part)))
    return part["value"].to_numpy()


# ---- texts


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen3", "gemma2", "gpt_neox"])
def test_every_sample_has_the_loss_that_transformers_gives(store, family):
    model = tiny(family, "sdpa")
    rows = quality(model, None, {"whole": Variant(), "plan": Variant(PLAN)}, TEXTS, store=store)
    assert list(rows.columns) == ["variant", "where", "metric", "item", "value", "n"]
    for name, variant in {"whole": Variant(), "plan": Variant(PLAN)}.items():
        with variant.applied(model), torch.no_grad():
            for where, text in TEXTS.items():
                losses = [float(model(ids[None], labels=ids[None]).loss) for ids in text.input_ids]
                np.testing.assert_allclose(values(rows, name, where), losses, atol=2e-5)
    assert set(rows.loc[rows["where"] == "one", "n"]) == {19} and set(rows["metric"]) == {"nats"}


def test_padding_is_left_out(store, model):
    rows = quality(model, None, {"whole": Variant()}, {"padded": PADDED}, store=store)
    assert list(rows["n"]) == [11, 7, 2]
    expected = perplexity(model, PADDED, progress=False)
    assert np.average(rows["value"], weights=rows["n"]) == pytest.approx(expected["log_perplexity"], abs=1e-6)
    alone = quality(model, None, {"whole": Variant()}, {"last": Calibration(PADDED.input_ids[2:, 9:])}, store=store)
    assert alone["value"][0] == pytest.approx(rows["value"][2], abs=1e-5)


@pytest.mark.parametrize("name", sorted(variants()))
def test_a_variant_loses_what_perplexity_says_inside_it(store, model, name):
    variant = variants()[name]
    rows = quality(model, None, {"whole": Variant(), name: variant}, TEXTS, store=store)
    for where, text in TEXTS.items():
        with variant.applied(model):
            expected = perplexity(model, text, progress=False)["log_perplexity"]
        assert values(rows, name, where).mean() == pytest.approx(expected, abs=2e-5)
    assert name == "whole" or abs(values(rows, name, "one") - values(rows, "whole", "one")).max() > 1e-3


def test_a_variant_of_4_bits(store):
    pytest.importorskip("bitsandbytes")
    model = tiny("llama", "sdpa", hidden_size=64, intermediate_size=64)
    variant = Variant(DropPlan([1]), four_bits=FourBits())
    rows = quality(model, None, {"whole": Variant(), "packed": variant}, TEXTS, store=store)
    with variant.applied(model):
        expected = perplexity(model, TEXTS["one"], progress=False)["log_perplexity"]
    assert values(rows, "packed", "one").mean() == pytest.approx(expected, abs=1e-5)
    assert abs(values(rows, "packed", "one") - values(rows, "whole", "one")).max() > 1e-3


@settings(deadline=None, max_examples=20, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.sets(st.integers(0, 4)), st.sets(st.integers(0, 3))), min_size=1, max_size=6))
def test_plans_in_one_sweep_are_as_alone(tmp_path_factory, model, plans):
    plans = [DropPlan(attn, mlp) for attn, mlp in plans]
    together = {str(k): Variant(plan) for k, plan in enumerate(plans)}
    rows = quality(model, None, together, TEXTS, store=Store(tmp_path_factory.mktemp("together")))
    assert list(dict.fromkeys(rows["variant"])) == list(together)
    apart = Store(tmp_path_factory.mktemp("apart"))
    for name, variant in together.items():
        alone = quality(model, None, {name: variant}, TEXTS, store=apart)
        for where in TEXTS:
            np.testing.assert_allclose(values(rows, name, where), values(alone, name, where), atol=1e-5)


def test_plans_share_one_sweep_and_others_run_alone(store, model, spy):
    quality(model, None, variants(), {"one": TEXTS["one"]}, store=store)
    assert spy.take() == [("loglikelihoods", 3)] + [("loglikelihoods", 1)] * 5


# ---- benchmarks


def test_tasks_give_what_evaluate_gives_and_choice(store, model, tokenizer):
    some = {name: variants()[name] for name in ("whole", "plan", "windows", "reconstructed")}
    rows = quality(model, tokenizer, some, tasks=["piqa", "openbookqa"], limit=4, store=store)
    for name, variant in some.items():
        with variant.applied(model):
            table = evaluate(model, tokenizer, ["piqa", "openbookqa"], limit=4, progress=False)
            records = ask(model, tokenizer, [DropPlan()], "openbookqa", limit=4, progress=False)[0]
        for row in table.itertuples():
            assert values(rows, name, row.task, row.metric).mean() == pytest.approx(row.value), (name, row)
        probabilities = []
        for record in records:
            scores = torch.tensor(record["loglikelihoods"], dtype=torch.float64) / torch.tensor(record["bytes"])
            probabilities.append(float(scores.log_softmax(0)[record["gold"]]))
        np.testing.assert_allclose(values(rows, name, "openbookqa", "choice"), probabilities)
    assert (rows["n"] == 1).all() and set(rows["metric"]) == {"acc", "acc_norm", "choice"}


@given(st.lists(st.tuples(st.floats(-500, -0.01), st.integers(1, 400)), min_size=2, max_size=6), st.data())
def test_choice_is_a_log_probability_of_one_among_them(choices, data):
    loglikelihoods = [value for value, _ in choices]
    n_bytes = [n for _, n in choices]
    question = {"loglikelihoods": loglikelihoods, "bytes": n_bytes}
    logs = [choice(question | {"gold": gold}) for gold in range(len(choices))]
    assert sum(np.exp(logs)) == pytest.approx(1)
    per_byte = np.array(loglikelihoods) / np.array(n_bytes)
    assert logs[int(per_byte.argmax())] == max(logs)


@pytest.fixture
def writer(tokenizer):
    """A tiny model that writes letters only, so that what it writes can be read back."""
    model = tiny("llama", "sdpa", vocab_size=300, max_position_embeddings=1024)
    letters = {tokenizer(chr(code))["input_ids"][0] for code in range(33, 127)}
    with torch.no_grad():
        for token in set(range(300)) - letters:
            model.lm_head.weight[token] = 0
    return model


@pytest.mark.parametrize("name", sorted(variants()))
def test_questions_match_what_is_generated(store, writer, tokenizer, name):
    """A question is right where greedy decoding, with the variant's own KV cache, writes the target."""
    prompts = ["The river runs past ", "The river runs past the mill. It", "A"]
    variant = variants()[name]
    with variant.applied(writer):
        written = generate(writer, tokenizer, prompts, 3, batch_size=1)
    assert min(map(len, written)) == 3
    targets = [written[0], written[1][:2] + "\n", written[2]]
    rows = quality(writer, tokenizer, {name: variant}, questions={"mine": Questions(prompts, targets)}, store=store)
    assert list(rows["value"]) == [1, 0, 1]
    assert set(rows["metric"]) == {"match"} and set(rows["where"]) == {"mine"}


def test_the_real_model(store, smollm2):
    """SmolLM2: losses, benchmarks and facts of variants are those of the library's own functions."""
    model, tokenizer = smollm2
    text = load_calibration("narrativeqa", tokenizer, 2, 96)
    facts = Questions(*retrieval(tokenizer, 256, 4))
    some = {"whole": Variant(), "plan": Variant(DropPlan([25, 26])), "windows": Variant(windows=Windows(range(30), 8))}
    rows = quality(model, tokenizer, some, {"plots": text}, ["piqa"], {"facts": facts}, limit=3, store=store)
    for name, variant in some.items():
        with variant.applied(model):
            loss = perplexity(model, text, progress=False)["log_perplexity"]
            table = evaluate(model, tokenizer, ["piqa"], limit=3, progress=False)
            written = generate(model, tokenizer, facts.prompts, 4, batch_size=1)
        assert values(rows, name, "plots").mean() == pytest.approx(loss, abs=1e-5)
        for row in table.itertuples():
            assert values(rows, name, "piqa", row.metric).mean() == pytest.approx(row.value)
        found = [float(answer.startswith(target)) for answer, target in zip(written, facts.targets, strict=True)]
        assert list(values(rows, name, "facts", "match")) == found
    assert values(rows, "whole", "facts", "match").sum() > values(rows, "windows", "facts", "match").sum() == 0
    assert quality(model, tokenizer, some, {"plots": text}, ["piqa"], {"facts": facts}, limit=3, store=store).equals(
        rows
    )


# ---- the store


def everything(model, tokenizer, some, store, **changed) -> pd.DataFrame:
    settings = {"texts": TEXTS, "tasks": ["piqa"], "questions": {"asked": QUESTIONS}, "limit": 2} | changed
    return quality(model, tokenizer, some, **settings, store=store)


def test_nothing_is_measured_twice(store, model, tokenizer, spy):
    first = everything(model, tokenizer, variants(), store)
    kept = files(store)
    spy.take()
    again = everything(model, tokenizer, variants(), store)
    assert again.equals(first) and spy.calls == [] and spy.applied == [] and files(store) == kept


def test_the_weights_are_digested_once(store, model, tokenizer, monkeypatch):
    """For the keys; what is stored beside the values says the same, and does not read all weights again."""
    digests = []

    def noted(model) -> str:
        digests.append(weights_digest(model))
        return digests[-1]

    monkeypatch.setattr(provenance_module, "weights_digest", noted)
    everything(model, tokenizer, {"whole": Variant(), "plan": Variant(PLAN)}, store)
    records = [json.loads(file.read_text()) for file in files(store)]
    assert len(records) == 8 and len(digests) == 1
    assert all(record["provenance"]["weights"] == record["key"]["weights"] == digests[0] for record in records)


def test_one_more_variant_text_or_task_measures_one(store, model, tokenizer, spy):
    some = {"whole": Variant(), "plan": Variant(PLAN)}
    first = everything(model, tokenizer, some, store)
    assert spy.take() == [("loglikelihoods", 2)] * 2 + [("ask", 2), ("greedy_matches", 2)]
    more = everything(model, tokenizer, {"new": Variant(DropPlan([2]))} | some, store)
    assert spy.take() == [("loglikelihoods", 1)] * 2 + [("ask", 1), ("greedy_matches", 1)]
    assert more[more["variant"] != "new"].reset_index(drop=True).equals(first)
    assert list(dict.fromkeys(more["variant"])) == ["new", "whole", "plan"]
    everything(model, tokenizer, some, store, texts=TEXTS | {"third": PADDED})
    assert spy.take() == [("loglikelihoods", 2)]
    everything(model, tokenizer, some, store, tasks=["openbookqa", "piqa"])
    assert spy.take() == [("ask", 2)]


def test_equal_variants_are_measured_once(store, model, spy):
    twice = {"one": Variant(PLAN), "other": Variant(PLAN, name="another name"), "whole": Variant()}
    rows = quality(model, None, twice, {"one": TEXTS["one"]}, store=store)
    assert spy.take() == [("loglikelihoods", 2)]
    assert list(values(rows, "one", "one")) == list(values(rows, "other", "one"))


def test_what_is_fitted_or_trained_is_so_once_for_all_places(store, model, tokenizer, spy):
    """Two texts, a task and prompts; a place that is stored already is not a reason to apply a variant again."""
    everything(model, tokenizer, variants(), store, tasks=[], questions={})
    changed = [variant.label for variant in variants().values() if not variant.is_plan_only]
    assert spy.applied == changed
    spy.take()
    everything(model, tokenizer, variants(), store)
    assert spy.applied == changed
    assert spy.take() == [("ask", 3), ("greedy_matches", 3)] + [("ask", 1), ("greedy_matches", 1)] * len(changed)


@pytest.mark.parametrize("fails", ["loglikelihoods", "greedy_matches"])
def test_a_failure_restores_the_model(store, model, tokenizer, monkeypatch, fails):
    """Whatever fails, in whichever place, also where the variant was applied for an earlier one."""
    before = weights_digest(model)

    def failing(*arguments, **settings):
        raise RuntimeError("out of memory")

    for name, variant in variants().items():
        with monkeypatch.context() as patch:
            patch.setattr(quality_module, fails, failing)
            with pytest.raises(RuntimeError, match="out of memory"):
                everything(model, tokenizer, {name: variant}, store, tasks=[])
        assert weights_digest(model) == before and find_anatomy(model).n_layers == 5 and not find_anatomy(model).plan


@pytest.mark.parametrize("failing", ["reconstructed", "mask", "windows"])
def test_an_interrupted_run_keeps_what_it_had(store, model, monkeypatch, spy, failing):
    """Plans are swept and stored first, whatever the order; what came before the interruption is not measured again."""
    some = {name: variants()[name] for name in ("reconstructed", "mask", "windows", "whole", "plan")}
    applied = Variant.applied

    def interrupted(variant, model):
        if variant is some[failing]:
            raise KeyboardInterrupt
        return applied(variant, model)

    with monkeypatch.context() as patch:
        patch.setattr(Variant, "applied", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quality(model, None, some, {"one": TEXTS["one"]}, store=store)
    before = [name for name in ("reconstructed", "mask", "windows") if name != failing]
    before = before[: ["reconstructed", "mask", "windows"].index(failing)]
    assert spy.take() == [("loglikelihoods", 2)] + [("loglikelihoods", 1)] * len(before)
    assert len(files(store)) == 2 + len(before)
    rows = quality(model, None, some, {"one": TEXTS["one"]}, store=store)
    assert spy.take() == [("loglikelihoods", 1)] * (3 - len(before))
    assert list(dict.fromkeys(rows["variant"])) == list(some)


def test_the_name_of_a_text_does_not_leak(store, model, spy):
    """Another text of the same tokens is stored already; it is called what it is called now."""
    text = TEXTS["one"]
    first = quality(model, None, variants(), {"one": text}, store=store)
    spy.take()
    again = Calibration(text.input_ids.clone(), source="another source")
    renamed = quality(model, None, variants(), {"a new name": again}, store=store)
    assert spy.calls == [] and set(renamed["where"]) == {"a new name"}
    assert renamed.drop(columns="where").equals(first.drop(columns="where"))
    both = quality(model, None, variants(), {"b": text, "a": again}, store=store)
    assert list(dict.fromkeys(both["where"])) == ["b", "a"]


def test_the_name_of_questions_does_not_leak(store, model, tokenizer, spy):
    quality(model, tokenizer, variants(), questions={"one": QUESTIONS}, store=store)
    spy.take()
    rows = quality(model, tokenizer, variants(), questions={"other": QUESTIONS}, store=store)
    assert spy.calls == [] and set(rows["where"]) == {"other"}


CHANGES = {
    "plan": lambda: {"some": {"x": Variant(DropPlan([2]))}},
    "texts": lambda: {"texts": {"one": PADDED}},
    "tasks": lambda: {"tasks": ["openbookqa"]},
    "limit": lambda: {"limit": 1},
    "questions": lambda: {"questions": {"asked": Questions(QUESTIONS.prompts, [" a", " r"])}},
    "weights": lambda: {"model": tiny("llama", "sdpa", vocab_size=300, max_position_embeddings=1024, seed=1)},
    "dtype": lambda: {"model": tiny("llama", "sdpa", vocab_size=300, max_position_embeddings=1024).bfloat16()},
    "attention": lambda: {"model": tiny("llama", "eager", vocab_size=300, max_position_embeddings=1024)},
}


@pytest.mark.parametrize("what", sorted(CHANGES))
def test_keys_differ_by_what_matters(store, model, tokenizer, spy, what):
    some = {"x": Variant(PLAN)}
    everything(model, tokenizer, some, store)
    spy.take()
    changed = CHANGES[what]()
    everything(changed.pop("model", model), tokenizer, changed.pop("some", some), store, **changed)
    n_calls = {"texts": 1, "tasks": 1, "limit": 1, "questions": 1}
    assert len(spy.calls) == n_calls.get(what, 4)  # of two texts, a task and a set of questions


def test_keys_differ_by_the_number_of_examples(store, model, tokenizer, spy):
    some = {"x": Variant(PLAN)}
    for shots in (0, 1, {"boolq": 2}):
        quality(model, tokenizer, some, tasks=["boolq"], limit=1, num_fewshot=shots, store=store)
        assert spy.take() == [("ask", 1)]
    quality(model, tokenizer, some, tasks=["boolq"], limit=1, num_fewshot={"boolq": 1}, store=store)
    assert spy.take() == []


def test_keys_differ_by_the_tokenizer_and_the_versions(store, model, tokenizer, spy, monkeypatch):
    some = {"x": Variant(PLAN)}
    everything(model, tokenizer, some, store)
    spy.take()
    other = byte_tokenizer()
    other.add_tokens(["river"])
    everything(model, other, some, store)
    assert [name for name, _ in spy.take()] == ["ask", "greedy_matches"]  # texts are tokens already
    affected = {sweep: 4, evaluate_module: 1, generation: 1}
    for module, n_calls in affected.items():
        with monkeypatch.context() as patch:
            patch.setattr(module, "VERSION", module.VERSION + 1)
            everything(model, tokenizer, some, store)
        assert len(spy.take()) == n_calls, module


def test_keys_do_not_differ_by_anything_else(store, model, tokenizer, spy):
    everything(model, tokenizer, {"x": Variant(PLAN)}, store)
    spy.take()
    twin = tiny("llama", "sdpa", vocab_size=300, max_position_embeddings=1024)
    twin.name_or_path = "org/elsewhere@v2"
    twin.train()
    same = {"y": Variant(DropPlan(attn=[3, 1], mlp=[2], n_layers=5), name="ours")}
    texts = {name: Calibration(text.input_ids.int(), "elsewhere") for name, text in TEXTS.items()}
    asked = {"asked": Questions(tuple(QUESTIONS.prompts), tuple(QUESTIONS.targets))}
    everything(twin, byte_tokenizer(), same, store, texts=texts, questions=asked, batch_size=3)
    assert spy.calls == [] and twin.training


def test_what_is_stored_says_what_it_is(store, model, tokenizer):
    everything(model, tokenizer, {"x": Variant(PLAN)}, store)
    records = [json.loads(path.read_text()) for path in sorted(files(store))]
    assert sorted(path.parent.name for path in files(store)) == ["losses", "losses", "matches", "questions"]
    for record in records:
        assert record["key"]["variant"] == PLAN.key and record["provenance"]["weights"] == record["key"]["weights"]
    (question, *_) = next(record["value"] for record in records if "task" in record["key"])
    assert {"loglikelihoods", "bytes", "tokens", "gold", "metrics"} <= set(question)  # for other metrics, later


def test_a_healed_variant_is_trained_once_and_stored(store, model, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setenv("LLMDROP_BUILD", str(tmp_path / "build"))
    some = {"plan": Variant(PLAN), "healed": Variant(PLAN, healing=Healing(FIT, learning_rate=1e-2))}
    rows = quality(model, None, some, {"one": TEXTS["one"]}, store=store)
    assert abs(values(rows, "healed", "one") - values(rows, "plan", "one")).max() > 1e-3
    monkeypatch.setattr("llmdrop.compress.healing.heal", None)
    assert quality(model, None, some, {"one": TEXTS["one"]}, store=store).equals(rows)


def test_windows_longer_than_the_questions_change_nothing(store, smollm2):
    """Real questions: a window longer than they are changes no log-likelihood, a short one does."""
    model, tokenizer = smollm2
    some = {"whole": Variant(), "long": Variant(windows=Windows(range(30), 256, 2))}
    some["short"] = Variant(windows=Windows(range(30), 4, 2))
    rows = quality(model, tokenizer, some, tasks=["piqa"], limit=6, store=store)
    whole, long, short = (values(rows, name, "piqa", "choice") for name in some)
    np.testing.assert_allclose(long, whole, atol=1e-4)
    assert abs(short - whole).max() > 1e-2


# ---- answers


def test_answers_are_what_each_variant_generates(store, model, tokenizer, spy):
    prompts = ["The river runs past ", "A"]
    some = {name: variants()[name] for name in ("windows", "whole", "plan")}
    rows = answers(model, tokenizer, some, prompts, "mine", max_new_tokens=4, batch_size=1, store=store)
    for name, variant in some.items():
        with variant.applied(model):
            expected = generate(model, tokenizer, prompts, 4, batch_size=1)
        part = rows[rows["variant"] == name]
        assert list(part["answer"]) == expected and list(part["item"]) == [0, 1]
    assert list(dict.fromkeys(rows["variant"])) == list(some)
    spy.take()
    again = answers(model, tokenizer, some, prompts, "renamed", max_new_tokens=4, store=store)
    assert again.equals(rows) and spy.calls == []
    answers(model, tokenizer, some, prompts, "mine", max_new_tokens=4, stop=["e"], store=store)
    answers(model, tokenizer, some, prompts, "mine", max_new_tokens=5, store=store)
    answers(model, tokenizer, some, prompts[:1], "mine", max_new_tokens=4, store=store)
    assert len(spy.take()) == 9


def test_answers_refuse_long_prompts_before_anything_runs(store, model, tokenizer, spy):
    with pytest.raises(ValueError, match="more than the 1,024 positions"):
        answers(model, tokenizer, variants(), ["short", "x" * 1020], "mine", max_new_tokens=8, store=store)
    assert spy.calls == [] and not files(store)


# ---- refusals


def test_refusals_before_anything_is_measured(store, model, tokenizer, spy):
    some = {"whole": Variant()}
    with pytest.raises(ValueError, match="unknown task"):
        everything(model, tokenizer, some, store, tasks=["piqa", "pica"])
    with pytest.raises(ValueError, match="piqa names several"):
        everything(model, tokenizer, some, store, texts={"piqa": TEXTS["one"]})
    with pytest.raises(ValueError, match="no variants"):
        everything(model, tokenizer, {}, store)
    assert spy.calls == [] and not files(store)
    assert quality(model, tokenizer, some, store=store).empty


@pytest.mark.parametrize("wrong", [Variant(DropPlan([7])), Variant(windows=Windows((9,), 4))])
def test_a_variant_that_does_not_fit_is_refused_and_the_model_stays(store, model, wrong):
    before = quality(model, None, {"whole": Variant()}, TEXTS, store=store)
    with pytest.raises(ValueError, match="out of range|no attention in layers"):
        quality(model, None, {"wrong": wrong}, TEXTS, store=store)
    again = quality(model, None, {"whole": Variant()}, TEXTS, store=Store(store.root / "again"))
    assert again.equals(before)


def test_in_16_bits_fits_of_another_batch_size_are_other_measurements(tmp_path):
    model = tiny("llama").bfloat16()
    text = Calibration(random_ids(8, 12))
    counted = []
    for batch_size in (2, 4, 2):
        variant = Variant(DropPlan([2]), reconstruction=Reconstruction(text, batch_size=batch_size))
        quality(model, None, {"a": variant}, {"text": text}, store=Store(tmp_path))
        counted.append(len(list(tmp_path.glob("losses/*.json"))))
    assert counted == [1, 2, 2]
    for batch_size in (2, 4):
        variant = Variant(DropPlan([2]), reconstruction=Reconstruction(text, batch_size=batch_size))
        quality(tiny("llama"), None, {"a": variant}, {"text": text}, store=Store(tmp_path / "float32"))
    assert len(list(tmp_path.glob("float32/losses/*.json"))) == 1
