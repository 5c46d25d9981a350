"""Write the shapes world to disk in the formats that LLaVA and VQAv2 use.

    python -m llava_sp.shapes.make --output runs/quickstart/data

    OUTPUT/images/*.jpg                             training images, 96 x 96
    OUTPUT/pretrain.json                            stage 1: LLaVA's caption format (blip_laion_cc_sbu_558k.json)
    OUTPUT/finetune.json                            stage 2: LLaVA's instruction format (llava_v1_5_mix665k.json)
    OUTPUT/vqav2/v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json, val2014/*.jpg
                                                    held-out scenes and unseen handwriting, as VQAv2's official files
    OUTPUT/scenes.json                              the scene graph behind every image, to derive every answer again
    OUTPUT/world.json                               the settings and what they made; written last

The same arguments give the same bytes. Where `world.json` records the same settings, nothing is made again.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from llava_sp.common.command import command_parser, count, run_command, seed
from llava_sp.common.files import read_json, write_atomic
from llava_sp.shapes.images import Images
from llava_sp.shapes.language import CAPTION_REQUESTS, FAMILIES, SUFFIX, Interviewer, Question, caption, description
from llava_sp.shapes.world import sample_scene

VERSION = 1  # of the world: a change in what a seed gives is a change of this number
QUESTIONS_FILE = "v2_OpenEnded_mscoco_val2014_questions.json"
ANNOTATIONS_FILE = "v2_mscoco_val2014_annotations.json"
TURNS = 8  # questions of one training conversation
TEXT_ONLY = 0.1  # share of the stage 2 conversations without an image


@dataclass(frozen=True)
class Settings:
    """How much of the world to make."""

    seed: int = 0
    captions: int = 4000
    conversations: int = 4000
    questions: int = 600
    version: int = VERSION


def make(output: Path, settings: Settings, log: Callable[[str], None] = print) -> dict:
    """Write everything under `output`; returns what `world.json` holds. Raises `ValueError` for a folder of something else."""
    record = output / "world.json"
    if record.is_file():
        found = read_json(record, {"settings": dict})
        if found["settings"] == asdict(settings):
            log(f"shapes data: {output} is complete, nothing to make")
            return found
    elif output.exists() and any(output.iterdir()) and not (output / "images").is_dir():
        raise ValueError(f"output: {output} holds other files; give a new folder or one that this command made")
    record.unlink(missing_ok=True)
    training, held_out = Images(output / "images"), Images(output / "vqav2" / "val2014")
    log(f"shapes data: {settings.captions} captions -> {output / 'pretrain.json'}")
    _write(output / "pretrain.json", _pretrain(training, settings))
    log(f"shapes data: {settings.conversations} conversations -> {output / 'finetune.json'}")
    _write(output / "finetune.json", _finetune(training, settings))
    log(f"shapes data: {settings.questions} held-out questions -> {output / 'vqav2'}")
    counts = write_vqav2(output / "vqav2", held_out, settings)
    scenes = training.scenes | held_out.scenes
    _write(output / "scenes.json", scenes)
    summary = {"settings": asdict(settings), "images": len(scenes), "held_out_answers": counts}
    _write(record, summary)
    return summary


def _write(path: Path, content: object) -> None:
    write_atomic(path, json.dumps(content, indent=1) + "\n")


def _pretrain(images: Images, settings: Settings) -> list[dict]:
    """Stage 1: one image, one request, one caption. The mark comes before or after the request, as in LLaVA's file."""
    rng = np.random.default_rng([settings.seed, 10])
    records = []
    for i in range(settings.captions):
        scene = sample_scene(rng, "train")
        request = CAPTION_REQUESTS[rng.integers(len(CAPTION_REQUESTS))]
        human = f"<image>\n{request}" if rng.random() < 0.5 else f"{request}\n<image>"
        turns = [{"from": "human", "value": human}, {"from": "gpt", "value": caption(scene)}]
        name = f"caption_{i:06d}"
        records.append({"id": name, "image": images.save(f"{name}.jpg", scene), "conversations": turns})
    return records


