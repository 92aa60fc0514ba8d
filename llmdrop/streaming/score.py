"""Score a model of any size layer by layer: one layer's weights in memory, the next one being read (paper's 70B rows).

A score is local to its layer, so layers can take turns: all calibration tokens pass layer i, only the residual stream
[n, T, C] is kept, and layer i is released. Every byte of the weights is read once, none of the head's.
"""

import ctypes
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from .. import scoring
from ..anatomy import Anatomy, find_anatomy
from ..calibration import Calibration
from ..checkpoints.load import check_device, check_dtype
from ..files import build_dir, locked
from ..scoring import ImportanceScores, sample_sums, scores_from_sums
from .processes import Sums, over_processes, own_device
from .shards import DTYPES, Checkpoint, Entry, open_checkpoint
from .stream_buffer import PLACES, StreamBuffer

VERSION = 1  # of what a run keeps on disk: raised when it changes, so that a new version does not go on with an old run
CHUNK = 64 * 2**20  # bytes of the word embedding in memory at a time


@torch.inference_mode()
def score_checkpoint(
    checkpoint: str | os.PathLike,
    calibration: Calibration,
    batch_size: int = 8,
    with_residual: bool = True,
    progress: bool = True,
    distributed: bool = False,
    dtype: str = "float32",
    device: str = "auto",
    stream_on: str = "auto",
    work_dir: str | os.PathLike | None = None,
    attn_implementation: str | None = None,
) -> ImportanceScores:
    """`score` for a checkpoint on disk of which two layers at a time are in memory, one computing, one being read.

    checkpoint: a hub id (optionally @revision; downloaded first), a directory, or a checkpoint of `save_model`.
    calibration, batch_size, with_residual, progress: as in `score`, and so are the scores. distributed: called in every
    process of torchrun or accelerate launch, as `score_distributed`. dtype, device, attn_implementation: as in
    `load_model` ("bfloat16" for the paper's 70B models). stream_on: where the residual stream of all samples waits
    between layers, see `StreamBuffer`. work_dir: where a run keeps the stream and the finished layers' sums, so that a
    killed one goes on at the layer it was in when called again with the same arguments; removed at the end. Default
    `build_dir()`/streams.

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
    check_dtype(dtype)
    if device == "balanced":
        raise ValueError("device='balanced' spreads a model in memory; streaming takes one device per process")
    if distributed and device == "auto":
        device = own_device()
    device = check_device(device)
    source = open_checkpoint(checkpoint, dtype, attn_implementation)
    run = _Run(source, batch_size, with_residual, progress, torch.device(device), stream_on)

    def part(share: Calibration) -> Sums:
        with _workplace(run, share, attn_implementation, work_dir) as folder:
            return run.sums(share, folder), None

    if distributed:
        sums, gaps = over_processes(part, calibration, find_anatomy(source.model).n_layers)
    else:
        sums, gaps = part(calibration)
    return scores_from_sums(sums, gaps, calibration)


@dataclass
class _Run:
    """How a checkpoint is scored."""

    source: Checkpoint
    batch_size: int
    with_residual: bool
    progress: bool
    device: torch.device
    stream_on: str

    def sums(self, calibration: Calibration, folder: Path) -> torch.Tensor:
        """Sums of every layer as from `sample_sums`, [n_layers, 6, n_samples]. The model is of no use afterwards."""
        source, model = self.source, self.source.model
        parts = find_anatomy(model)
        n_samples, length = calibration.input_ids.shape
        vocabulary, width = model.get_input_embeddings().weight.shape
        if calibration.input_ids.max() >= vocabulary:
            largest = calibration.input_ids.max().item()
            raise ValueError(f"token id {largest} is beyond the model's vocabulary of {vocabulary}")
        present = [i for i, layer in enumerate(parts.layers) if layer is not None]
        types = getattr(model.config, "layer_types", None)
        entries = {id(p): source[name] for name, p in model.state_dict(keep_vars=True).items() if name in source.names}
        table = entries.pop(id(model.get_input_embeddings().weight))
        layers = [_entries_of(parts.layers[i], entries) for i in present]
        sizes = [sum(entry.n_bytes for entry in layer.values()) for layer in layers]

        stream = StreamBuffer(folder, (n_samples, length, width), model.dtype, self.device, self.stream_on)
        n_done, sums = stream.resume()  # layers of `present`
        if n_done is None:
            n_done = 0
            sums = torch.full((parts.n_layers, 6, n_samples), torch.nan, dtype=torch.float64)
            _embed(model, table, calibration.input_ids, stream)
            stream.save(0, sums)
        feed = _isolate(model, parts, _entries_of(parts.decoder, entries), stream)
        bar = tqdm(
            desc="score",
            total=table.n_bytes + sum(sizes),
            initial=table.n_bytes + sum(sizes[:n_done]),
            unit="B",
            unit_scale=True,
            disable=not self.progress,
        )
        with bar, _Reader(layers, self.device, model.dtype) as reader:
            reader.start(n_done)
            for k in range(n_done, len(present)):
                i = present[k]
                bar.set_description(f"score: layer {k + 1} of {len(present)}")
                layer = parts.layers[i]
                layer.load_state_dict(reader.take(k), assign=True)
                layer.to(self.device)
                _leave_only(model, parts, i, [types[k]] if types else None)
                with feed.layer(layer, is_first=k == 0, is_last=k == len(present) - 1):
                    sums[i] = sample_sums(model, calibration, self.batch_size, self.with_residual, progress=False)[0][i]
                layer.to("meta")
                _trim_heap()
                bar.update(sizes[k])
                if k + 1 < len(present):
                    stream.save(k + 1, sums)
        return sums


def _entries_of(module: nn.Module, entries: dict[int, Entry]) -> dict[str, Entry]:
    """Where the module's weights lie, by name within it; entries: by the identity of parameters."""
    state = module.state_dict(keep_vars=True)
    return {name: entries[id(parameter)] for name, parameter in state.items() if id(parameter) in entries}


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
    """Make `model` a decoder without layers, word embedding, final norm and head, in memory, fed from the stream."""
    decoder = parts.decoder
    feed = _Feed(stream)
    model.set_input_embeddings(feed)
    setattr(decoder, parts.layers_name, nn.ModuleList())
    if getattr(decoder, parts.layout.final, None) is not None:
        setattr(decoder, parts.layout.final, nn.Identity())
    state = {}
    for name in set(decoder.state_dict()) & set(rest):
        entry = rest[name]
        flat = torch.empty(entry.n_bytes, dtype=torch.uint8)
        entry.read(flat)
        state[name] = flat.view(DTYPES[entry.dtype]).view(entry.shape).to(model.dtype)
    decoder.load_state_dict(state, assign=True, strict=False)
    decoder.to(stream.device)
    model.base_model.register_forward_hook(feed.keep)
    return feed


