"""Calibration text: the token windows on which layers are scored and perplexity is measured."""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter

import numpy as np
import torch

from .data import read_split, split_file


@dataclass(frozen=True, eq=False)
class Calibration:
    """Token ids on which a model is scored.

    input_ids: [n_samples, seq_len] integers (kept as int64). attention_mask: the same shape, 1 for tokens that count
    and 0 for padding, or None if all count. source: where they came from, for people. Raises TypeError for ids that
    are no integers, ValueError for a wrong shape, negative ids or a mask that does not fit.
    """

    input_ids: torch.Tensor
    source: str = "custom"
    attention_mask: torch.Tensor | None = None

    def __post_init__(self):
        ids = torch.as_tensor(self.input_ids)
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"input_ids has dtype {ids.dtype}; token ids are integers")
        if ids.ndim != 2 or 0 in ids.shape:
            raise ValueError(f"input_ids has shape {tuple(ids.shape)}; expected [n_samples, seq_len], both > 0")
        if ids.min() < 0:
            raise ValueError(f"input_ids holds {ids.min().item()}; token ids start at 0 (mask padding instead)")
        object.__setattr__(self, "input_ids", ids.long())
        if self.attention_mask is not None:
            mask = torch.as_tensor(self.attention_mask)
            if mask.shape != ids.shape:
                raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}")
            if not ((mask == 0) | (mask == 1)).all():
                raise ValueError("attention_mask holds values other than 0 (padding) and 1 (token)")
            if not (mask == 1).any(dim=1).all():
                raise ValueError("attention_mask leaves a sample without any token; leave that sample out")
            object.__setattr__(self, "attention_mask", mask.long())

    @property
    def n_tokens(self) -> int:
        """Tokens that count, padding left out."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())

    @property
    def digest(self) -> str:
        """sha256 of shape, ids and mask, the same on every device."""
        state = hashlib.sha256(repr(tuple(self.input_ids.shape)).encode())
        for tensor in (self.input_ids, self.attention_mask):
            state.update(b"none" if tensor is None else tensor.cpu().numpy().astype("<i8").tobytes())
        return state.hexdigest()


_text = itemgetter("text")


def _code(row: dict) -> str:
    return "\n".join(part for part in (row["instruction"], row.get("input"), row["output"]) if part)


# name: (dataset, config, split, text of a row, what it is)
SOURCES: dict[str, tuple[str, str | None, str, Callable[[dict], str], str]] = {
    "xsum": ("EdinburghNLP/xsum", None, "test", lambda row: row["document"], "news"),
    "multilexsum": ("allenai/multi_lexsum", "v20230518", "test", lambda row: row["summary/long"], "court cases"),
    "boolq": ("aps/super_glue", "boolq", "train", lambda row: row["passage"], "encyclopedia paragraphs"),
    "quac": ("allenai/quac", "plain_text", "validation", lambda row: row["context"], "encyclopedia sections"),
    "questions": ("allenai/quac", "plain_text", "validation", lambda row: "\n".join(row["questions"]), "questions"),
    "dialogue": (
        *("packaged/stories", None, "test"),
        lambda row: "\n".join(f"Q: {turn['question']}\nA: {turn['answer']}" for turn in row["turns"]),
        "questions and answers about a story",
    ),
    "narrativeqa": ("packaged/stories", None, "test", lambda row: row["passage"], "plots"),
    "wiki": ("packaged/wiki", None, "test", _text, "encyclopedia sentences"),
    "squad": ("packaged/squad", None, "test", _text, "encyclopedia paragraphs"),
    "tales": ("packaged/tales", None, "test", _text, "very short stories"),
    "abstracts": ("packaged/abstracts", None, "test", _text, "medical abstracts"),
    "reviews": ("packaged/reviews", None, "test", _text, "film reviews"),
    "stdlib": ("python/stdlib", None, "train", _text, "Python code"),
    "asdiv": (
        *("EleutherAI/asdiv", None, "validation"),
        lambda row: f"{row['body']} {row['question']}\nAnswer: {row['answer']}",
        "school mathematics",
    ),
    "c4": ("allenai/c4", "en", "validation", _text, "web pages"),
    "lima": ("GAIR/lima", None, "train", lambda row: "\n".join(row["conversations"]), "instructions"),
    "codealpaca": ("sahil2801/CodeAlpaca-20k", None, "train", _code, "code instructions"),
    "mathinstruct": ("TIGER-Lab/MathInstruct", None, "train", _code, "mathematics instructions"),
    "wikitext": (
        *("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "test"),
        lambda row: row["page"],
        "encyclopedia articles",
    ),
}


def available_sources(data_dir: str | os.PathLike | None = None) -> list[str]:
    """Names of the sources that load with this data_dir; with None, those that need no hub."""
    names = []
    for name, (dataset, config, split, *_) in SOURCES.items():
        try:
            if split_file(dataset, config, split, data_dir) is None and data_dir != "hub":
                continue
        except FileNotFoundError:
            continue
        names.append(name)
    return names


def load_calibration(
    name: str,
    tokenizer,
    n_samples: int = 16,
    seq_len: int = 512,
    seed: int = 0,
    data_dir: str | os.PathLike | None = None,
    skip: int = 0,
) -> Calibration:
    """Cut n_samples windows of exactly seq_len tokens out of a text source (a key of `SOURCES`).

    Documents come in an order shuffled by seed. Each sample opens with a new document; where that is too short, the
    next ones follow, an end-of-sequence token between them (as LLM-Drop packs C4); a document longer than the room
    left gives a window from a random spot (as SparseGPT and Wanda do). What is left of it is used only when there are
    no new documents any more: until then no two samples share a document. Begin-of-sequence stands first if the
    tokenizer puts it there. No token is padding or used twice, and for one seed and seq_len the first k samples of n
    are the k samples. skip leaves out the first samples: text that no set of up to `skip` samples holds.
    data_dir: see `llmdrop.data`.

    Raises ValueError for an unknown name, sizes below 1, or a source with too little text; FileNotFoundError for data
    that is not there.
    """
    if name not in SOURCES:
        raise ValueError(f"unknown calibration {name!r}; these are known: {', '.join(SOURCES)}")
    if min(n_samples, seq_len - 1, skip + 1) < 1:
        raise ValueError(f"{n_samples=}, {seq_len=}, {skip=}: need at least 1 sample, 2 tokens and 0 to skip")
    dataset, config, split, text, _ = SOURCES[name]
    rows = read_split(dataset, config, split, data_dir)
    documents = list(dict.fromkeys(map(text, rows)))  # a text that occurs twice would weigh twice
    random = np.random.default_rng(seed)
    texts = (documents[i] for i in random.permutation(len(documents)))
    start, end = _special_tokens(tokenizer)
    samples: list[list[int]] = []
    sample, rest, n_read = list(start), deque(), 0
    for tokens, is_new in chain(((t, True) for t in _tokenize(texts, tokenizer)), _drain(rest)):
        n_read += len(tokens) if is_new else 0
        room = seq_len - len(sample)
        first = int(random.integers(max(len(tokens) - room, 0) + 1))
        rest.extend(filter(None, (tokens[:first], tokens[first + room :])))
        sample += tokens[first : first + room] + end
        if len(sample) >= seq_len:
            samples.append(sample[:seq_len])
            sample = list(start)
            if len(samples) == skip + n_samples:
                break
    else:
        raise ValueError(
            f"{name} has {n_read:,} tokens in {len(documents):,} documents: enough for {len(samples)} samples of "
            f"{seq_len} tokens; {skip + n_samples} (n_samples + skip) need {(skip + n_samples) * seq_len:,} tokens. "
            f"Use fewer or shorter samples, or another source: {', '.join(SOURCES)}"
        )
    return Calibration(torch.tensor(samples[skip:]), source=f"{name} ({dataset} {split}), seed {seed}, skip {skip}")


def _special_tokens(tokenizer) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before a text (perhaps a begin-of-sequence token), and what goes between documents."""
    opening = list(tokenizer("")["input_ids"][:1])
    start = opening if opening and opening[0] == tokenizer.bos_token_id else []
    return start, [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _drain(rest: deque) -> Iterator[tuple[list[int], bool]]:
    while rest:  # may grow while it is drained
        yield rest.popleft(), False


def _tokenize(texts: Iterator[str], tokenizer, n: int = 16) -> Iterator[list[int]]:
    """Tokens of each text that has any, n texts at a time: no more are tokenized than are needed."""
    while batch := [text for _, text in zip(range(n), texts, strict=False)]:
        yield from filter(None, tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"])
