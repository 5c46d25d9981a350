"""RefCOCO without a model: the recorded figures, the padded square, the forms its files come in, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_sp.decoding import Generation
from llava_sp.eval.refcoco import RefCOCO
from llava_sp.eval.run.evaluate import check_images
from llava_sp.eval.scoring.boxes import box_as_list, first_box, first_plain_box, iou, middle_inside, unpad
from tests.eval.commands import command_of

RECORDING = "refcoco"

ANNOTATIONS = "annotations.json"
REQUEST = "Please provide the bounding box coordinate of the region this sentence describes: "


@pytest.fixture
def data(official) -> Path:
    """The recorded files; the answers as lines, which is what an answers file is."""
    folder = official("refcoco")[1]
    answers = json.loads((folder / "answers.json").read_text())
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in answers))
    return folder


run = command_of(RefCOCO)


def outputs(capsys, data: Path, output: Path, protocol: str) -> tuple[dict, list[dict]]:
    answers = data / "answers.jsonl"
    status, _, err = run(capsys, "--answers", answers, "--data", data, "--output", output, "--protocol", protocol)
    assert status == 0, err
    per_item = [json.loads(line) for line in (output / "per_item.jsonl").open()]
    return json.loads((output / "metrics.json").read_text()), per_item


def refused(capsys, data: Path, *arguments: object) -> str:
    status, _, err = run(capsys, "--answers", data / "answers.jsonl", "--data", data, *arguments)
    assert status == 2
    return err


def write(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = content if file.suffix == ".jsonl" else [content]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_scores_as_lmms_eval(tmp_path, data, recorded, capsys):
    result, per_item = outputs(capsys, data, tmp_path / "out", "lmms_eval")
    expected = recorded["expected"]["lmms_eval"]
    assert {key: result["metrics"][key] for key in expected["aggregate"]} == expected["aggregate"]
    assert result["score"] == round(100 * expected["aggregate"]["ACC@0.5"], 2) == 30.0
    found = {line["question_id"]: {key: line[key] for key in ("box", "iou", "center")} for line in per_item}
    assert found == expected["per_item"]
    assert RefCOCO.headline(per_item) == result["score"]


def test_scores_as_vlm_evaluation(tmp_path, data, recorded, capsys):
    result, per_item = outputs(capsys, data, tmp_path / "out", "vlm_evaluation")
    expected = recorded["expected"]["tri_ml"]
    assert result["metrics"]["datasets"] == expected["aggregate"] and result["metrics"]["invalid"] == 21
    for line in per_item:
        official = expected["per_item"][line["question_id"]]
        assert line["box"] == official["box"] and line["iou"] == (official["iou"] or 0)
        assert line["invalid"] == (official["box"] is None) == (line["answer"] == "no box")
    assert result["score"] == 25.0 == RefCOCO.headline(per_item)
    assert result["categories"]["RefCOCO+"] == {"score": 30.77, "count": 13, "highest": 100.0}


def test_true_boxes_on_the_padded_square_score_the_maximum(tmp_path, data, capsys):
    """What LLaVA is trained to answer; and why the other rules, which do not bring it back, are not the default."""
    lines = []
    for record in json.loads((data / ANNOTATIONS).read_text()):
        x, y, w, h = record["bbox_xywh_pixels"]
        side = max(record["image_width"], record["image_height"])
        x += (side - record["image_width"]) // 2
        y += (side - record["image_height"]) // 2
        corners = ", ".join(f"{n / side:.3f}" for n in (x, y, x + w, y + h))
        lines.append({"question_id": record["question_id"], "text": f"[{corners}]"})
    write(data / "answers.jsonl", lines)
    result, per_item = outputs(capsys, data, tmp_path / "out", "llava15")
    assert result["score"] == 100.0 and result["metrics"]["ACC@0.9"] == 1.0 and result["metrics"]["IoU"] > 0.97
    assert result["scored_as"]["lmms_eval"] == 87.5
    square = [line for line in per_item if line["question_id"] == "3"]
    assert square[0]["answer"] == "[0.175, 0.482, 0.525, 0.648]"  # a square picture: as it was answered
    assert RefCOCO.headline(per_item) == 100.0


@pytest.mark.parametrize(
    "size, answered, expected",
    [
        ((640, 480), (0.25, 0.125, 0.5, 0.875), (0.25, 0.0, 0.5, 1.0)),  # 80 pixels above and below
        ((480, 640), (0.125, 0.25, 0.875, 0.5), (0.0, 0.25, 1.0, 0.5)),
        ((500, 500), (0.1, 0.2, 0.3, 0.4), (0.1, 0.2, 0.3, 0.4)),
        ((100, 99), (0.0, 0.0, 1.0, 0.99), (0.0, 0.0, 1.0, 1.0)),  # an odd pixel of padding goes below
        ((100, 97), (0.0, 0.01, 1.0, 0.98), (0.0, 0.0, 1.0, 1.0)),
    ],
)
def test_unpad(size, answered, expected):
    assert unpad(answered, *size) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["wide", "tall", "gray"])
def test_unpad_fits_the_pictures_as_llava_pads_them(golden, name):
    """In the recorded input of the vision tower, what is not of the padding's colour is the whole picture."""
    size = Image.open(golden / "images" / f"{name}.png").size
    padded = np.asarray(Image.open(golden / "images" / f"{name}.pad.processed.png").convert("RGB")).astype(int)
    drawn = (abs(padded - np.array([122, 116, 104])) > 2).any(axis=2)
    rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
    corners = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    whole = unpad(tuple(corner / len(padded) for corner in corners), *size)
    assert whole == pytest.approx((0, 0, 1, 1), abs=0.02)  # resizing blurs the edges


