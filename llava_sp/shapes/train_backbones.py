"""Train the two tiny backbones that the repository ships, on text and images of the shapes world.

    python -m llava_sp.shapes.train_backbones [--output llava_sp/shapes/backbones] [--only clip|llama]

Writes OUTPUT/clip (a CLIPModel) and OUTPUT/llama (a LlamaForCausalLM with its tokenizer) in the formats of the real ones,
16-bit, and OUTPUT/README.md with the command and what was measured.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from llava_sp.common.command import at_once, command_parser, count, run_command, seed
from llava_sp.common.files import write_atomic
from llava_sp.common.provenance import version

DEFAULT_OUTPUT = Path(__file__).resolve().parent / "backbones"
BATCH = {"clip": 64, "llama": 16}
RECORD = "training.json"
README = """# Tiny backbones of the shapes world

Made by `{command}` (torch {torch}, transformers {transformers}, {threads} threads, float32; stored in float16). Floating
point differs between machines, so a new run gives weights like these, not the same bits. Nothing held out was used: neither
scenes of the `val` split nor its handwritten digits.

* `clip/`: {clip_size:,} parameters. A CLIPModel, {image} px, patch {patch}, grid {grid} x {grid}, with tokenizer and
  preprocessor_config.json. Loss: CLIP's, plus patches against the phrases of the things they show.
* `llama/`: {llama_size:,} parameters. A LlamaForCausalLM with a SentencePiece tokenizer of {vocabulary} pieces (BPE, byte
  fallback), trained on captions and on conversations about scenes described in words, some of them with several words at one
  position (the sum of their embeddings), as image tokens are. It was trained on no image.

Figures at the end of each cycle (CLIP's on held-out scenes):

{figures}
"""


def modules() -> dict[str, ModuleType]:
    """Part -> its module, which has `CYCLES`, `start`, `load`, `train` and `save`."""
    from llava_sp.shapes import tiny_clip, tiny_llama  # torch and transformers: not needed for --help

    return {"clip": tiny_clip, "llama": tiny_llama}


def train(output: Path, parts: Sequence[str], seed: int, max_steps: int | None, threads: int) -> None:
    """Train the parts, cycle by cycle, and write them below `output`. What an interrupted run finished is used."""
    import torch

    torch.set_num_threads(threads)
    for part in parts:
        new = output / f".{part}.new"
        new.mkdir(parents=True, exist_ok=True)
        module = modules()[part]
        for number in range(len(_cycles_done(new)), len(module.CYCLES)):
            _train_cycle(part, new, seed, number, max_steps)
        shutil.rmtree(output / part, ignore_errors=True)
        new.rename(output / part)
    write_readme(output, threads)


def _cycles_done(folder: Path) -> list[dict]:
    record = folder / RECORD
    return json.loads(record.read_text())["cycles"] if record.is_file() else []


def _train_cycle(part: str, folder: Path, seed: int, number: int, max_steps: int | None) -> None:
    """One cycle; it starts from the 16-bit weights that the one before left in `folder`, and leaves its own there."""
    module = modules()[part]
    model = module.start(seed, folder) if number == 0 else module.load(folder)
    steps = min(module.CYCLES[number].steps, max_steps or module.CYCLES[number].steps)
    figures = module.train(model, folder, seed, number, steps, BATCH[part])
    module.save(model, folder)
    cycles = [*_cycles_done(folder), {"steps": steps, "batch size": BATCH[part], **figures}]
    record = {"seed": seed, "parameters": sum(p.numel() for p in model.parameters()), "cycles": cycles}
    write_atomic(folder / RECORD, json.dumps(record, indent=1) + "\n")


def write_readme(output: Path, threads: int) -> None:
    """OUTPUT/README.md from the figures recorded beside the weights; nothing while a part is missing."""
    files = {part: output / part / RECORD for part in BATCH}
    if not all(file.is_file() for file in files.values()):
        return
    records = {part: json.loads(file.read_text()) for part, file in files.items()}
    lines = [
        f"* {part}, seed {record['seed']}, cycle {number}: "
        + ", ".join(f"{name} {value}" for name, value in cycle.items())
        for part, record in records.items()
        for number, cycle in enumerate(record["cycles"])
    ]
    clip, llama = modules()["clip"], modules()["llama"]
    text = README.format(
        command="python -m llava_sp.shapes.train_backbones",
        torch=(version("torch") or "").split("+")[0],
        transformers=version("transformers"),
        threads=threads,
        clip_size=records["clip"]["parameters"],
        llama_size=records["llama"]["parameters"],
        image=clip.SIZE,
        patch=clip.PATCH,
        grid=clip.GRID,
        vocabulary=llama.VOCABULARY,
        figures="\n".join(lines),
    )
    write_atomic(output / "README.md", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = command_parser("llava_sp.shapes.train_backbones", __doc__)
    add = parser.add_argument
    add("--output", type=Path, default=DEFAULT_OUTPUT, help="default: %(default)s")
    add("--only", choices=tuple(BATCH), help="train this one alone")
    add("--seed", type=seed, default=0)
    add("--threads", type=at_once, default=2)
    add("--max-steps", type=count, help="no more steps than this in a cycle (to try the command out)")
    args = parser.parse_args(argv)

    def action() -> None:
        train(args.output, [args.only] if args.only else list(BATCH), args.seed, args.max_steps, args.threads)

    return run_command(
        action, traceback=args.traceback, on_interrupt="interrupted: the same command continues from here"
    )


if __name__ == "__main__":
    sys.exit(main())
