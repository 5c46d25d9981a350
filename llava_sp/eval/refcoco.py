"""RefCOCO, RefCOCO+ and RefCOCOg (Yu et al. 2016, Mao et al. 2016): the box of what a sentence describes.

    python -m llava_sp.eval.refcoco --model M --data D --output O [--split val|testA|testB|test]

D holds the expressions with their boxes, in any of four forms (the official refs and instances as JSON, the files of InternVL
and Qwen-VL, MDETR's, or this package's own annotations.json), listed in `llava_sp/eval/inputs/refcoco_files.py`. The images
are those of COCO train2014, in D/train2014, D/images or the folder of --images. If D has several of the three data sets, all
are asked: `categories` has the accuracy of each, which papers report, and the score is over all expressions together. Without
--split the first that D has is used, in the order val, testA, testB, test.

The score is the percentage of expressions whose answered box and true box overlap by at least half (intersection over union
0.5 or more, the field's measure). The metrics hold it for other thresholds (`ACC@0.1` ...), the mean overlap (`IoU`), how
often the middle of the answered box lies in the true one (`Center_ACC`), and the answers without a box (`invalid`).

RefCOCO is not part of LLaVA-1.5's evaluation, so its authors published no figure. lmms-eval measured 56.2 on RefCOCO val and
64.4 on testA (pull request 52) with the rule `lmms_eval` below, which is too low: LLaVA is trained on boxes as fractions of
the square that the image is padded to, and that rule compares them with fractions of the image itself.

Protocols
    llava15         the prompt of LLaVA's training data; the first [a, b, c, d] of four numbers in the answer, converted from
                    the padded square to the image (S = max(w, h): x * S - (S - w) // 2, and so on). The default, as it
                    measures where the model points
    lmms_eval       lmms-eval's prompt, which explains the format; the first [a, b, c, d] of four plain decimals (not .5), else
                    the box [0, 0, 0, 0]; compared as they are. Up to 1024 tokens
    vlm_evaluation  TRI-ML's prompt, with the sentence in quotes; the whole answer must be a list of four numbers from 0 to 1
                    with x1 < x2 and y1 < y2; compared as they are. (TRI-ML rounds the true boxes to two decimals when it
                    builds its index; here they stay as they are.) TRI-ML reports each data set, `datasets` in the metrics

All generate greedily, on padded images: otherwise coordinates differ, so --image-aspect-ratio crop is an error and
checkpoints that crop are asked to pad. For a square image the first and second rule agree.

An answered box with its corners the wrong way round overlaps nothing. It can have minus the area of the true box: lmms-eval
then divides by zero; here the overlap is 0. Answers on which TRI-ML's parser would stop otherwise are invalid.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from llava_sp.decoding import Generation
from llava_sp.eval.base import Benchmark, Category, Item, Scores
from llava_sp.eval.cli import main
from llava_sp.eval.inputs.checks import first_folder, inside
from llava_sp.eval.inputs.refcoco_files import SPLITS, Expression, read_expressions
from llava_sp.eval.scoring import boxes
from llava_sp.eval.scoring.records import grouped, row

REQUEST = "Please provide the bounding box coordinate of the region this sentence describes: "
FORMAT = (
    "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right x, bottom-right y). All "
    "values are floating point numbers bounded between 0 and 1. "
)
THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)
READ = {"llava15": boxes.first_box, "lmms_eval": boxes.first_plain_box, "vlm_evaluation": boxes.box_as_list}


class RefCOCO(Benchmark):
    name = "refcoco"
    title = "RefCOCO accuracy in percent (overlap of 0.5 or more)"
    splits = SPLITS
    protocols = tuple(READ)
    generations: ClassVar = {"lmms_eval": Generation(max_new_tokens=1024)}
    image_aspect_ratio = "pad"

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> RefCOCO:
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
            name, where = expression.image, f"question {expression.id}"
            images = () if name is None else (inside(folder, name, where),)
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
            found = box = READ[self.protocol](text)
            if self.protocol == "llava15" and box:
                box = boxes.unpad(box, item.metadata["width"], item.metadata["height"])
            elif self.protocol == "lmms_eval":
                box = box or (0.0, 0.0, 0.0, 0.0)
            overlap = boxes.iou(box, item.reference) if box else 0.0
            facts = {
                "references": [boxes.shown(item.reference)],
                "category": item.metadata["dataset"],
                "box": box and list(box),
                "reference_box": list(item.reference),
                "iou": overlap,
                "center": box is not None and boxes.middle_inside(box, item.reference),
                "invalid": found is None,
            }
            per_item.append(row(item, boxes.shown(found and box), text, 100.0 * (overlap >= 0.5), **facts))
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

    def _of_split(self, expressions: list[Expression], data: Path) -> list[Expression]:
        found = {expression.split for expression in expressions}
        if None in found and (self.split is not None or len(found) > 1):
            lost = sum(expression.split is None for expression in expressions)
            raise ValueError(f"{data}: {lost} of {len(expressions)} expressions have no split")
        if None in found:
            return expressions
        wanted = self.split or next((split for split in SPLITS if split in found), None)
        if wanted is None or wanted not in found:
            there = ", ".join(sorted(map(str, found)))
            raise ValueError(f"{data} has no {self.split or ' or '.join(SPLITS)} expressions, only those of {there}")
        self.split = wanted
        return [expression for expression in expressions if expression.split == wanted]


def _figures(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    correct, total = sum(record["score"] == 100 for record in records), len(records)
    invalid = sum(record["invalid"] for record in records)
    return {"total": total, "correct": correct, "invalid": invalid, "accuracy": correct / total}


if __name__ == "__main__":
    sys.exit(main(RefCOCO))
