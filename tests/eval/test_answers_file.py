"""Finished answers files: errors name file and line; answers to other questions are noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava_sp.eval.base import Item
from llava_sp.eval.inputs.answers_file import check_questions, match_by_question_id, read_answers, read_lines
from tests.messages import refused


def write(path: Path, records: list[dict], blank: int | None = None) -> Path:
    lines = [json.dumps(record) for record in records]
    if blank is not None:
        lines.insert(blank, "")
    path.write_text("\n".join(lines) + "\n")
    return path


def test_duplicate_answers_name_their_lines(tmp_path):
    lines = [{"question_id": i, "text": "a"} for i in (1, 2, 1)]
    records, _ = read_answers(write(tmp_path / "a.jsonl", lines, blank=0))
    with refused("3 answers", "2 questions of things", "1 (1)", "1 is on lines 2 and 4"):
        match_by_question_id([Item(1, "a?"), Item(2, "b?")], records, "things")


def test_answers_to_other_questions_are_noticed(tmp_path):
    items = [Item(0, "Is it red?"), Item(1, "What is it?")]
    asked = [item.text for item in items]
    lines = [{"question_id": 0, "prompt": "Is it  RED?\nAnswer.", "text": "a"}, {"question_id": 1, "text": "b"}]
    check_questions(items, asked, read_answers(write(tmp_path / "a.jsonl", lines))[0])
    lines[1]["prompt"] = "Where is it?\nAnswer."
    records, _ = read_answers(write(tmp_path / "b.jsonl", lines))
    with refused("1 of 2 answers", "line 2, question 1", "'Where is it? Answer.'"):
        check_questions(items, asked, records)


@pytest.mark.parametrize("ids", [(1,), (1, 2, 3)])
def test_missing_and_foreign_ids_are_named(tmp_path, ids):
    records, _ = read_answers(write(tmp_path / "a.jsonl", [{"question_id": i, "text": "a"} for i in ids]))
    with refused(f"{len(ids)} answers", "2 questions of things", f"1 ({2 if len(ids) == 1 else 3})"):
        match_by_question_id([Item(1, "a?"), Item(2, "b?")], records, "things")


def test_the_last_line_may_be_cut_off(tmp_path):
    file = tmp_path / "a.jsonl"
    whole = '{"question_id": 1, "text": "a"}\n{"question_id": 2, "text": "schön"}'.encode()
    file.write_bytes(whole)  # only the line break is missing
    assert [len(part or ()) for part in read_answers(file)] == [2, 0]
    for end in (-1, -10, whole.index("ö".encode()) + 1):  # the last of these within a character
        file.write_bytes(whole[:end])
        records, note = read_answers(file)
        assert [record["question_id"] for record in records] == [1]
        assert f"{file}, line 2 is cut off and was left out: '{{" in note
        assert file.read_bytes() == whole[:end]
    file.write_bytes(b"{" + whole)
    with pytest.raises(ValueError, match="a.jsonl, line 1 is not valid JSON"):
        read_answers(file)


@pytest.mark.parametrize(
    "content, parts",
    [
        ('[{"question_id": 1, "text": "a"}]', ("JSON list",)),
        ('{"question_id": 1}\n', ("line 1", "no text", "question_id")),
        ('{"question_id": 1, "text": null}\n', ("line 1", "text is None", "expected text")),
        ("", ("empty",)),
        ("{}\n\xff\n", ("UTF-8",)),
    ],
)
def test_what_is_not_an_answers_file(tmp_path, content, parts):
    (tmp_path / "a.jsonl").write_bytes(content.encode("latin-1"))
    with refused("a.jsonl", *parts):
        read_answers(tmp_path / "a.jsonl")


def test_lines_of_any_schema(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"x": 1}, {"x": "1"}])
    with refused("a.jsonl, line 2", "x is '1'", "whole number"):
        read_lines(file, {"x": int})
