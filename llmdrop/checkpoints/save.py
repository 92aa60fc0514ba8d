"""Save a model, dropped or not, for transformers, vLLM or llama.cpp."""

import os
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..anatomy import check_has_weights, unwrapped
from ..files import new_directory, real_path
from .card import write_card
from .destination import check_destination
from .nemotron_nas import write_nemotron_nas
from .push import check_can_push, push
from .transformers_format import write_hf

DIRECTORIES = {"hf": write_hf, "nemotron-nas": write_nemotron_nas}


def save_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    path: str | os.PathLike,
    overwrite: bool = False,
    format: str = "hf",
    note: str = "",
    push_to_hub: str | None = None,
    **settings,
) -> Path:
    """Write model and tokenizer with only what is left of the model, for the program named by `format`.

    - "hf" (default): a directory of safetensors and config.json, an ordinary checkpoint where only whole blocks are
      dropped. Else (single sublayers dropped, or biases that a mean added) `load_model` reads it, and
      `AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)`; stock classes refuse it.
    - "nemotron-nas": a directory for vLLM, SGLang and TensorRT-LLM, see `nemotron_nas.write_nemotron_nas`.
    - "gguf": one file for llama.cpp, Ollama and LM Studio, with weights="f16" (or f32, bf16, q8_0, q4_0, q4_1), see
      `gguf_format.write_gguf`; `load_model` reads it back.

    A directory gets a model card (README.md), with `note` in it: how the layers were chosen and what that cost, as
    Markdown; a card that is not llmdrop's own is never replaced.

    push_to_hub: "owner/name", or a name of your own: what was saved is also uploaded into that model repository, which
    is made if need be. Needs a token with write access (`hf auth login`, or HF_TOKEN).

    Raises FileExistsError if `path` exists and is not empty (overwrite=True replaces what llmdrop wrote, and nothing
    else), PermissionError where nothing may be written, ValueError for what a format cannot hold and for adapters that
    are not merged, ImportError without the extra that a GGUF needs, RuntimeError while another process writes there;
    the destination is complete or absent, also when the process is killed. For push_to_hub what `push.push` raises, as
    far as can be known before anything is saved. Returns the absolute path, of a link that of its target, which is
    replaced.
    """
    path = real_path(path)
    model = unwrapped(model, with_adapters=False)
    check_has_weights(model)
    if push_to_hub is not None:
        check_can_push(push_to_hub)
    if format == "gguf":
        if note:
            raise ValueError("note= goes into a directory's model card, and a GGUF has none; leave it out")
        from .gguf_format import write_gguf  # needs an extra

        write_gguf(model, tokenizer, path, overwrite=overwrite, **settings)
    elif format not in DIRECTORIES or settings:
        raise ValueError(
            f"format={format!r} with {settings or 'no settings'}; allowed are 'hf' and 'nemotron-nas' without "
            "settings, and 'gguf' with weights=..."
        )
    else:
        check_destination(path, overwrite)
        with new_directory(path) as temporary:
            DIRECTORIES[format](model, tokenizer, temporary)
            write_card(temporary, path.name, str(getattr(model, "name_or_path", "")), note)
    if push_to_hub is not None:
        print(f"pushed to {push(path, push_to_hub, overwrite)}")
    return path
