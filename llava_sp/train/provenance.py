"""Facts about a run that its settings do not hold, for run.yaml and the checkpoints' manifests."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

from llava_sp.common.provenance import command, git_commit, now, versions
from llava_sp.config.arguments import TrainArguments


def collect(args: TrainArguments) -> dict[str, Any]:
    return {
        "started": now(),
        "command": command(),
        "commit": git_commit(Path(__file__).parent),
        "seed": args.seed,
        "processes": args.world_size,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "versions": versions(),
    }
