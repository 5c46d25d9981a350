"""The golden tokenizer and CLIP settings as a processor, the golden model, and small configurations."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig

from llava_sp import LlavaSPConfig, LlavaSPForCausalLM, LlavaSPProcessor
from tests.released import load_released


def tiny_config(**vision) -> LlavaSPConfig:
    scales = None if "image_size" not in vision else [2, 4]
    vision = {"hidden_size": 64, "num_attention_heads": 4, "image_size": 336, "patch_size": 14, **vision}
    return LlavaSPConfig(
        text_config=LlamaConfig(vocab_size=1024, hidden_size=96),
        vision_config=CLIPVisionConfig(**vision),
        spatial_scales=scales,
    )


@pytest.fixture(scope="session", name="tiny_config")
def tiny_config_fixture():
    """`tiny_config(image_size=..., patch_size=...)`."""
    return tiny_config


@pytest.fixture(scope="session")
def processor(golden) -> LlavaSPProcessor:
    """At CLIP-L/14-336's geometry: 582 tokens per image."""
    return LlavaSPProcessor.from_backbones(tiny_config(), golden / "base", golden / "clip")


@pytest.fixture(scope="session")
def model(golden) -> LlavaSPForCausalLM:
    return load_released(golden, "cropping", lora=False)


@pytest.fixture(scope="session")
def images(golden) -> list[Image.Image]:
    return [Image.open(golden / "samples/images" / name) for name in ("wide.png", "tall.png", "square.png")]


@pytest.fixture(scope="session")
def saved(model, processor, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
