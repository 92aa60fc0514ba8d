"""Shapes, which speed, KV cache and memory depend on: of any model, and of the paper's, with random weights."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from ..anatomy import find_anatomy, unwrapped
from ..plan import DropPlan, as_plan


@dataclass(frozen=True)
class Shape:
    """What the bytes and FLOPs of an undropped decoder depend on.

    width: of the hidden state. mlp_width: of a gated MLP (three matrices), None where the MLP is another. vocabulary:
    rows of the head. tied: embedding and head are one matrix. windows: the model's own sliding window of each layer in
    tokens, None where there is none; empty if no layer has one.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int | None
    vocabulary: int
    tied: bool = False
    windows: tuple[int | None, ...] = ()

    @property
    def attn_weights(self) -> int:
        """Weights in the matrices of one attention layer: queries and output, keys and values."""
        return 2 * self.width * self.head_dim * (self.heads + self.kv_heads)

    @property
    def mlp_weights(self) -> int:
        """Weights in the matrices of one MLP. Raises ValueError where it is not gated."""
        if self.mlp_width is None:
            raise ValueError("predict_speed counts gated MLPs of three matrices (as Llama's); this model has others")
        return 3 * self.width * self.mlp_width

    @property
    def head_weights(self) -> int:
        """Weights of the head, and of the embedding."""
        return self.width * self.vocabulary

    @property
    def kv_values(self) -> int:
        """Numbers that one attention layer caches for each token: its keys and values."""
        return 2 * self.kv_heads * self.head_dim

    def cached_tokens(self, plan: DropPlan, n: int | np.ndarray) -> int | np.ndarray:
        """Tokens in the caches of all layers together after n of the text, without what `plan` drops."""
        windows = [window for i, window in enumerate(self.windows) if window and i not in plan.attn]
        unlimited = self.layers - len(plan.attn) - len(windows)
        # the current token is not in the cache yet
        return unlimited * n + sum(np.minimum(n, window - 1) for window in windows)


# Mistral-7B's window of 4,096 tokens is beyond the paper's contexts
GEOMETRIES = {
    "Llama-2-7B": Shape(32, 4096, 32, 32, 128, 11008, 32000),
    "Llama-2-13B": Shape(40, 5120, 40, 40, 128, 13824, 32000),
    "Llama-2-70B": Shape(80, 8192, 64, 8, 128, 28672, 32000),
    "Llama-3-8B": Shape(32, 4096, 32, 8, 128, 14336, 128256),
    "Llama-3-70B": Shape(80, 8192, 64, 8, 128, 28672, 128256),
    "Mistral-7B": Shape(32, 4096, 32, 8, 128, 14336, 32000),
}


def shape_of(model: nn.Module | str) -> Shape:
    """The undropped shape of a model, or of one of the paper's by name (a key of GEOMETRIES).

    Raises ValueError for an unknown name or architecture.
    """
    if isinstance(model, str):
        if model not in GEOMETRIES:
            raise ValueError(f"unknown geometry {model!r}; known: {', '.join(GEOMETRIES)}")
        return GEOMETRIES[model]
    model = unwrapped(model)
    config = model.config
    parts = find_anatomy(model)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * len(parts.layer_list)
    slides = [place is not None and types[place] == "sliding_attention" for place in parts.places]
    windows = tuple(getattr(config, "sliding_window", None) if slide else None for slide in slides)
    return Shape(
        layers=parts.n_layers,
        width=config.hidden_size,
        heads=heads,
        kv_heads=kv_heads or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        mlp_width=config.intermediate_size if kv_heads else None,  # GPT-2, GPT-NeoX and OPT have neither
        vocabulary=config.vocab_size,
        tied=has_tied_head(model),
        windows=windows if any(windows) else (),
    )


def has_tied_head(model: nn.Module) -> bool:
    """Whether the head is the word embedding."""
    model = unwrapped(model)
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def whole_plan(model: nn.Module | str, plan: DropPlan) -> DropPlan:
    """`plan` and what is dropped from the model already. Raises ValueError for a plan made for another depth."""
    if isinstance(model, str):
        n_layers = shape_of(model).layers
        return as_plan(plan, n_layers).for_depth(n_layers)
    return find_anatomy(model).whole_plan(plan)


def kv_cache_bytes(
    model: nn.Module | str, batch_size: int, seq_len: int, plan: DropPlan = DropPlan(), dtype: str = "float16"
) -> int:
    """KV-cache bytes by formula: 2 x remaining attention layers x KV heads x head width x bytes x tokens x sequences.

    model: a model (its own dtype, windows and drops count; `plan` adds to them) or one of the paper's by name, in
    `dtype`. Raises ValueError for an unknown name or architecture, and for a plan that does not fit.
    """
    shape = shape_of(model)
    kind = getattr(torch, dtype) if isinstance(model, str) else unwrapped(model).dtype
    tokens = shape.cached_tokens(whole_plan(model, plan), seq_len)
    return int(shape.kv_values * kind.itemsize * tokens * batch_size)


