"""What most notebooks begin with: a model, the text it is scored on, its scores, and what variants of it are asked."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property

import numpy as np
import pandas as pd
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..anatomy import find_anatomy
from ..calibration import Calibration, load_calibration
from ..checkpoints.embedded import in_words, short_name
from ..checkpoints.load import load_model
from ..compress.variant import Variant
from ..data.texts import HELD_OUT, held_out_texts, mixture
from ..evaluation.questions import retrieval
from ..scoring import ImportanceScores
from .provenance import provenance
from .quality import Questions, quality
from .selectors import Chooser
from .store import Store

MIXTURE = ("xsum", "multilexsum", "quac", "squad", "tales", "reviews", "abstracts", "asdiv", "questions")


@dataclass(frozen=True)
class Settings:
    """What an experiment can be told beside its model, device and data: SETTINGS of the notebooks.

    Lengths are in tokens. Sources of text are keys of `llmdrop.calibration.SOURCES` (calibration: or whatever else
    `load_calibration` takes).
    """

    dtype: str = "float32"  # or "bfloat16", "float16", "auto"
    seed: int = 0  # draws all text and all questions
    batch_size: int = 8  # samples or questions at a time; changes speed and memory, and 16-bit sums a little

    calibration: object = "xsum"  # text to score on
    n_samples: int = 16  # samples of it; the paper takes 256
    seq_len: int = 512  # of each, and of each sample to fit on; the paper takes 2048

    held_out: Sequence[str] = HELD_OUT  # text to measure loss on: documents that nothing is scored, chosen or fitted on
    held_out_samples: int = 16  # samples of each; with fewer than 16, intervals are too narrow
    held_out_len: int = 128  # of each

    num_fewshot: Mapping[str, int] | int | None = None  # examples by task; None: lm-eval's default of each
    contexts: Sequence[int] = (512, 1024, 2048)  # lengths of contexts with facts, all of which are asked for
    n_facts: int = 16  # in each context

    fit_sources: Sequence[str] = MIXTURE  # text to choose and fit on, beyond the paper
    fit_samples: int = 8  # samples of each to fit on; Wanda's norms are of so many samples of the calibration
    search_len: int = 256  # of one further sample of each, on which dropped models are run to choose layers
    long_sources: Sequence[str] = ("multilexsum", "quac")  # text of long documents, to choose windowed layers on
    long_samples: int = 4  # samples of each
    long_len: int = 1024  # of each; more than a window and its sinks
    predicted: Mapping[str, object] = field(  # of `predict_speed`, by which variants are as fast as each other
        default_factory=lambda: {"prompt_len": 2048, "new_tokens": 256, "hardware": "RTX 6000 Ada"}
    )


@dataclass(frozen=True)
class Experiment:
    """A model and its text. Texts and scores are made when first used, scores once for all (stored).

    source: where the model comes from, as `load_model` takes it. calibration: text to score on.
    """

    source: str
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    calibration: Calibration
    settings: Settings
    data_dir: str | os.PathLike | None
    store: Store

    @property
    def name(self) -> str:
        """Of the model, for tables."""
        return short_name(self.source)

    @property
    def weights(self) -> str:
        """Which weights these are, for captions."""
        return in_words(self.source)

    @property
    def n_layers(self) -> int:
        return find_anatomy(self.model).n_layers

    @cached_property
    def scores(self) -> ImportanceScores:
        """Of the undropped model: first used before anything is dropped."""
        return self.store.score(self.model, self.calibration, self.settings.batch_size)

    def sample_scores(self, text: Calibration | None = None) -> np.ndarray:
        """Scores of every sample of a text (None: the calibration), [n_samples, 3, n_layers]: attn, mlp, block."""
        scores = self.store.sample_scores(self.model, text or self.calibration, self.settings.batch_size)
        return np.stack([scores[kind] for kind in ("attn", "mlp", "block")], axis=1)

    def text(self, source: object = None, n_samples: int | None = None, skip: int = 0) -> Calibration:
        """Other calibration text: of another source, of so many samples (None: as the settings say)."""
        settings = self.settings
        return load_calibration(
            settings.calibration if source is None else source,
            self.tokenizer,
            settings.n_samples if n_samples is None else n_samples,
            settings.seq_len,
            settings.seed,
            self.data_dir,
            skip=skip,
        )

    @property
    def calibration_in_words(self) -> str:
        """For captions: "16 × 512 tokens of xsum"."""
        n_samples, length = self.calibration.input_ids.shape
        source = self.settings.calibration
        return f"{n_samples} × {length:,} tokens of {source if isinstance(source, str) else self.calibration.source}"

    @cached_property
    def held_out(self) -> dict[str, Calibration]:
        """Text to measure on, by source: documents that nothing is scored, chosen or fitted on."""
        settings = self.settings
        sizes = settings.held_out_samples, settings.held_out_len
        return held_out_texts(self.tokenizer, *sizes, settings.held_out, settings.seed, self.data_dir)

    @property
    def held_out_in_words(self) -> str:
        """For captions: "16 × 128 held-out tokens of each of xsum, boolq"."""
        settings = self.settings
        size = f"{settings.held_out_samples} × {settings.held_out_len:,}"
        return f"{size} held-out tokens of each of {', '.join(settings.held_out)}"

    @cached_property
    def retrieval(self) -> dict[int, Questions]:
        """Facts to be found in a context, by its length in tokens (`llmdrop.evaluation.questions.retrieval`)."""
        settings = self.settings
        drawn = settings.n_facts, settings.seed, self.data_dir
        return {n: Questions(*retrieval(self.tokenizer, n, *drawn)) for n in settings.contexts}

    def mixture(self, n_samples: int, seq_len: int, skip: int = 0) -> Calibration:
        """Text of all kinds to fit, search or train on."""
        settings = self.settings
        sources = settings.fit_sources
        return mixture(sources, self.tokenizer, n_samples, seq_len, settings.seed, self.data_dir, skip)

    @property
    def _before_search(self) -> int:
        """Samples of `search_len` that the text to fit on may share documents or tokens with."""
        settings = self.settings
        return max(5 * settings.fit_samples, math.ceil(settings.fit_samples * settings.seq_len / settings.search_len))

    def training_text(self, n_samples: int, seq_len: int) -> Calibration:
        """Text of all kinds to train on, so many samples of each source: nothing that is fitted or searched on."""
        before = self._before_search + 1
        skip = max(before, math.ceil(before * self.settings.search_len / seq_len))
        return self.mixture(n_samples, seq_len, skip)

    @cached_property
    def chooser(self) -> Chooser:
        """Chooses layers on a mixture of text; the paper's method on the calibration, as everywhere."""
        settings = self.settings
        sizes = settings.long_samples, settings.long_len
        return Chooser(
            self.model,
            text=self.mixture(settings.fit_samples, settings.seq_len),
            search_text=self.mixture(1, settings.search_len, skip=self._before_search),
            long_text=mixture(settings.long_sources, self.tokenizer, *sizes, settings.seed, self.data_dir),
            batch_size=settings.batch_size,
            speed=settings.predicted,
            store=self.store,
            paper_text=self.calibration,
        )

    def quality(
        self,
        variants: Mapping[str, Variant],
        texts: Mapping[str, Calibration] | None = None,
        tasks: Sequence[str] = (),
        questions: Mapping[str, Questions] | None = None,
        limit: int | None = None,
    ) -> pd.DataFrame:
        """`llmdrop.repro.quality.quality` of variants of the model, on texts (None: the held-out ones) and tasks."""
        return quality(
            self.model,
            self.tokenizer,
            variants,
            self.held_out if texts is None else texts,
            tasks,
            questions,
            limit,
            self.data_dir,
            self.settings.num_fewshot,
            self.settings.batch_size,
            self.store,
            self.settings.seed,
        )

    def provenance(self, **facts) -> dict:
        """`llmdrop.provenance` of the model and its calibration text, and these facts."""
        own = {"weights_of": self.weights, "seed": self.settings.seed}
        return provenance(self.model, self.calibration, **own | facts)


def load_experiment(
    model: str,
    device: str = "auto",
    data_dir: str | os.PathLike | None = None,
    store: Store | None = None,
    **settings: object,
) -> Experiment:
    """Load a model and cut the text that it is scored on; scores and other text follow when they are asked for.

    settings: fields of `Settings`. Raises TypeError for another name, and what `llmdrop.load_model` and
    `llmdrop.load_calibration` raise.
    """
    allowed = [setting.name for setting in fields(Settings)]
    unknown = [name for name in settings if name not in allowed]
    if unknown:
        raise TypeError(f"SETTINGS has no {', '.join(map(repr, unknown))}; it may have: {', '.join(allowed)}")
    chosen = Settings(**settings)
    loaded, tokenizer = load_model(model, chosen.dtype, device)
    sizes = chosen.n_samples, chosen.seq_len
    text = load_calibration(chosen.calibration, tokenizer, *sizes, chosen.seed, data_dir)
    return Experiment(model, loaded, tokenizer, text, chosen, data_dir, store or Store())
