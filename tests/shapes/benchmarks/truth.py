"""A second opinion: `Truth` answers the questions from the scene file alone, with none of the writers' code."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path

from llava_sp.shapes.world import PLACES, Scene, Thing

LETTERS = "ABCDE"
SHORT = "\nAnswer the question using a single word or phrase."
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_table(path: Path, delimiter: str) -> list[dict]:
    csv.field_size_limit(2**31 - 1 if sys.maxsize > 2**31 else 2**30)
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter=delimiter))


def as_scene(graph: dict) -> Scene:
    return Scene(tuple(Thing(**thing) for thing in graph["things"]), tuple(graph["background"]))


def place_of(thing: dict) -> str:
    return PLACES[thing["row"]][thing["col"]]


def name_of(thing: dict) -> str:
    return "digit" if thing["kind"] == "digit" else f"{thing['color']} {thing['kind']}"


def label_of(thing: dict) -> str:
    return f"digit {thing['value']}" if thing["kind"] == "digit" else name_of(thing)


class Truth:
    """Answers questions about one scene of the scene file."""

    def __init__(self, graph: dict) -> None:
        self.graph, self.things = graph, graph["things"]

    def called(self, words: str) -> list[dict]:
        """The things that "circle", "red circle", "red circles" or "digit" can mean."""
        words = words.removesuffix("s")
        return [t for t in self.things if words in (t["kind"], name_of(t))]

    def only(self, words: str) -> dict:
        (thing,) = self.called(words)
        return thing

    def at(self, place: str) -> dict:
        (thing,) = [thing for thing in self.things if place_of(thing) == place]
        return thing

    def is_(self, a: str, relation: str, b: str) -> bool:
        first, second = self.only(a), self.only(b)
        return {
            "to the left of": first["col"] < second["col"],
            "to the right of": first["col"] > second["col"],
            "above": first["row"] < second["row"],
            "below": first["row"] > second["row"],
        }[relation]

    def values(self) -> list[int]:
        return [thing["value"] for thing in self.things if thing["kind"] == "digit"]

    def without(self, kind: str) -> list[dict]:
        return [thing for thing in self.things if thing not in self.called(kind)]

    def shows(self, description: str) -> bool:
        """Whether a caption names everything that is there, where it is, and nothing else."""
        named = re.findall(
            r"(?:an?|the) ([\w ]+?) at the ((?:top|bottom)? ?(?:left|right)?|center|top|bottom)(?=[,.]| and|$)",
            description,
        )
        return sorted(named) == sorted((label_of(thing), place_of(thing)) for thing in self.things)

    def answer(self, question: str) -> str:
        for pattern, method in ANSWERS:
            if match := re.fullmatch(pattern, question):
                found = method(self, *match.groups())
                return {True: "yes", False: "no"}.get(found, found) if isinstance(found, bool) else str(found)
        raise AssertionError(f"no pattern fits this question: {question}")


def color(truth: Truth, kind: str) -> str:
    return truth.only(kind)["color"] if truth.called(kind) else "unanswerable"


def place(truth: Truth, name: str) -> str:
    return place_of(truth.only(name)) if truth.called(name) else "unanswerable"


def count(truth: Truth, what: str) -> int:
    return sum(thing["color"] == what.removesuffix(" shapes") for thing in truth.things) or len(truth.called(what))


def side(truth: Truth, a: str, b: str) -> str:
    (relation,) = [r for r in ("to the left of", "to the right of", "above", "below") if truth.is_(a, r, b)]
    return f"{relation} it"


def neighbour(truth: Truth, relation: str, name: str) -> str:
    step = {"above": (-1, 0), "below": (1, 0), "to the left of": (0, -1), "to the right of": (0, 1)}[relation]
    thing = truth.only(name)
    return label_of(truth.at(PLACES[thing["row"] + step[0]][thing["col"] + step[1]]))


def more(truth: Truth, a: str, b: str) -> str:
    difference = len(truth.called(a)) - len(truth.called(b))
    return "as many of both" if not difference else f"more {a if difference > 0 else b}"


def left_without_color(truth: Truth, gone: str, kind: str) -> bool:
    return any(thing["kind"] == kind and thing["color"] != gone for thing in truth.things)


def translated(truth: Truth, words: str, english: str) -> bool:
    return words == in_chinese(english)


THING = r"((?:\w+ )?(?:circle|square|triangle|star|digit))"
SIDE = "(to the left of|to the right of|above|below)"
ANSWERS = [
    (rf"Is there an? {THING} in (?:the|this) image\?", lambda t, name: bool(t.called(name))),
    (r"What color is the (\w+)(?: in this picture)?\?", color),
    (rf"Where is the {THING}\?", place),
    (r"How many (\w+|\w+ shapes) are there\?", count),
    (r"How many things are there in the image\?", lambda t: len(t.things)),
    (rf"Is the {THING} {SIDE} the {THING}\?", lambda t, a, relation, b: t.is_(a, relation, b)),
    (r"What digit is in the image\?", lambda t: t.values()[0] if len(t.values()) == 1 else "unclear"),
    (r"What digit is at the ([\w ]+)\?", lambda t, where: t.at(where)["value"]),
    (r"What is at the ([\w ]+)\?", lambda t, where: label_of(t.at(where))),
    (r"What shape is at the ([\w ]+)\?", lambda t, where: t.at(where)["kind"]),
    (rf"Where is the {THING}, seen from the {THING}\?", side),
    (rf"What is directly {SIDE} the {THING}\?", neighbour),
    (r"Are there more (\w+) or more (\w+)\?", more),
    (r"How many things would be left without the (\w+)\?", lambda t, kind: len(t.without(kind))),
    (r"What is the sum of the two digits\?", lambda t: sum(t.values()) if len(t.values()) == 2 else "unclear"),
    (
        r"How many corners does the shape at the ([\w ]+) have\?",
        lambda t, where: {"circle": 0, "triangle": 3, "square": 4}[t.at(where)["kind"]],
    ),
    # GQA
    (r"Which kind of shape is (\w+)\?", lambda t, c: "".join(o["kind"] for o in t.things if o["color"] == c)),
    (
        rf"Is the {THING} to the left or to the right of the {THING}\?",
        lambda t, a, b: "left" if t.is_(a, "to the left of", b) else "right",
    ),
    (
        r"Are the (\w+) and the (\w+) the same color\?",
        lambda t, a, b: t.only(a)["color"] == t.only(b)["color"],
    ),
    (r"Are there either (\w+ \w+) or (\w+ \w+) in the image\?", lambda t, a, b: bool(t.called(a) or t.called(b))),
    (r"Are there both (\w+ \w+) and (\w+ \w+) in the image\?", lambda t, a, b: bool(t.called(a) and t.called(b))),
    # MME
    (r"Is there a total of (\w+) (\w+) in the picture\?", lambda t, n, what: len(t.called(what)) == NUMBERS.index(n)),
    (rf"Is the {THING} on the (left|right) side of the {THING}\?", lambda t, a, s, b: t.is_(a, f"to the {s} of", b)),
    (rf"Does this poster show the {THING} at the ([\w ]+)\?", lambda t, a, where: place_of(t.only(a)) == where),
    (
        r"Is the shape inside the red bounding box called (\w+)\?",
        lambda t, kind: t.things[t.graph["boxed"]]["kind"] == kind,
    ),
    (r"Does this image show a scene of (\w+) things\?", lambda t, n: len(t.things) == NUMBERS.index(n)),
    (r'Is the digit in the picture "(\d)"\?', lambda t, value: t.values() == [int(value)]),
    (r"If all (\w+) things were taken away, would there still be an? (\w+)\?", left_without_color),
    (
        r"Is the sum of the two digits in the image (\d+)\?",
        lambda t, n: len(t.values()) == 2 and sum(t.values()) == int(n),
    ),
    (
        r'Is it appropriate to translate the Chinese "(.+)" into English "(.+)" in the picture\?',
        translated,
    ),
]
CHINESE = {
    "red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "purple": "紫色", "orange": "橙色",
    "circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "星形", "digit": "数字", "yes": "是", "no": "否",
    "top left": "左上角", "top": "上边", "top right": "右上角", "left": "左边", "center": "中间", "right": "右边",
    "bottom left": "左下角", "bottom": "下边", "bottom right": "右下角", "as many of both": "一样多",
    "above it": "上方", "below it": "下方", "to the left of it": "左方", "to the right of it": "右方",
}  # fmt: skip


def in_chinese(english: str) -> str:
    if english in CHINESE or english.isdigit():
        return CHINESE.get(english, english)
    if english.startswith("more "):
        return CHINESE[english.removeprefix("more ").removesuffix("s")] + "更多"
    if english.endswith("."):
        phrases = re.findall(r"(?:an?|the) (\w+) (\w+) at the ([a-z ]+?)(?=, | and |\.)", english)
        return "，".join(f"{CHINESE[p]}有{CHINESE[a]}{CHINESE.get(b, b)}" for a, b, p in phrases) + "。"
    first, second = english.split()
    return CHINESE[first] + CHINESE.get(second, second)


def right_options(truth: Truth, question: str, options: list[str]) -> list[int]:
    """The positions of all options that are right: there must be exactly one."""
    if question == "What does the image show?":
        return [i for i, option in enumerate(options) if truth.shows(option)]
    return [i for i, option in enumerate(options) if option.lower() == truth.answer(question)]
