"""What a message must name: the file, the key, the value, what would be right. Its sentences may change."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


def names(text: str, *parts: object) -> bool:
    """Whether every part stands in the text, not as a piece of a longer word or number."""
    return all(re.search(rf"(?!\B\w){re.escape(str(part))}(?<!\w\B)", text) for part in parts)


@contextmanager
def refused(
    *parts: object, error: type[BaseException] | tuple[type[BaseException], ...] = ValueError
) -> Iterator[pytest.ExceptionInfo]:
    """Expects `error` with a message that names every part."""
    with pytest.raises(error) as raised:
        yield raised
    absent = [part for part in parts if not names(str(raised.value), part)]
    assert not absent, f"{absent} not in: {raised.value}"
