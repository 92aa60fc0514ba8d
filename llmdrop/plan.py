"""Which sublayers to drop: `DropPlan`, and the selectors that order layers by what they are worth."""

import json
import random as _random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from operator import index

import numpy as np

TARGETS = ("attn", "mlp", "block", "joint", "consecutive")


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

    def __bool__(self) -> bool:
        return len(self) > 0

    def __or__(self, other: "DropPlan") -> "DropPlan":
        return DropPlan(
            set(self.attn) | set(other.attn), set(self.mlp) | set(other.mlp), self.n_layers or other.n_layers
        )

    def overlap(self, other: "DropPlan") -> float:
        """Share of sublayers the two plans have in common (Jaccard index; 1.0 for two empty plans)."""
        mine = {("attn", i) for i in self.attn} | {("mlp", i) for i in self.mlp}
        theirs = {("attn", i) for i in other.attn} | {("mlp", i) for i in other.mlp}
        return len(mine & theirs) / len(mine | theirs) if mine | theirs else 1.0

    def to_json(self) -> str:
        return json.dumps({"attn": list(self.attn), "mlp": list(self.mlp), "n_layers": self.n_layers})

    @classmethod
    def from_json(cls, text: str) -> "DropPlan":
        """Inverse of `to_json`. Raises ValueError for anything else."""
        try:
            record = json.loads(text)
            unknown = set(record) - {"attn", "mlp", "n_layers"}
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f'not a drop plan: {text[:80]!r}; expected {{"attn": [...], "mlp": [...]}}') from error
        if not isinstance(record, dict) or unknown:
            raise ValueError(
                f"not a drop plan: {text[:80]!r}; expected an object with attn, mlp and (optionally) n_layers"
            )
        return cls(record.get("attn", ()), record.get("mlp", ()), record.get("n_layers"))

    @classmethod
    def from_llm_drop(cls, config: dict, n_layers: int | None = None) -> "DropPlan":
        """Read the lists of an LLM-Drop checkpoint config, either indices or one boolean per layer."""
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


def _indices(values: Iterable[int], kind: str, n_layers: int | None) -> tuple[int, ...]:
    values = list(values)
    allowed = f"0-based layer indices{f' below {n_layers}' if n_layers else ''}, each once"
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
    if target not in ("attn", "mlp", "block", "joint"):
        raise ValueError(f"target {target!r} is not one of {', '.join(TARGETS)}")
    if target == "joint":
        items = [(s, i, kind) for kind in ("attn", "mlp") for i, s in enumerate(values[kind]) if np.isfinite(s)]
        return [(kind, i) for _, i, kind in sorted(items)]
    return [i for s, i in sorted((s, i) for i, s in enumerate(values[target]) if np.isfinite(s))]


def drop_order(scores, target: str, selector: Callable = cosine) -> list:
    """All droppable sublayers in the order in which they would be dropped (Figures 6 and 11)."""
    return selector(scores, target)


def plan_drop(scores, target: str, n: int, selector: Callable = cosine) -> DropPlan:
    """The plan that drops the `n` cheapest layers.

    scores: ImportanceScores. target: "attn" (Attention Drop), "mlp" (MLP Drop), "block" (Block Drop), "joint" (Joint
    Layer Drop, n sublayers of either kind) or "consecutive" (n neighbouring blocks, the run whose input and output are
    most alike; needs `score(..., gap=True)`). Raises ValueError if n is not between 0 and what there is.
    """
    if target == "consecutive":
        return _consecutive(scores, n)
    order = selector(scores, target)
    _check_count(n, len(order), target)
    chosen, n_layers = order[:n], len(scores.attn)
    if target == "joint":
        attn, mlp = ([i for kind, i in chosen if kind == wanted] for wanted in ("attn", "mlp"))
        return DropPlan(attn, mlp, n_layers)
    return DropPlan(
        chosen if target in ("attn", "block") else (), chosen if target in ("mlp", "block") else (), n_layers
    )


def _consecutive(scores, n: int) -> DropPlan:
    if scores.gap is None:
        raise ValueError("consecutive Block Drop needs the gap matrix: call score(..., gap=True)")
    n_layers = len(scores.block)
    _check_count(n, n_layers, "consecutive")
    # gap[i, j]: 1 - cos(input of layer i, output of layer j); a run of n blocks from i ends with j = i + n - 1
    run = [scores.gap[i, i + n - 1] for i in range(n_layers - n + 1)] if n else [0.0]
    start = int(np.nanargmin(run))
    return DropPlan(range(start, start + n), range(start, start + n), n_layers)


def _check_count(n: int, available: int, target: str) -> None:
    if isinstance(n, bool) or not 0 <= index(n) <= available:
        raise ValueError(f"cannot drop n={n} of {available} {target} layers; n must be between 0 and {available}")
