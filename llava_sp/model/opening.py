"""Where code that opens formats other than transformers' own registers itself; the model's files work without it."""

from __future__ import annotations

from types import ModuleType

formats: ModuleType | None = None  # llava_sp.checkpoints.opening, where it is imported


def other_formats() -> ModuleType | None:
    # A function, as transformers copies a file for remote code where `from .x import y` names it, but not `from . import x`.
    return formats


def needed_formats() -> ModuleType:
    """Raises `ImportError` where the package is not installed: these files alone open transformers' own format only."""
    if formats is None:
        raise ImportError("backbones and adapter checkpoints need the package: pip install llava_sp")
    return formats
