"""Annotation records in LLaVA's format.

{"id": ..., "image": path or list of paths (optional), "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, ...]}

`images` is read like `image`. Other keys (id, model, source, ...) are metadata and ignored; one that names media, such
as `video` or `image_path`, makes the record bad, unless it is empty. In a record without images `<image>` is text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llava_sp.common.schema import Check, expect, is_utf8, one_of, some

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
TEXT = Check(is_utf8, "text, without half a surrogate pair", str)
PATH = Check(lambda path: path and is_utf8(path), "a path", str)
# The order of the turns is checked where they are rendered, the paths where they are opened.
RECORD = {
    "conversations": some({"from": one_of(*ROLES), "value": TEXT}),
    "image?": (None, PATH, [PATH]),
    "images?": (None, PATH, [PATH]),
}
_IMAGES = ("image", "images")
_MEDIA = re.compile(
    r"(?:(?P<image>image|img|picture|pic|photo|jpe?g|png|webp)|media|video|clip|mp4|webm|gif|audio|sound|speech|wav|mp3|flac|"
    r"frame|depth|point_?cloud)s?(?P<place>(?:_?(?:path|file|file_?name|name|url|uri|list|folder|dir|bytes|base64)s?)*)",
    re.IGNORECASE,
)


class BadSample(ValueError):
    """A sample that cannot be used for training; the message gives the reason."""


@dataclass(frozen=True)
class Conversation:
    """One record: its turns, and the images of its marks."""

    id: str
    turns: list[dict[str, str]]  # {"role": "user" | "assistant" | "system", "content": text}
    images: list[str]  # paths below the image folder, in the order of the marks


def parse_record(record: dict[str, Any]) -> Conversation:
    """The conversation of a record. Raises `BadSample` if the record does not fit `RECORD` or names media that are not used."""
    name = str(record.get("id", ""))
    try:
        expect(record, RECORD, f"id {name!r}")
    except ValueError as error:
        raise BadSample(str(error)) from None
    if unused := ", ".join(_unused_media(record)):
        raise BadSample(f"id {name!r}: {unused}: media that are not used (the key `image` names images)")
    turns = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in record["conversations"]]
    return Conversation(name, turns, images_of(record))


def images_of(record: dict[str, Any]) -> list[Any]:
    """The images that a record names, even if it is bad."""
    images: Any = next((record[key] for key in _IMAGES if record.get(key)), [])
    return images if isinstance(images, list) else [images]


def _unused_media(record: dict[str, Any]) -> Iterator[str]:
    """`key is value` of fields that name media besides the images used. Numbers and empty values do not count,
    nor does an `image_url` or `image_path` beside an `image`."""
    used = next((record[key] for key in _IMAGES if record.get(key)), None)
    turns = {f"conversations[{index}].": turn for index, turn in enumerate(record["conversations"])}
    for path, fields in {"": record, **turns}.items():
        for key, value in fields.items():
            media = _MEDIA.fullmatch(key.replace("-", "_"))
            about_used = value == used or (used and media and media["image"] and media["place"])
            if media and value and isinstance(value, (str, list, dict)) and not about_used:
                yield f"{path}{key} is {value!r:.60}"
