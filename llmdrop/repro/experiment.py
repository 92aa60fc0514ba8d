"""What most notebooks begin with: a model, the text it is scored on, its scores, and held-out text."""

import os
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..calibration import Calibration, load_calibration
from ..checkpoints.load import load_model
from ..scoring import ImportanceScores
from .provenance import provenance
from .store import Store


@dataclass(frozen=True)
class Experiment:
    """A scored model. held_out: text that the scores have not seen, on which its variants are measured."""

    name: str  # of the model, for captions
    model: nn.Module
    tokenizer: object
    calibration: Calibration
    scores: ImportanceScores
    held_out: Calibration

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
    held_out: str = "xsum",
    held_out_samples: int = 8,
    held_out_len: int = 256,
    held_out_skip: int = 64,
    seed: int = 0,
    data_dir: str | os.PathLike | None = None,
    batch_size: int = 8,
    store: Store | None = None,
) -> Experiment:
    """Load a model, score it (stored) on n_samples x seq_len tokens, and cut held-out text.

    held_out_skip: samples of the held-out source that are left out, since the calibration may have seen them (twice the
    calibration's tokens). Raises what `llmdrop.load_model`, `llmdrop.load_calibration` and `llmdrop.score` raise.
    """
    loaded, tokenizer = load_model(model, dtype, device)
    text = load_calibration(calibration, tokenizer, n_samples, seq_len, seed, data_dir)
    scores = (store or Store()).score(loaded, text, batch_size)
    rest = load_calibration(held_out, tokenizer, held_out_samples, held_out_len, seed, data_dir, skip=held_out_skip)
    return Experiment(Path(model.split("@")[0]).name, loaded, tokenizer, text, scores, rest)
