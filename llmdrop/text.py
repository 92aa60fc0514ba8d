"""Text to train a small language model on: a tokenizer of its own, packed windows, and losses to beat."""

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .calibration import SOURCES, Calibration
from .data import read_split

END = "</s>"  # stands after every document


@dataclass(frozen=True, eq=False)
class Text:
    """Text as tokens, ready to train on. train: int32 [n, seq_len]. valid: windows of documents held out of training.
    baselines: validation loss in nats per token of models that know no context ("uniform", "unigram") or one token of
    it ("bigram"), counted on `train`.
    """

    tokenizer: PreTrainedTokenizerFast
    train: np.ndarray
    valid: Calibration
    baselines: dict[str, float]

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.train.tobytes() + self.valid.digest.encode()).hexdigest()


def load_text(
    sources: Sequence[str],
    vocabulary: int = 2048,
    seq_len: int = 128,
    n_train: int | None = None,
    n_valid: int = 64,
    data_dir: str | os.PathLike | None = None,
) -> Text:
    """Tokenize sources (keys of `llmdrop.calibration.SOURCES`) with a byte-level BPE trained on them, in windows.

    About one document in twenty is held out, chosen by its opening words, so that two passages of one article are
    never on both sides. The others, shuffled (always alike), train the tokenizer (the first 2,000) and fill at most
    n_train windows of seq_len tokens (None: all there is). data_dir: see `llmdrop.data`.

    Raises ValueError for unknown sources, sizes that make no sense, or too little text.
    """
    unknown = [name for name in sources if name not in SOURCES]
    if unknown or not sources:
        raise ValueError(f"unknown text {', '.join(unknown) or '(none given)'}; these are known: {', '.join(SOURCES)}")
    if vocabulary < 257 or min(seq_len - 1, n_valid - 1, 1 if n_train is None else n_train) < 1:
        raise ValueError(
            f"{vocabulary=}, {seq_len=}, {n_train=}, {n_valid=}: need at least 257 (256 bytes and {END}), 2, 1 and 2"
        )
    documents: dict[str, None] = {}  # a text that occurs twice would weigh twice
    for dataset, config, split, text, _ in (SOURCES[name] for name in sources):
        documents |= dict.fromkeys(map(text, read_split(dataset, config, split, data_dir)))
    texts = list(documents)
    texts = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]
    held_out = [hashlib.sha256(text[:24].encode()).digest()[0] < 13 for text in texts]
    train_texts = [text for text, held in zip(texts, held_out, strict=True) if not held]

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(train_texts[:2000], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END)

    train = _pack(train_texts, tokenizer, seq_len, n_train)
    valid = _pack([text for text, held in zip(texts, held_out, strict=True) if held], tokenizer, seq_len, n_valid)
    if not len(train) or len(valid) < n_valid:
        raise ValueError(
            f"{', '.join(sources)}: {len(texts)} documents give {len(train)} windows of {seq_len} tokens to train on "
            f"and {len(valid)} held out; need 1 and {n_valid}. Add sources, or make windows shorter or n_valid smaller"
        )
    calibration = Calibration(torch.tensor(valid, dtype=torch.long), source=f"{'+'.join(sources)}, held out")
    return Text(tokenizer, train, calibration, _baselines(train, valid, len(tokenizer)))


def _pack(texts: Sequence[str], tokenizer, seq_len: int, n: int | None) -> np.ndarray:
    """Documents end to end, cut into at most n windows: int32 [<= n, seq_len]."""
    stream: list[int] = []
    for start in range(0, len(texts), 64):
        for ids in tokenizer(texts[start : start + 64], verbose=False)["input_ids"]:
            stream += ids + [tokenizer.eos_token_id]
        if n is not None and len(stream) >= n * seq_len:
            break
    whole = min(len(stream) // seq_len, len(stream) if n is None else n)
    return np.array(stream[: whole * seq_len], dtype=np.int32).reshape(whole, seq_len)


def _baselines(train: np.ndarray, valid: np.ndarray, vocabulary: int) -> dict[str, float]:
    """Loss on the second and later tokens of each window of `valid`, as for a model, of models that count `train`.

    The bigram is smoothed towards the unigram with the strength that suits `valid` best: the hardest one to beat.
    """
    counts = np.bincount(train.ravel(), minlength=vocabulary) + 1.0
    unigram = counts / counts.sum()
    pairs, seen = np.unique(train[:, :-1].astype(np.int64) * vocabulary + train[:, 1:], return_counts=True)
    firsts = np.bincount(train[:, :-1].ravel(), minlength=vocabulary)
    before, after = valid[:, :-1].ravel().astype(np.int64), valid[:, 1:].ravel()
    wanted = before * vocabulary + after
    at = np.searchsorted(pairs, wanted).clip(max=len(pairs) - 1)
    joint = np.where(pairs[at] == wanted, seen[at], 0)
    bigrams = [-np.log((joint + k * unigram[after]) / (firsts[before] + k)).mean() for k in 2.0 ** np.arange(-2, 12)]
    return {
        "uniform": math.log(vocabulary),
        "unigram": float(-np.log(unigram[after]).mean()),
        "bigram": float(min(bigrams)),
    }
