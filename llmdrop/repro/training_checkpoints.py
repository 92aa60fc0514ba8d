"""Score the published checkpoints of a training run (Figure 7), one after the other, each stored when it is done."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pandas as pd
from huggingface_hub import HfApi, snapshot_download
from transformers import AutoTokenizer

from .. import scoring
from ..calibration import load_calibration
from ..checkpoints.load import check_device, load_model
from ..files import build_dir
from ..scoring import ImportanceScores, score
from .provenance import provenance, tokenizer_digest, version
from .store import Entry, Store

TEXT_FILES = ["*.json", "*.txt", "*.model"]  # configuration and tokenizer


def score_checkpoints(
    model: str,
    revisions: Mapping[str, float],
    calibration: str = "c4",
    n_samples: int = 256,
    seq_len: int = 2048,
    seed: int = 0,
    data_dir: str | os.PathLike | None = None,
    dtype: str = "float32",
    device: str = "auto",
    batch_size: int = 8,
    keep: bool = True,
    store: Store | None = None,
) -> pd.DataFrame:
    """Score the checkpoints of one training run on one text: run, step, tokens, kind, layer, score, stderr, magnitude.

    model: a hub id, or a directory. revisions: {name: training tokens}, of a hub model its branches, tags or commits,
    of a directory its subdirectories. keep=False holds at most one hub checkpoint on disk, outside the hub's cache,
    and deletes it when it is scored. Each checkpoint is in the store as soon as it is scored, so a killed run goes on
    where it was, and nothing is downloaded twice.

    Raises, before any is scored: FileNotFoundError or ValueError for checkpoints that are not there, ValueError where
    their tokenizers differ, since scores on different tokens cannot be compared; then ValueError where depths differ.
    """
    device = check_device(device)
    if len(revisions) < 2 or len(set(revisions.values())) < len(revisions):
        raise ValueError(f"revisions={dict(revisions)}: need {{name: tokens}} of at least two, no two alike in tokens")
    is_directory = Path(model).is_dir()
    checkpoints = _directories(model, revisions) if is_directory else _hub_commits(model, revisions)
    tokenizer = _shared_tokenizer(model, checkpoints, last=max(revisions, key=revisions.get))
    text = load_calibration(calibration, tokenizer, n_samples, seq_len, seed, data_dir)
    key = {
        "model": model,
        "dtype": dtype,
        "device": device.split(":")[0],
        "calibration": text.digest,
        "torch": version("torch"),
        "transformers": version("transformers"),
        "version": scoring.VERSION,
        "batch_size": None if dtype == "float32" else batch_size,
    }
    entries = [
        Entry(key | {"revision": name, "place": checkpoint.identity}, f"{model}-{name}")
        for name, checkpoint in checkpoints.items()
    ]

    def compute(missing: list[int]) -> Iterator[dict]:
        names = list(checkpoints)
        for i in missing:
            with checkpoints[names[i]].on_disk(keep) as where:
                loaded, _ = load_model(where, dtype, device)
                yield json.loads(score(loaded, text, batch_size).to_json())
                del loaded  # before the next one is read

    def facts() -> dict:
        return provenance(None, text) | {"model": model, "dtype": dtype, "device_type": device}

    values = (store or Store()).get_many("checkpoint", entries, compute, facts)
    run = Path(model).name if is_directory else model
    frames = {}
    for name, value in zip(checkpoints, values, strict=True):
        scores = ImportanceScores.from_json(json.dumps(value))
        frames[name] = scores.to_frame(run=run, step=name, tokens=revisions[name])
    depths = {name: frame["layer"].nunique() for name, frame in frames.items()}
    if len(set(depths.values())) > 1:
        raise ValueError(f"{model}: these checkpoints differ in depth, so they are not of one run: {depths}")
    return pd.concat(frames.values(), ignore_index=True).sort_values("tokens", kind="stable", ignore_index=True)


class Checkpoint(Protocol):
    """One checkpoint of a run, wherever it is."""

    @property
    def identity(self) -> str | list:
        """What changes when the checkpoint does, as plain JSON."""

    def load_tokenizer(self):
        """Its tokenizer. Raises OSError or ValueError where there is none that loads without remote code."""

    def on_disk(self, keep: bool) -> AbstractContextManager[str]:
        """What `load_model` takes, for the length of a `with` block."""


@dataclass(frozen=True)
class DirectoryCheckpoint:
    """A checkpoint in a directory of its own."""

    folder: Path

    @property
    def identity(self) -> list[list]:
        """Names, sizes and times of its files."""
        files = sorted(file for file in self.folder.iterdir() if file.is_file())
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]

    def load_tokenizer(self):
        return AutoTokenizer.from_pretrained(self.folder)

    def on_disk(self, keep: bool) -> AbstractContextManager[str]:
        return nullcontext(str(self.folder))


@dataclass(frozen=True)
class HubCheckpoint:
    """A commit of a model on the hub."""

    model: str
    commit: str

    @property
    def identity(self) -> str:
        return self.commit

    def load_tokenizer(self):
        return AutoTokenizer.from_pretrained(self.model, revision=self.commit)

    @contextmanager
    def on_disk(self, keep: bool) -> Iterator[str]:
        """Without `keep`: downloaded outside the hub's cache, and gone afterwards."""
        if keep:
            yield f"{self.model}@{self.commit}"
            return
        downloads = build_dir() / "checkpoint" / self.model.replace("/", "--")
        folder = downloads / self.commit
        for leftover in downloads.glob("*"):  # of a killed run; the same commit goes on where its download stopped
            if leftover != folder:
                shutil.rmtree(leftover)
        files = HfApi().list_repo_files(self.model, revision=self.commit)
        has_safetensors = any(name.endswith(".safetensors") for name in files)
        weights = "*.safetensors" if has_safetensors else "*.bin"
        snapshot_download(self.model, revision=self.commit, local_dir=folder, allow_patterns=[*TEXT_FILES, weights])
        try:
            yield str(folder)
        finally:
            shutil.rmtree(folder)


