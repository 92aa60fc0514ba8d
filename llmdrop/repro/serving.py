"""The checks and timings of `llmdrop.serving`, in every engine that is here, through the results store."""

from collections.abc import Mapping, Sequence
from functools import partial

import pandas as pd
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..plan import DropPlan
from ..serving.checks import VERSION, check_export, compare_serving, engines
from .provenance import model_key, provenance, speed_key
from .statistics import speed_ratio
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
        facts = partial(provenance, model, engine=[engine, version], weights=key["weights"])
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
    """`compare_serving` in every engine, one row per engine and plan. settings: its rounds, threads, weights.

    Columns: engine, plan; prefill_tokens_per_second and decode_tokens_per_second, medians over rounds; prefill_speedup
    and decode_speedup over the first plan with their 95 % intervals (prefill_speedup_low, ...; NaN of a single round);
    kv_bytes, file_bytes, and kv_share, file_share relative to the first plan's.
    """
    store = store or Store()
    key = speed_key(model) | settings | {"version": VERSION, "prompt": prompt, "new_tokens": new_tokens}
    key["plans"] = {name: plan.key for name, plan in plans.items()}
    tables = []
    for engine, version in engines().items():
        run = partial(compare_serving, engine, model, tokenizer, plans, prompt, new_tokens, **settings)
        facts = partial(provenance, model, engine=[engine, version])
        timed = pd.DataFrame(store.get("serving", key | {"engine": [engine, version]}, run, engine, facts))
        if len(timed):
            tables.append(_summed_up(timed, len(prompt), new_tokens).assign(engine=engine))
    table = pd.concat(tables, ignore_index=True)
    return table[["engine", *table.columns.drop("engine")]]


def _summed_up(timed: pd.DataFrame, prompt_len: int, new_tokens: int) -> pd.DataFrame:
    """One row per plan of one engine: the columns of `compare_all`, without the engine."""
    rounds = timed.rename(columns={"plan": "variant"})
    plans = list(rounds["variant"].unique())
    medians = rounds.groupby("variant", sort=False).median(numeric_only=True)
    table = pd.DataFrame({"plan": plans})
    for phase, n_tokens in {"prefill": prompt_len, "decode": new_tokens}.items():
        seconds = f"{phase}_seconds"
        table[f"{phase}_tokens_per_second"] = n_tokens / medians[seconds].to_numpy()
        ratios = [speed_ratio(rounds, plan, plans[0], seconds).columns(f"{phase}_speedup") for plan in plans]
        table = table.join(pd.DataFrame(ratios))
    for what in ("kv", "file"):
        sizes = medians[f"{what}_bytes"].to_numpy()
        table[f"{what}_bytes"] = sizes.astype(int)
        table[f"{what}_share"] = sizes / sizes[0]
    return table
