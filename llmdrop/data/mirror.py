"""Reads a split of a dataset from a mirror, the packaged data or the hub.

A mirror holds `<hub dataset path>/<config or "default">/<split>.jsonl[.gz]`, one JSON object with the columns of the
hub dataset per line.
"""

import os
from pathlib import Path

from .packaged import PACKAGED, packaged_data_dir
from .rows import jsonl_file, read_rows

# A split that is one file of a large dataset on the hub, as SparseGPT and Wanda read it
HUB_FILES = {"allenai/c4/en/validation": "en/c4-validation.00000-of-00008.json.gz"}


def read_split(path: str, config: str | None, split: str, data_dir: str | os.PathLike | None = None) -> list[dict]:
    """All rows of a split, from the mirror, the packaged data or the hub (see `split_file`).

    Raises FileNotFoundError where the split cannot be had, ValueError (file and line) where its file is damaged.
    """
    file = split_file(path, config, split, data_dir)
    if file is not None:
        return read_rows(file)
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(f"reading from the hub needs datasets ({error}): pip install 'llmdrop[eval]'") from error

    name = _name(path, config, split)
    which = {"data_files": {split: HUB_FILES[name]}} if name in HUB_FILES else {"name": config}
    try:
        return list(load_dataset(path, split=split, **which))
    except Exception as error:  # offline, unknown, gated: datasets raises a dozen kinds
        if os.path.isdir(path):
            reason = " ".join(str(error).split())[:300]
            raise FileNotFoundError(f"datasets finds no split {split!r} in the directory {path}: {reason}") from error
        raise FileNotFoundError(
            f"cannot get {name} from the hub: {' '.join(str(error).split())[:300]} | It is not packaged. Fix: a "
            f"network, or data_dir=<mirror> with <mirror>/{name}.jsonl[.gz], or one of the packaged sets"
        ) from error


def split_file(path: str, config: str | None, split: str, data_dir: str | os.PathLike | None = None) -> Path | None:
    """The file holding a split, or None where it comes from the hub.

    A mirror stands in for the hub: where it lacks a split that is packaged, the packaged one is used; where it lacks
    any other, FileNotFoundError says what was looked for, what is there and how to fix it.
    """
    name = _name(path, config, split)
    if data_dir == "hub":
        return None
    if data_dir is not None:
        root = Path(data_dir).expanduser()
        if not root.is_dir():
            raise FileNotFoundError(f"data_dir {str(data_dir)!r} is not a directory; give a mirror, None or 'hub'")
        file = jsonl_file(root / name)
        if file is not None:
            return file
    if name in PACKAGED:
        return packaged_data_dir() / f"{name}.jsonl"
    if data_dir is None:
        return None
    nearest = next(folder for folder in (root / name).parents if folder.is_dir())
    entries = sorted(entry.name for entry in nearest.iterdir())
    raise FileNotFoundError(
        f"{root / name}.jsonl[.gz] does not exist; {nearest} holds: {', '.join(entries[:20]) or 'nothing'}. "
        "Put the split there (one JSON object per line, the hub's columns), or use another data_dir ('hub' downloads)."
    )


def _name(path: str, config: str | None, split: str) -> str:
    return f"{path}/{config or 'default'}/{split}"
