"""POPE (Li et al. 2023): is a given object in the image? Half of the answers are yes.

    python -m llava_sp.eval.pope --model M --data D --output O [--split random|popular|adversarial]

D holds the official label files coco_pope_random.json, coco_pope_popular.json and coco_pope_adversarial.json (in D, D/coco
or D/output/coco) and the images val2014/COCO_val2014_*.jpg. The absent objects were drawn at random, from the most frequent
(popular) or from those that often occur beside what is there (adversarial). LLaVA's question file llava_pope_test.jsonl,
which published numbers come from, is used if it is there; without it the same prompts are made from the label files, with
ids that run on over the categories in LLaVA's order.

The score is the mean of the three categories' F1, in percent (not accuracy, nor the F1 of all questions together): 85.9 is
published for LLaVA-1.5-7B. `--split` scores one category alone; without it all three must be there.

LLaVA's file asks 2910 random questions, those of POPE at commit e3e3926; today's label files have 3000. LLaVA's scorer pairs
answers and labels by position, unchecked (its random F1 then falls from 0.87 to 0.46). Here image and text of each question
are compared with the label file ("a" equals "an", which POPE corrected), and so is the `prompt` of an answers file. Labels
in another order, or of questions not asked, are found by image and text (metrics.json counts labels not asked for); a
question without a label, or with two different ones, is an error.

Protocols, all with the same prompts and greedy generation of up to 128 tokens:
    llava15     LLaVA's and POPE's own scorer. "no" if the text up to the first period, without commas, has a word "No", "no"
                or "not", split at single spaces; anything else is "yes": "NO", "no!" and an empty answer too
    lmms_eval   the text in lower case must be "yes" or "no" alone; anything else is wrong, and recall leaves it out.
                Score: F1 of all questions together. Its yes ratio is that of the labels
    vlmevalkit  one of the words "yes" and "no" without the other, in any case; anything else is wrong and counts as not yes.
                Score: F1 of all questions together

Where a denominator is zero (no answer or no label is yes) precision, recall and F1 are 0; the official scorer stops with
ZeroDivisionError.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from llava_sp.common.files import counted
from llava_sp.common.schema import Check, one_of
from llava_sp.eval.base import LLAVA15, LLAVA15_LORA, LLAVA_SP, SHORT_ANSWER, Benchmark, Category, Item, Scores
from llava_sp.eval.cli import main
from llava_sp.eval.inputs.checks import LLAVA_LINE, by_id, find, find_one, first_folder, inside
from llava_sp.eval.scoring import yes_no
from llava_sp.eval.scoring.records import grouped, row

CATEGORIES = ("random", "popular", "adversarial")  # in the order of the paper's tables
LLAVA_ORDER = ("adversarial", "popular", "random")  # in the order of LLaVA's question file
QUESTIONS = "llava_pope_test.jsonl"
QUESTION = {**LLAVA_LINE, "category": one_of(*CATEGORIES)}
RULES = {"llava15": yes_no.llava_pope, "lmms_eval": yes_no.lmms_pope, "vlmevalkit": yes_no.vlmevalkit}
LABEL = {**LLAVA_LINE, "label": Check(lambda label: label.strip().lower() in ("yes", "no"), "yes or no", str)}

Row = dict[str, Any]


class POPE(Benchmark):
    name = "pope"
    title = "POPE F1 in percent, mean over the categories"
    splits = CATEGORIES
    protocols = tuple(RULES)
    published: Mapping[str, float] = {LLAVA15: 85.9, LLAVA15_LORA: 86.4, LLAVA_SP: 86.6}
    not_asked: Mapping[str, int] = {}  # set by load: labels that belong to no question, by category

    def load(self, data: Path) -> list[Item]:
        wanted = [category for category in LLAVA_ORDER if self.split in (None, category)]
        files: dict[str, Path] = {}
        labels: dict[str, list[Row]] = {}
        for category in wanted:
            name, what = f"coco_pope_{category}.json", f"{category} labels (--split scores one category alone)"
            file = files[category] = find_one(data, name, f"output/coco/{name}", what=what)
            lines = by_id(self.read_jsonl(file, LABEL), file).values()
            labels[category] = [line | {"category": category, "label": line["label"].strip().lower()} for line in lines]
        asked = [line for category in wanted for line in labels[category]]
        if self.split is None:
            asked = [line | {"question_id": i} for i, line in enumerate(asked, 1)]
        for source in find(data, QUESTIONS)[:1]:
            lines = by_id(self.read_jsonl(source, QUESTION), source).values()
            asked = [line for line in lines if line["category"] in wanted]
            for category, file in files.items():
                _add_labels([x for x in asked if x["category"] == category], labels[category], source, file)
        counts = Counter(line["category"] for line in asked)
        self.not_asked = {c: len(labels[c]) - counts[c] for c in wanted if len(labels[c]) > counts[c]}
        folder = self.images or first_folder([data / "val2014", data / "images" / "val2014", data / "images"])
        items = []
        for line in asked:
            text = line["text"].removesuffix(SHORT_ANSWER)
            image = inside(folder, line["image"], f"{line['category']} question {line['question_id']}")
            about = {"question": text.strip(), "category": line["category"]}
            items.append(Item(line["question_id"], text, (image,), line["label"], about))
        return items

    def prompt(self, item: Item) -> str:
        return item.text + SHORT_ANSWER

    def question(self, item: Item) -> str:
        return _wording(item.text)

    def match(self, items: Sequence[Item], records: Sequence[dict[str, Any]]) -> list[str]:
        worded = [{**r, "prompt": _wording(r["prompt"])} if isinstance(r.get("prompt"), str) else r for r in records]
        return super().match(items, worded)

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> Scores:
        per_item = []
        for item, text in zip(items, answers):
            prediction = RULES[self.protocol](text)
            about = {"category": item.metadata["category"], "label": item.reference, "prediction": prediction}
            right = 100.0 * (prediction == item.reference)
            per_item.append(row(item, prediction, text, right, **about, protocol=self.protocol))
        figures = {name: _figures(records) for name, records in grouped(per_item, "category", CATEGORIES).items()}
        metrics = {**figures, "overall": _figures(per_item), "labels_not_asked": self.not_asked}
        categories = {name: Category(round(100 * f["f1"], 2), f["count"]) for name, f in figures.items()}
        return Scores(self.headline(per_item), metrics, per_item, categories)

    @classmethod
    def headline(cls, per_item: Sequence[Mapping[str, Any]]) -> float:
        """The mean of the categories' F1 in percent; for other protocols than LLaVA's the F1 of all records."""
        by_category = grouped(per_item, "category", CATEGORIES).values()
        groups = by_category if per_item[0]["protocol"] == "llava15" else [per_item]
        return round(100 * fmean(_figures(records)["f1"] for records in groups), 2)

    def summary(self, scores: Scores) -> list[str]:
        unasked = scores.metrics["labels_not_asked"].items()
        return super().summary(scores) + [
            f"{counted(n, 'label')} of {category} without a question" for category, n in unasked
        ]


def _figures(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    pairs = [(record["label"], record["prediction"]) for record in records]
    found = yes_no.figures(pairs, unknown_is_no=records[0]["protocol"] == "vlmevalkit")
    if records[0]["protocol"] == "lmms_eval":
        found["yes_ratio"] = sum(label == "yes" for label, _ in pairs) / len(pairs)
    return found


def _add_labels(asked: Sequence[Row], labels: Sequence[Row], file: Path, label_file: Path) -> None:
    """By position if both files have the same questions in the same order, else by image and text."""
    same = [_identity(line) for line in asked] == [_identity(line) for line in labels]
    known: dict[object, set[str]] = defaultdict(set)
    for place, line in enumerate(labels):
        known[_identity(line), place if same else None].add(line["label"])
    found = [known[_identity(line), place if same else None] for place, line in enumerate(asked)]
    unclear = [line for line, labels_of_line in zip(asked, found) if len(labels_of_line) != 1]
    if unclear or not asked:
        shown = [f", such as {x['question_id']}: {_wording(x['text'])!r} about {x['image']}" for x in unclear[:1]]
        raise ValueError(
            f"{file} does not fit {label_file}: of {len(asked)} questions, {len(unclear)} have no label or two different ones "
            f"among {len(labels)}{''.join(shown)}. It fits the label files of POPE at commit e3e3926 (2910 random questions; "
            f"today's have 3000): get those, or remove {file.name} to ask the questions of the label files"
        )
    for line, [label] in zip(asked, found):
        line["label"] = label


def _wording(text: str) -> str:
    """The question as it is compared: POPE first asked for "a apple", later for "an apple"."""
    return text.removesuffix(SHORT_ANSWER).strip().replace(" an ", " a ")


def _identity(line: Row) -> tuple[str, str]:
    return line["image"], _wording(line["text"])


if __name__ == "__main__":
    sys.exit(main(POPE))
