"""What an answer to a yes-or-no question says, by a rule that several benchmarks share: "yes", "no" or `UNKNOWN`."""

from __future__ import annotations

import re

from llava_sp.eval.vqa_metrics import PUNCTUATION

UNKNOWN = "unknown"
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD_AWAY_FROM_DIGITS = re.compile(r"(?<!\d)\.(?!\d)")
_MOST_PERIODS = 32  # a flag is passed where a count belongs, as in the official VQA scorer


def vlmevalkit(answer: str) -> str:
    """VLMEvalKit's exact matching: one of the words "yes" and "no" stands in the answer, and the other does not.

    Its punctuation step is that of the VQA scorer with the period rule mended: a period after a digit stays.
    """
    text = answer.lower()
    number_with_comma = _COMMA_IN_NUMBER.search(text) is not None
    cleaned = text
    for mark in PUNCTUATION:
        touches_space = mark + " " in text or " " + mark in text
        cleaned = cleaned.replace(mark, "" if touches_space or number_with_comma else " ")
    words = _PERIOD_AWAY_FROM_DIGITS.sub("", cleaned, count=_MOST_PERIODS).split()
    if ("yes" in words) == ("no" in words):
        return UNKNOWN
    return "yes" if "yes" in words else "no"
