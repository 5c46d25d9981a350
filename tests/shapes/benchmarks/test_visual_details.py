"""MMVP, RefCOCO and Q-Bench: what differs, where it is and how good the image is, measured on the pixels."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from llava_sp.shapes.world import draw
from tests.shapes.benchmarks.truth import (
    SIDE,
    THING,
    Truth,
    as_scene,
    label_of,
    place_of,
    read_json,
    read_table,
    right_options,
)


def test_mmvp(world, graphs):
    rows = read_table(world / "mmvp/Questions.csv", ",")
    assert [int(row["Index"]) for row in rows] == list(range(1, 61))
    differences = Counter()
    for first, second in zip(rows[::2], rows[1::2]):
        assert first["Question"] == second["Question"] and first["Options"] == second["Options"]
        assert {first["Correct Answer"], second["Correct Answer"]} == {"(a)", "(b)"}
        pair = [graphs[f"mmvp/MMVP Images/{row['Index']}.jpg"] for row in (first, second)]
        shown = [{(label_of(thing), place_of(thing)) for thing in graph["things"]} for graph in pair]
        assert 1 <= len(shown[0] ^ shown[1]) <= 2 and pair[0]["background"] == pair[1]["background"]
        for row, graph in zip((first, second), pair):
            a, b = re.fullmatch(r"\(a\) (.+) \(b\) (.+)", row["Options"]).groups()
            right = right_options(Truth(graph), row["Question"], [a, b])
            assert [f"({'ab'[i]})" for i in right] == [row["Correct Answer"]]
        differences[" ".join(first["Question"].split()[:2])] += 1
    assert set(differences) == {"Where is", "What color", "What shape", "What digit", "Is there"}


def test_refcoco(world, graphs):
    records = read_json(world / "refcoco/annotations.json")
    assert [record["question_id"] for record in records] == [str(i) for i in range(60)]
    splits = {(record["refer_dataset"], record["split"]) for record in records}
    assert {dataset for dataset, _ in splits} == {"RefCOCO", "RefCOCO+", "RefCOCOg"}
    assert {split for dataset, split in splits if dataset == "RefCOCOg"} == {"val", "test"}
    assert {split for dataset, split in splits if dataset != "RefCOCOg"} == {"val", "testA", "testB"}
    sizes = set()
    for record in records:
        with Image.open(world / "refcoco/images" / record["image"]) as image:
            assert image.size == (record["image_width"], record["image_height"])
            pixels = np.asarray(image).astype(int)
        graph = graphs[f"refcoco/images/{record['image']}"]
        x, y, width, height = record["bbox_xywh_pixels"]
        across, down = record["image_width"], record["image_height"]
        assert graph["offset"] == [(across - 96) // 2, (down - 96) // 2]  # in the middle: "left" stays left
        wanted = [x / across, y / down, (x + width) / across, (y + height) / down]
        assert record["bbox"] == pytest.approx(wanted) and min(wanted) >= 0 and max(wanted) <= 1
        thing = referred(Truth(graph), record)
        left, top = (graph["offset"][i] + 32 * thing[axis] for i, axis in enumerate(("col", "row")))
        ink = np.abs(pixels[top : top + 32, left : left + 32] - np.array(graph["background"])).max(axis=2) > 40
        rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
        drawn = (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1)
        assert np.abs(np.array(drawn) - (x, y, x + width, y + height)).max() <= 2, record
        if record["split"].startswith("test") and record["refer_dataset"] != "RefCOCOg":
            assert (record["split"] == "testA") == (thing["kind"] == "digit")
        sizes.add((across > down) - (across < down))
    assert sizes == {-1, 0, 1} and len({record["image"] for record in records}) < 30


def referred(truth: Truth, record: dict) -> dict:
    """The one thing that an expression means."""
    expression = record["answer"].removeprefix("the ")
    if record["refer_dataset"] == "RefCOCO":
        kind, _, where = expression.partition(" at the ")
        thing = truth.at(where)
        assert thing["kind"] == kind
        return thing
    if record["refer_dataset"] == "RefCOCO+":
        assert " at " not in expression
        return truth.only(expression)
    a, relation, b = re.fullmatch(rf"{THING} that is {SIDE} the {THING}", expression).groups()
    assert truth.is_(a, relation, b)
    return truth.only(a)


def test_qbench(world, graphs):
    """The recorded quality of an image is measured on its pixels, against the same scene drawn again."""
    records = read_json(world / "qbench/llvisionqa_dev.json")
    seen = Counter()
    for number, record in enumerate(records):
        assert record["img_path"] == f"{number:05d}.jpg"
        graph = graphs[f"qbench/images/{record['img_path']}"]
        with Image.open(world / "qbench/images" / record["img_path"]) as image:
            pixels = np.asarray(image).astype(float)
        clean = np.asarray(draw(as_scene(graph))).astype(float)
        inside = np.ones((96, 96), bool)
        if graph["local"] is not None:
            thing = graph["things"][graph["local"]]
            top, left = 32 * thing["row"], 32 * thing["col"]
            cell, inside = np.zeros((2, 96, 96), bool)
            cell[top : top + 32, left : left + 32] = True
            inside[top + 3 : top + 29, left + 3 : left + 29] = True  # not the rim between spoiled and clean
            assert thing["kind"] in record["question"] and record["concern"] == 2
            assert np.abs(pixels - clean)[~cell].mean() < 4
        found = measured_quality(pixels, clean, inside)
        assert found == graph["quality"]
        assert record["correct_ans"] in record["candidates"] and 2 <= len(set(record["candidates"])) <= 4
        assert record["correct_ans"] == quality_answer(record["question"], found, graph)
        seen[record["type"], record["concern"]] += 1
        assert record["type"] == {"Is": 0, "How": 1, "What": 2}[record["question"].split()[0]]
    assert set(seen) == {(0, 0), (2, 0), (1, 1), (1, 2), (2, 3)}
    assert {graphs[f"qbench/images/{r['img_path']}"]["quality"] for r in records} == {
        "clean",
        "blurred",
        "noisy",
        "dark",
    }


def measured_quality(pixels: np.ndarray, clean: np.ndarray, inside: np.ndarray) -> str:
    def edges(image: np.ndarray) -> float:
        bent = np.abs(4 * image[1:-1, 1:-1] - image[:-2, 1:-1] - image[2:, 1:-1] - image[1:-1, :-2] - image[1:-1, 2:])
        return float(bent[inside[1:-1, 1:-1]].mean())

    if pixels[inside].mean() < 0.4 * clean[inside].mean():
        return "dark"
    ratio = edges(pixels) / edges(clean)
    return "blurred" if ratio < 0.75 else "noisy" if ratio > 3 else "clean"


def quality_answer(question: str, quality: str, graph: dict) -> str:
    if question.startswith("What color"):
        return Truth(graph).answer(question)
    if question == "Is this picture blurred?":
        return "Yes" if quality == "blurred" else "No"
    if question == "How is the lighting of this picture?":
        return "Dark" if quality == "dark" else "Normal"
    if question == "What is the problem of this picture?":
        return {"clean": "No problem", "blurred": "Blur", "noisy": "Noise", "dark": "Underexposure"}[quality]
    return {"clean": "Sharp", "blurred": "Blurred", "noisy": "Sharp but noisy", "dark": "Sharp but dark"}[quality]
