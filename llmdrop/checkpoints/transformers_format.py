"""Write a dropped model for transformers, with or without llmdrop beside it.

Importing this file teaches transformers' own `save_pretrained` what a dropped model is, so that every checkpoint of one
is right, whoever calls it: Trainer, peft's merge-and-save, the user.
"""

import inspect
import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from .. import prune
from ..anatomy import RECORD, Anatomy, exclusive, find_anatomy
from ..proof import Gone, has_gone
from . import modeling_llmdrop
from .blocks import is_ordinary, renumber
from .destination import mark
from .modeling_llmdrop import merged

OURS = "llmdrop"  # model type of a checkpoint that stock classes must not read
# those that, dropped, also run in transformers before 4.56, if all their layers attend alike
IN_OLD_RELEASES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2")
stock_save_pretrained = getattr(PreTrainedModel.save_pretrained, "__wrapped__", PreTrainedModel.save_pretrained)


@wraps(stock_save_pretrained)
def _save_pretrained(self, save_directory, is_main_process=True, state_dict=None, *args, **kwargs):
    names = [] if state_dict is None else list(self.state_dict())
    with described(self):
        if state_dict is not None:  # has the names from before the model was numbered anew
            renamed = dict(zip(names, self.state_dict(), strict=True))
            state_dict = {renamed.get(name, name): tensor for name, tensor in state_dict.items()}
        return stock_save_pretrained(self, save_directory, is_main_process, state_dict, *args, **kwargs)


PreTrainedModel.save_pretrained = _save_pretrained


def write_hf(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write safetensors, config.json and tokenizer into `folder`, and the modeling file if the model needs one."""
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    if config["model_type"] != OURS:  # else `our_config` has done so
        config |= for_transformers_4(config, type(model.config))
    file.write_text(json.dumps(config | mark(), indent=2))


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

    A model that has only lost whole blocks is a shorter one of its architecture meanwhile, where it is one. Raises
    ValueError for a dropped model that `find_anatomy` does not know.
    """
    if not has_gone(model) and not any(hasattr(module, RECORD) for module in model.modules()):
        yield
        return
    parts = find_anatomy(model)
    config = model.config
    if type(config.get_text_config(decoder=True)) is not type(parts.decoder.config):
        raise ValueError(
            f"this {config.model_type!r} model holds a dropped {parts.decoder.config.model_type!r} model, and its "
            "config has no room to say so; save the dropped model by itself"
        )

    class Description(type(config)):
        _auto_class = None  # of a config class out of a checkpoint, whose file is written below

        def to_json_string(self, use_diff: bool = True, **kwargs) -> str:
            raw = json.loads(PretrainedConfig.to_json_string(self, use_diff, **kwargs))
            return json.dumps(our_config(raw, model, parts), indent=2, sort_keys=True) + "\n"

        def save_pretrained(self, folder, **kwargs) -> None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / "modeling_llmdrop.py").write_text(_modeling_file(config.model_type))
            super().save_pretrained(folder, **kwargs)

    with ExitStack() as undo:
        undo.enter_context(exclusive(parts.decoder))
        if is_ordinary(model) and "auto_map" not in vars(config):  # else it was made by a modeling_llmdrop.py
            renumber(undo, model)
            prune.put(undo, config, "llmdrop", record_of(find_anatomy(model)))  # for load_model
        else:
            prune.put(undo, config, "__class__", Description)
        yield


def record_of(parts: Anatomy) -> dict:
    """What config.json says of a dropped model: its depth before, the plan, biases that were added."""
    return getattr(parts.decoder, RECORD, {"n_layers": parts.n_layers} | parts.plan.key)


def our_config(config: dict, model: nn.Module, parts: Anatomy) -> dict:
    """The saved config with what is needed to take the same out of the stock model, unreadable for stock classes."""
    text = model.config.get_text_config(decoder=True)
    depth = text.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    undropped: dict = {depth: len(parts.layer_list)}
    refused: dict = {
        depth: f"{parts.n_layers} minus dropped ones: load with llmdrop.load_model or trust_remote_code=True"
    }
    for key in model.config.sub_configs:
        if getattr(model.config, key, None) is text:  # the text model's part of a multimodal config
            undropped = {key: undropped}
            refused = {key: refused}
    attend_alike = len(set(getattr(text, "layer_types", None) or ())) < 2
    has_attention = any(parts.live("attn"))
    record = record_of(parts) | {
        "undropped": undropped | {"model_type": model.config.model_type},
        "refused": refused | {"model_type": OURS},
        "in_old_releases": model.config.model_type in IN_OLD_RELEASES and attend_alike and has_attention,
    }
    record |= prune.placements(model, parts)
    if not record["matrices"] and not getattr(text, "is_heterogeneous", False):
        # The same in transformers' own words, for the release whose stock classes build layers from them. At the top of
        # the config they would mislead today's: those that read the depth there check them against it.
        skip = {"attention": parts.plan.attn, "mlp": parts.plan.mlp}
        skipped_in = {i: [part for part, layers in skip.items() if i in layers] for i in range(parts.n_layers)}
        record["per_layer_config"] = {str(i): {"skip": names} for i, names in skipped_in.items() if names}
    classes = auto_classes(model.config.model_type)
    auto_map = {auto: f"modeling_llmdrop.{stock}" for auto, stock in classes.items()}
    auto_map["AutoConfig"] = "modeling_llmdrop.DroppedConfig"
    config = config | for_transformers_4(config, CONFIG_MAPPING[model.config.model_type])
    return merged(config, record["refused"]) | {"auto_map": auto_map, "llmdrop": record}


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
    parts = (Gone, prune.TokenCount, prune.CacheCut, prune.is_old_release, prune.place, prune.zero_bias)
    own = "\n\n".join(map(inspect.getsource, parts))
    return f"{source[:start]}RECORD = {RECORD!r}\n\n\n{own}{source[end:]}"


def for_transformers_4(config: dict, kind: type[PretrainedConfig]) -> dict:
    """The rotary settings by their names before transformers 5, which would silently take its defaults.

    kind: the class that reads this config. Empty where it would take these names for other settings than the config's.
    """
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
    out = {key: value for key, value in out.items() if key not in config}
    if not out:
        return out
    try:
        is_same = _rope(kind, config | out) == _rope(kind, config)
    except (KeyError, ValueError, TypeError):
        is_same = False
    return out if is_same else {}


def _rope(kind: type[PretrainedConfig], config: dict) -> dict | None:
    """What a config class makes of the rotary settings in a config.json."""
    with tempfile.TemporaryDirectory() as folder:  # only from_json_file knows how infinity is written
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(config))
        return getattr(kind.from_json_file(file), "rope_parameters", None)
