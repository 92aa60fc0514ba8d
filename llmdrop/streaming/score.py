"""Score a model of any size layer by layer: one layer's weights in memory, the next one being read.

A score is local to its layer, so layers can take turns: all calibration tokens pass layer i, only the residual stream
[n, T, C] is kept, and layer i is released. Every byte of the layers is read once, none of the head's.
"""

import ctypes
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from .. import scoring
from ..anatomy import Anatomy, find_anatomy
from ..calibration import Calibration, TokenIds, check_vocabulary
from ..checkpoints.load import check_device, check_dtype
from ..files import build_dir, locked
from ..proof import Gone, first_tensor
from ..scoring import ImportanceScores, sample_sums, scores_from_sums
from .processes import Sums, over_processes
from .shards import DTYPES, Checkpoint, Entry, open_checkpoint
from .stream_buffer import PLACES, StreamBuffer

VERSION = 1  # of what a run keeps on disk: raised when it changes, so that a new version does not go on with an old run
CHUNK = 64 * 2**20  # bytes of the word embedding in memory at a time


@torch.inference_mode()
def score_checkpoint(
    checkpoint: str | os.PathLike,
    calibration: Calibration | TokenIds,
    batch_size: int = 8,
    with_residual: bool = True,
    progress: bool = True,
    distributed: bool = False,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "auto",
    stream_on: str = "auto",
    work_dir: str | os.PathLike | None = None,
    attn_implementation: str | None = None,
) -> ImportanceScores:
    """`score` for a checkpoint on disk of which two layers at a time are in memory, one computing, one being read.

    checkpoint: a hub id (optionally @revision; downloaded first), a directory, or a checkpoint of `save_model`.
    calibration, batch_size, with_residual, progress: as in `score`, and so are the scores. distributed: called in every
    process of torchrun or accelerate launch, as `score_distributed`. dtype, device, attn_implementation: as in
    `load_model`, but for dtype="auto" ("bfloat16" for the paper's 70B models). stream_on: where the residual stream of
    all samples waits between layers, see `StreamBuffer`. work_dir: where a run keeps the stream and the finished
    layers' sums, so that a killed one goes on at the layer it was in when called again with the same arguments; removed
    at the end. Default `build_dir()`/streams.

    Raises what `open_checkpoint` raises, ValueError for other arguments that are not allowed, OSError when the disk
    is full or a file cannot be read, RuntimeError if another process is at the same scores.
    """
    if not isinstance(checkpoint, str | os.PathLike):
        raise ValueError(
            f"streaming takes the name of a checkpoint (a hub id or a directory), got a {type(checkpoint).__name__}; "
            "a model in memory is scored by score(model, calibration)"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; it must be at least 1")
    if stream_on not in PLACES:
        raise ValueError(f"{stream_on=}; allowed are {', '.join(PLACES)}")
    dtype = check_dtype(dtype)
    if device == "balanced":
        raise ValueError("device='balanced' spreads a model in memory; streaming takes one device per process")
    device = torch.device(check_device(device))
    source = open_checkpoint(checkpoint, dtype, attn_implementation)
    vocabulary, width = source.model.get_input_embeddings().weight.shape
    if not isinstance(calibration, Calibration):
        calibration = Calibration(calibration)
    check_vocabulary(int(calibration.input_ids.max()), vocabulary)
    key = {
        "files": [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in source.shards],
        "config": source.model.config.to_dict(),
        "batch_size": batch_size,
        "with_residual": with_residual,
        "dtype": dtype,
        "device": device.type,
        "attention": attn_implementation,
        "rank": os.environ.get("RANK"),
        "versions": [VERSION, scoring.VERSION, version("torch"), version("transformers")],
    }

    def part(share: Calibration) -> Sums:
        text = json.dumps(key | {"calibration": share.digest}, default=str)
        name = f"{source.folder.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        with _kept_until_done(Path(work_dir or build_dir() / "streams") / name) as folder:
            stream = StreamBuffer(folder, (*share.input_ids.shape, width), source.model.dtype, device, stream_on)
            return _layer_sums(source, share, stream, batch_size, with_residual, progress), None

    if distributed:
        sums, gaps = over_processes(part, calibration, find_anatomy(source.model).n_layers)
    else:
        sums, gaps = part(calibration)
    return scores_from_sums(sums, gaps, calibration)


@contextmanager
def _kept_until_done(folder: Path) -> Iterator[Path]:
    """A run's own directory: left by a run that is killed, found by the next one, gone when that is through."""
    with locked(folder / "lock", refusal=f"another process is at these scores (it holds {folder}); wait for it"):
        try:
            yield folder
        except Exception:
            if not (folder / StreamBuffer.RECORD).exists():
                shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)


