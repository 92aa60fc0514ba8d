"""Log-likelihoods of many continuations under many drop plans, close to the cost of the forward pass.

Nothing is computed twice. Sequences are packed into rows as token tries: a context is run once for all its
continuations, a few-shot prefix once for all the questions of its row. Rows of like length run together, with next to
no padding. Plans are walked as a trie over layers: plans that agree on layers 0..i share the residual stream up to
there. The language-model head runs only on the positions that are scored. Causal attention makes all of this exact.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm  # not tqdm.auto: a widget inside a kernel never reaches the terminal

from .anatomy import Anatomy, anatomy
from .calibration import Calibration
from .plan import DropPlan
from .prune import stub_sublayer

# Tokens of a call: enough to keep the device busy. Of a row: longer ones only cost more attention, quadratic in them.
CALL_TOKENS = {"cpu": 1024, "cuda": 4096}
ROW_TOKENS = {"cpu": 256, "cuda": 1024}
LONGEST_ROW = 4096


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
    row, path = Row([], [], [], []), []  # path: (token, node) from the root to the last item's last token
    for index in sorted(range(len(items)), key=lambda k: items[k].tokens):
        tokens, inputs = items[index].tokens, items[index].tokens[:-1]  # the last token is predicted, never read
        shared = 0
        while shared < min(len(path), len(inputs)) and path[shared][0] == inputs[shared]:
            shared += 1
        best = shared + math.sqrt(shared**2 + shared * pairs_per_token)
        if row.ids and len(row.ids) + len(inputs) - shared > max(row_tokens, min(best, LONGEST_ROW)):
            yield row
            row, path, shared = Row([], [], [], []), [], 0
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
    progress: bool | str = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Sum of log p(token) over each item's continuation, and whether greedy decoding would have produced it.

    model: undropped (or dropped: then every plan's indices still mean the undropped model). items: tokens and number
    scored, 1 <= n_scored < len(tokens). Returns two arrays [n_plans, n_items], float64 and bool. Log-softmax in
    float32. Memory: besides the model, at most one residual stream [B, N, C] per layer at which plans part, a mask
    [B, 1, N, N] and logits [128, vocabulary]. Rows are `row_tokens` long (N; by default 256 on CPUs, 1024 on CUDA), or
    up to 4096 where that lets more questions share their few-shot examples, or as long as the longest item; B rows run
    together while B N is at most 1024 on CPUs, 4096 on CUDA. Raises ValueError for a model whose attention takes no
    explicit mask.
    """
    check_packable(model)
    for item in items:
        if not 1 <= item.n_scored < len(item.tokens):
            raise ValueError(f"an item scores {item.n_scored} of {len(item.tokens)} tokens; needs a context of >= 1")
    parts = anatomy(model)
    plans = [plan | parts.plan for plan in plans]
    for plan in plans:
        DropPlan(plan.attn, plan.mlp, parts.n_layers)  # raises for indices the model does not have
    sums = np.zeros((len(plans), len(items)))
    greedy = np.ones((len(plans), len(items)), dtype=bool)
    device = model.device.type
    row_tokens = row_tokens or ROW_TOKENS.get(device, ROW_TOKENS["cpu"])
    rows = list(pack(items, row_tokens, pairs_per_token=6 * model.config.hidden_size))  # 12 C² of weights to 2 C a pair
    label = progress if isinstance(progress, str) else "evaluate"
    training = model.training
    model.eval()
    with tqdm(total=sum(len(row.ids) for row in rows), desc=label, unit="tok", disable=not progress) as bar:
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
            wanted = torch.tensor([token for _, _, tokens in targets for token in tokens])
            for group, hidden in _walk(model, parts, plans, call):
                logp, best = _head(model, parts, hidden.flatten(0, 1)[read], place, wanted)
                start = 0
                for index, _, tokens in targets:
                    stop = start + len(tokens)
                    sums[group, index] = logp[start:stop].sum()
                    greedy[group, index] = best[start:stop].all()
                    start = stop
            bar.update(sum(len(row.ids) for row in call))
    model.train(training)
    return sums, greedy


