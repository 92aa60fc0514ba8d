"""Where attention, MLP, norms and the residual stream sit in a decoder layer of a transformers model.

Every supported layer is two sublayers on a residual stream of width C,

    sequential   m = x + attn(x)        y = m + mlp(m)              x, m, y: [B, T, C]
    parallel     y = x + attn(x) + mlp(x)                           (GPT-NeoX with use_parallel_residual)

where attn() and mlp() stand for whole sublayers, their norms included: the norm before (Llama), after (OLMo-2)
or on both sides (Gemma-2, Gemma-3). A `Layout` names the modules of each sublayer in the order they run; the
first one reads the residual stream and the last one returns what is added to it. That is all the rest of
llmdrop knows about an architecture.
"""

from dataclasses import dataclass
from functools import cache

from torch import nn

from .plan import AnyPlan, DropPlan, as_plan


@dataclass(frozen=True)
class Layout:
    attn: tuple[str, ...]  # modules of the attention sublayer, first reads x, last returns what is added
    mlp: tuple[str, ...]
    attn_core: str = "self_attn"  # the module with the KV cache
    mlp_core: str = "mlp"  # the module whose output is zero when the MLP is dropped
    final: str = "norm"  # the decoder's norm after its last layer


_PRE_NORM = Layout(("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp"))
_SANDWICH = Layout(
    ("input_layernorm", "self_attn", "post_attention_layernorm"),
    ("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"),
)
LAYOUTS = {
    "llama": _PRE_NORM,
    "mistral": _PRE_NORM,
    "qwen2": _PRE_NORM,
    "qwen3": _PRE_NORM,
    "phi3": _PRE_NORM,
    "qwen2_vl_text": _PRE_NORM,
    "qwen2_5_vl_text": _PRE_NORM,
    "qwen3_vl_text": _PRE_NORM,
    "gemma2": _SANDWICH,
    "gemma3_text": _SANDWICH,
    "olmo2": Layout(("self_attn", "post_attention_layernorm"), ("mlp", "post_feedforward_layernorm")),
    "gpt_neox": Layout(
        ("input_layernorm", "attention"),
        ("post_attention_layernorm", "mlp"),
        attn_core="attention",
        final="final_layer_norm",
    ),
    "gpt2": Layout(("ln_1", "attn"), ("ln_2", "mlp"), attn_core="attn", final="ln_f"),
    "opt": Layout(
        ("self_attn_layer_norm", "self_attn"),
        ("final_layer_norm", "fc1", "activation_fn", "fc2"),
        mlp_core="fc2",
        final="final_layer_norm",
    ),
}
# attribute of a decoder that was dropped from: its depth before ("n_layers"), DropPlan.key, and biases that were added
RECORD = "_llmdrop"
# what architectures call a sublayer's last matrix
OUTPUT_MATRICES = ("o_proj", "out_proj", "down_proj", "dense", "dense_4h_to_h", "c_proj", "fc2")


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model. Layers are numbered as in the undropped model, whatever is dropped already."""

    decoder: nn.Module  # owns the layer list and is called with input_ids; its output is the final hidden state
    layers_name: str  # the attribute of `decoder` that holds the layer list
    layers: tuple[nn.Module | None, ...]  # None where the whole block is gone
    layout: Layout
    parallel: bool  # attention and MLP read the same x
    plan: DropPlan  # what is dropped already

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    def live(self, kind: str) -> list[int]:
        """Indices of the layers whose "attn" or "mlp" sublayer is still there."""
        gone = set(getattr(self.plan, kind))
        return [i for i in range(self.n_layers) if i not in gone]

    def whole_plan(self, plan: AnyPlan) -> DropPlan:
        """`plan` and what is dropped already.

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
    """Find the parts of a transformers causal language model (or its bare decoder), also inside of a multimodal one.

    Raises ValueError for an architecture, or a variant of a known one, whose residual stream is not known, and what
    `unwrapped` raises.
    """
    model = unwrapped(model)
    text = model.config.get_text_config() if hasattr(model, "config") else None
    model_type = getattr(text, "model_type", type(model).__name__)
    if model_type not in LAYOUTS:
        raise ValueError(
            f"llmdrop does not know where attention and MLP sit in a {model_type!r} model; "
            f"known: {', '.join(sorted(LAYOUTS))}. A new entry in llmdrop.anatomy.LAYOUTS teaches it."
        )
    layout = LAYOUTS[model_type]
    decoder = model.base_model
    for name in ("language_model", "decoder"):  # of multimodal models; OPT nests one level deeper
        decoder = getattr(decoder, name, decoder)
    layers_name = "h" if model_type == "gpt2" else "layers"
    present = getattr(decoder, layers_name)
    for layer in present:
        _check(layer, layout, model_type)
    record = getattr(decoder, RECORD, None) or {"n_layers": len(present)}
    plan = DropPlan(record.get("attn", ()), record.get("mlp", ()), record["n_layers"])
    remaining = iter(present)
    layers = tuple(None if i in plan.blocks else next(remaining) for i in range(record["n_layers"]))
    parallel = bool(getattr(model.config, "use_parallel_residual", False))
    return Anatomy(decoder, layers_name, layers, layout, parallel, plan)


def _check(layer: nn.Module, layout: Layout, model_type: str) -> None:
    """ValueError unless the layer is the stock one of its architecture."""
    named = set(layout.attn + layout.mlp)
    missing = [name for name in named if not hasattr(layer, name)]
    unknown = [name for name, child in layer.named_children() if name not in named and list(child.parameters())]
    if missing or unknown:
        what = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(unknown)} besides"
        raise ValueError(
            f"this {model_type!r} layer ({type(layer).__name__}) is not the stock one: it {what}; expected "
            f"{', '.join(layout.attn)} and {', '.join(layout.mlp)}. Merge adapters and remove wrappers first."
        )
    if getattr(layer, "do_layer_norm_before", True) is False:
        raise ValueError(
            "this OPT variant normalizes after the residual sum (do_layer_norm_before=False, as opt-350m): it has no "
            "residual stream, so S = 1 - cos(x, x + f(norm(x))) is not defined. Use another OPT size."
        )


def output_matrix(parts: Anatomy, i: int, kind: str) -> nn.Module:
    """The matrix that ends layer i's "attn" or "mlp" sublayer. Raises what `output_name` raises."""
    return parts.layers[i].get_submodule(output_name(parts, i, kind))


def output_name(parts: Anatomy, i: int, kind: str) -> str:
    """The name in layer i of the matrix that ends its "attn" or "mlp" sublayer: "mlp.down_proj".

    Raises ValueError where something follows that matrix, or attention and MLP run in parallel.
    """
    layout = parts.layout
    core = layout.attn_core if kind == "attn" else layout.mlp_core
    last = getattr(layout, kind)[-1]
    if core in OUTPUT_MATRICES:
        name = core
    else:
        module = getattr(parts.layers[i], core)
        name = next((f"{core}.{matrix}" for matrix in OUTPUT_MATRICES if hasattr(module, matrix)), None)
    if name is None or core != last or parts.parallel:
        why = "attention and MLP run in parallel" if parts.parallel else f"{last} follows its last matrix"
        raise ValueError(
            f"cannot reconstruct at layer {i}'s {kind} sublayer: {why}; that needs sublayers one after the other, each "
            "ending in a matrix (Llama, Mistral, Qwen, Phi-3, GPT-2, OPT). Drop without reconstruction"
        )
    return name
