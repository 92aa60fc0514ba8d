"""Write a dropped model for transformers, with or without llmdrop beside it.

Importing this file teaches transformers' own `save_pretrained` what a dropped model is, so that every checkpoint of one
is right, whoever writes it: Trainer, peft's merge-and-save, accelerate, the user.
"""

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import wraps
from pathlib import Path

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from .. import prune
from ..anatomy import RECORD, Anatomy, find_anatomy
from . import modeling_llmdrop
from .destination import mark
from .modeling_llmdrop import merged

OURS = "llmdrop"  # model type of a checkpoint that stock classes must not read
stock_save_pretrained = getattr(PreTrainedModel.save_pretrained, "__wrapped__", PreTrainedModel.save_pretrained)


@wraps(stock_save_pretrained)
def _save_pretrained(self, *args, **kwargs):
    with described(self):
        return stock_save_pretrained(self, *args, **kwargs)


PreTrainedModel.save_pretrained = _save_pretrained


def write_hf(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write safetensors, config.json and tokenizer into `folder`, and the modeling file if the model needs one."""
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    parts = find_anatomy(model)
    if parts.plan and "llmdrop" not in config:  # whole blocks: for load_model, which counts as in the undropped model
        config["llmdrop"] = record_of(parts)
    file.write_text(json.dumps(config | for_transformers_4(config) | mark(), indent=2))


def save_tokenizer(tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """`save_pretrained` of the tokenizer, its class by a name that transformers 4 knows; None writes nothing."""
    if tokenizer is None:
        return
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    if settings.get("tokenizer_class") == "TokenizersBackend":  # transformers 5's name, where the old one works too
        file.write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2))


@contextmanager
def described(model: nn.Module) -> Iterator[None]:
    """While it lasts, the model's config is written as that of what is left, with the modeling file beside it.

    Nothing changes for a model that is whole, or that has only lost whole blocks: it is an ordinary checkpoint. Raises
    ValueError for a dropped model that `find_anatomy` does not know.
    """
    if not any(hasattr(module, RECORD) for module in model.modules()):
        yield
        return
    parts = find_anatomy(model)
    if is_ordinary(model, parts):
        yield
        return
    config = model.config

    class Description(type(config)):
        _auto_class = None  # of a config class out of a checkpoint, whose file is written below

        def to_json_string(self, use_diff: bool = True, **kwargs) -> str:
            raw = json.loads(PretrainedConfig.to_json_string(self, use_diff, **kwargs))
            return json.dumps(our_config(raw, model, parts), indent=2, sort_keys=True) + "\n"

        def save_pretrained(self, folder, **kwargs) -> None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / "modeling_llmdrop.py").write_text(_modeling_file(config.model_type))
            super().save_pretrained(folder, **kwargs)

    former = type(config)
    config.__class__ = Description
    try:
        yield
    finally:
        config.__class__ = former


def is_ordinary(model: nn.Module, parts: Anatomy) -> bool:
    """Whether stock classes can hold what is left: a whole model, or one that has only lost whole blocks."""
    scaled = getattr(model.config, "scale_attn_by_inverse_layer_idx", False)  # GPT-2 with depth in its attention
    whole_blocks = parts.plan.attn == parts.plan.mlp and not (scaled and parts.plan)
    has_own_file = "undropped" in (getattr(model.config, "llmdrop", None) or {})  # made by a modeling_llmdrop.py
    return whole_blocks and not has_own_file and not prune.given_biases(parts)


def record_of(parts: Anatomy) -> dict:
    """What config.json says of a dropped model: its depth before, the plan, biases that were added."""
    record = {"n_layers": parts.n_layers} | parts.plan.key
    biases = prune.given_biases(parts)
    return record | {"biases": biases} if biases else record


def our_config(config: dict, model: nn.Module, parts: Anatomy) -> dict:
    """The saved config with what is needed to rebuild the undropped skeleton, unreadable for stock classes."""
    text = model.config.get_text_config()
    depth = text.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    undropped = {depth: parts.n_layers}
    if getattr(text, "layer_types", None):  # of the layers that are left; the type of a removed one has no effect
        types = iter(text.layer_types)
        undropped["layer_types"] = [text.layer_types[0] if layer is None else next(types) for layer in parts.layers]
    refused = {depth: f"{parts.n_layers} minus dropped ones: load with llmdrop.load_model or trust_remote_code=True"}
    for key in model.config.sub_configs:
        if getattr(model.config, key, None) is text:  # the text model's part of a multimodal config
            undropped = {key: undropped}
            refused = {key: refused}
    decoder = next(name for name, module in model.base_model.named_modules() if module is parts.decoder)
    record = record_of(parts) | {
        "undropped": undropped | {"model_type": model.config.model_type},
        "refused": refused | {"model_type": OURS},
        "decoder": decoder,
        "layers": parts.layers_name,
        "layout": asdict(parts.layout),
    }
    classes = auto_classes(model.config.model_type)
    auto_map = {auto: f"modeling_llmdrop.{stock}" for auto, stock in classes.items()}
    auto_map["AutoConfig"] = "modeling_llmdrop.DroppedConfig"
    return merged(config | for_transformers_4(config), record["refused"]) | {"auto_map": auto_map, "llmdrop": record}


def auto_classes(model_type: str) -> dict[str, str]:
    """{name of an Auto class: name of the stock class that it makes} for every Auto class that has this model type."""
    classes = {}
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None) if isinstance(auto, type) else None
        if mapping is not None and model_type in mapping._model_mapping:
            classes[name] = mapping._model_mapping[model_type]
    return classes


def _modeling_file(model_type: str) -> str:
    """modeling_llmdrop.py for one architecture: it subclasses its stock classes, and needs no llmdrop."""
    classes = tuple(dict.fromkeys(auto_classes(model_type).values()))
    source = inspect.getsource(modeling_llmdrop)
    source = source.replace('("LlamaModel", "LlamaForCausalLM")', repr(classes))
    source = source.replace("transformers.LlamaConfig", f"transformers.{CONFIG_MAPPING_NAMES[model_type]}")
    start = source.index("# in a checkpoint these stand here themselves")
    end = source.index("\n", source.index("from llmdrop.prune import")) + 1
    parts = (prune.stubs, prune.zero_bias, prune.NoAttention, prune.NoMLP, prune.TokenCount, prune.CacheCut)
    own = "\n\n".join(map(inspect.getsource, (*parts, prune.text_configs)))
    return f"{source[:start]}RECORD = {RECORD!r}\n\n\n{own}{source[end:]}"


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
