"""ScienceQA, MMBench in two languages and SEED-Bench: one option is right, and it is the one recorded."""

from __future__ import annotations

import re
from collections import Counter, defaultdict

from llava_sp.shapes.world import PLACES
from tests.shapes.benchmarks.truth import (
    LETTERS,
    Truth,
    in_chinese,
    place_of,
    read_json,
    read_jsonl,
    read_table,
    right_options,
)


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
    """The scene that a hint describes."""
    cells = {PLACES[row][col]: (row, col) for row in range(3) for col in range(3)}
    things = []
    for first, second, where in re.findall(r"(?:an?|the) (\w+) (\w+) at the ([a-z ]+?)(?=, | and |\.)", hint):
        row, col = cells[where]
        digit = first == "digit"
        kind, shade, value = ("digit", "white", int(second)) if digit else (second, first, None)
        things.append({"kind": kind, "color": shade, "row": row, "col": col, "value": value})
    return Truth({"things": things})


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
