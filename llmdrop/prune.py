"""Remove sublayers from a stock model: for good (`apply_plan`) or for a while (`dropped`)."""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer, DynamicCache, DynamicLayer

from .anatomy import Anatomy, find_anatomy
from .plan import DropPlan
from .proof import Gone, Sublayer


def apply_plan(model: nn.Module, plan: DropPlan) -> nn.Module:
    """Drop the plan's sublayers from `model` in place and return it.

    The sublayers and their norms are gone: parameters freed, the residual stream passes by. A layer that loses both is
    gone whole. Layers keep their numbers, and in every KV cache the slot of a dropped attention holds nothing. Indices
    mean the undropped model, also when the model was dropped from before; of a layer that has no such sublayer nothing
    is dropped. What was dropped is recorded in `model.config.llmdrop`, beside the biases that reconstruction gave to
    what stays.

    Raises ValueError for architectures whose residual split cannot be proven, indices the model does not have, a plan
    made for another depth, and plans that leave no sublayer at all. The model is unchanged then.
    """
    _drop(model, plan)
    return model


@contextmanager
def dropped(model: nn.Module, plan: DropPlan) -> Iterator[nn.Module]:
    """`apply_plan` for the length of a `with` block; everything is restored afterwards, also after an exception.

    Can be nested (the plans add up). A KV cache made inside must not be used outside.
    """
    with _drop(model, plan):
        yield model


_ABSENT = object()


def put(undo: ExitStack, owner, name: str, value) -> None:
    """Set an attribute; `undo` gives it its former value, or deletes it where there was none."""
    former = getattr(owner, name, _ABSENT)
    setattr(owner, name, value)
    if former is _ABSENT:
        undo.callback(delattr, owner, name)
    else:
        undo.callback(setattr, owner, name, former)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model without dropout for the length of a `with` block; every module then has its own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _drop(model: nn.Module, plan: DropPlan) -> ExitStack:
    """Drop, and return what restores the model when it is closed. Where dropping fails, the model is restored."""
    parts = find_anatomy(model)
    plan = _checked(parts, plan)
    layers = parts.layer_list
    cut = getattr(parts.decoder, "_llmdrop_cache", None)
    slots = set(cut.slots if cut else ())
    with ExitStack() as undo:
        for kind in ("attn", "mlp"):
            for i in getattr(plan, kind):
                if not parts.has(kind, i):
                    continue
                if kind == "attn":
                    slots.add(parts.places[i])  # modules know their slot by it
                put_stubs(undo, parts.layers[i], parts.sublayer(kind, i))
        for i in plan.blocks:
            if parts.splits[i] is not None:
                put(undo, layers, str(parts.places[i]), Gone(parts.layers[i], 0, 0, parts.splits[i].n_outputs))
        cut_caches(undo, parts.decoder, slots)
        former = getattr(model.config, "llmdrop", None) or {}
        record = {key: former[key] for key in ("removed",) if key in former} | {"n_layers": parts.n_layers} | plan.key
        biases = [[i, name] for i, name in given_biases(model.config) if _is_there(parts, i, name)]
        if biases:
            record["biases"] = biases
        put(undo, model.config, "llmdrop", record)
        return undo.pop_all()


def put_stubs(undo: ExitStack, layer: nn.Module, sublayer: Sublayer) -> None:
    """Take a sublayer and its norms out of a layer; `undo` puts them back."""
    for name, stub in sublayer.stubs.items():
        owner, _, child = name.rpartition(".")
        former = layer.get_submodule(name)
        put(undo, layer.get_submodule(owner), child, Gone(former, stub.passes, stub.width, stub.n_outputs))


def cut_caches(undo: ExitStack, decoder: nn.Module, slots: Iterable[int]) -> None:
    """Let the decoder's KV caches hold nothing in these slots."""
    cut = getattr(decoder, "_llmdrop_cache", None)
    if cut is None:
        cut = CacheCut()
        undo.callback(decoder.register_forward_pre_hook(cut.before, with_kwargs=True).remove)
        undo.callback(decoder.register_forward_hook(cut.after, with_kwargs=True).remove)
        put(undo, decoder, "_llmdrop_cache", cut)
    put(undo, cut, "slots", tuple(sorted(slots)))


