"""MMVP (pairs of pictures that differ in one thing), Q-Bench (picture quality) and RefCOCO (where is it?)."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from llava_sp.common.files import write_atomic, write_json
from llava_sp.shapes.benchmarks.common import (
    SIDES,
    SPLIT,
    EvenHanded,
    Gallery,
    Settings,
    Written,
    alone,
    digits,
    generator,
    one_of,
    scene_with,
)
from llava_sp.shapes.language import article, subjects
from llava_sp.shapes.world import (
    CELL,
    COLORS,
    GRID,
    SHAPES,
    SIZE,
    Scene,
    Thing,
    digit_instances,
    draw,
    sample_scene,
    split_of,
)

QUALITIES = ("clean", "blurred", "noisy", "dark")
PROBLEMS = {"clean": "No problem", "blurred": "Blur", "noisy": "Noise", "dark": "Underexposure"}
REF_DATASETS = ("RefCOCO", "RefCOCO+", "RefCOCOg")
CANVASES = ((SIZE, SIZE), (160, SIZE), (SIZE, 144), (200, 120), (150, 151))  # width, height: most are not square


@dataclass(frozen=True)
class _Change:
    """A scene that differs from another in one thing, and a question whose answer differs for that reason."""

    kind: str
    scene: Scene
    question: str
    before: str
    after: str


def write_mmvp(folder: Path, settings: Settings) -> Written:
    """Questions.csv and "MMVP Images/<n>.jpg": lines 1 and 2 are a pair, 3 and 4, ..."""
    rng = generator("mmvp", settings)
    gallery = Gallery(folder)
    kinds = EvenHanded(rng)
    rows = []
    for _ in range(max(1, settings.questions // 2)):
        found: list[_Change] = []
        while not found:
            scene = sample_scene(rng, SPLIT)
            found = _changes(scene, rng)
        change = kinds.pick(found, key=lambda change: change.kind)
        answers = [change.before, change.after]
        options = [answers[i] for i in rng.permutation(2)]
        for shown, answer in zip((scene, change.scene), answers):
            number = len(rows) + 1
            gallery.save(f"MMVP Images/{number}.jpg", shown)
            text = " ".join(f"({letter}) {option}" for letter, option in zip("ab", options))
            rows.append((number, change.question, text, f"({'ab'[options.index(answer)]})"))
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerows([("Index", "Question", "Options", "Correct Answer"), *rows])
    write_atomic(folder / "Questions.csv", table.getvalue())
    return Written(len(rows), gallery.scenes)


def _changes(scene: Scene, rng: np.random.Generator) -> list[_Change]:
    """The changes whose outcome is a held-out scene too: another colour, shape, place or digit, or one thing gone."""
    found = []
    for thing in alone(scene):
        color = one_of(rng, [color for color in COLORS if color != thing.color])
        changed = _with(scene, thing, replace(thing, color=color))
        found.append(_Change("color", changed, f"What color is the {thing.kind}?", thing.color, color))
        kind = one_of(rng, [kind for kind in SHAPES if kind != thing.kind])
        changed = _with(scene, thing, replace(thing, kind=kind))
        found.append(_Change("shape", changed, f"What shape is at the {thing.place}?", thing.kind, kind))
        gone = replace(scene, things=tuple(other for other in scene.things if other is not thing))
        question = f"Is there {article(thing.kind)} {thing.kind} in the image?"
        found.append(_Change("existence", gone, question, "Yes", "No"))
    for thing in subjects(scene):
        taken = {(other.row, other.col) for other in scene.things}
        row, col = one_of(rng, [(r, c) for r in range(GRID) for c in range(GRID) if (r, c) not in taken])
        x, y = thing.x + CELL * (col - thing.col), thing.y + CELL * (row - thing.row)
        moved = replace(thing, row=row, col=col, x=x, y=y)
        changed = _with(scene, thing, moved)
        found.append(_Change("place", changed, f"Where is the {thing.name}?", thing.place, moved.place))
    for thing in digits(scene):
        value = int((thing.value + rng.integers(1, 10)) % 10)
        written = replace(thing, value=value, instance=int(one_of(rng, digit_instances(SPLIT)[value])))
        question = f"What digit is at the {thing.place}?"
        found.append(_Change("digit", _with(scene, thing, written), question, str(thing.value), str(value)))
    return [change for change in found if split_of(change.scene.signature()) == SPLIT]


def _with(scene: Scene, old: Thing, new: Thing) -> Scene:
    """The scene with one thing exchanged, in reading order again."""
    things = [new if thing is old else thing for thing in scene.things]
    return replace(scene, things=tuple(sorted(things, key=lambda thing: (thing.row, thing.col))))


def write_qbench(folder: Path, settings: Settings) -> Written:
    """llvisionqa_dev.json and images: scenes that are blurred, noisy or dark (or none of it), as a whole or in one thing.

    `type` is 0 for yes-or-no questions, 1 for how, 2 for what; `concern` is 0 for a distortion of the whole picture, 1
    for something else of the whole, 2 and 3 for the same in one thing.
    """
    rng = generator("qbench", settings)
    gallery = Gallery(folder)
    kinds, answers = EvenHanded(rng), EvenHanded(rng)
    records = []
    for i in range(settings.questions):
        scene = scene_with(rng, alone)
        asked_of = one_of(rng, alone(scene))
        kind = kinds.pick(_QUALITY_QUESTIONS)
        found = [_QUALITY_QUESTIONS[kind](asked_of, quality) for quality in QUALITIES]
        which = answers.pick(range(len(QUALITIES)), key=lambda q: (kind, found[q]["correct_ans"]))
        local = asked_of if found[which]["concern"] == 2 else None
        image = f"{i:05d}.jpg"
        more = {"quality": QUALITIES[which], "local": None if local is None else scene.things.index(local)}
        gallery.save(f"images/{image}", scene, _spoiled(scene, QUALITIES[which], local, rng), **more)
        candidates = found[which]["candidates"]
        shuffled = [candidates[j] for j in rng.permutation(len(candidates))]
        records.append({"img_path": image} | found[which] | {"candidates": shuffled})
    write_json(folder / "llvisionqa_dev.json", records)
    return Written(len(records), gallery.scenes)


def _quality_question(question: str, candidates: list[str], correct: str, type_: int, concern: int) -> dict:
    return {
        "question": question,
        "candidates": candidates,
        "correct_ans": correct,
        "type": type_,
        "concern": concern,
    }


def _is_blurred(thing: Thing, quality: str) -> dict:
    answer = "Yes" if quality == "blurred" else "No"
    return _quality_question("Is this picture blurred?", ["Yes", "No"], answer, 0, 0)


def _what_problem(thing: Thing, quality: str) -> dict:
    return _quality_question("What is the problem of this picture?", list(PROBLEMS.values()), PROBLEMS[quality], 2, 0)


def _how_light(thing: Thing, quality: str) -> dict:
    answer = "Dark" if quality == "dark" else "Normal"
    return _quality_question("How is the lighting of this picture?", ["Dark", "Normal"], answer, 1, 1)


def _how_sharp(thing: Thing, quality: str) -> dict:
    answers = {"clean": "Sharp", "blurred": "Blurred", "noisy": "Sharp but noisy", "dark": "Sharp but dark"}
    question = f"How does the {thing.kind} in this picture look?"
    return _quality_question(question, list(answers.values()), answers[quality], 1, 2)


def _which_color(thing: Thing, quality: str) -> dict:
    wrong = [color for color in COLORS if color != thing.color][:2]
    question = f"What color is the {thing.kind} in this picture?"
    return _quality_question(question, [thing.color, *wrong], thing.color, 2, 3)


_QUALITY_QUESTIONS = {
    "blurred": _is_blurred,
    "problem": _what_problem,
    "light": _how_light,
    "sharp": _how_sharp,
    "color": _which_color,
}


def _spoiled(scene: Scene, quality: str, local: Thing | None, rng: np.random.Generator) -> Image.Image:
    """The picture in this quality; only in the cell of `local` where that is given."""
    image = draw(scene)
    if quality == "blurred":
        spoiled = image.filter(ImageFilter.GaussianBlur(3.5))
    elif quality == "noisy":
        noise = rng.normal(0, 45, (SIZE, SIZE, 3))
        spoiled = Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
    elif quality == "dark":
        spoiled = image.point(lambda value: value // 4)
    else:
        return image
    if local is None:
        return spoiled
    corner = (CELL * local.col, CELL * local.row)
    image.paste(spoiled.crop((*corner, corner[0] + CELL, corner[1] + CELL)), corner)
    return image


def write_refcoco(folder: Path, settings: Settings) -> Written:
    """annotations.json and images: boxes around single things, several expressions on a picture.

    Most pictures are not square, so that padding matters. As in the real sets RefCOCO's expressions may use places,
    those of RefCOCO+ may not, and those of RefCOCOg are longer; testA has one group of things (there people, here
    digits) and testB the others. `bbox_xywh_pixels` is x, y, width, height; `bbox` is x1, y1, x2, y2 in shares of the
    picture itself, not of the padded square. `image` (a name in images/) and
    `split` (val, testA, testB; val, test of RefCOCOg) are added to the fields that lmms-eval's scorer reads.
    """
    rng = generator("refcoco", settings)
    gallery = Gallery(folder)
    sets = EvenHanded(rng)
    records: list[dict] = []
    picture = 0
    while len(records) < settings.questions:
        scene = sample_scene(rng, SPLIT)
        canvas = CANVASES[picture % len(CANVASES)]
        offset = ((canvas[0] - SIZE) // 2, (canvas[1] - SIZE) // 2)
        image = f"{picture:06d}.jpg"
        asked = []
        for dataset in sets.order(REF_DATASETS):
            found = _expressions(scene, dataset)
            if found:
                sets.picked[dataset] += 1
                asked.append((dataset, *one_of(rng, found)))
        for dataset, expression, thing in asked[: settings.questions - len(records)]:
            records.append(
                {
                    "question_id": str(len(records)),
                    "refer_dataset": dataset,
                    "split": _ref_split(dataset, thing, picture),
                    "image": image,
                    "answer": expression,
                    "image_width": canvas[0],
                    "image_height": canvas[1],
                    **_box(scene, thing, canvas, offset),
                }
            )
        wide = Image.new("RGB", canvas, scene.background)
        wide.paste(draw(scene), offset)
        gallery.save(f"images/{image}", scene, wide, offset=offset)
        picture += 1
    write_json(folder / "annotations.json", records)
    return Written(len(records), gallery.scenes)


def _ref_split(dataset: str, thing: Thing, picture: int) -> str:
    if picture % 2 == 0:
        return "val"
    if dataset == "RefCOCOg":
        return "test"
    return "testA" if thing.kind == "digit" else "testB"


def _expressions(scene: Scene, dataset: str) -> list[tuple[str, Thing]]:
    """Expressions that fit one thing only, and that thing."""
    known = subjects(scene)
    if dataset == "RefCOCO":
        return [(f"the {thing.kind} at the {thing.place}", thing) for thing in scene.things]
    if dataset == "RefCOCO+":
        return [(f"the {thing.name}", thing) for thing in known]
    found = []
    for a in known:
        for b in known:
            for side, (down, right) in SIDES.items():
                if (a.row - b.row) * down + (a.col - b.col) * right > 0:
                    found.append((f"the {a.name} that is {side} the {b.name}", a))
    return found


def _box(scene: Scene, thing: Thing, canvas: tuple[int, int], offset: tuple[int, int]) -> dict:
    """The box around the thing's ink, in pixels and in shares of the picture."""
    empty, single = draw(replace(scene, things=())), draw(replace(scene, things=(thing,)))
    ink = ImageChops.difference(empty, single).convert("L").point(lambda value: 255 * (value > 24))
    left, top, right, bottom = ink.getbbox()
    x1, y1, x2, y2 = left + offset[0], top + offset[1], right + offset[0], bottom + offset[1]
    width, height = canvas
    return {
        "bbox_xywh_pixels": [x1, y1, x2 - x1, y2 - y1],
        "bbox": [x1 / width, y1 / height, x2 / width, y2 / height],
    }
