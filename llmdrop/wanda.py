"""Wanda (Sun et al. 2023, arXiv 2306.11695): zero the single weights that matter least, to compare dropping with.

The score of a weight is |W_ij| ||x_j||_2, where x_j is what its input j reads over all calibration tokens. In every
row of every linear layer of the decoder's layers (not of the embedding and the head) the weights that score lowest
become zero, the same number in each row. As in the authors' code, layer after layer: the norms of a layer are taken
with the layers before it already pruned, the layer itself still whole. Nothing is retrained. The matrices keep their
shapes, so that dense kernels take as long as before.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache

import pandas as pd
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .anatomy import Anatomy, anatomy
from .calibration import Calibration
from .evaluate import evaluate
from .fingerprint import model_key, provenance, speed_key, tokenizer_digest, version
from .hooks import batches
from .plan import DropPlan
from .prune import dropped
from .results import Store, _name, _plan_key, _short
from .speed import measure_speed, over_rounds
from .sweep import layer_calls, perplexity, run_layer
from .tasks import task_digest

Zeros = dict[str, torch.Tensor]  # "<layer>.<linear>" -> the inputs that each row loses, int32 [rows, k]


def lowest(weight: torch.Tensor, norms: torch.Tensor, share: float) -> torch.Tensor:
    """Which weights of each row score lowest: int32 [rows, k], k = round(share * inputs), from weight [rows, inputs].

    norms: ||x_j|| of each input, [inputs]. Of equal scores the first inputs go. (The authors round k down.)
    """
    k = round(share * weight.shape[1])
    score = weight.abs().float() * norms
    found = score.topk(min(k + 1, weight.shape[1]), largest=False)
    index = found.indices[:, :k]
    if 0 < k < weight.shape[1]:
        tied = found.values[:, k - 1] == found.values[:, k]  # topk says nothing about which of them it takes
        index[tied] = score[tied].sort(dim=1, stable=True).indices[:, :k]
    return index.int()


@torch.inference_mode()
def wanda(
    model: nn.Module, calibration: Calibration, share: float, batch_size: int = 8, sequential: bool = True
) -> Zeros:
    """Find the `share` of the weights of every row that Wanda zeroes. The model itself is not changed.

    share: from 0 to below 1. sequential=False takes all norms in the undropped, unpruned model, in half the time.
    Layers dropped before are left out, padding does not count. Takes two forward passes over the calibration text, and
    besides the model the memory of its residual streams, [tokens, C], and of the result, 4 bytes a zero.

    Raises ValueError for a share out of range, an unknown architecture, weights that are no plain matrices (quantized
    ones), or calibration text on which a layer's inputs are not finite.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share={share}; give the share of the weights to zero, from 0 to below 1")
    parts, zeros, undo, streams, calls, real = anatomy(model), {}, [], [], [], []
    names, training = linears(parts), model.training
    model.eval()
    for _, inputs in batches(calibration, batch_size, model.get_input_embeddings().weight.device):
        stream, call = layer_calls(parts, **inputs)
        streams.append(stream), calls.append(call)
        real.append(inputs["attention_mask"].bool().flatten() if "attention_mask" in inputs else None)
    try:
        for i in (i for i, layer in enumerate(parts.layers) if layer is not None):
            mine = {name: module for name, module in names.items() if name.startswith(f"{i}.")}
            after, norms = _through(parts, i, streams, calls, mine, real)
            for name, module in mine.items():
                if not norms[name].isfinite().all():
                    raise ValueError(
                        f"what {name} reads on this calibration text is not finite, so Wanda cannot score its weights; "
                        f"load the model in bfloat16 or float32 (it is in {module.weight.dtype})"
                    )
                zeros[name] = lowest(_rows(module), norms[name], share)
            if sequential:
                undo += _zero(mine, zeros)
                after, _ = _through(parts, i, streams, calls, {}, real)
            streams = after
    finally:
        _restore(undo)
        model.train(training)
    return zeros


def _through(parts: Anatomy, i: int, streams: list, calls: list, watched: Mapping[str, nn.Module], real: list):
    """(The residual streams after layer i, ||x_j|| of each watched linear layer over all real tokens.)"""
    squares: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable:
        def hook(module, args):
            x = args[0].reshape(-1, args[0].shape[-1]).float()  # OPT's MLP reads [B * T, C], all others [B, T, C]
            x = x if mask is None else x[mask.to(x.device)]
            squares[name] = squares.get(name, 0) + x.square().sum(0).double()

        return hook

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in watched.items()]
    try:
        after = []
        for k, x in enumerate(streams):
            mask = real[k]  # which the hooks read
            after.append(run_layer(parts, i, x, calls[k][i]))
    finally:
        for handle in handles:
            handle.remove()
    return after, {name: total.sqrt().float() for name, total in squares.items()}


def linears(parts: Anatomy) -> dict[str, nn.Module]:
    """The linear layers of all live sublayers: "<layer>.<name in the layer>" -> nn.Linear or (GPT-2) Conv1D."""
    found = {}
    for i, layer in enumerate(parts.layers):
        for name, module in layer.named_modules() if layer is not None else ():
            matrices = [p for p in module.parameters(recurse=False) if p.ndim > 1]
            if not matrices:
                continue
            if not isinstance(module, nn.Linear | Conv1D) or not module.weight.is_floating_point():
                raise ValueError(
                    f"layer {i}'s {name} is a {type(module).__name__} of {matrices[0].dtype}, no plain matrix: Wanda "
                    "scores single weights, so it needs a model that is not quantized"
                )
            found[f"{i}.{name}"] = module
    return found


def _rows(module: nn.Module) -> torch.Tensor:
    """The weight as [outputs, inputs], sharing its memory."""
    return module.weight.data.T if isinstance(module, Conv1D) else module.weight.data


