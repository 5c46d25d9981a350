"""The watchdog: processes that wait for a stopped or a slow one end, and say for whom they waited."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from llava_sp.common.processes import Processes
from llava_sp.common.watchdog import WAITING, Watchdog

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
watchdog = Watchdog(folder / "alive", Processes(rank, 2, rank), {SECONDS / 60})
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


def watched(tmp_path, monkeypatch, others, **at):
    """What rank 0 of two says in 0.6 seconds of a limit of 0.2; `others` writes the state of rank 1 at each beat."""
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    watchdog = Watchdog(tmp_path, Processes(0, 2, 0), 0.2 / 60)
    with watchdog:
        watchdog.progress(3, **at)
        for beat in range(60):
            if text := others(beat):
                (tmp_path / "1").write_text(text)
            time.sleep(0.01)
            if ended:
                break
    return bool(ended)


@pytest.mark.parametrize(
    ("others", "at", "late"),
    [
        (lambda beat: f"{beat} there:1 1 0 answering", {"doing": WAITING}, "process 1 (step 0, answering)"),
        (lambda beat: "1 there:1 1 0 answering" if beat == 0 else "", {"doing": WAITING}, "silent: stopped or dead"),
        (
            lambda beat: f"{beat} there:1 9 0 {WAITING}",
            {"doing": "answering"},
            "waiting for process 0 (step 3, answering)",
        ),
        (lambda beat: f"{beat} there:1 {beat} 0 answering", {"doing": WAITING}, None),
        (lambda beat: f"{beat} there:1 9 0 {WAITING}", {"doing": "opening the model", "patient": True}, None),
        (lambda beat: "", {"doing": "scoring", "patient": True}, None),
    ],
    ids=["it hangs", "it is silent", "this one hangs", "it answers more questions", "this one is slow", "it has ended"],
)
def test_who_waits_is_not_late(tmp_path, monkeypatch, capsys, others, at, late):
    """Shares of questions differ, and reading a model may take any time: only where nobody gets on, all end."""
    assert watched(tmp_path, monkeypatch, others, **at) == (late is not None)
    assert (late or "") in capsys.readouterr().err


@pytest.mark.parametrize(("world", "minutes"), [(1, 1e-9), (2, None), (2, 1e308)])
def test_nothing_to_watch(tmp_path, world, minutes):
    with Watchdog(tmp_path / "alive", Processes(0, world, 0), minutes) as watchdog:
        watchdog.progress(1, "computing")
        time.sleep(0.05)
    assert not (tmp_path / "alive").exists()


@pytest.mark.parametrize(
    ("identity", "beats", "lost"),
    [
        (f"{socket.gethostname()}:{os.getpid()}", 100, ""),
        (
            f"{socket.gethostname()}:{2**22 + 1}",
            100,
            "process 1 (step 7, computing; ended or silent)",
        ),  # no such process
        (f"other:{2**22 + 1}", 100, ""),
        (f"other:{os.getpid()}", 1, "process 1 (step 7, computing; ended or silent)"),
    ],
    ids=["here, lives", "here, ended", "elsewhere, lives", "elsewhere, silent"],
)
def test_who_was_lost(tmp_path, identity, beats, lost):
    """Of this machine at once; of another one where nothing is heard."""
    watchdog = Watchdog(tmp_path, Processes(0, 2, 0), 1 / 60)
    ended = threading.Event()

    def other():
        for beat in range(beats):
            (tmp_path / "1.part").write_text(f"{beat} {identity} 9 7 computing")
            os.replace(tmp_path / "1.part", tmp_path / "1")
            if ended.wait(0.02):
                return

    thread = threading.Thread(target=other)
    with watchdog:
        thread.start()
        watchdog.progress(7, "computing", patient=True)
        time.sleep(0.15)
        assert watchdog.lost() == lost
    ended.set()
    thread.join()
