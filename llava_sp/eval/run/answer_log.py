"""LLaVA's answer files: one JSON object per line, `{"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}`.

`read_answers` and `match_by_question_id` judge a finished file; `AnswerLog` is the file that one process appends to while
it generates, so that SIGKILL at any moment costs at most the batch in flight. A line counts only with its line break:
what a killed process left behind the last one is dropped, on reading and, before anything is appended, on disk.
"""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_sp.common.files import Line, decode, examples, lock, parse_line, parse_lines, read_bytes

if TYPE_CHECKING:
    from llava_sp.eval.base import Item


def read_answers(path: Path) -> tuple[list[dict[str, Any]], str | None]:
    """Reads a finished answers file.

    Returns: the lines, and a note if a half-written last line had to be left out (the file itself is not changed).

    Raises:
        ValueError: naming the line, for broken JSON anywhere else or a line without `question_id` and text.
    """
    content = read_bytes(path)
    if content.removeprefix(BOM_UTF8).lstrip().startswith(b"["):
        raise ValueError(
            f"{path} is a JSON list (a submission file?); needed is LLaVA's answers file, one object per line"
        )
    content, note = _without_half_line(content, path)
    records = parse_lines(decode(content, path), path)
    for record in records:
        if "question_id" not in record or not isinstance(record.get("text"), str):
            has = ", ".join(sorted(record)) or "nothing"
            raise ValueError(f"{path}, line {record.number} has no question_id or no text; it has {has}")
    return records, note


def _without_half_line(content: bytes, path: Path) -> tuple[bytes, str | None]:
    """Drops what stands behind the last line break unless it is a whole line; a cut may go through a character."""
    end = content.rfind(b"\n") + 1
    last = content[end:]
    if not last.strip():
        return content, None
    try:
        json.loads(last.decode("utf-8-sig"))
        return content, None
    except json.JSONDecodeError:
        pass
    except UnicodeDecodeError as error:
        if error.reason != "unexpected end of data":  # not a cut, but another encoding: `decode` says where
            return content, None
    number, shown = content.count(b"\n") + 1, last.decode("utf-8-sig", errors="replace")[:60]
    note = f"{path}, line {number} is cut off (a process killed while writing?); it was left out: {shown!r}"
    return content[:end], note


def check_questions(items: Sequence[Item], questions: Sequence[str], records: Sequence[dict[str, Any]]) -> None:
    """Raises ValueError if an answer's line records a prompt that does not hold the question its id has here.

    Ids of different splits and languages can be the same numbers. Case and spaces do not count; lines without `prompt` and
    questions without words are passed over.
    """
    asked = {str(item.id): _plain(question) for item, question in zip(items, questions)}
    wrong = []
    for record in records:
        prompt, question = record.get("prompt"), asked.get(str(record["question_id"]))
        if isinstance(prompt, str) and prompt.strip() and question and question not in _plain(prompt):
            wrong.append((record, question))
    if wrong:
        record, question = wrong[0]
        line = f"line {record.number}, " if isinstance(record, Line) else ""
        raise ValueError(
            f"{len(wrong)} of {len(records)} answers are to other questions than their ids have here (answers of another "
            f"split, language or version?): {line}question {record['question_id']} was asked as "
            f"{' '.join(record['prompt'].split())[:80]!r}, here it is {question[:80]!r}"
        )


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def match_by_question_id(items: Sequence[Item], records: Sequence[dict[str, Any]], what: str) -> list[str]:
    """The answers in the order of the items.

    Raises:
        ValueError: for ids that occur twice, that the data do not have (answers of another split), or that are
            missing, each with count and examples.
    """
    counts = Counter(str(record["question_id"]) for record in records)
    wanted = {str(item.id) for item in items}
    problems = []
    twice = [i for i, n in counts.items() if n > 1]
    lines = [str(r.number) for r in records if isinstance(r, Line) and twice and str(r["question_id"]) == twice[0]]
    of_first = f". {twice[0]} stands in lines {' and '.join(lines[:2])}" if lines else ""
    for found, trouble in (
        (twice, "have more than one answer"),
        ([i for i in counts if i not in wanted], f"are not in {what}: answers of another split or data set?"),
        ([str(item.id) for item in items if str(item.id) not in counts], "have no answer"),
    ):
        if found:
            problems.append(f"{len(found)} question ids {trouble} ({examples(found)})")
    if problems:
        raise ValueError(
            f"the {len(records)} answers do not fit the {len(items)} questions of {what}: "
            + "; ".join(problems)
            + of_first
        )
    texts = {str(record["question_id"]): record["text"] for record in records}
    return [texts[str(item.id)] for item in items]


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
        try:
            if not lock(self._stream, self.path):
                raise ValueError(f"{self.path} is being written by another process: is the same command running?")
            self._repair()
        except BaseException:
            self._stream.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._stream.close()

    def _repair(self) -> None:
        self._stream.seek(0)
        content = self._stream.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self._stream.truncate(whole)
        self._stream.seek(0, 2)

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
            raise OSError(f"cannot write {self.path}: {error.strerror}; the same command goes on from here") from error


def read_logs(folder: Path, settings: str | None = None) -> dict[str, dict[str, Any]]:
    """All whole lines of all processes, of this run and of earlier ones with any number of processes: key -> line.

    Raises ValueError naming file and line: for a line that is none of ours, or of a run with other `settings`.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("rank-*.jsonl")):
        content = path.read_bytes()
        lines = decode(content[: content.rfind(b"\n") + 1], path).splitlines()
        for number, line in enumerate(lines, 1):
            where = f"{path}, line {number}"
            record = parse_line(line, where)
            if not isinstance(record.get("key"), str) or not isinstance(record.get("text"), str):
                raise ValueError(f"{where} is no answer of this program: it has no key or no text")
            if settings is not None and record.get("settings", settings) != settings:
                raise ValueError(f"{where} is an answer of a run with other settings: give another --output")
            found.setdefault(record["key"], record)
    return found
