"""An experiment is what the library's own functions give with its settings, and refuses a setting that it has not."""

from dataclasses import fields, replace
from itertools import combinations

import numpy as np
import pytest
from tiny import byte_tokenizer, tiny

from llmdrop import DropPlan, Store, load_calibration, save_model, score
from llmdrop.compress.variant import Variant
from llmdrop.data.texts import held_out_texts, mixture
from llmdrop.evaluation.questions import retrieval
from llmdrop.repro.experiment import Experiment, Settings, load_experiment
from llmdrop.repro.quality import quality

SMALL = {
    "n_samples": 3,
    "seq_len": 24,
    "held_out": ["boolq", "stdlib"],
    "held_out_samples": 2,
    "held_out_len": 16,
    "contexts": [200],
    "n_facts": 1,
    "fit_sources": ["xsum", "quac"],
    "fit_samples": 2,
    "search_len": 12,
    "long_sources": ["multilexsum"],
    "long_samples": 2,
    "long_len": 40,
    "seed": 3,
}


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Experiment:
    root = tmp_path_factory.mktemp("experiment")
    tokenizer = byte_tokenizer()
    save_model(tiny("llama", vocab_size=len(tokenizer)), tokenizer, root / "a-model")
    return load_experiment(str(root / "a-model"), "cpu", store=Store(root / "store"), **SMALL)


def test_text_and_scores_are_those_of_the_settings(experiment):
    tokenizer = experiment.tokenizer
    text = load_calibration("xsum", tokenizer, 3, 24, seed=3)
    assert experiment.calibration.digest == experiment.text().digest == text.digest
    scores = score(experiment.model, text, progress=False)
    assert experiment.scores.attn == pytest.approx(scores.attn)
    by_sample = experiment.sample_scores()
    assert by_sample.shape == (3, 3, experiment.n_layers)
    np.testing.assert_allclose(by_sample.mean(axis=0), [scores.attn, scores.mlp, scores.block], atol=1e-5)
    other = load_calibration("quac", tokenizer, 2, 24, seed=3, skip=4)
    assert experiment.text("quac", n_samples=2, skip=4).digest == other.digest

    held_out = held_out_texts(tokenizer, 2, 16, ["boolq", "stdlib"], seed=3)
    assert {name: text.digest for name, text in experiment.held_out.items()} == {
        name: text.digest for name, text in held_out.items()
    }
    prompts, targets = retrieval(tokenizer, 200, 1, seed=3)
    assert list(experiment.retrieval) == [200]
    assert experiment.retrieval[200].prompts == prompts and experiment.retrieval[200].targets == targets


def test_layers_are_chosen_on_a_mixture_and_by_the_papers_method_on_the_calibration(experiment):
    tokenizer = experiment.tokenizer
    chooser = experiment.chooser
    sources = ["xsum", "quac"]
    assert chooser.text.digest == mixture(sources, tokenizer, 2, 24, seed=3).digest
    assert chooser.search_text.digest == mixture(sources, tokenizer, 1, 12, seed=3, skip=10).digest
    assert chooser.long_text.digest == mixture(["multilexsum"], tokenizer, 2, 40, seed=3).digest
    assert chooser.paper_text is experiment.calibration
    assert chooser.speed == Settings().predicted


def runs(text, n_tokens: int = 24) -> set[tuple[int, ...]]:
    """All runs of so many tokens."""
    return {
        tuple(sample[first : first + n_tokens])
        for sample in text.input_ids.tolist()
        for first in range(len(sample) - n_tokens + 1)
    }


@pytest.mark.parametrize(
    ("changed", "n_samples", "seq_len"),
    [
        ({}, 10, 256),
        ({"search_len": 32}, 4, 64),
        ({"seq_len": 64}, 2, 384),
        ({"fit_samples": 2, "seq_len": 1024}, 4, 32),
    ],
)
def test_what_is_fitted_searched_and_trained_on_is_not_the_same(experiment, smollm2, changed, n_samples, seq_len):
    """Whatever the lengths; and there is enough packaged text for the sizes that notebooks take."""
    real = replace(experiment, tokenizer=smollm2[1], settings=Settings(**changed))
    chooser = real.chooser
    texts = [chooser.text, chooser.search_text, real.training_text(n_samples, seq_len)]
    for one, other in combinations([runs(text) for text in texts], 2):
        assert not one & other


def test_quality_is_stored_under_the_same_keys_as_by_the_function(experiment):
    variants = {"whole": Variant(), "less": Variant(DropPlan(attn=[1]))}
    rows = experiment.quality(variants)
    assert set(rows["where"]) == {"boolq", "stdlib"}
    n_files = len(list(experiment.store.root.rglob("*.json")))
    again = quality(experiment.model, experiment.tokenizer, variants, experiment.held_out, store=experiment.store)
    assert again.equals(rows) and len(list(experiment.store.root.rglob("*.json"))) == n_files
    assert (
        experiment.quality(variants, texts={}, questions={"facts": experiment.retrieval[200]})["where"]
        .eq("facts")
        .all()
    )


def test_says_what_it_is(experiment):
    assert experiment.name == experiment.weights == "a-model"
    assert experiment.calibration_in_words == "3 × 24 tokens of xsum"
    assert experiment.held_out_in_words == "2 × 16 held-out tokens of each of boolq, stdlib"
    facts = experiment.provenance(profile="mine")
    assert facts["seed"] == 3 and facts["profile"] == "mine" and facts["weights_of"] == "a-model"
    assert facts["calibration_digest"] == experiment.calibration.digest


def test_unknown_settings_are_refused_before_anything_is_loaded():
    with pytest.raises(TypeError, match=r"SETTINGS has no 'n_sample', 'DTYPE'; it may have: dtype, ") as refused:
        load_experiment("no/such-model", n_sample=4, DTYPE="float32", seq_len=8)
    for setting in fields(Settings):
        assert setting.name in str(refused.value)
