"""RefCOCO, RefCOCO+ and RefCOCOg (Yu et al. 2016, Mao et al. 2016): where in the image is what a sentence describes?

    python -m llava_sp.eval.refcoco --model M --data D --output O [--split val|testA|testB|test]

D holds the expressions with their boxes, in any of four forms (the official refs and instances as JSON, the files of InternVL
and Qwen-VL, MDETR's, or this package's own annotations.json); `llava_sp/eval/inputs/refcoco_files.py` says exactly which. The images
are those of COCO train2014, in D/train2014, D/images or what --images names. If D has several of the three data sets, all are
asked: `categories` has the accuracy of each, which is what papers report, and the score is over all expressions together.
Without --split the first that D has is taken, in the order val, testA, testB, test.

The score is the percentage of expressions whose answered box and true box overlap by at least half (intersection over union
0.5 or more, the field's measure). The metrics hold it for other thresholds (`ACC@0.1` ...), the mean overlap (`IoU`), how
often the middle of the answered box lies in the true one (`Center_ACC`), and the answers without a box (`invalid`).

RefCOCO is no part of LLaVA-1.5's evaluation, so there is no published figure of its authors. lmms-eval measured 56.2 on
RefCOCO val, 64.4 on testA (pull request 52) with the rule `lmms_eval` below, which does LLaVA injustice: LLaVA is trained on
boxes as fractions of the square that the image is padded to, and is there compared with fractions of the image itself.

Protocols
    llava15         the prompt of LLaVA's training data; the first [a, b, c, d] of four numbers in the answer; brought from the
                    padded square to the image before it is compared (S = max(w, h): x * S - (S - w) // 2, and so on). The
                    default, as it measures where the model points
    lmms_eval       lmms-eval's prompt, which explains the format; the first [a, b, c, d] of four plain decimals (.5 is none),
                    else the box [0, 0, 0, 0]; compared as they are. Up to 1024 tokens
    vlm_evaluation  TRI-ML's prompt, with the sentence in quotes; the whole answer must be a list of four numbers from 0 to 1
                    with x1 < x2 and y1 < y2; compared as they are. (TRI-ML rounds the true boxes to two decimals when it
                    builds its index; here they stay as they are.) TRI-ML reports each data set, `datasets` in the metrics

All generate greedily, on padded images: otherwise coordinates mean something else, so --image-aspect-ratio crop is refused and
checkpoints that crop are asked to pad. For a square image the first and second rule agree.

An answered box with its corners the wrong way round overlaps nothing. It can have minus the area of the true box: lmms-eval
then divides by zero; here the overlap is 0. Answers on which TRI-ML's parser would stop otherwise are invalid.
"""

from __future__ import annotations

import argparse
import ast
import math
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from llava_sp.decoding import Generation
from llava_sp.eval.base import Benchmark, Category, Item, Scores
from llava_sp.eval.cli import main
from llava_sp.eval.inputs.checks import first_folder, inside
from llava_sp.eval.inputs.refcoco_files import SPLITS, Box, Expression, read_expressions
from llava_sp.eval.scoring.records import grouped, row

REQUEST = "Please provide the bounding box coordinate of the region this sentence describes: "
FORMAT = (
    "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right x, bottom-right y). All "
    "values are floating point numbers bounded between 0 and 1. "
)
THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)
_PLAIN = r"(-?\d+(?:\.\d+)?)"
_ANY = r"([-+]?(?:\d+\.?\d*|\.\d+))"
_LMMS_BOX = re.compile(rf"\[\s*{_PLAIN},\s*{_PLAIN},\s*{_PLAIN},\s*{_PLAIN}\s*\]")
_LLAVA_BOX = re.compile(rf"\[\s*{_ANY}\s*,\s*{_ANY}\s*,\s*{_ANY}\s*,\s*{_ANY}\s*\]")


