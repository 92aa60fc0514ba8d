"""Calibration text: the token windows on which layers are scored and perplexity is measured."""

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase


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
    def n_samples(self) -> int:
        return len(self.input_ids)

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


def batches(
    calibration: Calibration, batch_size: int, device: torch.device
) -> Iterator[tuple[slice, dict[str, torch.Tensor]]]:
    """(which samples, a decoder's inputs on `device`), batch after batch.

    Inputs: input_ids [B, T]; where there is padding, on either side, also attention_mask and the position_ids that
    leave it out.
    """
    for start in range(0, len(calibration.input_ids), batch_size):
        rows = slice(start, start + batch_size)
        inputs = {"input_ids": calibration.input_ids[rows].to(device)}
        if calibration.attention_mask is not None:
            mask = calibration.attention_mask[rows].to(device).long()
            inputs["attention_mask"] = mask
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
        yield rows, inputs


class TextSource(Protocol):
    """A named text: its documents, and where they come from, for people."""

    where: str

    def documents(self, data_dir: str | os.PathLike | None) -> list[str]: ...


# Named texts. `llmdrop.data.texts` fills this, so that the core neither knows a dataset nor reads a mirror.
SOURCES: dict[str, TextSource] = {}


def load_calibration(
    source: str | os.PathLike | Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    n_samples: int = 16,
    seq_len: int = 512,
    seed: int = 0,
    data_dir: str | os.PathLike | None = None,
    skip: int = 0,
) -> Calibration:
    """Cut n_samples windows of exactly seq_len tokens out of a text.

    source: a key of `SOURCES`; a .txt file (one document) or a .jsonl file (a document in the "text" of each line); a
    datasets.Dataset with a column "text"; or documents, as strings.

    Documents come in an order shuffled by seed. Each sample opens with a new document; where that is too short, the
    next ones follow, an end-of-sequence token between them (as LLM-Drop packs C4); a document longer than the room
    left gives a window from a random spot (as SparseGPT and Wanda do). What is left of it is used only when there are
    no new documents any more: until then no two samples share a document. Begin-of-sequence stands first if the
    tokenizer puts it there. No token is padding or used twice, and for one seed and seq_len the first k samples of n
    are the k samples. skip leaves out the first samples: text that no set of up to `skip` samples holds.
    data_dir: see `llmdrop.data`.

    Raises ValueError for an unknown name, sizes below 1, or a source with too little text; FileNotFoundError for data
    that is not there; TypeError for documents that are no text.
    """
    if n_samples < 1 or seq_len < 2 or skip < 0:
        raise ValueError(f"{n_samples=}, {seq_len=}, {skip=}: need at least 1 sample, 2 tokens and 0 to skip")
    name, documents = _documents(source, data_dir)
    documents = list(dict.fromkeys(documents))  # a text that occurs twice would weigh twice
    random = np.random.default_rng(seed)
    texts = (documents[i] for i in random.permutation(len(documents)))
    start, end = _special_tokens(tokenizer)
    samples: list[list[int]] = []
    sample = list(start)
    leftovers: deque[list[int]] = deque()  # what windows left of their documents
    n_read = 0
    for tokens, is_new in chain(((t, True) for t in _tokenize(texts, tokenizer)), _drain(leftovers)):
        n_read += len(tokens) if is_new else 0
        room = seq_len - len(sample)
        first = int(random.integers(max(len(tokens) - room, 0) + 1))
        leftovers.extend(filter(None, (tokens[:first], tokens[first + room :])))
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
    return Calibration(torch.tensor(samples[skip:]), source=f"{name}, seed {seed}, skip {skip}")


def _documents(source, data_dir) -> tuple[str, list[str]]:
    """What the source is called, and its documents."""
    if isinstance(source, str) and source in SOURCES:
        return f"{source} ({SOURCES[source].where})", SOURCES[source].documents(data_dir)
    name = "documents"
    if isinstance(source, str | os.PathLike):
        name = Path(source).name
        source = _read_documents(Path(os.path.expanduser(source)))
    elif hasattr(source, "column_names"):  # a datasets.Dataset
        if "text" not in source.column_names:
            raise ValueError(f'the dataset has columns {", ".join(source.column_names)}; expected one called "text"')
        source = source["text"]
    documents = list(source)
    if wrong := [document for document in documents if not isinstance(document, str)]:
        raise TypeError(f"documents must be text; one is a {type(wrong[0]).__name__}. Token ids go into Calibration()")
    return name, documents


def _read_documents(file: Path) -> list:
    """The one document of a .txt file, or the "text" of every line of a .jsonl file."""
    if file.suffix not in (".txt", ".jsonl"):
        known = ", ".join(SOURCES)
        raise ValueError(f"unknown calibration '{file}'; these are known: {known}; or give a .txt or .jsonl file")
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}; give a .txt or .jsonl file that is there, or a known name")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8 ({error})") from error
    if file.suffix == ".txt":
        return [text]
    try:
        return [json.loads(line)["text"] for line in text.split("\n") if line.strip()]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{file}: expected an object with "text" on every line ({error!r})') from error


def _special_tokens(tokenizer) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before a text (perhaps a begin-of-sequence token), and what goes between documents."""
    opening = list(tokenizer("")["input_ids"][:1])
    start = opening if opening and opening[0] == tokenizer.bos_token_id else []
    return start, [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _drain(leftovers: deque) -> Iterator[tuple[list[int], bool]]:
    while leftovers:  # may grow while it is drained
        yield leftovers.popleft(), False


def _tokenize(texts: Iterator[str], tokenizer, n: int = 16) -> Iterator[list[int]]:
    """Tokens of each text that has any, n texts at a time: no more are tokenized than are needed."""
    while batch := [text for _, text in zip(range(n), texts, strict=False)]:
        yield from filter(None, tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"])
