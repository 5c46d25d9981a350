"""A thread in each process of a command that ends the process when one of them hangs.

A process that is stopped, or waits for a disk, silently blocks all others in the next collective, until the timeout of
the process group. Each process writes its state to a shared folder, and reads the states of the others.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llava_sp.common.processes import Processes

_BEATS = 20  # beats in the time allowed without progress
_SILENT = 4  # beats without an update from a process: stopped or dead
WAITING = "waiting for the others"


class Watchdog:
    """Watches from `start` to `stop`, or as a context manager; a single process has nobody to wait for.

    Args:
        folder: shared by all processes; created here.
        here: the rank of this process.
        minutes: time without progress of any process after which this one reports the late ones and exits with
            status 1; None: never.
    """

    def __init__(self, folder: Path, here: Processes, minutes: float | None):
        self.folder, self.here, self.minutes = folder, here, minutes
        self._at = (0, 0, "")  # progress count, step, activity; training ranks at the same point have the same count
        self._patient = False
        self._idle = 0  # beats; a clock would advance while the run is suspended
        self._heard: dict[int, tuple[str, int]] = {}  # rank -> last update, beats since
        self._id = f"{socket.gethostname()}:{os.getpid()}"
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def start(self) -> None:
        if self.minutes is not None and self.here.world_size > 1:
            self._thread.start()

    def progress(self, step: int, doing: str, patient: bool = False) -> None:
        """Record progress at `step`; `doing` is the next activity.

        While `patient`, being alive is progress: for what may take any time, such as reading a model from a slow disk.
        """
        self._at, self._idle, self._patient = (self._at[0] + 1, step, doing), 0, patient

    @contextmanager
    def together(self) -> Iterator[None]:
        """`Processes.together`; a process that is through waits for the others."""
        with self.here.together():
            try:
                yield
            finally:
                self.progress(self._at[1], WAITING)

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
            self._file(self.here.rank).unlink(missing_ok=True)

    def __enter__(self) -> Watchdog:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _watch(self) -> None:
        beat, count, lived = min(60 * (self.minutes or 0) / _BEATS, threading.TIMEOUT_MAX), 0, 0
        while not self._stopped.wait(beat):
            count += 1
            if self._patient:
                lived, self._idle = lived + 1, 0
            self._idle += 1
            marks, step, doing = self._at
            try:
                self._say(f"{count} {self._id} {marks + lived} {step} {doing}")
                self._listen()
            except OSError:
                continue  # a full disk is reported elsewhere
            if self._idle > _BEATS:
                print(f"{self.here.name}error: {self._whom()}", file=sys.stderr, flush=True)
                self._stopped.wait(4 * beat)  # the others report before a launcher kills them
                os._exit(1)

    def _say(self, text: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self._file(self.here.rank)
        part = file.with_suffix(".part")
        part.write_text(text)
        os.replace(part, file)

    def _listen(self) -> None:
        for rank in range(self.here.world_size):
            file = self._file(rank)
            text = file.read_text() if file.is_file() else ""
            last, beats = self._heard.get(rank, ("", 0))
            if text and _fields(text)[2] != _fields(last)[2]:
                self._idle = 0  # without it, who has answered all of its questions would not wait for the others
            self._heard[rank] = (last, beats + 1) if text in ("", last) else (text, 0)

    def _whom(self) -> str:
        """The processes that block the others: the silent ones, else those that do not wait with the least progress."""
        states = {rank: _fields(text) for rank, (text, _) in self._heard.items()}
        silent = [rank for rank, (_, beats) in self._heard.items() if beats > _SILENT]
        marks = {rank: int(state[2]) for rank, state in states.items() if state[4] != WAITING}
        late = silent or [rank for rank, count in marks.items() if count == min(marks.values())] or list(states)
        words = [self._described(rank, "; silent: stopped or dead" if silent else "") for rank in late]
        _, step, doing = self._at
        return f"no progress for {self.minutes:.3g} minutes at step {step} ({doing}): waiting for {', '.join(words)}"

    def _described(self, rank: int, more: str) -> str:
        _, _, _, step, doing = _fields(self._heard[rank][0])
        return f"process {rank} (step {step}, {doing}{more})"

    def lost(self) -> str:
        """The processes that ended without a word, to be asked after an error of communication; empty if there are none.

        Known at once for those of this machine; waits for the others until they must have been heard.
        """
        end = time.monotonic() + (_SILENT + 2) * 60 * (self.minutes or 0) / _BEATS
        while time.monotonic() < end:
            heard = dict(self._heard)
            gone = [rank for rank, (text, beats) in heard.items() if beats > _SILENT or _has_ended(_fields(text)[1])]
            if gone:
                return ", ".join(self._described(rank, "; ended or silent") for rank in gone)
            self._stopped.wait(0.05)
        return ""

    def _file(self, rank: int) -> Path:
        return self.folder / f"{rank}"


def _fields(text: str) -> list[str]:
    """Beats, host:process, marks, step, activity."""
    return (text or "0 ? 0 0 starting").split(" ", 4)


def _has_ended(identity: str) -> bool:
    """Whether a process of this machine has ended."""
    host, _, number = identity.rpartition(":")
    if host != socket.gethostname():
        return False
    with contextlib.suppress(PermissionError):
        try:
            os.kill(int(number), 0)
        except ProcessLookupError:
            return True
    return False
