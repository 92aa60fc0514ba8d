"""Log-likelihoods of many continuations under many drop plans, close to the cost of the forward pass.

Nothing is computed twice. Sequences are packed into rows as token tries: a context is run once for all its
continuations, few-shot examples once for all the questions of their row. Plans are walked as a trie over layers: those
that agree on layers 0..i share the residual stream up to there. The head runs only on the positions that are scored.
"""

import inspect
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from os.path import commonprefix
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from ..anatomy import Anatomy, exclusive, find_anatomy, unwrapped
from ..calibration import check_readable
from ..plan import DropPlan
from ..proof import Call, random_copy
from ..prune import dropped, eval_mode
from ..sublayers import NOT_FINITE, head_logits, is_close, layer_calls, not_finite, run_layer

VERSION = 1  # raised when the numbers change

# Tokens of a call: enough to keep the device busy. Of a row: longer ones only cost more attention, quadratic in them.
CALL_TOKENS = {"cpu": 1024, "cuda": 4096}
ROW_TOKENS = {"cpu": 256, "cuda": 1024}
LONGEST_ROW = 4096
# by model and attention implementation: whether texts of so many tokens can share rows of so many
_PACKS: WeakKeyDictionary[nn.Module, dict[str, dict[tuple[int, int], bool]]] = WeakKeyDictionary()
LAST = 16  # tokens of a text by which it is seen whether it can share a row: the farthest from its beginning
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
    path: list[int] = []  # nodes of the last item's inputs
    last: tuple[int, ...] = ()
    for index in sorted(range(len(items)), key=lambda k: items[k].tokens):
        tokens = items[index].tokens
        inputs = tokens[:-1]  # the last token is predicted, never read
        shared = len(commonprefix((last, inputs)))
        best = shared + math.sqrt(shared**2 + shared * pairs_per_token)
        if row.ids and len(row.ids) + len(inputs) - shared > max(row_tokens, min(best, LONGEST_ROW)):
            yield row
            row = Row([], [], [], [])
            shared = 0
        path = path[:shared]
        for depth in range(shared, len(inputs)):
            row.parent.append(path[-1] if path else -1)
            path.append(len(row.ids))
            row.ids.append(inputs[depth])
            row.position.append(depth)
        n = items[index].n_scored
        row.targets.append((index, path[len(path) - n :], list(tokens[-n:])))
        last = inputs
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
    1024 on CUDA), or longer (see `pack`); B rows run together while B N is at most 1024 on CPUs, 4096 on CUDA.

    Raises ValueError without plans or items, for a plan of another depth, for a model whose attention takes no explicit
    mask, or that cannot read the tokens (see `calibration.check_readable`), and for values that are not finite, naming
    the layer.
    """
    model = unwrapped(model)
    _check(model, items)
    parts = find_anatomy(model)
    plans = whole_plans(model, plans)
    sums = np.zeros((len(plans), len(items)))
    greedy = np.ones((len(plans), len(items)), dtype=bool)
    groups = _groups(parts, items)
    if len(groups) > 1:
        for group in groups:
            some = [items[k] for k in group]
            sums[:, group], greedy[:, group] = loglikelihoods(model, plans, some, row_tokens, progress, label)
        return sums, greedy
    device = model.device.type
    row_tokens = row_tokens or ROW_TOKENS.get(device, ROW_TOKENS["cpu"])
    width = model.get_input_embeddings().weight.shape[-1]
    rows = list(pack(items, row_tokens, pairs_per_token=6 * width))  # 12 C² of weights to 2 C a pair
    n_tokens = sum(len(row.ids) for row in rows)
    with ExitStack() as undo:
        undo.enter_context(exclusive(parts.decoder))  # layers run one by one, and others would run among them
        undo.enter_context(eval_mode(model))
        if not _can_pack(model, parts, max(len(item.tokens) for item in items), max(len(row.ids) for row in rows)):
            return _plain(model, plans, items, progress, label)
        bar = undo.enter_context(tqdm(total=n_tokens, desc=label, unit="tok", disable=not progress))
        for call in _calls(rows, CALL_TOKENS.get(device, CALL_TOKENS["cpu"])):
            longest = len(call[0].ids)
            targets = [
                (index, [k * longest + node for node in nodes], tokens)  # nodes of the call, row after row
                for k, row in enumerate(call)
                for index, nodes, tokens in row.targets
            ]
            nodes = torch.tensor([node for _, nodes, _ in targets for node in nodes])
            tokens = torch.tensor([token for _, _, tokens in targets for token in tokens])
            reads = _reads(nodes, tokens, model.get_output_embeddings().weight.device)
            ends = np.cumsum([len(tokens) for _, _, tokens in targets])[:-1]
            for group, hidden in _walk(model, parts, plans, call):
                logp, is_likeliest = _read_off(model, parts, hidden.flatten(0, 1), reads)
                if not np.isfinite(logp).all():
                    raise ValueError(_not_finite(model, parts, plans[group[0]], call))
                of_items = zip(targets, np.split(logp, ends), np.split(is_likeliest, ends), strict=True)
                for (index, _, _), item_logp, item_is_likeliest in of_items:
                    sums[group, index] = item_logp.sum()
                    greedy[group, index] = item_is_likeliest.all()
            bar.update(sum(len(row.ids) for row in call))
    return sums, greedy


def _groups(parts: Anatomy, items: Sequence[Item]) -> list[list[int]]:
    """Which items can run in one batch: rotary settings that change with the longest text in it keep others apart."""
    config = parts.decoder.config
    settings = getattr(config, "rope_parameters", None) or {}
    of_kinds = [kind for kind in (settings, *settings.values()) if isinstance(kind, dict)]
    limits = [
        kind.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or config.max_position_embeddings
        for kind in of_kinds
        if kind.get("rope_type") in ("longrope", "dynamic")
    ]
    is_dynamic = any(kind.get("rope_type") == "dynamic" for kind in of_kinds)
    groups: dict[int, list[int]] = {}
    for k, item in enumerate(items):
        length = len(item.tokens) - 1  # the last token is never read
        group = 0
        if limits and length > min(limits):
            group = length if is_dynamic else 1
        groups.setdefault(group, []).append(k)
    return list(groups.values())


@torch.inference_mode()
def _can_pack(model: nn.Module, parts: Anatomy, longest: int, n_nodes: int) -> bool:
    """Whether texts of up to `longest` tokens in rows of up to `n_nodes` get the predictions that each gets by itself.

    Tried with such texts in such a row, since windows and chunks show where they end, be it in a text or in a row, and
    with a copy in float32 where rounding to 16 bits moves predictions as much as a neighbor in the row would. What was
    tried with a model is known from then on.
    """
    implementation = model.config._attn_implementation
    known = _PACKS.setdefault(model, {}).setdefault(implementation, {})
    size = (longest, n_nodes)
    if size not in known:
        if any(fits and longest <= texts and n_nodes <= nodes for (texts, nodes), fits in known.items()):
            known[size] = True
        elif model.dtype.itemsize < 4 and implementation in ("eager", "sdpa"):
            copy = random_copy(model, {model.get_input_embeddings(): _FewTokens(model.get_input_embeddings())})
            copy.config._attn_implementation = implementation
            known[size] = _are_alike(copy, find_anatomy(copy), *_trial(longest, n_nodes))
        else:
            known[size] = _are_alike(model, parts, *_trial(longest, n_nodes))
    if not known[size]:
        warnings.warn(
            f"texts of this {model.config.model_type!r} model cannot share rows, so each runs by itself: slower",
            stacklevel=3,
        )
    return known[size]


def _trial(longest: int, n_nodes: int) -> tuple[list[Item], Row]:
    """Texts that begin alike, in one row: a short one, long ones until the row is full, and another short one.

    The first long one is of `longest` tokens, the last of what is left of the row: with one long context for all
    questions, a second text as long would make the trial cost more than what is measured.
    """
    start = (3, 4, 5, 6)
    begun = 7  # tokens of a further long text that add no node: six are another's, and the last one is never read
    lengths = [max(longest, 8)]
    left = n_nodes - lengths[0] - 13  # the short texts have 18 nodes of their own, the first long one lacks 5
    while left > 0:
        lengths.append(min(lengths[0], max(left + begun, 2 * LAST)))
        left -= lengths[-1] - begun
    middle = tuple(3 + k % 23 for k in range(longest))
    beginnings = [start + (10, 3 + j // 20 % 20, 3 + j % 20) for j in range(len(lengths))]
    long = [(beginning + middle)[:n] for beginning, n in zip(beginnings, lengths, strict=True)]
    texts = [(*start, *range(7, 15)), *long, (*start, *range(20, 28))]
    items = [Item(text, len(text) - 1) for text in texts]
    return items, next(pack(items, row_tokens=n_nodes * 2 + 64))


def _are_alike(model: nn.Module, parts: Anatomy, items: list[Item], row: Row) -> bool:
    """Whether the first two items and the last two are predicted in the row as each is by itself."""
    device = model.get_input_embeddings().weight.device
    how = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        how["logits_to_keep"] = LAST
    try:
        _, hidden = next(_walk(model, parts, [parts.plan], [row]))
        for index, nodes, _ in row.targets[:2] + row.targets[2:][-2:]:
            nodes = nodes[-LAST:]
            logits = head_logits(model, parts, hidden[0, nodes])
            ids = torch.tensor([items[index].tokens[:-1]], device=device)
            alone = model(ids, **how).logits[0, -len(nodes) :]
            if alone.isfinite().all() and not is_close(logits, alone, model.dtype):  # else refused where it is measured
                return False
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError):
        return False
    return True


class _FewTokens(nn.Module):
    """Random vectors for token ids, of which those below 64 differ, whatever the size of the vocabulary."""

    def __init__(self, embedding: nn.Module):
        super().__init__()
        self.weight = nn.Parameter(
            torch.randn(64, embedding.weight.shape[1], generator=torch.Generator().manual_seed(0))
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(ids % 64, self.weight)


def _plain(
    model: nn.Module, plans: list[DropPlan], items: Sequence[Item], progress: bool, label: str
) -> tuple[np.ndarray, np.ndarray]:
    """`loglikelihoods` by the model's own forward pass, texts of like length in one batch, plan after plan."""
    sums = np.zeros((len(plans), len(items)))
    greedy = np.ones((len(plans), len(items)), dtype=bool)
    device = model.get_input_embeddings().weight.device
    order = sorted(range(len(items)), key=lambda k: -len(items[k].tokens))
    at_once = CALL_TOKENS.get(device.type, CALL_TOKENS["cpu"])
    with eval_mode(model), tqdm(total=len(plans) * len(items), desc=label, disable=not progress) as bar:
        for p, plan in enumerate(plans):
            with dropped(model, plan):
                left = order
                while left:
                    n = max(1, at_once // len(items[left[0]].tokens))
                    batch = left[:n]
                    left = left[n:]
                    texts = [torch.tensor(items[k].tokens[:-1]) for k in batch]  # the last token is never read
                    ids = pad_sequence(texts, batch_first=True).to(device)
                    mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True).to(device)
                    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
                    for row, k in enumerate(batch):
                        item = items[k]
                        end = len(item.tokens) - 1
                        predicted = logits[row, end - item.n_scored : end].float()
                        target = torch.tensor(item.tokens[-item.n_scored :], device=predicted.device)
                        logp = predicted.log_softmax(-1).gather(-1, target[:, None])
                        if not logp.isfinite().all():
                            raise ValueError(f"the model gives values that are not finite on this text. {NOT_FINITE}")
                        sums[p, k] = logp.double().sum().item()
                        greedy[p, k] = bool((predicted.argmax(-1) == target).all())
                    bar.update(len(batch))
    return sums, greedy


