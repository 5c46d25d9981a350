"""All that only a CUDA GPU can show, in parts: tests, both stages by their scripts, steps, generation, evaluation, merging.

    bash benchmarks/gpu.sh [--part N ...] [--size 7b|tiny] [--device cuda|cpu] [--work FOLDER] [--results FOLDER]

Vicuna-7B's and CLIP-L/14-336's shapes with random weights, and random pictures with conversations of LLaVA-665k's lengths, are
made in the work folder (15 GiB) by the first part that needs them. A part that has ended well is not run again, unless it is
named; one that takes longer than `--minutes` is ended, and the next one goes on. Needs this checkout, torch, transformers,
peft, accelerate, safetensors and pillow; DeepSpeed, pytest and TRL are used where they are installed.

Writes what each part printed to FOLDER/gpu_PART.txt, the benchmarks' own JSON files beside it, and prints their tables.
Exit status: 0 all parts are done, 1 one failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from frame import RESULTS, default_device, device_name

ROOT = Path(__file__).parent.parent
LOGGED = (("loss", 9, 4), ("samples_per_second", 10, 2), ("tokens_per_second", 10, 0), ("memory_gib", 11, 2))
PICTURES = 64  # different ones; the records share them

Command = list[str]


@dataclass(frozen=True)
class Place:
    """What a part is given."""

    size: str
    device: str
    work: Path
    results: Path

    @property
    def tiny(self) -> bool:
        return self.size == "tiny"

    def python(self, *words: object) -> Command:
        return [sys.executable, "-W", "ignore", *map(str, words)]

    def benchmark(self, name: str, *words: object) -> Command:
        output = self.results / f"{name}_{self.size}_{self.device_name}.json"
        return self.python(ROOT / "benchmarks" / f"{name}.py", *words, "--output", output)

    @property
    def device_name(self) -> str:
        return device_name(self.device)


# ---- what is trained on


def make_inputs(place: Place) -> None:
    """Backbones and data, once."""
    if (place.work / "data" / "conversations.json").is_file():
        return
    from merge import make_backbones

    shutil.rmtree(place.work / "data", ignore_errors=True)
    make_backbones("tiny" if place.tiny else "7b", place.work, place.device)
    make_data(place.work / "data", 64 if place.tiny else 4096)


def make_data(folder: Path, records: int) -> None:
    """LLaVA's annotations with LLaVA-665k's lengths, in words of one token each, and JPEGs of COCO's size."""
    import numpy as np
    from PIL import Image
    from train_step import drawn

    (folder / "images").mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(PICTURES):
        coarse = random.integers(0, 256, (15, 20, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC).save(
            folder / f"images/{number}.jpg", quality=90
        )
    captions, conversations = [], []
    for number, (text, learned, images) in enumerate(drawn(records, seed=0)):
        question, answer = (("the " * max(count, 1)).strip() for count in (text - learned, learned))
        picture = {"id": str(number), "image": f"{number % PICTURES}.jpg"}
        captions.append(picture | {"conversations": turns("<image>", "the " * 40)})
        mark = "<image>\n" if images else ""
        conversations.append((picture if images else {}) | {"conversations": turns(mark + question, answer)})
    (folder / "captions.json").write_text(json.dumps(captions))
    (folder / "conversations.json").write_text(json.dumps(conversations))


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer.strip()}]


# ---- the parts


def tests(place: Place) -> Iterator[Command]:
    """what is marked gpu"""
    if importlib.util.find_spec("pytest") is None:
        print("pytest is not installed: left out")
    elif place.device == "cpu":
        yield place.python(
            "-m", "pytest", "-q", "-m", "gpu", "--collect-only", ROOT / "tests/model", "-p", "no:cacheprovider"
        )
    else:
        yield place.python("-m", "pytest", "-q", "-m", "gpu", ROOT / "tests", "-p", "no:cacheprovider")


def stage(place: Place, script: str, name: str, **settings: object) -> Command:
    """A few steps of a stage, by the script that users run."""
    make_inputs(place)
    output = place.work / "runs" / name
    shutil.rmtree(output, ignore_errors=True)
    settings |= {
        "language_model": place.work / "base",
        "vision_tower": place.work / "clip",
        "image_folder": place.work / "data" / "images",
        "output_dir": output,
        "max_steps": 2 if place.tiny else 6,
        "logging_steps": 1,
    }
    if importlib.util.find_spec("deepspeed") is None or place.device == "cpu":
        settings["deepspeed"] = "null"
    if place.tiny:
        settings |= {"global_batch_size": 8, "dataloader_num_workers": 0, "lora_r": 8, "bf16": "false"}
    config = ROOT / "configs" / f"{Path(script).stem}_7b_cropping.yaml"
    words = [word for key, value in settings.items() for word in (f"--{key}", value)]
    return place.python(ROOT / "scripts" / script, "--config", config, *words)


def stage_1(place: Place) -> Iterator[Command]:
    """scripts/pretrain.sh"""
    data = place.work / "data" / "captions.json"
    yield stage(place, "pretrain.sh", "pretrain", data_path=data)


def stage_2(place: Place, name: str, **settings: object) -> Command:
    data, start = place.work / "data" / "conversations.json", place.work / "runs" / "pretrain"
    settings["projector_checkpoint"] = start if (start / "llava_sp.json").is_file() else "scratch"
    return stage(place, "finetune_lora.sh", name, data_path=data, **settings)


def stage_2_packed(place: Place) -> Iterator[Command]:
    """scripts/finetune_lora.sh, packed"""
    yield stage_2(place, "lora-packed")  # as the recipe has it


