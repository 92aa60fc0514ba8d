"""Ways to choose what to drop or to window, by name, stored with what choosing costs; what they choose, as variants.

Everything is chosen for one comparison: what is lost at equal predicted speed, that of the model without its n least
important attention layers (`Contender`).
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

from torch import nn

from .. import plan as orders
from ..anatomy import find_anatomy
from ..calibration import Calibration
from ..compress import search, windows
from ..compress.reconstruction import METHODS, Changes, Reconstruction, combined
from ..compress.search import Choice
from ..compress.variant import Variant
from ..compress.windows import SINKS, WINDOW, Windows, score_windows
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
    `llmdrop.plan`, for a choice by scores; with_residual: what is scored; reads_text: False where no score matters.
    search: of `llmdrop.compress.search`, for a choice by `loss`; with_reconstruction: what is tried is reconstructed;
    latency_aware: loss counts per second saved.
    """

    target: str = "attn"
    order: Callable | None = None
    with_residual: bool = True
    reads_text: bool = True
    search: Callable | None = None
    loss: str | None = None
    with_reconstruction: bool = False
    latency_aware: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of the sublayers that go together."""
        return ("attn", "mlp") if self.target in ("block", "consecutive") else (self.target,)


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
    return Selector(order=orders.random(int(random[1])), reads_text=False)


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
    def method(self) -> str:
        """In legends: the same for every n."""
        return f"{self.choice}: {self.setting}"

    @property
    def name(self) -> str:
        """In the rows of `quality` and `timing`."""
        return f"{self.method}, {self.n}"

    def reconstructed(self, reconstruction: Reconstruction | None) -> "Contender":
        """The same layers, with what makes up for them (None: nothing does)."""
        setting = "none" if reconstruction is None else reconstruction.label
        return replace(self, setting=setting, variant=replace(self.variant, reconstruction=reconstruction))


def named(contenders: Iterable[Contender]) -> dict[str, Variant]:
    """Their variants by name, for `quality` and `timing`."""
    return {contender.name: contender.variant for contender in contenders}


@dataclass(frozen=True, eq=False)
class Chooser:
    """Chooses what to drop or to window in `model`; choices are stored, and made once.

    text: to score on, and to fit reconstructions on. search_text: a shorter one, on which dropped models are run;
    long_text: to choose windows on (None: `text`). paper_text: what "cosine", the paper's method, scores on (None:
    `text`), so that it is the same baseline everywhere. speed: settings of `predict_speed`, by which contenders are as
    fast.
    """

    model: nn.Module
    text: Calibration
    search_text: Calibration | None = None
    long_text: Calibration | None = None
    batch_size: int = 8
    speed: Mapping[str, object] = field(default_factory=dict)
    store: Store = field(default_factory=Store)
    paper_text: Calibration | None = None

    @cached_property
    def reconstructions(self) -> dict[str, Reconstruction | None]:
        """What may make up for dropped layers, by name: "none", and every method of `Reconstruction` on `text`."""
        by_method = {method: Reconstruction(self.text, method, self.batch_size) for method in METHODS}
        return {"none": None} | by_method

    def choose(self, name: str, n: int, seconds: Mapping[str, float] | None = None) -> Choice:
        """The first n sublayers (of "consecutive blocks": the blocks) to drop by a named `selector`.

        seconds: for latency-aware searches (None: `seconds_saved`). `tokens` of what is returned is what choosing cost.
        Raises ValueError for an unknown name.
        """
        chosen_by = selector(name)
        if chosen_by.search is None:
            return self._by_scores(chosen_by, n)
        text = self.search_text or self.text
        settings = {"loss": chosen_by.loss, "every": EVERY}
        if chosen_by.search is search.greedy:
            settings |= {"n": n, "width": WIDTH}
        if chosen_by.latency_aware:
            settings["seconds"] = dict(seconds or self.seconds_saved())
        least_squares = self.reconstructions["least squares"] if chosen_by.with_reconstruction else None

        def compute() -> dict:
            arguments = settings | {"batch_size": self.batch_size}
            if chosen_by.search is search.taylor:  # goes by gradients, whatever the settings
                arguments = {}
            if least_squares is not None:
                arguments["corrections"] = least_squares.corrections(self.model, ("attn", "mlp"))
            choice = chosen_by.search(self.model, text, chosen_by.target, **arguments)
            if least_squares is not None:
                choice.tokens += self.text.n_tokens
            return asdict(choice)

        key = model_key(self.model, self.batch_size) | settings
        key |= {
            "version": search.VERSION,
            "search": chosen_by.search.__name__,
            "target": chosen_by.target,
            "text": text.digest,
        }
        if least_squares is not None:
            key["reconstruction"] = least_squares.key
        slug = f"{model_name(self.model)}-{name}"
        value = self.store.get("choices", key, compute, slug, lambda: provenance(self.model, text))
        return Choice([tuple(sublayer) for sublayer in value["order"]], value["tokens"], value["losses"])

    def _by_scores(self, chosen_by: Selector, n: int) -> Choice:
        """A choice that follows from one scoring pass, or from none."""
        consecutive = chosen_by.target == "consecutive"
        text = self.text
        if chosen_by is SELECTORS["cosine"] and self.paper_text is not None:
            text = self.paper_text
        scores = self.store.score(self.model, text, self.batch_size, chosen_by.with_residual, gap=consecutive)
        if consecutive:
            order = plan_drop(scores, "consecutive", n).attn
        else:
            order = drop_order(scores, chosen_by.target, chosen_by.order)
        if chosen_by.target != "joint":  # whose order is of sublayers already
            order = [(kind, i) for i in order for kind in chosen_by.kinds]
        return Choice(order, float(text.n_tokens) if chosen_by.reads_text else 0.0)

    def seconds_saved(self, window: int | None = None) -> dict[str, float]:
        """What dropping one sublayer of each kind saves by prediction: {"attn": ..., "mlp": ...}.

        window: of all other attention layers (None: they attend to everything).
        """
        live = find_anatomy(self.model).live("attn")

        def seconds(plan: DropPlan) -> float:
            others = [i for i in live if i not in plan.attn]
            narrow = None if window is None else Windows(tuple(others), window)
            return Variant(plan, windows=narrow).speed_limit(self.model, **self.speed).seconds

        whole = seconds(DropPlan())
        return {"attn": whole - seconds(DropPlan(attn=live[:1])), "mlp": whole - seconds(DropPlan(mlp=[0]))}

    def as_fast(self, choice: Choice, n: int, step: int = 1) -> DropPlan:
        """The shortest plan of `choice`, in steps of so many sublayers, that is as fast as without n attention layers.

        Raises ValueError where the choice is too short.
        """
        limit = predict_speed(self.model, DropPlan(attn=range(n)), **self.speed).seconds * (1 + 1e-9)
        for k in range(step, len(choice.order) + 1, step):
            if predict_speed(self.model, choice.plan(k), **self.speed).seconds <= limit:
                return choice.plan(k)
        raise ValueError(f"all {len(choice.order)} sublayers of this choice save less time than {n} attention layers")

    def dropped(self, names: Iterable[str], counts: Iterable[int]) -> list[Contender]:
        """What every selector drops at every n, with nothing in its place.

        A selector of attention layers drops n of them; the others drop as much as it takes to be as fast.
        """
        seconds = self.seconds_saved()
        most = max(counts)
        most_sublayers = math.ceil(most * seconds["attn"] / min(seconds.values()) - 1e-6)
        contenders = []
        for name in names:
            chosen_by = selector(name)
            is_attn = chosen_by.target == "attn"
            for n in counts:
                length = most if is_attn else most_sublayers
                if chosen_by.target == "consecutive":  # other blocks for every number of them
                    length = math.ceil(n * seconds["attn"] / sum(seconds.values()) - 1e-6)
                choice = self.choose(name, length)
                plan = choice.plan(n) if is_attn else self.as_fast(choice, n, len(chosen_by.kinds))
                contenders.append(Contender(name, "none", n, Variant(plan), choice.tokens / self.text.n_tokens))
        return contenders

    def contenders(self, methods: Iterable[str], counts: Iterable[int]) -> list[Contender]:
        """What is dropped at every n, with what makes up for it, for methods like "cosine: least squares".

        Before the last colon stands a selector, after it a key of `reconstructions`. Raises ValueError for another.
        """
        settings: dict[str, list[str]] = {}
        for method in methods:
            choice, _, setting = method.rpartition(": ")
            if setting not in self.reconstructions:
                allowed = ", ".join(self.reconstructions)
                raise ValueError(f"method {method!r} is not '<selector>: <what makes up for it>', the latter {allowed}")
            settings.setdefault(choice, []).append(setting)
        contenders = []
        for choice in settings:
            for contender in self.dropped([choice], counts):
                contenders += [contender.reconstructed(self.reconstructions[name]) for name in settings[choice]]
        return contenders

    def window_order(self, window: int = WINDOW) -> list[int]:
        """The attention layers, those first that can best do with a window by `score_windows` on `long_text`."""
        text = self.long_text or self.text
        key = model_key(self.model, 1) | {"version": windows.VERSION, "text": text.digest}
        scores = self.store.get(
            "window-scores",
            key | {"window": window, "sinks": SINKS},
            lambda: score_windows(self.model, text, window),
            f"{model_name(self.model)}-{window}-{SINKS}",
            lambda: provenance(self.model, text),
        )
        return sorted(find_anatomy(self.model).live("attn"), key=lambda i: scores[i])

    def windowed(self, sizes: Iterable[int], counts: Iterable[int], sequences: Iterable[int] = (1,)) -> list[Contender]:
        """Windows in the fewest layers that save what n attention layers save, for b sequences at a time.

        Where windows of that size in all layers save less, there is no such contender.
        """
        contenders = []
        for window in sizes:
            layers = self.window_order(window)
            for b in sequences:
                for n in counts:
                    k = windows.as_fast(self.model, n, window, **self.speed | {"batch_size": b})
                    if k is not None:
                        variant = Variant(windows=Windows(tuple(layers[:k]), window))
                        contenders.append(Contender(f"window {window}", f"as fast for {b}", n, variant))
        return contenders

    def mixed(
        self, counts: Iterable[int], most: int, window: int = WINDOW, reconstruction: Reconstruction | None = None
    ) -> list[Contender]:
        """A few drops, and windows in as many other attention layers as it takes to be as fast, for every n.

        Up to `most` sublayers go, in the order of a latency-aware search that counts what they save beside windows;
        `reconstruction` makes up for them (None: nothing does, in the search either). Their number k goes up from the
        fewest that can be as fast, while the loss on `long_text` falls; meanwhile every dropped sublayer is
        reconstructed by itself. Raises ValueError where `most` sublayers and all windows save less time.
        """
        one_by_one = None
        name = "KL greedy, latency-aware"
        if reconstruction is not None:
            shared = self.reconstructions["least squares"]
            one_by_one = _OneByOne(self.text, batch_size=self.batch_size, shared=shared)
            name = "KL greedy, reconstructed, latency-aware"
        choice = self.choose(name, most, self.seconds_saved(window))
        texts = {"long": self.long_text or self.text}
        layers = self.window_order(window)
        contenders = []
        for n in counts:
            losses: dict[Variant, float] = {}
            for k in range(most + 1):
                plan = choice.plan(k)
                n_windows = windows.as_fast(self.model, n, window, plan=plan, **self.speed)
                if n_windows is None:
                    continue
                live = [i for i in layers if i not in plan.attn]
                narrow = Windows(tuple(live[:n_windows]), window) if n_windows else None
                tried = Variant(plan, one_by_one if plan else None, narrow)
                rows = quality(self.model, None, {"": tried}, texts, store=self.store)
                losses[tried] = rows["value"].mean()
                if losses[tried] > min(losses.values()) or narrow is None:
                    break
            if not losses:
                raise ValueError(f"windows and {most=} sublayers save less time than {n} attention layers; raise most")
            best = min(losses, key=losses.get)
            best = replace(best, reconstruction=reconstruction if best.plan else None)
            contenders.append(Contender("drops and windows", f"as fast for {self.speed.get('batch_size', 1)}", n, best))
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
