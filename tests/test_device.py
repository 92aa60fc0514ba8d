"""Every path of the library on two pretended GPUs gives the CPU's numbers, and waits for them no more than it must.

What the pretence can show, and what only a real GPU can, is said in `device.py`.
"""

import json
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from device import pretended_gpus, reason_not_to
from exports import byte_level_tokenizer
from tiny import random_ids, tiny

from llmdrop import (
    Calibration,
    DropPlan,
    apply_plan,
    dropped,
    load_model,
    perplexity_sweep,
    save_model,
    score,
    score_checkpoint,
    weights_digest,
)
from llmdrop.compress import search
from llmdrop.compress.reconstruction import METHODS, corrections, fit, reconstructed
from llmdrop.compress.wanda import wanda, zeroed
from llmdrop.compress.windows import score_windows, windowed
from llmdrop.evaluation.generation import generate, greedy_matches
from llmdrop.evaluation.sweep import Item, loglikelihoods

pytestmark = pytest.mark.skipif(reason_not_to() is not None, reason=str(reason_not_to()))

FAMILIES = ["llama", "qwen2", "gemma2", "gpt2", "gpt_neox", "opt"]
IDS = random_ids(5, 24)
MASK = torch.ones_like(IDS)
MASK[1, :4] = 0
MASK[3, :9] = 0
TEXT = Calibration(IDS, "random", MASK)
PLAN = DropPlan(attn=[1, 3], mlp=[2])


@pytest.fixture
def gpus():
    with pretended_gpus() as machine:
        yield machine


def logits(model) -> np.ndarray:
    device = model.get_input_embeddings().weight.device
    with torch.no_grad():
        return model(IDS.to(device), attention_mask=MASK.to(device), use_cache=False).logits[0].float().cpu().numpy()


# -- what is done to a model, and the numbers that come out


def forward(model):
    return logits(model)


def scored(model):
    scores = score(model, TEXT, batch_size=2, gap=True, progress=False)
    return np.stack([scores.attn, scores.mlp, scores.block, scores.stderr["attn"], scores.magnitude["mlp"], *scores.gap])


def scored_alone(model):
    return score(model, TEXT, with_residual=False, progress=False).attn


def perplexities(model):
    plans = {"whole": DropPlan(), "attn": DropPlan(attn=[2]), "block": DropPlan([3], [3])}
    return perplexity_sweep(model, plans, TEXT, progress=False)["log_perplexity"].to_numpy()


def sweep(model):
    shared = tuple(random_ids(1, 40)[0].tolist())
    items = [Item((*shared, *row[:6].tolist()), 3) for row in IDS]
    plans = [DropPlan(), PLAN, DropPlan(attn=range(5))]
    return np.concatenate(loglikelihoods(model, plans, items, row_tokens=48, progress=False))


