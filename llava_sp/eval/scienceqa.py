"""ScienceQA (Lu et al. 2022): school questions with two to five options, about half of them with a picture.

    python -m llava_sp.eval.scienceqa --model M --data D --output O [--split test|val|train|minitest|minival]

D holds, under their official names (in D itself or one folder below), problems.json and pid_splits.json, and the
pictures images/test/<problem>/image.png (or test/<problem>/image.png). LLaVA's question file llava_test_CQM-A.json is
taken where it is there; without it the same prompts are made from problems.json. (LLaVA's own script
convert_sqa_to_llava.py makes another layout, with which no published figure was made: such a file is refused.)

Published for LLaVA-1.5-7B: 66.8, the accuracy on the questions with a picture (IMG); that is the headline here. All
questions are asked, those without a picture as text alone; a split (or a --limit) without any picture has no score.
The LLaVA scripts of October 2023 cropped the middle of each picture where today's pad it to a square; which of them
the published figure was made with is not known: `--image-aspect-ratio crop` gives the older way.

Protocols, with the same prompts: `llava15` counts the letter alone, "A. ..." or one "The answer is A."; anything else,
also "A." or "a", is wrong. `lmms_eval` counts the letter alone in either case or before a period, and generates 16
tokens.

LLaVA's scorer leaves questions without an answer out of the IMG accuracy (a picture cannot be seen in a prompt that is
not there); here missing answers are an error. `metrics` holds the table of the official ScienceQA scorer (subjects,
context, grades, topics) too; where it divides by zero or prints -1, a group without questions is left out.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava_sp.common.files import examples
from llava_sp.decoding import Generation
from llava_sp.eval.base import LLAVA15, LLAVA15_LORA, LLAVA_SP, OPTION_LETTER, Benchmark, Category, Item, Scores
from llava_sp.eval.cli import main
from llava_sp.eval.inputs.checks import (
    compare_ids,
    expect,
    expect_all,
    expect_once,
    find,
    find_one,
    first_folder,
    inside,
)
from llava_sp.eval.scoring.letters import by_letter, lettered, llava_scienceqa, lmms_scienceqa, not_in, percent
from llava_sp.model.conversation import IMAGE_MARK

_PROBLEM = {"question": str, "choices": list, "answer": int, "hint": str, "subject": str, "grade": str, "topic": str}
_LINE = {"id": (str, int), "conversations": list}
_SUBJECTS = ("natural science", "social science", "language science")
_SPACES = re.compile(" {2,}")  # LLaVA's file has none
_GRADES = {"grades 1-6": range(1, 7), "grades 7-12": range(7, 13)}


class ScienceQA(Benchmark):
    name = "scienceqa"
    title = "ScienceQA accuracy on questions with a picture, in percent"
    splits = ("test", "val", "train", "minitest", "minival")
    protocols = ("llava15", "lmms_eval")
    unscored = "none of them has a picture, and the score is of those that have one (metrics.json holds the rest)"
    generation = Generation(max_new_tokens=1024)
    generations: ClassVar = {"lmms_eval": Generation(max_new_tokens=16)}
    published: ClassVar = {LLAVA15: 66.8, LLAVA15_LORA: 68.4, LLAVA_SP: 68.4}

    def load(self, data: Path) -> list[Item]:
        self.data = data
        self.split = self.split or "test"
        splits_file = find_one(data, "pid_splits.json", what="list of problems per split")
        wanted = self.read_json(splits_file)
        expect(wanted, {self.split: list}, str(splits_file))
        ids = [str(i) for i in wanted[self.split]]
        if not ids:
            raise ValueError(f"{splits_file} lists no problems for {self.split}")
        expect_once(ids, splits_file, "problem id")
        file = find_one(data, "problems.json", what="problems")
        problems = self.read_json(file)
        expect(problems, {}, str(file))
        absent = [i for i in ids if i not in problems]
        if absent:
            raise ValueError(
                f"{file} lacks {len(absent)} problems of {self.split} ({examples(absent)}): of another version?"
            )
        texts = self._llava_texts(ids)
        return [self._item(i, problems[i], texts.get(i), f"{file}: problem {i}") for i in ids]

    def _llava_texts(self, ids: list[str]) -> dict[str, str]:
        """What LLaVA's question file asks, by problem; {} where there is none."""
        found = find(self.data, f"llava_{self.split}_CQM-A.json")
        if not found:
            return {}
        lines = self.read_json(found[0])
        expect_all(lines, _LINE, found[0])
        trouble = compare_ids([str(line["id"]) for line in lines], ids, "question")
        if trouble:
            raise ValueError(f"{found[0]} does not fit pid_splits.json: {trouble}")
        texts = {}
        for line in lines:
            where = f"{found[0]}: question {line['id']}"
            turn = line["conversations"][0] if line["conversations"] else None
            expect(turn, {"value": str}, f"{where}: the first turn")
            texts[str(line["id"])] = turn["value"]
            if ("image" in line) != (IMAGE_MARK in turn["value"]):
                raise ValueError(f"{where} has an image without {IMAGE_MARK} in its text, or the other way round")
        return texts

    def _item(self, pid: str, problem: dict[str, Any], llava: str | None, where: str) -> Item:
        expect(problem, _PROBLEM, where)
        choices = problem["choices"]
        if not all(isinstance(choice, str) for choice in choices) or not 2 <= len(choices) <= 5:
            raise ValueError(f"{where}: choices is {str(choices)[:60]}, not two to five texts")
        if not 0 <= problem["answer"] < len(choices):
            raise ValueError(f"{where}: answer is {problem['answer']}, not the number of one of {len(choices)} choices")
        options = by_letter(choices)
        context = f"Context: {problem['hint']}\n" if problem["hint"] else ""
        text = _SPACES.sub(" ", f"{context}{problem['question']}\n{lettered(options)}").strip()
        images: tuple[Path, ...] = ()
        if problem.get("image"):
            expect(problem, {"image": str}, where)
            images = (inside(self._image_folder(problem) / pid, problem["image"], where),)
        if llava is not None:
            asked = llava.replace(IMAGE_MARK, "").strip()
            _check_llava(asked, bool(IMAGE_MARK in llava), problem, bool(images), where)
            text = asked
        facts = {key: problem[key] for key in ("question", "hint", "subject", "grade", "topic")}
        return Item(pid, text, images, list(options)[problem["answer"]], {**facts, "options": options})

    def _image_folder(self, problem: dict[str, Any]) -> Path:
        if self.images is not None:
            return self.images
        split = str(problem.get("split") or self.split.removeprefix("mini"))
        return first_folder([self.data / "images" / split, self.data / split, self.data / "images"])

    def prompt(self, item: Item) -> str:
        return item.text + OPTION_LETTER

    def record(self, item: Item) -> dict[str, Any]:
        return {"question_id": item.id, "prompt": self.message(item)}  # LLaVA's has the image mark, here alone

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> Scores:
        infer = lmms_scienceqa if self.protocol == "lmms_eval" else llava_scienceqa
        per_item = []
        for item, text in zip(items, answers):
            letter = infer(text)
            per_item.append(
                {
                    "question_id": item.id,
                    "score": 100.0 if letter == item.reference else 0.0,
                    "answer": letter,
                    "text": text,
                    "image": f"{item.id}/{item.images[0].name}" if item.images else None,
                    "references": [item.reference],
                    **item.metadata,
                }
            )
        groups = {name: members for name, members in _groups(per_item).items() if members}
        metrics: dict[str, Any] = {"accuracy": _accuracy(per_item), "correct": _correct(per_item)}
        metrics["count"] = len(per_item)
        with_image = [record for record in per_item if record["image"]]
        score = self.headline(per_item) if with_image else None
        metrics["image_accuracy"] = score
        metrics |= {"image_correct": _correct(with_image), "image_count": len(with_image)}
        metrics["not_understood"] = sum(record["answer"] is None for record in per_item)
        metrics["by_topic"] = {
            topic: _accuracy([r for r in per_item if r["topic"] == topic])
            for topic in sorted({record["topic"] for record in per_item})
        }
        categories = {name: Category(_accuracy(members), len(members)) for name, members in groups.items()}
        return Scores(score, metrics, per_item, categories, len(with_image), "questions with a picture")

    @classmethod
    def headline(cls, per_item: Sequence[Mapping[str, Any]]) -> float:
        """The accuracy on questions with a picture; 0 where a sample has none of them."""
        return _accuracy([record for record in per_item if record["image"]])


