"""VQAv2 (Goyal et al. 2017): open-ended questions about COCO images, ten human answers each.

    python -m llava_sp.eval.vqav2 --model M --data D --output O [--split val|train|test-dev|test]

D holds, under their official names (in D itself or one folder below), for val and train
    v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json, images val2014/COCO_val2014_*.jpg
and for the test splits, whose answers only the EvalAI server knows,
    v2_OpenEnded_mscoco_test-dev2015_questions.json, images test2015/COCO_test2015_*.jpg
or LLaVA's question files llava_vqav2_mscoco_test-dev2015.jsonl. For a test split O/submission.json is written; it covers the
whole of test2015 (empty answers outside test-dev, as LLaVA's) if the questions of test2015 are in D too; these must then hold
all of test-dev.

Published for LLaVA-1.5-7B: 78.5 (LoRA 79.1) on test-dev, from the server. Scores on val are not comparable with it.

LLaVA's converter skips broken answer lines, lets the last of two answers win and fills gaps with empty answers; here each of
these is an error that counts them (only a half-written last line is left out, and said), and so is a second annotation.

Protocols, all with the same prompt:
    llava15    the EvalAI answer processor, then the official scorer (the default, and what published figures rest on)
    official   the official scorer on the raw answers
    lmms_eval  lmms-eval's val task: at most 16 new tokens; both sides are always normalised by the official steps, also
               where the ten annotators agree (there the official scorer compares raw strings), and EvalAI's are left out
A submission file holds the answers as the protocol hands them to its scorer. Quirks that are kept are listed in
`vqa_metrics`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava_sp.common.files import examples, write_json
from llava_sp.decoding import Generation
from llava_sp.eval.base import LLAVA15, LLAVA15_LORA, LLAVA_SP, SHORT_ANSWER, Category, Item, Scores
from llava_sp.eval.cli import main
from llava_sp.eval.inputs.checks import compare_ids, expect, expect_all, expect_once, find, first_folder, inside
from llava_sp.eval.scoring.vqa import AccuracyBenchmark, evalai_answer, official_answer, score_vqa

SUBTYPES = {"val": "val2014", "test-dev": "test-dev2015", "test": "test2015", "train": "train2014"}
FULL_TEST = "test"
ANSWER_TYPES = ("yes/no", "number", "other")  # in the order of the published tables
_ANNOTATION = {"question_id": (int, str), "answers": list, "answer_type": str, "question_type": str}


class VQAv2(AccuracyBenchmark):
    name = "vqav2"
    title = "VQAv2 accuracy in percent"
    splits = tuple(SUBTYPES)
    protocols = ("llava15", "official", "lmms_eval")
    generations: ClassVar = {"lmms_eval": Generation(max_new_tokens=16)}
    published: ClassVar = {LLAVA15: 78.5, LLAVA15_LORA: 79.1, LLAVA_SP: 79.2}
    published_on = "test-dev, from the EvalAI server"

    def load(self, data: Path) -> list[Item]:
        self.data = data
        if self.split is None:
            self.split = self._find_split(data)
        file, records = self._records(self.split)
        folder = self._image_folder(self.split)
        items = [_item(record, folder, self.split, file) for record in records]
        if self.split == "test-dev" and self._question_files(FULL_TEST):
            file, records = self._records(FULL_TEST)
            _check_inside(items, records, file)
        self.submission_ids = [record["question_id"] for record in records]
        if not self.split.startswith("test"):
            items = self._annotated(items)
        return items

    def prompt(self, item: Item) -> str:
        return item.text if item.text.endswith(SHORT_ANSWER) else item.text + SHORT_ANSWER

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> Scores:
        final = [self._final(answer) for answer in answers]
        per_item = [
            {"question_id": item.id, "answer": answer, "text": text}
            for item, answer, text in zip(items, final, answers)
        ]
        if any(item.reference is None for item in items):
            return Scores(score=None, metrics={}, per_item=per_item)
        annotations = [item.reference for item in items]
        if self.protocol == "lmms_eval":  # from the raw answers: normalising twice is not the same as once
            scores = score_vqa(answers, annotations, prepare=None, always_normalise=True)
        else:
            scores = score_vqa(final, annotations, prepare=None)
        for line, item, value, accuracy in zip(per_item, items, scores.per_item, scores.accuracies):
            kinds = {key: item.reference[key] for key in ("answer_type", "question_type")}
            references = [record["answer"] for record in item.reference["answers"]]
            line |= {
                "score": value,
                "accuracy": accuracy,
                "question": item.metadata["question"],
                "image": item.images[0].name,
            }
            line |= {**kinds, "references": references}
        metrics = {"per_answer_type": scores.per_answer_type, "per_question_type": scores.per_question_type}
        counts = Counter(a["answer_type"] for a in annotations)
        metrics["count_per_answer_type"] = dict(counts)
        metrics["count_per_question_type"] = dict(Counter(a["question_type"] for a in annotations))
        kinds = [kind for kind in ANSWER_TYPES if kind in counts] + sorted(set(counts).difference(ANSWER_TYPES))
        categories = {kind: Category(scores.per_answer_type[kind], counts[kind]) for kind in kinds}
        return Scores(scores.overall, metrics, per_item, categories)

    def _final(self, answer: str) -> str:
        """The answer as the protocol hands it to its scorer, or to the server."""
        if self.protocol == "official":
            return answer
        return official_answer(answer) if self.protocol == "lmms_eval" else evalai_answer(answer)

    def submission(self, items: Sequence[Item], answers: Sequence[str], output: Path) -> Path | None:
        if not self.split.startswith("test"):
            return None
        given = {item.id: self._final(answer) for item, answer in zip(items, answers)}
        path = output / "submission.json"
        write_json(path, [{"question_id": i, "answer": given.get(i, "")} for i in self.submission_ids])
        return path

    def validate(self, file: Path, data: Path) -> str:
        self.data = data
        splits = [split for split in ("test", "test-dev") if self._question_files(split)]
        if self.split is not None:
            splits = [self.split]
        if not splits:
            raise ValueError(f"{data} has no question file of a test split to compare with ({_names('test-dev')})")
        results = self.read_json(file)
        _check_result_fields(file, results)
        found = [result["question_id"] for result in results]
        problems = []
        for split in splits:
            wanted = {record["question_id"] for record in self._records(split)[1]}
            trouble = compare_ids(found, wanted)
            if not trouble:
                empty = sum(1 for result in results if not result["answer"])
                return f"{file} answers all {len(wanted)} questions of {split} once ({empty} answers are empty)"
            problems.append(f"as {split}: {trouble}")
        raise ValueError(f"{file} " + "; ".join(problems))

    def _find_split(self, data: Path) -> str:
        for split in self.splits:
            if self._question_files(split):
                return split
        raise ValueError(
            f"{data} has no VQAv2 questions; looked for {_names('val')} and the like for {', '.join(self.splits)}"
        )

    def _question_files(self, split: str) -> list[Path]:
        subtype = SUBTYPES[split]
        return find(self.data, f"llava_vqav2_mscoco_{subtype}.jsonl", f"v2_OpenEnded_mscoco_{subtype}_questions.json")

    def _records(self, split: str) -> tuple[Path, list[dict[str, Any]]]:
        """The question file of a split and its records, each with a question_id of its own."""
        files = self._question_files(split)
        if not files:
            raise ValueError(f"{self.data} has no {split} questions: looked for {_names(split)}")
        file = files[0]
        records = self.read_jsonl(file) if file.suffix == ".jsonl" else self._official(file)
        expect_all(records, {"question_id": (int, str)}, file)
        expect_once(records, file, key="question_id")
        return file, records

    def _official(self, file: Path) -> list[dict[str, Any]]:
        content = self.read_json(file)
        if not isinstance(content, dict) or not isinstance(content.get("questions"), list):
            raise ValueError(f'{file} is not an official questions file: it has no list "questions"')
        return content["questions"]

    def _image_folder(self, split: str) -> Path:
        if self.images is not None:
            return self.images
        name = "test2015" if split.startswith("test") else SUBTYPES[split]
        return first_folder([self.data / name, self.data / "images" / name, self.data / "images"])

    def _annotated(self, items: list[Item]) -> list[Item]:
        name = f"v2_mscoco_{SUBTYPES[self.split]}_annotations.json"
        if not find(self.data, name):
            raise ValueError(f"{self.data} has the questions of {self.split} but not their answers, {name}")
        file = find(self.data, name)[0]
        content = self.read_json(file)
        if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
            raise ValueError(f'{file} is not an official annotations file: it has no list "annotations"')
        for number, record in enumerate(content["annotations"]):
            _check_annotation(record, f"{file}: annotation {number} (counted from 0)")
        expect_once(content["annotations"], file, "annotated question", key="question_id")
        by_id = {record["question_id"]: record for record in content["annotations"]}
        trouble = compare_ids(by_id, [item.id for item in items], "annotation")
        if trouble:
            raise ValueError(f"{file} does not fit the questions: {trouble}")
        return [Item(i.id, i.text, i.images, by_id[i.id], i.metadata) for i in items]


def _item(record: dict[str, Any], folder: Path, split: str, file: Path) -> Item:
    """An item from a line of the official questions or of LLaVA's."""
    text_key, image_key = ("text", "image") if "text" in record else ("question", "image_id")
    where = f"{file}: question {record['question_id']}"
    expect(record, {text_key: str, image_key: str if image_key == "image" else int}, where)
    if image_key == "image":
        image = inside(folder, record["image"], where)
    else:
        name = "test2015" if split.startswith("test") else SUBTYPES[split]
        image = folder / f"COCO_{name}_{record['image_id']:012d}.jpg"
    question = record[text_key].removesuffix(SHORT_ANSWER)
    return Item(record["question_id"], record[text_key], (image,), metadata={"question": question})


