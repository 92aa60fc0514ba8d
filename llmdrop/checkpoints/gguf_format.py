"""Dropped models for llama.cpp (Ollama, LM Studio): write a GGUF from a model or from another GGUF, and read it back.

llama.cpp runs layers of different shapes by its architecture "deci": head counts and feed-forward lengths are arrays,
one entry per layer. What this engine cannot do is written exactly, in another way:

    both sublayers dropped     the block is gone and later ones move up (blocks only: an ordinary "llama" file)
    MLP dropped                an MLP of width 32, all zeros: a length of 0 would silently lose that layer's attention
    first attention dropped    one head, all zeros: the engine reads cache facts off its first layer
"""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ..anatomy import find_anatomy
from ..files import new_directory, real_path
from ..plan import DropPlan, as_plan
from ..prune import apply_plan, give_biases
from .blocks import renumber
from .destination import MARK, check_file
from .extras import import_extra
from .gguf_tokenizer import read_tokenizer, tokenizer_facts
from .nemotron_nas import attended, check_llama

gguf = import_extra("gguf", "gguf")
Kind = gguf.GGMLQuantizationType
WEIGHTS = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1")
TYPES = {  # of a file; of all others float32 holds the values
    gguf.LlamaFileType.MOSTLY_F16: torch.float16,
    gguf.LlamaFileType.MOSTLY_BF16: torch.bfloat16,
}
ZERO_WIDTH = 32  # of an MLP that is not there; one quantization block

Tensors = Iterator[tuple[str, np.ndarray, Kind]]  # name in the file, values as they stand there, type


