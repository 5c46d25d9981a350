"""Rank and world size of this process under `torchrun`, `accelerate launch`, `deepspeed`, or without a launcher.

Communication here uses gloo on the CPU, which every machine has. torch is imported only if there is more
than one process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")

_LONGEST_WAIT = timedelta(days=7)  # for the slowest process at the end of a long benchmark
# Errors that the user can correct: wrong values, too little memory, a missing package.
USER_ERRORS = (ValueError, OSError, MemoryError, ImportError)


class ReportedElsewhere(ValueError):
    """Another process failed and reports the error."""


class FailedHere(ValueError):
    """An error that may occur in this process alone, which therefore reports it itself."""


@dataclass(frozen=True)
class Processes:
    """This process's rank among those of a command."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> Processes:
        """Reads RANK, WORLD_SIZE and LOCAL_RANK; nothing is started. Raises `ValueError` if they contradict each other."""
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return cls()
        rank, world_size = launcher_number("RANK"), launcher_number("WORLD_SIZE")
        if not 0 <= rank < world_size:
            raise ValueError(f"RANK is {rank} in the environment; it must be below WORLD_SIZE ({world_size})")
        return cls(rank, world_size, launcher_number("LOCAL_RANK", rank))

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        """True in one process of each machine."""
        return self.local_rank == 0

    @property
    def name(self) -> str:
        """The prefix of this process's messages: empty for the main process, `process 3: ` for that of rank 3."""
        return "" if self.is_main else f"process {self.rank}: "

    @contextmanager
    def group(self) -> Iterator[Processes]:
        """The gloo process group for the duration of the block, if there is more than one process."""
        if self.world_size > 1:
            import torch.distributed as dist

            dist.init_process_group("gloo", timeout=_LONGEST_WAIT)
        try:
            yield self
        finally:
            leave_group()

    @contextmanager
    def together(self) -> Iterator[None]:
        """All processes complete the block, or all raise: an error on one rank is raised on every rank.

        Raises:
            ValueError, OSError, MemoryError: on the rank that failed.
            ReportedElsewhere: on the others.
        """
        problem: Exception | None = None
        try:
            yield
        except USER_ERRORS as error:
            problem = error
        if self.world_size > 1:
            problems = self.gather(None if problem is None else str(problem))
            if problem is None and any(one is not None for one in problems):
                raise ReportedElsewhere(next(one for one in problems if one is not None))
        if problem is not None:
            raise problem

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank, on every process."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: T) -> T:
        """The main process's value, on every process."""
        if self.world_size == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


def launcher_number(variable: str, default: int = 1) -> int:
    """A number set by a launcher. Raises `ValueError` naming the variable."""
    text = os.environ.get(variable, str(default))
    if not text.isdecimal() or len(text) > 9:
        raise ValueError(f"{variable} is {text!r} in the environment; it must be a whole number, 0 or more")
    return int(text)


def leave_group() -> None:
    """End the process group, if there is one; gloo may abort at exit otherwise."""
    if "torch" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
