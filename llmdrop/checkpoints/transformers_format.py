"""Write a dropped model for transformers, with or without llmdrop beside it."""

import inspect
import json
from contextlib import ExitStack
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .. import prune
from ..proof import Gone
from ..prune import placements
from . import modeling_llmdrop
from .blocks import is_ordinary, renumber
from .destination import mark

OURS = "llmdrop"  # model type of a checkpoint that stock classes must not read


def write_hf(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write safetensors, config.json and tokenizer into `folder`, and the modeling file if the model needs one."""
    ordinary = is_ordinary(model)
    with ExitStack() as undo:
        if ordinary:
            renumber(undo, model)
        save_weights_and_tokenizer(model, tokenizer, folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    if not ordinary and config["model_type"] != OURS:
        (folder / "modeling_llmdrop.py").write_text(_modeling_file(config["model_type"]))
        config = our_config(config, model)
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


def our_config(config: dict, model: nn.Module) -> dict:
    """The saved config with what is needed to take the same out of the stock model, unreadable for stock classes."""
    depth = model.config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    undropped = {"model_type": config["model_type"], depth: model.config.num_hidden_layers}
    stock, stock_config = stock_names(undropped["model_type"])
    changes = {
        "model_type": OURS,
        depth: f"{undropped[depth]} minus dropped ones: load with llmdrop.load_model or trust_remote_code=True",
        "auto_map": {
            "AutoConfig": f"modeling_llmdrop.{stock_config}",
            "AutoModelForCausalLM": f"modeling_llmdrop.{stock}",
        },
        "llmdrop": config["llmdrop"] | {"undropped": undropped, "depth": depth} | placements(model),
    }
    return config | changes


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
    parts = [Gone, prune.zero_bias, prune.EmptySlot, prune.TokenCount, prune.CacheCut, prune.renumber_attention]
    parts.append(prune.place)
    return source[:start].rstrip() + "\n\n\n" + "\n\n".join(map(inspect.getsource, parts)) + source[end:]


def for_transformers_4(config: dict) -> dict:
    """The rotary settings by their names before transformers 5, which would silently take its defaults."""
    rope = config.get("rope_parameters") or {}
    local = rope.get("sliding_attention") or {}
    rope = rope.get("full_attention", rope) or {}  # Beam has none in such layers
    out = {}
    if "rope_theta" in local:
        out["rope_local_base_freq"] = local["rope_theta"]
    if "rope_theta" in rope:
        out["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        out["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {key: value for key, value in out.items() if key not in config}
