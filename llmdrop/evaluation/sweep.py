"""Log-likelihoods of many continuations under many drop plans, close to the cost of the forward pass.

Nothing is computed twice. Sequences are packed into rows as token tries: a context is run once for all its
continuations, a few-shot prefix once for all the questions of its row. Rows of like length run together, with next to
no padding. Plans are walked as a trie over layers: plans that agree on layers 0..i share the residual stream up to
there. The language-model head runs only on the positions that are scored. Causal attention makes all of this exact.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..anatomy import Anatomy, find_anatomy
from ..plan import DropPlan
from ..sublayers import LayerCall, head_logits, layer_calls, run_layer

VERSION = 1  # raised when the numbers change

# Tokens of a call: enough to keep the device busy. Of a row: longer ones only cost more attention, quadratic in them.
CALL_TOKENS = {"cpu": 1024, "cuda": 4096}
ROW_TOKENS = {"cpu": 256, "cuda": 1024}
LONGEST_ROW = 4096
HEAD_POSITIONS = 128  # logits of so many positions at a time: small enough for the allocator to reuse their memory


@dataclass(frozen=True)
class Item:
    """One continuation to score: tokens = context + continuation, of which the last `n_scored` are scored."""

    tokens: tuple[int, ...]
    n_scored: int


@dataclass
class Row:
    """A token trie, depth first: node k holds token ids[k], at depth position[k], below parent[k] (-1: a root)."""

    ids: list[int]
    position: list[int]
    parent: list[int]
    targets: list[tuple[int, list[int], list[int]]]  # (item, nodes whose prediction is read, tokens to predict)


def pack(items: Sequence[Item], row_tokens: int = 256, pairs_per_token: int = 0) -> Iterator[Row]:
    """Fill rows of about `row_tokens` nodes with the items in lexical order, no node twice in a row.

    A row grows longer for one long item, and where items share a long prefix of s tokens (few-shot examples), which
    the next row would have to compute again: up to s + sqrt(s² + s p) nodes, the length at which an item costs least
    if the rest of a layer costs, per token, as much as p = `pairs_per_token` pairs of tokens in attention.
    """
    row = Row([], [], [], [])
    path: list[tuple[int, int]] = []  # (token, node) from the root to the last item's last token
    for index in sorted(range(len(items)), key=lambda k: items[k].tokens):
        tokens = items[index].tokens
        inputs = tokens[:-1]  # the last token is predicted, never read
        shared = 0
        while shared < min(len(path), len(inputs)) and path[shared][0] == inputs[shared]:
            shared += 1
        best = shared + math.sqrt(shared**2 + shared * pairs_per_token)
        if row.ids and len(row.ids) + len(inputs) - shared > max(row_tokens, min(best, LONGEST_ROW)):
            yield row
            row = Row([], [], [], [])
            path = []
            shared = 0
        del path[shared:]
        for depth in range(shared, len(inputs)):
            row.parent.append(path[-1][1] if path else -1)
            path.append((inputs[depth], len(row.ids)))
            row.ids.append(inputs[depth])
            row.position.append(depth)
        n = items[index].n_scored
        row.targets.append((index, [node for _, node in path[len(path) - n :]], list(tokens[-n:])))
    if row.ids:
        yield row


def _calls(rows: list[Row], call_tokens: int) -> Iterator[list[Row]]:
    """Rows of like length together, at most `call_tokens` of them when padded to the longest, or one row."""
    call: list[Row] = []
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        if call and (len(call) + 1) * len(call[0].ids) > call_tokens:
            yield call
            call = []
        call.append(row)
    if call:
        yield call


def _visible(rows: list[Row]) -> torch.Tensor:
    """[B, N, N] bool: node q sees its ancestors and itself, the first row being the longest."""
    longest = len(rows[0].ids)
    seen = np.zeros((len(rows), longest, longest), dtype=bool)
    seen[:] = np.eye(longest, dtype=bool)  # padding sees itself: attention to nothing is NaN
    for matrix, row in zip(seen, rows, strict=True):
        for node, parent in enumerate(row.parent):
            if parent >= 0:
                matrix[node] |= matrix[parent]
    return torch.from_numpy(seen)


@torch.inference_mode()
def loglikelihoods(
    model: nn.Module,
    plans: Sequence[DropPlan],
    items: Sequence[Item],
    row_tokens: int | None = None,
    progress: bool = True,
    label: str = "evaluate",
) -> tuple[np.ndarray, np.ndarray]:
    """Sum of log p(token) over each item's continuation, and whether greedy decoding would have produced it.

    model: undropped (or dropped: then every plan's indices still mean the undropped model). items: tokens and number
    scored, 1 <= n_scored < len(tokens). label: of the progress bar. Returns two arrays [n_plans, n_items], float64 and
    bool. Log-softmax in float32. Memory: besides the model, at most one residual stream [B, N, C] per layer at which
    plans part, a mask [B, 1, N, N] and logits [128, vocabulary]. Rows are `row_tokens` long (N; by default 256 on CPUs,
    1024 on CUDA), or up to 4096 where that lets more questions share their few-shot examples, or as long as the longest
    item; B rows run together while B N is at most 1024 on CPUs, 4096 on CUDA.

    Raises ValueError without plans or items, for a plan of another depth, and for a model whose attention takes no
    explicit mask.
    """
    check_packable(model)
    if not items:
        raise ValueError("no items to score; give at least one")
    for item in items:
        if not 1 <= item.n_scored < len(item.tokens):
            raise ValueError(f"an item scores {item.n_scored} of {len(item.tokens)} tokens; needs a context of >= 1")
    parts = find_anatomy(model)
    plans = whole_plans(model, plans)
    sums = np.zeros((len(plans), len(items)))
    greedy = np.ones((len(plans), len(items)), dtype=bool)
    device = model.device.type
    row_tokens = row_tokens or ROW_TOKENS.get(device, ROW_TOKENS["cpu"])
    rows = list(pack(items, row_tokens, pairs_per_token=6 * model.config.hidden_size))  # 12 C² of weights to 2 C a pair
    n_tokens = sum(len(row.ids) for row in rows)
    with eval_mode(model), tqdm(total=n_tokens, desc=label, unit="tok", disable=not progress) as bar:
        for call in _calls(rows, CALL_TOKENS.get(device, CALL_TOKENS["cpu"])):
            longest = len(call[0].ids)
            targets = [
                (index, [k * longest + node for node in nodes], tokens)  # nodes of the call, row after row
                for k, row in enumerate(call)
                for index, nodes, tokens in row.targets
            ]
            nodes = [node for _, nodes, _ in targets for node in nodes]
            read = sorted(set(nodes))
            place = torch.from_numpy(np.searchsorted(read, nodes))
            tokens = torch.tensor([token for _, _, tokens in targets for token in tokens])
            for group, hidden in _walk(model, parts, plans, call):
                logp, is_likeliest = _read_off(model, parts, hidden.flatten(0, 1)[read], place, tokens)
                start = 0
                for index, _, item_tokens in targets:
                    stop = start + len(item_tokens)
                    sums[group, index] = logp[start:stop].sum()
                    greedy[group, index] = is_likeliest[start:stop].all()
                    start = stop
            bar.update(sum(len(row.ids) for row in call))
    return sums, greedy


def whole_plans(model: nn.Module, plans: Iterable[DropPlan]) -> list[DropPlan]:
    """The plans, each with what the model lacks already. ValueError without any, or for a plan of another depth."""
    parts = find_anatomy(model)
    plans = [parts.whole_plan(plan) for plan in plans]
    if not plans:
        raise ValueError("no plans to measure; give at least one (DropPlan() is the whole model)")
    return plans


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model without dropout for the length of a `with` block; every module then has its own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def check_packable(model: nn.Module) -> None:
    """ValueError unless the attention implementation honors an explicit [B, 1, N, N] mask (eager or sdpa)."""
    implementation = model.config._attn_implementation
    if implementation not in ("eager", "sdpa"):
        raise ValueError(
            f"packed evaluation needs an explicit attention mask, which {implementation!r} attention does not take; "
            "load the model with attn_implementation='sdpa' or 'eager'"
        )


def _walk(model, parts: Anatomy, plans: list[DropPlan], rows: list[Row]) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Yield (indices of plans, their final residual stream [B, N, C]), computing every shared stretch once."""
    hidden, calls = _row_calls(model, parts, rows)

    def walk(group: list[int], i: int, hidden: torch.Tensor) -> Iterator[tuple[list[int], torch.Tensor]]:
        while i < parts.n_layers:
            branches: dict[tuple[str, ...], list[int]] = {}  # by what of layer i is dropped
            for k in group:
                gone = tuple(kind for kind in ("attn", "mlp") if i in getattr(plans[k], kind))
                branches.setdefault(gone, []).append(k)
            (first, group), *others = branches.items()
            for gone, members in others:
                yield from walk(members, i + 1, step(i, gone, hidden))
            hidden = step(i, first, hidden)
            i += 1
        yield group, hidden

    def step(i: int, gone: tuple[str, ...], hidden: torch.Tensor) -> torch.Tensor:
        if len(gone) == 2:
            return hidden
        live = [kind for kind in gone if i not in getattr(parts.plan, kind)]
        return run_layer(parts, i, hidden, calls[i], without=live)

    yield from walk(list(range(len(plans))), 0, hidden)


def _row_calls(model, parts: Anatomy, rows: list[Row]) -> tuple[torch.Tensor, dict[int, LayerCall]]:
    """`layer_calls` for token tries, the longest first: what each node may see is in the masks."""
    device = model.get_input_embeddings().weight.device
    longest = len(rows[0].ids)

    def padded(columns: list[list[int]]) -> torch.Tensor:  # [B, N]
        return torch.tensor([values + [0] * (longest - len(values)) for values in columns], device=device)

    def additive(allowed: torch.Tensor) -> torch.Tensor:  # [B, 1, N, N]
        mask = torch.zeros(allowed.shape, dtype=model.dtype, device=device)
        return mask.masked_fill(~allowed, torch.finfo(model.dtype).min)[:, None]

    position = padded([row.position for row in rows])
    distance = position[:, :, None] - position[:, None, :]
    visible = _visible(rows).to(device)
    full = additive(visible)
    ids = padded([row.ids for row in rows])
    hidden, calls = layer_calls(parts, input_ids=ids, attention_mask=full, position_ids=position)
    masks = {None: full}
    for place, (i, (args, kwargs)) in enumerate(calls.items()):
        window = _window(model.config, place)
        if window not in masks:
            masks[window] = additive(visible & (distance < window))

        def with_own_mask(value, mask=masks[window]):
            return mask if isinstance(value, torch.Tensor) and value.shape == full.shape else value

        calls[i] = tuple(map(with_own_mask, args)), {name: with_own_mask(value) for name, value in kwargs.items()}
    return hidden, calls


def _window(config, layer: int) -> int | None:
    """How many tokens back this layer's attention reaches (itself included), None for all."""
    types = getattr(config, "layer_types", None)
    if types is not None:
        return config.sliding_window if types[layer] == "sliding_attention" else None
    return getattr(config, "sliding_window", None)


def _read_off(
    model, parts: Anatomy, hidden: torch.Tensor, place: torch.Tensor, tokens: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability of each token at its place in the streams [n_read, C], and whether it is the most likely."""
    logp: list[torch.Tensor] = []
    is_likeliest: list[torch.Tensor] = []
    for start in range(0, len(place), HEAD_POSITIONS):
        part = slice(start, start + HEAD_POSITIONS)
        rows, inverse = torch.unique(place[part], return_inverse=True)
        logits = head_logits(model, parts, hidden[rows.to(hidden.device)])
        token = tokens[part].to(logits.device)
        inverse = inverse.to(logits.device)
        highest = (logits.amax(-1)[inverse] == logits[inverse, token]).nonzero()[:, 0]
        first = torch.zeros_like(inverse, dtype=torch.bool)
        first[highest] = logits[inverse[highest]].argmax(-1) == token[highest]  # argmax is slow, and settles ties
        is_likeliest.append(first.cpu())
        # log_softmax, not logsumexp: its rounding is lm-eval's rounding (a bias of 1e-5 a token in float32)
        logp.append(logits.log_softmax(-1)[inverse, token].double().cpu())
    return torch.cat(logp).numpy(), torch.cat(is_likeliest).numpy()
