"""Score the published checkpoints of a training run (Figure 7), one after the other, each stored when it is done."""

import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
from huggingface_hub import HfApi, snapshot_download
from transformers import AutoTokenizer

from .. import scoring
from ..calibration import load_calibration
from ..checkpoints.load import check_device, load_model, locate
from ..files import build_dir
from ..scoring import ImportanceScores, score
from .provenance import provenance, tokenizer_digest, version
from .store import Entry, Store

TEXT_FILES = ["*.json", "*.txt", "*.model"]  # configuration and tokenizer


def score_checkpoints(
    model: str,
    revisions: Mapping[str, float],
    calibration: str = "c4",
    dtype: str = "float32",
    device: str = "auto",
    batch_size: int = 8,
    keep: bool = True,
    store: Store | None = None,
    **text_settings,
) -> pd.DataFrame:
    """Score the checkpoints of one training run on one text: run, step, tokens, kind, layer, score, stderr, magnitude.

    model: a hub id, or a directory. revisions: {name: training tokens}, of a hub model its branches, tags or commits,
    of a directory its subdirectories. text_settings: of `load_calibration`. keep=False holds at most one hub checkpoint
    on disk, outside the hub's cache, and deletes it when it is scored. Each checkpoint is in the store as soon as it is
    scored, so a killed run goes on where it was, and nothing is downloaded twice.

    Raises ValueError for checkpoints that are not there or whose tokenizers or depths differ, FileNotFoundError for a
    hub that does not answer, OSError or ValueError for a checkpoint without a tokenizer that needs no remote code.
    """
    device = check_device(device)
    if len(revisions) < 2 or len(set(revisions.values())) < len(revisions):
        raise ValueError(f"revisions={dict(revisions)}: need {{name: tokens}} of at least two, no two alike in tokens")
    places = _places(model, revisions)
    tokenizer = _shared_tokenizer(model, places, last=max(revisions, key=revisions.get))
    text = load_calibration(calibration, tokenizer, **text_settings)
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
        Entry(key | {"revision": name, "place": _identity(place)}, f"{model}-{name}") for name, place in places.items()
    ]

    def compute(missing: list[int]) -> Iterator[dict]:
        for i in missing:
            with _on_disk(list(places.values())[i], keep) as where:
                loaded, _ = load_model(where, dtype, device)
                yield score(loaded, text, batch_size).to_record()
                del loaded  # before the next one is read

    def facts() -> dict:
        return provenance(None, text) | {"model": model, "dtype": dtype, "device_type": device}

    values = (store or Store()).get_many("checkpoint", entries, compute, facts)
    run = Path(model).name if Path(model).is_dir() else model
    frames = []
    for name, value in zip(places, values, strict=True):
        scores = ImportanceScores.from_record(value)
        frames.append(scores.to_frame(run=run, step=name, tokens=revisions[name]))
    depths = {name: frame["layer"].nunique() for name, frame in zip(places, frames, strict=True)}
    if len(set(depths.values())) > 1:
        raise ValueError(f"{model}: these checkpoints differ in depth, so they are not of one run: {depths}")
    return pd.concat(frames, ignore_index=True).sort_values("tokens", kind="stable", ignore_index=True)


def _places(model: str, names: Iterable[str]) -> dict[str, str]:
    """What `load_model` takes for each of these subdirectories, or branches, tags and commits."""
    if Path(model).is_dir():
        known = {file.parent.name: str(file.parent) for file in sorted(Path(model).glob("*/config.json"))}
        kind = "checkpoint"
    else:
        known = {name: f"{model}@{commit}" for name, commit in _commits(model).items()}
        known |= {name: f"{model}@{name}" for name in names if re.fullmatch("[0-9a-f]{40}", name)}
        kind = "revision"
    absent = [name for name in names if name not in known]
    if absent:
        some = ", ".join(list(known)[:20]) + (", ..." if len(known) > 20 else "")
        raise ValueError(f"{model} has no {kind} {', '.join(absent)}; it has {len(known)}: {some}")
    return {name: known[name] for name in names}


def _commits(model: str) -> dict[str, str]:
    try:
        refs = HfApi().list_repo_refs(model)
    except Exception as error:  # offline, unknown, gated, no hub id: a dozen kinds
        raise FileNotFoundError(
            f"cannot list the revisions of {model!r}: {' '.join(str(error).split())[:300]} | Give a hub id that this "
            "machine can reach (unset HF_HUB_OFFLINE), or a directory with one subdirectory per checkpoint"
        ) from error
    return {ref.name: ref.target_commit for ref in [*refs.branches, *refs.tags]}


def _identity(place: str) -> str | list[list]:
    """What changes when the checkpoint does, as plain JSON: a commit, or names, sizes and times of files."""
    path, commit = locate(place)
    if not Path(path).is_dir():
        return commit
    files = sorted(file for file in Path(path).iterdir() if file.is_file())
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


@contextmanager
def _on_disk(place: str, keep: bool) -> Iterator[str]:
    """What `load_model` takes; without `keep` downloaded outside the hub's cache, and gone afterwards."""
    model, commit = locate(place)
    if keep or Path(model).is_dir():
        yield place
        return
    downloads = build_dir() / "checkpoint" / model.replace("/", "--")
    folder = downloads / commit
    for leftover in downloads.glob("*"):  # of a killed run; the same commit goes on where its download stopped
        if leftover != folder:
            shutil.rmtree(leftover)
    files = HfApi().list_repo_files(model, revision=commit)
    has_safetensors = any(name.endswith(".safetensors") for name in files)
    weights = "*.safetensors" if has_safetensors else "*.bin"
    snapshot_download(model, revision=commit, local_dir=folder, allow_patterns=[*TEXT_FILES, weights])
    try:
        yield str(folder)
    finally:
        shutil.rmtree(folder)


def _shared_tokenizer(model: str, places: Mapping[str, str], last: str):
    """The tokenizer of all of them. ValueError where they differ."""
    tokenizers = {}
    for name, place in places.items():
        path, revision = locate(place)
        tokenizers[name] = AutoTokenizer.from_pretrained(path, revision=revision)
    digests = {name: tokenizer_digest(tokenizer) for name, tokenizer in tokenizers.items()}
    different = [name for name, digest in digests.items() if digest != digests[last]]
    if different:
        raise ValueError(
            f"{model}: the tokenizer of {', '.join(different)} is not that of {last}, so their scores cannot be "
            "compared; leave those checkpoints out"
        )
    return tokenizers[last]
