"""Results of release 0.1.0, as its own smoke run wrote them: what is carried over is not measured again."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest

from llmdrop import Calibration, DropPlan, load_calibration
from llmdrop.compress.healing import Healing
from llmdrop.compress.reconstruction import Reconstruction
from llmdrop.compress.variant import Variant
from llmdrop.compress.windows import Windows
from llmdrop.data.texts import mixture
from llmdrop.repro import block_importance, quality
from llmdrop.repro.provenance import version
from llmdrop.repro.selectors import Chooser
from llmdrop.repro.store import Store

ROOT = Path(__file__).resolve().parent.parent.parent
OLD = Path(__file__).with_name("results_0.1.0")
sys.path.insert(0, str(ROOT / "scripts"))

import rekey_store  # noqa: E402


def sealed(record: dict) -> str:
    """The record as 0.1.0 would have written it, with its checksum."""
    parts = [record["key"], record["value"], record["provenance"], record["created"]]
    text = json.dumps(parts, separators=(",", ":"))
    return json.dumps(record | {"checksum": hashlib.sha256(text.encode()).hexdigest()}, indent=1)


def change(file: Path, **entries) -> None:
    record = json.loads(file.read_text())
    record["key"] |= entries
    file.write_text(sealed(record))


@pytest.fixture(autouse=True)
def whole_texts(monkeypatch):
    """0.1.0 held no documents of a named source back: what it measured on one is found by the text it had."""
    monkeypatch.setattr("llmdrop.data.texts.is_held_out", lambda document: False)


@pytest.fixture
def old(tmp_path):
    """A copy, as if measured with the torch and transformers of this machine."""
    root = tmp_path / "results"
    shutil.copytree(OLD, root)
    for file in root.glob("*/*.json"):
        assert sealed(json.loads(file.read_text())) == file.read_text()  # as it was written
        change(file, torch=version("torch"), transformers=version("transformers"))
    return root


@pytest.fixture
def found(old, smollm2, monkeypatch):
    """The store after carrying over; measuring is forbidden."""

    def never(*args, **kwargs):
        raise AssertionError("measured again")

    rekey_store.main([str(old)])
    monkeypatch.setattr(Store, "_measure", never)
    return Store(old)


def value(root: Path, name: str):
    return json.loads((root / name).read_text())["value"]


def test_scores_are_found(found, smollm2):
    model, tokenizer = smollm2
    scores = found.score(model, load_calibration("xsum", tokenizer, 2, 64))
    assert json.loads(scores.to_json()) == value(OLD, "score/smollm2-135m-xsum-2x64-835fd5ca55c8f14c.json")
    with pytest.raises(AssertionError, match="measured again"):
        found.score(model, load_calibration("xsum", tokenizer, 2, 64), gap=True)


def test_losses_of_texts_are_found(found, smollm2):
    model, tokenizer = smollm2
    narrativeqa = load_calibration("narrativeqa", tokenizer, 2, 64)
    boolq = load_calibration("boolq", tokenizer, 2, 64)
    fitted = mixture(["xsum", "tales"], tokenizer, 4, 64)
    few = Variant(DropPlan([25, 26]))
    means = Variant(few.plan, Reconstruction(fitted, "mean"))
    sequential = Variant(DropPlan([6, 23]), Reconstruction(fitted, "sequential least squares"))
    healed = Variant(few.plan, healing=Healing(mixture(["xsum", "wiki"], tokenizer, 2, 32, skip=40)))
    windows = Variant(windows=Windows((11, 25, 26, 27, 29), 16, 4))

    def losses(variant: Variant, name: str, text: Calibration) -> list[float]:
        rows = quality.quality(model, tokenizer, {"": variant}, {name: text}, store=found)
        assert rows["n"].tolist() == [63, 63]
        return rows["value"].tolist()

    def old_losses(name: str, where: str) -> list[float]:
        rows = value(OLD, name)
        rows = rows["rows"] if isinstance(rows, dict) else rows
        return [pytest.approx(row["value"], rel=1e-15) for row in rows if row["where"] == where]

    plain = "plain/smollm2-135m-Attn-2-1769a9679d31340b.json"
    for name, text in {"narrativeqa": narrativeqa, "boolq": boolq}.items():
        assert losses(Variant(DropPlan([20, 23])), name, text) == old_losses(plain, name)
    by_mean = "compensated/smollm2-135m-Attn-2-mean-boolq-1864df37497f4154.json"
    assert losses(means, "boolq", boolq) == old_losses(by_mean, "boolq")
    in_turn = "compensated/smollm2-135m-Attn-2-refit-in-turn-narrativeqa-5155799438f48e44.json"
    assert losses(sequential, "narrativeqa", narrativeqa) == old_losses(in_turn, "narrativeqa")
    narrow = "windows/smollm2-135m-Baseline-5x16-narrativeqa-7e0b3859fb1e398c.json"
    assert losses(windows, "narrativeqa", narrativeqa) == old_losses(narrow, "narrativeqa")
    trained = "healed/smollm2-135m-Attn-2-none-ce02a3f060207970.json"
    assert losses(healed, "boolq", boolq) == old_losses(trained, "boolq")
    with pytest.raises(AssertionError, match="measured again"):
        losses(Variant(DropPlan([20, 24])), "boolq", boolq)


def test_choices_are_found(found, smollm2):
    model, tokenizer = smollm2
    text = mixture(["xsum", "tales"], tokenizer, 4, 64)
    search_text = mixture(["xsum", "tales"], tokenizer, 1, 16, skip=20)
    chooser = Chooser(model, text, search_text, mixture(["quac"], tokenizer, 2, 96), store=found)
    choice = chooser.choose("KL greedy", 2)
    old = value(OLD, "selector/smollm2-135m-KL-greedy-e6e3fe8d6b7437c0.json")
    assert choice.order == [tuple(sublayer) for sublayer in old["order"]] and choice.tokens == old["tokens"]
    order = chooser.window_order(16)
    scores = value(OLD, "window-scores/smollm2-135m-16-4-dd6e3d907a8d4a82.json")
    assert order == sorted(range(30), key=lambda i: scores[i])
    blocks = block_importance.by_taylor(model, load_calibration("xsum", tokenizer, 2, 16), store=found)
    assert blocks.tolist() == value(OLD, "selector/smollm2-135m-block-taylor-xsum-2x16-83c7265ea77ce070.json")


def test_written_answers_are_found(found, smollm2):
    model, tokenizer = smollm2
    prompts, targets = json.loads((OLD / FACTS).read_text())["key"]["asked"]
    few = Variant(windows=Windows((11, 25, 26, 27, 29), 16, 4))
    asked = {"facts": quality.Questions(prompts, targets)}
    rows = quality.quality(model, tokenizer, {"": few}, questions=asked, store=found)
    assert rows["value"].tolist() == [row["value"] for row in value(OLD, FACTS)]


FACTS = "windows/smollm2-135m-Baseline-5x16-facts_160-6e8655a1f59621f3.json"


def test_the_answers_key_is_that_of_today(old, smollm2):
    """The prompts of the old entry are known by their digest only."""
    model, tokenizer = smollm2
    rekey_store.main([str(old)])
    (file,) = (old / "answers").glob("*.json")
    carried = json.loads(file.read_text())
    today = Store(old.parent / "today")
    quality.answers(model, tokenizer, {"": Variant()}, ["1 + 1 ="], "arithmetic", 1, ["\n"], store=today)
    (file,) = (today.root / "answers").glob("*.json")
    key = json.loads(file.read_text())["key"]
    different = {name for name in key if carried["key"][name] != key[name]}
    assert set(carried["key"]) == set(key) and different == {"prompts", "max_new_tokens"}


def test_what_is_not_carried_over_is_reported(old, capsys):
    damaged = old / "score/smollm2-135m-xsum-2x64-835fd5ca55c8f14c.json"
    damaged.write_text(damaged.read_text().replace("0.1", "0.2", 1))
    code = json.loads((old / FACTS).read_text())["key"]["code"]
    change(old / FACTS, code=code | {"windows": "0123456789abcdef"})
    bfloat16 = next((old / "compensated").glob("*mean-boolq*"))
    change(bfloat16, dtype="bfloat16")
    change(next((old / "generate").glob("*.json")), weights="of another model")
    before = {file: file.read_bytes() for file in old.glob("*/*.json")}
    rekey_store.main([str(old)])
    report = capsys.readouterr().out
    for expected in (
        "1 score: measured again when it is needed (the file is damaged)",
        "1 windows: measured again when it is needed (measured by other code than 0.1.0's (windows))",
        "1 windows: carried over",
        "1 compensated: measured again when it is needed (a fit in 16 bits",
        "1 compensated: measured again when it is needed (right or wrong for every question",
        "1 compensated: carried over",
        "1 generate: measured again when it is needed (of other weights than those of --model",
        "1 evaluate: measured again when it is needed (means over questions",
        "1 perplexity: measured again",
        "1 greedy: measured again when it is needed (its key names the questions by their tokens",
        "7 entries of",
    ):
        assert expected in report
    assert all(file.read_bytes() == content for file, content in before.items())
    files = sorted(old.glob("*/*.json"))
    rekey_store.main([str(old)])  # again: nothing more is written
    assert sorted(old.glob("*/*.json")) == files


def test_no_store(tmp_path, capsys):
    with pytest.raises(SystemExit):
        rekey_store.main([str(tmp_path / "none")])
    assert "is not a directory; give the folder of results of release 0.1.0" in capsys.readouterr().err
