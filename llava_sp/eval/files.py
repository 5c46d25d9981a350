"""Reading with errors that name the file and the line; writing that is never seen half done."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import sys
from codecs import BOM_UTF8
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def read_bytes(path: Path) -> bytes:
    """Raises ValueError if there is no such file or nothing in it."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    content = path.read_bytes()
    if not content.removeprefix(BOM_UTF8).strip():
        raise ValueError(f"{path} is empty")
    return content


def decode(content: bytes, path: Path) -> str:
    """UTF-8, with or without a byte order mark. Raises ValueError naming the byte that is none."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None


def read_text(path: Path) -> str:
    return decode(read_bytes(path), path)


def read_json(path: Path) -> Any:
    """Raises ValueError if the file is missing, empty or cut off."""
    text = read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        ends_early = error.pos >= len(text.rstrip()) - 1 or error.msg.startswith("Unterminated string")
        cut = " (it ends in the middle: an interrupted download or copy?)" if ends_early else ""
        raise ValueError(
            f"{path} is not valid JSON: {error.msg}, line {error.lineno} column {error.colno}{cut}"
        ) from None


class Line(dict[str, Any]):
    """The JSON object on a line of a file; `number` is which line, counted from 1."""

    number: int


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """One JSON object per line; empty lines are passed over. Raises ValueError naming the line."""
    return parse_lines(read_text(path), path)


def parse_lines(text: str, path: Path) -> list[dict[str, Any]]:
    """`Line`s of a text that was read from `path`. Raises ValueError naming a line that is no JSON object."""
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            records.append(Line(parse_line(line, f"{path}, line {number}")))
            records[-1].number = number
    return records


def read_table(path: Path, delimiter: str) -> list[tuple[int, dict[str, str]]]:
    """The rows of a CSV or TSV file whose first line names the columns: `(line number, {column: text})`.

    Raises ValueError naming the line of a row that has too few or too many fields (a file that was cut off, or another
    delimiter), and if there is no row.
    """
    csv.field_size_limit(sys.maxsize)  # MMBench has whole pictures in a field
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    rows, columns = [], None
    start = 1
    try:
        for fields in reader:
            if columns is None:
                columns = fields
            elif fields and len(fields) != len(columns):
                raise ValueError(
                    f"{path}, line {start} has {len(fields)} fields, not {len(columns)} ({', '.join(columns)}): an "
                    "interrupted download or copy?"
                )
            elif fields:
                rows.append((start, dict(zip(columns, fields))))
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {start} is not a row of a table: {error} (is the file cut off?)") from None
    if not rows:
        raise ValueError(f"{path} has no rows below its header")
    return rows


def parse_line(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where} holds {type(record).__name__}, not an object with fields")
    return record


def write_atomic(path: Path, text: str) -> None:
    """Writes beside the target and renames, so that a reader (or a crash) sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))  # half a surrogate pair as JSON's own escape
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    write_atomic(path, "".join(json.dumps(record) + "\n" for record in records))


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def checkpoints_hint(folder: Path) -> str:
    """What to say of a run's folder that has no model (yet): its newest intermediate checkpoint, if there is one."""
    steps = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")}
    steps = {path: int(step) for path, step in steps.items() if step.isdigit()}
    return f"; the newest checkpoint of the unfinished run is {max(steps, key=steps.get)}" if steps else ""


def examples(values: Iterable[object], limit: int = 3) -> str:
    """`1, 2, 3, ...` for error messages."""
    shown = [str(value) for _, value in zip(range(limit + 1), values)]
    return ", ".join(shown[:limit]) + (", ..." if len(shown) > limit else "")
