"""What lmms-eval reads from the entry point `lmms_eval.models`: the name and the class of the model.

lmms-eval loads this with every command, also those for other models, so nothing heavy is imported here. The model itself,
and how to use it, is `llava_sp.eval.lmms_eval.model`.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """The `ModelManifest` of `--model llava_sp`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="llava_sp", simple_class_path="llava_sp.eval.lmms_eval.model.LlavaSP")
