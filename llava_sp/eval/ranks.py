"""Which of how many processes this one is, under `torchrun`, `accelerate launch`, `deepspeed`, or none of them.

Evaluation needs the others only to agree that the run may start and that every share is done, so gloo over CPU serves
every machine. torch is imported only if there is more than one process.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")

_LONGEST_WAIT = timedelta(days=7)  # for the slowest process at the end of a long benchmark


class Elsewhere(ValueError):
    """Another process has met a problem, and says it."""


@dataclass(frozen=True)
class Ranks:
    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> Ranks:
        """Reads RANK, WORLD_SIZE, LOCAL_RANK; joins the process group if there are several."""
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return cls()
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if not 0 <= rank < world:
            raise ValueError(
                f"RANK is {rank} and WORLD_SIZE {world} in the environment; RANK must be from 0 to {world - 1}"
            )
        if world > 1:
            import torch.distributed as dist

            dist.init_process_group("gloo", timeout=_LONGEST_WAIT)
        return cls(rank, world, int(os.environ.get("LOCAL_RANK", rank)))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def agree(self, problem: str | None) -> None:
        """Returns when every process has come here; raises on all of them if any brings a problem.

        Raises:
            ValueError: on the process whose problem it is.
            Elsewhere: on the others.
        """
        problems = [problem]
        if self.world > 1:
            import torch.distributed as dist

            problems = [None] * self.world
            dist.all_gather_object(problems, problem)
        if problem is not None:
            raise ValueError(problem)
        if any(problems):
            raise Elsewhere(next(p for p in problems if p is not None))

    def from_first(self, value: T) -> T:
        """The value that the first process has, on every process."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def close(self) -> None:
        if self.world > 1:
            import torch.distributed as dist

            if dist.is_initialized():
                dist.destroy_process_group()
