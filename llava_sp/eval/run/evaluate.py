"""One benchmark from its questions to its results: claim the folder, answer, have judged, score, write.

`cli` calls this for one benchmark, `__main__` for all of them, with one `Engine`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llava_sp.common.files import examples, lock, read_json, write_json, write_jsonl
from llava_sp.common.processes import Processes
from llava_sp.decoding import Generation
from llava_sp.eval.base import Benchmark, Item, Scores
from llava_sp.eval.run.output import check_output, provenance, run_settings, settings_id
from llava_sp.eval.run.runner import generate_answers, merge

if TYPE_CHECKING:
    from llava_sp.inference import Engine

T = TypeVar("T")

LOCK = ".lock"


@dataclass(frozen=True)
class Outcome:
    """A benchmark that was scored; `result` is what metrics.json holds."""

    benchmark: Benchmark
    items: Sequence[Item]
    scores: Scores
    result: dict[str, Any]


def open_engine(model: str, args: argparse.Namespace, processes: Processes) -> Engine:
    """The checkpoint that the arguments name, on this process's device; nothing of it is read yet."""
    from llava_sp import inference  # torch and transformers from here on

    source = inference.Source(model, args.language_model, args.vision_tower)
    return inference.Engine.choose(source, args.dtype, args.device, processes.local_rank)


def evaluate(
    benchmark_class: type[Benchmark],
    args: argparse.Namespace,
    data: Path,
    output: Path,
    engine: Engine,
    processes: Processes,
) -> Outcome | None:
    """Answers and scores one benchmark; the outcome on the first process, None on the others.

    Raises:
        ValueError, OSError: on the process that meets the problem; the others raise `ReportedElsewhere`.
    """
    from llava_sp import inference
    from llava_sp.eval.run.answerer import ModelAnswerer

    def prepare() -> tuple[Benchmark, Sequence[Item], Any]:
        benchmark = benchmark_class.from_arguments(args)
        items = load_items(benchmark, data)
        return benchmark, items, engine.processor(args.image_aspect_ratio or benchmark.image_aspect_ratio)

    benchmark, all_items, processor = together(processes, prepare)
    items = all_items[: args.limit]
    generation = _generation(benchmark, args)
    about = {"generation": asdict(generation)}

    def claim() -> dict[str, Any]:
        check_images(items)
        settings = _settings(benchmark, all_items, engine, processor, generation, args.seed)
        check_output(output, settings)
        _check_limit(output, len(items))
        asked = " ".join(filter(None, (benchmark.name, benchmark.split)))
        print(f"{len(items)} questions of {asked} -> {output}", file=sys.stderr)
        return settings

    with claimed(output if processes.is_main else None, processes):
        settings = together(processes, claim if processes.is_main else dict)
        run_id = processes.from_main(settings_id(settings))

        def answer() -> int:
            return generate_answers(
                benchmark,
                items,
                lambda: ModelAnswerer(engine.model, processor, benchmark, generation, args.seed),
                output,
                batch_size=1 if generation.do_sample else args.batch_size,
                processes=processes,
                about={**about, "settings": run_id},
            )

        start = time.perf_counter()
        answered = together(processes, answer)
        if not processes.is_main:
            return None
        records = merge(benchmark, items, output, model_id=engine.source.name, settings_id=run_id, metadata=about)
        origin = provenance(
            benchmark,
            items,
            settings,
            model=engine.source.path,
            device=inference.device_name(engine.device),
            batch_size=args.batch_size,
            processes=processes.world_size,
            limit=args.limit,
            seed=args.seed,
            last_command={
                "answered_by_first_process": answered,
                "seconds": round(time.perf_counter() - start, 2),
            },
        )
        outcome = finish(benchmark, items, [record["text"] for record in records], output, origin)
    if len(items) < len(all_items):
        print(f"note: --limit: the first {len(items)} of {len(all_items)} questions; not comparable", file=sys.stderr)
    return outcome


def _settings(
    benchmark: Benchmark, items: Sequence[Item], engine: Engine, processor: Any, generation: Generation, seed: int
) -> dict[str, Any]:
    """What decides the answers; see `provenance.run_settings`."""
    from llava_sp import inference

    return run_settings(
        benchmark,
        items,
        checkpoint=engine.source.fingerprint,
        config=engine.source.config_hash,
        processor=inference.processor_hash(processor),
        checkpoint_generation=engine.source.generation_config,
        conversation_template=benchmark.conversation_template or processor.conversation_template,
        example=inference.render_prompt(processor, benchmark.message(items[0]), benchmark.conversation_template),
        image_aspect_ratio=processor.image_aspect_ratio,
        generation=generation,
        dtype=engine.dtype,
        seed=seed,
    )