def _is_there(parts: Anatomy, i: int, name: str) -> bool:
    """Whether a module of layer i is in the model."""
    try:
        return not isinstance(parts.layer_list[parts.places[i]].get_submodule(name), Gone)
    except (AttributeError, TypeError):  # something above it is gone, or the whole layer
        return False


def placements(model: nn.Module) -> dict:
    """What stands where in a dropped model, for a checkpoint's record: see `place`."""
    parts = find_anatomy(model)
    names = {module: name for name, module in model.named_modules()}
    gone = {names[module]: module for module in names if isinstance(module, Gone)}
    cut = getattr(parts.decoder, "_llmdrop_cache", CacheCut)
    return {
        "stubs": {name: [module.passes, module.width, module.n_outputs] for name, module in gone.items()},
        "inside": {name: module.inside for name, module in gone.items() if module.inside},
        "decoder": names[parts.decoder],
        "layers": names[parts.layer_list],
        "slots": list(cut.slots),
        "matrices": [f"{names[parts.layers[i]]}.{name}" for i, name in given_biases(model.config)],
    }


def place(model: nn.Module, record: dict) -> None:
    """Take out of an undropped model what a checkpoint's record lists, and make room for its biases.

    record: "stubs", by the name of the module that each stands for, the arguments of `Gone`; "inside", of whole layers,
    the same for what is in them; "decoder", the name of the module that makes KV caches, and "slots" of these that hold
    nothing; "layers", the name of the list of layers; "matrices", names of those with a bias of ours.
    """
    for name, arguments in record["stubs"].items():
        former = model.get_submodule(name)
        inside = record["inside"].get(name, {})
        if DummyLayer is object and inside:  # an older transformers: its layers know best what they return
            for child, of_child in inside.items():
                former.set_submodule(child, Gone(former.get_submodule(child), *of_child))
            continue
        gone = Gone(former, *arguments)
        gone.inside = inside
        model.set_submodule(name, gone)
    decoder = model.get_submodule(record["decoder"])
    if DummyLayer is object:
        renumber_attention(model.get_submodule(record["layers"]), record["slots"], decoder.config)
    else:
        cut = CacheCut()
        cut.slots = tuple(record["slots"])
        decoder._llmdrop_cache = cut
        decoder.register_forward_pre_hook(cut.before, with_kwargs=True)
        decoder.register_forward_hook(cut.after, with_kwargs=True)
    for name in record["matrices"]:
        matrix = model.get_submodule(name)
        matrix.bias = zero_bias(matrix)


def renumber_attention(layers: nn.ModuleList, slots: list[int], config) -> None:
    """For a transformers without empty cache slots: the attention that is left takes the first ones."""
    mixed = len(set(getattr(config, "layer_types", None) or ())) > 1
    if slots and (mixed or len(slots) == len(layers)):
        raise ImportError("this dropped model mixes kinds of attention, or has none: it needs a newer transformers")
    live = [layer for place, layer in enumerate(layers) if place not in slots]
    for slot, layer in enumerate(live):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = slot


def drop_recorded(model: nn.Module, record: dict) -> nn.Module:
    """What a checkpoint's record lists, dropped from the undropped model, with room for its biases; returns it."""
    if "stubs" in record:
        place(model, record)
        kept = ("n_layers", "attn", "mlp", "biases", "removed")
        model.config.llmdrop = {key: record[key] for key in kept if key in record}
        return model
    apply_plan(model, DropPlan(record["attn"], record["mlp"], record["n_layers"]))
    give_biases(ExitStack(), model, record.get("biases", ()))
    return model


def give_biases(undo: ExitStack, model: nn.Module, places: Iterable[tuple[int, str]]) -> None:
    """Give matrices that have none a bias of zeros; `undo` takes them away.

    places: (index of the layer in the undropped model, name in the layer as "mlp.down_proj") of each. They are listed
    in `model.config.llmdrop` where it has a record: stock classes have no room for them.
    """
    parts = find_anatomy(model)
    config = model.config
    places = [[i, name] for i, name in places]
    for i, name in places:
        matrix = parts.layers[i].get_submodule(name)
        put(undo, matrix, "bias", zero_bias(matrix))
    if places and getattr(config, "llmdrop", None):
        put(undo, config, "llmdrop", config.llmdrop | {"biases": sorted(given_biases(config) + places)})


