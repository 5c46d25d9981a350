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


def is_missing_folder(path: str | os.PathLike) -> bool:
    """Whether `path` can only mean a local folder, and none is there."""
    text = str(path)
    return not os.path.exists(text) and (text.count("/") > 1 or text.startswith((".", "/", "~")))