def _finetune(images: Images, settings: Settings) -> list[dict]:
    """Stage 2: short answers over several turns, now and then a caption, and some conversations without an image."""
    rng = np.random.default_rng([settings.seed, 11])
    interviewer = Interviewer(rng)
    records = []
    for i in range(settings.conversations):
        scene = sample_scene(rng, "train")
        turns: list[dict] = []
        text_only = rng.random() < TEXT_ONLY
        opening = f"{description(scene, rng)}\n" if text_only else "<image>\n"
        for question in interviewer.interview(scene, TURNS):
            asked = question.text if turns else f"{opening}{question.text}{SUFFIX}"
            turns += [{"from": "human", "value": asked}, {"from": "gpt", "value": question.answer}]
        record: dict = {"id": f"talk_{i:06d}"}
        if not text_only:
            record["image"] = images.save(f"talk_{i:06d}.jpg", scene)
        records.append(record | {"conversations": turns})
    return records


def write_vqav2(output: Path, images: Images, settings: Settings) -> dict[str, dict[str, int]]:
    """The held-out questions: as many of each family as of another, two or three on an image.

    Returns how often each answer is right, by family.
    """
    rng = np.random.default_rng([settings.seed, 12])
    interviewer = Interviewer(rng)
    asked: list[tuple[int, int, Question]] = []
    per_family: Counter[str] = Counter()
    image_id = 0
    while len(asked) < settings.questions:
        scene = sample_scene(rng, "val")
        order = rng.permutation(len(FAMILIES))
        families = sorted((list(FAMILIES)[i] for i in order), key=lambda family: per_family[family])[:3]
        found = [question for family in families if (question := interviewer.ask(scene, family))]
        found = found[: settings.questions - len(asked)]
        if not found:
            continue
        image_id += 1
        images.save(f"COCO_val2014_{image_id:012d}.jpg", scene)
        per_family.update(question.family for question in found)
        asked += [(image_id, number, question) for number, question in enumerate(found)]
    questions, annotations = zip(*(_vqa_records(*entry) for entry in asked))
    info = {"description": "The shapes world of llava_sp, held-out scenes.", "version": f"{VERSION}.0", "year": 2025}
    license = {"name": "Apache License 2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"}
    header = {"info": info, "data_type": "mscoco", "data_subtype": "val2014", "license": license}
    _write(output / QUESTIONS_FILE, header | {"task_type": "Open-Ended", "questions": questions})
    _write(output / ANNOTATIONS_FILE, header | {"annotations": annotations})
    counts: dict[str, Counter[str]] = {family: Counter() for family in FAMILIES}
    for _, _, question in asked:
        counts[question.family][question.answer] += 1
    return {family: dict(sorted(found.items())) for family, found in counts.items()}


def _vqa_records(image_id: int, number: int, question: Question) -> tuple[dict, dict]:
    """VQAv2's question and annotation; ids are image_id * 1000 + n, as in the official files."""
    question_type, answer_type = FAMILIES[question.family]
    ids = {"image_id": image_id, "question_id": image_id * 1000 + number}
    answers = [{"answer": question.answer, "answer_confidence": "yes", "answer_id": i} for i in range(1, 11)]
    annotation = {
        "question_type": question_type,
        "multiple_choice_answer": question.answer,
        "answers": answers,
        "answer_type": answer_type,
        **ids,
    }
    return {"question": question.text, **ids}, annotation


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = command_parser("llava_sp.shapes.make", __doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for the data")
    numbers = {"seed": seed, "captions": count, "conversations": count, "questions": count}
    for name, kind in numbers.items():
        parser.add_argument(f"--{name}", type=kind, default=getattr(Settings, name), help="default: %(default)s")
    args = parser.parse_args(argv)
    settings = Settings(**{name: getattr(args, name) for name in numbers})

    def action() -> None:
        make(args.output, settings)

    return run_command(action, traceback=args.traceback)


if __name__ == "__main__":
    sys.exit(main())
