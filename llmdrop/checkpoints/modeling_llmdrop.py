"""A dropped model for transformers alone: AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).

llmdrop.save_model puts this file into checkpoints, made for their architecture. It builds the stock model of the
undropped depth, takes out what config.json's "llmdrop" lists and makes room for the biases that it lists, then weights
are loaded. transformers 4.50 or later.
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
from llmdrop.prune import CacheCut, NoAttention, NoMLP, TokenCount, stubs, zero_bias  # noqa: F401


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
            raw.pop("layer_types", None)  # of what is left; the record has those of all layers
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
        _drop(self, config.llmdrop)

    def is_custom_code(self) -> bool:
        return False  # as far as weights go: they have the stock names, and need the stock renamings


def _drop(model: nn.Module, record: dict) -> None:
    layout = SimpleNamespace(**record["layout"])
    attn = set(record["attn"])
    mlp = set(record["mlp"])
    # before 4.56 caches grow as layers use them; some models and mixed windows have caches of other kinds there
    legacy = "config" not in inspect.signature(DynamicCache.__init__).parameters
    mixed = len(set(record["undropped"].get("layer_types") or ())) > 1
    if legacy and (mixed or len(attn) == record["n_layers"] or layout.mlp_core == "fc2" or layout.final != "norm"):
        raise ImportError(f"this dropped {type(model).__name__} needs transformers 4.56 or later")
    decoder = getattr(model.base_model, "decoder", model.base_model)  # OPT nests one level deeper
    layers = getattr(decoder, record["layers"])
    config = model.config
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
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]
    config.num_hidden_layers = len(kept)
    if not legacy:
        cut = CacheCut()
        cut.slots = tuple(kept.index(i) for i in live)
        cut.n_layers = len(kept)
        decoder.register_forward_pre_hook(cut, with_kwargs=True)
        decoder._llmdrop_cache = cut  # where llmdrop finds it, to drop more
        if not live:
            getattr(layers[kept[0]], layout.attn_core).counts_tokens = True
