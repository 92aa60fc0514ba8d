"""Train small Llamas from scratch on packaged text and score their layers as they learn (Figure 7, without a hub)."""

import io
import json
import math
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from .. import scoring
from ..calibration import Calibration, batches
from ..checkpoints.load import check_device
from ..files import build_dir, write_atomic
from ..scoring import ImportanceScores, score
from .provenance import model_key, provenance
from .store import Entry, Store
from .training_text import TrainingText

VERSION = 1  # of training: raised when its numbers change


@dataclass(frozen=True)
class Recipe:
    """How a Llama is made and trained.

    n_layers, width: of the model; the width is a multiple of the head size, 32 or, from 512 on, 64. batch_size: windows
    a step. lr: peak learning rate. n_checkpoints: how often it is scored, step 0 and the last among them.

    Raises ValueError for a shape or steps that are impossible.
    """

    n_layers: int = 12
    width: int = 128
    steps: int = 800
    batch_size: int = 4
    lr: float = 3e-3
    n_checkpoints: int = 16

    def __post_init__(self):
        shape_fits = self.n_layers >= 1 and self.width >= 1 and self.width % self.head_size == 0
        if not shape_fits or self.batch_size < 1 or not self.lr > 0:
            raise ValueError(
                f"{self}: need at least one layer, a width that is a multiple of the head size {self.head_size}, and a "
                "positive batch size and learning rate"
            )
        checkpoint_steps(self.steps, self.n_checkpoints)

    @property
    def head_size(self) -> int:
        return 64 if self.width >= 512 else 32

    def learning_rate(self, step: int) -> float:
        """5 % warm-up to `lr`, then a cosine down to a tenth of it."""
        warm_up = max(1, round(0.05 * self.steps))
        share_done = max(step - warm_up, 0) / max(self.steps - warm_up, 1)
        cosine = 0.55 + 0.45 * math.cos(math.pi * share_done)
        return self.lr * min((step + 1) / warm_up, cosine)


def checkpoint_steps(steps: int, n: int) -> list[int]:
    """Step 0, the last, and n - 2 others evenly spaced on a log scale between them (fewer where they coincide)."""
    if steps < 1 or n < 2:
        raise ValueError(f"{steps=}, {n=}: need at least one step and two checkpoints (step 0 and the last)")
    spaced = np.geomspace(steps, 1, n - 1).round().astype(int)
    return sorted({0, *spaced.tolist()})


