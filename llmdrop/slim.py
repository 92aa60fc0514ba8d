"""Drop layers of a checkpoint on disk without loading it: the kept tensors' bytes are copied, file by file."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm
from transformers import AutoTokenizer

from .export import write_hf
from .models import check_destination, held_alone
from .plan import DropPlan
from .prune import apply_plan
from .shards import INDEX, Checkpoint, Entry, open_checkpoint, renamed

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
    with _partial(destination) as folder:
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
    kept, prefix = {}, f"{checkpoint.model.base_model_prefix}."
    for old, new in moved.items():
        raw = checkpoint.names.get(old)
        if raw is not None:
            bare = old == prefix + raw
            kept[raw] = new.removeprefix(prefix) if bare else new if raw == old else raw
    return kept


def _tokenizer(folder: Path):
    there = any(any(folder.glob(pattern)) for pattern in ("tokenizer*", "vocab*", "*.model"))
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False) if there else None


def _write_config(checkpoint: Checkpoint, tokenizer, folder: Path) -> None:
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
    shards = {}  # of each source file, what stays of it: [(new name, entry)], and whether that is all of it, unmoved
    for file, entries in checkpoint.shards.items():
        stays = [(kept[raw], entry) for raw, entry in entries.items() if raw in kept]
        if stays:
            shards[file] = stays, all(kept.get(raw) == raw for raw in entries)
    total = sum(entry.n_bytes for stays, _ in shards.values() for _, entry in stays)
    weight_map = {}
    with tqdm(desc="drop", total=total, unit="B", unit_scale=True, disable=not progress) as bar:
        for k, (stays, unmoved) in enumerate(shards.values(), start=1):
            name = "model.safetensors" if len(shards) == 1 else f"model-{k:05d}-of-{len(shards):05d}.safetensors"
            if not (link and unmoved and _linked(stays[0][1].file, folder / name)):
                _write_shard(stays, folder / name, bar)
            else:
                bar.update(sum(entry.n_bytes for _, entry in stays))
            weight_map |= {new: name for new, _ in stays}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _linked(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        return False
    return True


def _write_shard(stays: list[tuple[str, Entry]], path: Path, bar) -> None:
    """One safetensors file of tensors in the order in which they lie in their source."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, entry in stays:
        header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [at, at + entry.n_bytes]}
        at += entry.n_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(stays[0][1].file, "rb") as source, open(path, "wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        target.flush()
        for start, stop in _runs([entry for _, entry in stays]):
            for n in _copy(source.fileno(), target.fileno(), start, stop):
                bar.update(n)
        os.fsync(target.fileno())


def _runs(entries: list[Entry]) -> Iterator[tuple[int, int]]:
    """Byte ranges of tensors, neighbours joined."""
    start, stop = entries[0].start, entries[0].start
    for entry in entries:
        if entry.start != stop:
            yield start, stop
            start = entry.start
        stop = entry.stop
    yield start, stop


def _copy(source: int, target: int, start: int, stop: int) -> Iterator[int]:
    """Append bytes [start, stop) of one open file to another, by the kernel where it can; yields what was copied."""
    in_kernel = hasattr(os, "copy_file_range")
    while start < stop:
        if in_kernel:
            try:
                n = os.copy_file_range(source, target, min(stop - start, 4 * CHUNK), start)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF):
                    raise
                in_kernel = False
                continue
        else:
            view = memoryview(os.pread(source, min(stop - start, CHUNK), start))
            n = len(view)
            while view:
                view = view[os.write(target, view) :]
        if n == 0:
            raise OSError(errno.EIO, "the source became shorter while it was being copied")
        start += n
        yield n


@contextmanager
def _partial(destination: Path) -> Iterator[Path]:
    """A hidden directory beside `destination` that becomes it on success; one process at a time."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    folder = destination.with_name(f".{destination.name}.partial")
    folder.mkdir(exist_ok=True)
    lock = held_alone(folder / ".lock", f"another process is writing {destination}; wait for it")
    former = destination.with_name(f".{destination.name}.former")
    try:
        for path in folder.iterdir():  # left by a killed process
            if path.name != ".lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.rmtree(former, ignore_errors=True)
        yield folder
        (folder / ".lock").unlink()
        if destination.exists():
            destination.rename(former)
        folder.rename(destination)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(former, ignore_errors=True)
        lock.release()