def _layer_sums(
    source: Checkpoint,
    calibration: Calibration,
    stream: StreamBuffer,
    batch_size: int,
    with_residual: bool,
    progress: bool,
) -> torch.Tensor:
    """Sums of every layer as from `sample_sums`, [n_layers, 6, n_samples]. The model is of no use afterwards."""
    model = source.model
    parts = find_anatomy(model)
    present = [i for i, split in enumerate(parts.splits) if split is not None]
    entries = {id(p): source[name] for name, p in model.state_dict(keep_vars=True).items() if name in source.names}
    table = entries.pop(id(model.get_input_embeddings().weight))
    layers = [_entries_of(parts.layers[i], entries) for i in present]
    sizes = [sum(entry.n_bytes for entry in layer.values()) for layer in layers]

    n_done, sums = stream.resume()  # layers of `present`
    if n_done is None:
        n_done = 0
        sums = torch.full((parts.n_layers, 6, calibration.n_samples), torch.nan, dtype=torch.float64)
        _embed(model, table, calibration.input_ids, stream)
        stream.save(0, sums)
    feed = _isolate(model, parts, _entries_of(parts.decoder, entries), stream)
    bar = tqdm(
        desc="score",
        total=table.n_bytes + sum(sizes),
        initial=table.n_bytes + sum(sizes[:n_done]),
        unit="B",
        unit_scale=True,
        disable=not progress,
    )
    with bar, ThreadPoolExecutor(2) as pool:

        def begin_to_read(k: int) -> dict[str, Future]:
            is_cuda = stream.device.type == "cuda"
            return {name: pool.submit(entry.tensor, is_cuda) for name, entry in layers[k].items()}

        coming = begin_to_read(n_done)
        for k, i in enumerate(present[n_done:], start=n_done):
            bar.set_description(f"score: layer {k + 1} of {len(present)}")
            layer = parts.layers[i]
            _fill(layer, coming, stream)
            layer.to(stream.device)  # buffers
            is_last = k + 1 == len(present)
            coming = {} if is_last else begin_to_read(k + 1)
            layer.register_forward_hook(feed.catch)
            if k > 0:  # before the first, the decoder does to embeddings what it does (positions, Gemma-2's scale)
                layer.register_forward_pre_hook(feed.instead, with_kwargs=True)
            place = parts.places[i]
            gone = parts.layer_list[place]
            parts.layer_list[place] = layer  # the only one: as if every other block were dropped
            sums[i] = sample_sums(model, calibration, batch_size, with_residual, progress=False)[0][i]
            parts.layer_list[place] = gone
            layer.to("meta")
            _trim_heap()
            bar.update(sizes[k])
            if not is_last:
                stream.save(k + 1, sums)
    return sums


def _entries_of(module: nn.Module, entries: dict[int, Entry]) -> dict[str, Entry]:
    """Where the module's weights lie, by name within it; entries: by the identity of parameters."""
    state = module.state_dict(keep_vars=True)
    return {name: entries[id(parameter)] for name, parameter in state.items() if id(parameter) in entries}


def _fill(module: nn.Module, weights: dict[str, Future], stream: StreamBuffer) -> None:
    """Give the module these weights, in the model's type, as soon as they are read, and let go of what was read."""
    for name in list(weights):
        tensor = weights.pop(name).result().to(stream.device, stream.dtype)
        module.load_state_dict({name: tensor}, assign=True, strict=False)


def _embed(model: nn.Module, table: Entry, ids: torch.Tensor, stream: StreamBuffer) -> None:
    """Fill the stream with the word embeddings, some rows of the table at a time."""
    embedding = model.get_input_embeddings()
    embedding.padding_idx = None
    n_rows, width = table.shape
    row_bytes = table.n_bytes // n_rows
    at_once = max(1, CHUNK // row_bytes)
    for start in range(0, n_rows, at_once):
        where = ((ids >= start) & (ids < start + at_once)).nonzero(as_tuple=True)
        if not len(where[0]):
            continue
        rows = torch.empty(min(at_once, n_rows - start), width, dtype=DTYPES[table.dtype])
        table.read(rows.view(torch.uint8).flatten(), start * row_bytes)
        embedding.weight = nn.Parameter(rows.to(stream.device, stream.dtype), requires_grad=False)
        stream.put(where, embedding((ids[where] - start).to(stream.device)))  # its own forward: Gemma-3's scales


def _isolate(model: nn.Module, parts: Anatomy, rest: dict[str, Entry], stream: StreamBuffer) -> "_Feed":
    """Make `model` a decoder without layers, word embedding and head, in memory, fed from the stream."""
    decoder = parts.decoder
    feed = _Feed(stream)
    model.set_input_embeddings(feed)
    for i, split in enumerate(parts.splits):
        if split is not None:
            parts.layer_list[parts.places[i]] = Gone(parts.layers[i], 0, 0, split.n_outputs)
    names = set(decoder.state_dict()) & set(rest)
    decoder.load_state_dict({name: rest[name].tensor().to(model.dtype) for name in names}, assign=True, strict=False)
    decoder.to(stream.device)
    model.base_model.register_forward_hook(feed.keep)
    return feed


class _Feed(nn.Module):
    """Stands where the word embedding was: hands the decoder the stream by batches, puts back what comes out."""

    def __init__(self, stream: StreamBuffer):
        super().__init__()
        self.stream = stream
        self.weight = nn.Parameter(torch.zeros((), dtype=stream.dtype, device=stream.device), requires_grad=False)
        self.position = 0  # of the next sample

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        self.rows = slice(self.position, self.position + len(input_ids))
        self.position = self.rows.stop % len(self.stream.x)  # the next layer begins with the first sample again
        self.x = self.stream.get(self.rows)
        return self.x

    def instead(self, layer, args, kwargs):
        """Forward pre-hook of a layer: it reads the stream, whatever the decoder made of it."""
        return ((self.x, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": self.x})

    def catch(self, layer, args, output) -> None:
        """Forward hook of a layer: what comes out is the stream."""
        self.y = first_tensor(output)

    def keep(self, decoder, args, output) -> None:
        """Forward hook of the decoder, so after everybody has seen x, which the stream may overwrite in place."""
        self.stream.put(self.rows, self.y)


def _trim_heap() -> None:
    """Free heap to the system, where the C library can (glibc): activations of many batches leave it full of holes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
