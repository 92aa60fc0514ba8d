"""Drop layers of a checkpoint on disk without loading it: the kept tensors' bytes are copied, file by file."""

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..checkpoints.destination import check_destination
from ..checkpoints.transformers_format import write_hf
from ..files import new_directory
from ..plan import DropPlan
from ..prune import apply_plan
from .shards import INDEX, SINGLE, Checkpoint, Entry, open_checkpoint, renamed

CHUNK = 16 * 2**20  # bytes in memory where the kernel cannot copy from file to file


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
    is not empty, RuntimeError if another process is writing it, OSError when the disk is full. The destination is
    complete or absent, whenever the process ends; what a killed one left is removed by the next.
    """
    destination = Path(destination)
    check_destination(destination, overwrite)
    checkpoint = open_checkpoint(source)
    before = checkpoint.model.state_dict(keep_vars=True)
    apply_plan(checkpoint.model, plan)
    kept = _kept_names(checkpoint, renamed(before, checkpoint.model))
    tokenizer = _tokenizer(checkpoint.folder)
    with new_directory(destination) as folder:
        try:
            _write_config(checkpoint, tokenizer, folder)
            _write_shards(checkpoint, kept, folder, link, progress)
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot write {destination}: {error.strerror or error}. Nothing of it is left; make room for the "
                "weights that are kept, or name a destination on another disk",
            ) from error
        open_checkpoint(folder)  # what was written is read back as far as its names, shapes and sizes go
    return destination


def _kept_names(checkpoint: Checkpoint, moved: dict[str, str]) -> dict[str, str]:
    """{name in the source's files: name in the destination's}, in the source's style (with or without prefix)."""
    prefix = f"{checkpoint.model.base_model_prefix}."
    kept = {}
    for old, new in moved.items():
        raw = checkpoint.names.get(old)
        if raw is None:
            continue
        if old == raw:
            kept[raw] = new
        elif old == prefix + raw:
            kept[raw] = new.removeprefix(prefix)
        else:  # by a former name, and nothing with one is renumbered
            kept[raw] = raw
    return kept


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    is_there = any(any(folder.glob(pattern)) for pattern in ("tokenizer*", "vocab*", "*.model"))
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False) if is_there else None


def _write_config(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """config.json, tokenizer and modeling file exactly as `save_model` writes them."""
    model = checkpoint.model

    def save_config(path) -> None:
        model.config.architectures = [type(model).__name__]
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.save_pretrained(path)

    model.save_pretrained = save_config  # of a model without weights nothing else can be saved
    write_hf(model, tokenizer, folder)
    if (checkpoint.folder / "generation_config.json").exists():
        shutil.copyfile(checkpoint.folder / "generation_config.json", folder / "generation_config.json")


def _write_shards(checkpoint: Checkpoint, kept: dict[str, str], folder: Path, link: bool, progress: bool) -> None:
    """The kept tensors, shard by shard, and their index; shards of which nothing stays are left out."""
    shards = []  # what stays of each file, {new name: entry}, and whether that is all of it under its old names
    for entries in checkpoint.shards.values():
        stays = {kept[raw]: entry for raw, entry in entries.items() if raw in kept}
        if stays:
            shards.append((stays, list(stays) == list(entries)))
    total = sum(entry.n_bytes for stays, _ in shards for entry in stays.values())
    weight_map = {}
    with tqdm(desc="drop", total=total, unit="B", unit_scale=True, disable=not progress) as bar:
        for k, (stays, is_unchanged) in enumerate(shards, start=1):
            name = SINGLE if len(shards) == 1 else f"model-{k:05d}-of-{len(shards):05d}.safetensors"
            source = next(iter(stays.values())).file
            if link and is_unchanged and _linked(source, folder / name):
                bar.update(sum(entry.n_bytes for entry in stays.values()))
            else:
                _write_shard(source, stays, folder / name, bar)
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


def _write_shard(source: Path, stays: dict[str, Entry], path: Path, bar: tqdm) -> None:
    """One safetensors file of tensors in the order in which they lie in their source."""
    header = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, entry in stays.items():
        end = position + entry.n_bytes
        header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(source, "rb") as read, open(path, "wb") as written:
        written.write(len(text).to_bytes(8, "little") + text)
        written.flush()
        for start, stop in _ranges(stays.values()):
            for n_bytes in _copy(read.fileno(), written.fileno(), start, stop):
                bar.update(n_bytes)
        os.fsync(written.fileno())


def _ranges(entries: Iterable[Entry]) -> list[tuple[int, int]]:
    """Byte ranges of tensors, neighbors joined."""
    ranges: list[tuple[int, int]] = []
    for entry in entries:
        if ranges and ranges[-1][1] == entry.start:
            ranges[-1] = ranges[-1][0], entry.stop
        else:
            ranges.append((entry.start, entry.stop))
    return ranges


def _copy(source: int, target: int, start: int, stop: int) -> Iterator[int]:
    """Append bytes [start, stop) of one open file to another, by the kernel where it can; yields what was copied."""
    in_kernel = hasattr(os, "copy_file_range")
    while start < stop:
        if in_kernel:
            try:
                n_bytes = os.copy_file_range(source, target, min(stop - start, 4 * CHUNK), start)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF):
                    raise
                in_kernel = False
                continue
        else:
            view = memoryview(os.pread(source, min(stop - start, CHUNK), start))
            n_bytes = len(view)
            while view:
                view = view[os.write(target, view) :]
        if n_bytes == 0:
            raise OSError(errno.EIO, "the source became shorter while it was being copied")
        start += n_bytes
        yield n_bytes
