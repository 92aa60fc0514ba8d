"""Whole blocks gone: the model as a shorter one of its architecture, where it is one."""

from contextlib import ExitStack

from huggingface_hub.errors import StrictDataclassError
from torch import nn

from ..anatomy import RECORD, Anatomy, find_anatomy, find_layers, undropped_decoder, unwrapped
from ..proof import has_gone, is_gone
from ..prune import given_biases, put

FIRST_LAYERS = ("first_k_dense_replace", "max_window_layers", "num_hash_layers")  # so many layers differ from the rest
LAST_LAYERS = ("num_kv_shared_layers",)
NOT_BY_LAYER = ("_token_id", "_limit", "_multipliers")  # ends of names of lists that may be as long by chance


def is_ordinary(model: nn.Module) -> bool:
    """Whether what is left of the model is a model of its architecture: nothing dropped, or whole blocks alone.

    For blocks the shorter model is made by its config, without weights, and its layers compared: shapes and plain
    attributes must be those of the layers that are left. Where a layer computes with its depth they are not.
    """
    parts = find_anatomy(model)
    if given_biases(parts):
        return False
    if not parts.plan:
        return True
    if any(i in parts.live(kind) for kind in ("attn", "mlp") for i in (*parts.plan.attn, *parts.plan.mlp)):
        return False
    # GPT-2 may divide attention by the depth of its layer, as it runs
    if getattr(model.config, "scale_attn_by_inverse_layer_idx", False):
        return False
    kept = _kept(parts)
    if any(has_gone(parts.layer_list[place]) for place in kept):
        return False
    with ExitStack() as undo:
        renumber(undo, model)
        try:
            type(model.config).from_dict(model.config.to_dict())  # as it would be read
            shorter = find_layers(undropped_decoder(parts.decoder))[1]
        # a config that refuses to be this short
        except (ValueError, TypeError, IndexError, KeyError, StrictDataclassError):
            return False
    live = [parts.layer_list[place] for place in kept]
    return len(shorter) == len(live) and all(
        _facts(new, {number}) == _facts(old, {number, place})
        for number, (new, old, place) in enumerate(zip(shorter, live, kept, strict=True))
    )


def renumber(undo: ExitStack, model: nn.Module) -> None:
    """Let the model have the names and the config of a shorter one, to be written; `undo` gives it its own back."""
    if not any(is_gone(layer) for layer in find_layers(unwrapped(model))[1]):
        return  # before anything is proven: every model is asked as it is made
    parts = find_anatomy(model)
    kept = _kept(parts)
    n_layers = len(parts.layer_list)
    path = next(name for name, module in model.named_modules() if module is parts.layer_list)
    owner, _, name = path.rpartition(".")
    put(undo, model.get_submodule(owner), name, nn.ModuleList(parts.layer_list[place] for place in kept))
    # heads made by Auto classes hold a copy of their own of the decoder's config
    configs = {id(config): config for config in (model.config.get_text_config(), parts.decoder.config)}
    for config in configs.values():
        former = vars(config).copy()
        undo.callback(vars(config).update, former)
        for key, value in former.items():
            if not key.startswith("_") or key == "_per_layer_config":
                vars(config)[key] = _cut(key, value, kept, n_layers)
        config.num_hidden_layers = len(kept)
    record = getattr(parts.decoder, RECORD) | {"removed": list(parts.plan.blocks)}
    put(undo, parts.decoder, RECORD, record)


def _cut(key: str, value, kept: list[int], n_layers: int):
    """What a setting of the config is with these layers alone."""
    if key.endswith(NOT_BY_LAYER):
        return value
    if isinstance(value, list | tuple) and len(value) == n_layers:
        return type(value)(value[place] for place in kept)
    is_numbers = isinstance(value, list | tuple) and value and all(type(number) is int for number in value)
    if is_numbers and key.endswith(("_layers", "_layer_ids", "_layer_indices", "_idxs")) and max(value) < n_layers:
        return type(value)(kept.index(number) for number in value if number in kept)
    if key in FIRST_LAYERS and type(value) is int:
        return sum(place < value for place in kept)
    if key in LAST_LAYERS and type(value) is int:
        return sum(place >= n_layers - value for place in kept)
    return value


def _kept(parts: Anatomy) -> list[int]:
    """Places in the layer list that hold a layer."""
    return [place for place, layer in enumerate(parts.layer_list) if not is_gone(layer)]


def _facts(layer: nn.Module, numbers: set[int]) -> dict:
    """Shapes and plain attributes of all of a layer's modules; the layer's own number or slot is "its own"."""
    facts: dict = {}
    for name, tensor in layer.state_dict(keep_vars=True).items():
        facts[name] = tuple(tensor.shape)
    for name, module in layer.named_modules():
        for key, value in vars(module).items():
            if key.startswith("_") or key == "training" or not isinstance(value, str | int | float | None):
                continue
            is_number = type(value) is int and ("idx" in key or "layer" in key)
            facts[name, key] = "its own" if is_number and value in numbers else value
    return facts
