"""One action in a process of its own: what it returned, or how it ended; within limits of time and memory.

The process is a fork, so imports are paid once, and what a test has patched is patched there too.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import psutil

ERROR_LINE = re.compile(r"[A-Za-z_][\w.]*(: |$)")
HUNG = "hung"
MOST_PROCESSES = 32  # that a case may start: a hostile number of workers must not stop the machine
CROWD = f"it started more than {MOST_PROCESSES} processes"
GIB = 2**30
MEMORY = 3 * GIB  # of address space, beyond what the process has
LARGEST_FILE = GIB // 4
STATM = Path("/proc/self/statm")


@dataclass(frozen=True)
class Outcome:
    """Attributes:
    status: the exit status; None where there is none.
    result: what the action computed, as plain values.
    check: the exit status of the command that checks beforehand whether the action works; None if there is none.
    words: what was printed, errors first.
    trace: the traceback of an exception that no command of ours ends with, or `HUNG`, `CROWD` or "signal N".
    """

    status: int | None
    result: Any = None
    check: int | None = None
    words: str = ""
    trace: str = ""

    @property
    def last_line(self) -> str:
        """The exception's message, and its place in our code."""
        lines = self.trace.strip().splitlines() or [""]
        errors = [line for line in lines if ERROR_LINE.match(line)]
        places = [line for line in lines if line.startswith("  File ") and "llava_sp/" in line]
        place = places[-1].split("llava_sp/", 1)[-1].replace('", line ', ":").split(", in")[0] if places else ""
        return f"{(errors or lines)[-1][:300]} [{place}]"


Action = Callable[[], tuple[int | None, Any, int | None]]


def contained(action: Action, folder: Path, seconds: float) -> Outcome:
    """The outcome of `action`, which returns (status, result, check); the working directory is `folder`."""
    with tempfile.TemporaryDirectory() as place:
        answer, out, err = (Path(place) / name for name in ("answer", "out", "err"))
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            _child(action, folder, answer, out, err)
        ended = _wait(child, seconds)
        words = "\n".join(p.read_text(errors="backslashreplace") for p in (err, out) if p.is_file())
        if ended or not answer.is_file():
            return Outcome(None, words=words, trace=ended or "ended without an answer")
        status, result, check, trace = pickle.loads(answer.read_bytes())
    return Outcome(status, result, check, words, trace)


def _wait(child: int, seconds: float) -> str:
    """Why a process was ended, if it was; its children are ended too."""
    start, pause, counted, status, why = time.monotonic(), 0.001, 0.0, None, ""
    try:
        while status is None and not why:
            done, found = os.waitpid(child, os.WNOHANG)
            now = time.monotonic() - start
            if done:
                status = found
            elif now > seconds:
                why = HUNG
            elif now > counted + 0.3:
                counted, why = now, CROWD if _descendants(child) > MOST_PROCESSES else ""
            else:
                time.sleep(pause)
                pause = min(0.02, pause * 1.5)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        if status is None:
            os.waitpid(child, 0)
    return f"signal {os.WTERMSIG(status)}" if status is not None and os.WIFSIGNALED(status) else why


def _descendants(process: int) -> int:
    try:
        return len(psutil.Process(process).children(recursive=True))
    except psutil.Error:
        return 0


def _child(action: Action, folder: Path, answer: Path, out: Path, err: Path) -> None:
    """Never returns."""
    code = 1
    try:
        os.setsid()
        faulthandler.disable()  # pytest's writes where the parent does
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for number, file in ((1, out), (2, err)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdout, sys.stderr = map(_lines_to, (1, 2))
        os.chdir(folder)
        os.environ["HOME"] = str(folder)
        _limit(resource.RLIMIT_FSIZE, LARGEST_FILE)
        _limit(resource.RLIMIT_CORE, 0)
        if STATM.is_file():  # Linux
            _limit(resource.RLIMIT_AS, int(STATM.read_text().split()[0]) * resource.getpagesize() + MEMORY)
        found = _answer(action)
        _limit(resource.RLIMIT_AS, None)
        answer.write_bytes(pickle.dumps(found))
        code = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _lines_to(number: int) -> TextIO:
    return open(number, "w", buffering=1, errors="backslashreplace", closefd=False)


def _answer(action: Action) -> tuple[int | None, Any, int | None, str]:
    try:
        return *action(), ""
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None), None, None, ""
    except BaseException:
        return None, None, None, traceback.format_exc()


def _limit(what: int, value: int | None) -> None:
    """Set the soft limit; None is as much as there may be."""
    most = resource.getrlimit(what)[1]
    resource.setrlimit(what, (most if value is None or 0 <= most < value else value, most))
