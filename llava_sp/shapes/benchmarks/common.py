"""What the writers of all benchmarks share: settings, pictures and the scenes behind them, and even-handed choosing."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from llava_sp.shapes.language import SUFFIX
from llava_sp.shapes.make import JPEG
from llava_sp.shapes.world import SHAPES, Scene, Thing, draw, sample_scene

VERSION = 1  # of the benchmarks: a change in what a seed gives is a change of this number
SPLIT = "val"  # every scored picture is a held-out scene with unseen handwriting
LETTER_ANSWER = "\nAnswer with the option's letter from the given choices directly."
LETTERS = "ABCDE"
SIDES = {
    "above": (-1, 0),
    "below": (1, 0),
    "to the left of": (0, -1),
    "to the right of": (0, 1),
}  # row and column steps

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """How much to write: about `questions` of each benchmark (the exact numbers stand in `world.json`)."""

    seed: int = 0
    questions: int = 60
    version: int = VERSION


@dataclass(frozen=True)
class Written:
    """What a writer wrote: the number of its questions, and per picture (a path in its folder) the scene in it."""

    questions: int
    scenes: dict[str, dict[str, Any]]


@dataclass
class Gallery:
    """The pictures of one benchmark: saves them and remembers what each of them shows."""

    folder: Path
    scenes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def save(
        self, name: str, scene: Scene, image: Image.Image | None = None, *, format: str | None = None, **more: Any
    ) -> str:
        """Draws `scene` (or takes `image`, something made of it) into the file `name`; `more` is remembered beside the
        scene. `format` where the name has no suffix that tells it."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = draw(scene) if image is None else image
        jpeg = format == "JPEG" or path.suffix == ".jpg"
        picture.save(path, format=format, **(JPEG if jpeg else {}))
        self.remember(name, scene, **more)
        return name

    def remember(self, name: str, scene: Scene, **more: Any) -> None:
        """What the picture `name` shows, where something else has drawn it."""
        self.scenes[name] = asdict(scene) | more


def generator(name: str, settings: Settings) -> np.random.Generator:
    """The benchmark's own stream of random numbers, so that writing one alone gives the bytes of writing all."""
    return np.random.default_rng([settings.seed, zlib.crc32(name.encode())])


class EvenHanded:
    """Picks what was picked least so far, so that no answer and no kind of question is the common one."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.picked: Counter = Counter()

    def order(self, found: Iterable[T], key: Callable[[T], Any] = lambda one: one) -> list[T]:
        """All of `found`, the least picked first, equals in random order."""
        found = list(found)
        return sorted((found[i] for i in self.rng.permutation(len(found))), key=lambda one: self.picked[key(one)])

    def pick(self, found: Iterable[T], key: Callable[[T], Any] = lambda one: one) -> T | None:
        """The first in that order, counted as picked; None where there is none."""
        best = next(iter(self.order(found, key)), None)
        if best is not None:
            self.picked[key(best)] += 1
        return best


def scene_with(rng: np.random.Generator, wanted: Callable[[Scene], Any]) -> Scene:
    """A held-out scene for which `wanted` is true (or finds something)."""
    while not wanted(scene := sample_scene(rng, SPLIT)):
        pass
    return scene


def one_of(rng: np.random.Generator, found: Sequence[T]) -> T:
    return found[rng.integers(len(found))]


def digits(scene: Scene) -> list[Thing]:
    """The handwritten digits, in reading order."""
    return [thing for thing in scene.things if thing.kind == "digit"]


def number_of(scene: Scene, kind: str) -> int:
    """How many things of the kind there are."""
    return sum(thing.kind == kind for thing in scene.things)


def alone(scene: Scene) -> list[Thing]:
    """The shapes that are the only ones of their kind: "the circle"."""
    return [thing for thing in scene.things if thing.kind in SHAPES and number_of(scene, thing.kind) == 1]


def neighbours(scene: Scene, of: Thing) -> dict[str, Thing]:
    """What stands in the cells that touch the thing's own: side ("above" ...) -> thing."""
    cells = {(thing.row, thing.col): thing for thing in scene.things}
    places = {side: (of.row + down, of.col + right) for side, (down, right) in SIDES.items()}
    return {side: cells[place] for side, place in places.items() if place in cells}


def plural(noun: str, count: int) -> str:
    return noun if count == 1 else f"{noun}s"


def llava_line(question_id: int | str, image: str, text: str, category: str = "default") -> dict[str, Any]:
    """A line of LLaVA's question files."""
    return {"question_id": question_id, "image": image, "text": text, "category": category}


def short_line(question_id: int | str, image: str, question: str, category: str = "default") -> dict[str, Any]:
    """A line that asks for a single word or phrase."""
    return llava_line(question_id, image, question + SUFFIX, category)


def lettered(options: Sequence[str]) -> str:
    """The options as LLaVA lists them, "A. red", one per line."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options))
