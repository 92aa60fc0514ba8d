"""Dropped models for llama.cpp (Ollama, LM Studio): write a GGUF from a model or from another GGUF, and read it back.

llama.cpp runs layers of different shapes by its architecture "deci": head counts and feed-forward lengths are arrays,
one entry per layer. What this engine cannot do is written exactly, in another way:

    both sublayers dropped     the block is gone and later ones move up (blocks only: an ordinary "llama" file)
    MLP dropped                an MLP of width 32, all zeros: a length of 0 would silently lose that layer's attention
    first attention dropped    one head, all zeros: the engine reads cache facts off its first layer
"""

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from .anatomy import anatomy
from .export import attended, check_llama
from .gguf_tokenizer import read_tokenizer, tokenizer_facts
from .plan import DropPlan
from .prune import apply_plan, give_biases

WEIGHTS = {"f32": Kind.F32, "f16": Kind.F16, "bf16": Kind.BF16, "q8_0": Kind.Q8_0, "q4_0": Kind.Q4_0, "q4_1": Kind.Q4_1}
ZERO_WIDTH = 32  # of an MLP that is not there; one quantisation block
# <name> and its place in a Llama; blk.N.<name> and its place in a layer
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ATTN = {"attn_norm": "input_layernorm"} | {f"attn_{k}": f"self_attn.{k}_proj" for k in "qkv"}
ATTN |= {"attn_output": "self_attn.o_proj"}
MLP = {"ffn_norm": "post_attention_layernorm"} | {f"ffn_{k}": f"mlp.{k}_proj" for k in ("gate", "up", "down")}