def generated(model):
    device = model.get_input_embeddings().weight.device
    mask = MASK[:2].to(device)
    out = model.generate(IDS[:2].to(device), attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    return out.cpu().numpy()


def while_dropped(model):
    with dropped(model, PLAN):
        return np.concatenate([logits(model).ravel(), generated(model).ravel()])


def without_attention(model):
    with dropped(model, DropPlan(attn=range(5))):
        return np.concatenate([logits(model).ravel(), generated(model).ravel()])


def applied(model):
    return logits(apply_plan(model, PLAN))


def searched(model):
    choice = search.greedy(model, TEXT, "joint", 3, batch_size=2)
    alone = search.one_shot(model, TEXT, "attn", "perplexity")
    return np.array([*choice.losses.values(), *alone.losses.values(), *[i for _, i in choice.order + alone.order]])


def sparse(model):
    zeros = wanda(model, TEXT, 0.4)
    before = logits(model)
    with zeroed(model, zeros):
        during = logits(model)
    np.testing.assert_array_equal(logits(model), before)
    return np.concatenate([during.ravel(), *[index.cpu().numpy().ravel() for index in zeros.values()]])


def compensated(model, method):
    changes = fit(model, PLAN, TEXT, method, batch_size=2)
    with reconstructed(model, PLAN, changes):
        return logits(model)


def all_corrections(model):
    """Of every sublayer that has one before it, so also right behind the border between two GPUs."""
    found = corrections(model, TEXT, ("attn", "mlp"), batch_size=2)
    return np.concatenate([next(iter(found[place].values())).weight.cpu().numpy().ravel() for place in sorted(found)])


def derivatives(model):
    """Taylor's way through the model; the gradients, which the pretence cannot have, are taken to be ones."""

    def ones(loss, scales):
        assert loss.isfinite()
        return [torch.ones_like(scale) for scale in scales]

    with mock.patch("torch.autograd.grad", ones):
        return np.array([i for _, i in search.taylor(model, TEXT, "joint").order])


def with_windows(model):
    scores = score_windows(model, TEXT, window=6, sinks=2)
    with windowed(model, [0, 2, 3], window=6, sinks=2), torch.no_grad():
        device = model.get_input_embeddings().weight.device
        out = model.generate(IDS[:1].to(device), max_new_tokens=6, do_sample=False, pad_token_id=0)
        return np.concatenate([scores, out.cpu().numpy().ravel(), logits(model).ravel()])


def digest(model):
    return np.frombuffer(bytes.fromhex(weights_digest(model)), dtype=np.uint8)


EVERYWHERE = [forward, scored, scored_alone, perplexities, sweep, generated, while_dropped, without_attention, applied]
EVERYWHERE += [searched, sparse, digest]
SEQUENTIAL = ["llama", "gpt2", "opt"]  # one sublayer after the other, each ending in a matrix
CASES = [(family, act) for family in FAMILIES for act in EVERYWHERE]
CASES += [(family, partial(compensated, method=method)) for family in SEQUENTIAL for method in METHODS]
CASES += [(family, all_corrections) for family in SEQUENTIAL]
CASES += [(family, with_windows) for family in ("llama", "gpt2", "opt", "gpt_neox")]


def name_of(value) -> str:
    if isinstance(value, partial):
        return f"{value.func.__name__}-{value.keywords['method']}"
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize("family, act", CASES, ids=name_of)
def test_one_gpu_gives_the_numbers_of_the_cpu(family, act, gpus):
    expected = act(tiny(family, "sdpa"))
    model = tiny(family, "sdpa").to("cuda:1")  # not the current device
    np.testing.assert_allclose(act(model), expected, rtol=1e-4, atol=1e-5)


# -- several GPUs


def spread(family: str, tmp_path, **settings):
    """A model with its layers on two GPUs, by accelerate's own hooks."""
    tiny(family, "sdpa", **settings).save_pretrained(tmp_path / "model")
    byte_level_tokenizer().save_pretrained(tmp_path / "model")
    model, _ = load_model(tmp_path / "model", device="balanced")
    assert {str(parameter.device) for parameter in model.parameters()} == {"cuda:0", "cuda:1"}
    return model


@pytest.fixture(autouse=True)
def loading_in_this_thread(monkeypatch):
    """transformers reads weights in a pool of threads of its own, which began outside of the pretence."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")


BALANCED = [forward, scored, perplexities, sweep, generated, while_dropped, applied, searched, sparse, digest]
BALANCED_CASES = [(family, act) for family in FAMILIES for act in BALANCED]
BALANCED_CASES += [(family, partial(compensated, method=method)) for family in SEQUENTIAL for method in METHODS]
BALANCED_CASES += [(family, act) for family in SEQUENTIAL for act in (all_corrections, derivatives)]
BALANCED_CASES += [("llama", with_windows), ("gpt2", with_windows)]


@pytest.mark.parametrize("family, act", BALANCED_CASES, ids=name_of)
def test_two_gpus_give_the_numbers_of_the_cpu(family, act, gpus, tmp_path):
    expected = act(tiny(family, "sdpa"))
    model = spread(family, tmp_path)
    np.testing.assert_allclose(act(model), expected, rtol=1e-4, atol=1e-5)
