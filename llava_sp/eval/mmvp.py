"""MMVP (Tong et al. 2024): 150 pairs of pictures that CLIP takes for alike; both questions of a pair must be answered right.

    python -m llava_sp.eval.mmvp --model M --data D --output O --judge MODEL [--grader-prompt FILE]
    python -m llava_sp.eval.mmvp --model M --data D --output O --protocol lmms_eval          (needs no judge)

D holds the official Questions.csv (columns Question, Options such as "(a) Open (b) Closed", Correct Answer) in D itself or one
folder below, and beside it the pictures 1.jpg, 2.jpg, ... in "MMVP Images" (or "MMVP Imgaes", as the official script spells
it, or images). Picture n belongs to row n; rows 1 and 2, 3 and 4, ... are pairs. The score is the percentage of pairs with
both answers right; `metrics` has the accuracy of single answers too. --answers takes the official script's answers.jsonl too.

Protocols:
    official     prompt "question options", conversation llava_v1, pictures cropped and not padded, answers drawn at
                 temperature 0.2, at most 1024 tokens; a judge is asked, at temperature 0.2, whether the answer is correct.
                 Right is the reply "yes" alone, in any case: "yes." and "yes" with a line break are wrong.
    lmms_eval    prompt with lettered options and LLaVA's request for the letter, greedy, at most 16 tokens; the letter
                 is parsed. Four labels of the official file are corrected (99, 100, 279, 280: swapped there); other data, told
                 by their number of rows or their first question, keep their labels.
    vlmevalkit   the same prompt, at most 512 tokens; exact matching of letters and option texts (`llava_sp.eval.scoring.letters`)
`llava_sp.eval.scoring.judge` tells how judges are asked and their replies kept. Without a judge `official` has no score; those of the
other protocols stand under their own names in `scored_as`.

The judge's question is our own wording; `--grader-prompt FILE` takes other words, for example those of the official
gpt_grader.py, as JSON {"system": TEXT, "user": TEXT} with {question}, {answer} and {response} where these belong (with the
official words, messages are the official ones to the letter: checked against recorded hashes). metrics.json says which was used.

The official judge, gpt-4-0314, is retired; no figure of LLaVA-1.5-7B is published under this protocol in LLaVA's tables. A last
row without its partner (--limit with an odd number) counts for no pair, and a score over no pair is 0. Quirks kept: the
parser of lmms_eval takes any "a" or "b" at the end of a word for a letter ("Shut it, Barb" is B).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from llava_sp.common.files import read_jsonl, read_text, sha256
from llava_sp.decoding import Generation
from llava_sp.eval.base import OPTION_LETTER, Item, Scores
from llava_sp.eval.cli import main
from llava_sp.eval.inputs.checks import expect, expect_all, find_one, first_folder
from llava_sp.eval.scoring.judge import JudgedBenchmark
from llava_sp.eval.scoring.judge_client import Request
from llava_sp.eval.scoring.letters import by_letter, lettered, vlmevalkit

QUESTIONS = "Questions.csv"
COLUMNS = ("Question", "Options", "Correct Answer")
FOLDERS = ("MMVP Images", "MMVP Imgaes", "images")
OFFICIAL_ROWS = 300
OFFICIAL_FIRST = "butterfly"  # what its first question is about
CORRECTED = {99: "B", 100: "A", 279: "B", 280: "A"}  # row -> label, by lmms-eval
SYSTEM = 'You check whether answers are right. Reply with "yes" or "no": one word, without a full stop.'
USER = (
    "This was asked about a picture: {question}\nThe right answer: {answer}\nThe answer that was given: {response}\n"
    "Is the answer that was given right?"
)
_MARK = re.compile(r"\(([a-z])\)", re.IGNORECASE)
_FIELD = re.compile(r"\{(question|answer|response)\}")
# lmms-eval's places for the letter, in the order in which they are tried
_PLACES = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"^\(?([ab])\)?(?:\.?$|[.\s])",  # at the beginning, alone or before a period or space
        r"answer\s+is\s+\(?([ab])",
        r"option\s+\(?([ab])",
        r"([ab])\)?(?:\s|$)",  # at the end of any word
        r"^([ab])",
    )
]


class MMVP(JudgedBenchmark):
    name = "mmvp"
    title = "MMVP pair accuracy in percent"
    folders = ("MMVP",)
    protocols = ("official", "lmms_eval", "vlmevalkit")
    generation = Generation(do_sample=True, temperature=0.2, max_new_tokens=1024)
    generations: ClassVar = {
        "lmms_eval": Generation(max_new_tokens=16),
        "vlmevalkit": Generation(max_new_tokens=512),
    }
    system, user = SYSTEM, USER

    def __init__(self, split: str | None = None, protocol: str | None = None, images: Path | None = None):
        super().__init__(split, protocol, images)
        if self.protocol == "official":
            self.conversation_template, self.image_aspect_ratio = "llava_v1", "crop"

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("--grader-prompt", type=Path, metavar="FILE", help="the judge's question in other words")

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> MMVP:
        benchmark = super().from_arguments(args)
        if args.grader_prompt:
            benchmark._read_prompt(args.grader_prompt)
        return benchmark

    def _read_prompt(self, file: Path) -> None:
        content = self.read_json(file)
        expect(content, {"system": str, "user": str}, str(file))
        missing = {"question", "answer", "response"}.difference(_FIELD.findall(content["user"]))
        if missing:
            raise ValueError(f"{file}: user has no {{{'}, {'.join(sorted(missing))}}}: {content['user'][:60]!r}")
        self.system, self.user = content["system"], content["user"]
        self.wording = f"{file} (sha256 {sha256(file)[:12]})"

    def load(self, data: Path) -> list[Item]:
        self.data = data
        file = find_one(data, QUESTIONS, what="questions of MMVP")
        folder = self.images or first_folder([file.parent / name for name in FOLDERS])
        rows = [(row.number, row) for row in self.read_table(file, ",")]
        if len(rows) % 2:
            raise ValueError(f"{file} has {len(rows)} rows, but MMVP's questions come in pairs: is the file cut off?")
        items: list[Item] = []
        for number, (line, row) in enumerate(rows, 1):
            where = f"{file}, line {line}"
            expect(row, dict.fromkeys(COLUMNS, str), where)
            question, options, answer = (row[column] for column in COLUMNS)
            official = len(rows) == OFFICIAL_ROWS and OFFICIAL_FIRST in rows[0][1]["Question"].lower()
            choices = by_letter(parse_options(options))
            if not question.strip() or len(choices) != 2:
                raise ValueError(f"{where}: {question!r} with options {options!r} is no question with (a) and (b)")
            if answer.strip().lower() not in ("(a)", "(b)"):
                raise ValueError(f"{where}: Correct Answer is {answer!r}, not (a) or (b)")
            metadata = {"options": options, "choices": choices, "pair": (number - 1) // 2}
            metadata["label"] = answer.strip()[1].upper()
            metadata["corrected"] = CORRECTED.get(number) if official else None
            items.append(Item(number, question, (folder / f"{number}.jpg",), answer, metadata))
        return items

    def prompt(self, item: Item) -> str:
        if self.protocol == "official":
            return _question(item)
        return f"{item.text}\n{lettered(item.metadata['choices'])}{OPTION_LETTER}"

    def record(self, item: Item) -> dict[str, Any]:
        return {"question_id": item.id, "prompt": self.prompt(item), "answer": item.reference}

    def read_answers(self, path: Path) -> tuple[list[dict[str, Any]], str | None]:
        """Also reads answers of the official script, which have `response` in place of `text`."""
        first = read_text(path).lstrip().split("\n")[0]
        if '"response"' not in first or '"text"' in first:
            return super().read_answers(path)
        records = read_jsonl(path)
        expect_all(records, {"question_id": int, "response": str}, path, "answer")
        return [{**record, "text": record["response"]} for record in records], None

    def request(self, item: Item, answer: str, replies: Sequence[str]) -> Request | None:
        if replies:
            return None
        values = {"question": _question(item), "answer": item.reference, "response": answer}
        user = _FIELD.sub(lambda field: values[field[1]], self.user)
        return Request((("system", self.system), ("user", user)), temperature=0.2)

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> Scores:
        per_item = [
            {
                "question_id": item.id,
                "unit": item.metadata["pair"],
                "answer": answer,
                "question": _question(item),
                "image": item.images[0].name,
                "references": [item.reference],
            }
            for item, answer in zip(items, answers)
        ]
        if self.protocol == "official" and self.judged is None:
            return Scores(score=None, metrics={"judge": None}, per_item=per_item)
        for record, item, answer in zip(per_item, items, answers):
            record |= self._verdict(item, answer)
            record["score"] = 100 * fmean(record["right"])
        metrics: dict[str, Any] = {"accuracy": round(fmean(record["score"] for record in per_item), 2)}
        metrics["runs"] = [round(value, 2) for value in pair_accuracies(per_item)]
        metrics["pairs"] = len(per_item) // 2
        if self.protocol == "official":
            metrics["judge"] = self.about_judge
        return Scores(self.headline(per_item), metrics, per_item, count=metrics["pairs"], counted="pairs")

    def _verdict(self, item: Item, answer: str) -> dict[str, Any]:
        """Whether the answer is right, in each run of the judge, and what says so."""
        if self.protocol == "official":
            replies = [run[0] for run in self.replies(item)]
            return {"right": [reply.lower() == "yes" for reply in replies], "judgements": replies}
        if self.protocol == "lmms_eval":
            letter, label = lmms_letter(answer), item.metadata["corrected"] or item.metadata["label"]
        else:
            letter, label = vlmevalkit(answer, item.metadata["choices"]), item.metadata["label"]
        return {"right": [letter == label], "answer": letter, "text": answer, "label": label}

    @classmethod
    def headline(cls, per_item: Sequence[Mapping[str, Any]]) -> float:
        return round(fmean(pair_accuracies(per_item)), 2)


def pair_accuracies(per_item: Sequence[Mapping[str, Any]]) -> list[float]:
    """Percent of pairs with both answers right, for each run; two records that stand side by side are a pair."""
    runs = range(len(per_item[0]["right"]))
    pairs = list(zip(per_item[::2], per_item[1::2]))
    if not pairs:
        return [0.0 for _ in runs]
    return [100 * fmean(a["right"][run] and b["right"][run] for a, b in pairs) for run in runs]


def parse_options(options: str) -> list[str]:
    """The texts behind "(a)", "(b)", ..."""
    return [text.strip() for text in _MARK.split(options)[2::2]]


def lmms_letter(answer: str) -> str | None:
    """The letter that lmms-eval's MMVP reads from an answer, None where it reads none."""
    answer = answer.strip()
    found = next(filter(None, (place.search(answer) for place in _PLACES)), None)
    return found[1].upper() if found else None


def _question(item: Item) -> str:
    return f"{item.text} {item.metadata['options']}"


if __name__ == "__main__":
    sys.exit(main(MMVP))
