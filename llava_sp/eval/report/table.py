"""The table of a whole evaluation: what was measured, beside what was published, as text, Markdown and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_sp.common.files import write_atomic, write_json
from llava_sp.eval.base import SOURCES, Benchmark
from llava_sp.eval.run.output import Outcome


@dataclass(frozen=True)
class Row:
    """A benchmark of the table; `outcome` is None where it was not scored, and `note` says why."""

    benchmark: type[Benchmark]
    outcome: Outcome | None = None
    note: str = ""
    output: Path | None = None

    @property
    def score(self) -> float | None:
        return self.outcome.scores.score if self.outcome else None

    @property
    def count(self) -> int:
        """How many questions the score is over."""
        if self.outcome is None:
            return 0
        counted = self.outcome.scores.count
        return len(self.outcome.items) if counted is None else counted

    @property
    def published(self) -> Mapping[str, float]:
        """Published figures, of the split that was asked where they differ by split."""
        return (self.outcome.benchmark if self.outcome else self.benchmark).published

    @property
    def published_on(self) -> str:
        return (self.outcome.benchmark if self.outcome else self.benchmark).published_on


@dataclass(frozen=True)
class Table:
    """The rows of one model; `limited` if only the first questions of each benchmark were asked."""

    model: str
    rows: Sequence[Row]
    limited: bool = False
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def header(self) -> list[str]:
        return ["benchmark", "protocol", "questions", Path(self.model).name, *SOURCES]

    def cells(self, row: Row) -> list[str]:
        """The row as text; `*` marks published figures of other questions or another judge."""
        outcome = row.outcome
        about = [outcome.benchmark.protocol, str(row.count)] if outcome else ["", ""]
        mark = "*" if row.published_on else ""
        published = [f"{row.published[s]:.1f}{mark}" if s in row.published else "" for s in SOURCES]
        score = "-" if row.score is None else f"{row.score:.2f}"
        return [row.benchmark.name, *about, score, *published]

    @property
    def notes(self) -> list[str]:
        """What the table does not say: metrics, why something has no score, what published figures are of."""
        notes = [f"{row.benchmark.name}: {row.note}" for row in self.rows if row.note]
        if self.limited:
            notes.insert(
                0, "--limit: only the first questions of each benchmark; nothing here compares with published figures"
            )
        of = [f"{row.benchmark.name}: {row.published_on}" for row in self.rows if row.published_on]
        if of:
            notes.append("* published figures do not compare directly with a local score: " + "; ".join(of))
        shown = [source for source in SOURCES if any(source in row.published for row in self.rows)]
        notes += [f"{source}: as published in {SOURCES[source]}" for source in shown]
        return notes

    def text(self) -> str:
        lines = [self.header, *(self.cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        aligned = [
            "  ".join(f"{cell:{'<' if i < 2 else '>'}{w}}" for i, (cell, w) in enumerate(zip(line, widths)))
            for line in lines
        ]
        return "\n".join([aligned[0].rstrip(), "-" * len(aligned[0]), *(line.rstrip() for line in aligned[1:])])

    def markdown(self) -> str:
        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

        rule = line(["---"] * 2 + ["---:"] * (len(self.header) - 2))
        table = [line(self.header), rule, *(line(self.cells(row)) for row in self.rows)]
        notes = [f"- {note}" for note in self.notes]
        metrics = [f"- {row.benchmark.name}: {row.benchmark.title}" for row in self.rows]
        return "\n".join([f"# {self.model}", "", *table, "", *notes, "", "The figures:", "", *metrics, ""])

    def json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "limited": self.limited,
            "benchmarks": {row.benchmark.name: self._record(row) for row in self.rows},
            "sources": dict(SOURCES),
            "provenance": self.provenance,
        }

    def write(self, folder: Path) -> None:
        write_json(folder / "results.json", self.json())
        write_atomic(folder / "results.md", self.markdown())

    def _record(self, row: Row) -> dict[str, Any]:
        record: dict[str, Any] = {"title": row.benchmark.title, "score": row.score}
        if row.outcome:
            result, benchmark = row.outcome.result, row.outcome.benchmark
            record |= {"protocol": benchmark.protocol, "split": benchmark.split, "count": row.count}
            record |= {"counted": row.outcome.scores.counted}
            record |= {key: result[key] for key in ("scored_as", "categories") if key in result}
        if row.note:
            record["note"] = row.note
        record |= {"published": dict(row.published), "published_on": row.published_on or None}
        return record | {"output": str(row.output) if row.output else None}
