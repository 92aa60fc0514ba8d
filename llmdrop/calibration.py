"""Calibration text: the token windows on which layers are scored and perplexity is measured."""

import hashlib
import json
import os
import re
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from .anatomy import check_has_weights, find_layers, unwrapped


@dataclass(frozen=True, eq=False)
class Calibration:
    """Token ids on which a model is scored.

    input_ids: [n_samples, seq_len] integers (kept as int64). attention_mask: the same shape, 1 for tokens that count
    and 0 for padding, or None if all count. source: where they came from, for people. Instead of ids also samples of
    different lengths (a list of lists or tensors), which are padded; what a tokenizer gives (a dict with input_ids and
    perhaps attention_mask); or an iterable of these, as a DataLoader or a tokenized datasets.Dataset is. Raises
    TypeError for ids that are no integers, ValueError for a wrong shape, negative ids or a mask that does not fit.
    """

    input_ids: torch.Tensor
    source: str = "custom"
    attention_mask: torch.Tensor | None = None

    def __post_init__(self):
        if not isinstance(self.input_ids, torch.Tensor | np.ndarray):
            ids, mask = _padded(_samples(self.input_ids, self.attention_mask))
            object.__setattr__(self, "input_ids", ids)
            object.__setattr__(self, "attention_mask", mask)
        ids = self.input_ids
        if isinstance(ids, np.ndarray) and ids.dtype.kind == "u":  # of which torch knows little, as a .bin file holds
            ids = ids.astype(np.int64)
        ids = torch.as_tensor(ids)
        if ids.is_meta:
            raise ValueError("input_ids are on the meta device, so there are no numbers in them")
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


TokenIds = torch.Tensor | np.ndarray | Mapping | Iterable  # what a Calibration is made of
Sample = tuple[torch.Tensor, torch.Tensor | None]  # ids [T], mask [T]


def _samples(given: TokenIds, mask=None, n_deep: int = 0) -> list[Sample]:
    """Every sample in what people have of token ids. TypeError for what has none, ValueError for what is ambiguous."""
    if hasattr(given, "input_ids"):  # what holds them, as a BatchEncoding does
        given = {"input_ids": given.input_ids, "attention_mask": getattr(given, "attention_mask", None)}
    if isinstance(given, Mapping):
        if "input_ids" not in given:
            raise ValueError(f"a batch holds {', '.join(map(str, given)) or 'nothing'}; expected input_ids")
        ids = given["input_ids"]
        if isinstance(ids, list | tuple) and any(isinstance(part, torch.Tensor) for part in ids):
            raise ValueError(
                "input_ids are a list of tensors: the loader has put samples into columns. Give it tensors to collate, "
                "as dataset.set_format('torch') makes them"
            )
        own_mask = given.get("attention_mask")
        return _samples(ids, mask if own_mask is None else own_mask, n_deep)
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(
            f"a {type(given).__name__} is no token ids; give [n_samples, seq_len] of them, samples of any length, what "
            "a tokenizer returns, or a DataLoader of that. Texts go through llmdrop.load_calibration"
        )
    if not isinstance(given, torch.Tensor | np.ndarray):
        parts = list(given)
        n_dims = [part.ndim for part in parts if isinstance(part, torch.Tensor)]
        is_batch = n_deep or isinstance(given, tuple)
        if is_batch and len(parts) > 1 and n_dims and (isinstance(given, tuple) or 2 in n_dims):
            raise ValueError(f"a batch holds {len(parts)} tensors; say which are the ids: {{'input_ids': ...}}")
        if not parts:
            raise ValueError("there are no samples, or one without a token; give at least one sample of one token")
        if isinstance(parts[0], Iterable):
            masks = [None] * len(parts) if mask is None else list(mask)
            if len(masks) != len(parts):
                raise ValueError(f"attention_mask has {len(masks)} samples, input_ids {len(parts)}")
            nested = [_samples(*pair, n_deep + 1) for pair in zip(parts, masks, strict=True)]
            return [sample for samples in nested for sample in samples]
        given = parts
    try:
        ids = torch.as_tensor(given)
    except (ValueError, RuntimeError, TypeError) as error:  # an id beyond 64 bits, or what is no number
        raise ValueError(f"these are no token ids: {str(given)[:80]} ({error}); give integers") from error
    if mask is not None:
        mask = torch.as_tensor(mask)
        if mask.shape != ids.shape:
            raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}")
    if ids.ndim == 1 and n_deep:
        return [(ids, mask)]
    if ids.ndim != 2:
        raise ValueError(f"input_ids has shape {tuple(ids.shape)}; expected [n_samples, seq_len], both > 0")
    return list(zip(ids, [None] * len(ids) if mask is None else mask, strict=True))


def _padded(samples: list[Sample]) -> Sample:
    """Samples side by side, [n, T], padded on the right, and their mask, or None where every token counts."""
    ids = pad_sequence([ids for ids, _ in samples], batch_first=True)
    if all(mask is None and len(sample) == ids.shape[1] for sample, mask in samples):
        return ids, None
    masks = [torch.ones_like(sample) if mask is None else mask for sample, mask in samples]
    return ids, pad_sequence(masks, batch_first=True)


