"""The shapes world: small scenes of coloured shapes and real handwritten digits, a function of a seed.

A `Scene` is a graph (things and positions); `draw` turns it into a 96 x 96 image, `llava_sp/shapes/language.py` into
captions, questions and answers, so that every answer can be derived again from the graph.

Held out twice over: a scene belongs to the `train` or the `val` split by the hash of what it shows, so no scene of one
split can ever be drawn in the other, and the two splits take their digits from different handwritten instances
(scikit-learn's bundled 1,797 digits of 8 x 8 pixels).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import numpy as np
from PIL import Image, ImageDraw

SIZE = 96  # pixels a side
GRID = 3  # a scene is a 3 x 3 board; one object per cell at most
CELL = SIZE // GRID
SHAPES = ("circle", "square", "triangle", "star")
COLORS = {
    "red": (225, 45, 45),
    "green": (50, 190, 70),
    "blue": (60, 95, 240),
    "yellow": (245, 220, 50),
    "purple": (170, 70, 215),
    "orange": (250, 140, 30),
}
PLACES = (("top left", "top", "top right"), ("left", "center", "right"), ("bottom left", "bottom", "bottom right"))
SPLITS = ("train", "val")
SIDES = {
    "above": (-1, 0),
    "below": (1, 0),
    "to the left of": (0, -1),
    "to the right of": (0, 1),
}  # row and column steps
HELD_OUT = 8  # one scene in eight, and one digit instance in eight, is held out


@dataclass(frozen=True)
class Thing:
    """One object: `kind` is a shape or "digit"; `row`, `col` its cell; `x`, `y` its centre and `size` its side in pixels."""

    kind: str
    color: str
    row: int
    col: int
    x: int
    y: int
    size: int
    value: int | None = None
    instance: int | None = None

    @property
    def place(self) -> str:
        """Its position, in words: "top left", ..., "center", ..., "bottom right"."""
        return PLACES[self.row][self.col]

    @property
    def name(self) -> str:
        """How questions name it: "red circle" or "digit"."""
        return "digit" if self.kind == "digit" else f"{self.color} {self.kind}"

    @property
    def label(self) -> str:
        """What it is in full: "red circle" or "digit 7"."""
        return f"digit {self.value}" if self.kind == "digit" else self.name

    @property
    def digit(self) -> int:
        """The value of a handwritten digit."""
        assert self.value is not None, f"a {self.kind} has no value"
        return self.value

    @property
    def cell(self) -> tuple[int, int]:
        return self.row, self.col

    def moved(self, down: int, right: int) -> Thing:
        """The same thing so many cells further."""
        x, y = self.x + CELL * right, self.y + CELL * down
        return replace(self, row=self.row + down, col=self.col + right, x=x, y=y)


@dataclass(frozen=True)
class Scene:
    """What an image shows: its things in reading order and the background colour (red, green, blue; 0 to 255)."""

    things: tuple[Thing, ...]
    background: tuple[int, int, int]

    def signature(self) -> str:
        """What a reader would see, without jitter, sizes or handwriting: two scenes with one signature are the same scene."""
        return ";".join(f"{t.kind},{t.color},{t.value},{t.row},{t.col}" for t in self.things)

    def digits(self) -> list[Thing]:
        """The handwritten digits, in reading order."""
        return [thing for thing in self.things if thing.kind == "digit"]

    def shapes(self) -> list[Thing]:
        return [thing for thing in self.things if thing.kind in SHAPES]

    def count(self, kind: str) -> int:
        """How many things of the kind there are."""
        return sum(thing.kind == kind for thing in self.things)

    def alone(self) -> list[Thing]:
        """The shapes that are the only ones of their kind: "the circle"."""
        return [thing for thing in self.shapes() if self.count(thing.kind) == 1]

    def subjects(self) -> list[Thing]:
        """The things with a name of their own: only these may be called "the red circle"."""
        names = Counter(thing.name for thing in self.things)
        return [thing for thing in self.things if names[thing.name] == 1]

    def neighbours(self, of: Thing) -> dict[str, Thing]:
        """The things in the cells that touch the thing's own: side ("above" ...) -> thing."""
        cells = {thing.cell: thing for thing in self.things}
        places = {side: (of.row + down, of.col + right) for side, (down, right) in SIDES.items()}
        return {side: cells[place] for side, place in places.items() if place in cells}

    def free_cells(self) -> list[tuple[int, int]]:
        """(row, column) of the empty cells, in reading order."""
        occupied = {thing.cell for thing in self.things}
        return [(row, col) for row in range(GRID) for col in range(GRID) if (row, col) not in occupied]

    def exchange(self, old: Thing, *new: Thing) -> Scene:
        """The scene with one thing exchanged, or removed."""
        index = next(i for i, thing in enumerate(self.things) if thing is old)
        return replace(self, things=(*self.things[:index], *new, *self.things[index + 1 :]))


