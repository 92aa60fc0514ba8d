"""A dropped model for transformers alone: AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).

llmdrop puts this file into checkpoints, made for their architecture; every Auto class that has the architecture finds
its class here. That builds the stock model of the undropped depth, takes out what config.json's "llmdrop" lists and
makes room for the biases that it lists; then weights are loaded. transformers 4.50 or later.
"""

from __future__ import annotations

import copy
import inspect  # noqa: F401
import json

import torch  # noqa: F401
import transformers
from torch import nn  # noqa: F401
from transformers.cache_utils import Cache, DynamicCache  # noqa: F401

try:
    from transformers.cache_utils import DynamicLayer
except ImportError:  # before 4.54
    DynamicLayer = object

# in a checkpoint these stand here themselves
from llmdrop.anatomy import RECORD  # noqa: F401
from llmdrop.proof import Gone  # noqa: F401
from llmdrop.prune import CacheCut, TokenCount, is_old_release, place, zero_bias  # noqa: F401

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
        # some models and mixed windows have caches of other kinds there
        if is_old_release() and not config.llmdrop["in_old_releases"]:
            raise ImportError(f"this dropped {type(self).__name__} needs transformers 4.56 or later")
        config = copy.deepcopy(config)
        # in memory it is the whole model's: heads and others may make models of their own from it
        config.__class__ = StockConfig
        self.written = {key: vars(config).pop(key) for key in ("llmdrop", "auto_map")}
        super().__init__(config, *args, **kwargs)
        place(self, self.written["llmdrop"])

    def save_pretrained(self, *args, **kwargs):
        former = type(self.config)
        self.config.__class__ = DroppedConfig
        vars(self.config).update(self.written)
        try:
            super().save_pretrained(*args, **kwargs)
        finally:
            self.config.__class__ = former
            for key in self.written:
                vars(self.config).pop(key, None)

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
