"""The paper's models by their shapes alone, and the bytes of a KV cache by formula.

Speed, KV cache and memory depend on shapes, not on weights: a model of random weights has the real ones.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from .anatomy import anatomy
from .models import GEOMETRIES
from .plan import DropPlan


def kv_cache_bytes(model, batch_size: int, seq_len: int, plan: DropPlan = DropPlan(), dtype: str = "float16") -> int:
    """KV-cache bytes by formula: 2 x remaining attention layers x KV heads x head width x bytes x tokens x sequences.

    model: a model (its own dtype and drops count; `plan` adds to them) or the name of one of the paper's geometries, in
    `dtype`. Layers with sliding-window attention hold at most their window (less the current token).
    """
    config = geometry_config(model) if isinstance(model, str) else model.config
    width = torch.finfo(getattr(torch, dtype) if isinstance(model, str) else model.dtype).bits // 8
    if isinstance(model, str):
        live, types = [i for i in range(config.num_hidden_layers) if i not in plan.attn], None
    else:
        parts = anatomy(model)
        gone = set(plan.attn) | set(parts.plan.attn)
        live = [i for i in range(parts.n_layers) if i not in gone]
        kept = [i for i in range(parts.n_layers) if parts.layers[i] is not None]
        types = getattr(config, "layer_types", None) and dict(zip(kept, config.layer_types, strict=True))
    window = getattr(config, "sliding_window", None)
    tokens = 0
    for i in live:
        slides = window is not None and (types is None or types[i] == "sliding_attention")
        tokens += min(seq_len, window - 1) if slides else seq_len
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * heads * head_dim * width * tokens * batch_size


def geometry_config(name: str):
    """transformers config with the shapes of one of the paper's models. Raises ValueError for an unknown name."""
    if name not in GEOMETRIES:
        raise ValueError(f"unknown geometry {name!r}; known: {', '.join(GEOMETRIES)}")
    layers, width, heads, kv_heads, mlp_width, vocabulary = GEOMETRIES[name]
    return AutoConfig.for_model(
        "llama",  # Mistral-7B has Llama's shapes; its window of 4,096 is beyond the paper's contexts
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=mlp_width,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )


def geometry_model(name: str, device: str = "meta", dtype: str = "float16", bits: int = 16):
    """One of the paper's models by shape. On "meta" it needs no memory: shapes, caches and bytes are real.

    On another device its weights are random, made there within seconds: speed and memory are real, quality is nobody's.
    bits=4: attention and MLP matrices in 4 bits (`Int4Linear`), so that 70B fits one 80 GB GPU; needs dtype="bfloat16".
    Raises ValueError for an unknown name, other bits, or 4 bits in another dtype.
    """
    if bits not in (4, 16) or (bits == 4 and dtype != "bfloat16"):
        raise ValueError(f"{bits=} with {dtype=}: bits is 16, or 4 with dtype='bfloat16' (its kernel has no other)")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(geometry_config(name), dtype=getattr(torch, dtype)).eval()
    kind = torch.device(device).type
    for layer in model.model.layers if bits == 4 else ():
        for owner in (layer.self_attn, layer.mlp):
            for child, linear in owner.named_children():
                if isinstance(linear, nn.Linear):
                    setattr(owner, child, Int4Linear(linear.in_features, linear.out_features, kind))
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

    Groups of 128 weights share a scale and a zero point in bfloat16: 4.25 bits a weight. Up to 64 rows go through the
    kernel; more rows (a prefill) go through a 16-bit copy made for the moment, as in other 4-bit engines, since the
    kernel is made for few. There the codes are taken in storage order, not in the kernel's: with random weights that
    is another random matrix, at the same cost.
    """

    bits = 4 + 32 / 128
    rows = 64

    def __init__(self, in_features: int, out_features: int, device_type: str):
        super().__init__()
        n, k, group = out_features, in_features, 128
        if k % group or n % 32:
            raise ValueError(f"4-bit weights come in groups of {group} inputs and 32 outputs; got {k} x {n}")
        # what the kernel reads: CUDA tiles of 8 outputs x 128 inputs, or bytes of two weights on the CPU
        cuda = device_type != "cpu"
        shape, dtype = ((n // 8, k // 128, 32, 4), torch.int32) if cuda else ((n, k // 2), torch.uint8)
        self.codes = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
        scales = torch.empty(k // group, n, 2, dtype=torch.bfloat16, device="meta")  # [..., 0] scale, [..., 1] zero
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.in_features, self.out_features = k, n

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type == "meta":
            return x.new_empty(*x.shape[:-1], self.out_features)
        flat = x.reshape(-1, self.in_features)
        if len(flat) > self.rows:
            return F.linear(x, self.dequantised())
        ops = torch.ops.aten
        kernel = ops._weight_int4pack_mm if x.device.type == "cuda" else ops._weight_int4pack_mm_for_cpu
        return kernel(flat, self.codes, 128, self.scales).view(*x.shape[:-1], self.out_features)

    def dequantised(self) -> torch.Tensor:
        """[out, in] in bfloat16: (code - 8) x scale + zero."""
        pairs = self.codes.view(torch.uint8).reshape(self.out_features, -1, 64)
        codes = torch.stack((pairs & 15, pairs >> 4), -1).flatten(2).to(self.scales.dtype)  # [out, groups, 128]
        scale, zero = self.scales.permute(2, 1, 0).unsqueeze(-1)  # each [out, groups, 1]
        return codes.sub_(8).mul_(scale).add_(zero).view(self.out_features, self.in_features)
