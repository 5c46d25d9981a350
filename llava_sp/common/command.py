"""Shared by all commands: output on standard error, exit status, `--traceback`.

Exit status: 0 done, 1 a check that found something, 2 an error that the user can correct (`error: ...`), 130
interrupted by Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from llava_sp.common.processes import USER_ERRORS, FailedHere, Processes, ReportedElsewhere
from llava_sp.common.schema import Check, fits, is_utf8, whole

INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """A parser with one-line errors, in which an empty word is seen; none is a path, as `Path("")` is where one stands."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.register("type", Path, _path)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        for word in words:
            if not is_utf8(word) or "\0" in word:
                self.error(f"{word!r} is not UTF-8 text")
        return super().parse_known_args(words, namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {in_quotes(unknown)}")
        return found

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (\S+): is ", r"\1 is ", message)  # from `fitting`
        self.exit(2, f"error: {message}\n")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        try:
            sys.stdout.flush()
        except BrokenPipeError:  # `--help | head`
            status = _reader_gone()
        super().exit(status, message)


def in_quotes(words: Iterable[str]) -> str:
    """The words of a command line, in quotes where they could not be seen."""
    return " ".join(word if word.isprintable() and word.strip() else repr(word) for word in words)


def _path(word: str) -> Path:
    if not word.strip():
        raise argparse.ArgumentTypeError(f"is {word!r}; it must be a path")
    return Path(word)


def fitting(right: Check) -> Callable[[str], Any]:
    """A type for `add_argument`: the number or text that a word gives, which must fit `right`."""

    def read(word: str) -> Any:
        with contextlib.suppress(ValueError):
            value = right.spec(word)
            if fits(value, right):
                return value
        raise argparse.ArgumentTypeError(f"is {word[:40]!r}; it must be {right.words}")

    return read


count, natural, seed = fitting(whole(1)), fitting(whole(0)), fitting(whole(0, 2**32 - 1))
at_once = fitting(whole(1, 1024))  # processes, threads, requests, beams: more would exhaust memory
share_of_peak = fitting(Check(lambda share: 0 < share <= 1, "a share of the peak, above 0 and at most 1", float))
temperature = fitting(
    Check(lambda t: t == 0 or 0.001 <= t <= 1000, "0 (greedy), or a number from 0.001 to 1000", float)
)


def command_parser(module: str, description: str | None, **options: Any) -> argparse.ArgumentParser:
    """The parser of `python -m MODULE`, with `--traceback`; the description is printed unchanged."""
    layout: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = _Parser(prog=f"python -m {module}", description=description, **layout | options)
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    return parser


def run_command(
    action: Callable[[], int | None],
    *,
    traceback: bool = False,
    on_interrupt: str = "interrupted",
    clean_up_on_sigterm: bool = False,
    processes: Processes | None = None,
) -> int:
    """Call `action`; returns its exit status (None is 0), or that of the error that ended it.

    With several `processes`, one per machine prints the error; each prints its own `FailedHere`.

    With `clean_up_on_sigterm`, SIGTERM ends the process as an exception does: `finally` blocks run.
    """
    if clean_up_on_sigterm:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if isinstance(sys.stdout, io.TextIOWrapper):  # lone surrogates, terminals with few characters
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = action() or 0
        sys.stdout.flush()  # a closed pipe is noticed here, not while Python exits
        return status
    except ReportedElsewhere:
        return 2
    except BrokenPipeError:  # `... | head`
        return _reader_gone()
    except USER_ERRORS as error:
        if traceback:
            raise
        here = processes or Processes()
        if here.is_local_main or isinstance(error, FailedHere):
            print(f"{here.name}error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        if (processes or Processes()).is_main:
            print(f"\n{on_interrupt}", file=sys.stderr)
        return INTERRUPTED


def _reader_gone() -> int:
    """The exit status for a closed pipe; the remaining standard output is discarded."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


def check_arguments(checks: Iterable[tuple[str, Any, bool, str]]) -> None:
    """Each is `(flag, value, whether it is valid, what is valid)`. Raises `ValueError` for the first invalid value."""
    for flag, value, right, words in checks:
        if not right:
            raise ValueError(f"{flag} is {value}; it must be {words}")
