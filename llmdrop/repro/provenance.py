"""What a measurement depends on: the key under which it is stored, and the provenance kept beside it."""

import hashlib
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..calibration import Calibration
from ..checkpoints.destination import MARK
from ..checkpoints.digest import weights_digest


def provenance(model: nn.Module | None = None, calibration: Calibration | None = None, **extra) -> dict:
    """What a result depends on: code, versions, machine, and the model and calibration text if given.

    Keys: time, llmdrop, git_commit and git_dirty (None outside a checkout), python, interpreter (its path; from the
    checkout or the home directory where it is in one), torch, transformers, lm_eval, platform, device, threads; of a
    model its name, revision, weights digest, dtype, device_type and attention implementation; of a calibration its
    source and digest; then `extra` (seed=...; weights= their digest where it was just taken, which is not done again).
    """
    commit, dirty = _git()
    if model is not None:
        device = next(model.parameters()).device
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "llmdrop": version("llmdrop"),
        "git_commit": commit,
        "git_dirty": dirty,
        "python": platform.python_version(),
        "interpreter": _interpreter(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "lm_eval": version("lm_eval"),
        "platform": platform.platform(),
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
    }
    if model is not None:
        name, _, revision = str(model.name_or_path).partition("@")
        facts["model"] = name
        facts["revision"] = revision or getattr(model.config, "_commit_hash", None)
        facts["weights"] = extra.get("weights") or weights_digest(model)
        facts |= {
            fact: value for fact, value in _numerics(model).items() if fact in ("dtype", "device_type", "attention")
        }
    if calibration is not None:
        facts |= {"calibration": calibration.source, "calibration_digest": calibration.digest}
    return facts | extra


def model_key(model: nn.Module, batch_size: int | None = None) -> dict:
    """Everything about the model and the numerics that can change a value.

    batch_size: of what is measured; None where it changes nothing. It counts in 16 bits only: sums depend on it there.
    """
    exact = next(model.parameters()).dtype == torch.float32
    return _numerics(model) | {"weights": weights_digest(model), "batch_size": None if exact else batch_size}


def speed_key(model: nn.Module) -> dict:
    """Everything that can change a duration: the shapes instead of the weights, and the machine."""
    shapes = [(name, tuple(p.shape), str(p.dtype)) for name, p in model.state_dict().items()]
    config = {name: value for name, value in model.config.to_dict().items() if name not in ("_name_or_path", MARK)}
    return _numerics(model) | {
        "shapes": hashlib.sha256(json.dumps([shapes, config], sort_keys=True, default=str).encode()).hexdigest(),
        "device": _device_name(next(model.parameters()).device),
        "threads": torch.get_num_threads(),
    }


def model_name(model: nn.Module) -> str:
    """The last part of where a model came from, for people."""
    return Path(str(model.name_or_path)).name or model.config.model_type


def text_name(calibration: Calibration) -> str:
    """A calibration's source and size, for people: "xsum-16x512"."""
    n_samples, length = calibration.input_ids.shape
    return f"{calibration.source.split(' ')[0].rstrip(',')}-{n_samples}x{length}"


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of the vocabulary and of what the tokenizer adds and merges; padding and truncation settings do not matter."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    probe = tokenizer("The quick brown fox, 1234567 naïve façades\n\n    return x+=1; 日本語")["input_ids"]
    return hashlib.sha256(json.dumps([type(tokenizer).__name__, vocabulary, probe]).encode()).hexdigest()[:16]


@cache
def version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numerics(model: nn.Module) -> dict:
    parameter = next(model.parameters())
    of_gpu = {}
    if parameter.device.type == "cuda":
        of_gpu["cudnn_attention"] = torch.backends.cuda.cudnn_sdp_enabled()
    return of_gpu | {
        "model_type": model.config.model_type,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device_type": parameter.device.type,
        "attention": model.config._attn_implementation,
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


@cache
def _git() -> tuple[str | None, bool | None]:
    """Commit of the checkout this package runs from, and whether its code (not its figures) differs from it."""
    folder = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", folder, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # else a repository that only happens to surround the package
        changed = git("status", "--porcelain", "--", ".", ":/notebooks", ":/pyproject.toml")
        return git("rev-parse", "HEAD"), bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return None, None


def _interpreter() -> str:
    path = Path(sys.executable)
    checkout = Path(__file__).parents[2]
    if path.is_relative_to(checkout):
        return str(path.relative_to(checkout))
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)


@cache
def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        return re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()
