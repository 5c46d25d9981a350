"""Errors about the ids and paths in official files."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_sp.eval.inputs.checks import compare_ids, inside


@pytest.mark.parametrize("name", ["../x.jpg", "/etc/x.jpg", "C:\\x.jpg", "a/../../x.jpg", ""])
def test_images_stay_below_their_folder(name):
    with pytest.raises(ValueError, match="is outside images"):
        inside(Path("images"), name, "question 1")


def test_ids_compared():
    assert compare_ids([1, 2], [2, 1]) == ""
    assert compare_ids([1, 1, 5], [1, 2]) == (
        "1 questions have more than one answer (1), 1 answers are for questions that are not in the file (5), "
        "1 questions have no answer (2)"
    )
    assert compare_ids({1: "a", 2: "b"}, [1, 2]) == ""