def test_overlap():
    box = (0.0, 0.0, 0.4, 0.4)
    assert iou(box, box) == 1.0 and iou(box, (0.5, 0.5, 1.0, 1.0)) == 0.0
    assert iou((0.0, 0.0, 0.5, 0.5), (0.0, 0.0, 0.5, 1.0)) == 0.5  # exactly half counts
    assert iou((0.4, 0.0, 0.0, 0.4), box) == 0.0  # minus the area of the other: lmms-eval divides by zero
    assert iou((0.4, 0.4, 0.0, 0.0), box) == 0.0
    assert middle_inside(box, (0.2, 0.2, 1.0, 1.0)) and not middle_inside(box, (0.3, 0.0, 1.0, 1.0))


@pytest.mark.parametrize(
    "text, llava, lmms, whole",
    [
        ("[0.1, 0.2, 0.3, 0.4]", True, True, True),
        ("It is at [0.1,0.2,0.3,0.4].", True, True, False),
        ("[.1, .2, .3, .4]", True, False, True),
        ("[-0.10, 0.2, 0.3, 0.4]", True, True, False),
        ("[0, 0, 1, 1]", True, True, True),
        ("[0.3, 0.2, 0.1, 0.4]", True, True, False),
        ("[0.1, 0.2, 0.3, 1.4]", True, True, False),
        ("(0.1, 0.2, 0.3, 0.4)", False, False, False),
        ("[0.1, 0.2, 0.3]", False, False, False),
        ("[0.1 , 0.2, 0.3, 0.4]", True, False, True),
        ("", False, False, False),
        ("[" * 500, False, False, False),
        ("[1j, 0.2, 0.3, 0.4]", False, False, False),
        ("['a', 'b', 'c', 'd']", False, False, False),
        ("[0.1, 0.2](0.3, 0.4)", False, False, False),
        ("\x00", False, False, False),
        (f"[{'9' * 400}, 0, 1, 1]", False, False, False),
        (f"[{'9' * 5000}, 0, 1, 1]", False, False, False),
    ],
)
def test_what_an_answer_says(text, llava, lmms, whole):
    assert [read(text) is not None for read in (first_box, first_plain_box, box_as_list)] == [llava, lmms, whole]


def test_answers_that_no_rule_stumbles_over(data, capsys):
    texts = [
        "[0.9, 0.9, 0.1, 0.1]",
        "[" * 3000,
        "[[]]",
        "None",
        "[0.5, 0.5, 0.5, 0.5]",
        "[1, 1, 0, 0]",
        "[1e9, 0, 1, 1]",
    ]
    lines = [{"question_id": str(i), "text": texts[i % len(texts)]} for i in range(40)]
    write(data / "answers.jsonl", lines)
    status, out, _ = run(capsys, "--answers", data / "answers.jsonl", "--data", data)
    assert status == 0 and json.loads(out)["scored_as"] == dict.fromkeys(RefCOCO.protocols, 0.0)


def with_images(data: Path) -> None:
    records = json.loads((data / ANNOTATIONS).read_text())
    write(data / ANNOTATIONS, [r | {"image": f"COCO_train2014_{i:012d}.jpg"} for i, r in enumerate(records)])


