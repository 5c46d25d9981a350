"""The output folder of a benchmark: who may write it, what it holds, and from answers to results.

`OUTPUT/run.json` holds the settings that decide the answers. A later command into the same folder must have the same ones, or
it fails with the differences: answers of two models or prompts are never mixed. Imports no torch: existing answers are
scored without.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llava_sp.common.files import counted, examples, lock, read_json, sha256, write_json, write_jsonl
from llava_sp.common.provenance import command, now, versions
from llava_sp.eval.base import Benchmark, Item, Scores

RUN_FILE = "run.json"
_OUTPUTS = ("answers", "answers.jsonl", "metrics.json", "per_item.jsonl")
_METRICS = {"provenance": {"count": int}}
_MOST_FILES = 20  # of one folder that provenance names one by one


@dataclass(frozen=True)
class Outcome:
    """A benchmark that was scored; `result` is what metrics.json holds."""

    benchmark: Benchmark
    items: Sequence[Item]
    scores: Scores
    result: dict[str, Any]


def load_items(benchmark: Benchmark, data: Path) -> list[Item]:
    """The benchmark's items. Raises ValueError: no items, or two with the same key."""
    items = benchmark.load(data)
    if not items:
        raise ValueError(f"{data} holds no questions of {benchmark.name}")
    twice = [key for key, count in Counter(item.key for item in items).items() if count > 1]
    if twice:
        raise ValueError(f"{data}: {len(twice)} keys of {benchmark.name} occur more than once ({examples(twice)})")
    return items


@contextmanager
def exclusive(output: Path) -> Iterator[None]:
    """Locks the folder, which is created if needed. Raises ValueError if another command uses it."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; give a directory")
    output.mkdir(parents=True, exist_ok=True)
    path = output / ".lock"
    with path.open("a") as stream:
        if not lock(stream, path):
            raise ValueError(f"{path} is being written by another process: is the same command running?")
        yield


def check_output(output: Path, settings: dict[str, Any], count: int) -> None:
    """Records `settings` in the output folder. Raises ValueError if it holds a run with others, results of unknown origin, or
    results of more than `count` questions, which would be replaced."""
    file, metrics = output / RUN_FILE, output / "metrics.json"
    changed, found = ["new"], ", ".join(name for name in _OUTPUTS if (output / name).exists())
    problem = found and f"{found} but no {RUN_FILE}"
    if file.exists():
        changed = changed_settings(read_json(file, {"settings": dict})["settings"], settings)
        held = read_json(metrics, _METRICS)["provenance"]["count"] if metrics.is_file() else 0
        problem = (
            f"results of {counted(held, 'question')}, which those of {count} would replace" if held > count else ""
        )
        if changed and (
            metrics.exists() or any(log.stat().st_size for log in (output / "answers").glob("rank-*.jsonl"))
        ):
            problem = f"a run with other settings: {'; '.join(changed)}"
    if problem:
        raise ValueError(f"{output} holds {problem}. Give another --output")
    if changed:  # also those of an earlier attempt that failed before its first answer
        write_json(file, {"settings": settings, "started": now()})


def changed_settings(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    old, new = dict(_flat(before)), dict(_flat(after))
    return [
        f"{key} was {_short(old.get(key))}, now {_short(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield prefix, value
        return
    for key, inner in value.items():
        yield from _flat(inner, f"{prefix}.{key}" if prefix else key)


def _short(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit // 2 - 2]} ... {text[-limit // 2 + 3 :]}"


def provenance(benchmark: Benchmark, items: Sequence[Item], settings: dict[str, Any], **extra: Any) -> dict[str, Any]:
    """The `provenance` of metrics.json."""
    return {
        "benchmark": benchmark.name,
        "metric": benchmark.title,
        "split": benchmark.split,
        "protocol": benchmark.protocol,
        "count": len(items),
        **settings,
        **extra,
        "data_files": _hash_files(benchmark.files),
        "versions": versions(),
        "platform": platform.platform(),
        "command": command(),
        "date": now(),
    }


def _hash_files(files: Sequence[Path]) -> dict[str, str]:
    """File -> SHA-256; the many files of one folder are one, with the hash of their names and hashes."""
    folders: dict[Path, dict[Path, str]] = {}
    for path in dict.fromkeys(files):
        folders.setdefault(path.parent, {})[path] = sha256(path)
    found: dict[str, str] = {}
    for folder, hashes in folders.items():
        if len(hashes) <= _MOST_FILES:
            found |= {str(path): digest for path, digest in hashes.items()}
        else:
            lines = "".join(f"{digest}  {path.name}\n" for path, digest in sorted(hashes.items()))
            found[str(folder / f"({len(hashes)} files)")] = hashlib.sha256(lines.encode()).hexdigest()
    return found


def finish(
    benchmark: Benchmark, items: Sequence[Item], answers: Sequence[str], output: Path | None, origin: dict[str, Any]
) -> Outcome:
    """Judges the answers if the benchmark needs it, scores them, writes, and prints the headline."""
    benchmark.judge(items, answers, output)
    scores = benchmark.score(items, answers)
    scored_as = {}
    if len(benchmark.protocols) > 1:  # the headline by the scoring rule of each protocol that can tell it
        each = {benchmark.protocol: scores.score}
        for protocol in benchmark.protocols:
            if protocol != benchmark.protocol:
                each[protocol] = benchmark.under(protocol).score(items, answers).score
        scored_as = {protocol: score for protocol, score in each.items() if score is not None}
    result: dict[str, Any] = {"score": scores.score} | ({"scored_as": scored_as} if scored_as else {})
    result["categories"] = {name: asdict(category) for name, category in scores.categories.items()}
    result |= {"metrics": scores.metrics, "provenance": origin}
    outcome = Outcome(benchmark, items, scores, result)
    if output is None:
        print(json.dumps(result, indent=2, ensure_ascii=False))
        if scores.score is None:
            print(f"note: no score: {benchmark.unscored}", file=sys.stderr)
        return outcome
    write_jsonl(output / "per_item.jsonl", scores.per_item)
    submission = benchmark.submission(items, answers, output)
    if submission is not None:
        result["submission"] = str(submission)
    write_json(output / "metrics.json", result)
    split = f", {benchmark.split}" if benchmark.split else ""
    if scores.score is not None:
        count = len(items) if scores.count is None else scores.count
        print(f"{benchmark.title}{split}: {scores.score} ({count} {scores.counted})")
        for line in benchmark.summary(scores):
            print(f"  {line}")
    else:
        print(f"{benchmark.title}{split}: {counted(len(items), 'question')} answered; {benchmark.unscored}")
    for protocol, value in scored_as.items():
        if protocol != benchmark.protocol:
            print(f"the same answers scored as {protocol} does: {value}")
    if submission is not None:
        print(f"{benchmark.submission_label + ':':13} {submission}")
    print(f"results:      {output / 'metrics.json'}")
    print(f"each answer:  {output / 'per_item.jsonl'}")
    return outcome
