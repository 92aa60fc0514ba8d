"""Score with several processes, started by torchrun or accelerate launch: samples are split, sums come together."""

import os
from collections.abc import Callable

import torch
from torch import distributed, nn

from ..anatomy import find_anatomy
from ..calibration import Calibration, TokenIds, read_by
from ..scoring import ImportanceScores, sample_sums, scores_from_sums

Sums = tuple[torch.Tensor, torch.Tensor | None]  # as from `scoring.sample_sums`


def score_distributed(
    model: nn.Module,
    calibration: Calibration | TokenIds,
    batch_size: int = 8,
    with_residual: bool = True,
    gap: bool = False,
    progress: bool = True,
) -> ImportanceScores:
    """`score` with several processes, each with the whole model and its share of the samples.

    Every process of torchrun or accelerate launch must call it with the same arguments; all get the scores of the whole
    calibration set. Without a launcher it is one process. Arguments and errors as of `score`.
    """
    if batch_size < 1:  # before the processes wait for each other
        raise ValueError(f"batch_size={batch_size}; it must be at least 1")
    calibration = read_by(model, calibration)

    def part(share: Calibration) -> Sums:
        return sample_sums(model, share, batch_size, with_residual, gap, progress)

    sums, gaps = over_processes(part, calibration, find_anatomy(model).n_layers, gap)
    return scores_from_sums(sums, gaps, calibration)


def over_processes(
    part: Callable[[Calibration], Sums], calibration: Calibration, n_layers: int, gap: bool = False
) -> Sums:
    """`sample_sums` of all samples, in every process, where `part` gives those of the samples it is given.

    Every process must call it. The process group is made if there is none. Sums are small and on the host, so gloo adds
    them, whatever the models run on.
    """
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    group = None
    if world > 1:
        if not distributed.is_initialized():
            distributed.init_process_group("gloo")
        group = distributed.new_group(backend="gloo")  # another's own group may be NCCL's
    sums = torch.zeros(n_layers, 6, calibration.n_samples, dtype=torch.float64)
    gaps = torch.zeros(n_layers, n_layers, dtype=torch.float64) if gap else None
    rows = list(range(calibration.n_samples))[rank::world]
    if rows:  # there may be more processes than samples
        mask = None if calibration.attention_mask is None else calibration.attention_mask[rows]
        share = Calibration(calibration.input_ids[rows], f"part of {calibration.source}", mask)
        sums[:, :, rows], gaps = part(share)
    if group is not None:
        for values in (sums, gaps):
            if values is not None:
                distributed.all_reduce(values, group=group)
        distributed.destroy_process_group(group)
    return sums, gaps
