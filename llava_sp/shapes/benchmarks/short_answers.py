"""VQAv2, VizWiz and TextVQA: open questions with ten answers each. (GQA has a file of its own.)"""

from __future__ import annotations

import hashlib
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llava_sp.shapes import make
from llava_sp.shapes.benchmarks.common import ALL_NAMES, NUMBERS, Benchmark, EvenHanded, Settings, Written, short_line
from llava_sp.shapes.images import Images
from llava_sp.shapes.language import FAMILIES, Interviewer, Question, questions
from llava_sp.shapes.world import SHAPES, SIZE, Scene

UNANSWERABLE = 4  # one VizWiz question in four asks for what is not there
WHEN_UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


def write_vqav2(folder: Path, settings: Settings) -> Written:
    """As `llava_sp.shapes.make` writes it: questions, annotations and val2014 images, under their official names."""
    images = Images(folder / "val2014")
    make.write_vqav2(folder, images, make.Settings(seed=settings.seed, questions=settings.questions))
    return Written(settings.questions, {f"val2014/{name}": scene for name, scene in images.scenes.items()})


def write_vizwiz(folder: Path, settings: Settings) -> Written:
    """val.json with answers and test.json without, LLaVA's question files of both, and the images, one per question.

    As many questions in test as in val; those of val are counted.
    """
    out = Benchmark("vizwiz", folder, settings)
    for split in ("val", "test"):
        interviewer, families = Interviewer(out.rng), EvenHanded(out.rng)
        records, lines = [], []
        for i in range(settings.questions):
            if i % UNANSWERABLE == UNANSWERABLE - 1:
                scene = out.scene()
                question: Question | None = Question(
                    "unanswerable", out.one_of(absent_questions(scene)), "unanswerable"
                )
            else:
                family = families.pick(FAMILIES)
                scene = out.scene(partial(questions, family=family))
                question = interviewer.ask(scene, family)
            assert question is not None
            image = f"VizWiz_{split}_{i:08d}.jpg"
            out.save(f"{split}/{image}", scene)
            record: dict[str, Any] = {"image": image, "question": question.text}
            records.append(record | _vizwiz_answers(question) if split == "val" else record)
            lines.append(short_line(i, image, question.text + WHEN_UNANSWERABLE))
        out.json(f"{split}.json", records)
        out.jsonl(f"llava_{split}.jsonl", lines)
    return out.written(settings.questions)


def absent_questions(scene: Scene) -> list[str]:
    """Questions about what is not in the scene, worded like the others."""
    kinds = [kind for kind in SHAPES if not scene.count(kind)]
    names = sorted(set(ALL_NAMES) - {thing.name for thing in scene.things})
    return [f"What color is the {kind}?" for kind in kinds] + [f"Where is the {name}?" for name in names]


def _vizwiz_answers(question: Question) -> dict:
    """Eight of ten people agree on the truth; as in VizWiz, some did not see it and some were not sure."""
    answerable = question.family != "unanswerable"
    others = "unanswerable" if answerable else "unsuitable"
    answers = [question.answer] * 8 + [others] * 2
    confidences = ["yes"] * 6 + ["maybe"] * 3 + ["no"]
    return {
        "answers": [{"answer_confidence": c, "answer": a} for c, a in zip(confidences, answers)],
        "answer_type": FAMILIES[question.family][1] if answerable else "unanswerable",
        "answerable": int(answerable),
    }


def write_textvqa(folder: Path, settings: Settings) -> Written:
    """TextVQA_0.5.1_val.json, LLaVA's question file with OCR tokens, and train_images. The digits are the text.

    As in the official files an image may have two questions (LLaVA's question_id is the image's), a reader of text
    may find nothing or misread, and people write "7" or "seven".
    """
    out = Benchmark("textvqa", folder, settings)
    data: list[dict[str, Any]] = []
    lines = []
    while len(data) < settings.questions:
        number = len(out.scenes)
        if number % 6 != 5:
            scene = out.scene(lambda scene: scene.digits())
        else:
            scene = out.scene(lambda scene: not scene.digits() and questions(scene, "color"))
        image_id = hashlib.sha256(f"textvqa {settings.seed} {number}".encode()).hexdigest()[:16]
        out.save(f"train_images/{image_id}.jpg", scene)
        tokens = [str(_read(thing.digit, out.rng)) for thing in scene.digits()]
        for question in _text_questions(scene, out)[: settings.questions - len(data)]:
            data.append(_textvqa_record(question, scene, image_id, 70_000 + len(data)))
            text = f"{question.text}\nReference OCR token: {', '.join(tokens)}"
            lines.append(short_line(image_id, f"{image_id}.jpg", text))
    header = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    out.json("TextVQA_0.5.1_val.json", header | {"data": data})
    out.jsonl("llava_textvqa_val_v051_ocr.jsonl", lines)
    return out.written(len(data))


def _read(value: int, rng: np.random.Generator) -> int:
    """What OCR makes of a digit: one in five is misread."""
    return int((value + rng.integers(1, 10)) % 10) if rng.random() < 0.2 else value


def _text_questions(scene: Scene, out: Benchmark) -> list[Question]:
    """One question about a digit where there is one, and on every other such image (or where there is none) another."""
    found = questions(scene, "digit")
    asked = [out.one_of(found)] if found else []
    if not asked or out.rng.random() < 0.5:
        asked += questions(scene, "color")[:1]
    return asked


def _textvqa_record(question: Question, scene: Scene, image_id: str, question_id: int) -> dict:
    answers = [question.answer] * 10
    if question.answer.isdigit():
        answers[7:] = [NUMBERS[int(question.answer)]] * 3
    return {
        "question": question.text,
        "image_id": image_id,
        "image_classes": [kind.capitalize() for kind in Counter(thing.kind for thing in scene.things)],
        "flickr_original_url": "",
        "flickr_300k_url": "",
        "image_width": SIZE,
        "image_height": SIZE,
        "answers": answers,
        "question_tokens": question.text.lower().rstrip("?").split(),
        "question_id": question_id,
        "set_name": "val",
    }