def write_gguf(model, tokenizer, path: str | os.PathLike, weights: str = "f16", overwrite: bool = False) -> Path:
    """Write a Llama or Mistral model, dropped or not, with its tokenizer and chat template, as one GGUF file.

    weights: "f32", "f16", "bf16", "q8_0", "q4_0" or "q4_1", quantised by the gguf package; then embedding and output
    stay at 8 bits. Norms, and biases that a mean added, are float32, as the engine wants them. The plan is recorded and
    `load_model(path)` finds it.
    Raises ValueError for other architectures, mixed dtypes, tokenizers that llama.cpp has no form for and numbers
    beyond float16; FileExistsError if `path` exists (overwrite=True replaces it).
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights!r} is not one of {', '.join(WEIGHTS)}")
    check_llama(model, "gguf")
    kind, parts, config = WEIGHTS[weights], anatomy(model), model.config
    state = model.state_dict()
    peak = max(float(t.abs().max()) for t in state.values())
    if not np.isfinite(peak) or (kind is Kind.F16 and peak > 65504):
        raise ValueError(f"the largest weight is {peak}; float16 ends at 65504: use weights='bf16' or 'f32'")
    head = config.hidden_size // config.num_attention_heads if config.head_dim is None else config.head_dim
    undropped = json.loads(config.to_json_string(use_diff=False)) | {"num_hidden_layers": parts.n_layers}
    for key in ("llmdrop", "layer_types", "transformers_version", "architectures", "auto_map", "dtype"):
        undropped.pop(key, None)
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
        "llmdrop.config": json.dumps(undropped),
    }
    facts |= tokenizer_facts(tokenizer, config.vocab_size)

    def tensors():
        for name, key in OUTER.items():
            if name != "output" or not config.tie_word_embeddings:
                large = Kind.Q8_0 if "q" in weights else kind  # the two large ones cost little and matter most
                yield f"{name}.weight", *_encode(state[f"{key}.weight"].float().numpy(), large)
        scaling = _rope_scaling(model, head)
        if scaling is not None:
            yield "rope_freqs.weight", scaling, Kind.F32
        for slot, i in enumerate(i for i in range(parts.n_layers) if i not in parts.plan.blocks):
            present = ({} if i in parts.plan.attn else ATTN) | ({} if i in parts.plan.mlp else MLP)
            for name, key in present.items():
                for what in ("weight", "bias"):
                    tensor = state.get(f"model.layers.{slot}.{key}.{what}")
                    if tensor is not None:
                        tensor = tensor.float().numpy()
                        tensor = _interleaved(tensor, head) if name in ("attn_q", "attn_k") else tensor
                        yield f"blk.{i}.{name}.{what}", *_encode(tensor, kind)

    return _write(path, parts.plan, parts.n_layers, head, facts, tensors(), overwrite)


def drop_gguf(source: str | os.PathLike, plan: DropPlan, path: str | os.PathLike, overwrite: bool = False) -> Path:
    """Apply a plan to a Llama GGUF, whatever its quantisation: what stays is copied byte for byte.

    Raises ValueError for other architectures, split files, files that were dropped from before and plans for another
    depth; FileExistsError if `path` exists (overwrite=True replaces it).
    """
    reader, facts = _read(source)
    if facts["general.architecture"] != "llama" or "expert_count" in facts or facts.get("split.count", 1) > 1:
        raise ValueError(f"{source} holds a {facts['general.architecture']!r} model; drop_gguf takes one dense 'llama'")
    if DropPlan.from_json(facts.get("llmdrop.plan", "{}")):
        raise ValueError(f"{source} was dropped from before; apply the plan to the undropped file")
    n_layers = facts["block_count"]
    if plan.n_layers not in (None, n_layers):
        raise ValueError(f"this plan was made for {plan.n_layers} layers, {source} has {n_layers}")
    plan = DropPlan(plan.attn, plan.mlp, n_layers)
    head = facts.get("attention.key_length", facts["embedding_length"] // facts["attention.head_count"])
    if "tokenizer.huggingface.json" not in facts:  # nobody can read a tokenizer out of a "deci" file
        facts["tokenizer.huggingface.json"] = read_tokenizer(source, facts).backend_tokenizer.to_str()

    def tensors():
        for tensor in reader.tensors:
            layer, name, _ = _place(tensor.name)
            if not (name in ATTN and layer in plan.attn) and not (name in MLP and layer in plan.mlp):
                yield tensor.name, tensor.data, tensor.tensor_type

    return _write(path, plan, n_layers, head, facts, tensors(), overwrite)


def load_gguf(path: str | os.PathLike, dtype: str = "float32"):
    """(model, tokenizer) from a GGUF with a Llama in it: ours, with the plan it was written with, or an undropped one.

    Weights are dequantised to `dtype`. `load_model` calls this for paths that end in .gguf. Raises ValueError for
    other architectures, and for files whose plan is not recorded.
    """
    reader, facts = _read(path)
    record = json.loads(facts.get("llmdrop.plan", "null"))
    if facts["general.architecture"] != "llama" and not record:
        raise ValueError(
            f"{path} holds a {facts['general.architecture']!r} model that llmdrop did not write; "
            "load_model reads 'llama' files and what save_model(..., format='gguf') wrote"
        )
    plan = DropPlan(**record) if record else DropPlan((), (), facts["block_count"])
    head = facts.get("attention.key_length", facts["embedding_length"] // np.max(facts["attention.head_count"]))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "llmdrop.config" in facts:
        config = AutoConfig.for_model(**json.loads(facts["llmdrop.config"]))
    elif "rope_freqs.weight" in tensors:
        raise ValueError(f"{path} scales rotary frequencies by a table; load the model from safetensors instead")
    else:
        config = AutoConfig.for_model(
            "llama",
            hidden_size=facts["embedding_length"],
            intermediate_size=int(np.max(facts["feed_forward_length"])),
            num_hidden_layers=plan.n_layers,
            num_attention_heads=int(np.max(facts["attention.head_count"])),
            num_key_value_heads=int(np.max(facts["attention.head_count_kv"])),
            head_dim=int(head),
            max_position_embeddings=facts["context_length"],
            rms_norm_eps=facts["attention.layer_norm_rms_epsilon"],
            rope_parameters={"rope_type": "default", "rope_theta": facts.get("rope.freq_base", 10000.0)},
            vocab_size=tensors["token_embd.weight"].shape[1].item(),
            tie_word_embeddings="output.weight" not in tensors,
            bos_token_id=facts.get("tokenizer.ggml.bos_token_id"),
            eos_token_id=facts.get("tokenizer.ggml.eos_token_id"),
            pad_token_id=facts.get("tokenizer.ggml.padding_token_id"),
        )
    with torch.device("meta"):
        model = apply_plan(AutoModelForCausalLM.from_config(config), plan)
    kept = [i for i in range(plan.n_layers) if i not in plan.blocks]
    state, biases = {}, []
    for tensor in tensors.values():
        slot, name, what = _place(tensor.name)
        if slot is None:
            key = OUTER.get(name)
        else:
            gone = (name in ATTN and kept[slot] in plan.attn) or (name in MLP and kept[slot] in plan.mlp)
            key = None if gone else f"model.layers.{slot}.{(ATTN | MLP)[name]}"
            biases += [(kept[slot], (ATTN | MLP)[name])] if key and what == "bias" else []
        if key:
            array = gguf.dequantize(tensor.data, tensor.tensor_type)
            array = _halves(array, head) if name in ("attn_q", "attn_k") else array
            state[f"{key}.{what}"] = torch.tensor(array).to(getattr(torch, dtype))
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    give_biases(model, biases)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # its table is no part of the state; Mistral's is the same
    return model.eval(), read_tokenizer(path, facts)


# -- the file ---------------------------------------------------------------------------------------------------------
def _write(path, plan: DropPlan, n_layers: int, head: int, facts: dict, tensors: Iterator, overwrite: bool) -> Path:
    """Write all of it beside `path`, then rename. facts: keys of this architecture without its name before them."""
    path = Path(path)
    if path.suffix != ".gguf":
        raise ValueError(f"{path} does not end in .gguf")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another path, or overwrite=True")
    if len(plan.attn) == len(plan.mlp) == n_layers:
        raise ValueError(f"the plan drops all {n_layers} attention and all {n_layers} MLP layers; keep at least one")
    kept = [i for i in range(n_layers) if i not in plan.blocks]
    arch = "llama" if plan.attn == plan.mlp else "deci"
    width, zeros = facts["embedding_length"], {}
    if arch == "deci":
        first = 1 if kept[0] in plan.attn else 0  # heads of zeros in the first layer
        for key in ("attention.head_count", "attention.head_count_kv"):
            counts = [0 if i in plan.attn else int(facts[key]) for i in kept]
            facts = facts | {key: [first or counts[0], *counts[1:]]}
        lengths = [ZERO_WIDTH if i in plan.mlp else int(facts["feed_forward_length"]) for i in kept]
        facts = facts | {"feed_forward_length": lengths}
        if first:
            zeros |= {"blk.0.attn_norm": (width,), "blk.0.attn_output": (width, head)}
            zeros |= {f"blk.0.attn_{k}": (head, width) for k in "qkv"}
        for slot in (slot for slot, i in enumerate(kept) if i in plan.mlp):
            zeros |= {f"blk.{slot}.ffn_norm": (width,), f"blk.{slot}.ffn_down": (width, ZERO_WIDTH)}
            zeros |= {f"blk.{slot}.ffn_{k}": (ZERO_WIDTH, width) for k in ("gate", "up")}
    facts = facts | {"block_count": len(kept), "attention.key_length": head, "attention.value_length": head}
    facts = facts | {"llmdrop.plan": json.dumps(json.loads(plan.to_json()) | {"n_layers": n_layers})}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    os.close(handle)
    try:
        writer = gguf.GGUFWriter(temporary, arch, use_temp_file=True)  # tensors spool to disk, not all in memory
        for key, value in facts.items():
            if key != "general.architecture" and value not in (None, []) and not key.startswith("GGUF."):
                known = key.startswith(("general.", "tokenizer.", "llmdrop."))
                _add(writer, key if known else f"{arch}.{key}", value)
        for name, array, kind in tensors:
            layer, rest, what = _place(name)
            name = name if layer is None else f"blk.{kept.index(layer)}.{rest}.{what}"
            writer.add_tensor(name, np.ascontiguousarray(array), raw_dtype=kind)
        for name, shape in zeros.items():
            kind = np.float32 if len(shape) == 1 else np.float16
            writer.add_tensor(f"{name}.weight", np.zeros(shape, kind))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def _add(writer: gguf.GGUFWriter, key: str, value) -> None:
    add = {bool: writer.add_bool, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    add.get(type(value), writer.add_uint32)(key, value)


def _read(path) -> tuple[gguf.GGUFReader, dict]:
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


def _place(name: str) -> tuple[int | None, str, str]:
    """Of a tensor: "blk.3.attn_q.weight" -> (3, "attn_q", "weight"), "output.weight" -> (None, "output", "weight")."""
    *place, what = name.split(".")
    return (int(place[1]), ".".join(place[2:]), what) if place[0] == "blk" else (None, ".".join(place), what)


# -- weights ----------------------------------------------------------------------------------------------------------
def _encode(array: np.ndarray, kind: Kind) -> tuple[np.ndarray, Kind]:
    """A tensor as it stands in the file; vectors stay float32, rows that blocks do not divide float16."""
    if array.ndim == 1 or kind is Kind.F32:
        return array, Kind.F32
    if array.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] or kind is Kind.F16:
        return array.astype(np.float16), Kind.F16
    return gguf.quantize(array, kind), kind


def _interleaved(array: np.ndarray, head: int) -> np.ndarray:
    """Rows of Q or K [heads * head, C] from transformers' order (halves are rotated) to llama.cpp's (neighbours)."""
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