@contextmanager
def zeroed(model: nn.Module, zeros: Zeros) -> Iterator[nn.Module]:
    """The model with these weights zero; every bit is restored afterwards, also after an exception.

    Raises ValueError for zeros that were found in a model with other layers.
    """
    modules = linears(anatomy(model))
    for name, module in modules.items():
        if name not in zeros or len(zeros[name]) != len(_rows(module)):
            shape = tuple(_rows(module).shape)
            raise ValueError(f"these zeros are of another model: none are for its {name} of {shape}; find its own")
    undo = _zero(modules, zeros)
    try:
        yield model
    finally:
        _restore(undo)


@torch.no_grad()
def _zero(modules: Mapping[str, nn.Module], zeros: Zeros) -> list[tuple]:
    undo = []
    for name, module in modules.items():
        rows, index = _rows(module), zeros[name].long()
        undo.append((rows, index, rows.gather(1, index)))
        rows.scatter_(1, index, 0)
    return undo


@torch.no_grad()
def _restore(undo: list[tuple]) -> None:
    for rows, index, values in undo:
        rows.scatter_(1, index, values)


def removed_share(model: nn.Module, plan: DropPlan) -> float:
    """The share of the weights of the layers' linear layers (no embedding, head, norms, biases) that `plan` removes."""

    def count() -> int:
        return sum(module.weight.numel() for module in linears(anatomy(model)).values())

    whole = count()
    with dropped(model, plan):
        return 1 - count() / whole


def rounded_share(model: nn.Module, share: float) -> float:
    """The share of the same weights that Wanda zeroes when asked for `share`: it rounds in every row."""
    shapes = [_rows(module).shape for module in linears(anatomy(model)).values()]
    return sum(n * round(share * inputs) for n, inputs in shapes) / sum(n * inputs for n, inputs in shapes)


def measure(
    store: Store,
    model: nn.Module,
    tokenizer,
    shares: Mapping[str, float],
    calibration: Calibration,
    texts: Sequence[Calibration],
    tasks: Sequence[str],
    limit: int | None = None,
    data_dir=None,
    num_fewshot=None,
    batch_size: int = 8,
    find: Callable[[float], Zeros] | None = None,
) -> tuple[pd.DataFrame, list[pd.DataFrame]]:
    """(rows as from `evaluate_sweep`, one frame a text as from `perplexity_sweep`) of Wanda at each of the shares.

    shares: by the name that stands in their column plan. find: gives `wanda(model, calibration, share)`, where it
    serves several measurements. Every share's tasks and texts are stored one by one.
    """
    find = find or cache(lambda share: wanda(model, calibration, share, batch_size))
    modules = ("wanda", "evaluate", "harness", "sweep", "tasks", "hooks", "anatomy")
    key = model_key(model, batch_size, *modules) | {"calibration": calibration.digest}
    of_tasks = {"limit": limit, "lm_eval": version("lm_eval"), "tokenizer": tokenizer_digest(tokenizer)}
    items = [of_tasks | {"task": task, "task_digest": task_digest(task, data_dir, num_fewshot)} for task in tasks]
    items += [{"text": text.digest} for text in texts]
    names = [*tasks, *(_short(text) for text in texts)]
    rows, losses = [], [[] for _ in texts]
    for name, share in shares.items():

        def compute(missing: list[int], share=share):
            for i in missing:
                with zeroed(model, find(share)):
                    if i < len(tasks):
                        frame = evaluate(model, tokenizer, [tasks[i]], limit, data_dir, num_fewshot, batch_size)
                        value = frame.drop(columns="task").to_dict("records")
                    else:
                        value = perplexity(model, texts[i - len(tasks)], progress=False)
                yield value

        slugs = [f"{_name(model)}-{share:.4f}-{item}" for item in names]
        wanted = [(key | {"share": share} | item, slug) for item, slug in zip(items, slugs, strict=True)]
        values = store.get_many("wanda", wanted, compute, lambda: provenance(model, calibration))
        for k, found in enumerate(values):
            if k < len(tasks):
                rows += [{"plan": name, "task": tasks[k]} | row for row in found]
            else:
                losses[k - len(tasks)].append({"plan": name} | found)
    return pd.DataFrame(rows), [pd.DataFrame(loss) for loss in losses]


def speeds(
    store: Store,
    model: nn.Module,
    plans: Mapping[str, DropPlan],
    shares: Mapping[str, float],
    find: Callable[[float], Zeros],
    rounds: int = 5,
    **settings,
) -> pd.DataFrame:
    """`llmdrop.compare_speed` of plans, the first of them the baseline, and of Wanda's models, in turn; stored.

    The matrices with zeros go through the same dense kernels as before. Returns one row each: plan, speedup (median
    over rounds of the baseline's seconds over this one's, both of one round), speedup_low and speedup_high (its
    smallest and largest), seconds, prefill_seconds, decode_seconds (medians).
    """

    def compute() -> list[dict]:
        rows = []
        for turn in range(rounds):
            for name in [*plans, *shares]:
                with dropped(model, plans[name]) if name in plans else zeroed(model, find(shares[name])):
                    one = measure_speed(model, repeats=1, warm_up=turn == 0, **settings)
                parts = {key: one[key] for key in ("seconds", "prefill_seconds", "decode_seconds")}
                rows.append({"plan": name, "round": turn} | parts)
        return rows

    key = speed_key(model, "wanda", "speed", "prune", "anatomy") | settings | {"rounds": rounds, "shares": dict(shares)}
    key["plans"] = {name: _plan_key(plan) for name, plan in plans.items()}
    rows = store.get("wanda-speed", key, compute, _name(model), lambda: provenance(model, **settings))
    return over_rounds(pd.DataFrame(rows), next(iter(plans))).reset_index()
