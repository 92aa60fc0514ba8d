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
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from .anatomy import Anatomy, anatomy
from .fingerprint import _code_digest, version
from .models import build_dir, check_device, check_dtype, held_alone
from .residual import Residual
from .scoring import ImportanceScores, sample_sums, summarise
from .shards import DTYPES, Checkpoint, Entry, open_checkpoint

CHUNK = 64 * 2**20  # bytes of the word embedding in memory at a time


@torch.inference_mode()
def score_checkpoint(
    checkpoint: str | os.PathLike,
    calibration,
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
    calibration, batch_size, with_residual, progress, distributed: as in `score`, and so are the scores. dtype, device,
    attn_implementation: as in `load_model` ("bfloat16" for the paper's 70B models). stream_on: where the residual
    stream of all samples waits between layers: "device", "host" (pinned memory where there is CUDA), "file" (two
    memory-mapped files), or "auto", the first of these of whose free memory it takes at most a quarter.
    work_dir: where a run keeps the stream and the finished layers' sums, so that a killed one goes on at the layer it
    was in when called again with the same arguments; removed at the end. Default `build_dir()`/streams.

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
    if stream_on not in ("auto", "device", "host", "file"):
        raise ValueError(f"stream_on={stream_on!r}; allowed are 'auto', 'device', 'host' and 'file'")
    check_dtype(dtype)
    if device == "balanced":
        raise ValueError("device='balanced' spreads a model in memory; streaming takes one device per process")
    if distributed and device == "auto":
        from accelerate import PartialState

        device = str(PartialState().device) if torch.cuda.is_available() else "cpu"
    device = torch.device(check_device(device))
    source = open_checkpoint(checkpoint, dtype, attn_implementation)
    n_layers = anatomy(source.model).n_layers

    def part(share) -> tuple[torch.Tensor, None]:
        settings = [batch_size, with_residual, dtype, device.type, attn_implementation, os.environ.get("RANK")]
        with _workplace(source, share, settings, work_dir) as folder:
            return _score(source, share, batch_size, with_residual, progress, device, stream_on, folder), None

    if not distributed:
        return summarise(*part(calibration), calibration)
    from .parallel import over_processes

    return summarise(*over_processes(part, calibration, n_layers), calibration)


def _score(source: Checkpoint, calibration, batch_size, with_residual, progress, device, stream_on, folder):
    """Sums of every layer, [n_layers, 6, n_samples]."""
    model, parts = source.model, anatomy(source.model)
    ids, (n, length) = calibration.input_ids, calibration.input_ids.shape
    embedding = model.get_input_embeddings()
    vocabulary = embedding.weight.shape[0]
    if ids.max() >= vocabulary:
        raise ValueError(f"token id {ids.max().item()} is beyond the model's vocabulary of {vocabulary}")
    layers, rest, embedding_name = _weights_of(source, parts)
    present = [i for i, layer in enumerate(parts.layers) if layer is not None]
    types = getattr(model.config, "layer_types", None) and list(model.config.layer_types)
    table, dtype = source[embedding_name], model.dtype
    sizes = [sum(entry.n_bytes for entry in layers[i].values()) for i in present]

    stream = Residual(folder, (n, length, embedding.embedding_dim), dtype, device, stream_on)
    done, sums = stream.resume()  # layers of `present`
    if done is None:
        done, sums = 0, torch.full((parts.n_layers, 6, n), torch.nan, dtype=torch.float64)
        _embed(embedding, table, ids, stream, device, dtype)
        stream.save(0, sums)
    feed = _isolate(source, parts, rest, stream, device)
    reader = _Reader([layers[i] for i in present], device, dtype)
    total, behind = table.n_bytes + sum(sizes), table.n_bytes + sum(sizes[:done])
    bar = tqdm(desc="score", total=total, initial=behind, unit="B", unit_scale=True, disable=not progress)
    with reader, bar:
        reader.start(done)
        for k in range(done, len(present)):
            i = present[k]
            bar.set_description(f"score: layer {k + 1} of {len(present)}")
            layer = parts.layers[i]
            layer.load_state_dict(reader.take(k), assign=True)
            layer.to(device)
            _leave_only(model, parts, i, types and [types[k]])
            feed.begin(layer, first=k == 0, last=k == len(present) - 1)
            sums[i] = sample_sums(model, calibration, batch_size, with_residual, progress=False)[0][i]
            feed.end()
            layer.to("meta")
            _give_back()
            bar.update(sizes[k])
            if k + 1 < len(present):
                stream.save(k + 1, sums)
    return sums


def _weights_of(source: Checkpoint, parts: Anatomy) -> tuple[list[dict[str, Entry]], dict[str, Entry], str]:
    """Entries by layer and name within it; those of the decoder's other modules; the word embedding's name."""
    model = source.model
    owner = {}
    for i, layer in enumerate(parts.layers):
        for name, parameter in layer.state_dict(keep_vars=True).items() if layer is not None else ():
            owner[id(parameter)] = i, name
    inside = {id(p): name for name, p in parts.decoder.state_dict(keep_vars=True).items()}
    word = id(model.get_input_embeddings().weight)
    layers, rest, embedding = [{} for _ in parts.layers], {}, None
    for name, parameter in model.state_dict(keep_vars=True).items():
        if name not in source.names:
            continue
        if id(parameter) == word:
            embedding = name
        elif id(parameter) in owner:
            i, local = owner[id(parameter)]
            layers[i][local] = source[name]
        elif id(parameter) in inside:
            rest[inside[id(parameter)]] = source[name]
    return layers, rest, embedding


def _embed(embedding: nn.Module, table: Entry, ids: torch.Tensor, stream: Residual, device, dtype) -> None:
    """Fill the stream with the word embeddings, some rows of the table at a time."""
    rows = max(1, CHUNK // (table.n_bytes // table.shape[0]))
    embedding.padding_idx = None
    for start in range(0, table.shape[0], rows):
        where = ((ids >= start) & (ids < start + rows)).nonzero(as_tuple=True)
        if not len(where[0]):
            continue
        chunk = torch.empty(min(rows, table.shape[0] - start), table.shape[1], dtype=DTYPES[table.dtype])
        table.read(chunk.view(torch.uint8).flatten(), start * table.n_bytes // table.shape[0])
        embedding.weight = nn.Parameter(chunk.to(device, dtype), requires_grad=False)
        stream.put(where, embedding((ids[where] - start).to(device)))  # its own forward: Gemma-3's scales


def _isolate(source: Checkpoint, parts: Anatomy, rest: dict[str, Entry], stream: Residual, device) -> "_Feed":
    """Make `model` a decoder without layers, word embedding, final norm and head, in memory, fed from the stream."""
    model, decoder = source.model, parts.decoder
    feed = _Feed(stream, device)
    model.set_input_embeddings(feed)
    setattr(decoder, parts.layers_name, nn.ModuleList())
    if getattr(decoder, parts.layout.final, None) is not None:
        setattr(decoder, parts.layout.final, nn.Identity())
    left = set(decoder.state_dict())
    small = {}
    for name, entry in rest.items():
        if name in left:
            flat = torch.empty(entry.n_bytes, dtype=torch.uint8)
            entry.read(flat)
            small[name] = flat.view(DTYPES[entry.dtype]).view(entry.shape).to(model.dtype)
    decoder.load_state_dict(small, assign=True, strict=False)
    decoder.to(device)
    model.base_model.register_forward_hook(feed.keep)
    return feed


def _leave_only(model: nn.Module, parts: Anatomy, i: int, types: list[str] | None) -> None:
    """As if every block but i were dropped: what `apply_plan` leaves, so that `score` finds layer i as number i."""
    setattr(parts.decoder, parts.layers_name, nn.ModuleList([parts.layers[i]]))
    others = {j for j in range(parts.n_layers) if j != i}
    gone = {kind: sorted(others | set(getattr(parts.plan, kind))) for kind in ("attn", "mlp")}
    model.config.llmdrop = {"n_layers": parts.n_layers} | gone
    model.config.num_hidden_layers = 1
    if types:
        model.config.layer_types = types


class _Feed(nn.Module):
    """Stands where the word embedding was: hands the decoder the stream by batches, puts back what comes out."""

    def __init__(self, stream: Residual, device: torch.device):
        super().__init__()
        self.stream = stream
        self.weight = nn.Parameter(torch.zeros((), dtype=stream.dtype, device=device), False)

    def begin(self, layer: nn.Module, first: bool, last: bool) -> None:
        """first: let the decoder do what it does to embeddings (positions, Gemma-2's scale). last: keep no output."""
        self.at, self.last = 0, last
        self.handle = None if first else layer.register_forward_pre_hook(self._instead, with_kwargs=True)

    def end(self) -> None:
        if self.handle is not None:
            self.handle.remove()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        self.rows = slice(self.at, self.at + len(input_ids))
        self.at = self.rows.stop
        self.x = self.stream.get(self.rows)
        return self.x

    def _instead(self, layer, args, kwargs):
        return ((self.x, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": self.x})

    def keep(self, decoder, args, output) -> None:
        """Forward hook of the decoder, so after everybody has seen x, which the stream may overwrite in place."""
        if not self.last:
            self.stream.put(self.rows, output[0])


class _Reader:
    """Reads layers in order, one ahead, into one buffer, or two that take turns where weights are used as they lie."""

    def __init__(self, layers: list[dict[str, Entry]], device: torch.device, dtype: torch.dtype):
        self.layers, self.device, self.dtype, self.pool = layers, device, dtype, ThreadPoolExecutor(2)
        room = max(sum(-(-entry.n_bytes // 64) * 64 for entry in layer.values()) for layer in layers)
        cuda, kinds = device.type == "cuda", {DTYPES[entry.dtype] for layer in layers for entry in layer.values()}
        n_buffers = 1 if cuda or dtype not in kinds else 2
        self.buffers = [torch.empty(room, dtype=torch.uint8, pin_memory=cuda) for _ in range(n_buffers)]
        self.pending: list[Future] = []

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, *exc) -> None:
        self.pool.shutdown(cancel_futures=True)

    def start(self, k: int) -> None:
        """Begin to read layer k into its buffer; what that held is not in use any more."""
        self.tensors, self.pending, at = {}, [], 0
        for name, entry in self.layers[k].items() if k < len(self.layers) else ():
            flat = self.buffers[k % len(self.buffers)][at : at + entry.n_bytes]
            self.pending.append(self.pool.submit(entry.read, flat))
            self.tensors[name] = flat.view(DTYPES[entry.dtype]).view(entry.shape)
            at += -(-entry.n_bytes // 64) * 64  # aligned for every dtype

    def take(self, k: int) -> dict[str, torch.Tensor]:
        """The weights of layer k, valid until `take(k + 1)`; layer k + 1 begins to be read."""
        for future in self.pending:
            future.result()
        tensors = {name: tensor.to(self.device, self.dtype) for name, tensor in self.tensors.items()}
        self.start(k + 1)
        return tensors


def _give_back() -> None:
    """Free heap to the system, where the C library can (glibc): activations of many batches leave it full of holes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def _workplace(source: Checkpoint, calibration, settings: list, work_dir) -> Iterator[Path]:
    """This run's own directory, found again by a run with the same arguments, gone when the scores are there."""
    files = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in source.shards]
    code = [_code_digest(name) for name in ("stream", "residual", "shards", "scoring", "hooks", "anatomy")]
    versions = [version("torch"), version("transformers")]
    key = json.dumps([files, source.model.config.to_dict(), calibration.digest, settings, code, versions], default=str)
    root = Path(work_dir) if work_dir else build_dir() / "streams"
    folder = root / f"{source.folder.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    with held_alone(folder / "lock", f"another process is at these scores (it holds {folder}); wait for it"):
        try:
            yield folder
        except Exception:
            if not (folder / Residual.RECORD).exists():
                shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)
