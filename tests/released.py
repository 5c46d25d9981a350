"""The recorded checkpoints of the original code, opened as a user opens them."""

from __future__ import annotations

from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from llava_sp import LlavaSPForCausalLM
from llava_sp.checkpoints.reading.names import our_projector_name, unwrapped

LAYOUTS = ("cropping", "pooling_dfi", "pooling")
CONVOLUTION_WIDTH = 5  # of the recorded checkpoints


def our_name(original: str) -> str:
    """`model.conv_4.1.weight` -> the name inside our SpatialProjector."""
    return our_projector_name(unwrapped(original))


def variant(layout: str) -> dict:
    """The configuration that is this layout."""
    return {"spatial_variant": layout.split("_")[0], "spatial_fusion": layout != "pooling"}


def projector_weights(originals: dict[str, Tensor]) -> dict[str, Tensor]:
    return {our_name(name): torch.as_tensor(tensor) for name, tensor in originals.items()}


def released_folder(golden: Path, layout: str) -> Path:
    return golden / f"checkpoint_{layout}" / "lora"


def bases(golden: Path) -> dict[str, Path]:
    """The recorded checkpoints' base models, which stand elsewhere than they say."""
    return {"language_model": golden / "base", "vision_tower": golden / "clip"}


def load_released(golden: Path, layout: str, lora: bool = True, dtype=torch.float32) -> LlavaSPForCausalLM:
    """The LoRA-stage model of a layout (LoRA unmerged), or its base with the trained projector alone; it can be trained."""
    folder = released_folder(golden, layout)
    path = folder if lora else folder / "non_lora_trainables.bin"
    model = LlavaSPForCausalLM.from_pretrained(path, **bases(golden), dtype=dtype)
    for module in model.modules():
        if isinstance(module, LoraLayer):  # the recordings of training are without dropout
            module.lora_dropout = nn.ModuleDict({name: nn.Identity() for name in module.lora_dropout})
    return model.requires_grad_(True)
