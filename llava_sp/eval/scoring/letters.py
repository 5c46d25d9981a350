"""The option letter that a free answer to a multiple-choice question means, by the rules of several scorers.

Every function takes the answer and gives a letter, or None where the rule finds none; each is named for its rule:

    llava_scienceqa    LLaVA's scorer of ScienceQA: the letter alone, "A. ..." or one "The answer is A."
    vlmevalkit         exact matching of VLMEvalKit, as it is today and as it was in v0.2
    lmms_mmbench       what lmms-eval's MMBench (static) infers: letters among words, option texts, then phrases
    lmms_qbench        what lmms-eval's Q-Bench (and MMMU) parses
    lmms_scienceqa     lmms-eval's ScienceQA: the letter in either case, or anything that begins with "A."
    lmms_seedbench     lmms-eval's SEED-Bench: the first character, in either case

Written from a description of the behaviour of these scorers. Published numbers rest on their quirks ("A tall man" means
option A to some of them), so the quirks are kept and named; use no rule for anything but comparing with such numbers.

`options` is the mapping of the question's own letters to their texts, in order: {"A": "red", "B": "green"}.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
REFUSED = "Z"  # VLMEvalKit's answer for a refusal: a wrong answer, where None would be one that nobody could infer

_THE_ANSWER_IS = re.compile(r"The answer is ([A-Z]).")
_ANSWER_IS = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([A-D])\**", re.IGNORECASE)
_NOT_ANSWERED = "Failed to obtain answer via API"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_TO_SPACES = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_LAST_WORDS = 4  # where VLMEvalKit expects the letter
_FORMS = ("X", "X.", "X,", "X:", "X)", "X).", "(X)", "(X).", ":X", ":X,", ":X.", ":X)", ":X).")
# what lmms-eval's MMBench allows around a letter, in the order in which it tries them
_AROUND = tuple(form.split("X") for form in _FORMS)
_MARKS = (",", ".", "!", "?", ";", ":", "'")
_MARKS_AND_QUOTES = (*_MARKS, '"')
_LMMS_LETTERS = "ABCDE"  # of MMBench, whether or not the question has five options
_BEFORE_THE_LETTER = (
    *(f"{the}{best}answer is" for the in ("the ", "") for best in ("", "correct ", "best ")),
    *(f"{the}{best} option is" for the in ("the ", "") for best in ("correct", "best")),
    *(f"{the}{best}choice is" for the in ("the ", "") for best in ("", "correct ")),
    *("i choose", "i select", "i pick", "my answer is", "my choice is"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)


def by_letter(options: Iterable[str]) -> dict[str, str]:
    """{"A": the first option, "B": the second, ...}"""
    return dict(zip(LETTERS, options))


def lettered(options: Mapping[str, str]) -> str:
    """The options as all prompts list them: "A. red", one per line."""
    return "\n".join(f"{letter}. {text}" for letter, text in options.items())


def not_in(text: str, parts: Iterable[str]) -> str | None:
    """The first of `parts` that `text` does not hold, whatever the spaces; None if it holds all."""
    text = " ".join(text.split())
    return next((part for part in parts if " ".join(part.split()) not in text), None)


def llava_scienceqa(answer: str) -> str | None:
    """One of A to E: the whole answer, or before ". ", or the only match of "The answer is X" and one more character.

    Quirks: "A." and "The answer is A" mean nothing, "The answer is Because" means B, lower case never counts.
    """
    if answer in tuple("ABCDE"):
        return answer
    if len(answer) >= 3 and answer[0] in "ABCDE" and answer[1:3] == ". ":
        return answer[0]
    found = _THE_ANSWER_IS.findall(answer)
    return found[0] if len(found) == 1 else None


def vlmevalkit(answer: str, options: Mapping[str, str], *, version: str = "head") -> str | None:
    """A letter of the question, `REFUSED`, or None.

    The letter that stands alone among the words (13 marks count as spaces), if no other letter does; otherwise the only
    option whose text is part of the answer, in any case. Today's version ("head") wants the letter among the last four
    words, then looks for "answer is X", and passes over answers of more than twice the length of all options together;
    "v0.2" does none of that.

    Quirks: the word "A" is an option; full-width marks are no marks; option texts match within words.
    """
    letter = _vlmevalkit_letter(answer, options, version)
    if letter is None and answer.find(_NOT_ANSWERED) < 0 and version == "head":
        found = _ANSWER_IS.search(answer)
        letter = found[1].upper() if found and found[1].upper() in options else None
    if letter is None and (version == "v0.2" or len(answer.lower()) <= 2 * sum(map(len, options.values()))):
        letter = _only_text(answer, options)
    return letter


def _vlmevalkit_letter(answer: str, options: Mapping[str, str], version: str) -> str | None:
    if _NOT_ANSWERED in answer:
        return None
    if any(refusal in answer for refusal in _REFUSALS):
        return REFUSED
    words = answer.translate(_TO_SPACES).split()
    found = [letter for letter in options if letter in words]
    if not found and REFUSED in words:
        return REFUSED
    if len(found) != 1 or (version == "head" and words.index(found[0]) < len(words) - _LAST_WORDS):
        return None
    return found[0]


def _only_text(answer: str, options: Mapping[str, str]) -> str | None:
    """The only option whose text is part of the answer, in any case."""
    found = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return found[0] if len(found) == 1 else None


def lmms_mmbench_prefetch(answer: str, options: Mapping[str, str]) -> str | None:
    """The one letter from A to E among the words, bare or with usual marks around it; else the only option text.

    Quirks: E counts where there is no E; a bare letter does not count where "A" is one of more than three words.
    """
    words = answer.split()
    if _NOT_ANSWERED not in answer:
        for before, after in _AROUND:
            found = [letter for letter in _LMMS_LETTERS if before + letter + after in words]
            article = not before + after and "A" in words and len(words) > 3
            if len(found) == 1 and not article:
                return found[0]
    return _only_text(answer, options)


def lmms_mmbench(answer: str, options: Mapping[str, str]) -> str | None:
    """`lmms_mmbench_prefetch`; else the letter in the most telling place, the last one of these: at the beginning, at
    the end, behind "the answer is" and the like, then before or between marks, then anywhere, even within a word."""
    letter = lmms_mmbench_prefetch(answer, options)
    if letter is not None:
        return letter
    text = f" {_strip_one_by_one(answer.strip(), _MARKS_AND_QUOTES)} "
    bare = text.strip()
    starts = [x for x in options if bare.startswith(x) and not bare[1:2].isalpha()]
    ends = [x for x in options if bare.endswith(x) and not bare[-2:-1].isalpha()]
    if starts or ends:
        return (starts or ends)[0]
    lower = text.lower()
    behind = [lower.find(phrase) + len(phrase) for phrase in _BEFORE_THE_LETTER if phrase in lower]
    places = {x: max((text.find(x, start) for start in behind), default=-1) for x in options}
    for form in ("({})", "{}.", "{}:", "{})", "{} ", "{}"):
        if max(places.values(), default=-1) >= 0:
            break
        places = {x: text.rfind(form.format(x)) for x in options}
    return max(places, key=lambda letter: places[letter]) if max(places.values(), default=-1) >= 0 else None


def lmms_qbench(answer: str, options: Mapping[str, str]) -> str | None:
    """Letters in brackets, else before a space, else before a period; in answers of more than five words, else option
    texts; of several the last one.

    Quirks: lower case, a letter before a line break and a short answer in words mean nothing. Where lmms-eval then
    draws an option at random, this is None.
    """
    text = f" {_strip_one_by_one(answer, _MARKS)} "
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = [letter for letter in options if form.format(letter) in text]
        if found:
            return max(found, key=lambda letter: text.rfind(place.format(letter)))
    if len(text.split()) <= 5:
        return None
    lower = text.lower()
    found = [letter for letter in options if options[letter].lower() in lower]
    return max(found, key=lambda letter: lower.rfind(options[letter].lower())) if found else None


def lmms_scienceqa(answer: str) -> str | None:
    """The letter alone, in either case, or a capital before a period. Quirk: "The answer is A." means nothing."""
    answer = answer.strip()
    if len(answer) == 1:
        return answer.upper()
    return answer[0] if len(answer) >= 2 and answer[0].isupper() and answer[1] == "." else None


def lmms_seedbench(answer: str) -> str | None:
    """The first character, as a capital. Quirk: "Because" means B, "(B)" nothing."""
    return answer.strip()[:1].upper() or None


def _strip_one_by_one(text: str, marks: Sequence[str]) -> str:
    """Strips the first mark from both ends, then the second, ...: "A,." keeps its comma."""
    for mark in marks:
        text = text.strip(mark)
    return text
