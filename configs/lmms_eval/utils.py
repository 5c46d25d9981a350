"""What the tasks of this folder call: VQAv2's official files in `../vqav2`, its scorer from llava_sp."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from llava_sp.eval.base import SHORT_ANSWER
from llava_sp.eval.scoring.vqa import evalai_answer, percent, vqa_accuracy

DATA = Path(__file__).parent.parent / "vqav2"


@lru_cache(maxsize=1)
def annotations() -> dict[int, dict[str, Any]]:
    content = json.loads((DATA / "v2_mscoco_val2014_annotations.json").read_text(encoding="utf-8"))
    return {record["question_id"]: record for record in content["annotations"]}


@lru_cache(maxsize=1)
def answers_by_type() -> dict[str, list[str]]:
    """Every answer that occurs to a type of question ("what color is the", "how many", ...)."""
    found: dict[str, set[str]] = {}
    for record in annotations().values():
        found.setdefault(record["question_type"], set()).add(record["multiple_choice_answer"])
    return {kind: sorted(answers) for kind, answers in found.items()}


def visual(doc: dict[str, Any]) -> list[str]:
    return [str(DATA / "val2014" / f"COCO_val2014_{doc['image_id']:012d}.jpg")]


def text(doc: dict[str, Any]) -> str:
    return doc["question"] + SHORT_ANSWER


def target(doc: dict[str, Any]) -> str:
    return annotations()[doc["question_id"]]["multiple_choice_answer"]


def choices(doc: dict[str, Any]) -> list[str]:
    return answers_by_type()[annotations()[doc["question_id"]]["question_type"]]


def score(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """VQAv2 accuracy (0 to 1) of one answer, as `python -m llava_sp.eval.vqav2` computes it."""
    return {"vqa_accuracy": vqa_accuracy(evalai_answer(results[0]), annotations()[doc["question_id"]]["answers"])}


def mean(accuracies: Sequence[float]) -> float:
    return percent(accuracies)
