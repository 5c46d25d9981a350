"""Tables for an evaluation server as .xlsx files (openpyxl, of `pip install llava_sp[eval]`), and what pandas makes of cells."""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from zipfile import BadZipFile

from llava_sp.common.files import examples, read_bytes, replacing
from llava_sp.common.schema import Spec, expect
from llava_sp.eval.inputs.checks import compare_ids

# What zipfile, the XML parser and openpyxl raise for files that are not a workbook, or have changed bytes
_DAMAGED = (
    BadZipFile, zlib.error, struct.error, EOFError, OSError, RuntimeError, LookupError, TypeError, AttributeError, ValueError,
    SyntaxError,  # the XML parser's
)  # fmt: skip
_MISSING = frozenset(
    (
        "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA", "NULL",
        "NaN", "None", "n/a", "nan", "null",
    )
)  # fmt: skip
_NO_CELL = re.compile(r"[\000-\010\013\014\016-\037]")  # characters that a table cannot hold


class NotInstalled(ValueError):
    """openpyxl is not installed."""


def import_openpyxl() -> ModuleType:
    try:
        import openpyxl
    except ModuleNotFoundError:
        raise NotInstalled("the table for the server needs openpyxl: pip install llava_sp[eval]") from None
    return openpyxl


def is_missing(text: str) -> bool:
    """Whether pandas reads the field of a table as missing."""
    return text in _MISSING


def write_xlsx(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows with the columns of the first one. Every text stays one ("=..." no formula, "#N/A" no error)."""
    book = import_openpyxl().Workbook()
    for number, row in enumerate([dict(zip(rows[0], rows[0])), *rows], 1):
        for place, value in enumerate(row.values(), 1):
            if value != "":
                cell = book.active.cell(number, place)
                cell.value = _NO_CELL.sub(" ", value) if isinstance(value, str) else value
                if isinstance(value, str):
                    cell.data_type = "s"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        book.save(part)


def read_xlsx(file: Path, spec: Spec) -> list[dict[str, Any]]:
    """The rows of the first table, {column: value}, each of which fits `spec`. Raises `ValueError` naming file and row."""
    openpyxl = import_openpyxl()
    content = io.BytesIO(read_bytes(file))
    try:
        book = openpyxl.load_workbook(content, read_only=True)
        header, *cells = [tuple(row) for row in book.worksheets[0].iter_rows()] or [()]
    except _DAMAGED as error:
        raise ValueError(
            f"{file} is not an .xlsx table, or is damaged ({str(error) or type(error).__name__})"
        ) from None
    columns = [cell.value for cell in header]
    twice = [name for name, count in Counter(columns).items() if name is not None and count > 1]
    if twice:
        raise ValueError(f"{file} has more than one column {', '.join(map(str, twice))}")
    rows = []
    for number, row in enumerate(cells, 2):
        formula = next((cell.value for cell in row if cell.data_type == "f"), None)
        if formula is not None:
            raise ValueError(f"{file}, row {number}: {formula!r} is a formula; expected a text that begins with =")
        values = dict.fromkeys(columns) | dict(zip(columns, (cell.value for cell in row)))  # a row may end early
        if any(value is not None for value in values.values()):
            named = {str(name): value for name, value in values.items() if name is not None}
            rows.append(expect(named, spec, f"{file}, row {number}"))
    if not rows:
        raise ValueError(f"{file} has no rows below its header")
    return rows


def differences(rows: Sequence[Mapping[str, Any]], wanted: Mapping[Any, Mapping[str, str]]) -> str:
    """What in rows of a table is not as in those `wanted`, by index; empty if nothing is."""
    submitted = {row["index"]: row for row in rows}
    trouble = compare_ids([row["index"] for row in rows], wanted)
    for column in [] if trouble else next(iter(wanted.values())):
        if column not in rows[0]:
            return f"it has no column {column}, but {', '.join(rows[0])}"
        wrong = [i for i, row in wanted.items() if not _is_same(submitted[i][column], row[column])]
        if wrong:
            shown = str(submitted[wrong[0]][column])[:60]
            return f"another {column} than in the data: {len(wrong)} ({examples(wrong)}); {wrong[0]} has {shown!r}"
    return trouble


def _is_same(cell: object, text: str) -> bool:
    """Whether a cell says what the data say, spaces aside. pandas makes numbers of some options and empties missing ones."""
    if isinstance(cell, (int, float)):
        try:
            return float(text) == cell
        except ValueError:
            return str(cell) == text
    return _words("" if cell is None else str(cell)) == _words(text)


def _words(text: str) -> list[str]:
    return [] if is_missing(text) else _NO_CELL.sub(" ", text).split()
