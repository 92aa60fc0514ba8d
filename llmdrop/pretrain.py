"""Train small Llamas from scratch on packaged text and score their layers as they learn (Figure 7, without a hub)."""

import hashlib
import json
import math
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import safetensors
import torch
from safetensors.torch import save
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from .calibration import Calibration
from .fingerprint import model_key, provenance
from .models import build_dir, check_device
from .paper import write_atomic
from .results import Store
from .scoring import ImportanceScores, score
from .text import Text

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic kernels need it before the first of them


def checkpoint_steps(steps: int, n: int) -> list[int]:
    """Step 0, the last, and n - 2 others evenly spaced on a log scale between them (fewer where they coincide)."""
    if steps < 1 or n < 2:
        raise ValueError(f"{steps=}, {n=}: need at least one step and two checkpoints (step 0 and the last)")
    return sorted({0, *np.geomspace(steps, 1, n - 1).round().astype(int).tolist()})


def pretrain(
    text: Text,
    seeds: Iterable[int] = (0,),
    n_layers: int = 12,
    width: int = 128,
    steps: int = 800,
    batch_size: int = 4,
    lr: float = 3e-3,
    n_checkpoints: int = 16,
    device: str = "auto",
    store: Store | None = None,
    save_every: float = 30.0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Train one Llama per seed and score it at log-spaced steps on text.valid; returns (scores, curve).

    scores: run, step, tokens, kind, layer, score, stderr, magnitude. curve: run, step, tokens, train_loss (mean since
    the checkpoint before), valid_loss, valid_stderr, in nats per token. The seed decides initialisation and order of
    the text, and with it every number: on a CPU each run has one thread, and the runs share the cores as processes;
    on CUDA they run one after the other, in bfloat16 autocast with deterministic kernels. AdamW (0.9, 0.95), weight
    decay 0.1 on matrices, gradients clipped to 1, 5 % warm-up to `lr`, then a cosine down to a tenth of it.

    Finished runs are in `store`. An unfinished one continues from `build_dir()/pretrain/<digest>/`, saved every
    save_every seconds, to the numbers it would have had. Raises ValueError for a shape, a device or steps that are
    impossible, FloatingPointError if a run diverges.
    """
    seeds, device = list(seeds), check_device(device)
    if len(set(seeds)) < max(len(seeds), 1) or min(seeds) < 0 or batch_size < 1 or not lr > 0 or device == "balanced":
        raise ValueError(
            f"{seeds=}, {batch_size=}, {lr=}, {device=}: need at least one seed, all different and none negative, a "
            "positive batch size and learning rate, and a single device"
        )
    checkpoint_steps(steps, n_checkpoints)  # say what is wrong before anything starts
    settings = dict(n_layers=n_layers, width=width, steps=steps, batch_size=batch_size, lr=lr)
    settings |= {"n_checkpoints": n_checkpoints}
    wanted, folders, jobs = [], [], []
    for seed in seeds:
        model = _new_model(text, n_layers, width, seed).to(device)
        key = model_key(model, 0, "pretrain", "scoring", "hooks", "anatomy") | settings
        key |= {"text": text.digest, "seed": seed}
        wanted.append((key, f"{n_layers}x{width}-{steps}-seed{seed}"))
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        folders.append(build_dir() / "pretrain" / digest[:16])
        jobs.append(partial(_train, text, seed, folders[-1], save_every, device, **settings))

    def compute(missing: list[int]) -> Iterator[list[dict]]:
        todo = [jobs[i] for i in missing]
        workers = min(len(todo), torch.get_num_threads()) if device == "cpu" else 1
        if workers == 1:
            yield from (job() for job in todo)
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, _die_with_parent) as pool:
            yield from tqdm(pool.map(_call, todo), "pretrain", len(todo), unit="run")

    facts = partial(provenance, model, text.valid, **settings)
    runs = (store or Store()).get_many("pretrain", wanted, compute, facts)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)  # stored, so no longer needed to continue
    rows = [{"run": f"seed {seed}"} | row for seed, found in zip(seeds, runs, strict=True) for row in found]
    frames = []
    for row in rows:
        scores = ImportanceScores.from_json(json.dumps(row.pop("scores")))
        frames.append(scores.to_frame(**{fact: row[fact] for fact in ("run", "step", "tokens")}))
    return pd.concat(frames, ignore_index=True), pd.DataFrame(rows)


def _call(job):
    return job()


def _die_with_parent() -> None:
    """A killed notebook must not leave its training behind."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _new_model(text: Text, n_layers: int, width: int, seed: int) -> LlamaForCausalLM:
    head = 64 if width >= 512 else 32
    if n_layers < 1 or width < head or width % head:
        raise ValueError(f"{n_layers=}, {width=}: need at least one layer, and a multiple of the head size {head}")
    config = LlamaConfig(
        vocab_size=len(text.tokenizer),
        hidden_size=width,
        intermediate_size=round(width / 12) * 32,  # 8/3 of the width
        num_hidden_layers=n_layers,
        num_attention_heads=width // head,
        max_position_embeddings=text.train.shape[1],
        initializer_range=0.5 * width**-0.5,  # 0.02 for widths near 576; narrow models need more to learn
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=text.tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _train(
    text: Text,
    seed: int,
    folder: Path,
    save_every: float,
    device,
    n_layers,
    width,
    steps,
    batch_size,
    lr,
    n_checkpoints,
) -> list[dict]:
    """One run, from its last saved state if there is one: a row per checkpoint."""
    model = _new_model(text, n_layers, width, seed).to(device)
    weights = dict(model.named_parameters())
    groups = [{"params": [p for p in weights.values() if (p.ndim > 1) == matrix]} for matrix in (True, False)]
    groups[1]["weight_decay"] = 0.0
    fused = True if device == "cpu" else None  # a tenth of the step there
    optimizer = torch.optim.AdamW(groups, lr, betas=(0.9, 0.95), weight_decay=0.1, fused=fused)
    marks, file = checkpoint_steps(steps, n_checkpoints), folder / "state.safetensors"
    first, losses, rows = _resume(file, weights, optimizer)
    saved = time.monotonic()
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    if device == "cpu":
        torch.set_num_threads(1)  # sums in one order, whatever the machine is told
    else:
        torch.use_deterministic_algorithms(True)
    quiet = multiprocessing.parent_process() is not None
    try:
        for step in tqdm(range(first, steps + 1), f"seed {seed}", steps + 1, initial=first, disable=quiet):
            if step in marks and step not in [row["step"] for row in rows]:
                tokens = step * batch_size * text.train.shape[1]
                row = {"step": step, "tokens": tokens, "train_loss": float(np.mean(losses)) if losses else None}
                rows.append(row | _measure(model, text.valid, batch_size))
                losses = []
                if not math.isfinite(rows[-1]["valid_loss"]):
                    raise FloatingPointError(f"seed {seed} diverged before step {step}; use a smaller lr than {lr}")
            if time.monotonic() - saved >= save_every:
                _save(file, step, losses, rows, weights, optimizer)
                saved = time.monotonic()
            if step == steps:
                return rows
            warm = max(1, round(0.05 * steps))
            cosine = 0.55 + 0.45 * math.cos(math.pi * max(step - warm, 0) / max(steps - warm, 1))
            for group in optimizer.param_groups:
                group["lr"] = lr * min((step + 1) / warm, cosine)
            ids = torch.from_numpy(_batch(text.train, step, batch_size, seed)).to(device)
            with torch.autocast("cuda", torch.bfloat16, enabled=device != "cpu"):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())  # a tensor kept from each step would pin the memory of its logits
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


def _batch(train: np.ndarray, step: int, batch_size: int, seed: int) -> np.ndarray:
    """The windows of a step, int64 [B, T]: every window once per epoch, each epoch in an order of its own."""
    at, n = np.arange(step * batch_size, (step + 1) * batch_size), len(train)
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(n) for epoch in set((at // n).tolist())}
    return train[[orders[i // n][i % n] for i in at.tolist()]].astype(np.int64)


@torch.no_grad()
def _measure(model, valid: Calibration, batch_size: int) -> dict:
    """Importance scores and the loss per window (nats per token) on the same text, from one forward pass in float32."""
    hidden, losses = [], []
    hook = model.base_model.register_forward_hook(lambda *seen: hidden.append(seen[-1].last_hidden_state))
    try:
        scores = score(model, valid, batch_size, progress=False)
    finally:
        hook.remove()
    for states, ids in zip(hidden, valid.input_ids.split(batch_size), strict=True):
        logits = model.lm_head(states[:, :-1]).float().flatten(0, 1)  # [B * (T - 1), V]
        targets = ids[:, 1:].to(logits.device).flatten()
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        losses += loss.view(len(ids), -1).mean(1).tolist()
    return {
        "valid_loss": float(np.mean(losses)),
        "valid_stderr": float(np.std(losses, ddof=1) / math.sqrt(len(losses))),
        "scores": json.loads(scores.to_json()),
    }


def _save(file: Path, step: int, losses: list, rows: list[dict], weights: dict, optimizer) -> None:
    progress = {"step": step, "losses": losses, "rows": rows}
    tensors = {f"weight.{name}": p.detach() for name, p in weights.items()}
    for name, p in weights.items():
        tensors |= {f"{part}.{name}": value for part, value in optimizer.state.get(p, {}).items()}
    for leftover in file.parent.glob(f".{file.name}.*"):  # of a process killed while it was writing
        leftover.unlink()
    write_atomic({file: save(tensors, {"progress": json.dumps(progress)})})


def _read(file: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """A saved state: (its progress, its tensors by name)."""
    try:
        with safetensors.safe_open(file, "pt") as saved:
            return json.loads(saved.metadata()["progress"]), {name: saved.get_tensor(name) for name in saved.keys()}
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({error}); delete it, and this run starts again from step 0") from error


def _resume(file: Path, weights: dict, optimizer) -> tuple[int, list, list[dict]]:
    """Put back the last saved state: (steps done, losses since the last checkpoint, rows so far)."""
    if not file.exists():
        return 0, [], []
    progress, tensors = _read(file)
    for name, p in weights.items():
        p.data.copy_(tensors[f"weight.{name}"])
        if progress["step"]:
            state = {part: tensors[f"{part}.{name}"] for part in ("step", "exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {
                part: value if part == "step" else value.to(p.device) for part, value in state.items()
            }
    return progress["step"], progress["losses"], progress["rows"]
