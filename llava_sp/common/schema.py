"""Schemas of records, declared as data and checked by one function.

    ANNOTATION = {"question_id": (int, str), "answers": some({"answer": str, "answer_id?": (int, str)})}
    expect(record, ANNOTATION, f"{file}: annotation 3")

    ValueError: val.json: annotation 3: answers[2].answer is 5; expected text

A spec is

    str, int, float, bool, list, dict   a value of that type (an int is also a float, a bool is neither); Any fits all
    None                                null
    (spec, spec, ...)                   any one of them
    {"key": spec, "key?": spec}         an object with these keys, those with ? optional; others are allowed unless it is `only`
    {str: spec}                         an object whose values all fit
    [spec]                              a list whose items all fit; `some(spec)` is one with at least one item
    one_of("a", "b")                    one of these values
    Check(test, "a number above 0")     a value for which test(value) is true; whole(1), POSITIVE, TEXT ... are such
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Spec = Any

_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


@dataclass(frozen=True, eq=False)  # may be part of a type, which hashes it
class Check:
    """A value of `spec` for which `test` is true; `words` describe a valid value."""

    test: Callable[[Any], object]
    words: str
    spec: Spec = Any


def whole(low: int, high: int = 10**9) -> Check:
    return Check(lambda number: low <= number <= high, f"a whole number from {low} to {high:,}", int)


NUMBER = Check(lambda number: abs(number) <= sys.float_info.max, "a number", float)
POSITIVE = Check(lambda number: 0 < number <= sys.float_info.max, "a number above 0", float)
NOT_NEGATIVE = Check(lambda number: 0 <= number <= sys.float_info.max, "a number, 0 or more", float)
SHARE = Check(lambda number: 0 <= number < 1, "a number of at least 0 and below 1", float)


def _is_clean(text: str) -> bool:
    return bool(text.strip()) and "\0" not in text and is_utf8(text)


def is_utf8(text: str) -> bool:
    """Whether a text can be encoded; a lone surrogate cannot, which is how Python decodes bytes that are not UTF-8."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


TEXT = Check(_is_clean, "text", str)  # for names and paths
SIZE = Check(re.compile(r"[1-9]\d{0,8}[KMGT]B").fullmatch, "a number and KB, MB, GB or TB, such as 5GB", str)


def one_of(*values: Any) -> Check:
    return Check(
        lambda value: any(value == v and type(value) is type(v) for v in values), " or ".join(map(repr, values))
    )


def some(spec: Spec = Any) -> Check:
    """A list with at least one item."""
    return Check(bool, f"a list of {_describe(spec)}, at least one", [spec])


def only(fields: dict[str, Spec]) -> Check:
    """An object with these keys and no others."""
    names = [key.removesuffix("?") for key in fields]
    return Check(lambda value: value.keys() <= set(names), f"an object with only {', '.join(names)}", fields)


def expect(value: Any, spec: Spec, where: object) -> Any:
    """`value`, if it fits `spec`.

    Raises:
        ValueError: `where`, the key, its value, and what was expected; for missing keys, the keys present.
    """
    problem = next(_problems(value, spec, ""), None)
    if problem is not None:
        path, wrong = problem
        raise ValueError(f"{where}: {path} {wrong}" if path else f"{where} {wrong}")
    return value


def expect_all(records: Any, spec: Spec, file: object, noun: str = "question") -> list[Any]:
    """The records of a list with at least one, which all must fit `spec`; errors name a `Line` by its number."""
    expect(records, some(), file)
    for index, record in enumerate(records):
        expect(record, spec, place(file, noun, record, index))
    return records


def place(file: object, noun: str, record: Any, index: int) -> str:
    """Where a record is, for error messages: its line, or its index in a list."""
    number = getattr(record, "number", None)
    return f"{file}, line {number}" if number else f"{file}: {noun} {index} (counted from 0)"


def fits(value: Any, spec: Spec) -> bool:
    return next(_problems(value, spec, ""), None) is None


def _problems(value: Any, spec: Spec, path: str) -> Iterator[tuple[str, str]]:
    """(path to the value, what is wrong with it) of everything that does not fit."""
    if isinstance(spec, tuple):
        if not any(fits(value, one) for one in spec):
            inner = [one.spec if isinstance(one, Check) else one for one in spec]
            alike = [one for one, kind in zip(spec, inner) if isinstance(kind, dict) and isinstance(value, dict)]
            yield next(_problems(value, alike[0], path)) if len(alike) == 1 else (path, _wrong(value, spec))
    elif isinstance(spec, Check):
        inner = list(_problems(value, spec.spec, path))
        if inner and not isinstance(spec.spec, type):
            yield from inner
        elif inner or not spec.test(value):
            yield path, _wrong(value, spec)
    elif isinstance(spec, dict):
        yield from _field_problems(value, spec, path)
    elif isinstance(spec, list):
        if not isinstance(value, list):
            yield path, _wrong(value, spec)
        else:
            for index, item in enumerate(value):
                if type(item) is not spec[0]:  # the common case, without a call
                    yield from _problems(item, spec[0], f"{path}[{index}]")
    elif not _is(value, spec):
        yield path, _wrong(value, spec)


def _field_problems(value: Any, fields: dict[Any, Spec], path: str) -> Iterator[tuple[str, str]]:
    if not isinstance(value, dict):
        yield path, _wrong(value, fields)
        return
    prefix = f"{path}." if path else ""
    if str in fields:
        for key, item in value.items():
            yield from _problems(item, fields[str], f"{prefix}{key}")
        return
    absent = [key for key in fields if not key.endswith("?") and key not in value]
    if absent:
        has = ", ".join(list(value)[:12]) or "nothing"
        yield path, f"has no {', '.join(absent)}; it has {has}"
    for key, spec in fields.items():
        name = key.removesuffix("?")
        kind = type(value.get(name))
        plain = kind is spec or (type(spec) is tuple and kind in spec)  # the common case, without a call
        if name in value and not plain:
            yield from _problems(value[name], spec, f"{prefix}{name}")


def _is(value: Any, kind: Any) -> bool:
    if kind is Any:
        return True
    if kind is None:
        return value is None
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _wrong(value: Any, spec: Spec) -> str:
    try:
        shown = repr(value)
    except ValueError:  # Python does not print integers of over 4300 digits
        shown = "a number of thousands of digits"
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return f"is {shown}; expected {_describe(spec)}"


def _describe(spec: Spec) -> str:
    if isinstance(spec, tuple):
        return " or ".join(_describe(one) for one in spec)
    if isinstance(spec, Check):
        return spec.words
    if isinstance(spec, dict):
        names = [key for key in spec if key is not str and not key.endswith("?")]
        return f"an object with {', '.join(names)}" if names else "an object"
    if isinstance(spec, list):
        return f"a list of {_describe(spec[0])}"
    return "null" if spec is None else "anything" if spec is Any else _WORDS.get(spec, spec.__name__)
