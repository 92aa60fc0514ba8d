"""The checks and timings of `llmdrop.serving`, in every engine that is here, through the results store."""

from collections.abc import Mapping, Sequence
from functools import partial

import pandas as pd
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..plan import DropPlan
from ..serving.checks import VERSION, check_export, compare_serving, engines
from .provenance import model_key, provenance, speed_key
from .store import Store


def check_all(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    plans: Mapping[str, DropPlan],
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    threads: int = 1,
    store: Store | None = None,
) -> pd.DataFrame:
    """`check_export` every plan of an undropped model in every engine: its rows, with engine and plan."""
    store = store or Store()
    key = model_key(model) | {"version": VERSION, "prompts": prompts, "new_tokens": new_tokens}
    rows = []
    for engine, version in engines().items():
        facts = partial(provenance, model, engine=[engine, version])
        for label, plan in plans.items():
            check = partial(check_export, engine, model, tokenizer, plan, prompts, new_tokens, threads)
            full_key = key | {"engine": [engine, version], "plan": plan.key}
            checked = store.get("serving-exact", full_key, check, f"{engine}-{label}", facts)
            rows += [{"engine": engine, "plan": label} | row for row in checked]
    return pd.DataFrame(rows)


def compare_all(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    plans: Mapping[str, DropPlan],
    prompt: Sequence[int],
    new_tokens: int,
    store: Store | None = None,
    **settings,
) -> pd.DataFrame:
    """`compare_serving` in every engine: its rows. settings: its rounds, threads, weights."""
    store = store or Store()
    key = speed_key(model) | settings | {"version": VERSION, "prompt": prompt, "new_tokens": new_tokens}
    key["plans"] = {name: plan.key for name, plan in plans.items()}
    rows = []
    for engine, version in engines().items():
        run = partial(compare_serving, engine, model, tokenizer, plans, prompt, new_tokens, **settings)
        facts = partial(provenance, model, engine=[engine, version])
        rows += store.get("serving", key | {"engine": [engine, version]}, run, engine, facts)
    return pd.DataFrame(rows)
