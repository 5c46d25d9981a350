"""The list of samples that were skipped or cut: one JSON object per line, written by every process and data worker."""

from __future__ import annotations

import json
import os
from pathlib import Path

from llava_sp.common.files import writing


class SampleReport:
    """Appends to `path`; without a path it only counts, in this process.

    A line is written by one append, so that lines of several processes do not mix; a process writes each event once.
    Other processes, epochs and resumed runs may repeat it: `counts` counts distinct records.
    """

    def __init__(self, path: str | os.PathLike | None):
        self.path = None if path is None else Path(path)
        self._seen: set[tuple[str, str, int]] = set()

    def add(self, kind: str, file: str, index: int, **details) -> None:
        """`kind` is "skipped" or "cut"; `index` counts the file's records from 0."""
        if (kind, file, index) in self._seen:
            return
        self._seen.add((kind, file, index))
        if self.path is None:
            return
        line = json.dumps({"kind": kind, "file": file, "index": index, **details}) + "\n"
        with writing(self.path), self.path.open("ab", buffering=0) as stream:
            stream.write(line.encode())

    def counts(self) -> dict[str, int]:
        """Distinct records per kind."""
        events = set(self._seen)
        if self.path is not None and self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                if not line.endswith("}"):  # a full disk stopped the last write
                    continue
                event = json.loads(line)
                events.add((event["kind"], event["file"], event["index"]))
        return {kind: sum(event[0] == kind for event in events) for kind in ("skipped", "cut")}
