"""The processes of a run: their environment, their group, and how they end. Nothing happens on import."""

from __future__ import annotations

import os
import socket

import torch
from transformers import TrainingArguments


def is_launched() -> bool:
    """Whether a launcher (deepspeed, torchrun, accelerate) started this process."""
    return "WORLD_SIZE" in os.environ


def become_a_group_of_one(args: TrainingArguments) -> bool:
    """Describe a plain `python` as a launcher's only process, where that is needed; true if that was done now.

    DeepSpeed needs it, and several visible GPUs: Trainer would split each batch among them (nn.DataParallel), which does not
    know which image belongs to which sample.
    """
    if is_launched() or not (args.deepspeed or args.n_gpu > 1):
        return False
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    return True


def is_first() -> bool:
    """True in the process that writes files and speaks."""
    return int(os.environ.get("RANK", "0")) == 0


def is_first_of_machine() -> bool:
    """True in one process of each machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def process_name() -> str:
    """What its messages begin with: nothing for the first process, `process 3: ` for that of rank 3."""
    return "" if is_first() else f"process {os.environ['RANK']}: "


def start_group(args: TrainingArguments) -> None:
    """Start the process group that DeepSpeed uses, where there is none yet: ZeRO-3 needs it to build the model."""
    if not args.deepspeed:
        return
    if args.use_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    deepspeed.init_distributed(dist_backend=get_accelerator().communication_backend_name(), auto_mpi_discovery=False)


def end_group() -> None:
    """Leave the process group; gloo may abort at exit otherwise."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
