"""Checks on the records of official files, shared by the benchmarks: every error names file, record, field and value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from llava_sp.common.files import Line, examples

_KINDS = {int: "a whole number", float: "a number", str: "text", list: "a list", dict: "an object with fields"}


def expect(record: Any, fields: Mapping[str, type | tuple[type, ...]], where: str) -> None:
    """Raises ValueError unless `record` is an object that has all `fields`, each of its kind (True is no number)."""
    if not isinstance(record, dict):
        raise ValueError(f"{where} is {str(record)[:60]!r}, not an object with {', '.join(fields)}")
    absent = [key for key in fields if key not in record]
    if absent:
        raise ValueError(f"{where} has no {', '.join(absent)}; it has {examples(record, 12) or 'nothing'}")
    for key, kind in fields.items():
        value = record[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            kinds = " or ".join(_KINDS[k] for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise ValueError(f"{where}: {key} is {str(value)[:60]!r}, not {kinds}")


def expect_all(records: Any, fields: Mapping[str, type | tuple[type, ...]], file: Path, noun: str = "question") -> None:
    """`expect` for each record of a list that must hold at least one."""
    if not isinstance(records, list):
        raise ValueError(f"{file} holds {type(records).__name__}, not a list of {noun}s")
    if not records:
        raise ValueError(f"{file} holds no {noun}s")
    for number, record in enumerate(records):
        expect(record, fields, place(file, noun, record, number))


def expect_once(records: Iterable[Any], file: Path, noun: str = "question id", key: str | None = None) -> None:
    """Raises ValueError, with count, examples and where the first one stands, if ids occur more than once.

    Args:
        records: the ids; with `key`, the records of the file that hold them.
    """
    records = list(records)
    ids = records if key is None else [record[key] for record in records]
    twice = [i for i, count in Counter(ids).items() if count > 1]
    if twice:
        where = [number for number, i in enumerate(ids) if i == twice[0]]
        first = [_number(records[number], number) for number in where[:2]]
        raise ValueError(
            f"{file}: {len(twice)} {noun}s occur more than once ({examples(twice)}); {twice[0]} is {' and '.join(first)}"
        )


def place(file: Path, noun: str, record: Any, number: int) -> str:
    """Where a record stands, for error messages: its line, or its number in a list."""
    return f"{file}, line {record.number}" if isinstance(record, Line) else f"{file}: {noun} {number} (counted from 0)"


def _number(record: Any, number: int) -> str:
    return f"line {record.number}" if isinstance(record, Line) else f"number {number} (counted from 0)"


def inside(folder: Path, name: str, where: str) -> Path:
    """The file `name` below `folder`. Raises ValueError if the name leads out of it."""
    parts = PurePosixPath(name).parts + PureWindowsPath(name).parts
    if ".." in parts or PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor or not name:
        raise ValueError(f"{where}: image {name!r} is outside {folder}")
    return folder / name


def find(data: Path, *names: str) -> list[Path]:
    """Files of these names in `data` itself or one folder below, in the order of the names."""
    return [path for name in names for path in [data / name, *sorted(data.glob(f"*/{name}"))] if path.is_file()]


def find_one(data: Path, *names: str, what: str) -> Path:
    """The first file that `find` gives. Raises ValueError naming `what` it would be and all names looked for."""
    found = find(data, *names)
    if not found:
        raise ValueError(f"{data} has no {what}: looked for {' or '.join(names)}")
    return found[0]


def first_folder(places: Sequence[Path]) -> Path:
    """The first of these that is a folder; the first of all where none is (its absence is then said)."""
    return next((place for place in places if place.is_dir()), places[0])


def compare_ids(found: Iterable[int | str], wanted: Iterable[int | str], noun: str = "answer") -> str:
    """What is wrong with the ids in `found`, with counts and examples; empty if nothing is."""
    counts, wanted = Counter(iter(found)), set(wanted)

    def order(i: int | str) -> tuple[bool, int | str]:
        return isinstance(i, str), i

    problems = [
        (f"questions have more than one {noun}", [i for i, count in counts.items() if count > 1]),
        (f"{noun}s are for questions that are not in the file", [i for i in counts if i not in wanted]),
        (f"questions have no {noun}", sorted((i for i in wanted if i not in counts), key=order)),
    ]
    return ", ".join(f"{len(ids)} {trouble} ({examples(ids)})" for trouble, ids in problems if ids)
