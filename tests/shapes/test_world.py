"""The world: deterministic, split by hash and by handwriting, and answers that follow from what is drawn."""

from __future__ import annotations

import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from llava_sp.shapes.language import FAMILIES, Interviewer, caption, description, questions
from llava_sp.shapes.world import CELL, COLORS, SHAPES, SIZE, digit_bank, digit_instances, draw, sample_scene, split_of

ROWS, COLS = ("top", "", "bottom"), ("left", "", "right")


def scenes(seed: int, count: int, split: str = "train") -> list:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, split) for _ in range(count)]


def solve(question: str, scene) -> str:
    """A second opinion on a question, from pixel coordinates and plain words, not from the code that asked."""
    things = [(t.color if t.kind != "digit" else "", t.kind, t.x, t.y, t.value) for t in scene.things]

    def find(words: str) -> tuple:
        *color, kind = words.split()
        found = [t for t in things if t[1] == kind and (not color or t[0] == color[0])]
        assert len(found) == 1, f"{words!r} means {len(found)} things"
        return found[0]

    def place(thing: tuple) -> str:
        words = [ROWS[thing[3] // CELL], COLS[thing[2] // CELL]]
        return " ".join(word for word in words if word) or "center"

    if match := re.fullmatch(r"Is there an? (\w+) (\w+) in the image\?", question):
        return "yes" if any(t[:2] == match.groups() for t in things) else "no"
    if match := re.fullmatch(r"What color is the (\w+)\?", question):
        return find(match[1])[0]
    if match := re.fullmatch(r"How many (\w+) shapes are there\?", question):
        return str(sum(t[0] == match[1] for t in things))
    if match := re.fullmatch(r"How many (\w+)s are there\?", question):
        return str(sum(t[1] == match[1] for t in things))
    if match := re.fullmatch(r"Where is the ([\w ]+)\?", question):
        return place(find(match[1]))
    if question == "What digit is in the image?":
        return str(find("digit")[4])
    if match := re.fullmatch(r"What digit is at the ([\w ]+)\?", question):
        return next(str(t[4]) for t in things if t[1] == "digit" and place(t) == match[1])
    match = re.fullmatch(r"Is the ([\w ]+) (to the left of|to the right of|above|below) the ([\w ]+)\?", question)
    assert match, question
    a, b = find(match[1]), find(match[3])
    ahead = {"to the left of": b[2] - a[2], "to the right of": a[2] - b[2], "above": b[3] - a[3], "below": a[3] - b[3]}
    return "yes" if ahead[match[2]] > CELL / 2 else "no"


def test_same_seed_same_scene_and_bytes():
    first, second, other = scenes(3, 20), scenes(3, 20), scenes(4, 20)
    assert first == second and first != other
    assert [draw(s).tobytes() for s in first] == [draw(s).tobytes() for s in second]


def test_every_answer_follows_from_the_scene():
    asked = Counter()
    for scene in scenes(0, 300):
        for family in FAMILIES:
            for question in questions(scene, family):
                assert question.answer == solve(question.text, scene), (question, scene)
                asked[family] += 1
    assert set(asked) == set(FAMILIES) and min(asked.values()) > 100


def test_each_thing_is_drawn_in_its_cell():
    for scene in scenes(1, 50):
        pixels = np.asarray(draw(scene)).astype(int)
        assert pixels.shape == (SIZE, SIZE, 3)
        for thing in scene.things:
            assert thing.x // CELL == thing.col and thing.y // CELL == thing.row
            cell = pixels[CELL * thing.row : CELL * (thing.row + 1), CELL * thing.col : CELL * (thing.col + 1)]
            ink = (255, 255, 255) if thing.kind == "digit" else COLORS[thing.color]
            near = np.abs(cell - np.array(ink)).sum(-1) < 40
            assert near.sum() >= (5 if thing.kind == "digit" else 60), thing
        empty = {(r, c) for r in range(3) for c in range(3)} - {(t.row, t.col) for t in scene.things}
        for row, col in empty:
            middle = pixels[CELL * row + 8 : CELL * (row + 1) - 8, CELL * col + 8 : CELL * (col + 1) - 8]
            assert (middle == np.array(scene.background)).all()


def test_captions_and_descriptions_tell_everything():
    rng = np.random.default_rng(0)
    for scene in scenes(5, 50):
        for text in (caption(scene), description(scene, rng)):
            for thing in scene.things:
                assert thing.label in text and thing.place in text


def test_splits_share_neither_scenes_nor_handwriting():
    train = {s.signature() for s in scenes(0, 3000)}
    held_out = scenes(0, 300, "val")
    assert not train & {s.signature() for s in held_out}
    assert all(split_of(s.signature()) == "val" for s in held_out)
    for value in range(10):
        train_digits, val_digits = (set(digit_instances(split)[value]) for split in ("train", "val"))
        assert not train_digits & val_digits and len(val_digits) >= 10 and len(train_digits) >= 100
        assert all(digit_bank()[1][i] == value for i in train_digits | val_digits)
    for scene in held_out:
        assert all(t.instance in digit_instances("val")[t.value] for t in scene.things if t.kind == "digit")


def test_no_wording_gives_its_answer_away():
    """The best guess from the words alone, learned on half of the questions, is hardly better than from the type."""
    rng = np.random.default_rng(0)
    interviewer = Interviewer(rng)
    asked = [q for s in scenes(7, 4000) for q in interviewer.interview(s, 6)]
    learn, test = asked[::2], asked[1::2]
    for family in FAMILIES:
        by_text, by_family = defaultdict(Counter), Counter()
        for question in (q for q in learn if q.family == family):
            by_text[question.text][question.answer] += 1
            by_family[question.answer] += 1
        mine = [q for q in test if q.family == family]
        guess = by_family.most_common(1)[0][0]
        from_type = np.mean([q.answer == guess for q in mine])
        from_text = np.mean([q.answer == by_text.get(q.text, by_family).most_common(1)[0][0] for q in mine])
        assert from_text < from_type + 0.06, (family, from_text, from_type)
        assert from_type < (0.55 if family in ("existence", "relation") else 0.35), family


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'test'"):
        digit_instances("test")
    with pytest.raises(ValueError, match="'smell'"):
        questions(scenes(0, 1)[0], "smell")


def test_every_shape_and_color_occurs():
    things = [t for s in scenes(0, 400) for t in s.things]
    assert {t.kind for t in things} == {*SHAPES, "digit"}
    assert {t.color for t in things} == {*COLORS, "white"}