def check_packable(model: nn.Module) -> None:
    """ValueError unless the attention implementation honours an explicit [B, 1, N, N] mask (eager or sdpa)."""
    implementation = model.config._attn_implementation
    if implementation not in ("eager", "sdpa"):
        raise ValueError(
            f"packed evaluation needs an explicit attention mask, which {implementation!r} attention does not take; "
            "load the model with attn_implementation='sdpa' or 'eager'"
        )


def _walk(model, parts: Anatomy, plans: list[DropPlan], rows: list[Row]) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Yield (indices of plans, their final residual stream [B, N, C]), computing every shared stretch once."""
    hidden, calls = _row_calls(model, parts, rows)

    def walk(group: list[int], i: int, hidden: torch.Tensor):
        while i < parts.n_layers:
            actions: dict[tuple[bool, bool], list[int]] = {}
            for k in group:
                actions.setdefault((i in plans[k].attn, i in plans[k].mlp), []).append(k)
            branches = list(actions.items())
            for action, members in branches[1:]:
                yield from walk(members, i + 1, step(i, action, hidden))
            action, group = branches[0]
            hidden, i = step(i, action, hidden), i + 1
        yield group, hidden

    def step(i: int, action: tuple[bool, bool], hidden: torch.Tensor) -> torch.Tensor:
        if parts.layers[i] is None or all(action):
            return hidden
        gone = [kind for kind, drop in zip(("attn", "mlp"), action, strict=True) if drop]
        return run_layer(parts, i, hidden, calls[i], [kind for kind in gone if i not in getattr(parts.plan, kind)])

    yield from walk(list(range(len(plans))), 0, hidden)


def run_layer(
    parts: Anatomy, i: int, hidden: torch.Tensor, call: tuple[tuple, dict], without: Sequence[str] = ()
) -> torch.Tensor:
    """The residual stream after layer i, [B, T, C], its live sublayers named in `without` ("attn", "mlp") left out."""
    undo = [former for kind in without for former in stub_sublayer(parts.layers[i], parts.layout, kind)]
    try:
        out = parts.layers[i](hidden, *call[0], **call[1])
    finally:
        for owner, name, value in undo:
            setattr(owner, name, value)
    return out[0] if isinstance(out, tuple) else out


class _Record(nn.Module):
    """Stands for a decoder layer: keeps what it was called with and passes the residual stream on."""

    def forward(self, hidden: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        self.call = hidden, args, kwargs
        return hidden


def layer_calls(parts: Anatomy, **inputs) -> tuple[torch.Tensor, dict[int, tuple[tuple, dict]]]:
    """The residual stream before the first layer, [B, T, C], and (args, kwargs) with which the decoder calls layer i.

    inputs: of the decoder. The layers themselves do not run.
    """
    present = [i for i, layer in enumerate(parts.layers) if layer is not None]
    recorders = nn.ModuleList(_Record() for _ in present)
    stock = getattr(parts.decoder, parts.layers_name)
    setattr(parts.decoder, parts.layers_name, recorders)
    try:
        parts.decoder(**inputs, use_cache=False)
    finally:
        setattr(parts.decoder, parts.layers_name, stock)
    return recorders[0].call[0], {i: recorder.call[1:] for i, recorder in zip(present, recorders, strict=True)}


def _row_calls(model, parts: Anatomy, rows: list[Row]) -> tuple[torch.Tensor, dict[int, tuple[tuple, dict]]]:
    """`layer_calls` for token tries, the longest first: what each node may see is in the masks."""
    embedding = model.get_input_embeddings().weight
    longest = len(rows[0].ids)
    ids, position = (
        torch.tensor([values + [0] * (longest - len(values)) for values in columns], device=embedding.device)
        for columns in ([row.ids for row in rows], [row.position for row in rows])
    )
    visible = _visible(rows).to(embedding.device)
    distance = position[:, :, None] - position[:, None, :]
    hidden_from = torch.finfo(model.dtype).min

    def additive(allowed: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(allowed.shape, dtype=model.dtype, device=allowed.device)
        return mask.masked_fill(~allowed, hidden_from)[:, None]  # [B, 1, N, N]

    full = additive(visible)
    hidden, calls = layer_calls(parts, input_ids=ids, attention_mask=full, position_ids=position)
    masks = {None: full}
    for place, (i, (args, kwargs)) in enumerate(calls.items()):
        window = _window(model.config, place)
        if window not in masks:
            masks[window] = additive(visible & (distance < window))

        def own(value, mask=masks[window]):
            return mask if isinstance(value, torch.Tensor) and value.shape == full.shape else value

        calls[i] = tuple(own(a) for a in args), {name: own(value) for name, value in kwargs.items()}
    return hidden, calls


def _window(config, layer: int) -> int | None:
    """How many tokens back this layer's attention reaches (itself included), None for all."""
    types = getattr(config, "layer_types", None)
    if types is not None:
        return config.sliding_window if types[layer] == "sliding_attention" else None
    return getattr(config, "sliding_window", None)


