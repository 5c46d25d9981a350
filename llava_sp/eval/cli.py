"""The command line that all benchmarks share: `python -m llava_sp.eval.NAME`.

    --model M --data D --output O            answer the questions and score the answers
    --answers FILE --data D [--output O]     score an existing answers file (LLaVA's JSONL) without a model
    --validate FILE --data D                 check a finished submission file

Every score has a protocol: whose prompts, generation settings and scoring rule. `--protocol` chooses; where there
are several, `scored_as` in metrics.json holds the score of the same answers under each one's scoring rule.

Under `torchrun`, `accelerate launch` or `deepspeed` the questions are shared among the processes; where one hangs, all end
and name it (`--watchdog-minutes`). The same command again continues where the last one stopped. What it writes:

    O/metrics.json     score (the headline figure as published), categories, metrics (all other figures), provenance
    O/per_item.jsonl   the score of each item
    O/answers.jsonl    the answers in LLaVA's format; O/answers/ holds each process's own log, O/run.json the settings
    O/submission.json  for splits that a server scores

Exit status: 0 done, 1 a file that does not validate, 2 an error that the user can correct, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from llava_sp.checkpoints.reading.places import checkpoints_hint
from llava_sp.common.command import check_arguments, command_parser, count, fitting, run_command, seed, temperature
from llava_sp.common.files import sha256
from llava_sp.common.processes import Processes
from llava_sp.common.schema import Check, whole
from llava_sp.common.watchdog import Watchdog
from llava_sp.eval.base import Benchmark
from llava_sp.eval.inputs.checks import first_folder
from llava_sp.eval.run.output import check_output, exclusive, finish, load_items, provenance

DEFAULT_MODEL = "llava-sp-7b-cropping-lora"  # what configs/finetune_lora_7b_cropping.yaml writes, below the runs folder
QUICKSTART = "bash scripts/quickstart.sh"
MINUTES = Check(lambda number: 0 <= number <= 10**6, "a number of minutes, at most 1,000,000, or 0: never", float)
INTERRUPTED = "interrupted; the same command continues from here"


def main(benchmark_class: type[Benchmark], argv: Sequence[str] | None = None) -> int:
    """Runs one benchmark; returns the exit status."""
    args = make_parser(benchmark_class).parse_args(argv)
    action = _validate if args.validate else _score_answers if args.answers else _run
    return run_command(lambda: action(benchmark_class, args), traceback=args.traceback, on_interrupt=INTERRUPTED)


def make_parser(benchmark: type[Benchmark]) -> argparse.ArgumentParser:
    about = f"{benchmark.title}. {(sys.modules[benchmark.__module__].__doc__ or '').strip()}"
    parser = command_parser(f"llava_sp.eval.{benchmark.name}", about)
    add = parser.add_argument
    add("--model", help="a LLaVA-SP checkpoint (full or adapter): directory or hub id")
    add(
        "--data",
        type=Path,
        help=f"folder of the official or LLaVA's files (default ./playground/data/eval/{benchmark.name})",
    )
    add("--images", type=Path, help="folder of the images, where it is not in its usual place in the data folder")
    add("--output", type=Path, help="where results go (default ./runs/eval/NAME/CHECKPOINT)")
    add("--answers", type=Path, help="score this answers file instead of running a model")
    add("--validate", type=Path, help="check this submission file")
    add("--split", choices=benchmark.splits or None, help="default: what the data folder holds")
    add("--protocol", choices=benchmark.protocols, help=f"default {benchmark.protocols[0]}")
    add("--batch-size", type=count, default=8, help="questions at once per process (default 8)")
    add("--max-new-tokens", type=count, help=f"default {benchmark.generation.max_new_tokens}")
    add(
        "--temperature",
        type=temperature,
        help="0 is greedy; more draws answers, one by one, each with a seed of its own",
    )
    add(
        "--image-aspect-ratio",
        choices=("pad", "crop"),
        help="pad to a square, or crop its middle (default: the checkpoint's)",
    )
    add("--dtype", choices=("auto", "float32", "float16", "bfloat16"), default="auto",
        help="auto: float16 on a GPU, as LLaVA evaluates, else float32")  # fmt: skip
    add("--device", help="cuda, cuda:1, cpu, ... (default: this process's GPU if there is one)")
    add("--limit", type=count, help="only the first N questions; the score is then not comparable")
    add("--seed", type=seed, default=0, help="for benchmarks that sample")
    add("--language-model", help="language model of an adapter checkpoint, if it was moved")
    add("--vision-tower", help="vision tower of an adapter checkpoint, if it was moved")
    add("--local_rank", "--local-rank", type=fitting(whole(-1)), help=argparse.SUPPRESS)  # some launchers pass it
    add(
        "--watchdog-minutes",
        "--watchdog_minutes",
        metavar="MINUTES",
        type=fitting(MINUTES),
        default=10.0,
        help="several processes end after this time without progress of any; a batch must take less (default 10; 0: never)",
    )
    benchmark.add_arguments(parser)
    return parser


def _validate(benchmark_class: type[Benchmark], args: argparse.Namespace) -> int:
    benchmark, data = benchmark_class.from_arguments(args), _find_inputs(benchmark_class, args)[1]
    try:
        print(f"valid: {benchmark.validate(args.validate, data)}")
    except ValueError as error:
        print(f"not valid: {error}", file=sys.stderr)
        return 1
    return 0


def _score_answers(benchmark_class: type[Benchmark], args: argparse.Namespace) -> None:
    check_arguments(
        [
            ("--limit", args.limit, args.limit is None, "left out with --answers: all answers of a file are scored"),
            ("--model", args.model, args.model is None, "left out with --answers: they are scored without a model"),
        ]
    )
    benchmark = benchmark_class.from_arguments(args)
    items = load_items(benchmark, _find_inputs(benchmark_class, args)[1])
    records, note = benchmark.read_answers(args.answers)
    if note:
        print(f"note: {note}", file=sys.stderr)
    try:
        answers = benchmark.match(items, records)
    except ValueError as error:
        raise ValueError(f"{args.answers}: {error}") from error
    settings = {
        "benchmark": benchmark.name,
        "answers_sha256": sha256(args.answers),
        "model_ids": sorted({str(record["model_id"]) for record in records if "model_id" in record}),
    }
    origin = provenance(benchmark, items, settings, answers_file=str(args.answers))
    if args.output is None:
        finish(benchmark, items, answers, None, origin)
        return
    with exclusive(args.output):
        check_output(args.output, settings, len(items))
        finish(benchmark, items, answers, args.output, origin)


def _run(benchmark_class: type[Benchmark], args: argparse.Namespace) -> None:
    model, data = _find_inputs(benchmark_class, args, needs_model=True)
    output = args.output or Path("runs") / "eval" / benchmark_class.name / Path(model).name

    from llava_sp.eval.run.evaluate import evaluate, open_engine  # torch and transformers from here on

    with Processes.from_environment().group() as processes, watched(output, processes, args) as watch:
        evaluate(benchmark_class, args, data, output, open_engine(model, args, processes), watch)


def watched(output: Path, processes: Processes, args: argparse.Namespace) -> Watchdog:
    """A watchdog for the processes that write into `output`."""
    return Watchdog(output / ".alive", processes, args.watchdog_minutes or None)


def _find_inputs(benchmark: type[Benchmark], args: argparse.Namespace, needs_model: bool = False) -> tuple[str, Path]:
    """Model and data, given or in their default places. Raises ValueError with all that is missing."""
    missing = []
    default = Path(os.environ.get("LLAVA_SP_RUNS", "runs")) / DEFAULT_MODEL
    model, data = args.model or str(default), args.data or default_data(benchmark)
    if needs_model and args.model is None and not (default / "config.json").is_file():
        missing.append(
            f"  model: no finished fine-tuning run in {default} (scripts/finetune_lora.sh writes it); "
            f"--model DIR names another{checkpoints_hint(default)}"
        )
    if not data.is_dir():
        missing.append(
            f"  data: --data {data} is not a directory"
            if args.data
            else f"  data: no {data} (LLaVA's layout, with the official files); --data DIR names another"
        )
    if missing:
        missing.insert(0, f"python -m llava_sp.eval.{benchmark.name} needs its inputs:")
        quick = f"To see it work on the embedded default, which trains and scores small models:\n  {QUICKSTART}"
        raise ValueError("\n".join([*missing, quick] if needs_model else missing))
    return model, data


def default_data(benchmark: type[Benchmark], root: Path | None = None) -> Path:
    """The benchmark's folder below `root` (LLaVA's playground/data/eval), under any name that it goes by."""
    root = root or Path(os.environ.get("LLAVA_SP_DATA", "playground/data")) / "eval"
    return first_folder([root / name for name in (benchmark.name, *benchmark.folders)])
