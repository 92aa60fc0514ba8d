"""Train small Llamas from scratch on packaged text and score their layers as they learn (Figure 7, without a hub)."""

import io
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
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from .. import scoring
from ..checkpoints.load import check_device
from ..files import build_dir, write_atomic
from ..plan import DropPlan
from ..scoring import ImportanceScores, score
from . import training_measures
from .provenance import model_key, provenance
from .store import Entry, Store
from .training_text import TrainingText

VERSION = 2  # of training: raised when its numbers change


@dataclass(frozen=True)
class Recipe:
    """How a Llama is made and trained.

    n_layers, width, head_size: of the model; the width is a multiple of the head size. batch_size: windows a step. lr:
    peak learning rate. n_checkpoints: how often it is scored on a log scale, step 0 and the last among
    them. n_late_checkpoints: how often besides, evenly over the second half. bfloat16: matrix products of training in
    bfloat16, with float32 weights (autocast); measured is in float32.

    Raises ValueError for a shape or steps that are impossible.
    """

    n_layers: int = 12
    width: int = 128
    head_size: int = 32
    steps: int = 800
    batch_size: int = 4
    lr: float = 3e-3
    n_checkpoints: int = 16
    n_late_checkpoints: int = 0
    bfloat16: bool = False

    def __post_init__(self):
        shape_fits = min(self.n_layers, self.width, self.head_size) >= 1 and self.width % self.head_size == 0
        if not shape_fits or self.batch_size < 1 or not self.lr > 0:
            raise ValueError(
                f"{self}: need at least one layer, a width that is a multiple of the head size {self.head_size}, and a "
                "positive batch size and learning rate"
            )
        checkpoint_steps(self.steps, self.n_checkpoints, self.n_late_checkpoints)

    def learning_rate(self, step: int) -> float:
        """5 % warm-up to `lr`, then a cosine down to a tenth of it."""
        warm_up = max(1, round(0.05 * self.steps))
        share_done = max(step - warm_up, 0) / max(self.steps - warm_up, 1)
        cosine = 0.55 + 0.45 * math.cos(math.pi * share_done)
        return self.lr * min((step + 1) / warm_up, cosine)


def checkpoint_steps(steps: int, n: int, n_late: int = 0) -> list[int]:
    """Step 0, the last, n - 2 evenly spaced on a log scale between them, and n_late evenly over the second half.

    Fewer where some coincide. Raises ValueError for numbers that are too small.
    """
    if steps < 1 or n < 2 or n_late < 0:
        raise ValueError(
            f"{steps=}, {n=}, {n_late=}: need at least one step, two checkpoints (step 0 and the last) and no negative "
            "number of late ones"
        )
    spaced = np.geomspace(steps, 1, n - 1).round().astype(int)
    late = np.linspace(steps / 2, steps, n_late, endpoint=False).round().astype(int)
    return sorted({0, *spaced.tolist(), *late.tolist()})


class TrainingRuns(NamedTuple):
    """What `pretrain` measured: frames with a row per run, step, tokens and what else is named here.

    scores: kind, layer, score, stderr, magnitude. curve: train_loss (mean since the checkpoint before), valid_loss,
    valid_stderr, and what `training_measures.abilities` measures; in nats per token where nothing else is said.
    losses: window (of text.valid) and nats. costs: window and kind, n, chosen and nats, as
    `training_measures.dropping_costs` says.
    """

    scores: pd.DataFrame
    curve: pd.DataFrame
    losses: pd.DataFrame
    costs: pd.DataFrame


def pretrain(
    text: TrainingText,
    recipe: Recipe,
    seeds: Sequence[int] = (0,),
    device: str = "auto",
    store: Store | None = None,
    save_every: float = 30.0,
) -> TrainingRuns:
    """Train one Llama per seed; at each checkpoint score its layers, and measure what it can and what dropping costs.

    Layers are scored on text.scored, all else is measured on text.valid. The seed decides initialization and order of
    the text, and with it every number: on a CPU each run has one thread, and the runs share the cores as processes; on
    CUDA they run one after the other, with deterministic kernels.

    Finished runs are in `store`. An unfinished one continues from `build_dir()/pretrain/<digest>/`, which holds its
    state, saved every save_every seconds, and the weights of its checkpoints, to the numbers it would have had. Raises
    ValueError for seeds or a device that are impossible, FloatingPointError if a run diverges.
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
        jobs.append(partial(train_and_measure, text, recipe, seed, device, folder, save_every))

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
    losses = []
    costs = []
    for seed, rows in zip(seeds, runs, strict=True):
        for row in rows:
            where = {"run": f"seed {seed}", "step": row["step"], "tokens": row["tokens"]}
            of_checkpoint = ImportanceScores.from_record(row["scores"])
            scores.append(of_checkpoint.to_frame(**where))
            losses.append(_by_window(where | {"nats": row["losses"]}))
            costs += [_by_window(where | cost) for cost in row["costs"]]
            loss = {"valid_loss": np.mean(row["losses"]), "valid_stderr": pd.Series(row["losses"]).sem()}
            curve.append(where | {"train_loss": row["train_loss"]} | loss | row["abilities"])
    frames = [pd.concat(parts, ignore_index=True) for parts in (scores, losses, costs)]
    return TrainingRuns(frames[0], pd.DataFrame(curve), *frames[1:])


def _by_window(row: dict) -> pd.DataFrame:
    """One row per window of a row whose nats are a list."""
    return pd.DataFrame(row).rename_axis("window").reset_index()


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


def model_to_train(text: TrainingText, recipe: Recipe, seed: int, device: str) -> LlamaForCausalLM:
    """A `new_model` on a device, with the attention that trains fastest there."""
    model = new_model(text, recipe, seed).to(device)
    if recipe.bfloat16 and device == "cpu":
        model.set_attn_implementation("eager")  # torch's flash attention takes longer there in 16 bits
    return model


def new_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """AdamW as for large models; norms do not decay. Its learning rate is set step by step."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    return torch.optim.AdamW(
        [{"params": matrices}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        weight_decay=0.1,
        fused=True if model.device.type == "cpu" else None,  # a tenth of the step there
    )


