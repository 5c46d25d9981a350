"""A benchmark without files and a model without weights: what the runner's tests run, also as a process to be killed:

python tests/eval/fake.py OUTPUT COUNT BATCH_SIZE SECONDS_PER_BATCH
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from llava_sp.common.processes import Processes
from llava_sp.eval.base import Benchmark, Item, Scores
from llava_sp.eval.run.runner import generate_answers, merge


class Fake(Benchmark):
    name = "fake"
    title = "nothing"

    def load(self, data: Path) -> list[Item]:
        return make_items(int(str(data)))

    def score(self, items, answers) -> Scores:
        return Scores(score=0.0, metrics={}, per_item=[])


def make_items(count: int) -> list[Item]:
    return [Item(id=1000 + i, text=f"question {i} " + "really " * (i * 7 % 11)) for i in range(count)]


class Echo:
    """Answers with the question's own words, a character above ASCII, and a line break."""

    def __init__(self, seconds: float = 0.0):
        self.seconds = seconds
        self.batches: list[list[str]] = []

    def prepare(self, items: list[Item]) -> list[Item]:
        return items

    def answer(self, batch: list[Item]) -> list[str]:
        self.batches.append([item.key for item in batch])
        time.sleep(self.seconds)
        return [f"écho\nof {item.text}" for item in batch]


def main() -> None:
    output, count, batch_size, seconds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    benchmark, items = Fake(), make_items(count)
    with Processes.from_environment().group() as processes:
        with processes.together():
            generate_answers(
                benchmark,
                items,
                Echo(seconds),
                output,
                batch_size=batch_size,
                processes=processes,
                progress=False,
            )
        if processes.is_main:
            merge(benchmark, items, output, model_id="fake", settings_id="settings")


if __name__ == "__main__":
    main()
