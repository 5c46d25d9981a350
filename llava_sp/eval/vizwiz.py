"""VizWiz-VQA (Gurari et al. 2018): photos and spoken questions of blind people, ten answers each, some unanswerable.

    python -m llava_sp.eval.vizwiz --model M --data D --output O [--split val|test]

D holds (in D itself or one folder below, such as the official Annotations)
    val.json                 the official questions with answers; images val/VizWiz_val_00000000.jpg, ...
    test.json                the official questions without answers; images test/VizWiz_test_00000000.jpg, ...
    llava_test.jsonl         LLaVA's question file of the test split (llava_val.jsonl of val); not needed beside the official
                             file, the prompts are the same; for test it is enough alone
--images names the folder of the images if it is elsewhere. Without --split, val is taken where val.json is, else test.

Of the test split only the EvalAI server knows the answers: O/submission.json is what it takes, in the order of the question
file; `--validate FILE --data D` checks such a file.

The score is the accuracy of the official scorer in percent; `metrics` has its second task too, average precision and F1 of
telling that a question is unanswerable (which is when the answer comes down to "unanswerable"). They are null where no
question is unanswerable.

Published for LLaVA-1.5-7B: 50.0 (LoRA 47.8) on test-dev, from the server. Scores on val are not comparable with it.

Protocols:
    llava15    the EvalAI answer processor, then the official VizWiz scorer (the default)
    official   the official VizWiz scorer on the raw answers
    lmms_eval  lmms-eval's val task: the question begins with a capital and goes on in small letters, at most 1024 new
               tokens; the EvalAI answer processor on answers *and* references, so scores are higher
A submission file holds the answers as the protocol hands them to its scorer.

Quirks kept on purpose: the VizWiz scorer normalises the answer and not the references, so a reference with a capital, an
article, a comma or a period can never be met, and "two" is compared as "2". The answer left out for each annotator is told
by its place (VQAv2's scorer tells it by its fields, which VizWiz's records lack). Copies of the scorer in circulation have
mangled apostrophes in the table of contractions; here it has plain ones.

A missing answer, on which LLaVA's converter dies with a bare AssertionError, is an error that names the question.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava_sp.common.files import write_json
from llava_sp.decoding import Generation
from llava_sp.eval.base import LLAVA15, LLAVA15_LORA, SHORT_ANSWER, Category, Item, Scores
from llava_sp.eval.cli import main
from llava_sp.eval.inputs.checks import compare_ids, expect, expect_all, expect_once, find, first_folder, inside
from llava_sp.eval.scoring.vqa import AccuracyBenchmark, evalai_answer, leave_one_out, official_answer, percent

SUFFIX = "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT_ANSWER
UNANSWERABLE = "unanswerable"
ANSWER_TYPES = ("yes/no", "number", "other", UNANSWERABLE)
_ANNOTATION = {"answers": list, "answer_type": str, "answerable": int}


class VizWiz(AccuracyBenchmark):
    name = "vizwiz"
    title = "VizWiz accuracy in percent"
    splits = ("val", "test")
    protocols = ("llava15", "official", "lmms_eval")
    generations: ClassVar = {"lmms_eval": Generation(max_new_tokens=1024)}
    published: ClassVar = {LLAVA15: 50.0, LLAVA15_LORA: 47.8}
    published_on = "test-dev, from the EvalAI server"

    def load(self, data: Path) -> list[Item]:
        self.split = self.split or _find_split(data)
        file, lines = self._questions(data)
        folder = self.images or first_folder([data / self.split, data / "images" / self.split, data / "images"])
        annotations = self._annotations(data, [line["image"] for line in lines]) if self.split == "val" else {}
        return [_item(line, folder, annotations.get(line["image"]), file) for line in lines]

    def prompt(self, item: Item) -> str:
        if self.protocol == "lmms_eval":
            return item.metadata["question"].capitalize() + SUFFIX
        return item.text

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> Scores:
        judged = [self._judged(answer) for answer in answers]
        per_item = [
            {
                "question_id": item.id,
                "answer": answer,
                "text": text,
                "question": item.metadata["question"],
                "image": item.images[0].name,
            }
            for item, answer, text in zip(items, judged, answers)
        ]
        if any(item.reference is None for item in items):
            return Scores(score=None, metrics={}, per_item=per_item)
        accuracies = []
        for line, item in zip(per_item, items):
            references = [record["answer"] for record in item.reference["answers"]]
            compared = [evalai_answer(r) for r in references] if self.protocol == "lmms_eval" else references
            accuracies.append(leave_one_out(line["answer"], compared))
            line |= {"score": round(100 * accuracies[-1], 2), "accuracy": accuracies[-1], "references": references}
            line |= {"category": item.reference["answer_type"], "answerable": item.reference["answerable"]}
        unanswerable = [item.reference["answerable"] == 0 for item in items]
        metrics = {"unanswerability": unanswerability(unanswerable, [answer == UNANSWERABLE for answer in judged])}
        groups: dict[str, list[float]] = {}
        for item, accuracy in zip(items, accuracies):
            groups.setdefault(item.reference["answer_type"], []).append(accuracy)
        kinds = [kind for kind in ANSWER_TYPES if kind in groups] + sorted(set(groups).difference(ANSWER_TYPES))
        categories = {kind: Category(percent(groups[kind]), len(groups[kind])) for kind in kinds}
        return Scores(percent(accuracies), metrics, per_item, categories)

    def _final(self, answer: str) -> str:
        """The answer as the protocol hands it to its scorer, or to the server."""
        return answer if self.protocol == "official" else evalai_answer(answer)

    def _judged(self, answer: str) -> str:
        """The answer as it is compared in the end; normalising twice is not the same as once."""
        final = self._final(answer)
        return final if self.protocol == "lmms_eval" else official_answer(final)

    def submission(self, items: Sequence[Item], answers: Sequence[str], output: Path) -> Path | None:
        if self.split != "test":
            return None
        path = output / "submission.json"
        lines = [{"image": i.images[0].name, "answer": self._final(a)} for i, a in zip(items, answers)]
        write_json(path, lines)
        return path

    def validate(self, file: Path, data: Path) -> str:
        self.split = self.split or ("test" if _question_files(data, "test") else "val")
        _, lines = self._questions(data)
        results = self.read_json(file)
        expect_all(results, {"image": str, "answer": str}, file, "result")
        for number, result in enumerate(results):
            if set(result) != {"image", "answer"}:
                raise ValueError(
                    f'{file}: result {number} is {str(result)[:80]}, not {{"image": name, "answer": text}}'
                )
        trouble = compare_ids([result["image"] for result in results], [line["image"] for line in lines])
        if trouble:
            raise ValueError(f"{file} as {self.split}: {trouble}")
        empty = sum(1 for result in results if not result["answer"])
        return f"{file} answers all {len(lines)} questions of {self.split} once ({empty} answers are empty)"

    def _questions(self, data: Path) -> tuple[Path, list[dict[str, Any]]]:
        """The questions of the split as LLaVA's lines `{"question_id", "image", "text"}`, from its file or the official."""
        files = _question_files(data, self.split)
        if not files:
            raise ValueError(f"{data} has no {self.split} questions: looked for {_names(self.split)}")
        file = files[0]
        if file.suffix == ".jsonl":
            lines = self.read_jsonl(file)
            expect_all(lines, {"question_id": (int, str), "image": str, "text": str}, file)
        else:
            records = self.read_json(file)
            expect_all(records, {"image": str, "question": str}, file)
            numbered = enumerate(records)
            lines = [{"question_id": i, "image": r["image"], "text": r["question"] + SUFFIX} for i, r in numbered]
        expect_once(lines, file, key="question_id")
        expect_once(lines, file, "image", key="image")
        return file, lines

    def _annotations(self, data: Path, images: Sequence[str]) -> dict[str, dict[str, Any]]:
        files = find(data, "val.json")
        if not files:
            raise ValueError(f"{data} has the questions of val but not their answers, val.json")
        records = self.read_json(files[0])
        expect_all(records, {"image": str} | _ANNOTATION, files[0])
        for number, record in enumerate(records):
            _check_annotation(record, f"{files[0]}: question {number} (counted from 0)")
        trouble = compare_ids([record["image"] for record in records], images, "annotation")
        if trouble:
            raise ValueError(f"{files[0]} does not fit the questions: {trouble}")
        return {record["image"]: record for record in records}


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