def _directories(model: str, names: Sequence[str]) -> dict[str, Checkpoint]:
    """The subdirectories of these names."""
    present = sorted(file.parent.name for file in Path(model).glob("*/config.json"))
    absent = [name for name in names if name not in present]
    if absent:
        raise FileNotFoundError(
            f"{model} has no checkpoint {', '.join(absent)}; those with a config.json there: "
            f"{', '.join(present[:20]) or 'none'}. A checkpoint is a directory with config.json, weights, tokenizer"
        )
    return {name: DirectoryCheckpoint(Path(model, name)) for name in names}


def _hub_commits(model: str, names: Sequence[str]) -> dict[str, Checkpoint]:
    """The commits of these branches, tags or commits."""
    try:
        refs = HfApi().list_repo_refs(model)
    except Exception as error:  # offline, unknown, gated, no hub id: a dozen kinds
        raise FileNotFoundError(
            f"cannot list the revisions of {model!r}: {' '.join(str(error).split())[:300]} | Give a hub id that this "
            "machine can reach (unset HF_HUB_OFFLINE), or a directory with one subdirectory per checkpoint"
        ) from error
    commits = {ref.name: ref.target_commit for ref in [*refs.branches, *refs.tags]}
    commits |= {name: name for name in names if re.fullmatch("[0-9a-f]{40}", name)}
    absent = [name for name in names if name not in commits]
    if absent:
        some = ", ".join(list(commits)[:20]) + (", ..." if len(commits) > 20 else "")
        raise ValueError(f"{model} has no revision {', '.join(absent)}; it has {len(commits)}: {some}")
    return {name: HubCheckpoint(model, commits[name]) for name in names}


def _shared_tokenizer(model: str, checkpoints: Mapping[str, Checkpoint], last: str):
    """The tokenizer of all of them. ValueError where they differ, FileNotFoundError where one has none."""
    tokenizers = {}
    for name, checkpoint in checkpoints.items():
        try:
            tokenizers[name] = checkpoint.load_tokenizer()
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"{model}, checkpoint {name}: no tokenizer that loads without remote code "
                f"({' '.join(str(error).split())[:200]}); put tokenizer.json beside the weights"
            ) from error
    digests = {name: tokenizer_digest(tokenizer) for name, tokenizer in tokenizers.items()}
    different = [name for name, digest in digests.items() if digest != digests[last]]
    if different:
        raise ValueError(
            f"{model}: the tokenizer of {', '.join(different)} is not that of {last}, so their scores cannot be "
            "compared; leave those checkpoints out"
        )
    return tokenizers[last]
