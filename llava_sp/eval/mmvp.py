"""MMVP (Tong et al. 2024): 150 pairs of images that CLIP embeds alike; both questions of a pair must be answered right.

    python -m llava_sp.eval.mmvp --model M --data D --output O --judge MODEL [--grader-prompt FILE]
    python -m llava_sp.eval.mmvp --model M --data D --output O --protocol lmms_eval          (needs no judge)

D holds the official Questions.csv (columns Question, Options such as "(a) Open (b) Closed", Correct Answer) in D itself or one
folder below, and beside it the images 1.jpg, 2.jpg, ... in "MMVP Images" (or "MMVP Imgaes", as the official script spells
it, or images). Image n belongs to row n; rows 1 and 2, 3 and 4, ... are pairs. The score is the percentage of pairs with
both answers right; `metrics` has the accuracy of single answers too. --answers takes the official script's answers.jsonl too.

Protocols:
    official     prompt "question options", conversation template llava_v1, images cropped and not padded, answers drawn at
                 temperature 0.2, at most 1024 tokens; a judge is asked, at temperature 0.2, whether the answer is correct.
                 Right is the reply "yes" alone, in any case: "yes." and "yes" with a line break are wrong.
    lmms_eval    prompt with lettered options and LLaVA's request for the letter, greedy, at most 16 tokens; the letter
                 is parsed. Four labels of the official file are corrected (99, 100, 279, 280: swapped there); other data, with
                 another number of rows or another first question, keep their labels.
    vlmevalkit   the same prompt, at most 512 tokens; exact matching of letters and option texts (`llava_sp.eval.scoring.letters`)
See `llava_sp.eval.scoring.judge` for how judges are asked and their replies kept. Without a judge `official` has no score; those of the
other protocols stand under their own names in `scored_as`.

The judge's question is our own wording; `--grader-prompt FILE` takes other words, for example those of the official
gpt_grader.py, as JSON {"system": TEXT, "user": TEXT} with {question}, {answer} and {response} where these belong (with the
official words, messages are the official ones to the letter: checked against recorded hashes). metrics.json says which was used.

The official judge, gpt-4-0314, is retired; no figure of LLaVA-1.5-7B is published under this protocol in LLaVA's tables. A last
row without its partner (--limit with an odd number) counts for no pair, and a score over no pair is 0. Quirks kept: the
parser of lmms_eval reads any "a" or "b" at the end of a word as a letter ("Shut it, Barb" is B).
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
from llava_sp.common.schema import Check
from llava_sp.decoding import Generation
from llava_sp.eval.base import OPTION_LETTER, Item, Scores
from llava_sp.eval.cli import main
from llava_sp.eval.inputs.checks import find_one, first_folder
from llava_sp.eval.scoring.judge import JudgedBenchmark
from llava_sp.eval.scoring.judge_client import Request
from llava_sp.eval.scoring.letters import by_letter, lettered, vlmevalkit
from llava_sp.eval.scoring.records import row

QUESTIONS = "Questions.csv"
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


def parse_options(options: str) -> list[str]:
    """The texts behind "(a)", "(b)", ..."""
    return [text.strip() for text in _MARK.split(options)[2::2]]


ROW = {
    "Question": Check(str.strip, "a question", str),
    "Options": Check(lambda options: len(parse_options(options)) == 2, "two options, behind (a) and (b)", str),
    "Correct Answer": Check(lambda answer: answer.strip().lower() in ("(a)", "(b)"), "(a) or (b)", str),
}
FIELDS = ("{question}", "{answer}", "{response}")
GRADER_PROMPT = {
    "system": str,
    "user": Check(lambda user: all(field in user for field in FIELDS), f"text with {', '.join(FIELDS)}", str),
}
ANSWER = {"question_id": int, "response": str}


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
    system, user = SYSTEM, USER  # the judge's messages, or those of --grader-prompt

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
            content = benchmark.read_json(args.grader_prompt, GRADER_PROMPT)
            benchmark.system, benchmark.user = content["system"], content["user"]
            benchmark.wording = f"{args.grader_prompt} (sha256 {sha256(args.grader_prompt)[:12]})"
        return benchmark

    def load(self, data: Path) -> list[Item]:
        self.data = data
        file = find_one(data, QUESTIONS, what="questions of MMVP")
        folder = self.images or first_folder([file.parent / name for name in FOLDERS])
        rows = self.read_table(file, ",", ROW)
        if len(rows) % 2:
            raise ValueError(f"{file} has {len(rows)} rows, but MMVP's questions come in pairs: is the file cut off?")
        official = len(rows) == OFFICIAL_ROWS and OFFICIAL_FIRST in rows[0]["Question"].lower()
        items: list[Item] = []
        for number, line in enumerate(rows, 1):
            question, options, answer = line["Question"], line["Options"], line["Correct Answer"]
            metadata = {
                "asked": f"{question} {options}",
                "options": by_letter(parse_options(options)),
                "pair": (number - 1) // 2,
                "label": answer.strip()[1].upper(),
                "corrected": CORRECTED.get(number) if official else None,
            }
            items.append(Item(number, question, (folder / f"{number}.jpg",), answer, metadata))
        return items

    def prompt(self, item: Item) -> str:
        if self.protocol == "official":
            return item.metadata["asked"]
        return f"{item.text}\n{lettered(item.metadata['options'])}{OPTION_LETTER}"

    def record(self, item: Item) -> dict[str, Any]:
        return {"question_id": item.id, "prompt": self.prompt(item), "answer": item.reference}

    def read_answers(self, path: Path) -> tuple[Sequence[dict[str, Any]], str | None]:
        """Also reads answers of the official script, which have `response` in place of `text`."""
        first = read_text(path).lstrip().split("\n")[0]
        if '"response"' not in first or '"text"' in first:
            return super().read_answers(path)
        return [{**record, "text": record["response"]} for record in read_jsonl(path, ANSWER)], None

    def request(self, item: Item, answer: str, replies: Sequence[str]) -> Request | None:
        if replies:
            return None
        values = {"question": item.metadata["asked"], "answer": item.reference, "response": answer}
        user = _FIELD.sub(lambda field: values[field[1]], self.user)
        return Request((("system", self.system), ("user", user)), temperature=0.2)

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> Scores:
        per_item = [
            row(item, answer, answer, unit=item.metadata["pair"], question=item.metadata["asked"])
            for item, answer in zip(items, answers)
        ]
        if self.protocol == "official" and self.judged is None:
            return Scores(score=None, metrics={"judge": None}, per_item=per_item)
        for record, item, answer in zip(per_item, items, answers):
            if self.protocol == "official":
                replies = [run[0] for run in self.replies(item)]
                record |= {"right": [reply.lower() == "yes" for reply in replies], "judgements": replies}
            else:
                letter, label = self._letters(item, answer)
                record |= {"right": [letter == label], "answer": letter, "label": label}
            record["score"] = 100 * fmean(record["right"])
        metrics: dict[str, Any] = {"accuracy": round(fmean(record["score"] for record in per_item), 2)}
        metrics["runs"] = [round(value, 2) for value in pair_accuracies(per_item)]
        metrics["pairs"] = len(per_item) // 2
        if self.protocol == "official":
            metrics["judge"] = self.about_judge
        return Scores(self.headline(per_item), metrics, per_item, count=metrics["pairs"], counted="pairs")

    def _letters(self, item: Item, answer: str) -> tuple[str | None, str]:
        """The letter that the answer means, and the right one."""
        if self.protocol == "lmms_eval":
            return lmms_letter(answer), item.metadata["corrected"] or item.metadata["label"]
        return vlmevalkit(answer, item.metadata["options"]), item.metadata["label"]

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


def lmms_letter(answer: str) -> str | None:
    """The letter that lmms-eval's MMVP reads from an answer, None where it reads none."""
    answer = answer.strip()
    found = next(filter(None, (place.search(answer) for place in _PLACES)), None)
    return found[1].upper() if found else None


if __name__ == "__main__":
    sys.exit(main(MMVP))
