"""Errors about the ids and paths in official files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava_sp.common.files import read_jsonl
from llava_sp.eval.inputs.checks import by_id, compare_ids, find_split, inside, joined, numbered, verdict


def write(path: Path, records: list[dict], blank: int | None = None) -> Path:
    lines = [json.dumps(record) for record in records]
    if blank is not None:
        lines.insert(blank, "")
    path.write_text("\n".join(lines) + "\n")
    return path


def test_ids_that_repeat_are_named_with_their_lines(tmp_path):
    file = write(tmp_path / "q.jsonl", [{"id": 1}, {"id": 2}, {"id": 1}, {"id": "x"}], blank=1)
    records = read_jsonl(file, {"id": (int, str)})
    assert records[2] == {"id": 1} and [record.number for record in records] == [1, 3, 4, 5]
    with pytest.raises(ValueError, match=r"q.jsonl, line 5: id is 'x'; expected a whole number"):
        read_jsonl(file, {"id": int})
    with pytest.raises(ValueError, match=r"q.jsonl: more than one record with the same id: 1 \(1: line 1, line 4\)"):
        by_id(records, file, "id")
    with pytest.raises(ValueError, match=r"same id: 1 \(1: record 0, record 1\)"):
        by_id([{"id": 1}, {"id": 1}], file, "id")
    assert by_id(records[1:], file, "id") == {2: {"id": 2}, 1: {"id": 1}, "x": {"id": "x"}}


@pytest.mark.parametrize("name", ["../x.jpg", "/etc/x.jpg", "C:\\x.jpg", "a/../../x.jpg", ""])
def test_images_stay_below_their_folder(name):
    with pytest.raises(ValueError, match="is outside images"):
        inside(Path("images"), name, "question 1")


def test_ids_compared():
    assert compare_ids([1, 2], [2, 1]) == ""
    assert compare_ids([1, 1, 5], [1, 2]) == (
        "more than one answer: 1 (1), answer to a question that is not in the file: 1 (5), no answer: 1 (2)"
    )
    assert compare_ids({1: "a", 2: "b"}, [1, 2]) == ""
    assert list(joined(["7", "8"], [{}, {"a": 1}], ["8", "7"], "f")) == ["7", "8"]
    with pytest.raises(ValueError, match=r"f does not fit the questions: no line: 1 \(8\)"):
        joined(["7"], [{}], ["8", "7"], "f", "line")


def test_repeated_ids_are_numbered():
    assert list(numbered([7, 8, "7", 7])) == ["7", "8", "7#2", "7#3"]


def test_splits_are_found_by_their_files(tmp_path):
    names = {"val": ["val.json"], "test": ["a.json", "b.json"]}
    with pytest.raises(ValueError, match=r"has no questions: looked for val.json, a.json, b.json"):
        find_split(tmp_path, names, None, "questions")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.json").touch()
    assert find_split(tmp_path, names, None, "questions") == ("test", tmp_path / "deep" / "b.json")
    with pytest.raises(ValueError, match=r"has no val questions: looked for val.json"):
        find_split(tmp_path, names, "val", "questions")


def test_a_submission_fits_the_first_split_that_it_answers():
    file = Path("s.json")
    assert verdict(file, ["a", ""], [("questions of val", "no"), ("questions of test", "")]) == (
        "s.json answers all 2 questions of test once (1 of them empty)"
    )
    with pytest.raises(ValueError, match=r"s.json: no \(as questions of val\); nor that \(as questions of test\)"):
        verdict(file, [], [("questions of val", "no"), ("questions of test", "nor that")])