def pretrain(
    text: TrainingText,
    recipe: Recipe,
    seeds: Sequence[int] = (0,),
    device: str = "auto",
    store: Store | None = None,
    save_every: float = 30.0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Train one Llama per seed and score it at log-spaced steps on text.valid; returns (scores, curve).

    scores: run, step, tokens, kind, layer, score, stderr, magnitude. curve: run, step, tokens, train_loss (mean since
    the checkpoint before), valid_loss, valid_stderr, in nats per token. The seed decides initialization and order of
    the text, and with it every number: on a CPU each run has one thread, and the runs share the cores as processes;
    on CUDA they run one after the other, in bfloat16 autocast with deterministic kernels.

    Finished runs are in `store`. An unfinished one continues from `build_dir()/pretrain/<digest>/`, saved every
    save_every seconds, to the numbers it would have had. Raises ValueError for seeds or a device that are impossible,
    FloatingPointError if a run diverges.
    """
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError(f"{seeds=}: need at least one seed, all different and none negative")
    device = check_device(device)
    entries = []
    folders = []
    jobs = []
    for seed in seeds:
        model = new_model(text, recipe, seed).to(device)
        key = model_key(model) | asdict(recipe)
        key |= {"version": [VERSION, scoring.VERSION], "text": text.digest, "seed": seed}
        entry = Entry(key, f"{recipe.n_layers}x{recipe.width}-{recipe.steps}-seed{seed}")
        folder = build_dir() / "pretrain" / entry.digest
        entries.append(entry)
        folders.append(folder)
        jobs.append(partial(train_run, text, recipe, seed, device, folder, save_every))

    def compute(missing: list[int]) -> Iterator[list[dict]]:
        workers = min(len(missing), torch.get_num_threads()) if device == "cpu" else 1
        if workers == 1:
            yield from (jobs[i]() for i in missing)
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, die_with_parent) as pool:
            runs = [pool.submit(jobs[i]) for i in missing]
            yield from (run.result() for run in tqdm(runs, "pretrain", unit="run"))

    facts = partial(provenance, model, text.valid, **asdict(recipe))
    runs = (store or Store()).get_many("pretrain", entries, compute, facts)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)  # stored, so no longer needed to continue
    scores = []
    curve = []
    for seed, rows in zip(seeds, runs, strict=True):
        for row in rows:
            row = {"run": f"seed {seed}"} | row
            of_checkpoint = ImportanceScores.from_json(json.dumps(row.pop("scores")))
            scores.append(of_checkpoint.to_frame(run=row["run"], step=row["step"], tokens=row["tokens"]))
            curve.append(row)
    return pd.concat(scores, ignore_index=True), pd.DataFrame(curve)


def die_with_parent() -> None:
    """A killed notebook must not leave its training behind: in a child process, end it when the parent ends."""
    parent = multiprocessing.parent_process()

    def wait_and_exit() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_and_exit, daemon=True).start()


def new_model(text: TrainingText, recipe: Recipe, seed: int) -> LlamaForCausalLM:
    """An untrained Llama for this text; the seed decides its weights."""
    config = LlamaConfig(
        vocab_size=len(text.tokenizer),
        hidden_size=recipe.width,
        intermediate_size=round(recipe.width / 12) * 32,  # 8/3 of the width
        num_hidden_layers=recipe.n_layers,
        num_attention_heads=recipe.width // recipe.head_size,
        max_position_embeddings=text.seq_len,
        initializer_range=0.5 * recipe.width**-0.5,  # 0.02 for widths near 576; narrow models need more to learn
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=text.tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def train_run(
    text: TrainingText, recipe: Recipe, seed: int, device: str, folder: Path, save_every: float
) -> list[dict]:
    """One run, from its last state saved in `folder` if there is one: a row per checkpoint."""
    model = new_model(text, recipe, seed).to(device)
    optimizer = torch.optim.AdamW(
        [
            {"params": [parameter for parameter in model.parameters() if parameter.ndim > 1]},
            {"params": [parameter for parameter in model.parameters() if parameter.ndim <= 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        weight_decay=0.1,
        fused=True if device == "cpu" else None,  # a tenth of the step there
    )
    file = folder / "state.pt"
    state = {"step": 0, "losses": [], "rows": []}  # losses: since the last row
    if file.exists():
        state = read_state(file)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    losses = state["losses"]
    rows = state["rows"]
    marks = checkpoint_steps(recipe.steps, recipe.n_checkpoints)
    is_worker = multiprocessing.parent_process() is not None
    with _same_numbers_every_time(device):
        saved_at = time.monotonic()
        for step in tqdm(range(state["step"], recipe.steps + 1), f"seed {seed}", disable=is_worker):
            if time.monotonic() - saved_at >= save_every:
                state = {"step": step, "losses": losses, "rows": rows}
                state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                content = io.BytesIO()
                torch.save(state, content)
                write_atomic({file: content.getvalue()})
                saved_at = time.monotonic()
            if step in marks:
                row = {"step": step, "tokens": step * recipe.batch_size * text.seq_len}
                row["train_loss"] = float(np.mean(losses)) if losses else None
                try:
                    row |= _measure(model, text.valid, recipe.batch_size)
                except ValueError as error:
                    message = f"seed {seed} diverged before step {step}; use a smaller lr than {recipe.lr}"
                    raise FloatingPointError(message) from error
                rows.append(row)
                losses.clear()
            if step < recipe.steps:
                ids = torch.from_numpy(training_batch(text.train, step, recipe.batch_size, seed)).to(device)
                losses.append(_train_step(model, optimizer, ids, recipe.learning_rate(step)))
    return rows


@contextmanager
def _same_numbers_every_time(device: str) -> Iterator[None]:
    """Sums in one order for the length of a `with` block, whatever the machine is told; its settings come back."""
    with ExitStack() as undo:
        undo.callback(torch.set_num_threads, torch.get_num_threads())
        undo.callback(torch.set_deterministic_debug_mode, torch.get_deterministic_debug_mode())
        if device == "cpu":
            torch.set_num_threads(1)
        else:
            if "CUBLAS_WORKSPACE_CONFIG" not in os.environ:  # deterministic kernels ask for it
                os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
                undo.callback(os.environ.pop, "CUBLAS_WORKSPACE_CONFIG")
            torch.set_deterministic_debug_mode("error")
        yield


def _train_step(
    model: LlamaForCausalLM, optimizer: torch.optim.AdamW, ids: torch.Tensor, learning_rate: float
) -> float:
    """One step on these windows, [B, T]; returns the loss before it."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type != "cpu"):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()  # a tensor kept from each step would pin the memory of its logits


def training_batch(train: np.ndarray, step: int, batch_size: int, seed: int) -> np.ndarray:
    """The windows of a step, int64 [B, T]: every window once per epoch, each epoch in an order of its own."""
    windows = []
    for place in range(step * batch_size, (step + 1) * batch_size):
        epoch, position = divmod(place, len(train))
        windows.append(_epoch_order(len(train), seed, epoch)[position])
    return train[windows].astype(np.int64)


@lru_cache(maxsize=2)
def _epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


@torch.no_grad()
def _measure(model: LlamaForCausalLM, valid: Calibration, batch_size: int) -> dict:
    """Loss (nats per token) and importance scores, in float32. ValueError where they are not finite."""
    losses: list[float] = []  # per window
    for _, inputs in batches(valid, batch_size, model.device):
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, :-1]).flatten(0, 1)  # [B * (T - 1), V]
        targets = inputs["input_ids"][:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        losses += loss.view(len(hidden), -1).mean(1).tolist()
    if not np.isfinite(losses).all():
        raise ValueError("the loss is not finite")
    return {
        "valid_loss": float(np.mean(losses)),
        "valid_stderr": float(np.std(losses, ddof=1) / math.sqrt(len(losses))),
        "scores": json.loads(score(model, valid, batch_size, progress=False).to_json()),
    }


def read_state(file: Path) -> dict:
    """A saved state: step, losses, rows, model, optimizer. ValueError where the file is damaged."""
    try:
        return torch.load(file, weights_only=True)
    except Exception as error:  # torch's reader has many kinds
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{file} is damaged ({reason}); delete it, and this run starts again from step 0") from error
