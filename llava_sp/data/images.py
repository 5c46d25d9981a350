"""Opening the image files that records name: each way in which one can be bad has its own message.

Limits, checked before anything is decoded: `MAX_PIXELS` pixels, `MAX_SIDE` pixels a side (padding to a square multiplies
a long image), sides in a ratio of at most `MAX_RATIO`.
"""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from pathlib import Path, PurePosixPath, PureWindowsPath

from PIL import Image, UnidentifiedImageError

from llava_sp.data.records import BadSample

MAX_PIXELS = 89_478_485  # Pillow's own limit: a quarter of a GiB as RGB
MAX_SIDE = 16_384
MAX_RATIO = 200

# What Pillow's decoders raise on broken files.
_BROKEN = (
    OSError, SyntaxError, RuntimeError, ValueError, EOFError, LookupError, TypeError, OverflowError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip


def image_path(folder: str | os.PathLike, name: str) -> Path:
    """Where the image `name` of a record lies: always below `folder`.

    A name may not be absolute nor hold `..`. Symbolic links in the folder are followed: they are its owner's layout
    (LLaVA's `playground/data` and the hub's cache are made of them), a record cannot make one.

    Raises:
        BadSample: the name leads out of the folder.
    """
    parts = PurePosixPath(name).parts + PureWindowsPath(name).parts
    if ".." in parts or PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor or "\0" in name:
        raise BadSample(
            f"image {name!r} leads out of the image folder {folder}; name it relative to the folder, without .."
        )
    return Path(folder, name)


def load_image(folder: str | os.PathLike, name: str) -> Image.Image:
    """The image `name` in `folder`, decoded, as RGB (converted as the original does; no EXIF rotation).

    Raises:
        BadSample: the file is outside the folder, missing, empty, no image, gigantic, or damaged.
    """
    path = image_path(folder, name)
    try:
        size = path.stat().st_size
    except OSError as error:
        raise BadSample(f"image {path} cannot be opened: {error.strerror}") from error
    if path.is_dir():
        raise BadSample(f"image {path} is a folder")
    if size == 0:
        raise BadSample(f"image {path} is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is stricter
            with Image.open(path) as image:
                _check_size(path, image.size)
                return image.convert("RGB")
    except BadSample:
        raise
    except UnidentifiedImageError as error:
        raise BadSample(f"image {path} is not an image: its {size} bytes begin with {_head(path)!r}") from error
    except Image.DecompressionBombError as error:
        raise BadSample(f"image {path} is too large, the limit is {MAX_PIXELS:,} pixels: {error}") from error
    except _BROKEN as error:
        raise BadSample(f"image {path} is damaged or cut off ({size} bytes): {error}") from error


def _check_size(path: Path, size: tuple[int, int]) -> None:
    width, height = size
    what = f"image {path} is {width} x {height}"
    if width * height > MAX_PIXELS:
        raise BadSample(f"{what}, {width * height:,} pixels; the limit is {MAX_PIXELS:,}")
    if max(size) > MAX_SIDE:
        raise BadSample(f"{what}; the limit is {MAX_SIDE:,} a side")
    if max(size) > MAX_RATIO * min(size):
        raise BadSample(f"{what}; one side may be at most {MAX_RATIO} times the other")


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(16)
