"""Ways to choose what to drop or to window, by name, stored with what choosing costs; what they choose, as variants.

Everything is chosen for one comparison: what is lost at equal predicted speed, that of the model without its n least
important attention layers (`Contender`).
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from torch import nn

from .. import plan as orders
from ..anatomy import find_anatomy
from ..calibration import Calibration
from ..compress import search, windows
from ..compress.reconstruction import METHODS, Changes, Reconstruction, combined
from ..compress.search import Choice
from ..compress.variant import Variant
from ..compress.windows import WINDOW, Windows, score_windows
from ..plan import DropPlan, drop_order, plan_drop
from ..speed.roofline import predict_speed
from .provenance import model_key, model_name, provenance
from .quality import quality
from .store import Store

WIDTH = 4  # sublayers that a step of a greedy search tries at a time
EVERY = 4  # a search takes the loss at every fourth token


@dataclass(frozen=True)
class Selector:
    """A way to choose sublayers: by an order of their scores, or by running models without them.

    target: what may go: "attn", "mlp", "joint" (both kinds), "block", or "consecutive" (blocks in a row). order: of
    `llmdrop.plan`, for a choice by scores; with_residual: what is scored. reads_text: False where nothing is scored.
    seed: of a random order. search: `taylor`, `one_shot` or `greedy` of `llmdrop.compress.search`, for a choice by
    their loss. with_reconstruction: what is tried is reconstructed. latency_aware: loss counts per second saved.
    """

    target: str = "attn"
    order: Callable | None = None
    with_residual: bool = True
    reads_text: bool = True
    seed: int | None = None
    search: Callable | None = None
    loss: str | None = None
    with_reconstruction: bool = False
    latency_aware: bool = False

    @property
    def sublayers_per_step(self) -> int:
        """A block is two sublayers, which go together."""
        return 2 if self.target in ("block", "consecutive") else 1


SELECTORS = {
    "reverse order": Selector(order=orders.reverse_order, reads_text=False),
    "cosine": Selector(order=orders.cosine),
    "cosine without residual": Selector(order=orders.cosine, with_residual=False),
    "relative magnitude": Selector(order=orders.relative_magnitude),
    "MLP Drop": Selector("mlp", orders.cosine),
    "Joint Drop": Selector("joint", orders.cosine),
    "Block Drop": Selector("block", orders.cosine),
    "consecutive blocks": Selector("consecutive", orders.cosine),
    "Taylor": Selector(search=search.taylor),
    "perplexity one-shot": Selector(search=search.one_shot, loss="perplexity"),
    "KL one-shot": Selector(search=search.one_shot, loss="kl"),
    "perplexity greedy": Selector(search=search.greedy, loss="perplexity"),
    "KL greedy": Selector(search=search.greedy, loss="kl"),
    "KL greedy, reconstructed": Selector(search=search.greedy, loss="kl", with_reconstruction=True),
    "perplexity greedy, all sublayers": Selector("joint", search=search.greedy, loss="perplexity"),
    "KL greedy, latency-aware": Selector("joint", search=search.greedy, loss="kl", latency_aware=True),
    "KL greedy, reconstructed, latency-aware": Selector(
        "joint", search=search.greedy, loss="kl", with_reconstruction=True, latency_aware=True
    ),
}


def selector(name: str) -> Selector:
    """The selector of this name: a key of SELECTORS, or "random <seed>". Raises ValueError for another."""
    if name in SELECTORS:
        return SELECTORS[name]
    random = re.fullmatch(r"random (\d+)", name)
    if random is None:
        raise ValueError(f"selector {name!r} is not one of {'; '.join(SELECTORS)}; or 'random <seed>'")
    seed = int(random[1])
    return Selector(order=orders.random(seed), reads_text=False, seed=seed)


@dataclass(frozen=True, eq=False)
class Contender:
    """A variant as fast, by prediction, as the model without n attention layers.

    choice: how its layers were chosen, or what it is: "cosine", "window 256". setting: what makes up for them, or at
    what it is as fast. passes: over the calibration text, that choosing took; NaN where nobody counted.
    """

    choice: str
    setting: str
    n: int
    variant: Variant
    passes: float = math.nan

    @property
    def name(self) -> str:
        """In the rows of `quality` and `timing`."""
        return f"{self.choice}: {self.setting}, {self.n}"

    def reconstructed(self, reconstruction: Reconstruction | None) -> "Contender":
        """The same layers, with what makes up for them (None: nothing does)."""
        setting = "none" if reconstruction is None else reconstruction.label
        return replace(self, setting=setting, variant=replace(self.variant, reconstruction=reconstruction))


def reconstructions(text: Calibration, batch_size: int = 8) -> dict[str, Reconstruction | None]:
    """What may make up for dropped layers, by name: "none", and every method of `Reconstruction` on this text."""
    by_method = {method: Reconstruction(text, method, batch_size) for method in METHODS}
    return {"none": None} | by_method


def named(contenders: Iterable[Contender]) -> dict[str, Variant]:
    """Their variants by name, for `quality` and `timing`."""
    return {contender.name: contender.variant for contender in contenders}


# ---- dropped sublayers


def choose(
    model: nn.Module,
    name: str,
    n: int,
    text: Calibration,
    search_text: Calibration,
    reconstruction: Reconstruction | None = None,
    seconds: Mapping[str, float] | None = None,
    batch_size: int = 8,
    store: Store | None = None,
) -> Choice:
    """The first n sublayers (of "consecutive blocks": the blocks) to drop by a named `selector`, stored.

    text: to score on. search_text: a shorter one, on which dropped models are run. reconstruction: for searches with
    it, by least squares (None: fitted on `text`). seconds: what a sublayer of each kind takes, {"attn": ..., "mlp":
    ...}, for latency-aware ones. `tokens` of what is returned is what choosing cost.

    Raises ValueError for another name, or a latency-aware search without seconds.
    """
    chosen_by = selector(name)
    store = store or Store()
    if chosen_by.search is None:
        return _by_scores(store, model, chosen_by, n, text, batch_size)
    if chosen_by.latency_aware and seconds is None:
        raise ValueError(f"selector {name!r} needs seconds={{'attn': ..., 'mlp': ...}}, what dropping each kind saves")
    if chosen_by.with_reconstruction and reconstruction is None:
        reconstruction = Reconstruction(text, batch_size=batch_size)

    def compute() -> dict:
        corrections = None
        if chosen_by.with_reconstruction:
            corrections = reconstruction.corrections(model, ("attn", "mlp"))
        found = _by_search(model, chosen_by, n, search_text, corrections, seconds, batch_size)
        if corrections:
            found.tokens += reconstruction.calibration.n_tokens
        return asdict(found)

    key = model_key(model, batch_size) | {
        "version": search.VERSION,
        "search": chosen_by.search.__name__,
        "target": chosen_by.target,
        "loss": chosen_by.loss,
        "text": search_text.digest,
        "every": EVERY,
    }
    if chosen_by.search is search.greedy:
        key |= {"n": n, "width": WIDTH}
    if chosen_by.with_reconstruction:
        key["reconstruction"] = reconstruction.key
    if chosen_by.latency_aware:
        key["seconds"] = dict(seconds)
    value = store.get("choices", key, compute, f"{model_name(model)}-{name}", lambda: provenance(model, search_text))
    return Choice([tuple(sublayer) for sublayer in value["order"]], value["tokens"], value["losses"])


def _by_search(
    model: nn.Module,
    chosen_by: Selector,
    n: int,
    text: Calibration,
    corrections: dict | None,
    seconds: Mapping[str, float] | None,
    batch_size: int,
) -> Choice:
    if chosen_by.search is search.taylor:
        return search.taylor(model, text, chosen_by.target)
    if chosen_by.search is search.one_shot:
        return search.one_shot(model, text, chosen_by.target, chosen_by.loss, EVERY, batch_size)
    return search.greedy(
        model,
        text,
        chosen_by.target,
        n,
        chosen_by.loss,
        corrections,
        seconds if chosen_by.latency_aware else None,
        WIDTH,
        EVERY,
        batch_size,
    )


def _by_scores(
    store: Store, model: nn.Module, chosen_by: Selector, n: int, text: Calibration, batch_size: int
) -> Choice:
    """A choice that follows from one scoring pass, or from none."""
    consecutive = chosen_by.target == "consecutive"
    scores = store.score(model, text, batch_size, chosen_by.with_residual, gap=consecutive)
    if chosen_by.target == "joint":
        order = drop_order(scores, "joint", chosen_by.order)
    elif chosen_by.sublayers_per_step == 2:
        blocks = plan_drop(scores, "consecutive", n).attn if consecutive else drop_order(scores, "block")
        order = [(kind, i) for i in blocks for kind in ("attn", "mlp")]
    else:
        order = [(chosen_by.target, i) for i in drop_order(scores, chosen_by.target, chosen_by.order)]
    return Choice(order, float(text.n_tokens) if chosen_by.reads_text else 0.0)


def as_fast(model: nn.Module, choice: Choice, n: int, step: int = 1, **speed) -> DropPlan:
    """The shortest plan of `choice`, in steps of so many sublayers, that is as fast as without n attention layers.

    By `predict_speed` with the settings `speed`. Raises ValueError where the choice is too short.
    """
    limit = predict_speed(model, DropPlan(attn=range(n)), **speed).seconds * (1 + 1e-9)
    for k in range(step, len(choice.order) + 1, step):
        if predict_speed(model, choice.plan(k), **speed).seconds <= limit:
            return choice.plan(k)
    raise ValueError(f"all {len(choice.order)} sublayers of this choice save less time than {n} attention layers")


def dropped_contenders(
    model: nn.Module,
    names: Sequence[str],
    counts: Sequence[int],
    text: Calibration,
    search_text: Calibration,
    reconstruction: Reconstruction | None = None,
    batch_size: int = 8,
    store: Store | None = None,
    **speed,
) -> list[Contender]:
    """What every selector (see `choose`) drops at every n, with nothing in its place.

    A selector of attention layers drops n of them; the others drop as much as it takes to be as fast by
    `predict_speed` with the settings `speed`.
    """
    whole = predict_speed(model, **speed).seconds
    seconds = {
        "attn": whole - predict_speed(model, DropPlan(attn=[0]), **speed).seconds,
        "mlp": whole - predict_speed(model, DropPlan(mlp=[0]), **speed).seconds,
    }
    most = max(counts)
    most_sublayers = math.ceil(most * seconds["attn"] / min(seconds.values()) - 1e-6)
    contenders = []
    for name in names:
        chosen_by = selector(name)
        for n in counts:
            if chosen_by.target == "attn":
                length = most
            elif chosen_by.target == "consecutive":
                length = math.ceil(n * seconds["attn"] / sum(seconds.values()) - 1e-6)  # blocks
            else:
                length = most_sublayers
            choice = choose(model, name, length, text, search_text, reconstruction, seconds, batch_size, store)
            if chosen_by.target == "attn":
                plan = choice.plan(n)
            else:
                plan = as_fast(model, choice, n, chosen_by.sublayers_per_step, **speed)
            contenders.append(Contender(name, "none", n, Variant(plan), choice.tokens / text.n_tokens))
    return contenders


# ---- windows, and both


def window_order(
    model: nn.Module, text: Calibration, window: int = WINDOW, sinks: int = windows.SINKS, store: Store | None = None
) -> list[int]:
    """The attention layers, those first that can best do with a window by `score_windows`, stored."""
    key = model_key(model, 1) | {"version": windows.VERSION, "text": text.digest, "window": window, "sinks": sinks}
    scores = (store or Store()).get(
        "window-scores",
        key,
        lambda: list(score_windows(model, text, window, sinks)),
        f"{model_name(model)}-{window}-{sinks}",
        lambda: provenance(model, text),
    )
    return sorted(find_anatomy(model).live("attn"), key=lambda i: scores[i])


def windowed_contenders(
    model: nn.Module,
    window_orders: Mapping[int, Sequence[int]],
    counts: Iterable[int],
    sequences: Iterable[int] = (1,),
    **speed,
) -> list[Contender]:
    """Windows in the fewest layers that save what n attention layers save, for b sequences at a time.

    window_orders: {window: layers} as from `window_order`. By `predict_speed` with the settings `speed`. Where windows
    in all layers save less, there is no such contender.
    """
    contenders = []
    for window, layers in window_orders.items():
        for b in sequences:
            for n in counts:
                k = windows.as_fast(model, n, window, batch_size=b, **speed)
                if k is not None:
                    variant = Variant(windows=Windows(tuple(layers[:k]), window))
                    contenders.append(Contender(f"window {window}", f"as fast for {b}", n, variant))
    return contenders


@dataclass(frozen=True)
class _OneByOne(Reconstruction):
    """Every dropped sublayer's own correction, those of `shared`, also for plans of attention layers and MLPs."""

    shared: Reconstruction | None = None

    @property
    def key(self) -> dict:
        return super().key | {"one_by_one": True}

    def changes(self, model: nn.Module, plan: DropPlan) -> Changes:
        return combined(self.shared.corrections(model, ("attn", "mlp")), plan)


