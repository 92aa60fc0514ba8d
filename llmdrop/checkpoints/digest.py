"""A digest of a model's config and weights: what a stored measurement is keyed by."""

import hashlib
import json
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.nn.functional import pad

from ..anatomy import unwrapped
from .destination import MARK

ROW = 2**16  # words of 32 bits that are summed together
VOLATILE = {"_name_or_path", "transformers_version", "architectures", "torch_dtype", "dtype", "use_cache", MARK}


def weights_digest(model: nn.Module) -> str:
    """Hex digest of the config and of every bit of every parameter, the same on any device.

    Instead of copying all bytes to the host, each row of 65,536 words is multiplied by two rows of random odd numbers
    and summed, modulo 2^64: a change of one word always shows, others go unseen with a probability of 2^-64. Takes a
    quarter of a second for 135M parameters. Never cached, since nothing tells that a weight was written to.
    """
    model = unwrapped(model)
    config = {key: value for key, value in model.config.to_dict().items() if key not in VOLATILE}
    state = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    odd = torch.from_numpy(np.frombuffer(hashlib.shake_256(b"llmdrop").digest(2 * ROW * 8), "<i8").copy()) | 1
    for name, parameter in sorted(model.state_dict(keep_vars=True).items()):
        state.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        data = parameter.detach().reshape(-1).contiguous().view(torch.uint8)
        if len(data) % 4 or data.storage_offset() % 4:
            data = torch.cat([data, data.new_zeros(-len(data) % 4)])
        for sums in _row_sums(data.view(torch.int32), odd.view(2, ROW)):
            state.update(sums.tobytes())
    return state.hexdigest()


def _row_sums(words: torch.Tensor, factors: torch.Tensor) -> Iterator[np.ndarray]:
    """For each row of ROW words its products with both rows of factors, summed modulo 2^64; int64, two for each row."""
    if words.device.type == "cpu":
        host_words = words.numpy()
        first, second = factors.numpy()
        for start in range(0, len(host_words), ROW):
            row = host_words[start : start + ROW].astype(np.int64)
            # NumPy's dot takes half as long as PyTorch's products and sums of int64
            yield np.array([row @ first[: len(row)], row @ second[: len(row)]])
        return
    factors = factors.to(words.device)
    for piece in words.split(256 * ROW):
        rows = pad(piece.long(), (0, -len(piece) % ROW)).view(-1, ROW)
        yield torch.stack([(rows * factors[0]).sum(1), (rows * factors[1]).sum(1)], 1).cpu().numpy()
