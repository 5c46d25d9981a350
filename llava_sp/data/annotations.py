"""Annotation records in LLaVA's format.

{"id": ..., "image": path or list of paths (optional), "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, ...]}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llava_sp.common.schema import Check, expect, one_of, some

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
PATH = Check(bool, "a path", str)
# The order of the turns is checked where they are rendered, the paths where they are opened.
RECORD = {
    "conversations": some({"from": one_of(*ROLES), "value": str}),
    "image?": (None, PATH, [PATH]),
}


class BadSample(ValueError):
    """A sample that cannot be used for training; the message gives the reason."""


@dataclass(frozen=True)
class Conversation:
    """One record: its turns, and the images of its marks."""

    id: str
    turns: list[dict[str, str]]  # {"role": "user" | "assistant" | "system", "content": text}
    images: list[str]  # paths below the image folder, in the order of the marks


def parse_record(record: dict[str, Any]) -> Conversation:
    """The conversation of a record. Raises `BadSample` if the record does not fit `RECORD`."""
    name = str(record.get("id", ""))
    try:
        expect(record, RECORD, f"id {name!r}")
    except ValueError as error:
        raise BadSample(str(error)) from None
    turns = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in record["conversations"]]
    images = record.get("image") or []
    return Conversation(name, turns, [images] if isinstance(images, str) else images)
