"""One benchmark from its questions to its results: load, check the output folder, answer, score.

`cli` calls this for one benchmark, `__main__` for all of them, with one `Engine`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from llava_sp.common.files import counted, examples
from llava_sp.common.processes import Processes
from llava_sp.common.watchdog import Watchdog
from llava_sp.decoding import Generation
from llava_sp.eval.base import Benchmark, Item
from llava_sp.eval.run.answerer import ModelAnswerer
from llava_sp.eval.run.output import Outcome, check_output, exclusive, finish, load_items, provenance
from llava_sp.eval.run.runner import generate_answers, merge
from llava_sp.inference import Engine, Source, processor_hash, render_prompt


def open_engine(model: str, args: argparse.Namespace, processes: Processes) -> Engine:
    """The checkpoint that the arguments name, on this process's device; not read yet."""
    source = Source(model, args.language_model, args.vision_tower)
    return Engine.choose(source, args.dtype, args.device, processes.local_rank)


def evaluate(
    benchmark_class: type[Benchmark],
    args: argparse.Namespace,
    data: Path,
    output: Path,
    engine: Engine,
    watch: Watchdog,
) -> Outcome | None:
    """Answers and scores one benchmark; the outcome on the main process, None on the others.

    `watch` watches the processes that share the questions.

    Raises:
        ValueError, OSError: on the rank that failed; the others raise `ReportedElsewhere`.
    """
    settings: dict[str, Any] = {}
    processes = watch.here
    watch.progress(0, "reading questions and checkpoint", patient=True)
    with ExitStack() as stack:
        with watch.together():
            benchmark = benchmark_class.from_arguments(args)
            all_items = load_items(benchmark, data)
            items = all_items[: args.limit]
            processor = engine.processor(args.image_aspect_ratio or benchmark.image_aspect_ratio)
            generation = benchmark.generation
            if args.max_new_tokens is not None:
                generation = replace(generation, max_new_tokens=args.max_new_tokens)
            if args.temperature is not None:
                generation = replace(generation, temperature=args.temperature, do_sample=args.temperature > 0)
            if processes.is_main:
                stack.enter_context(exclusive(output))
                check_images(items)
                settings = answer_settings(benchmark, all_items, engine, processor, generation, args.seed)
                check_output(output, settings, len(items))
                asked = " ".join(filter(None, (benchmark.name, benchmark.split)))
                print(f"{counted(len(items), 'question')} of {asked} -> {output}", file=sys.stderr)
        settings_id = hashlib.sha256(json.dumps(processes.from_main(settings), sort_keys=True).encode()).hexdigest()
        about = {"generation": asdict(generation)}
        start = time.perf_counter()
        with watch.together():
            answered = generate_answers(
                benchmark,
                items,
                ModelAnswerer(engine, processor, benchmark, generation, args.seed),
                output,
                batch_size=1 if generation.do_sample else args.batch_size,
                processes=processes,
                watch=watch,
                about={**about, "settings": settings_id},
            )
        if not processes.is_main:
            return None
        watch.progress(answered, "scoring", patient=True)
        answers = merge(benchmark, items, output, model_id=engine.source.name, settings_id=settings_id, metadata=about)
        origin = provenance(
            benchmark,
            items,
            settings,
            model=engine.source.path,
            device=engine.device_name,
            batch_size=args.batch_size,
            processes=processes.world_size,
            limit=args.limit,
            seed=args.seed,
            last_command={
                "answered_by_first_process": answered,
                "seconds": round(time.perf_counter() - start, 2),
            },
        )
        outcome = finish(benchmark, items, answers, output, origin)
    if len(items) < len(all_items):
        print(f"note: --limit: the first {len(items)} of {len(all_items)} questions; not comparable", file=sys.stderr)
    return outcome


def answer_settings(
    benchmark: Benchmark, items: Sequence[Item], engine: Engine, processor: Any, generation: Generation, seed: int
) -> dict[str, Any]:
    """The settings that determine the answers: not batch size, device, number of processes, --limit."""
    questions = hashlib.sha256()
    for item in items:
        images = [
            "/".join(image.parts[-2:]) if isinstance(image, Path) else hashlib.sha256(image).hexdigest()
            for image in item.images
        ]
        questions.update(json.dumps([item.key, benchmark.message(item), images]).encode() + b"\n")
    return {
        "benchmark": benchmark.name,
        "split": benchmark.split,
        "questions": questions.hexdigest(),
        "checkpoint": engine.source.fingerprint,
        "config": engine.source.config_hash,
        "processor": processor_hash(processor),
        "checkpoint_generation": engine.source.generation_config,
        "conversation_template": benchmark.conversation_template or processor.conversation_template,
        "prompt_example": render_prompt(processor, benchmark.message(items[0]), benchmark.conversation_template),
        "image_aspect_ratio": processor.image_aspect_ratio,
        "generation": asdict(generation) | ({"seed": seed} if generation.do_sample else {}),
        "dtype": engine.dtype,
    }


def check_images(items: Sequence[Item]) -> None:
    """Raises ValueError with count and examples if image files are missing, before any model is loaded."""
    owners: dict[Path, Item] = {}
    for item in items:
        for image in item.images:
            if isinstance(image, Path):
                owners.setdefault(image, item)
    listings = {folder: set(os.listdir(folder)) if folder.is_dir() else set() for folder in {i.parent for i in owners}}
    missing = [image for image in owners if image.name not in listings[image.parent]]
    if missing:
        raise ValueError(
            f"{len(missing)} image files are missing ({examples(missing)}), the first for question {owners[missing[0]].id}; "
            "--images names the folder if they are elsewhere"
        )
