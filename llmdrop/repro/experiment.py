"""What most notebooks begin with: a model, the text it is scored on, its scores, and held-out text."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..calibration import Calibration, load_calibration
from ..checkpoints.load import load_model
from ..data.texts import HELD_OUT, held_out_texts
from ..scoring import ImportanceScores
from .provenance import provenance
from .store import Store


@dataclass(frozen=True)
class Experiment:
    """A scored model. held_out: text by source that nothing is scored on, on which its variants are measured."""

    name: str  # of the model, for captions
    model: nn.Module
    tokenizer: object
    calibration: Calibration
    scores: ImportanceScores
    held_out: dict[str, Calibration]

    @property
    def n_layers(self) -> int:
        return len(self.scores.attn)

    def provenance(self, **facts) -> dict:
        """`llmdrop.provenance` of the model and its calibration text, and these facts."""
        return provenance(self.model, self.calibration, **facts)


def load_experiment(
    model: str,
    dtype: str = "float32",
    device: str = "auto",
    calibration: str = "xsum",
    n_samples: int = 16,
    seq_len: int = 512,
    held_out: Sequence[str] = HELD_OUT,
    held_out_samples: int = 16,
    held_out_len: int = 128,
    seed: int = 0,
    data_dir: str | os.PathLike | None = None,
    batch_size: int = 8,
    store: Store | None = None,
) -> Experiment:
    """Load a model, score it (stored) on n_samples x seq_len tokens, and cut held-out text.

    held_out: its sources (see `llmdrop.data.texts.held_out_texts`). Raises what `llmdrop.load_model`,
    `llmdrop.load_calibration` and `llmdrop.score` raise.
    """
    loaded, tokenizer = load_model(model, dtype, device)
    text = load_calibration(calibration, tokenizer, n_samples, seq_len, seed, data_dir)
    scores = (store or Store()).score(loaded, text, batch_size)
    rest = held_out_texts(tokenizer, held_out_samples, held_out_len, held_out, seed, data_dir)
    return Experiment(Path(model.split("@")[0]).name, loaded, tokenizer, text, scores, rest)
