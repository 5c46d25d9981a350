"""GQA: answers, programs, annotated words, and what follows from what."""

from __future__ import annotations

import re
from collections import Counter, defaultdict

from tests.shapes.benchmarks.truth import SHORT, Truth, name_of, read_json, read_jsonl


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
                except (ValueError, KeyError):  # the scene lacks what is asked about, or has it twice
                    continue
