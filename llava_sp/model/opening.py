"""What opens other formats than transformers' own full checkpoint registers itself here; the model's files stand alone without."""

from __future__ import annotations

import os
from types import ModuleType

formats: ModuleType | None = None  # llava_sp.checkpoints.opening, where it is imported


def check_folder(path: str | os.PathLike) -> None:
    """Raises `FileNotFoundError` where `path` can only mean a local folder, and there is none."""
    if is_missing_folder(path):
        raise FileNotFoundError(f"there is no folder {path}, and it cannot be a hub id either")


def is_missing_folder(path: str | os.PathLike) -> bool:
    """Whether `path` can only mean a local folder, and there is none."""
    text = str(path)
    return not os.path.exists(text) and (text.count("/") > 1 or text.startswith((".", "/", "~")))
