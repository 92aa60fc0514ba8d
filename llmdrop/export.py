"""Write a dropped model for transformers without llmdrop, and for vLLM. (For llama.cpp: gguf_export.py.)"""

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from . import configuration_nemotron_nas, modeling_llmdrop, prune
from .anatomy import Anatomy, anatomy

OURS = "llmdrop"  # model type of a checkpoint that stock classes must not read
# a matrix to which a mean adds a bias: vLLM's switch for it, and the matrices that it then gives one in every layer
SWITCHES = {
    "self_attn.o_proj": ("attention_bias", (".o_proj",)),  # with qkv_bias off
    "mlp.down_proj": ("mlp_bias", (".gate_proj", ".up_proj", ".down_proj")),
}


def write_hf(model, tokenizer, folder: Path) -> None:
    """Write safetensors, config.json and tokenizer into the existing `folder`, and the modeling file if it needs one.

    What transformers 5 writes in a way that 4.50 would misread (the rotary base, the tokenizer's class) is written in
    both ways.
    """
    _save_pretrained(model, tokenizer, folder)
    parts, file = anatomy(model), folder / "config.json"
    config = json.loads(file.read_text())
    scaled = getattr(model.config, "scale_attn_by_inverse_layer_idx", False)  # GPT-2 with depth in its attention
    whole_blocks = set(parts.plan.attn) == set(parts.plan.mlp) and not (scaled and parts.plan)
    if (not whole_blocks or prune.given_biases(model.config)) and config["model_type"] != OURS:
        (folder / "modeling_llmdrop.py").write_text(_modeling_file(config["model_type"]))
        config = _our_config(config, parts)
    file.write_text(json.dumps(config | _for_transformers_4(config), indent=2))


def _save_pretrained(model, tokenizer, folder: Path) -> None:
    model.save_pretrained(folder)
    if tokenizer is None:
        return
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    if settings.get("tokenizer_class") == "TokenizersBackend":  # transformers 5's name, where the old one works too
        file.write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2))


def _our_config(config: dict, parts: Anatomy) -> dict:
    """The saved config with what is needed to rebuild the undropped skeleton, unreadable for stock classes."""
    depth = next(key for key in ("num_hidden_layers", "n_layer") if key in config)
    undropped = {"model_type": config["model_type"], depth: parts.n_layers}
    remaining = config.pop("layer_types", None)  # of the layers that are left; the type of a removed one has no effect
    if remaining:
        types = iter(remaining)
        undropped["layer_types"] = [remaining[0] if layer is None else next(types) for layer in parts.layers]
    refused = f"{parts.n_layers} minus dropped ones: load with llmdrop.load_model or trust_remote_code=True"
    record = {"undropped": undropped, "depth": depth, "layers": parts.layers_name, "layout": asdict(parts.layout)}
    stock, stock_config = stock_names(undropped["model_type"])
    auto_map = {
        "AutoConfig": f"modeling_llmdrop.{stock_config}",
        "AutoModelForCausalLM": f"modeling_llmdrop.{stock}",
    }
    return config | {"model_type": OURS, depth: refused, "auto_map": auto_map, "llmdrop": config["llmdrop"] | record}


def stock_names(model_type: str) -> tuple[str, str]:
    """Names of the stock model and config class of a model type."""
    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type], CONFIG_MAPPING_NAMES[model_type]


def _modeling_file(model_type: str) -> str:
    """modeling_llmdrop.py for one architecture: it subclasses that stock class, and needs no llmdrop."""
    stock, stock_config = stock_names(model_type)
    source = inspect.getsource(modeling_llmdrop)
    source = source.replace("LlamaForCausalLM", stock).replace("LlamaConfig", stock_config)
    start = source.index("# in a checkpoint these stand here themselves")
    parts = (prune.stub_sublayer, prune.add_bias, prune.NoAttention, prune.NoMLP, prune.TokenCount, prune.CacheCut)
    end = source.index("\n", source.index("from llmdrop.prune import")) + 1
    return source[:start].rstrip() + "\n\n\n" + "\n\n".join(map(inspect.getsource, parts)) + source[end:]


