"""Train small Llamas from scratch on packaged text and score their layers as they learn (Figure 7, without a hub)."""

import json
import math
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import safetensors
import torch
from safetensors.torch import save
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from .. import scoring
from ..calibration import Calibration
from ..checkpoints.load import check_device
from ..files import build_dir, write_atomic
from ..scoring import ImportanceScores, score
from .provenance import model_key, provenance
from .store import Entry, Store
from .training_text import TrainingText

VERSION = 1  # of training: raised when its numbers change
CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # deterministic kernels need it before the first of them


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
        if self.n_layers < 1 or self.width < self.head_size or self.width % self.head_size:
            raise ValueError(
                f"n_layers={self.n_layers}, width={self.width}: need at least one layer, and a multiple of the head "
                f"size {self.head_size}"
            )
        if self.batch_size < 1 or not self.lr > 0:
            raise ValueError(
                f"batch_size={self.batch_size}, lr={self.lr}: need a positive batch size and learning rate"
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


@dataclass
class Progress:
    """How far a run is: steps done, training losses since the last checkpoint, and a row for each checkpoint so far."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    rows: list[dict] = field(default_factory=list)


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
    on CUDA they run one after the other, in bfloat16 autocast with deterministic kernels. AdamW (0.9, 0.95), weight
    decay 0.1 on matrices, gradients clipped to 1, the learning rate as of `Recipe.learning_rate`.

    Finished runs are in `store`. An unfinished one continues from `build_dir()/pretrain/<digest>/`, saved every
    save_every seconds, to the numbers it would have had. Raises ValueError for seeds or a device that are impossible,
    FloatingPointError if a run diverges.
    """
    seeds = list(seeds)
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError(f"{seeds=}: need at least one seed, all different and none negative")
    device = check_device(device)
    if device == "balanced":
        raise ValueError(f"{device=}: a run trains on a single device; use 'auto', 'cpu' or 'cuda'")
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
        return _run_all([jobs[i] for i in missing], device)

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


def _run_all(jobs: Sequence[Callable[[], list[dict]]], device: str) -> Iterator[list[dict]]:
    """What each job returns, in order; on a CPU as many at a time as there are threads."""
    workers = min(len(jobs), torch.get_num_threads()) if device == "cpu" else 1
    if workers == 1:
        for job in jobs:
            yield job()
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, die_with_parent) as pool:
        yield from tqdm(pool.map(_call, jobs), "pretrain", len(jobs), unit="run")


def _call(job: Callable[[], list[dict]]) -> list[dict]:
    return job()


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
    optimizer = _new_optimizer(model, recipe.lr, device)
    file = folder / "state.safetensors"
    progress = _resume(file, model, optimizer)
    marks = checkpoint_steps(recipe.steps, recipe.n_checkpoints)
    is_worker = multiprocessing.parent_process() is not None
    with _same_numbers_every_time(device):
        saved_at = time.monotonic()
        first = progress.step
        steps = range(first, recipe.steps + 1)
        for step in tqdm(steps, f"seed {seed}", recipe.steps + 1, initial=first, disable=is_worker):
            progress.step = step
            if step in marks and step not in [row["step"] for row in progress.rows]:
                try:
                    row = _checkpoint_row(model, text, recipe, progress)
                except ValueError as error:
                    raise FloatingPointError(
                        f"seed {seed} diverged before step {step}; use a smaller lr than {recipe.lr}"
                    ) from error
                progress.rows.append(row)
                progress.losses = []
            if time.monotonic() - saved_at >= save_every:
                _save(file, progress, model, optimizer)
                saved_at = time.monotonic()
            if step < recipe.steps:
                ids = torch.from_numpy(training_batch(text.train, step, recipe.batch_size, seed)).to(device)
                loss = _train_step(model, optimizer, ids, recipe.learning_rate(step))
                progress.losses.append(loss)
    return progress.rows


def _new_optimizer(model: LlamaForCausalLM, lr: float, device: str) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    fused = True if device == "cpu" else None  # a tenth of the step there
    return torch.optim.AdamW(groups, lr, betas=(0.9, 0.95), weight_decay=0.1, fused=fused)


