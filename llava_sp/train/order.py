"""Which samples a step learns from: found again from the data order, so that training records nothing."""

from __future__ import annotations

import math
from itertools import islice
from typing import Any

from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import DataLoader


def batches_of_step(loader: DataLoader, step: int, accumulation: int, processes: int) -> list[list[Any]]:
    """The batches of `step` (from 1), those of process 0 first: each what the dataset is asked for.

    Args:
        loader: Trainer's, prepared by accelerate or not.
        accumulation: micro batches of a step, in each process.
    """
    batches: Any = loader.batch_sampler
    if isinstance(batches, BatchSamplerShard):
        batches = batches.batch_sampler
    shards = [batches]
    if processes > 1:
        shards = [BatchSamplerShard(batches, processes, rank) for rank in range(processes)]
    epoch, place = divmod(step - 1, math.ceil(len(shards[0]) / accumulation))
    sampler = batches.sampler
    before = sampler.epoch
    sampler.set_epoch(epoch)
    try:
        first = place * accumulation
        return [batch for shard in shards for batch in islice(shard, first, first + accumulation)]
    finally:
        sampler.set_epoch(before)


def samples_of(batches: list[list[Any]]) -> list[int]:
    """The samples of batches, one by one; a tuple in a batch is a pack of several."""
    return [sample for batch in batches for item in batch for sample in (item if isinstance(item, tuple) else (item,))]
