"""Command lines of every command, in a folder with a bit of everything. All paths in them are relative."""

from __future__ import annotations

import hashlib
import importlib
import math
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from llava_sp.eval.run.registry import load_benchmark
from tests.checkpoints.kinds import build
from tests.hostile.judge import LARGEST, Spoilt
from tests.hostile.mutations import WORDS, Mutation
from tests.hostile.surfaces.base import GOLDEN, Answer, Surface, plain
from tests.hostile.surfaces.evaluation import ANSWERS, recordings, run, write_lines, write_recording
from tests.hostile.surfaces.runs import write_run

LINES = {
    "generate": "--model full --image images/wide.png --prompt What? --max-new-tokens 3 --num-beams 1 --repetition-penalty 1.5 --seed 3",
    "data.check": "--config run.yaml --workers 0 --show 5 --output bad.jsonl --full --model_max_length 700",
    "data.preview": "--config run.yaml --index 1 --output preview --image_aspect_ratio pad",
    "data.precompute": "--config run.yaml --precompute_features features --workers 0 --batch-size 2 --images-per-shard 2",
    "checkpoints.inspect": "adapter --json",
    "checkpoints.convert": "--from full --to converted --format original --max-shard-size 5GB",
    "checkpoints.merge": "adapter --to merged --dtype float32 --max-shard-size 5GB --device cpu",
    "eval.vqav2": "--answers answers.jsonl --data data --output scored --split val --protocol llava15 --seed 0",
    "eval.compare": "a b --samples 50 --seed 1 --show 2 --output compared.json",
    "eval": "--only vqav2 --data bench --model full --output all --limit 1 --batch-size 1 --max-new-tokens 1",
    "train": "--config run.yaml --max_steps 1 --learning_rate 1e-3 --lora_r 4 --seed 7 --output_dir out",
    "shapes.make": "--output shapes --seed 1 --captions 2 --conversations 2 --questions 3",
}
# Options whose number may be zero, and those whose number may be as large as one likes: that takes long, or runs to the end.
ZERO = ("--seed", "--workers", "--show", "--index", "--temperature", "--learning_rate")
LARGE = ("--seed", "--show", "--captions", "--conversations", "--questions", "--samples", "--max_steps", "--limit", "--batch-size",
         "--max-new-tokens", "--model_max_length")  # fmt: skip


class CommandSurface(Surface):
    """Result: a digest of the images and weights that were written."""

    seconds = 30.0
    weight = 0.5

    def __init__(self, name: str, line: str):
        self.command, self.name, self.words = name, f"command.{name}", line.split()
        self.is_check = name in ("data.check", "checkpoints.inspect")

    def build(self, folder: Path) -> None:
        shutil.copytree(_world(folder.parents[1]), folder, dirs_exist_ok=True)

    def act(self, folder: Path, words: Sequence[str]) -> Answer:
        if self.command == "eval.vqav2":
            main: Any = importlib.import_module("llava_sp.eval.cli").main
            status = main(load_benchmark("vqav2"), list(words))
        else:
            module = {"train": "train.__main__", "eval": "eval.__main__"}.get(self.command, self.command)
            status = importlib.import_module(f"llava_sp.{module}").main(list(words))
        return status, _written(folder) if status == 0 else None, None

    def may_take_long(self, mutation: Mutation) -> bool:
        at = mutation.at[0]
        return (_number(WORDS.get(mutation.value, "")) or 0) > LARGEST and self.words[max(0, at - 1)] in LARGE

    def may_differ(self, spoilt: Spoilt, words: Sequence[str]) -> bool:
        """Options left out have their default, texts may be any; a number is replaced by a number in its range."""
        mutation = spoilt.mutation
        at, old, new = mutation.at[0], self.words[mutation.at[0]], WORDS.get(mutation.value, "")
        option = self.words[at - 1] if at else ""
        if mutation.action in ("drop", "double"):
            return True
        if mutation.action == "before":
            return option.startswith("--") and old.startswith("--") and option in ("--json",)
        if _number(old) is None or (
            new == "null" and self.command in ("train", "data.check", "data.preview", "data.precompute")
        ):
            return not old.startswith("--")
        value = _number(new)
        if value is None or not math.isfinite(value) or value < 0 or (value == 0 and option not in ZERO):
            return False
        return value <= LARGEST or option in LARGE


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _written(folder: Path) -> dict[str, str]:
    files = [f for f in folder.rglob("*") if f.suffix in (".safetensors", ".bin", ".jpg", ".png") and f.is_file()]
    new = [file for file in sorted(files) if not (folder.parent / "sound" / file.relative_to(folder)).is_file()]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in new}


@cache
def _world(root: Path) -> Path:
    """Checkpoints, data of a run, and of a benchmark, with which all of the command lines work."""
    place = root / "world"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    kinds = build(GOLDEN, _fresh(root / "kinds of commands"))
    shutil.copytree(kinds["llava_sp_adapter"].folder, place / "adapter")
    shutil.copytree(kinds["llava_sp"].folder, place / "full")
    write_run(place, max_steps=1, save_steps=1, logging_steps=1)
    keys = yaml.safe_load((place / "run.yaml").read_text())
    (place / "run.yaml").write_text(yaml.safe_dump(plain(keys)))
    recorded = recordings()["vqav2"]
    write_recording(place, recorded)
    lines = recorded["files"]["answers/merge.jsonl"]["data"]
    for output, answer in (("a", {}), ("b", {"text": "yes"})):
        write_lines(place / ANSWERS, [line | answer for line in lines])
        assert run("vqav2", place, "--output", place / output)[0] == 0
    write_lines(place / ANSWERS, lines)
    _write_benchmark(place)
    return place


def _write_benchmark(place: Path) -> None:
    """The questions of VQAv2 with an image for each."""
    shutil.copytree(place / "data", place / "bench" / "vqav2")
    images = place / "bench" / "vqav2" / "val2014"
    images.mkdir()
    questions = yaml.safe_load((place / "data" / "v2_OpenEnded_mscoco_val2014_questions.json").read_text())["questions"]
    for image in {question["image_id"] for question in questions}:
        shutil.copyfile(place / "images" / "square.png", images / f"COCO_val2014_{image:012d}.jpg")


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


SURFACES = [CommandSurface(name, line) for name, line in LINES.items()]
