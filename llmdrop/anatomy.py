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
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers.modeling_utils import local_torch_dtype

from .plan import AnyPlan, DropPlan, as_plan
from .proof import N_TOKENS, NotAdditive, Split, StandIn, Sublayer, as_output, has_gone, is_gone, prove, random_copy

# attribute of a decoder that was dropped from: its depth before ("n_layers"), DropPlan.key, biases that were added, and
# layers that its list does not even hold a place for ("removed")
RECORD = "_llmdrop"
_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()  # by decoder
Signature = tuple
_OF_CONFIG: dict[tuple, dict[Signature, Split | None]] = {}  # by decoder class, config and signatures
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

    def has(self, kind: str, i: int) -> bool:
        """Whether layer i has an "attn" or "mlp" sublayer that is not dropped."""
        return self.sublayer(kind, i) is not None and i not in getattr(self.plan, kind)

    def live(self, kind: str) -> list[int]:
        """Indices of the layers whose "attn" or "mlp" sublayer is there."""
        return [i for i in range(self.n_layers) if self.has(kind, i)]

    def sublayer(self, kind: str, i: int) -> Sublayer | None:
        """What the "attn" or "mlp" of layer i is made of, dropped or not; None where the layer is gone or has none."""
        return self.splits[i] and getattr(self.splits[i], kind)

    def whole_plan(self, plan: AnyPlan) -> DropPlan:
        """`plan` (whatever `as_plan` takes) and what is dropped already.

        Raises what `as_plan` raises, and ValueError for a plan of another depth or unknown indices.
        """
        return as_plan(plan, self.n_layers).for_depth(self.n_layers) | self.plan.for_depth(self.n_layers)


# what others put around a model, by the name of the class (none of them has to be installed): where the model is in it
WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}
SHARDING = {"FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine"}  # parameters lie in pieces
ADAPTERS = {"BaseTunerLayer", "AuxiliaryTrainingWrapper"}  # peft's, in place of a layer's own modules


def unwrapped(model: nn.Module, with_adapters: bool = True) -> nn.Module:
    """The transformers model in what torch.compile, DataParallel, DistributedDataParallel and peft put around it.

    What it computes is what the wrapper computes: adapters of peft that are not merged stay in its layers, and with
    with_adapters=False, for what reads or writes weights, they are refused. Raises ValueError for these, for models
    whose parameters FSDP or DeepSpeed keep in pieces, and for peft models that are more than their layers (prompt
    tuning); each says what to do.
    """
    if not isinstance(model, nn.Module):
        return model
    names = _class_names(type(model))
    if any(SHARDING & _class_names(type(module)) for module in model.modules()):
        raise ValueError(
            "this model is sharded (FSDP, DeepSpeed), and its layers hold pieces of their parameters: do this before "
            "it is wrapped, or load what you save of it (a full state dict) into a plain model"
        )
    for wrapper, inside in WRAPPERS.items():
        if wrapper in names:
            return unwrapped(getattr(model, inside), with_adapters)
    if names & {"PeftModel", "PeftMixedModel"}:
        tuner = _class_names(type(model.base_model))
        if "BaseTuner" not in tuner or "XLoraModel" in tuner:
            raise ValueError(
                "this peft model adds more than its layers show (virtual tokens, prompts, mixtures); give the model "
                "inside, model.get_base_model(), which is without them, or adapters of another kind, as LoRA"
            )
        return unwrapped(model.base_model.model, with_adapters)
    if not with_adapters and any(ADAPTERS & _class_names(type(module)) for module in model.modules()):
        raise ValueError(
            "this model has adapters of peft beside its weights, which this reads or writes: merge them first, "
            "model = peft_model.merge_and_unload()"
        )
    return model


def check_has_weights(model: nn.Module) -> None:
    """ValueError for a model on the meta device, unless accelerate brings its weights when they are needed."""
    is_offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())
    if not is_offloaded and any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "the model is on the meta device, so it has shapes and no weights; load it with llmdrop.load_model, or "
            "score one that is larger than memory by llmdrop.score_checkpoint"
        )


@cache
def _class_names(kind: type) -> frozenset[str]:
    return frozenset(parent.__name__ for parent in kind.__mro__)


def find_anatomy(model: nn.Module) -> Anatomy:
    """Find the parts of a transformers causal language model (or its bare decoder), and prove them.

    What is proven stays with the model; a layer whose class or child modules have changed is proven again. Raises
    ValueError, saying which layer and why, for a model without a residual split that can be proven: several residual
    streams, norms after the sum, layers that run more than once, attention that looks ahead; and what `unwrapped` does.
    """
    model = unwrapped(model)
    decoder, layer_list = find_layers(model)
    with exclusive(decoder):  # else others may stand in for layers
        return _anatomy(model, decoder, layer_list)


