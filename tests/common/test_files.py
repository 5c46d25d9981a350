"""Reading with errors that name file and line; writing that is never half done; locks, paths, words."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import subprocess

import pytest

from llava_sp.common.files import (
    examples,
    leads_outside,
    lock,
    read_json,
    read_jsonl,
    read_table,
    replacing,
    sha256,
    write_atomic,
    write_json,
    write_jsonl,
)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "x.json does not exist"),
        (b" \n", "x.json is empty"),
        (b"\xef\xbb\xbf", "x.json is empty"),
        (b'{"a": "\xff"}', r"x.json is not UTF-8 text \(invalid start byte at byte 7\)"),
        (b'{"a": 1,,}', r"x.json is not valid JSON: .*, line 1 column 9$"),
        (b'{"a": [1, 2', r"x.json is not valid JSON: .* \(it ends in the middle"),
        (b'{"a": "cut', r"x.json is not valid JSON: .* \(it ends in the middle"),
        (b'{"a": "1"}', "x.json: a is '1'; expected a whole number"),
        (b"[" * 100_000 + b"]" * 100_000, "x.json is not valid JSON: brackets within brackets, too deep to be read"),
        (b'{"a":' * 100_000, "x.json is not valid JSON: brackets within brackets"),
        (b'{"a": ' + b"7" * 5000 + b"}", r"x.json is not valid JSON: Exceeds the limit \(4300 digits\)"),
    ],
)
def test_json_that_cannot_be_read(tmp_path, content, message):
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "x.json", {"a": int})


def test_a_line_too_deep_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"{}\n" + b'{"a":' * 100_000 + b"1" + b"}" * 100_000)
    with pytest.raises(ValueError, match="x.jsonl, line 2 is not valid JSON: brackets within brackets"):
        read_jsonl(tmp_path / "x.jsonl")


def test_a_folder_is_not_a_file(tmp_path):
    with pytest.raises(ValueError, match="is not a file"):
        read_json(tmp_path)


def test_lines_count_empty_ones_too(tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"id": 1}\n\n{"id": 2}\r\n{"id": "x"}')
    records = read_jsonl(file)
    assert records == [{"id": 1}, {"id": 2}, {"id": "x"}] and [record.number for record in records] == [1, 3, 4]
    with pytest.raises(ValueError, match="q.jsonl, line 4: id is 'x'; expected a whole number"):
        read_jsonl(file, {"id": int})
    file.write_text('{"id": 1}\n[2]\n')
    with pytest.raises(ValueError, match=r"q.jsonl, line 2 is \[2\]; expected an object"):
        read_jsonl(file)
    file.write_text('{"id": 1}\n{"id": \n')
    with pytest.raises(ValueError, match="q.jsonl, line 2 is not valid JSON: .* at column"):
        read_jsonl(file)


def test_tables_name_the_line(tmp_path):
    file = tmp_path / "t.tsv"
    file.write_text('a\tb\n1\t"two\nlines"\n\n3\n')
    with pytest.raises(ValueError, match=r"t.tsv, line 5 has 1 fields, not 2 \(a, b\)"):
        read_table(file, "\t")
    file.write_text('a\tb\n1\t"two\nlines"\n3\t4\n')
    rows = read_table(file, "\t")
    assert rows == [{"a": "1", "b": "two\nlines"}, {"a": "3", "b": "4"}] and [row.number for row in rows] == [2, 4]
    file.write_text('a\tb\n1\t"cut of')
    with pytest.raises(ValueError, match=r"t.tsv, line 2 is not a row of a table: .* \(is the file cut off\?\)"):
        read_table(file, "\t")
    file.write_text("a\tb\n")
    with pytest.raises(ValueError, match="t.tsv has no rows below its header"):
        read_table(file, "\t")


def test_fields_longer_than_the_csv_modules_limit(tmp_path):
    (tmp_path / "t.csv").write_text("a,b\n1," + "x" * 200_000 + "\n")
    assert len(read_table(tmp_path / "t.csv", ",")[0]["b"]) == 200_000


def test_writing_replaces_whole_files(tmp_path):
    file = tmp_path / "new" / "x.json"
    write_json(file, {"a": "ö\ud83d"})
    assert json.loads(file.read_text()) == {"a": "ö\ud83d"} and os.listdir(file.parent) == ["x.json"]
    write_jsonl(file, [{"a": 1}, {"b": 2}])
    assert file.read_text() == '{"a": 1}\n{"b": 2}\n'
    assert sha256(file) == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_failure_while_writing_leaves_the_old_file(tmp_path):
    file = tmp_path / "x.txt"
    write_atomic(file, "old")
    with pytest.raises(RuntimeError), replacing(file) as part:
        part.write_text("half")
        raise RuntimeError
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["x.txt"]
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="cannot write .*folder"):
        write_atomic(tmp_path / "folder", "text")


def test_what_a_killed_process_left_is_removed(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    left, others, running = (
        tmp_path / f".{name}.part" for name in (f"x.txt.{gone.pid}", f"y.txt.{gone.pid}", "x.txt.1")
    )
    for file in (left, others, running):
        file.touch()
    write_atomic(tmp_path / "x.txt", "text")
    assert not left.exists() and others.exists() and running.exists()


def test_written_files_have_the_modes_of_the_umask(tmp_path):
    before = os.umask(0o022)
    try:
        with replacing(tmp_path / "x") as part:
            part.unlink()
            part.touch(0o600)  # as safetensors makes them
        assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(before)


def test_a_lock_keeps_others_out(tmp_path, monkeypatch, capsys):
    path = tmp_path / "lock"
    with path.open("a") as first, path.open("a") as second:
        assert lock(first, path) and not lock(second, path)
    with path.open("a") as third:
        assert lock(third, path)

    def flock(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with path.open("a") as stream, pytest.raises(OSError, match="cannot lock .*lock: Input/output error"):
        lock(stream, path)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "C:\\x", "a/../../x", "..\\x", "", "a\0b"])
def test_names_that_lead_out_of_a_folder(name):
    assert leads_outside(name)


@pytest.mark.parametrize("name", ["x", "a/b.jpg", "a..b", ".hidden", "a b/c"])
def test_names_below_a_folder(name):
    assert not leads_outside(name)


def test_examples():
    assert examples([]) == "" and examples("abc") == "a, b, c" and examples(range(9), 2) == "0, 1, ..."