def test_prompts_and_generation(data):
    with_images(data)
    quoted, explained = f'{REQUEST}"the pink wheelbarrow"', f". {REQUEST}the pink wheelbarrow"
    texts = {}
    for protocol in RefCOCO.protocols:
        benchmark = RefCOCO(protocol=protocol)
        item = benchmark.load(data)[0]
        texts[protocol] = benchmark.prompt(item)
        assert benchmark.message(item) == f"<image>\n{texts[protocol]}"
        assert benchmark.record(item) == {"question_id": "0", "prompt": texts[protocol]}
        most = 1024 if protocol == "lmms_eval" else 128
        assert benchmark.generation == Generation(max_new_tokens=most)
    assert texts["llava15"] == f"{REQUEST}the pink wheelbarrow" and texts["vlm_evaluation"] == quoted
    assert texts["lmms_eval"].startswith("Bounding box coordinates are") and texts["lmms_eval"].endswith(explained)


def test_without_image_names_only_answers_can_be_scored(data):
    benchmark = RefCOCO()
    with pytest.raises(ValueError, match="question 0 names no image: such files can only be used to score --answers"):
        benchmark.message(benchmark.load(data)[0])


def test_images_are_those_of_coco(data):
    with_images(data)
    with pytest.raises(ValueError, match=r"40 image files are missing \(.*train2014/COCO_train2014_000000000000\.jpg"):
        check_images(RefCOCO().load(data))
    (data / "images" / "mscoco" / "images" / "train2014").mkdir(parents=True)
    assert RefCOCO().load(data)[0].images[0].parent == data / "images" / "mscoco" / "images" / "train2014"
    assert RefCOCO(images=Path("/coco")).load(data)[0].images == (Path("/coco/COCO_train2014_000000000000.jpg"),)


def test_cropped_images_are_refused(data, capsys):
    err = refused(capsys, data, "--image-aspect-ratio", "crop")
    assert "refcoco has no --image-aspect-ratio crop: LLaVA's boxes are fractions of the padded square" in err
    assert RefCOCO.image_aspect_ratio == "pad"  # also where the checkpoint crops
    assert run(capsys, "--answers", data / "answers.jsonl", "--data", data, "--image-aspect-ratio", "pad")[0] == 0


# One picture of 640 x 480, three expressions for two boxes, and a third box that is of no split to be scored.
PICTURE = {"id": 7, "file_name": "COCO_train2014_000000000007.jpg", "width": 640, "height": 480}
BOXES = {1: [64, 48, 128, 240], 2: [320, 120, 160, 120]}
REFS = [
    {"ref_id": 10, "ann_id": 1, "image_id": 7, "split": "testA", "sentences": [
        {"sent_id": 100, "sent": "left man"}, {"sent_id": 101, "sent": "the man"}]},
    {"ref_id": 11, "ann_id": 2, "image_id": 7, "split": "testA", "sentences": [{"sent_id": 102, "sent": "the dog"}]},
    {"ref_id": 12, "ann_id": 2, "image_id": 7, "split": "train", "sentences": [{"sent_id": 103, "sent": "it"}]},
]  # fmt: skip
SENTENCES = [("left man", 1), ("the man", 1), ("the dog", 2)]


def official_form(folder: Path, name: str = "refcoco", splits_by: str = "unc") -> list[str]:
    annotations = [{"id": i, "bbox": box, "image_id": 7, "category_id": 1} for i, box in BOXES.items()]
    write(folder / name / "instances.json", {"images": [PICTURE], "annotations": annotations})
    write(folder / name / f"refs({splits_by}).json", REFS)
    return [f"{name.split('_')[0]}_{i}" for i in (100, 101, 102)]


def line_form(folder: Path) -> list[str]:
    def corners(i: int) -> list[int]:
        x, y, w, h = BOXES[i]
        return [x, y, x + w, y + h]

    path = f"data/coco/train2014/{PICTURE['file_name']}"
    lines = [{"image": path, "sent": s, "bbox": corners(i), "height": 480, "width": 640} for s, i in SENTENCES]
    write(folder / "refcoco_testA.jsonl", lines)
    return [f"refcoco_testA_{i}" for i in range(3)]


def coco_form(folder: Path) -> list[str]:
    images = [PICTURE | {"id": n, "caption": text, "original_id": 7} for n, (text, _) in enumerate(SENTENCES)]
    annotations = [{"id": n, "image_id": n, "bbox": BOXES[i]} for n, (_, i) in enumerate(SENTENCES)]
    write(folder / "mdetr" / "finetune_refcoco_testA.json", {"images": images, "annotations": annotations})
    return [f"refcoco_{i}" for i in range(3)]


def own_form(folder: Path) -> list[str]:
    size = {"image_width": 640, "image_height": 480, "file_name": PICTURE["file_name"], "split": "testA"}
    lines = [{"question_id": n, "answer": s, "bbox_xywh_pixels": BOXES[i]} | size for n, (s, i) in enumerate(SENTENCES)]
    write(folder / "annotations.jsonl", [*lines, {**lines[0], "question_id": 9, "split": "val", "answer": "x"}])
    return [0, 1, 2]