def _anatomy(model: nn.Module, decoder: nn.Module, layer_list: nn.ModuleList) -> Anatomy:
    record = getattr(decoder, RECORD, None) or {"n_layers": len(layer_list)}
    plan = DropPlan(record.get("attn", ()), record.get("mlp", ()), record["n_layers"])
    removed = () if len(layer_list) == record["n_layers"] else record.get("removed", plan.blocks)
    remaining = iter(range(len(layer_list)))
    places = tuple(None if i in removed else next(remaining) for i in range(record["n_layers"]))
    present = [None if place is None else layer_list[place] for place in places]
    layers = tuple(None if is_gone(layer) else layer for layer in present)
    for i, layer in enumerate(layers):
        if layer is not None and layer in layers[:i]:
            raise ValueError(
                f"layers {layers.index(layer)} and {i} are one module, so that what is dropped from one is gone from "
                "both; give each a copy of its own (copy.deepcopy)"
            )
    proven = _PROVEN.setdefault(model, {})
    signatures = [layer if layer is None else _signature(layer) for layer in layers]
    if not proven.keys() >= {signature for signature in signatures if signature is not None}:
        if has_gone(layer_list):
            proven |= _prove_all(decoder, layer_list)
        else:  # models of one config are alike
            alike = (type(decoder), json.dumps(decoder.config.to_dict(), sort_keys=True, default=str), *signatures)
            if alike not in _OF_CONFIG:
                _OF_CONFIG[alike] = _prove_all(decoder, layer_list)
            proven |= _OF_CONFIG[alike]
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


def exclusive(decoder: nn.Module) -> threading.RLock:
    """The lock under which a thread changes a decoder, or watches it, for a while; others that would do so wait."""
    return _LOCKS.setdefault(decoder, threading.RLock())


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
    return module.stands_for if is_gone(module) else type(module)


def _prove_all(decoder: nn.Module, layers: nn.ModuleList) -> dict[Signature, Split | None]:
    """The split of every signature, by one run of a copy of the decoder whose layers look at how they are called."""
    model_type = getattr(decoder.config, "model_type", type(decoder).__name__)
    signatures = [None if is_gone(layer) else _signature(layer) for layer in layers]
    whole = {k: layer for k, layer in enumerate(layers) if signatures[k] is not None and not has_gone(layer)}
    missing = {signature for signature in signatures if signature is not None} - {signatures[k] for k in whole}
    if missing:  # of these every layer has something dropped
        undropped = find_layers(undropped_decoder(decoder))[1]
        whole |= {k: undropped[k] for k, signature in enumerate(signatures) if signature in missing}
    shown: dict[Signature, list[int]] = {}  # the layers to prove it by: the first and the last
    for k in sorted(whole):
        first = shown.setdefault(signatures[k], [k])[0]
        shown[signatures[k]] = [first, k]
    # in float32, also while transformers loads a model of another type
    float32 = local_torch_dtype(torch.float32)
    with torch.device("cpu"), torch.no_grad(), torch.random.fork_rng(devices=[]), float32:
        proven: dict[Signature, Split] = {}
        probes = nn.ModuleList(
            layer if signatures[k] is None else _Probe(k, whole.get(k, layer), signatures[k], shown, proven)
            for k, layer in enumerate(layers)
        )
        shell = random_copy(decoder, {layers: probes})
        vocabulary = getattr(decoder.config.get_text_config(decoder=True), "vocab_size", N_TOKENS)
        try:
            shell(input_ids=torch.arange(N_TOKENS)[None] % vocabulary, use_cache=False)
            often = [probe.index for probe in probes if isinstance(probe, _Probe) and probe.calls > 1]
            if often:
                raise NotAdditive(f"it runs layer {often[0]} more than once (recurrent depth)")
            if not proven:
                raise NotAdditive("no layer runs on text alone")
        except (RuntimeError, TypeError, AttributeError, ValueError, IndexError, KeyError) as error:
            why = str(error)
            if not isinstance(error, NotAdditive):
                why = f"its decoder does not run on a line of tokens alone ({type(error).__name__}: {error})"
            raise ValueError(f"no residual split of this {model_type!r} model can be proven: {why}") from error
    return proven | dict.fromkeys({signature for signature in signatures if signature} - proven.keys())


def undropped_decoder(decoder: nn.Module) -> nn.Module:
    """The decoder that the config describes, before anything is dropped; its weights are on "meta"."""
    with weights_on_meta(), torch.device("cpu"):
        return type(decoder)(copy.deepcopy(decoder.config))


@contextmanager
def weights_on_meta() -> Iterator[None]:
    """Modules that are made meanwhile get parameters without memory, which take no gradients, and buffers as ever."""
    register = nn.Module.register_parameter

    def on_meta(self, name, parameter):
        register(self, name, None if parameter is None else nn.Parameter(parameter.to("meta"), False))

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


class _Probe(StandIn):
    """In a copy of the decoder, proves a layer's kind, if the layer is the first or last of it; passes x on."""

    def __init__(
        self,
        index: int,
        layer: nn.Module,
        signature: Signature,
        shown: dict[Signature, list[int]],
        proven: dict[Signature, Split],
    ):
        super().__init__(layer)
        self.index = index
        self.signature = signature
        self.shown = shown
        self.proven = proven
        self.calls = 0

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
        return as_output(hidden, n_outputs)

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
