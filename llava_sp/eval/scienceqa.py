"""ScienceQA (Lu et al. 2022): school questions with two to five options, about half of them with an image.

    python -m llava_sp.eval.scienceqa --model M --data D --output O [--split test|val|train|minitest|minival]

D holds, under their official names (in D itself or one folder below), problems.json and pid_splits.json, and the
images images/test/<problem>/image.png (or test/<problem>/image.png). LLaVA's question file llava_test_CQM-A.json is
used if it is there; without it the same prompts are made from problems.json. (LLaVA's convert_sqa_to_llava.py makes
another layout, with which no published figure was made: such a file is not supported.)

Published for LLaVA-1.5-7B: 66.8, the accuracy on the questions with an image (IMG); that is the headline here. All
questions are asked, those without an image as text alone; a split (or a --limit) without any image has no score. LLaVA's
scripts of October 2023 cropped the middle of each image where today's pad it to a square; which of them the published
figure comes from is not known: `--image-aspect-ratio crop` gives the older way.

Protocols, with the same prompts: `llava15` counts the letter alone, "A. ..." or one "The answer is A."; anything else,
also "A." or "a", is wrong. `lmms_eval` counts the letter alone in either case or before a period, and generates 16
tokens.

LLaVA's scorer leaves questions without an answer out of the IMG accuracy; here missing answers are an error. The table
of the official ScienceQA scorer (subjects, context, grades, topics) is there too, without groups that have no questions
(where that scorer divides by zero or prints -1).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava_sp.common.files import counted, examples
from llava_sp.common.schema import Check, expect, some
from llava_sp.decoding import Generation
from llava_sp.eval.base import LLAVA15, LLAVA15_LORA, LLAVA_SP, OPTION_LETTER, Benchmark, Item, Scores
from llava_sp.eval.cli import main
from llava_sp.eval.inputs.checks import ID, by_id, find, find_one, first_folder, inside, joined
from llava_sp.eval.scoring.letters import by_letter, lettered, llava_scienceqa, lmms_scienceqa, not_in
from llava_sp.eval.scoring.records import categories, grouped, row, share_right
from llava_sp.model.conversation import IMAGE_MARK

PROBLEM = {
    "choices": Check(lambda choices: 2 <= len(choices) <= 5, "a list of two to five texts", [str]),
    "answer": int,
    "image?": (str, None),
    "split?": str,
    **dict.fromkeys(("question", "hint", "subject", "grade", "topic"), str),
}
LLAVA = some({"id": ID, "conversations": some({"value": str})})
_SUBJECTS = ("natural science", "social science", "language science")
_GRADES = {f"grade{grade}": "grades 1-6" if grade < 7 else "grades 7-12" for grade in range(1, 13)}
_SPACES = re.compile(" {2,}")  # LLaVA's file has none


class ScienceQA(Benchmark):
    name = "scienceqa"
    title = "ScienceQA accuracy on questions with an image, in percent"
    splits = ("test", "val", "train", "minitest", "minival")
    protocols = ("llava15", "lmms_eval")
    unscored = "the score is over questions with an image, but there is no such question (metrics.json holds the rest)"
    generation = Generation(max_new_tokens=1024)
    generations: ClassVar = {"lmms_eval": Generation(max_new_tokens=16)}
    published: Mapping[str, float] = {LLAVA15: 66.8, LLAVA15_LORA: 68.4, LLAVA_SP: 68.4}

    def load(self, data: Path) -> list[Item]:
        self.split = self.split or "test"
        splits_file = find_one(data, "pid_splits.json", what="list of problems per split")
        ids = [str(i) for i in self.read_json(splits_file, {self.split: some(ID)})[self.split]]
        file = find_one(data, "problems.json", what="problems")
        problems = self.read_json(file, dict)
        by_id([{"problem": i} for i in ids], splits_file, "problem")
        absent = [i for i in ids if i not in problems]
        if absent:
            raise ValueError(
                f"{file} lacks {counted(len(absent), 'problem')} of {self.split} ({examples(absent)}): another version?"
            )
        asked: dict[str, dict[str, Any]] = {}
        for llava in find(data, f"llava_{self.split}_CQM-A.json")[:1]:
            lines = self.read_json(llava, LLAVA)
            asked = joined([str(line["id"]) for line in lines], lines, ids, llava, "line", splits_file)
        return [self._item(data, i, problems[i], asked.get(i), f"{file}: problem {i}") for i in ids]

    def _item(self, data: Path, pid: str, problem: dict[str, Any], llava: dict[str, Any] | None, where: str) -> Item:
        """The item of a problem, in the words of LLaVA's line where there is one."""
        expect(problem, PROBLEM, where)
        options = by_letter(problem["choices"])
        if not 0 <= problem["answer"] < len(options):
            raise ValueError(
                f"{where}: answer is {problem['answer']}; expected 0 to {len(options) - 1}, one of its choices"
            )
        images: tuple[Path, ...] = ()
        if problem.get("image"):
            split = problem.get("split") or self.split.removeprefix("mini")
            folder = self.images or first_folder([data / "images" / split, data / split, data / "images"])
            images = (inside(folder / pid, problem["image"], where),)
        context = f"Context: {problem['hint']}\n" if problem["hint"] else ""
        text = _SPACES.sub(" ", f"{context}{problem['question']}\n{lettered(options)}").strip()
        if llava is not None:
            value = llava["conversations"][0]["value"]
            text = value.replace(IMAGE_MARK, "").strip()
            missing = not_in(text, (problem["question"], *problem["choices"]))
            same_images = ("image" in llava) == (IMAGE_MARK in value) == bool(images)
            if missing is not None or not same_images or "\nOptions: (A)" in text:
                what = "the image or the layout differs" if missing is None else f"{missing[:60]!r} is not in it"
                raise ValueError(
                    f"{where}: LLaVA's question file asks {text[:60]!r}...: {what}. Needed is the llava_test_CQM-A.json of "
                    "LLaVA's eval.zip; without it the same questions are made from problems.json"
                )
        facts = {key: problem[key] for key in ("question", "hint", "subject", "grade", "topic")}
        return Item(pid, text, images, list(options)[problem["answer"]], {**facts, "options": options})

    def prompt(self, item: Item) -> str:
        return item.text + OPTION_LETTER

    def record(self, item: Item) -> dict[str, Any]:
        return {"question_id": item.id, "prompt": self.message(item)}  # LLaVA's has the image mark, here alone

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> Scores:
        infer = lmms_scienceqa if self.protocol == "lmms_eval" else llava_scienceqa
        per_item = []
        for item, text in zip(items, answers):
            letter = infer(text)
            image = f"{item.id}/{item.image_name}" if item.images else None
            per_item.append(
                row(item, letter, text, 100.0 * (letter == item.reference), **{**item.metadata, "image": image})
            )
        with_image = [record for record in per_item if record["image"]]
        score = self.headline(per_item) if with_image else None
        metrics = {
            "accuracy": share_right(per_item),
            "correct": sum(record["score"] > 0 for record in per_item),
            "count": len(per_item),
            "image_accuracy": score,
            "image_correct": sum(record["score"] > 0 for record in with_image),
            "image_count": len(with_image),
            "not_understood": sum(record["answer"] is None for record in per_item),
            "by_topic": {topic: share_right(records) for topic, records in grouped(per_item, "topic").items()},
        }
        found = categories(_groups(per_item), share_right)
        return Scores(score, metrics, per_item, found, len(with_image), "questions with an image")

    @classmethod
    def headline(cls, per_item: Sequence[Mapping[str, Any]]) -> float:
        """The accuracy on questions with an image; 0 where a sample has none of them."""
        return share_right([record for record in per_item if record["image"]])


def _groups(per_item: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The columns of ScienceQA's table of which there are questions, in its order."""
    by_subject = grouped(per_item, "subject")
    by_grade = grouped([{**record, "grades": _GRADES.get(record["grade"])} for record in per_item], "grades")
    columns = {name: by_subject.get(name) for name in _SUBJECTS} | {
        "text context": [r for r in per_item if r["hint"]],
        "image context": [r for r in per_item if r["image"]],
        "no context": [r for r in per_item if not r["hint"] and not r["image"]],
    }
    return {name: records for name, records in (columns | by_grade).items() if records}


if __name__ == "__main__":
    sys.exit(main(ScienceQA))
