"""Remove sublayers from a stock model: for good (`apply_plan`) or for a while (`dropped`)."""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from .anatomy import RECORD, Anatomy, exclusive, find_anatomy, find_layers, unwrapped
from .plan import AnyPlan, DropPlan
from .proof import Gone, Sublayer, has_gone, is_gone

SLOT_NAMES = ("layer_idx", "layer_id")  # attributes by which modules know their slot of a KV cache
DROPPED = " (dropped)"  # after the name of a model
# methods of a KV cache, or of its layers, by which a model uses them
CACHE_USES = ("update", "get_conv_state", "update_conv_state", "get_recurrent_state", "update_recurrent_state")
_INSIDE: WeakKeyDictionary[nn.Module, list] = WeakKeyDictionary()  # by decoder, the `dropped` blocks that are running
SHARED_SLOT = "kv_shared_layer_index"  # and that of another layer, whose keys and values they read


def apply_plan(model: nn.Module, plan: AnyPlan) -> nn.Module:
    """Drop the plan's sublayers from `model` in place and return it.

    The sublayers and their norms are gone: parameters freed, the residual stream passes by. A layer that loses both is
    gone whole. Every KV cache gets exactly one slot per remaining attention layer. Indices mean the undropped model,
    also when the model was dropped from before; of a layer that has no such sublayer nothing is dropped. The model
    knows what was dropped (`find_anatomy(model).plan`), and its `save_pretrained` writes a checkpoint that stock
    classes refuse instead of filling it with random weights; where only whole blocks are gone, an ordinary one.
    plan: a DropPlan, or what `llmdrop.plan.as_plan` makes one of.

    Raises ValueError for architectures whose residual split cannot be proven, indices the model does not have, a plan
    made for another depth, plans that leave no sublayer at all, a model in DistributedDataParallel, and inside of
    `dropped`; TypeError for what is no plan. The model is unchanged then.
    """
    parts = list(model.modules()) if isinstance(model, nn.Module) else []
    if any(_INSIDE.get(part) for part in parts):
        raise ValueError("apply_plan inside of `dropped` would outlast what it builds on; nest `dropped` instead")
    if any(isinstance(part, nn.parallel.DistributedDataParallel) for part in parts):
        raise ValueError(
            "DistributedDataParallel waits for gradients of the parameters it was made with: apply_plan to the model "
            "before it is wrapped, and wrap what is left"
        )
    _drop(model, plan)
    name_as_dropped(model)
    return model


def name_as_dropped(model: nn.Module) -> None:
    """Let the model's name say so: adapters that are trained on it must not name the undropped model as their base."""
    model = unwrapped(model)
    name = str(getattr(model, "name_or_path", ""))
    if name and has_gone(model) and not name.endswith(DROPPED):
        model.name_or_path = name + DROPPED


@contextmanager
def dropped(model: nn.Module, plan: AnyPlan) -> Iterator[nn.Module]:
    """`apply_plan` for the length of a `with` block; everything is restored afterwards, also after an exception.

    Can be nested (the plans add up). A KV cache is good for the plan it was filled under, as long as the `with` block
    lasts: the model refuses it elsewhere (ValueError), though not a copy of it. The model changes for every thread:
    none may run it meanwhile that does not want it dropped. Raises what `apply_plan` raises.
    """
    decoder = find_anatomy(model).decoder
    with exclusive(decoder), _drop(model, plan):
        inside = _INSIDE.setdefault(decoder, [])
        inside.append(object())
        entered = inside[-1]
        try:
            yield model
        finally:
            if inside[-1] is not entered:
                raise RuntimeError("two `dropped` of one model end in another order than they began; nest them")
            inside.pop()


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


def _drop(model: nn.Module, plan: AnyPlan) -> ExitStack:
    """Drop, and return what restores the model when it is closed. Where dropping fails, the model is restored."""
    parts = find_anatomy(model)
    plan = _checked(parts, plan)
    with ExitStack() as undo:
        for kind in ("attn", "mlp"):
            for i in getattr(plan, kind):
                if parts.has(kind, i):
                    put_stubs(undo, parts.layers[i], parts.sublayer(kind, i))
        for i in plan.blocks:
            if parts.splits[i] is not None:
                gone = Gone(parts.layers[i], 0, 0, parts.splits[i].n_outputs)
                put(undo, parts.layer_list, str(parts.places[i]), gone)
        cut_caches(undo, parts, plan)
        record = {"n_layers": parts.n_layers} | plan.key
        former = getattr(parts.decoder, RECORD, {})
        if "removed" in former:
            record["removed"] = former["removed"]
        biases = [[i, name] for i, name in given_biases(parts) if _is_there(parts, i, name)]
        if biases:
            record["biases"] = biases
        put(undo, parts.decoder, RECORD, record)
        return undo.pop_all()


