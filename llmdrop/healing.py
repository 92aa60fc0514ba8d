"""A short training after the drop: low-rank adapters (peft), so that the dropped model predicts as the whole one does.

Compensation (`compensate`) is closed-form and costs one pass; this costs three a token and needs peft, and starts
where that ends. Adapters are merged: shapes, speed and formats stay those of the dropped model.
"""

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from .beyond import text_rows
from .calibration import Calibration
from .compensate import Changes, compensate, shared_or_fit
from .fingerprint import model_key, provenance, version
from .models import build_dir
from .plan import DropPlan
from .results import Store, _name, _plan_key
from .selection import LOSSES

PEFT = "peft==0.21.2"


def heal(
    model: nn.Module,
    plan: DropPlan,
    text: Calibration,
    changes: Changes | None = None,
    loss: str = "kl",
    rank: int = 8,
    learning_rate: float = 1e-3,
    batch_size: int = 2,
    seed: int = 0,
    folder: str | os.PathLike | None = None,
    progress: bool = True,
) -> tuple[nn.Module, list[float]]:
    """A copy of `model` without the plan's sublayers, trained for one pass over `text`: (the copy, loss by step).

    changes: of `compensate.fit`, to start from. loss: "kl", the divergence from the undropped model's predictions
    (distillation), or "perplexity", the next-token loss. rank: of the adapter beside every matrix of the layers that
    are left; all else stays. batch_size: samples a step and process. folder: the adapter is kept there once it is
    done, and read from there instead of training again; a run that was interrupted leaves nothing there.

    Holds two models, each on one device. Under `accelerate launch` or torchrun every process calls this with the same
    arguments; samples are split over the processes and all get the same model.

    Raises ImportError without peft, ValueError for an unknown loss, or a folder with an adapter of other settings.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"healing trains adapters with peft, which is not installed: pip install {PEFT}") from error
    if loss not in LOSSES:
        raise ValueError(f"loss {loss!r} is not one of {', '.join(LOSSES)}")
    settings = {"text": text.digest, "loss": loss, "rank": rank, "learning_rate": learning_rate}
    settings |= {"batch_size": batch_size, "seed": seed, "changes": _digest(changes or {})} | _plan_key(plan)
    student = compensate(copy.deepcopy(model), plan, changes or {})
    done = None if folder is None else Path(folder) / "healing.json"
    if done is not None and done.is_file():
        record = json.loads(done.read_text())
        if record["settings"] != settings:
            differ = ", ".join(name for name in settings if record["settings"].get(name) != settings[name])
            raise ValueError(f"{folder} holds an adapter of another training ({differ} differ); give another folder")
        return peft.PeftModel.from_pretrained(student, folder).merge_and_unload(), record["losses"]
    torch.manual_seed(seed)  # of the adapters' first values
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", fan_in_fan_out=model.config.model_type == "gpt2"
    )
    adapted = peft.get_peft_model(student, config)
    losses = _train(adapted, model, text, loss, learning_rate, batch_size, seed, progress)
    if done is not None and Accelerator().is_main_process:
        temporary = done.parent.with_name(f".{done.parent.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        adapted.save_pretrained(temporary)
        (temporary / done.name).write_text(json.dumps({"settings": settings, "losses": losses}))
        done.parent.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, done.parent)
    return adapted.merge_and_unload(), losses


def _train(student, teacher, text: Calibration, loss: str, rate: float, batch_size: int, seed: int, progress: bool):
    """Train in place what requires gradients; the mean loss of each step. The rate rises for a tenth, then falls."""
    device = student.get_input_embeddings().weight.device
    accelerator = Accelerator(cpu=device.type == "cpu")
    mask = torch.ones_like(text.input_ids) if text.attention_mask is None else text.attention_mask
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(TensorDataset(text.input_ids, mask), batch_size, shuffle=True, generator=order)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], rate, weight_decay=0.0)
    student, optimizer, loader = accelerator.prepare(student, optimizer, loader)
    losses, n = [], len(loader)
    for step, (ids, real) in enumerate(tqdm(loader, desc="heal", unit="step", disable=not progress)):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / max(0.1 * n, 1), (n - step) / max(0.9 * n, 1), 1.0)
        value = _loss(student, teacher, ids, real, loss)
        accelerator.backward(value)
        accelerator.clip_grad_norm_([p for p in student.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.reduce(value.detach(), "mean")))
    return losses


def _loss(student, teacher, ids: torch.Tensor, real: torch.Tensor, loss: str) -> torch.Tensor:
    """Mean over the real tokens, of student's predictions [B, T, vocabulary] against teacher's or the next token."""
    inputs = {"input_ids": ids, "use_cache": False} | ({} if real.all() else {"attention_mask": real})
    predicted = student(**inputs).logits.float().log_softmax(-1)
    if loss == "kl":
        with torch.no_grad():
            wanted = teacher(**inputs).logits.float().log_softmax(-1)
        each, weight = nn.functional.kl_div(predicted, wanted, reduction="none", log_target=True).sum(-1), real
    else:
        each, weight = -predicted[:, :-1].gather(-1, ids[:, 1:, None])[..., 0], real[:, 1:] * real[:, :-1]
    return (each * weight).sum() / weight.sum()


def _digest(changes: Changes) -> str:
    state = hashlib.sha256()
    for at, change in sorted(changes.items()):
        state.update(repr(at).encode() + change.detach().float().cpu().numpy().tobytes())
    return state.hexdigest()[:16]


def measure_healed(
    store: Store,
    model,
    plan: DropPlan,
    method: str,
    fitted: Calibration,
    text: Calibration,
    texts: Mapping[str, Calibration],
    shared: Callable[[str], dict] | None = None,
    **settings,
) -> tuple[list[dict], list[float]]:
    """What `beyond.measure` gives on texts after `heal` on `text`, started from `method`'s corrections, and the losses.

    Stored, and the adapter under `build_dir()/healed`. shared, fitted: as for `beyond.measure`. settings: of `heal`.
    """
    modules = ("healing", "beyond", "compensate", "sweep", "prune", "anatomy")
    key = model_key(model, 0, *modules) | _plan_key(plan) | {"method": method, "text": text.digest}
    key |= {"fitted": None if method == "none" else fitted.digest, "settings": settings, "peft": version("peft")}
    key |= {"texts": {name: each.digest for name, each in texts.items()}}
    slug = f"{_name(model)}-{plan.label}-{method}"

    def compute() -> dict:
        changes = shared_or_fit(model, plan, fitted, method, shared)
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        folder = build_dir() / "healed" / f"{slug.replace(' ', '-')}-{digest}"
        healed, losses = heal(model, plan, text, changes, folder=folder, **settings)
        return {"rows": text_rows(healed, [DropPlan()], texts)[0], "losses": losses}

    value = store.get("healed", key, compute, slug, lambda: provenance(model, text, peft=version("peft"), **settings))
    return value["rows"], value["losses"]
