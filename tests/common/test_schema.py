"""Records against schemas: what fits, and which key, value and expectation an error names."""

from __future__ import annotations

from typing import Any

import pytest

from llava_sp.common.schema import Check, expect, expect_all, fits, one_of, only, some

POSITIVE = Check(lambda value: value > 0, "a number above 0", float)


@pytest.mark.parametrize(
    "value, spec",
    [
        (3, int),
        (3, float),
        (3.5, float),
        ("x", (int, str)),
        (None, None),
        (None, (str, None)),
        (object(), Any),
        ({"a": 1, "more": 2}, {"a": int, "b?": str}),
        ({"a": 1, "b": "x"}, only({"a": int, "b?": str})),
        ({"x": 1, "y": 2}, {str: int}),
        ([], [int]),
        ([1, 2], some(int)),
        ("pad", one_of("pad", "crop")),
        (0.5, POSITIVE),
        ({"total": None}, ({"total?": (int, None)}, None)),
    ],
)
def test_values_that_fit(value, spec):
    assert fits(value, spec) and expect(value, spec, "file") is value


@pytest.mark.parametrize(
    "value, spec, message",
    [
        (True, int, "file is True; expected a whole number"),
        (1, bool, "file is 1; expected true or false"),
        (1.5, int, "file is 1.5; expected a whole number"),
        ("x", (int, None), "file is 'x'; expected a whole number or null"),
        (True, one_of(1, 2), "file is True; expected 1 or 2"),
        ([], some(int), "file is []; expected a list of "),
        ([1, "x"], [int], "file: [1] is 'x'; expected a whole number"),
        (-1, POSITIVE, "file is -1; expected a number above 0"),
        ({"x": "1"}, {str: int}, "file: x is '1'; expected a whole number"),
        ({"b": 1}, {"a": int, "c": int}, "file has no a, c; it has b"),
        ({"a": 1, "z": 2}, only({"a": int}), "expected an object with only a"),
        ({"a": [{"b": 5}]}, {"a": some({"b": str})}, "file: a[0].b is 5; expected text"),
        ({"a": {"b": "7"}}, {"a": ({"b?": int}, None)}, "file: a.b is '7'; expected a whole number"),
        ([3], ({"b?": int}, None), "file is [3]; expected an object or null"),
        ("x" * 200, int, f"file is '{'x' * 76}...; expected a whole number"),
    ],
)
def test_errors_name_key_value_and_expectation(value, spec, message):
    with pytest.raises(ValueError) as error:
        expect(value, spec, "file")
    assert message in str(error.value)


def test_records_of_a_list_are_named_by_their_index():
    assert expect_all([{"a": 1}], {"a": int}, "f.json") == [{"a": 1}]
    with pytest.raises(ValueError, match=r"f.json: question 1 \(counted from 0\) has no a; it has b"):
        expect_all([{"a": 1}, {"b": 2}], {"a": int}, "f.json")
    for empty in ([], {}, None):
        with pytest.raises(ValueError, match="f.json is .*; expected a list"):
            expect_all(empty, {"a": int}, "f.json")