def given_biases(config) -> list[list]:
    """[index of the layer in the undropped model, name in the layer] of the matrices that `give_biases` gave one."""
    return list((getattr(config, "llmdrop", None) or {}).get("biases", ()))


def zero_bias(matrix: nn.Linear) -> nn.Parameter:
    """A bias of zeros for this matrix, [outputs], in its type (of 4-bit weights: the default type)."""
    dtype = matrix.weight.dtype if matrix.weight.is_floating_point() else torch.get_default_dtype()
    zeros = torch.zeros(matrix.out_features, dtype=dtype, device=matrix.weight.device)
    return nn.Parameter(zeros, requires_grad=matrix.weight.requires_grad)


def _checked(parts: Anatomy, plan: DropPlan) -> DropPlan:
    """The plan with what is dropped already. ValueError where it does not fit the model or leaves nothing of it."""
    whole = parts.whole_plan(plan)
    left = [(kind, i) for kind in ("attn", "mlp") for i in parts.live(kind) if i not in getattr(whole, kind)]
    if not left:
        raise ValueError(
            f"the plan drops all {parts.n_layers} attention and all {parts.n_layers} MLP layers; keep at least one"
        )
    for i, readers in parts.readers.items():
        needing = [j for j in readers if ("attn", j) in left]
        if i in whole.attn and needing:
            raise ValueError(
                f"the attention of layers {needing} reads what that of layer {i} gives it (shared keys or selected "
                f"tokens); drop them together, or keep that of layer {i}"
            )
    silent = [i for i, layer in enumerate(parts.layers) if layer is not None and parts.splits[i] is None]
    if silent and not any(kind == "attn" and i < silent[0] for kind, i in left):
        raise ValueError(
            f"layer {silent[0]} does not run on text alone, and its cache does not count the tokens of the text; keep "
            "at least one attention before it"
        )
    return whole


class EmptySlot(DummyLayer):
    """Cache slot of a dropped attention layer: holds nothing."""

    def __init__(self):
        super().__init__()
        self.is_initialized = False
        self.keys = self.values = torch.empty(0)


class TokenCount(DynamicLayer):
    """Cache slot of a model without any attention: positions still need the number of past tokens. Holds no bytes."""

    def get_seq_length(self) -> int:
        return self.keys.shape[-2] if self.is_initialized else 0

    def count(self, hidden: torch.Tensor) -> None:
        """hidden: [B, T, C] of the tokens that come."""
        nothing = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 0)  # [B, 1, T, 0]
        self.update(nothing, nothing)


class CacheCut:
    """Hooks of the decoder: in every KV cache, the slots of dropped attention layers hold nothing.

    transformers gives a cache one slot per layer, which the modules know by number. The length of the text is read
    from the first slot that has one.
    """

    slots: tuple[int, ...] = ()

    def before(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        cache = self._cache(args, kwargs)
        if cache is None and "past_key_values" in inspect.signature(decoder.forward).parameters:
            use_cache = kwargs.get("use_cache")
            if getattr(decoder.config, "use_cache", False) if use_cache is None else use_cache:
                cache = DynamicCache(config=decoder.config)
                kwargs = kwargs | {"past_key_values": cache}
        if cache is None:
            return args, kwargs
        while len(cache.layers) <= max(self.slots, default=-1) and cache.layer_class_to_replicate is not None:
            cache.layers.append(cache.layer_class_to_replicate())
        had_length = any(isinstance(layer, CacheLayerMixin) for layer in cache.layers)
        for slot in self.slots:
            if slot < len(cache.layers) and not isinstance(cache.layers[slot], EmptySlot | TokenCount):
                cache.layers[slot] = EmptySlot()
        if had_length and not any(isinstance(layer, CacheLayerMixin) for layer in cache.layers):
            cache.layers[self.slots[0]] = TokenCount()
        return args, kwargs

    def after(self, decoder: nn.Module, args: tuple, kwargs: dict, output) -> None:
        cache = self._cache(args, kwargs)
        for layer in cache.layers if cache is not None else ():
            if isinstance(layer, TokenCount):
                layer.count(output[0])

    @staticmethod
    def _cache(args: tuple, kwargs: dict) -> Cache | None:
        return next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
