"""Packs: the samples of an optimizer step in a few rows, without padding between them.

A step has the samples that it would have without packing: the next `samples_per_step` of a shuffle by (seed, epoch) alone,
for any number of processes and any length of packs. They are distributed over `packs_per_step` packs of similar cost, none
longer than `pack_length`; that number is a multiple of the processes, the same in all steps, and the least that suffices.

The cost of a sample, in passes of one token through Vicuna-7B, forward and backward through frozen weights (4 FLOPs per
weight, 6.7e9 weights):

    tokens                                              1 each
    attention: 2 products of width 4096, half of the    2e-5 each pair of tokens:
    square, in 32 layers, forward and twice backward        12 x 4096 x 32 / 2 / (4 x 6.7e9) = 2.9e-5, less what is fused
    an image: CLIP-L, 577 tokens x 0.3e9 weights        16, forward only (2 FLOPs per weight), and the projector, which learns

Balance hardly depends on them: tokens dominate.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from llava_sp.common.files import counted
from llava_sp.data.dataset import ConversationDataset

PER_TOKEN, PER_PAIR, PER_IMAGE = 1.0, 2e-5, 16.0
PLANNED = 20_000_000  # samples, of all epochs, that are looked at for the number of packs; some seconds
LOOKED_AT = 256  # steps of the first epoch, evenly spread, from which `PackSampler.summary` is made

Pack = tuple[int, ...]


class PackSampler(Sampler[Pack]):
    """The packs of an epoch, as indices of samples: pack k is for process k modulo `processes`, as accelerate gives them out.

    Packs of a step follow each other by cost, so that those computed at the same time are alike. The last step of an
    epoch may have fewer samples; where they are fewer than packs, some packs are empty.

    Args:
        tokens: of each sample; samples of 0 tokens are left out.
        images: of each sample.
        samples_per_step: over all processes.
        pack_length: most tokens in a pack.
        processes: that share a step.
        steps: of the whole run; a number, or None for one epoch.

    Raises:
        ValueError: no samples; a sample longer than `pack_length`.
    """

    def __init__(
        self,
        tokens: Sequence[int] | np.ndarray,
        images: Sequence[int] | np.ndarray,
        samples_per_step: int,
        pack_length: int,
        processes: int = 1,
        seed: int = 0,
        steps: int | None = None,
    ):
        self.tokens = np.asarray(tokens, dtype=np.int64)
        self.samples = np.flatnonzero(self.tokens)
        if not len(self.samples):
            raise ValueError(f"{counted(len(self.tokens), 'sample')}, of which none has tokens")
        longest = int(self.tokens.argmax())
        if self.tokens[longest] > pack_length:
            raise ValueError(f"sample {longest} has {self.tokens[longest]} tokens; packs have at most {pack_length}")
        costs = PER_TOKEN * self.tokens + PER_PAIR * self.tokens.astype(float) ** 2
        self.costs = costs + PER_IMAGE * np.asarray(images, dtype=float)
        self.samples_per_step, self.pack_length, self.processes = samples_per_step, pack_length, processes
        self.seed, self.epoch = seed, 0
        self.steps_per_epoch = -(-len(self.samples) // samples_per_step)
        self.packs_per_step = self._least_packs(self.steps_per_epoch if steps is None else steps)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps_per_epoch * self.packs_per_step

    def __iter__(self) -> Iterator[Pack]:
        for step in self.steps(self.epoch):
            yield from self.packs(step)

    def steps(self, epoch: int) -> list[np.ndarray]:
        """The samples of each step of an epoch."""
        order = self.samples[np.random.default_rng([self.seed, epoch]).permutation(len(self.samples))]
        return np.split(order, range(self.samples_per_step, len(order), self.samples_per_step))

    def packs(self, step: np.ndarray) -> list[Pack]:
        """The packs of a step, the most expensive first."""
        packs = self._distribute(step, self.packs_per_step)
        assert packs is not None, "packs_per_step was chosen so"
        return sorted(map(tuple, packs), key=lambda pack: -self.cost(pack))

    def largest(self) -> Pack:
        """The most expensive of the packs that `summary` looks at."""
        return max((self.packs(step)[0] for step in self._some_steps()), key=self.cost)

    def cost(self, pack: Pack) -> float:
        return float(self.costs[list(pack)].sum())

    def _least_packs(self, steps: int) -> int:
        """The least number of packs, a multiple of the processes, into which every step of the run can be distributed.

        Of a run that is too long to look at, a number that suffices for any step.
        """
        if steps * self.samples_per_step > PLANNED:
            longest = np.sort(self.tokens)[-self.samples_per_step :]
            room = self.pack_length - int(longest[-1])  # the least loaded pack has it, if the mean is no more than this
            packs = min(len(longest), -(-int(longest.sum()) // room)) if room else len(longest)
            return -(-packs // self.processes) * self.processes
        packs = self.processes
        for epoch in range(-(-steps // self.steps_per_epoch)):
            left = steps - epoch * self.steps_per_epoch
            for step in self.steps(epoch)[:left]:
                tokens = self.tokens[step]
                # If the longest fits on top of the mean, the least loaded pack always has room.
                while tokens.sum() / packs + tokens.max() > self.pack_length and self._distribute(step, packs) is None:
                    packs += self.processes
        return packs

    def _distribute(self, step: np.ndarray, count: int) -> list[list[int]] | None:
        """The most expensive first, each to the cheapest pack with room (longest processing time first); if that leads
        nowhere, each to the fullest with room. None if that does not either."""
        if self.tokens[step].sum() > count * self.pack_length:
            return None
        by_cost = step[np.argsort(-self.costs[step], kind="stable")].tolist()
        return self._fill(by_cost, count, cheapest=True) or self._fill(by_cost, count, cheapest=False)

    def _fill(self, samples: list[int], count: int, cheapest: bool) -> list[list[int]] | None:
        packs: list[list[int]] = [[] for _ in range(count)]
        room = [self.pack_length] * count
        heap = [(0.0, place) for place in range(count)]  # (load, pack), least first
        for sample in samples:
            passed = []
            length = int(self.tokens[sample])
            while heap and room[heap[0][1]] < length:
                passed.append(heapq.heappop(heap))
            if not heap:
                return None
            load, place = heapq.heappop(heap)
            packs[place].append(sample)
            room[place] -= length
            heapq.heappush(heap, (load + (float(self.costs[sample]) if cheapest else -length), place))
            for entry in passed:
                heapq.heappush(heap, entry)
        return packs

    def _some_steps(self) -> list[np.ndarray]:
        steps = self.steps(0)
        chosen = np.unique(np.linspace(0, len(steps) - 1, min(LOOKED_AT, len(steps))).astype(int))
        return [steps[place] for place in chosen]

    def summary(self, multiple: int = 1) -> PackSummary:
        """What the packs of the first epoch are like, when their lengths are padded to a multiple."""
        looked_at = [self.packs(step) for step in self._some_steps()]
        tokens = np.array([[self.tokens[list(pack)].sum() for pack in packs] for packs in looked_at])
        costs = np.array([[self.cost(pack) for pack in packs] for packs in looked_at])
        rows = np.maximum(-(-tokens // multiple) * multiple, multiple)
        slowest = costs.reshape(len(costs), -1, self.processes).max(axis=2)
        return PackSummary(
            tokens=float(tokens.mean()),
            longest=int(tokens.max()),
            padding=1 - float(tokens.sum() / rows.sum()),
            waiting=1 - float(costs.sum() / (slowest.sum() * self.processes)),
        )


@dataclass(frozen=True)
class PackSummary:
    """Tokens of a pack on average and at most; the share of padding; the share of time that processes wait for the slowest."""

    tokens: float
    longest: int
    padding: float
    waiting: float


class Packs(Dataset):
    """`packs[indices]` are the samples of a pack, without the bad ones, which are listed; `Collator` makes them one row.

    In place of a pack whose samples are all bad comes the next good sample, as without packing.
    """

    def __init__(self, dataset: ConversationDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, pack: Pack) -> list[dict[str, torch.Tensor]]:
        found = [self.dataset.sample_or_reason(index)[0] for index in pack]
        good = [sample for sample in found if sample is not None]
        return good if good or not pack else [self.dataset[pack[0]]]

    def origin(self, index: int) -> tuple[str, int]:
        """File and record of a sample."""
        return self.dataset.origin(index)