@pytest.mark.parametrize("form", [official_form, line_form, coco_form, own_form])
def test_every_form_gives_the_same_questions(tmp_path, capsys, form):
    ids = form(tmp_path)
    benchmark = RefCOCO(split="testA")
    items = benchmark.load(tmp_path)
    assert [item.id for item in items] == ids
    assert [item.text for item in items] == [text for text, _ in SENTENCES]
    assert [item.reference for item in items] == [(0.1, 0.1, 0.3, 0.6)] * 2 + [(0.5, 0.25, 0.75, 0.5)]
    assert items[0].images == (tmp_path / "train2014" / PICTURE["file_name"],)
    assert items[0].metadata["dataset"] == "RefCOCO" and len(benchmark.files) in (1, 2)
    padded = {(0.1, 0.1, 0.3, 0.6): "[0.1, 0.2, 0.3, 0.575]", (0.5, 0.25, 0.75, 0.5): "[0.5, 0.3125, 0.75, 0.5]"}
    lines = [{"question_id": item.id, "text": padded[item.reference]} for item in items]
    write(tmp_path / "answers.jsonl", lines)
    arguments = ("--answers", tmp_path / "answers.jsonl", "--data", tmp_path, "--split", "testA")
    status, out, _ = run(capsys, *arguments)
    assert status == 0 and json.loads(out)["score"] == 100.0 and json.loads(out)["metrics"]["IoU"] > 0.999


def test_splits_and_several_data_sets(tmp_path, capsys):
    official_form(tmp_path, "refcoco")
    official_form(tmp_path, "refcoco+")
    official_form(tmp_path, "refcocog_umd", "umd")
    benchmark = RefCOCO()
    items = benchmark.load(tmp_path)
    assert benchmark.split == "testA" and len({item.id for item in items}) == 9
    assert [item.metadata["dataset"] for item in items[::3]] == ["RefCOCO", "RefCOCO+", "RefCOCOg"]
    with pytest.raises(ValueError, match="has no val expressions, only those of testA, train"):
        RefCOCO(split="val").load(tmp_path)
    own_form(tmp_path)  # goes before the official files
    assert RefCOCO(split="val").load(tmp_path)[0].text == "x" and len(RefCOCO().load(tmp_path)) == 1


def test_files_without_splits_have_none_to_choose(data, capsys):
    assert "expressions have no split" in refused(capsys, data, "--split", "val")
    records = json.loads((data / ANNOTATIONS).read_text())
    write(data / ANNOTATIONS, [records[0] | {"split": "val"}, *records[1:]])
    assert "39 of 40 expressions have no split" in refused(capsys, data)


def test_pickles_are_never_opened(tmp_path):
    (tmp_path / "refcoco").mkdir()
    (tmp_path / "refcoco" / "refs(unc).p").write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    with pytest.raises(
        ValueError, match=r"no referring expressions.*refs\(unc\)\.p is a pickle, which is never opened"
    ):
        RefCOCO().load(tmp_path)


def test_answers_that_do_not_fit(data, capsys):
    lines = [json.loads(line) for line in (data / "answers.jsonl").open()]
    write(data / "answers.jsonl", [*lines[1:], lines[1], {"question_id": "77", "text": ""}])
    err = refused(capsys, data)
    assert "(1)" in err and "(0)" in err
    assert "40 questions of refcoco" in err and "not in the file: 1 (77)" in err


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bbox": [0.1, 0.2, 0.3]}, "[1].bbox is [0.1, 0.2, 0.3]"),
        ({"bbox": [0.1, 0.2, 0.3, "x"]}, "[1].bbox[3] is 'x'; expected a number"),
        (
            {"bbox": [0.3, 0.2, 0.1, 0.4]},
            "question 1: the corners [0.3, 0.2, 0.1, 0.4] are not a box in fractions of width and height",
        ),
        (
            {"bbox": [10, 20, 30, 40]},
            "question 1: the corners [10, 20, 30, 40] are not a box in fractions of width and height",
        ),
        ({"image_width": 0}, "[1].image_width is 0"),
        ({"image_height": "x"}, "[1].image_height is 'x'"),
        ({"answer": None}, "[1].answer is None; expected text"),
        ({"split": "dev"}, "[1].split is 'dev'; expected 'val' or 'testA' or 'testB' or 'test' or 'train'"),
        ({"image": 3}, "[1].image is 3; expected text"),
        ({"image": "../x.jpg"}, "question 1: image '../x.jpg' is outside"),
        ({"question_id": "0"}, "more than one record with the same id: 0 (0: record 0, record 1)"),
    ],
)
def test_wrong_fields_are_named(data, capsys, change, message):
    records = json.loads((data / ANNOTATIONS).read_text())
    write(data / ANNOTATIONS, [records[0], records[1] | change, *records[2:]])
    assert message in refused(capsys, data)


