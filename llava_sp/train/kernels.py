"""Fused kernels in place of the language model's own modules: Liger's rope, RMSNorm and SwiGLU, on a CUDA GPU.

Liger's fused cross-entropy is not used: it would replace the model's forward, and the loss here is of the learned positions
alone already.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from llava_sp import LlavaSPForCausalLM
from llava_sp.model.backbone_configs import language_config

LIGER = ("llama", "mistral", "qwen2", "qwen3")  # model types whose layers Liger replaces by these three


def liger_problem(language_model: str | None) -> str | None:
    """Why `use_liger_kernel` cannot be used here for this language model, or None if it can."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed (pip install 'llava_sp[liger]')"
    if not torch.cuda.is_available():
        return "its kernels need a CUDA GPU, and there is none"
    kind = language_config(language_model).model_type if language_model else LIGER[0]
    return None if kind in LIGER else f"the language model is of type {kind}; it must be one of {', '.join(LIGER)}"


def use_liger(model: LlavaSPForCausalLM) -> None:
    """Replace rope, RMSNorm and SwiGLU of the language model, LoRA included; the tower keeps its own.

    Liger replaces rope for all models of the type in this process.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    kernels: Any = {"rope": True, "rms_norm": True, "swiglu": True}
    others = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    kind = model.config.text_config.model_type
    MODEL_TYPE_TO_APPLY_LIGER_FN[kind](**kernels, **others, model=model.model.language_model)
