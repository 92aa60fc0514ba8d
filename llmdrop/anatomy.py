"""Where attention, MLP and the residual stream sit in a transformers decoder: found and proven, not listed by hand.

Every layer is one or two sublayers on a residual stream of width C,

    sequential   m = x + attn(x)        y = m + mlp(m)              x, m, y: [B, T, C]
    parallel     y = x + attn(x) + mlp(x)

where attn() and mlp() stand for whole sublayers, their norms included, wherever these are (Llama, OLMo-2, Gemma).
Scaled branches (Granite), several writers to the stream (shared experts, a Mamba beside an attention) and layers with
attention or MLP alone are of this kind, too: `proof.Split` says which modules add what. Layers of one signature (their
class, and names and classes of their children) are alike, so that the first and the last of them are proven, on copies
with random weights: where a model's weights are (on a GPU, in 4 bits, on a disk) makes no difference.
"""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .plan import DropPlan
from .proof import N_TOKENS, Gone, NotAdditive, Split, Sublayer, prove, random_copy

Signature = tuple
_PROVEN: WeakKeyDictionary[nn.Module, dict[Signature, Split | None]] = WeakKeyDictionary()  # by model


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model. Layers are numbered as in the undropped model, whatever is dropped already."""

    decoder: nn.Module  # is called with input_ids; its output is the final hidden state
    layer_list: nn.ModuleList  # of the decoder; what stands for a layer that is gone included
    places: tuple[int | None, ...]  # of each layer in the list; None in a shorter model that lacks it
    layers: tuple[nn.Module | None, ...]  # None where the whole block is gone
    splits: tuple[Split | None, ...]  # of each layer that is there and runs (not without an image: Mllama)
    plan: DropPlan  # what is dropped already
    readers: dict[int, tuple[int, ...]]  # of layers whose attention others use: those that read its keys or selection

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def parallel(self) -> bool:
        """Whether attention and MLP of any layer read the same x."""
        return any(split.parallel for split in self.splits if split)

    def has(self, kind: str, i: int) -> bool:
        """Whether layer i has an "attn" or "mlp" sublayer that is not dropped."""
        return self.sublayer(kind, i) is not None and i not in getattr(self.plan, kind)

    def live(self, kind: str) -> list[int]:
        """Indices of the layers whose "attn" or "mlp" sublayer is there."""
        return [i for i in range(self.n_layers) if self.has(kind, i)]

    def sublayer(self, kind: str, i: int) -> Sublayer | None:
        """What the "attn" or "mlp" of layer i is made of, dropped or not; None where the layer is gone or has none."""
        return self.splits[i] and getattr(self.splits[i], kind)

    def whole_plan(self, plan: DropPlan) -> DropPlan:
        """`plan` and what is dropped already.

        Raises TypeError for what is no DropPlan, ValueError for a plan of another depth or unknown indices.
        """
        if not isinstance(plan, DropPlan):
            raise TypeError(f"a {type(plan).__name__} is no plan; give a llmdrop.DropPlan, as plan_drop makes it")
        return plan.for_depth(self.n_layers) | self.plan.for_depth(self.n_layers)


def find_anatomy(model: nn.Module) -> Anatomy:
    """Find the parts of a transformers causal language model (or its bare decoder), and prove them.

    What is proven stays with the model; a layer whose class or child modules have changed is proven again. Raises
    ValueError, saying which layer and why, for a model without a residual split that can be proven: several residual
    streams, norms after the sum, layers that run more than once, attention that looks ahead.
    """
    decoder, layer_list = find_layers(model)
    record = getattr(model.config, "llmdrop", None) or {"n_layers": len(layer_list)}
    plan = DropPlan(record.get("attn", ()), record.get("mlp", ()), record["n_layers"])
    removed = () if len(layer_list) == record["n_layers"] else record.get("removed", plan.blocks)
    remaining = iter(range(len(layer_list)))
    places = tuple(None if i in removed else next(remaining) for i in range(record["n_layers"]))
    present = [None if place is None else layer_list[place] for place in places]
    layers = tuple(None if isinstance(layer, Gone) else layer for layer in present)
    proven = _PROVEN.setdefault(model, {})
    signatures = [layer if layer is None else _signature(layer) for layer in layers]
    if not proven.keys() >= {signature for signature in signatures if signature is not None}:
        proven |= _prove_all(decoder, layer_list)
    splits = tuple(signature and proven[signature] for signature in signatures)
    readers = {}
    for place, reading in _readers(decoder.config).items():
        readers[places.index(place)] = tuple(places.index(reader) for reader in reading)
    return Anatomy(decoder, layer_list, places, layers, splits, plan, readers)


def _readers(config) -> dict[int, tuple[int, ...]]:
    """By place, which layers need what the attention of another gives them: keys and values, or selected tokens."""
    readers: dict[int, list[int]] = {}
    stores: dict[str, int] = {}  # by type of layer, the last that keeps its keys and values for others (Gemma 4)
    for place, mode in enumerate(getattr(config, "kv_sharing_modes", None) or []):
        if mode == "store":
            stores[config.layer_types[place]] = place
        elif mode == "reuse":
            readers.setdefault(stores[config.layer_types[place]], []).append(place)
    for place, kind in enumerate(getattr(config, "indexer_types", None) or []):
        if kind == "shared":  # DeepSeek's sparse attention: the selection is handed on from layer to layer
            readers.setdefault(place - 1, []).append(place)
    return {place: tuple(reading) for place, reading in readers.items()}


def find_layers(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """(The decoder, its list of layers) of a language model, also inside of a multimodal one.

    Raises ValueError for what has no such list.
    """
    name = type(model).__name__
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        raise ValueError(f"a {name} is no transformers model; give a causal language model of transformers")
    text = model.config.get_text_config(decoder=True)
    depth = getattr(text, "num_hidden_layers", None)
    found: list[tuple[bool, int, nn.Module, nn.ModuleList]] = []
    inside: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(f"{outer}.") for outer in inside):
            continue
        inside.append(path)
        owner = path
        decoder = None
        while owner and decoder is None:
            owner = owner.rpartition(".")[0]
            candidate = model.get_submodule(owner)
            if "input_ids" in inspect.signature(candidate.forward).parameters:
                decoder = candidate
        if decoder is not None:
            is_text = type(decoder.config) is type(text) and len(module) == depth
            found.append((is_text, len(module), decoder, module))
    if not found:
        raise ValueError(f"this {name} has no list of layers; llmdrop drops layers of decoders that keep them in one")
    *_, decoder, layers = max(found, key=lambda entry: entry[:2])
    return decoder, layers


def _signature(layer: nn.Module) -> Signature:
    """What layers that are alike have in common, whatever is dropped from them."""
    children = tuple((name, _class(child)) for name, child in layer.named_children())
    facts = tuple((k, v) for k, v in vars(layer).items() if isinstance(v, str | bool) and k != "training")
    return type(layer), children, facts


def _class(module: nn.Module) -> type:
    return module.stands_for if isinstance(module, Gone) else type(module)


def _prove_all(decoder: nn.Module, layers: nn.ModuleList) -> dict[Signature, Split | None]:
    """The split of every signature, by one run of a copy of the decoder whose layers look at how they are called."""
    model_type = getattr(decoder.config, "model_type", type(decoder).__name__)
    signatures = [None if isinstance(layer, Gone) else _signature(layer) for layer in layers]
    whole = {k: layer for k, layer in enumerate(layers) if signatures[k] is not None and not _has_gone(layer)}
    missing = {signature for signature in signatures if signature is not None} - {signatures[k] for k in whole}
    if missing:  # of these every layer has something dropped
        undropped = find_layers(undropped_decoder(decoder))[1]
        whole |= {k: undropped[k] for k, signature in enumerate(signatures) if signature in missing}
    shown: dict[Signature, list[int]] = {}  # the layers to prove it by: the first and the last
    for k in sorted(whole):
        first = shown.setdefault(signatures[k], [k])[0]
        shown[signatures[k]] = [first, k]
    with torch.device("cpu"), torch.no_grad(), torch.random.fork_rng(devices=[]):
        proven: dict[Signature, Split] = {}
        probes = nn.ModuleList(
            layer if signatures[k] is None else _Probe(k, whole.get(k, layer), signatures[k], shown, proven)
            for k, layer in enumerate(layers)
        )
        shell = random_copy(decoder, {layers: probes})
        vocabulary = getattr(decoder.config.get_text_config(decoder=True), "vocab_size", N_TOKENS)
        try:
            shell(input_ids=torch.arange(N_TOKENS)[None] % vocabulary, use_cache=False)
        except NotAdditive as error:
            raise ValueError(f"no residual split of this {model_type!r} model can be proven: {error}") from error
        except (RuntimeError, TypeError, AttributeError, ValueError, IndexError, KeyError) as error:
            raise ValueError(
                f"no residual split of this {model_type!r} model can be proven: its decoder does not run on a line of "
                f"tokens alone ({type(error).__name__}: {error})"
            ) from error
        often = [probe.index for probe in probes if isinstance(probe, _Probe) and probe.calls > 1]
        if often:
            what = f"it runs layer {often[0]} more than once (recurrent depth)"
            raise ValueError(f"no residual split of this {model_type!r} model can be proven: {what}")
        if not proven:
            raise ValueError(
                f"no residual split of this {model_type!r} model can be proven: no layer runs on text alone"
            )
    return proven | dict.fromkeys({signature for signature in signatures if signature} - proven.keys())


def _has_gone(layer: nn.Module) -> bool:
    return any(isinstance(module, Gone) for module in layer.modules())


def undropped_decoder(decoder: nn.Module) -> nn.Module:
    """The decoder that the config describes, before anything is dropped; its weights are on "meta"."""
    with _weights_on_meta(), torch.device("cpu"):
        return type(decoder)(copy.deepcopy(decoder.config))


@contextmanager
def _weights_on_meta() -> Iterator[None]:
    """Modules that are made get parameters without memory, and buffers as ever."""
    register = nn.Module.register_parameter

    def on_meta(self, name, parameter):
        register(self, name, None if parameter is None else nn.Parameter(parameter.to("meta"), False))

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


class _Probe(nn.Module):
    """Stands for a layer in a copy of the decoder: proves its kind, if it is the first or last of it; passes x on."""

    def __init__(
        self,
        index: int,
        layer: nn.Module,
        signature: Signature,
        shown: dict[Signature, list[int]],
        proven: dict[Signature, Split],
    ):
        super().__init__()
        vars(self)["layer"] = layer  # not as a child
        self.index = index
        self.signature = signature
        self.shown = shown
        self.proven = proven
        self.calls = 0

    def __getattr__(self, name: str):
        return getattr(vars(self)["layer"], name)  # what decoders ask a layer

    def forward(self, *args, **kwargs):
        self.calls += 1
        hidden = args[0] if args else kwargs.pop("hidden_states")
        first, last = self.shown[self.signature]
        if self.calls == 1 and self.index == first:
            self.proven[self.signature] = self._prove(hidden, (args[1:], kwargs), seed=0)
        if self.calls == 1 and self.index == last:  # other weights, and perhaps another depth
            again = self._prove(hidden, (args[1:], kwargs), seed=1)
            self.proven[self.signature] = self.proven[self.signature].in_common_with(again)
        if self.signature in self.proven:
            n_outputs = self.proven[self.signature].n_outputs
        else:  # one that lost something, before the first whole one
            output = random_copy(vars(self)["layer"])(hidden, *args[1:], **kwargs)
            n_outputs = len(output) if isinstance(output, tuple | list) else 0
        return (hidden, *[None] * (n_outputs - 1)) if n_outputs else hidden

    def _prove(self, hidden: torch.Tensor, call: tuple[tuple, dict], seed: int) -> Split:
        layer = vars(self)["layer"]
        name = f"layer {self.index} ({type(layer).__name__})"
        if not isinstance(hidden, torch.Tensor) or hidden.ndim != 3:
            shape = tuple(hidden.shape) if isinstance(hidden, torch.Tensor) else type(hidden).__name__
            raise NotAdditive(f"{name} has several residual streams, or none: it reads {shape}, not [batch, tokens, C]")
        try:
            return prove(random_copy(layer, seed=seed), call, hidden.shape)
        except NotAdditive as error:
            raise NotAdditive(f"{name}: {error}") from error


def output_matrix(parts: Anatomy, i: int, kind: str) -> nn.Module:
    """The matrix that ends layer i's "attn" or "mlp" sublayer. Raises what `output_name` raises."""
    return parts.layers[i].get_submodule(output_name(parts, i, kind))


def output_name(parts: Anatomy, i: int, kind: str) -> str:
    """The name in layer i of the matrix that ends its "attn" or "mlp" sublayer: "mlp.down_proj".

    Raises ValueError where something follows that matrix, or attention and MLP run in parallel.
    """
    sublayer = parts.sublayer(kind, i)
    parallel = parts.splits[i].parallel
    if sublayer is None or sublayer.matrix is None or parallel:
        why = "it has none"
        if sublayer is not None:
            why = (
                "attention and MLP run in parallel" if parallel else f"{', '.join(sublayer.writers)} ends in no matrix"
            )
        raise ValueError(
            f"cannot reconstruct at layer {i}'s {kind} sublayer: {why}; that needs sublayers one after the other, each "
            "ending in a matrix (Llama, Mistral, Qwen, Phi-3, GPT-2, OPT). Drop without reconstruction"
        )
    return sublayer.matrix
