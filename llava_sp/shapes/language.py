"""Captions, questions and answers about a scene of the shapes world, all derived from its graph.

`Interviewer` picks questions so that no wording gives its answer away: per wording it asks for the answer that was asked
for least. A model that reads only the text can do no better than the most frequent answer of a question type.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from llava_sp.shapes.world import COLORS, PLACES, SHAPES, Scene, Thing

SUFFIX = "\nAnswer the question using a single word or phrase."
CAPTION_REQUESTS = (
    "Describe the image.",
    "What do you see in the image?",
    "Give a caption of the image.",
    "What is shown here?",
    "Say what stands where.",
)
MAX_COUNT = 4

# question family -> (VQAv2 question_type, answer_type)
FAMILIES = {
    "existence": ("is there a", "yes/no"),
    "color": ("what color is the", "other"),
    "count": ("how many", "number"),
    "relation": ("is the", "yes/no"),
    "place": ("where is the", "other"),
    "digit": ("what digit is", "number"),
}


@dataclass(frozen=True)
class Question:
    """One question about a scene: `family` is a key of `FAMILIES`, `answer` the one right answer."""

    family: str
    text: str
    answer: str


def caption(scene: Scene) -> str:
    """Everything in the scene, in reading order: "a red circle at the top left, the digit 7 at the center and ...\""""
    parts = [f"{phrase(thing)} at the {thing.place}" for thing in scene.things]
    return f"{', '.join(parts[:-1])} and {parts[-1]}." if len(parts) > 1 else f"{parts[0]}."


def phrase(thing: Thing) -> str:
    """A thing in words: "a red circle" or "the digit 7"."""
    return f"the {thing.label}" if thing.kind == "digit" else with_article(thing.label)


def description(scene: Scene, rng: np.random.Generator) -> str:
    """The scene in words, in one of four styles: what a text-only conversation is about."""
    things = [scene.things[i] for i in rng.permutation(len(scene.things))]
    style = rng.integers(4)
    if style == 0:
        return caption(scene)
    if style == 1:
        return " ".join(f"{thing.place}: {thing.label}." for thing in things)
    if style == 2:
        return " ".join(f"{thing.label} {thing.place}" for thing in things for _ in range(2))
    return f"{', '.join(f'{thing.label} {thing.place}' for thing in things)}."


def with_article(noun: str) -> str:
    """ "a red circle" or "an orange circle", by the first letter."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str, count: int) -> str:
    return noun if count == 1 else f"{noun}s"


def questions(scene: Scene, family: str) -> list[Question]:
    """Every question of the family that has one right answer in this scene. Raises `ValueError` for another family."""
    asked = {
        "existence": _existence,
        "color": _color,
        "count": _count,
        "relation": _relation,
        "place": _place,
        "digit": _digit,
    }
    if family not in asked:
        raise ValueError(f"family: {family!r} is not known; use one of {', '.join(FAMILIES)}")
    return [Question(family, text, answer) for text, answer in asked[family](scene)]


def _existence(scene: Scene) -> list[tuple[str, str]]:
    present = {thing.name for thing in scene.things}
    names = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
    return [(f"Is there {with_article(n)} in the image?", "yes" if n in present else "no") for n in names]


def _color(scene: Scene) -> list[tuple[str, str]]:
    return [(f"What color is the {t.kind}?", t.color) for t in scene.alone()]


def _count(scene: Scene) -> list[tuple[str, str]]:
    colors = Counter(thing.color for thing in scene.things)
    numbers = [(f"{shape}s", scene.count(shape)) for shape in SHAPES]
    numbers += [(f"{color} shapes", colors[color]) for color in COLORS]
    return [(f"How many {what} are there?", str(n)) for what, n in numbers if n <= MAX_COUNT]


def _relation(scene: Scene) -> list[tuple[str, str]]:
    found = []
    for a in scene.subjects():
        for b in scene.subjects():
            if a.col != b.col:
                for side, is_so in (("to the left of", a.col < b.col), ("to the right of", a.col > b.col)):
                    found.append((f"Is the {a.name} {side} the {b.name}?", "yes" if is_so else "no"))
            if a.row != b.row:
                for side, is_so in (("above", a.row < b.row), ("below", a.row > b.row)):
                    found.append((f"Is the {a.name} {side} the {b.name}?", "yes" if is_so else "no"))
    return found


def _place(scene: Scene) -> list[tuple[str, str]]:
    return [(f"Where is the {thing.name}?", thing.place) for thing in scene.subjects()]


def _digit(scene: Scene) -> list[tuple[str, str]]:
    written = scene.digits()
    if len(written) == 1:
        return [("What digit is in the image?", str(written[0].value))]
    return [(f"What digit is at the {thing.place}?", str(thing.value)) for thing in written]


class Interviewer:
    """Asks about scenes, and keeps the answers to each wording balanced.

    The wording of a relation is counted without its second thing: by symmetry "Is the red circle above ..." is then true
    as often as false.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.asked: Counter[tuple[str, str]] = Counter()

    def ask(self, scene: Scene, family: str) -> Question | None:
        """One question of the family, the least asked for (wording, answer) first; None where the scene allows none."""
        found = questions(scene, family)
        if not found:
            return None
        order = self.rng.permutation(len(found))
        best = min((found[i] for i in order), key=lambda q: self.asked[self._wording(q), q.answer])
        self.asked[self._wording(best), best.answer] += 1
        return best

    def interview(self, scene: Scene, count: int) -> list[Question]:
        """`count` different questions at most, over as many families as the scene allows, in random order."""
        found: dict[str, Question] = {}
        families = list(FAMILIES)
        for round_ in range(2 * len(families)):
            if round_ % len(families) == 0:
                self.rng.shuffle(families)
            if len(found) == count:
                break
            question = self.ask(scene, families[round_ % len(families)])
            if question is not None:
                found.setdefault(question.text, question)
        return list(found.values())

    @staticmethod
    def _wording(question: Question) -> str:
        if question.family != "relation":
            return question.text
        return question.text.rsplit(" the ", 1)[0]


def all_words() -> list[str]:
    """Every place, colour and shape of the world, for vocabularies and tests."""
    return [*COLORS, *SHAPES, *(place for row in PLACES for place in row)]
