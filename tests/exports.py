"""Tiny models with a tokenizer that llama.cpp knows, and plans of every kind, for the tests of exports."""

from contextlib import ExitStack
from pathlib import Path

import torch
from tiny import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llmdrop import DropPlan, apply_plan, find_anatomy
from llmdrop.checkpoints.transformers_format import record_of
from llmdrop.prune import give_biases

ROOT = Path(__file__).parents[1]
N_TOKENS = 400
TEXTS = ["Layers that change little", "1, 2, 3, go", "The", "a b c d e f g", "Permission is hereby granted, free of",
         "it's 12345", "<|im_start|>user", "software", "ABC and", "WITHOUT WARRANTY OF ANY KIND"]  # fmt: skip
MIXED = DropPlan([1, 3, 4], [2, 3])
PLANS = {
    "dense": DropPlan(),
    "first attention": DropPlan([0]),
    "first attentions": DropPlan([0, 1, 2]),
    "last attention": DropPlan([4]),
    "last MLP": DropPlan([], [4]),
    "scattered": DropPlan([0, 2, 4], [1, 3]),
    "mixed": MIXED,
    "first block": DropPlan([0], [0]),
    "blocks": DropPlan([1, 2], [1, 2]),
    "no attention": DropPlan(range(5)),
    "no MLP": DropPlan([], range(5)),
}
BIASES = {"mixed": [(0, "mlp.down_proj"), (2, "self_attn.o_proj")], "blocks": [(0, "mlp.down_proj")]}


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """A small byte-level BPE that splits text as SmolLM's does, with a chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=N_TOKENS, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator([(ROOT / "LICENSE").read_text()], trainer)
    out = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=special[1], eos_token=special[2])
    out.chat_template = "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
    return out


TOKENIZER = byte_level_tokenizer()
PROMPTS = [TOKENIZER(text).input_ids for text in TEXTS]


def wide(plan: DropPlan = DropPlan(), family: str = "llama", **overrides):
    """A tiny Llama with that tokenizer's vocabulary, dropped from."""
    return apply_plan(tiny(family, vocab_size=N_TOKENS, **overrides), plan)


def with_biases(name: str, **overrides):
    """`wide` with PLANS[name] dropped, and biases where "mean" reconstruction of that plan adds them."""
    model = wide(PLANS[name], **overrides)
    give_biases(ExitStack(), model, BIASES[name])
    generator = torch.Generator().manual_seed(0)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(".bias"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def record(model) -> dict:
    """What a checkpoint of this model says of what was dropped from it and of the biases that it was given."""
    return record_of(find_anatomy(model))


@torch.inference_mode()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).logits
