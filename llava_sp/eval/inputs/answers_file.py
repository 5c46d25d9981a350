"""A finished answers file as LLaVA writes it: one JSON object per line, `{"question_id", "prompt", "text", ...}`."""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from llava_sp.common.files import Line, decode, parse_json, parse_lines, read_bytes
from llava_sp.common.schema import Spec
from llava_sp.eval.inputs.checks import compare_ids


class Question(Protocol):
    @property
    def id(self) -> int | str: ...


def read_answers(path: Path) -> tuple[list[Line], str | None]:
    """Reads a finished answers file.

    Returns: the lines, and a note if a half-written last line had to be left out (the file itself is not changed).

    Raises:
        ValueError: naming the line, for broken JSON anywhere else or a line without `question_id` and text.
    """
    if read_bytes(path).removeprefix(BOM_UTF8).lstrip().startswith(b"["):
        raise ValueError(f"{path} is a JSON list (a submission file?); expected an answers file, one object per line")
    return read_lines(path, {"question_id": (int, str), "text": str})


def read_lines(path: Path, spec: Spec) -> tuple[list[Line], str | None]:
    """The lines of a file whose last one may be cut off, by SIGKILL while it was written; then a note says so."""
    content, note = read_bytes(path), None
    end = content.rfind(b"\n") + 1
    try:
        parse_json(content[end:].decode("utf-8-sig") or "0")
    except ValueError as error:  # cut off, maybe within a character; of another encoding `decode` names the position
        if not isinstance(error, UnicodeDecodeError) or error.reason == "unexpected end of data":
            number, shown = content.count(b"\n") + 1, content[end:].decode("utf-8-sig", errors="replace")[:60]
            note = f"{path}, line {number} is cut off and was left out: {shown!r}"
            content = content[:end]
    return parse_lines(decode(content, path), path, spec), note


def check_questions(items: Sequence[Question], questions: Sequence[str], records: Sequence[dict[str, Any]]) -> None:
    """Raises ValueError if the prompt on an answer's line, where there is one, does not hold the question its id has here: ids
    of different splits and languages can be the same numbers. Case and spaces do not count."""
    asked = {str(item.id): _plain(question) for item, question in zip(items, questions)}
    pairs = [(record, asked.get(str(record["question_id"]), "")) for record in records if _plain(record.get("prompt"))]
    wrong = [(record, question) for record, question in pairs if question not in _plain(record["prompt"])]
    if wrong:
        record, question = wrong[0]
        raise ValueError(
            f"{len(wrong)} of {len(records)} answers are to other questions than their ids have here (another split, language "
            f"or version?): line {getattr(record, 'number', '?')}, question {record['question_id']} was asked as "
            f"{' '.join(record['prompt'].split())[:80]!r}, here it is {question[:80]!r}"
        )


def _plain(text: Any) -> str:
    return " ".join(text.lower().split()) if isinstance(text, str) else ""


def match_by_question_id(items: Sequence[Question], records: Sequence[dict[str, Any]], what: str) -> list[str]:
    """The answers in the order of the items.

    Raises:
        ValueError: for ids that occur twice, that the data do not have (answers of another split), or that are
            missing, each with count and examples.
    """
    ids = [str(record["question_id"]) for record in records]
    trouble = compare_ids(ids, [str(item.id) for item in items])
    if trouble:
        lines: dict[str, list[Any]] = {}
        for i, record in zip(ids, records):
            lines.setdefault(i, []).append(getattr(record, "number", "?"))
        twice = [f". {i} is on lines {n[0]} and {n[1]}" for i, n in lines.items() if len(n) > 1]
        counts = f"the {len(records)} answers do not fit the {len(items)} questions of {what}"
        raise ValueError(f"{counts} (answers of another split or data set?): {trouble}{''.join(twice[:1])}")
    texts = {i: record["text"] for i, record in zip(ids, records)}
    return [texts[str(item.id)] for item in items]
