"""Samples per second of the data loader, and where its time goes: decode, pad, resize, normalise, tokenise.

    python benchmarks/loader.py [--samples 64] [--workers 0 2]

The images are JPEGs of COCO's size (640 x 480, about 120 kB), made on the spot; each sample asks twice about one, at CLIP-L/14-336's settings. Parts
are processor time on one thread, which other work on the machine disturbs less than clock time. The baseline in the same run is what
LLaVA's own loader does: Pillow, padding, CLIPImageProcessorPil, and the tokenizer on the rendered text.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frame import write_results

from llava_sp.common.command import command_parser, count, natural, run_command

if TYPE_CHECKING:
    from llava_sp.data.dataset import ConversationDataset

SIDE, TOKENS = 336, 582
QUESTIONS = ("What is in front of the house, and what colour is it?", "How many people do you see in the picture?")
ANSWERS = (
    "In front of the house stands a small red car, its windows half open, beside a row of flower pots and a bicycle.",
    "There are three people: two adults who talk to each other, and a child who runs after a dog on the lawn.",
)


def write_data(folder: Path, samples: int) -> None:
    """`samples` records and JPEGs: smooth colours with grain, for about COCO's bytes per pixel."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    records = []
    for number in range(samples):
        coarse = Image.fromarray(random.integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize((640, 480))
        grain = np.asarray(coarse).astype(np.int16) + random.normal(0, 6, (480, 640, 3)).astype(np.int16)
        Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.jpg", quality=90)
        turns = [
            {"from": who, "value": "<image>\n" * (not place) + text}
            for place, pair in enumerate(zip(QUESTIONS, ANSWERS))
            for who, text in zip(("human", "gpt"), pair)
        ]
        turns[1:] = [{**turn, "value": turn["value"].removeprefix("<image>\n")} for turn in turns[1:]]
        records.append({"id": str(number), "image": f"{number}.jpg", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))


def open_data(folder: Path) -> ConversationDataset:
    from transformers import AutoTokenizer, CLIPImageProcessorPil

    from llava_sp.data.dataset import ConversationDataset
    from llava_sp.data.mixture import load_mixture
    from llava_sp.model.processing_llava_sp import LlavaSPProcessor, add_special_tokens

    package = Path(__file__).parents[1] / "llava_sp"
    tokenizer = AutoTokenizer.from_pretrained(package / "shapes" / "backbones" / "llama")
    add_special_tokens(tokenizer)
    settings: dict[str, Any] = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    processor = LlavaSPProcessor(CLIPImageProcessorPil(**settings), tokenizer, num_image_tokens=TOKENS)
    return ConversationDataset(load_mixture([{"annotations": folder / "data.json", "images": folder}]), processor)


def steps(dataset: ConversationDataset, folder: Path) -> dict[str, Callable[[int], Any]]:
    """Each part of loading sample i, ours and the baseline's, alone."""
    from PIL import Image

    from llava_sp.model.image_preprocessing import pad_to_square

    processor = dataset.processor
    colour = tuple(int(mean * 255) for mean in processor.image_processor.image_mean)
    images = [dataset.load_images(i, dataset.conversation(i))[0] for i in range(4)]
    squares = [pad_to_square(image, colour) for image in images]
    small = [square.resize((SIDE, SIDE), Image.Resampling.BICUBIC) for square in squares]
    talk = [dataset.conversation(i) for i in range(4)]

    def baseline(i: int) -> None:
        record = dataset.files[0][i]
        image = Image.open(folder / record["image"]).convert("RGB")
        processor.image_processor.preprocess(pad_to_square(image, colour), return_tensors="pt")
        segments = processor.render_conversation(talk[i % 4].turns)
        processor.tokenizer("".join(text for text, _ in segments).replace("<image>", ""))

    return {
        "whole sample": lambda i: dataset[i],
        "baseline": baseline,
        "read the record": dataset.conversation,
        "decode": lambda i: dataset.load_images(i, talk[i % 4]),
        "pad": lambda i: pad_to_square(images[i % 4], colour),
        "resize": lambda i: squares[i % 4].resize((SIDE, SIDE), Image.Resampling.BICUBIC),
        "normalise, copy": lambda i: processor.preprocess_images([small[i % 4]]),
        "... by the processor": lambda i: processor.image_processor([small[i % 4]], return_tensors="pt"),
        "tokenise": lambda i: dataset.encode(talk[i % 4]),
    }


def per_second(dataset: ConversationDataset, workers: int) -> float:
    """Samples per second of clock time, after the workers have started."""
    from torch.utils.data import DataLoader

    from llava_sp.data.collator import Collator

    collator: Any = Collator(dataset.processor.pad_token_id)
    batches = iter(DataLoader(dataset, batch_size=4, num_workers=workers, collate_fn=collator))
    next(batches)
    start = time.perf_counter()
    found = sum(len(batch["input_ids"]) for batch in batches)
    return found / (time.perf_counter() - start)


def main() -> int:
    parser = command_parser("", __doc__, usage="python benchmarks/loader.py [options]")
    parser.add_argument("--samples", type=count, default=64)
    parser.add_argument("--workers", type=natural, nargs="+", default=[0, 1])
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/loader_cpu.json")
    options = parser.parse_args()
    options.device = "cpu"
    return run_command(lambda: report(options), traceback=options.traceback)


def report(options: Namespace) -> None:
    """Measure, print the tables and write the JSON."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, max(options.samples, 8))
        dataset = open_data(folder)
        times: dict[str, list[float]] = {}
        parts = steps(dataset, folder)
        for i in range(-2, len(dataset)):  # the first two warm up
            for part, action in parts.items():
                start = time.process_time()
                action(max(i, 0))
                times.setdefault(part, []).append(time.process_time() - start)
        found = {part: 1e3 * statistics.median(spent[2:]) for part, spent in times.items()}
        for part, ms in found.items():
            print(f"{part:22} {ms:8.2f} ms {100 * ms / found['whole sample']:6.1f} %")
        print(f"baseline / ours: {found['baseline'] / found['whole sample']:.2f}")
        rates = {str(workers): per_second(dataset, workers) for workers in options.workers}
    for workers, rate in rates.items():
        print(f"{workers} workers: {rate:.1f} samples/s of clock time")
    write_results("loader", options, {"processor_ms": found, "samples_per_second": rates})


if __name__ == "__main__":
    sys.exit(main())
