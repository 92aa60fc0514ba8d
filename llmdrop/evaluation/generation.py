"""Greedy answers to many prompts: stock `model.generate`, batched, and what it would write without generating it.

What goes into the prompts, and whether an answer is right, is in `questions.py` and `free_text.py`.
"""

import copy
from collections.abc import Iterator, Sequence
from itertools import pairwise
from os.path import commonprefix

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..anatomy import check_has_weights, unwrapped
from ..calibration import check_vocabulary
from ..plan import DropPlan
from ..prune import eval_mode
from .sweep import Item, loglikelihoods

VERSION = 1  # raised when what is written changes
CACHED = 32_768  # tokens that the KV caches of one batch may hold: long prompts share a batch with fewer others
SHARED = 64  # a common beginning of at least so many tokens runs once
QUESTION_TOKENS = 2048  # room in a row of `greedy_matches` beyond the longest prompt, for others that begin alike


@torch.inference_mode()
def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int = 48,
    stop: Sequence[str] = (),
    batch_size: int = 16,
) -> list[str]:
    """What the model writes after each prompt, greedily, up to the first of `stop` (which is left out).

    Prompts share batches, padded. What neighboring prompts begin with in common (few-shot examples, a long document)
    runs once, and its KV cache serves all of their batches. Raises ValueError for a prompt that with its answer is
    longer than the model's positions: nothing is ever cut off.
    """
    model = unwrapped(model)
    check_has_weights(model)
    ids = [encode(tokenizer, prompt) for prompt in prompts]
    check_length(model, ids, max_new_tokens)
    padding = next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": padding}
    if stop:
        options |= {"stop_strings": list(stop), "tokenizer": tokenizer}
    device = model.get_input_embeddings().weight.device
    sliding = getattr(model.config, "sliding_window", None) is not None  # padding inside would take up the window
    texts = [""] * len(ids)
    begun: tuple[int, ...] = ()
    beginning = None  # the KV cache of these tokens
    with eval_mode(model):
        for batch, start in _batches(ids, batch_size):
            start = 0 if sliding else start
            shared = ids[batch[0]][:start]
            if start and shared != begun:
                out = model(torch.tensor([shared], device=device), use_cache=True, logits_to_keep=1)
                begun = shared
                beginning = out.past_key_values
            cache = None
            if start:
                cache = copy.deepcopy(beginning)
                cache.batch_repeat_interleave(len(batch))
            width = max(len(ids[k]) for k in batch)
            gaps = [width - len(ids[k]) for k in batch]  # the padding stands between what is shared and what is not
            rows = [[*shared, *[padding] * gap, *ids[k][start:]] for k, gap in zip(batch, gaps, strict=True)]
            mask = [[1] * start + [0] * gap + [1] * (width - start - gap) for gap in gaps]
            out = model.generate(
                torch.tensor(rows, device=device),
                attention_mask=torch.tensor(mask, device=device),
                past_key_values=cache,
                **options,
            )
            answers = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
            for k, text in zip(batch, answers, strict=True):
                texts[k] = text[: min((text.find(s) for s in stop if s in text), default=len(text))]
    return texts


def greedy_matches(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    plans: Sequence[DropPlan],
    prompts: Sequence[str],
    targets: Sequence[str],
    progress: bool = True,
) -> list[list[int]]:
    """Per plan and prompt: 1 where the model, writing greedily after the prompt, would write its target, else 0.

    Nothing is generated: all is read off one forward pass (see `llmdrop.evaluation.sweep`). Raises ValueError where
    `check_length` or `loglikelihoods` does, and for a target without a token of its own.
    """
    if len(prompts) != len(targets):
        raise ValueError(f"{len(prompts)} prompts and {len(targets)} targets; give one target for each prompt")
    contexts = [encode(tokenizer, prompt) for prompt in prompts]
    wholes = [encode(tokenizer, prompt + target) for prompt, target in zip(prompts, targets, strict=True)]
    items = [Item(whole, len(whole) - len(context)) for whole, context in zip(wholes, contexts, strict=True)]
    check_length(model, contexts, max((item.n_scored for item in items), default=0))
    row_tokens = max(map(len, wholes)) + QUESTION_TOKENS
    return loglikelihoods(model, plans, items, row_tokens, progress, "answer")[1].astype(int).tolist()


def check_length(model: nn.Module, ids: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """ValueError if a prompt's tokens and its answer's are more than the model has positions, or a prompt is empty.

    Also for tokens that are beyond the model's vocabulary.
    """
    model = unwrapped(model)
    if not ids or not all(ids):
        raise ValueError("no prompts, or an empty prompt: give at least one prompt, each of one token or more")
    check_vocabulary(max(map(max, ids)), len(model.get_input_embeddings().weight))
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max(range(len(ids)), key=lambda k: len(ids[k]))
    if limit is not None and len(ids[longest]) + max_new_tokens > limit:
        raise ValueError(
            f"prompt {longest} has {len(ids[longest]):,} tokens, with {max_new_tokens} new ones more than the "
            f"{limit:,} positions of {model.name_or_path or model.config.model_type}; shorten it, or take a model "
            "with a longer context"
        )


def chat(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """The question as a user's turn of the tokenizer's chat template, ready for the answer. ValueError without one."""
    if tokenizer.chat_template is None:
        raise ValueError("this tokenizer has no chat template; give plain prompts, or take an instruction-tuned model")
    turn = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> tuple[int, ...]:
    """Tokens of a prompt; a chat template has written the begin-of-sequence token already."""
    begun = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)
    return tuple(tokenizer(prompt, add_special_tokens=not begun, verbose=False)["input_ids"])


def _batches(ids: list[tuple[int, ...]], batch_size: int) -> Iterator[tuple[list[int], int]]:
    """(prompts, how many tokens they share that run apart): neighbors that begin alike go together, by length."""
    alike = [0, *(len(commonprefix(pair)) for pair in pairwise(ids)), 0]  # tokens that prompts k - 1 and k share
    groups = [[0]]
    for k in range(1, len(ids)):
        if alike[k] >= max(alike[k - 1 : k + 2]) - SHARED:
            groups[-1].append(k)
        else:
            groups.append([k])
    for group in groups:
        start = min([alike[k] for k in group[1:]] + [len(ids[k]) - 1 for k in group])  # one token is left to run
        if start < SHARED or len(group) == 1:
            start = 0
        group.sort(key=lambda k: len(ids[k]))
        batch: list[int] = []
        for k in group:  # the next one is the longest of its batch
            if batch and (len(batch) == batch_size or (len(batch) + 1) * len(ids[k]) > CACHED):
                yield batch, start
                batch = []
            batch.append(k)
        yield batch, start
