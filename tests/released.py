"""Reading the recorded checkpoints of the original code into our modules, by hand, for parity tests."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor

from llava_sp import LlavaSPForCausalLM

LAYOUTS = ("cropping", "pooling_dfi", "pooling")
CONVOLUTION_WIDTH = 5  # of the recorded checkpoints

_PATCH_MLP = {"mm_projector.0": "linear_1", "mm_projector.2": "linear_2"}
_FUSION = {"query_projector": "query", "key_projector": "key", "value_projector": "value"}


def our_name(original: str) -> str:
    """`model.conv_4.1.weight` -> the name inside our SpatialProjector."""
    name = original.removeprefix("base_model.model.").removeprefix("model.")
    for theirs, ours in _PATCH_MLP.items():
        if name.startswith(theirs):
            return name.replace(theirs, ours)
    for theirs, ours in _FUSION.items():
        if name.startswith(theirs):
            return name.replace(theirs, f"spatial.integrator.{ours}")
    if name.startswith("conv_linear.1"):
        return name.replace("conv_linear.1", "spatial.linear")
    if name.startswith("conv_CM"):
        return name.replace("conv_CM", "spatial.integrator.context")
    scale = name.split(".")[0].removeprefix("conv_")
    return f"spatial.extractor.projections.{scale}.weight"


def variant(layout: str) -> dict:
    """The configuration that is this layout."""
    return {"spatial_variant": layout.split("_")[0], "spatial_fusion": layout != "pooling"}


def projector_weights(originals: dict[str, Tensor]) -> dict[str, Tensor]:
    return {our_name(name): torch.as_tensor(tensor) for name, tensor in originals.items()}


def load_released(golden: Path, layout: str, lora: bool = True) -> LlavaSPForCausalLM:
    """The recorded LoRA-stage model of a layout: base, CLIP, projector and (unmerged) LoRA, in float32."""
    model = LlavaSPForCausalLM.from_backbones(
        golden / "base", golden / "clip", spatial_width=CONVOLUTION_WIDTH, dtype=torch.float32, **variant(layout)
    )
    folder = golden / f"checkpoint_{layout}" / "lora"
    originals = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    model.model.multi_modal_projector.load_state_dict(projector_weights(originals))
    if lora:
        settings = LoraConfig.from_pretrained(str(folder))
        leaves = "|".join(sorted(settings.target_modules))
        model.add_adapter(
            LoraConfig(
                r=settings.r,
                lora_alpha=settings.lora_alpha,
                lora_dropout=0.0,
                target_modules=rf"model\.language_model\..*\.({leaves})",
            )
        )
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, tensor in load_file(folder / "adapter_model.safetensors").items():
                own = name.replace("base_model.model.model.", "model.language_model.")
                own = own.replace(".weight", ".default.weight")
                parameters[own].copy_(tensor)
    return model.eval()
