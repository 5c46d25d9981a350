"""Asks a model about one or several images (or none) and prints the answer as it is made.

    python -m llava_sp.generate --model M --image x.jpg --prompt "What is in the picture?"
    python -m llava_sp.generate --model M --image a.jpg --image b.jpg --prompt "What changed?" --temperature 0.7

The images go in front of the question, or where <image> stands in it. Decoding is greedy unless --temperature or
--top-p is given. The answer goes to standard output, everything else to standard error. Exit status: 0 done, 2 something to
put right (the message says what), 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

IMAGE_MARK = "<image>"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        _generate(args)
    except (ValueError, OSError, MemoryError) as error:
        if args.traceback:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llava_sp.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="a LLaVA-SP checkpoint (full or adapter): directory or hub id")
    add("--image", type=Path, action="append", default=[], help="an image file; may be given several times")
    add("--prompt", required=True, help="the question")
    add("--conversation-template", help="conversation template (default: the checkpoint's own)")
    add("--max-new-tokens", type=int, default=512, help="default 512")
    add("--temperature", type=float, help="sample at this temperature instead of taking the likeliest token")
    add("--top-p", type=float, help="sample from the likeliest tokens that together have this probability")
    add("--num-beams", type=int, default=1, help="beam search; the answer then comes at once")
    add("--repetition-penalty", type=float, default=1.0, help="above 1 makes repetition less likely")
    add("--seed", type=int, help="makes sampling repeatable")
    add("--dtype", choices=("auto", "float32", "float16", "bfloat16"), default="auto",
        help="auto: float16 on a GPU, else float32")  # fmt: skip
    add("--device", help="cuda, cuda:1, cpu, ... (default: a GPU if there is one)")
    add("--language-model", help="language model of an adapter checkpoint, where it has moved")
    add("--vision-tower", help="vision tower of an adapter checkpoint, where it has moved")
    add("--traceback", action="store_true", help="show where an error comes from")
    return parser


def place_images(prompt: str, count: int) -> str:
    """The user's message: `count` images in front, each on a line of its own, unless the prompt says where they go.

    Raises:
        ValueError: the prompt holds marks, but not one per image.
    """
    marks = prompt.count(IMAGE_MARK)
    if marks == 0:
        return f"{IMAGE_MARK}\n" * count + prompt
    if marks != count:
        raise ValueError(f"--prompt holds {marks} {IMAGE_MARK} marks, but {count} images were given with --image")
    return prompt


def sampling_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `generate`. Raises ValueError naming the flag and the value that is out of range."""
    checks = [
        ("--max-new-tokens", args.max_new_tokens, args.max_new_tokens >= 1, "at least 1"),
        ("--num-beams", args.num_beams, args.num_beams >= 1, "at least 1"),
        ("--temperature", args.temperature, args.temperature is None or args.temperature >= 0, "0 (greedy) or more"),
        ("--top-p", args.top_p, args.top_p is None or 0 < args.top_p <= 1, "above 0 and at most 1"),
        ("--repetition-penalty", args.repetition_penalty, args.repetition_penalty > 0, "above 0"),
    ]
    for flag, value, fits, right in checks:
        if not fits:
            raise ValueError(f"{flag} is {value}; it must be {right}")
    sample = args.temperature != 0 and not (args.temperature is None and args.top_p is None)
    arguments: dict[str, Any] = {
        "max_new_tokens": args.max_new_tokens,
        "num_beams": args.num_beams,
        "repetition_penalty": args.repetition_penalty,
        "do_sample": sample,
    }
    if sample:
        arguments |= {"temperature": args.temperature or 1.0, "top_p": 1.0 if args.top_p is None else args.top_p}
    else:
        arguments |= {"temperature": None, "top_p": None, "top_k": None}  # not those of the checkpoint either
    return arguments


def _generate(args: argparse.Namespace) -> None:
    arguments = sampling_arguments(args)
    message = place_images(args.prompt, len(args.image))
    for path in args.image:  # before torch is loaded
        if not path.is_file():
            raise ValueError(f"--image {path} {'is not a file' if path.exists() else 'does not exist'}")

    import torch
    from transformers import TextStreamer

    from llava_sp import inference
    from llava_sp.eval.run.answerer import open_image

    images = [open_image(path, "--image") for path in args.image]
    source = inference.Source(args.model, args.language_model, args.vision_tower)
    device = inference.choose_device(args.device)
    processor = inference.load_processor(source)
    prompt = inference.render_prompt(processor, message, args.conversation_template)
    inputs = processor(text=prompt, images=images or None, return_tensors="pt").to(device)
    model = source.model(inference.choose_dtype(args.dtype, device), device)
    if images:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    streamer = None
    if args.num_beams == 1:
        streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    try:
        with torch.inference_mode():
            ids = model.generate(**inputs, **arguments, streamer=streamer)
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"out of GPU memory ({str(error).splitlines()[0]}); try --dtype bfloat16") from None
    if streamer is None:
        print(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())


if __name__ == "__main__":
    sys.exit(main())
