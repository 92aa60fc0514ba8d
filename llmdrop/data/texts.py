"""Named texts, for calibration and for measuring: importing this enters them into `llmdrop.calibration.SOURCES`.

A quarter of every source's documents is held out: no calibration of any size, seed or mixture holds one of them, and
`held_out_texts` cuts the text that quality is measured on from nothing else.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from operator import itemgetter

import torch
from transformers import PreTrainedTokenizerBase

from ..calibration import DATASETS, SOURCES, Calibration, load_calibration
from .mirror import read_split, split_file


def _dialogue(row: dict) -> str:
    return "\n".join(f"Q: {turn['question']}\nA: {turn['answer']}" for turn in row["turns"])


def _worked(row: dict) -> str:
    return f"{row['body']} {row['question']}\nAnswer: {row['answer']}"


def _instruction(row: dict) -> str:
    return "\n".join(part for part in (row["instruction"], row.get("input"), row["output"]) if part)


HELD_OUT = ("xsum", "boolq", "narrativeqa", "stdlib")  # news, encyclopedia, plots, code
HELD_OUT_SHARE = 4  # one document of so many
OPENING = 24  # characters: documents that open alike are on one side


def is_held_out(document: str) -> bool:
    """Whether a document is kept for measuring: by its text alone, so that it is so in every source and order."""
    return hashlib.sha256(document[:OPENING].encode()).digest()[0] % HELD_OUT_SHARE == 0


@dataclass(frozen=True)
class Documents:
    """The documents of one split of a dataset: a `llmdrop.calibration.TextSource`."""

    dataset: str
    config: str | None
    split: str
    about: str  # what kind of text it is
    text: Callable[[dict], str] = itemgetter("text")  # of a row
    holds_out: bool = True  # some of its documents for measuring

    @property
    def where(self) -> str:
        return f"{self.dataset} {self.split}"

    def documents(self, data_dir: str | os.PathLike | None = None) -> list[str]:
        """Every text once, in the order of the split, but those held out for measuring (where some are).

        data_dir: see `llmdrop.data`; raises what `read_split` raises.
        """
        return [text for text in self._all(data_dir) if not (self.holds_out and is_held_out(text))]

    def held_out(self, data_dir: str | os.PathLike | None = None) -> list[str]:
        """The other documents. Raises as `documents`."""
        return [document for document in self._all(data_dir) if is_held_out(document)]

    def _all(self, data_dir: str | os.PathLike | None) -> list[str]:
        rows = read_split(self.dataset, self.config, self.split, data_dir)
        return list(dict.fromkeys(map(self.text, rows)))


_LEXSUM = ("allenai/multi_lexsum", "v20230518", "test")
_QUAC = ("allenai/quac", "plain_text", "validation")
_WIKITEXT = ("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "test")

SOURCES |= {
    "xsum": Documents("EdinburghNLP/xsum", None, "test", "news", itemgetter("document")),
    "multilexsum": Documents(*_LEXSUM, "court cases", itemgetter("summary/long")),
    "boolq": Documents("aps/super_glue", "boolq", "train", "encyclopedia paragraphs", itemgetter("passage")),
    "quac": Documents(*_QUAC, "encyclopedia sections", itemgetter("context")),
    "questions": Documents(*_QUAC, "questions", lambda row: "\n".join(row["questions"])),
    "dialogue": Documents("packaged/stories", None, "test", "questions and answers about a story", _dialogue),
    "narrativeqa": Documents("packaged/stories", None, "test", "plots", itemgetter("passage")),
    "wiki": Documents("packaged/wiki", None, "test", "encyclopedia sentences"),
    "squad": Documents("packaged/squad", None, "test", "encyclopedia paragraphs"),
    "tales": Documents("packaged/tales", None, "test", "very short stories"),
    "abstracts": Documents("packaged/abstracts", None, "test", "medical abstracts"),
    "reviews": Documents("packaged/reviews", None, "test", "film reviews"),
    "stdlib": Documents("python/stdlib", None, "train", "Python code"),
    "libraries": Documents("python/libraries", None, "train", "Python code and its documentation"),
    "asdiv": Documents("EleutherAI/asdiv", None, "validation", "school mathematics", _worked),
    "c4": Documents("allenai/c4", "en", "validation", "web pages"),
    "lima": Documents("GAIR/lima", None, "train", "instructions", lambda row: "\n".join(row["conversations"])),
    "codealpaca": Documents("sahil2801/CodeAlpaca-20k", None, "train", "code instructions", _instruction),
    "mathinstruct": Documents("TIGER-Lab/MathInstruct", None, "train", "mathematics instructions", _instruction),
    "wikitext": Documents(*_WIKITEXT, "encyclopedia articles", itemgetter("page")),
}


def _text(row: dict) -> str:
    if "text" not in row:
        raise ValueError(
            f'the dataset has columns {", ".join(row)}; expected one called "text". Give the texts as a list instead: '
            'datasets.load_dataset(...)["a column"]'
        )
    return row["text"]


def _dataset(name: str) -> Documents:
    """A dataset that datasets can load: a directory, or owner/name[/config[/split]] of the hub."""
    if os.path.isdir(name):
        return Documents(name, None, "train", "own", _text, holds_out=False)
    owner, dataset, *rest = name.split("/")
    config, split = [*rest, None, None][:2]
    return Documents(f"{owner}/{dataset}", config, split or "train", "from the hub", _text, holds_out=False)


DATASETS.append(_dataset)


def available_sources(data_dir: str | os.PathLike | None = None) -> list[str]:
    """Names of the sources that load with this data_dir; with None, those that need no hub."""
    names = []
    for name, source in SOURCES.items():
        with suppress(FileNotFoundError):
            is_ours = isinstance(source, Documents)
            file = split_file(source.dataset, source.config, source.split, data_dir) if is_ours else None
            if file is not None or data_dir == "hub" or not is_ours:
                names.append(name)
    return names


def mixture(
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    n_samples: int,
    seq_len: int,
    seed: int = 0,
    data_dir: str | os.PathLike | None = None,
    skip: int = 0,
) -> Calibration:
    """n_samples of every named source, taken in turn: text of several kinds (see `load_calibration`)."""
    parts = [load_calibration(name, tokenizer, n_samples, seq_len, seed, data_dir, skip).input_ids for name in names]
    ids = torch.stack(parts, 1).flatten(0, 1)
    return Calibration(ids, f"{'+'.join(names)}, {n_samples} each, seed {seed}, skip {skip}")


def held_out_texts(
    tokenizer: PreTrainedTokenizerBase,
    n_samples: int = 16,
    seq_len: int = 128,
    sources: Sequence[str] = HELD_OUT,
    seed: int = 0,
    data_dir: str | os.PathLike | None = None,
) -> dict[str, Calibration]:
    """Text that nothing is scored, chosen or fitted on, by source: what `quality` measures `nats` on.

    n_samples of each source: below 16 of each of four sources, intervals of what has long tails are too narrow. Raises
    what `load_calibration` raises, and ValueError for a source that is no key of `llmdrop.calibration.SOURCES`.
    """
    texts = {}
    for name in sources:
        source = SOURCES.get(name)
        if not isinstance(source, Documents):
            raise ValueError(f"{name!r} has no held-out documents; named sources have: {', '.join(SOURCES)}")
        text = load_calibration(source.held_out(data_dir), tokenizer, n_samples, seq_len, seed)
        texts[name] = replace(text, source=f"{name} ({source.where}), held out, seed {seed}")
    return texts