def train_and_measure(
    text: TrainingText, recipe: Recipe, seed: int, device: str, folder: Path, save_every: float
) -> list[dict]:
    """One run, from what there is of it in `folder`: a row per checkpoint."""
    rows = train_run(text, recipe, seed, device, folder, save_every)
    model = new_model(text, recipe, seed).to(device)
    last_scores = ImportanceScores.from_record(rows[-1]["scores"])
    file = folder / "measured.pt"
    measured = read_state(file)["rows"] if file.exists() else []
    with same_numbers_every_time(device):
        for row in rows[len(measured) :]:
            model.load_state_dict(read_state(weights_file(folder, row["step"])))
            scores = ImportanceScores.from_record(row["scores"])
            row["abilities"] = training_measures.abilities(model, text.valid)
            row["costs"] = training_measures.dropping_costs(model, scores, last_scores, text.valid)
            measured.append(row)
            write_state(file, {"rows": measured})
    return measured


def weights_file(folder: Path, step: int) -> Path:
    """Where a run keeps the weights of a checkpoint until all of it is measured."""
    return folder / f"step-{step}.pt"


def train_run(
    text: TrainingText, recipe: Recipe, seed: int, device: str, folder: Path, save_every: float
) -> list[dict]:
    """Train, from the last state saved in `folder` if there is one: a row of losses and scores per checkpoint.

    The weights of every checkpoint are in `weights_file` then.
    """
    model = model_to_train(text, recipe, seed, device)
    optimizer = new_optimizer(model)
    file = folder / "state.pt"
    state = {"step": 0, "losses": [], "rows": []}  # losses: since the last row
    if file.exists():
        state = read_state(file)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    losses = state["losses"]
    rows = state["rows"]
    marks = checkpoint_steps(recipe.steps, recipe.n_checkpoints, recipe.n_late_checkpoints)
    is_worker = multiprocessing.parent_process() is not None
    with same_numbers_every_time(device):
        saved_at = time.monotonic()
        for step in tqdm(range(state["step"], recipe.steps + 1), f"seed {seed}", disable=is_worker):
            is_last = step == recipe.steps
            if step in marks:
                row = {"step": step, "tokens": step * recipe.batch_size * text.seq_len}
                row["train_loss"] = float(np.mean(losses)) if losses else None
                try:
                    row |= _measure(model, text, recipe.batch_size)
                except ValueError as error:
                    message = f"seed {seed} diverged before step {step}; use a smaller lr than {recipe.lr}"
                    raise FloatingPointError(message) from error
                rows.append(row)
                losses.clear()
                write_state(weights_file(folder, step), {name: t.cpu() for name, t in model.state_dict().items()})
            if not is_last:
                ids = torch.from_numpy(training_batch(text.train, step, recipe.batch_size, seed)).to(device)
                losses.append(train_step(model, optimizer, ids, recipe, recipe.learning_rate(step)))
            if is_last or time.monotonic() - saved_at >= save_every:
                state = {"step": step + 1, "losses": losses, "rows": rows}
                state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                write_state(file, state)
                saved_at = time.monotonic()
    return rows


@contextmanager
def same_numbers_every_time(device: str) -> Iterator[None]:
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


def train_step(
    model: LlamaForCausalLM, optimizer: torch.optim.AdamW, ids: torch.Tensor, recipe: Recipe, learning_rate: float
) -> float:
    """One step on these windows, [B, T]; returns the loss before it."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=recipe.bfloat16):
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


def _measure(model: LlamaForCausalLM, text: TrainingText, batch_size: int) -> dict:
    """Loss by window (nats per token) and importance scores, in float32. ValueError where they are not finite."""
    (losses,) = training_measures.window_losses(model, [DropPlan()], text.valid)
    return {
        "losses": losses.tolist(),
        "scores": score(model, text.scored, batch_size, progress=False).to_record(),
    }


def write_state(file: Path, state: dict) -> None:
    """Write tensors and plain values, wholly or not at all."""
    content = io.BytesIO()
    torch.save(state, content)
    write_atomic({file: content.getvalue()})


def read_state(file: Path) -> dict:
    """What `write_state` wrote. ValueError where the file is damaged."""
    try:
        return torch.load(file, weights_only=True)
    except Exception as error:  # torch's reader has many kinds
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{file} is damaged ({reason}); delete it, and this run starts again from step 0") from error