def _find_split(data: Path) -> str:
    for split, needed in (("val", ["val.json"]), ("test", ["llava_test.jsonl", "test.json"])):
        if find(data, *needed):
            return split
    raise ValueError(f"{data} has no VizWiz questions: looked for val.json, test.json and llava_test.jsonl")


def _question_files(data: Path, split: str) -> list[Path]:
    return find(data, f"llava_{split}.jsonl", f"{split}.json")


def _names(split: str) -> str:
    return f"{split}.json or llava_{split}.jsonl"


def _item(line: dict[str, Any], folder: Path, annotation: dict[str, Any] | None, file: Path) -> Item:
    where = f"{file}: question {line['question_id']}"
    metadata = {"question": line["text"].removesuffix(SUFFIX)}
    return Item(line["question_id"], line["text"], (inside(folder, line["image"], where),), annotation, metadata)


def _check_annotation(record: dict[str, Any], where: str) -> None:
    if not record["answers"]:
        raise ValueError(f"{where} has no answers")
    if record["answerable"] not in (0, 1):
        raise ValueError(f"{where}: answerable is {record['answerable']}, not 0 or 1")
    for number, answer in enumerate(record["answers"]):
        expect(answer, {"answer": str}, f"{where}, answer {number}")


if __name__ == "__main__":
    sys.exit(main(VizWiz))
