"""A short training after the drop: low-rank adapters (peft), so that the dropped model predicts as the whole one does.

Reconstruction costs one pass, this three a token, and starts where that ends. Adapters are merged: shapes stay.
"""

import copy
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from ..anatomy import unwrapped
from ..calibration import Calibration
from ..checkpoints.digest import weights_digest
from ..checkpoints.extras import import_extra
from ..files import build_dir, new_directory
from ..plan import DropPlan
from ..prune import eval_mode
from .reconstruction import Changes, put_weights, reconstruct, reconstructed
from .search import LOSSES, next_tokens

VERSION = 1  # of the training: raised when its numbers change
RECORD = "healing.json"  # settings and losses, beside the adapter


@dataclass(frozen=True)
class Healing:
    """A training after the drop, of one pass over `text`.

    loss: "kl", the divergence from the undropped model's predictions (distillation), or "perplexity", the next-token
    loss. rank: of the adapter beside every matrix of the layers that are left; all else stays. batch_size: samples a
    step and process.
    """

    text: Calibration
    loss: str = "kl"
    rank: int = 8
    learning_rate: float = 1e-3
    batch_size: int = 2
    seed: int = 0

    def __post_init__(self):
        if self.loss not in LOSSES:
            raise ValueError(f"loss {self.loss!r} is not one of {', '.join(LOSSES)}")

    @property
    def label(self) -> str:
        return f"healed, rank {self.rank}"

    @property
    def key(self) -> dict:
        """What tells it from others, as plain JSON. Raises ImportError without peft."""
        peft = import_extra("peft", "healing").__version__
        return self._settings | {"text": self.text.digest, "version": VERSION, "peft": peft}

    @property
    def _settings(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "text"}

    @contextmanager
    def applied(self, model: nn.Module, plan: DropPlan, changes: Changes) -> Iterator[nn.Module]:
        """`model` without the plan's sublayers and with the healed weights, for the length of a `with` block.

        changes: of the reconstruction that the training starts from, or {}. Trains where no adapter of the same model,
        plan, changes and settings is kept under `build_dir()/healed`. Raises what `heal` raises.
        """
        healed, _ = self._heal(model, plan, changes)
        with ExitStack() as undo:
            undo.enter_context(reconstructed(model, plan, changes))
            put_weights(undo, model, healed)
            yield model

    def losses(self, model: nn.Module, plan: DropPlan, changes: Changes) -> list[float]:
        """The training loss by step; trains where `applied` would."""
        return self._heal(model, plan, changes)[1]

    def _heal(self, model: nn.Module, plan: DropPlan, changes: Changes) -> tuple[nn.Module, list[float]]:
        model = unwrapped(model, with_adapters=False)
        of_model = {"weights": weights_digest(model), "dtype": str(model.dtype), "device": model.device.type}
        key = of_model | plan.key | self.key | {"changes": _digest(changes)}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        name = Path(model.config._name_or_path).name or model.config.model_type
        folder = build_dir() / "healed" / f"{name}-{plan.label}-{digest}"
        return heal(model, plan, self.text, changes, folder, **self._settings)


