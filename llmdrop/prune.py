"""Remove sublayers from a stock model: for good (`apply_plan`) or for a while (`dropped`)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import DynamicCache, DynamicLayer

from .anatomy import Anatomy, Layout, anatomy
from .plan import DropPlan


def apply_plan(model: nn.Module, plan: DropPlan) -> nn.Module:
    """Drop the plan's sublayers from `model` in place and return it.

    The sublayers and their norms are gone: parameters freed, the residual stream passes by. A layer that loses both
    leaves the layer list, so a plan of blocks only gives an ordinary, shorter model. The remaining attention modules
    are renumbered and every KV cache gets exactly one slot per remaining attention layer. Indices mean the undropped
    model, also when the model was dropped from before. What was dropped is recorded in `model.config.llmdrop`, beside
    the biases that compensation gave to what stays.

    Raises ValueError for unknown architectures, indices the model does not have, a plan made for another depth, and
    plans that leave no sublayer at all. The model is unchanged then.
    """
    _drop(model, plan)
    return model


@contextmanager
def dropped(model: nn.Module, plan: DropPlan) -> Iterator[nn.Module]:
    """`apply_plan` for the length of a `with` block; everything is restored afterwards, also after an exception.

    Can be nested (the plans add up). A KV cache made inside must not be used outside.
    """
    undo = _drop(model, plan)
    try:
        yield model
    finally:
        for owner, name, value in reversed(undo):
            _restore(owner, name, value)


_ABSENT = object()


def _restore(owner, name: str, value) -> None:
    if isinstance(owner, RemovableHandle):
        owner.remove()
    elif value is _ABSENT:
        delattr(owner, name)
    else:
        setattr(owner, name, value)


def _drop(model: nn.Module, plan: DropPlan) -> list[tuple]:
    """Drop and return the undo log: (owner, attribute, former value), to be put back last first."""
    parts = anatomy(model)
    plan = _checked(parts, plan)
    layout, config, undo = parts.layout, model.config, []

    def put(owner, name, value):
        undo.append((owner, name, getattr(owner, name, _ABSENT)))
        setattr(owner, name, value)

    for kind in ("attn", "mlp"):
        for i in getattr(plan, kind):
            if i not in getattr(parts.plan, kind):
                undo += stub_sublayer(parts.layers[i], layout, kind)

    kept = [i for i in range(parts.n_layers) if i not in plan.blocks]
    before = [i for i in range(parts.n_layers) if parts.layers[i] is not None]
    if kept != before:
        put(parts.decoder, parts.layers_name, nn.ModuleList(parts.layers[i] for i in kept))
        if getattr(config, "layer_types", None) is not None:
            types = [config.layer_types[before.index(i)] for i in kept]
            put(config, "layer_types", types)
        put(config, "num_hidden_layers", len(kept))

    live = [i for i in kept if i not in plan.attn]
    for slot, i in enumerate(live):
        put(getattr(parts.layers[i], layout.attn_core), "layer_idx", slot)
    slots = tuple(kept.index(i) for i in live)  # where a cache made from the config has this layer's slot
    hook = getattr(parts.decoder, "_llmdrop_cache", None)
    if hook is None:
        hook = CacheCut()
        handle = parts.decoder.register_forward_pre_hook(hook, with_kwargs=True)
        undo.append((handle, "remove", None))
        put(parts.decoder, "_llmdrop_cache", hook)
    put(hook, "slots", slots)
    put(hook, "n_layers", len(kept))
    if not live:
        put(getattr(parts.layers[kept[0]], layout.attn_core), "counts_tokens", True)
    record = {"n_layers": parts.n_layers, "attn": list(plan.attn), "mlp": list(plan.mlp)}
    gone = {layout.attn_core: plan.attn, layout.mlp_core: plan.mlp}
    biases = [[i, name] for i, name in given_biases(config) if i not in gone[name.split(".")[0]]]
    put(config, "llmdrop", record | ({"biases": biases} if biases else {}))
    return undo


def drop_recorded(model: nn.Module, record: dict) -> nn.Module:
    """`apply_plan` of what a checkpoint's record lists, with room for its biases; returns the model."""
    apply_plan(model, DropPlan(record["attn"], record["mlp"], record["n_layers"]))
    give_biases(model, record.get("biases", ()))
    return model


def give_biases(model: nn.Module, places: Iterable[tuple[int, str]]) -> list[tuple]:
    """Give matrices that have none a bias of zeros; returns the undo log: (owner, attribute, former value).

    places: (index of the layer in the undropped model, name in the layer as "mlp.down_proj") of each. They are listed
    in `model.config.llmdrop` where it has a record: stock classes have no room for them.
    """
    parts, config, places = anatomy(model), model.config, [[i, name] for i, name in places]
    undo = [add_bias(parts.layers[i].get_submodule(name)) for i, name in places]
    if places and getattr(config, "llmdrop", None):
        undo.append((config, "llmdrop", config.llmdrop))
        config.llmdrop = config.llmdrop | {"biases": sorted(given_biases(config) + places)}
    return undo


def given_biases(config) -> list[list]:
    """[index of the layer in the undropped model, name in the layer] of the matrices that `give_biases` gave one."""
    return list((getattr(config, "llmdrop", None) or {}).get("biases", ()))


def add_bias(matrix: nn.Linear) -> tuple[nn.Linear, str, None]:
    """Give it a bias of zeros; returns (owner, attribute, former value)."""
    dtype = matrix.weight.dtype if matrix.weight.is_floating_point() else torch.get_default_dtype()  # 4-bit: bytes
    zeros = torch.zeros(matrix.out_features, dtype=dtype, device=matrix.weight.device)
    matrix.bias = nn.Parameter(zeros, requires_grad=matrix.weight.requires_grad)
    return matrix, "bias", None


def stub_sublayer(layer: nn.Module, layout: Layout, kind: str) -> list[tuple[nn.Module, str, nn.Module]]:
    """Put stubs where the "attn" or "mlp" sublayer of one layer and its norms were; returns (layer, name, module)s."""
    core, names = (layout.attn_core, layout.attn) if kind == "attn" else (layout.mlp_core, layout.mlp)
    removed = [(layer, name, getattr(layer, name)) for name in names]
    for name in names:
        setattr(layer, name, (NoAttention() if kind == "attn" else NoMLP()) if name == core else nn.Identity())
    return removed


def _checked(parts: Anatomy, plan: DropPlan) -> DropPlan:
    if plan.n_layers not in (None, parts.n_layers):
        raise ValueError(
            f"this plan was made for a model of {plan.n_layers} layers, this model has {parts.n_layers}; "
            "make a plan from this model's own scores"
        )
    whole = DropPlan(plan.attn, plan.mlp, parts.n_layers) | parts.plan  # raises for indices beyond the model
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

    def __call__(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        cache, use_cache = kwargs.get("past_key_values"), kwargs.get("use_cache")
        if cache is None and (decoder.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=decoder.config)
            kwargs = kwargs | {"past_key_values": cache}
        if cache is not None and len(cache.layers) == self.n_layers != len(self.slots):  # fresh; once cut, shorter
            cache.layers = [cache.layers[slot] for slot in self.slots]
        if cache is not None and not self.slots and not cache.layers:
            cache.layers = [TokenCount()]
        return args, kwargs
