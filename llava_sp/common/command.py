"""The frame of every command: what goes to standard error, which exit status, `--traceback`.

Exit status: 0 done, 1 a check that found something, 2 something the user can put right (`error: ...` says what), 130
interrupted by Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterable
from typing import Any

from llava_sp.common.processes import USER_ERRORS, FailedHere, Processes, ReportedElsewhere

INTERRUPTED = 130


def command_parser(module: str, description: str | None, **options: Any) -> argparse.ArgumentParser:
    """The parser of `python -m MODULE`, with `--traceback`; the description is printed as it is."""
    layout: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description, **layout | options)
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

    Of several `processes`, one on each machine prints the error, and each one that prints a `FailedHere`.

    With `clean_up_on_sigterm`, SIGTERM ends the process as an exception does: `finally` blocks run.
    """
    if clean_up_on_sigterm:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return action() or 0
    except ReportedElsewhere:
        return 2
    except BrokenPipeError:  # `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
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


def check_arguments(checks: Iterable[tuple[str, Any, bool, str]]) -> None:
    """Each is `(flag, value, does it fit, what would be right)`. Raises `ValueError` for the first that does not fit."""
    for flag, value, right, words in checks:
        if not right:
            raise ValueError(f"{flag} is {value}; it must be {words}")
