"""Remove sublayers from a stock model: for good (`apply_plan`) or for a while (`dropped`)."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakSet

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .anatomy import RECORD, Anatomy, Layout, find_anatomy, unwrapped
from .plan import AnyPlan, DropPlan


def apply_plan(model: nn.Module, plan: AnyPlan) -> nn.Module:
    """Drop the plan's sublayers from `model` in place and return it.

    The sublayers and their norms are gone: parameters freed, the residual stream passes by. A layer that loses both
    leaves the layer list, so a plan of blocks only gives an ordinary, shorter model. The remaining attention modules
    are renumbered and every KV cache gets exactly one slot per remaining attention layer. Indices mean the undropped
    model, also when the model was dropped from before. The model knows what was dropped (`find_anatomy(model).plan`),
    and its `save_pretrained` writes a checkpoint that stock classes refuse instead of filling it with random weights.
    plan: a DropPlan, or what `llmdrop.plan.as_plan` makes one of.

    Raises ValueError for unknown architectures, indices the model does not have, a plan made for another depth, plans
    that leave no sublayer at all, and a model in DistributedDataParallel; TypeError for what is no plan. The model is
    unchanged then.
    """
    parts = model.modules() if isinstance(model, nn.Module) else ()
    if any(isinstance(part, nn.parallel.DistributedDataParallel) for part in parts):
        raise ValueError(
            "DistributedDataParallel waits for gradients of the parameters it was made with: apply_plan to the model "
            "before it is wrapped, and wrap what is left"
        )
    _drop(model, plan)
    return model


@contextmanager
def dropped(model: nn.Module, plan: AnyPlan) -> Iterator[nn.Module]:
    """`apply_plan` for the length of a `with` block; everything is restored afterwards, also after an exception.

    Can be nested (the plans add up). A KV cache is good for the plan it was filled under, as long as the `with` block
    lasts: the model refuses it elsewhere (ValueError). The model changes for every thread: none may run it meanwhile
    that does not want it dropped.
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


def _drop(model: nn.Module, plan: AnyPlan) -> ExitStack:
    """Drop, and return what restores the model when it is closed. Where dropping fails, the model is restored."""
    parts = find_anatomy(model)
    plan = _checked(parts, plan)
    layout = parts.layout
    with ExitStack() as undo:
        for kind in ("attn", "mlp"):
            for i in sorted(set(getattr(plan, kind)) - set(getattr(parts.plan, kind))):
                for name, stub in stubs(layout, kind).items():
                    put(undo, parts.layers[i], name, stub)

        kept = [i for i in range(parts.n_layers) if i not in plan.blocks]
        present = [i for i in range(parts.n_layers) if parts.layers[i] is not None]
        if kept != present:
            put(undo, parts.decoder, parts.layers_name, nn.ModuleList(parts.layers[i] for i in kept))
            for config in text_configs(unwrapped(model), parts):
                if getattr(config, "layer_types", None) is not None:
                    put(undo, config, "layer_types", [config.layer_types[present.index(i)] for i in kept])
                put(undo, config, "num_hidden_layers", len(kept))

        with_attention = [i for i in kept if i not in plan.attn]
        for slot, i in enumerate(with_attention):
            put(undo, getattr(parts.layers[i], layout.attn_core), "layer_idx", slot)
        cut = getattr(parts.decoder, "_llmdrop_cache", None)
        if cut is None:
            cut = CacheCut()
            undo.callback(parts.decoder.register_forward_pre_hook(cut, with_kwargs=True).remove)
            put(undo, parts.decoder, "_llmdrop_cache", cut)
        put(undo, cut, "slots", tuple(kept.index(i) for i in with_attention))
        put(undo, cut, "n_layers", len(kept))
        put(undo, cut, "plan", (plan.attn, plan.mlp) if plan else None)
        if plan != parts.plan:
            put(undo, cut, "caches", WeakSet())
            undo.callback(_close, cut.caches)
        if not with_attention:
            put(undo, getattr(parts.layers[kept[0]], layout.attn_core), "counts_tokens", True)

        record = {"n_layers": parts.n_layers} | plan.key
        gone = {layout.attn_core: plan.attn, layout.mlp_core: plan.mlp}
        biases = [[i, name] for i, name in given_biases(parts) if i not in gone[name.split(".")[0]]]
        if biases:
            record["biases"] = biases
        put(undo, parts.decoder, RECORD, record)
        return undo.pop_all()


def drop_recorded(model: nn.Module, record: dict) -> nn.Module:
    """`apply_plan` of what a checkpoint's record lists, with room for its biases; returns the model."""
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
        record = {"n_layers": parts.n_layers} | parts.plan.key
        put(undo, parts.decoder, RECORD, record | {"biases": sorted(given_biases(parts) + places)})