def _check_inside(items: Sequence[Item], records: Sequence[dict[str, Any]], file: Path) -> None:
    """Raises ValueError if questions are not among those of the whole test set: their answers would not be sent."""
    whole = {record["question_id"] for record in records}
    lost = [item.id for item in items if item.id not in whole]
    if lost:
        raise ValueError(
            f"{file} lacks {len(lost)} of the {len(items)} questions of test-dev ({examples(lost)}), and the submission has "
            "the questions of that file: is one of the two of another version, or cut off?"
        )


def _check_annotation(record: Any, where: str) -> None:
    """Raises ValueError unless it is `{"question_id", "answer_type", "question_type", "answers": [{"answer": text}, ...]}`,
    with a number or text wherever there is an `answer_id`."""
    expect(record, _ANNOTATION, where)
    if not record["answers"]:
        raise ValueError(f"{where} has no answers")
    for number, answer in enumerate(record["answers"]):
        if not isinstance(answer, dict) or not isinstance(answer.get("answer"), str):
            raise ValueError(
                f"{where}: answer {number} is {str(answer)[:60]!r}, not an annotator's record "
                '{"answer": text, "answer_id": number, ...}'
            )
        if "answer_id" in answer:
            expect(answer, {"answer_id": (int, str)}, f"{where}: answer {number}")


def _names(split: str) -> str:
    subtype = SUBTYPES[split]
    return f"v2_OpenEnded_mscoco_{subtype}_questions.json or llava_vqav2_mscoco_{subtype}.jsonl"


def _check_result_fields(file: Path, results: Any) -> None:
    if not isinstance(results, list):
        raise ValueError(f"{file} holds {type(results).__name__}; the server wants a list of results")
    for number, result in enumerate(results):
        fits = isinstance(result, dict) and set(result) == {"question_id", "answer"}
        if not fits or not isinstance(result["question_id"], int) or not isinstance(result["answer"], str):
            raise ValueError(
                f'{file}: result {number} is {str(result)[:80]}, not {{"question_id": number, "answer": text}}'
            )


if __name__ == "__main__":
    sys.exit(main(VQAv2))
