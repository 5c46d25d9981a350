"""Multiple-choice questions about a scene, in English and in Chinese: one right option, the others wrong in this scene."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np

from llava_sp.shapes.benchmarks.common import ALL_LABELS, ALL_NAMES, ALL_PLACES, draw_options, one_of, others
from llava_sp.shapes.language import caption, plural, with_article
from llava_sp.shapes.world import COLORS, PLACES, SHAPES, SIDES, Scene, Thing

# kind of question -> its wording in English and in Chinese
WORDINGS = {
    "existence": ("Is there {a} in the image?", "图中有{a}吗？"),
    "color": ("What color is the {a}?", "{a}是什么颜色？"),
    "count": ("How many {a} are there?", "图中有多少个{a}？"),
    "place": ("Where is the {a}?", "{a}在哪里？"),
    "identity": ("What is at the {a}?", "{a}是什么？"),
    "digit": ("What digit is at the {a}?", "{a}的数字是多少？"),
    "side": ("Where is the {a}, seen from the {b}?", "{a}在{b}的哪一边？"),
    "neighbour": ("What is directly {b} the {a}?", "{a}的正{b}是什么？"),
    "more": ("Are there more {a} or more {b}?", "{a}多还是{b}多？"),
    "left over": ("How many things would be left without the {a}?", "去掉{a}以后还剩几个东西？"),
    "sum": ("What is the sum of the two digits?", "两个数字的和是多少？"),
    "corners": ("How many corners does the shape at the {a} have?", "{a}的图形有几个角？"),
    "caption": ("What does the image show?", "这张图里有什么？"),
}
CORNERS = {"circle": 0, "triangle": 3, "square": 4}  # of a star people count five points or ten corners: not asked
CHINESE = {
    **dict(zip(COLORS, ("红色", "绿色", "蓝色", "黄色", "紫色", "橙色"))),
    **dict(zip(SHAPES, ("圆形", "正方形", "三角形", "星形"))),
    "digit": "数字",
    "yes": "是",
    "no": "否",
    **dict(zip(sum(PLACES, ()), ("左上角", "上边", "右上角", "左边", "中间", "右边", "左下角", "下边", "右下角"))),
    **dict(zip(SIDES, ("上方", "下方", "左方", "右方"))),
    "as many of both": "一样多",
}


@dataclass(frozen=True)
class Choice:
    """A question with its options, of which the one at position `answer` is right; `texts` and `options` hold the
    English and then the Chinese ones."""

    kind: str
    texts: tuple[str, str]
    options: tuple[tuple[str, ...], tuple[str, ...]]
    answer: int

    @property
    def right(self) -> str:
        """The right option, in English."""
        return self.options[0][self.answer]


@dataclass(frozen=True)
class _Candidate:
    """A question before its options are drawn: what fills the wording, the right answer, and wrong ones to draw from."""

    answer: str
    wrong: list[str]
    a: str = ""
    b: str = ""


def choices(scene: Scene, kind: str, rng: np.random.Generator, most: int = 4) -> Choice | None:
    """A question of the kind with `most` options at most, in random order; None where the scene allows none.

    Answers are drawn first and questions after, so that "Is there ...?" is as often true as false. Raises `ValueError`
    for an unknown kind.
    """
    if kind not in WORDINGS:
        raise ValueError(f"kind: {kind!r} is not a kind of question; use one of {', '.join(WORDINGS)}")
    found = _CANDIDATES[kind](scene)
    if not found:
        return None
    answer = one_of(rng, sorted({candidate.answer for candidate in found}))
    asked = one_of(rng, [candidate for candidate in found if candidate.answer == answer])
    options = draw_options(rng, answer, asked.wrong, most)
    english, chinese_ = WORDINGS[kind]
    a = with_article(asked.a) if kind == "existence" else asked.a
    texts = (english.format(a=a, b=asked.b), chinese_.format(a=chinese(asked.a), b=chinese(asked.b)))
    return Choice(kind, texts, (tuple(options), tuple(chinese(o) for o in options)), options.index(answer))


def chinese(text: str) -> str:
    """A place, a thing, a colour, a number or a whole caption in Chinese. Raises `ValueError` for another text."""
    text = text.removesuffix(" it")
    if text in CHINESE or not text or text.isdigit():
        return CHINESE.get(text, text)
    if text.endswith("."):
        return "，".join(chinese(part) for part in re.split(r", | and ", text[:-1])) + "。"
    if match := re.fullmatch(r"(?:an?|the) (.+) at the (.+)", text):
        return f"{chinese(match[2])}有{chinese(match[1])}"
    if text.startswith("more "):
        return f"{chinese(text.removeprefix('more '))}更多"
    words = [word if word in CHINESE or word.isdigit() else word.removesuffix("s") for word in text.split()]
    unknown = [word for word in words if word not in CHINESE and not word.isdigit()]
    if unknown:
        raise ValueError(f"no Chinese for {unknown[0]!r} in {text!r}")
    return "".join(CHINESE.get(word, word) for word in words)


def _numbers(answer: int, largest: int = 6) -> list[str]:
    return others(str(answer), map(str, range(largest + 1)))


def _existence(scene: Scene) -> list[_Candidate]:
    present = {thing.name for thing in scene.things}
    answers = {name: "yes" if name in present else "no" for name in ALL_NAMES}
    return [_Candidate(answer, others(answer, ("yes", "no")), name) for name, answer in answers.items()]


def _color(scene: Scene) -> list[_Candidate]:
    return [_Candidate(t.color, others(t.color, COLORS), t.kind) for t in scene.alone()]


def _count(scene: Scene) -> list[_Candidate]:
    counts = {kind: scene.count(kind) for kind in SHAPES}
    return [_Candidate(str(n), _numbers(n), f"{kind}s") for kind, n in counts.items()]


def _place(scene: Scene) -> list[_Candidate]:
    return [_Candidate(t.place, others(t.place, ALL_PLACES), t.name) for t in scene.subjects()]


def _identity(scene: Scene) -> list[_Candidate]:
    return [_Candidate(t.label, others(t.label, ALL_LABELS), t.place) for t in scene.things]


def _digit(scene: Scene) -> list[_Candidate]:
    return [_Candidate(str(t.digit), _numbers(t.digit, 9), t.place) for t in scene.digits()]


def _side(scene: Scene) -> list[_Candidate]:
    """Only of two in one row or in one column: of others two answers would be right."""
    found = []
    for a in scene.subjects():
        for b in scene.subjects():
            if (a.row == b.row) != (a.col == b.col):
                step = (int(np.sign(a.row - b.row)), int(np.sign(a.col - b.col)))
                answer = next(side for side, direction in SIDES.items() if direction == step)
                wrong = [f"{side} it" for side in others(answer, SIDES)]
                found.append(_Candidate(f"{answer} it", wrong, a.name, b.name))
    return found


def _neighbour(scene: Scene) -> list[_Candidate]:
    return [
        _Candidate(other.label, others(other.label, ALL_LABELS), thing.name, side)
        for thing in scene.subjects()
        for side, other in scene.neighbours(thing).items()
    ]


def _more(scene: Scene) -> list[_Candidate]:
    found = []
    for a in SHAPES:
        for b in SHAPES:
            counts = scene.count(a), scene.count(b)
            if a != b and any(counts):
                options = (f"more {a}s", f"more {b}s", "as many of both")
                answer = options[2] if counts[0] == counts[1] else options[int(counts[1] > counts[0])]
                found.append(_Candidate(answer, others(answer, options), f"{a}s", f"{b}s"))
    return found


def _left_over(scene: Scene) -> list[_Candidate]:
    left = {kind: len(scene.things) - scene.count(kind) for kind in SHAPES if scene.count(kind)}
    return [_Candidate(str(n), _numbers(n), plural(kind, scene.count(kind))) for kind, n in left.items()]


def _sum(scene: Scene) -> list[_Candidate]:
    values = [thing.digit for thing in scene.digits()]
    near = map(str, range(max(0, sum(values) - 4), sum(values) + 5))
    return [_Candidate(str(sum(values)), others(str(sum(values)), near))] if len(values) == 2 else []


def _corners(scene: Scene) -> list[_Candidate]:
    answers = [(thing, CORNERS[thing.kind]) for thing in scene.things if thing.kind in CORNERS]
    return [_Candidate(str(n), _numbers(n), thing.place) for thing, n in answers]


def _caption(scene: Scene) -> list[_Candidate]:
    """The wrong captions are those of the same board in other colours."""
    colors = list(COLORS)

    def recolored(thing: Thing, by: int) -> Thing:
        if thing.kind == "digit":
            return thing
        return replace(thing, color=colors[(colors.index(thing.color) + by) % len(colors)])

    boards = [replace(scene, things=tuple(recolored(t, by) for t in scene.things)) for by in range(1, len(colors))]
    return [_Candidate(caption(scene), [caption(board) for board in boards])]


_CANDIDATES = {
    "existence": _existence,
    "color": _color,
    "count": _count,
    "place": _place,
    "identity": _identity,
    "digit": _digit,
    "side": _side,
    "neighbour": _neighbour,
    "more": _more,
    "left over": _left_over,
    "sum": _sum,
    "corners": _corners,
    "caption": _caption,
}
