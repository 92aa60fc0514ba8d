"""A dropped model for transformers alone: AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).

llmdrop puts this file into checkpoints, made for their architecture; every Auto class that has the architecture finds
its class here. That builds the stock model of the undropped depth, takes out what config.json's "llmdrop" lists and
makes room for the biases that it lists; then weights are loaded. transformers 4.50 or later.
"""

from __future__ import annotations

import copy
import inspect
import json
from types import SimpleNamespace

import torch  # noqa: F401
import transformers
from torch import nn
from transformers.cache_utils import DynamicCache

try:
    from transformers.cache_utils import DynamicLayer
except ImportError:  # before 4.54
    DynamicLayer = object

# in a checkpoint these stand here themselves
from llmdrop.anatomy import RECORD
from llmdrop.prune import CacheCut, NoAttention, NoMLP, TokenCount, stubs, text_configs, zero_bias  # noqa: F401

StockConfig = transformers.LlamaConfig
CLASSES = ("LlamaModel", "LlamaForCausalLM")


def merged(settings: dict, changes: dict) -> dict:
    """`settings` with `changes`, those of a part of it (as text_config) inside of that part."""
    nested = {key: merged(settings.get(key) or {}, value) for key, value in changes.items() if isinstance(value, dict)}
    return settings | changes | nested


class DroppedConfig(StockConfig):
    """The undropped model's config in memory; on disk one that stock classes refuse."""

    @classmethod
    def get_config_dict(cls, *args, **kwargs):
        raw, rest = super().get_config_dict(*args, **kwargs)
        raw.pop("llmdrop_written", None)  # who wrote the file, which is not the model's
        return merged(raw, raw.get("llmdrop", {}).get("undropped", {})), rest

    def to_json_string(self, use_diff: bool = True) -> str:
        raw = json.loads(super().to_json_string(use_diff))
        return json.dumps(merged(raw, raw.get("llmdrop", {}).get("refused", {})), indent=2, sort_keys=True) + "\n"


class Dropped:
    """A stock model without the sublayers, and with the biases, that its config's record lists."""

    def __init__(self, config, *args, **kwargs):
        config = copy.deepcopy(config)  # it is about to say what is left
        _set(config, config.llmdrop["undropped"])
        auto_map = vars(config).pop("auto_map", None)
        config.__class__ = StockConfig  # heads make their decoder by Auto classes, which know this one
        super().__init__(config, *args, **kwargs)
        config.__class__ = DroppedConfig
        config.auto_map = auto_map
        _drop(self, config.llmdrop)

    @classmethod
    def is_custom_code(cls) -> bool:
        return False  # as far as weights go: they have the stock names, and need the stock renamings


def __getattr__(name: str):
    if name not in CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not hasattr(transformers, name):
        raise ImportError(f"transformers {transformers.__version__} has no {name}; a later release does")
    made = type(name, (Dropped, getattr(transformers, name)), {"config_class": DroppedConfig, "__module__": __name__})
    return globals().setdefault(name, made)


def _set(config, settings: dict) -> None:
    for key, value in settings.items():
        if isinstance(value, dict):
            _set(getattr(config, key), value)
        elif key != "model_type":
            setattr(config, key, value)


def _drop(model: nn.Module, record: dict) -> None:
    layout = SimpleNamespace(**record["layout"])
    attn = set(record["attn"])
    mlp = set(record["mlp"])
    decoder = model.base_model.get_submodule(record["decoder"])
    layers = getattr(decoder, record["layers"])
    configs = text_configs(model, SimpleNamespace(decoder=decoder))
    # before 4.56 caches grow as layers use them; some models and mixed windows have caches of other kinds there
    legacy = "config" not in inspect.signature(DynamicCache.__init__).parameters
    mixed = len(set(getattr(configs[0], "layer_types", None) or ())) > 1
    if legacy and (mixed or len(attn) == record["n_layers"] or layout.mlp_core == "fc2" or layout.final != "norm"):
        raise ImportError(f"this dropped {type(model).__name__} needs transformers 4.56 or later")
    for kind, gone in (("attn", attn), ("mlp", mlp)):
        for i in gone:
            for name, stub in stubs(layout, kind).items():
                setattr(layers[i], name, stub)
    for i, name in record.get("biases", ()):
        matrix = layers[i].get_submodule(name)
        matrix.bias = zero_bias(matrix)
    kept = [i for i in range(record["n_layers"]) if i not in attn & mlp]
    live = [i for i in kept if i not in attn]
    for slot, i in enumerate(live):
        getattr(layers[i], layout.attn_core).layer_idx = slot
    setattr(decoder, record["layers"], nn.ModuleList(layers[i] for i in kept))
    for config in configs:
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[i] for i in kept]
        config.num_hidden_layers = len(kept)
    setattr(decoder, RECORD, {key: record[key] for key in ("n_layers", "attn", "mlp", "biases") if key in record})
    if not legacy:
        cut = CacheCut()
        cut.slots = tuple(kept.index(i) for i in live)
        cut.n_layers = len(kept)
        decoder.register_forward_pre_hook(cut, with_kwargs=True)
        decoder._llmdrop_cache = cut  # where llmdrop finds it, to drop more
        if not live:
            getattr(layers[kept[0]], layout.attn_core).counts_tokens = True