def geometry_config(name: str) -> PretrainedConfig:
    """transformers config with the shape of one of the paper's models. Raises ValueError for an unknown name."""
    shape = shape_of(name)
    return AutoConfig.for_model(
        "llama",  # Mistral-7B has Llama's shapes
        num_hidden_layers=shape.layers,
        hidden_size=shape.width,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.mlp_width,
        vocab_size=shape.vocabulary,
        max_position_embeddings=8192,
    )


def geometry_model(name: str, device: str = "meta", dtype: str = "float16", bits: int = 16) -> nn.Module:
    """One of the paper's models by shape. On "meta" it needs no memory: shapes, caches and bytes are real.

    On another device its weights are random, made there within seconds: speed and memory are real, quality is nobody's.
    bits=4: attention and MLP matrices in 4 bits (`Int4Linear`), so that 70B fits one 80 GB GPU; needs dtype="bfloat16".
    Raises ValueError for an unknown name, other bits, or 4 bits in another dtype.
    """
    if bits not in (4, 16) or (bits == 4 and dtype != "bfloat16"):
        raise ValueError(f"{bits=} with {dtype=}: bits is 16, or 4 with dtype='bfloat16' (its kernel has no other)")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(geometry_config(name), dtype=getattr(torch, dtype)).eval()
    if bits == 4:
        for layer in model.model.layers:
            for owner in (layer.self_attn, layer.mlp):
                for part, matrix in owner.named_children():
                    if isinstance(matrix, nn.Linear):
                        packed = Int4Linear(matrix.in_features, matrix.out_features, torch.device(device).type)
                        setattr(owner, part, packed)
    model.requires_grad_(False)
    model.name_or_path = name if bits == 16 else f"{name}-4bit"
    if device == "meta":
        return model
    model.to_empty(device=device)
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            parameter.view(torch.uint8).random_(256)
        elif parameter.dim() == 1:
            parameter.fill_(1)  # norms
        else:
            parameter.normal_(std=0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(device)  # its buffers are no weights
    return model


class Int4Linear(nn.Module):
    """A linear layer of random 4-bit weights for PyTorch's own weight-only kernel, the one behind torchao's int4.

    Groups of 128 weights share a scale and a zero point in bfloat16: 4.25 bits a weight. More rows than the kernel is
    made for (a prefill) go through a 16-bit copy made for the moment, as in other 4-bit engines. There the codes are
    taken in storage order, not in the kernel's: with random weights another random matrix, at the same cost.
    """

    bits = 4 + 32 / 128
    rows = 64  # the most that go through the kernel

    def __init__(self, in_features: int, out_features: int, device_type: str):
        super().__init__()
        if device_type == "cpu":  # the kernel reads bytes of two weights; on CUDA tiles of 8 outputs x 128 inputs
            codes = torch.empty(out_features, in_features // 2, dtype=torch.uint8, device="meta")
        else:
            codes = torch.empty(out_features // 8, in_features // 128, 32, 4, dtype=torch.int32, device="meta")
        self.codes = nn.Parameter(codes, requires_grad=False)
        # [..., 0] scale, [..., 1] zero
        scales = torch.empty(in_features // 128, out_features, 2, dtype=torch.bfloat16, device="meta")
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.in_features = in_features
        self.out_features = out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type == "meta":
            return x.new_empty(*x.shape[:-1], self.out_features)
        flat = x.reshape(-1, self.in_features)
        if len(flat) > self.rows:
            return F.linear(x, self.dequantized())
        ops = torch.ops.aten
        kernel = ops._weight_int4pack_mm if x.device.type == "cuda" else ops._weight_int4pack_mm_for_cpu
        return kernel(flat, self.codes, 128, self.scales).view(*x.shape[:-1], self.out_features)

    def dequantized(self) -> torch.Tensor:
        """[out, in] in bfloat16: (code - 8) x scale + zero."""
        pairs = self.codes.view(torch.uint8).reshape(self.out_features, -1, 64)
        codes = torch.stack((pairs & 15, pairs >> 4), -1).flatten(2).to(self.scales.dtype)  # [out, groups, 128]
        scale, zero = self.scales.permute(2, 1, 0).unsqueeze(-1)  # each [out, groups, 1]
        return codes.sub_(8).mul_(scale).add_(zero).view(self.out_features, self.in_features)