def given_biases(parts: Anatomy) -> list[list]:
    """[index of the layer in the undropped model, name in the layer] of the matrices that `give_biases` gave one."""
    return list(getattr(parts.decoder, RECORD, {}).get("biases", ()))


def text_configs(model: nn.Module, parts: Anatomy) -> list:
    """The configs that say how many layers the decoder has: heads made by Auto classes hold a copy of their own."""
    configs = [model.config.get_text_config(), parts.decoder.config]
    return list({id(config): config for config in configs}.values())


def zero_bias(matrix: nn.Linear) -> nn.Parameter:
    """A bias of zeros for this matrix, [outputs], in its type (of 4-bit weights: the default type)."""
    dtype = matrix.weight.dtype if matrix.weight.is_floating_point() else torch.get_default_dtype()
    zeros = torch.zeros(matrix.out_features, dtype=dtype, device=matrix.weight.device)
    return nn.Parameter(zeros, requires_grad=matrix.weight.requires_grad)


def stubs(layout: Layout, kind: str) -> dict[str, nn.Module]:
    """What stands in a layer where its "attn" or "mlp" sublayer and its norms were: {name in the layer: module}."""
    core, names = (layout.attn_core, layout.attn) if kind == "attn" else (layout.mlp_core, layout.mlp)
    nothing = NoAttention() if kind == "attn" else NoMLP()
    return {name: nothing if name == core else nn.Identity() for name in names}


def _checked(parts: Anatomy, plan: AnyPlan) -> DropPlan:
    """The plan with what is dropped already. ValueError where it does not fit the model or leaves nothing of it."""
    whole = parts.whole_plan(plan)
    if len(whole) == 2 * parts.n_layers:
        raise ValueError(
            f"the plan drops all {parts.n_layers} attention and all {parts.n_layers} MLP layers; keep at least one"
        )
    return whole


class NoAttention(nn.Module):
    """Stands where an attention module was: adds nothing to the residual stream and owns no KV-cache slot."""

    counts_tokens = False  # True in one layer of a model with no attention left

    def forward(self, hidden_states, *args, past_key_values=None, layer_past=None, **kwargs):
        cache = layer_past if past_key_values is None else past_key_values  # GPT-NeoX says layer_past
        if self.counts_tokens and cache is not None:
            nothing = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 0)  # [B, 1, T, 0]
            cache.update(nothing, nothing, 0)
        return hidden_states.new_zeros(()), None  # one zero, broadcast: no [B, T, C] is made


class NoMLP(nn.Module):
    """Stands where an MLP was: adds nothing to the residual stream."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.new_zeros(())


class TokenCount(DynamicLayer):
    """Cache slot of a model without any attention: positions still need the number of past tokens. Holds no bytes."""

    def get_seq_length(self) -> int:
        return self.keys.shape[-2] if self.is_initialized else 0


class CacheCut:
    """Forward pre-hook of the decoder: gives every fresh KV cache exactly the slots of the remaining attention layers.

    transformers sizes caches from the config, one slot per layer, typed by config.layer_types (sliding or full
    attention). Picking the live layers' slots, in order, keeps types and modules in step, and slot 0, from which the
    cache length is read, belongs to a layer that is there.
    """

    slots: tuple[int, ...]  # of a cache made from the config, the slots that stay
    n_layers: int  # how many slots such a cache has
    plan: tuple | None = ()  # what is dropped, and so under what a cache must have been filled
    caches = None  # filled under a plan that may end

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "caches"}  # a copy has filled none

    def __call__(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        cache, use_cache = kwargs.get("past_key_values"), kwargs.get("use_cache")
        if cache is None and (decoder.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=decoder.config)
            kwargs = kwargs | {"past_key_values": cache}
        if cache is None:
            return args, kwargs
        if getattr(cache, "llmdrop_plan", None) != self.plan:
            if cache.get_seq_length() or len(cache.layers) > self.n_layers:
                raise ValueError(
                    "this KV cache was made or filled while other layers were dropped than now, and its keys and "
                    "values are of another model; begin with a fresh one"
                )
            if not self.slots:
                cache.layers = [TokenCount()]
            elif len(cache.layers) == self.n_layers:
                cache.layers = [cache.layers[slot] for slot in self.slots]
            cache.llmdrop_plan = self.plan
        if self.caches is not None and not torch.compiler.is_compiling():
            self.caches.add(cache)
        return args, kwargs


def _close(caches: Iterable[Cache]) -> None:
    """Let nothing more be put into these caches: the model they were filled by is about to be another one."""
    for cache in caches:
        for layer in cache.layers:
            layer.update = _refuse


def _refuse(*args, **kwargs):
    raise ValueError(
        "this KV cache was filled while layers were dropped that are here again (or the other way round), and its keys "
        "and values are of another model; begin with a fresh one"
    )
