"""Opening and saving models in every format but transformers' own full checkpoint.

`backbones`: assemble from a language model and a vision tower. `adapter`: LoRA and projector, without base weights.
`formats`: what a folder is, by its content. `original`: what other code wrote. `warm_start`: a trained
LLaVA-1.5 as a beginning. `locating`: where it all is. `filling`: tensors into a model. As commands:
`convert`, `merge`, `inspect`.
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
from .backbones import weights_fingerprint
from .filling import check_values
from .formats import Checkpoint, recognise
from .original import check_full, format_of, needs_processor, open_original, open_processor, opener
from .warm_start import from_backbones, holds_lora, language_model_within, start_from

__all__ = [
    "Checkpoint",
    "check_full",
    "check_values",
    "checkpoint_hash",
    "describe",
    "format_of",
    "from_backbones",
    "holds_lora",
    "is_adapter",
    "language_model_within",
    "load_adapter",
    "load_projector",
    "needs_processor",
    "open_adapter",
    "open_original",
    "open_processor",
    "opener",
    "recognise",
    "save_adapter",
    "start_from",
    "trainable_state_dict",
    "weights_fingerprint",
]
