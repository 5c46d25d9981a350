"""The shapes world in every benchmark's format: official fields, true answers, sound pictures, the same bytes again.

`Truth` reads the questions and answers them from the scene file alone, with none of the writers' code.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_sp.shapes.benchmarks import WRITERS, Settings, write_all
from llava_sp.shapes.benchmarks.__main__ import main
from llava_sp.shapes.world import COLORS, PLACES, SHAPES, Scene, Thing, digit_instances, draw, split_of

SETTINGS = Settings(questions=60)
LETTERS = "ABCDE"
SHORT = "\nAnswer the question using a single word or phrase."
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    write_all(folder, SETTINGS, log=lambda text: None)
    return folder


@pytest.fixture(scope="module")
def graphs(world) -> dict[str, dict]:
    return json.loads((world / "scenes.json").read_text())


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_table(path: Path, delimiter: str) -> list[dict]:
    csv.field_size_limit(2**31 - 1 if sys.maxsize > 2**31 else 2**30)
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter=delimiter))


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def as_scene(graph: dict) -> Scene:
    return Scene(tuple(Thing(**thing) for thing in graph["things"]), tuple(graph["background"]))


def place_of(thing: dict) -> str:
    return PLACES[thing["row"]][thing["col"]]


def name_of(thing: dict) -> str:
    return "digit" if thing["kind"] == "digit" else f"{thing['color']} {thing['kind']}"


def label_of(thing: dict) -> str:
    return f"digit {thing['value']}" if thing["kind"] == "digit" else name_of(thing)


class Truth:
    """Answers questions about one scene of the scene file."""

    def __init__(self, graph: dict) -> None:
        self.graph, self.things = graph, graph["things"]

    def called(self, words: str) -> list[dict]:
        """The things that "circle", "red circle", "red circles" or "digit" can mean."""
        words = words.removesuffix("s")
        return [t for t in self.things if words in (t["kind"], name_of(t))]

    def only(self, words: str) -> dict:
        (thing,) = self.called(words)
        return thing

    def at(self, place: str) -> dict:
        (thing,) = [thing for thing in self.things if place_of(thing) == place]
        return thing

    def is_(self, a: str, relation: str, b: str) -> bool:
        first, second = self.only(a), self.only(b)
        return {
            "to the left of": first["col"] < second["col"],
            "to the right of": first["col"] > second["col"],
            "above": first["row"] < second["row"],
            "below": first["row"] > second["row"],
        }[relation]

    def values(self) -> list[int]:
        return [thing["value"] for thing in self.things if thing["kind"] == "digit"]

    def without(self, kind: str) -> list[dict]:
        return [thing for thing in self.things if thing not in self.called(kind)]

    def shows(self, description: str) -> bool:
        """Whether a caption names everything that is there, where it is, and nothing else."""
        said = re.findall(
            r"(?:an?|the) ([\w ]+?) at the ((?:top|bottom)? ?(?:left|right)?|center|top|bottom)(?=[,.]| and|$)",
            description,
        )
        return sorted(said) == sorted((label_of(thing), place_of(thing)) for thing in self.things)

    def answer(self, question: str) -> str:
        for pattern, method in ANSWERS:
            if match := re.fullmatch(pattern, question):
                found = method(self, *match.groups())
                return {True: "yes", False: "no"}.get(found, found) if isinstance(found, bool) else str(found)
        raise AssertionError(f"nobody can tell whether this is answered rightly: {question}")


def color(truth: Truth, kind: str) -> str:
    return truth.only(kind)["color"] if truth.called(kind) else "unanswerable"


def place(truth: Truth, name: str) -> str:
    return place_of(truth.only(name)) if truth.called(name) else "unanswerable"


def count(truth: Truth, what: str) -> int:
    return sum(thing["color"] == what.removesuffix(" shapes") for thing in truth.things) or len(truth.called(what))


def side(truth: Truth, a: str, b: str) -> str:
    (relation,) = [r for r in ("to the left of", "to the right of", "above", "below") if truth.is_(a, r, b)]
    return f"{relation} it"


def neighbour(truth: Truth, relation: str, name: str) -> str:
    step = {"above": (-1, 0), "below": (1, 0), "to the left of": (0, -1), "to the right of": (0, 1)}[relation]
    thing = truth.only(name)
    return label_of(truth.at(PLACES[thing["row"] + step[0]][thing["col"] + step[1]]))


def more(truth: Truth, a: str, b: str) -> str:
    difference = len(truth.called(a)) - len(truth.called(b))
    return "as many of both" if not difference else f"more {a if difference > 0 else b}"


def left_without_color(truth: Truth, gone: str, kind: str) -> bool:
    return any(thing["kind"] == kind and thing["color"] != gone for thing in truth.things)


def translated(truth: Truth, words: str, english: str) -> bool:
    return words == in_chinese(english)


THING = r"((?:\w+ )?(?:circle|square|triangle|star|digit))"
SIDE = "(to the left of|to the right of|above|below)"
ANSWERS = [
    (rf"Is there an? {THING} in (?:the|this) image\?", lambda t, name: bool(t.called(name))),
    (r"What color is the (\w+)(?: in this picture)?\?", color),
    (rf"Where is the {THING}\?", place),
    (r"How many (\w+|\w+ shapes) are there\?", count),
    (r"How many things are there in the image\?", lambda t: len(t.things)),
    (rf"Is the {THING} {SIDE} the {THING}\?", lambda t, a, relation, b: t.is_(a, relation, b)),
    (r"What digit is in the image\?", lambda t: t.values()[0] if len(t.values()) == 1 else "unclear"),
    (r"What digit is at the ([\w ]+)\?", lambda t, where: t.at(where)["value"]),
    (r"What is at the ([\w ]+)\?", lambda t, where: label_of(t.at(where))),
    (r"What shape is at the ([\w ]+)\?", lambda t, where: t.at(where)["kind"]),
    (rf"Where is the {THING}, seen from the {THING}\?", side),
    (rf"What is directly {SIDE} the {THING}\?", neighbour),
    (r"Are there more (\w+) or more (\w+)\?", more),
    (r"How many things would be left without the (\w+)\?", lambda t, kind: len(t.without(kind))),
    (r"What is the sum of the two digits\?", lambda t: sum(t.values()) if len(t.values()) == 2 else "unclear"),
    (
        r"How many corners does the shape at the ([\w ]+) have\?",
        lambda t, where: {"circle": 0, "triangle": 3, "square": 4}[t.at(where)["kind"]],
    ),
    # GQA
    (r"Which kind of shape is (\w+)\?", lambda t, c: "".join(o["kind"] for o in t.things if o["color"] == c)),
    (
        rf"Is the {THING} to the left or to the right of the {THING}\?",
        lambda t, a, b: "left" if t.is_(a, "to the left of", b) else "right",
    ),
    (
        r"Are the (\w+) and the (\w+) the same color\?",
        lambda t, a, b: t.only(a)["color"] == t.only(b)["color"],
    ),
    (r"Are there either (\w+ \w+) or (\w+ \w+) in the image\?", lambda t, a, b: bool(t.called(a) or t.called(b))),
    (r"Are there both (\w+ \w+) and (\w+ \w+) in the image\?", lambda t, a, b: bool(t.called(a) and t.called(b))),
    # MME
    (r"Is there a total of (\w+) (\w+) in the picture\?", lambda t, n, what: len(t.called(what)) == NUMBERS.index(n)),
    (rf"Is the {THING} on the (left|right) side of the {THING}\?", lambda t, a, s, b: t.is_(a, f"to the {s} of", b)),
    (rf"Does this poster show the {THING} at the ([\w ]+)\?", lambda t, a, where: place_of(t.only(a)) == where),
    (
        r"Is the shape inside the red bounding box called (\w+)\?",
        lambda t, kind: t.things[t.graph["boxed"]]["kind"] == kind,
    ),
    (r"Does this image show a scene of (\w+) things\?", lambda t, n: len(t.things) == NUMBERS.index(n)),
    (r'Is the digit in the picture "(\d)"\?', lambda t, value: t.values() == [int(value)]),
    (r"If all (\w+) things were taken away, would there still be an? (\w+)\?", left_without_color),
    (
        r"Is the sum of the two digits in the image (\d+)\?",
        lambda t, n: len(t.values()) == 2 and sum(t.values()) == int(n),
    ),
    (
        r'Is it appropriate to translate the Chinese "(.+)" into English "(.+)" in the picture\?',
        translated,
    ),
]

CHINESE = {
    "red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "purple": "紫色", "orange": "橙色",
    "circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "星形", "digit": "数字", "yes": "是", "no": "否",
    "top left": "左上角", "top": "上边", "top right": "右上角", "left": "左边", "center": "中间", "right": "右边",
    "bottom left": "左下角", "bottom": "下边", "bottom right": "右下角", "as many of both": "一样多",
    "above it": "上方", "below it": "下方", "to the left of it": "左方", "to the right of it": "右方",
}  # fmt: skip


def in_chinese(english: str) -> str:
    if english in CHINESE or english.isdigit():
        return CHINESE.get(english, english)
    if english.startswith("more "):
        return CHINESE[english.removeprefix("more ").removesuffix("s")] + "更多"
    if english.endswith("."):
        phrases = re.findall(r"(?:an?|the) (\w+) (\w+) at the ([a-z ]+?)(?=, | and |\.)", english)
        return "，".join(f"{CHINESE[p]}有{CHINESE[a]}{CHINESE.get(b, b)}" for a, b, p in phrases) + "。"
    first, second = english.split()
    return CHINESE[first] + CHINESE.get(second, second)


def question_of(text: str) -> str:
    return text.split("\n")[0]


def right_options(truth: Truth, question: str, options: list[str]) -> list[int]:
    """The positions of all options that are right: there must be exactly one."""
    if question == "What does the image show?":
        return [i for i, option in enumerate(options) if truth.shows(option)]
    return [i for i, option in enumerate(options) if option.lower() == truth.answer(question)]


# --- formats -------------------------------------------------------------------------------------------------------

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


def test_every_line_of_llavas_files_has_its_picture(world):
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


# --- pictures ------------------------------------------------------------------------------------------------------


def test_every_picture_shows_its_scene(world, graphs):
    """Each picture in the scene file is there, is readable and is the scene drawn again, unless it was changed on purpose."""
    shown = set()
    for name, graph in graphs.items():
        if ".tsv:" in name:
            continue
        with Image.open(world / name) as image:
            picture = np.asarray(image.convert("RGB")).astype(float)
        shown.add(name)
        if graph.get("quality", "clean") == "clean" and "boxed" not in graph and "offset" not in graph:
            assert np.abs(picture - np.asarray(draw(as_scene(graph)))).mean() < 4, name
    pictures = {path.relative_to(world).as_posix() for path in world.rglob("*") if path.suffix in (".jpg", ".png", "")}
    assert {path for path in pictures if (world / path).is_file()} == shown


def test_every_scene_is_held_out(graphs):
    allowed = {instance for group in digit_instances("val").values() for instance in group}
    for name, graph in graphs.items():
        scene = as_scene(graph)
        assert split_of(scene.signature()) == "val", name
        assert {thing.instance for thing in scene.things if thing.kind == "digit"} <= allowed, name


def test_pictures_in_tables(world, graphs):
    sizes = []
    for folder, name in (("mmbench", "mmbench_dev_20230712.tsv"), ("mmbench_cn", "mmbench_dev_cn_20231003.tsv")):
        for row in read_table(world / folder / name, "\t"):
            scene = as_scene(graphs[f"{folder}/{name}:{int(row['index']) % 1_000_000}"])
            with Image.open(io.BytesIO(base64.b64decode(row["image"], validate=True))) as image:
                picture = np.asarray(image.convert("RGB").resize((96, 96))).astype(float)
            assert np.abs(picture - np.asarray(draw(scene))).mean() < 6
            sizes.append(len(row["image"]))
    assert max(sizes) > 131_072, "no picture is larger than the csv module's default limit, as real ones are"


# --- answers -------------------------------------------------------------------------------------------------------


def test_vqav2(world, graphs):
    asked = read_json(world / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json")["questions"]
    given = read_json(world / "vqav2/v2_mscoco_val2014_annotations.json")["annotations"]
    for question, annotation in zip(asked, given):
        graph = graphs[f"vqav2/val2014/COCO_val2014_{question['image_id']:012d}.jpg"]
        assert Truth(graph).answer(question["question"]) == annotation["multiple_choice_answer"]


def test_gqa(world, graphs):
    records = read_json(world / "gqa/testdev_balanced_questions.json")
    lines = read_jsonl(world / "gqa/llava_gqa_testdev_balanced.jsonl")
    assert [line["question_id"] for line in lines] == list(records)
    by_picture = defaultdict(list)
    for line, (question_id, record) in zip(lines, records.items()):
        graph = graphs[f"gqa/images/{record['imageId']}.jpg"]
        truth = Truth(graph)
        assert line["text"] == record["question"] + SHORT and line["image"] == f"{record['imageId']}.jpg"
        assert truth.answer(record["question"]) == record["answer"]
        assert run_program(record["semantic"], truth) == record["answer"], record["question"]
        yes_no = record["answer"].capitalize() + "," if record["answer"] in ("yes", "no") else record["answer"]
        assert yes_no in record["fullAnswer"] and record["fullAnswer"].endswith(".")
        steps = [
            f"{s['operation']}: {s['argument']}" + (f" {s['dependencies']}" if s["dependencies"] else "")
            for s in record["semantic"]
        ]
        assert "->".join(steps) == record["semanticStr"]
        for field, text in (("question", record["question"]), ("fullAnswer", record["fullAnswer"])):
            words = re.findall(r"\w+", text)
            for span, number in record["annotations"][field].items():
                first, _, end = span.partition(":")
                named = " ".join(words[int(first) : int(end or int(first) + 1)])
                thing = graph["things"][int(number)]
                assert named in (name_of(thing), thing["kind"], "shape"), (text, span)
        by_picture[record["imageId"]].append(question_id)
    for ids in by_picture.values():
        for question_id in ids:
            record = records[question_id]
            assert question_id in record["equivalent"] and question_id not in record["entailed"]
            assert set(record["entailed"]) | set(record["equivalent"]) <= set(ids)
    structural = Counter(record["types"]["structural"] for record in records.values())
    assert set(structural) == {"verify", "query", "choose", "compare", "logical"}
    assert {record["types"]["semantic"] for record in records.values()} == {"obj", "attr", "rel", "cat"}
    assert any(record["entailed"] for record in records.values()) and max(map(len, by_picture.values())) > 2


def run_program(semantic: list[dict], truth: Truth) -> str:
    """Executes a GQA program on the scene; things are sets of positions."""
    results: list = []
    for step in semantic:
        operation, argument = step["operation"], step["argument"]
        taken = [results[i] for i in step["dependencies"]]
        things = truth.things
        if operation == "select":
            kind, numbers = re.fullmatch(r"(\w+) \((.+)\)", argument).groups()
            chosen = {i for i, t in enumerate(things) if kind in ("shape", t["kind"])}
            named = set() if numbers == "-" else {int(n) for n in numbers.split(",")}
            assert named <= chosen
            results.append(chosen if kind != "shape" else {i for i in chosen if things[i]["kind"] != "digit"})
        elif operation == "filter color":
            results.append({i for i in taken[0] if things[i]["color"] == argument})
        elif operation == "exist":
            results.append(bool(taken[0]))
        elif operation == "query":
            (only,) = taken[0]
            results.append(things[only]["kind" if argument == "name" else argument])
        elif operation == "same color":
            (a,), (b,) = taken
            results.append(things[a]["color"] == things[b]["color"])
        elif operation in ("or", "and"):
            results.append(any(taken) if operation == "or" else all(taken))
        elif operation in ("verify rel", "choose rel"):
            (only,) = taken[0]
            name, relation, number = re.fullmatch(r"(.+),(.+),o \((\d+)\)", argument).groups()
            assert name_of(things[int(number)]) == name
            holds = [r for r in relation.split("|") if truth.is_(name_of(things[only]), r, name)]
            results.append(bool(holds) if operation == "verify rel" else holds[0].split()[2])
        else:
            raise AssertionError(f"{operation} is not an operation of GQA")
    return {True: "yes", False: "no"}.get(results[-1], results[-1])


def test_gqa_entailed_questions_have_a_settled_answer(world, graphs):
    """What is listed as entailed follows: no scene with the same answer to the first gives another to the second."""
    records = read_json(world / "gqa/testdev_balanced_questions.json")
    scenes = [Truth(graph) for name, graph in graphs.items() if name.startswith("gqa/")]
    for record in records.values():
        for other_id in record["entailed"]:
            other = records[other_id]
            for truth in scenes:
                try:
                    if truth.answer(record["question"]) == record["answer"]:
                        assert truth.answer(other["question"]) == other["answer"]
                except (ValueError, KeyError):  # the scene has not what is spoken of, or has it twice
                    continue


def test_vizwiz(world, graphs):
    for split in ("val", "test"):
        records, lines = read_json(world / f"vizwiz/{split}.json"), read_jsonl(world / f"vizwiz/llava_{split}.jsonl")
        assert len(records) == len(lines) == 60
        for number, (record, line) in enumerate(zip(records, lines)):
            assert record["image"] == line["image"] == f"VizWiz_{split}_{number:08d}.jpg"
            insufficient = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
            assert line["question_id"] == number and line["text"] == record["question"] + insufficient + SHORT
            answer = Truth(graphs[f"vizwiz/{split}/{record['image']}"]).answer(record["question"])
            if split == "test":
                assert set(record) == {"image", "question"}
                continue
            given = Counter(entry["answer"] for entry in record["answers"])
            assert len(record["answers"]) == 10 and given.most_common(1)[0] == (answer, 8)
            assert record["answerable"] == int(answer != "unanswerable")
            kind = {"yes": "yes/no", "no": "yes/no", "unanswerable": "unanswerable"}.get(answer, "other")
            assert record["answer_type"] == ("number" if answer.isdigit() else kind)
    types = Counter(record["answer_type"] for record in read_json(world / "vizwiz/val.json"))
    assert types["unanswerable"] == 15 and set(types) == {"yes/no", "number", "other", "unanswerable"}


def test_scienceqa(world, graphs):
    problems, splits = read_json(world / "scienceqa/problems.json"), read_json(world / "scienceqa/pid_splits.json")
    lines = {line["id"]: line for line in read_json(world / "scienceqa/llava_test_CQM-A.json")}
    assert list(lines) == splits["test"] and set(problems) == {*splits["test"], *splits["train"]} and splits["train"]
    assert {problem["split"] for problem in problems.values()} == {"train", "test"}
    seen = Counter()
    for pid, line in lines.items():
        problem = problems[pid]
        options, hint = problem["choices"], problem["hint"]
        human, reply = (turn["value"] for turn in line["conversations"])
        listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options))
        context = f"Context: {hint}\n" if hint else ""
        mark = "<image>\n" if problem["image"] else ""
        assert human == f"{mark}{context}{problem['question']}\n{listed}" and "  " not in human
        assert reply == LETTERS[problem["answer"]] and 2 <= len(set(options)) == len(options) <= 5
        assert ("image" in line) == bool(problem["image"]) and line.get(
            "image", f"{pid}/image.png"
        ) == f"{pid}/image.png"
        assert {turn["from"] for turn in line["conversations"]} == {"human", "gpt"}
        seen[bool(problem["image"]), bool(hint)] += 1
        graph = graphs.get(f"scienceqa/images/test/{pid}/image.png")
        if graph is not None:
            if hint:
                assert hint == f"There are {len(graph['things'])} things in the picture."
            assert right_options(Truth(graph), problem["question"], options) == [problem["answer"]]
        elif hint:
            assert right_options(from_words(hint), problem["question"], options) == [problem["answer"]]
        else:
            (kind,) = re.fullmatch(r"How many corners does a (\w+) have\?", problem["question"]).groups()
            assert options[problem["answer"]] == {"circle": "0", "triangle": "3", "square": "4"}[kind]
    assert seen == {(True, False): 24, (True, True): 12, (False, True): 12, (False, False): 12}
    assert {problem["subject"] for problem in problems.values()} == {
        "natural science", "social science", "language science"
    }  # fmt: skip


def from_words(hint: str) -> Truth:
    """The scene that a hint tells of."""
    cells = {PLACES[row][col]: (row, col) for row in range(3) for col in range(3)}
    things = []
    for first, second, where in re.findall(r"(?:an?|the) (\w+) (\w+) at the ([a-z ]+?)(?=, | and |\.)", hint):
        row, col = cells[where]
        digit = first == "digit"
        kind, shade, value = ("digit", "white", int(second)) if digit else (second, first, None)
        things.append({"kind": kind, "color": shade, "row": row, "col": col, "value": value})
    return Truth({"things": things})


def test_textvqa(world, graphs):
    content_ = read_json(world / "textvqa/TextVQA_0.5.1_val.json")
    lines = read_jsonl(world / "textvqa/llava_textvqa_val_v051_ocr.jsonl")
    assert len(content_["data"]) == len(lines)
    right_tokens = []
    for record, line in zip(content_["data"], lines):
        truth = Truth(graphs[f"textvqa/train_images/{record['image_id']}.jpg"])
        asked, tokens, _ = line["text"].split("\n")
        assert line["question_id"] == record["image_id"] and line["image"] == f"{record['image_id']}.jpg"
        assert asked == record["question"] and tokens.startswith("Reference OCR token: ")
        answer = truth.answer(asked)
        allowed = {answer, NUMBERS[int(answer)]} if answer.isdigit() else {answer}
        assert (
            set(record["answers"]) == allowed and record["answers"].count(answer) >= 7 and len(record["answers"]) == 10
        )
        read = [int(token) for token in tokens.removeprefix("Reference OCR token: ").split(", ") if token]
        assert len(read) == len(truth.values())
        right_tokens += [a == b for a, b in zip(read, truth.values())]
        assert (record["image_width"], record["image_height"]) == (96, 96)
    keys = {(record["image_id"], record["question"].lower()) for record in content_["data"]}
    assert len(keys) == 60 and len({line["question_id"] for line in lines}) < 60
    assert any(line["text"].split("\n")[1] == "Reference OCR token: " for line in lines)
    assert 0.6 < np.mean(right_tokens) < 1


def test_pope(world, graphs):
    lines = read_jsonl(world / "pope/llava_pope_test.jsonl")
    assert [line["question_id"] for line in lines] == list(range(1, 61))
    pictures = {name: graph for name, graph in graphs.items() if name.startswith("pope/")}
    often = Counter(name_of(thing) for graph in pictures.values() for thing in graph["things"])
    asked: dict[str, dict] = {}
    for category in ("random", "popular", "adversarial"):
        labels = read_jsonl(world / f"pope/coco/coco_pope_{category}.json")
        mine = [line for line in lines if line["category"] == category]
        assert [line["text"] for line in mine] == [label["text"] + SHORT for label in labels]
        assert [line["image"] for line in mine] == [label["image"] for label in labels]
        assert [label["question_id"] for label in labels] == list(range(1, 21))
        assert [label["label"] for label in labels] == ["yes", "no"] * 10
        asked[category] = defaultdict(list)
        for label in labels:
            truth = Truth(graphs[f"pope/val2014/{label['image']}"])
            assert truth.answer(label["text"]) == label["label"]
            if label["label"] == "no":
                name = re.fullmatch(r"Is there an? (.+) in the image\?", label["text"])[1]
                asked[category][label["image"]].append(name)
    assert asked["random"] != asked["popular"] != asked["adversarial"]
    for category, rank in (("popular", lambda name, graph: often[name]), ("adversarial", likeness)):
        for image, names in asked[category].items():
            graph = graphs[f"pope/val2014/{image}"]
            absent = {f"{c} {s}" for c in COLORS for s in SHAPES} - {name_of(t) for t in graph["things"]}
            best = sorted((rank(name, graph) for name in absent), reverse=True)[: len(names)]
            assert sorted((rank(name, graph) for name in names), reverse=True) == best
    assert max(Counter(label["image"] for label in labels).values()) > 2


def likeness(name: str, graph: dict) -> int:
    return sum(word in (thing["color"], thing["kind"]) for thing in graph["things"] for word in name.split())


def test_mme(world, graphs):
    """Looked up as the official converter does: subtask, text file, question (with one space or two)."""
    root = world / "mme/MME_Benchmark_release_version"
    truths = {}
    for folder in root.iterdir():
        apart = (folder / "images").is_dir()
        assert apart == (folder.name in ("posters", "celebrity", "scene"))
        for file in (folder / "questions_answers_YN" if apart else folder).glob("*.txt"):
            asked = [line.split("\t") for line in file.read_text(encoding="utf-8").strip().split("\n")]
            assert sorted(answer for _, answer in asked) == ["No", "Yes"]
            truths |= {(folder.name, file.name, question): answer for question, answer in asked}
    lines = read_jsonl(world / "mme/llava_mme.jsonl")
    spaces = Counter()
    for line in lines:
        subtask, name = line["question_id"].split("/")[0], line["question_id"].split("/")[-1]
        question = line["text"].removesuffix(SHORT)
        keys = [(subtask, name.replace(".jpg", ".txt"), f"{question}{s}Please answer yes or no.") for s in (" ", "  ")]
        (found,) = [
            truths.pop(key) for key in keys if key in truths and not spaces.update([len(key[2]) - len(question)])
        ]
        graph = graphs[f"mme/MME_Benchmark_release_version/{line['image']}"]
        assert Truth(graph).answer(question) == found.lower(), question
        assert line["question_id"] == line["image"] and line["category"] == subtask
    assert not truths and len(spaces) == 2
    assert [line["image"] for line in lines[::2]] == [line["image"] for line in lines[1::2]]
    perception = {"existence", "count", "position", "color", "posters", "celebrity", "scene", "OCR"}
    cognition = {"commonsense_reasoning", "numerical_calculation", "text_translation"}
    assert {line["category"] for line in lines} == perception | cognition


def test_mmbench(world, graphs):
    english = read_table(world / "mmbench/mmbench_dev_20230712.tsv", "\t")
    chinese = read_table(world / "mmbench_cn/mmbench_dev_cn_20231003.tsv", "\t")
    groups = defaultdict(list)
    for row, other in zip(english, chinese, strict=True):
        options = [row[letter] for letter in "ABCD" if row[letter]]
        assert not any(row[letter] for letter in "ABCD"[len(options) :])
        graph = graphs[f"mmbench/mmbench_dev_20230712.tsv:{int(row['index']) % 1_000_000}"]
        right = right_options(Truth(graph), row["question"], options)
        assert [LETTERS[i] for i in right] == [row["answer"]], row["question"]
        assert row["hint"] in ("", f"There are {len(graph['things'])} things in the picture.")
        same = ("index", "answer", "category", "image", "source", "l2-category", "comment", "split")
        assert [row[key] for key in same] == [other[key] for key in same]
        assert [in_chinese(option) for option in options] == [other[letter] for letter in "ABCD" if other[letter]]
        assert bool(row["hint"]) == bool(other["hint"]) and re.search("[\u4e00-\u9fff]", other["question"])
        groups[int(row["index"]) % 1_000_000].append((int(row["index"]) // 1_000_000, options, row))
    assert len(groups) == 60 and [int(row["index"]) for row in english] == sorted(int(row["index"]) for row in english)
    for rows in groups.values():
        _, first, head = rows[0]
        assert [round_ for round_, _, _ in rows] == list(range(len(first)))
        for round_, options, row in rows:
            assert options == first[round_:] + first[:round_]
            assert row[row["answer"]] == head[head["answer"]] and row["hint"] == head["hint"]
            assert row["question"] == head["question"] and row["image"] == head["image"]
    assert {len(rows) for rows in groups.values()} == {2, 3, 4}
    assert 5 < sum(bool(rows[0][2]["hint"]) for rows in groups.values()) < 55
    assert {row["l2-category"] for row in english} == {
        "coarse_perception", "finegrained_perception (instance-level)", "finegrained_perception (cross-instance)",
        "logic_reasoning", "relation_reasoning", "attribute_reasoning",
    }  # fmt: skip


def test_seedbench(world, graphs):
    content_ = read_json(world / "seedbench/SEED-Bench.json")
    lines = read_jsonl(world / "seedbench/llava-seed-bench.jsonl")
    assert content_["question_type"] == {
        "Scene Understanding": 1, "Instance Identity": 2, "Instance Location": 3, "Instance Attributes": 4,
        "Instances Counting": 5, "Spatial Relation": 6, "Instance Interaction": 7, "Visual Reasoning": 8,
        "Text Understanding": 9, "Action Recognition": 10, "Action Prediction": 11, "Procedure Understanding": 12,
    }  # fmt: skip
    for record, line in zip(content_["questions"], lines, strict=True):
        options = [record[f"choice_{letter}"] for letter in "abcd"]
        assert len(set(options)) == 4
        listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options))
        letter = "\nAnswer with the option's letter from the given choices directly."
        assert line["text"] == f"{record['question']}\n{listed}{letter}"
        graph = graphs[f"seedbench/{line['image']}"]
        if record["data_type"] == "image":
            assert record["question_type_id"] <= 9 and line["question_id"] == int(record["question_id"])
            assert line["image"] == f"SEED-Bench-image/{record['data_id']}" and "." not in record["data_id"]
            right = right_options(Truth(graph), record["question"], options)
        else:
            assert line["question_id"] == record["question_id"] and record["question_id"].startswith("v")
            assert line["image"] == f"SEED-Bench-video-image/{record['question_type_id']}_{record['question_id']}.png"
            assert ("segment" in record) == (record["question_type_id"] > 10)
            right = [options.index(in_the_video(graph, record["question"], record["question_type_id"]))]
        assert [LETTERS[i] for i in right] == [record["answer"]], record["question"]
    types = Counter(record["question_type_id"] for record in content_["questions"])
    assert types == dict.fromkeys(range(1, 13), 5)


def in_the_video(graph: dict, question: str, type_id: int) -> str:
    frames = graph["frames"]
    assert frames[1]["things"] == graph["things"]
    name = re.search(r"(?:the|The) ((?:\w+ )?(?:circle|square|triangle|star|digit)) ", question)[1]
    moving = [Truth(frame).only(name) for frame in frames]
    cells = [(thing["row"], thing["col"]) for thing in moving]
    assert all(0 <= row < 3 and 0 <= col < 3 for row, col in cells)
    for frame in frames:  # nothing stands on anything else
        assert len({place_of(thing) for thing in frame["things"]}) == len(frame["things"])
    step = (cells[1][0] - cells[0][0], cells[1][1] - cells[0][1])
    assert step == (cells[2][0] - cells[1][0], cells[2][1] - cells[1][1])
    if type_id == 10:
        ways = {(-1, 0): "moves up", (1, 0): "moves down", (0, -1): "moves to the left", (0, 1): "moves to the right"}
        return ways[step]
    return place_of(moving[2]) if type_id == 11 else ", ".join(place_of(thing) for thing in moving)


def test_llava_bench(world, graphs):
    questions = read_jsonl(world / "llava_bench/questions.jsonl")
    references = read_jsonl(world / "llava_bench/answers_gpt4.jsonl")
    contexts = read_jsonl(world / "llava_bench/context.jsonl")
    assert [q["question_id"] for q in questions] == [r["question_id"] for r in references] == list(range(60))
    assert Counter(q["category"] for q in questions) == {"conv": 20, "detail": 20, "complex": 20}
    assert {type(context["caption"]) for context in contexts} == {str, list}
    assert {context["image"] for context in contexts} == {q["image"] for q in questions}
    for context in contexts:
        told = context["caption"] if isinstance(context["caption"], str) else " ".join(context["caption"])
        assert context["image"] == f"{context['id']}.jpg"
        assert told_things(told) == drawn_things(graphs[f"llava_bench/images/{context['image']}"]["things"])
    for question, reference in zip(questions, references):
        truth = Truth(graphs[f"llava_bench/images/{question['image']}"])
        assert reference["prompt"] == question["text"]
        if question["category"] == "conv":
            assert f" {truth.answer(question['text'])}" in reference["text"]
        elif question["category"] == "detail":
            assert told_things(reference["text"]) == drawn_things(truth.things)
        else:
            kind = re.fullmatch(r"If every (\w+) were taken away, what would be left, and why\?", question["text"])[1]
            what, _, why = reference["text"].partition(" would be left, because ")
            named = re.findall(r"(?:an?|the) (\w+ \w+) at the ([a-z ]+?)(?:,|$)", what[0].lower() + what[1:])
            assert sorted(named) == drawn_things(truth.without(kind))
            assert why.startswith(f"{len(truth.called(kind))} of the {len(truth.things)} things")


def told_things(text: str) -> list[tuple[str, str]]:
    said = re.findall(r"At the ([a-z ]+) there is (?:an?|the) (\w+ \w+)\.", text)
    return sorted((what, where) for where, what in said)


def drawn_things(things: list[dict]) -> list[tuple[str, str]]:
    return sorted((label_of(thing), place_of(thing)) for thing in things)


def test_mmvet(world, graphs):
    items, lines = read_json(world / "mmvet/mm-vet.json"), read_jsonl(world / "mmvet/llava-mm-vet.jsonl")
    assert list(items) == [f"v1_{i}" for i in range(60)] and [line["question_id"] for line in lines] == list(range(60))
    for item, line in zip(items.values(), lines):
        assert line["image"] == item["imagename"] and line["text"] == item["question"]
        truth = Truth(graphs[f"mmvet/images/{item['imagename']}"])
        parts = [part.split("<OR>") for part in item["answer"].split("<AND>")]
        if item["question"].startswith("Describe"):
            assert truth.shows(", ".join(part[0] for part in parts) + ".")
        elif item["question"].startswith("Which digit is in the image"):
            (value,) = truth.values()
            assert parts == [[str(value), NUMBERS[value]], [place_of(truth.only("digit"))]]
        else:
            answer = truth.answer(item["question"])
            words = [answer, NUMBERS[int(answer)]] if answer.isdigit() and int(answer) < 10 else [answer]
            assert parts == [words]
    capabilities = {capability for item in items.values() for capability in item["capability"]}
    assert capabilities == {"rec", "ocr", "know", "gen", "spat", "math"}
    assert len({item["imagename"] for item in items.values()}) < 60


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
    """The quality that a picture is said to have is measured on its pixels, beside the same scene drawn anew."""
    records = read_json(world / "qbench/llvisionqa_dev.json")
    seen = Counter()
    for number, record in enumerate(records):
        assert record["img_path"] == f"{number:05d}.jpg"
        graph = graphs[f"qbench/images/{record['img_path']}"]
        with Image.open(world / "qbench/images" / record["img_path"]) as image:
            picture = np.asarray(image).astype(float)
        clean = np.asarray(draw(as_scene(graph))).astype(float)
        inside = np.ones((96, 96), bool)
        if graph["local"] is not None:
            thing = graph["things"][graph["local"]]
            top, left = 32 * thing["row"], 32 * thing["col"]
            cell, inside = np.zeros((2, 96, 96), bool)
            cell[top : top + 32, left : left + 32] = True
            inside[top + 3 : top + 29, left + 3 : left + 29] = True  # not the rim between spoiled and clean
            assert thing["kind"] in record["question"] and record["concern"] == 2
            assert np.abs(picture - clean)[~cell].mean() < 4
        found = measured_quality(picture, clean, inside)
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


def measured_quality(picture: np.ndarray, clean: np.ndarray, inside: np.ndarray) -> str:
    def edges(image: np.ndarray) -> float:
        bent = np.abs(4 * image[1:-1, 1:-1] - image[:-2, 1:-1] - image[2:, 1:-1] - image[1:-1, :-2] - image[1:-1, 2:])
        return float(bent[inside[1:-1, 1:-1]].mean())

    if picture[inside].mean() < 0.4 * clean[inside].mean():
        return "dark"
    ratio = edges(picture) / edges(clean)
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


# --- again and again -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_one_alone_gives_the_bytes_of_all_together(world, tmp_path, name):
    written = WRITERS[name](tmp_path / "alone", SETTINGS)
    assert written.questions == 60
    assert digests(tmp_path / "alone") == digests(world / name)


def test_another_seed_gives_other_questions_and_one_question_is_enough(world, tmp_path):
    write_all(tmp_path, Settings(seed=1, questions=1), log=lambda text: None)
    counts = {name: entry["questions"] for name, entry in read_json(tmp_path / "world.json")["benchmarks"].items()}
    least = {"pope": 6, "mme": 22, "seedbench": 12, "mmvp": 2}  # the fewest with every category, subtask, type and pair
    assert counts == {name: least.get(name, 1) for name in WRITERS}
    for name in ("gqa/images/n900000.jpg", "mmvp/MMVP Images/1.jpg", "pope/val2014/COCO_val2014_000000000001.jpg"):
        assert (tmp_path / name).read_bytes() != (world / name).read_bytes()


def test_made_once_and_never_over_other_files(tmp_path, capsys):
    output = tmp_path / "made"
    assert main(["--output", str(output), "--questions", "2"]) == 0
    stamp = (output / "scenes.json").stat().st_mtime_ns
    assert main(["--output", str(output), "--questions", "2"]) == 0
    assert "nothing to make" in capsys.readouterr().out and (output / "scenes.json").stat().st_mtime_ns == stamp
    record = read_json(output / "world.json")
    (output / "world.json").write_text(json.dumps(record | {"complete": False}))
    (output / "mme/MME_Benchmark_release_version/count/9999.txt").write_text("left over from an interrupted call")
    assert main(["--output", str(output), "--questions", "2"]) == 0
    assert not list(output.rglob("9999.txt")) and read_json(output / "world.json") == record

    real = tmp_path / "eval"
    (real / "gqa").mkdir(parents=True)
    (real / "gqa/testdev_balanced_questions.json").write_text("the real ones")
    for world_file in (None, {"settings": {}, "held_out_answers": {}}, ["something else"]):
        if world_file is not None:
            (real / "world.json").write_text(json.dumps(world_file))
        assert main(["--output", str(real)]) == 2
        assert "other files" in capsys.readouterr().err
    assert (real / "gqa/testdev_balanced_questions.json").read_text() == "the real ones"
    for wrong in (["--questions", "0"], ["--seed", "-1"]):
        with pytest.raises(SystemExit):
            main(["--output", str(tmp_path / "new"), *wrong])
