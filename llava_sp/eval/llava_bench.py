"""LLaVA-Bench (in the wild) (Liu et al. 2023): 60 open questions on 24 images; a judge rates each answer beside GPT-4's.

    python -m llava_sp.eval.llava_bench --model M --data D --output O --judge MODEL [--judge-runs 3] [--rules rule.json]
    python -m llava_sp.eval.llava_bench --answers FILE --data D --judgements review.jsonl [more reviews ...]

D holds LLaVA's files, in D itself or one folder below: questions.jsonl, context.jsonl (captions of each image, which the
judge reads in place of it), answers_gpt4.jsonl (the reference answers), and images/. The prompt is the question alone.
`llava_sp.eval.scoring.judge` describes how judges are asked and their replies kept.

The judge gets context, question, both answers and a rule, at temperature 0.2, and is to begin its reply with two scores
from 1 to 10, the reference's first. The score is relative: 100 * mean of the model's / mean of the reference's. Beside it
stand, as LLaVA prints them, 10 * both means, for all questions and by category (conv, detail, complex).

The rule is our own wording of what LLaVA's asks for, and so is the system message. `--rules FILE` takes LLaVA's rule.json
(llava/eval/table) instead; then the user message is LLaVA's to the letter (checked against recorded hashes). An entry
{"system": {"prompt": TEXT}} that is added to the file replaces the system message. metrics.json says which was used.

Protocols, which differ in how replies are read and added up:
    llava15      the first line must be two numbers with one space or comma between them; means rounded to 3 decimals first
    lmms_eval    the first two numbers anywhere in the first line; answers of up to 4096 tokens (the others: 1024)
    vlmevalkit   reads as llava15, divides unrounded means
Several runs (--judge-runs, or several files of --judgements) are averaged.

Published: 65.4 for LLaVA-1.5-7B is the mean of three runs of gpt-4-0314 (64.7, 65.3, 66.3), which is retired: a score by
another judge does not compare with it. LLaVA's scripts of that time cropped images instead of padding (--image-aspect-ratio crop).

Kept on purpose: a reply that cannot be read ("8, 7", a trailing space, "8/10 7/10") counts as -1 for both sides, and numbers
are read as Python does ("8_0" is 80); `metrics` counts such replies, and ratings outside 1 to 10. Different from LLaVA: where
no reply can be read the score is 0, not the 100 of -1 / -1; "nan" and "inf" cannot be read; files are joined by question
id, not by line. LLaVA's own review files are joined by id too, but hold neither the judge's name nor the answer: nothing can
tell whether they belong to this answers file.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from llava_sp.common.files import read_jsonl, read_text, sha256
from llava_sp.common.schema import one_of
from llava_sp.decoding import Generation
from llava_sp.eval.base import LLAVA15, LLAVA15_LORA, LLAVA_SP, Category, Item, Scores
from llava_sp.eval.cli import main
from llava_sp.eval.inputs.checks import ID, LLAVA_LINE, by_id, find_one, first_folder, inside, joined
from llava_sp.eval.scoring.judge import JudgedBenchmark, Run
from llava_sp.eval.scoring.judge_client import Request
from llava_sp.eval.scoring.records import grouped, row

CATEGORIES = ("conv", "detail", "complex")
COLUMNS = ("relative", "reference_x10", "model_x10")
UNREAD = (-1.0, -1.0)  # what LLaVA counts for a reply without two scores
ROLE = "Assistant"
SYSTEM = "You check the quality of answers, carefully and to the point."
RULE = (
    "Two AI assistants have answered the question above, which a user asked about a picture. You do not see the picture; "
    "the context describes it.\n"
    "Judge how helpful, relevant, accurate and detailed each answer is, and give each an overall score from 1 (worst) to "
    "10 (best). Which answer stands first must make no difference.\n"
    "Write nothing but the two scores on the first line, that of Assistant 1 before that of Assistant 2, with one space "
    "between them. From the second line on, explain your scores."
)
QUESTION = {**LLAVA_LINE, "category": one_of(*CATEGORIES)}
CAPTION = {"image": str, "caption": (str, [str])}
ANSWER = {"question_id": ID, "text": str}
RULES = {f"llava_bench_{category}": {"role": str, "prompt": str} for category in CATEGORIES} | {
    "system?": {"prompt": str}
}
REVIEW = {"question_id": ID, "content": str}
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")

Pair = tuple[float, float]


class LLaVABench(JudgedBenchmark):
    name = "llava_bench"
    title = "LLaVA-Bench (in the wild) relative score"
    folders = ("llava-bench-in-the-wild",)
    protocols = ("llava15", "lmms_eval", "vlmevalkit")
    generation = Generation(max_new_tokens=1024)
    generations: ClassVar = {"lmms_eval": Generation(max_new_tokens=4096)}
    published: Mapping[str, float] = {LLAVA15: 65.4, LLAVA15_LORA: 67.9, LLAVA_SP: 61.7}
    published_on = "judged by gpt-4-0314 (retired; LLaVA-SP's judge is not stated)"
    rules: Mapping[str, tuple[str, str]] | None = None  # category -> role and rule, of --rules
    system = SYSTEM

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("--rules", type=Path, help="LLaVA's llava/eval/table/rule.json, for its own wording")

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> LLaVABench:
        benchmark = super().from_arguments(args)
        if args.rules:
            content = benchmark.read_json(args.rules, RULES)
            entries = {category: content[f"llava_bench_{category}"] for category in CATEGORIES}
            benchmark.rules = {category: (entry["role"], entry["prompt"]) for category, entry in entries.items()}
            benchmark.system = content.get("system", {"prompt": SYSTEM})["prompt"]
            benchmark.wording = f"{args.rules} (sha256 {sha256(args.rules)[:12]})"
        return benchmark

    def load(self, data: Path) -> list[Item]:
        self.data = data
        file = find_one(data, "questions.jsonl", what="questions of LLaVA-Bench")
        questions = by_id(self.read_jsonl(file, QUESTION), file)
        captions_file = find_one(data, "context.jsonl", what="descriptions of LLaVA-Bench's images")
        captions = by_id(self.read_jsonl(captions_file, CAPTION), captions_file, "image")
        answers_file = find_one(data, "answers_gpt4.jsonl", what="answers of GPT-4")
        answers = self.read_jsonl(answers_file, ANSWER)
        references = joined([answer["question_id"] for answer in answers], answers, questions, answers_file)
        folder = self.images or first_folder([file.parent / "images", data / "images"])
        items = []
        for i, question in questions.items():
            where = f"{file}: question {i}"
            if question["image"] not in captions:
                raise ValueError(f"{where}: {captions_file.name} has no caption of {question['image']}")
            caption = captions[question["image"]]["caption"]
            context = caption if isinstance(caption, str) else "\n".join(caption)
            image = inside(folder, question["image"], where)
            metadata = {"category": question["category"], "context": context}
            items.append(Item(i, question["text"], (image,), references[i]["text"], metadata))
        return items

    def request(self, item: Item, answer: str, replies: Sequence[str]) -> Request | None:
        if replies:
            return None
        role, rule = self.rules[item.metadata["category"]] if self.rules else (ROLE, RULE)
        blocks = [
            f"[Context]\n{item.metadata['context']}",
            f"[Question]\n{item.text}",
            f"[{role} 1]\n{item.reference}",
            f"[End of {role} 1]",
            f"[{role} 2]\n{answer}",
            f"[End of {role} 2]",
            f"[System]\n{rule}",
        ]
        user = "".join(f"{block}\n\n" for block in blocks)
        return Request((("system", self.system), ("user", user)), temperature=0.2, max_tokens=1024)

    def foreign_runs(self, file: Path, items: Sequence[Item]) -> tuple[list[Run], list[str]] | None:
        """LLaVA's review file: one line per question, `content` is the reply."""
        if '"request_sha256"' in (text := read_text(file)) or '"content"' not in text:
            return None
        records = read_jsonl(file, REVIEW)
        contents = [record["content"] for record in records]
        ids = [record["question_id"] for record in records]
        replies = joined(ids, contents, [item.id for item in items], file, "judgement")
        return [{item.key: [replies[item.id]] for item in items}], []

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> Scores:
        per_item = [
            row(item, answer, answer, category=item.metadata["category"], protocol=self.protocol)
            for item, answer in zip(items, answers)
        ]
        if self.judged is None:
            return Scores(score=None, metrics={"judge": None}, per_item=per_item)
        read = read_anywhere if self.protocol == "lmms_eval" else read_strictly
        for record, item in zip(per_item, items):
            replies = [run[0] for run in self.replies(item)]
            record["ratings"] = [read(reply) for reply in replies]  # of the reference and of the model, by run
            record["score"] = 10 * fmean(min(10.0, max(0.0, model)) for _, model in record["ratings"])
            record["judgements"] = replies
        by_category = grouped(per_item, "category", CATEGORIES)
        figures = {"all": _figures(per_item)} | {name: _figures(group) for name, group in by_category.items()}
        ratings = [rating for record in per_item for rating in record["ratings"]]
        read_ratings = [rating for rating in ratings if rating != UNREAD]
        metrics: dict[str, Any] = {
            **{name: dict(zip(COLUMNS, _means(runs, self.protocol))) for name, runs in figures.items()},
            "runs": [run[0] for run in figures["all"]],
            "unread_replies": len(ratings) - len(read_ratings),
            "ratings_outside_1_to_10": sum(not all(1 <= value <= 10 for value in rating) for rating in read_ratings),
            "judge": self.about_judge,
        }
        found = {name: Category(metrics[name]["relative"], len(records)) for name, records in by_category.items()}
        return Scores(metrics["all"]["relative"], metrics, per_item, found)

    @classmethod
    def headline(cls, per_item: Sequence[Mapping[str, Any]]) -> float:
        return _means(_figures(per_item), per_item[0]["protocol"])[0]

    def summary(self, scores: Scores) -> list[str]:
        lines = super().summary(scores)
        unread = scores.metrics.get("unread_replies")
        return [*lines, f"{unread} replies could not be read; they count as -1 for both"] if unread else lines


