"""Benchmarks: the recorded official files and answers scored, two scored runs compared, and logs resumed."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_sp.common.processes import Processes
from llava_sp.eval.base import Item
from llava_sp.eval.cli import main
from llava_sp.eval.compare import main as compare
from llava_sp.eval.run.registry import load_benchmark
from llava_sp.eval.run.runner import generate_answers, merge
from tests.eval.conftest import write_files
from tests.eval.fake import Echo, Fake
from tests.eval.judge_server import JudgeServer
from tests.hostile.judge import Spoilt, anything, content
from tests.hostile.surfaces.base import GOLDEN, Answer, Surface, through_command

NAMES = {"seed": "seedbench", "llavabench": "llava_bench"}  # of recordings, where not the benchmark's
REPLIES = {"llava_bench": "8 7\nBoth are fine.", "mmvet": "0.5", "mmvp": "yes"}
ANSWERS = "answers.jsonl"
JUDGEMENTS = "judgements.jsonl"


def recordings() -> dict[str, dict[str, Any]]:
    """What was recorded of each benchmark that has files, by the benchmark's name."""
    found = {file.stem: json.loads(file.read_text()) for file in sorted((GOLDEN / "eval").glob("*.json"))}
    return {NAMES.get(name, name): recorded for name, recorded in found.items() if "files" in recorded}


def write_recording(folder: Path, recorded: dict[str, Any]) -> None:
    """The official files in `folder/data`, the answers as lines in `folder/answers.jsonl`."""
    files = dict(recorded["files"])
    given = [n for n in files if n.startswith("answers/") or n in ("answers.json", "answers.jsonl")]
    lines = [line for name in given[:1] for line in files.pop(name)["data"]]
    files.pop("judge_replies.json", None)
    write_files(folder / "data", files)
    lines = lines or [{"question_id": item["id"], "text": item["raw"]} for item in recorded["items"]]
    lines = [{("text" if key == "response" else key): value for key, value in line.items()} for line in lines]
    write_lines(folder / ANSWERS, lines)


def write_lines(file: Path, lines: Sequence[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def run(name: str, folder: Path, *words: object) -> tuple[int, str]:
    """(exit status, what it printed) of scoring the answers in a folder."""
    out = io.StringIO()
    where = ["--answers", folder / ANSWERS, "--data", folder / "data"]
    with contextlib.redirect_stdout(out):
        status = main(load_benchmark(name), [str(word) for word in (*where, *words)])
    return status, out.getvalue()


def score(name: str, folder: Path, *words: object) -> tuple[int, Any]:
    """(exit status, score and metrics)."""
    status, out = run(name, folder, *words)
    if status:
        return status, None
    result = json.loads(out)
    result.pop("provenance")
    (result["metrics"].get("judge") or {}).pop("files", None)  # the hash of the spoilt file
    return status, result


def other_reply(spoilt: Spoilt) -> bool:
    """Tokens and the name of the model are null where the judge's server does not say them."""
    unsaid = [path[1:] in (("usage",), ("answered_by",)) and new is None for path, _, new in spoilt.differences]
    return content(spoilt) or (bool(unsaid) and all(unsaid))


class BenchmarkSurface(Surface):
    """Result: score, categories and all other metrics."""

    rules = (
        (JUDGEMENTS, other_reply),
        ("*.json", content),
        ("*.jsonl", content),
        ("*.tsv", anything),
        ("*.csv", anything),
        ("*.txt", anything),
    )
    seconds = 20.0
    weight = 0.4

    def __init__(self, name: str, recorded: dict[str, Any]):
        self.benchmark, self.name, self.recorded = name, f"eval.{name}", recorded
        self.judged = ["--judgements", JUDGEMENTS] if name in REPLIES else []

    def build(self, folder: Path) -> None:
        write_recording(folder, self.recorded)
        if self.judged:
            with JudgeServer(lambda body: REPLIES[self.benchmark]) as server:
                assert run(self.benchmark, folder, "--output", folder / "out", *server.arguments)[0] == 0
            (folder / "out" / JUDGEMENTS).rename(folder / JUDGEMENTS)
            shutil.rmtree(folder / "out")

    def act(self, folder: Path, words: Sequence[str]) -> Answer:
        return *score(self.benchmark, folder, *self.judged), None


SHOWN = (
    "image",
    "category",
    "answer",
)  # fields of a line that are shown beside a changed answer, and not all benchmarks have


def other_line(spoilt: Spoilt) -> bool:
    return content(spoilt) or all(path[1:2] in [(name,) for name in SHOWN] for path, *_ in spoilt.differences)


class CompareSurface(Surface):
    """Two scored runs of VQAv2. Result: what `compare` writes."""

    name = "outputs"
    rules = (("*/per_item.jsonl", other_line),)
    names = ("a and b",)
    seconds = 20.0

    def __init__(self, recorded: dict[str, Any]):
        self.recorded = recorded

    def build(self, folder: Path) -> None:
        write_recording(folder, self.recorded)
        lines = [json.loads(line) for line in (folder / ANSWERS).read_text().splitlines()]
        for output, answer in (("a", {}), ("b", {"text": "yes"})):
            write_lines(folder / ANSWERS, [line | answer for line in lines])
            assert run("vqav2", folder, "--output", folder / output)[0] == 0

    def targets(self, folder: Path) -> list[str]:
        return [f"{run}/{name}" for run in "ab" for name in ("metrics.json", "per_item.jsonl", "run.json")]

    def act(self, folder: Path, words: Sequence[str]) -> Answer:
        status = compare(["a", "b", "--samples", "50", "--output", "compared.json"])
        file = folder / "compared.json"
        return status, json.loads(file.read_text()) if file.is_file() else None, None


def other_answer(spoilt: Spoilt) -> bool:
    """A log's line may hold any text as its answer, and lines may be missing: they are asked again."""
    return isinstance(spoilt.after, list) and all(
        isinstance(line, dict) and isinstance(line.get("text"), str) for line in spoilt.after
    )


class LogSurface(Surface):
    """An interrupted run's logs. Result: the answers to all questions."""

    name = "logs"
    rules = (("*", other_answer),)
    seconds = 20.0

    def build(self, folder: Path) -> None:
        self._answer(folder, self._items()[:7])

    def act(self, folder: Path, words: Sequence[str]) -> Answer:
        def go_on() -> list[str]:
            self._answer(folder, self._items())
            return merge(Fake(), self._items(), folder, model_id="fake", settings_id="settings")

        return *through_command(go_on), None

    def _items(self) -> list[Item]:
        return [Item(id=i, text=f"question {i} " + "really " * (i % 4)) for i in range(10)]

    def _answer(self, folder: Path, items: list[Item]) -> None:
        about = {"settings": "settings"}
        generate_answers(
            Fake(), items, Echo(), folder, batch_size=3, processes=Processes(), progress=False, about=about
        )


SURFACES: list[Surface] = [BenchmarkSurface(name, recorded) for name, recorded in recordings().items()]
SURFACES += [CompareSurface(recordings()["vqav2"]), LogSurface()]
