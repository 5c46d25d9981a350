"""What a run learns from, in little: enough to notice on resuming that files of the same names hold something else now.

Annotation files are hashed whole (some 2 seconds a GiB); of up to `IMAGES` images, spread evenly, the sizes are kept.
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
    """As `FINGERPRINT` says; the size of an image that cannot be found is None."""
    pairs = list(zip(dataset.sources, dataset.files, strict=True))
    return {
        "annotations": [
            {"path": str(file.path), "sha256": sha256(file.path), "weight": source.weight} for source, file in pairs
        ],
        "images": {str(path): _size(path) for path in _some_images(pairs)},
    }


def changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In words, what differs between two fingerprints; the folders that files are in do not count."""
    lines = []
    if len(was["annotations"]) != len(now["annotations"]):
        lines.append(f"{len(now['annotations'])} annotation files; there were {len(was['annotations'])}")
    for before, after in zip(was["annotations"], now["annotations"]):
        if before["sha256"] != after["sha256"]:
            lines.append(f"{after['path']} has another content")
        if before["weight"] != after["weight"]:
            lines.append(f"{after['path']} has the weight {after['weight']}; it was {before['weight']}")
    if not lines:  # else other images are looked at
        sizes = zip(was["images"].values(), now["images"].items())
        other = [f"{path} ({before} bytes, now {size})" for before, (path, size) in sizes if before != size]
        if other:
            lines.append(f"{len(other):,} of {len(now['images']):,} images that were looked at: {examples(other)}")
    return lines


def _some_images(pairs: list[tuple[Source, Records]]) -> Iterator[Path]:
    """Up to `IMAGES` images (more only where records have several), spread evenly over the records that have some."""
    places = [(pair, record) for pair in pairs for record in np.flatnonzero(pair[1].image_counts).tolist()]
    for place in np.unique(np.linspace(0, len(places) - 1, min(IMAGES, len(places))).astype(int)):
        (source, file), record = places[place]
        for name in images_of(file[record]):
            try:
                yield image_path(source.images, name)
            except (BadSample, TypeError):  # it is reported when it is learned from
                continue


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except (OSError, ValueError):
        return None
