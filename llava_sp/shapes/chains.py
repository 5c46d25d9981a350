"""Chains of commands, several chains at a time: each command a process whose lines are shown and kept in a file."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

UNSHOWN = ("Loading weights:",)  # progress bars of less than a second; the log files keep them


@dataclass(frozen=True)
class Command:
    """What to run: `words` after `python`, under a title, with the file that keeps what it prints."""

    title: str
    words: Sequence[str]
    log: Path


class Chains:
    """Runs named chains of commands: in order within a chain, at most `jobs` at once, the one that waited longest first.

    Args:
        jobs: how many commands run at once; each gets an even share of the processor's cores, unless OMP_NUM_THREADS is
            set, because small models gain little from threads and lose much where threads outnumber cores.
        heading: what to print in front of a command's title, such as the time so far.
    """

    def __init__(self, jobs: int, heading: Callable[[], str] = lambda: "") -> None:
        self.jobs, self.heading = jobs, heading
        self.running: set[subprocess.Popen[str]] = set()
        self.stopping = False
        threads = {"OMP_NUM_THREADS": str(max(1, cores() // jobs))}
        self.environment = threads | os.environ | {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}

    def run(self, chains: dict[str, Sequence[Command]]) -> None:
        """Run them all. The first command that fails ends the others; raises `SystemExit` with its status."""
        width = max(map(len, chains))
        waiting = deque((name.ljust(width), deque(chain)) for name, chain in chains.items())

        def work() -> None:
            # Commands inherit this: Ctrl-C reaches this process alone, which ends them.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            while not self.stopping:
                try:
                    name, chain = waiting.popleft()
                except IndexError:  # those that run the last chains go on with them
                    return
                self.execute(name, chain.popleft())
                if chain:
                    waiting.append((name, chain))

        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                workers = [pool.submit(work) for _ in range(min(self.jobs, len(chains)))]
                wait(workers, return_when=FIRST_EXCEPTION)
            finally:  # also where this process is interrupted
                self.stop()
        failures = [failure for worker in workers if (failure := worker.exception())]
        if failures:
            raise failures[0]

    def execute(self, name: str, command: Command) -> None:
        """Run one command; every line it prints is shown behind its chain's name. Raises `SystemExit` if it fails."""
        line = shlex.join(["python", *command.words])
        print(f"\n== {name.strip()}: {command.title}{self.heading()}\n$ {line}\n", end="", flush=True)
        command.log.parent.mkdir(parents=True, exist_ok=True)
        with open(command.log, "w", encoding="utf-8") as log:
            process = subprocess.Popen(
                [sys.executable, *command.words],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=self.environment,
            )
            self.running.add(process)
            if self.stopping:  # since a moment ago
                process.terminate()
            assert process.stdout is not None
            for text in process.stdout:
                log.write(text)
                if text.strip() and not text.startswith(UNSHOWN) and not self.stopping:
                    print(f"  {name} | {text.rstrip()}\n", end="", flush=True)
            status = process.wait()
            self.running.discard(process)
        if status != 0 and not self.stopping:
            self.stopping = True
            print(f"error: {line}\nended with status {status}; its output is in {command.log}", file=sys.stderr)
            raise SystemExit(status)

    def stop(self) -> None:
        """End what still runs and start nothing more: the same commands again go on where these were."""
        self.stopping = True
        for process in list(self.running):
            process.terminate()


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
