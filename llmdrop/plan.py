"""Which sublayers to drop: `DropPlan`, and the selectors that order layers by what they are worth."""

import json
import os
import random as _random
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from operator import index
from pathlib import Path

import numpy as np

TARGETS = ("attn", "mlp", "block", "joint", "consecutive")
RECORD = 'expected an object {"attn": [...], "mlp": [...]}, n_layers optional'


@dataclass(frozen=True)
class DropPlan:
    """Sublayers to drop: sorted unique 0-based layer indices of the undropped model.

    attn, mlp: indices; a block is an index in both. n_layers: depth of the model the plan was made for, when known;
    `apply_plan` refuses a model of another depth. Raises ValueError for negative, repeated, boolean or fractional
    indices and for indices beyond n_layers.
    """

    attn: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()
    n_layers: int | None = field(default=None, compare=False)

    def __post_init__(self):
        if self.n_layers is not None and (type(self.n_layers) is not int or self.n_layers < 1):
            raise ValueError(f"n_layers={self.n_layers!r}; expected the model's number of layers, or None if unknown")
        for kind in ("attn", "mlp"):
            object.__setattr__(self, kind, _indices(getattr(self, kind), kind, self.n_layers))

    @property
    def blocks(self) -> tuple[int, ...]:
        """Layers dropped whole."""
        return tuple(sorted(set(self.attn) & set(self.mlp)))

    @property
    def label(self) -> str:
        """The paper's name: "Baseline", "Attn-8", "MLP-4", "Block-4", or "Joint-12" for any other mixture."""
        if not self.attn and not self.mlp:
            return "Baseline"
        if self.attn == self.mlp:
            return f"Block-{len(self.attn)}"
        if not self.mlp:
            return f"Attn-{len(self.attn)}"
        return f"Joint-{len(self)}" if self.attn else f"MLP-{len(self.mlp)}"

    def __len__(self) -> int:
        """Number of dropped sublayers (a block counts two)."""
        return len(self.attn) + len(self.mlp)

    def __or__(self, other: "DropPlan") -> "DropPlan":
        """Both plans at once. Raises ValueError where they were made for models of different depth."""
        n_layers = self.n_layers or other.n_layers
        other = other.for_depth(n_layers)
        return DropPlan(set(self.attn) | set(other.attn), set(self.mlp) | set(other.mlp), n_layers)

    def for_depth(self, n_layers: int | None) -> "DropPlan":
        """The same plan for a model of `n_layers`. Raises ValueError where it was made for another depth."""
        if None not in (self.n_layers, n_layers) and self.n_layers != n_layers:
            raise ValueError(
                f"this plan was made for a model of {self.n_layers} layers, this model has {n_layers}; "
                "make a plan from this model's own scores"
            )
        return DropPlan(self.attn, self.mlp, n_layers)

    @property
    def key(self) -> dict[str, list[int]]:
        """What tells it from other plans, as plain JSON."""
        return {"attn": list(self.attn), "mlp": list(self.mlp)}

    def overlap(self, other: "DropPlan") -> float:
        """Share of sublayers the two plans have in common (Jaccard index; 1.0 for two empty plans)."""
        either = self | other
        common = len(set(self.attn) & set(other.attn)) + len(set(self.mlp) & set(other.mlp))
        return common / len(either) if either else 1.0

    def to_json(self) -> str:
        return json.dumps({"attn": list(self.attn), "mlp": list(self.mlp), "n_layers": self.n_layers})

    @classmethod
    def from_json(cls, text: str) -> "DropPlan":
        """Inverse of `to_json`. Raises ValueError for anything else."""
        try:
            record = json.loads(text)
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"not a drop plan: {str(text)[:80]!r}; {RECORD}") from error
        return cls._from_record(record)

    @classmethod
    def _from_record(cls, record) -> "DropPlan":
        if not isinstance(record, Mapping) or set(record) - {"attn", "mlp", "n_layers"}:
            raise ValueError(f"not a drop plan: {str(record)[:80]}; {RECORD}")
        return cls(record.get("attn", ()), record.get("mlp", ()), record.get("n_layers"))

    @classmethod
    def from_llm_drop(cls, config: dict, n_layers: int | None = None) -> "DropPlan":
        """Read the lists of an LLM-Drop checkpoint config, either indices or one boolean per layer.

        Raises ValueError for booleans of another number of layers, and what `DropPlan` raises.
        """
        lists = {}
        for kind in ("attn", "mlp"):
            values = config.get(f"drop_{kind}_list") or []
            if values and all(isinstance(value, bool) for value in values):
                if n_layers is not None and len(values) != n_layers:
                    raise ValueError(
                        f"drop_{kind}_list holds {len(values)} booleans for a model of {n_layers} layers; "
                        "expected one per layer"
                    )
                values = [i for i, dropped in enumerate(values) if dropped]
            lists[kind] = values
        return cls(lists["attn"], lists["mlp"], n_layers)

    def to_llm_drop(self) -> dict[str, list[int]]:
        """The same plan as LLM-Drop's config entries (indices)."""
        return {"drop_attn_list": list(self.attn), "drop_mlp_list": list(self.mlp)}


