"""The log of a run that resumes."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from llava_sp.train.logs import JsonLines
from llava_sp.train.run_folder import RunFolder

DAMAGED = [
    b'{"step": 1, "lo',
    b"\x01\xff",
    b"[1]",
    b"7",
    b'{"loss": 1}',
    b'{"step": "1"}',
    b'{"step": NaN}',
    b"[" * 9**5,
]


@pytest.mark.parametrize("line", DAMAGED, ids=lambda line: str(line[:20]))
def test_damaged_lines_are_left_out(tmp_path, line):
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n{"step": 3}\n' + line)
    state = SimpleNamespace(is_world_process_zero=True, global_step=2)
    JsonLines(RunFolder(str(tmp_path))).on_train_begin(None, state, None)
    assert [json.loads(kept) for kept in (tmp_path / "log.jsonl").read_text().splitlines()] == [
        {"step": 1},
        {"step": 2},
    ]
