"""The outcome of a mutation: right, or one of the ways to be wrong.

Whether another result is right is decided by the rules below: a surface assigns one to each of its files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from tests.hostile.mutations import Mutation
from tests.hostile.sandbox import HUNG, Outcome

RIGHT = ("same", "another valid input", "refused")
WRONG = (
    "silently different", "traceback", "refused without a name", "wrong status", "check disagrees", "hung",
)  # fmt: skip
TOLERANCE = 1e-4  # of the largest number of a list; kernels may sum in another order
LARGEST = 1e7  # that a setting plausibly is
MISSING = "(missing)"
ERROR = re.compile(r"^(.*: )?(error|not valid):", re.MULTILINE)

Difference = tuple[tuple[Any, ...], Any, Any]  # path, value before, value after


@dataclass(frozen=True)
class Spoilt:
    """What a rule may look at. `before` and `after` are the file's documents, None where it is none."""

    mutation: Mutation
    before: Any
    after: Any
    sound: Any  # results
    now: Any

    @property
    def differences(self) -> list[Difference]:
        return [] if self.before is None or self.after is None else list(differences(self.before, self.after))


Rule = Callable[[Spoilt], bool]
Rules = Sequence[tuple[str, Rule]]  # the first pattern that fits `target`, or `target:key.key`, decides


def judge(
    mutation: Mutation,
    spoilt: Spoilt,
    sound: Outcome,
    now: Outcome,
    rules: Rules,
    names: Sequence[str],
    is_check: bool = False,
) -> tuple[str, str]:
    """(one of `RIGHT` and `WRONG`, what shows it). `names` are those that an error may name what is wrong by."""
    if now.trace == HUNG:
        return "hung", now.words[-200:]
    if now.trace or "Traceback (most recent call last)" in now.words:
        return "traceback", now.last_line if now.trace else now.words.strip().splitlines()[-1]
    if now.check is not None and (now.check == 0) != (now.status == 0):
        return "check disagrees", f"the check: {now.check}; used: {now.status}; {first_error(now.words)}"
    if now.status == 0:
        if alike(sound.result, now.result):
            return "same", ""
        if _rule(rules, mutation)(spoilt):
            return "another valid input", ""
        return "silently different", shown(sound.result, now.result)
    found_something = is_check and now.status == 1
    if now.status != 2 and not found_something:
        return "wrong status", f"{now.status}; {first_error(now.words)}"
    if not ERROR.search(now.words) and not found_something:
        return "wrong status", f"{now.status} without 'error:'; {now.words[-200:]}"
    found = ERROR.search(now.words)
    if not any(name and name in now.words[found.start() if found else 0 :] for name in names):
        return "refused without a name", first_error(now.words)
    return "refused", first_error(now.words)


def _rule(rules: Rules, mutation: Mutation) -> Rule:
    place = f"{mutation.target}:{'.'.join(map(str, mutation.at))}"
    fitting = (rule for pattern, rule in rules if fnmatch(mutation.target, pattern) or fnmatch(place, pattern))
    return next(fitting, exact)


def first_error(words: str) -> str:
    found = ERROR.search(words)
    line = words[found.start() :] if found else words.strip()
    return " ".join(line.split("\n")[0].split())[:300]


def shown(before: Any, after: Any) -> str:
    for path, old, new in differences(before, after):
        return f"{'.'.join(map(str, path))}: {str(old)[:60]} -> {str(new)[:60]}"
    return ""


# ---- comparing


def alike(a: Any, b: Any) -> bool:
    """Equal, where lists of floats may differ by rounding."""
    if isinstance(a, list) and isinstance(b, list) and a and all(type(x) is float for x in a + b):
        largest = max(map(abs, a))
        return len(a) == len(b) and all(abs(x - y) <= TOLERANCE * largest for x, y in zip(a, b))
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    return type(a) is type(b) and (a == b or (a != a and b != b))


def differences(before: Any, after: Any, path: tuple[Any, ...] = ()) -> Iterator[Difference]:
    """Every value that was added, removed or replaced."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in {**before, **after}:
            yield from differences(before.get(key, MISSING), after.get(key, MISSING), (*path, key))
    elif isinstance(before, list) and isinstance(after, list):
        for index in range(max(len(before), len(after))):
            one, other = (part[index] if index < len(part) else MISSING for part in (before, after))
            yield from differences(one, other, (*path, index))
    elif type(before) is not type(after) or (before != after and not (before != before and after != after)):
        yield path, before, after


def plausible(old: Any, new: Any) -> bool:
    """Whether `new` is a value that a file could have in place of `old`: of its type, finite, not below zero, printable."""
    if isinstance(old, bool) or isinstance(new, bool):
        return type(old) is type(new) or old is None
    if isinstance(new, (int, float)):
        fits = isinstance(old, float) or isinstance(new, int) or old is None
        least = 0 if old == 0 or isinstance(old, float) else 1e-300
        return isinstance(old, (int, float, type(None))) and fits and least <= new <= LARGEST
    if isinstance(new, str):
        return isinstance(old, (str, type(None))) and bool(new.strip()) and new.isprintable()
    return False


# ---- rules


def exact(spoilt: Spoilt) -> bool:
    """Our own files: only the same result is right."""
    return False


def anything(spoilt: Spoilt) -> bool:
    """What nobody can check: pixels, the weights and words of other people's models."""
    return True


def settings(spoilt: Spoilt) -> bool:
    """Values were replaced by plausible ones."""
    return spoilt.after is not None and all(plausible(old, new) for _, old, new in spoilt.differences)


def optional_settings(spoilt: Spoilt) -> bool:
    """The same, where keys are left out by other people's code too, which has a value for them then."""
    return spoilt.after is not None and all(
        new in (MISSING, None) or plausible(old, new) for _, old, new in spoilt.differences
    )


def content(spoilt: Spoilt) -> bool:
    """Texts and numbers that are asked about, answered and scored: any others are as good; their types are not.

    A list inside of a record may be shorter; the list of records may not.
    """

    def fits(path: tuple[Any, ...], old: Any, new: Any) -> bool:
        if new is MISSING:
            return len(path) > 1 and isinstance(path[-1], int)
        if isinstance(old, bool) or isinstance(new, bool):
            return type(old) is type(new)
        if isinstance(old, (int, float)):
            return isinstance(new, (int, float)) and math.isfinite(new)
        return isinstance(old, str) and isinstance(new, str)

    return spoilt.after is not None and all(fits(*difference) for difference in spoilt.differences)


def weights(spoilt: Spoilt) -> bool:
    """Other numbers under the same names and shapes, which cannot be told where nothing records a hash of them."""
    return spoilt.mutation.action in ("flip", "zeros") and spoilt.before == spoilt.after