def _figures(records: Sequence[Mapping[str, Any]]) -> list[tuple[float, float, float]]:
    """`relative` of each run."""
    rounded = records[0]["protocol"] != "vlmevalkit"
    return [relative(ratings, rounded) for ratings in zip(*(record["ratings"] for record in records))]


def _means(runs: Sequence[Sequence[float]], protocol: str) -> list[float]:
    """The mean over the runs of each figure."""
    digits = 2 if protocol == "vlmevalkit" else 1
    return [round(fmean(figures), digits) for figures in zip(*runs)]


def read_strictly(reply: str) -> Pair:
    """LLaVA's reading: the first line is two numbers with exactly one space or comma between them."""
    parts = reply.split("\n")[0].replace(",", " ").split(" ")
    if len(parts) != 2:
        return UNREAD
    try:
        pair = float(parts[0]), float(parts[1])
    except ValueError:
        return UNREAD
    return pair if all(map(math.isfinite, pair)) else UNREAD


def read_anywhere(reply: str) -> Pair:
    """lmms-eval's reading: the first two numbers of the first line that is not empty."""
    numbers = _NUMBER.findall(reply.strip().split("\n")[0])
    return (float(numbers[0]), float(numbers[1])) if len(numbers) >= 2 else UNREAD


def relative(ratings: Sequence[Pair], rounded: bool = True) -> tuple[float, float, float]:
    """The relative score of a run, 10 * the reference's mean and 10 * the model's: with one decimal, from means of three,
    or with two, from unrounded means.

    Replies that could not be read are in the means. The relative score is 0 where the reference's mean is not positive.
    """
    reference, model = (fmean(rating[side] for rating in ratings) for side in (0, 1))
    if rounded:
        reference, model = round(reference, 3), round(model, 3)
    share = model / reference * 100 if reference > 0 else 0.0
    digits = 1 if rounded else 2
    return round(share, digits), round(reference * 10, digits), round(model * 10, digits)


if __name__ == "__main__":
    sys.exit(main(LLaVABench))
