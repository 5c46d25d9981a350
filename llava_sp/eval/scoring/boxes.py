"""The box that an answer gives, by the rules of several scorers, and how far it fits the true box.

A box is x1, y1, x2, y2 as fractions of width and height, of the image or of the square that it is padded to.
"""

from __future__ import annotations

import ast
import math
import re
import warnings

from llava_sp.eval.inputs.refcoco_files import Box

_PLAIN = r"(-?\d+(?:\.\d+)?)"
_ANY = r"([-+]?(?:\d+\.?\d*|\.\d+))"
_PLAIN_BOX = re.compile(rf"\[\s*{_PLAIN},\s*{_PLAIN},\s*{_PLAIN},\s*{_PLAIN}\s*\]")
_ANY_BOX = re.compile(rf"\[\s*{_ANY}\s*,\s*{_ANY}\s*,\s*{_ANY}\s*,\s*{_ANY}\s*\]")


def first_box(text: str) -> Box | None:
    """The first [a, b, c, d] of four numbers."""
    return _found(_ANY_BOX, text)


def first_plain_box(text: str) -> Box | None:
    """The first [a, b, c, d] of four plain decimals, as lmms-eval looks for it: `.5`, `+1` and a space before a comma do
    not match."""
    return _found(_PLAIN_BOX, text)


def _found(pattern: re.Pattern[str], text: str) -> Box | None:
    match = pattern.search(text)
    if match is None:
        return None
    x1, y1, x2, y2 = map(float, match.groups())
    return (x1, y1, x2, y2) if all(map(math.isfinite, (x1, y1, x2, y2))) else None


def box_as_list(text: str) -> Box | None:
    """The whole answer as TRI-ML reads it: a Python list of four numbers from 0 to 1, corners in order."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Python thinks of odd literals
            x1, y1, x2, y2 = box = ast.literal_eval(text)
        fits = isinstance(box, list) and all(0 <= number <= 1 for number in box) and x1 < x2 and y1 < y2
        return (float(x1), float(y1), float(x2), float(y2)) if fits else None
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def unpad(box: Box, width: float, height: float) -> Box:
    """From fractions of the padded square to fractions of the image; the padding is as the image processor adds it."""
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    x1, y1, x2, y2 = (number * side for number in box)
    return (x1 - left) / width, (y1 - top) / height, (x2 - left) / width, (y2 - top) / height


def iou(a: Box, b: Box) -> float:
    """Intersection over union; 0 for a box whose corners are not in order."""
    intersection = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    if not intersection:
        return 0.0
    return intersection / ((b[2] - b[0]) * (b[3] - b[1]) + (a[2] - a[0]) * (a[3] - a[1]) - intersection)


def middle_inside(box: Box, reference: Box) -> bool:
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return reference[0] <= x <= reference[2] and reference[1] <= y <= reference[3]


def shown(box: Box | None) -> str:
    return "no box" if box is None else f"[{', '.join(f'{number:.3f}' for number in box)}]"
