"""What the records of a mixture are read from. A new kind of source is a class of `Records` and its line in the two functions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from llava_sp.data.mixture import Source
from llava_sp.data.record_file import RecordFile


class Records(Protocol):
    """Records by index; goes to data workers by pickle.

    Attributes:
        path: the file, named in messages and hashed for the data's fingerprint.
        words, image_counts: [records], each one's size; for the order of samples, before any is read.
    """

    path: Path
    words: np.ndarray
    image_counts: np.ndarray

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The record, in LLaVA's form, before it is checked."""
        ...

    def image(self, name: str) -> Image.Image:
        """The image that a record of this source names, decoded, as RGB. Raises `BadSample`."""
        ...

    def look_at_image(self, name: str) -> None:
        """Raises `BadSample` unless the image is there and begins as one; nothing is decoded."""
        ...


def open_records(source: Source) -> Records:
    """Raises `ValueError` for a file that is missing or not what it should be."""
    return RecordFile(source.annotations, source.images)


def missing(source: Source) -> Iterator[tuple[str, Path]]:
    """(key of the mixture, path) of what is not there."""
    if not source.annotations.is_file():
        yield "annotations", source.annotations
    if not source.images.is_dir():
        yield "images", source.images
