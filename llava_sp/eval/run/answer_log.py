"""The append-only file of one process: SIGKILL at any moment costs at most the batch in flight.

A line counts only with its line break: what a killed process left behind the last one is dropped, on reading and, before
anything is appended, on disk.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llava_sp.common.files import decode, lock, parse_lines


class AnswerLog:
    """The append-only file of one process. Use as a context manager.

    Raises:
        ValueError: on entering, if another process has the same file open (the same command running twice).
    """

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> AnswerLog:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self.path.open("a+b", buffering=0)
        if not lock(self._stream, self.path):
            raise ValueError(f"{self.path} is being written by another process: is the same command running?")
        self._stream.seek(0)
        self._stream.truncate(self._stream.read().rfind(b"\n") + 1)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stream.close()

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Writes all lines past Python's buffers: a later SIGKILL cannot take them back.

        Raises:
            OSError: the disk is full, naming the file; what is half written is repaired by the next run.
        """
        rest = memoryview("".join(json.dumps(record) + "\n" for record in records).encode())
        try:
            while rest:
                rest = rest[self._stream.write(rest) :]
        except OSError as error:
            advice = "the same command continues from here"
            raise OSError(f"cannot write {self.path}: {error.strerror}; {advice}") from error


def read_logs(folder: Path, settings: str | None = None) -> dict[str, dict[str, Any]]:
    """All whole lines of all processes, of this run and of earlier ones with any number of processes: key -> line.

    Raises:
        ValueError: naming file and line, for a line that is not an answer of ours, or of a run with other `settings`.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("rank-*.jsonl")):
        content = path.read_bytes()
        for record in parse_lines(decode(content[: content.rfind(b"\n") + 1], path), path, {"key": str, "text": str}):
            if settings is not None and record.get("settings", settings) != settings:
                where = f"{path}, line {record.number}"
                raise ValueError(f"{where} was answered with other settings: give another --output")
            found.setdefault(record["key"], record)
    return found
