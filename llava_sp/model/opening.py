"""What opens other formats than transformers' own full checkpoint registers itself here; the model's files work without."""

from __future__ import annotations

from types import ModuleType

formats: ModuleType | None = None  # llava_sp.checkpoints.opening, where it is imported


def needed() -> ModuleType:
    """Raises `ImportError` where the package is not installed: these files alone open transformers' own format only."""
    if formats is None:
        raise ImportError("backbones and adapter checkpoints need the package: pip install llava_sp")
    return formats
