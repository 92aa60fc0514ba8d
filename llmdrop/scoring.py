"""Importance scores of Attention, MLP and Block from one forward pass (paper section 3, equations 1 to 6)."""

import json
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from .anatomy import Anatomy, find_anatomy, unwrapped
from .calibration import Calibration, TokenIds, batches, read_by
from .hooks import ResidualTap
from .prune import eval_mode
from .sublayers import in_float64, not_finite

KINDS = ("attn", "mlp", "block")
VERSION = 1  # of the scores: raised when their numbers change, so that stored ones are measured again


@dataclass(frozen=True, eq=False)
class ImportanceScores:
    """S = 1 - cos(x, y) per layer, averaged over the calibration tokens; low means redundant.

    attn, mlp, block: float64 [n_layers], NaN where the sublayer is dropped already. stderr: the same three, standard
    errors over samples (NaN for one sample). magnitude: the same three, ||f(x)|| / ||y||. gap: [n_layers, n_layers],
    gap[i, j] = 1 - cos of the residual stream before layer i and after layer j >= i (NaN below the diagonal), or None
    if not asked for.
    """

    attn: np.ndarray
    mlp: np.ndarray
    block: np.ndarray
    stderr: dict[str, np.ndarray]
    magnitude: dict[str, np.ndarray]
    gap: np.ndarray | None = None
    n_samples: int = 0
    n_tokens: int = 0

    def to_frame(self, **facts) -> pd.DataFrame:
        """Tidy: one row per kind and layer, with columns kind, layer, score, stderr, magnitude; the facts in front."""
        frames = []
        for kind in KINDS:
            columns = {"kind": kind, "layer": np.arange(len(self.attn)), "score": getattr(self, kind)}
            columns |= {"stderr": self.stderr[kind], "magnitude": self.magnitude[kind]}
            frames.append(pd.DataFrame(facts | columns))
        return pd.concat(frames, ignore_index=True)

    def __eq__(self, other) -> bool:
        return isinstance(other, ImportanceScores) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json())

    def to_record(self) -> dict:
        """As plain values, for what is kept among others as JSON."""
        record = {kind: _listed(getattr(self, kind)) for kind in KINDS}
        record |= {name: {k: _listed(getattr(self, name)[k]) for k in KINDS} for name in ("stderr", "magnitude")}
        record["gap"] = None if self.gap is None else [_listed(row) for row in self.gap]
        return record | {"n_samples": self.n_samples, "n_tokens": self.n_tokens}

    @classmethod
    def from_record(cls, record: dict) -> "ImportanceScores":
        """Inverse of `to_record`. Raises ValueError for anything else."""
        try:
            arrays = {kind: np.array(record[kind], dtype=float) for kind in KINDS}
            for name in ("stderr", "magnitude"):
                arrays[name] = {kind: np.array(record[name][kind], dtype=float) for kind in KINDS}
            gap = None if record["gap"] is None else np.array(record["gap"], dtype=float)
            return cls(**arrays, gap=gap, n_samples=record["n_samples"], n_tokens=record["n_tokens"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not importance scores: {json.dumps(record)[:80]!r} ({error})") from error

    def to_json(self) -> str:
        return json.dumps(self.to_record())

    @classmethod
    def from_json(cls, text: str) -> "ImportanceScores":
        """Inverse of `to_json`. Raises ValueError for anything else."""
        try:
            record = json.loads(text)
        except ValueError as error:
            raise ValueError(f"not importance scores: {text[:80]!r} ({error})") from error
        return cls.from_record(record)


def score(
    model: nn.Module,
    calibration: Calibration | TokenIds,
    batch_size: int = 8,
    with_residual: bool = True,
    gap: bool = False,
    progress: bool = True,
) -> ImportanceScores:
    """Score all Attention layers, MLP layers and Blocks in one forward pass over the calibration tokens.

    For a sublayer f reading the residual stream x, y = x + f(x) (its norms are part of f) and S = 1 - mean cos(x, y):
    cosine in float32 per token, mean over every real token. A block's y is what leaves the layer. Where attention and
    MLP are parallel both read the same x, and each y holds only its own branch: y_attn = x + attn(x),
    y_mlp = x + mlp(x). Branches count as they are added: scaled where the layer scales them (Granite), together where
    several are one sublayer (a Mamba beside an attention; shared and routed experts). NaN where a layer has no such
    sublayer. with_residual=False compares x with f(x) alone (Table 6). gap=True also fills the gap matrix
    (needs the residual streams of one batch at a time; otherwise nothing is kept and memory does not depend on the
    number of samples). Standard errors treat samples as independent. The language-model head is never computed.
    calibration: a Calibration, or what it can be made of (token ids, a tokenizer's batch, a DataLoader of these).

    Models larger than memory: `llmdrop.score_checkpoint`. Several processes: `llmdrop.score_distributed`.

    Raises ValueError for architectures without a provable residual split, an empty calibration set, token ids or
    samples that the model cannot read (see `calibration.check_readable`), a batch size below 1, and activations that
    are not finite, naming the layer.
    """
    calibration = read_by(model, calibration)
    sums, gaps = sample_sums(model, calibration, batch_size, with_residual, gap, progress)
    return scores_from_sums(sums, gaps, calibration)


@torch.inference_mode()
def sample_sums(
    model: nn.Module,
    calibration: Calibration,
    batch_size: int,
    with_residual: bool = True,
    gap: bool = False,
    progress: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `score` averages, summed over the tokens of each sample: [n_layers, 6, n_samples] and [n_layers, n_layers].

    The six: cosine and relative magnitude of attention, of MLP, of block; NaN where dropped. The second is None without
    gap.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; it must be at least 1")
    model = unwrapped(model)
    parts = find_anatomy(model)
    n_samples = len(calibration.input_ids)
    present = [i for i, split in enumerate(parts.splits) if split is not None]
    next_layer = dict(zip(present, present[1:], strict=False))
    streams: list[tuple[int, torch.Tensor]] = []  # (layer, unit vectors of the stream before it), of this batch
    # per layer [6, B], left on the layer's device until the batch ends, so that CUDA never waits
    rows: dict[int, torch.Tensor] = {}

    def on_layer(i, x, m, y, f_attn, f_mlp):
        x, y = x.float(), y.float()
        m = x if m is None else m.float()
        parallel = parts.splits[i].parallel
        carried = tap.carried(i, x) if parallel else x
        y_attn = carried + f_attn if parallel and f_attn is not None else m
        y_mlp = carried + f_mlp if parallel and f_mlp is not None else y
        distinct = {id(stream): stream for stream in (x, m, y, y_attn, y_mlp)}  # most stand there twice
        size = {key: _norm(stream) for key, stream in distinct.items()}
        quantities = []  # cosine and relative magnitude of each kind, [B, T]
        for f, before, after in ((f_attn, x, y_attn), (f_mlp, m, y_mlp), (y - x, x, y)):
            if f is None:
                quantities += [torch.full(x.shape[:2], torch.nan, device=x.device)] * 2
                continue
            f_size = _norm(f)
            other, other_size = (after, size[id(after)]) if with_residual else (f.float(), f_size)
            cos = torch.linalg.vecdot(before, other) / (size[id(before)] * other_size).clamp_min(1e-12)
            quantities += [cos, f_size / size[id(after)].clamp_min(1e-12)]
        weights = batch_mask.to(x.device)
        rows[i] = torch.stack([in_float64(torch.where(weights, q, 0.0)).sum(1) for q in quantities])
        if gap:
            if not streams:
                streams.append((i, x / _norm(x).unsqueeze(-1)))
            unit = y / _norm(y).unsqueeze(-1)
            for start, before in streams:
                cos = torch.linalg.vecdot(before.to(unit.device), unit)
                gaps[start, i] += in_float64(torch.where(weights, 1 - cos, 0.0)).sum().item()
            if i in next_layer:
                streams.append((next_layer[i], unit))

    sums = torch.full((parts.n_layers, 6, n_samples), torch.nan, dtype=torch.float64)
    gaps = torch.full((parts.n_layers, parts.n_layers), torch.nan, dtype=torch.float64)
    for start in present:
        gaps[start, [i for i in present if i >= start]] = 0.0
    with ExitStack() as undo:
        tap = undo.enter_context(ResidualTap(model, on_layer))
        undo.enter_context(eval_mode(model))  # last, since other threads that score this model wait for the tap
        bar = undo.enter_context(tqdm(total=n_samples, desc="score", unit="sample", disable=not progress))
        for batch, inputs in batches(calibration, batch_size, model.get_input_embeddings().weight.device):
            batch_mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
            model.base_model(**inputs, use_cache=False)
            for i, row in rows.items():
                sums[i, :, batch] = row.cpu()
            _check_finite(parts, sums[:, :, batch])
            streams.clear()
            bar.update(len(batch_mask))
    return sums, gaps if gap else None


def _check_finite(parts: Anatomy, sums: torch.Tensor) -> None:
    """ValueError naming the first layer whose activations are not finite: NaN in a score means "dropped already"."""
    for i, of_layer in enumerate(sums.isfinite().all(dim=-1)):  # [6]
        for k, kind in enumerate(("attn", "mlp")):
            if parts.has(kind, i) and not of_layer[2 * k : 2 * k + 2].all():
                raise ValueError(not_finite(kind, i))


def scores_from_sums(sums: torch.Tensor, gaps: torch.Tensor | None, calibration: Calibration) -> ImportanceScores:
    """Scores from what `sample_sums` gives, of all samples."""
    ids, mask = calibration.input_ids, calibration.attention_mask
    n = len(ids)
    tokens = (torch.full((n,), ids.shape[1]) if mask is None else mask.sum(1)).double()
    mean = sums.sum(2) / tokens.sum()  # [L, 6]
    residual = sums - mean.unsqueeze(2) * tokens  # ratio estimator: samples may differ in length
    stderr = (residual.square().sum(2) * n / max(n - 1, 1)).sqrt() / tokens.sum()
    if n < 2:
        stderr = torch.full_like(stderr, torch.nan)
    mean, stderr = mean.numpy(), stderr.numpy()
    if gaps is not None:
        gaps = gaps.numpy() / tokens.sum().item()
    return ImportanceScores(
        **{kind: 1 - mean[:, 2 * k] for k, kind in enumerate(KINDS)},
        stderr={kind: stderr[:, 2 * k] for k, kind in enumerate(KINDS)},
        magnitude={kind: mean[:, 2 * k + 1] for k, kind in enumerate(KINDS)},
        gap=gaps,
        n_samples=n,
        n_tokens=int(tokens.sum()),
    )


def _norm(a: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(a.float(), dim=-1)


def _listed(values: np.ndarray) -> list:
    return [None if np.isnan(v) else float(v) for v in values]
