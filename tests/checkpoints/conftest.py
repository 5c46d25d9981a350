from __future__ import annotations

import shutil

import pytest
from PIL import Image
from transformers import AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration

from llava_sp import LlavaSPForCausalLM
from llava_sp.model.processing_llava_sp import add_special_tokens
from tests.checkpoints.kinds import Kind, build, llava_15


@pytest.fixture(scope="session")
def kinds(golden, tmp_path_factory) -> dict[str, Kind]:
    """A checkpoint of every format; to be copied before it is changed."""
    return build(golden, tmp_path_factory.mktemp("kinds"))


@pytest.fixture(scope="session")
def images(golden) -> list[Image.Image]:
    return [Image.open(golden / "samples/images" / name) for name in ("wide.png", "tall.png", "square.png")]


@pytest.fixture(scope="session")
def none(golden) -> LlavaSPForCausalLM:
    """A model without spatial tokens: what LLaVA-1.5 is."""
    return llava_15(golden)


@pytest.fixture(scope="session")
def llava_hf(golden, none, tmp_path_factory):
    """A folder as llava-hf's: transformers' own model, with a tokenizer that has <image> and <pad>."""
    folder = tmp_path_factory.mktemp("hf")
    settings = none.config
    config = LlavaConfig(
        text_config=settings.text_config.to_dict(),
        vision_config=settings.vision_config.to_dict(),
        image_token_index=settings.image_token_id,
        pad_token_id=settings.pad_token_id,
    )
    llava = LlavaForConditionalGeneration(config).eval()
    llava.load_state_dict(none.state_dict())
    llava.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(golden / "base")
    add_special_tokens(tokenizer)
    tokenizer.save_pretrained(folder)
    shutil.copy(golden / "clip/preprocessor_config.json", folder)
    return folder
