"""Timing: how long variants of a model take, all in turn on this machine, stored."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import pandas as pd
from torch import nn

from ..compress.variant import Variant
from ..speed import measure
from ..speed.measure import time_rounds
from .provenance import model_name, provenance, speed_key
from .store import Store


def timing(
    model: nn.Module, variants: Mapping[str, Variant], rounds: int = 5, store: Store | None = None, **settings
) -> pd.DataFrame:
    """Time every variant once a round, in turn, `rounds` times over: a drifting machine hits all alike.

    settings: of `llmdrop.measure_speed` (batch_size, prompt_len, new_tokens, ...). Variants of one shape (as many
    sublayers gone, as many windows, ...) take as long as each other and are timed once. Stored for these variants
    together; weights do not enter the key, shapes do.

    Returns a row per variant and round: variant, round, prefill_seconds, decode_seconds, seconds, status, and the bytes
    of weights and KV cache, as from `llmdrop.speed.measure.time_rounds`. `speedups` sums them up.
    """
    details = {name: variant.shape | _attention_types(model, variant) for name, variant in variants.items()}
    shapes = {name: str(detail) for name, detail in details.items()}
    timed: dict[str, Variant] = {}  # the first of each shape, without what takes long to fit and changes no shape
    for name, variant in variants.items():
        timed.setdefault(shapes[name], replace(variant, reconstruction=None, healing=None))

    def compute() -> list[dict]:
        models = {shape: partial(variant.applied, model) for shape, variant in timed.items()}
        return time_rounds(models, rounds, **settings).to_dict("records")

    key = speed_key(model) | {"version": measure.VERSION, "rounds": rounds, "settings": settings}
    key["shapes_timed"] = list({shapes[name]: details[name] for name in variants}.values())
    rows = (store or Store()).get(
        "timing",
        key,
        compute,
        f"{model_name(model)}-{'-'.join(variant.label for variant in timed.values())}",
        lambda: provenance(model, rounds=rounds, **settings),
    )
    by_shape = dict(tuple(pd.DataFrame(rows).rename(columns={"name": "variant"}).groupby("variant", sort=False)))
    frames = [by_shape[shapes[name]].assign(variant=name) for name in variants]
    return pd.concat(frames, ignore_index=True)


def _attention_types(model: nn.Module, variant: Variant) -> dict:
    """How many layers of each type (sliding or full attention) keep their attention, where a model has several."""
    types = getattr(model.config, "layer_types", None) or []
    if len(set(types)) < 2:
        return {}
    return {"attention_types": dict(Counter(kind for i, kind in enumerate(types) if i not in variant.plan.attn))}


def speedups(rows: pd.DataFrame, baseline: str | None = None) -> pd.DataFrame:
    """One row a variant from `timing`: medians over rounds, and speedups over the baseline (the first variant if None).

    Columns as from `llmdrop.speed.measure.speedups`, indexed by variant.
    """
    return measure.speedups(rows.rename(columns={"variant": "name"}), baseline).rename_axis("variant")
