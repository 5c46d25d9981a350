"""Asks a model about one or several images (or none) and prints the answer while it is generated.

    python -m llava_sp.generate --model M --image x.jpg --prompt "What is in the image?"
    python -m llava_sp.generate --model M --image a.jpg --image b.jpg --prompt "What changed?" --temperature 0.7

The images go in front of the question, or where <image> is in it; without images <image> is text. Decoding is greedy unless
--temperature or --top-p is given. The answer goes to standard output, everything else to standard error. Exit status: 0
done, 2 an error that the user can correct, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_sp.common.command import (
    at_once,
    check_arguments,
    command_parser,
    count,
    fitting,
    run_command,
    seed,
    temperature,
)
from llava_sp.common.schema import Check
from llava_sp.decoding import Generation

PART = Check(lambda number: 0 < number <= 1, "a number above 0 and at most 1", float)
PENALTY = Check(lambda number: 0.01 <= number <= 100, "a number from 0.01 to 100", float)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    args = _parser().parse_args(argv)
    return run_command(lambda: _generate(args), traceback=args.traceback)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("llava_sp.generate", __doc__)
    add = parser.add_argument
    add("--model", required=True, help="a LLaVA-SP checkpoint (full or adapter): directory or hub id")
    add("--image", type=Path, action="append", default=[], help="an image file; may be given several times")
    add("--prompt", required=True, help="the question")
    add("--conversation-template", help="conversation template (default: the checkpoint's own)")
    add("--max-new-tokens", type=count, default=512, help="default 512")
    add("--temperature", type=temperature, help="sample at this temperature instead of greedy decoding")
    add("--top-p", type=fitting(PART), help="sample from the likeliest tokens that together have this probability")
    add("--num-beams", type=at_once, default=1, help="beam search; the answer is then printed at the end")
    add("--repetition-penalty", type=fitting(PENALTY), default=1.0, help="above 1 makes repetition less likely")
    add("--seed", type=seed, help="makes sampling repeatable")
    add("--dtype", choices=("auto", "float32", "float16", "bfloat16"), default="auto",
        help="auto: float16 on a GPU, else float32")  # fmt: skip
    add("--device", help="cuda, cuda:1, cpu, ... (default: a GPU if there is one)")
    add("--language-model", help="language model of an adapter checkpoint, if it was moved")
    add("--vision-tower", help="vision tower of an adapter checkpoint, if it was moved")
    return parser


def _generate(args: argparse.Namespace) -> None:
    greedy = args.temperature == 0 or (args.temperature is None and args.top_p is None)
    check_arguments(("--image", path, path.is_file(), "a file") for path in args.image)
    generation = Generation(
        do_sample=not greedy,
        temperature=args.temperature or 1.0,
        top_p=1.0 if args.top_p is None else args.top_p,
        num_beams=args.num_beams,
        max_new_tokens=args.max_new_tokens,
    )

    import torch
    from transformers import TextStreamer

    from llava_sp.inference import Engine, Source, open_image, place_images

    message = place_images(args.prompt, len(args.image), "--prompt") if args.image else args.prompt
    images = [open_image(path, "--image") for path in args.image]
    engine = Engine.choose(Source(args.model, args.language_model, args.vision_tower), args.dtype, args.device)
    options: dict[str, Any] = {"repetition_penalty": args.repetition_penalty}
    if args.num_beams == 1:
        tokenizer = engine.processor().tokenizer
        options["streamer"] = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    answer = engine.answer(message, images, generation, args.conversation_template, **options)
    if args.num_beams > 1:
        print(answer)


if __name__ == "__main__":
    sys.exit(main())
