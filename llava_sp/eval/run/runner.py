"""Generates the answers to a list of items: batched by length, sharded over processes, resumable.

* Process r of n takes items r, r + n, r + 2n, ... of the list: every item belongs to exactly one process, whatever the
  counts. Within its share the longest come first (out-of-memory errors come first; batches hold similar lengths),
  and the questions about one image stay together, so that it can be encoded once for all of them.
* Each process appends to `OUTPUT/answers/rank-R.jsonl`. What any process of any earlier run has answered there is not
  asked again, so the number of processes may change between runs.
* `merge` puts all answers, in the order of the items, into one file in LLaVA's format.

Nothing here knows the model: an answerer has `prepare(items) -> batch` (called in a thread, ahead of time) and
`answer(batch) -> texts`, which are called only if there is something left to answer.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

from llava_sp.common.files import examples, write_jsonl
from llava_sp.common.processes import Processes
from llava_sp.common.watchdog import Watchdog
from llava_sp.eval.base import Benchmark, Item
from llava_sp.eval.run.answer_log import AnswerLog, read_logs

LOGS = "answers"
MERGED = "answers.jsonl"
_BATCHES_AHEAD = 2

T = TypeVar("T")
U = TypeVar("U")


class Answerer(Protocol):
    def prepare(self, items: list[Item]) -> Any: ...

    def answer(self, batch: Any) -> list[str]: ...


def generate_answers(
    benchmark: Benchmark,
    items: Sequence[Item],
    answerer: Answerer,
    output: Path,
    *,
    batch_size: int,
    processes: Processes,
    progress: bool = True,
    watch: Watchdog | None = None,
    about: Mapping[str, Any] = MappingProxyType({}),
) -> int:
    """Answers this process's share of the unanswered `items`; returns their number.

    Each line of the log holds the item's record, the answer (`text`), `key`, the fields of `about` (among them `settings`,
    which must be those of all lines there), `image_bytes`, and `seconds`: the time of the batch divided by its size.
    `watch` hears of every batch; the first one, with which the model is opened, may take any time.

    Raises:
        ValueError: answers of other settings, or about other images under the same names, exist already.
    """
    share = items[processes.rank :: processes.world_size]
    watch = watch or Watchdog(output, processes, None)
    watch.progress(0, "opening the model, first batch", patient=True)
    with AnswerLog(output / LOGS / f"rank-{processes.rank:05d}.jsonl") as log:
        done = read_logs(output / LOGS, about.get("settings"))
        for item in share:
            before = done.get(item.key, {}).get("image_bytes")
            if before is not None and before != image_bytes(item):
                sizes = f"image_bytes {before}, now they are {image_bytes(item)}"
                raise ValueError(
                    f"{output / LOGS}: question {item.id} was answered with {sizes}: give another --output"
                )
        todo = in_order(benchmark, [item for item in share if item.key not in done])
        if not todo:
            return 0
        batches = [todo[i : i + batch_size] for i in range(0, len(todo), batch_size)]
        title = benchmark.name + (f" (process 1 of {processes.world_size})" if processes.world_size > 1 else "")
        shown, answered = progress and processes.is_main, 0
        with tqdm(total=len(share), initial=len(share) - len(todo), desc=title, unit="q", disable=not shown) as bar:
            for batch, prepared in zip(batches, ahead(answerer.prepare, batches)):
                start = time.perf_counter()
                texts = answerer.answer(prepared)
                assert len(texts) == len(batch), f"{len(texts)} answers for {len(batch)} items"
                seconds = round((time.perf_counter() - start) / len(batch), 4)
                log.append(
                    {**benchmark.record(item), "text": text, "key": item.key, **about}
                    | {"image_bytes": image_bytes(item), "seconds": seconds}
                    for item, text in zip(batch, texts)
                )
                bar.update(len(batch))
                answered += len(batch)
                watch.progress(answered, "answering")
    return len(todo)


def image_bytes(item: Item) -> list[int]:
    """The sizes of the item's image files."""
    return [image.stat().st_size if isinstance(image, Path) else len(image) for image in item.images]


def in_order(benchmark: Benchmark, items: Sequence[Item]) -> list[Item]:
    """The longest message first; the items of an image follow its longest one."""
    lengths = {item.key: (len(item.images), len(benchmark.message(item))) for item in items}
    longest: dict[tuple[Path | bytes, ...], tuple[int, int]] = {}
    for item in items:
        longest[item.images] = max(longest.get(item.images, (0, 0)), lengths[item.key])
    first = {images: number for number, images in enumerate(longest)}  # separates images of equal length

    def place(item: Item) -> tuple:
        shared = (longest[item.images], -first[item.images]) if item.images else (lengths[item.key], 0)
        return *shared, lengths[item.key]

    return sorted(items, key=place, reverse=True)


def merge(
    benchmark: Benchmark,
    items: Sequence[Item],
    output: Path,
    *,
    model_id: str,
    settings_id: str,
    metadata: Mapping[str, Any] = MappingProxyType({}),
) -> list[str]:
    """Writes `OUTPUT/answers.jsonl`: one line per item, in the order of the items. Returns the answers.

    The file depends on settings, items and texts alone, not on the number of processes or interruptions:
    `answer_id` is a hash of the settings and the item.
    """
    logged = read_logs(output / LOGS, settings_id)
    missing = [item.key for item in items if item.key not in logged]
    if missing:
        raise ValueError(f"{len(missing)} of {len(items)} items lack an answer ({examples(missing)}): run it again")
    answers = [logged[item.key]["text"] for item in items]
    lines = []
    for item, text in zip(items, answers):
        answer_id = hashlib.sha256(f"{settings_id}/{item.key}".encode()).hexdigest()[:22]
        line = {**benchmark.record(item), "text": text, "answer_id": answer_id, "model_id": model_id}
        lines.append(line | {"metadata": dict(metadata)})
    write_jsonl(output / MERGED, lines)
    return answers


def ahead(function: Callable[[T], U], values: Iterable[T], count: int = _BATCHES_AHEAD) -> Iterator[U]:
    """`map`, with up to `count` results computed before they are needed, in one thread (a tokenizer is not thread safe)."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting: deque = deque()
        for value in values:
            waiting.append(pool.submit(function, value))
            if len(waiting) > count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
