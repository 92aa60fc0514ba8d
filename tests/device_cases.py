"""What is done to a model on a GPU to compare it with the CPU: tests on a pretended one, `make gpu` on a real one.

Each case takes a model, wherever it is, and gives numbers. Nothing here needs pytest.
"""

from functools import partial
from unittest import mock

import numpy as np
import torch
from tiny import random_ids

from llmdrop import Calibration, DropPlan, apply_plan, dropped, perplexity_sweep, score, weights_digest
from llmdrop.compress import search
from llmdrop.compress.reconstruction import METHODS, corrections, fit, reconstructed
from llmdrop.compress.wanda import wanda, zeroed
from llmdrop.compress.windows import score_windows, windowed
from llmdrop.evaluation.sweep import Item, loglikelihoods
from llmdrop.speed.measure import greedy_tokens

FAMILIES = ["llama", "qwen2", "gemma2", "gpt2", "gpt_neox", "opt"]
SEQUENTIAL = ["llama", "gpt2", "opt"]  # one sublayer after the other, each ending in a matrix
IDS = random_ids(5, 24)
MASK = torch.ones_like(IDS)
MASK[1, :4] = 0
MASK[3, :9] = 0
TEXT = Calibration(IDS, "random", MASK)
PLAN = DropPlan(attn=[1, 3], mlp=[2])


def device_of(model) -> torch.device:
    return model.get_input_embeddings().weight.device


@torch.no_grad()
def forward(model):
    device = device_of(model)
    logits = model(IDS.to(device), attention_mask=MASK.to(device), use_cache=False).logits
    return logits[MASK.bool().to(logits.device)].float().cpu().numpy()


def scored(model):
    scores = score(model, TEXT, batch_size=2, gap=True, progress=False)
    return np.stack(
        [scores.attn, scores.mlp, scores.block, scores.stderr["attn"], scores.magnitude["mlp"], *scores.gap]
    )


def perplexities(model):
    plans = {"whole": DropPlan(), "attn": DropPlan(attn=[2]), "block": DropPlan([3], [3])}
    return perplexity_sweep(model, plans, TEXT, progress=False)["log_perplexity"].to_numpy()


def sweep(model):
    shared = tuple(random_ids(1, 40)[0].tolist())
    items = [Item((*shared, *row[:6].tolist()), 3) for row in IDS]
    plans = [DropPlan(), PLAN, DropPlan(attn=range(5))]
    return np.concatenate(loglikelihoods(model, plans, items, row_tokens=48, progress=False))


def generated(model, **settings):
    ids = IDS[:2].to(device_of(model))
    mask = MASK[:2].to(device_of(model))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0} | settings
    return model.generate(ids, attention_mask=mask, **options).cpu().numpy()


def while_dropped(model):
    with dropped(model, PLAN):
        return np.concatenate([forward(model).ravel(), generated(model).ravel()])


def without_attention(model):
    with dropped(model, DropPlan(attn=range(5))):
        return np.concatenate([forward(model).ravel(), generated(model).ravel()])


def applied(model):
    return forward(apply_plan(model, PLAN))


def searched(model):
    choice = search.greedy(model, TEXT, "joint", 2, batch_size=3)
    alone = search.one_shot(model, TEXT, "attn", "perplexity")
    return np.array([*choice.losses.values(), *alone.losses.values(), *[i for _, i in choice.order + alone.order]])


def derivatives(model):
    """Taylor's way through the model; the gradients, which a pretended GPU cannot have, are taken to be ones."""

    def ones(loss, scales):
        assert loss.isfinite()
        return [torch.ones_like(scale) for scale in scales]

    with mock.patch("torch.autograd.grad", ones):
        return np.array([i for _, i in search.taylor(model, TEXT, "joint").order])


def sparse(model):
    zeros = wanda(model, TEXT, 0.4)
    before = forward(model)
    with zeroed(model, zeros):
        during = forward(model)
    np.testing.assert_array_equal(forward(model), before)
    return np.concatenate([during.ravel(), *[index.cpu().numpy().ravel() for index in zeros.values()]])


def compensated(model, method):
    changes = fit(model, PLAN, TEXT, method, batch_size=2)
    with reconstructed(model, PLAN, changes):
        return forward(model)


def all_corrections(model):
    """Of every sublayer that has one before it, so also right behind the border between two GPUs."""
    found = corrections(model, TEXT, ("attn", "mlp"), batch_size=2)
    return np.concatenate([next(iter(found[place].values())).weight.cpu().numpy().ravel() for place in sorted(found)])


def with_windows(model):
    scores = score_windows(model, TEXT, window=6, sinks=2)
    with windowed(model, [0, 2, 3], window=6, sinks=2), torch.no_grad():
        ids = IDS[:1].to(device_of(model))
        written = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        return np.concatenate([scores, written.cpu().numpy().ravel(), forward(model).ravel()])


def digest(model):
    return np.frombuffer(bytes.fromhex(weights_digest(model)), dtype=np.uint8)


def static_cache(model):
    """Stepwise and by transformers' own generation, whole and with attention dropped."""
    prompt = random_ids(2, 16).to(device_of(model))
    stepwise = [greedy_tokens(model, prompt, 6, "static").cpu().numpy()]
    with dropped(model, DropPlan(attn=[0, 3])):
        stepwise.append(greedy_tokens(model, prompt, 6, "static").cpu().numpy())
    return np.concatenate([*stepwise, generated(model, cache_implementation="static")], 1)


ONE_GPU = [forward, scored, perplexities, sweep, generated, while_dropped, without_attention, applied, searched, sparse]
TWO_GPUS = [forward, scored, perplexities, sweep, generated, while_dropped, searched, derivatives]


def cases(acts, with_all_methods: bool = True) -> list[tuple]:
    """(family, what is done) of every pair that goes together."""
    found = [(family, act) for family in FAMILIES for act in acts]
    found += [(family, all_corrections) for family in SEQUENTIAL]
    found += [(family, with_windows) for family in ("llama", "gpt2", "gpt_neox")]
    found += [("llama", digest)]
    if with_all_methods:
        found += [(family, partial(compensated, method=method)) for family in SEQUENTIAL for method in METHODS]
        found += [(family, static_cache) for family in ("llama", "qwen2", "gemma2")]
    return found


def name_of(value) -> str:
    if isinstance(value, partial):
        return f"{value.func.__name__}-{value.keywords['method']}"
    return getattr(value, "__name__", str(value))
