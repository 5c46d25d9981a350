"""LLaVA-SP: visual spatial tokens for LLaVA-1.5 (Lou et al., ICCV 2025, arXiv 2507.00505).

`from llava_sp import LlavaSPForCausalLM, LlavaSPProcessor`. Importing the package itself loads neither torch nor the
model: names are resolved on first use, and the model is registered with transformers' Auto classes when they load.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from llava_sp import _auto

__version__ = "0.1.0"

_EXPORTS = {
    "LlavaSPConfig": "llava_sp.model.configuration_llava_sp",
    "LlavaSPForCausalLM": "llava_sp.model.modeling_llava_sp",
    "LlavaSPModel": "llava_sp.model.modeling_llava_sp",
    "LlavaSPProcessor": "llava_sp.model.processing_llava_sp",
}
__all__ = ["LlavaSPConfig", "LlavaSPForCausalLM", "LlavaSPModel", "LlavaSPProcessor", "__version__"]

if TYPE_CHECKING:
    from llava_sp.model.configuration_llava_sp import LlavaSPConfig
    from llava_sp.model.modeling_llava_sp import LlavaSPForCausalLM, LlavaSPModel
    from llava_sp.model.processing_llava_sp import LlavaSPProcessor


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'llava_sp' has no attribute {name!r}; it offers {', '.join(__all__)}")
    if name != "LlavaSPConfig":
        importlib.import_module("llava_sp.checkpoints.opening")  # the formats that model and processor open
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


_auto.register_when_loaded()