def _leave_only(model: nn.Module, parts: Anatomy, i: int, types: list[str] | None) -> None:
    """As if every block but i were dropped: what `apply_plan` leaves, so that `sample_sums` finds it as number i."""
    setattr(parts.decoder, parts.layers_name, nn.ModuleList([parts.layers[i]]))
    others = {j for j in range(parts.n_layers) if j != i}
    gone = {kind: sorted(others | set(getattr(parts.plan, kind))) for kind in ("attn", "mlp")}
    model.config.llmdrop = {"n_layers": parts.n_layers} | gone
    model.config.num_hidden_layers = 1
    if types:
        model.config.layer_types = types


class _Feed(nn.Module):
    """Stands where the word embedding was: hands the decoder the stream by batches, puts back what comes out."""

    def __init__(self, stream: StreamBuffer):
        super().__init__()
        self.stream = stream
        self.weight = nn.Parameter(torch.zeros((), dtype=stream.dtype, device=stream.device), requires_grad=False)

    @contextmanager
    def layer(self, layer: nn.Module, is_first: bool, is_last: bool) -> Iterator[None]:
        """One pass over all samples through this layer.

        is_first: let the decoder do what it does to embeddings (positions, Gemma-2's scale). is_last: keep no output.
        """
        self.position = 0
        self.is_last = is_last
        if is_first:
            yield
            return
        handle = layer.register_forward_pre_hook(self._instead, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        self.rows = slice(self.position, self.position + len(input_ids))
        self.position = self.rows.stop
        self.x = self.stream.get(self.rows)
        return self.x

    def _instead(self, layer, args, kwargs):
        return ((self.x, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": self.x})

    def keep(self, decoder, args, output) -> None:
        """Forward hook of the decoder, so after everybody has seen x, which the stream may overwrite in place."""
        if not self.is_last:
            self.stream.put(self.rows, output[0])


class _Reader:
    """Reads layers in order, one ahead, into one buffer, or two that take turns where weights are used as they lie."""

    def __init__(self, layers: list[dict[str, Entry]], device: torch.device, dtype: torch.dtype):
        self.layers = layers
        self.device = device
        self.dtype = dtype
        self.pool = ThreadPoolExecutor(2)
        is_cuda = device.type == "cuda"
        is_copied = is_cuda or dtype not in {DTYPES[entry.dtype] for layer in layers for entry in layer.values()}
        room = max(sum(_aligned(entry.n_bytes) for entry in layer.values()) for layer in layers)
        n_buffers = 1 if is_copied else 2
        self.buffers = [torch.empty(room, dtype=torch.uint8, pin_memory=is_cuda) for _ in range(n_buffers)]
        self.tensors: dict[str, torch.Tensor] = {}  # of the layer being read
        self.pending: list[Future] = []

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, *exc) -> None:
        self.pool.shutdown(cancel_futures=True)

    def start(self, k: int) -> None:
        """Begin to read layer k, if there is one, into its buffer; what that held is not in use any more."""
        self.tensors = {}
        self.pending = []
        if k == len(self.layers):
            return
        buffer = self.buffers[k % len(self.buffers)]
        position = 0
        for name, entry in self.layers[k].items():
            flat = buffer[position : position + entry.n_bytes]
            self.pending.append(self.pool.submit(entry.read, flat))
            self.tensors[name] = flat.view(DTYPES[entry.dtype]).view(entry.shape)
            position += _aligned(entry.n_bytes)

    def take(self, k: int) -> dict[str, torch.Tensor]:
        """The weights of layer k, valid until `take(k + 1)`; layer k + 1 begins to be read."""
        for future in self.pending:
            future.result()
        tensors = {name: tensor.to(self.device, self.dtype) for name, tensor in self.tensors.items()}
        self.start(k + 1)
        return tensors


def _aligned(n_bytes: int) -> int:
    """Rounded up, so that the next tensor starts where every dtype can."""
    return -(-n_bytes // 64) * 64


def _trim_heap() -> None:
    """Free heap to the system, where the C library can (glibc): activations of many batches leave it full of holes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def _workplace(
    run: _Run, calibration: Calibration, attn_implementation: str | None, work_dir: str | os.PathLike | None
) -> Iterator[Path]:
    """This run's own directory, found again by a run with the same arguments, gone when the scores are there."""
    key = {
        "files": [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in run.source.shards],
        "config": run.source.model.config.to_dict(),
        "calibration": calibration.digest,
        "batch_size": run.batch_size,
        "with_residual": run.with_residual,
        "dtype": str(run.source.model.dtype),
        "device": run.device.type,
        "attention": attn_implementation,
        "rank": os.environ.get("RANK"),
        "versions": [VERSION, scoring.VERSION, version("torch"), version("transformers")],
    }
    digest = hashlib.sha256(json.dumps(key, default=str).encode()).hexdigest()[:16]
    root = Path(work_dir) if work_dir else build_dir() / "streams"
    folder = root / f"{run.source.folder.name}-{digest}"
    with locked(folder / "lock", refusal=f"another process is at these scores (it holds {folder}); wait for it"):
        try:
            yield folder
        except Exception:
            if not (folder / StreamBuffer.RECORD).exists():
                shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)
