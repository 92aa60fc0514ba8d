"""Where a checkpoint may be written: never over anything that llmdrop did not write itself."""

import re
from collections.abc import Callable
from pathlib import Path

# all that `save_model` and `drop_checkpoint` write into a directory
OUR_FILES = re.compile(
    r"(generation_)?config\.json|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|modeling_llmdrop\.py|configuration_nemotron_nas\.py"
    r"|tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|(tokenizer|spiece|sentencepiece\.bpe)\.model|chat_template\.jinja|additional_chat_templates/[^/]+\.jinja"
)


def check_destination(path: Path, overwrite: bool) -> None:
    """FileExistsError unless a checkpoint may become the directory `path`.

    It may where nothing is, or, with `overwrite`, a checkpoint of which every file is one that `save_model` writes.
    """
    _check_parents(path)
    if path.is_file():
        raise FileExistsError(f"{path} is a file, and a checkpoint is a directory; choose another path")
    files = sorted(str(file.relative_to(path)) for file in path.rglob("*") if not file.is_dir() or file.is_symlink())
    if files and not overwrite:
        raise FileExistsError(f"{path} is not empty; choose another path, or overwrite=True to replace a checkpoint")
    obstacles = [f"{name}, which save_model does not write" for name in files if not OUR_FILES.fullmatch(name)]
    if files and "config.json" not in files:
        obstacles.append("no config.json, so no checkpoint")
    if obstacles:
        raise FileExistsError(f"{path} holds {obstacles[0]}; overwrite=True replaces checkpoints, choose another path")


def check_file(path: Path, overwrite: bool, is_ours: Callable[[Path], bool]) -> None:
    """FileExistsError unless a checkpoint may become the file `path`: nothing is there, or one of ours to overwrite."""
    _check_parents(path)
    if path.is_dir():
        raise FileExistsError(f"{path} is a directory, and a GGUF is a file; choose another path")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another path, or overwrite=True to replace a file of llmdrop's")
    if path.exists() and not is_ours(path):
        raise FileExistsError(f"{path} was not written by llmdrop, so overwrite=True spares it; choose another path")


def _check_parents(path: Path) -> None:
    for parent in path.absolute().parents:
        if parent.exists() and not parent.is_dir():
            raise FileExistsError(f"{path} cannot be written, since {parent} is a file; choose another path")
