"""Checkpoints of all six formats: opened, with their processor, and asked one question."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from llava_sp import LlavaSPForCausalLM, LlavaSPProcessor
from llava_sp.checkpoints.inspect import main as inspect
from tests.checkpoints.kinds import NAMES, Kind, build
from tests.hostile.judge import Rules, anything, optional_settings, settings, weights
from tests.hostile.surfaces.base import GOLDEN, Answer, Surface, through_command

QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
BASES = {"LANGUAGE_MODEL": GOLDEN / "base", "VISION_TOWER": GOLDEN / "clip"}  # inspect's words for what it needs
OURS = ("llava_sp_adapter", "llava_sp")
# Words and pixels: a tokenizer, a chat template and the image settings are as good with other ones.
PROCESSOR: Rules = [
    ("tokenizer.model", anything),
    ("chat_template.jinja", anything),
    ("tokenizer*.json", settings),
    ("preprocessor_config.json", settings),
    ("generation_config.json", optional_settings),
]
OTHERS: Rules = [
    ("*config.json", optional_settings),
    ("*.bin", anything),
    ("*.safetensors", weights),
]
RULES: dict[str, Rules] = {
    "llava_sp_adapter": PROCESSOR,  # all else is recorded twice, or as a hash
    "llava_sp": [
        *PROCESSOR,
        ("config.json:text_config*", optional_settings),
        ("config.json:vision_config*", optional_settings),
        ("config.json", settings),
        ("*.safetensors", weights),
    ],
}


class CheckpointSurface(Surface):
    """Result: a digest of all weights, ids of a question, the last logits, and three tokens by the checkpoint's own
    generation settings."""

    weight = 2.0

    def __init__(self, kind: str):
        self.name, self.kind = f"checkpoint.{kind}", kind
        self.rules = RULES.get(kind, [("*token*.json", anything), *PROCESSOR, *OTHERS])
        self.keywords: dict[str, Path] = {}

    def build(self, folder: Path) -> None:
        kind = _kinds(folder.parents[1])[self.kind]
        self.keywords = kind.keywords
        shutil.copytree(kind.folder, folder, dirs_exist_ok=True)

    def act(self, folder: Path, words: Sequence[str]) -> Answer:
        check, lines = None, _lines(folder, self.keywords)
        if self.kind in OURS:
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                check = inspect([str(folder), "--json"])
            lines = json.loads(out.getvalue())["call"] if check == 0 else lines
        status, result = through_command(lambda: _ask("\n".join(lines)))
        return status, result, check


def _lines(folder: Path, keywords: dict[str, Path]) -> list[str]:
    """The lines of Python that open model and processor."""
    words = "".join(f", {keyword}={str(base)!r}" for keyword, base in keywords.items())
    return [
        f"model = LlavaSPForCausalLM.from_pretrained({str(folder)!r}{words})",
        f"processor = LlavaSPProcessor.from_pretrained({str(folder)!r}{words})",
    ]


@torch.no_grad()
def _ask(lines: str) -> list:
    for word, base in BASES.items():
        lines = lines.replace(f'"{word}"', repr(str(base)))
    scope: dict[str, Any] = {"LlavaSPForCausalLM": LlavaSPForCausalLM, "LlavaSPProcessor": LlavaSPProcessor}
    exec(lines, scope)
    model, processor = scope["model"].eval(), scope["processor"]
    text = processor.apply_chat_template(QUESTION, add_generation_prompt=True)
    image = Image.open(GOLDEN / "samples" / "images" / "wide.png")
    inputs = processor(text=text, images=[image], return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    logits = model(**inputs).logits[0, -1].double().tolist()
    answer = model.generate(**inputs, max_new_tokens=3)[0].tolist()
    return [_digest(model), ids, logits, answer]


def _digest(model: torch.nn.Module) -> str:
    """One weight among many moves the logits less than another kernel does."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@cache
def _kinds(root: Path) -> dict[str, Kind]:
    place = root / "kinds"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    return build(GOLDEN, place)


SURFACES = [CheckpointSurface(name) for name in NAMES]
