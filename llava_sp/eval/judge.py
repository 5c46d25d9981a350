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
import hashlib
import importlib.util
import json
import os
import random
import shlex
import sys
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from tqdm import tqdm

from llava_sp.eval.answers import AnswerLog
from llava_sp.eval.base import Benchmark, Item, Scores
from llava_sp.eval.files import examples, parse_line, read_text, sha256
from llava_sp.eval.provenance import now
from llava_sp.eval.records import compare_ids, expect

JUDGEMENTS = "judgements.jsonl"
OPENAI_URL = "https://api.openai.com/v1"
OPENAI_KEY = "OPENAI_API_KEY"
TRIES = 8
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds; the wait doubles each time
LONGEST_RETRY_AFTER = 600.0

_LINE = {
    "key": str,
    "run": int,
    "attempt": int,
    "judge": str,
    "request_sha256": str,
    "answer_sha256": str,
    "reply": str,
}
_CARRIED = ("split", "protocol", "rules", "judge_prompt", "grader_prompt")  # arguments that the later command needs too

Run = dict[str, list[str]]  # item key -> the judge's replies to its answer, in the order of the attempts


@dataclass(frozen=True)
class Request:
    """One request to the judge: (role, text) pairs and the settings; max_tokens None is not sent."""

    messages: tuple[tuple[str, str], ...]
    temperature: float
    max_tokens: int | None = None

    def arguments(self) -> dict[str, Any]:
        limit = {} if self.max_tokens is None else {"max_tokens": self.max_tokens}
        messages = [{"role": role, "content": text} for role, text in self.messages]
        return {"messages": messages, "temperature": self.temperature, **limit}

    def sha256(self, judge: str) -> str:
        return _sha256(json.dumps({"judge": judge, **self.arguments()}, sort_keys=True))


@dataclass(frozen=True)
class JudgeOptions:
    """What the command line says about the judge; without model and recorded files nobody judges."""

    model: str | None = None
    url: str = OPENAI_URL
    key: str = field(default="", repr=False)
    key_env: str = OPENAI_KEY
    concurrency: int = 8
    runs: int | None = None
    timeout: float = 300.0
    recorded: tuple[Path, ...] = ()

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> JudgeOptions:
        """Raises ValueError for what would only come out after hours of answering: numbers, key, package, address."""
        for name in ("judge_concurrency", "judge_runs", "judge_timeout"):
            value = getattr(args, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be more than 0")
        url = (args.judge_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL).rstrip("/")
        options = cls(
            model=args.judge,
            url=url,
            key=os.environ.get(args.judge_key_env, "").strip(),
            key_env=args.judge_key_env,
            concurrency=args.judge_concurrency,
            runs=args.judge_runs,
            timeout=args.judge_timeout,
            recorded=tuple(args.judgements or ()),
        )
        if options.asks:
            options._check()
            if args.answers and not args.output:
                raise ValueError("--judge needs --output DIR: every reply of the judge is kept there")
        return options

    @property
    def asks(self) -> bool:
        """Whether requests are sent; beside recorded files, --judge only chooses among the judges in them."""
        return self.model is not None and not self.recorded

    @property
    def public_url(self) -> str:
        """The address without user names, passwords and parameters."""
        parts = urlsplit(self.url)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))

    def _check(self) -> None:
        if not self.model:
            raise ValueError("--judge is empty; give the name of a model")
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"--judge-url {self.public_url} is no address: it must begin with http:// or https://")
        if self.url.endswith("/completions"):
            raise ValueError(f"--judge-url {self.public_url}: give the part before /chat/completions")
        if not self.key and (self.url == OPENAI_URL or self.key_env != OPENAI_KEY):
            raise ValueError(
                f"--judge {self.model}: no key in the environment variable {self.key_env}; set it, or name another by "
                "--judge-key-env (a server of your own, --judge-url, needs none)"
            )
        if importlib.util.find_spec("openai") is None:
            raise ValueError("--judge needs the package openai: pip install llava_sp[eval]")


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
        group = parser.add_argument_group("judge", "see llava_sp/eval/judge.py")
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
                        hashes = {"request_sha256": digest, "answer_sha256": _sha256(answer)}
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
                elif _sha256(answer) not in judged[item.key]:
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
            "no judge was asked for a score. Later: the same command with --judge MODEL (no question is answered twice), "
            f"or without the model\n  {shlex.join(map(str, command))}"
        )

    def summary(self, scores: Scores) -> list[str]:
        about = scores.metrics.get("judge")
        if not about:
            return super().summary(scores)
        runs = f"{about['runs']} run{'s' if about['runs'] > 1 else ''}"
        date = f", {about['date'][:10]}" if about["date"] else ""
        return [*super().summary(scores), f"judge: {about['model']}{date}, {runs}, prompt: {about['prompt']}"]


