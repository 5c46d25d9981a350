"""VQA accuracy and answer normalisation as the official scorers compute them, quirks included.

Written from a description of the behaviour of GT-Vision-Lab/VQA `vqaEval.py` (the official scorer of VQAv2) and of the
EvalAI answer processor that LLaVA applies before it writes a submission. TextVQA, VizWiz and the harnesses put the same
steps together in other ways; `vqav2`, `textvqa` and `vizwiz` describe which. Published numbers rest on the quirks
below, so they are kept on purpose:

* a punctuation mark is deleted or replaced by a space depending on the *whole* original text, not on its neighbours;
* the rule for periods was meant to look behind and does not (`5.` -> `5`, `a.b` -> `ab`), and removes 32 at most;
* if the ten answers of the annotators are identical, nothing is normalised at all and raw strings are compared;
* some contractions map to odd forms, and those with a capital I never match.

Other copies of this code match a comma between digits in `1,,2` too; here, as in the official one,
only `1,2` counts.

Pure Python: importing this module imports neither torch nor transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from llava_sp.eval.base import Benchmark

_APOSTROPHE_LOST = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's I'm I've
isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd
they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd
who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
_ONE_OF_TWO_LOST = """
couldn't've hadn't've he'd've I'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've
there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've
"""
_ODD = {
    "let's": "let's",
    "she's": "she's",
    "somebody'd": "somebodyd",
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
}


def _contraction_table() -> dict[str, str]:
    table = {word.replace("'", ""): word for word in _APOSTROPHE_LOST.split()}
    for word in _ONE_OF_TWO_LOST.split():
        first, second = (i for i, character in enumerate(word) if character == "'")
        table[word[:first] + word[first + 1 :]] = word
        table[word[:second] + word[second + 1 :]] = word
    return table | _ODD


CONTRACTIONS: Mapping[str, str] = _contraction_table()
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COUNTING = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
ARTICLES = frozenset(("a", "an", "the"))
NUMBERS: Mapping[str, str] = {"none": "0", "zero": "0"} | {word: str(i + 1) for i, word in enumerate(_COUNTING)}
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_LOOSE_PERIOD = re.compile(r"\.(?!\d)")
PERIOD_BY_NO_DIGIT = re.compile(r"(?<!\d)\.(?!\d)")  # VLMEvalKit's: `5.` stays
_MOST_PERIODS = 32  # the official code passes re.UNICODE, which is 32, where re.sub expects a count


def process_punctuation(text: str, period: re.Pattern[str] = _LOOSE_PERIOD) -> str:
    """Removes or spaces out 21 marks, then removes up to 32 periods: by default those that no digit follows."""
    number_with_comma = _COMMA_IN_NUMBER.search(text) is not None
    result = text
    for mark in PUNCTUATION:
        touches_space = mark + " " in text or " " + mark in text
        result = result.replace(mark, "" if touches_space or number_with_comma else " ")
    return period.sub("", result, count=_MOST_PERIODS)


def process_digits_and_articles(text: str) -> str:
    """Lower case; number words to digits; articles dropped; apostrophes of contractions restored; single spaces."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def clean(text: str) -> str:
    """The only step that the official scorer always takes: line breaks and tabs to spaces, ends stripped."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def evalai_answer(text: str) -> str:
    """The EvalAI answer processor: what LLaVA writes into VQAv2, TextVQA and VizWiz answers. Not idempotent."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return process_digits_and_articles(process_punctuation(clean(text.strip())))


@lru_cache(maxsize=1 << 16)
def official_answer(text: str) -> str:
    """All steps of the official scorer: line breaks, punctuation, number words, articles, contractions."""
    return process_digits_and_articles(process_punctuation(clean(text)))


def vlmevalkit_answer(text: str) -> str:
    """The official scorer's steps with VLMEvalKit's rule for periods: only those beside no digit go (`1984.` stays)."""
    return process_digits_and_articles(process_punctuation(clean(text), PERIOD_BY_NO_DIGIT))


def leave_one_out(prediction: str, answers: Sequence[str], identities: Sequence[object] | None = None) -> float:
    """VQA accuracy (0 to 1) of one prediction: for each annotator, min(1, matches among the *other* annotators / 3).

    Args:
        identities: what else the annotators' records hold. The official code takes every record for the left-out one
            that equals it in all fields, so equal answers with equal identities drop out together. None: all differ.
    """
    hits = [answer == prediction for answer in answers]
    if identities is None:
        others = [sum(hits) - hit for hit in hits]
    else:
        records = list(zip(answers, identities))
        others = [sum(hit for hit, other in zip(hits, records) if other != record) for record in records]
    scores = [min(1.0, matches / 3) for matches in others]
    return sum(scores) / len(scores)


def vqa_accuracy(prediction: str, answers: Sequence[Mapping[str, object]], always_normalise: bool = False) -> float:
    """Official VQAv2 accuracy (0 to 1) of one prediction.

    Args:
        prediction: the answer as submitted.
        answers: the annotators' records, `{"answer": str, "answer_id": int, ...}`; ten in the official files.
        always_normalise: also where all annotators agree, as lmms-eval does.
    """
    prediction = clean(prediction)
    texts = [clean(str(record["answer"])) for record in answers]
    if always_normalise or len(set(texts)) > 1:
        texts = [official_answer(text) for text in texts]
        prediction = official_answer(prediction)
    if len({record.get("answer_id") for record in answers}) == len(answers):
        return leave_one_out(prediction, texts)
    identities = [{key: value for key, value in record.items() if key != "answer"} for record in answers]
    return leave_one_out(prediction, texts, identities)


def percent(accuracies: Iterable[float]) -> float:
    """The mean in percent, two decimals, with the official order of operations (100 * sum / count)."""
    values = list(accuracies)
    return round(100 * sum(values) / len(values), 2)


def percent_of_mean(accuracies: Iterable[float]) -> float:
    """The mean in percent, two decimals, in TextVQA's order of operations (100 * (sum / count)): ties may round apart."""
    values = list(accuracies)
    return round(100 * (sum(values) / len(values)), 2)


class AccuracyBenchmark(Benchmark):
    """A benchmark whose headline is the mean of VQA accuracies: each record has its own as `accuracy`, 0 to 1, unrounded."""

    @classmethod
    def headline(cls, per_item: Sequence[Mapping[str, Any]]) -> float:
        """The official figure to the digit; the mean of `score`, which is rounded, is another one at times."""
        return percent(record["accuracy"] for record in per_item)