def test_boxes_in_pixels_serve_where_there_are_no_fractions(tmp_path, data, capsys):
    with_both = outputs(capsys, data, tmp_path / "a", "llava15")[0]["metrics"]
    records = json.loads((data / ANNOTATIONS).read_text())
    for record in records:
        del record["bbox"]
    write(data / ANNOTATIONS, records)
    assert outputs(capsys, data, tmp_path / "b", "llava15")[0]["metrics"] == with_both
    write(data / ANNOTATIONS, [{k: v for k, v in r.items() if k != "bbox_xywh_pixels"} for r in records])
    assert "question 0 has no bbox_xywh_pixels" in refused(capsys, data)


def broken(form: str, folder: Path) -> None:
    if form == "no instances":
        official_form(folder)
        (folder / "refcoco" / "instances.json").unlink()
    elif form == "box of another file":
        official_form(folder)
        write(
            folder / "refcoco" / "instances.json", {"images": [PICTURE], "annotations": [{"id": 5, "bbox": BOXES[1]}]}
        )
    elif form == "doubled boxes":
        official_form(folder)
        file = folder / "refcoco" / "instances.json"
        content = json.loads(file.read_text())
        content["annotations"].append(content["annotations"][0] | {"bbox": BOXES[2]})
        write(file, content)
    elif form == "box in another picture":
        official_form(folder)
        file = folder / "refcoco" / "instances.json"
        content = json.loads(file.read_text())
        content["images"].append(PICTURE | {"id": 8})
        content["annotations"][1]["image_id"] = 8
        write(file, content)
    elif form == "doubled pictures":
        coco_form(folder)
        file = folder / "mdetr" / "finetune_refcoco_testA.json"
        content = json.loads(file.read_text())
        write(file, content | {"images": [*content["images"], content["images"][1]]})
    elif form == "folder":
        official_form(folder, "expressions")
    elif form == "two boxes":
        coco_form(folder)
        file = folder / "mdetr" / "finetune_refcoco_testA.json"
        content = json.loads(file.read_text())
        write(file, content | {"annotations": content["annotations"] * 2})
    elif form == "fractions for pixels":
        write(
            folder / "refcoco_val.jsonl", [{"image": "a", "sent": "b", "bbox": [4, 3, 2, 1], "height": 9, "width": 9}]
        )
    elif form == "cut":
        official_form(folder)
        file = folder / "refcoco" / "refs(unc).json"
        file.write_text(file.read_text()[:-30])


@pytest.mark.parametrize(
    "form, message",
    [
        ("no instances", "refcoco/instances.json does not exist"),
        ("box of another file", "ref 10: instances.json has no annotation 1 on image 7"),
        (
            "doubled boxes",
            "more than one record with the same id: 1 (1: record 0, record 2)",
        ),
        (
            "box in another picture",
            "ref 11: instances.json has no annotation 2 on image 7",
        ),
        ("doubled pictures", "more than one record with the same id: 1 (1: record 1, record 3)"),
        ("folder", "must be in a folder named after its data set: refcoco, refcoco+ or refcocog"),
        ("two boxes", "image 0: its boxes in annotations is [[64, 48, 128, 240], [64, 48, 128, 240]]"),
        (
            "fractions for pixels",
            "line 0 (counted from 0): the corners [4, 3, 2, 1] are not a box in pixels of an image of 9 x 9",
        ),
        ("cut", "refs(unc).json is not valid JSON"),
        ("nothing", "has no referring expressions: looked for annotations.json, refs(unc).json"),
    ],
)
def test_broken_files_are_named(tmp_path, capsys, form, message):
    broken(form, tmp_path)
    (tmp_path / "answers.jsonl").write_text('{"question_id": 1, "text": ""}\n')
    assert message in refused(capsys, tmp_path)


def test_annotations_need_not_say_their_picture(tmp_path):
    official_form(tmp_path)
    file = tmp_path / "refcoco" / "instances.json"
    content = json.loads(file.read_text())
    for annotation in content["annotations"]:
        del annotation["image_id"]
    write(file, content)
    assert len(RefCOCO(split="testA").load(tmp_path)) == 3