@contextmanager
def _same_numbers_every_time(device: str) -> Iterator[None]:
    """Sums in one order for the length of a `with` block, whatever the machine is told; all settings come back."""
    with ExitStack() as undo:
        if device == "cpu":
            undo.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)
        else:
            undo.callback(
                torch.use_deterministic_algorithms,
                torch.are_deterministic_algorithms_enabled(),
                warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
            )
            if CUBLAS_WORKSPACE not in os.environ:
                os.environ[CUBLAS_WORKSPACE] = ":4096:8"
                undo.callback(os.environ.pop, CUBLAS_WORKSPACE, None)
            torch.use_deterministic_algorithms(True)
        yield


def _train_step(
    model: LlamaForCausalLM, optimizer: torch.optim.AdamW, ids: torch.Tensor, learning_rate: float
) -> float:
    """One step on these windows, [B, T]; returns the loss before it."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    with torch.autocast("cuda", torch.bfloat16, enabled=ids.device.type != "cpu"):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()  # a tensor kept from each step would pin the memory of its logits


def training_batch(train: np.ndarray, step: int, batch_size: int, seed: int) -> np.ndarray:
    """The windows of a step, int64 [B, T]: every window once per epoch, each epoch in an order of its own."""
    n = len(train)
    orders: dict[int, np.ndarray] = {}  # of the windows, by epoch
    windows = []
    for place in range(step * batch_size, (step + 1) * batch_size):
        epoch = place // n
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([seed, epoch]).permutation(n)
        windows.append(orders[epoch][place % n])
    return train[windows].astype(np.int64)


def _checkpoint_row(model: LlamaForCausalLM, text: TrainingText, recipe: Recipe, progress: Progress) -> dict:
    """What is stored of a checkpoint. ValueError where activations or losses are not finite."""
    row = {
        "step": progress.step,
        "tokens": progress.step * recipe.batch_size * text.seq_len,
        "train_loss": float(np.mean(progress.losses)) if progress.losses else None,
    }
    return row | _measure(model, text.valid, recipe.batch_size)


@torch.no_grad()
def _measure(model: LlamaForCausalLM, valid: Calibration, batch_size: int) -> dict:
    """Importance scores and the loss per window (nats per token) on the same text, from one forward pass in float32."""
    hidden: list[torch.Tensor] = []

    def keep_hidden(module, args, output) -> None:
        hidden.append(output.last_hidden_state)

    hook = model.base_model.register_forward_hook(keep_hidden)
    try:
        scores = score(model, valid, batch_size, progress=False)
    finally:
        hook.remove()
    losses: list[float] = []  # per window
    for states, ids in zip(hidden, valid.input_ids.split(batch_size), strict=True):
        logits = model.lm_head(states[:, :-1]).float().flatten(0, 1)  # [B * (T - 1), V]
        targets = ids[:, 1:].to(logits.device).flatten()
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        losses += loss.view(len(ids), -1).mean(1).tolist()
    if not np.isfinite(losses).all():
        raise ValueError("the loss is not finite")
    return {
        "valid_loss": float(np.mean(losses)),
        "valid_stderr": float(np.std(losses, ddof=1) / math.sqrt(len(losses))),
        "scores": json.loads(scores.to_json()),
    }


def _save(file: Path, progress: Progress, model: LlamaForCausalLM, optimizer: torch.optim.AdamW) -> None:
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"weight.{name}"] = parameter.detach()
        for part, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{part}.{name}"] = value
    for leftover in file.parent.glob(f".{file.name}.*"):  # of a process killed while it was writing
        leftover.unlink()
    write_atomic({file: save(tensors, {"progress": json.dumps(asdict(progress))})})


def read_state(file: Path) -> tuple[Progress, dict[str, torch.Tensor]]:
    """A saved state: its progress, and its tensors by name. ValueError where the file is damaged."""
    try:
        with safetensors.safe_open(file, "pt") as saved:
            progress = Progress(**json.loads(saved.metadata()["progress"]))
            tensors = {name: saved.get_tensor(name) for name in saved.keys()}
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({error}); delete it, and this run starts again from step 0") from error
    return progress, tensors


def _resume(file: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW) -> Progress:
    """Put back the last saved state, if there is one, and say how far it is."""
    if not file.exists():
        return Progress()
    progress, tensors = read_state(file)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(tensors[f"weight.{name}"])
        if progress.step:
            optimizer.state[parameter] = {
                "step": tensors[f"step.{name}"],  # stays on the CPU
                "exp_avg": tensors[f"exp_avg.{name}"].to(parameter.device),
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(parameter.device),
            }
    return progress
