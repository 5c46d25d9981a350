"""POPE and MME: questions to answer with yes or no."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from llava_sp.common.files import write_atomic, write_jsonl
from llava_sp.shapes.benchmarks.choices import ALL_NAMES, ALL_PLACES, chinese
from llava_sp.shapes.benchmarks.common import (
    SPLIT,
    Gallery,
    Settings,
    Written,
    digits,
    generator,
    number_of,
    one_of,
    plural,
    scene_with,
    short_line,
)
from llava_sp.shapes.language import article, subjects
from llava_sp.shapes.world import COLORS, SHAPES, Scene, Thing, draw, sample_scene

POPE_CATEGORIES = ("adversarial", "popular", "random")  # in the order of LLaVA's question file
POPE_PAIRS = 3  # questions with "yes", and as many with "no", on a picture at most
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
YES_NO = "Please answer yes or no."


def write_pope(folder: Path, settings: Settings) -> Written:
    """The three label files, LLaVA's question file over all of them, and the pictures, which the categories share.

    Absent things are taken at random (random), from those that are most often in other pictures (popular), or from
    those most like what is there: same shape or same colour (adversarial).
    """
    rng = generator("pope", settings)
    gallery = Gallery(folder)
    per_category = max(1, settings.questions // (2 * len(POPE_CATEGORIES)))  # pairs
    scenes: list[tuple[str, Scene, list[str]]] = []
    while (missing := per_category - sum(len(present) for _, _, present in scenes)) > 0:
        scene = sample_scene(rng, SPLIT)
        names = sorted({thing.name for thing in scene.things if thing.kind in SHAPES})
        present = [names[i] for i in rng.permutation(len(names))][: min(POPE_PAIRS, missing)]
        image = f"COCO_val2014_{len(scenes) + 1:012d}.jpg"
        gallery.save(f"val2014/{image}", scene)
        scenes.append((image, scene, present))
    popular = Counter(thing.name for _, scene, _ in scenes for thing in scene.things)
    lines = []
    for category in POPE_CATEGORIES:
        labels = []
        for image, scene, present in scenes:
            absent = _absent(scene, category, popular, rng)
            for yes, no in zip(present, absent):
                for name, label in ((yes, "yes"), (no, "no")):
                    text = f"Is there {article(name)} {name} in the image?"
                    labels.append({"question_id": len(labels) + 1, "image": image, "text": text, "label": label})
                    lines.append(short_line(len(lines) + 1, image, text, category))
        write_jsonl(folder / "coco" / f"coco_pope_{category}.json", labels)
    write_jsonl(folder / "llava_pope_test.jsonl", lines)
    return Written(len(lines), gallery.scenes)


def _absent(scene: Scene, category: str, popular: Counter, rng: np.random.Generator) -> list[str]:
    """All names that the scene has not, those first that the category asks for."""
    present = {thing.name for thing in scene.things}
    absent = [ALL_NAMES[i] for i in rng.permutation(len(ALL_NAMES)) if ALL_NAMES[i] not in present]
    if category == "popular":
        absent.sort(key=lambda name: -popular[name])
    if category == "adversarial":
        looks = Counter(word for thing in scene.things for word in (thing.color, thing.kind))
        absent.sort(key=lambda name: -sum(looks[word] for word in name.split()))
    return absent


class _Pair(NamedTuple):
    """What MME asks of one picture: a question whose answer is yes and one whose answer is no."""

    scene: Scene
    yes: str
    no: str
    boxed: Thing | None = None


def write_mme(folder: Path, settings: Settings) -> Written:
    """LLaVA's question file and MME_Benchmark_release_version with two questions on every picture, in both layouts:
    text beside the pictures, or in questions_answers_YN/ and images/.

    As in the official files a few questions have two spaces before "Please answer yes or no.", and only some text files
    end with a newline. Of the subtasks landmark, artwork and code_reasoning are left out: nothing here is like them.
    """
    rng = generator("mme", settings)
    gallery = Gallery(folder)
    root = "MME_Benchmark_release_version"
    lines = []
    for picture in range(max(len(SUBTASKS), settings.questions // 2)):
        subtask = list(SUBTASKS)[picture % len(SUBTASKS)]
        number = picture // len(SUBTASKS) + 1
        pair = SUBTASKS[subtask](rng)
        apart = subtask in APART
        image = f"{subtask}/{'images/' if apart else ''}{number:04d}.jpg"
        text = f"{subtask}/{'questions_answers_YN/' if apart else ''}{number:04d}.txt"
        more = {} if pair.boxed is None else {"boxed": pair.scene.things.index(pair.boxed)}
        gallery.save(f"{root}/{image}", pair.scene, _with_box(pair.scene, pair.boxed), **more)
        asked = [(pair.yes, "Yes"), (pair.no, "No")][:: 1 if rng.random() < 0.5 else -1]
        space = "  " if number == 1 and subtask in TWO_SPACES else " "
        content = "\n".join(f"{question}{space}{YES_NO}\t{answer}" for question, answer in asked)
        write_atomic(folder / root / text, content + ("\n" if number % 2 else ""))
        lines += [short_line(image, image, question, subtask) for question, _ in asked]
    order = sorted(SUBTASKS)
    write_jsonl(folder / "llava_mme.jsonl", sorted(lines, key=lambda line: order.index(line["category"])))
    return Written(len(lines), gallery.scenes)


def _with_box(scene: Scene, boxed: Thing | None) -> Image.Image:
    image = draw(scene)
    if boxed is not None:
        half = boxed.size // 2 + 3
        box = (boxed.x - half, boxed.y - half, boxed.x + half, boxed.y + half)
        ImageDraw.Draw(image).rectangle(box, outline=(255, 0, 0), width=2)
    return image


def _existence(rng: np.random.Generator) -> _Pair:
    scene = sample_scene(rng, SPLIT)
    present = sorted({thing.name for thing in scene.things} & set(ALL_NAMES))
    names = one_of(rng, present), one_of(rng, sorted(set(ALL_NAMES) - set(present)))
    return _Pair(scene, *(f"Is there {article(name)} {name} in this image?" for name in names))


def _count(rng: np.random.Generator) -> _Pair:
    scene = sample_scene(rng, SPLIT)
    kind = one_of(rng, sorted({thing.kind for thing in scene.things} & set(SHAPES)))
    right = number_of(scene, kind)
    wrong = one_of(rng, [n for n in (right - 1, right + 1) if 1 <= n < len(NUMBERS)])
    texts = (f"Is there a total of {NUMBERS[n]} {plural(kind, n)} in the picture?" for n in (right, wrong))
    return _Pair(scene, *texts)


def _position(rng: np.random.Generator) -> _Pair:
    scene = scene_with(rng, _apart_in_columns)
    a, b = one_of(rng, _apart_in_columns(scene))
    sides = ("left", "right") if a.col < b.col else ("right", "left")
    return _Pair(scene, *(f"Is the {a.name} on the {side} side of the {b.name}?" for side in sides))


def _apart_in_columns(scene: Scene) -> list[tuple[Thing, Thing]]:
    known = subjects(scene)
    return [(a, b) for a in known for b in known if a.col != b.col]


def _color(rng: np.random.Generator) -> _Pair:
    scene = sample_scene(rng, SPLIT)
    thing = one_of(rng, [thing for thing in scene.things if thing.kind in SHAPES])
    taken = {other.color for other in scene.things if other.kind == thing.kind}
    wrong = one_of(rng, [color for color in COLORS if color not in taken])
    texts = (f"Is there {article(color)} {color} {thing.kind} in the image?" for color in (thing.color, wrong))
    return _Pair(scene, *texts)


def _posters(rng: np.random.Generator) -> _Pair:
    scene = scene_with(rng, subjects)
    thing = one_of(rng, subjects(scene))
    wrong = one_of(rng, [place for place in ALL_PLACES if place != thing.place])
    return _Pair(scene, *(f"Does this poster show the {thing.name} at the {place}?" for place in (thing.place, wrong)))


def _celebrity(rng: np.random.Generator) -> _Pair:
    scene = sample_scene(rng, SPLIT)
    thing = one_of(rng, [thing for thing in scene.things if thing.kind in SHAPES])
    wrong = one_of(rng, [kind for kind in SHAPES if kind != thing.kind])
    texts = (f"Is the shape inside the red bounding box called {kind}?" for kind in (thing.kind, wrong))
    return _Pair(scene, *texts, boxed=thing)


def _scene(rng: np.random.Generator) -> _Pair:
    scene = sample_scene(rng, SPLIT)
    right = len(scene.things)
    wrong = one_of(rng, [n for n in range(2, len(NUMBERS)) if n != right])
    return _Pair(scene, *(f"Does this image show a scene of {NUMBERS[n]} things?" for n in (right, wrong)))


def _ocr(rng: np.random.Generator) -> _Pair:
    scene = scene_with(rng, lambda scene: len(digits(scene)) == 1)
    right = digits(scene)[0].value
    wrong = (right + int(rng.integers(1, 10))) % 10
    return _Pair(scene, *(f'Is the digit in the picture "{value}"?' for value in (right, wrong)))


def _commonsense(rng: np.random.Generator) -> _Pair:
    scene = scene_with(rng, lambda scene: _gone_without(scene) and _left_without(scene))
    texts = []
    for kind, color in (one_of(rng, _left_without(scene)), one_of(rng, _gone_without(scene))):
        texts.append(f"If all {color} things were taken away, would there still be {article(kind)} {kind}?")
    return _Pair(scene, *texts)


def _left_without(scene: Scene) -> list[tuple[str, str]]:
    """(shape, colour) for which a shape of that kind is left when all things of that colour are gone."""
    colors = {thing.color for thing in scene.things if thing.kind in SHAPES}
    kinds = {(thing.kind, thing.color) for thing in scene.things if thing.kind in SHAPES}
    return sorted({(kind, gone) for kind, color in kinds for gone in colors if gone != color})


def _gone_without(scene: Scene) -> list[tuple[str, str]]:
    """(shape, colour) for which there are such shapes, all of that colour."""
    kinds = {(thing.kind, thing.color) for thing in scene.things if thing.kind in SHAPES}
    return sorted(set(kinds) - set(_left_without(scene)))


def _calculation(rng: np.random.Generator) -> _Pair:
    scene = scene_with(rng, lambda scene: len(digits(scene)) == 2)
    right = sum(thing.value for thing in digits(scene))
    wrong = one_of(rng, [right + by for by in (-2, -1, 1, 2) if right + by >= 0])
    return _Pair(scene, *(f"Is the sum of the two digits in the image {value}?" for value in (right, wrong)))


def _translation(rng: np.random.Generator) -> _Pair:
    scene = sample_scene(rng, SPLIT)
    name = one_of(rng, sorted({thing.name for thing in scene.things} & set(ALL_NAMES)))
    wrong = one_of(rng, [other for other in ALL_NAMES if other != name])
    ask = 'Is it appropriate to translate the Chinese "{}" into English "{}" in the picture?'
    texts = (ask.format(chinese(name), english) for english in (name, wrong))
    return _Pair(scene, *texts)


# Subtask -> its maker, under the official names
SUBTASKS: dict[str, Callable[[np.random.Generator], _Pair]] = {
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
APART = ("posters", "celebrity", "scene")  # text and pictures in folders of their own
TWO_SPACES = ("position", "scene")
