"""POPE (Li et al. 2023): is there such an object in the image? Half of the answers are yes.

    python -m llava_sp.eval.pope --model M --data D --output O [--split random|popular|adversarial]

D holds the official label files coco_pope_random.json, coco_pope_popular.json and coco_pope_adversarial.json (in D, in
D/coco or in D/output/coco) and the images val2014/COCO_val2014_*.jpg. LLaVA's question file llava_pope_test.jsonl is taken
if it is there, as published numbers come from it; without it the same prompts are made from the label files, with ids that
run on over the categories in LLaVA's order. The absent objects were drawn at random, from the most frequent ones (popular)
or from those that often occur beside what is there (adversarial).

The score is the mean of the three categories' F1, in percent: 85.9 is published for LLaVA-1.5-7B. It is neither accuracy nor
the F1 of all questions together. `--split` scores one category alone; without it all three must be there.

2910 or 3000: LLaVA's file asks 2910 random questions, those of POPE at commit e3e3926; POPE's label files of today have 3000.
LLaVA's scorer pairs answers and labels by position and notices nothing (its random F1 then falls from 0.87 to 0.46). Here
image and text of every question are compared with the label file first ("a" and "an" are the same: POPE mended that). Labels
in another order, or with questions that LLaVA does not ask, are found by image and text (metrics.json says how many labels
were not asked for); a question without a label, or with two different ones, is an error. The `prompt` of an answers file is
compared too.

Protocols, all with the same prompts and greedy generation of up to 128 tokens; each judges the text differently
    llava15     LLaVA's and POPE's own scorer. "no" if the text up to the first period, without commas, has a word "No", "no"
                or "not", with single spaces between words; anything else is "yes", and so are "NO", "no!" and an empty answer
    lmms_eval   the text in lower case must be "yes" or "no", with nothing around it; anything else is wrong, and recall does
                not count it. Score: F1 of all questions together. Its yes ratio is that of the labels
    vlmevalkit  one of the words "yes" and "no" without the other, in any case; anything else is wrong and counts as not yes.
                Score: F1 of all questions together

Where a denominator is zero (no answer is yes, no label is yes) the official scorer stops with ZeroDivisionError; here
precision, recall and F1 are then 0. LLaVA's scorer also passes over missing answers; here they are an error.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from llava_sp.eval.base import LLAVA15, LLAVA15_LORA, LLAVA_SP, SHORT_ANSWER, Benchmark, Category, Item, Scores
from llava_sp.eval.cli import main
from llava_sp.eval.inputs.answers_file import match_by_question_id
from llava_sp.eval.inputs.checks import expect_all, expect_once, find, first_folder, inside
from llava_sp.eval.scoring import yes_no

CATEGORIES = ("random", "popular", "adversarial")  # in the order of the paper's tables
LLAVA_ORDER = ("adversarial", "popular", "random")  # in the order of LLaVA's question file
QUESTIONS = "llava_pope_test.jsonl"
_QUESTION = {"question_id": (int, str), "image": str, "text": str, "category": str}
_LABEL = {"question_id": (int, str), "image": str, "text": str, "label": str}

Row = dict[str, Any]


class POPE(Benchmark):
    name = "pope"
    title = "POPE F1 in percent, mean over the categories"
    splits = CATEGORIES
    protocols = ("llava15", "lmms_eval", "vlmevalkit")
    published: ClassVar = {LLAVA15: 85.9, LLAVA15_LORA: 86.4, LLAVA_SP: 86.6}

    def load(self, data: Path) -> list[Item]:
        wanted = CATEGORIES if self.split is None else (self.split,)
        files = _label_files(data, wanted)
        labels = {category: self._read_labels(file) for category, file in files.items()}
        folder = self.images or first_folder([data / "val2014", data / "images" / "val2014", data / "images"])
        self.not_asked: dict[str, int] = {}
        found = find(data, QUESTIONS)
        if found:
            return self._llava_items(found[0], files, labels, folder)
        rows = [(category, row) for category in LLAVA_ORDER if category in labels for row in labels[category]]
        ids = (row["question_id"] for _, row in rows) if self.split else range(1, len(rows) + 1)
        return [
            _item({**row, "question_id": i, "category": category}, row["label"], folder, files[category])
            for i, (category, row) in zip(ids, rows)
        ]

    def prompt(self, item: Item) -> str:
        return item.text if item.text.endswith(SHORT_ANSWER) else item.text + SHORT_ANSWER

    def match(self, items: Sequence[Item], records: Sequence[dict[str, Any]]) -> list[str]:
        answers = match_by_question_id(items, records, what=f"{self.name} {self.split or ''}".strip())
        asked = {str(record["question_id"]): record.get("prompt") for record in records}
        for item in items:
            prompt = asked[str(item.id)]
            if isinstance(prompt, str) and _wording(prompt) != _wording(item.text):
                raise ValueError(
                    f"the answers are to other questions: question {item.id} was {_plain(prompt)!r}, here it is "
                    f"{_plain(item.text)!r} (another version of POPE, or its categories in another order?)"
                )
        return answers

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> Scores:
        judge = {"llava15": llava_label, "lmms_eval": lmms_label, "vlmevalkit": yes_no.vlmevalkit}[self.protocol]
        per_item = []
        for item, text in zip(items, answers):
            prediction = judge(text)
            line = {"question_id": item.id, "score": 100.0 * (prediction == item.reference), "answer": prediction}
            line |= {"text": text, "question": item.metadata["question"], "image": item.images[0].name}
            line |= {"references": [item.reference], "category": item.metadata["category"]}
            per_item.append(line | {"label": item.reference, "prediction": prediction, "protocol": self.protocol})
        figures = _by_category(per_item)
        metrics = {**figures, "overall": _figures(per_item), "labels_not_asked": self.not_asked}
        categories = {name: Category(round(100 * f["f1"], 2), f["count"]) for name, f in figures.items()}
        return Scores(self.headline(per_item), metrics, per_item, categories)

    @classmethod
    def headline(cls, per_item: Sequence[Mapping[str, Any]]) -> float:
        """The mean of the categories' F1 in percent; for other protocols than LLaVA's the F1 of all records."""
        if per_item[0]["protocol"] != "llava15":
            return round(100 * _figures(per_item)["f1"], 2)
        return round(100 * fmean(figures["f1"] for figures in _by_category(per_item).values()), 2)

    def summary(self, scores: Scores) -> list[str]:
        unasked = [f"{n} labels of {category} belong to no question" for category, n in self.not_asked.items()]
        return super().summary(scores) + unasked

    def _read_labels(self, file: Path) -> list[Row]:
        rows = self.read_jsonl(file)
        expect_all(rows, _LABEL, file)
        expect_once(rows, file, key="question_id")
        for row in rows:
            if row["label"].strip().lower() not in ("yes", "no"):
                raise ValueError(f"{file}: question {row['question_id']}: label is {row['label']!r}, not yes or no")
        return [row | {"label": row["label"].strip().lower()} for row in rows]

    def _llava_items(
        self, file: Path, label_files: Mapping[str, Path], labels: Mapping[str, list[Row]], folder: Path
    ) -> list[Item]:
        rows = self.read_jsonl(file)
        expect_all(rows, _QUESTION, file)
        expect_once(rows, file, key="question_id")
        strange = next((row for row in rows if row["category"] not in CATEGORIES), None)
        if strange is not None:
            raise ValueError(
                f"{file}: question {strange['question_id']}: category is {strange['category']!r}, not one of "
                f"{', '.join(CATEGORIES)}"
            )
        found: dict[Any, str] = {}
        for category in labels:
            asked = [row for row in rows if row["category"] == category]
            found |= _find_labels(asked, labels[category], category, file, label_files[category])
            if len(asked) < len(labels[category]):
                self.not_asked[category] = len(labels[category]) - len(asked)
        return [_item(row, found[row["question_id"]], folder, file) for row in rows if row["question_id"] in found]


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


def _by_category(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The figures of each category that occurs, in the order of `CATEGORIES`."""
    groups: dict[str, list[Mapping[str, Any]]] = {category: [] for category in CATEGORIES}
    for record in records:
        groups[record["category"]].append(record)
    return {category: _figures(group) for category, group in groups.items() if group}