def put_stubs(undo: ExitStack, layer: nn.Module, sublayer: Sublayer) -> None:
    """Take a sublayer and its norms out of a layer; `undo` puts them back."""
    for name, stub in sublayer.stubs.items():
        owner, _, child = name.rpartition(".")
        former = layer.get_submodule(name)
        put(undo, layer.get_submodule(owner), child, Gone(former, stub.passes, stub.width, stub.n_outputs))


def cut_caches(undo: ExitStack, parts: Anatomy, plan: DropPlan) -> None:
    """Let KV caches have no slots for the attention layers of the plan, and number the modules of the others anew."""
    fresh = DynamicCache(config=parts.decoder.config).layers
    cut = getattr(parts.decoder, "_llmdrop_cache", None)
    if cut is None:
        cut = CacheCut()
        undo.callback(parts.decoder.register_forward_pre_hook(cut.before, with_kwargs=True).remove)
        undo.callback(parts.decoder.register_forward_hook(cut.after, with_kwargs=True).remove)
        put(undo, parts.decoder, "_llmdrop_cache", cut)
        cut.slots = tuple(range(len(fresh)))
    gone = {i for i in plan.attn if parts.has("attn", i)} | {i for i in plan.blocks if parts.splits[i] is not None}
    without = {parts.places[i] for i in gone}
    slots = tuple(slot for slot in cut.slots if slot not in without)
    with_length = {slot for slot, layer in enumerate(fresh) if isinstance(layer, CacheLayerMixin)}
    counts = bool(with_length) and with_length.isdisjoint(slots)
    numbers = {slot + cut.counts: slots.index(place) + counts for slot, place in enumerate(cut.slots) if place in slots}
    for slot, place in enumerate(cut.slots):
        for module in parts.layer_list[place].modules() if place in slots else ():
            for name in SLOT_NAMES:
                if vars(module).get(name) == slot + cut.counts:
                    put(undo, module, name, numbers[slot + cut.counts])
            if vars(module).get(SHARED_SLOT) in numbers:
                put(undo, module, SHARED_SLOT, numbers[vars(module)[SHARED_SLOT]])
    put(undo, cut, "by_place", slots != tuple(range(len(fresh))) and _asks_by_place(parts))
    put(undo, cut, "slots", slots)
    put(undo, cut, "n_slots", len(fresh))
    put(undo, cut, "counts", counts)
    put(undo, cut, "plan", (plan.attn, plan.mlp) if plan else None)
    if plan != parts.plan:
        put(undo, cut, "caches", WeakSet())
        undo.callback(_close, cut.caches)


def _asks_by_place(parts: Anatomy) -> bool:
    """Whether the decoder itself asks its cache about layers, by their places: for those that it skips on text alone,
    as Mllama's, and those that share one attention without a number of its own, as Zamba's."""
    if any(layer is not None and split is None for layer, split in zip(parts.layers, parts.splits, strict=True)):
        return True
    for i in parts.live("attn"):
        for stub in parts.sublayer("attn", i).stubs:
            mixer = parts.layers[i].get_submodule(stub)
            for module in () if is_gone(mixer) else mixer.modules():
                numbers = [vars(module).get(name, 0) for name in SLOT_NAMES]
                if any(number is None or number < 0 for number in numbers):
                    return True
    return False


def _is_there(parts: Anatomy, i: int, name: str) -> bool:
    """Whether a module of layer i is in the model."""
    try:
        return not is_gone(parts.layer_list[parts.places[i]].get_submodule(name))
    except (AttributeError, TypeError):  # something above it is gone, or the whole layer
        return False


