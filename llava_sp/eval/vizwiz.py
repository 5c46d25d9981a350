"""VizWiz-VQA (Gurari et al. 2018): photos and spoken questions of blind people, ten answers each, some unanswerable.

    python -m llava_sp.eval.vizwiz --model M --data D --output O [--split val|test]

D holds (in D itself or one folder below, such as the official Annotations)
    val.json                 the official questions with answers; images val/VizWiz_val_00000000.jpg, ...
    test.json                the official questions without answers; images test/VizWiz_test_00000000.jpg, ...
    llava_test.jsonl         LLaVA's question file of the test split (llava_val.jsonl of val); gives the same prompts as the
                             official file, and for test is enough alone
--images names the folder of the images if it is elsewhere. Without --split, val is asked where val.json is, else test.

Of the test split only the EvalAI server knows the answers: O/submission.json is what it takes, in the order of the question
file; `--validate FILE --data D` checks such a file.

The score is the accuracy of the official scorer in percent; `metrics` has its second task too, average precision and F1 of
detecting unanswerable questions (the answer comes down to "unanswerable"), null where no question is unanswerable.

Published for LLaVA-1.5-7B: 50.0 (LoRA 47.8) on test-dev, from the server. Scores on val are not comparable with it.

Protocols:
    llava15    the EvalAI answer processor, then the official VizWiz scorer (the default)
    official   the official VizWiz scorer on the raw answers
    lmms_eval  lmms-eval's val task: the question begins with a capital and goes on in small letters, at most 1024 new
               tokens; the EvalAI answer processor on answers *and* references, so scores are higher
A submission file holds the answers as the protocol passes them to its scorer.

Quirks kept on purpose: the VizWiz scorer normalises the answer and not the references, so a reference with a capital, an
article, a comma or a period never matches, and "two" is compared as "2". The answer left out for each annotator is found by
its place (VQAv2's scorer finds it by its fields, which VizWiz's records lack). Copies of the scorer in circulation have
mangled apostrophes in the table of contractions; here they are plain.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava_sp.common.files import write_json
from llava_sp.common.schema import one_of, only, some
from llava_sp.decoding import Generation
from llava_sp.eval.base import LLAVA15, LLAVA15_LORA, SHORT_ANSWER, Item, Scores
from llava_sp.eval.cli import main
from llava_sp.eval.inputs.checks import (
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
from llava_sp.eval.scoring.vqa import AccuracyBenchmark, evalai_answer, leave_one_out, official_answer

SUFFIX = "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT_ANSWER
UNANSWERABLE = "unanswerable"
FILES = {split: (f"llava_{split}.jsonl", f"{split}.json") for split in ("val", "test")}
ANSWER_TYPES = ("yes/no", "number", "other", UNANSWERABLE)

QUESTIONS = some({"image": str, "question": str})
ANNOTATIONS = some({"image": str, "answers": some({"answer": str}), "answer_type": str, "answerable": one_of(0, 1)})
SUBMISSION = some(only({"image": str, "answer": str}))


class VizWiz(AccuracyBenchmark):
    name = "vizwiz"
    title = "VizWiz accuracy in percent"
    splits = ("val", "test")
    protocols = ("llava15", "official", "lmms_eval")
    generations: ClassVar = {"lmms_eval": Generation(max_new_tokens=1024)}
    published: Mapping[str, float] = {LLAVA15: 50.0, LLAVA15_LORA: 47.8}
    published_on = "test-dev, from the EvalAI server"

    def load(self, data: Path) -> list[Item]:
        there = {"val": ["val.json"], "test": ["test.json", "llava_test.jsonl"]}
        self.split = self.split or find_split(data, there, None, "VizWiz questions")[0]
        file, lines = self._questions(data)
        annotations: dict[str, dict[str, Any]] = {}
        if self.split == "val":
            answers_file = find_one(data, "val.json", what="answers to the questions of val")
            records = self.read_json(answers_file, ANNOTATIONS)
            images = [line["image"] for line in lines]
            annotations = joined([r["image"] for r in records], records, images, answers_file, "annotation")
        folder = self.images or first_folder([data / self.split, data / "images" / self.split, data / "images"])
        items = []
        for line in lines:
            image = inside(folder, line["image"], f"{file}: question {line['question_id']}")
            metadata = {"question": line["text"].removesuffix(SUFFIX)}
            items.append(Item(line["question_id"], line["text"], (image,), annotations.get(line["image"]), metadata))
        return items

    def prompt(self, item: Item) -> str:
        return item.metadata["question"].capitalize() + SUFFIX if self.protocol == "lmms_eval" else item.text

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> Scores:
        per_item = []
        for item, text in zip(items, answers):
            lmms, final = self.protocol == "lmms_eval", self._final(text)
            answer = final if lmms else official_answer(final)  # normalising twice is not the same as once
            if item.reference is None:
                per_item.append(row(item, answer, text))
                continue
            references = [record["answer"] for record in item.reference["answers"]]
            accuracy = leave_one_out(answer, [evalai_answer(r) for r in references] if lmms else references)
            record = row(item, answer, text, round(100 * accuracy, 2), accuracy=accuracy, references=references)
            record |= {"category": item.reference["answer_type"], "answerable": item.reference["answerable"]}
            per_item.append(record)
        if any(item.reference is None for item in items):
            return Scores(score=None, metrics={}, per_item=per_item)
        truth = [record["answerable"] == 0 for record in per_item]
        metrics = {"unanswerability": unanswerability(truth, [r["answer"] == UNANSWERABLE for r in per_item])}
        found = categories(grouped(per_item, "category", ANSWER_TYPES), self.headline)
        return Scores(self.headline(per_item), metrics, per_item, found)

    def submission(self, items: Sequence[Item], answers: Sequence[str], output: Path) -> Path | None:
        if self.split != "test":
            return None
        path = output / "submission.json"
        write_json(path, [{"image": i.image_name, "answer": self._final(a)} for i, a in zip(items, answers)])
        return path

    def validate(self, file: Path, data: Path) -> str:
        self.split = self.split or ("test" if find(data, *FILES["test"]) else "val")
        _, lines = self._questions(data)
        results = self.read_json(file, SUBMISSION)
        trouble = compare_ids([result["image"] for result in results], [line["image"] for line in lines])
        return verdict(file, [result["answer"] for result in results], [(f"questions of {self.split}", trouble)])

    def _final(self, answer: str) -> str:
        """The answer as the protocol passes it to its scorer, or to the server."""
        return answer if self.protocol == "official" else evalai_answer(answer)

    def _questions(self, data: Path) -> tuple[Path, Sequence[dict[str, Any]]]:
        """The question file of the split and its lines; those of the official file as LLaVA's file has them."""
        file = find_one(data, *FILES[self.split], what=f"{self.split} questions")
        lines: Sequence[dict[str, Any]]
        if file.suffix == ".jsonl":
            lines = self.read_jsonl(file, LLAVA_LINE)
        else:
            records = enumerate(self.read_json(file, QUESTIONS))
            lines = [{"question_id": i, "image": r["image"], "text": r["question"] + SUFFIX} for i, r in records]
        by_id(lines, file, key="image")
        return file, list(by_id(lines, file).values())


def unanswerability(unanswerable: Sequence[bool], said_so: Sequence[bool]) -> dict[str, float | int | None]:
    """Average precision and F1 of the unanswerable questions in percent, from yes/no predictions; None if there are none.

    A yes/no prediction has two thresholds: the precision among those said to be unanswerable counts for the part of the
    unanswerable ones found there, the share of unanswerable questions in the whole for the rest.
    """
    truth, said = sum(unanswerable), sum(said_so)
    both = sum(t and s for t, s in zip(unanswerable, said_so))
    counts = {"unanswerable": truth, "answered_unanswerable": said}
    if not truth:
        return {"average_precision": None, "f1_score": None, **counts}
    recall, precision = both / truth, both / said if said else 0.0
    average_precision = recall * precision + (1 - recall) * truth / len(unanswerable)
    f1 = 2 * both / (truth + said)
    return {"average_precision": round(100 * average_precision, 2), "f1_score": round(100 * f1, 2), **counts}


if __name__ == "__main__":
    sys.exit(main(VizWiz))
