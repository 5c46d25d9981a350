"""The watchdog: processes that wait for a stopped or a slow one end, and say for whom they waited."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SECONDS = 1.0
PROCESS = f"""
import sys, time
from pathlib import Path
from llava_sp.common.processes import Processes
from llava_sp.common.watchdog import Watchdog
folder, rank, steps, then = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
(folder / f"started {{rank}}").touch()
while not (folder / f"started {{1 - rank}}").exists():
    time.sleep(0.01)
watchdog = Watchdog(folder / "alive", Processes(rank, 2, rank), {SECONDS})
watchdog.start()
for step in range(1, steps + 1):
    watchdog.progress(step, "computing")
    time.sleep(0.05)
(folder / f"reached {{rank}}").touch()
if then == "end":
    watchdog.stop()
else:
    time.sleep(60)
"""


@pytest.fixture
def processes(tmp_path):
    """Starts two processes that make so many steps and then wait, or end; waits until they are there."""
    started: list[subprocess.Popen] = []

    def start(*steps: int, then: str = "wait") -> list[subprocess.Popen]:
        for rank, count in enumerate(steps):
            words = [sys.executable, "-c", PROCESS, str(tmp_path), str(rank), str(count), then]
            started.append(
                subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()})
            )
        end = time.monotonic() + 30
        while not all((tmp_path / f"reached {rank}").exists() for rank in range(len(steps))):
            assert time.monotonic() < end
            time.sleep(0.01)
        return started

    yield start
    for process in started:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen) -> str:
    error = process.communicate(timeout=30)[1]
    assert process.returncode == 1, error
    return error.strip()


def test_a_stopped_process_is_named(processes):
    first, second = processes(5, 5)
    time.sleep(0.3)  # some beats
    second.send_signal(signal.SIGSTOP)
    assert said(first) == (
        "error: no progress for 0.0167 minutes at step 5 (computing): waiting for process 1 "
        "(step 5, computing; silent: stopped or dead)"
    )


def test_a_process_that_stands_still_is_named_by_all(processes):
    """It lives, but waits for something else than the others (its disk)."""
    first, second = processes(5, 3)
    for process, step in ((first, 5), (second, 3)):
        assert f"at step {step} (computing): waiting for process 1 (step 3, computing)" in said(process)


def test_progress_keeps_them_alive(processes, tmp_path):
    """Longer than the limit; nothing is left behind."""
    for process in processes(int(SECONDS / 0.05 * 1.5), int(SECONDS / 0.05 * 1.5), then="end"):
        assert process.wait(30) == 0
    assert not list(Path(tmp_path / "alive").iterdir())


def test_a_command_that_was_suspended_goes_on(processes):
    """Ctrl-Z and fg: the time in between is nobody's fault."""
    both = processes(1, 1)
    for process in both:
        process.send_signal(signal.SIGSTOP)
    time.sleep(1.5 * SECONDS)
    for process in both:
        process.send_signal(signal.SIGCONT)
    time.sleep(0.3 * SECONDS)
    assert [process.poll() for process in both] == [None, None]
