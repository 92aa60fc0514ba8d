"""Write a Llama checkpoint of real geometry with random weights, one shard in memory at a time.

    .venv/bin/python benchmarks/synthetic.py build/synthetic [--layers 28]

28 layers of Llama-3.2-3B's shapes in bfloat16: 6.4 GB. Without a tokenizer: nothing is to be said with it.
"""

import argparse
import json
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

SHARD = 10**9  # bytes


def config(layers: int = 28):
    """Llama-3.2-3B's shapes."""
    return AutoConfig.for_model(
        "llama",
        num_hidden_layers=layers,
        hidden_size=3072,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=8192,
        vocab_size=128256,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )


def write_checkpoint(folder: Path, layers: int = 28, dtype: torch.dtype = torch.bfloat16) -> int:
    """Returns the bytes of the weights."""
    folder.mkdir(parents=True)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config(layers), dtype=dtype)
    model.config.save_pretrained(folder)
    shapes = {name: p.shape for name, p in model.state_dict().items() if name != "lm_head.weight"}
    shards = [[]]
    size = 0
    for name, shape in shapes.items():
        if size + shape.numel() * dtype.itemsize > SHARD and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += shape.numel() * dtype.itemsize
    torch.manual_seed(0)
    noise = torch.randn(2**24 + 1).mul_(0.02).to(dtype)  # repeated: random enough, and written in seconds
    weight_map = {}
    total = 0
    for k, names in enumerate(shards, start=1):
        file = f"model-{k:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name in names:
            shape = shapes[name]
            n = shape.numel()
            is_norm = len(shape) == 1
            tensors[name] = torch.ones(n, dtype=dtype) if is_norm else noise.repeat(n // len(noise) + 1)[:n].view(shape)
            weight_map[name] = file
            total += n * dtype.itemsize
        save_file({name: t.contiguous() for name, t in tensors.items()}, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=28)
    args = parser.parse_args()
    print(f"{write_checkpoint(args.folder, args.layers) / 1e9:.2f} GB in {args.folder}")
