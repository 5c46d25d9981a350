"""Atomic creation of a folder: written beside the target, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from llava_sp.common.files import readable


def check_new(target: Path, *sources: str | os.PathLike) -> None:
    """Raises `ValueError` if `target` holds files or is inside a source folder."""
    for source in sources:
        if Path(source).is_dir() and target.is_relative_to(Path(source).resolve()):
            raise ValueError(f"{target} is inside {source}, which is read: choose a folder elsewhere")
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file: choose a new folder")
    if target.is_dir() and any(target.iterdir()):
        raise ValueError(f"{target} holds files: choose a new folder")


@contextlib.contextmanager
def new_folder(target: Path, needed: int) -> Iterator[Path]:
    """A folder beside `target`, renamed to it at the end, removed on failure; `needed` bytes must be free there.

    Raises:
        OSError: not enough space, or the disk fills up while writing.
        ValueError: another process is writing the same folder.
    """
    anchor = next(folder for folder in target.parents if folder.is_dir())
    free = shutil.disk_usage(anchor).free
    if free < needed:
        raise OSError(f"{target} needs {readable(needed)}, but {anchor} has {readable(free)} free")
    stage = anchor / f".{target.name}.part"
    try:
        stage.mkdir()
    except FileExistsError:
        raise ValueError(f"{stage} exists: another command is writing it, or was killed; then remove it") from None
    mode = stage.stat().st_mode & 0o666  # as set by the umask; the parent may be writable for all
    try:
        yield stage
        for file in (path for path in stage.rglob("*") if path.is_file()):
            file.chmod(mode)  # safetensors makes files that only their owner can read
        sync(stage)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(stage, target)  # fails if files have been put there meanwhile
    except SafetensorError as error:  # raised for a full disk
        raise OSError(f"{stage}: {error}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def sync(folder: Path) -> None:
    """fsync every file below a folder."""
    for directory, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(directory, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(directory))


def sync_folder(folder: Path) -> None:
    """fsync a folder's own entries (names, not contents)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
