"""What the benchmarks' tests share: calling the command line, reading its results, changing files of lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from llava_sp.eval.base import Benchmark
from llava_sp.eval.cli import main


def command_of(benchmark: type[Benchmark]) -> Callable[..., tuple[int, str, str]]:
    """`run(capsys, *arguments)`: the command line of a benchmark; exit status, output, errors."""

    def run(capsys, *arguments: object) -> tuple[int, str, str]:
        status = main(benchmark, [str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def write_lines(file: Path, lines: list[dict]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def results_of(output: Path) -> tuple[dict, list[dict]]:
    """What metrics.json and per_item.jsonl hold."""
    return json.loads((output / "metrics.json").read_text()), read_lines(output / "per_item.jsonl")
