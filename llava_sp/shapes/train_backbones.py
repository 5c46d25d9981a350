"""Train the two tiny backbones that the repository ships, on text and pictures of the shapes world.

    python -m llava_sp.shapes.train_backbones [--output llava_sp/shapes/backbones] [--only clip|llama]

Writes OUTPUT/clip (a CLIPModel) and OUTPUT/llama (a LlamaForCausalLM with its tokenizer) in the formats of the real ones,
16-bit, and OUTPUT/README.md with the command and what was measured.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from llava_sp.shapes import tiny_clip, tiny_llama

DEFAULT_OUTPUT = Path(__file__).resolve().parent / "backbones"
STEPS = {"clip": 1000, "llama": 2500}
BATCH = {"clip": 64, "llama": 16}
README = """# Tiny backbones of the shapes world

Made by `{command}` (torch {torch}, transformers {transformers}, {threads} threads, float32; stored in float16). Floating
point differs between machines, so a new run gives weights like these, not the same bits. Nothing held out was used: neither
scenes of the `val` split nor its handwritten digits.

* `clip/`: {clip_size:,} parameters. A CLIPModel, {image} px, patch {patch}, grid {grid} x {grid}, with tokenizer and
  preprocessor_config.json. Loss: CLIP's, plus patches against the phrases of the things they show.
* `llama/`: {llama_size:,} parameters. A LlamaForCausalLM with a SentencePiece tokenizer of {vocabulary} pieces (BPE, byte
  fallback), trained on captions and on conversations about scenes described in words. It has seen no picture.

Figures at the end (CLIP on held-out scenes):

{figures}
"""


def train(output: Path, parts: Sequence[str], seed: int, steps: dict[str, int], threads: int) -> None:
    """Train the parts and write them below `output`; the figures of a part that is not trained again are kept."""
    torch.set_num_threads(threads)
    output.mkdir(parents=True, exist_ok=True)
    for part in parts:
        new = output / f".{part}.new"
        shutil.rmtree(new, ignore_errors=True)
        if part == "clip":
            model, tokenizer, figures = tiny_clip.train(seed, steps[part], BATCH[part])
            tiny_clip.save(model, tokenizer, new)
        else:
            model, figures = tiny_llama.train(seed, steps[part], BATCH[part], new)
            tiny_llama.save(model, new)
        record = {"seed": seed, "steps": steps[part], "batch size": BATCH[part], **figures}
        record["parameters"] = sum(p.numel() for p in model.parameters())
        (new / "training.json").write_text(json.dumps(record, indent=1) + "\n")
        shutil.rmtree(output / part, ignore_errors=True)
        new.rename(output / part)
    write_readme(output, threads)


def write_readme(output: Path, threads: int) -> None:
    """OUTPUT/README.md from the figures recorded beside the weights; nothing while a part is missing."""
    files = {part: output / part / "training.json" for part in ("clip", "llama")}
    if not all(file.is_file() for file in files.values()):
        return
    records = {part: json.loads(file.read_text()) for part, file in files.items()}
    lines = [
        f"* {part}: " + ", ".join(f"{name} {value}" for name, value in record.items())
        for part, record in records.items()
    ]
    text = README.format(
        command="python -m llava_sp.shapes.train_backbones",
        torch=torch.__version__.split("+")[0],
        transformers=transformers.__version__,
        threads=threads,
        clip_size=records["clip"]["parameters"],
        llama_size=records["llama"]["parameters"],
        image=tiny_clip.SIZE,
        patch=tiny_clip.PATCH,
        grid=tiny_clip.GRID,
        vocabulary=tiny_llama.VOCABULARY,
        figures="\n".join(lines),
    )
    (output / "README.md").write_text(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m llava_sp.shapes.train_backbones", description="Train the shapes world's tiny CLIP and Llama."
    )
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="default: %(default)s")
    parser.add_argument("--only", choices=("clip", "llama"), help="train this one alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    for part, steps in STEPS.items():
        parser.add_argument(f"--{part}-steps", type=int, default=steps)
    args = parser.parse_args(argv)
    parts = [args.only] if args.only else ["clip", "llama"]
    train(args.output, parts, args.seed, {"clip": args.clip_steps, "llama": args.llama_steps}, args.threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