AnyPlan = DropPlan | Mapping | str | os.PathLike | list | tuple  # what `as_plan` makes a plan of


def as_plan(given: AnyPlan, n_layers: int | None = None) -> DropPlan:
    """The plan that `given` stands for, in a model of n_layers where that is known.

    given: a DropPlan; its record as a dict, or the path of a .json file with one; LLM-Drop's lists, as a dict or the
    path of a config.json; or ("attn" | "mlp", layer) pairs. Raises TypeError for anything else, FileNotFoundError for a
    file that is not there, ValueError for one with no plan in it, and what `DropPlan` raises.
    """
    if isinstance(given, DropPlan):
        return given
    if isinstance(given, str | os.PathLike) and str(given).endswith(".json"):
        file = Path(given).expanduser()
        if not file.is_file():
            raise FileNotFoundError(f"no plan in {file}: there is no such file; write one with plan.to_json()")
        try:
            given = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is no JSON ({error}); {RECORD}") from error
        if not isinstance(given, dict):
            raise ValueError(f"{file} holds no drop plan; {RECORD}")
    if isinstance(given, Mapping):
        if "drop_attn_list" in given or "drop_mlp_list" in given:
            return DropPlan.from_llm_drop(given, n_layers)
        return DropPlan._from_record(given)
    if isinstance(given, list | tuple) and all(map(_is_sublayer, given)):
        return plan_of(given, n_layers)
    raise TypeError(
        f"a {type(given).__name__} is no plan; give a llmdrop.DropPlan, as plan_drop makes it or as "
        'DropPlan(attn=[25, 26]), its dict or .json file, LLM-Drop\'s lists, or pairs as [("attn", 25), ("mlp", 3)]'
    )


def _is_sublayer(item) -> bool:
    return isinstance(item, list | tuple) and len(item) == 2 and item[0] in ("attn", "mlp")


def _indices(values: Iterable[int], kind: str, n_layers: int | None) -> tuple[int, ...]:
    """The indices checked and sorted."""
    allowed = f"0-based layer indices{f' below {n_layers}' if n_layers else ''}, each once"
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise ValueError(f"{kind}={values!r} is no list of layers; expected {allowed}")
    values = list(values)
    for value in values:
        if isinstance(value, (bool, np.bool_)):
            raise ValueError(
                f"{kind}={values} holds booleans; expected {allowed}. LLM-Drop's boolean lists are read by "
                "DropPlan.from_llm_drop."
            )
        try:
            index(value)
        except TypeError:
            raise ValueError(f"{kind} index {value!r} is not a whole number; expected {allowed}") from None
        if value < 0 or (n_layers is not None and value >= n_layers):
            raise ValueError(f"{kind} index {value} is out of range; expected {allowed}")
    if len(set(values)) < len(values):
        raise ValueError(f"{kind}={sorted(values)} repeats an index; expected {allowed}")
    return tuple(sorted(int(value) for value in values))


# -- selectors: (scores, target) -> the order in which to drop, cheapest loss first --------------------------------
# target "attn", "mlp", "block" -> layer indices; "joint" -> ("attn" | "mlp", index) pairs, ranked together


def cosine(scores, target: str) -> list:
    """The paper's order: lowest S = 1 - cos(x, y) first; ties by layer index. Dropped sublayers (NaN) never appear."""
    return _ascending({kind: getattr(scores, kind) for kind in ("attn", "mlp", "block")}, target)


def relative_magnitude(scores, target: str) -> list:
    """Lowest ||f(x)|| / ||x + f(x)|| first (Table 7, after Samragh et al. 2023)."""
    return _ascending(scores.magnitude, target)


def reverse_order(scores, target: str) -> list:
    """Deepest layer first (Table 7); "joint" takes each layer's MLP, then its attention."""
    return sorted(cosine(scores, target), key=lambda item: item[::-1] if isinstance(item, tuple) else item)[::-1]


def random(seed: int) -> Callable:
    """A selector that drops in a random order fixed by `seed` (Table 7)."""

    def random_order(scores, target: str) -> list:
        order = sorted(cosine(scores, target))
        _random.Random(seed).shuffle(order)
        return order

    return random_order


