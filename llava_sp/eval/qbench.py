"""Q-Bench, perception (Wu et al. 2023): multiple-choice questions about the low-level quality of an image (LLVisionQA).

    python -m llava_sp.eval.qbench --model M --data D --output O [--split dev|test]
    python -m llava_sp.eval.qbench --answers llvisionqa_dev_answers.json --data D

D holds (in D itself or one folder below) llvisionqa_dev.json (or llvisionqa_test.json) and the images as
images/<img_path> (or LLVisionQA-QBench/images/<img_path>, or beside the JSON). The questions have no ids: here they
are counted from 0.

LLaVA asked with the conversation template `llava_v1`, cropped the middle of each image (it did not pad), and let the model
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
line breaks nor brackets around the records, which is not valid JSON; ours is a JSON list. `--answers` reads both, and
answers.jsonl of this command. Answers in LLaVA's file are matched by image and question; those in answers.jsonl by
number, and where a line says what was asked (`prompt`, `img_path`), question, options and image must be those of the number
here: an answer of another split is an error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava_sp.common.files import examples, read_json, read_text, write_json
from llava_sp.common.schema import Check, expect, some
from llava_sp.decoding import Generation
from llava_sp.eval.base import OPTION_LETTER, Benchmark, Item, Scores
from llava_sp.eval.cli import main
from llava_sp.eval.inputs.answers_file import read_answers
from llava_sp.eval.inputs.checks import find, find_split, first_folder, inside, joined, verdict
from llava_sp.eval.scoring.letters import by_letter, lettered, lmms_qbench, not_in, vlmevalkit
from llava_sp.eval.scoring.records import categories, grouped, row, share_right

_FILES = {split: (f"llvisionqa_{split}.json",) for split in ("dev", "test")}
CANDIDATES = Check(lambda texts: len(texts) >= 2, "a list of two or more texts", [str])
QUESTION = {
    "img_path": str,
    "question": str,
    "candidates": CANDIDATES,
    "correct_ans?": (str, None),
    "type?": (int, None),
    "concern?": (int, None),
}
ANSWER = {"img_path": str, "question": str, "response": str}
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
    unscored = "only their authors can score them"

    def __init__(self, split: str | None = None, protocol: str | None = None, images: Path | None = None):
        super().__init__(split, protocol, images)
        self.conversation_template = None if self.protocol == "lmms_eval" else "llava_v1"
        self.image_aspect_ratio = {"llava15": "crop", "vlmevalkit": "pad"}.get(self.protocol)

    def load(self, data: Path) -> list[Item]:
        self.split, file = find_split(data, _FILES, self.split, "questions")
        questions = self.read_json(file, some(QUESTION))
        folder = self.images or first_folder(
            [file.parent / "images", data / "images", data / "LLVisionQA-QBench" / "images", file.parent]
        )
        items = [_item(number, question, folder, file) for number, question in enumerate(questions)]
        for key in ("correct_ans", "type", "concern"):  # all or none
            lost = [number for number, question in enumerate(questions) if question.get(key) is None]
            if lost and len(lost) < len(items):
                raise ValueError(f"{file}: {len(lost)} of {len(items)} questions have no {key} ({examples(lost)})")
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

    def read_answers(self, path: Path) -> tuple[Sequence[dict[str, Any]], str | None]:
        """The lines of an answers file, also of LLaVA's: records with `response`, in a list or one after another."""
        text = read_text(path).strip()
        if text.startswith("["):
            records = read_json(path)
        elif "response" in _first(text):
            records = _one_after_another(text, path)
        else:
            return read_answers(path)
        expect(records, some(ANSWER), path)
        return [{**record, "question_id": _place(record), "text": record["response"]} for record in records], None

    def match(self, items: Sequence[Item], records: Sequence[dict[str, Any]]) -> list[str]:
        """By image and question for LLaVA's file, by number for answers.jsonl."""
        if not any("response" in record for record in records):
            texts = super().match(items, records)
            asked = {str(record["question_id"]): record for record in records}
            others = [item for item in items if _is_other(item, asked[str(item.id)])]
            for other in others[:1]:
                was = " about ".join(str(asked[str(other.id)].get(key))[:80] for key in ("prompt", "img_path"))
                here = f"{other.text[:80]!r} about {other.metadata['official']['img_path']}"
                raise ValueError(
                    f"{len(others)} of {len(items)} answers are to other questions than {self.name} {self.split} has under their "
                    f"numbers (of another split?): question {other.id} was {was!r}, here it is {here}"
                )
            return texts
        ids, texts = [record["question_id"] for record in records], [record["text"] for record in records]
        places = [item.metadata["place"] for item in items]
        what = f"the questions of {self.name} {self.split}"
        found = joined(ids, texts, places, f"the answers file ({len(records)} records)", questions=what)
        return [found[place] for place in places]

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> Scores:
        infer = lmms_qbench if self.protocol == "lmms_eval" else vlmevalkit
        per_item = []
        for item, text in zip(items, answers):
            letter = infer(text, item.metadata["options"])
            score = None if item.reference is None else 100.0 * (letter == item.reference)
            facts = {key: item.metadata[key] for key in ("options", "type", "concern")}
            per_item.append(row(item, letter, text, score, **facts))
        if any(item.reference is None for item in items):
            return Scores(score=None, metrics={}, per_item=per_item)
        groups = grouped(per_item, "type", _TYPES) | grouped(per_item, "concern", _CONCERNS)
        found = categories(groups, share_right)
        metrics = {"count": len(per_item), "not_understood": sum(record["answer"] is None for record in per_item)}
        metrics |= {name: category.score for name, category in found.items()}
        return Scores(self.headline(per_item), metrics, per_item, found)

    @classmethod
    def headline(cls, per_item: Sequence[Mapping[str, Any]]) -> float:
        return share_right(per_item)

    def submission(self, items: Sequence[Item], answers: Sequence[str], output: Path) -> Path | None:
        path = output / f"llvisionqa_{self.split}_answers.json"
        write_json(path, [{**item.metadata["official"], "response": text} for item, text in zip(items, answers)])
        return path

    def validate(self, file: Path, data: Path) -> str:
        there = [split for split in self.splits if find(data, *_FILES[split])]
        splits = [self.split] if self.split or not there else there
        records, _ = self.read_answers(file)

        def trouble(split: str | None) -> str:
            benchmark = type(self)(split)
            try:
                benchmark.match(benchmark.load(data), records)
            except ValueError as error:
                return str(error)
            return ""

        tries = ((f"questions of {split}", trouble(split)) for split in splits)
        return verdict(file, [record["text"] for record in records], tries)


def _item(number: int, question: dict[str, Any], folder: Path, file: Path) -> Item:
    where = f"{file}: question {number} (counted from 0)"
    candidates, right = question["candidates"], question.get("correct_ans")
    if right is not None and candidates.count(right) != 1:
        raise ValueError(f"{where}: correct_ans is {right[:60]!r}, not one of {candidates}")
    options = by_letter(candidates)
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


def _name(number: int | None, names: Sequence[str], kind: str) -> str | None:
    """The name of an official number; unknown ones keep their number."""
    if number is None:
        return None
    return names[number] if 0 <= number < len(names) else f"{kind} {number}"


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
                f"{path}: record {len(values)} (counted from 0) is cut off or not JSON: {error.msg}"
            ) from None
        values.append(value)
        text = text[end:].lstrip()
    return values


if __name__ == "__main__":
    sys.exit(main(QBench))
