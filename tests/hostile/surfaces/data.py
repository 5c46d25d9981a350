"""What is learned from: a mixture of a JSON and a JSONL file, with images; looked at by the check and by the data set."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from llava_sp.data.annotations import ROLES
from llava_sp.data.build import dataset_of_config
from llava_sp.data.check import main as check
from tests.hostile.judge import MISSING, Spoilt, anything, plausible
from tests.hostile.surfaces.base import GOLDEN, Answer, Surface, through_command

CONFIG = {
    "language_model": str(GOLDEN / "base"),
    "vision_tower": str(GOLDEN / "clip"),
    "spatial_width": 5,
    "mixture": "mixture.yaml",
    "bf16": False,
    "output_dir": "out",
}
MANY = 100  # samples: of more, each record is encoded once
OTHER_MEDIA = ("video", "videos", "images", "audio", "audios")


def samples() -> list[dict[str, Any]]:
    return json.loads((GOLDEN / "samples" / "data.json").read_text())


def write_samples(folder: Path) -> None:
    shutil.copytree(GOLDEN / "samples" / "images", folder / "images")
    for file in (folder / "images").glob("processed_*"):
        file.unlink()


def well_formed(spoilt: Spoilt) -> bool:
    """Other texts, other images, fewer records: all are LLaVA records still."""
    return isinstance(spoilt.after, list) and bool(spoilt.after) and all(map(_is_record, spoilt.after))


def _is_record(record: Any) -> bool:
    turns = record.get("conversations") if isinstance(record, dict) else None
    images = [] if not isinstance(record, dict) or record.get("image") is None else record["image"]
    images = [images] if isinstance(images, str) else images
    return (
        isinstance(turns, list)
        and all(isinstance(t, dict) and t.get("from") in ROLES and isinstance(t.get("value"), str) for t in turns)
        and isinstance(images, list)
        and all(isinstance(name, str) and name for name in images)
        and not any(record.get(key) for key in OTHER_MEDIA)
    )


def other_mixture(spoilt: Spoilt) -> bool:
    """Entries left out, other weights; and the image folder, which may be left out, as long as images are found."""
    if not isinstance(spoilt.after, list) or not spoilt.after:
        return False
    if len(spoilt.after) < len(spoilt.before):
        return True
    for path, old, new in spoilt.differences:
        if new is MISSING or (new is None and path[-1] == "images"):
            if path[-1] not in ("weight", "images"):
                return False
        elif not plausible(old, new):
            return False
    return True


class DataSurface(Surface):
    """Result: how many samples there are; ids and labels of each, and two figures of its pixels."""

    name = "data"
    weight = 4.0
    rules = (
        ("images/*", anything),
        ("*.json", well_formed),
        ("*.jsonl", well_formed),
        ("mixture.yaml", other_mixture),
    )

    def build(self, folder: Path) -> None:
        write_samples(folder)
        records = samples()
        (folder / "data.json").write_text(json.dumps(records, indent=1, ensure_ascii=False))
        lines = copy.deepcopy(records[1:])
        lines[2]["image"] = ["square.png"]
        (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines))
        entries = [
            {"annotations": "data.json", "images": "images", "weight": 1.5},
            {"annotations": "data.jsonl", "images": "images", "weight": 2.0},
        ]
        (folder / "mixture.yaml").write_text(yaml.safe_dump(entries))
        (folder / "run.yaml").write_text(yaml.safe_dump(CONFIG))

    def targets(self, folder: Path) -> list[str]:
        images = sorted(str(file.relative_to(folder)) for file in (folder / "images").iterdir())
        return [*images, *["mixture.yaml", "data.json", "data.jsonl"] * 3]

    def act(self, folder: Path, words: Sequence[str]) -> Answer:
        checked = check(["--config", "run.yaml", "--workers", "0", "--full"])
        status, result = through_command(_encode)
        return status, result, checked


def _encode() -> list[Any]:
    data = dataset_of_config("run.yaml")
    found: list[Any] = [len(data)]
    for sample in data if len(data) < MANY else data.distinct():
        pixels = sample.get("pixel_values")
        summary = [] if pixels is None else [float(pixels.double().sum()), float(pixels.double().std())]
        found.append([sample["input_ids"].tolist(), sample["labels"].tolist(), summary])
    return found


SURFACES = [DataSurface()]