def _label_files(data: Path, wanted: Sequence[str]) -> dict[str, Path]:
    names = {category: f"coco_pope_{category}.json" for category in wanted}
    found = {category: find(data, name, f"output/coco/{name}") for category, name in names.items()}
    missing = [names[category] for category, files in found.items() if not files]
    if missing:
        hint = "; --split scores one category alone" if len(missing) < len(wanted) else ""
        raise ValueError(f"{data} has no {', '.join(missing)} (looked there, in coco/ and in output/coco/){hint}")
    return {category: files[0] for category, files in found.items()}


def _find_labels(
    asked: Sequence[Row], labelled: Sequence[Row], category: str, file: Path, label_file: Path
) -> dict[Any, str]:
    """question_id -> label, by position if both files have the same questions in the same order, else by image and text."""
    if not asked:
        raise ValueError(f"{file} has no questions of {category}")
    ids = [row["question_id"] for row in asked]
    if [_identity(row) for row in asked] == [_identity(row) for row in labelled]:
        return dict(zip(ids, (row["label"] for row in labelled)))
    known: dict[tuple[str, str], set[str]] = {}
    for row in labelled:
        known.setdefault(_identity(row), set()).add(row["label"])
    unclear = [row for row in asked if len(known.get(_identity(row), ())) != 1]
    if unclear:
        first = unclear[0]
        raise ValueError(
            f"{file} has {len(asked)} questions of {category}, {label_file} has {len(labelled)}, and {len(unclear)} of the "
            f"former have no label in the latter, or two different ones; the first is question {first['question_id']}, "
            f"{_plain(first['text'])!r} about {first['image']}. LLaVA's file goes with the label files of POPE at commit "
            f"e3e3926 (2910 random questions; today's have 3000): get those, or take {file.name} away to ask the questions "
            "of the label files (published numbers are of LLaVA's)"
        )
    return {i: next(iter(known[_identity(row)])) for i, row in zip(ids, asked)}


def _item(row: Row, label: str, folder: Path, file: Path) -> Item:
    where = f"{file}: question {row['question_id']}"
    about = {"question": _plain(row["text"]), "category": row["category"]}
    return Item(row["question_id"], row["text"], (inside(folder, row["image"], where),), label, about)


def _plain(text: str) -> str:
    return text.removesuffix(SHORT_ANSWER).strip()


def _wording(text: str) -> str:
    """The question as it is compared: POPE first asked for "a apple", later for "an apple"."""
    return _plain(text).replace(" an ", " a ")


def _identity(row: Row) -> tuple[str, str]:
    return row["image"], _wording(row["text"])


if __name__ == "__main__":
    sys.exit(main(POPE))
