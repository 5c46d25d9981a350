"""The proof that a merged checkpoint is the unmerged model; see `python -m llava_sp.checkpoints.merge --help`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from llava_sp.model.modeling_llava_sp import LlavaSPForCausalLM
from llava_sp.model.processing_llava_sp import LlavaSPProcessor

SAMPLE_TEXT = (
    "<image>\nThe picture shows a red square on a ground that turns from blue to green. How many squares are there, what "
    "colour are they, and what is to the left of the largest one? Answer in one sentence."
)
_LOGITS_FLOAT32, _LOGITS_STEPS = 1e-4, 16
_SHARE_SLACK, _SHARE_DEVIATIONS, _SHARE_UNKNOWN = 0.01, 6, 0.5


@dataclass
class Probe:
    """A layer's output for a fixed vector before merging, [out_features] in float32: the base's, and LoRA's part."""

    base: Tensor
    lora: Tensor


def probe_vector(size: int, device: torch.device) -> Tensor:
    """Signs, [size], always the same."""
    return torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(0)).mul(2).sub(1).float().to(device)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def proof_sample(processor: LlavaSPProcessor):
    """A fixed image (a red square on a blue-green gradient, 480 x 320) and text, as model inputs of batch 1."""
    pixels = numpy.zeros((320, 480, 3), dtype=numpy.uint8)
    pixels[..., 1] = numpy.linspace(0, 255, 480)
    pixels[..., 2] = 255 - pixels[..., 1]
    pixels[80:200, 120:240] = (255, 0, 0)
    return processor(images=Image.fromarray(pixels), text=SAMPLE_TEXT)


@torch.inference_mode()
def text_logits(model: LlavaSPForCausalLM, sample) -> Tensor:
    """Logits at the positions that are text, [positions, vocabulary], float32, on the CPU.

    Raises:
        ValueError: they are not finite.
    """
    positions = (sample["input_ids"][0] != model.config.image_token_id).nonzero()[:, 0]
    logits = model(**sample, logits_to_keep=positions).logits[0].float().cpu()
    if not torch.isfinite(logits).all():
        raise ValueError(f"logits hold NaN or infinity: broken weights, or {dtype_name(model.dtype)} is too narrow")
    return logits


@torch.inference_mode()
def prove(stage: Path, sample, before: Tensor, probes: dict[str, Probe], dtype: str, device: str = "cpu") -> dict:
    """Open the merged checkpoint as a user will and compare it with the unmerged model's outputs.

    Args:
        stage: the merged checkpoint. before: `text_logits` of the unmerged model. probes: from `merge_layers`.

    Returns:
        The figures for the record.

    Raises:
        ValueError: it is not the same model; the message has the figures.
    """
    placed = {} if device == "cpu" else {"device_map": device}
    merged = LlavaSPForCausalLM.from_pretrained(stage, **placed)
    if dtype_name(merged.dtype) != dtype:
        raise ValueError(f"the merged model opens in {dtype_name(merged.dtype)}, not in {dtype}; nothing was written")
    return {"logits": _compare_logits(before, text_logits(merged, sample), dtype), "layers": _find_lora(merged, probes)}


def _compare_logits(before: Tensor, after: Tensor, dtype: str) -> dict:
    words = before > torch.finfo(getattr(torch, dtype)).min  # the others are masked, see LlavaSPForCausalLM.silence
    difference = (after - before)[words].abs().max().item()
    relative = difference / before[words].abs().max().item()
    allowed = _LOGITS_FLOAT32 if dtype == "float32" else _LOGITS_STEPS * torch.finfo(getattr(torch, dtype)).eps
    if not relative <= allowed:
        raise ValueError(
            f"the merged model is not the unmerged one: its logits differ by {difference:.3g}, {relative:.2g} of the "
            f"largest, where {dtype} allows {allowed:.2g}; nothing was written"
        )
    return {
        "tokens": len(before),
        "largest_difference": difference,
        "largest_relative_difference": relative,
        "allowed_relative_difference": allowed,
        "same_next_token": int((before.argmax(-1) == after.argmax(-1)).sum()),
    }


def _find_lora(merged: nn.Module, probes: dict[str, Probe]) -> dict:
    """How much of LoRA is found in each merged layer: 1 is right. Layers where rounding hides it are only counted."""
    shares = {}
    for name, probe in probes.items():
        layer: Any = merged.get_submodule(name)
        bias = None if layer.bias is None else layer.bias.float()
        vector = probe_vector(layer.in_features, layer.weight.device)
        found = F.linear(vector, layer.weight.float(), bias).cpu() - probe.base
        # Each weight is off by half a step of its type at most, float32's sums by some steps of theirs; signs are random.
        step = torch.finfo(layer.weight.dtype).eps / 2 + 8 * torch.finfo(torch.float32).eps
        noise = step * torch.linalg.vector_norm(layer.weight.float(), dim=1).cpu() * probe.lora
        power = probe.lora.square().sum().item()
        allowed = _SHARE_SLACK + _SHARE_DEVIATIONS * noise.norm().item() / power if power else math.inf
        if allowed > _SHARE_UNKNOWN:
            continue
        shares[name] = found.dot(probe.lora).item() / power
        if not abs(shares[name] - 1) <= allowed:
            raise ValueError(
                f"{name}: {shares[name]:.3f} of LoRA is in the merged weight; 1 is expected, and rounding explains "
                f"{allowed:.3f} more or less; nothing was written"
            )
    return {
        "found": len(shares),
        "below_rounding": len(probes) - len(shares),
        "least_share": min(shares.values(), default=None),
        "largest_share": max(shares.values(), default=None),
    }
