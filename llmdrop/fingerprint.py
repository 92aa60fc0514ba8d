"""What a measurement depends on: the key under which it is stored, and the provenance kept beside it."""

import ast
import hashlib
import importlib.metadata
import json
import platform
import re
import subprocess
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

import torch

from .models import weights_digest


def provenance(model=None, calibration=None, **extra) -> dict:
    """What a result depends on: code, versions, machine, and the model and calibration text if given.

    Keys: time, llmdrop, git_commit and git_dirty (None outside a checkout), python, torch, transformers, lm_eval,
    platform, device, threads; of a model its name, revision, weights digest, dtype, device_type and attention
    implementation; of a calibration its source and digest; then `extra` (seed=...).
    """
    facts = {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "llmdrop": version("llmdrop")}
    facts |= dict(zip(("git_commit", "git_dirty"), _git(), strict=True)) | {"python": platform.python_version()}
    facts |= {name: version(name) for name in ("torch", "transformers", "lm_eval")}
    fallback = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = next(model.parameters()).device if model is not None else fallback
    facts |= {"platform": platform.platform(), "device": _device_name(device), "threads": torch.get_num_threads()}
    if model is not None:
        name, _, revision = str(model.name_or_path).partition("@")
        revision = revision or getattr(model.config, "_commit_hash", None)
        key = model_key(model, 0)
        facts |= {"model": name, "revision": revision}
        facts |= {name: key[name] for name in ("weights", "dtype", "device_type", "attention")}
    if calibration is not None:
        facts |= {"calibration": calibration.source, "calibration_digest": calibration.digest}
    return facts | extra


def model_key(model, batch_size: int, *modules: str) -> dict:
    """Everything about the model, the numerics and the measuring code (modules of ours) that can change a value."""
    parameter = next(model.parameters())
    return _common_key(model, *modules) | {
        "weights": weights_digest(model),
        "batch_size": None if parameter.dtype == torch.float32 else batch_size,  # 16-bit sums depend on it
    }


def speed_key(model, *modules: str) -> dict:
    """Everything that can change a duration: the shapes instead of the weights, and the machine."""
    shapes = [(name, tuple(p.shape), str(p.dtype)) for name, p in model.state_dict().items()]
    config = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
    return _common_key(model, *modules) | {
        "shapes": hashlib.sha256(json.dumps([shapes, config], sort_keys=True, default=str).encode()).hexdigest(),
        "device": _device_name(next(model.parameters()).device),
        "threads": torch.get_num_threads(),
    }


def _common_key(model, *modules: str) -> dict:
    parameter = next(model.parameters())
    return {
        "model_type": model.config.model_type,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device_type": parameter.device.type,
        "attention": model.config._attn_implementation,
        "torch": version("torch"),
        "transformers": version("transformers"),
        "code": {module: _code_digest(module) for module in modules},
    }


@cache
def _code_digest(module: str) -> str:
    """Digest of what a module of ours does: its syntax tree, without comments, layout and docstrings."""
    tree = ast.parse((Path(__file__).parent / f"{module}.py").read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]


def tokenizer_digest(tokenizer) -> str:
    """Of the vocabulary and of what the tokenizer adds and merges; padding and truncation settings do not matter."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    probe = tokenizer("The quick brown fox, 1234567 naïve façades\n\n    return x+=1; 日本語")["input_ids"]
    return hashlib.sha256(json.dumps([type(tokenizer).__name__, vocabulary, probe]).encode()).hexdigest()[:16]


@cache
def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def _git() -> tuple[str | None, bool | None]:
    """Commit of the checkout this package runs from, and whether its code (not its figures) differs from it."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", folder, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # else a repository that only happens to surround the package
        return git("rev-parse", "HEAD"), bool(
            git("status", "--porcelain", "--", ".", ":/notebooks", ":/pyproject.toml")
        )
    except (OSError, subprocess.CalledProcessError):
        return None, None


@cache
def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        return re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()
