"""Give attention layers a window instead of dropping them: less KV cache and less to read, every weight kept.

A windowed layer's token attends to the last `window` tokens, itself included, and to the first `sinks` of the text
(attention sinks: StreamingLLM, Xiao et al. 2024, arXiv 2309.17453). Positions stay those of the whole text.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import nn
from transformers import AttentionInterface, PretrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

from ..anatomy import Anatomy, find_anatomy, unwrapped
from ..calibration import Calibration
from ..plan import DropPlan
from ..prune import put
from ..speed.roofline import predict_speed
from ..sublayers import SublayerRun, in_float64

VERSION = 1  # of windowed models and their scores: raised when their numbers change
WINDOW = 64
SINKS = 4
BLOCK = 128  # queries at a time: fewer are slower on 2 cores, more compute more of what is hidden


@dataclass(frozen=True)
class Windows:
    """Attention layers, as numbered in the undropped model, that keep a window of the text and its first tokens."""

    layers: tuple[int, ...]
    window: int = WINDOW
    sinks: int = SINKS

    def __post_init__(self):
        _check_sizes(self.window, self.sinks)
        object.__setattr__(self, "layers", DropPlan(set(self.layers)).attn)  # refuses what is no index of a layer
        object.__setattr__(self, "window", int(self.window))
        object.__setattr__(self, "sinks", int(self.sinks))

    @property
    def label(self) -> str:
        return f"{len(self.layers)} windows of {self.window}"

    @property
    def key(self) -> dict:
        """What tells it from others, as plain JSON."""
        return {"layers": list(self.layers), "window": self.window, "sinks": self.sinks, "version": VERSION}

    def applied(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """`windowed`."""
        return windowed(model, self.layers, self.window, self.sinks)


def _check_sizes(window: int, sinks: int) -> None:
    whole = isinstance(window, Integral) and isinstance(sinks, Integral)
    if not whole or window < 1 or sinks < 0:
        raise ValueError(
            f"{window=} must be at least 1 token, the own one, and {sinks=} at least 0, whole numbers both"
        )


@contextmanager
def windowed(model: nn.Module, layers: Iterable[int], window: int = WINDOW, sinks: int = SINKS) -> Iterator[nn.Module]:
    """`model` with these attention layers windowed; everything is restored afterwards, also after an exception.

    layers: indices as in the undropped model; with none, any model stays as it is. A KV cache made inside must not be
    used outside. Without a cache, batches may be padded (tokens are counted by their positions); with one, they must
    not be: padding would take up the window and stand where the sinks should be.

    Raises ValueError for layers that are not there or dropped, a window below 1 or sinks below 0, an architecture with
    windows of its own, a compiled model, and attention other than "sdpa" and "eager"; at a forward pass, for padding
    beside a cache, and a cache that was not filled with these windows.
    """
    parts = find_anatomy(model)
    config = unwrapped(model).config
    layers = sorted(set(layers))
    _check_sizes(window, sinks)
    if layers:
        _check(config, parts, layers)
        if any(hasattr(part, "_orig_mod") or part._compiled_call_impl for part in model.modules()):
            raise ValueError("a compiled model does not see windows that come later: give it before torch.compile")
    additive = config._attn_implementation == "eager"
    hook = _Window(window, sinks, additive)
    with ExitStack() as undo:
        for i in layers:
            module = parts.layers[i].get_submodule(parts.sublayer("attn", i).core)
            undo.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            if not additive:
                config = copy.copy(module.config)
                config._attn_implementation = "llmdrop_blocks"
                put(undo, module, "config", config)
        yield model


def _check(config: PretrainedConfig, parts: Anatomy, layers: list[int]) -> None:
    """ValueError where these layers cannot have windows."""
    missing = [i for i in layers if i not in parts.live("attn")]
    if missing:
        raise ValueError(f"no attention in layers {missing} to give a window; there is in {parts.live('attn')}")
    if getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True):
        raise ValueError(
            f"this {config.model_type!r} model has windows of its own; only full attention can be given one"
        )
    if config._attn_implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"attention {config._attn_implementation!r} takes no mask; load with attn_implementation='sdpa' or 'eager'"
        )


class WindowLayer(DynamicLayer):
    """KV-cache slot of a windowed layer: the first `sinks` tokens and the last window - 1, [B, heads, n, head_dim].

    To the model it looks as long as the text, so that positions and masks of the other layers stay right.
    """

    is_croppable = False

    def __init__(self, window: int, sinks: int):
        super().__init__()
        self.window = window
        self.sinks = sinks
        self.seen = 0  # tokens of the text so far

    def held(self) -> torch.Tensor:
        """Positions in the text of the tokens in the cache."""
        start = max(self.seen - self.window + 1, min(self.sinks, self.seen))
        return torch.cat([torch.arange(min(self.sinks, self.seen)), torch.arange(start, self.seen)])

    def update(self, key_states, value_states, *args, **kwargs):
        keys, values = super().update(key_states, value_states)
        self.seen += key_states.shape[-2]
        self.keys = self._kept(keys)
        self.values = self._kept(values)
        return keys, values

    def _kept(self, states: torch.Tensor) -> torch.Tensor:
        n = states.shape[-2]
        last = self.window - 1
        if n <= self.sinks + last:
            return states
        return torch.cat([states[..., : self.sinks, :], states[..., n - last :, :]], -2)

    def get_seq_length(self) -> int:
        return self.seen

    def reset(self) -> None:
        super().reset()
        self.seen = 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError("a windowed KV cache cannot be cut back: what left the window is gone; fill it anew")


def _attend_in_blocks(module: nn.Module, query, key, value, attention_mask, **kwargs):
    """SDPA, a block of queries at a time where a mask of ours says so: with the keys that one of the block sees."""
    sdpa = AttentionInterface()["sdpa"]
    blocks = getattr(attention_mask, "blocks", None)
    if not blocks:
        return sdpa(module, query, key, value, attention_mask, **kwargs)
    parts = [
        sdpa(module, query[:, :, start : start + BLOCK], key[:, :, seen], value[:, :, seen], mask, **kwargs)[0]
        for start, seen, mask in blocks
    ]
    return torch.cat(parts, 1), None  # [B, n, heads, head_dim]


AttentionInterface.register("llmdrop_blocks", _attend_in_blocks)


class _Window:
    """Forward pre-hook of attention modules: masks of their own, and their own slots in a fresh KV cache."""

    def __init__(self, window: int, sinks: int, additive: bool):
        self.window = window
        self.sinks = sinks
        self.additive = additive  # masks are added to the scores (eager attention), not booleans
        self.mask: torch.Tensor | None = None  # of the layer before
        self.basis: tuple | None = None  # what that mask was made from
        self.alive: tuple | None = None  # kept, so that nothing new gets the ids in `basis`

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        hidden = args[0] if args else kwargs["hidden_states"]
        caches = [kwargs[name] for name in ("past_key_values", "layer_past") if isinstance(kwargs.get(name), Cache)]
        cached = self._slot(caches[0], module.layer_idx) if caches else None
        given = kwargs.get("attention_mask")
        positions = kwargs.get("position_ids")
        seen = cached.seen if cached else None
        basis = id(given), id(positions), seen, hidden.shape[1], hidden.device, hidden.dtype, hidden.is_inference()
        if basis != self.basis:
            self.basis = basis
            self.alive = given, positions
            self.mask = self._mask(hidden, cached, given, positions)
        return args, kwargs | {"attention_mask": self.mask}

    def _mask(self, hidden: torch.Tensor, cached: WindowLayer | None, given, positions) -> torch.Tensor | None:
        """[1 or B, 1, n, keys]: what each token sees; long ones with `blocks` for `_attend_in_blocks`."""
        n = hidden.shape[1]
        past = cached.seen if cached else 0
        if given is None and (cached or positions is None) and not self._hides(past, n):
            return None  # known without asking the device: a decode step waits for nothing
        now = past + torch.arange(n, device=hidden.device)[None]
        keys = torch.cat([cached.held().to(hidden.device)[None], now], 1) if cached else now
        seen = (keys[:, None] <= now[..., None])[:, None]  # [1, 1, n, keys]: all but what is to come
        besides = None  # what else hides tokens: padding, or the other branches of a trie
        if cached is None and positions is not None:
            now = positions
            keys = positions
            besides = given
        elif given is not None:
            allowed = given if given.dtype == torch.bool else given == 0
            if given.shape[-1] != past + n or not bool((allowed[..., keys[0]] | ~seen).all()):
                raise ValueError(
                    "this batch is padded (or has masks of its own) where windowed layers have a KV cache, or no "
                    f"positions to go by. Mask {tuple(given.shape)}, {past + n} tokens so far; run texts of different "
                    "lengths one by one, or without a cache"
                )
        near = now[..., None] - keys[:, None] < self.window  # [1 or B, n, keys]
        near = (near | (keys[:, None] < self.sinks))[:, None]
        if besides is None and bool((near | ~seen).all()):
            return None if n == 1 else given  # nothing is hidden
        if besides is not None and besides.dtype != torch.bool:
            return besides.masked_fill(~near, torch.finfo(besides.dtype).min)
        mask = near & (seen if besides is None else besides)
        if self.additive:
            lowest = torch.finfo(hidden.dtype).min
            return torch.zeros(mask.shape, dtype=hidden.dtype, device=hidden.device).masked_fill(~mask, lowest)
        if n > BLOCK:
            mask.blocks = []
            for start in range(0, n, BLOCK):
                part = mask[:, :, start : start + BLOCK]
                reached = part.flatten(0, 2).any(0).nonzero()[:, 0]
                mask.blocks.append((start, reached, part[..., reached]))
        return mask

    def _hides(self, past: int, n: int) -> bool:
        """Whether the last of n tokens after `past` ones is too far from the first that is there and no sink."""
        first = max(past - self.window + 1, self.sinks)
        return past + n - 1 - first >= self.window

    def _slot(self, cache: Cache, slot: int) -> WindowLayer:
        while len(cache.layers) <= slot and cache.layer_class_to_replicate is not None:
            cache.layers.append(cache.layer_class_to_replicate())
        layer = cache.layers[slot]
        if type(layer) is DynamicLayer and layer.get_seq_length() == 0:
            layer = cache.layers[slot] = WindowLayer(self.window, self.sinks)
        if not isinstance(layer, WindowLayer) or (layer.window, layer.sinks) != (self.window, self.sinks):
            raise ValueError(
                f"slot {slot} of this KV cache is a {type(layer).__name__} not made for a window of {self.window} and "
                f"{self.sinks} sinks; give each `windowed` model a fresh dynamic cache"
            )
        return layer


# ---- which layers, and how many


@torch.no_grad()
def score_windows(
    model: nn.Module, calibration: Calibration, window: int = WINDOW, sinks: int = SINKS, batch_size: int = 1
) -> list[float]:
    """1 - cos(y, y') of each attention layer, from one pass; the lowest can do with a window. NaN without attention.

    y = x + f(norm(x)) is the residual stream after the layer, [B, T, C], y' that with a window; the mean is over the
    tokens that a window can change: those after the first window + sinks of their sample, padding left out. Raises
    ValueError where no sample is longer than window + sinks, for activations that are not finite, naming the layer, and
    what `windowed` raises.
    """
    model = unwrapped(model)
    parts = find_anatomy(model)
    live = parts.live("attn")
    run = SublayerRun(model, parts, calibration, batch_size)
    longest = max(int(mask.sum(1).max()) for mask in run.masks)
    if longest <= window + sinks:
        raise ValueError(
            f"samples of {longest} tokens show nothing of a window of {window} and {sinks} sinks; score on longer ones"
        )
    changed = [mask.bool() & (mask.cumsum(1) > window + sinks) for mask in run.masks]  # [B, T] per batch
    scores = []
    streams = run.start
    for i, layer in enumerate(parts.layers):
        score = float("nan")
        if i in live:
            with windowed(model, [i], window, sinks):
                narrow = run.through(streams, "attn", i)
            streams = run.through(streams, "attn", i)
            cosines = []
            for full, cut, which in zip(streams, narrow, changed, strict=True):
                which = which.to(full.device)
                pair = in_float64(full[which]), in_float64(cut[which])
                cosines.append(torch.cosine_similarity(*pair, dim=-1))
            score = 1 - float(torch.cat(cosines).mean())
        scores.append(score)
        if layer is not None:
            streams = run.through(streams, "mlp", i)
    return scores


def as_fast(
    model: nn.Module | str, n: int, window: int = WINDOW, sinks: int = SINKS, plan: DropPlan = DropPlan(), **speed
) -> int | None:
    """How many windowed attention layers it takes, beside dropping `plan`, to be as fast as without n attention layers.

    By `predict_speed` with the settings `speed`. None where windows in all layers save less time than that.
    """
    limit = predict_speed(model, DropPlan(attn=range(n)), **speed).seconds * (1 + 1e-9)
    n_live = len(set(find_anatomy(model).live("attn")) - set(plan.attn))
    for number in range(n_live + 1):
        if predict_speed(model, plan, windowed=number, window=window + sinks, **speed).seconds <= limit:
            return number
    return None
