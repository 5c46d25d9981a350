"""POPE and MME: questions to answer with yes or no."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from llava_sp.common.files import write_atomic
from llava_sp.shapes.benchmarks.choices import chinese
from llava_sp.shapes.benchmarks.common import (
    ALL_NAMES,
    ALL_PLACES,
    NUMBERS,
    Benchmark,
    Settings,
    Written,
    others,
    short_line,
    shuffled,
)
from llava_sp.shapes.language import plural, with_article
from llava_sp.shapes.world import COLORS, SHAPES, Scene, Thing, draw

POPE_CATEGORIES = ("adversarial", "popular", "random")  # in the order of LLaVA's question file
POPE_PAIRS = 3  # questions with "yes", and as many with "no", on an image at most
MOST_THINGS = 6  # in a scene
YES_NO = "Please answer yes or no."


def write_pope(folder: Path, settings: Settings) -> Written:
    """The three label files, LLaVA's question file over all of them, and the images, which the categories share.

    Absent things are chosen at random (random), from those that are most often in other images (popular), or from
    those most like what is there: same shape or same colour (adversarial).
    """
    out = Benchmark("pope", folder, settings)
    per_category = max(1, settings.questions // (2 * len(POPE_CATEGORIES)))  # pairs
    scenes: list[tuple[str, Scene, list[str]]] = []
    while (missing := per_category - sum(len(present) for _, _, present in scenes)) > 0:
        scene = out.scene()
        present = shuffled(out.rng, sorted({thing.name for thing in scene.shapes()}))[: min(POPE_PAIRS, missing)]
        image = f"COCO_val2014_{len(scenes) + 1:012d}.jpg"
        out.save(f"val2014/{image}", scene)
        scenes.append((image, scene, present))
    popular = Counter(thing.name for _, scene, _ in scenes for thing in scene.things)
    lines: list[dict[str, Any]] = []
    for category in POPE_CATEGORIES:
        labels: list[dict[str, Any]] = []
        for image, scene, present in scenes:
            for pair in zip(present, _absent(scene, category, popular, out.rng)):
                for name, label in zip(pair, ("yes", "no")):
                    text = f"Is there {with_article(name)} in the image?"
                    labels.append({"question_id": len(labels) + 1, "image": image, "text": text, "label": label})
                    lines.append(short_line(len(lines) + 1, image, text, category))
        out.jsonl(f"coco/coco_pope_{category}.json", labels)
    out.jsonl("llava_pope_test.jsonl", lines)
    return out.written(len(lines))


def _absent(scene: Scene, category: str, popular: Counter, rng: np.random.Generator) -> list[str]:
    """All names that are not in the scene, those first that the category asks for."""
    present = {thing.name for thing in scene.things}
    absent = [name for name in shuffled(rng, ALL_NAMES) if name not in present]
    if category == "popular":
        absent.sort(key=lambda name: -popular[name])
    if category == "adversarial":
        looks = Counter(word for thing in scene.things for word in (thing.color, thing.kind))
        absent.sort(key=lambda name: -sum(looks[word] for word in name.split()))
    return absent


class _Pair(NamedTuple):
    """What MME asks about one image: a question whose answer is yes and one whose answer is no."""

    scene: Scene
    yes: str
    no: str
    boxed: Thing | None = None


def _pair(scene: Scene, wording: str, right: object, wrong: object, boxed: Thing | None = None) -> _Pair:
    """The wording with the right word or number, and with a wrong one."""
    return _Pair(scene, wording.format(right), wording.format(wrong), boxed)


def write_mme(folder: Path, settings: Settings) -> Written:
    """LLaVA's question file and MME_Benchmark_release_version with two questions on every image, in both layouts:
    text beside the images, or in questions_answers_YN/ and images/.

    As in the official files a few questions have two spaces before "Please answer yes or no.", and only some text files
    end with a newline. Of the subtasks landmark, artwork and code_reasoning are left out: nothing here is like them.
    """
    out = Benchmark("mme", folder, settings)
    root = "MME_Benchmark_release_version"
    lines = []
    for index in range(max(len(SUBTASKS), settings.questions // 2)):
        subtask = list(SUBTASKS)[index % len(SUBTASKS)]
        number = index // len(SUBTASKS) + 1
        pair = SUBTASKS[subtask](out)
        apart = subtask in APART
        image = f"{subtask}/{'images/' if apart else ''}{number:04d}.jpg"
        text = f"{subtask}/{'questions_answers_YN/' if apart else ''}{number:04d}.txt"
        more = {} if pair.boxed is None else {"boxed": pair.scene.things.index(pair.boxed)}
        out.save(f"{root}/{image}", pair.scene, _with_box(pair.scene, pair.boxed), **more)
        asked = [(pair.yes, "Yes"), (pair.no, "No")][:: 1 if out.rng.random() < 0.5 else -1]
        space = "  " if number == 1 and subtask in TWO_SPACES else " "
        content = "\n".join(f"{question}{space}{YES_NO}\t{answer}" for question, answer in asked)
        write_atomic(folder / root / text, content + ("\n" if number % 2 else ""))
        lines += [short_line(image, image, question, subtask) for question, _ in asked]
    out.jsonl("llava_mme.jsonl", sorted(lines, key=lambda line: line["category"]))
    return out.written(len(lines))


def _with_box(scene: Scene, boxed: Thing | None) -> Image.Image:
    image = draw(scene)
    if boxed is not None:
        half = boxed.size // 2 + 3
        box = (boxed.x - half, boxed.y - half, boxed.x + half, boxed.y + half)
        ImageDraw.Draw(image).rectangle(box, outline=(255, 0, 0), width=2)
    return image


def _names(scene: Scene) -> set[str]:
    return {thing.name for thing in scene.shapes()}


def _existence(out: Benchmark) -> _Pair:
    scene = out.scene()
    right = out.one_of(sorted(_names(scene)))
    wrong = out.one_of(sorted(set(ALL_NAMES) - _names(scene)))
    return _pair(scene, "Is there {} in this image?", with_article(right), with_article(wrong))


def _count(out: Benchmark) -> _Pair:
    scene = out.scene()
    kind = out.one_of(sorted({thing.kind for thing in scene.shapes()}))
    right = scene.count(kind)
    wrong = out.one_of([n for n in (right - 1, right + 1) if 1 <= n <= MOST_THINGS])
    texts = [f"{NUMBERS[n]} {plural(kind, n)}" for n in (right, wrong)]
    return _pair(scene, "Is there a total of {} in the picture?", texts[0], texts[1])


def _position(out: Benchmark) -> _Pair:
    scene = out.scene(_apart_in_columns)
    a, b = out.one_of(_apart_in_columns(scene))
    right, wrong = ("left", "right") if a.col < b.col else ("right", "left")
    return _pair(scene, f"Is the {a.name} on the {{}} side of the {b.name}?", right, wrong)


def _apart_in_columns(scene: Scene) -> list[tuple[Thing, Thing]]:
    known = scene.subjects()
    return [(a, b) for a in known for b in known if a.col != b.col]


def _color(out: Benchmark) -> _Pair:
    scene = out.scene()
    thing = out.one_of(scene.shapes())
    of_kind = {other.color for other in scene.things if other.kind == thing.kind}
    wrong = out.one_of([color for color in COLORS if color not in of_kind])
    texts = [with_article(f"{color} {thing.kind}") for color in (thing.color, wrong)]
    return _pair(scene, "Is there {} in the image?", texts[0], texts[1])


def _posters(out: Benchmark) -> _Pair:
    scene = out.scene(lambda scene: scene.subjects())
    thing = out.one_of(scene.subjects())
    wrong = out.one_of(others(thing.place, ALL_PLACES))
    return _pair(scene, f"Does this poster show the {thing.name} at the {{}}?", thing.place, wrong)


def _celebrity(out: Benchmark) -> _Pair:
    scene = out.scene()
    thing = out.one_of(scene.shapes())
    wrong = out.one_of(others(thing.kind, SHAPES))
    return _pair(scene, "Is the shape inside the red bounding box called {}?", thing.kind, wrong, boxed=thing)


def _scene(out: Benchmark) -> _Pair:
    scene = out.scene()
    wrong = out.one_of(others(len(scene.things), range(2, MOST_THINGS + 1)))
    return _pair(scene, "Does this image show a scene of {} things?", NUMBERS[len(scene.things)], NUMBERS[wrong])


def _ocr(out: Benchmark) -> _Pair:
    scene = out.scene(lambda scene: len(scene.digits()) == 1)
    right = scene.digits()[0].digit
    wrong = (right + int(out.rng.integers(1, 10))) % 10
    return _pair(scene, 'Is the digit in the picture "{}"?', right, wrong)


def _commonsense(out: Benchmark) -> _Pair:
    scene = out.scene(lambda scene: _gone_without(scene) and _left_without(scene))
    wording = "If all {} things were taken away, would there still be {}?"
    (kind, color), (gone_kind, gone_color) = out.one_of(_left_without(scene)), out.one_of(_gone_without(scene))
    right, wrong = wording.format(color, with_article(kind)), wording.format(gone_color, with_article(gone_kind))
    return _Pair(scene, right, wrong)


def _left_without(scene: Scene) -> list[tuple[str, str]]:
    """(shape, colour) for which a shape of that kind is left when all things of that colour are gone."""
    kinds = {(thing.kind, thing.color) for thing in scene.shapes()}
    return sorted({(kind, gone) for kind, color in kinds for _, gone in kinds if gone != color})


def _gone_without(scene: Scene) -> list[tuple[str, str]]:
    """(shape, colour) for which there are such shapes, all of that colour."""
    return sorted({(thing.kind, thing.color) for thing in scene.shapes()} - set(_left_without(scene)))


def _calculation(out: Benchmark) -> _Pair:
    scene = out.scene(lambda scene: len(scene.digits()) == 2)
    right = sum(thing.digit for thing in scene.digits())
    wrong = out.one_of([right + by for by in (-2, -1, 1, 2) if right + by >= 0])
    return _pair(scene, "Is the sum of the two digits in the image {}?", right, wrong)


def _translation(out: Benchmark) -> _Pair:
    scene = out.scene()
    name = out.one_of(sorted(_names(scene)))
    wrong = out.one_of(others(name, ALL_NAMES))
    ask = f'Is it appropriate to translate the Chinese "{chinese(name)}" into English "{{}}" in the picture?'
    return _pair(scene, ask, name, wrong)


# Subtask -> its maker, under the official names
SUBTASKS: dict[str, Callable[[Benchmark], _Pair]] = {
    "existence": _existence,
    "count": _count,
    "position": _position,
    "color": _color,
    "posters": _posters,
    "celebrity": _celebrity,
    "scene": _scene,
    "OCR": _ocr,
    "commonsense_reasoning": _commonsense,
    "numerical_calculation": _calculation,
    "text_translation": _translation,
}
APART = ("posters", "celebrity", "scene")  # text and images in folders of their own
TWO_SPACES = ("position", "scene")
