"""Text to train a small language model on: a tokenizer of its own, packed windows, and losses to beat."""

import hashlib
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from transformers import PreTrainedTokenizerFast

from ..calibration import SOURCES, Calibration

END = "</s>"  # stands after every document
SMALLEST_VOCABULARY = 257  # 256 bytes and END
TOKENIZER_DOCUMENTS = 2000  # on which the tokenizer is trained


@dataclass(frozen=True, eq=False)
class TrainingText:
    """Text as tokens, ready to train on.

    train: int32 [n, seq_len]. valid: windows of documents held out of training. baselines: validation loss in nats per
    token of models that know no context ("uniform", "unigram") or one token of it ("bigram"), counted on `train`.
    """

    tokenizer: PreTrainedTokenizerFast
    train: np.ndarray
    valid: Calibration
    baselines: dict[str, float]

    @property
    def seq_len(self) -> int:
        return self.train.shape[1]

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.train.tobytes() + self.valid.digest.encode()).hexdigest()


def load_training_text(
    sources: Sequence[str],
    vocabulary: int = 2048,
    seq_len: int = 128,
    n_train: int | None = None,
    n_valid: int = 64,
    data_dir: str | os.PathLike | None = None,
) -> TrainingText:
    """Tokenize sources (keys of `llmdrop.calibration.SOURCES`) with a byte-level BPE trained on them, in windows.

    Validation is on the documents that the sources hold out (see `llmdrop.data.texts`). The others, shuffled (always
    alike), train the tokenizer (the first 2,000) and fill at most n_train windows of seq_len tokens (None: all there
    is). data_dir: see `llmdrop.data`.

    Raises ValueError for unknown sources, sizes that make no sense, or too little text.
    """
    unknown = [name for name in sources if name not in SOURCES]
    if unknown or not sources:
        raise ValueError(f"unknown text {', '.join(unknown) or '(none given)'}; these are known: {', '.join(SOURCES)}")
    if vocabulary < SMALLEST_VOCABULARY or seq_len < 2 or n_valid < 2:
        raise ValueError(f"{vocabulary=}, {seq_len=}, {n_valid=}: need at least {SMALLEST_VOCABULARY}, 2 and 2")
    train_documents = _shuffled(document for name in sources for document in SOURCES[name].documents(data_dir))
    valid_documents = _shuffled(document for name in sources for document in SOURCES[name].held_out(data_dir))
    tokenizer = _train_tokenizer(train_documents[:TOKENIZER_DOCUMENTS], vocabulary)
    train = _pack(train_documents, tokenizer, seq_len, n_train)
    valid = _pack(valid_documents, tokenizer, seq_len, n_valid)
    if not len(train) or len(valid) < n_valid:
        raise ValueError(
            f"{', '.join(sources)}: {len(train_documents)} documents give {len(train)} windows of {seq_len} tokens to "
            f"train on, {len(valid_documents)} give {len(valid)} held out; need 1 and {n_valid}. Add sources, or "
            "shorten windows or n_valid"
        )
    held_out = Calibration(torch.tensor(valid, dtype=torch.long), source=f"{'+'.join(sources)}, held out")
    return TrainingText(tokenizer, train, held_out, count_baselines(train, valid, len(tokenizer)))


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


def count_baselines(train: np.ndarray, valid: np.ndarray, vocabulary: int) -> dict[str, float]:
    """Loss on the second and later tokens of each window of `valid`, as for a model, of models that count `train`.

    The bigram is smoothed towards the unigram with the strength that suits `valid` best: the hardest one to beat.
    """
    counts = np.bincount(train.ravel(), minlength=vocabulary) + 1.0
    unigram = counts / counts.sum()
    first = train[:, :-1].ravel().astype(np.int64)
    pairs, n_pairs = np.unique(first * vocabulary + train[:, 1:].ravel(), return_counts=True)  # each as one number
    before = valid[:, :-1].ravel().astype(np.int64)
    after = valid[:, 1:].ravel()
    asked = before * vocabulary + after
    place = np.searchsorted(pairs, asked).clip(max=len(pairs) - 1)
    times_together = np.where(pairs[place] == asked, n_pairs[place], 0)
    times_before = np.bincount(first, minlength=vocabulary)[before]
    losses = []  # by strength
    for strength in 2.0 ** np.arange(-2, 12):
        probability = (times_together + strength * unigram[after]) / (times_before + strength)
        losses.append(-np.log(probability).mean())
    return {
        "uniform": math.log(vocabulary),
        "unigram": float(-np.log(unigram[after]).mean()),
        "bigram": float(min(losses)),
    }
