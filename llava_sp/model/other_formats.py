"""Where this package is installed, `llava_sp.checkpoints` opens further formats; the model's files stand alone without it."""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType


def checkpoints_package() -> ModuleType | None:
    """llava_sp.checkpoints, or None where only the model's files were pushed (trust_remote_code).

    Looked up by name: what opens other formats builds upon the model, not the other way round.
    """
    if importlib.util.find_spec("llava_sp") is None:
        return None
    return importlib.import_module("llava_sp.checkpoints")


def check_folder(path: str | os.PathLike) -> None:
    """Raises `FileNotFoundError` where `path` can only mean a local folder, and none is there."""
    if is_missing_folder(path):
        raise FileNotFoundError(f"there is no folder {path}, and it cannot be a hub id either")


def is_missing_folder(path: str | os.PathLike) -> bool:
    """Whether `path` can only mean a local folder, and none is there."""
    text = str(path)
    return not os.path.exists(text) and (text.count("/") > 1 or text.startswith((".", "/", "~")))
