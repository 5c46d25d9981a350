"""What a quickstart folder holds, read back: losses, scores, answers, and the majority baseline beside them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from llava_sp.common.files import read_json, read_jsonl

STAGES = {"pretrain": "Stage 1: projector, captions", "lora": "Stage 2: LoRA + projector, questions"}


METRICS = {"score": float, "metrics": {"per_question_type": {str: float}}}


@dataclass(frozen=True)
class Result:
    """One trained and scored model.

    Attributes:
        losses: stage folder -> [(step, loss)].
        score: VQA accuracy in percent; `per_type` the same by question type.
        items: the lines of per_item.jsonl.
    """

    name: str
    variant: str
    losses: dict[str, list[tuple[int, float]]]
    score: float
    per_type: dict[str, float]
    items: list[dict]


def load_results(output: Path, runs: Sequence[tuple[str, str]]) -> list[Result]:
    """Read the runs `(folder name, variant)` below `output`. Raises `ValueError` naming a file that is missing."""
    return [_load(output / name, variant) for name, variant in runs]


def _load(folder: Path, variant: str) -> Result:
    metrics = read_json(folder / "vqav2" / "metrics.json", METRICS)
    losses = {}
    for stage in STAGES:
        lines = read_jsonl(folder / stage / "log.jsonl")
        losses[stage] = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    items = read_jsonl(folder / "vqav2" / "per_item.jsonl")
    return Result(folder.name, variant, losses, metrics["score"], metrics["metrics"]["per_question_type"], [*items])


def majority_baseline(items: Sequence[dict]) -> tuple[float, dict[str, float]]:
    """What a model scores that always gives the most frequent right answer of the question type: percent overall, by type.

    The answer is chosen on the very questions that are scored, so no guess by type alone can do better.
    """
    by_type: dict[str, list[list[str]]] = defaultdict(list)
    for item in items:
        by_type[item["question_type"]].append(item["references"])
    scores = {}
    for kind, references in by_type.items():
        answer = Counter(Counter(given).most_common(1)[0][0] for given in references).most_common(1)[0][0]
        scores[kind] = [min(1.0, given.count(answer) / 3) for given in references]
    everything = [score for values in scores.values() for score in values]
    return 100 * mean(everything), {kind: 100 * mean(values) for kind, values in scores.items()}


def table(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: overall first, then by question type; a column for each variant, the baseline last.

    Over several seeds a cell is the mean and the standard deviation.
    """
    variants = list(dict.fromkeys(result.variant for result in results))
    items = results[0].items
    baseline, baseline_by_type = majority_baseline(items)
    counts = Counter(item["question_type"] for item in items)
    rows = [["overall", str(len(items))]]
    rows[0] += [_cell([r.score for r in results if r.variant == v]) for v in variants] + [f"{baseline:.1f}"]
    for kind in sorted(counts):
        cells = [_cell([r.per_type.get(kind, 0.0) for r in results if r.variant == v]) for v in variants]
        rows.append([f"{kind} ...", str(counts[kind]), *cells, f"{baseline_by_type[kind]:.1f}"])
    return ["VQA accuracy, %", "questions", *variants, "majority answer"], rows


def _cell(values: Sequence[float]) -> str:
    return f"{values[0]:.1f}" if len(values) == 1 else f"{mean(values):.1f} ±{stdev(values):.1f}"


def render_table(results: Sequence[Result]) -> str:
    """The table as aligned text."""
    header, rows = table(results)
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths)))
        return "  ".join([first, *rest])

    rule = "-" * len(line(header))
    return "\n".join([line(header), rule, line(rows[0]), rule, *(line(row) for row in rows[1:])])
