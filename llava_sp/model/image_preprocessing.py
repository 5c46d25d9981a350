"""Image settings of a vision tower, and the steps before its image processor. Pillow only: torchvision resizes
differently, and the weights were trained on Pillow's pixels.
"""

from __future__ import annotations

import os
from functools import lru_cache
from os import PathLike
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor, CLIPImageProcessorPil, SiglipImageProcessorPil
from transformers.image_transforms import to_pil_image
from transformers.image_utils import load_image

from .backbone_configs import as_value_error
from .configuration_llava_sp import LlavaSPConfig


def pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def pixels_of(image_processor, images: list[Image.Image]) -> torch.Tensor:
    """What the image processor gives for RGB images, [n, 3, H, W], to the bit.

    Its last steps compute with every pixel; as a channel has only 256 values, each is computed once here.
    """
    kind: Any = type(image_processor)
    of_bytes = kind in (CLIPImageProcessorPil, SiglipImageProcessorPil) and not image_processor.do_pad
    if not (of_bytes and image_processor.do_rescale and image_processor.do_normalize):
        return image_processor(images, return_tensors="pt")["pixel_values"]
    mean, std = image_processor.image_mean, image_processor.image_std
    table = _normalised(kind, image_processor.rescale_factor, tuple(mean), tuple(std))
    pixels = image_processor(images, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
    return torch.from_numpy(np.stack([table[channel][pixels[:, channel]] for channel in range(3)], axis=1))


@lru_cache
def _normalised(kind: Any, factor: float, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """[3, 256]: each value of each channel, rescaled and normalised by such an image processor."""
    processor = kind(do_resize=False, do_center_crop=False, rescale_factor=factor, image_mean=mean, image_std=std)
    values = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    return processor([Image.fromarray(values)], return_tensors="np")["pixel_values"][0].reshape(3, 256)


def flatten_images(images) -> list[Image.Image]:
    """All images of a call in order, as PIL images."""
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return [image for entry in images for image in flatten_images(entry)]
    if isinstance(images, (str, PathLike)):
        return [load_image(str(images))]
    if isinstance(images, Image.Image):
        return [images]
    if getattr(images, "ndim", 0) == 4:
        return [to_pil_image(image) for image in images]
    return [to_pil_image(images)]


def images_per_prompt(images, total: int) -> list[int] | int:
    """Images per prompt, if they are given by prompt; otherwise `total`."""
    if isinstance(images, (list, tuple)) and any(isinstance(entry, (list, tuple)) for entry in images):
        return [len(entry) if isinstance(entry, (list, tuple)) else int(entry is not None) for entry in images]
    return total


def pillow_counterpart(image_processor):
    """The Pillow counterpart of an image processor, with the same settings."""
    if image_processor is None or getattr(image_processor, "backend", "pil") == "pil":
        return image_processor
    settings = image_processor.to_dict()
    name = settings.pop("image_processor_type", type(image_processor).__name__)
    counterpart = getattr(transformers, f"{name.removesuffix('Fast')}Pil", None)
    if counterpart is None:
        raise ValueError(f"{name} resizes with torchvision and has no Pillow counterpart; use a CLIP or SigLIP one")
    return counterpart(**settings)


def image_processor_of(config: LlavaSPConfig, vision_tower: str | PathLike | None, **hub_kwargs):
    """The vision tower's image processor at the config's image size.

    A timm tower states mean, std and interpolation in its `pretrained_cfg`; a directory without a preprocessor_config.json
    gets CLIP's values.
    """
    side = config.image_size
    square = {"height": side, "width": side}
    timm_settings = getattr(config.vision_config, "pretrained_cfg", None)
    if timm_settings:
        resampling = Image.Resampling[timm_settings.get("interpolation", "bicubic").upper()]
        values = {
            "image_mean": timm_settings.get("mean"),
            "image_std": timm_settings.get("std"),
            "resample": resampling,
        }
        values = {key: value for key, value in values.items() if value is not None}
        return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=square, **values)
    names = ("preprocessor_config.json", "processor_config.json")
    if vision_tower is None or (os.path.isdir(vision_tower) and not set(names) & set(os.listdir(vision_tower))):
        return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=square)
    with as_value_error(vision_tower):
        processor = pillow_counterpart(AutoImageProcessor.from_pretrained(vision_tower, backend="pil", **hub_kwargs))
    by_edge = dict(processor.size).get("shortest_edge") is not None
    settings = {**processor.to_dict(), "size": {"shortest_edge": side} if by_edge else square}
    if settings.get("do_center_crop"):
        settings["crop_size"] = square
    settings.pop("image_processor_type", None)
    return type(processor)(**settings)
