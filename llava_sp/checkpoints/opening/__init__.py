"""From what was found to a model, and back to disk. Importing this lets the model open every format."""

import sys

from llava_sp.checkpoints.opening.adapter import save_adapter
from llava_sp.checkpoints.opening.fill import check_values
from llava_sp.checkpoints.opening.foreign import check_full, needs_processor, open_processor, opener
from llava_sp.checkpoints.opening.warm_start import from_backbones
from llava_sp.model import opening

opening.formats = sys.modules[__name__]

__all__ = [
    "check_full",
    "check_values",
    "from_backbones",
    "needs_processor",
    "open_processor",
    "opener",
    "save_adapter",
]