def heal(
    model: nn.Module,
    plan: DropPlan,
    text: Calibration,
    changes: Changes | None = None,
    folder: str | os.PathLike | None = None,
    progress: bool = True,
    **settings,
) -> tuple[nn.Module, list[float]]:
    """A copy of `model` without the plan's sublayers, trained for one pass over `text`: (the copy, loss by step).

    changes: of `reconstruction.fit`, to start from. folder: the adapter is kept there once it is done, and read from
    there instead of training again. settings: those of `Healing`.

    Both run without dropout, and the copy is in evaluation mode, whatever mode `model` is in. Holds two models, each on
    one device. Under `accelerate launch` or torchrun every process calls this with the same arguments; samples are
    split over the processes and all get the same model.

    Raises ImportError without peft, ValueError for a folder with an adapter of other settings, and what `Healing` and
    `reconstruct` refuse.
    """
    model = unwrapped(model, with_adapters=False)
    healing = Healing(text, **settings)
    changes = changes or {}
    peft = import_extra("peft", "healing")
    trained_for = healing.key | {"changes": _digest(changes)} | plan.key
    del trained_for["peft"]  # its version, which may read an adapter of another
    student = reconstruct(copy.deepcopy(model), plan, changes).eval()
    record = None if folder is None else Path(folder, RECORD)
    if record is not None and record.is_file():
        kept = json.loads(record.read_text())
        differ = [name for name in trained_for if kept["settings"].get(name) != trained_for[name]]
        if differ:
            raise ValueError(
                f"{folder} holds an adapter of another training ({', '.join(differ)} differ); give another folder"
            )
        return peft.PeftModel.from_pretrained(student, folder).merge_and_unload(), kept["losses"]
    torch.manual_seed(healing.seed)  # of the adapters' first values
    config = peft.LoraConfig(
        r=healing.rank,
        lora_alpha=2 * healing.rank,
        target_modules="all-linear",
        fan_in_fan_out=model.config.model_type == "gpt2",
    )
    adapted = peft.get_peft_model(student, config)
    with eval_mode(model):
        losses, is_main = _train(adapted, model, healing, progress)
    if record is not None and is_main:
        with new_directory(record.parent) as partial:
            adapted.save_pretrained(partial)
            (partial / RECORD).write_text(json.dumps({"settings": trained_for, "losses": losses}))
    return adapted.merge_and_unload(), losses


def _train(student: nn.Module, teacher: nn.Module, healing: Healing, progress: bool) -> tuple[list[float], bool]:
    """Train what requires gradients: (the mean loss of each step, whether this is the main process)."""
    device = student.get_input_embeddings().weight.device
    ids = healing.text.input_ids
    mask = torch.ones_like(ids) if healing.text.attention_mask is None else healing.text.attention_mask
    order = torch.Generator().manual_seed(healing.seed)
    loader = DataLoader(TensorDataset(ids, mask), healing.batch_size, shuffle=True, generator=order)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, healing.learning_rate, weight_decay=0.0)
    accelerator = None  # has one device for the whole process, so it is for the processes of a launcher alone
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=device.type == "cpu")
        student, optimizer, loader = accelerator.prepare(student, optimizer, loader)
    losses = []
    n_steps = len(loader)
    for step, (ids, real) in enumerate(tqdm(loader, desc="heal", unit="step", disable=not progress)):
        rising = (step + 1) / max(0.1 * n_steps, 1)
        falling = (n_steps - step) / max(0.9 * n_steps, 1)
        for group in optimizer.param_groups:
            group["lr"] = healing.learning_rate * min(rising, falling, 1.0)
        value = _loss(student, teacher, ids.to(device), real.to(device), healing.loss)
        value.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.reduce(value.detach(), "mean") if accelerator else value))
    return losses, accelerator is None or accelerator.is_main_process


def _loss(student: nn.Module, teacher: nn.Module, ids: torch.Tensor, real: torch.Tensor, loss: str) -> torch.Tensor:
    """Mean over the real tokens, of student's predictions [B, T, vocabulary] against teacher's or the next token."""
    inputs = {"input_ids": ids}
    if not real.all():
        inputs |= {"attention_mask": real, "position_ids": (real.cumsum(1) - 1).clamp_min(0)}
    predicted = student(**inputs, use_cache=False).logits.float().log_softmax(-1)
    if loss == "kl":
        with torch.no_grad():
            expected = teacher(**inputs, use_cache=False).logits.float().log_softmax(-1)
        losses = nn.functional.kl_div(predicted, expected, reduction="none", log_target=True).sum(-1)
        return (losses * real).sum() / real.sum()
    labels = next_tokens(inputs)[:, 1:]
    losses = nn.functional.nll_loss(predicted[:, :-1].transpose(1, 2), labels, reduction="none")  # 0 where -100
    return losses.sum() / (labels != -100).sum()


def _digest(changes: Changes) -> str:
    state = hashlib.sha256()
    for place, change in sorted(changes.items()):
        for value in (change.weight, change.bias):
            state.update(repr(place).encode())
            state.update(b"none" if value is None else value.detach().float().cpu().numpy().tobytes())
    return state.hexdigest()[:16]
