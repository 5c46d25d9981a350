"""The files that RefCOCO, RefCOCO+ and RefCOCOg go by, read into one form: an `Expression` with its box.

Of the kinds below the first that a folder holds is read, all its files at once. DATASET is refcoco, refcoco+ or refcocog (also
refcoco_plus), SPLIT one of val, testA, testB, test; files lie in the folder itself or one folder below.

    annotations.json, annotations.jsonl
        This package's own form, a JSON list or one object per line:
            question_id      number or text, unique
            answer           the expression ("the man on the left"), named as in lmms-eval's data
            image_width, image_height
            bbox             [x1, y1, x2, y2] as fractions of width and height, or instead
            bbox_xywh_pixels [x, y, width, height] in pixels; `bbox` goes first
            image            file name below the image folder (`file_name` does too); not needed to score answers
            refer_dataset    "RefCOCO", "RefCOCO+" or "RefCOCOg"; RefCOCO if absent
            split            if absent, the file is one split and --split cannot choose

    DATASET/refs(unc).json (or umd, google) with DATASET/instances.json
        The official files. refs(unc).p is a Python pickle, which can run any code when it is opened: nothing here opens one.
        Where you trust its source, make the JSON file yourself, in the folder of the pickle:
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
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from llava_sp.common.files import examples
from llava_sp.eval.inputs.checks import expect, expect_all, expect_once, find

DATASETS: Mapping[str, str] = {
    "refcoco": "RefCOCO",
    "refcoco+": "RefCOCO+",
    "refcoco_plus": "RefCOCO+",
    "refcocog": "RefCOCOg",
}
SPLITS = ("val", "testA", "testB", "test")
_NUMBER = (int, float)
_TOLERANCE = 0.01  # boxes of COCO end up to a pixel outside their picture

Box = tuple[float, float, float, float]
Reader = Callable[[Path], Any]


@dataclass(frozen=True)
class Expression:
    """A sentence and the box of what it describes.

    Attributes:
        id: unique in the folder.
        image: file name below the image folder; None where the file does not say.
        width, height: of the picture, in pixels.
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
    """All expressions in folder `data`; `read_json` and `read_jsonl` read a file. Raises ValueError naming what is wrong."""
    for kind in (_own_files, _official_files, _line_files, _coco_files):
        found = list(kind(data, read_json, read_jsonl))
        if found:
            twice = [i for i, count in Counter(expression.id for expression in found).items() if count > 1]
            if twice:
                raise ValueError(f"{data}: {len(twice)} question ids occur more than once ({examples(twice)})")
            return found
    pickles = [path.name for path in sorted(data.glob("**/refs(*).p"))[:1]]
    hint = f". {pickles[0]} is a pickle, which is never opened here; the JSON file is made from it" if pickles else ""
    raise ValueError(
        f"{data} has no referring expressions: looked for annotations.json, refs(unc).json with instances.json, "
        f"refcoco_val.jsonl or finetune_refcoco_val.json and the like (llava_sp/eval/inputs/refcoco_files.py says what they are){hint}"
    )


def _own_files(data: Path, read_json: Reader, read_jsonl: Reader) -> Iterator[Expression]:
    for file in find(data, "annotations.json", "annotations.jsonl"):
        records = read_jsonl(file) if file.suffix == ".jsonl" else read_json(file)
        fields = {"question_id": (int, str), "answer": str, "image_width": _NUMBER, "image_height": _NUMBER}
        expect_all(records, fields, file, "expression")
        for record in records:
            where = f"{file}: question {record['question_id']}"
            size = _size(record["image_width"], record["image_height"], where)
            if "bbox" in record:
                box = _fractions(_numbers(record["bbox"], where), (1, 1), where)
            else:
                expect(record, {"bbox_xywh_pixels": list}, where)
                box = _from_xywh(record["bbox_xywh_pixels"], size, where)
            optional = {key: record[key] for key in ("image", "file_name", "refer_dataset", "split") if key in record}
            expect(optional, dict.fromkeys(optional, str), where)
            image, split = optional.get("image", optional.get("file_name")), optional.get("split")
            dataset = optional.get("refer_dataset", "RefCOCO")
            if split is not None and split not in (*SPLITS, "train"):
                raise ValueError(f"{where}: split is {split!r}, not one of {', '.join(SPLITS)}")
            yield Expression(record["question_id"], record["answer"], image, *size, box, dataset, split)


def _official_files(data: Path, read_json: Reader, read_jsonl: Reader) -> Iterator[Expression]:
    for file in sorted({*data.glob("refs(*).json"), *data.glob("*/refs(*).json")}):
        name = _dataset_of(file.parent.resolve().name, file)
        instances = read_json(file.parent / "instances.json")
        expect(instances, {"images": list, "annotations": list}, f"{file.parent / 'instances.json'}")
        pictures = _by_id(instances["images"], file.parent / "instances.json", "image")
        boxes = _by_id(instances["annotations"], file.parent / "instances.json", "annotation")
        refs = read_json(file)
        expect_all(refs, {"ref_id": int, "ann_id": int, "image_id": int, "split": str, "sentences": list}, file, "ref")
        for ref in refs:
            where = f"{file}: ref {ref['ref_id']}"
            if ref["ann_id"] not in boxes or ref["image_id"] not in pictures:
                raise ValueError(
                    f"{where}: instances.json has no annotation {ref['ann_id']} or image {ref['image_id']}"
                )
            of_image = boxes[ref["ann_id"]].get("image_id", ref["image_id"])
            if of_image != ref["image_id"]:
                raise ValueError(
                    f"{where} is of image {ref['image_id']}, but its annotation {ref['ann_id']} in instances.json is of image "
                    f"{of_image}"
                )
            picture = pictures[ref["image_id"]]
            expect(picture, {"file_name": str, "width": _NUMBER, "height": _NUMBER}, f"{where}: its image")
            size = _size(picture["width"], picture["height"], where)
            box = _from_xywh(boxes[ref["ann_id"]].get("bbox"), size, where)
            for sentence in ref["sentences"]:
                expect(sentence, {"sent_id": int, "sent": str}, f"{where}: sentence")
                i = f"{name}_{sentence['sent_id']}"
                text, split = sentence["sent"], ref["split"]
                yield Expression(i, text, picture["file_name"], *size, box, DATASETS[name], split)


