"""Items per second of the evaluation runner against one-by-one evaluation, same model, same questions, same answers.

    python benchmarks/evaluation.py                        the shipped tiny model, on a CPU
    python benchmarks/evaluation.py --size 7b              7B + CLIP-L/14-336 with random weights, float16, on the first GPU

"one by one" is what LLaVA's scripts do: for each question open the image, prepare it, encode it, generate, decode. The
runner is `llava_sp.eval.run.runner` as the benchmarks use it, with its logs on disk. Sets of questions about images of the shapes
world with 1 question to an image (as VizWiz), 3 (as VQAv2), and 6 (POPE has 18, GQA 31); from two on, the runner is also
measured with each question's image encoded for itself. All in one process and one run; repeats take turns; medians. Prints a table with ratios against one by one and writes JSON to `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from frame import default_device, synchronize, write_results
from real_size import build

from llava_sp import LlavaSPForCausalLM, LlavaSPProcessor
from llava_sp.common.processes import Processes
from llava_sp.decoding import Generation
from llava_sp.eval.base import SHORT_ANSWER, Benchmark, Item, Scores
from llava_sp.eval.run.answer_log import read_logs
from llava_sp.eval.run.answerer import ModelAnswerer
from llava_sp.eval.run.runner import LOGS, generate_answers
from llava_sp.inference import merge_lora, open_image, render_prompt
from llava_sp.shapes.language import Interviewer
from llava_sp.shapes.world import draw, sample_scene

SHIPPED = Path(__file__).parents[1] / "llava_sp" / "shapes" / "model"


class Questions(Benchmark):
    """Questions made here; what is measured is answering them."""

    name = "speed"
    title = "items per second"

    def load(self, data: Path) -> list[Item]:
        raise NotImplementedError("the questions are made by `make_items`")

    def prompt(self, item: Item) -> str:
        return item.text + SHORT_ANSWER

    def score(self, items, answers) -> Scores:
        raise NotImplementedError("nothing is scored here")


def make_items(folder: Path, count: int, per_image: int, seed: int) -> list[Item]:
    """`count` questions, `per_image` to an image, as JPEG files in `folder`."""
    rng = np.random.default_rng([seed, per_image])
    interviewer = Interviewer(rng)
    folder.mkdir(parents=True)
    items: list[Item] = []
    while len(items) < count:
        scene = sample_scene(rng, "val")
        path = folder / f"{len(items):06d}.jpg"
        draw(scene).save(path, quality=95)
        for question in interviewer.interview(scene, per_image)[: count - len(items)]:
            items.append(Item(len(items), question.text, (path,)))
    return items


def load(size: str, device: str) -> tuple[LlavaSPForCausalLM, LlavaSPProcessor]:
    shipped = LlavaSPForCausalLM.from_pretrained(SHIPPED)
    processor = LlavaSPProcessor.from_pretrained(SHIPPED)
    if size == "tiny":
        return merge_lora(shipped.to(device).eval()), processor
    model = build("cropping", "7b", device, torch.float16).eval()
    for name in ("image_token_id", "pad_token_id"):  # of the small tokenizer, which serves random weights as well
        setattr(model.config, name, getattr(shipped.config, name))
    model.generation_config = shipped.generation_config
    side = model.config.image_size
    processor.image_processor.size = {"shortest_edge": side}
    processor.image_processor.crop_size = {"height": side, "width": side}
    processor.num_image_tokens = model.config.num_image_tokens
    return model, processor


def one_by_one(model, processor, items: list[Item], generation: Generation, folder: Path) -> dict[str, str]:
    """What LLaVA's evaluation scripts do: batch size 1, every image opened and encoded again for every question."""
    benchmark, texts = Questions(), {}
    with (folder / "answers.jsonl").open("w") as stream, torch.inference_mode():
        for item in items:
            prompt = render_prompt(processor, benchmark.message(item))
            image = open_image(item.images[0], f"question {item.id}")
            inputs = processor(text=prompt, images=image, return_tensors="pt").to(model.device)
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
            ids = model.generate(**inputs, **generation.arguments())
            text = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()
            texts[item.key] = text
            stream.write(json.dumps({**benchmark.record(item), "text": text}) + "\n")
            stream.flush()
    return texts


def by_runner(
    model, processor, items: list[Item], generation: Generation, folder: Path, batch: int, share: bool
) -> dict[str, str]:
    benchmark = Questions()
    generate_answers(
        benchmark,
        items,
        ModelAnswerer(SimpleNamespace(model=model), processor, benchmark, generation, share_images=share),
        folder,
        batch_size=batch,
        processes=Processes(),
        progress=False,
    )
    return {key: line["text"] for key, line in read_logs(folder / LOGS).items()}


def measure(per_image: int, items: list[Item], model, processor, generation: Generation, arguments) -> list[dict]:
    """A row for each way of answering `items`."""
    ways = {"one by one": None}
    for batch in arguments.batch:
        ways[f"runner, batch {batch}"] = (batch, True)
        if per_image > 1 and batch > 1:
            ways[f"runner, batch {batch}, not shared"] = (batch, False)
    times: dict[str, list[float]] = {way: [] for way in ways}
    texts: dict[str, dict[str, str]] = {}
    for repeat in range(-1, arguments.repeats):  # the first round warms up
        for way, settings in ways.items():
            asked = items if repeat >= 0 else items[: 2 * max(arguments.batch)]
            with tempfile.TemporaryDirectory() as folder:
                synchronize(arguments.device)
                start = time.perf_counter()
                if settings is None:
                    found = one_by_one(model, processor, asked, generation, Path(folder))
                else:
                    found = by_runner(model, processor, asked, generation, Path(folder), *settings)
                synchronize(arguments.device)
                if repeat >= 0:
                    times[way].append(time.perf_counter() - start)
                    texts[way] = found
    base = statistics.median(times["one by one"])
    rows = []
    for way, seconds in times.items():
        same = sum(texts[way][key] == text for key, text in texts["one by one"].items())
        median = statistics.median(seconds)
        row = {"per_image": per_image, "way": way, "count": len(items), "seconds": seconds}
        rows.append(row | {"items_per_second": len(items) / median, "ratio": base / median, "same_answers": same})
        print(
            f"{per_image:11d} {way:28} {len(items) / median:9.1f} {base / median:7.2f}x {same:6d} of {len(items)}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["7b", "tiny"], default="tiny")
    parser.add_argument("--count", type=int, default=192, help="questions of each set")
    parser.add_argument("--per-image", type=int, nargs="+", default=[1, 3, 6], help="questions to an image")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--new-tokens", type=int, default=8, help="at most; random weights take all of them")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.size == "7b" and arguments.device != "cuda":
        parser.error("7B needs a CUDA GPU; --size tiny runs the same code on a CPU")
    model, processor = load(arguments.size, arguments.device)
    generation = Generation(max_new_tokens=arguments.new_tokens)
    print(f"{'per image':11} {'way':28} {'items/s':>9} {'ratio':>8} {'same answers':>12}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for per_image in arguments.per_image:
            items = make_items(Path(folder) / str(per_image), arguments.count, per_image, seed=0)
            rows += measure(per_image, items, model, processor, generation, arguments)
    write_results(f"evaluation_{arguments.size}", arguments, {"rows": rows})


if __name__ == "__main__":
    main()
