"""Tiny random models of every decoder type of the installed transformers, made from its own configs, no downloads.

Nothing here knows an architecture by more than a few numbers: each type's default config is made again with small
sizes, by the names that configs give to sizes.
"""

import re

import torch
import transformers
from tiny import give_weights
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

ENCODER_DECODERS = set(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES) | {
    "musicgen",
    "musicgen_melody",
    "trocr",
    "whisper",
}
DEPTH = 6
VOCABULARY = 97
SIZES = [  # (what a config calls a size, the small one); the first that matches is taken
    (r"vocab_size|vocab_size_per_layer_input|unpadded_vocab_size", VOCABULARY),
    (r"num_hidden_layers|n_layers?|num_layers|decoder_layers|num_blocks", DEPTH),
    (
        r"max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|max_target_positions|context_length",
        256,
    ),
    (
        r"(hidden_size|d_model|n_embd|embedding_dim|embedding_size|word_embed_proj_dim|lru_width|attention_hidden_size)",
        32,
    ),
    (r"(emb_dim|input_embedding_size|output_embedding_size)", 32),
    (r"hidden_size_per_layer_input|ple_embed_dim|shared_embed_dim", 8),
    (r"(num|swa_num|linear_num|decoder|mamba_num|index_n|n_mamba)?_?(attention_)?(key_|value_)?(heads?)|n_heads?", 4),
    (r"(swa_)?num_key_value_heads|num_kv_heads|num_query_groups", 2),
    (r"qk_head_dim", 16),
    (r".*(rope_head_dim|nope_head_dim|v_head_dim|key_head_dim|value_head_dim)", 8),
    (
        r"(global_|swa_|linear_|local_)?(v_)?head_dim|dim_head|d_head|kv_channels|index_head_dim|attention_head_(dim|size)",
        8,
    ),
    (r".*(lora_rank|lowrank|_rank|gated_norm_rank)", 8),
    (r".*(intermediate_size.*|ffn_dim|ffn_hidden_size|dim_ff|dff|d_inner|router_hidden_size|feed_forward_size)", 48),
    (r"(moe_)?num_(local_)?experts|n_routed_experts|moe_num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_k|moe_topk", 2),
    (r"n_group|num_expert_group", 2),
    (r"topk_group", 1),
    (r"sliding_window(_size)?|window_size|attention_window_size|local_attention|attention_chunk_size", 8),
    (r"mamba_d_state|state_size|ssm_state_size", 8),
    (r"mamba_d_ssm", 64),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"mamba_d_head|mamba_head_dim|mamba_headdim", 8),
    (r"(mamba_)?chunk_size", 4),
    (r"(mamba_)?n_groups|mamba_ngroups", 2),
    (r"time_step_rank|mamba_dt_rank|rotary_dim", 4),
    (r"max_window_layers", 3),
    (r"num_kv_shared_layers", 2),
]
FILLED = ("head_dim", "num_key_value_heads", "v_head_dim")  # small also where the default derives them
TOKENS = {"pad_token_id": 0, "bos_token_id": 1}  # no end of sequence: generation goes on
# what one type needs beside: sizes that depend on each other, and what its config has no default for
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
DOTS3 = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 8, "swa_kv_lora_rank": 8}
DOTS3 |= {"swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8}
INDEXER = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 64}
INDEXER |= {"indexer_compress_ratio": 2}
OF_TYPE: dict[str, dict] = {
    "bamba": dict(attn_layer_indices=[1, 3, 5]),
    "blt": dict(encoder_hash_byte_group_vocab=97)
    | {f"{part}coder_config": {"hidden_size_global": 32} for part in ("en", "de")},
    "cohere_compass_text": dict(rope_parameters={"full_attention": ROPE, "sliding_attention": ROPE}),
    "dbrx": dict(
        attn_config=dict(clip_qkv=8.0, rope_theta=10_000.0, kv_n_heads=2),
        ffn_config=dict(hidden_size=32, ffn_hidden_size=48, moe_top_k=2),
    ),
    "deepseek_v2": dict(num_experts_per_tok=2),
    "dots1": dict(n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, num_experts_per_tok=2),
    "dots3_note": DOTS3,
    "dots3_note_text": DOTS3,
    "gemma3n_text": dict(intermediate_size=48, hidden_size_per_layer_input=8),
    "gemma4": dict(text_config=dict(global_head_dim=16)),
    "gemma4_text": dict(global_head_dim=16),
    "gemma4_unified": dict(text_config=dict(global_head_dim=16)),
    "gemma4_unified_text": dict(global_head_dim=16),
    "gpt_neo": dict(attention_types=[[["global", "local"], 3]]),
    "granitemoehybrid": dict(layer_types=["linear_attention", "full_attention"] * 3),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=3),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 3),
    "longcat_flash": dict(zero_expert_num=2),
    "mamba2": dict(num_heads=8, head_dim=8),
    "qwen4_exp": dict(text_config=INDEXER),
    "qwen4_exp_text": INDEXER,
    "reformer": dict(is_decoder=True, axial_pos_embds_dim=(16, 16), axial_pos_shape=(16, 16)),
    "roc_bert": dict(shape_vocab_size=97, pronunciation_vocab_size=97),
    "xlstm": dict(qk_dim_factor=1.0),
    "xmod": dict(default_language="en_XX"),
    "zamba": dict(attention_hidden_size=64, attention_head_dim=16),
    "zamba2": dict(n_mamba_heads=8, attention_hidden_size=64, attention_head_dim=16, kv_channels=8),
}


def decoder_types() -> list[str]:
    """Every type that transformers takes for a causal language model, without parts of encoder-decoders."""
    return [kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind not in ENCODER_DECODERS]


def tiny_config(kind: str, **overrides):
    """The config of a tiny model of this type, with all its sub-configs small."""
    return _small(_model_class(kind).config_class, OF_TYPE.get(kind, {}) | overrides)


def _model_class(kind: str) -> type:
    return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])


def _small(cls: type, beside: dict):
    """A config of this class with small sizes, the settings `beside` taking precedence."""
    try:
        default = cls()
    except ValueError:  # its own default does not pass its own check
        default = cls(**beside)
    settings = {}
    for name, value in vars(default).items():
        sub_config = getattr(cls, "sub_configs", {}).get(name)
        if sub_config is not None:
            given = dict(beside.pop(name, {}))
            settings[name] = _small(type(value), given) if isinstance(value, PreTrainedConfig) else value
        elif name.endswith("_token_id"):
            settings[name] = TOKENS.get(name, None if name == "eos_token_id" or value is None else 2)
        elif name in FILLED and value is None or isinstance(value, int) and not isinstance(value, bool):
            size = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), value)
            if value is None or size == DEPTH:
                settings[name] = size
            else:
                settings[name] = min(size, value) if value > 0 else value
    if "kv_lora_rank" in settings:  # latent attention has no shared heads
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    name = cls.attribute_map.get("layer_types", "layer_types")
    kinds = list(dict.fromkeys(getattr(default, name, None) or []))
    if len(kinds) > 1 and not isinstance(getattr(cls, name, None), property):
        settings[name] = [kinds[i % len(kinds)] for i in range(DEPTH)]
    return cls(**settings | beside)


def tiny_decoder(kind: str, attn_implementation: str = "eager", seed: int = 0, **overrides):
    """A model of this type with weights large enough that every sublayer matters to the output."""
    torch.manual_seed(seed)
    model = (
        _model_class(kind)._from_config(tiny_config(kind, **overrides), attn_implementation=attn_implementation).eval()
    )
    give_weights(model, seed)
    return model
