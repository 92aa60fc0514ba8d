"""The README.md of a saved model: the hub reads its metadata, its commands are true, and nobody's own text is lost."""

import json
import re

import pytest
import torch
from exports import TOKENIZER, logits
from huggingface_hub import ModelCard, constants
from tiny import random_ids, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmdrop import DropPlan, apply_plan, find_anatomy, load_model, save_model
from llmdrop.checkpoints.destination import CARD_MARK
from llmdrop.streaming.drop import drop_checkpoint

PLAN = DropPlan([1, 3], [2], 5)
NOTE = "Lowest cosine scores on xsum, 16 × 512 tokens."


def named(name, plan=PLAN, family="llama"):
    model = tiny(family)
    model.name_or_path = name
    return apply_plan(model, plan)


def card_of(folder):
    """The card as the hub parses it: one that does not parse raises."""
    return ModelCard.load(folder / "README.md")


def plan_in(card):
    return DropPlan.from_json(re.search(r"`(\{.*?\})`", card.text)[1])


@pytest.mark.parametrize("format", ["hf", "nemotron-nas"])
@pytest.mark.parametrize("plan", [PLAN, DropPlan([2], [2], 5)], ids=["sublayers", "blocks"])
def test_a_card_says_what_it_is_made_of_and_how(plan, format, tmp_path):
    card = card_of(save_model(named("me/tiny@v2", plan), TOKENIZER, tmp_path / "out", format=format, note=NOTE))
    assert card.data.base_model == "me/tiny" and card.data.license is None
    assert card.data.library_name == "transformers" and "llmdrop" in card.data.tags
    assert plan_in(card) == plan and plan_in(card).n_layers == 5
    assert NOTE in card.text and "# out\n" in card.text and "\n\n\n" not in card.text
    assert 'llmdrop.load_model("out")' in card.text and "vllm serve out" in card.text or "out-nas" in card.text
    assert ("from_pretrained" in card.text) == (format == "hf")


@pytest.mark.parametrize("family", ["llama", "qwen3"])  # whose config says of every layer what it is
@pytest.mark.parametrize("plan", [PLAN, DropPlan([2], [2]), DropPlan()], ids=["sublayers", "blocks", "whole"])
def test_what_a_card_says_about_loading_works(plan, family, tmp_path, monkeypatch):
    model, ids = named("me/tiny", plan, family=family), random_ids(1, 8)
    path = save_model(model, TOKENIZER, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    names = {"AutoModelForCausalLM": AutoModelForCausalLM, "AutoTokenizer": AutoTokenizer}
    command, of_tokenizer = re.search(r"- transformers, without llmdrop: `(.*?)`, `(.*?)`", card_of(path).text).groups()
    again = eval(command, names)
    assert eval(of_tokenizer, names)("some text").input_ids == TOKENIZER("some text").input_ids
    torch.testing.assert_close(logits(again.eval(), ids), logits(model, ids), atol=1e-5, rtol=0)
    assert ("trust_remote_code" in command) == (plan == PLAN)


def test_other_engines_are_named_only_where_they_apply(tmp_path):
    llama = card_of(save_model(named("me/a"), TOKENIZER, tmp_path / "llama")).text
    qwen = card_of(save_model(named("me/b", family="qwen3"), TOKENIZER, tmp_path / "qwen")).text
    assert "llama.cpp" in llama and "nemotron-nas" in llama
    assert "llama.cpp" not in qwen and "vLLM" not in qwen


def test_the_embedded_models_card(smollm2, tmp_path):
    card = card_of(save_model(*smollm2, tmp_path / "out"))
    assert (card.data.base_model, card.data.license) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
    assert "with all its layers" in card.text


LICENSED = "---\nlicense: other\nlicense_name: llama2\nbase_model: far/away\nlanguage: en\n---\n# Theirs\n"


def test_the_license_in_a_directory_is_carried_over_and_by_cards_of_ours_the_base_model(tmp_path):
    source = save_model(named("", DropPlan()), TOKENIZER, tmp_path / "source")
    (source / "README.md").write_text(LICENSED)
    first = save_model(named(str(source)), TOKENIZER, tmp_path / "first")
    data = card_of(first).data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", "llama2")
    assert "base_model" not in data and "language" not in data, "the base of its base is not its own"
    assert str(tmp_path) not in (first / "README.md").read_text()
    of_hub = save_model(named("me/tiny", DropPlan()), TOKENIZER, tmp_path / "of_hub")
    again, _ = load_model(of_hub, device="cpu")
    assert card_of(save_model(apply_plan(again, PLAN), TOKENIZER, tmp_path / "b")).data.base_model == "me/tiny"
    on_disk = card_of(drop_checkpoint(of_hub, PLAN, tmp_path / "c", progress=False))
    assert on_disk.data.base_model == "me/tiny" and plan_in(on_disk) == PLAN


def test_the_license_in_the_hubs_cache_is_carried_over(tmp_path, monkeypatch):
    folder = tmp_path / "models--me--tiny" / "snapshots" / ("a" * 40)
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(LICENSED)
    (tmp_path / "models--me--tiny" / "refs").mkdir()
    (tmp_path / "models--me--tiny" / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    data = card_of(save_model(named("me/tiny"), TOKENIZER, tmp_path / "out")).data
    assert (data.license, data.base_model) == ("other", "me/tiny")


@pytest.mark.parametrize("text", ["", "---\n: [\n---\n", "---\n- a\n---\n", "no metadata", "---\nlicense: mit\n"])
def test_a_source_without_a_readable_card_is_saved(text, tmp_path, monkeypatch):
    source = save_model(named("", DropPlan()), TOKENIZER, tmp_path / "source")
    (source / "README.md").write_text(text)
    monkeypatch.chdir(source)  # of a model without a name, the card that happens to lie here says nothing
    for name in (str(source), ""):
        data = card_of(save_model(named(name), TOKENIZER, tmp_path / "out", overwrite=True)).data
        assert data.base_model is None and data.license is None


def test_a_card_of_ones_own_is_never_replaced(tmp_path):
    source = save_model(named("me/tiny", DropPlan()), TOKENIZER, tmp_path / "source")
    path = save_model(named("me/tiny"), TOKENIZER, tmp_path / "out")
    save_model(named("me/tiny"), TOKENIZER, path, overwrite=True, note="new")
    assert "new" in (path / "README.md").read_text()
    claimed = (path / "README.md").read_text().replace(CARD_MARK, "")
    for text in ("mine", claimed, ""):
        (path / "README.md").write_text(text)
        with pytest.raises(FileExistsError, match="holds a README.md that is not"):
            save_model(named("me/tiny"), TOKENIZER, path, overwrite=True)
        with pytest.raises(FileExistsError, match="holds a README.md that is not"):
            drop_checkpoint(source, PLAN, path, overwrite=True)
        assert (path / "README.md").read_text() == text
    assert json.loads((path / "config.json").read_text())["llmdrop"]["attn"] == [1, 3]
    assert find_anatomy(load_model(path, device="cpu")[0]).plan == PLAN


def test_a_gguf_has_no_card(tmp_path):
    with pytest.raises(ValueError, match="a GGUF has none"):
        save_model(tiny("llama"), TOKENIZER, tmp_path / "m.gguf", format="gguf", note=NOTE)
    assert not list(tmp_path.iterdir())
