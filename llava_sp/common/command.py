"""Shared by all commands: output on standard error, exit status, `--traceback`.

Exit status: 0 done, 1 a check that found something, 2 an error that the user can correct (`error: ...`), 130
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
    """The parser of `python -m MODULE`, with `--traceback`; the description is printed unchanged."""
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

    With several `processes`, one per machine prints the error; each prints its own `FailedHere`.

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
        print(f"\n{on_interrupt}", file=sys.stderr)
        return INTERRUPTED


def check_arguments(checks: Iterable[tuple[str, Any, bool, str]]) -> None:
    """Each is `(flag, value, whether it is valid, what is valid)`. Raises `ValueError` for the first invalid value."""
    for flag, value, right, words in checks:
        if not right:
            raise ValueError(f"{flag} is {value}; it must be {words}")
