"""VQAv2, VizWiz and TextVQA: open questions with ten answers each. (GQA has a file of its own.)"""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np

from llava_sp.common.files import write_json, write_jsonl
from llava_sp.shapes import make
from llava_sp.shapes.benchmarks.choices import ALL_NAMES
from llava_sp.shapes.benchmarks.common import (
    SPLIT,
    EvenHanded,
    Gallery,
    Settings,
    Written,
    digits,
    generator,
    number_of,
    one_of,
    scene_with,
    short_line,
)
from llava_sp.shapes.language import FAMILIES, Interviewer, Question, questions
from llava_sp.shapes.world import SHAPES, SIZE, Scene, sample_scene

UNANSWERABLE = 4  # one VizWiz question in four asks for what is not there
WHEN_UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def write_vqav2(folder: Path, settings: Settings) -> Written:
    """As `llava_sp.shapes.make` writes it: questions, annotations and val2014 pictures, under their official names."""
    (folder / "val2014").mkdir(parents=True, exist_ok=True)
    graphs: dict[str, Scene] = {}
    make.write_vqav2(folder, make.Settings(seed=settings.seed, questions=settings.questions), graphs)
    gallery = Gallery(folder)
    for name, scene in graphs.items():
        gallery.remember(f"val2014/{name}", scene)
    return Written(settings.questions, gallery.scenes)


def write_vizwiz(folder: Path, settings: Settings) -> Written:
    """val.json with answers and test.json without, LLaVA's question files of both, and the pictures, one per question.

    As many questions in test as in val; those of val are counted.
    """
    rng = generator("vizwiz", settings)
    gallery = Gallery(folder)
    for split in ("val", "test"):
        asker = _VizWizAsker(rng)
        records, lines = [], []
        for i in range(settings.questions):
            scene, question = asker.ask(unanswerable=i % UNANSWERABLE == UNANSWERABLE - 1)
            image = f"VizWiz_{split}_{i:08d}.jpg"
            gallery.save(f"{split}/{image}", scene)
            record = {"image": image, "question": question.text}
            records.append(record | _vizwiz_answers(question) if split == "val" else record)
            lines.append(short_line(i, image, question.text + WHEN_UNANSWERABLE))
        write_json(folder / f"{split}.json", records)
        write_jsonl(folder / f"llava_{split}.jsonl", lines)
    return Written(settings.questions, gallery.scenes)


class _VizWizAsker:
    """Asks one question about a new scene; the unanswerable ones are worded like the others, about things not there."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.interviewer = Interviewer(rng)
        self.families = EvenHanded(rng)

    def ask(self, unanswerable: bool) -> tuple[Scene, Question]:
        if unanswerable:
            scene = sample_scene(self.rng, SPLIT)
            return scene, Question("unanswerable", one_of(self.rng, absent_questions(scene)), "unanswerable")
        family = self.families.pick(FAMILIES)
        scene = scene_with(self.rng, lambda scene: questions(scene, family))
        return scene, self.interviewer.ask(scene, family)


def absent_questions(scene: Scene) -> list[str]:
    """Questions of the usual wordings about what the scene does not hold."""
    kinds = [kind for kind in SHAPES if not number_of(scene, kind)]
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

    As in the official files a picture may have two questions (LLaVA's question_id is the picture's), a reader of text
    may find nothing or misread, and people write "7" or "seven".
    """
    rng = generator("textvqa", settings)
    gallery = Gallery(folder)
    data, lines = [], []
    number = 0
    while len(data) < settings.questions:
        scene = _scene_with_text(rng, with_text=number % 6 != 5)
        image_id = hashlib.sha256(f"textvqa {settings.seed} {number}".encode()).hexdigest()[:16]
        gallery.save(f"train_images/{image_id}.jpg", scene)
        tokens = [str(_read(thing.value, rng)) for thing in digits(scene)]
        asked = _text_questions(scene, rng)[: settings.questions - len(data)]
        for question in asked:
            data.append(_textvqa_record(question, scene, image_id, 70_000 + len(data)))
            text = f"{question.text}\nReference OCR token: {', '.join(tokens)}"
            lines.append(short_line(image_id, f"{image_id}.jpg", text))
        number += 1
    header = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    write_json(folder / "TextVQA_0.5.1_val.json", header | {"data": data})
    write_jsonl(folder / "llava_textvqa_val_v051_ocr.jsonl", lines)
    return Written(len(data), gallery.scenes)


def _scene_with_text(rng: np.random.Generator, with_text: bool) -> Scene:
    if with_text:
        return scene_with(rng, digits)
    return scene_with(rng, lambda scene: not digits(scene) and questions(scene, "color"))


def _read(value: int, rng: np.random.Generator) -> int:
    """What OCR makes of a digit: one in five is misread."""
    return int((value + rng.integers(1, 10)) % 10) if rng.random() < 0.2 else value


def _text_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """One question about a digit where there is one, and on every other such picture (or where there is none) another."""
    found = questions(scene, "digit")
    asked = [one_of(rng, found)] if found else []
    if not asked or rng.random() < 0.5:
        asked += questions(scene, "color")[:1]
    return asked


def _textvqa_record(question: Question, scene: Scene, image_id: str, question_id: int) -> dict:
    answers = [question.answer] * 10
    if question.answer.isdigit():
        answers[7:] = [DIGIT_WORDS[int(question.answer)]] * 3
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