def read_by(model: nn.Module, calibration: Calibration | TokenIds) -> Calibration:
    """The calibration, made of what `Calibration` takes where it is none, after a check that the model can read it.

    Raises what `Calibration` raises and what `check_readable` raises.
    """
    if not isinstance(calibration, Calibration):
        calibration = Calibration(calibration)
    mask = calibration.attention_mask
    longest = calibration.input_ids.shape[1] if mask is None else int(mask.sum(1).max())
    check_readable(model, int(calibration.input_ids.max()), longest)
    return calibration


def check_readable(model: nn.Module, largest_id: int, longest: int) -> None:
    """ValueError unless the model can read token ids up to the largest, in samples of up to so many tokens.

    That is where its vocabulary ends before, where it has learned positions (GPT-2, OPT) and fewer of them, and where
    it is on the meta device and so has no weights. Warns where its positions are computed (rotary): longer samples can
    be read, but it was not made for them.
    """
    model = unwrapped(model)
    check_has_weights(model)
    embedding = model.get_input_embeddings()
    check_vocabulary(largest_id, len(embedding.weight))
    decoder = find_layers(model)[0]
    others = [child for child in decoder.children() if isinstance(child, nn.Embedding) and child is not embedding]
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is None or longest <= limit:
        return
    kind = model.config.model_type
    if others:
        raise ValueError(
            f"a sample has {longest:,} tokens and this {kind} model learned {limit:,} positions; "
            f"use samples of at most {limit:,}"
        )
    warnings.warn(
        f"a sample has {longest:,} tokens and this {kind} model was made for {limit:,}: numbers of longer texts say "
        f"little about it; use samples of at most {limit:,}",
        stacklevel=3,
    )


def check_vocabulary(largest_id: int, size: int) -> None:
    """ValueError for a token id beyond the vocabulary."""
    if largest_id >= size:
        raise ValueError(
            f"token id {largest_id} is beyond the model's vocabulary of {size}; use the model's own tokenizer, or make "
            "room for added tokens: model.resize_token_embeddings(len(tokenizer))"
        )


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


# Named texts, and what makes a source of a dataset's directory or hub id. `llmdrop.data.texts` fills them, so that the
# core neither knows a dataset nor reads a mirror.
SOURCES: dict[str, TextSource] = {}
DATASETS: list[Callable[[str], TextSource]] = []
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+){1,3}")  # owner/name, perhaps with /config and /split


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
    datasets.Dataset with a column "text"; documents, as strings; or a dataset of the hub, as "owner/name" or
    "owner/name/config/split" (split: train), all of which is downloaded, or a directory that datasets can load.

    Documents come in an order shuffled by seed. Each sample opens with a new document; where that is too short, the
    next ones follow, an end-of-sequence token between them (as LLM-Drop packs C4); a document longer than the room
    left gives a window from a random spot (as SparseGPT and Wanda do). What is left of it is used only when there are
    no new documents any more: until then no two samples share a document. Begin-of-sequence stands first if the
    tokenizer puts it there. No token is padding or used twice, and for one seed and seq_len the first k samples of n
    are the k samples. skip leaves out the first samples: text that no set of up to `skip` samples holds.
    data_dir: see `llmdrop.data`.

    Raises ValueError for an unknown name, fewer than 1 sample or 2 tokens, a negative skip, or a source with too little
    text; FileNotFoundError for data that is not there; TypeError for documents that are no text.
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


def check_source(source: str | os.PathLike) -> None:
    """ValueError for what is no named text, .txt or .jsonl file nor dataset; FileNotFoundError for a file not there."""
    path = Path(os.path.expanduser(source))
    if source in SOURCES or _is_dataset(path):
        return
    if path.suffix not in (".txt", ".jsonl"):
        known = ", ".join(SOURCES)
        raise ValueError(f"unknown calibration '{source}'; these are known: {known}; or give a .txt or .jsonl file")
    if not path.is_file():
        raise FileNotFoundError(f"no file {source}; give a .txt or .jsonl file that is there, or a known name")


def _is_dataset(path: Path) -> bool:
    return path.suffix not in (".txt", ".jsonl") and (
        path.is_dir() or (HUB_ID.fullmatch(str(path)) is not None and not path.exists())
    )


def _documents(source, data_dir) -> tuple[str, list[str]]:
    """What the source is called, and its documents."""
    if isinstance(source, str) and source in SOURCES:
        return f"{source} ({SOURCES[source].where})", SOURCES[source].documents(data_dir)
    name = "documents"
    if isinstance(source, str | os.PathLike):
        check_source(source)
        path = Path(os.path.expanduser(source))
        if _is_dataset(path):
            dataset = DATASETS[0](str(path))
            return str(source), dataset.documents(data_dir)
        name = path.name
        source = _read_documents(path)
    elif isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise TypeError(
            f"a {type(source).__name__} is no text; give a known name ({', '.join(SOURCES)}), a file, documents or one "
            "split of a dataset, and to Calibration() what a tokenizer gave"
        )
    elif hasattr(source, "column_names"):  # a datasets.Dataset, or one that is read as it comes
        if source.column_names and "text" not in source.column_names:
            raise ValueError(f'the dataset has columns {", ".join(source.column_names)}; expected one called "text"')
        source = [row["text"] for row in source.select_columns("text")]
    documents = list(source)
    if wrong := [document for document in documents if not isinstance(document, str)]:
        raise TypeError(f"documents must be text; one is a {type(wrong[0]).__name__}. Token ids go into Calibration()")
    return name, documents


def _read_documents(file: Path) -> list:
    """The one document of a .txt file, or the "text" of every line of a .jsonl file."""
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
