"""Write a dropped model for transformers, with or without llmdrop beside it."""

import inspect
import json
from dataclasses import asdict
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .. import prune
from ..anatomy import Anatomy, find_anatomy
from . import modeling_llmdrop
from .destination import mark

OURS = "llmdrop"  # model type of a checkpoint that stock classes must not read


def write_hf(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write safetensors, config.json and tokenizer into `folder`, and the modeling file if the model needs one."""
    save_weights_and_tokenizer(model, tokenizer, folder)
    parts = find_anatomy(model)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    scaled = getattr(model.config, "scale_attn_by_inverse_layer_idx", False)  # GPT-2 with depth in its attention
    whole_blocks = parts.plan.attn == parts.plan.mlp and not (scaled and parts.plan)
    if (not whole_blocks or prune.given_biases(model.config)) and config["model_type"] != OURS:
        (folder / "modeling_llmdrop.py").write_text(_modeling_file(config["model_type"]))
        config = our_config(config, parts)
    file.write_text(json.dumps(config | for_transformers_4(config) | mark(), indent=2))


def save_weights_and_tokenizer(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """`save_pretrained` of both, the tokenizer's class by a name that transformers 4 knows; tokenizer may be None."""
    model.save_pretrained(folder)
    if tokenizer is None:
        return
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    if settings.get("tokenizer_class") == "TokenizersBackend":  # transformers 5's name, where the old one works too
        file.write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2))


def our_config(config: dict, parts: Anatomy) -> dict:
    """The saved config with what is needed to rebuild the undropped skeleton, unreadable for stock classes."""
    depth = next(key for key in ("num_hidden_layers", "n_layer") if key in config)
    undropped = {"model_type": config["model_type"], depth: parts.n_layers}
    remaining = config.get("layer_types")  # of the layers that are left; the type of a removed one has no effect
    if remaining:
        types = iter(remaining)
        undropped["layer_types"] = [remaining[0] if layer is None else next(types) for layer in parts.layers]
    record = {"undropped": undropped, "depth": depth, "layers": parts.layers_name, "layout": asdict(parts.layout)}
    stock, stock_config = stock_names(undropped["model_type"])
    changes = {
        "model_type": OURS,
        depth: f"{parts.n_layers} minus dropped ones: load with llmdrop.load_model or trust_remote_code=True",
        "auto_map": {
            "AutoConfig": f"modeling_llmdrop.{stock_config}",
            "AutoModelForCausalLM": f"modeling_llmdrop.{stock}",
        },
        "llmdrop": config["llmdrop"] | record,
    }
    return {key: value for key, value in config.items() if key != "layer_types"} | changes


def stock_names(model_type: str) -> tuple[str, str]:
    """Names of the stock model and config class of a model type."""
    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type], CONFIG_MAPPING_NAMES[model_type]


def _modeling_file(model_type: str) -> str:
    """modeling_llmdrop.py for one architecture: it subclasses that stock class, and needs no llmdrop."""
    stock, stock_config = stock_names(model_type)
    source = inspect.getsource(modeling_llmdrop)
    source = source.replace("LlamaForCausalLM", stock).replace("LlamaConfig", stock_config)
    start = source.index("# in a checkpoint these stand here themselves")
    end = source.index("\n", source.index("from llmdrop.prune import")) + 1
    parts = (prune.stubs, prune.zero_bias, prune.NoAttention, prune.NoMLP, prune.TokenCount, prune.CacheCut)
    return source[:start].rstrip() + "\n\n\n" + "\n\n".join(map(inspect.getsource, parts)) + source[end:]


def for_transformers_4(config: dict) -> dict:
    """The rotary settings by their names before transformers 5, which would silently take its defaults."""
    rope = config.get("rope_parameters") or {}
    local = rope.get("sliding_attention") or {}
    rope = rope.get("full_attention", rope)
    out = {}
    if "rope_theta" in local:
        out["rope_local_base_freq"] = local["rope_theta"]
    if "rope_theta" in rope:
        out["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        out["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {key: value for key, value in out.items() if key not in config}
