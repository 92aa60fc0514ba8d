"""Score with several processes, started by torchrun or accelerate launch: samples are split, sums come together."""

from collections.abc import Callable

import torch
from accelerate import PartialState

from .calibration import Calibration

Sums = tuple[torch.Tensor, torch.Tensor | None]


def over_processes(part: Callable[[Calibration], Sums], calibration, n_layers: int) -> Sums:
    """`scoring.sample_sums` of all samples, in every process, where `part` gives those of the samples it is given.

    Every process of torchrun or accelerate launch must call it; any number of them, with any number of samples. The
    process group is made if there is none (NCCL between GPUs, gloo between CPUs). Without a launcher it is one process.
    """
    state = PartialState()
    ids, mask = calibration.input_ids, calibration.attention_mask
    sums, gaps = torch.zeros(n_layers, 6, len(ids), dtype=torch.float64), None
    with state.split_between_processes(list(range(len(ids)))) as mine:
        if mine:
            share = Calibration(ids[mine], f"part of {calibration.source}", None if mask is None else mask[mine])
            sums[:, :, mine], gaps = part(share)
    if state.num_processes == 1:
        return sums, gaps
    sums = _added(sums, state.device)
    wanted = _added(torch.tensor(0.0 if gaps is None else 1.0), state.device)  # a process without samples cannot know
    if wanted > 0:
        gaps = _added(torch.zeros(n_layers, n_layers, dtype=torch.float64) if gaps is None else gaps, state.device)
    return sums, gaps


def _added(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    values = values.to(device)  # NCCL adds what is on GPUs
    torch.distributed.all_reduce(values)
    return values.cpu()
