"""Atomic creation of a folder: written beside the target, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from llava_sp.common.files import lock, readable

_LOCK = ".lock"  # in a folder that is being written


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

    Files left by a killed command are removed.

    Raises:
        OSError: not enough space, or the disk fills up while writing.
        ValueError: another process is writing the same folder.
    """
    anchor = next(folder for folder in target.parents if folder.is_dir())
    stage = anchor / f".{target.name}.part"
    with _owned(stage):
        free = shutil.disk_usage(anchor).free
        try:
            if free < needed:
                raise OSError(f"{target} needs {readable(needed)}, but {anchor} has {readable(free)} free")
            yield stage
            mode = (stage / _LOCK).stat().st_mode & 0o666  # as set by the umask
            for file in (path for path in stage.rglob("*") if path.is_file()):
                file.chmod(mode)  # safetensors files are readable by the owner only
            sync(stage)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(stage, target)  # fails if files were added there meanwhile
            (target / _LOCK).unlink()
        except SafetensorError as error:  # raised for a full disk
            raise OSError(f"{stage}: {error}") from error
        finally:
            shutil.rmtree(stage, ignore_errors=True)


@contextlib.contextmanager
def _owned(stage: Path) -> Iterator[None]:
    """The folder `stage`, empty except for a lock, which the system releases when the process exits or is killed."""
    stage.mkdir(exist_ok=True)
    file = stage / _LOCK
    with open(file, "a") as stream:
        held = lock(stream, stage) and file.exists() and os.path.samestat(file.stat(), os.fstat(stream.fileno()))
        if not held:  # or its owner has renamed the folder since the file was opened
            raise ValueError(f"{stage} is being written by another command: wait for it, or end it")
        for entry in stage.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != _LOCK:
                entry.unlink()
        yield


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
