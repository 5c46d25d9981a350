"""POPE and MME: yes and no in pairs, and the rank of what is absent."""

from __future__ import annotations

import re
from collections import Counter, defaultdict

from llava_sp.shapes.world import COLORS, SHAPES
from tests.shapes.benchmarks.truth import SHORT, Truth, name_of, read_jsonl


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
