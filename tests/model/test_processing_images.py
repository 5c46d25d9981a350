"""Pixels: equal to the original's to the last bit; image settings of CLIP, SigLIP, timm and towers without any."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPImageProcessorPil, LlamaConfig, SiglipImageProcessorPil, TimmWrapperConfig

from llava_sp.model.configuration_llava_sp import LlavaSPConfig
from llava_sp.model.image_preprocessing import pad_to_square
from llava_sp.model.processing_llava_sp import LlavaSPProcessor, add_special_tokens

GOLDEN = Path(__file__).parent.parent / "golden"
PREPROCESSED = json.loads((GOLDEN / "image_preprocess.json").read_text())


def golden_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "base")
    add_special_tokens(tokenizer)
    return tokenizer


@pytest.mark.parametrize("mode", ["pad", "default"])
@pytest.mark.parametrize("entry", PREPROCESSED["images"], ids=lambda entry: entry["name"])
def test_pixels_of_the_original(golden, processor, entry, mode):
    ours = LlavaSPProcessor(
        processor.image_processor, processor.tokenizer, 582, image_aspect_ratio="pad" if mode == "pad" else "crop"
    )
    pixels = ours.preprocess_images([Image.open(golden / entry["file"])])[0]
    assert pixels.shape == (3, 336, 336) and pixels.dtype == torch.float32
    processed = np.array(Image.open(golden / "images" / f"{entry['name']}.{mode}.processed.png")).transpose(2, 0, 1)
    assert np.array_equal(pixels.numpy(), normalised(processed, processor))
    expected = load_file(golden / "image_preprocess.safetensors")[f"pixel_values_s8.{entry['name']}.{mode}"]
    assert torch.equal(pixels[:, ::8, ::8], expected)


def normalised(processed: np.ndarray, processor: LlavaSPProcessor) -> np.ndarray:
    settings = processor.image_processor
    mean, std = (
        np.array(values, dtype=np.float32)[:, None, None] for values in (settings.image_mean, settings.image_std)
    )
    return ((processed * (1 / 255)).astype(np.float32) - mean) / std


@pytest.mark.parametrize("layout", ["cropping", "pooling", "pooling_dfi"])
def test_pixels_of_the_recorded_checkpoints(golden, processor, layout):
    expected = load_file(golden / f"checkpoint_{layout}" / "expected.safetensors")
    for index, name in enumerate(("wide", "tall", "square")):
        pixels = processor.preprocess_images([Image.open(golden / "samples" / "images" / f"{name}.png")])[0]
        assert torch.equal(pixels[:, ::4, ::4], expected[f"pixel_values_s4.{index}"])
        processed = np.array(Image.open(golden / "samples" / "images" / f"processed_{index}.png").convert("RGB"))
        assert np.array_equal(pixels.numpy(), normalised(processed.transpose(2, 0, 1), processor))


@pytest.mark.parametrize("size", [(640, 480), (31, 77), (64, 64)])
@pytest.mark.parametrize(
    "image_processor",
    [
        CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        CLIPImageProcessorPil(
            size={"shortest_edge": 40}, crop_size={"height": 56, "width": 56}
        ),  # crops beyond the image
        CLIPImageProcessorPil(do_normalize=False),
        CLIPImageProcessorPil(do_pad=True, pad_size={"height": 300, "width": 300}),
        SiglipImageProcessorPil(size={"height": 56, "width": 56}, image_mean=[0.1, 0.5, 0.6], rescale_factor=1 / 127),
    ],
)
@pytest.mark.parametrize("aspect_ratio", ["pad", "crop"])
def test_pixels_are_those_of_the_image_processor(image_processor, size, aspect_ratio):
    """They are looked up by value; to the bit, also if its settings are changed later."""
    ours = LlavaSPProcessor(image_processor, golden_tokenizer(), 582, image_aspect_ratio=aspect_ratio)
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    for mean in ([0.4, 0.5, 0.6], [0.3, 0.2, 0.1]):
        image_processor.image_mean = mean
        image = squared = Image.fromarray(values)
        if aspect_ratio == "pad":
            squared = pad_to_square(image, tuple(int(value * 255) for value in mean))
        expected = image_processor([squared], return_tensors="pt")["pixel_values"]
        assert torch.equal(ours.preprocess_images([image]), expected)


def test_siglip_settings_at_the_configs_size(tmp_path, tiny_config):
    SiglipImageProcessorPil(size={"height": 224, "width": 224}).save_pretrained(tmp_path)
    ours = LlavaSPProcessor.from_backbones(tiny_config(image_size=112, patch_size=16), GOLDEN / "base", tmp_path)
    assert type(ours.image_processor) is SiglipImageProcessorPil
    pixels = ours.preprocess_images([Image.new("RGB", (50, 20), "white")])
    assert pixels.shape == (1, 3, 112, 112) and pixels.max() == 1 and list(ours.image_processor.image_mean) == [0.5] * 3


def test_timm_settings_come_from_the_towers_config(tmp_path):
    settings = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear", "crop_pct": 0.9}
    vision = TimmWrapperConfig(architecture="vit_tiny_patch16_224", pretrained_cfg=settings)
    vision.hidden_size, vision.image_size, vision.patch_size = 48, [64, 64], [16, 16]
    config = LlavaSPConfig(text_config=LlamaConfig(vocab_size=1024), vision_config=vision, spatial_scales=[2, 4])
    ours = LlavaSPProcessor.from_backbones(config, GOLDEN / "base", tmp_path)
    assert list(ours.image_processor.image_std) == [0.4, 0.5, 0.6]
    assert ours.image_processor.resample == Image.Resampling.BILINEAR
    assert ours.preprocess_images([Image.new("L", (50, 20))]).shape == (1, 3, 64, 64)


def test_tower_without_image_settings_gets_clips(tmp_path, tiny_config):
    ours = LlavaSPProcessor.from_backbones(tiny_config(image_size=56), GOLDEN / "base", tmp_path)
    assert ours.preprocess_images([Image.new("RGB", (9, 30))]).shape == (1, 3, 56, 56)
    assert tuple(ours.image_processor.image_mean) == tuple(CLIPImageProcessorPil().image_mean)


def test_a_torchvision_image_processor_is_replaced():
    pytest.importorskip("torchvision")
    from transformers import CLIPImageProcessor

    settings = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    ours = LlavaSPProcessor(CLIPImageProcessor(**settings), golden_tokenizer(), num_image_tokens=4)
    assert type(ours.image_processor) is CLIPImageProcessorPil and ours.image_processor.size["shortest_edge"] == 56
