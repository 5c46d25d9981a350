"""Locations of a checkpoint and its base models: a local folder, a path relative to the checkpoint, or the hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from llava_sp.common.files import is_missing_folder

_HUB_KEYWORDS = ("revision", "cache_dir", "token", "local_files_only", "force_download")
# The Auto classes' own keywords, and those for the checkpoint only, not for its bases.
_OF_THE_CHECKPOINT = ("adapter_kwargs", "trust_remote_code", "_from_auto", "_commit_hash", "revision", "force_download")


def hub_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those keywords of a `from_pretrained` that concern downloads from the hub."""
    return {name: kwargs[name] for name in _HUB_KEYWORDS if name in kwargs}


def base_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those keywords of a checkpoint's `from_pretrained` that its base models are opened with."""
    return {name: value for name, value in kwargs.items() if name not in _OF_THE_CHECKPOINT}


def fetch(path: str | os.PathLike, **kwargs) -> Path:
    """The local folder (or file) of a checkpoint, downloaded if it is a hub id.

    Raises:
        FileNotFoundError: `path` can only be a folder and does not exist.
        OSError: there is no such folder, and the hub has no such model or cannot be reached.
    """
    if Path(path).exists():
        return Path(path)
    if is_missing_folder(path):
        raise FileNotFoundError(f"there is no folder {path}, and it cannot be a hub id either")
    from huggingface_hub import snapshot_download

    given = {name: value for name, value in hub_kwargs(kwargs).items() if name != "token" or value is not None}
    try:
        return Path(snapshot_download(str(path), **given))
    except (OSError, ValueError) as error:  # also huggingface_hub's own
        reason = " ".join(str(error).split())
        raise OSError(
            f"there is no folder {path}, and no model of that name on the hub can be read: {reason}"
        ) from None


def fetch_config(path: str | os.PathLike, name: str = "config.json", **kwargs) -> Path | None:
    """One small file of a folder, or of a hub model (downloaded if needed); None if not available."""
    if Path(path).exists() or is_missing_folder(path):
        return Path(path) / name if (Path(path) / name).is_file() else None
    from transformers.utils import cached_file

    found = cached_file(
        str(path),
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
        **hub_kwargs(kwargs),
    )
    return None if found is None else Path(found)


def base_folder(checkpoint: Path, name: str | os.PathLike) -> Path | None:
    """The folder that a checkpoint means by `name`: as it is, within it, or beside it."""
    return next((place for place in (Path(name), checkpoint / name, checkpoint.parent / name) if place.is_dir()), None)


def find_base(
    checkpoint: Path, keyword: str, given: str | os.PathLike | None, recorded: str | os.PathLike | None, **kwargs
) -> str:
    """Where a base model is: the folder that is given or recorded, else an available hub id.

    Raises `ValueError` naming what was given or recorded, and what to pass as `keyword`.
    """
    chosen = given if given is not None else recorded
    folder = None if chosen is None else base_folder(checkpoint, chosen)
    if folder is not None:
        return str(folder)
    if chosen is None or is_missing_folder(chosen) or fetch_config(chosen, **kwargs) is None:
        what = keyword.replace("_", " ")
        origin = f"passed as {keyword}" if given is not None else "that the checkpoint records"
        lost = (
            f"the {what} {origin}, {chosen}, is not there" if chosen is not None else f"it does not record its {what}"
        )
        raise ValueError(f"{checkpoint}: {lost}; pass {keyword}=<hub id or folder>")
    return str(chosen)


def checkpoints_hint(folder: Path) -> str:
    """The hint for a run's folder without a model (yet): its newest intermediate checkpoint, if any."""
    steps = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")}
    numbers = {path: int(step) for path, step in steps.items() if step.isdigit()}
    return (
        f"; the newest checkpoint of the unfinished run is {max(numbers, key=numbers.__getitem__)}" if numbers else ""
    )
