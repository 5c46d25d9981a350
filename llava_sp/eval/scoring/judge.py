"""Benchmarks whose answers a judge model grades (LLaVA-Bench, MM-Vet, MMVP).

    --judge MODEL             ask this model; by default OpenAI, with the key in OPENAI_API_KEY
    --judge-url URL           any other server that speaks OpenAI's chat API (vLLM, SGLang, llama.cpp, a proxy): the part
                              before /chat/completions, as http://localhost:8000/v1; needs no key unless the server does
    --judge-key-env NAME      the environment variable that holds the key; keys are neither written nor printed
    --judge-runs N            judge everything N times and average (default 1)
    --judge-concurrency N     requests at once (default 8);  --judge-timeout SECONDS (default 300) is for a single one
    --judgements FILE ...     score recorded replies instead of asking; several files are several runs

Judging needs the package `openai` (`pip install llava_sp[eval]`). Without --judge the answers are produced and the command
says how to have them judged later; where O/judgements.jsonl is there already, its replies are scored again.

Every raw reply is appended to O/judgements.jsonl as it comes: item (`key`, `question_id`), `run`, `attempt`, `judge` and
`answered_by` (what the server says it is), `date`, settings, `reply`, tokens, and the hash of the whole request, which holds
judge, settings, prompt and answer. A recorded reply is used only where this hash is that of the request that would be sent:
so the same command again asks only for what is missing, whatever stopped it, and replies to other answers, by other judges
or to other prompts may stay in the file and are never mixed in. The address of the server is not part of the hash.

After rate limits, timeouts, lost connections, replies that are no JSON and errors of the server (5xx) the request is sent
again, 8 times in all, after 1, 2, 4, ... 60 seconds or what the server's Retry-After says. A refused key, an unknown model or
a quota that is used up ends the run at once. What was judged until then is kept.

A judge is part of the score: `metrics.json` names it, with date and prompt, and figures by different judges do not compare.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava_sp.common.files import examples, parse_line, read_text, sha256
from llava_sp.common.schema import expect
from llava_sp.eval.base import Benchmark, Item, Scores
from llava_sp.eval.inputs.checks import compare_ids
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
}
_OPTIONAL = {"date": str, "url": str, "answered_by": str, "usage": dict}
_CARRIED = ("split", "protocol", "rules", "judge_prompt", "grader_prompt")  # arguments that the later command needs too

Run = dict[str, list[str]]  # item key -> the judge's replies to its answer, in the order of the attempts


class JudgedBenchmark(Benchmark):
    """A benchmark that sets `request`, and `score` from `self.judged`: the runs, None where nobody has judged."""

    wording = "llava_sp"  # whose prompt the judge gets; a file that is read instead is named by the instance
    options = JudgeOptions()
    judged: Sequence[Run] | None = None
    about_judge: Mapping[str, Any] | None = None  # for metrics.json
    data: Path | None = None  # set by `load`, for the command that judges later
    _args: argparse.Namespace | None = None
    _output: Path | None = None

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        group = parser.add_argument_group("judge", "see llava_sp/eval/scoring/judge.py")
        add = group.add_argument
        add("--judge", metavar="MODEL", help="the model that judges; without it, answers are produced and not scored")
        add("--judge-url", metavar="URL", help="server with OpenAI's chat API (default OPENAI_BASE_URL, else OpenAI)")
        add("--judge-key-env", metavar="NAME", default=OPENAI_KEY, help="variable with the key (default %(default)s)")
        add("--judge-concurrency", metavar="N", type=int, default=8, help="requests at once (default %(default)s)")
        add("--judge-runs", metavar="N", type=int, help="judge N times and average (default 1)")
        add("--judge-timeout", metavar="SECONDS", type=float, default=300.0, help="of a request (default %(default)s)")
        add("--judgements", metavar="FILE", type=Path, nargs="+", help="score these recorded replies; ask nobody")

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> JudgedBenchmark:
        benchmark = super().from_arguments(args)
        benchmark._args = args
        benchmark.options = JudgeOptions.from_arguments(args)
        return benchmark

    @abstractmethod
    def request(self, item: Item, answer: str, replies: Sequence[str]) -> Request | None:
        """What to ask after these replies to the item's answer; None when they are enough."""

    def foreign_runs(self, file: Path, items: Sequence[Item]) -> tuple[list[Run], list[str]] | None:
        """Recorded runs and names of judges from a file as the official code writes it; None if it is not such a file."""
        return None

    def judge(self, items: Sequence[Item], answers: Sequence[str], output: Path | None) -> None:
        """Sets `judged` and `about_judge`: asks, or reads recorded replies, or leaves both None.

        Raises:
            ValueError: the judge cannot be asked, or recorded replies do not fit; the message says what to do.
        """
        self._output = output
        pairs = list(zip(items, answers))
        own = output / JUDGEMENTS if output else None
        if self.options.asks:
            self._ask(pairs, own)
        elif self.options.recorded:
            self._read(pairs, self.options.recorded)
        elif own and own.is_file() and own.stat().st_size:
            print(f"note: scored by the replies in {own}", file=sys.stderr)
            self._read(pairs, [own])

    def _ask(self, pairs: Sequence[tuple[Item, str]], file: Path) -> None:
        options, lock, stop = self.options, threading.Lock(), threading.Event()
        with AnswerLog(file) as log:
            found = _by_place(read_judgements(file))
            client = JudgeClient(options, stop)
            tasks = [(run, item, answer) for run in range(options.runs or 1) for item, answer in pairs]

            def work(run: int, item: Item, answer: str) -> list[dict[str, Any]]:
                def line(attempt: int, request: Request) -> dict[str, Any]:
                    digest = request.sha256(options.model)
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
        self._set_runs([(run, item.key) for run, item, _ in tasks], lines)

    def _read(self, pairs: Sequence[tuple[Item, str]], files: Sequence[Path]) -> None:
        """Scores recorded replies; the runs of several files are runs of one judgement."""
        items = [item for item, _ in pairs]
        foreign = [self.foreign_runs(file, items) for file in files]
        if all(foreign):
            self.judged = [run for runs, _ in foreign for run in runs][: self.options.runs]
            names = sorted({name for _, names in foreign for name in names})
            self.about_judge = {"model": ", ".join(names) or "not recorded", "answered_by": names, "date": None}
            self.about_judge |= {"prompt": "not recorded", "runs": len(self.judged)}
        elif any(foreign):
            raise ValueError(f"the files of --judgements are not all of one kind: {', '.join(map(str, files))}")
        else:
            lines = {file: read_judgements(file) for file in files}
            judge = self._only_judge(lines)
            runs: dict[tuple[Path, int], list[dict[str, Any]]] = {}
            for file in files:
                for line in sorted(lines[file], key=lambda line: line["run"]):
                    if line["judge"] == judge:
                        runs.setdefault((file, line["run"]), []).append(line)
            places, chains = [], []
            for (file, run), found in list(runs.items())[: self.options.runs]:
                places += [((file, run), item.key) for item in items]
                chains += self._recorded_chains(f"{file}, run {run}", judge, found, pairs)
            self._set_runs(places, chains)
        self.about_judge["files"] = {str(file): sha256(file) for file in files}
        if self.options.runs and len(self.judged) < self.options.runs:
            raise ValueError(f"--judge-runs {self.options.runs}, but {examples(files)} hold {len(self.judged)}")

    def _only_judge(self, lines: Mapping[Path, Sequence[dict[str, Any]]]) -> str:
        """The judge whose replies count: --judge, or the only one there is."""
        names = sorted({line["judge"] for found in lines.values() for line in found})
        where = examples(lines)
        if self.options.model is None and len(names) != 1:
            held = f"replies of {' and '.join(names)}; choose one with --judge NAME" if names else "no replies"
            raise ValueError(f"{where} holds {held}")
        judge = self.options.model or names[0]
        if judge not in names:
            raise ValueError(f"{where} holds no replies of {judge} (but of {', '.join(names) or 'nobody'})")
        return judge

    def _recorded_chains(
        self, where: str, judge: str, lines: Sequence[dict[str, Any]], pairs: Sequence[tuple[Item, str]]
    ) -> list[list[dict[str, Any]]]:
        """The recorded replies of one run to each answer. Raises ValueError with counts if some do not fit."""
        found = {(key, attempt, digest): line for (key, _, attempt, digest), line in _by_place(lines).items()}
        judged: dict[str, set[str]] = {}
        for line in lines:
            judged.setdefault(line["key"], set()).add(line["answer_sha256"])
        chains: list[list[dict[str, Any]]] = []
        missing: dict[str, list[int | str]] = {}
        for item, answer in pairs:
            try:
                chains.append(self._chain(item, answer, lambda n, r, key=item.key: found[key, n, r.sha256(judge)]))
            except KeyError:
                if item.key not in judged:
                    trouble = "were not judged"
                elif hash_text(answer) not in judged[item.key]:
                    trouble = "have other answers than were judged"
                else:
                    trouble = "were judged by another prompt or setting, or not to the end"
                missing.setdefault(trouble, []).append(item.id)
        if missing:
            found_out = "; ".join(f"{len(ids)} questions {why} ({examples(ids)})" for why, ids in missing.items())
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

    def _set_runs(self, places: Sequence[tuple[Any, str]], chains: Sequence[list[dict[str, Any]]]) -> None:
        runs: dict[Any, Run] = {}
        for (run, key), lines in zip(places, chains):
            runs.setdefault(run, {})[key] = [line["reply"] for line in lines]
        self.judged = list(runs.values())
        lines = [line for chain in chains for line in chain]
        dates = sorted(line["date"] for line in lines if line.get("date"))
        self.about_judge = {
            "model": lines[0]["judge"],
            "answered_by": sorted({line["answered_by"] for line in lines if line.get("answered_by")}),
            "url": ", ".join(sorted({line["url"] for line in lines if line.get("url")})),
            "date": dates[-1] if dates else None,
            "first_date": dates[0] if dates else None,
            "prompt": self.wording,
            "runs": len(self.judged),
            "replies": len(lines),
            "tokens": sum((line.get("usage") or {}).get("total_tokens") or 0 for line in lines),
        }

    def replies(self, item: Item) -> list[list[str]]:
        """The judge's replies to an item's answer, run by run."""
        return [run[item.key] for run in self.judged]

    @property
    def unscored(self) -> str:
        """How to score later, for the command line to print."""
        given = vars(self._args) if self._args else {}
        answers = given.get("answers")
        output = self._output or "DIR"
        if not answers:
            answers, output = f"{output}/answers.jsonl", f"{output}/judged"
        command = ["python", "-m", f"llava_sp.eval.{self.name}", "--answers", answers, "--data", self.data]
        for name in _CARRIED:
            if given.get(name) is not None:
                command += ["--" + name.replace("_", "-"), given[name]]
        command += ["--output", output, "--judge", "MODEL"]
        return (
            "no judge was asked for a score; the same command with --judge MODEL asks one and answers no question twice"
            f"\nwithout the model:\n  {shlex.join(map(str, command))}"
        )

    def summary(self, scores: Scores) -> list[str]:
        about = scores.metrics.get("judge")
        if not about:
            return super().summary(scores)
        runs = f"{about['runs']} run{'s' if about['runs'] > 1 else ''}"
        date = f", {about['date'][:10]}" if about["date"] else ""
        return [*super().summary(scores), f"judge: {about['model']}{date}, {runs}, prompt: {about['prompt']}"]


