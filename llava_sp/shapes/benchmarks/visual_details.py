"""MMVP (pairs of images that differ in one thing), Q-Bench (image quality) and RefCOCO (where is it?)."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from llava_sp.common.files import write_atomic
from llava_sp.shapes.benchmarks.common import Benchmark, EvenHanded, Settings, Written, others, shuffled
from llava_sp.shapes.language import with_article
from llava_sp.shapes.world import CELL, COLORS, SHAPES, SIDES, SIZE, Scene, Thing, digit_instances, draw, split_of

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
    out = Benchmark("mmvp", folder, settings)
    kinds = EvenHanded(out.rng)
    rows: list[tuple] = []
    for _ in range(max(1, settings.questions // 2)):
        found: list[_Change] = []
        while not found:
            scene = out.scene()
            found = _changes(scene, out)
        change = kinds.pick(found, key=lambda change: change.kind)
        answers = [change.before, change.after]
        options = shuffled(out.rng, answers)
        for shown, answer in zip((scene, change.scene), answers):
            number = len(rows) + 1
            out.save(f"MMVP Images/{number}.jpg", shown)
            text = " ".join(f"({letter}) {option}" for letter, option in zip("ab", options))
            rows.append((number, change.question, text, f"({'ab'[options.index(answer)]})"))
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerows([("Index", "Question", "Options", "Correct Answer"), *rows])
    write_atomic(folder / "Questions.csv", table.getvalue())
    return out.written(len(rows))


def _changes(scene: Scene, out: Benchmark) -> list[_Change]:
    """The changes whose outcome is a held-out scene too: another colour, shape, place or digit, or one thing gone."""
    found = []
    for thing in scene.alone():
        color = out.one_of(others(thing.color, COLORS))
        changed = scene.exchange(thing, replace(thing, color=color))
        found.append(_Change("color", changed, f"What color is the {thing.kind}?", thing.color, color))
        kind = out.one_of(others(thing.kind, SHAPES))
        changed = scene.exchange(thing, replace(thing, kind=kind))
        found.append(_Change("shape", changed, f"What shape is at the {thing.place}?", thing.kind, kind))
        question = f"Is there {with_article(thing.kind)} in the image?"
        found.append(_Change("existence", scene.exchange(thing), question, "Yes", "No"))
    for thing in scene.subjects():
        row, col = out.one_of(scene.free_cells())
        moved = thing.moved(row - thing.row, col - thing.col)
        things = sorted(scene.exchange(thing, moved).things, key=lambda thing: thing.cell)  # in reading order again
        changed = replace(scene, things=tuple(things))
        found.append(_Change("place", changed, f"Where is the {thing.name}?", thing.place, moved.place))
    for thing in scene.digits():
        value = int((thing.digit + out.rng.integers(1, 10)) % 10)
        written = replace(thing, value=value, instance=int(out.one_of(digit_instances("val")[value])))
        question = f"What digit is at the {thing.place}?"
        found.append(_Change("digit", scene.exchange(thing, written), question, str(thing.value), str(value)))
    return [change for change in found if split_of(change.scene.signature()) == "val"]


def write_qbench(folder: Path, settings: Settings) -> Written:
    """llvisionqa_dev.json and images: scenes that are blurred, noisy or dark (or clean), as a whole or in one thing.

    `type` is 0 for yes-or-no questions, 1 for how, 2 for what; `concern` is 0 for a distortion of the whole image, 1
    for something else of the whole, 2 and 3 for the same in one thing.
    """
    out = Benchmark("qbench", folder, settings)
    kinds, answers = EvenHanded(out.rng), EvenHanded(out.rng)
    records = []
    for i in range(settings.questions):
        scene = out.scene(lambda scene: scene.alone())
        thing = out.one_of(scene.alone())
        kind = kinds.pick(_QUALITY_QUESTIONS)
        found = {quality: _QUALITY_QUESTIONS[kind](thing, quality) for quality in QUALITIES}
        quality = answers.pick(QUALITIES, key=lambda q: (kind, found[q]["correct_ans"]))
        record = found[quality]
        local = thing if record["concern"] == 2 else None
        image = f"{i:05d}.jpg"
        more = {"quality": quality, "local": None if local is None else scene.things.index(local)}
        out.save(f"images/{image}", scene, _spoiled(scene, quality, local, out.rng), **more)
        records.append({"img_path": image} | record | {"candidates": shuffled(out.rng, record["candidates"])})
    out.json("llvisionqa_dev.json", records)
    return out.written(len(records))


def _quality_question(question: str, candidates: list[str], correct: str, type_: int, concern: int) -> dict[str, Any]:
    record = {"question": question, "candidates": candidates, "correct_ans": correct}
    return record | {"type": type_, "concern": concern}


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
    wrong = others(thing.color, COLORS)[:2]
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
    """The image in this quality; only in the cell of `local` where that is given."""
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
    """annotations.json and images: boxes around single things, several expressions on an image.

    Most images are not square, so that padding matters. As in the real sets RefCOCO's expressions may use places,
    those of RefCOCO+ may not, and those of RefCOCOg are longer; testA has one group of things (there people, here
    digits) and testB the others. `bbox_xywh_pixels` is x, y, width, height; `bbox` is x1, y1, x2, y2 in shares of the
    image itself, not of the padded square. `image` (a name in images/) and `split` (val, testA, testB; val, test of
    RefCOCOg) are added to the fields that lmms-eval's scorer reads.
    """
    out = Benchmark("refcoco", folder, settings)
    sets = EvenHanded(out.rng)
    records: list[dict] = []
    while len(records) < settings.questions:
        scene, number = out.scene(), len(out.scenes)
        canvas = CANVASES[number % len(CANVASES)]
        offset = ((canvas[0] - SIZE) // 2, (canvas[1] - SIZE) // 2)
        image = f"{number:06d}.jpg"
        asked = []
        for dataset in sets.order(REF_DATASETS):
            if found := _expressions(scene, dataset):
                sets.picked[dataset] += 1
                asked.append((dataset, *out.one_of(found)))
        for dataset, expression, thing in asked[: settings.questions - len(records)]:
            record = {"question_id": str(len(records)), "refer_dataset": dataset}
            record |= {"split": _ref_split(dataset, thing, number), "image": image, "answer": expression}
            size = {"image_width": canvas[0], "image_height": canvas[1]}
            records.append(record | size | _box(scene, thing, canvas, offset))
        wide = Image.new("RGB", canvas, scene.background)
        wide.paste(draw(scene), offset)
        out.save(f"images/{image}", scene, wide, offset=offset)
    out.json("annotations.json", records)
    return out.written(len(records))


def _ref_split(dataset: str, thing: Thing, number: int) -> str:
    if number % 2 == 0:
        return "val"
    if dataset == "RefCOCOg":
        return "test"
    return "testA" if thing.kind == "digit" else "testB"


def _expressions(scene: Scene, dataset: str) -> list[tuple[str, Thing]]:
    """Expressions that fit one thing only, and that thing."""
    known = scene.subjects()
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
    """The box around the thing's ink, in pixels and in shares of the image."""
    empty, single = draw(replace(scene, things=())), draw(replace(scene, things=(thing,)))
    ink = ImageChops.difference(empty, single).convert("L").point(lambda value: 255 * (value > 24))
    box = ink.getbbox()
    assert box is not None, "a thing without ink"
    left, top, right, bottom = box
    x1, y1, x2, y2 = left + offset[0], top + offset[1], right + offset[0], bottom + offset[1]
    width, height = canvas
    return {
        "bbox_xywh_pixels": [x1, y1, x2 - x1, y2 - y1],
        "bbox": [x1 / width, y1 / height, x2 / width, y2 / height],
    }
