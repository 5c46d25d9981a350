"""POPE (Li et al. 2023): is there such an object in the image? Half of the answers are yes.

    python -m llava_sp.eval.pope --model M --data D --output O [--split random|popular|adversarial]

D holds the official label files coco_pope_random.json, coco_pope_popular.json and coco_pope_adversarial.json (in D, in
D/coco or in D/output/coco) and the images val2014/COCO_val2014_*.jpg. LLaVA's question file llava_pope_test.jsonl is used
if it is there, as published numbers come from it; without it the same prompts are made from the label files, with ids that
run on over the categories in LLaVA's order. The absent objects were drawn at random, from the most frequent ones (popular)
or from those that often occur beside what is there (adversarial).

The score is the mean of the three categories' F1, in percent: 85.9 is published for LLaVA-1.5-7B. It is neither accuracy nor
the F1 of all questions together. `--split` scores one category alone; without it all three must be there.

2910 or 3000: LLaVA's file asks 2910 random questions, those of POPE at commit e3e3926; POPE's label files of today have 3000.
LLaVA's scorer pairs answers and labels by position without a check (its random F1 then falls from 0.87 to 0.46). Here image
and text of every question are compared with the label file first ("a" and "an" are the same: POPE corrected that). Labels in
another order, or of questions that LLaVA does not ask, are found by image and text (metrics.json counts labels not asked for);
a question without a label, or with two different ones, is an error. The `prompt` of an answers file is compared too.

Protocols, all with the same prompts and greedy generation of up to 128 tokens; each judges the text differently
    llava15     LLaVA's and POPE's own scorer. "no" if the text up to the first period, without commas, has a word "No", "no"
                or "not", with single spaces between words; anything else is "yes", and so are "NO", "no!" and an empty answer
    lmms_eval   the text in lower case must be "yes" or "no", with nothing around it; anything else is wrong, and recall does
                not count it. Score: F1 of all questions together. Its yes ratio is that of the labels
    vlmevalkit  one of the words "yes" and "no" without the other, in any case; anything else is wrong and counts as not yes.
                Score: F1 of all questions together

Where a denominator is zero (no answer is yes, no label is yes) precision, recall and F1 are 0 (the official scorer stops with
ZeroDivisionError).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

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
LABEL = {**LLAVA_LINE, "label": Check(lambda label: label.strip().lower() in ("yes", "no"), "yes or no", str)}

Row = dict[str, Any]


class POPE(Benchmark):
    name = "pope"
    title = "POPE F1 in percent, mean over the categories"
    splits = CATEGORIES
    protocols = ("llava15", "lmms_eval", "vlmevalkit")
    published: ClassVar = {LLAVA15: 85.9, LLAVA15_LORA: 86.4, LLAVA_SP: 86.6}
    not_asked: Mapping[str, int] = {}  # set by load: labels that belong to no question, by category

    def load(self, data: Path) -> list[Item]:
        wanted = [category for category in LLAVA_ORDER if self.split in (None, category)]
        files: dict[str, Path] = {}
        for category in wanted:
            name = f"coco_pope_{category}.json"
            what = f"{category} labels (--split scores one category alone)"
            files[category] = find_one(data, name, f"output/coco/{name}", what=what)
        labels: dict[str, list[Row]] = {}
        for category, file in files.items():
            lines = by_id(self.read_jsonl(file, LABEL), file).values()
            labels[category] = [line | {"category": category, "label": line["label"].strip().lower()} for line in lines]
        asked = [line for category in wanted for line in labels[category]]
        if self.split is None:
            asked = [line | {"question_id": i} for i, line in enumerate(asked, 1)]
        for source in find(data, QUESTIONS)[:1]:
            lines = by_id(self.read_jsonl(source, QUESTION), source).values()
            found: dict[Any, str] = {}
            for category in wanted:
                of_category = [line for line in lines if line["category"] == category]
                found |= _labels_of(of_category, labels[category], source, files[category])
            asked = [line | {"label": found[line["question_id"]]} for line in lines if line["category"] in wanted]
        counts = Counter(line["category"] for line in asked)
        self.not_asked = {c: len(labels[c]) - counts[c] for c in wanted if len(labels[c]) > counts[c]}
        folder = self.images or first_folder([data / "val2014", data / "images" / "val2014", data / "images"])
        items = []
        for line in asked:
            about = {"question": _plain(line["text"]), "category": line["category"]}
            image = inside(folder, line["image"], f"{line['category']} question {line['question_id']}")
            text = line["text"].removesuffix(SHORT_ANSWER)
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
        judge = {"llava15": llava_label, "lmms_eval": lmms_label, "vlmevalkit": yes_no.vlmevalkit}[self.protocol]
        per_item = []
        for item, text in zip(items, answers):
            prediction = judge(text)
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
        groups = (
            grouped(per_item, "category", CATEGORIES).values() if per_item[0]["protocol"] == "llava15" else [per_item]
        )
        return round(100 * fmean(_figures(records)["f1"] for records in groups), 2)

    def summary(self, scores: Scores) -> list[str]:
        unasked = scores.metrics["labels_not_asked"].items()
        return super().summary(scores) + [f"{n} labels of {category} belong to no question" for category, n in unasked]


def llava_label(answer: str) -> str:
    """LLaVA's rule (POPE's own is the same), quirks included: see the module's docstring."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def lmms_label(answer: str) -> str:
    text = answer.lower().strip()
    return text if text in ("yes", "no") else yes_no.UNKNOWN


