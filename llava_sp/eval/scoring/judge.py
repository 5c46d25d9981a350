"""Benchmarks whose answers a judge model grades (LLaVA-Bench, MM-Vet, MMVP).

    --judge MODEL             ask this model; by default OpenAI, with the key in OPENAI_API_KEY
    --judge-url URL           any other server with OpenAI's chat API (vLLM, SGLang, llama.cpp, a proxy): the part
                              before /chat/completions, as http://localhost:8000/v1; needs no key unless the server does
    --judge-key-env NAME      the environment variable that holds the key; keys are neither written nor printed
    --judge-runs N            judge everything N times and average (default 1)
    --judge-concurrency N     requests at once (default 8);  --judge-timeout SECONDS (default 300) is for a single one
    --judgements FILE ...     score recorded replies instead of asking; several files are several runs

Judging needs the package `openai` (`pip install llava_sp[eval]`). Without --judge the answers are produced and the command
prints how to judge them later; if O/judgements.jsonl exists, its replies are scored again.

Every raw reply is appended to O/judgements.jsonl as it comes: item (`key`, `question_id`), `run`, `attempt`, `judge` and
`answered_by` (as the server reports), `date`, settings, `reply`, tokens, and the hash of the whole request:
judge, settings, prompt and answer. A recorded reply is used only where this hash is that of the request that would be sent:
so the same command again asks only for what is missing, whatever stopped it, and replies to other answers, by other judges
or to other prompts may stay in the file and are never mixed in. The address of the server is not part of the hash.

After rate limits, timeouts, lost connections, replies that are not JSON and errors of the server (5xx) the request is sent
again, 8 times in all, after 1, 2, 4, ... 60 seconds or what the server's Retry-After says. A refused key, an unknown model or
a quota that is used up ends the run at once. What was judged until then is kept.

A judge is part of the score: `metrics.json` names it, with date and prompt, and figures by different judges do not compare.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from llava_sp.common.command import at_once, count, fitting
from llava_sp.common.files import Line, counted, examples, sha256
from llava_sp.common.schema import Check, whole
from llava_sp.eval.base import Benchmark, Item, Scores
from llava_sp.eval.inputs.answers_file import read_lines
from llava_sp.eval.run.answer_log import AnswerLog
from llava_sp.eval.scoring.judge_client import OPENAI_KEY, JudgeClient, JudgeOptions, Request, hash_text

JUDGEMENTS = "judgements.jsonl"

_LINE = {
    "key": str,
    "run": int,
    "attempt": int,
    "judge": str,
    "request_sha256": str,
    "answer_sha256": str,
    "reply": str,
    "date": str,
    "url": str,
    "answered_by": (str, None),
    "usage": ({"total_tokens": whole(0)}, None),  # null: the server does not say
}
SECONDS = Check(lambda number: 0 < number <= 10**6, "a number of seconds above 0, at most 1,000,000", float)
_CARRIED = ("split", "protocol", "rules", "judge_prompt", "grader_prompt")  # arguments that the later command needs too

J = TypeVar("J", bound="JudgedBenchmark")
Run = dict[str, list[str]]  # item key -> the judge's replies to its answer, in the order of the attempts


class JudgedBenchmark(Benchmark):
    """A benchmark that defines `request`, and `score` from `self.judged`: the runs, None if there are none."""

    wording = "llava_sp"  # whose prompt the judge gets; the instance names a file that replaces it
    options = JudgeOptions()
    judged: Sequence[Run] | None = None  # set by `judge`
    about_judge: dict[str, Any] | None = None  # for metrics.json; set by `judge`
    args: argparse.Namespace | None = None  # for the command that judges later

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        group = parser.add_argument_group("judge", "see llava_sp/eval/scoring/judge.py")
        add = group.add_argument
        add("--judge", metavar="MODEL", help="the model that judges; without it, answers are produced and not scored")
        add("--judge-url", metavar="URL", help="server with OpenAI's chat API (default OPENAI_BASE_URL, else OpenAI)")
        add("--judge-key-env", metavar="NAME", default=OPENAI_KEY, help="variable with the key (default %(default)s)")
        add("--judge-concurrency", metavar="N", type=at_once, default=8, help="requests at once (default %(default)s)")
        add("--judge-runs", metavar="N", type=count, help="judge N times and average (default 1)")
        add(
            "--judge-timeout",
            metavar="SECONDS",
            type=fitting(SECONDS),
            default=300.0,
            help="of a request (default %(default)s)",
        )
        add("--judgements", metavar="FILE", type=Path, nargs="+", help="score these recorded replies, without requests")

    @classmethod
    def from_arguments(cls: type[J], args: argparse.Namespace) -> J:
        benchmark = super().from_arguments(args)
        benchmark.args = args
        benchmark.options = JudgeOptions.from_arguments(args)
        return benchmark

    @abstractmethod
    def request(self, item: Item, answer: str, replies: Sequence[str]) -> Request | None:
        """The next request after these replies to the item's answer; None if they are enough."""

    def foreign_runs(self, file: Path, items: Sequence[Item]) -> tuple[list[Run], list[str]] | None:
        """Recorded runs and names of judges from a file as the official code writes it; None if it is not such a file."""
        return None

    def judge(self, items: Sequence[Item], answers: Sequence[str], output: Path | None) -> None:
        """Sets `judged` and `about_judge`: asks, or reads recorded replies, or leaves both None.

        Raises:
            ValueError: the judge gives no reply, or recorded replies do not fit; the message says what to do.
        """
        pairs = list(zip(items, answers))
        own = output / JUDGEMENTS if output else None
        if self.options.asks and own:
            self.judged, self.about_judge = self._ask(pairs, own)
        elif self.options.recorded:
            self.judged, self.about_judge = self._read(pairs, self.options.recorded)
        elif own and own.is_file() and own.stat().st_size:
            print(f"note: scored by the replies in {own}", file=sys.stderr)
            self.judged, self.about_judge = self._read(pairs, [own])
        else:
            self.unscored = self._how_to_judge_later(output or "DIR")

    def _ask(self, pairs: Sequence[tuple[Item, str]], file: Path) -> tuple[list[Run], dict[str, Any]]:
        options, lock, stop = self.options, threading.Lock(), threading.Event()
        with AnswerLog(file) as log:
            found = _by_place(read_judgements(file))
            client = JudgeClient(options, stop)
            tasks = [(run, item, answer) for run in range(options.runs or 1) for item, answer in pairs]

            def work(run: int, item: Item, answer: str) -> list[dict[str, Any]]:
                def line(attempt: int, request: Request) -> dict[str, Any]:
                    digest = request.sha256(options.model or "")
                    place = (item.key, run, attempt, digest)
                    if place not in found:
                        about = {"key": item.key, "question_id": item.id, "run": run, "attempt": attempt}
                        hashes = {"request_sha256": digest, "answer_sha256": hash_text(answer)}
                        reply = client.ask(request, f"question {item.id}")
                        with lock:
                            log.append([{**about, **hashes, **reply}])
                            found[place] = reply
                    return found[place]

                return self._chain(item, answer, line)

            lines = _all(work, tasks, options.concurrency, stop, f"judged by {options.model}")
        return self._runs([(run, item.key) for run, item, _ in tasks], lines)

    def _read(self, pairs: Sequence[tuple[Item, str]], files: Sequence[Path]) -> tuple[list[Run], dict[str, Any]]:
        """Scores recorded replies; the runs of several files are runs of one judgement."""
        items = [item for item, _ in pairs]
        foreign = [found for file in files if (found := self.foreign_runs(file, items)) is not None]
        if foreign and len(foreign) < len(files):
            raise ValueError(f"the files of --judgements are not all of one kind: {', '.join(map(str, files))}")
        if foreign:
            judged = [run for runs, _ in foreign for run in runs][: self.options.runs]
            names = sorted({name for _, names in foreign for name in names})
            about: dict[str, Any] = {"model": ", ".join(names) or "not recorded", "answered_by": names, "date": None}
            about |= {"prompt": "not recorded", "runs": len(judged)}
        else:
            lines = {file: read_judgements(file) for file in files}
            judge = self._only_judge(lines)
            runs: dict[tuple[Path, int], list[dict[str, Any]]] = {}
            for file in files:
                for line in sorted(lines[file], key=lambda line: line["run"]):
                    if line["judge"] == judge:
                        runs.setdefault((file, line["run"]), []).append(line)
            places, chains = [], []
            for (file, run), replies in list(runs.items())[: self.options.runs]:
                places += [((file, run), item.key) for item in items]
                chains += self._recorded_chains(f"{file}, run {run}", judge, replies, pairs)
            judged, about = self._runs(places, chains)
        if self.options.runs and len(judged) < self.options.runs:
            raise ValueError(f"--judge-runs is {self.options.runs}, but {examples(files)} hold {len(judged)}")
        return judged, about | {"files": {str(file): sha256(file) for file in files}}

    def _only_judge(self, lines: Mapping[Path, Sequence[dict[str, Any]]]) -> str:
        """The judge whose replies count: that of --judge, or the only one there is."""
        names = sorted({line["judge"] for found in lines.values() for line in found})
        judge = self.options.model or (names[0] if len(names) == 1 else "")
        if judge not in names:
            wanted = f"none of {judge}" if judge else "choose one with --judge NAME"
            raise ValueError(f"{examples(lines)} holds replies of {' and '.join(names) or 'no judge'}; {wanted}")
        return judge

    def _recorded_chains(
        self, where: str, judge: str, lines: Sequence[dict[str, Any]], pairs: Sequence[tuple[Item, str]]
    ) -> list[list[dict[str, Any]]]:
        """The recorded replies of one run to each answer. Raises ValueError with counts if some do not fit."""
        found = {(key, attempt, digest): line for (key, _, attempt, digest), line in _by_place(lines).items()}
        judged: dict[str, set[str]] = {}
        for reply in lines:
            judged.setdefault(reply["key"], set()).add(reply["answer_sha256"])
        chains: list[list[dict[str, Any]]] = []
        missing: dict[str, list[int | str]] = {}
        for item, answer in pairs:

            def line(attempt: int, request: Request, key: str = item.key) -> dict[str, Any]:
                return found[key, attempt, request.sha256(judge)]

            try:
                chains.append(self._chain(item, answer, line))
            except KeyError:
                if item.key not in judged:
                    trouble = "not judged"
                elif hash_text(answer) not in judged[item.key]:
                    trouble = "judged with another answer"
                else:
                    trouble = "judged with another prompt or setting, or incompletely"
                missing.setdefault(trouble, []).append(item.id)
        if missing:
            found_out = "; ".join(
                f"{why}: {counted(len(ids), 'question')} ({examples(ids)})" for why, ids in missing.items()
            )
            raise ValueError(
                f"{where}: {found_out}. --judge {judge} with --output asks for what is missing; --judge-runs N takes "
                "the first runs only"
            )
        return chains

    def _chain(self, item: Item, answer: str, line: Callable[[int, Request], dict[str, Any]]) -> list[dict[str, Any]]:
        """The lines of all replies to one answer; `line(attempt, request)` gives the next one."""
        lines: list[dict[str, Any]] = []
        while (request := self.request(item, answer, [each["reply"] for each in lines])) is not None:
            lines.append(line(len(lines), request))
        return lines

    def _runs(
        self, places: Sequence[tuple[Any, str]], chains: Sequence[list[dict[str, Any]]]
    ) -> tuple[list[Run], dict[str, Any]]:
        """The runs, and the entry on the judge in metrics.json."""
        runs: dict[Any, Run] = {}
        for (run, key), lines in zip(places, chains):
            runs.setdefault(run, {})[key] = [line["reply"] for line in lines]
        lines = [line for chain in chains for line in chain]
        dates = sorted(line["date"] for line in lines)
        tokens = [line["usage"]["total_tokens"] for line in lines if line["usage"]]
        return list(runs.values()), {
            "model": lines[0]["judge"],
            "answered_by": sorted({line["answered_by"] for line in lines if line["answered_by"]}),
            "url": ", ".join(sorted({line["url"] for line in lines})),
            "date": dates[-1],
            "first_date": dates[0],
            "prompt": self.wording,
            "runs": len(runs),
            "replies": len(lines),
            "tokens": sum(tokens) if len(tokens) == len(lines) else None,
        }

    def replies(self, item: Item) -> list[list[str]]:
        """The judge's replies to an item's answer, run by run."""
        return [run[item.key] for run in self.judged or ()]

    def _how_to_judge_later(self, output: Path | str) -> str:
        given = vars(self.args) if self.args else {}
        answers = given.get("answers")
        if not answers:
            answers, output = f"{output}/answers.jsonl", f"{output}/judged"
        command = ["python", "-m", f"llava_sp.eval.{self.name}", "--answers", answers, "--data", self.data]
        for name in _CARRIED:
            if given.get(name) is not None:
                command += ["--" + name.replace("_", "-"), given[name]]
        command += ["--output", output, "--judge", "MODEL"]
        return (
            "no judge was used, so there is no score; the same command with --judge MODEL judges these answers"
            f"\nwithout the model:\n  {shlex.join(map(str, command))}"
        )

    def summary(self, scores: Scores) -> list[str]:
        about = scores.metrics.get("judge")
        if not about:
            return super().summary(scores)
        runs = f"{about['runs']} run{'s' if about['runs'] > 1 else ''}"
        date = f", {about['date'][:10]}" if about["date"] else ""
        return [*super().summary(scores), f"judge: {about['model']}{date}, {runs}, prompt: {about['prompt']}"]