def whole_plans(model: nn.Module, plans: Iterable[DropPlan]) -> list[DropPlan]:
    """The plans, each with what the model lacks already. ValueError without any, or for a plan of another depth."""
    parts = find_anatomy(model)
    plans = [parts.whole_plan(plan) for plan in plans]
    if not plans:
        raise ValueError("no plans to measure; give at least one (DropPlan() is the whole model)")
    return plans


def _check(model: nn.Module, items: Sequence[Item]) -> None:
    implementation = model.config._attn_implementation
    if implementation not in ("eager", "sdpa"):
        raise ValueError(
            f"packed evaluation needs an explicit attention mask, which {implementation!r} attention does not take; "
            "load the model with attn_implementation='sdpa' or 'eager'"
        )
    if not items:
        raise ValueError("no items to score; give at least one")
    for item in items:
        if not 1 <= item.n_scored < len(item.tokens):
            raise ValueError(f"an item scores {item.n_scored} of {len(item.tokens)} tokens; needs a context of >= 1")
    largest = max(max(item.tokens) for item in items)
    check_readable(model, largest, max(len(item.tokens) for item in items) - 1)  # the last token is not read


def _walk(model, parts: Anatomy, plans: list[DropPlan], rows: list[Row]) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Yield (indices of plans, their final residual stream [B, N, C]), computing every shared stretch once."""
    hidden, calls = _layer_calls(model, parts, rows)

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
        is_nothing = len(gone) == 2 or parts.splits[i] is None
        return hidden if is_nothing else run_layer(parts, i, hidden, calls[i], without=gone)

    yield from walk(list(range(len(plans))), 0, hidden)


def _not_finite(model: nn.Module, parts: Anatomy, plan: DropPlan, rows: list[Row]) -> str:
    """The complaint about the first layer, without the plan's sublayers, whose streams are not finite."""
    hidden, calls = _layer_calls(model, parts, rows)
    for i in range(parts.n_layers):
        gone = [kind for kind in ("attn", "mlp") if i in getattr(plan, kind)]
        if len(gone) < 2:
            hidden = run_layer(parts, i, hidden, calls[i], without=gone)
            if not hidden.isfinite().all():
                return not_finite("block", i)
    return f"the head gives values that are not finite on this text. {NOT_FINITE}"


