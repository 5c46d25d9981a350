"""What an answer to a yes-or-no question says, by a rule that several benchmarks share: "yes", "no" or `UNKNOWN`."""

from __future__ import annotations

from llava_sp.eval.scoring.vqa import PERIOD_BY_NO_DIGIT, process_punctuation

UNKNOWN = "unknown"


def vlmevalkit(answer: str) -> str:
    """VLMEvalKit's exact matching: one of the words "yes" and "no" stands in the answer, and the other does not.

    Its punctuation step is that of the VQA scorer with the period rule mended: a period after a digit stays.
    """
    words = process_punctuation(answer.lower(), PERIOD_BY_NO_DIGIT).split()
    if ("yes" in words) == ("no" in words):
        return UNKNOWN
    return "yes" if "yes" in words else "no"