def split_of(key: str) -> str:
    """The split of a scene or digit, by the hash of its name: the same on every machine and for every seed."""
    return "val" if hashlib.sha256(key.encode()).digest()[0] % HELD_OUT == 0 else "train"


@cache
def digit_bank() -> tuple[np.ndarray, np.ndarray]:
    """Scikit-learn's handwritten digits: images [1797, 8, 8] uint8 (0 to 255, ink is bright) and their values [1797]."""
    from sklearn.datasets import load_digits

    bank = load_digits()
    return np.round(bank.images * (255 / 16)).astype(np.uint8), bank.target.astype(int)


@cache
def digit_instances(split: str) -> dict[int, tuple[int, ...]]:
    """Digit value -> the instances in the bank that scenes of this split may show. Raises `ValueError` for another split."""
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} is not known; use one of {', '.join(SPLITS)}")
    _, values = digit_bank()
    of_split = [i for i in range(len(values)) if split_of(f"digit {i}") == split]
    return {value: tuple(i for i in of_split if values[i] == value) for value in range(10)}


def sample_scene(rng: np.random.Generator, split: str) -> Scene:
    """A scene of the split: two to six things, at most two of them digits. Draws again until the hash is of that split."""
    instances = digit_instances(split)
    while True:
        scene = _sample_any_scene(rng, instances)
        if split_of(scene.signature()) == split:
            return scene


def _sample_any_scene(rng: np.random.Generator, instances: dict[int, tuple[int, ...]]) -> Scene:
    """A scene of either split. Half of the scenes repeat one shape or one colour, so that counts vary."""
    count = int(rng.integers(2, 7))
    digits = min(int(rng.choice(3, p=(0.25, 0.6, 0.15))), count - 1)
    colors = list(COLORS)
    theme = rng.choice(("shape", "color", "none"), p=(0.3, 0.3, 0.4))
    theme_shape, theme_color = SHAPES[rng.integers(len(SHAPES))], colors[rng.integers(len(colors))]
    cells = sorted(int(c) for c in rng.permutation(GRID * GRID)[:count])
    is_digit = rng.permutation(count) < digits
    things = []
    for cell, written in zip(cells, is_digit):
        row, col = divmod(cell, GRID)
        jitter_x, jitter_y = (int(j) for j in rng.integers(-3, 4, size=2))
        place = {"row": row, "col": col, "x": CELL * col + CELL // 2 + jitter_x, "y": CELL * row + CELL // 2 + jitter_y}
        size = int(rng.integers(20, 27))
        if written:
            value = int(rng.integers(10))
            instance = int(rng.choice(instances[value]))
            things.append(Thing("digit", "white", **place, size=size, value=value, instance=instance))
            continue
        follow = rng.random() < 0.7
        kind = theme_shape if theme == "shape" and follow else SHAPES[rng.integers(len(SHAPES))]
        color = theme_color if theme == "color" and follow else colors[rng.integers(len(colors))]
        things.append(Thing(kind, color, **place, size=size))
    red, green, blue = (int(v) for v in rng.integers(15, 65, size=3))
    return Scene(tuple(things), (red, green, blue))


@lru_cache(maxsize=4096)
def _mask(kind: str, size: int, instance: int | None) -> Image.Image:
    """The ink of one thing, an "L" image of `size` x `size`: smooth edges by drawing four times larger."""
    if kind == "digit":
        return Image.fromarray(digit_bank()[0][instance]).resize((size, size), Image.Resampling.BICUBIC)
    big = 4 * size
    mask = Image.new("L", (big, big))
    pen = ImageDraw.Draw(mask)
    if kind == "circle":
        pen.ellipse((0, 0, big - 1, big - 1), fill=255)
    elif kind == "square":
        margin = big // 16
        pen.rectangle((margin, margin, big - 1 - margin, big - 1 - margin), fill=255)
    elif kind == "triangle":
        pen.polygon(((big / 2, 0), (big - 1, big - 1), (0, big - 1)), fill=255)
    elif kind == "star":
        radii = (0.54 * big, 0.22 * big)
        angles = [np.pi * i / 5 - np.pi / 2 for i in range(10)]
        points = [
            (big / 2 + radii[i % 2] * np.cos(a), 0.53 * big + radii[i % 2] * np.sin(a)) for i, a in enumerate(angles)
        ]
        pen.polygon([(float(x), float(y)) for x, y in points], fill=255)
    else:
        raise ValueError(f"kind: {kind!r} is not a shape; use one of {', '.join(SHAPES)} or 'digit'")
    return mask.resize((size, size), Image.Resampling.BOX)


def draw(scene: Scene) -> Image.Image:
    """The scene as an RGB image of 96 x 96 pixels."""
    image = Image.new("RGB", (SIZE, SIZE), scene.background)
    for thing in scene.things:
        color = (255, 255, 255) if thing.kind == "digit" else COLORS[thing.color]
        corner = (thing.x - thing.size // 2, thing.y - thing.size // 2)
        image.paste(color, corner, _mask(thing.kind, thing.size, thing.instance))
    return image