class JudgeClient:
    """Asks the judge; may be used by several threads at once. `stop` ends every wait and every further request."""

    def __init__(self, options: JudgeOptions, stop: threading.Event):
        import openai

        self._openai = openai
        self._options = options
        self._stop = stop
        self._client = openai.OpenAI(
            api_key=options.key or "none", base_url=options.url, timeout=options.timeout, max_retries=0
        )

    def ask(self, request: Request, what: str) -> dict[str, Any]:
        """The reply with who gave it, when, by which settings, and its tokens.

        Raises:
            ValueError: naming `what`, the server and its own words: at once where trying again cannot help, else after
                `TRIES` times.
        """
        problem = ""
        for failures in range(TRIES):
            if self._stop.is_set():
                break
            try:
                return self._once(request)
            except self._openai.APIStatusError as error:
                problem = f"it says {error.status_code}: {self._words(error)}"
                advice = self._hopeless(error)
                if advice:
                    raise ValueError(self._message(what, f"{problem}{advice}")) from None
                wait = _retry_after(error.response.headers)
                if wait is not None and wait > LONGEST_RETRY_AFTER:
                    raise ValueError(self._message(what, f"{problem} (try again in {wait:.0f} seconds)")) from None
            except self._openai.APITimeoutError:
                problem, wait = f"no reply within {self._options.timeout:g} seconds (--judge-timeout)", None
            except self._openai.APIConnectionError as error:
                problem, wait = f"no connection ({error.__cause__ or error})", None
            except (json.JSONDecodeError, UnicodeDecodeError, _NoReply) as error:
                problem, wait = f"its reply is no chat completion ({error})", None
            backoff = min(LONGEST_WAIT, FIRST_WAIT * 2**failures) * random.uniform(0.75, 1.25)
            if failures < TRIES - 1:
                self._stop.wait(backoff if wait is None else wait + backoff / 10)
        raise ValueError(self._message(what, f"{problem or 'stopped'} (tried {TRIES} times)"))

    def _once(self, request: Request) -> dict[str, Any]:
        start = time.perf_counter()
        completion = self._client.chat.completions.create(model=self._options.model, **request.arguments())
        try:
            choice = completion.choices[0]
            content = choice.message.content
        except (AttributeError, TypeError, IndexError):
            raise _NoReply(str(completion)[:200]) from None
        if content is not None and not isinstance(content, str):
            raise _NoReply(f"its content is {str(content)[:200]!r}")
        return {
            "judge": self._options.model,
            "url": self._options.public_url,
            "temperature": request.temperature,
            "max_tokens": request.max_tokens,
            "reply": content or "",  # None is a refusal: the benchmark's rule for replies it cannot read applies
            "answered_by": completion.model,
            "finish_reason": choice.finish_reason,
            "refusal": getattr(choice.message, "refusal", None),
            "usage": _tokens(completion.usage),
            "date": now(),
            "seconds": round(time.perf_counter() - start, 3),
        }

    def _hopeless(self, error: Any) -> str | None:
        """What to do where trying again cannot help; None where it can."""
        status, options = error.status_code, self._options
        if status in (401, 403):
            return (
                f". The key in {options.key_env} is refused" if options.key else f". Set the key in {options.key_env}"
            )
        if status == 404:
            return f". Is {options.model} a model there, and the address the part before /chat/completions?"
        if status == 429 and "insufficient_quota" in (error.code, getattr(error, "type", None)):
            return ". The account has no quota left"
        return None if status in (408, 409, 425, 429) or status >= 500 else ". The request itself is refused"

    def _words(self, error: Any) -> str:
        body = error.body
        said = body.get("message") if isinstance(body, Mapping) else body
        return str(said or error.message)[:300]

    def _message(self, what: str, problem: str) -> str:
        text = f"the judge {self._options.model} at {self._options.public_url} gave no reply for {what}: {problem}"
        text = text.replace(self._options.key, "***") if self._options.key else text
        return f"{text}. What was judged is kept: the same command goes on from here"


class _NoReply(Exception):
    """A well-formed response without a reply in it."""


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
    return records


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


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server wants to be left alone: a number, or the date when it may be asked again."""
    said = headers.get("retry-after-ms") or headers.get("retry-after")
    if not said:
        return None
    try:
        return max(0.0, float(said) / (1000 if "retry-after-ms" in headers else 1))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
    except ValueError:
        return None


def _tokens(usage: Any) -> dict[str, int] | None:
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    found = {name: getattr(usage, name, None) for name in names}
    return {name: count for name, count in found.items() if isinstance(count, int)} or None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
