"""VQAv2 (Goyal et al. 2017): open-ended questions about COCO images, ten human answers each.

    python -m llava_sp.eval.vqav2 --model M --data D --output O [--split val|train|test-dev|test]

D holds, under their official names (in D itself or one folder below), for val and train
    v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json, images val2014/COCO_val2014_*.jpg
and for the test splits, whose answers only the EvalAI server knows,
    v2_OpenEnded_mscoco_test-dev2015_questions.json, images test2015/COCO_test2015_*.jpg
or LLaVA's question files llava_vqav2_mscoco_test-dev2015.jsonl. For a test split O/submission.json is written. It covers
the whole of test2015 (empty answers outside test-dev, as LLaVA's) if D has the questions of test2015 too; these must then
hold all of test-dev.

Published for LLaVA-1.5-7B: 78.5 (LoRA 79.1) on test-dev, from the server. Scores on val are not comparable with it.

LLaVA's converter skips broken answer lines, keeps the last of two answers and fills gaps with empty answers; here each of
these is an error that counts them (only a half-written last line is left out, with a note), and so is a second annotation.

Protocols, all with the same prompt:
    llava15    the EvalAI answer processor, then the official scorer (the default, and what published figures rest on)
    official   the official scorer on the raw answers
    lmms_eval  lmms-eval's val task: at most 16 new tokens; both sides are always normalised by the official steps, also
               where the ten annotators agree (there the official scorer compares raw strings), and EvalAI's are left out
A submission file holds the answers as the protocol passes them to its scorer. Quirks that are kept are listed in
`llava_sp.eval.scoring.vqa`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava_sp.common.files import examples, write_json
from llava_sp.common.schema import only, some
from llava_sp.decoding import Generation
from llava_sp.eval.base import LLAVA15, LLAVA15_LORA, LLAVA_SP, SHORT_ANSWER, Item, Scores
from llava_sp.eval.cli import main
from llava_sp.eval.inputs.checks import (
    ID,
    LLAVA_LINE,
    by_id,
    compare_ids,
    find,
    find_one,
    find_split,
    first_folder,
    inside,
    joined,
    verdict,
)
from llava_sp.eval.scoring.records import categories, grouped, row
from llava_sp.eval.scoring.vqa import AccuracyBenchmark, evalai_answer, official_answer, vqa_accuracy

SUBTYPES = {"val": "val2014", "test-dev": "test-dev2015", "test": "test2015", "train": "train2014"}
IMAGES = {**SUBTYPES, "test-dev": "test2015"}
FILES = {
    split: (f"llava_vqav2_mscoco_{name}.jsonl", f"v2_OpenEnded_mscoco_{name}_questions.json")
    for split, name in SUBTYPES.items()
}
ANNOTATIONS_FILE = "v2_mscoco_{}_annotations.json"
ANSWER_TYPES = ("yes/no", "number", "other")  # in the order of the published tables

QUESTIONS = {"questions": some({"question_id": ID, "image_id": int, "question": str})}
ANSWER = {"answer": str, "answer_id?": ID}
ANNOTATIONS = {"annotations": [{"question_id": ID, "answers": some(ANSWER), "answer_type": str, "question_type": str}]}
SUBMISSION = some(only({"question_id": int, "answer": str}))


class VQAv2(AccuracyBenchmark):
    name = "vqav2"
    title = "VQAv2 accuracy in percent"
    splits = tuple(SUBTYPES)
    protocols = ("llava15", "official", "lmms_eval")
    generations: ClassVar = {"lmms_eval": Generation(max_new_tokens=16)}
    published: Mapping[str, float] = {LLAVA15: 78.5, LLAVA15_LORA: 79.1, LLAVA_SP: 79.2}
    published_on = "test-dev, from the EvalAI server"
    submission_ids: Sequence[int | str] = ()  # set by load: what the server wants answered

    def load(self, data: Path) -> list[Item]:
        asked = self.split
        self.split, _ = find_split(data, FILES, asked, "VQAv2 questions")
        scored = find(data, *(ANNOTATIONS_FILE.format(SUBTYPES[split]) for split in ("val", "train")))
        if asked is None and self.split.startswith("test") and scored:
            raise ValueError(
                f"{data} has no questions to the answers in {scored[0].name}; --split {self.split} takes those that only the "
                "server can score"
            )
        file, questions = self._questions(data, self.split)
        self.submission_ids = list(questions)
        if self.split == "test-dev" and find(data, *FILES["test"]):
            whole_file, whole = self._questions(data, "test")
            self.submission_ids = list(whole)
            lost = [i for i in questions if i not in whole]
            if lost:
                raise ValueError(
                    f"{whole_file} lacks {len(lost)} of the {len(questions)} questions of test-dev ({examples(lost)}): "
                    "is it cut off, or of another version?"
                )
        annotations: dict[int | str, Any] = {}
        if not self.split.startswith("test"):
            name = ANNOTATIONS_FILE.format(SUBTYPES[self.split])
            annotation_file = find_one(data, name, what=f"answers to the questions of {self.split}")
            records = self.read_json(annotation_file, ANNOTATIONS)["annotations"]
            ids = [record["question_id"] for record in records]
            annotations = joined(ids, records, questions, annotation_file, "annotation")
        name = IMAGES[self.split]
        folder = self.images or first_folder([data / name, data / "images" / name, data / "images"])
        items = []
        for i, line in questions.items():
            image = inside(folder, line["image"], f"{file}: question {i}")
            items.append(Item(i, line["text"].removesuffix(SHORT_ANSWER), (image,), annotations.get(i)))
        return items

    def prompt(self, item: Item) -> str:
        return item.text + SHORT_ANSWER

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> Scores:
        per_item = []
        for item, text in zip(items, answers):
            final, annotation = self._final(text), item.reference
            if annotation is None:
                per_item.append(row(item, final, text))
                continue
            # lmms_eval from the raw answer: normalising twice is not the same as once
            lmms = self.protocol == "lmms_eval"
            accuracy = vqa_accuracy(text if lmms else final, annotation["answers"], always_normalise=lmms)
            about = {key: annotation[key] for key in ("answer_type", "question_type")}
            about["references"] = [record["answer"] for record in annotation["answers"]]
            per_item.append(row(item, final, text, round(100 * accuracy, 2), accuracy=accuracy, **about))
        if any(item.reference is None for item in items):
            return Scores(score=None, metrics={}, per_item=per_item)
        kinds = ("answer_type", "question_type")
        found = {kind: categories(grouped(per_item, kind, ANSWER_TYPES), self.headline) for kind in kinds}
        metrics = {f"per_{kind}": {name: c.score for name, c in found[kind].items()} for kind in kinds}
        metrics |= {f"count_per_{kind}": {name: c.count for name, c in found[kind].items()} for kind in kinds}
        return Scores(self.headline(per_item), metrics, per_item, found["answer_type"])

    def submission(self, items: Sequence[Item], answers: Sequence[str], output: Path) -> Path | None:
        if not self.split.startswith("test"):
            return None
        given = {item.id: self._final(answer) for item, answer in zip(items, answers)}
        path = output / "submission.json"
        write_json(path, [{"question_id": i, "answer": given.get(i, "")} for i in self.submission_ids])
        return path

    def validate(self, file: Path, data: Path) -> str:
        tests = [split for split in ("test", "test-dev") if find(data, *FILES[split])]
        splits = [self.split] if self.split else tests or ["test-dev"]
        results = self.read_json(file, SUBMISSION)
        ids = [result["question_id"] for result in results]
        tries = ((f"questions of {split}", compare_ids(ids, self._questions(data, split)[1])) for split in splits)
        return verdict(file, [result["answer"] for result in results], tries)

    def _final(self, answer: str) -> str:
        """The answer as the protocol passes it to its scorer, or to the server."""
        if self.protocol == "official":
            return answer
        return official_answer(answer) if self.protocol == "lmms_eval" else evalai_answer(answer)

    def _questions(self, data: Path, split: str) -> tuple[Path, dict[int | str, dict[str, Any]]]:
        """The question file of a split, and by id its lines; those of an official file as LLaVA's file has them."""
        file = find_one(data, *FILES[split], what=f"{split} questions")
        if file.suffix == ".jsonl":
            return file, by_id(self.read_jsonl(file, LLAVA_LINE), file)
        lines = by_id(self.read_json(file, QUESTIONS)["questions"], file)
        image = f"COCO_{IMAGES[split]}_{{:012d}}.jpg"
        return file, {i: {"text": q["question"], "image": image.format(q["image_id"])} for i, q in lines.items()}


if __name__ == "__main__":
    sys.exit(main(VQAv2))
