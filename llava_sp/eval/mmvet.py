"""MM-Vet (Yu et al. 2023): 218 open questions that need six capabilities; a judge grades each answer from 0 to 1.

    python -m llava_sp.eval.mmvet --model M --data D --output O --judge MODEL [--judge-runs 5] [--judge-prompt FILE]
    python -m llava_sp.eval.mmvet --answers FILE --data D --judgements grade.json

D holds mm-vet.json and images/ of the official mm-vet.zip, in D itself or one folder below, and may hold LLaVA's question file
llava-mm-vet.jsonl, which is then asked (both give the same prompts: the question alone). See `llava_sp.eval.scoring.judge` for how
judges are asked and their replies kept.

O/submission.json, {"v1_0": answer, ...}, is what the official online grader takes; `--validate FILE` checks such a file, and
the grades that official code returns ({"v1_0": {"model", "content", "score"}}) are read by --judgements.

The judge completes a table of question, truth, prediction and grade, at temperature 0, with at most 3 tokens. A reply that is not a
number from 0 to 1 is asked again: at temperature 0, 0.5, 1, 1.5 and 2, five times at most; the reply to the last one is not
read (the official code does so), and the grade is 0. The score is 100 * the mean grade, averaged over the runs; `metrics`
holds the same by capability and by combination of capabilities, each run, and their standard deviation.

The table with its examples is our own, after the description of the official one, and so is the line that asks again.
`--judge-prompt FILE` takes the text of the official table (everything of `prompt` in mm-vet_evaluator.py, with its last line
break); then the first message is the official one to the letter (checked against recorded hashes). metrics.json says which was
used.

Published for LLaVA-1.5-7B: 31.1, the mean of three runs of gpt-4 of 2023. A score by another judge does not compare with it.
LLaVA's scripts of that time cropped images instead of padding them (--image-aspect-ratio crop).

Different from the official code: "nan" is asked again (there it counts, and spoils every mean); grades of an interrupted run
never count as those of a finished one; the capabilities in the name of a combination are sorted (there their order
changes from run to run).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from llava_sp.common.files import examples, parse_json, read_text, sha256, write_json
from llava_sp.common.schema import Check, expect, some
from llava_sp.decoding import Generation
from llava_sp.eval.base import LLAVA15, LLAVA15_LORA, LLAVA_SP, Category, Item, Scores
from llava_sp.eval.cli import main
from llava_sp.eval.inputs.checks import LLAVA_LINE, compare_ids, find, find_one, first_folder, inside, joined, verdict
from llava_sp.eval.scoring.judge import JudgedBenchmark, Run
from llava_sp.eval.scoring.judge_client import Request
from llava_sp.eval.scoring.records import row

OFFICIAL, LLAVAS = "mm-vet.json", "llava-mm-vet.jsonl"
CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")  # in the order of the published tables
TEMPERATURES = (0.0, 0.0, 0.5, 1.0, 1.5, 2.0)
PROMPT = """\
Grade predictions of AI models against the ground truth. Where the ground truth joins elements by <AND>, a prediction is all \
right only if it has all of them; where it joins them by <OR>, one is enough. Grades are 0.0 (all wrong), 0.1, 0.2, 0.3, 0.4, \
0.5, 0.6, 0.7, 0.8, 0.9 and 1.0 (all right). The last row of the table has no grade yet: write that grade and nothing else.

