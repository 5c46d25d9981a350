"""Opening the image files of records, with its own message for each kind of failure.

Limits, checked before anything is decoded: `MAX_PIXELS` pixels, `MAX_SIDE` pixels a side (padding to a square multiplies
a long image), sides in a ratio of at most `MAX_RATIO`.
"""

from __future__ import annotations

import errno
import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from llava_sp.common.files import leads_outside
from llava_sp.data.annotations import BadSample

MAX_PIXELS = 89_478_485  # Pillow's own limit: a quarter of a GiB as RGB
MAX_SIDE = 16_384
MAX_RATIO = 200

# Errors of the storage or of this process, which say nothing about a file.
_NOT_THE_FILE = frozenset(
    (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENODEV, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
)  # fmt: skip

# Raised by Pillow's decoders on broken files.
_BROKEN = (
    OSError, SyntaxError, RuntimeError, ValueError, EOFError, LookupError, TypeError, OverflowError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip


def image_path(folder: str | os.PathLike, name: str) -> Path:
    """Where the image `name` of a record is: always below `folder`.

    A name may not be absolute nor hold `..`. Symbolic links in the folder are followed: they are the owner's layout
    (LLaVA's `playground/data` and the hub's cache are made of them), records cannot create them.

    Raises:
        BadSample: the name is outside the folder.
    """
    if leads_outside(name):
        raise BadSample(f"image {name!r} is outside the image folder {folder}; use a path relative to it, without ..")
    return Path(folder, name)


def load_image(folder: str | os.PathLike, name: str) -> Image.Image:
    """The image `name` in `folder`, decoded, as RGB (converted as the original does; no EXIF rotation).

    Raises:
        BadSample: the file is outside the folder, missing, empty, not an image, too large, or damaged.
        OSError: the folder itself is gone or empty, as when its file system is no longer mounted, or cannot be read.
    """
    return _from_folder(folder, name, _as_rgb)


def look_at_image(folder: str | os.PathLike, name: str) -> None:
    """Raises as `load_image` does, but not for damage beyond the header, which only decoding finds."""
    _from_folder(folder, name, lambda image: image)


def _from_folder(folder: str | os.PathLike, name: str, use: Callable[[Image.Image], Image.Image]) -> Image.Image:
    path = image_path(folder, name)
    try:
        return _read(path, f"image {path}", use)
    except BadSample:
        if not path.exists() and not _holds_files(folder):
            raise OSError(
                f"the image folder {folder} is gone or empty (is its file system mounted?); no sample is to blame. "
                "Make it available; the same command goes on"
            ) from None
        raise


def _holds_files(folder: str | os.PathLike) -> bool:
    try:
        return any(True for _ in Path(folder).iterdir())
    except OSError:
        return False


def decode_image(source: Path | bytes, what: str) -> Image.Image:
    """An image file, or the bytes of one, as RGB. Raises `BadSample` like `load_image`, naming `what`."""
    return _read(source, what, _as_rgb)


def _as_rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


def _read(source: Path | bytes, what: str, use: Callable[[Image.Image], Image.Image]) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limits below are stricter
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                width, height = image.size
                for value, limit, unit in (
                    (width * height, MAX_PIXELS, "pixels"),
                    (max(image.size), MAX_SIDE, "a side"),
                    (max(image.size), MAX_RATIO * min(image.size), f"a side ({MAX_RATIO} times the other)"),
                ):
                    if value > limit:
                        raise BadSample(f"{what} is {width} x {height}, {value:,}; the limit is {limit:,} {unit}")
                return use(image)
    except BadSample:
        raise
    except _BROKEN as error:
        if isinstance(error, OSError) and error.errno in _NOT_THE_FILE:
            advice = "the storage or this process fails, not the image; the same command goes on when that is mended"
            raise OSError(f"{what} cannot be read: {error.strerror} ({advice})") from error
        raise BadSample(f"{what} {_reason(source, error)}") from error


def _reason(source: Path | bytes, error: Exception) -> str:
    """Why an image cannot be decoded."""
    if isinstance(error, Image.DecompressionBombError):
        return f"is too large, the limit is {MAX_PIXELS:,} pixels: {error}"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be opened: {error.strerror}"
    content = source if isinstance(source, bytes) else source.read_bytes()
    if not content:
        return "is empty (0 bytes)"
    if isinstance(error, UnidentifiedImageError):
        return f"is not an image: its {len(content)} bytes begin with {content[:16]!r}"
    return f"is damaged or cut off ({len(content)} bytes): {error}"