def _line_files(data: Path, read_json: Reader, read_jsonl: Reader) -> Iterator[Expression]:
    for name, split, file in _split_files(data, "", (".jsonl", ".json")):
        records = read_jsonl(file) if file.suffix == ".jsonl" else read_json(file)
        expect_all(
            records, {"image": str, "sent": str, "bbox": list, "width": _NUMBER, "height": _NUMBER}, file, "line"
        )
        for number, record in enumerate(records):
            where = f"{file}: line {number} (counted from 0)"
            size = _size(record["width"], record["height"], where)
            box = _fractions(_numbers(record["bbox"], where), size, where)
            image = PurePosixPath(record["image"]).name
            yield Expression(f"{name}_{split}_{number}", record["sent"], image, *size, box, DATASETS[name], split)


def _coco_files(data: Path, read_json: Reader, read_jsonl: Reader) -> Iterator[Expression]:
    for name, split, file in _split_files(data, "finetune_", (".json",)):
        content = read_json(file)
        expect(content, {"images": list, "annotations": list}, str(file))
        pictures = _by_id(content["images"], file, "image")
        fields = {"image_id": int, "bbox": list}
        expect_all(content["annotations"], fields, file, "annotation")
        boxes: dict[int, list[Any]] = {}
        for annotation in content["annotations"]:
            boxes.setdefault(annotation["image_id"], []).append(annotation["bbox"])
        for i, picture in pictures.items():
            where = f"{file}: image {i}"
            expect(picture, {"caption": str, "file_name": str, "width": _NUMBER, "height": _NUMBER}, where)
            if len(boxes.get(i, ())) != 1:
                raise ValueError(f"{where} has {len(boxes.get(i, ()))} boxes in annotations, not one")
            size = _size(picture["width"], picture["height"], where)
            box = _from_xywh(boxes[i][0], size, where)
            caption, image = picture["caption"], picture["file_name"]
            yield Expression(f"{name}_{i}", caption, image, *size, box, DATASETS[name], split)


def _split_files(data: Path, prefix: str, suffixes: Sequence[str]) -> Iterator[tuple[str, str, Path]]:
    """(dataset, split, file) of the files named PREFIX DATASET _ SPLIT SUFFIX."""
    for name in DATASETS:
        for split in SPLITS:
            for file in find(data, *(f"{prefix}{name}_{split}{suffix}" for suffix in suffixes))[:1]:
                yield name, split, file


def _dataset_of(folder: str, file: Path) -> str:
    """The data set that a folder like refcoco, refcoco+ or refcocog_umd is named after."""
    found = re.match(r"(refcoco(?:\+|_plus|g)?)(?:_|$)", folder.lower())
    if found is None:
        raise ValueError(f"{file} must lie in a folder named after its data set: refcoco, refcoco+ or refcocog")
    return found[1]


def _by_id(records: Sequence[Any], file: Path, noun: str) -> dict[int, dict[str, Any]]:
    expect_all(records, {"id": int}, file, noun)
    expect_once(records, file, f"{noun} id", key="id")
    return {record["id"]: record for record in records}


def _numbers(box: Any, where: str) -> Box:
    fits = isinstance(box, list) and len(box) == 4
    if not fits or not all(isinstance(n, _NUMBER) and not isinstance(n, bool) and math.isfinite(n) for n in box):
        raise ValueError(f"{where}: the box is {str(box)[:60]}, not a list of four numbers")
    return tuple(box)


def _from_xywh(box: Any, size: tuple[float, float], where: str) -> Box:
    x, y, width, height = _numbers(box, where)
    return _fractions((x, y, x + width, y + height), size, where)


def _fractions(box: Box, size: tuple[float, float], where: str) -> Box:
    """A box x1, y1, x2, y2 in units of `size`; must have an area and lie in the picture."""
    x1, y1, x2, y2 = box[0] / size[0], box[1] / size[1], box[2] / size[0], box[3] / size[1]
    inside = all(-_TOLERANCE <= n <= 1 + _TOLERANCE for n in (x1, y1, x2, y2))
    if not inside or not (x1 < x2 and y1 < y2):
        unit = "fractions of width and height" if size == (1, 1) else f"pixels of a picture of {size[0]} x {size[1]}"
        raise ValueError(f"{where}: the corners of the box, {list(box)}, are no box in {unit}")
    return x1, y1, x2, y2


def _size(width: float, height: float, where: str) -> tuple[float, float]:
    if not (width > 0 and height > 0):
        raise ValueError(f"{where}: the picture is {width} x {height} pixels")
    return width, height
