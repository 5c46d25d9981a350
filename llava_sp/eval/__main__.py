"""Runs every benchmark whose data exist, one after the other, with one table beside the published figures.

    python -m llava_sp.eval --all --data ROOT --model M [--only NAME ...] [--output O]
    python -m llava_sp.eval --list

ROOT holds a folder for each benchmark, under its own name or the one it has in LLaVA's playground/data/eval. Any argument of
`python -m llava_sp.eval.NAME` can follow (--batch-size, --dtype, --limit, --judge, ...), for the benchmarks that have
it. Under `torchrun`, `accelerate launch` or `deepspeed --module` the questions are shared among the processes. The same
command again continues where the last one stopped.

    O/NAME/            what `python -m llava_sp.eval.NAME --output O/NAME` writes
    O/results.json     all scores with protocol, categories, published figures and their sources
    O/results.md       the table
    O/report.html      the table, bars by category, the worst answers with their images; needs no other file

A benchmark whose files are invalid is skipped, with the reason in the table, and the exit status is 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from llava_sp.common.command import command_parser, in_quotes, run_command
from llava_sp.common.files import read_json
from llava_sp.common.processes import USER_ERRORS, Processes
from llava_sp.common.provenance import now, versions
from llava_sp.eval.base import Benchmark
from llava_sp.eval.cli import INTERRUPTED, default_data, make_parser, watched
from llava_sp.eval.report.table import Row, Table
from llava_sp.eval.run.output import exclusive
from llava_sp.eval.run.registry import benchmark_names, load_benchmark

if TYPE_CHECKING:
    from llava_sp.common.watchdog import Watchdog
    from llava_sp.inference import Engine

_SINGLE = ("--model", "--data", "--output", "--answers", "--validate", "--images", "--split")  # not to be passed on


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring. Returns 0, or 2 if something did not run."""
    parser = command_parser("llava_sp.eval", __doc__)
    parser.add_argument("--all", action="store_true", help="every benchmark whose data are below ROOT")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these benchmarks")
    parser.add_argument("--list", action="store_true", help="name the benchmarks")
    parser.add_argument("--model", help="a LLaVA-SP checkpoint: directory or hub id")
    parser.add_argument("--data", type=Path, metavar="ROOT", help="folder with a folder for each benchmark")
    parser.add_argument("--output", type=Path, help="where results go (default ./runs/eval/all/CHECKPOINT)")
    parser.add_argument("--protocol", help="for the benchmarks that have it; the others are scored by their default")
    args, rest = parser.parse_known_args(argv)
    if args.list:
        for name in benchmark_names():
            print(f"{name:12} {load_benchmark(name).title}")
        return 0
    if not args.all and not args.only:
        parser.error("give --all, --only NAME ..., or --list; python -m llava_sp.eval.NAME runs a single one")
    if args.model is None or args.data is None:
        parser.error("--model and --data are needed")
    return run_command(lambda: _run(args, rest), traceback=args.traceback, on_interrupt=INTERRUPTED)


def _run(args: argparse.Namespace, rest: list[str]) -> int:
    classes = [load_benchmark(name) for name in dict.fromkeys(args.only or benchmark_names())]
    known = _arguments(classes, args, rest)
    present = [cls for cls in classes if _has_data(cls, known[cls], args.data)]
    absent = [cls.name for cls in classes if cls not in present]
    if not present or (args.only and absent):
        raise ValueError(f"--data {args.data} has no folder for {', '.join(absent)}")
    output = args.output or Path("runs") / "eval" / "all" / Path(args.model).name

    from llava_sp.eval.run.evaluate import open_engine  # torch and transformers from here on

    with Processes.from_environment().group() as processes, ExitStack() as stack:
        watch = stack.enter_context(watched(output, processes, known[present[0]]))
        watch.progress(0, "reading the checkpoint", patient=True)
        engine = open_engine(args.model, known[present[0]], processes)
        with watch.together():
            engine.processor()  # a checkpoint that cannot be opened is reported before anything else
            if processes.is_main:
                stack.enter_context(exclusive(output))
        rows = _rows(present, args, known, output, engine, watch)
        if not processes.is_main:
            return 0
        if absent:
            print(f"no data below {args.data} for {', '.join(absent)}", file=sys.stderr)
        limited = any(known[cls].limit is not None for cls in present)
        return _report(Table(args.model, rows, limited, {"date": now(), **versions()}), output)


