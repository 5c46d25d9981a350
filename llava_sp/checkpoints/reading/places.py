"""Where a checkpoint and its base models are: a folder here, a place relative to the checkpoint, or the hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from llava_sp.model.opening import is_missing_folder

_HUB_KEYWORDS = ("revision", "cache_dir", "token", "local_files_only", "force_download")
# The Auto classes' own keywords, and those that are about the checkpoint alone, not about its bases.
_OF_THE_CHECKPOINT = ("adapter_kwargs", "trust_remote_code", "_from_auto", "_commit_hash", "revision", "force_download")


def hub_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those keywords of a `from_pretrained` that say how to get a file from the hub."""
    return {name: kwargs[name] for name in _HUB_KEYWORDS if name in kwargs}


def base_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those keywords of a checkpoint's `from_pretrained` that its base models are opened with."""
    return {name: value for name, value in kwargs.items() if name not in _OF_THE_CHECKPOINT}


def fetch(path: str | os.PathLike, **kwargs) -> Path:
    """The local folder (or file) of a checkpoint, downloaded if it is a hub id.

    Raises `FileNotFoundError` where `path` can only be a folder and none is there.
    """
    if Path(path).exists():
        return Path(path)
    if is_missing_folder(path):
        raise FileNotFoundError(f"there is no folder {path}")
    from huggingface_hub import snapshot_download

    given = {name: value for name, value in hub_kwargs(kwargs).items() if name != "token" or value is not None}
    return Path(snapshot_download(str(path), **given))


def from_hub(path: str | os.PathLike, name: str, **kwargs) -> str | None:
    """One file of a hub model in the cache, downloaded if need be; None where it cannot be had."""
    from transformers.utils import cached_file

    return cached_file(
        str(path),
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
        **hub_kwargs(kwargs),
    )


def find_config(path: str | os.PathLike, **kwargs) -> Path | None:
    """The config.json of a folder or of a hub model; None where it has none.

    Raises `OSError` where `path` is no folder, and the hub has no such model or cannot be reached.
    """
    if Path(path).is_dir():
        file = Path(path) / "config.json"
        return file if file.is_file() else None
    from transformers.utils import cached_file

    try:
        found = cached_file(str(path), "config.json", **hub_kwargs(kwargs))
    except OSError as error:
        reason = " ".join(str(error).split())
        raise OSError(
            f"there is no folder {path}, and no model of that name can be had from the hub: {reason}"
        ) from None
    return None if found is None else Path(found)


def base_folder(checkpoint: Path, name: str | os.PathLike) -> Path | None:
    """The folder that a checkpoint means by `name`: as it is, within it, or beside it."""
    return next((place for place in (Path(name), checkpoint / name, checkpoint.parent / name) if place.is_dir()), None)


def find_base(
    checkpoint: Path, given: str | os.PathLike | None, recorded: str | None, keyword: str, what: str, **kwargs
) -> str:
    """Where a base model is: the folder that is given or recorded, else a hub id that can be had.

    Raises `ValueError` saying what was recorded and what to pass.
    """
    chosen = given if given is not None else recorded
    if chosen is None:
        raise ValueError(f"{checkpoint} does not record its {what}: pass {keyword}=<hub id or folder>")
    folder = base_folder(checkpoint, chosen)
    if folder is not None:
        return str(folder)
    origin = f"passed as {keyword}" if given is not None else "that the checkpoint records"
    lost = f"{checkpoint}: the {what} {origin}, {chosen}, is not there"
    if is_missing_folder(chosen):
        raise ValueError(f"{lost}; pass {keyword}=<hub id or folder>")
    if from_hub(chosen, "config.json", **kwargs) is None:
        raise ValueError(
            f"{lost}: no folder of that name, and no model that the hub gives (or the hub cannot be reached); pass "
            f"{keyword}=<hub id or folder>"
        )
    return str(chosen)


def checkpoints_hint(folder: Path) -> str:
    """What to say of a run's folder that has no model (yet): its newest intermediate checkpoint, if there is one."""
    steps = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")}
    steps = {path: int(step) for path, step in steps.items() if step.isdigit()}
    return f"; the newest checkpoint of the unfinished run is {max(steps, key=steps.get)}" if steps else ""
