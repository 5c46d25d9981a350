"""LLaVA annotation files by index: a JSON list of records, or one record per line (JSONL).

A file is read once to index where each record begins; records are then read from the file when needed. 665,000
records take about 15 MB, instead of the gigabytes of Python objects that every data worker would copy.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava_sp.common.files import parse_json, parse_line
from llava_sp.common.schema import expect
from llava_sp.data.annotations import images_of
from llava_sp.data.images import load_image, look_at_image

WHITESPACE = re.compile(r"[ \t\n\r]*")
BLOCK = 1 << 22  # characters read at a time


class RecordFile:
    """The records of one annotation file, by index, and the folder of their images; see `sources.Records`.

    Raises:
        ValueError: the file is missing, empty, cut off, not JSON, or not a list of objects (file, line and column are named).
    """

    def __init__(self, path: str | os.PathLike, image_folder: str | os.PathLike):
        self.path, self.image_folder = Path(path), Path(image_folder)
        if not self.path.is_file():
            raise ValueError(f"there is no annotation file {self.path}")
        self._stamp = self._file_stamp()
        rows = [(start, end, *_size(record)) for start, end, record in _scan(self.path)]
        if not rows:
            raise ValueError(f"{self.path} holds no records; give a JSON list of LLaVA records, or one record per line")
        starts, ends, words, images = np.array(rows, dtype=np.int64).T
        self._starts, self._ends = np.ascontiguousarray(starts), np.ascontiguousarray(ends)
        self.words, self.image_counts = words.astype(np.int32), images.astype(np.int32)
        self._handle: tuple[int, Any] | None = None  # (process id, open file): a forked worker opens its own

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Record `index` as it is in the file. Raises `ValueError` if the file was changed since it was opened."""
        if self._handle is None or self._handle[0] != os.getpid():
            self._handle = (os.getpid(), self.path.open("rb"))
            if self._file_stamp() != self._stamp:
                raise ValueError(f"{self.path} was changed while it was in use; restart the command")
        file = self._handle[1]
        file.seek(int(self._starts[index]))
        return json.loads(file.read(int(self._ends[index] - self._starts[index])))

    def image(self, name: str) -> Image.Image:
        """The image that a record names. Raises `BadSample`."""
        return load_image(self.image_folder, name)

    def look_at_image(self, name: str) -> None:
        """Raises `BadSample` unless the image is there and begins as one."""
        look_at_image(self.image_folder, name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}

    def _file_stamp(self) -> tuple[int, int]:
        status = self.path.stat()
        return status.st_size, status.st_mtime_ns


def _size(record: dict[str, Any]) -> tuple[int, int]:
    """Words of all turns, and images; for a malformed record, what can be counted."""
    turns = record.get("conversations")
    texts = [turn.get("value") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    words = sum(len(text.split()) for text in texts if isinstance(text, str))
    return words, len(images_of(record))


def _scan(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """`(first byte, byte after the last, record)` of each record."""
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    try:
        yield from _scan_list(path) if head.startswith(b"[") else _scan_lines(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def _scan_lines(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            end += len(line)
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            text = line.decode()
            if text.strip():
                yield end - len(line), end, parse_line(text, f"{path}, line {number}")


def _scan_list(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    text = _Text(path)
    text.take("[")
    index, last = 0, text.take("]") if text.next_character() == "]" else ","
    while last == ",":
        start, record = text.value(index)
        yield start, text.byte, expect(record, dict, f"{path}, record {index}")
        index, last = index + 1, text.take(",]")
    if text.next_character():
        raise text.error("more text after the end of the list")


class _Text:
    """A JSON file read block by block. `byte`, `line` and `column` locate the next character."""

    def __init__(self, path: Path):
        self.path = path
        self.file = path.open(encoding="utf-8", newline="")
        self.text, self.place, self.ended = "", 0, False
        self.byte, self.line, self.column = 0, 1, 1
        self.decoder = json.JSONDecoder()
        self.read()
        if self.text.startswith("\ufeff"):
            self.skip(1)

    def read(self) -> None:
        rest = self.text[self.place :]
        block = self.file.read(max(BLOCK, len(rest)))  # doubling keeps a huge record from costing quadratic time
        self.ended = not block
        self.text, self.place = rest + block, 0
        if self.ended:
            self.file.close()

    def skip(self, end: int) -> None:
        """Advance to `end` in `text`."""
        done = self.text[self.place : end]
        self.place = end
        self.byte += len(done) if done.isascii() else len(done.encode())
        lines = done.count("\n")
        self.line += lines
        self.column = len(done) - done.rfind("\n") if lines else self.column + len(done)

    def next_character(self) -> str:
        """The next character that is not white space, "" at the end of the file."""
        while True:
            blank = WHITESPACE.match(self.text, self.place)
            self.skip(blank.end() if blank else self.place)
            if self.place < len(self.text) or self.ended:
                return self.text[self.place : self.place + 1]
            self.read()

    def take(self, characters: str) -> str:
        """The next character, which must be one of `characters`."""
        found = self.next_character()
        if not found or found not in characters:
            expected = " or ".join(map(repr, characters))
            raise self.error(f"expected {expected}, found {found!r}" if found else "the file is cut off here")
        self.skip(self.place + 1)
        return found

    def value(self, index: int) -> tuple[int, Any]:
        """`(first byte, value)` of the next value, record `index`."""
        self.next_character()
        start = self.byte
        while True:
            try:
                value, end = parse_json(self.text, lambda text: self.decoder.raw_decode(text, self.place))
            except json.JSONDecodeError as error:
                if not self.ended:
                    self.read()
                    continue
                cut = error.pos >= len(self.text.rstrip()) or error.msg.startswith("Unterminated")
                self.skip(min(error.pos, len(self.text)))
                what = "cut off: the file ends inside it" if cut else f"not JSON: {error.msg}"
                raise self.error(f"record {index} is {what}") from error
            self.skip(end)
            return start, value

    def error(self, what: str) -> ValueError:
        return ValueError(f"{self.path}, line {self.line}, column {self.column}: {what}")
