"""Train LLaVA-SP in both stages and score it, on the embedded default: minutes on a laptop.

    python -m llava_sp.shapes.quickstart --output runs/quickstart

Makes the shapes data, then for every variant runs the very commands that a real run uses (`python -m llava_sp.train` with
configs/shapes/*.yaml, `python -m llava_sp.eval.vqav2`), prints one table and writes OUTPUT/report.html. The same command
again reuses finished steps and continues with the others.
"""

from __future__ import annotations

import argparse
import resource
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_sp.common.command import at_once, command_parser, count, run_command, seed
from llava_sp.common.files import read_json, write_json
from llava_sp.shapes.chains import Chains, Command, cores
from llava_sp.shapes.report import write_report
from llava_sp.shapes.results import load_results, render_table

VARIANTS = ("none", "cropping", "pooling")
CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "shapes"
DEFAULT_SEED = 42  # configs/base.yaml
JOBS = 3  # a variant each; with more, the quickstart would need more than 4 GiB


@dataclass(frozen=True)
class Run:
    """One variant with one seed: its folder holds pretrain/, lora/ and vqav2/."""

    variant: str
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name


def plan(output: Path, variants: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """The runs, seed by seed; the default seed's folders carry the variant's name alone."""
    names = {(v, s): v if s == DEFAULT_SEED else f"{v}-seed{s}" for s in seeds for v in variants}
    return [Run(variant, seed, output / name) for (variant, seed), name in names.items()]


def commands(run: Run, data: Path, args: argparse.Namespace) -> list[Command]:
    """What to run, in order."""
    shared = ["--spatial_variant", run.variant, "--seed", str(run.seed), "--image_folder", str(data / "images")]
    stage1, stage2 = run.folder / "pretrain", run.folder / "lora"
    pretrain = ["-m", "llava_sp.train", "--config", str(CONFIGS / "pretrain.yaml"), *shared]
    pretrain += ["--data_path", str(data / "pretrain.json"), "--output_dir", str(stage1)]
    finetune = ["-m", "llava_sp.train", "--config", str(CONFIGS / "finetune_lora.yaml"), *shared]
    finetune += ["--data_path", str(data / "finetune.json"), "--output_dir", str(stage2)]
    finetune += ["--projector_checkpoint", str(stage1)]
    for words, steps in ((pretrain, args.pretrain_steps), (finetune, args.finetune_steps)):
        words += [] if steps is None else ["--max_steps", str(steps)]
    score = ["-m", "llava_sp.eval.vqav2", "--model", str(stage2), "--data", str(data / "vqav2")]
    score += ["--output", str(run.folder / "vqav2"), "--batch-size", "50", "--max-new-tokens", "16"]
    logs = run.folder.parent / "logs" / run.name
    steps = {"stage 1": pretrain, "stage 2": finetune, "score": score}
    return [Command(title, words, logs / f"{title.replace(' ', '-')}.log") for title, words in steps.items()]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    args = parse(argv)
    interrupted = "interrupted: the same command continues from here"
    return run_command(lambda: run(args), traceback=args.traceback, on_interrupt=interrupted, clean_up_on_sigterm=True)


def run(args: argparse.Namespace) -> None:
    """Make the data, train and score every model, and report. Raises `ValueError` outside of a clone of the repository."""
    if not CONFIGS.is_dir():
        raise ValueError(f"{CONFIGS} does not exist: the quickstart runs from a clone of the repository")
    started = time.time()
    output = args.output.resolve()
    data = output / "data"
    runs = plan(output, list(dict.fromkeys(args.variants)), list(dict.fromkeys(args.seeds)))
    jobs = min(args.jobs, len(runs))
    print(f"quickstart: {len(runs)} models, each in two stages, then scored; {jobs} at a time", flush=True)
    print(f"everything goes to {output}", flush=True)
    make = ["-m", "llava_sp.shapes.make", "--output", str(data)]
    make += [] if args.questions is None else ["--questions", str(args.questions)]
    Chains(1).run({"data": [Command("making", make, output / "logs" / "data.log")]})
    Chains(jobs, lambda: f"; {_minutes(time.time() - started)} so far").run(
        {run.name: commands(run, data, args) for run in runs}
    )
    spent = {"seconds": round(time.time() - started, 1), "peak_memory_gib": round(jobs * peak_memory_gib(), 2)}
    spent = most_spent(output / "quickstart.json", spent)
    results = load_results(output, [(run.name, run.variant) for run in runs])
    print(f"\n{render_table(results)}")
    print(f"\nreport: {write_report(output, results, spent)}")
    print(f"took {_minutes(spent['seconds'])}, at most {spent['peak_memory_gib']:.1f} GiB of memory")
    model = next((run.folder / "lora" for run in runs if run.variant != "none"), runs[0].folder / "lora")
    image = next((data / "vqav2" / "val2014").glob("*.jpg"))
    ask = ["python", "-m", "llava_sp.generate", "--model", str(model), "--image", str(image)]
    print(f"ask it yourself: {shlex.join([*ask, '--prompt', 'What do you see in the image?'])}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line's arguments."""
    parser = command_parser("llava_sp.shapes.quickstart", __doc__)
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/quickstart"), help="folder for everything (default %(default)s)")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all three")
    seeds = "one model per variant and seed (default %(default)s)"
    add("--seeds", nargs="+", type=seed, default=[DEFAULT_SEED], help=seeds)
    add("--pretrain-steps", type=count, help="instead of max_steps in configs/shapes/pretrain.yaml")
    add("--finetune-steps", type=count, help="instead of max_steps in configs/shapes/finetune_lora.yaml")
    add("--jobs", type=at_once, default=min(JOBS, cores()), help="models trained at a time (default here: %(default)s)")
    add("--questions", type=count, help="held-out questions (default: what llava_sp.shapes.make makes)")
    return parser.parse_args(argv)


def peak_memory_gib() -> float:
    """The most memory that one of the commands had resident, in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 2**30


def most_spent(path: Path, spent: dict[str, float]) -> dict[str, float]:
    """The cost of the run that did the work, kept in `path`: a later one, which reuses it, is quick and small."""
    if path.is_file():
        before = read_json(path, {str: float})
        spent = {key: max(value, before.get(key, 0)) for key, value in spent.items()}
    write_json(path, spent)
    return spent


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


if __name__ == "__main__":
    sys.exit(main())