def _for_transformers_4(config: dict) -> dict:
    """The rotary settings by their names before transformers 5, which would silently take its defaults."""
    rope = config.get("rope_parameters") or {}
    local = rope.get("sliding_attention") or {}
    rope = rope.get("full_attention", rope)
    out = {"rope_local_base_freq": local["rope_theta"]} if "rope_theta" in local else {}
    if "rope_theta" in rope:
        out["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        out["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {key: value for key, value in out.items() if key not in config}


def write_nemotron_nas(model, tokenizer, folder: Path) -> None:
    """Write a Llama or Mistral into the existing `folder` for engines that have DeciLMForCausalLM: vLLM, and SGLang.

    Weights keep their Llama names; config.json says layer by layer what is there. Serve it with `python -m
    vllm.entrypoints.openai.api_server --model folder` where llmdrop is installed (it registers the config), else with
    --trust-remote-code (the config file is beside the weights). A model with biases that a mean added is for vLLM
    alone: the others have no place for them and would skip them in silence, but for an MLP width that they cannot read.
    Raises ValueError for what the engine cannot run: other architectures, mixed dtypes, no attention in the first layer
    that is left.
    """
    check_llama(model, "nemotron-nas")
    parts, config = anatomy(model), model.config
    biased = [SWITCHES[name] for name in sorted({name for _, name in prune.given_biases(config)})]
    kept = [i for i in range(parts.n_layers) if i not in parts.plan.blocks]
    if kept[0] in parts.plan.attn:
        raise ValueError(
            f"layer {kept[0]} would be the first and has no attention: vLLM loads that and fails at the first request. "
            f"Keep that attention, drop the whole block (attn and mlp of {kept[0]}), or use format='gguf'"
        )
    with _zeros_beside(model, tuple(ending for _, endings in biased for ending in endings)):
        _save_pretrained(model, tokenizer, folder)
    file = folder / "config.json"
    written = json.loads(file.read_text())
    record = _our_config(dict(written) | {"llmdrop": written.get("llmdrop") or _record(parts)}, parts)["llmdrop"]
    grouped = config.num_attention_heads // config.num_key_value_heads
    blocks = [_block(i in parts.plan.attn, i in parts.plan.mlp, grouped, config, bool(biased)) for i in kept]
    written |= {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {"AutoConfig": "configuration_nemotron_nas.NemotronNASConfig"},
        "block_configs": blocks,
        "llmdrop": record,
        "max_position_embeddings": attended(config),
    }
    if biased:
        record["undropped"] |= {switch: False for switch, _ in SWITCHES.values()}  # load_model adds the record's
        written |= {"qkv_bias": False} | {switch: True for switch, _ in biased}
    for key in ("sliding_window", "layer_types"):
        written.pop(key, None)
    file.write_text(json.dumps(written | _for_transformers_4(written), indent=2))
    (folder / "configuration_nemotron_nas.py").write_text(inspect.getsource(configuration_nemotron_nas))


@contextmanager
def _zeros_beside(model, endings: tuple[str, ...]) -> Iterator[None]:
    """For the length of a `with` block no matrix of these names lacks a bias: vLLM would take what is in memory."""
    matrices = [module for name, module in model.named_modules() if name.endswith(endings) and module.bias is None]
    undo = [prune.add_bias(matrix) for matrix in matrices]
    try:
        yield
    finally:
        for owner, name, value in undo:
            setattr(owner, name, value)


def _record(parts: Anatomy) -> dict:
    return {"n_layers": parts.n_layers, "attn": list(parts.plan.attn), "mlp": list(parts.plan.mlp)}


def _block(no_attn: bool, no_mlp: bool, grouped: int, config, biased: bool) -> dict:
    """One entry of block_configs. Engines take an MLP's width as 2 * ffn_mult * hidden / 3, rounded up to 256."""
    attention = {"no_op": no_attn, "replace_with_linear": False, "n_heads_in_group": None if no_attn else grouped}
    ffn = {"no_op": no_mlp, "replace_with_linear": False, "ffn_mult": None}
    if not no_mlp and (biased or config.intermediate_size % 256):
        del ffn["ffn_mult"]  # vLLM then reads the width itself; other engines stop, and cannot have this model
        ffn["intermediate_size"] = config.intermediate_size
    elif not no_mlp:
        ffn["ffn_mult"] = 1.5 * config.intermediate_size / config.hidden_size
    return {"attention": attention, "ffn": ffn}


def check_llama(model, format: str) -> None:
    """Raise ValueError unless the model is a Llama in all that the engines assume, in one floating-point type."""
    config, dtypes = model.config, {p.dtype for p in model.parameters()}
    if config.model_type not in ("llama", "mistral"):
        raise ValueError(
            f"format={format!r} holds Llama's architecture, so llama and mistral models, not {config.model_type!r}; "
            "format='hf' holds every model that llmdrop knows"
        )
    if len(dtypes) > 1 or not next(iter(dtypes)).is_floating_point:
        raise ValueError(f"the weights are of mixed or integer types {sorted(map(str, dtypes))}; use model.to(...)")
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False) or config.hidden_act != "silu":
        raise ValueError(
            f"format={format!r} has no biases and no activation but SiLU; this model has attention_bias="
            f"{config.attention_bias}, mlp_bias={config.mlp_bias}, hidden_act={config.hidden_act!r}. Use format='hf'"
        )


def attended(config) -> int:
    """The context within which full attention is the model's own: of a sliding window, its length."""
    return min(
        config.max_position_embeddings, getattr(config, "sliding_window", None) or config.max_position_embeddings
    )
