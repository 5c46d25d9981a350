"""From a recognised checkpoint to a model, and back to disk. Importing this lets the model open every format."""

from __future__ import annotations

import os
import sys

from llava_sp.checkpoints.opening.adapter import open_adapter, save_adapter
from llava_sp.checkpoints.opening.foreign import open_llava_hf, open_original
from llava_sp.checkpoints.opening.full import open_full
from llava_sp.checkpoints.opening.processors import open_processor
from llava_sp.checkpoints.opening.warm_start import from_backbones
from llava_sp.checkpoints.reading.formats import Checkpoint, recognise
from llava_sp.checkpoints.reading.places import fetch
from llava_sp.model import opening

__all__ = ["from_backbones", "open_model", "open_processor", "save_adapter"]

# A format of `FORMATS` -> f(model class, Checkpoint, **keywords), which returns the model. "llava_sp" is transformers' own way.
_OPENERS = {
    "llava_sp_adapter": open_adapter,
    "original_lora": open_original,
    "original_full": open_original,
    "original_projector": open_original,
    "llava_hf": open_llava_hf,
}
_ELSEWHERE = ("state_dict", "subfolder", "variant", "gguf_file")  # the weights are not those of the folder


def open_model(cls, checkpoint: str | os.PathLike | Checkpoint, *args, output_loading_info: bool = False, **kwargs):
    """The model of a checkpoint; `LlavaSPForCausalLM.from_pretrained` calls this.

    Args:
        checkpoint: a folder, the file of a first stage's projector, a hub id, or the result of `recognise`.
        args, output_loading_info: as for transformers' `from_pretrained`, for our full checkpoints only.

    Raises like `LlavaSPForCausalLM.from_pretrained`.
    """
    if any(kwargs.get(name) for name in _ELSEWHERE):
        return cls.from_full(checkpoint, *args, output_loading_info=output_loading_info, **kwargs)
    found = checkpoint if isinstance(checkpoint, Checkpoint) else recognise(fetch(checkpoint, **kwargs))
    if found.holds_vision_tower:
        kwargs.pop("is_trainable", None)  # all of a full model trains
    if found.format == "llava_sp":
        return open_full(cls, found, *args, output_loading_info=output_loading_info, **kwargs)
    if output_loading_info or args:
        raise ValueError(f"{found.folder} is not a full checkpoint of LLaVA-SP: output_loading_info is not supported")
    return _OPENERS[found.format](cls, found, **kwargs)


opening.formats = sys.modules[__name__]
