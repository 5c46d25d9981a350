"""A digest of a run's training data, to notice on resuming that files of the same names have different content.

Annotation files are hashed (about 2 seconds per GiB); of up to `IMAGES` images, spread evenly, the sizes are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llava_sp.common.files import examples, sha256
from llava_sp.data.annotations import BadSample, images_of
from llava_sp.data.dataset import ConversationDataset
from llava_sp.data.images import image_path
from llava_sp.data.mixture import Source
from llava_sp.data.sources import Records

IMAGES = 10_000
FINGERPRINT = {
    "annotations": [{"path": str, "sha256": str, "weight": float}],
    "images": {str: (int, None)},
}


def fingerprint(dataset: ConversationDataset) -> dict[str, Any]:
    """Has the schema `FINGERPRINT`; the size of a missing image is None."""
    pairs = list(zip(dataset.sources, dataset.files, strict=True))
    return {
        "annotations": [
            {"path": str(file.path), "sha256": sha256(file.path), "weight": source.weight} for source, file in pairs
        ],
        "images": {str(path): _size(path) for path in _some_images(pairs)},
    }


def changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences between two fingerprints, as text; the folders of the files are ignored."""
    lines = []
    if len(was["annotations"]) != len(now["annotations"]):
        lines.append(f"{len(now['annotations'])} annotation files; there were {len(was['annotations'])}")
    for before, after in zip(was["annotations"], now["annotations"]):
        if before["sha256"] != after["sha256"]:
            lines.append(f"{after['path']} has different content")
        if before["weight"] != after["weight"]:
            lines.append(f"{after['path']} has the weight {after['weight']}; it was {before['weight']}")
    if not lines:  # else other images are sampled
        sizes = zip(was["images"].values(), now["images"].items())
        other = [f"{path} ({before} bytes, now {size})" for before, (path, size) in sizes if before != size]
        if other:
            lines.append(f"{len(other):,} of {len(now['images']):,} checked images changed: {examples(other)}")
    return lines


def _some_images(pairs: list[tuple[Source, Records]]) -> Iterator[Path]:
    """Up to `IMAGES` images (more only if records have several), spread evenly over the records with images."""
    places = [(pair, record) for pair in pairs for record in np.flatnonzero(pair[1].image_counts).tolist()]
    for place in np.unique(np.linspace(0, len(places) - 1, min(IMAGES, len(places))).astype(int)):
        (source, file), record = places[place]
        for name in images_of(file[record]):
            try:
                yield image_path(source.images, name)
            except (BadSample, TypeError):  # reported when it is loaded
                continue


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except (OSError, ValueError):
        return None