class RefCOCO(Benchmark):
    name = "refcoco"
    title = "RefCOCO accuracy in percent (overlap of 0.5 or more)"
    splits = SPLITS
    protocols = ("llava15", "lmms_eval", "vlm_evaluation")
    generations: ClassVar = {"lmms_eval": Generation(max_new_tokens=1024)}
    image_aspect_ratio = "pad"

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> Benchmark:
        if args.image_aspect_ratio not in (None, cls.image_aspect_ratio):
            given = f"--image-aspect-ratio {args.image_aspect_ratio}"
            raise ValueError(f"refcoco has no {given}: LLaVA's boxes are fractions of the padded square (pad)")
        return super().from_arguments(args)

    def load(self, data: Path) -> list[Item]:
        expressions = self._of_split(read_expressions(data, self.read_json, self.read_jsonl), data)
        names = ("train2014", "images/train2014", "images/mscoco/images/train2014", "coco/train2014", "images")
        folder = self.images or first_folder([data / name for name in names])
        items = []
        for expression in expressions:
            images = (
                () if expression.image is None else (inside(folder, expression.image, f"question {expression.id}"),)
            )
            about = {key: getattr(expression, key) for key in ("dataset", "split", "width", "height")}
            items.append(Item(expression.id, expression.text, images, expression.box, about))
        return items

    def prompt(self, item: Item) -> str:
        if not item.images:
            raise ValueError(f"question {item.id} names no image: such files can only be used to score --answers")
        if self.protocol == "vlm_evaluation":
            return f'{REQUEST}"{item.text}"'
        return (FORMAT if self.protocol == "lmms_eval" else "") + REQUEST + item.text

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> Scores:
        per_item = []
        for item, text in zip(items, answers):
            found = self._read_box(text)
            box = (0.0, 0.0, 0.0, 0.0) if found is None and self.protocol == "lmms_eval" else found
            if box is not None and self.protocol == "llava15":
                box = unpad(box, item.metadata["width"], item.metadata["height"])
            overlap = iou(box, item.reference) if box is not None else 0.0
            facts = {
                "references": [_shown(item.reference)],
                "category": item.metadata["dataset"],
                "box": box and list(box),
                "reference_box": list(item.reference),
                "iou": overlap,
                "center": box is not None and middle_inside(box, item.reference),
                "invalid": found is None,
            }
            per_item.append(row(item, _shown(None if found is None else box), text, 100.0 * (overlap >= 0.5), **facts))
        datasets = {name: _figures(records) for name, records in grouped(per_item, "category").items()}
        metrics: dict[str, Any] = {
            "IoU": sum(record["iou"] for record in per_item) / len(per_item),
            **{f"ACC@{t}": fmean(record["iou"] >= t for record in per_item) for t in THRESHOLDS},
            "Center_ACC": fmean(record["center"] for record in per_item),
            "invalid": sum(record["invalid"] for record in per_item),
            "datasets": datasets,
        }
        categories = {name: Category(round(100 * d["accuracy"], 2), d["total"]) for name, d in datasets.items()}
        return Scores(self.headline(per_item), metrics, per_item, categories)

    def _read_box(self, text: str) -> Box | None:
        if self.protocol == "vlm_evaluation":
            return box_as_list(text)
        match = (_LMMS_BOX if self.protocol == "lmms_eval" else _LLAVA_BOX).search(text)
        box = tuple(float(number) for number in match.groups()) if match else None
        return box if box and all(map(math.isfinite, box)) else None

    def _of_split(self, expressions: list[Expression], data: Path) -> list[Expression]:
        found = {expression.split for expression in expressions}
        if None in found and (self.split is not None or len(found) > 1):
            lost = sum(expression.split is None for expression in expressions)
            raise ValueError(f"{data}: {lost} of {len(expressions)} expressions do not say of which split they are")
        if None in found:
            return expressions
        wanted = self.split or next((split for split in SPLITS if split in found), None)
        if wanted not in found:
            there = ", ".join(sorted(map(str, found)))
            raise ValueError(f"{data} has no {self.split or ' or '.join(SPLITS)} expressions, only those of {there}")
        self.split = wanted
        return [expression for expression in expressions if expression.split == wanted]


def box_as_list(text: str) -> Box | None:
    """The answer as TRI-ML reads it: a Python list of four numbers from 0 to 1, corners in order; None if it is not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd text is no program of ours
            box = ast.literal_eval(text)
        fits = isinstance(box, list) and len(box) == 4 and all(0 <= number <= 1 for number in box)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return tuple(float(n) for n in box) if fits and box[0] < box[2] and box[1] < box[3] else None


def unpad(box: Box, width: float, height: float) -> Box:
    """From fractions of the padded square to fractions of the image; the padding is as the image processor adds it."""
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    x1, y1, x2, y2 = (number * side for number in box)
    return (x1 - left) / width, (y1 - top) / height, (x2 - left) / width, (y2 - top) / height


def iou(a: Box, b: Box) -> float:
    """Intersection over union; 0 for a box whose corners are not in order."""
    intersection = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    if not intersection:
        return 0.0
    return intersection / ((b[2] - b[0]) * (b[3] - b[1]) + (a[2] - a[0]) * (a[3] - a[1]) - intersection)


def middle_inside(box: Box, reference: Box) -> bool:
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return reference[0] <= x <= reference[2] and reference[1] <= y <= reference[3]


def _figures(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    correct, total = sum(record["score"] == 100 for record in records), len(records)
    invalid = sum(record["invalid"] for record in records)
    return {"total": total, "correct": correct, "invalid": invalid, "accuracy": correct / total}


def _shown(box: Box | None) -> str:
    return "no box" if box is None else f"[{', '.join(f'{number:.3f}' for number in box)}]"


if __name__ == "__main__":
    sys.exit(main(RefCOCO))