def placements(model: nn.Module, parts: Anatomy) -> dict:
    """What stands where in a dropped model, for a checkpoint's record (see `place`)."""
    names = {module: name for name, module in model.base_model.named_modules()}
    cut = getattr(parts.decoder, "_llmdrop_cache", None) or CacheCut()
    numbers = {}
    for slot in cut.slots:
        for module in parts.layer_list[slot].modules():
            known = [name for name in (*SLOT_NAMES, SHARED_SLOT) if type(vars(module).get(name)) is int]
            numbers |= {f"{names[module]}.{name}": vars(module)[name] for name in known}
    gone = {names[module]: module for module in names if is_gone(module)}
    return {
        "stubs": {name: [module.passes, module.width, module.n_outputs] for name, module in gone.items()},
        "decoder": names[parts.decoder],
        "cache": {"slots": list(cut.slots), "n_slots": cut.n_slots, "counts": cut.counts, "by_place": cut.by_place},
        "numbers": numbers,
        "matrices": [f"{names[parts.layers[i]]}.{name}" for i, name in given_biases(parts)],
    }


def place(model: nn.Module, record: dict) -> None:
    """Take out of an undropped model what a checkpoint's record lists, and make room for its biases.

    record: "stubs", by the name of the module that each stands for, the arguments of `Gone`; "decoder", the name of the
    module that makes the KV caches; "cache", what `CacheCut` knows; "numbers" by which modules know their slots;
    "matrices", names of those with biases. Names are from the base model on.
    """
    base = model.base_model
    is_old = is_old_release()
    for name, (passes, width, n_outputs) in record["stubs"].items():
        owner, _, child = name.rpartition(".")
        if is_old and child.isdigit():
            n_outputs = n_outputs or 1
        setattr(base.get_submodule(owner), child, Gone(base.get_submodule(name), passes, width, n_outputs))
    for name, number in record["numbers"].items():
        module, _, attribute = name.rpartition(".")
        setattr(base.get_submodule(module), attribute, number)
    for name in record["matrices"]:
        matrix = base.get_submodule(name)
        matrix.bias = zero_bias(matrix)
    decoder = base.get_submodule(record["decoder"])
    kept = ("n_layers", "attn", "mlp", "biases", "removed")
    setattr(decoder, RECORD, {key: record[key] for key in kept if key in record})
    if not is_old:
        cut = CacheCut()
        cut.slots = tuple(record["cache"]["slots"])
        cut.n_slots = record["cache"]["n_slots"]
        cut.counts = record["cache"]["counts"]
        cut.by_place = record["cache"].get("by_place", False)
        cut.plan = (tuple(record["attn"]), tuple(record["mlp"]))
        decoder._llmdrop_cache = cut
        decoder.register_forward_pre_hook(cut.before, with_kwargs=True)
        decoder.register_forward_hook(cut.after, with_kwargs=True)


def is_old_release() -> bool:
    """Whether this transformers is older than 4.56: caches grow as layers use them, and layers return tuples."""
    return "config" not in inspect.signature(DynamicCache.__init__).parameters


def drop_recorded(model: nn.Module, record: dict) -> nn.Module:
    """What a checkpoint's record lists, dropped from the undropped model, with room for its biases; returns it."""
    if "stubs" in record:
        place(model, record)
        return model
    if "removed" in record:  # as far as the config goes there is nothing to drop
        setattr(find_layers(model)[0], RECORD, record)
        return model
    apply_plan(model, DropPlan(record["attn"], record["mlp"], record["n_layers"]))
    give_biases(ExitStack(), model, record.get("biases", ()))
    return model


def give_biases(undo: ExitStack, model: nn.Module, places: Iterable[tuple[int, str]]) -> None:
    """Give matrices that have none a bias of zeros; `undo` takes them away.

    places: (index of the layer in the undropped model, name in the layer as "mlp.down_proj") of each.
    """
    parts = find_anatomy(model)
    places = [[i, name] for i, name in places]
    for i, name in places:
        matrix = parts.layers[i].get_submodule(name)
        put(undo, matrix, "bias", zero_bias(matrix))
    if places:  # recorded, because stock classes have no room for them
        record = getattr(parts.decoder, RECORD, {"n_layers": parts.n_layers} | parts.plan.key)
        put(undo, parts.decoder, RECORD, record | {"biases": sorted(given_biases(parts) + places)})


def given_biases(parts: Anatomy) -> list[list]:
    """[index of the layer in the undropped model, name in the layer] of the matrices that `give_biases` gave one."""
    return list(getattr(parts.decoder, RECORD, {}).get("biases", ()))


