"""Command line; see the package's docstring."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import llava_sp.shapes.benchmarks as package
from llava_sp.common.command import command_parser, count, run_command, seed
from llava_sp.shapes.benchmarks import Settings, write_all


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser("llava_sp.shapes.benchmarks", package.__doc__)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder for the benchmarks, one folder each")
    add("--seed", type=seed, default=Settings.seed, help="default: %(default)s")
    add("--questions", type=count, default=Settings.questions, help="about how many of each benchmark (%(default)s)")
    args = parser.parse_args(argv)

    def action() -> None:
        write_all(args.output, Settings(seed=args.seed, questions=args.questions))

    return run_command(action, traceback=args.traceback)


if __name__ == "__main__":
    sys.exit(main())
