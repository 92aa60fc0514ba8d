"""Drop layers of a checkpoint on disk without loading it: the kept tensors' bytes are copied, file by file."""

import json
import os
import shutil
from contextlib import ExitStack
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from ..checkpoints.blocks import is_ordinary, renumber
from ..checkpoints.card import write_card
from ..checkpoints.destination import check_destination
from ..checkpoints.transformers_format import described, write_hf
from ..files import new_directory, real_path
from ..plan import DropPlan
from ..prune import apply_plan
from .shards import INDEX, SINGLE, Checkpoint, Entry, open_checkpoint, renamed

CHUNK = 16 * 2**20  # bytes in memory at a time


def drop_checkpoint(
    source: str | os.PathLike,
    plan: DropPlan,
    destination: str | os.PathLike,
    link: bool = True,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Write what `save_model(apply_plan(load_model(source), plan), ...)` would, without loading a single weight.

    source: as in `score_checkpoint`, in whatever float type; plan: indices of the undropped model. The result has the
    source's types and shards: kept tensors are copied byte by byte under their new numbers. link=True: a shard of
    which everything is kept under its old names becomes a hard link (no bytes, no time) where the file system can; it
    is then one file with the source's, so change neither in place. overwrite: replace a checkpoint that is there.

    Raises what `open_checkpoint` raises, ValueError for plans that do not fit, FileExistsError for a destination that
    is not empty or is the source, RuntimeError if another process is writing it, OSError when the disk is full. The
    destination is complete or absent, whenever the process ends; what a killed one left is removed by the next.
    """
    destination = real_path(destination)
    check_destination(destination, overwrite)
    checkpoint = open_checkpoint(source)
    if checkpoint.folder.resolve() == destination:
        raise FileExistsError(f"{destination} is the checkpoint to drop from; choose another path for what is left")
    before = checkpoint.model.state_dict(keep_vars=True)
    apply_plan(checkpoint.model, plan)
    prefix = f"{checkpoint.model.base_model_prefix}."
    with ExitStack() as undo:
        if is_ordinary(checkpoint.model):
            renumber(undo, checkpoint.model)
        new_names = renamed(before, checkpoint.model)
    kept = {}  # {name in the source's files: name in the destination's}, both with or without prefix
    for old, new in new_names.items():
        raw = checkpoint.names.get(old)
        if raw is not None:
            kept[raw] = raw.replace(old.removeprefix(prefix), new.removeprefix(prefix))
    with new_directory(destination) as folder:
        try:
            _write_beside_weights(checkpoint, folder)
            write_card(folder, destination.name, checkpoint.model.name_or_path)
            _write_shards(checkpoint, kept, folder, link, progress)
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot write {destination}: {error.strerror or error}. Nothing of it is left; make room for the "
                "weights that are kept, or name a destination on another disk",
            ) from error
        open_checkpoint(folder)  # what was written is read back as far as its names, shapes and sizes go
    return destination


def _write_beside_weights(checkpoint: Checkpoint, folder: Path) -> None:
    """config.json, tokenizer and modeling file exactly as `save_model` writes them."""
    model = checkpoint.model
    source = checkpoint.folder
    tokenizer = None
    if any(any(source.glob(pattern)) for pattern in ("tokenizer*", "vocab*", "*.model")):
        # with a config in hand it reads none: that of a dropped checkpoint asks for remote code
        tokenizer = AutoTokenizer.from_pretrained(source, config=model.config, trust_remote_code=False)

    def save_config(path) -> None:
        model.config.architectures = [type(model).__name__]
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        with described(model):
            model.config.save_pretrained(path)

    model.save_pretrained = save_config  # of a model without weights nothing else can be saved
    write_hf(model, tokenizer, folder)
    if (source / "generation_config.json").exists():
        shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")


def _write_shards(checkpoint: Checkpoint, kept: dict[str, str], folder: Path, link: bool, progress: bool) -> None:
    """The kept tensors, shard by shard, and their index; shards of which nothing stays are left out."""
    shards = {}  # of each file what stays, by new names
    for file, entries in checkpoint.shards.items():
        stays = {kept[raw]: entry for raw, entry in entries.items() if raw in kept}
        if stays:
            shards[file] = stays
    total = sum(entry.n_bytes for stays in shards.values() for entry in stays.values())
    weight_map = {}
    with tqdm(desc="drop", total=total, unit="B", unit_scale=True, disable=not progress) as bar:
        for k, (source, stays) in enumerate(shards.items(), start=1):
            name = SINGLE if len(shards) == 1 else f"model-{k:05d}-of-{len(shards):05d}.safetensors"
            is_unchanged = list(stays) == list(checkpoint.shards[source])
            if link and is_unchanged and _linked(source.resolve(), folder / name):
                bar.update(sum(entry.n_bytes for entry in stays.values()))
            else:
                _write_shard(stays, folder / name, bar)
            weight_map |= dict.fromkeys(stays, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _linked(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        return False
    return True


def _write_shard(stays: dict[str, Entry], path: Path, bar: tqdm) -> None:
    """One safetensors file of tensors in the order in which they lie in their source."""
    header = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, entry in stays.items():
        end = position + entry.n_bytes
        header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    buffer = torch.empty(CHUNK, dtype=torch.uint8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in stays.values():
            for offset in range(0, entry.n_bytes, CHUNK):
                part = buffer[: entry.n_bytes - offset]
                entry.read(part, offset)
                file.write(part.numpy())
                bar.update(len(part))
        file.flush()
        os.fsync(file.fileno())
