"""The order of the training samples: batches of one modality and of similar length, a function of (seed, epoch) alone.

As in LLaVA: samples with and without images are shuffled apart, cut into megabatches (one step of all processes), sorted
by length inside, split so that the processes' loads are similar, and the megabatches are shuffled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle, islice

import numpy as np
from torch.utils.data import DistributedSampler, Sampler

from llava_sp.common.files import counted


class ModalityLengthSampler(Sampler[int]):
    """Indices in training order, for all processes together: batch k of `batch_size` goes to process k modulo `world_size`
    (what accelerate does with any sampler).

    The order depends only on the arguments and `set_epoch`; a resumed run skips the samples it has used.

    Args:
        lengths: of each sample, negative if it has no image (`ConversationDataset.modality_lengths`).
        batch_size: samples per process and forward pass.
        world_size: batches that belong to one optimizer step: processes times accumulation steps.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, world_size: int = 1, seed: int = 0):
        if batch_size < 1 or world_size < 1:
            raise ValueError(f"batch_size is {batch_size} and world_size {world_size}; both must be at least 1")
        self.lengths = np.asarray(lengths, dtype=np.int64)
        zeros = int((self.lengths == 0).sum())
        if not len(self.lengths) or zeros:
            raise ValueError(
                f"{counted(len(self.lengths), 'length')}, {zeros} of them zero; at least one is needed, and none zero"
            )
        self.batch_size, self.world_size = batch_size, world_size
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self.seed, self.epoch])
        step = self.batch_size * self.world_size
        whole, rest = [], []
        for modality in (np.flatnonzero(self.lengths > 0), np.flatnonzero(self.lengths < 0)):
            random.shuffle(modality)
            full = len(modality) - len(modality) % step
            whole += [modality[start : start + step] for start in range(0, full, step)]
            rest.append(modality[full:])
        order = [whole[place] for place in random.permutation(len(whole))]
        left = np.concatenate(rest)  # less than two steps, modalities mixed, last
        order += [left[start : start + step] for start in range(0, len(left), step)]
        for megabatch in order:
            yield from self._balanced(megabatch)

    def _balanced(self, megabatch: np.ndarray) -> list[int]:
        """Longest first, each sample to the batch with the least so far: all batches full, their sums similar."""
        sizes = np.abs(self.lengths[megabatch])
        by_length = megabatch[np.argsort(-sizes, kind="stable")]
        if len(megabatch) < self.batch_size * self.world_size:
            return by_length.tolist()
        batches: list[list[int]] = [[] for _ in range(self.world_size)]
        loads = [0] * self.world_size
        for index in by_length.tolist():
            open_batches = [place for place in range(self.world_size) if len(batches[place]) < self.batch_size]
            lightest = min(open_batches, key=loads.__getitem__)
            batches[lightest].append(index)
            loads[lightest] += abs(int(self.lengths[index]))
        return [index for batch in batches for index in batch]


class WholeSteps(Sampler[int]):
    """The order of another sampler, continued from its beginning to a whole number of steps.

    Without it the last step of an epoch depends on the number of processes: accelerate fills up what each one needs.
    """

    def __init__(self, order: ModalityLengthSampler | DistributedSampler, samples_per_step: int):
        self.order, self.samples_per_step = order, samples_per_step

    @property
    def epoch(self) -> int:
        return self.order.epoch

    def set_epoch(self, epoch: int) -> None:
        self.order.set_epoch(epoch)

    def __len__(self) -> int:
        return -(-len(self.order) // self.samples_per_step) * self.samples_per_step

    def __iter__(self) -> Iterator[int]:
        indices = list(self.order)
        return islice(cycle(indices), len(self))
