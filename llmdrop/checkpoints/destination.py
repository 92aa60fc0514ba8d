"""Where a checkpoint may be written: never over anything that llmdrop did not write itself."""

import json
import os
import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

MARK = "llmdrop_written"  # in config.json: the version of llmdrop that wrote the checkpoint; loading leaves it out
CARD_MARK = "<!-- llmdrop wrote this card and replaces it with the checkpoint. Delete this line to keep your text. -->"

# all that `save_model` and `drop_checkpoint` write into a directory
OUR_FILES = re.compile(
    r"README\.md|(generation_)?config\.json|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|modeling_llmdrop\.py|configuration_nemotron_nas\.py"
    r"|tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|((video_)?pre)?processor_config\.json"
    r"|(tokenizer|spiece|sentencepiece\.bpe)\.model|chat_template\.jinja|additional_chat_templates/[^/]+\.jinja"
)


def mark() -> dict[str, str]:
    """The entry of config.json that every writer of a directory leaves."""
    try:
        return {MARK: version("llmdrop")}
    except PackageNotFoundError:  # run from a checkout that is not installed
        return {MARK: "not installed"}


def check_destination(path: Path, overwrite: bool) -> None:
    """FileExistsError unless a checkpoint may become the directory `path`; PermissionError where nobody lets us write.

    It may where nothing is, or, with `overwrite`, a checkpoint that llmdrop wrote and to which no other file was added.
    """
    _check_parents(path)
    if path.is_file():
        raise FileExistsError(f"{path} is a file, and a checkpoint is a directory; choose another path")
    files = sorted(str(file.relative_to(path)) for file in path.rglob("*") if not file.is_dir() or file.is_symlink())
    if files and not overwrite:
        raise FileExistsError(f"{path} is not empty; choose another path, or overwrite=True to replace a checkpoint")
    obstacles = [f"{name}, which save_model does not write" for name in files if not OUR_FILES.fullmatch(name)]
    if "README.md" in files and not is_our_card(path / "README.md"):
        obstacles.append("a README.md that is not (or no longer) that of llmdrop")
    if files and "config.json" not in files:
        obstacles.append("no config.json, so no checkpoint")
    elif files and not _is_ours(path / "config.json"):
        obstacles.append("a config.json that llmdrop did not write")
    if obstacles:
        raise FileExistsError(
            f"{path} holds {obstacles[0]}; overwrite=True replaces checkpoints of llmdrop's alone, choose another path"
        )


def check_file(path: Path, overwrite: bool, is_ours: Callable[[Path], bool]) -> None:
    """As `check_destination`, of the file `path`: nothing is there, or one of ours to overwrite."""
    _check_parents(path)
    if path.is_dir():
        raise FileExistsError(f"{path} is a directory, and a GGUF is a file; choose another path")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another path, or overwrite=True to replace a file of llmdrop's")
    if path.exists() and not is_ours(path):
        raise FileExistsError(f"{path} was not written by llmdrop, so overwrite=True spares it; choose another path")


def is_our_card(card: Path) -> bool:
    """Whether llmdrop wrote this README.md, and the line that says so is still there."""
    try:
        return CARD_MARK in card.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


def _is_ours(config: Path) -> bool:
    """Whether llmdrop wrote this config.json: it has the mark, or release 0.1.0's record of single sublayers."""
    try:
        raw = json.loads(config.read_text())
    except (OSError, ValueError):
        return False
    if not isinstance(raw, dict):
        return False
    record = raw.get("llmdrop")
    return MARK in raw or (isinstance(record, dict) and "undropped" in record)


def _check_parents(path: Path) -> None:
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise FileExistsError(f"{path} cannot be written, since {parent} is a file; choose another path")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written: {parent} is closed to you; choose another path")