def _groups(per_item: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The columns of ScienceQA's table, in its order."""
    groups = {name: [r for r in per_item if r["subject"] == name] for name in _SUBJECTS}
    groups["text context"] = [r for r in per_item if r["hint"]]
    groups["image context"] = [r for r in per_item if r["image"]]
    groups["no context"] = [r for r in per_item if not r["hint"] and not r["image"]]
    for name, grades in _GRADES.items():
        groups[name] = [r for r in per_item if r["grade"] in {f"grade{grade}" for grade in grades}]
    return groups


def _check_llava(asked: str, has_image: bool, problem: dict[str, Any], needs_image: bool, where: str) -> None:
    """Raises ValueError if LLaVA's question file asks something else than the problem."""
    missing = not_in(asked, (problem["question"], *problem["choices"]))
    if missing is not None or has_image != needs_image or "\nOptions: (A)" in asked:
        what = "the picture or the layout is another" if missing is None else f"{missing[:60]!r} is not in it"
        raise ValueError(
            f"{where}: LLaVA's question file asks {asked[:60]!r}...: {what}. Needed is the llava_test_CQM-A.json of "
            "LLaVA's eval.zip; without it the same questions are made from problems.json"
        )


def _correct(records: Sequence[Mapping[str, Any]]) -> int:
    return sum(record["score"] > 0 for record in records)


def _accuracy(records: Sequence[Mapping[str, Any]]) -> float:
    return percent(_correct(records), len(records))


if __name__ == "__main__":
    sys.exit(main(ScienceQA))