Question | Ground truth | Prediction | Grade
--- | --- | --- | ---
Which fruits are in the bowl? | pear <AND> plum | There is a banana in the bowl. | 0.0
Which fruits are in the bowl? | pear <AND> plum | A plum. | 0.5
Which fruits are in the bowl? | pear <AND> plum | a plum or a cherry | 0.5
Which fruits are in the bowl? | pear <AND> plum | I see two fruits, a plum and a pear. | 1.0
What colour is the door? | dark red <OR> maroon | maroon | 1.0
What colour is the door? | dark red <OR> maroon | It is painted pink. | 0.2
Why is the drawing funny? | The cat has put on the dog's collar so that the neighbour takes it for the dog and gives it the \
bone, while the dog looks on. | A cat is wearing a collar, and the dog watches it. | 0.4
Why is the drawing funny? | The cat has put on the dog's collar so that the neighbour takes it for the dog and gives it the \
bone, while the dog looks on. | The joke is the disguise: wearing the dog's collar, the cat is mistaken for the dog by the \
neighbour, who hands it the bone as the poor dog watches. | 1.0"""
AGAIN = "\nThe grade of the last row, a number in digits: "

QUESTION = {"imagename": str, "question": str, "answer": str, "capability": some(str)}
QUESTIONS = Check(bool, "questions by name", {str: QUESTION})
NAMES = [Check(re.compile(r"v1_\d+").fullmatch, "v1_ and a number", str)]
GRADE = Check(lambda grade: 0 <= grade <= 1, "a number from 0 to 1", float)
GRADES = {str: {"score": some(GRADE), "model": list}}


class MMVet(JudgedBenchmark):
    name = "mmvet"
    title = "MM-Vet total"
    folders = ("mm-vet",)
    generation = Generation(max_new_tokens=1024)
    published: Mapping[str, float] = {LLAVA15: 31.1, LLAVA15_LORA: 30.2, LLAVA_SP: 33.8}
    published_on = "judged by gpt-4 of 2023 (LLaVA-SP's judge is not stated)"
    prompt_text = PROMPT

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("--judge-prompt", type=Path, metavar="FILE", help="text of the official table of examples")

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> MMVet:
        benchmark = super().from_arguments(args)
        if args.judge_prompt:
            benchmark.prompt_text = read_text(args.judge_prompt)
            benchmark.wording = f"{args.judge_prompt} (sha256 {sha256(args.judge_prompt)[:12]})"
            benchmark.files.append(args.judge_prompt)
        return benchmark

    def load(self, data: Path) -> list[Item]:
        self.data = data
        file = find_one(data, OFFICIAL, what="official questions of MM-Vet")
        entries = self.read_json(file, QUESTIONS)
        expect(list(entries), NAMES, file)
        folder = self.images or first_folder([file.parent / "images", data / "images"])
        lines = {name: {"text": entry["question"], "image": entry["imagename"]} for name, entry in entries.items()}
        for llava in find(data, LLAVAS)[:1]:
            asked = self.read_jsonl(llava, {**LLAVA_LINE, "question_id": int})
            lines = joined([f"v1_{line['question_id']}" for line in asked], asked, entries, llava, "line", file)
        items = []
        for name, line in lines.items():
            entry, given = entries[name], set(entries[name]["capability"])
            capabilities = [*(c for c in CAPABILITIES if c in given), *sorted(given.difference(CAPABILITIES))]
            metadata = {"name": name, "question": entry["question"], "capabilities": capabilities}
            image = inside(folder, line["image"], f"{file}: {name}")
            items.append(Item(int(name.removeprefix("v1_")), line["text"], (image,), entry["answer"], metadata))
        return items

    def request(self, item: Item, answer: str, replies: Sequence[str]) -> Request | None:
        if len(replies) == len(TEMPERATURES) or (replies and read_grade(replies[-1]) is not None):
            return None
        truth = item.reference.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        text = f"{self.prompt_text}\n{item.metadata['question']} | {truth} | {answer} | "
        return Request((("user", text + (AGAIN if replies else "")),), TEMPERATURES[len(replies)], max_tokens=3)

    def foreign_runs(self, file: Path, items: Sequence[Item]) -> tuple[list[Run], list[str]] | None:
        """The grades of the official code: its last replies, in place of which the recorded scores stand here."""
        try:
            content = parse_json(read_text(file))
        except json.JSONDecodeError:
            return None
        if not isinstance(content, dict) or "request_sha256" in content:
            return None
        expect(content, GRADES, file)
        joined(list(content), list(content), [item.metadata["name"] for item in items], file, "judgement")
        counts = {len(entry["score"]) for entry in content.values()}
        if len(counts) > 1:
            raise ValueError(f"{file}: questions have {examples(sorted(counts))} scores each; is the run unfinished?")
        runs = [
            {item.key: [str(content[item.metadata["name"]]["score"][run])] for item in items} for run in range(*counts)
        ]
        return runs, sorted({str(model) for entry in content.values() for model in entry["model"]})

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> Scores:
        per_item = [
            row(item, answer, answer, category="_".join(item.metadata["capabilities"]))
            for item, answer in zip(items, answers)
        ]
        if self.judged is None:
            return Scores(score=None, metrics={"judge": None}, per_item=per_item)
        for record, item in zip(per_item, items):
            runs = self.replies(item)
            record["grades"] = [final_grade(replies) for replies in runs]
            record["score"] = 100 * fmean(record["grades"])
            record["judgements"] = [replies[-1] for replies in runs]
        parts: dict[str, list[list[float]]] = {}  # capability -> the grades of its questions, by run
        combinations: dict[str, list[list[float]]] = {}
        for record, item in zip(per_item, items):
            for capability in item.metadata["capabilities"]:
                parts.setdefault(capability, []).append(record["grades"])
            combinations.setdefault("_".join(sorted(item.metadata["capabilities"])), []).append(record["grades"])
        parts = {
            name: parts[name] for name in (*CAPABILITIES, *sorted(set(parts).difference(CAPABILITIES))) if name in parts
        }
        combinations = dict(sorted(combinations.items(), key=lambda found: (-len(found[1]), found[0])))
        totals = run_means([record["grades"] for record in per_item])
        metrics: dict[str, Any] = {
            "total": self.headline(per_item),
            "std": one_decimal(pstdev(totals)),
            "runs": [one_decimal(total) for total in totals],
            "capabilities": {name: one_decimal(fmean(run_means(grades))) for name, grades in parts.items()},
            "combinations": {name: one_decimal(fmean(run_means(grades))) for name, grades in combinations.items()},
            "count_per_combination": {name: len(grades) for name, grades in sorted(combinations.items())},
            "judge": self.about_judge,
        }
        categories = {name: Category(metrics["capabilities"][name], len(grades)) for name, grades in parts.items()}
        return Scores(metrics["total"], metrics, per_item, categories)

    @classmethod
    def headline(cls, per_item: Sequence[Mapping[str, Any]]) -> float:
        return one_decimal(fmean(run_means([record["grades"] for record in per_item])))

    def submission(self, items: Sequence[Item], answers: Sequence[str], output: Path) -> Path | None:
        path = output / "submission.json"
        write_json(path, {item.metadata["name"]: answer for item, answer in zip(items, answers)})
        return path

    def validate(self, file: Path, data: Path) -> str:
        entries = self.read_json(find_one(data, OFFICIAL, what="official questions of MM-Vet"), QUESTIONS)
        results = self.read_json(file, {str: str})
        return verdict(
            file, [answer.strip() for answer in results.values()], [("questions", compare_ids(results, entries))]
        )


def read_grade(reply: str) -> float | None:
    """The number before the first space if it is from 0 to 1; None for anything else ("nan", a leading space)."""
    try:
        grade = float(reply.split(" ")[0])
    except ValueError:
        return None
    return grade if 0 <= grade <= 1 else None


def final_grade(replies: Sequence[str]) -> float:
    """The grade after all attempts; 0 if the last but one could not be read either (the last one is not looked at)."""
    grade = read_grade(replies[-1]) if len(replies) < len(TEMPERATURES) else None
    return 0.0 if grade is None else grade


def run_means(grades: Sequence[Sequence[float]]) -> list[float]:
    """100 * the mean grade of each run, added up in the order of the questions as the official code does."""
    totals = [0.0] * len(grades[0])
    for of_question in grades:
        totals = [total + grade for total, grade in zip(totals, of_question)]
    return [total / len(grades) * 100 for total in totals]


def one_decimal(value: float) -> float:
    """numpy's rounding, which the official code uses: 5.55 is 5.6 there, 5.5 by Python's `round`."""
    return round(value * 10) / 10


if __name__ == "__main__":
    sys.exit(main(MMVet))