def _layer_calls(model, parts: Anatomy, rows: list[Row]) -> tuple[torch.Tensor, dict[int, Call]]:
    """`layer_calls` for token tries, the longest first: what each node may see is in the masks."""
    device = model.get_input_embeddings().weight.device
    ids = pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True).to(device)  # [B, N]
    position = pad_sequence([torch.tensor(row.position) for row in rows], batch_first=True).to(device)
    visible = _visible(rows).to(device)

    def additive(allowed: torch.Tensor) -> torch.Tensor:  # [B, 1, N, N]
        mask = torch.zeros(allowed.shape, dtype=model.dtype, device=device)
        return mask.masked_fill(~allowed, torch.finfo(model.dtype).min)[:, None]

    mask = additive(visible)
    config = parts.decoder.config
    window = getattr(config, "sliding_window", None)  # how many tokens back, itself included
    if window is not None:
        near = mask
        if window < ids.shape[1]:
            distance = position.int()[:, :, None] - position.int()[:, None, :]
            near = additive(visible & (distance < window))
        by_type = getattr(config, "layer_types", None) is not None
        mask = {"full_attention": mask, "sliding_attention": near} if by_type else near
    return layer_calls(parts, input_ids=ids, attention_mask=mask, position_ids=position)


def _reads(nodes: torch.Tensor, tokens: torch.Tensor, device: torch.device) -> list[tuple[torch.Tensor, ...]]:
    """HEAD_POSITIONS scored positions at a time: (distinct nodes, the place of each position's among them, its token).

    All of them go to the device at once: every copy waits for what the GPU has to do.
    """
    pieces: list[torch.Tensor] = []
    for node, token in zip(nodes.split(HEAD_POSITIONS), tokens.split(HEAD_POSITIONS), strict=True):
        pieces += [*torch.unique(node, return_inverse=True), token]
    on_device = torch.cat(pieces).to(device).split([len(piece) for piece in pieces])
    return list(zip(on_device[::3], on_device[1::3], on_device[2::3], strict=True))


def _read_off(
    model, parts: Anatomy, hidden: torch.Tensor, reads: list[tuple[torch.Tensor, ...]]
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability of each token after its node of the streams [n_nodes, C], and whether it is the most likely."""
    found: list[torch.Tensor] = []
    for read, place, token in reads:
        logits = head_logits(model, parts, hidden[read.to(hidden.device)])
        place = place.to(logits.device)  # over several GPUs the head's is not always where logits come out
        token = token.to(logits.device)
        is_likeliest = logits.argmax(-1)[place] == token
        # log_softmax, not logsumexp: its rounding is lm-eval's rounding (a bias of 1e-5 a token in float32)
        found.append(torch.stack([logits.log_softmax(-1)[place, token].double(), is_likeliest.double()]))
    logp, is_likeliest = torch.cat(found, 1).cpu().numpy()  # waits for the device, once
    return logp, is_likeliest.astype(bool)
