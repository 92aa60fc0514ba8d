"""What a small model can do during its training, and what dropping its layers costs then (Figure 7, beyond scores)."""

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
import torch
from transformers import LlamaForCausalLM

from ..calibration import Calibration
from ..evaluation.perplexity import text_items
from ..evaluation.sweep import loglikelihoods
from ..plan import DropPlan, plan_drop
from ..scoring import ImportanceScores

DROPPED_KINDS = ("attn", "mlp", "block")
N_REPEATED = 32  # sequences of random tokens, each followed by itself


def abilities(model: LlamaForCausalLM, valid: Calibration) -> dict[str, float]:
    """How much a model makes of its context.

    Returns in_context (loss on the last eighth of each window less that on the second eighth, nats per token: Olsson et
    al. 2022 take tokens 500 and 50), repeated_loss (loss on random tokens that stood in the same order before, nats per
    token; log of the vocabulary for who does not see that) and induction (the largest share, over attention heads, of
    a token's attention on the one after its earlier occurrence, mean over those random tokens: the same paper's
    prefix matching).
    """
    ids = valid.input_ids
    n_tokens = ids.shape[1]
    eighth = max(n_tokens // 8, 1)
    losses = _token_losses(model, ids)  # [n, T - 1]
    in_context = losses[:, -eighth:].mean() - losses[:, eighth - 1 : 2 * eighth - 1].mean()

    random = np.random.default_rng(0)
    once = torch.from_numpy(random.integers(1, model.config.vocab_size, (N_REPEATED, n_tokens // 2)))
    twice = torch.cat([once, once], dim=1)
    repeated = _token_losses(model, twice)[:, once.shape[1] :]
    return {
        "in_context": float(in_context),
        "repeated_loss": float(repeated.mean()),
        "induction": _induction(model, twice),
    }


@torch.no_grad()
def _token_losses(model: LlamaForCausalLM, ids: torch.Tensor, batch_size: int = 8) -> torch.Tensor:
    """Loss on every token but the first, nats: [n, T - 1]."""
    losses = []
    for batch in ids.to(model.device).split(batch_size):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits.mT, batch[:, 1:], reduction="none"))
    return torch.cat(losses).cpu()


@torch.no_grad()
def _induction(model: LlamaForCausalLM, twice: torch.Tensor, batch_size: int = 8) -> float:
    """The largest mean, over heads, of the attention from each token of the second half to the one after its twin."""
    half = twice.shape[1] // 2
    asked = torch.arange(half, 2 * half, device=model.device)
    total = 0.0
    with ExitStack() as undo:
        undo.callback(model.set_attn_implementation, model.config._attn_implementation)
        model.set_attn_implementation("eager")  # the only one that shows its attention
        for batch in twice.to(model.device).split(batch_size):
            attentions = model(input_ids=batch, use_cache=False, output_attentions=True).attentions
            on_next = torch.stack([layer[:, :, asked, asked - half + 1].mean(dim=2) for layer in attentions])
            total = total + on_next.sum(dim=1)  # [n_layers, n_heads]
    return float((total / len(twice)).max())


def window_losses(model: LlamaForCausalLM, plans: Sequence[DropPlan], text: Calibration) -> np.ndarray:
    """Loss of each plan on each window, nats per token: [n_plans, n_windows]. ValueError where it is not finite."""
    items = text_items(text)
    sums, _ = loglikelihoods(model, plans, items, progress=False)
    return -sums / np.array([item.n_scored for item in items])


def dropping_costs(
    model: LlamaForCausalLM, scores: ImportanceScores, last_scores: ImportanceScores, valid: Calibration
) -> list[dict]:
    """What it costs to drop a quarter and half of the layers of a kind, chosen now or by the scores at the end.

    Returns rows of kind, n, chosen ("now", "at the end"), and nats: per token more than the whole model, by window.
    """
    n_layers = len(scores.attn)
    plans = [DropPlan(n_layers=n_layers)]
    rows = []
    for n in dict.fromkeys((max(n_layers // 4, 1), max(n_layers // 2, 1))):
        for kind in DROPPED_KINDS:
            for chosen, by in (("now", scores), ("at the end", last_scores)):
                plans.append(plan_drop(by, kind, n))
                rows.append({"kind": kind, "n": n, "chosen": chosen})
    losses = window_losses(model, plans, valid)
    more = (losses[1:] - losses[0]).tolist()
    return [row | {"nats": of_windows} for row, of_windows in zip(rows, more, strict=True)]
