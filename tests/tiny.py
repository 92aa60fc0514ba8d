"""Tiny randomly initialized models of every family in `anatomy`, made from their configs, no downloads."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SHAPE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4, vocab_size=97)
GQA = dict(SHAPE, num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=None)
SLIDING = dict(GQA, head_dim=8, sliding_window=6)
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]

CONFIGS = {
    "llama": ("llama", GQA),
    "mistral": ("mistral", dict(SLIDING)),
    "qwen2": ("qwen2", dict(GQA, use_sliding_window=True, sliding_window=6, layer_types=MIXED)),
    "qwen3": ("qwen3", dict(GQA, head_dim=8)),
    "gemma2": ("gemma2", dict(SLIDING, layer_types=MIXED, query_pre_attn_scalar=8)),
    "gemma3_text": ("gemma3_text", dict(SLIDING, layer_types=MIXED, query_pre_attn_scalar=8)),
    "phi3": ("phi3", GQA),
    "olmo2": ("olmo2", GQA),
    "gpt_neox": ("gpt_neox", dict(SHAPE, max_position_embeddings=256, use_parallel_residual=True, eos_token_id=None)),
    "gpt_neox_sequential": (
        "gpt_neox",
        dict(SHAPE, max_position_embeddings=256, use_parallel_residual=False, eos_token_id=None),
    ),
    "opt": (
        "opt",
        dict(
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=5,
            num_attention_heads=4,
            vocab_size=97,
            max_position_embeddings=256,
            word_embed_proj_dim=32,
            pad_token_id=0,
            eos_token_id=None,
        ),
    ),
    "gpt2": ("gpt2", dict(n_embd=32, n_layer=5, n_head=4, vocab_size=97, n_positions=256, eos_token_id=None)),
}
FAMILIES = sorted(CONFIGS)


def tiny(family: str, attn_implementation: str = "eager", seed: int = 0, **overrides):
    """A model with weights large enough that every sublayer matters to the output."""
    model_type, options = CONFIGS[family]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**options, **overrides})
    if family == "gemma2":
        attn_implementation = "eager"  # its soft-capped attention has no sdpa form in transformers
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation).eval()
    give_weights(model, seed)
    return model


def give_weights(model, seed: int = 0) -> None:
    """Random weights: the default initialization is so small that dropping a layer changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.6 / parameter.shape[-1] ** 0.5)
        elif "bias" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        else:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def random_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and an end of sequence: 257 in all. For models of a vocabulary of at least as many."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "<eos>"])}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<eos>")