def _ascending(values: dict[str, np.ndarray], target: str) -> list:
    """Lowest value first, ties by layer index; NaN left out."""
    if target == "consecutive":
        raise ValueError("target 'consecutive' has no order, only runs, which plan_drop finds; take another one")
    if target not in TARGETS:
        raise ValueError(f"target {target!r} is not one of {', '.join(TARGETS)}")
    if target == "joint":
        items = [(s, i, kind) for kind in ("attn", "mlp") for i, s in enumerate(values[kind]) if np.isfinite(s)]
        return [(kind, i) for _, i, kind in sorted(items)]
    return [i for s, i in sorted((s, i) for i, s in enumerate(values[target]) if np.isfinite(s))]


def drop_order(scores, target: str, selector: Callable = cosine) -> list:
    """All droppable sublayers in the order in which they would be dropped (Figures 6 and 11).

    Layer indices; for "joint" pairs of "attn" or "mlp" and a layer. Raises ValueError for any other target,
    "consecutive" included.
    """
    return selector(scores, target)


def plan_drop(
    scores, target: str, n: int | float | str, selector: Callable = cosine, keep: Iterable[int] = ()
) -> DropPlan:
    """The plan that drops the `n` cheapest layers.

    scores: ImportanceScores. target: "attn" (Attention Drop), "mlp" (MLP Drop), "block" (Block Drop), "joint" (Joint
    Layer Drop, n sublayers of either kind) or "consecutive" (n neighboring blocks, the run whose input and output are
    most alike; needs `score(..., gap=True)`). n: a count, or a share of the layers of this kind that there are, between
    0 and 1 or as "40%", rounded to the nearest count. keep: layers to protect, of which nothing is dropped. Raises
    ValueError for any other n or target, for layers to keep that the model does not have, and for "consecutive" without
    a gap matrix or without a run of n blocks that are all left.
    """
    n_layers = len(scores.attn)
    keep = _indices(keep, "keep", n_layers)
    if target == "consecutive":
        return _consecutive(scores, n, keep)
    order = selector(scores, target)
    free = [item for item in order if (item[1] if target == "joint" else item) not in keep]
    chosen = free[: _count(n, len(order), target, len(free))]
    if target == "joint":
        return plan_of(chosen, n_layers)
    attn = chosen if target in ("attn", "block") else ()
    mlp = chosen if target in ("mlp", "block") else ()
    return DropPlan(attn, mlp, n_layers)


def plan_of(sublayers: Iterable[tuple[str, int]], n_layers: int | None = None) -> DropPlan:
    """The plan that drops these ("attn" | "mlp", layer) pairs."""
    sublayers = list(sublayers)
    attn = [i for kind, i in sublayers if kind == "attn"]
    mlp = [i for kind, i in sublayers if kind == "mlp"]
    return DropPlan(attn, mlp, n_layers)


def _consecutive(scores, n: int | float | str, keep: tuple[int, ...]) -> DropPlan:
    """The run of n blocks, none of them dropped already or kept, whose input and output are most alike."""
    if scores.gap is None:
        raise ValueError("consecutive Block Drop needs the gap matrix: call score(..., gap=True)")
    there = ~np.isnan(scores.block)
    free = there.copy()
    free[list(keep)] = False
    n = _count(n, int(there.sum()), "consecutive", int(free.sum()))
    n_layers = len(scores.block)
    if n == 0:
        return DropPlan((), (), n_layers)
    starts = [i for i in range(n_layers - n + 1) if free[i : i + n].all()]
    if not starts:
        raise ValueError(
            f"no {n} blocks in a row are left; blocks to keep or dropped already lie between. Use a smaller n"
        )
    # gap[i, j]: 1 - cos(input of layer i, output of layer j); a run of n blocks from i ends with j = i + n - 1
    start = min(starts, key=lambda i: scores.gap[i, i + n - 1])
    run = range(start, start + n)
    return DropPlan(run, run, n_layers)


def _count(n: int | float | str, available: int, target: str, free: int) -> int:
    """How many of the available layers `n` is, a count or a share. ValueError where it is neither or more than free."""
    share = n
    if isinstance(n, str) and n.endswith("%"):
        with suppress(ValueError):
            share = float(n[:-1]) / 100
    count = -1
    if isinstance(share, float) and 0 < share < 1:
        count = int(share * available + 0.5)
    elif hasattr(n, "__index__") and not isinstance(n, bool):
        count = index(n)
    if not 0 <= count <= free:
        kept = f", {available - free} of them kept" if free < available else ""
        raise ValueError(
            f"cannot drop n={n!r} of {available} {target} layers{kept}; n must be between 0 and {free}, a whole "
            "number, or a share of them above 0 and below 1, as 0.4 or '40%'"
        )
    return count
