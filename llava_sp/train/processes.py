"""The processes of a run: their environment, their group, and how they end. Nothing happens on import."""

from __future__ import annotations

import os
import socket

import torch
from transformers import TrainingArguments


def prepare_environment() -> bool:
    """Make a plain `python` look like a launcher's only process. Returns whether a launcher started this one."""
    launched = "WORLD_SIZE" in os.environ
    if not launched:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
    return launched


def is_first() -> bool:
    """True in the process that writes files and speaks."""
    return int(os.environ.get("RANK", "0")) == 0


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