def mixed_contenders(
    model: nn.Module,
    counts: Iterable[int],
    search_text: Calibration,
    long_text: Calibration,
    most: int,
    window: int = WINDOW,
    reconstruction: Reconstruction | None = None,
    least_squares: Reconstruction | None = None,
    batch_size: int = 8,
    store: Store | None = None,
    **speed,
) -> list[Contender]:
    """A few drops, and windows in as many other attention layers as it takes to be as fast, for every n.

    Sublayers are listed by loss per second saved in a model of windows alone: `most` attention layers and MLPs, run on
    `search_text` (the latency-aware searches of `choose`). A contender drops the first k of them, made up for by
    `reconstruction` (None: nothing is, in the search either), and gives windows to the other attention layers that
    `window_order` has first on `long_text`. k goes up from the fewest that can be as fast by `predict_speed`, while
    the loss on `long_text` falls; meanwhile every dropped sublayer is reconstructed by itself, by `least_squares`
    (None: fitted on the same text).

    Raises ValueError where all sublayers listed and all windows save less time.
    """
    one_by_one = None
    if reconstruction is not None:
        text = reconstruction.calibration
        least_squares = least_squares or Reconstruction(text, batch_size=batch_size)
        one_by_one = _OneByOne(text, shared=least_squares)
    choice = choose(
        model,
        "KL greedy, latency-aware" if reconstruction is None else "KL greedy, reconstructed, latency-aware",
        most,
        search_text,
        search_text,
        least_squares,
        _seconds_beside_windows(model, window, **speed),
        batch_size,
        store,
    )
    layers = window_order(model, long_text, window, store=store)

    def variant(k: int, n: int) -> Variant | None:
        plan = choice.plan(k)
        n_windows = windows.as_fast(model, n, window, plan=plan, **speed)
        if n_windows is None:
            return None
        live = [i for i in layers if i not in plan.attn]
        return Variant(
            plan,
            reconstruction=one_by_one if plan else None,
            windows=Windows(tuple(live[:n_windows]), window) if n_windows else None,
        )

    contenders = []
    for n in counts:
        losses: dict[Variant, float] = {}
        for k in range(most + 1):
            tried = variant(k, n)
            if tried is None:
                continue
            rows = quality(model, None, {"": tried}, {"long": long_text}, batch_size=batch_size, store=store)
            losses[tried] = rows["value"].mean()
            if losses[tried] > min(losses.values()) or tried.windows is None:
                break
        if not losses:
            raise ValueError(f"windows and {most=} sublayers save less time than {n} attention layers; raise most")
        best = min(losses, key=losses.get)
        best = replace(best, reconstruction=reconstruction if best.plan else None)
        contenders.append(Contender("drops and windows", f"as fast for {speed.get('batch_size', 1)}", n, best))
    return contenders


def _seconds_beside_windows(model: nn.Module, window: int, **speed) -> dict[str, float]:
    """What dropping a sublayer of each kind saves where every attention layer has a window."""
    live = find_anatomy(model).live("attn")
    every = Variant(windows=Windows(tuple(live), window))
    without = {
        "attn": Variant(DropPlan(attn=live[:1]), windows=Windows(tuple(live[1:]), window)),
        "mlp": Variant(DropPlan(mlp=[0]), windows=every.windows),
    }
    took = every.speed_limit(model, **speed).seconds
    return {kind: took - variant.speed_limit(model, **speed).seconds for kind, variant in without.items()}