def zero_bias(matrix: nn.Linear) -> nn.Parameter:
    """A bias of zeros for this matrix, [outputs], in its type (of 4-bit weights: the default type)."""
    dtype = matrix.weight.dtype if matrix.weight.is_floating_point() else torch.get_default_dtype()
    zeros = torch.zeros(matrix.out_features, dtype=dtype, device=matrix.weight.device)
    return nn.Parameter(zeros, requires_grad=matrix.weight.requires_grad)


def _checked(parts: Anatomy, plan: AnyPlan) -> DropPlan:
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


class TokenCount(DynamicLayer):
    """Cache slot of a model without any attention: positions still need the number of past tokens. Holds no bytes."""

    def get_seq_length(self) -> int:
        return self.keys.shape[-2] if self.is_initialized else 0

    def count(self, hidden: torch.Tensor) -> None:
        """hidden: [B, T, C] of the tokens that come."""
        nothing = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 0)  # [B, 1, T, 0]
        self.update(nothing, nothing, 0)


class CacheCut:
    """Hooks of the decoder: every fresh KV cache gets exactly the slots of the layers that still have an attention.

    transformers sizes caches from the config, one slot per layer, typed by config.layer_types (sliding or full
    attention). Picking the live layers' slots, in order, keeps types and modules in step, and slot 0, from which the
    cache length is read, belongs to a layer that is there. Where no slot is left that has a length, one counts tokens.
    """

    slots: tuple[int, ...] = ()  # of a cache made from the config, the slots that stay
    n_slots: int = 0  # how many such a cache has
    counts: bool = False  # whether a slot that counts tokens stands before them
    by_place: bool = False  # whether the decoder would look for them by the places of layers
    plan: tuple | None = ()  # what is dropped, and so under what a cache must have been filled
    caches = None  # filled under a plan that may end

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "caches"}  # a copy has filled none

    def before(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        cache = self._cache(args, kwargs)
        names = [n for n in ("past_key_values", "cache_params") if n in inspect.signature(decoder.forward).parameters]
        if cache is None and names:
            use_cache = kwargs.get("use_cache")
            if getattr(decoder.config, "use_cache", False) if use_cache is None else use_cache:
                cache = DynamicCache(config=decoder.config)
                kwargs = kwargs | {names[0]: cache}
        if cache is None:
            return args, kwargs
        if self.by_place:
            raise ValueError(
                "this model looks up the cache slots of its layers by their places (layers share an attention, or are "
                "skipped without an image), and a slot of a dropped one is missing; run it with use_cache=False"
            )
        if getattr(cache, "llmdrop_plan", None) != self.plan:
            if self._is_filled(cache) or len(cache.layers) > self.n_slots:
                raise ValueError(
                    "this KV cache was made or filled while other layers were dropped than now, and its keys and "
                    "values are of another model; begin with a fresh one"
                )
            if len(cache.layers) == self.n_slots:  # else it grows as layers use it
                cache.layers = [cache.layers[slot] for slot in self.slots]
            if self.counts:
                cache.layers.insert(0, TokenCount())
            cache.llmdrop_plan = self.plan
        if self.caches is not None and not torch.compiler.is_compiling():
            self.caches.add(cache)
        return args, kwargs

    def after(self, decoder: nn.Module, args: tuple, kwargs: dict, output) -> None:
        cache = self._cache(args, kwargs) if self.counts else None
        if cache is not None:
            cache.layers[0].count(output[0])

    @staticmethod
    def _is_filled(cache: Cache) -> bool:
        states = [getattr(layer, name, None) for layer in cache.layers for name in ("conv_states", "recurrent_states")]
        leaves = torch.utils._pytree.tree_leaves(states)
        try:
            return any(leaf is not None and bool(leaf.any()) for leaf in leaves) or cache.get_seq_length() > 0
        except ValueError:  # it has states alone, as of a Mamba
            return False

    @staticmethod
    def _cache(args: tuple, kwargs: dict) -> Cache | None:
        return next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)


def _close(caches: Iterable[Cache]) -> None:
    """Let nothing more be put into these caches: the model they were filled by is about to be another one."""
    for cache in caches:
        for part in (cache, *cache.layers):
            for name in CACHE_USES:
                if hasattr(part, name):
                    setattr(part, name, _refuse)


def _refuse(*args, **kwargs):
    raise ValueError(
        "this KV cache was filled while layers were dropped that are here again (or the other way round), and its keys "
        "and values are of another model; begin with a fresh one"
    )