def stage_2_padded(place: Place) -> Iterator[Command]:
    """scripts/finetune_lora.sh, padded"""
    batch = 4 if place.tiny else 16
    yield stage_2(
        place, "lora-padded", packing="false", group_by_modality_length="true", per_device_train_batch_size=batch
    )


def steps(place: Place) -> Iterator[Command]:
    """steps of stage 2 beside transformers' own LLaVA"""
    ways = ["transformers", "padded", "packed", "packed+recomputed", "packed+compiled"]
    ways += ["trl"] if importlib.util.find_spec("trl") else []
    few = ("--steps", 1, "--repeats", 1)
    yield place.benchmark(
        "train_step", "--size", place.size, "--device", place.device, "--ways", *ways, *(few if place.tiny else ())
    )


def generation(place: Place) -> Iterator[Command]:
    """first token and tokens/s for none, cropping, pooling"""
    few = ("--new-tokens", 4, "--repeats", 1, "--train-batch", 2)
    yield place.benchmark("real_size", "--size", place.size, "--device", place.device, *(few if place.tiny else ()))


def evaluation(place: Place) -> Iterator[Command]:
    """questions/s of the evaluation, beside one by one"""
    few = ("--count", 12, "--per-image", 3, "--batch", 4, "--repeats", 1)
    yield place.benchmark("evaluation", "--size", place.size, "--device", place.device, *(few if place.tiny else ()))


def projector(place: Place) -> Iterator[Command]:
    """the projector's products beside convolutions"""
    few = ("--batch", 1, "--dtype", "bfloat16", "--variant", "cropping", "--kind", "extractor", "--repeats", 1)
    yield place.benchmark("projector", "--device", place.device, *(few if place.tiny else ()))


def merging(place: Place) -> Iterator[Command]:
    """checkpoints.merge of what stage 2 wrote"""
    source, target = place.work / "runs" / "lora-packed", place.work / "merged"
    shutil.rmtree(target, ignore_errors=True)
    if not source.is_dir():
        raise SystemExit("part stage_2_packed has written nothing yet")
    yield place.python("-m", "llava_sp.checkpoints.merge", source, "--to", target, "--device", place.device)


PARTS: dict[str, Callable[[Place], Iterator[Command]]] = {
    part.__name__: part
    for part in (tests, stage_1, stage_2_packed, stage_2_padded, steps, generation, evaluation, projector, merging)
}


# ---- running them


def run_part(number: int, name: str, place: Place, minutes: float) -> float | None:
    """Its seconds, or None if it failed; what it prints is shown and kept."""
    print(f"\n== part {number}: {name} ({PARTS[name].__doc__})", flush=True)
    start = time.monotonic()
    with (place.results / f"gpu_{name}_{place.device_name}.txt").open("w") as log:
        for command in PARTS[name](place):
            left = 60 * minutes - (time.monotonic() - start)
            limited = ["timeout", "--kill-after", "10", f"{max(left, 1):.0f}", *command]
            with subprocess.Popen(
                limited, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
            ) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    print(line, end="", flush=True)
                    log.write(line)
            if process.returncode:
                reason = (
                    f"took more than {minutes:g} minutes"
                    if process.returncode == 124
                    else f"status {process.returncode}"
                )
                print(f"part {name} failed: {reason}", flush=True)
                return None
    return time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", metavar="N", help="numbers or names; --list shows them")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--size", choices=["7b", "tiny"], default="7b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default=default_device())
    parser.add_argument(
        "--work", type=Path, default=ROOT / "gpu_work", help="for weights, data and runs (default: %(default)s)"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=9, help="for one part")
    arguments = parser.parse_args()
    names = [*PARTS]
    if arguments.list:
        for number, name in enumerate(names, 1):
            print(f"{number} {name}: {PARTS[name].__doc__}")
        return 0
    wrong = [
        part for part in arguments.part or () if part not in names and part not in map(str, range(1, len(names) + 1))
    ]
    if wrong:
        parser.error(f"--part {wrong[0]}: one of 1 to {len(names)}, or {', '.join(names)}")
    chosen = [names[int(part) - 1] if part.isdigit() else part for part in arguments.part or ()]
    return run_parts(chosen, arguments)


def run_parts(chosen: Sequence[str], arguments: Namespace) -> int:
    """Run the chosen parts, or those that are not done yet."""
    place = Place(arguments.size, arguments.device, arguments.work.absolute(), arguments.results.absolute())
    for folder in (place.work, place.results):
        folder.mkdir(parents=True, exist_ok=True)
    record = place.work / f"done_{place.size}_{place.device_name}.json"
    done: dict[str, float] = json.loads(record.read_text()) if record.is_file() else {}
    failed = []
    for number, name in enumerate(PARTS, 1):
        if name not in chosen if chosen else name in done:
            continue
        seconds = run_part(number, name, place, arguments.minutes)
        if seconds is None:
            failed.append(name)
            continue
        done[name] = round(seconds, 1)
        record.write_text(json.dumps(done))
    print("\nseconds of each part: " + ", ".join(f"{name} {seconds:g}" for name, seconds in done.items()))
    print(training_table(place))
    if failed:
        print(f"failed: {', '.join(failed)}")
    return int(bool(failed))


def training_table(place: Place) -> str:
    """What the runs of both stages logged in their last steps."""
    lines = [f"{'run':14} {'step':>5} {'loss':>9} {'samples/s':>10} {'tokens/s':>10} {'memory GiB':>11}"]
    for folder in sorted((place.work / "runs").glob("*")):
        logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        steps = [line for line in logged if "loss" in line]
        if steps:
            last = steps[-1]
            cells = [f"{last[key]:>{width},.{digits}f}" for key, width, digits in LOGGED if key in last]
            lines.append(f"{folder.name:14} {last['step']:5} {' '.join(cells)}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
