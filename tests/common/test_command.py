"""The frame of every command: messages, exit statuses, `--traceback`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from llava_sp.common.command import check_arguments, command_parser, run_command
from llava_sp.common.processes import ReportedElsewhere


def raising(error: BaseException):
    def action() -> None:
        raise error

    return action


def test_statuses():
    assert run_command(lambda: None) == 0 and run_command(lambda: 1) == 1


@pytest.mark.parametrize(
    "error, status, printed",
    [
        (ValueError("--x is 3"), 2, "error: --x is 3\n"),
        (OSError("cannot write f"), 2, "error: cannot write f\n"),
        (MemoryError("too small"), 2, "error: too small\n"),
        (ReportedElsewhere("on another process"), 2, ""),
        (KeyboardInterrupt(), 130, "\nstopped\n"),
    ],
)
def test_errors_of_the_user_are_one_line(capsys, error, status, printed):
    assert run_command(raising(error), on_interrupt="stopped") == status
    assert capsys.readouterr() == ("", printed)


def test_other_errors_and_traceback_are_raised():
    with pytest.raises(KeyError):
        run_command(raising(KeyError("a bug")))
    with pytest.raises(ValueError, match="shown"):
        run_command(raising(ValueError("shown")), traceback=True)
    assert run_command(raising(ReportedElsewhere("")), traceback=True) == 2


def test_a_reader_that_went_away_is_not_an_error(repo):
    code = (
        "import sys; from llava_sp.common.command import run_command\n"
        "def action():\n    for i in range(100_000): print(i)\n"
        "sys.exit(run_command(action))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=repo, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"0\n"
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(timeout=600) == 128 + signal.SIGPIPE


@pytest.mark.parametrize(
    "what", ["run_command(lambda: print('x' * 99))", "command_parser('x', 'y' * 999).parse_args(['--help'])"]
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_went_away_before_the_end(repo, what, unbuffered):
    """What is short is written when Python ends, unless it is asked for before."""
    code = f"import sys; from llava_sp.common.command import *; sys.stdin.read(); sys.exit({what})"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=repo, env=environment, **pipes)
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == b"" and process.wait(timeout=600) in (0, 128 + signal.SIGPIPE)


def test_sigterm_runs_finally_blocks(repo, tmp_path):
    code = (
        "import sys, time, pathlib; from llava_sp.common.command import run_command\n"
        "def action():\n    try:\n        print('ready', flush=True); time.sleep(60)\n"
        "    finally: pathlib.Path(sys.argv[1]).touch()\n"
        "sys.exit(run_command(action, clean_up_on_sigterm=True))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "done")]
    process = subprocess.Popen(command, cwd=repo, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=600) == 128 + signal.SIGTERM and (tmp_path / "done").exists()


def test_the_parser_does_not_abbreviate(capsys):
    parser = command_parser("llava_sp.thing", "What it does.\n\n    as typed")
    assert parser.parse_args(["--traceback"]).traceback
    assert "python -m llava_sp.thing" in parser.format_help() and "\n    as typed" in parser.format_help()
    with pytest.raises(SystemExit):
        parser.parse_args(["--trace"])


def test_the_first_argument_out_of_range_is_named():
    check_arguments([("--a", 1, True, "at least 1")])
    with pytest.raises(ValueError, match="--b is 0; it must be at least 1"):
        check_arguments([("--a", 1, True, ""), ("--b", 0, False, "at least 1"), ("--c", 0, False, "")])
