"""The files that RefCOCO, RefCOCO+ and RefCOCOg go by, read into one form: an `Expression` with its box.

Of the kinds below the first that a folder holds is read, all its files at once. DATASET is refcoco, refcoco+ or refcocog (also
refcoco_plus), SPLIT one of val, testA, testB, test; files lie in the folder itself or one folder below.

    annotations.json, annotations.jsonl
        This package's own form, a JSON list or one object per line:
            question_id      number or text, unique
            answer           the expression ("the man on the left"), named as in lmms-eval's data
            image_width, image_height
            bbox             [x1, y1, x2, y2] as fractions of width and height, or instead
            bbox_xywh_pixels [x, y, width, height] in pixels; `bbox` comes first
            image            file name below the image folder (or `file_name`); not needed to score answers
            refer_dataset    "RefCOCO", "RefCOCO+" or "RefCOCOg"; RefCOCO if no record has it
            split            if absent, the file is one split and --split cannot choose

    DATASET/refs(unc).json (or umd, google) with DATASET/instances.json
        The official files. refs(unc).p is a Python pickle, which can run any code when it is opened: nothing here opens one.
        If you trust its source, make the JSON file yourself, in the folder of the pickle:
            python -c "import json, pickle; json.dump(pickle.load(open('refs(unc).p', 'rb')), open('refs(unc).json', 'w'))"
        Every sentence of every ref is a question; its id is DATASET_SENTID. A ref and its annotation must be of
        one image.

    DATASET_SPLIT.jsonl (or .json)
        Lines as InternVL and Qwen-VL have them: {"image": path, "sent": text, "bbox": [x1, y1, x2, y2] in pixels, "height",
        "width"}. Of the path only the file name counts. Ids are DATASET_SPLIT_LINE, counted from 0.

    finetune_DATASET_SPLIT.json
        MDETR's COCO-style files: `images` with `caption`, `file_name`, `width`, `height`, and one box per image in
        `annotations`. Ids are DATASET_IMAGEID.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from llava_sp.common.schema import Check, expect, expect_all, one_of, some
from llava_sp.eval.inputs.checks import ID, by_id, find

DATASETS: Mapping[str, str] = {
    "refcoco": "RefCOCO",
    "refcoco+": "RefCOCO+",
    "refcoco_plus": "RefCOCO+",
    "refcocog": "RefCOCOg",
}
SPLITS = ("val", "testA", "testB", "test")
_TOLERANCE = 0.01  # boxes of COCO end up to a pixel outside their image

Box = tuple[float, float, float, float]
Reader = Callable[[Path, Any], Any]

SIDE = Check(lambda pixels: pixels > 0, "a number above 0", float)
BOX = Check(lambda box: len(box) == 4 and all(map(math.isfinite, box)), "a list of four numbers", [float])
OWN = {
    "question_id": ID,
    "answer": str,
    "image_width": SIDE,
    "image_height": SIDE,
    "bbox?": BOX,
    "bbox_xywh_pixels?": BOX,
    "split?": one_of(*SPLITS, "train"),
    **dict.fromkeys(("image?", "file_name?", "refer_dataset?"), str),
}
IMAGE = {"id": int, "file_name": str, "width": SIDE, "height": SIDE}
INSTANCES = {"images": some(IMAGE), "annotations": some({"id": int, "bbox": BOX, "image_id?": int})}
SENTENCE = {"sent_id": int, "sent": str}
REF = {"ref_id": int, "ann_id": int, "image_id": int, "split": str, "sentences": [SENTENCE]}
LINE = {"image": str, "sent": str, "bbox": BOX, "width": SIDE, "height": SIDE}
ONE_BOX = Check(lambda boxes: len(boxes) == 1, "exactly one")
COCO = {"images": some({**IMAGE, "caption": str}), "annotations": some({"image_id": int, "bbox": BOX})}


@dataclass(frozen=True)
class Expression:
    """A sentence and the box of what it describes.

    Attributes:
        id: unique in the folder.
        image: file name below the image folder; None where the file does not say.
        width, height: of the image, in pixels.
        box: x1, y1, x2, y2 as fractions of width and height.
        split: None where the file does not say.
    """

    id: int | str
    text: str
    image: str | None
    width: float
    height: float
    box: Box
    dataset: str
    split: str | None


def read_expressions(data: Path, read_json: Reader, read_jsonl: Reader) -> list[Expression]:
    """All expressions in folder `data`; the readers take a file and the schema of its content, or of a line.

    Raises:
        ValueError: naming file, record and key, for what is missing or wrong.
    """
    for kind in (_own_files, _official_files, _line_files, _coco_files):
        found = list(kind(data, read_json, read_jsonl))
        if found:
            by_id((vars(expression) for expression in found), data, "id")
            return found
    pickles = [path.name for path in sorted(data.glob("**/refs(*).p"))[:1]]
    hint = f". {pickles[0]} is a pickle, which is never opened here; the JSON file is made from it" if pickles else ""
    raise ValueError(
        f"{data} has no referring expressions: looked for annotations.json, refs(unc).json with instances.json, "
        "refcoco_val.jsonl or finetune_refcoco_val.json and the like (llava_sp/eval/inputs/refcoco_files.py describes "
        f"them){hint}"
    )


def _own_files(data: Path, read_json: Reader, read_jsonl: Reader) -> Iterator[Expression]:
    for file in find(data, "annotations.json", "annotations.jsonl"):
        records = read_jsonl(file, OWN) if file.suffix == ".jsonl" else read_json(file, some(OWN))
        named = {"refer_dataset": str} if any("refer_dataset" in record for record in records) else {}
        for record in expect_all(records, named, file):  # those without would count for another data set
            where = f"{file}: question {record['question_id']}"
            size = record["image_width"], record["image_height"]
            if "bbox" in record:
                box = _fractions(record["bbox"], (1, 1), where)
            else:
                expect(record, {"bbox_xywh_pixels": BOX}, where)
                box = _from_xywh(record["bbox_xywh_pixels"], size, where)
            image, dataset = record.get("image", record.get("file_name")), record.get("refer_dataset", "RefCOCO")
            yield Expression(record["question_id"], record["answer"], image, *size, box, dataset, record.get("split"))


def _official_files(data: Path, read_json: Reader, read_jsonl: Reader) -> Iterator[Expression]:
    for file in sorted({*data.glob("refs(*).json"), *data.glob("*/refs(*).json")}):
        named = re.match(r"(refcoco(?:\+|_plus|g)?)(?:_|$)", file.parent.resolve().name.lower())  # also refcocog_umd
        if named is None:
            raise ValueError(f"{file} must be in a folder named after its data set: refcoco, refcoco+ or refcocog")
        instances_file = file.parent / "instances.json"
        instances = read_json(instances_file, INSTANCES)
        images = by_id(instances["images"], instances_file, "id")
        annotations = by_id(instances["annotations"], instances_file, "id")
        for ref in read_json(file, some(REF)):
            where = f"{file}: ref {ref['ref_id']}"
            image, annotation = images.get(ref["image_id"]), annotations.get(ref["ann_id"])
            if not image or not annotation or annotation.get("image_id", ref["image_id"]) != ref["image_id"]:
                raise ValueError(
                    f"{where}: instances.json has no annotation {ref['ann_id']} on image {ref['image_id']}"
                )
            size = image["width"], image["height"]
            box = _from_xywh(annotation["bbox"], size, where)
            for sentence in ref["sentences"]:
                i, dataset = f"{named[1]}_{sentence['sent_id']}", DATASETS[named[1]]
                yield Expression(i, sentence["sent"], image["file_name"], *size, box, dataset, ref["split"])


def _line_files(data: Path, read_json: Reader, read_jsonl: Reader) -> Iterator[Expression]:
    for name, split, file in _split_files(data, "", (".jsonl", ".json")):
        records = read_jsonl(file, LINE) if file.suffix == ".jsonl" else read_json(file, some(LINE))
        for number, record in enumerate(records):
            size = record["width"], record["height"]
            box = _fractions(record["bbox"], size, f"{file}: line {number} (counted from 0)")
            image = PurePosixPath(record["image"]).name
            yield Expression(f"{name}_{split}_{number}", record["sent"], image, *size, box, DATASETS[name], split)


def _coco_files(data: Path, read_json: Reader, read_jsonl: Reader) -> Iterator[Expression]:
    for name, split, file in _split_files(data, "finetune_", (".json",)):
        content = read_json(file, COCO)
        boxes: dict[int, list[Any]] = defaultdict(list)
        for annotation in content["annotations"]:
            boxes[annotation["image_id"]].append(annotation["bbox"])
        for i, image in by_id(content["images"], file, "id").items():
            where = f"{file}: image {i}"
            expect(boxes[i], ONE_BOX, f"{where}: its boxes in annotations")
            size = image["width"], image["height"]
            box = _from_xywh(boxes[i][0], size, where)
            yield Expression(f"{name}_{i}", image["caption"], image["file_name"], *size, box, DATASETS[name], split)


def _split_files(data: Path, prefix: str, suffixes: Sequence[str]) -> Iterator[tuple[str, str, Path]]:
    """(dataset, split, file) of the files named PREFIX DATASET _ SPLIT SUFFIX."""
    for name in DATASETS:
        for split in SPLITS:
            for file in find(data, *(f"{prefix}{name}_{split}{suffix}" for suffix in suffixes))[:1]:
                yield name, split, file


def _from_xywh(box: Sequence[float], size: tuple[float, float], where: str) -> Box:
    x, y, width, height = box
    return _fractions((x, y, x + width, y + height), size, where)


def _fractions(box: Sequence[float], size: tuple[float, float], where: str) -> Box:
    """A box x1, y1, x2, y2 in units of `size`; must have an area and lie in the image."""
    x1, y1, x2, y2 = box[0] / size[0], box[1] / size[1], box[2] / size[0], box[3] / size[1]
    within = all(-_TOLERANCE <= n <= 1 + _TOLERANCE for n in (x1, y1, x2, y2))
    if not within or not (x1 < x2 and y1 < y2):
        unit = "fractions of width and height" if size == (1, 1) else f"pixels of an image of {size[0]} x {size[1]}"
        raise ValueError(f"{where}: the corners {list(box)} are not a box in {unit}")
    return x1, y1, x2, y2
