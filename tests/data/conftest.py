"""A processor on the golden backbones, a writer of annotation files, and a data set over them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil

from llava_sp.data.dataset import ConversationDataset
from llava_sp.data.mixture import load_mixture
from llava_sp.model.processing_llava_sp import LlavaSPProcessor, add_special_tokens


@pytest.fixture(scope="session")
def processor(golden) -> LlavaSPProcessor:
    """Golden tokenizer, 28 pixel images, 7 tokens each."""
    tokenizer = AutoTokenizer.from_pretrained(golden / "base")
    add_special_tokens(tokenizer)
    settings = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    return LlavaSPProcessor(CLIPImageProcessorPil(**settings), tokenizer, num_image_tokens=7)


def record(question: str, answer: str, image=None, **more) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "x", **({} if image is None else {"image": image}), "conversations": turns, **more}


@pytest.fixture
def world(tmp_path, processor):
    """`world(records, **options)` writes data.json beside an `images` folder with a.png and b.png."""
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (40, 20), (200, 30, 30)).save(images / "a.png")
    Image.new("RGB", (10, 30), (30, 30, 200)).save(images / "b.png")

    def make(records: list[dict], **options) -> ConversationDataset:
        path = tmp_path / "data.json"
        path.write_text(json.dumps(records), encoding="utf-8")
        sources = load_mixture([{"annotations": path, "images": images, "weight": options.pop("weight", 1)}])
        return ConversationDataset(sources, processor, **options)

    make.folder = tmp_path
    return make


@pytest.fixture(scope="session")
def make_record():
    return record


@pytest.fixture
def run_yaml(tmp_path, golden) -> Path:
    """A training YAML over the golden samples and backbones."""
    path = tmp_path / "run.yaml"
    path.write_text(
        f"language_model: {golden / 'base'}\nvision_tower: {golden / 'clip'}\ndata_path: {golden / 'samples' / 'data.json'}\n"
        f"image_folder: {golden / 'samples' / 'images'}\noutput_dir: {tmp_path / 'out'}\n"
    )
    return path
