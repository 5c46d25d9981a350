"""Opening and saving models in every format but transformers' own full checkpoint.

`backbones`: assemble from a language model and a vision tower. `adapter`: LoRA and projector, without base weights.
"""

from .adapter import (
    checkpoint_hash,
    describe,
    is_adapter,
    load_adapter,
    load_projector,
    open_adapter,
    save_adapter,
    trainable_state_dict,
)
from .backbones import from_backbones, weights_fingerprint

__all__ = [
    "checkpoint_hash",
    "describe",
    "from_backbones",
    "is_adapter",
    "load_adapter",
    "load_projector",
    "open_adapter",
    "save_adapter",
    "trainable_state_dict",
    "weights_fingerprint",
]
