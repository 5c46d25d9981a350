"""Every benchmark whose data are there, one after the other, and one table beside the published figures.

    python -m llava_sp.eval --all --data ROOT --model M [--only NAME ...] [--output O]
    python -m llava_sp.eval --list

ROOT holds a folder for each benchmark, under its own name or the one it has in LLaVA's playground/data/eval. Any argument of
`python -m llava_sp.eval.NAME` can follow (--batch-size, --dtype, --limit, --judge, ...); it goes to the benchmarks that know
it. Under `torchrun`, `accelerate launch` or `deepspeed --module` the questions are shared among the processes. The same
command again goes on where the last one stopped.

    O/NAME/            what `python -m llava_sp.eval.NAME --output O/NAME` writes
    O/results.json     all scores with protocol, categories, published figures and their sources
    O/results.md       the table
    O/report.html      the table, bars by category, the worst answers with their pictures; needs no other file

A benchmark whose files are not in order is left out with its reason in the table, and the exit status is 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llava_sp.common.processes import Processes, ReportedElsewhere
from llava_sp.common.provenance import now, versions
from llava_sp.eval.base import Benchmark
from llava_sp.eval.cli import check_numbers, default_data, make_parser
from llava_sp.eval.report.table import Row, Table
from llava_sp.eval.run.evaluate import evaluate, open_engine, together
from llava_sp.eval.run.registry import benchmark_names, load_benchmark

_OWN = (
    "--model",
    "--data",
    "--output",
    "--answers",
    "--validate",
    "--images",
    "--split",
)  # are for one benchmark, or set here


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring. Returns 0, or 2 if something did not run."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if args.list:
        for name in benchmark_names():
            print(f"{name:12} {load_benchmark(name).title}")
        return 0
    if not args.all and not args.only:
        parser.error("give --all, --only NAME ..., or --list; python -m llava_sp.eval.NAME runs a single one")
    if args.model is None or args.data is None:
        parser.error("--model and --data are needed")
    try:
        return _run(args, rest)
    except ReportedElsewhere:  # the process it concerns says it
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llava_sp.eval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--all", action="store_true", help="every benchmark whose data are below ROOT")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these benchmarks")
    parser.add_argument("--list", action="store_true", help="name the benchmarks")
    parser.add_argument("--model", help="a LLaVA-SP checkpoint: directory or hub id")
    parser.add_argument("--data", type=Path, metavar="ROOT", help="folder with a folder for each benchmark")
    parser.add_argument("--output", type=Path, help="where results go (default ./runs/eval/all/CHECKPOINT)")
    parser.add_argument("--protocol", help="for the benchmarks that have it; the others are scored by their default")
    return parser


def _run(args: argparse.Namespace, rest: list[str]) -> int:
    if not args.data.is_dir():
        raise ValueError(f"--data {args.data} is not a directory")
    wanted = args.only or benchmark_names()
    classes = [load_benchmark(name) for name in dict.fromkeys(wanted)]
    if args.protocol and not any(args.protocol in cls.protocols for cls in classes):
        known = sorted({protocol for cls in classes for protocol in cls.protocols})
        raise ValueError(f"none of these benchmarks has the protocol {args.protocol!r}; there are {', '.join(known)}")
    parsed = {cls: _arguments(cls, args, rest) for cls in classes}
    _check_all_known(parsed)
    present = [cls for cls in classes if _has_data(cls, parsed[cls][0], args.data)]
    absent = [cls.name for cls in classes if cls not in present]
    if not present or (args.only and absent):
        raise ValueError(f"{args.data} has no folder for {', '.join(absent)}")
    output = args.output or Path("runs") / "eval" / "all" / Path(args.model).name
    with Processes.from_environment().group() as processes:
        rows = _rows(present, args, {cls: known for cls, (known, _) in parsed.items()}, output, processes)
    if not processes.is_main:
        return 0
    if absent:
        print(f"no data below {args.data} for {', '.join(absent)}", file=sys.stderr)
    return _report(args, rows, output, limited=parsed[present[0]][0].limit is not None)


def _arguments(cls: type[Benchmark], args: argparse.Namespace, rest: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The benchmark's own arguments, and what of `rest` it does not know."""
    own = [argument for argument in rest if argument.split("=")[0] in _OWN]
    if own:
        raise ValueError(f"{', '.join(own)} is for a single benchmark: python -m llava_sp.eval.{cls.name}")
    protocol = ["--protocol", args.protocol] if args.protocol in cls.protocols else []
    known, unknown = make_parser(cls).parse_known_args([*rest, *protocol, "--model", args.model])
    check_numbers(known)
    return known, unknown


def _check_all_known(parsed: dict[type[Benchmark], tuple[argparse.Namespace, list[str]]]) -> None:
    """Raises ValueError for arguments that no benchmark knows."""
    left = [set(unknown) for _, unknown in parsed.values()]
    nowhere = sorted(set.intersection(*left), key=str)
    if nowhere:
        raise ValueError(f"unknown arguments: {' '.join(nowhere)}")


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
    processes: Processes,
) -> list[Row]:
    engine = open_engine(args.model, known[classes[0]], processes)
    together(processes, engine.processor)  # a checkpoint that cannot be opened is said before anything else
    rows = []
    for cls in classes:
        folder = output / cls.name
        try:
            outcome = evaluate(cls, known[cls], default_data(cls, args.data), folder, engine, processes)
        except (ValueError, OSError, MemoryError) as error:
            if known[cls].traceback:
                raise
            if processes.is_main:
                print(f"error: {cls.name}: {error}", file=sys.stderr)
            rows.append(Row(cls, note=f"not run: {error}"))
            continue
        note = outcome.benchmark.unscored.splitlines()[0] if outcome and outcome.scores.score is None else ""
        rows.append(Row(cls, outcome, note, folder))
    return rows


def _report(args: argparse.Namespace, rows: Sequence[Row], output: Path, limited: bool) -> int:
    from llava_sp.eval.report.html import write_report

    table = Table(args.model, rows, limited, {"date": now(), **versions()})
    table.write(output)
    print("\n" + table.text())
    for note in table.notes:
        print(f"  {note}")
    print(f"results: {output / 'results.json'}, {output / 'results.md'}")
    print(f"report:  {write_report(output, table)}")
    return 2 if any(row.outcome is None for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
