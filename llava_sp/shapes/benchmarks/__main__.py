"""Command line; see the package's docstring."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llava_sp.shapes.benchmarks import Settings, write_all


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m llava_sp.shapes.benchmarks",
        description="Write the shapes world in the official format of every benchmark.",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the benchmarks, one folder each")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--questions", type=int, default=Settings.questions, help="about how many of each benchmark")
    args = parser.parse_args(argv)
    if args.questions < 1 or args.seed < 0:
        parser.error(f"--questions must be at least 1 and --seed at least 0: {args.questions}, {args.seed}")
    try:
        write_all(args.output, Settings(seed=args.seed, questions=args.questions))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
