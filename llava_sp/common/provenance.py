"""Provenance of an output: versions, commit, command, date, machine."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "llava_sp", "torch", "transformers", "tokenizers", "peft", "accelerate", "deepspeed", "safetensors", "numpy", "pillow",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages of `PACKAGES`."""
    return {"python": platform.python_version()} | {name: v for name in PACKAGES if (v := version(name)) is not None}


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def now() -> str:
    """The date and time, UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def command() -> str:
    """The command line of this process, as it can be repeated."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["-m", spec.name.removesuffix(".__main__")] if spec else [Path(sys.argv[0]).name]
    return shlex.join(["python", *program, *sys.argv[1:]])


def git_commit(folder: Path) -> str | None:
    """The commit that a folder is at, with `+changes` if files differ from it; None outside a repository."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changes else "")
