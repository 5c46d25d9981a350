"""Try new hostile inputs for the given time, and report the outcomes.

    python -m tests.hostile --minutes 30 [--surface NAME ...] [--seed N] [--jobs 2] [--failures FILE]
    python -m tests.hostile --surface NAME --case '{"target": ..., "action": ..., "at": [...], "value": ...}'
    python -m tests.hostile --list

Time is shared among the surfaces by their weights; NAME may be the beginning of several names. FILE gets every distinct failure with the
command that repeats it. Exit status: 0 all is right, 1 there were failures.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from queue import Empty
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.hostile.judge import RIGHT, WRONG
from tests.hostile.mutations import Mutation, drawn
from tests.hostile.surfaces import SURFACES
from tests.hostile.surfaces.base import Case, Workbench

CHUNK = 20  # mutations that are drawn at once
SHOWN = 3  # commands of a distinct failure
VARIES = re.compile(r"0x[0-9a-f]+|[\d.]+|'[^']*'|\S*/\S+")


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.hostile", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--surface", nargs="+", default=[""], metavar="NAME")
    parser.add_argument("--case", help="a mutation, as a failure is saved")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--failures", type=Path, default=Path("hostile_failures.txt"))
    parser.add_argument("--list", action="store_true", help="name the surfaces")
    args = parser.parse_args(words)
    names = [name for name in SURFACES if name.startswith(tuple(args.surface))]
    if args.list or not names:
        print("\n".join(SURFACES))
        return int(not args.list)
    with tempfile.TemporaryDirectory(prefix="hostile-") as root:
        if args.case:
            return _repeat(args.surface[0], Mutation.read(args.case), Path(root))
        return _run(args, names, Path(root))


def _repeat(name: str, mutation: Mutation, root: Path) -> int:
    bench = Workbench(SURFACES[name], root)
    case = bench.attempt(mutation)
    print(f"sound:   {_short(bench.sound.result)}")
    print(f"outcome: {_short(case.outcome.result)}, status {case.outcome.status}, check {case.outcome.check}")
    print(case.outcome.words.strip()[-4000:], case.outcome.trace[-4000:], sep="\n")
    print(f"{case.verdict}: {case.shown}")
    return int(case.failed)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 400 else f"{text[:200]} ... {text[-200:]}"


def _run(args: argparse.Namespace, names: list[str], root: Path) -> int:
    tally: dict[str, Counter[str]] = defaultdict(Counter)
    failures: dict[tuple[str, ...], list[Case]] = defaultdict(list)
    end = time.monotonic() + 60 * args.minutes
    print(f"seed {args.seed}, {len(names)} surfaces, {args.minutes:g} minutes", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        for case in _cases(names, args.seed, args.jobs, root, end):
            tally[case.surface][case.verdict] += 1
            if case.failed:
                key = (case.surface, case.verdict, VARIES.sub("#", case.shown)[:160])
                failures[key].append(case)
                if len(failures[key]) == 1:
                    print(f"{case.surface}: {case}", flush=True)
                args.failures.write_text(_report(failures))
    print(_table(tally))
    if failures:
        print(f"{len(failures)} distinct failures: {args.failures}")
    return int(bool(failures))


def _cases(names: list[str], seed: int, jobs: int, root: Path, end: float) -> Iterator[Case]:
    if jobs == 1:
        yield from _attempts(names, seed, root, end)
        return
    context = multiprocessing.get_context("fork")
    queue: Any = context.Queue()

    def work(job: int) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            for case in _attempts(names[job::jobs], seed + job, root / str(job), end):
                queue.put(replace(case, outcome=None))

    workers = [context.Process(target=work, args=(job,)) for job in range(jobs)]
    for worker in workers:
        worker.start()
    try:
        while any(worker.is_alive() for worker in workers) or not queue.empty():
            with contextlib.suppress(Empty):
                yield queue.get(timeout=1)
    finally:
        for worker in workers:
            worker.join()


def _attempts(names: list[str], seed: int, root: Path, end: float) -> Iterator[Case]:
    """One mutation after another, each of the surface with the least time so far."""
    benches: dict[str, Workbench] = {}
    spent = dict.fromkeys(names, 0.0)
    waiting: dict[str, list[Mutation]] = {name: [] for name in names}
    seen: set[tuple[str, Mutation]] = set()
    while time.monotonic() < end:
        name = min(names, key=spent.__getitem__)
        if name not in benches:
            benches[name] = Workbench(SURFACES[name], root / name)
            assert benches[name].sound.status == 0
        start = time.monotonic()
        if not waiting[name]:
            seed += 1
            found = drawn(benches[name].mutations, CHUNK, seed)
            waiting[name] = [mutation for mutation in found if (name, mutation) not in seen]
        if waiting[name]:
            mutation = waiting[name].pop()
            seen.add((name, mutation))
            yield benches[name].attempt(mutation)
        spent[name] += (time.monotonic() - start) / SURFACES[name].weight


def _report(failures: dict[tuple[str, ...], list[Case]]) -> str:
    """Every distinct failure, its count, and the commands that repeat it."""
    lines = []
    for (surface, verdict, _), cases in sorted(failures.items()):
        lines += [f"{surface}: {verdict} ({len(cases)} times): {cases[0].shown}"]
        lines += [f"    {case.command}" for case in cases[:SHOWN]]
    return "\n".join(lines) + "\n"


def _table(tally: dict[str, Counter[str]]) -> str:
    """Surfaces by outcomes; those that never happened are left out."""
    total: Counter[str] = sum(tally.values(), Counter())
    columns = [verdict for verdict in (*RIGHT, *WRONG) if total[verdict] or verdict in WRONG[:2]]
    width = max(map(len, tally), default=8)
    lines = [f"{'':{width}}  {'all':>6}  " + "  ".join(columns)]
    for name, counts in [*sorted(tally.items()), ("total", total)]:
        cells = "  ".join(f"{counts[column]:>{len(column)}}" for column in columns)
        lines.append(f"{name:{width}}  {sum(counts.values()):>6}  {cells}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
