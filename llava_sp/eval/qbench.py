"""Q-Bench, perception (Wu et al. 2023): multiple-choice questions about the low-level quality of an image (LLVisionQA).

    python -m llava_sp.eval.qbench --model M --data D --output O [--split dev|test]
    python -m llava_sp.eval.qbench --answers llvisionqa_dev_answers.json --data D

D holds (in D itself or one folder below) llvisionqa_dev.json (or llvisionqa_test.json) and the images as
images/<img_path> (or LLVisionQA-QBench/images/<img_path>, or beside the JSON). The questions have no ids: here they
are counted from 0.

LLaVA asked with the conversation `llava_v1`, cropped the middle of each image (it did not pad), and let the model
write up to 1024 tokens; so does this command. Its script does not score: answers were sent to the authors of the
benchmark by mail. No figure of LLaVA-1.5-7B is in LLaVA's documents.

Protocols: `llava15` asks as LLaVA does. Its prompt does not ask for a letter, so answers may be words: the score is by
exact matching as VLMEvalKit does it (the letter; else the only option whose text is in the answer), and an answer that
means no option is wrong. `vlmevalkit` is the same rule on the prompt that VLMEvalKit asks LLaVA models (with the
letter sentence, padded, up to 512 tokens; it also writes spaces around the image mark and behind ASSISTANT:, which is
not copied). There an empty answer is searched as the text "nan", here it means nothing. `lmms_eval` asks lmms-eval's
prompt in the checkpoint's own conversation, up to 32 tokens, and parses as it does; where it draws an option at
random, the answer is wrong here (and where it stops with a NameError, at several letters, the last one counts, as its
authors meant).

O/llvisionqa_<split>_answers.json holds the official records with `response`, LLaVA's answers file. LLaVA's has neither
line breaks nor brackets around the records, so that no JSON reader takes it; ours is a JSON list. `--answers` reads
both, and answers.jsonl of this command. Answers in LLaVA's file are matched by image and question; those in answers.jsonl by
number, and where a line says what was asked (`prompt`, `img_path`), question, options and image must be those of the number
here: an answer of another split is an error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava_sp.common.files import read_json, read_text, write_json
from llava_sp.decoding import Generation
from llava_sp.eval.base import OPTION_LETTER, Benchmark, Category, Item, Scores
from llava_sp.eval.cli import main
from llava_sp.eval.inputs.answers_file import read_answers
from llava_sp.eval.inputs.checks import compare_ids, expect_all, find, first_folder, inside
from llava_sp.eval.scoring.letters import by_letter, lettered, lmms_qbench, not_in, percent, vlmevalkit

_FILES = {split: f"llvisionqa_{split}.json" for split in ("dev", "test")}
_QUESTION = {"img_path": str, "question": str, "candidates": list}
_CONCERNS = ("global distortion", "global others", "local distortion", "local others")
_TYPES = ("yes/no", "how", "what")


class QBench(Benchmark):
    name = "qbench"
    title = "Q-Bench (LLVisionQA) accuracy in percent"
    splits = tuple(_FILES)
    protocols = ("llava15", "vlmevalkit", "lmms_eval")
    generation = Generation(max_new_tokens=1024)
    generations: ClassVar = {
        "vlmevalkit": Generation(max_new_tokens=512),
        "lmms_eval": Generation(max_new_tokens=32),
    }
    folders = ("q-bench", "LLVisionQA-QBench")
    unscored = "their authors alone can score them"

    def __init__(self, split: str | None = None, protocol: str | None = None, images: Path | None = None):
        super().__init__(split, protocol, images)
        self.conversation_template = None if self.protocol == "lmms_eval" else "llava_v1"
        self.image_aspect_ratio = {"llava15": "crop", "vlmevalkit": "pad"}.get(self.protocol)

    def load(self, data: Path) -> list[Item]:
        splits = self.splits if self.split is None else (self.split,)
        found = [(split, path) for split in splits for path in find(data, _FILES[split])]
        if not found:
            raise ValueError(f"{data} has no questions: looked for {', '.join(_FILES[split] for split in splits)}")
        self.split, file = found[0]
        questions = self.read_json(file)
        expect_all(questions, _QUESTION, file)
        folder = self.images or first_folder(
            [file.parent / "images", data / "images", data / "LLVisionQA-QBench" / "images", file.parent]
        )
        items = [_item(number, question, folder, file) for number, question in enumerate(questions)]
        lost = [item.id for item in items if item.reference is None]
        if lost and len(lost) < len(items):
            raise ValueError(f"{file}: {len(lost)} questions have no correct_ans, the first is question {lost[0]}")
        return items

    def prompt(self, item: Item) -> str:
        options = lettered(item.metadata["options"])
        if self.protocol == "vlmevalkit":
            return f"{item.text}\n{options}{OPTION_LETTER}"
        if self.protocol == "lmms_eval":
            return f"{item.text}\n{options}{OPTION_LETTER}\n"
        return f"{item.text}\nChoose between one of the options as follows:\n{options}\n"

    def record(self, item: Item) -> dict[str, Any]:
        return {**super().record(item), "img_path": item.metadata["official"]["img_path"]}

    def read_answers(self, path: Path) -> tuple[list[dict[str, Any]], str | None]:
        """The lines of an answers file, also of LLaVA's: records with `response`, in a list or one after another."""
        text = read_text(path).strip()
        if text.startswith("["):
            records = read_json(path)
        elif "response" in _first(text):
            records = _one_after_another(text, path)
        else:
            return read_answers(path)
        expect_all(records, {"img_path": str, "question": str, "response": str}, path, "record")
        return [{**record, "question_id": _place(record), "text": record["response"]} for record in records], None

    def match(self, items: Sequence[Item], records: Sequence[dict[str, Any]]) -> list[str]:
        """By image and question for LLaVA's file, by number for answers.jsonl."""
        if not any("response" in record for record in records):
            texts = super().match(items, records)
            self._check_asked(items, records)
            return texts
        trouble = compare_ids([record["question_id"] for record in records], [item.metadata["place"] for item in items])
        if trouble:
            raise ValueError(
                f"the {len(records)} answers do not fit the questions of {self.name} {self.split}: {trouble}"
            )
        texts = {record["question_id"]: record["text"] for record in records}
        return [texts[item.metadata["place"]] for item in items]

    def _check_asked(self, items: Sequence[Item], records: Sequence[dict[str, Any]]) -> None:
        """Raises ValueError if lines say that they answer something else than the questions of their numbers here."""
        asked = {str(record["question_id"]): record for record in records}
        wrong = [item for item in items if _is_other(item, asked[str(item.id)])]
        if wrong:
            record = asked[str(wrong[0].id)]
            was = " about ".join(str(record[key])[:80] for key in ("prompt", "img_path") if record.get(key))
            raise ValueError(
                f"{len(wrong)} of {len(records)} answers are to other questions than {self.name} {self.split} has under their "
                f"numbers (answers of another split?): question {wrong[0].id} was {was!r}, here it is "
                f"{wrong[0].text[:80]!r} about {wrong[0].metadata['official']['img_path']}"
            )

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> Scores:
        infer = lmms_qbench if self.protocol == "lmms_eval" else vlmevalkit
        per_item = []
        for item, text in zip(items, answers):
            letter = infer(text, item.metadata["options"])
            record: dict[str, Any] = {"question_id": item.id}
            if item.reference is not None:
                record["score"] = 100.0 if letter == item.reference else 0.0
            record |= {"answer": letter, "text": text, "question": item.text, "image": item.images[0].name}
            record["references"] = [] if item.reference is None else [item.reference]
            record |= {key: item.metadata[key] for key in ("options", "type", "concern")}
            per_item.append(record)
        if any(item.reference is None for item in items):
            return Scores(score=None, metrics={}, per_item=per_item)
        categories = {}
        for key, known in (("type", _TYPES), ("concern", _CONCERNS)):
            names = {record[key] for record in per_item if record[key]}
            for name in (*(n for n in known if n in names), *sorted(names.difference(known))):
                members = [record for record in per_item if record[key] == name]
                categories[name] = Category(self.headline(members), len(members))
        metrics = {"count": len(per_item), "not_understood": sum(record["answer"] is None for record in per_item)}
        metrics |= {name: category.score for name, category in categories.items()}
        return Scores(self.headline(per_item), metrics, per_item, categories)

    @classmethod
    def headline(cls, per_item: Sequence[Mapping[str, Any]]) -> float:
        return percent(sum(record["score"] > 0 for record in per_item), len(per_item))

    def submission(self, items: Sequence[Item], answers: Sequence[str], output: Path) -> Path | None:
        path = output / f"llvisionqa_{self.split}_answers.json"
        write_json(path, [{**item.metadata["official"], "response": text} for item, text in zip(items, answers)])
        return path

    def validate(self, file: Path, data: Path) -> str:
        there = [split for split in self.splits if find(data, _FILES[split])]
        splits = there if self.split is None and there else [self.split]
        records, _ = self.read_answers(file)
        problems = []
        for split in splits:
            benchmark = type(self)(split)
            items = benchmark.load(data)
            try:
                empty = benchmark.match(items, records).count("")
                return f"{file} answers all {len(items)} questions of {split} once ({empty} answers are empty)"
            except ValueError as error:
                problems.append(str(error))
        raise ValueError(f"{file}: " + "; ".join(problems))