def write_gguf(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    path: str | os.PathLike,
    weights: str = "f16",
    overwrite: bool = False,
) -> Path:
    """Write a Llama or Mistral model, dropped or not, with its tokenizer and chat template, as one GGUF file.

    weights: one of WEIGHTS, quantized by the gguf package; below 8 bits, embedding and output stay at 8. Norms, and
    biases that a mean added, are float32. The plan is recorded and `load_model(path)` finds it.
    Raises ValueError for other architectures, mixed dtypes, tokenizers that llama.cpp has no form for and numbers
    beyond float16; FileExistsError if `path` exists (overwrite=True replaces a file of llmdrop's).
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights!r} is not one of {', '.join(WEIGHTS)}")
    path = _checked_path(path, overwrite)
    check_llama(model, "gguf")
    peak = max(float(tensor.abs().max()) for tensor in model.state_dict().values())
    if not np.isfinite(peak) or (weights == "f16" and peak > 65504):
        raise ValueError(f"the largest weight is {peak}; float16 ends at 65504: use weights='bf16' or 'f32'")
    parts = find_anatomy(model)
    config = model.config
    rows = {len(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    if rows != {config.vocab_size}:  # an engine would take other bytes for the missing rows
        raise ValueError(
            f"embedding and output have {' and '.join(map(str, sorted(rows)))} rows, the config says vocab_size="
            f"{config.vocab_size}; model.resize_token_embeddings(n) sets all three"
        )
    facts = {
        "general.name": os.path.basename(str(model.name_or_path)) or "model",
        "general.file_type": gguf.LlamaFileType[f"{'ALL' if weights == 'f32' else 'MOSTLY'}_{weights.upper()}"],
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "context_length": attended(config),
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
        "llmdrop.config": _undropped_config(config, parts.n_layers),
    }
    facts |= tokenizer_facts(tokenizer, config.vocab_size)
    tensors = _model_tensors(model, Kind[weights.upper()])
    return _write(path, parts.plan.for_depth(parts.n_layers), config.head_dim, facts, tensors)


def _model_tensors(model, kind: Kind) -> Tensors:
    state = model.state_dict()
    # where the rest has fewer bits, the two large ones stay at 8: they cost little and matter most
    large = kind if kind in (Kind.F32, Kind.F16, Kind.BF16) else Kind.Q8_0
    for name, key in _names(model).items():
        for what in ("weight", "bias"):
            tensor = state.get(f"{key}.{what}")
            if tensor is None or (name == "output" and model.config.tie_word_embeddings):
                continue
            array = tensor.float().cpu().numpy()
            if name.endswith(("attn_q", "attn_k")):
                array = _reordered(array, (2, model.config.head_dim // 2))
            yield f"{name}.{what}", *_encode(array, large if name in ("token_embd", "output") else kind)
    scaling = _rope_scaling(model)
    if scaling is not None:
        yield "rope_freqs.weight", scaling, Kind.F32


def drop_gguf(source: str | os.PathLike, plan: DropPlan, path: str | os.PathLike, overwrite: bool = False) -> Path:
    """Apply a plan to a Llama GGUF, whatever its quantization: what stays is copied byte for byte.

    Raises ValueError for other architectures, split files, files that were dropped from before and plans for another
    depth; FileExistsError if `path` exists (overwrite=True replaces a file of llmdrop's).
    """
    path = _checked_path(path, overwrite)
    source = os.path.expanduser(source)
    reader, facts = _read(source)
    if facts["general.architecture"] != "llama" or "expert_count" in facts or facts.get("split.count", 1) > 1:
        raise ValueError(f"{source} holds a {facts['general.architecture']!r} model; drop_gguf takes one dense 'llama'")
    if DropPlan.from_json(facts.get("llmdrop.plan", "{}")):
        raise ValueError(f"{source} was dropped from before; apply the plan to the undropped file")
    if "tokenizer.huggingface.json" not in facts:  # nobody can read a tokenizer out of a "deci" file
        facts["tokenizer.huggingface.json"] = read_tokenizer(source, facts).backend_tokenizer.to_str()
    facts["llmdrop.config"] = _recorded_config(source, reader, facts)
    plan = as_plan(plan, facts["block_count"]).for_depth(facts["block_count"])
    return _write(path, plan, _head_width(facts), facts, _kept_tensors(reader, plan))


def _kept_tensors(reader: gguf.GGUFReader, plan: DropPlan) -> Tensors:
    kept = _kept_layers(plan)
    for tensor in reader.tensors:
        name = tensor.name
        layer, kind = _place(name)
        if layer is not None and layer in getattr(plan, kind):
            continue
        if layer is not None:
            name = name.replace(f"blk.{layer}.", f"blk.{kept.index(layer)}.")
        yield name, tensor.data, tensor.tensor_type


def load_gguf(
    path: str | os.PathLike, dtype: str = "float32", attn_implementation: str | None = None, device: str = "cpu"
):
    """(model, tokenizer) from a GGUF with a Llama in it: ours, with the plan it was written with, or an undropped one.

    Weights are dequantized to `dtype`, one by one, and go to `device`; "auto" is the file's own type, float32 where it
    is quantized. Raises ValueError for other architectures, and for files whose plan is not recorded.
    """
    reader, facts = _read(path)
    if facts["general.architecture"] != "llama" and "llmdrop.plan" not in facts:
        raise ValueError(
            f"{path} holds a {facts['general.architecture']!r} model that llmdrop did not write; "
            "load_model reads 'llama' files and what save_model(..., format='gguf') wrote"
        )
    recorded = _recorded_config(path, reader, facts)
    if recorded is None:
        raise ValueError(f"{path} scales rotary frequencies by a table; load the model from safetensors instead")
    config = AutoConfig.for_model(**json.loads(recorded))
    torch_dtype = getattr(torch, dtype) if dtype != "auto" else TYPES.get(facts.get("general.file_type"), torch.float32)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch_dtype, attn_implementation=attn_implementation)
    plan = DropPlan.from_json(facts.get("llmdrop.plan", "{}")).for_depth(config.num_hidden_layers)
    apply_plan(model, plan)
    kept = _kept_layers(plan)
    names = _names(model)
    state = {}
    biases = []
    for tensor in reader.tensors:
        name, _, what = tensor.name.rpartition(".")
        slot, kind = _place(tensor.name)
        if name == "rope_freqs" or (slot is not None and kept[slot] in getattr(plan, kind)):  # zeros stand there
            continue
        if name not in names:
            raise ValueError(f"{path} holds {tensor.name}, which a Llama does not have; load_model reads Llamas")
        array = gguf.dequantize(tensor.data, tensor.tensor_type)
        if name.endswith(("attn_q", "attn_k")):
            array = _reordered(array, (_head_width(facts) // 2, 2))
        state[f"{names[name]}.{what}"] = torch.tensor(array).to(device, torch_dtype)
        if what == "bias":
            biases.append((kept[slot], names[name].split(".", 3)[3]))
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    give_biases(ExitStack(), model, biases)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    # its table is no part of the state; Mistral's is the same
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    model.to(device)  # what little is no weight
    return model.eval(), read_tokenizer(path, facts)


# -- the file ---------------------------------------------------------------------------------------------------------
def _write(path: Path, plan: DropPlan, head: int, facts: dict, tensors: Tensors) -> Path:
    """Write all of it beside `path`, then rename. facts: keys of this architecture without its name before them."""
    kept = _kept_layers(plan)
    if not kept:
        raise ValueError(f"the plan drops all {plan.n_layers} attention and all MLP layers; keep at least one")
    arch = "llama" if plan.attn == plan.mlp else "deci"
    facts = facts | {
        "block_count": len(kept),
        "attention.key_length": head,
        "attention.value_length": head,
        "llmdrop.plan": plan.to_json(),
    }
    zeros = {}
    if arch == "deci":
        width = facts["embedding_length"]
        for key in ("attention.head_count", "attention.head_count_kv"):
            facts[key] = [0 if i in plan.attn else int(facts[key]) for i in kept]
            facts[key][0] = facts[key][0] or 1
        lengths = [ZERO_WIDTH if i in plan.mlp else int(facts["feed_forward_length"]) for i in kept]
        facts["feed_forward_length"] = lengths
        if kept[0] in plan.attn:
            zeros |= {"blk.0.attn_norm": (width,), "blk.0.attn_output": (width, head)}
            zeros |= {f"blk.0.attn_{matrix}": (head, width) for matrix in "qkv"}
        for slot, i in enumerate(kept):
            if i in plan.mlp:
                zeros |= {f"blk.{slot}.ffn_norm": (width,), f"blk.{slot}.ffn_down": (width, ZERO_WIDTH)}
                zeros |= {f"blk.{slot}.ffn_{matrix}": (ZERO_WIDTH, width) for matrix in ("gate", "up")}
    add_methods = {bool: "add_bool", float: "add_float32", str: "add_string", list: "add_array"}
    finished = path.with_name(f".{path.name}.finished")
    with new_directory(finished) as folder:  # for its lock, and because the next one removes what a killed one left
        writer = gguf.GGUFWriter(folder / path.name, arch, use_temp_file=True)  # tensors spool to disk, not in memory
        for key, value in facts.items():
            if key != "general.architecture" and value is not None and not key.startswith("GGUF."):
                full_key = key if key.startswith(("general.", "tokenizer.", "llmdrop.")) else f"{arch}.{key}"
                getattr(writer, add_methods.get(type(value), "add_uint32"))(full_key, value)
        for name, array, kind in tensors:
            writer.add_tensor(name, np.ascontiguousarray(array), raw_dtype=kind)
        for name, shape in zeros.items():
            writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32 if len(shape) == 1 else np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(folder / path.name, path)
    finished.rmdir()
    return path


def _checked_path(path: str | os.PathLike, overwrite: bool) -> Path:
    def is_ours(path: Path) -> bool:
        with suppress(ValueError):  # of what is no GGUF
            return "llmdrop.plan" in _read(path)[1]
        return False

    path = real_path(path)
    if path.suffix != ".gguf":
        raise ValueError(f"{path} does not end in .gguf")
    check_file(path, overwrite, is_ours)
    return path


def _read(path: str | os.PathLike) -> tuple[gguf.GGUFReader, dict]:
    """A reader and the file's facts; those of its architecture without the name before them."""
    try:
        reader = gguf.GGUFReader(path)
        facts = {name: field.contents() for name, field in reader.fields.items()}
        arch = facts["general.architecture"]
    except (ValueError, KeyError, IndexError) as error:
        raise ValueError(f"{path} is not a readable GGUF file ({error}); copy or download it again") from error
    return reader, {name.removeprefix(f"{arch}."): value for name, value in facts.items()}


def _recorded_config(path: str | os.PathLike, reader: gguf.GGUFReader, facts: dict) -> str | None:
    """The undropped model's config as JSON; of files of others as transformers reads it, None where it cannot."""
    if "llmdrop.config" in facts or any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors):
        return facts.get("llmdrop.config")
    config = AutoConfig.from_pretrained(Path(path).parent, gguf_file=Path(path).name)
    return _undropped_config(config, facts["block_count"])


