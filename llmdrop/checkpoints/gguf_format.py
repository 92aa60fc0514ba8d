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
from contextlib import ExitStack
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ..anatomy import find_anatomy
from ..files import new_directory
from ..plan import DropPlan
from ..prune import apply_plan, give_biases
from .destination import check_file
from .gguf_tokenizer import read_tokenizer, tokenizer_facts
from .nemotron_nas import attended, check_llama

WEIGHTS = {"f32": Kind.F32, "f16": Kind.F16, "bf16": Kind.BF16, "q8_0": Kind.Q8_0, "q4_0": Kind.Q4_0, "q4_1": Kind.Q4_1}
TYPES = {  # of a file; of all others float32 holds the values
    gguf.LlamaFileType.MOSTLY_F16: torch.float16,
    gguf.LlamaFileType.MOSTLY_BF16: torch.bfloat16,
}
ZERO_WIDTH = 32  # of an MLP that is not there; one quantization block

Tensors = Iterator[tuple[str, np.ndarray, Kind]]  # name in the file, values as they stand there, type


def write_gguf(model, tokenizer, path: str | os.PathLike, weights: str = "f16", overwrite: bool = False) -> Path:
    """Write a Llama or Mistral model, dropped or not, with its tokenizer and chat template, as one GGUF file.

    weights: "f32", "f16", "bf16", "q8_0", "q4_0" or "q4_1", quantized by the gguf package; then embedding and output
    stay at 8 bits. Norms, and biases that a mean added, are float32, as the engine wants them. The plan is recorded and
    `load_model(path)` finds it.
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
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
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
        "rope.freq_base": float(rope_theta(config)),
        "rope.dimension_count": head,
        "vocab_size": config.vocab_size,
        "llmdrop.config": _undropped_config(config, parts.n_layers),
    }
    facts |= tokenizer_facts(tokenizer, config.vocab_size)
    return _write(path, parts.plan, parts.n_layers, head, facts, _model_tensors(model, WEIGHTS[weights], head))


def _undropped_config(config, n_layers: int) -> str:
    settings = json.loads(config.to_json_string(use_diff=False)) | {"num_hidden_layers": n_layers}
    for key in ("llmdrop", "layer_types", "transformers_version", "architectures", "auto_map", "dtype"):
        settings.pop(key, None)
    return json.dumps(settings)


def _model_tensors(model, kind: Kind, head: int) -> Tensors:
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
                array = _interleaved(array, head)
            yield f"{name}.{what}", *_encode(array, large if name in ("token_embd", "output") else kind)
    scaling = _rope_scaling(model, head)
    if scaling is not None:
        yield "rope_freqs.weight", scaling, Kind.F32


def _names(model) -> dict[str, str]:
    """{name in a GGUF: name in the model} of every module with weights, also of those that bring a bias."""
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    modules = dict.fromkeys(key.rpartition(".")[0] for key in model.state_dict())
    return {known.get_name(key): key for key in modules}


def drop_gguf(source: str | os.PathLike, plan: DropPlan, path: str | os.PathLike, overwrite: bool = False) -> Path:
    """Apply a plan to a Llama GGUF, whatever its quantization: what stays is copied byte for byte.

    Raises ValueError for other architectures, split files, files that were dropped from before and plans for another
    depth; FileExistsError if `path` exists (overwrite=True replaces a file of llmdrop's).
    """
    path = _checked_path(path, overwrite)
    reader, facts = _read(source)
    if facts["general.architecture"] != "llama" or "expert_count" in facts or facts.get("split.count", 1) > 1:
        raise ValueError(f"{source} holds a {facts['general.architecture']!r} model; drop_gguf takes one dense 'llama'")
    if DropPlan.from_json(facts.get("llmdrop.plan", "{}")):
        raise ValueError(f"{source} was dropped from before; apply the plan to the undropped file")
    plan = plan.for_depth(facts["block_count"])
    head = facts.get("attention.key_length", facts["embedding_length"] // facts["attention.head_count"])
    if "tokenizer.huggingface.json" not in facts:  # nobody can read a tokenizer out of a "deci" file
        facts["tokenizer.huggingface.json"] = read_tokenizer(source, facts).backend_tokenizer.to_str()
    if "llmdrop.config" not in facts and not _has_rope_table(reader):
        facts["llmdrop.config"] = _undropped_config(_foreign_config(source), plan.n_layers)
    return _write(path, plan, plan.n_layers, head, facts, _kept_tensors(reader, plan))


def _kept_tensors(reader: gguf.GGUFReader, plan: DropPlan) -> Tensors:
    kept = [i for i in range(plan.n_layers) if i not in plan.blocks]
    for tensor in reader.tensors:
        layer, name = _place(tensor.name)
        if layer is None:
            yield tensor.name, tensor.data, tensor.tensor_type
        elif not _is_gone(plan, layer, name):
            yield f"blk.{kept.index(layer)}.{name}", tensor.data, tensor.tensor_type


def load_gguf(path: str | os.PathLike, dtype: str = "float32", attn_implementation: str | None = None):
    """(model, tokenizer) from a GGUF with a Llama in it: ours, with the plan it was written with, or an undropped one.

    Weights are dequantized to `dtype`; "auto" is the file's own type, float32 where it is quantized. `load_model` calls
    this for paths that end in .gguf. Raises ValueError for other architectures, and for files whose plan is not
    recorded.
    """
    reader, facts = _read(path)
    if facts["general.architecture"] != "llama" and "llmdrop.plan" not in facts:
        raise ValueError(
            f"{path} holds a {facts['general.architecture']!r} model that llmdrop did not write; "
            "load_model reads 'llama' files and what save_model(..., format='gguf') wrote"
        )
    plan = DropPlan.from_json(facts.get("llmdrop.plan", json.dumps({"n_layers": facts["block_count"]})))
    head = int(facts.get("attention.key_length", facts["embedding_length"] // np.max(facts["attention.head_count"])))
    if "llmdrop.config" in facts:
        config = AutoConfig.for_model(**json.loads(facts["llmdrop.config"]))
    elif _has_rope_table(reader):
        raise ValueError(f"{path} scales rotary frequencies by a table; load the model from safetensors instead")
    else:
        config = _foreign_config(path)
    torch_dtype = getattr(torch, dtype) if dtype != "auto" else TYPES.get(facts.get("general.file_type"), torch.float32)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch_dtype, attn_implementation=attn_implementation)
    apply_plan(model, plan)
    kept = [i for i in range(plan.n_layers) if i not in plan.blocks]
    names = _names(model)
    state = {}
    biases = []
    for tensor in reader.tensors:
        name, _, what = tensor.name.rpartition(".")
        slot, rest = _place(tensor.name)
        if name == "rope_freqs" or (slot is not None and _is_gone(plan, kept[slot], rest)):  # zeros stand there
            continue
        if name not in names:
            raise ValueError(f"{path} holds {tensor.name}, which a Llama does not have; load_model reads Llamas")
        array = gguf.dequantize(tensor.data, tensor.tensor_type)
        if name.endswith(("attn_q", "attn_k")):
            array = _halves(array, head)
        state[f"{names[name]}.{what}"] = torch.tensor(array).to(torch_dtype)
        if what == "bias":
            biases.append((kept[slot], names[name].split(".", 3)[3]))
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    give_biases(ExitStack(), model, biases)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # its table is no part of the state; Mistral's is the same
    return model.eval(), read_tokenizer(path, facts)


def _has_rope_table(reader: gguf.GGUFReader) -> bool:
    return any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors)


def _foreign_config(path: str | os.PathLike):
    """The config of an undropped Llama in a file that llmdrop did not write."""
    return AutoConfig.from_pretrained(Path(path).parent, gguf_file=Path(path).name)


# -- the file ---------------------------------------------------------------------------------------------------------
def _write(path: Path, plan: DropPlan, n_layers: int, head: int, facts: dict, tensors: Tensors) -> Path:
    """Write all of it beside `path`, then rename. facts: keys of this architecture without its name before them."""
    if len(plan.attn) == len(plan.mlp) == n_layers:
        raise ValueError(f"the plan drops all {n_layers} attention and all {n_layers} MLP layers; keep at least one")
    kept = [i for i in range(n_layers) if i not in plan.blocks]
    arch = "llama" if plan.attn == plan.mlp else "deci"
    zeros = {}
    if arch == "deci":
        first_head = 1 if kept[0] in plan.attn else 0  # of zeros
        width = facts["embedding_length"]
        for key in ("attention.head_count", "attention.head_count_kv"):
            counts = [0 if i in plan.attn else int(facts[key]) for i in kept]
            facts = facts | {key: [first_head or counts[0], *counts[1:]]}
        lengths = [ZERO_WIDTH if i in plan.mlp else int(facts["feed_forward_length"]) for i in kept]
        facts = facts | {"feed_forward_length": lengths}
        if first_head:
            zeros |= {"blk.0.attn_norm": (width,), "blk.0.attn_output": (width, head)}
            zeros |= {f"blk.0.attn_{matrix}": (head, width) for matrix in "qkv"}
        for slot, i in enumerate(kept):
            if i in plan.mlp:
                zeros |= {f"blk.{slot}.ffn_norm": (width,), f"blk.{slot}.ffn_down": (width, ZERO_WIDTH)}
                zeros |= {f"blk.{slot}.ffn_{matrix}": (ZERO_WIDTH, width) for matrix in ("gate", "up")}
    facts = facts | {
        "block_count": len(kept),
        "attention.key_length": head,
        "attention.value_length": head,
        "llmdrop.plan": DropPlan(plan.attn, plan.mlp, n_layers).to_json(),
    }
    finished = path.with_name(f".{path.name}.finished")
    with new_directory(finished) as folder:  # for its lock, and because the next one removes what a killed one left
        writer = gguf.GGUFWriter(folder / path.name, arch, use_temp_file=True)  # tensors spool to disk, not in memory
        for key, value in facts.items():
            if key != "general.architecture" and value not in (None, []) and not key.startswith("GGUF."):
                known = key.startswith(("general.", "tokenizer.", "llmdrop."))
                _add(writer, key if known else f"{arch}.{key}", value)
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


def _add(writer: gguf.GGUFWriter, key: str, value) -> None:
    add = {bool: writer.add_bool, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    add.get(type(value), writer.add_uint32)(key, value)


def _checked_path(path: str | os.PathLike, overwrite: bool) -> Path:
    path = Path(path)
    if path.suffix != ".gguf":
        raise ValueError(f"{path} does not end in .gguf")
    check_file(path, overwrite, _is_ours)
    return path


def _is_ours(path: Path) -> bool:
    """Whether `_write` wrote this file."""
    try:
        return "llmdrop.plan" in _read(path)[1]
    except ValueError:
        return False


def _read(path: str | os.PathLike) -> tuple[gguf.GGUFReader, dict]:
    """A reader and the file's facts; those of its architecture without the name before them."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not there; expected a GGUF file")
    try:
        reader = gguf.GGUFReader(path)
        facts = {name: field.contents() for name, field in reader.fields.items()}
        arch = facts["general.architecture"]
    except (ValueError, KeyError, IndexError) as error:
        raise ValueError(f"{path} is not a readable GGUF file ({error}); copy or download it again") from error
    return reader, {name.removeprefix(f"{arch}."): value for name, value in facts.items()}


def _place(name: str) -> tuple[int | None, str]:
    """Of a tensor: "blk.3.attn_q.weight" -> (3, "attn_q.weight"), "output.weight" -> (None, "output.weight")."""
    if not name.startswith("blk."):
        return None, name
    _, layer, rest = name.split(".", 2)
    return int(layer), rest


def _is_gone(plan: DropPlan, layer: int, name: str) -> bool:
    """Whether the plan drops this tensor of a layer."""
    return layer in (plan.attn if name.startswith("attn_") else plan.mlp)


# -- weights ----------------------------------------------------------------------------------------------------------
def _encode(array: np.ndarray, kind: Kind) -> tuple[np.ndarray, Kind]:
    """A tensor as it stands in the file; vectors stay float32, rows that blocks do not divide float16."""
    if array.ndim == 1 or kind is Kind.F32:
        return array, Kind.F32
    if array.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] or kind is Kind.F16:
        return array.astype(np.float16), Kind.F16
    return gguf.quantize(array, kind), kind


def _interleaved(array: np.ndarray, head: int) -> np.ndarray:
    """Rows of Q or K [heads * head, C] from transformers' order (halves are rotated) to llama.cpp's (neighbors)."""
    return array.reshape(-1, 2, head // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _halves(array: np.ndarray, head: int) -> np.ndarray:
    """Inverse of `_interleaved`."""
    return array.reshape(-1, head // 2, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def rope_theta(config) -> float:
    """Base of the rotary embedding, wherever this version of transformers keeps it."""
    return (getattr(config, "rope_parameters", None) or {}).get("rope_theta") or config.rope_theta


def _rope_scaling(model, head: int) -> np.ndarray | None:
    """What each rotary frequency is divided by [head / 2], or None where it is not scaled (Llama 3.1 and later are)."""
    rotary = model.model.rotary_emb
    if getattr(rotary, "rope_type", "default") not in ("default", "llama3", "linear"):
        raise ValueError(f"rotary embeddings of type {rotary.rope_type!r} cannot be written as a table of factors")
    plain = rope_theta(model.config) ** (-np.arange(0, head, 2) / head)
    factors = plain / rotary.inv_freq.float().cpu().numpy()
    return None if np.allclose(factors, 1, atol=1e-4) else factors.astype(np.float32)
