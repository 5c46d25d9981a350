"""LLaVA-Bench and MM-Vet: sentences and parts of answers that say what is there."""

from __future__ import annotations

import re
from collections import Counter

from tests.shapes.benchmarks.truth import NUMBERS, Truth, label_of, place_of, read_json, read_jsonl


def test_llava_bench(world, graphs):
    questions = read_jsonl(world / "llava_bench/questions.jsonl")
    references = read_jsonl(world / "llava_bench/answers_gpt4.jsonl")
    contexts = read_jsonl(world / "llava_bench/context.jsonl")
    assert [q["question_id"] for q in questions] == [r["question_id"] for r in references] == list(range(60))
    assert Counter(q["category"] for q in questions) == {"conv": 20, "detail": 20, "complex": 20}
    assert {type(context["caption"]) for context in contexts} == {str, list}
    assert {context["image"] for context in contexts} == {q["image"] for q in questions}
    for context in contexts:
        described = context["caption"] if isinstance(context["caption"], str) else " ".join(context["caption"])
        assert context["image"] == f"{context['id']}.jpg"
        assert described_things(described) == drawn_things(graphs[f"llava_bench/images/{context['image']}"]["things"])
    for question, reference in zip(questions, references):
        truth = Truth(graphs[f"llava_bench/images/{question['image']}"])
        assert reference["prompt"] == question["text"]
        if question["category"] == "conv":
            assert f" {truth.answer(question['text'])}" in reference["text"]
        elif question["category"] == "detail":
            assert described_things(reference["text"]) == drawn_things(truth.things)
        else:
            kind = re.fullmatch(r"If every (\w+) were taken away, what would be left, and why\?", question["text"])[1]
            what, _, why = reference["text"].partition(" would be left, because ")
            named = re.findall(r"(?:an?|the) (\w+ \w+) at the ([a-z ]+?)(?:,|$)", what[0].lower() + what[1:])
            assert sorted(named) == drawn_things(truth.without(kind))
            assert why.startswith(f"{len(truth.called(kind))} of the {len(truth.things)} things")


def described_things(text: str) -> list[tuple[str, str]]:
    named = re.findall(r"At the ([a-z ]+) there is (?:an?|the) (\w+ \w+)\.", text)
    return sorted((what, where) for where, what in named)


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
