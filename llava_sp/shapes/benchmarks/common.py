"""What the writers of all benchmarks share: settings, a benchmark's folder, and even-handed choosing."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from llava_sp.common.files import write_json, write_jsonl
from llava_sp.shapes.images import Images
from llava_sp.shapes.language import SUFFIX
from llava_sp.shapes.world import COLORS, PLACES, SHAPES, Scene, sample_scene

VERSION = 1  # of the benchmarks: a change in what a seed gives is a change of this number
LETTER_ANSWER = "\nAnswer with the option's letter from the given choices directly."
LETTERS = "ABCDE"
ALL_PLACES = sum(PLACES, ())
ALL_NAMES = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)
ALL_LABELS = (*ALL_NAMES, *(f"digit {value}" for value in range(10)))
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """How much to write: about `questions` of each benchmark (the exact numbers are in `world.json`)."""

    seed: int = 0
    questions: int = 60
    version: int = VERSION


@dataclass(frozen=True)
class Written:
    """What a writer wrote: the number of its questions, and per image (a path in its folder) the scene in it."""

    questions: int
    scenes: dict[str, dict[str, Any]]


class Benchmark(Images):
    """The folder of one benchmark, with random numbers of its own: written alone it has the bytes of writing all."""

    def __init__(self, name: str, folder: Path, settings: Settings) -> None:
        super().__init__(folder)
        self.rng = np.random.default_rng([settings.seed, zlib.crc32(name.encode())])

    def scene(self, fits: Callable[[Scene], Any] = lambda scene: True) -> Scene:
        """A held-out scene for which `fits` is true (or finds something)."""
        while not fits(scene := sample_scene(self.rng, "val")):
            pass
        return scene

    def one_of(self, found: Sequence[T]) -> T:
        return one_of(self.rng, found)

    def json(self, name: str, value: Any) -> None:
        write_json(self.folder / name, value)

    def jsonl(self, name: str, lines: Iterable[dict[str, Any]]) -> None:
        write_jsonl(self.folder / name, lines)

    def written(self, questions: int) -> Written:
        return Written(questions, self.scenes)


class EvenHanded:
    """Picks what was picked least so far, so that no answer and no kind of question is the common one."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.picked: Counter = Counter()

    def order(self, found: Iterable[T], key: Callable[[T], Any] = lambda one: one) -> list[T]:
        """All of `found`, the least picked first, equals in random order."""
        return sorted(shuffled(self.rng, list(found)), key=lambda one: self.picked[key(one)])

    def pick(self, found: Iterable[T], key: Callable[[T], Any] = lambda one: one) -> T:
        """The first in that order, counted as picked; there must be one."""
        best = self.order(found, key)[0]
        self.picked[key(best)] += 1
        return best


def one_of(rng: np.random.Generator, found: Sequence[T]) -> T:
    return found[int(rng.integers(len(found)))]


def shuffled(rng: np.random.Generator, found: Sequence[T]) -> list[T]:
    return [found[i] for i in rng.permutation(len(found))]


def draw_options(rng: np.random.Generator, answer: str, wrong: Sequence[str], most: int) -> list[str]:
    """The answer and wrong options, `most` in all at most, in random order."""
    return shuffled(rng, [answer, *shuffled(rng, wrong)[: most - 1]])


def others(answer: T, domain: Iterable[T]) -> list[T]:
    """The wrong answers."""
    return [one for one in domain if one != answer]


def llava_line(question_id: int | str, image: str, text: str, category: str = "default") -> dict[str, Any]:
    """A line of LLaVA's question files."""
    return {"question_id": question_id, "image": image, "text": text, "category": category}


def short_line(question_id: int | str, image: str, question: str, category: str = "default") -> dict[str, Any]:
    """A line that asks for a single word or phrase."""
    return llava_line(question_id, image, question + SUFFIX, category)


def lettered(options: Sequence[str]) -> str:
    """The options as LLaVA lists them, "A. red", one per line."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options))
