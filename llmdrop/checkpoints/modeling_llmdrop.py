"""A dropped model for transformers alone: AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).

llmdrop.save_model puts this file into checkpoints, made for their architecture. It builds the stock model of the
undropped depth, takes out what config.json's "llmdrop" lists and makes room for the biases that it lists, then weights
are loaded. transformers 4.50 or later.
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
    from transformers.cache_utils import CacheLayerMixin, DummyLayer, DynamicLayer  # noqa: F401
except ImportError:  # an older one
    CacheLayerMixin = DummyLayer = DynamicLayer = object

# in a checkpoint these stand here themselves
from llmdrop.proof import Gone  # noqa: F401
from llmdrop.prune import CacheCut, EmptySlot, TokenCount, place, renumber_attention, zero_bias  # noqa: F401


class LlamaConfig(transformers.LlamaConfig):
    """The undropped model's config in memory; on disk one that stock classes refuse."""

    @classmethod
    def get_config_dict(cls, *args, **kwargs):
        raw, rest = super().get_config_dict(*args, **kwargs)
        raw.pop("llmdrop_written", None)  # who wrote the file, which is not the model's
        return raw | raw.get("llmdrop", {}).get("undropped", {}), rest

    def to_json_string(self, use_diff: bool = True) -> str:
        raw = json.loads(super().to_json_string(use_diff))
        record = getattr(self, "llmdrop", None)
        if record and "undropped" in record:
            refused = f"{record['n_layers']} minus dropped ones: load with llmdrop.load_model or trust_remote_code=True"
            raw |= {"model_type": "llmdrop", record["depth"]: refused}
        return json.dumps(raw, indent=2, sort_keys=True) + "\n"


class LlamaForCausalLM(transformers.LlamaForCausalLM):
    """The stock model without the sublayers, and with the biases, that its config's record lists."""

    config_class = LlamaConfig

    def __init__(self, config, *args, **kwargs):
        config = copy.deepcopy(config)  # it is about to say what is left
        for key, value in config.llmdrop["undropped"].items():
            if key != "model_type":
                setattr(config, key, value)
        super().__init__(config, *args, **kwargs)
        place(self, config.llmdrop)

    def is_custom_code(self) -> bool:
        return False  # as far as weights go: they have the stock names, and need the stock renamings
