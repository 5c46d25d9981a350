"""Patch features of a run's images on disk, which it trains from instead of the images (`precompute_features: FOLDER`).

FOLDER/features.json              what they were made of, and how many images there are in how many shards
FOLDER/features-00000.safetensors the images of shard 0: one tensor [N, C] for each, and the CRC-32 of its bytes

`python -m llava_sp.data.precompute` writes them. They are what the vision tower gives, before the projector.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llava_sp.checkpoints.reading.fingerprint import weights_fingerprint
from llava_sp.common.files import parse_json, read_json
from llava_sp.common.schema import Check, expect, whole
from llava_sp.config.arguments import Run
from llava_sp.data.annotations import BadSample
from llava_sp.data.dataset import ConversationDataset
from llava_sp.data.fingerprint import FINGERPRINT, changes, fingerprint
from llava_sp.model.configuration_llava_sp import LlavaSPConfig

MANIFEST = "features.json"
MADE_OF = {
    "vision_tower": str,
    "vision_feature_layer": (int, [int]),
    "image_aspect_ratio": str,
    "image_settings": str,
    "number_format": str,
    "shape": [whole(1)],  # patches, width
    "data": FINGERPRINT,
}
FEATURES = {
    "made_of": MADE_OF,
    "images": whole(1),
    "images_per_shard": whole(1),
}
ADVICE = "python -m llava_sp.data.precompute with the run's --config writes them"


def made_of(dataset: ConversationDataset, run: Run, config: LlavaSPConfig) -> dict[str, Any]:
    """What the features of a run's images depend on. Reads the annotation files and the tower's headers."""
    settings = dataset.processor.image_processor.to_json_string()
    return {
        "vision_tower": weights_fingerprint(str(run.model.vision_tower)),
        "vision_feature_layer": config.vision_feature_layer,
        "image_aspect_ratio": dataset.processor.image_aspect_ratio,
        "image_settings": hashlib.sha256(settings.encode()).hexdigest()[:16],
        "number_format": "bfloat16" if run.train.bf16 else "float32",
        "shape": [config.num_patch_tokens, config.vision_width],
        "data": fingerprint(dataset),
    }


def shard_name(number: int) -> str:
    return f"features-{number:05}.safetensors"


def key_of(source: int, name: str) -> str:
    """The name of an image's tensor: its source's place in the mixture, and the name in its records."""
    return f"{source}/{name}"


class PatchFeatures:
    """The features of a folder, by image.

    Args:
        folder: what `precompute` wrote.
        wanted: `made_of` the run.

    Raises:
        ValueError: the folder is not such a folder, holds features of something else (each difference is named), or lacks a
            shard, or has a damaged one.
    """

    def __init__(self, folder: Path, wanted: dict[str, Any]):
        self.folder = folder
        found = read_manifest(folder, wanted)
        self.shape = wanted["shape"]
        self.dtype = getattr(torch, wanted["number_format"])
        self._places: dict[str, tuple[int, int]] = {}  # of each image: shard, CRC-32
        for number in range(-(-found["images"] // found["images_per_shard"])):
            sums = read_sums(folder / shard_name(number))
            self._places |= {key: (number, value) for key, value in sums.items()}

    def read(self, source: int, names: Sequence[str]) -> Tensor:
        """[images, N, C]; [0, N, C] without images. Raises `BadSample` for an image that has none, `ValueError` for damage."""
        features = torch.empty(len(names), *self.shape, dtype=self.dtype)
        for place, name in enumerate(names):
            key = key_of(source, name)
            if key not in self._places:
                raise BadSample(f"image {name!r} has no features in {self.folder}: it was bad when they were made")
            number, recorded = self._places[key]
            file = self.folder / shard_name(number)
            try:
                with safe_open(file, "pt") as shard:
                    stored = shard.get_tensor(key)
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} cannot be read: {error}") from error
            if (list(stored.shape), stored.dtype, checksum(stored)) != (self.shape, self.dtype, recorded):
                raise ValueError(
                    f"{file} is damaged: {key} is not what was written; delete it, and run precompute again"
                )
            features[place] = stored
        return features


def read_manifest(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The content of features.json. Raises `ValueError` if it is missing, or of another tower, layer, image setting or data."""
    file = folder / MANIFEST
    if not file.is_file():
        raise ValueError(f"precompute_features = {folder} holds no {MANIFEST}: {ADVICE}")
    found = read_json(file, FEATURES)
    was = found["made_of"]
    lines = [f"{key} is {now}, not {was[key]}" for key, now in wanted.items() if key != "data" and now != was[key]]
    lines += changes(was["data"], wanted["data"])
    if lines:
        raise ValueError(
            f"precompute_features = {folder} holds the features of another run; of this one {'; '.join(lines)}. Give it "
            f"another folder: {ADVICE}"
        )
    return found


def read_sums(file: Path) -> dict[str, int]:
    """The CRC-32 of each image of a shard. Raises `ValueError` if it is missing or cut off, or its header is damaged."""
    try:
        with safe_open(file, "pt") as shard:
            sums, stored = parse_json((shard.metadata() or {}).get("crc32", "null")), sorted(shard.keys())
    except FileNotFoundError:
        raise ValueError(f"{file} is missing: {ADVICE}, and goes on where they end") from None
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is damaged or cut off: {error}; delete it, and run precompute again") from error
    recorded = Check(lambda sums: sorted(sums) == stored, "the CRC-32 of each of its tensors", {str: int})
    return expect({"crc32": sums}, {"crc32": recorded}, file)["crc32"]


def checksum(features: Tensor) -> int:
    return zlib.crc32(features.contiguous().view(torch.uint8).numpy().data)