def _item(number: int, question: dict[str, Any], folder: Path, file: Path) -> Item:
    where = f"{file}: question {number} (counted from 0)"
    candidates = question["candidates"]
    if len(candidates) < 2 or not all(isinstance(candidate, str) for candidate in candidates):
        raise ValueError(f"{where}: candidates is {str(candidates)[:60]}, not a list of two or more texts")
    options = by_letter(candidates)
    right = question.get("correct_ans")
    if right is not None and candidates.count(right) != 1:
        raise ValueError(f"{where}: correct_ans is {str(right)[:60]!r}, not one of {candidates}")
    facts = {
        "options": options,
        "type": _name(question.get("type"), _TYPES, "type"),
        "concern": _name(question.get("concern"), _CONCERNS, "concern"),
        "place": _place(question),
        "official": question,
    }
    image = inside(folder, question["img_path"], where)
    reference = None if right is None else list(options)[candidates.index(right)]
    return Item(number, question["question"], (image,), reference, facts)


def _is_other(item: Item, record: Mapping[str, Any]) -> bool:
    """Whether an answer's line names another image, or a prompt without the question and its options."""
    prompt, image = record.get("prompt"), record.get("img_path")
    wrong_image = image is not None and image != item.metadata["official"]["img_path"]
    parts = (item.text, *item.metadata["options"].values())
    return wrong_image or (isinstance(prompt, str) and bool(prompt) and not_in(prompt, parts) is not None)


def _place(record: Mapping[str, Any]) -> str:
    """What tells questions apart: they have no ids."""
    return f"{record['img_path']}: {record['question']}"


def _name(number: Any, names: Sequence[str], kind: str) -> str | None:
    """The name of an official number; unknown ones keep their number."""
    if number is None:
        return None
    known = isinstance(number, int) and 0 <= number < len(names)
    return names[number] if known else f"{kind} {number}"


def _first(text: str) -> dict[str, Any]:
    """The first JSON object of a text; {} if it does not begin with one."""
    try:
        value, _ = json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def _one_after_another(text: str, path: Path) -> list[Any]:
    """JSON values with nothing (or spaces) between them."""
    values: list[Any] = []
    while text:
        try:
            value, end = json.JSONDecoder().raw_decode(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}: record {len(values)} (counted from 0) is cut off or no JSON: {error.msg}"
            ) from None
        values.append(value)
        text = text[end:].lstrip()
    return values


if __name__ == "__main__":
    sys.exit(main(QBench))
