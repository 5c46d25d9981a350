"""Facts about a run that its settings do not hold: versions, commit, seed, command line, machine."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from llava_sp.train.arguments import TrainArguments

PACKAGES = ("llava_sp", "torch", "transformers", "peft", "accelerate", "deepspeed", "safetensors", "numpy", "pillow")


def collect(args: TrainArguments) -> dict[str, Any]:
    """Plain values for run.yaml and the checkpoints' manifests."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": git_commit(Path(__file__).parent),
        "seed": args.seed,
        "processes": args.world_size,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_commit(folder: Path) -> str | None:
    """The commit that the code is at, with `+changes` if files differ from it; None outside a repository."""
    try:
        commit = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        changes = subprocess.run(
            ["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"],
            capture_output=True, text=True, timeout=10, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changes else "")