def _report(table: Table, output: Path) -> int:
    """Writes and prints the table; the exit status."""
    from llava_sp.eval.report.html import write_report

    file, held = output / "results.json", {}
    with suppress(ValueError, OSError):  # none yet, or damaged: it is replaced
        held = read_json(file, {"benchmarks": dict})["benchmarks"]
    table.write(output)
    given = {row.benchmark.name for row in table.rows}
    left_out = [name for name in benchmark_names() if name in held and name not in given]
    if left_out:
        print(
            f"note: {file} held {', '.join(left_out)} too, whose folders are unchanged; one table of all, from the "
            f"answers in them: --only {' '.join(name for name in benchmark_names() if name in given.union(left_out))}",
            file=sys.stderr,
        )
    print("\n" + table.text())
    for note in table.notes:
        print(f"  {note}")
    print(f"results: {output / 'results.json'}, {output / 'results.md'}")
    print(f"report:  {write_report(output, table)}")
    return 2 if any(row.outcome is None for row in table.rows) else 0


def _arguments(
    classes: Sequence[type[Benchmark]], args: argparse.Namespace, rest: list[str]
) -> dict[type[Benchmark], argparse.Namespace]:
    """The arguments of each benchmark. Raises ValueError for those that no benchmark has."""
    single = [argument for argument in rest if argument.split("=")[0] in _SINGLE]
    if single:
        raise ValueError(f"{', '.join(single)} is for a single benchmark: python -m llava_sp.eval.NAME")
    protocols = sorted({protocol for cls in classes for protocol in cls.protocols})
    if args.protocol and args.protocol not in protocols:
        raise ValueError(
            f"none of these benchmarks has the protocol {args.protocol!r}; there are {', '.join(protocols)}"
        )
    parsed, unknown = {}, set(rest)
    for cls in classes:
        protocol = ["--protocol", args.protocol] if args.protocol in cls.protocols else []
        parsed[cls], left = make_parser(cls).parse_known_args([*rest, *protocol, "--model", args.model])
        unknown &= set(left)
    if unknown:
        raise ValueError(f"unknown arguments: {in_quotes(argument for argument in rest if argument in unknown)}")
    return parsed


def _has_data(cls: type[Benchmark], known: argparse.Namespace, root: Path) -> bool:
    """Whether there is a folder of the benchmark; one of another benchmark counts if it has files of this one too."""
    folder = default_data(cls, root)
    if folder.name == cls.name or folder.name not in benchmark_names():
        return folder.is_dir()
    try:
        return bool(cls.from_arguments(known).load(folder))
    except ValueError:
        return False


def _rows(
    classes: Sequence[type[Benchmark]],
    args: argparse.Namespace,
    known: dict[type[Benchmark], argparse.Namespace],
    output: Path,
    engine: Engine,
    watch: Watchdog,
) -> list[Row]:
    from llava_sp.eval.run.evaluate import evaluate

    rows = []
    for cls in classes:
        folder = output / cls.name
        try:
            outcome = evaluate(cls, known[cls], default_data(cls, args.data), folder, engine, watch)
        except USER_ERRORS as error:
            if args.traceback:
                raise
            if watch.here.is_main:
                print(f"error: {cls.name}: {error}", file=sys.stderr)
            rows.append(Row(cls, note=f"not run: {error}"))
            continue
        note = outcome.benchmark.unscored.splitlines()[0] if outcome and outcome.scores.score is None else ""
        rows.append(Row(cls, outcome, note, folder))
    return rows


if __name__ == "__main__":
    sys.exit(main())
