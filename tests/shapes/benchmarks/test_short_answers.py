"""VQAv2, VizWiz and TextVQA: ten answers each, and the OCR tokens."""

from __future__ import annotations

from collections import Counter

import numpy as np

from tests.shapes.benchmarks.truth import NUMBERS, SHORT, Truth, read_json, read_jsonl


def test_vqav2(world, graphs):
    asked = read_json(world / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json")["questions"]
    given = read_json(world / "vqav2/v2_mscoco_val2014_annotations.json")["annotations"]
    for question, annotation in zip(asked, given):
        graph = graphs[f"vqav2/val2014/COCO_val2014_{question['image_id']:012d}.jpg"]
        assert Truth(graph).answer(question["question"]) == annotation["multiple_choice_answer"]


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