def _undropped_config(config, n_layers: int) -> str:
    settings = json.loads(config.to_json_string(use_diff=False)) | {"num_hidden_layers": n_layers}
    for key in ("llmdrop", MARK, "layer_types", "transformers_version", "architectures", "auto_map", "dtype"):
        settings.pop(key, None)
    return json.dumps(settings)


def _head_width(facts: dict) -> int:
    return int(facts.get("attention.key_length", facts["embedding_length"] // np.max(facts["attention.head_count"])))


# -- names and weights ------------------------------------------------------------------------------------------------
def _kept_layers(plan: DropPlan) -> list[int]:
    """By their place in the file, layers that are not dropped whole."""
    return [i for i in range(plan.n_layers) if i not in plan.blocks]


def _names(model) -> dict[str, str]:
    """{name in a GGUF: name in the model} of every module with weights, also of those that bring a bias."""
    modules = _modules(model)
    with ExitStack() as undo:  # files count the layers without dropped blocks
        renumber(undo, model)
        in_file = _modules(model)
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    return {known.get_name(new): name for new, name in zip(in_file, modules, strict=True)}


def _modules(model) -> list[str]:
    return list(dict.fromkeys(key.rpartition(".")[0] for key in model.state_dict()))


def _place(name: str) -> tuple[int | None, str]:
    """Layer and sublayer of a tensor: "blk.3.attn_q.weight" -> (3, "attn"), "output.weight" -> (None, "")."""
    if not name.startswith("blk."):
        return None, ""
    _, layer, rest = name.split(".", 2)
    return int(layer), "attn" if rest.startswith("attn_") else "mlp"


def _encode(array: np.ndarray, kind: Kind) -> tuple[np.ndarray, Kind]:
    """A tensor as it stands in the file; vectors stay float32, rows that blocks do not divide float16."""
    if array.ndim == 1 or kind is Kind.F32:
        return array, Kind.F32
    if array.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] or kind is Kind.F16:
        return array.astype(np.float16), Kind.F16
    return gguf.quantize(array, kind), kind


def _reordered(array: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Rows of Q or K [heads * head, C] with each head's taken for a matrix of this shape, transposed.

    transformers rotates the halves of a head, (2, head / 2), llama.cpp neighbors, (head / 2, 2).
    """
    return array.reshape(-1, *shape, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _rope_scaling(model) -> np.ndarray | None:
    """What each rotary frequency is divided by [head / 2], or None where it is not scaled (Llama 3.1 and later are)."""
    rotary = model.model.rotary_emb
    if rotary.rope_type not in ("default", "llama3", "linear"):
        raise ValueError(f"rotary embeddings of type {rotary.rope_type!r} cannot be written as a table of factors")
    head = model.config.head_dim
    plain = model.config.rope_parameters["rope_theta"] ** (-np.arange(0, head, 2) / head)
    factors = plain / rotary.inv_freq.float().cpu().numpy()
    return None if np.allclose(factors, 1, atol=1e-4) else factors.astype(np.float32)
