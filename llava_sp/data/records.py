"""LLaVA annotation files: a JSON list of records, or one record per line (JSONL).

A file is read once to find where each record stands; records are then read from the file as they are needed. 665,000
records cost some 15 MB here, instead of the gigabytes of Python objects that every data worker would copy.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

WHITESPACE = re.compile(r"[ \t\n\r]*")
BLOCK = 1 << 22  # characters read at a time
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class BadSample(ValueError):
    """A sample that cannot be learned from; the message says why."""


@dataclass(frozen=True)
class Conversation:
    """One record: who said what, and which images the marks stand for."""

    id: str
    turns: list[dict[str, str]]  # {"role": "user" | "assistant" | "system", "content": text}
    images: list[str]  # paths below the image folder, in the order of the marks


def parse_record(record: dict[str, Any]) -> Conversation:
    """Check one LLaVA record: `{"id", "image": path or list of paths (optional), "conversations": [{"from", "value"}]}`.

    Raises:
        BadSample: a part is missing or of another type, or a speaker is unknown.
    """
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise BadSample(f"`conversations` is {_short(turns)}; a list of turns is needed")
    parsed = []
    for position, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise BadSample(f'turn {position} is {_short(turn)}; {{"from": ..., "value": text}} is needed')
        if turn.get("from") not in ROLES:
            raise BadSample(f"turn {position} is from {turn.get('from')!r}; use {', '.join(ROLES)}")
        parsed.append({"role": ROLES[turn["from"]], "content": turn["value"]})
    return Conversation(id=str(record.get("id", "")), turns=parsed, images=_image_names(record))


def _image_names(record: dict[str, Any]) -> list[str]:
    names = record.get("image")
    if names is None:
        return []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise BadSample(f"`image` is {_short(names)}; a path or a list of paths is needed")
    return names


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."


class RecordFile:
    """The records of one annotation file, by index; `words` and `images` hold each one's size.

    Raises:
        ValueError: the file is missing, empty, cut off, not JSON, or no list of objects (file, line and column are named).
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"there is no annotation file {self.path}")
        self._stamp = self._file_stamp()
        starts, ends, words, images = [], [], [], []
        for start, end, record in _scan(self.path):
            starts.append(start)
            ends.append(end)
            size = _size(record)
            words.append(size[0])
            images.append(size[1])
        if not starts:
            raise ValueError(
                f"{self.path} holds no records; a JSON list of LLaVA records, or one record per line, is needed"
            )
        self._starts, self._ends = np.array(starts, dtype=np.int64), np.array(ends, dtype=np.int64)
        self.words, self.images = np.array(words, dtype=np.int32), np.array(images, dtype=np.int32)
        self._handle: tuple[int, Any] | None = None  # (process id, open file): a forked worker opens its own

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Record `index` as it stands in the file. `ValueError` if the file was changed since it was opened."""
        if self._handle is None or self._handle[0] != os.getpid():
            self._handle = (os.getpid(), self.path.open("rb"))
            if self._file_stamp() != self._stamp:
                raise ValueError(f"{self.path} was changed while it was in use; start again")
        file = self._handle[1]
        file.seek(int(self._starts[index]))
        return json.loads(file.read(int(self._ends[index] - self._starts[index])))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}

    def _file_stamp(self) -> tuple[int, int]:
        status = self.path.stat()
        return status.st_size, status.st_mtime_ns


def _size(record: dict[str, Any]) -> tuple[int, int]:
    """Words of all turns, and images; a record that turns out to be bad later has whatever can be counted."""
    turns = record.get("conversations")
    texts = [turn.get("value") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    words = sum(len(text.split()) for text in texts if isinstance(text, str))
    images = record.get("image")
    return words, len(images) if isinstance(images, list) else int(images is not None)


def _scan(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """`(first byte, byte after the last, record)` of each record."""
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not head:
        if path.stat().st_size <= 4096:
            raise ValueError(f"{path} is empty; a JSON list of LLaVA records, or one record per line, is needed")
        raise ValueError(f"{path} begins with 4096 blank characters; this is no annotation file")
    try:
        yield from _scan_list(path) if head.startswith(b"[") else _scan_lines(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def _scan_lines(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if text.strip():
                try:
                    record = json.loads(text)
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"{path}, line {number}: not a JSON record ({error.msg}, column {error.colno}); the file must be "
                        "one JSON list of records, or hold one record per line"
                    ) from error
                yield (
                    start + len(line) - len(line.lstrip(b"\xef\xbb\xbf")),
                    start + len(line),
                    _checked(record, path, f"line {number}"),
                )
            start += len(line)


def _scan_list(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    text = _Text(path)
    text.expect("[")
    if text.next_character() == "]":
        text.expect("]")
    else:
        for index in range(1 << 62):
            start, record = text.value(index)
            yield start, text.byte, _checked(record, path, f"record {index}")
            if text.next_character() != ",":
                break
            text.expect(",")
        text.expect("]")
    if text.next_character():
        raise text.error("more text after the end of the list")


def _checked(record: Any, path: Path, place: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise ValueError(f"{path}, {place}: {_short(record)} is no record; an object with `conversations` is needed")
    return record


class _Text:
    """A JSON file read block by block. `byte`, `line` and `column` are the place in the file of what comes next."""

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
        """Go on to `end` in `text`."""
        done = self.text[self.place : end]
        self.place = end
        self.byte += len(done) if done.isascii() else len(done.encode())
        lines = done.count("\n")
        self.line += lines
        self.column = len(done) - done.rfind("\n") if lines else self.column + len(done)

    def next_character(self) -> str:
        """The next character that is no white space, "" at the end of the file."""
        while True:
            self.skip(WHITESPACE.match(self.text, self.place).end())
            if self.place < len(self.text) or self.ended:
                return self.text[self.place : self.place + 1]
            self.read()

    def expect(self, character: str) -> None:
        found = self.next_character()
        if found != character:
            raise self.error(f"expected {character!r}, found {found!r}" if found else "the file is cut off here")
        self.skip(self.place + 1)

    def value(self, index: int) -> tuple[int, Any]:
        """`(first byte, value)` of the value that comes next, record `index`."""
        self.next_character()
        start = self.byte
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.place)
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
