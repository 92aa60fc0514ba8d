"""Text to train a small language model on: a tokenizer of its own, packed windows, and losses to beat."""

import hashlib
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from transformers import PreTrainedTokenizerFast

from ..calibration import SOURCES, Calibration

END = "</s>"  # stands after every document
SMALLEST_VOCABULARY = 257  # 256 bytes and END
TOKENIZER_DOCUMENTS = 2000  # on which the tokenizer is trained
LONGEST_GRAM = 5  # tokens, the predicted one among them, of the strongest model that only counts


@dataclass(frozen=True, eq=False)
class TrainingText:
    """Text as tokens, ready to train on.

    train: int32 [n, seq_len]. scored, valid: windows of documents held out of training, on which layers are scored and,
    other windows, on which losses are measured. baselines: loss on `valid`, in nats per token, of what only counts
    `train`, by name (see `count_baselines`). count_losses: of the strongest of them, by window.
    """

    tokenizer: PreTrainedTokenizerFast
    train: np.ndarray
    scored: Calibration
    valid: Calibration
    baselines: dict[str, float]
    count_losses: np.ndarray

    @property
    def seq_len(self) -> int:
        return self.train.shape[1]

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.train.tobytes() + (self.scored.digest + self.valid.digest).encode()).hexdigest()


def load_training_text(
    sources: Sequence[str],
    vocabulary: int = 2048,
    seq_len: int = 128,
    n_train: int | None = None,
    n_valid: int = 64,
    data_dir: str | os.PathLike | None = None,
) -> TrainingText:
    """Tokenize sources (keys of `llmdrop.calibration.SOURCES`) with a byte-level BPE trained on them, in windows.

    n_valid windows to score on and n_valid others to measure on come from the documents that the sources hold out (see
    `llmdrop.data.texts`): one of every source, then the next of every source, as far as they reach. All other
    documents, shuffled (always alike), train the tokenizer (the first 2,000) and fill at most n_train windows of
    seq_len tokens (None: all there is). data_dir: see `llmdrop.data`.

    Raises ValueError for unknown sources, sizes that make no sense, or too little text.
    """
    unknown = [name for name in sources if name not in SOURCES]
    if unknown or not sources:
        raise ValueError(f"unknown text {', '.join(unknown) or '(none given)'}; these are known: {', '.join(SOURCES)}")
    if vocabulary < SMALLEST_VOCABULARY or seq_len < 2 or n_valid < 2:
        raise ValueError(f"{vocabulary=}, {seq_len=}, {n_valid=}: need at least {SMALLEST_VOCABULARY}, 2 and 2")
    train_documents = _shuffled(document for name in sources for document in SOURCES[name].documents(data_dir))
    tokenizer = _train_tokenizer(train_documents[:TOKENIZER_DOCUMENTS], vocabulary)
    train = _pack(train_documents, tokenizer, seq_len, n_train)
    by_source = [
        _pack(_shuffled(SOURCES[name].held_out(data_dir)), tokenizer, seq_len, 2 * n_valid) for name in sources
    ]
    held_out = [window for together in zip_longest(*by_source) for window in together if window is not None]
    if not len(train) or len(held_out) < 2 * n_valid:
        raise ValueError(
            f"{', '.join(sources)}: {len(train_documents)} documents give {len(train)} windows of {seq_len} tokens to "
            f"train on, and {len(held_out)} are held out; need 1 and {2 * n_valid}. Add sources, or shorten windows or "
            "n_valid"
        )
    scored, valid = (
        Calibration(torch.from_numpy(np.stack(windows)).long(), source=f"{'+'.join(sources)}, held out")
        for windows in (held_out[:n_valid], held_out[n_valid : 2 * n_valid])
    )
    losses = count_baselines(train, valid.input_ids.numpy(), len(tokenizer))
    baselines = {name: float(of_windows.mean()) for name, of_windows in losses.items()}
    return TrainingText(tokenizer, train, scored, valid, baselines, losses[f"{LONGEST_GRAM}-gram"])


def _shuffled(documents: Iterable[str]) -> list[str]:
    """Each once, in an order that is always the same."""
    distinct = list(dict.fromkeys(documents))
    return [distinct[i] for i in np.random.default_rng(0).permutation(len(distinct))]


