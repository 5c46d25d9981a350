"""Compare two runs of a benchmark: the difference with its uncertainty, and the questions whose answers changed.

    python -m llava_sp.eval.compare A B [--samples 2000] [--seed 0] [--show 5] [--output FILE.json]

A and B are output folders of `python -m llava_sp.eval.NAME`, or of `python -m llava_sp.eval --all` (then every benchmark
that both hold is compared). Both must have scored the same questions by the same protocol and, where there is one, judge.

The interval is a paired bootstrap (Efron and Tibshirani 1993, chapter 8): questions are drawn with replacement, the same
ones for A and B, the headline is computed anew for both, and the middle 95 % of the differences B - A is reported. Questions
that are only judged together (the two questions on an image of MME, the rotations of an MMBench question) are drawn
together. The interval covers the choice of questions, and nothing about seeds of training.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_sp.common.command import command_parser, count, natural, run_command, seed
from llava_sp.common.files import examples, read_json, read_jsonl, write_json
from llava_sp.common.schema import NUMBER
from llava_sp.eval.base import Benchmark
from llava_sp.eval.inputs.checks import ID
from llava_sp.eval.run.registry import benchmark_names, load_benchmark
from llava_sp.eval.scoring.vqa import AccuracyBenchmark

if TYPE_CHECKING:
    import numpy as np

RESAMPLES = 2000
_ROUNDING = 0.011  # of headlines
_METRICS = {
    "score": (NUMBER, None),
    "metrics": {"judge?": ({"model": str, "prompt": str}, None)},
    "provenance": {"benchmark": str, "protocol": str, "split": (str, None), "count": int, "questions?": str},
}
_ITEM = {"question_id": ID, "score": NUMBER, "unit?": (*ID, None)}


class Unscored(ValueError):
    """A run has answers and no score."""


@dataclass(frozen=True)
class Run:
    """An output folder, read back."""

    folder: Path
    benchmark: type[Benchmark]
    score: float
    protocol: str
    split: str | None
    items: Sequence[dict[str, Any]]
    judge: str | None = None
    questions: str | None = None  # hash of ids, prompts and images, where the run recorded it


@dataclass(frozen=True)
class Comparison:
    """Attributes: a, b, the headlines; difference, b - a; low, high, the middle 95 % of the bootstrap; better, worse, how
    many questions gained or lost from a to b; changed, how many were answered differently; items, those whose score
    changed, the largest change first."""

    benchmark: str
    protocol: str
    split: str | None
    count: int
    a: float
    b: float
    difference: float
    low: float
    high: float
    resamples: int
    better: int
    worse: int
    changed: int
    items: list[dict[str, Any]]


def read_run(folder: Path) -> Run:
    """Raises ValueError naming what is missing or damaged, or that the run has no score."""
    result = read_json(folder / "metrics.json", _METRICS)
    origin, judge, score = result["provenance"], result["metrics"].get("judge"), result["score"]
    benchmark = load_benchmark(origin["benchmark"])
    if score is None:
        raise Unscored(f"{folder} has answers of {origin['benchmark']} but no score (a server or a judge gives it)")
    items, found = read_jsonl(folder / "per_item.jsonl", _ITEM), None
    with suppress(ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
        found = benchmark.headline(items)
    if found is None or abs(found - score) > _ROUNDING or len(items) != origin["count"]:
        raise ValueError(
            f"{folder}/per_item.jsonl has {len(items)} questions, which make the score {found}, metrics.json has "
            f"{origin['count']} and {score}: one of the files was changed or cut off; score the answers again"
        )
    return Run(
        folder,
        benchmark,
        score,
        origin["protocol"],
        origin["split"],
        items,
        f"{judge['model']} (prompt: {judge['prompt']})" if judge else None,
        origin.get("questions"),
    )


def compare(a: Run, b: Run, resamples: int = RESAMPLES, seed: int = 0) -> Comparison:
    """Raises ValueError if the two did not score the same questions by the same rule."""
    problem = _difference(a, b)
    if problem:
        raise ValueError(f"{a.folder} and {b.folder} cannot be compared: {problem}")
    import numpy as np  # after the arguments are parsed

    differences = bootstrap(a.benchmark, a.items, b.items, resamples, seed)
    low, high = np.percentile(differences, [2.5, 97.5])
    pairs = list(zip(a.items, b.items))
    moved = [(first, second) for first, second in pairs if first["score"] != second["score"]]
    moved.sort(key=lambda pair: -abs(pair[1]["score"] - pair[0]["score"]))
    return Comparison(
        benchmark=a.benchmark.name,
        protocol=a.protocol,
        split=a.split,
        count=len(pairs),
        a=a.score,
        b=b.score,
        difference=round(b.score - a.score, 4),
        low=round(float(low), 4),
        high=round(float(high), 4),
        resamples=resamples,
        better=sum(second["score"] > first["score"] for first, second in moved),
        worse=sum(second["score"] < first["score"] for first, second in moved),
        changed=sum(first.get("answer") != second.get("answer") for first, second in pairs),
        items=[_changed_item(first, second) for first, second in moved],
    )


def _difference(a: Run, b: Run) -> str | None:
    """What keeps two runs from being compared; None if nothing does."""
    for what in ("benchmark", "protocol", "split", "judge"):
        first, second = (getattr(getattr(run, what), "name", getattr(run, what)) for run in (a, b))
        if first != second:
            return f"{what} is {first} in one, {second} in the other"
    ids = [[record["question_id"] for record in run.items] for run in (a, b)]
    if ids[0] != ids[1]:
        only = sorted({*map(str, ids[0])} ^ {*map(str, ids[1])})
        where = f"{len(only)} are in one only ({examples(only)})" if only else "in another order"
        return f"not the same questions: {len(ids[0])} and {len(ids[1])}; {where}"
    asked = [[(record.get("question"), record.get("references")) for record in run.items] for run in (a, b)]
    if asked[0] != asked[1] or (a.questions and b.questions and a.questions != b.questions):
        return (
            "not the same questions: the ids are the same, but not what was asked, what is right, or the images' names"
        )
    return None


def bootstrap(
    benchmark: type[Benchmark], a: Sequence[dict], b: Sequence[dict], resamples: int, seed: int
) -> np.ndarray:
    """Differences of the headline [resamples]: the same units of both runs drawn, with replacement."""
    import numpy as np

    units: dict[Any, list[int]] = {}
    for position, record in enumerate(a):
        units.setdefault(record.get("unit", ("item", position)), []).append(position)
    members = list(units.values())
    rng = np.random.default_rng(seed)
    draws = (rng.integers(len(members), size=len(members)) for _ in range(resamples))
    rule = next(vars(cls)["headline"] for cls in benchmark.__mro__ if "headline" in vars(cls))
    if rule in (vars(Benchmark)["headline"], vars(AccuracyBenchmark)["headline"]):  # means: sums of units are enough
        gains = np.array([sum(b[i]["score"] - a[i]["score"] for i in unit) for unit in members])
        sizes = np.array([len(unit) for unit in members])
        return np.array([gains[draw].sum() / sizes[draw].sum() for draw in draws])
    differences = []
    for draw in draws:
        chosen = [i for unit in draw for i in members[unit]]
        differences.append(benchmark.headline([b[i] for i in chosen]) - benchmark.headline([a[i] for i in chosen]))
    return np.array(differences)


def _changed_item(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    kept = {key: a[key] for key in ("question_id", "question", "image", "category", "references") if key in a}
    answers = {"answers": [a.get("answer"), b.get("answer")], "scores": [a["score"], b["score"]]}
    return kept | answers


def find_pairs(a: Path, b: Path) -> list[tuple[Path, Path]]:
    """The folders to compare: a and b themselves, or the benchmarks below both."""
    if (a / "metrics.json").is_file() or (b / "metrics.json").is_file():
        return [(a, b)]
    below = [{path.parent.name for path in folder.glob("*/metrics.json")} for folder in (a, b)]
    order = benchmark_names()
    names = sorted(below[0] & below[1], key=lambda name: order.index(name) if name in order else -1)
    if not names:
        raise ValueError(f"{a} and {b} hold no results of a benchmark in common (metrics.json, or NAME/metrics.json)")
    for folder, other in ((a, below[0] - below[1]), (b, below[1] - below[0])):
        if other:
            print(f"note: only {folder} holds {', '.join(sorted(other))}", file=sys.stderr)
    return [(a / name, b / name) for name in names]


def _print(result: Comparison, show: int) -> None:
    split = f", {result.split}" if result.split else ""
    print(f"{result.benchmark}{split} ({result.protocol}, {result.count} questions)")
    print(
        f"  A {result.a:g}   B {result.b:g}   B - A {result.difference:+.2f}   95 % [{result.low:+.2f}, {result.high:+.2f}]"
    )
    print(f"  {result.changed} answers differ; {result.better} questions score better in B, {result.worse} worse")
    for item in result.items[:show]:
        (first, second), scores = item["answers"], item["scores"]
        question = " ".join(str(item.get("question", "")).split())
        print(f"    {item['question_id']}  {question[:70]}")
        print(f"      A {scores[0]:g} {str(first)[:60]!r}   B {scores[1]:g} {str(second)[:60]!r}")
    if len(result.items) > show:
        print(f"    ... {len(result.items) - show} more; --show N, or --output FILE.json for all")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring. Returns 0, or 2 with a message for runs that do not compare."""
    parser = command_parser("llava_sp.eval.compare", __doc__)
    parser.add_argument("a", type=Path, help="output folder of the first run")
    parser.add_argument("b", type=Path, help="output folder of the second run")
    parser.add_argument("--samples", type=count, default=RESAMPLES, help=f"bootstrap samples (default {RESAMPLES})")
    parser.add_argument("--seed", type=seed, default=0, help="of the bootstrap")
    parser.add_argument("--show", type=natural, default=5, help="how many changed questions to print (default 5)")
    parser.add_argument("--output", type=Path, help="write everything as JSON to this file")
    args = parser.parse_args(argv)

    def run() -> int:
        """Compares and prints each pair; of several, one that does not compare does not stop the others."""
        pairs = find_pairs(args.a, args.b)
        results, status = [], 0
        for a, b in pairs:
            try:
                results.append(compare(read_run(a), read_run(b), args.samples, args.seed))
                _print(results[-1], args.show)
            except ValueError as error:
                if len(pairs) == 1:
                    raise
                unscored = isinstance(error, Unscored)
                print(f"note: left out: {error}" if unscored else f"error: {error}", file=sys.stderr)
                status = status if unscored else 2
        if args.output:
            write_json(args.output, {"a": str(args.a), "b": str(args.b), "results": [asdict(r) for r in results]})
        return status

    return run_command(run, traceback=args.traceback)


if __name__ == "__main__":
    sys.exit(main())
