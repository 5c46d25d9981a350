"""The label of an answer to a yes-or-no question, by the rules of several scorers ("yes", "no" or `UNKNOWN`; each
function is named for its rule), and the figures on such answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

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


def llava_pope(answer: str) -> str:
    """LLaVA's scorer of POPE, and POPE's own: no if the text up to the first period, without commas, has a word "No", "no"
    or "not", split at single spaces. Quirk: anything else is yes, also "NO", "no!" and nothing."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def lmms_pope(answer: str) -> str:
    """lmms-eval's POPE: the word alone, in any case."""
    text = answer.lower().strip()
    return text if text in ("yes", "no") else UNKNOWN


def figures(pairs: Sequence[tuple[str, str]], unknown_is_no: bool = False) -> dict[str, Any]:
    """Accuracy, precision, recall and F1 of "yes", and the share of answers that say yes: fractions, 0 where a denominator
    is 0; and the counts behind them.

    Args:
        pairs: (label, prediction), at least one. A label is "yes" or "no"; any other prediction is unknown.
        unknown_is_no: an unknown answer counts as a false no where the label is yes; otherwise recall leaves it out.
    """
    counts = Counter(pairs)
    true_yes, false_yes = counts["yes", "yes"], counts["no", "yes"]
    true_no, false_no = counts["no", "no"], counts["yes", "no"]
    unknown = len(pairs) - true_yes - false_yes - true_no - false_no
    if unknown_is_no:
        false_no = sum(label == "yes" for label, _ in pairs) - true_yes
    precision = true_yes / (true_yes + false_yes or 1)
    recall = true_yes / (true_yes + false_no or 1)
    return {
        "accuracy": (true_yes + true_no) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall or 1),
        "yes_ratio": (true_yes + false_yes) / len(pairs),
        **{"TP": true_yes, "FP": false_yes, "TN": true_no, "FN": false_no},
        "unknown": unknown,
        "count": len(pairs),
    }
