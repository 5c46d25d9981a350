"""The official files: their names, fields and ids, and an image for every line."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter, defaultdict

import pytest

from llava_sp.shapes.benchmarks import WRITERS
from tests.shapes.benchmarks.truth import read_json, read_jsonl

# benchmark folder, file, golden file, its entry, fields that are ours alone
FORMATS = [
    ("gqa", "testdev_balanced_questions.json", "gqa", None, ()),
    ("gqa", "llava_gqa_testdev_balanced.jsonl", "gqa", None, ()),
    ("vizwiz", "val.json", "vizwiz", None, ()),
    ("vizwiz", "llava_val.jsonl", "vizwiz", None, ()),
    ("vizwiz", "llava_test.jsonl", "vizwiz", "llava_val.jsonl", ()),
    ("scienceqa", "problems.json", "scienceqa", None, ()),
    ("scienceqa", "pid_splits.json", "scienceqa", None, ()),
    ("scienceqa", "llava_test_CQM-A.json", "scienceqa", None, ()),
    ("textvqa", "TextVQA_0.5.1_val.json", "textvqa", None, ()),
    ("textvqa", "llava_textvqa_val_v051_ocr.jsonl", "textvqa", None, ()),
    ("pope", "llava_pope_test.jsonl", "pope", None, ()),
    ("pope", "coco/coco_pope_random.json", "pope", None, ()),
    ("pope", "coco/coco_pope_popular.json", "pope", None, ()),
    ("pope", "coco/coco_pope_adversarial.json", "pope", None, ()),
    ("mme", "llava_mme.jsonl", "mme", None, ()),
    ("mmbench", "mmbench_dev_20230712.tsv", "mmbench", "mmbench_dev.tsv", ()),
    ("mmbench_cn", "mmbench_dev_cn_20231003.tsv", "mmbench_cn", "mmbench_dev_cn.tsv", ()),
    ("seedbench", "SEED-Bench.json", "seed", None, ()),
    ("seedbench", "llava-seed-bench.jsonl", "seed", None, ()),
    ("llava_bench", "questions.jsonl", "llavabench", None, ()),
    ("llava_bench", "context.jsonl", "llavabench", None, ()),
    ("llava_bench", "answers_gpt4.jsonl", "llavabench", None, ()),
    ("mmvet", "mm-vet.json", "mmvet", None, ()),
    ("mmvet", "llava-mm-vet.jsonl", "mmvet", None, ()),
    ("mmvp", "Questions.csv", "mmvp", None, ()),
    ("refcoco", "annotations.json", "refcoco", None, ("image", "split")),
    ("qbench", "llvisionqa_dev.json", "qbench", None, ()),
    ("vqav2", "v2_OpenEnded_mscoco_val2014_questions.json", "vqav2", None, ()),
]
FREE_KEYS = re.compile(r"^(\d+(:\d+)?|v1_\d+)$")  # ids and positions: the same field of many records


def fields(value, at: str = "") -> dict[str, set[str]]:
    """Path of every field -> the kinds of value it has; keys that are ids count as one field."""
    if isinstance(value, dict):
        found: dict[str, set[str]] = defaultdict(set, {at: {"object"}})
        for key, inner in value.items():
            for path, kinds in fields(inner, f"{at}.{'*' if FREE_KEYS.match(key) else key}").items():
                found[path] |= kinds
        return found
    if isinstance(value, list):
        found = defaultdict(set, {at: {"list"}})
        for inner in value:
            for path, kinds in fields(inner, f"{at}[]").items():
                found[path] |= kinds
        return found
    names = {str: "text", int: "number", float: "number", bool: "true or false", type(None): "null"}
    return {at: {names[type(value)]}}


def content(text: str, name: str):
    if name.endswith((".csv", ".tsv")):
        delimiter = "," if name.endswith(".csv") else "\t"
        csv.field_size_limit(2**30)
        return list(csv.DictReader(io.StringIO(text), delimiter=delimiter))
    return (
        [json.loads(line) for line in text.splitlines()]
        if name.endswith(".jsonl") or "coco_pope" in name
        else json.loads(text)
    )


@pytest.mark.parametrize("folder, name, golden_name, entry, own", FORMATS, ids=[f"{f[0]}/{f[1]}" for f in FORMATS])
def test_fields_are_the_official_ones(world, golden, folder, name, golden_name, entry, own):
    file = json.loads((golden / "eval" / f"{golden_name}.json").read_text())["files"][entry or name]
    official = content(file["data"], name) if file["kind"] == "text" else file["data"]
    ours = content((world / folder / name).read_text(encoding="utf-8"), name)
    wanted, found = fields(official), fields(ours)
    # the golden files have other names of dimensions, no words' positions, and lists that are empty throughout
    loose = re.compile(
        r"question_type\.|annotations\..*\*$|image_classes\[\]$|entailed\[\]$|dependencies\[\]$|^\.info|^\.license"
    )
    strict = {path for path in wanted if not loose.search(path)}
    extra = {path for path in found if not loose.search(path)} - strict
    assert strict <= set(found), f"missing: {strict - set(found)}"
    assert extra == {f"[].{field}" for field in own}
    for path in strict:
        video_ids = {"text"} if (folder, path) == ("seedbench", "[].question_id") else set()
        assert found[path] <= wanted[path] | video_ids, path


def test_folders_and_world_file(world, graphs):
    record = read_json(world / "world.json")
    assert record["settings"] == {"seed": 0, "questions": 60, "version": 1} and record["complete"]
    assert set(record["benchmarks"]) == set(WRITERS) == {path.name for path in world.iterdir() if path.is_dir()}
    per_benchmark = Counter(name.split("/")[0] for name in graphs)
    for name, entry in record["benchmarks"].items():
        assert entry["questions"] == 60 and entry["pictures"] == per_benchmark[name], name


def test_every_line_of_llavas_files_has_its_image(world):
    places = {
        "gqa/llava_gqa_testdev_balanced.jsonl": "gqa/images",
        "vizwiz/llava_val.jsonl": "vizwiz/val",
        "vizwiz/llava_test.jsonl": "vizwiz/test",
        "textvqa/llava_textvqa_val_v051_ocr.jsonl": "textvqa/train_images",
        "pope/llava_pope_test.jsonl": "pope/val2014",
        "mme/llava_mme.jsonl": "mme/MME_Benchmark_release_version",
        "seedbench/llava-seed-bench.jsonl": "seedbench",
        "llava_bench/questions.jsonl": "llava_bench/images",
        "mmvet/llava-mm-vet.jsonl": "mmvet/images",
    }
    for file, folder in places.items():
        lines = read_jsonl(world / file)
        assert len(lines) == 60
        for line in lines:
            assert (world / folder / line["image"]).is_file(), line
    for file in ("scienceqa/llava_test_CQM-A.json", "qbench/llvisionqa_dev.json", "refcoco/annotations.json"):
        records = read_json(world / file)
        assert len(records) == 60
        folder = {"scienceqa": "scienceqa/images/test"}.get(file.split("/")[0], f"{file.split('/')[0]}/images")
        for record in records:
            image = record.get("image") or record.get("img_path")
            assert image is None or (world / folder / image).is_file()