def read_judgements(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of judgements; a half-written last line is left out, as are empty ones.

    Raises ValueError naming the line, for broken JSON or missing fields anywhere else.
    """
    if path.is_file() and not path.stat().st_size:
        return []
    *lines, last = read_text(path).split("\n")
    try:
        lines += [last] if json.loads(last or "0") else []
    except json.JSONDecodeError:
        print(f"note: {path}, line {len(lines) + 1} is cut off and was left out", file=sys.stderr)
    records = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}, line {number}"
            records.append(parse_line(line, where))
            expect(records[-1], _LINE, where)
            _check_optional(records[-1], where)
    return records


def _check_optional(record: Mapping[str, Any], where: str) -> None:
    """Raises ValueError if what need not be there is of another kind; null is as good as absent."""
    given = {name: record[name] for name in _OPTIONAL if record.get(name) is not None}
    expect(given, {name: _OPTIONAL[name] for name in given}, where)
    if given.get("usage", {}).get("total_tokens") is not None:
        expect(given["usage"], {"total_tokens": int}, f"{where}: usage")


def check_foreign_ids(file: Path, found: Iterable[int | str], items: Sequence[Item]) -> None:
    """Raises ValueError unless the recorded judgements are of exactly these items."""
    trouble = compare_ids(found, [item.id for item in items], "judgement")
    if trouble:
        raise ValueError(f"{file} does not fit the questions: {trouble}")


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
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)  # requests under way come back and are kept
            raise
        return [future.result() for future in futures]
