"""Letters inferred from answers, beyond what the recorded runs of the official scorers hold."""

from __future__ import annotations

import pytest

from llava_sp.eval.scoring.letters import (
    REFUSED,
    by_letter,
    lettered,
    llava_scienceqa,
    lmms_mmbench,
    lmms_mmbench_prefetch,
    lmms_qbench,
    lmms_scienceqa,
    lmms_seedbench,
    not_in,
    vlmevalkit,
)
from llava_sp.eval.scoring.records import share_right

COLOURS = by_letter(["red", "green", "dark blue"])


def test_options_are_lettered():
    assert COLOURS == {"A": "red", "B": "green", "C": "dark blue"}
    assert lettered(COLOURS) == "A. red\nB. green\nC. dark blue"
    assert share_right([{"score": score} for score in (100.0, 0.0, 0.0)]) == 33.33 and share_right([]) == 0.0
    assert not_in("a  b\nc", ["b c", "a b"]) is None and not_in("a b", ["a", "ab"]) == "ab"


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("B", "B"),
        ("E", "E"),
        ("F", None),
        ("", None),
        ("AB", None),
        ("A.", None),
        ("A. ", "A"),
        ("A. x", "A"),
        ("A: x", None),
        ("b", None),
        ("The answer is B.", "B"),
        ("The answer is B", None),
        ("The answer is Because of it", "B"),
        ("So. The answer is C, I think", "C"),
        ("The answer is C\n", None),
        ("The answer is A. The answer is A.", None),
        ("The answer is Z.", "Z"),
    ],
)
def test_llava_scienceqa(answer, letter):
    assert llava_scienceqa(answer) == letter


@pytest.mark.parametrize(
    "answer, head, v02",
    [
        ("B", "B", "B"),
        ("(b)", None, None),
        ("**B**", "B", "B"),
        ("B。", None, None),
        ("A dark blue one stands there.", "C", "A"),  # the word A; today it stands too far from the end
        ("A dark blue one", "A", "A"),
        ("D", None, None),
        ("Z", REFUSED, REFUSED),
        ("Z or B", "B", "B"),
        ("A or B", None, None),
        ("Sorry, I can't help with images of people yet. B", REFUSED, REFUSED),
        ("Failed to obtain answer via API", None, None),
        ("Failed to obtain answer via API: red", None, "A"),
        ("DARK BLUE", "C", "C"),
        ("red, not green", None, None),
        ("predicted", "A", "A"),  # texts match within words
        ("B is what stands in the middle of it", None, "B"),
        ("B it is: the answer is B since I see that it is", "B", "B"),
        ("The correct Answer is **b** since neither of the others is there", "B", None),
        ("the answer is D, it is there to be seen", None, None),
        ("It is of the colour that people call red", None, "A"),  # more than twice as long as all options
    ],
)
def test_vlmevalkit(answer, head, v02):
    assert vlmevalkit(answer, COLOURS) == head
    assert vlmevalkit(answer, COLOURS, version="v0.2") == v02


@pytest.mark.parametrize(
    "answer, prefetch, letter",
    [
        ("B", "B", "B"),
        ("E", "E", "E"),  # there is no E
        ("(B).", "B", "B"),
        ("B and C", None, "B"),  # the beginning counts more than the end
        ("of B and C", None, "C"),
        ("A thing that is B.", "B", "B"),
        ("A thing that is B", None, "A"),  # no bare letter is taken from more than three words with A: the beginning is
        ("It is A thing that is B", None, "B"),
        ("It is B or A as such", None, "A"),
        ("**B**", None, "B"),
        ("答案是C", None, "C"),
        ("the answer is B because A is wrong", None, "A"),  # the last capital behind the phrase
        ("Failed to obtain answer via API: B", None, "B"),
        ("the DARK BLUE one", "C", "C"),
        ("", None, None),
        ("?", None, None),
        ("xBx", None, "B"),
        ("xB: yC.z", None, "C"),  # before a period, rather than before a colon
        ("xC) yB: z", None, "B"),
        ("x(A)y zB:", None, "A"),
        ("x1", None, None),
    ],
)
def test_lmms_mmbench(answer, prefetch, letter):
    assert lmms_mmbench_prefetch(answer, COLOURS) == prefetch
    assert lmms_mmbench(answer, COLOURS) == letter


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("B", "B"),
        ("B.", "B"),
        ("(A) or (C)", "C"),
        ("(C) is better than (A)?", "A"),
        ("A is better than B", "B"),
        ("B.x", "B"),
        ("B\n", None),
        ("b", None),
        ("red", None),  # up to five words are no text
        ("it is what people call green, not red", "A"),
        ("it is what people call grey or so", None),
        ("", None),
    ],
)
def test_lmms_qbench(answer, letter):
    assert lmms_qbench(answer, COLOURS) == letter


def test_first_characters():
    assert [lmms_scienceqa(t) for t in ("b", " B ", "B.x", "b.", "", "The answer is B.")] == [
        "B",
        "B",
        "B",
        None,
        None,
        None,
    ]
    assert [lmms_seedbench(t) for t in ("b", " B. x", "", "(B)", "Because")] == ["B", "B", None, "(", "B"]
