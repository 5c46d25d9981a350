"""Files: reading with errors that name file and line, atomic writing, locks, hashes, paths."""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import glob
import hashlib
import io
import json
import os
import sys
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from llava_sp.common.schema import Spec, expect

_NO_LOCKS = frozenset((errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP))  # flock on such file systems

# ---- reading


def read_bytes(path: Path) -> bytes:
    """The content of a file. Raises `ValueError` if it does not exist or is empty."""
    if not path.is_file():
        raise ValueError(f"{path} {'is not a file' if path.exists() else 'does not exist'}")
    content = path.read_bytes()
    if not content.removeprefix(BOM_UTF8).strip():
        raise ValueError(f"{path} is empty")
    return content


def decode(content: bytes, path: Path) -> str:
    """UTF-8, with or without a byte order mark. Raises `ValueError` with the position of an invalid byte."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None


def read_text(path: Path) -> str:
    return decode(read_bytes(path), path)


def read_json(path: Path, spec: Spec = Any) -> Any:
    """The content of a JSON file that fits `spec` (see `schema`). Raises `ValueError` with file, line and column, or key."""
    text = read_text(path)
    try:
        content = parse_json(text)
    except json.JSONDecodeError as error:
        ends_early = error.pos >= len(text.rstrip()) - 1 or error.msg.startswith("Unterminated string")
        cut = " (it ends in the middle: an interrupted download or copy?)" if ends_early else ""
        raise ValueError(
            f"{path} is not valid JSON: {error.msg}, line {error.lineno} column {error.colno}{cut}"
        ) from None
    return expect(content, spec, path)


def parse_json(text: str, decode: Callable[[str], Any] = json.loads) -> Any:
    """Raises `JSONDecodeError`, also for Python's limits: thousands of nested brackets, or of digits in an integer."""
    try:
        return decode(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        reason = "brackets are nested too deeply"
    except ValueError as error:
        reason = str(error).partition(";")[0]
    raise json.JSONDecodeError(reason, text, 0)


class Line(dict[str, Any]):
    """The JSON object on a line of a file; `number` is the line number, from 1."""

    number: int


def read_jsonl(path: Path, spec: Spec = dict) -> list[Line]:
    """One JSON object per line, as `Line`s that fit `spec`; empty lines are skipped. Raises `ValueError` with the line."""
    return parse_lines(read_text(path), path, spec)


def parse_lines(text: str, path: Path, spec: Spec = dict) -> list[Line]:
    """The `Line`s of a text that was read from `path`. Raises `ValueError` with the line."""
    records: list[Line] = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            records.append(Line(parse_line(line, f"{path}, line {number}", spec)))
            records[-1].number = number
    return records


def parse_line(line: str, where: str, spec: Spec = dict) -> dict[str, Any]:
    try:
        return expect(parse_json(line), spec, where)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON: {error.msg} at column {error.colno}") from None


def read_table(path: Path, delimiter: str, spec: Spec = dict) -> list[Line]:
    """The rows of a CSV or TSV file whose first line names the columns, as `Line`s of texts that fit `spec`.

    Raises:
        ValueError: no rows; or, with its line, a row with too few or too many fields (cut off, or another delimiter).
    """
    csv.field_size_limit(sys.maxsize)  # MMBench has whole images in a field
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    rows: list[Line] = []
    columns, start = None, 1
    try:
        for fields in reader:
            if columns is None:
                columns = fields
            elif fields:
                if len(fields) != len(columns):
                    raise ValueError(
                        f"{path}, line {start} has {len(fields)} fields, not {len(columns)} ({', '.join(columns)}): cut off?"
                    )
                rows.append(Line(expect(dict(zip(columns, fields)), spec, f"{path}, line {start}")))
                rows[-1].number = start
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {start} is not a row of a table: {error} (is the file cut off?)") from None
    if not rows:
        raise ValueError(f"{path} has no rows below its header")
    return rows


def identity(path: Path) -> dict[str, Any]:
    """`{"bytes", "sha256"}` of a file, as manifests record it."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---- writing


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Wraps writing a file: creates its folder, adds its name to each `OSError` (a full disk's has none)."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, synced and renamed to `path` at the end; removed on failure.

    Those left by killed processes are removed.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        if not _runs(left.suffixes[-2].removeprefix(".")):
            left.unlink(missing_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.touch()
        mode = part.stat().st_mode  # as set by the umask; safetensors files are readable by the owner only
        yield part
        with open(part, "rb") as stream:
            os.fsync(stream.fileno())
        part.chmod(mode)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _runs(process: str) -> bool:
    """Whether a process with this id runs on this machine."""
    try:
        os.kill(int(process), 0)
    except PermissionError:
        return True
    except (ValueError, OSError, OverflowError):
        return False
    return True


def write_atomic(path: Path, text: str) -> None:
    """Readers see the old file or the new one, also after a crash. Raises `OSError` naming the file."""
    with writing(path), replacing(path) as part:
        part.write_bytes(text.encode("utf-8", "backslashreplace"))  # a lone surrogate as a JSON escape


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    write_atomic(path, "".join(json.dumps(record) + "\n" for record in records))


def lock(stream: Any, path: Path) -> bool:
    """Lock an open file against other processes; False if another one holds the lock.

    Where the file system has no locks, prints a note and returns True.
    """
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise OSError(f"cannot lock {path}: {error.strerror}") from error
        _note_no_locks(path.parent, error.strerror)
    return True


@cache  # once per folder
def _note_no_locks(folder: Path, reason: str) -> None:
    print(
        f"note: the file system of {folder} has no file locks ({reason}): do not run two commands in it at once",
        file=sys.stderr,
    )


# ---- paths and words


def is_missing_folder(path: str | os.PathLike) -> bool:
    """Whether `path` can only be a local folder (it is not a valid hub id) and does not exist."""
    text = str(path)
    return not os.path.exists(text) and (text.count("/") > 1 or text.startswith((".", "/", "~")))


def leads_outside(name: str) -> bool:
    """Whether a file name relative to a folder leads out of it: absolute (on any system), with `..`, or empty."""
    parts = PurePosixPath(name).parts + PureWindowsPath(name).parts
    absolute = PurePosixPath(name).is_absolute() or bool(PureWindowsPath(name).anchor)
    return not name or ".." in parts or absolute or "\0" in name


def readable(size: int) -> str:
    """Bytes as GiB or MiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def examples(values: Iterable[object], limit: int = 3) -> str:
    """`1, 2, 3, ...` for error messages."""
    shown = [str(value) for _, value in zip(range(limit + 1), values)]
    return ", ".join(shown[:limit]) + (", ..." if len(shown) > limit else "")


def counted(number: int, noun: str) -> str:
    """`1 record`, `2 records`, for messages."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
