"""Folders that are all there or not there."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple

import pytest

from llava_sp.common.folders import check_new, new_folder


def test_a_folder_appears_at_the_end(tmp_path):
    target = tmp_path / "deep" / "target"
    with new_folder(target, needed=0) as stage:
        (stage / "x").write_text("text")
        assert not target.exists()
        with (
            pytest.raises(ValueError, match="target.part is being written by another command"),
            new_folder(target, needed=0),
        ):
            pass
    assert (target / "x").read_text() == "text" and os.listdir(tmp_path) == ["deep"]


def test_a_failure_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "target", needed=0) as stage:
        (stage / "x").write_text("text")
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_what_a_killed_command_left_is_removed(tmp_path, repo):
    code = (
        "import os, signal, sys, pathlib; from llava_sp.common.folders import new_folder\n"
        "with new_folder(pathlib.Path(sys.argv[1]), 0) as stage:\n"
        "    (stage / 'deep').mkdir(); (stage / 'deep' / 'half').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "target"], cwd=repo).returncode == -signal.SIGKILL
    assert (tmp_path / ".target.part/deep/half").exists()
    with new_folder(tmp_path / "target", needed=0) as stage:
        (stage / "whole").touch()
        assert sorted(os.listdir(stage)) == [".lock", "whole"]
    assert os.listdir(tmp_path) == ["target"] and os.listdir(tmp_path / "target") == ["whole"]


def test_too_little_room_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**32, 2**31, 2**30))
    room = pytest.raises(OSError, match="target needs 2.0 GiB, but .* has 1.0 GiB free")
    with room, new_folder(tmp_path / "target", needed=2**31):
        raise AssertionError("the folder was made")


def test_targets_that_are_not_new(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    check_new(tmp_path / "new", tmp_path / "source", "hub/model")
    check_new(tmp_path / "source")
    for target, message in {
        "source/inner": "source/inner is inside .*source, which is read",
        "file": "file is a file",
        "full": "full holds files",
    }.items():
        with pytest.raises(ValueError, match=message):
            check_new(tmp_path / target, tmp_path / "source")