def load_items(benchmark: Benchmark, data: Path) -> list[Item]:
    """The benchmark's items. Raises ValueError if there is none, or if answers could not be told apart by their keys."""
    items = benchmark.load(data)
    if not items:
        raise ValueError(f"{data} holds no questions of {benchmark.name}")
    twice = [key for key, count in Counter(item.key for item in items).items() if count > 1]
    if twice:
        raise ValueError(
            f"{len(twice)} ids of {benchmark.name} occur more than once in {data} ({examples(twice)}); where official ids "
            "repeat, the benchmark must give each Item a key of its own"
        )
    return items


@contextmanager
def claimed(output: Path | None, processes: Processes | None = None) -> Iterator[Path | None]:
    """Keeps a second command out of the folder as long as this one is in it; nothing happens without a folder.

    Raises:
        ValueError: another command is in it; with `processes`, on every process.
    """
    with ExitStack() as stack:

        def take() -> None:
            if output is None:
                return
            if output.exists() and not output.is_dir():
                raise ValueError(f"--output {output} is a file; give a directory")
            output.mkdir(parents=True, exist_ok=True)
            path = output / LOCK
            if not lock(stack.enter_context(path.open("a")), path):
                raise ValueError(f"{path} is being written by another process: is the same command running?")

        together(processes or Processes(), take)
        yield output


def _check_limit(output: Path, count: int) -> None:
    """Raises ValueError if results of more questions are there, which those of `count` would replace."""
    metrics = output / "metrics.json"
    held = read_json(metrics).get("provenance", {}).get("count", 0) if metrics.is_file() else 0
    if held > count:
        raise ValueError(
            f"{output} holds results of {held} questions, and those of {count} would replace them: give another --output"
        )


def together(processes: Processes, function: Callable[[], T]) -> T:
    """Calls `function`; a problem on any process is raised on all of them, once all have come here."""
    with processes.together():
        return function()


def _generation(benchmark: Benchmark, args: argparse.Namespace) -> Generation:
    """The benchmark's generation settings with what the command line changes."""
    generation = benchmark.generation
    if args.max_new_tokens is not None:
        generation = replace(generation, max_new_tokens=args.max_new_tokens)
    if args.temperature is not None:
        generation = replace(generation, temperature=args.temperature, do_sample=args.temperature > 0)
    return generation


def finish(
    benchmark: Benchmark, items: Sequence[Item], answers: Sequence[str], output: Path | None, origin: dict[str, Any]
) -> Outcome:
    """Has the answers judged where that needs a judge, scores them, writes, and prints the headline."""
    benchmark.judge(items, answers, output)
    scores = benchmark.score(items, answers)
    result: dict[str, Any] = {"score": scores.score}
    scored_as = _scored_as(benchmark, items, answers, scores)
    if scored_as:
        result["scored_as"] = scored_as
    result["categories"] = {name: asdict(category) for name, category in scores.categories.items()}
    result |= {"metrics": scores.metrics, "provenance": origin}
    outcome = Outcome(benchmark, items, scores, result)
    if output is None:
        print(json.dumps(result, indent=2, ensure_ascii=False))
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
        print(f"{benchmark.title}{split}: {len(items)} questions answered; {benchmark.unscored}")
    for protocol, value in scored_as.items():
        if protocol != benchmark.protocol:
            print(f"the same answers scored as {protocol} does: {value}")
    if submission is not None:
        print(f"{benchmark.submission_label + ':':13} {submission}")
    print(f"results:      {output / 'metrics.json'}")
    print(f"each answer:  {output / 'per_item.jsonl'}")
    return outcome


def _scored_as(benchmark: Benchmark, items: Sequence[Item], answers: Sequence[str], scores: Scores) -> dict[str, float]:
    """The headline by the scoring rule of each protocol that can tell it; {} where there is but one."""
    others = [protocol for protocol in benchmark.protocols if protocol != benchmark.protocol]
    found = {benchmark.protocol: scores.score} if others else {}
    found |= {protocol: benchmark.under(protocol).score(items, answers).score for protocol in others}
    return {protocol: score for protocol, score in found.items() if score is not None}


def check_images(items: Sequence[Item]) -> None:
    """Raises ValueError with count and examples if image files are missing, before any model is loaded."""
    listings: dict[Path, set[str]] = {}
    missing: dict[Path, Item] = {}
    for item in items:
        for image in item.images:
            if not isinstance(image, Path):
                continue
            if image.parent not in listings:
                listings[image.parent] = set(os.listdir(image.parent)) if image.parent.is_dir() else set()
            if image.name not in listings[image.parent]:
                missing.setdefault(image, item)
    if missing:
        first = next(iter(missing))
        raise ValueError(
            f"{len(missing)} image files are missing ({examples(missing)}), the first for question {missing[first].id}; "
            "--images names the folder if they are elsewhere"
        )
