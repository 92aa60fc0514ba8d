"""Greedy answers to many prompts under many drop plans: stock `model.generate`, batched, stored plan by plan.

What goes into the prompts, and whether an answer is right, is in `questions.py`.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise

import pandas as pd
import torch

from .calibration import Calibration
from .compensate import Changes, compensated, shared_or_fit
from .fingerprint import model_key, provenance, tokenizer_digest
from .plan import DropPlan
from .results import Store, _name, _plan_key
from .sweep import Item, loglikelihoods

CACHED = 32_768  # tokens that the KV caches of one batch may hold: long prompts share a batch with fewer others
SHARED = 64  # a common beginning of at least so many tokens runs once


@torch.inference_mode()
def generate(
    model, tokenizer, prompts: Sequence[str], max_new_tokens: int = 48, stop: Sequence[str] = (), batch_size: int = 16
) -> list[str]:
    """What the model writes after each prompt, greedily, up to the first of `stop` (which is left out).

    Prompts share batches, padded on the left. What the prompts of a batch begin with in common (few-shot examples, a
    long document) runs once, and its KV cache serves them all and the next batch. Raises ValueError for a prompt that
    with its answer is longer than the model's positions: nothing is ever cut off.
    """
    ids = [_encode(tokenizer, prompt) for prompt in prompts]
    check_length(model, ids, max_new_tokens)
    padding = next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": padding}
    options |= {"stop_strings": list(stop), "tokenizer": tokenizer} if stop else {}
    texts, cache, held, device = [""] * len(ids), None, (), model.get_input_embeddings().weight.device
    training = model.training
    model.eval()
    sliding = getattr(model.config, "sliding_window", None) is not None  # padding inside would take up the window
    for batch, start in _batches(ids, batch_size):
        start = 0 if sliding else start
        prefix, cache_of_batch = ids[batch[0]][:start], None
        if start:
            keep = _common(held, prefix)
            if keep < len(held):  # another prefix: of the last batch's cache, what fits
                cache = cache if keep else None
                if cache is not None:
                    cache.crop(keep)
            if keep < start:
                new = torch.tensor([prefix[keep:]], device=device)
                cache = model(new, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
            held, cache_of_batch = prefix, copy.deepcopy(cache)
            cache_of_batch.batch_repeat_interleave(len(batch))
        width = max(len(ids[k]) for k in batch)
        rows, mask = [], []
        for k in batch:  # the padding stands between what is shared and what is not
            gap, own = width - len(ids[k]), ids[k][start:]
            rows.append([*prefix, *[padding] * gap, *own])
            mask.append([1] * start + [0] * gap + [1] * len(own))
        rows, mask = (torch.tensor(values, device=device) for values in (rows, mask))
        out = model.generate(rows, attention_mask=mask, past_key_values=cache_of_batch, **options)[:, width:]
        for k, text in zip(batch, tokenizer.batch_decode(out, skip_special_tokens=True), strict=True):
            texts[k] = _until(text, stop)
    model.train(training)
    return texts


def answers(
    store: Store,
    model,
    tokenizer,
    plans: Mapping[str, DropPlan],
    prompts: Sequence[str],
    max_new_tokens: int = 48,
    stop: Sequence[str] = (),
    batch_size: int = 16,
    name: str = "",
    fitted: Calibration | None = None,
    shared: Callable[[str], dict] | None = None,
) -> pd.DataFrame:
    """`generate` for each plan of an undropped model; stored plan by plan, so that an interrupted run goes on.

    Returns plan, item (number of the prompt), answer. name: of the set of prompts, for people. fitted: text on which
    every plan's gaps are refitted first (`llmdrop.compensate`); shared("refit") then gives `corrections(model, fitted)`
    where they serve several plans.
    """
    names, method = list(plans), "none" if fitted is None else "refit"
    modules = ("generation", "prune", "anatomy") + (("compensate", "sweep", "hooks") if fitted is not None else ())
    key = model_key(model, batch_size, *modules) | {"tokenizer": tokenizer_digest(tokenizer), "method": method}
    key |= {"prompts": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(), "stop": list(stop)}
    key |= {"max_new_tokens": max_new_tokens, "fitted": None if fitted is None else fitted.digest}
    check_length(model, [_encode(tokenizer, prompt) for prompt in prompts], max_new_tokens)  # before the first plan

    def compute(missing: list[int]) -> Iterator[list[str]]:
        for plan in (plans[names[i]] for i in missing):
            with compensated(model, plan, _changes(model, plan, fitted, shared)):
                yield generate(model, tokenizer, prompts, max_new_tokens, stop, batch_size)

    wanted = [(key | _plan_key(plan), f"{_name(model)}-{plan.label}-{method}-{name}") for plan in plans.values()]
    found = store.get_many("generate", wanted, compute, lambda: provenance(model, fitted))
    rows = [(plan, k, text) for plan, texts in zip(names, found, strict=True) for k, text in enumerate(texts)]
    return pd.DataFrame(rows, columns=["plan", "item", "answer"])


def greedy_matches(
    store: Store,
    model,
    tokenizer,
    plans: Mapping[str, DropPlan],
    prompts: Sequence[str],
    targets: Sequence[str],
    name: str = "",
    fitted: Calibration | None = None,
    shared: Callable[[str], dict] | None = None,
) -> pd.DataFrame:
    """Whether each plan's model, writing greedily after a prompt, would write its target: exact match, not generated.

    Returns plan, item, right (0 or 1). All is read off one forward pass, in which prompts share what they begin with
    and plans their first layers (`llmdrop.sweep`). fitted, shared: as in `answers`; plans then run one by one.
    """
    inputs = [_encode(tokenizer, prompt) for prompt in prompts]
    whole = [_encode(tokenizer, prompt + target) for prompt, target in zip(prompts, targets, strict=True)]
    items = [Item(ids, len(ids) - len(context)) for ids, context in zip(whole, inputs, strict=True)]
    check_length(model, inputs, max(item.n_scored for item in items))
    row_tokens = max(256, max(map(len, whole)) + 2048)  # room for the longest context and its questions
    names, method = list(plans), "none" if fitted is None else "refit"
    modules = ("generation", "sweep", "prune", "anatomy") + (("compensate", "hooks") if fitted is not None else ())
    key = model_key(model, 1, *modules) | {"tokenizer": tokenizer_digest(tokenizer), "method": method}
    key |= {"items": hashlib.sha256(json.dumps([[item.tokens, item.n_scored] for item in items]).encode()).hexdigest()}
    key |= {"fitted": None if fitted is None else fitted.digest}

    def compute(missing: list[int]) -> Iterator[list[int]]:
        wanted = [plans[names[i]] for i in missing]
        if fitted is None:
            yield from loglikelihoods(model, wanted, items, row_tokens, progress=name)[1].astype(int).tolist()
            return
        for plan in wanted:
            with compensated(model, plan, _changes(model, plan, fitted, shared)):
                yield loglikelihoods(model, [DropPlan()], items, row_tokens, progress=name)[1][0].astype(int).tolist()

    wanted = [(key | _plan_key(plan), f"{_name(model)}-{plan.label}-{method}-{name}") for plan in plans.values()]
    found = store.get_many("greedy", wanted, compute, lambda: provenance(model, fitted))
    rows = [(plan, k, value) for plan, values in zip(names, found, strict=True) for k, value in enumerate(values)]
    return pd.DataFrame(rows, columns=["plan", "item", "right"])


def _changes(model, plan: DropPlan, fitted: Calibration | None, shared: Callable[[str], dict] | None) -> Changes:
    if fitted is None or not plan:
        return {}
    return shared_or_fit(model, plan, fitted, shared=shared)


def check_length(model, ids: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """ValueError if a prompt's tokens and its answer's are more than the model has positions, or a prompt is empty."""
    if not ids or not all(ids):
        raise ValueError(f"{'an empty prompt' if ids else 'no prompts'}: give at least one prompt of one token or more")
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max(range(len(ids)), key=lambda k: len(ids[k]))
    if limit is not None and len(ids[longest]) + max_new_tokens > limit:
        raise ValueError(
            f"prompt {longest} has {len(ids[longest]):,} tokens, with {max_new_tokens} new ones more than the "
            f"{limit:,} positions of {_name(model)}; shorten it (fewer examples, less text) or take a model with a "
            "longer context"
        )


def chat(tokenizer, question: str) -> str:
    """The question as a user's turn of the tokenizer's chat template, ready for the answer. ValueError without one."""
    if tokenizer.chat_template is None:
        raise ValueError("this tokenizer has no chat template; give plain prompts, or take an instruction-tuned model")
    turn = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)


def _encode(tokenizer, prompt: str) -> tuple[int, ...]:
    """Tokens of a prompt; a chat template has written the begin-of-sequence token already."""
    begun = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)
    return tuple(tokenizer(prompt, add_special_tokens=not begun, verbose=False)["input_ids"])


def _batches(ids: list[tuple[int, ...]], batch_size: int) -> Iterator[tuple[list[int], int]]:
    """(prompts, how many tokens they share that run apart): neighbours that begin alike go together, by length."""
    alike = [0, *(_common(one, other) for one, other in pairwise(ids)), 0]  # [k]: of prompts k - 1 and k
    groups = [[0]]
    for k in range(1, len(ids)):
        if alike[k] >= max(alike[k - 1 : k + 2]) - SHARED:
            groups[-1].append(k)
        else:
            groups.append([k])
    for group in groups:
        start = min([alike[k] for k in group[1:]] + [len(ids[k]) - 1 for k in group])  # one token is left to run
        start = start if start >= SHARED and len(group) > 1 else 0
        group.sort(key=lambda k: len(ids[k]))
        batch_size = max(1, min(batch_size, CACHED // len(ids[group[-1]])))
        for i in range(0, len(group), batch_size):
            yield group[i : i + batch_size], start


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens the two begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _until(text: str, stop: Sequence[str]) -> str:
    return text[: min((text.find(s) for s in stop if s in text), default=len(text))]