def _figures(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Accuracy, precision, recall, F1 and yes ratio (fractions), and what they were counted from."""
    protocol = records[0]["protocol"]
    pairs = Counter((record["label"], record["prediction"]) for record in records)
    true_yes, false_yes, true_no = pairs["yes", "yes"], pairs["no", "yes"], pairs["no", "no"]
    false_no = pairs["yes", "no"] + (pairs["yes", yes_no.UNKNOWN] if protocol == "vlmevalkit" else 0)
    precision = _ratio(true_yes, true_yes + false_yes)
    recall = _ratio(true_yes, true_yes + false_no)
    said_yes = sum(n for (label, said), n in pairs.items() if (label if protocol == "lmms_eval" else said) == "yes")
    return {
        "accuracy": (true_yes + true_no) / len(records),
        "precision": precision,
        "recall": recall,
        "f1": _ratio(2 * precision * recall, precision + recall),
        "yes_ratio": said_yes / len(records),
        **{"TP": true_yes, "FP": false_yes, "TN": true_no, "FN": false_no},
        "unknown": pairs["yes", yes_no.UNKNOWN] + pairs["no", yes_no.UNKNOWN],
        "count": len(records),
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _labels_of(asked: Sequence[Row], labelled: Sequence[Row], file: Path, label_file: Path) -> dict[Any, str]:
    """question_id -> label, by position if both files have the same questions in the same order, else by image and text."""
    ids, same = [line["question_id"] for line in asked], [_identity(line) for line in asked]
    if asked and same == [_identity(line) for line in labelled]:
        return dict(zip(ids, (line["label"] for line in labelled)))
    known: dict[tuple[str, str], set[str]] = {}
    for line in labelled:
        known.setdefault(_identity(line), set()).add(line["label"])
    unclear = [line for line in asked if len(known.get(_identity(line), ())) != 1]
    if unclear or not asked:
        first = (
            f", such as {unclear[0]['question_id']}: {_plain(unclear[0]['text'])!r} about {unclear[0]['image']}"
            if unclear
            else ""
        )
        raise ValueError(
            f"{file} does not fit {label_file}: of {len(asked)} questions, {len(unclear)} have no label or two different ones "
            f"among {len(labelled)}{first}. LLaVA's file fits the label files of POPE at commit e3e3926 (2910 random questions; "
            f"today's have 3000): get those, or remove {file.name} to ask the questions of the label files"
        )
    return {i: next(iter(known[key])) for i, key in zip(ids, same)}


def _plain(text: str) -> str:
    return text.removesuffix(SHORT_ANSWER).strip()


def _wording(text: str) -> str:
    """The question as it is compared: POPE first asked for "a apple", later for "an apple"."""
    return _plain(text).replace(" an ", " a ")


def _identity(line: Row) -> tuple[str, str]:
    return line["image"], _wording(line["text"])


if __name__ == "__main__":
    sys.exit(main(POPE))
