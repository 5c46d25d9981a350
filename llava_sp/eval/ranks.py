"""Which of how many processes this one is, under `torchrun`, `accelerate launch`, `deepspeed`, or none of them.

Evaluation needs the others only to agree that the run may start and to wait for the last one, so gloo over CPU serves
every machine. torch is imported only if there is more than one process.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

_LONGEST_WAIT = timedelta(days=7)  # for the slowest process at the end of a long benchmark


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
        if world > 1:
            import torch.distributed as dist

            dist.init_process_group("gloo", timeout=_LONGEST_WAIT)
        return cls(rank, world, int(os.environ.get("LOCAL_RANK", rank)))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def agree(self, problem: str | None) -> str | None:
        """What rank 0 says (None if all is well) is what every rank gets."""
        if self.world == 1:
            return problem
        import torch.distributed as dist

        box = [problem]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self) -> None:
        """Returns when every process has come here."""
        if self.world > 1:
            import torch.distributed as dist

            dist.barrier()

    def close(self) -> None:
        if self.world > 1:
            import torch.distributed as dist

            if dist.is_initialized():
                dist.destroy_process_group()
