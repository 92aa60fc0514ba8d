"""Write a dropped Llama for vLLM, as a nemotron-nas checkpoint whose layers differ."""

import inspect
import json
from contextlib import ExitStack
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from .. import prune
from ..anatomy import find_anatomy
from . import configuration_nemotron_nas
from .blocks import renumber
from .destination import mark
from .transformers_format import for_transformers_4, our_config, save_tokenizer, stock_save_pretrained

LLAMA = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}  # all that the engines can run
# a matrix to which a mean adds a bias: vLLM's switch for it, and the matrices that it then gives one in every layer
SWITCHES = {
    "self_attn.o_proj": ("attention_bias", (".o_proj",)),  # with qkv_bias off
    "mlp.down_proj": ("mlp_bias", (".gate_proj", ".up_proj", ".down_proj")),
}


def write_nemotron_nas(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a Llama or Mistral into the existing `folder` for engines that have DeciLMForCausalLM: vLLM, and SGLang.

    Weights keep their Llama names; config.json says layer by layer what is there. vLLM needs --trust-remote-code where
    llmdrop is not installed beside it. With biases that a mean added it is for vLLM alone: the others would skip them
    in silence, but for an MLP width that they cannot read. Raises ValueError for what the engine cannot run: other
    architectures, mixed dtypes, no attention in the first layer that is left.
    """
    check_llama(model, "nemotron-nas")
    parts = find_anatomy(model)
    config = model.config
    kept = [i for i in range(parts.n_layers) if i not in parts.plan.blocks]
    if kept[0] in parts.plan.attn:
        raise ValueError(
            f"layer {kept[0]} would be the first and has no attention: vLLM loads that and fails at the first request. "
            f"Keep that attention, drop the whole block (attn and mlp of {kept[0]}), or use format='gguf'"
        )
    biased = [SWITCHES[name] for name in sorted({name for _, name in prune.given_biases(parts)})]
    endings = tuple(ending for _, endings in biased for ending in endings)
    with ExitStack() as undo:  # no matrix of these names may lack a bias: vLLM would take what is in memory
        for name, module in model.named_modules():
            if name.endswith(endings) and module.bias is None:
                prune.put(undo, module, "bias", prune.zero_bias(module))
        renumber(undo, model)
        stock_save_pretrained(model, folder)
    save_tokenizer(tokenizer, folder)
    file = folder / "config.json"
    written = json.loads(file.read_text())
    record = our_config(written, model, parts)["llmdrop"] | {"renumbered": True}
    written |= {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {"AutoConfig": "configuration_nemotron_nas.NemotronNASConfig"},
        "block_configs": [_block(i in parts.plan.attn, i in parts.plan.mlp, config, bool(biased)) for i in kept],
        "llmdrop": record,
        "max_position_embeddings": attended(config),
    }
    if biased:
        record["undropped"] |= {switch: False for switch, _ in SWITCHES.values()}  # load_model adds the record's
        written |= {"qkv_bias": False} | {switch: True for switch, _ in biased}
    for key in ("sliding_window", "layer_types"):
        written.pop(key, None)
    file.write_text(json.dumps(written | for_transformers_4(written, type(model.config)) | mark(), indent=2))
    (folder / "configuration_nemotron_nas.py").write_text(inspect.getsource(configuration_nemotron_nas))


def _block(no_attn: bool, no_mlp: bool, config, biased: bool) -> dict:
    """One entry of block_configs. Engines take an MLP's width as 2 * ffn_mult * hidden / 3, rounded up to 256."""
    grouped = config.num_attention_heads // config.num_key_value_heads
    attention = {"no_op": no_attn, "replace_with_linear": False, "n_heads_in_group": None if no_attn else grouped}
    if no_mlp:
        width = {"ffn_mult": None}
    elif biased or config.intermediate_size % 256:  # vLLM reads this; other engines stop, and cannot have this model
        width = {"intermediate_size": config.intermediate_size}
    else:
        width = {"ffn_mult": 1.5 * config.intermediate_size / config.hidden_size}
    return {"attention": attention, "ffn": {"no_op": no_mlp, "replace_with_linear": False} | width}


def check_llama(model: nn.Module, format: str) -> None:
    """Raise ValueError unless the model is a Llama in all that the engines assume, in one floating-point type."""
    config = model.config
    if config.model_type not in ("llama", "mistral"):
        raise ValueError(
            f"format={format!r} holds Llama's architecture, so llama and mistral models, not {config.model_type!r}; "
            "format='hf' holds every model that llmdrop knows"
        )
    dtypes = {p.dtype for p in model.parameters()}
    if len(dtypes) > 1 or not next(iter(dtypes)).is_floating_point:
        raise ValueError(f"the weights are of mixed or integer types {sorted(map(str, dtypes))}; use model.to(...)")
    # not every config has all of these: Mistral's knows no biases
    settings = {name: getattr(config, name, value) for name, value in LLAMA.items()}
    if settings != LLAMA:
        listed = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        raise ValueError(
            f"format={format!r} has no biases and no activation but SiLU; this model has {listed}. Use format='hf'"
        )


def attended(config) -> int:
    """The context within which full attention is the model's own: of a sliding window, its length."""
    window = getattr(config, "sliding_window", None)
    return min(config.max_position_embeddings, window or config.max_position_embeddings)
