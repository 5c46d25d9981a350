"""What a score was made with: settings that change answers (guarded), and everything else worth knowing (recorded).

`OUTPUT/run.json` holds the settings. A later command into the same directory must have the same ones, or it is refused
with the differences: answers of two models or prompts are never mixed.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llava_sp.common.files import read_json, sha256, write_json
from llava_sp.common.provenance import command, now, versions
from llava_sp.decoding import Generation
from llava_sp.eval.base import Benchmark, Item

RUN_FILE = "run.json"
_OUTPUTS = ("answers", "answers.jsonl", "metrics.json", "per_item.jsonl")
_MOST_FILES = 20  # of one folder that provenance names one by one


def run_settings(
    benchmark: Benchmark,
    items: Sequence[Item],
    *,
    checkpoint: str,
    config: str,
    processor: str,
    checkpoint_generation: dict[str, Any],
    conversation_template: str,
    example: str,
    image_aspect_ratio: str,
    generation: Generation,
    dtype: str,
    seed: int,
) -> dict[str, Any]:
    """What decides the answers. Not among them: batch size, device, number of processes, --limit."""
    return {
        "benchmark": benchmark.name,
        "split": benchmark.split,
        "questions": _hash_questions(benchmark, items),
        "checkpoint": checkpoint,
        "config": config,
        "processor": processor,
        "checkpoint_generation": checkpoint_generation,
        "conversation_template": conversation_template,
        "prompt_example": example,
        "image_aspect_ratio": image_aspect_ratio,
        "generation": asdict(generation) | ({"seed": seed} if generation.do_sample else {}),
        "dtype": dtype,
    }


def settings_id(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def check_output(output: Path, settings: dict[str, Any]) -> None:
    """Claims the output directory for `settings`, or accepts it if it has the same ones already.

    Raises:
        ValueError: the directory holds a run with other settings (naming what changed) or results of unknown origin.
    """
    file = output / RUN_FILE
    if not file.exists():
        unknown = [name for name in _OUTPUTS if (output / name).exists()]
        if unknown:
            raise ValueError(f"{output} holds {', '.join(unknown)} but no {RUN_FILE}: give another --output")
        write_json(file, {"settings": settings, "started": now()})
        return
    held = read_json(file)
    if not isinstance(held, dict) or not isinstance(held.get("settings"), dict):
        raise ValueError(f"{file} is not the record of a run: it has no settings. Give another --output")
    before = dict(_flat(held["settings"]))
    after = dict(_flat(settings))
    changed = [
        f"{key} was {_short(before.get(key))}, now {_short(after.get(key))}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
    if changed and not _holds_results(output):  # an earlier attempt that failed before its first answer
        write_json(file, {"settings": settings, "started": now()})
    elif changed:
        raise ValueError(
            f"{output} holds a run with other settings: {'; '.join(changed)}. Give another --output, or remove this one"
        )


def _holds_results(output: Path) -> bool:
    logs = (output / "answers").glob("rank-*.jsonl")
    return (output / "metrics.json").exists() or any(log.stat().st_size for log in logs)


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
    """File -> SHA-256; the many files of one folder stand as one, with the hash of their names and hashes."""
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


def _hash_questions(benchmark: Benchmark, items: Sequence[Item]) -> str:
    digest = hashlib.sha256()
    for item in items:
        images = [
            "/".join(image.parts[-2:]) if isinstance(image, Path) else hashlib.sha256(image).hexdigest()
            for image in item.images
        ]
        digest.update(json.dumps([item.key, benchmark.message(item), images]).encode() + b"\n")
    return digest.hexdigest()


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield prefix, value
        return
    for key, inner in value.items():
        yield from _flat(inner, f"{prefix}.{key}" if prefix else key)


def _short(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit // 2 - 2]} ... {text[-limit // 2 + 3 :]}"
