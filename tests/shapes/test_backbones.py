"""The shipped backbones: real formats, small, and able to do what the quickstart rests on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPModel,
    LlamaForCausalLM,
)

from llava_sp.shapes import tiny_clip, tiny_llama
from llava_sp.shapes.language import SUFFIX, caption, description, questions
from llava_sp.shapes.train_backbones import DEFAULT_OUTPUT
from llava_sp.shapes.world import draw, sample_scene

CLIP, LLAMA = DEFAULT_OUTPUT / "clip", DEFAULT_OUTPUT / "llama"


def test_small():
    files = [path for path in DEFAULT_OUTPUT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 5 * 2**20
    assert (DEFAULT_OUTPUT / "README.md").is_file()


def test_formats():
    clip, llama = AutoModel.from_pretrained(CLIP), AutoModelForCausalLM.from_pretrained(LLAMA)
    assert isinstance(clip, CLIPModel) and isinstance(llama, LlamaForCausalLM)
    vision = AutoConfig.from_pretrained(CLIP).vision_config
    assert vision.image_size // vision.patch_size in (12, 16, 24) and vision.image_size % vision.patch_size == 0
    tokenizer = AutoTokenizer.from_pretrained(LLAMA)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2) and llama.config.vocab_size == len(tokenizer)
    assert not (LLAMA / "tokenizer.json").exists() and (LLAMA / "tokenizer.model").is_file()


def test_tokenizer_behaves_like_llamas():
    tokenizer = AutoTokenizer.from_pretrained(LLAMA)
    for text in ("Where is the red circle?", "naïve café 北京 \n\t!", "a  b   c"):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("red\n7", add_special_tokens=False).input_ids) == [
        "▁red",
        "<0x0A>",
        "7",
    ]


def test_image_processor_gives_the_pixels_of_training():
    image = draw(sample_scene(np.random.default_rng(0), "val"))
    processor = CLIPImageProcessorPil.from_pretrained(CLIP)
    pixels = processor([image], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, tiny_clip.to_pixels([image]), atol=1e-5, rtol=0)


def test_clip_matches_held_out_images_and_captions():
    rng = np.random.default_rng(1)
    scenes = [sample_scene(rng, "val") for _ in range(40)]
    model = CLIPModel.from_pretrained(CLIP, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(CLIP)
    texts = tokenizer([caption(s) for s in scenes], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(pixel_values=tiny_clip.to_pixels([draw(s) for s in scenes]), **texts).logits_per_image
    assert (logits.argmax(1) == torch.arange(len(scenes))).float().mean() > 0.8


@pytest.mark.parametrize(("family", "at_least"), [("existence", 0.7), ("count", 0.6), ("digit", 0.75)])
def test_llama_answers_about_a_described_scene(family, at_least):
    rng = np.random.default_rng(2)
    model = LlamaForCausalLM.from_pretrained(LLAMA, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(LLAMA)
    right = []
    while len(right) < 30:
        scene = sample_scene(rng, "val")
        found = questions(scene, family)
        for question in found and [found[rng.integers(len(found))]]:
            prompt = f"{tiny_llama.SYSTEM} USER: {description(scene, rng)}\n{question.text}{SUFFIX} ASSISTANT:"
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            with torch.no_grad():
                out = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
            right.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip() == question.answer)
    assert np.mean(right) >= at_least


@pytest.mark.slow
def test_training_command_writes_what_is_shipped(tmp_path):
    from llava_sp.shapes.train_backbones import main

    assert main(["--output", str(tmp_path), "--max-steps", "4", "--threads", "1"]) == 0
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {
        str(path.relative_to(DEFAULT_OUTPUT)) for path in Path(DEFAULT_OUTPUT).rglob("*") if path.is_file()
    }