def head_logits(model, parts: Anatomy, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [..., vocabulary] in float32 from the residual stream after the last layer, [..., C]."""
    normed = parts.decoder.get_submodule(parts.layout.final)(hidden)
    logits = model.get_output_embeddings()(normed).float()
    cap = getattr(model.config, "final_logit_softcapping", None)  # Gemma-2
    return torch.tanh(logits / cap) * cap if cap else logits


def _head(model, parts: Anatomy, hidden: torch.Tensor, place: torch.Tensor, wanted: torch.Tensor):
    """Log-probability of each wanted token and whether it is the most likely, from the streams [n_read, C]."""
    logp, best = [], []
    for start in range(0, len(place), 128):  # small enough for the allocator to reuse its memory
        part = slice(start, start + 128)
        rows, inverse = torch.unique(place[part], return_inverse=True)
        logits = head_logits(model, parts, hidden[rows.to(hidden.device)])
        token = wanted[part].to(logits.device)
        inverse = inverse.to(logits.device)
        highest = (logits.amax(-1)[inverse] == logits[inverse, token]).nonzero()[:, 0]
        first = torch.zeros_like(inverse, dtype=torch.bool)
        first[highest] = logits[inverse[highest]].argmax(-1) == token[highest]  # argmax is slow, and settles ties
        best.append(first.cpu())
        # log_softmax, not logsumexp: its rounding is lm-eval's rounding (a bias of 1e-5 a token in float32)
        logp.append(logits.log_softmax(-1)[inverse, token].double().cpu())
    return torch.cat(logp).numpy(), torch.cat(best).numpy()


def text_items(calibration: Calibration) -> list[Item]:
    """Each sample without its padding, every token but the first to be scored. ValueError for less than two tokens."""
    ids, mask = calibration.input_ids, calibration.attention_mask
    samples = [row if mask is None else row[mask[k].bool()] for k, row in enumerate(ids)]
    if min(map(len, samples)) < 2:
        raise ValueError("perplexity needs at least two tokens in every sample; the shortest has one")
    return [Item(tuple(sample.tolist()), len(sample) - 1) for sample in samples]


def perplexity(model, calibration: Calibration, progress: bool = True) -> dict:
    """Token-level next-token perplexity of one model: see `perplexity_sweep`."""
    frame = perplexity_sweep(model, {"": DropPlan()}, calibration, progress)
    return frame.drop(columns="plan").iloc[0].to_dict()


def perplexity_sweep(
    model, plans: Mapping[str, DropPlan], calibration: Calibration, progress: bool = True
) -> pd.DataFrame:
    """Perplexity of many plans of one model on the samples of `calibration` (each token but a sample's first).

    Returns one row per plan: plan, perplexity = exp(log_perplexity), log_perplexity (mean negative log-likelihood per
    token, nats), stderr and log_stderr (of either, over samples; NaN for a single sample), n_tokens. Padding is left
    out. Raises ValueError for samples of fewer than two tokens.
    """
    items = text_items(calibration)
    sums, _ = loglikelihoods(model, list(plans.values()), items, progress=progress and "perplexity")
    counts = np.array([item.n_scored for item in items])
    log_ppl = -sums.sum(1) / counts.sum()
    n = len(items)
    spread = -sums - log_ppl[:, None] * counts  # ratio estimator: samples may differ in length
    log_stderr = np.sqrt((spread**2).sum(1) * n / max(n - 1, 1)) / counts.sum() if n > 1 else np.full(len(sums), np.nan)
    return pd.DataFrame(
        {
            "plan": list(plans),
            "perplexity": np.exp(log_ppl),
            "stderr": np.exp(log_ppl) * log_stderr,
            "log_perplexity": log_ppl,
            "log_stderr": log_stderr,
            "n_tokens": int(counts.sum()),
        }
    )