def read_judgements(path: Path) -> list[Line]:
    """The lines of a file of judgements; a half-written last line is left out, as are empty ones.

    Raises ValueError naming the line, for broken JSON or missing fields anywhere else.
    """
    if path.is_file() and not path.stat().st_size:
        return []
    lines, note = read_lines(path, _LINE)
    if note:
        print(f"note: {note}", file=sys.stderr)
    return lines


def _by_place(lines: Iterable[dict[str, Any]]) -> dict[tuple[str, int, int, str], dict[str, Any]]:
    """Item, run, attempt and request -> its line, the first one where there are several."""
    found: dict[tuple[str, int, int, str], dict[str, Any]] = {}
    for line in lines:
        found.setdefault((line["key"], line["run"], line["attempt"], line["request_sha256"]), line)
    return found


def _all(
    work: Callable[..., Any], tasks: Sequence[tuple], concurrency: int, stop: threading.Event, title: str
) -> list[Any]:
    """`work(*task)` of all tasks, some at once, in their order; the first error stops the rest."""
    with ThreadPoolExecutor(concurrency) as pool:
        futures = [pool.submit(work, *task) for task in tasks]
        try:
            for future in tqdm(as_completed(futures), total=len(futures), desc=title, unit="answer"):
                future.result()
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)  # pending requests complete and are kept
        return [future.result() for future in futures]