def _train_tokenizer(documents: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with END as its only special token."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(documents, vocabulary, min_frequency=0, show_progress=False, special_tokens=[END])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(bpe.to_str()), eos_token=END)


def _pack(documents: Sequence[str], tokenizer: PreTrainedTokenizerFast, seq_len: int, n: int | None) -> np.ndarray:
    """Documents end to end, cut into at most n windows: int32 [<= n, seq_len]."""
    stream: list[int] = []
    for start in range(0, len(documents), 64):
        for ids in tokenizer(documents[start : start + 64], verbose=False)["input_ids"]:
            stream += ids + [tokenizer.eos_token_id]
        if n is not None and len(stream) >= n * seq_len:
            break
    n_windows = len(stream) // seq_len
    return np.array(stream[: n_windows * seq_len], dtype=np.int32).reshape(n_windows, seq_len)[:n]


def count_baselines(train: np.ndarray, valid: np.ndarray, vocabulary: int) -> dict[str, np.ndarray]:
    """Loss on the second and later tokens of each window of `valid`, as for a model, of models that count `train`.

    Returns nats per token by window: "uniform", "unigram", "bigram" and "5-gram", the last two with interpolated
    Kneser-Ney smoothing and one discount per order (Kneser and Ney 1995; Chen and Goodman 1998, section 4.1.6). No
    n-gram reaches over the edge of a window.
    """
    counts = np.bincount(train.ravel(), minlength=vocabulary) + 1.0
    unigram = counts / counts.sum()
    by_order = _kneser_ney(train, valid, vocabulary)
    return {
        "uniform": np.full(len(valid), math.log(vocabulary)),
        "unigram": -np.log(unigram[valid[:, 1:]]).mean(axis=1),
        "bigram": -np.log(by_order[2]).mean(axis=1),
        f"{LONGEST_GRAM}-gram": -np.log(by_order[LONGEST_GRAM]).mean(axis=1),
    }


def _kneser_ney(train: np.ndarray, valid: np.ndarray, vocabulary: int) -> dict[int, np.ndarray]:
    """Probabilities of valid[:, 1:] by order, 2 to LONGEST_GRAM."""
    grams = _numbered_grams(np.concatenate([train, valid]).astype(np.int64), vocabulary)
    n_train = len(train)
    probability = np.full(valid[:, 1:].shape, 1 / vocabulary)
    by_order = {}
    for order in range(1, LONGEST_GRAM + 1):
        counts = _counts(grams, order, n_train)
        context = np.zeros(len(counts), dtype=np.int64)  # of every n-gram; a single token has the empty one
        if order > 1:
            context[grams[order]] = grams[order - 1][:, :-1]
        total = np.bincount(context, weights=counts)
        n_followers = np.bincount(context[counts > 0], minlength=len(total))
        once = (counts == 1).sum()
        discount = once / (once + 2 * (counts == 2).sum()) if once else 0.5  # which leaves something for the unseen

        first = max(order - 2, 0)  # column of `probability` from which on there is so much context
        asked = grams[order][n_train:]
        if order == 1:
            asked = asked[:, 1:]
        divisor = np.maximum(total[context[asked]], 1)
        left_over = discount * n_followers[context[asked]] / divisor
        smoothed = np.maximum(counts[asked] - discount, 0) / divisor + left_over * probability[:, first:]
        probability[:, first:] = np.where(total[context[asked]] > 0, smoothed, probability[:, first:])
        by_order[order] = probability.copy()
    return by_order


def _numbered_grams(windows: np.ndarray, vocabulary: int) -> dict[int, np.ndarray]:
    """By order, a number for the n-gram that begins at each place: int64 [n_windows, seq_len - order + 1]."""
    grams = {1: windows}
    for order in range(2, LONGEST_GRAM + 1):
        with_next_token = grams[order - 1][:, :-1] * vocabulary + windows[:, order - 1 :]
        grams[order] = np.unique(with_next_token, return_inverse=True)[1].reshape(with_next_token.shape)
    return grams


def _counts(grams: dict[int, np.ndarray], order: int, n_train: int) -> np.ndarray:
    """By number of an n-gram: how often it stands in the training windows, or, of all but the longest, after how many
    different tokens."""
    n_grams = grams[order].max() + 1
    if order == LONGEST_GRAM:
        return np.bincount(grams[order][:n_train].ravel(), minlength=n_grams)
    _, first_places = np.unique(grams[order + 1][:n_train], return_index=True)
    ends = grams[order][:n_train, 1:].ravel()[first_places]
    return np.bincount(ends, minlength=n_grams)
