"""SEED-Bench (Li et al. 2023): questions with four options about images and videos, in twelve dimensions.

    python -m llava_sp.eval.seedbench --model M --data D --output O [--split all|image|video]

D holds (in D itself or one folder below) SEED-Bench.json, and beside it SEED-Bench-image/<data_id> and
SEED-Bench-video-image/<type>_<question id>.png: of each video its middle frame, as LLaVA's extract_video_frames.py
writes it. LLaVA's question file llava-seed-bench.jsonl is taken where it is there; without it the same prompts are
made from SEED-Bench.json. Who has no videos takes `--split image`; its score is what tables call SEED-I.

Published for LLaVA-1.5-7B: 58.6, images and videos together, by generated letters; 66.2 on the images alone (SEED-I;
LLaVA-SP-7B 67.9; both as TrustCLIP, table 3, has them). The benchmark's own eval.py processes the options by their likelihood
instead: do not compare with its leaderboard.

Protocols, with the same prompts: `llava15` counts an answer that is exactly the letter ("B." is wrong); `lmms_eval`
counts the first character, in either case (it gives eight frames of a video, though, where LLaVA and this command give
one).

O/submission.jsonl is the file for the leaderboard, as LLaVA writes it.

The official annotations have one question id twice. LLaVA's scorer knows answers by id, so that the last answer to it
is taken for both; here each question keeps its own answer (told apart by the prompt, else by the order of the lines),
and a single answer to such an id is taken for both as LLaVA's is. LLaVA's scorer stops with a KeyError where a kind of
question has no right answer (here 0) or an answer is missing (here an error that counts them).
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava_sp.common.files import examples, read_jsonl, write_jsonl
from llava_sp.decoding import Generation
from llava_sp.eval.base import LLAVA15, LLAVA15_LORA, LLAVA_SP, OPTION_LETTER, Benchmark, Category, Item, Scores
from llava_sp.eval.cli import main
from llava_sp.eval.inputs.answers_file import match_by_question_id
from llava_sp.eval.inputs.checks import expect, expect_all, find, find_one, first_folder, inside
from llava_sp.eval.scoring.letters import by_letter, lettered, lmms_seedbench, not_in, percent

_QUESTION = {
    "question_id": (str, int),
    "question_type_id": int,
    "question": str,
    "data_type": str,
    "data_id": str,
    "answer": str,
    **dict.fromkeys(("choice_a", "choice_b", "choice_c", "choice_d"), str),
}
_LINE = {"question_id": (str, int), "text": str, "image": str}
_FOLDERS = {"image": "SEED-Bench-image", "video": "SEED-Bench-video-image"}
ALL = "all"


class SeedBench(Benchmark):
    name = "seedbench"
    title = "SEED-Bench accuracy in percent"
    splits = (ALL, "image", "video")
    protocols = ("llava15", "lmms_eval")
    generations: ClassVar = {"lmms_eval": Generation(max_new_tokens=1024)}
    published: ClassVar = {LLAVA15: 58.6, LLAVA15_LORA: 60.1}
    published_on = "images and videos together"
    folders = ("seed_bench", "SEED-Bench")

    def __init__(self, split: str | None = None, protocol: str | None = None, images: Path | None = None):
        super().__init__(split, protocol, images)
        if self.split == "image":  # what tables call SEED-I
            self.published = {LLAVA15: 66.2, LLAVA_SP: 67.9}
            self.published_on = "images alone, both as TrustCLIP, table 3, has them"
        elif self.split == "video":
            self.published, self.published_on = {}, ""

    def load(self, data: Path) -> list[Item]:
        self.data = data
        self.split = self.split or ALL
        file = find_one(data, "SEED-Bench.json", what="questions")
        content = self.read_json(file)
        expect(content, {"questions": list, "question_type": dict}, str(file))
        questions = content["questions"]
        expect_all(questions, _QUESTION, file)
        names = _type_names(content["question_type"], f"{file}: question_type")
        for question in questions:
            _check(question, names, f"{file}: question {question['question_id']}")
        questions = [q for q in questions if self.split in (ALL, q["data_type"])]
        if not questions:
            raise ValueError(f"{file} has no questions about a {self.split}")
        texts, images = self._asked(questions)
        folder = self.images or first_folder([self.data, self.data / "images"])
        items, seen = [], Counter()
        for question, text, name in zip(questions, texts, images):
            official = str(question["question_id"])
            seen[official] += 1
            key = official if seen[official] == 1 else f"{official}#{seen[official]}"
            image = inside(folder, name, f"{file}: question {official}")
            items.append(_item(question, text, image, names[question["question_type_id"]], key))
        return items

    def _asked(self, questions: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
        """Prompts and image names of the questions, from LLaVA's question file if there is one."""
        found = find(self.data, "llava-seed-bench.jsonl")
        if not found:
            return [_text(question) for question in questions], [_image(question) for question in questions]
        lines = self.read_jsonl(found[0])
        expect_all(lines, _LINE, found[0])
        by_id = defaultdict(list)
        for line in lines:
            by_id[_llava_id(line["question_id"])].append(line)
        missing = [question["question_id"] for question in questions if _llava_id(question["question_id"]) not in by_id]
        if missing:
            raise ValueError(f"{found[0]} lacks {len(missing)} questions of SEED-Bench.json ({examples(missing)})")
        chosen = []
        for question in questions:
            parts = (question["question"], *_options(question).values())
            same = by_id[_llava_id(question["question_id"])]
            line = next((line for line in same if not_in(line["text"], parts) is None), None)
            if line is None:
                raise ValueError(
                    f"{found[0]}: question {question['question_id']} asks {same[0]['text'][:60]!r}..., without "
                    f"{not_in(same[0]['text'], parts)[:60]!r} of SEED-Bench.json: is one of another version?"
                )
            if len(same) > 1:
                same.remove(line)  # the next question of this id has the next line
            chosen.append(line)
        return [line["text"] for line in chosen], [line["image"] for line in chosen]

    def match(self, items: Sequence[Item], records: Sequence[dict[str, Any]]) -> list[str]:
        """By question id, a number or its text; see the module's docstring for the id that is twice."""
        items_of, records_of = defaultdict(list), defaultdict(list)
        for item in items:
            items_of[item.id].append(item)
        for record in records:
            records_of[_llava_id(record["question_id"])].append(record)
        taken: dict[str, str] = {}
        for i, same in items_of.items():
            answers = records_of[i]
            if len(same) > 1 and len(answers) in (1, len(same)):
                taken |= {item.key: text for item, text in zip(same, _of_each(same, answers))}
                del records_of[i]
        others = [item for item in items if item.key not in taken]
        left = [{**record, "question_id": i} for i, same in records_of.items() for record in same]
        texts = match_by_question_id(others, left, what=f"{self.name} {self.split}")
        taken |= {item.key: text for item, text in zip(others, texts)}
        return [taken[item.key] for item in items]

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> Scores:
        infer = lmms_seedbench if self.protocol == "lmms_eval" else str
        per_item = []
        for item, text in zip(items, answers):
            per_item.append(
                {
                    "question_id": item.id,
                    "score": 100.0 if infer(text) == item.reference else 0.0,
                    "answer": infer(text),
                    "text": text,
                    "image": item.images[0].name,
                    "references": [item.reference],
                    **item.metadata,
                }
            )
        types = {record["type_id"]: record["type"] for record in sorted(per_item, key=lambda r: r["type_id"])}
        parts = {name: [r for r in per_item if r["type_id"] == number] for number, name in types.items()}
        parts |= {kind: [r for r in per_item if r["data_type"] == kind] for kind in _FOLDERS}
        categories = {name: Category(self.headline(part), len(part)) for name, part in parts.items() if part}
        total = self.headline(per_item)
        metrics = {"total": total, "count": len(per_item)}
        metrics |= {kind: categories[kind].score for kind in _FOLDERS if kind in categories}
        metrics["by_type"] = {name: categories[name].score for name in types.values()}
        return Scores(total, metrics, per_item, categories)

    @classmethod
    def headline(cls, per_item: Sequence[Mapping[str, Any]]) -> float:
        return percent(sum(record["score"] > 0 for record in per_item), len(per_item))

    def submission(self, items: Sequence[Item], answers: Sequence[str], output: Path) -> Path | None:
        path = output / "submission.jsonl"
        write_jsonl(
            path, [{"question_id": i.metadata["official_id"], "prediction": text} for i, text in zip(items, answers)]
        )
        return path

    def validate(self, file: Path, data: Path) -> str:
        items = self.load(data)
        lines = read_jsonl(file)
        expect_all(lines, {"question_id": (str, int), "prediction": str}, file, "line")
        found = Counter(str(line["question_id"]) for line in lines)
        wanted = Counter(item.metadata["official_id"] for item in items)
        missing, more = wanted - found, found - wanted
        if missing or more:
            problems = [f"{missing.total()} questions have no answer ({examples(missing)})"] * bool(missing)
            problems += [f"{more.total()} answers are for no question, or for one twice ({examples(more)})"] * bool(
                more
            )
            raise ValueError(f"{file}: {', '.join(problems)}")
        empty = sum(not line["prediction"] for line in lines)
        return f"{file} answers all {len(items)} questions ({empty} answers are empty)"


def _item(question: Mapping[str, Any], text: str, image: Path, type_name: str, key: str) -> Item:
    facts = {"question": question["question"], "options": _options(question), "data_type": question["data_type"]}
    facts |= {"type": type_name, "type_id": question["question_type_id"], "official_id": str(question["question_id"])}
    return Item(_llava_id(question["question_id"]), text, (image,), question["answer"], facts, key)


def _type_names(numbers: dict[str, Any], where: str) -> dict[int, str]:
    """Number -> name of a kind of question. Raises ValueError for what is no number, and for one number of two kinds."""
    expect(numbers, dict.fromkeys(numbers, int), where)
    names: dict[int, str] = {}
    for name, number in numbers.items():
        if number in names:
            raise ValueError(f"{where}: {number} is the number of both {names[number]!r} and {name!r}")
        names[number] = name
    return names


def _check(question: dict[str, Any], names: Mapping[int, str], where: str) -> None:
    if question["data_type"] not in _FOLDERS:
        raise ValueError(f"{where}: data_type is {question['data_type']!r}, not image or video")
    if question["answer"] not in tuple("ABCD"):
        raise ValueError(f"{where}: answer is {question['answer']!r}, not A, B, C or D")
    if question["question_type_id"] not in names:
        raise ValueError(f"{where}: question_type_id {question['question_type_id']} is not in question_type")


def _options(question: Mapping[str, Any]) -> dict[str, str]:
    return by_letter(question[f"choice_{letter}"] for letter in "abcd")


def _image(question: Mapping[str, Any]) -> str:
    kind = question["data_type"]
    if kind == "image":
        return f"{_FOLDERS[kind]}/{question['data_id']}"
    return f"{_FOLDERS[kind]}/{question['question_type_id']}_{question['question_id']}.png"


def _text(question: Mapping[str, Any]) -> str:
    return f"{question['question']}\n{lettered(_options(question))}{OPTION_LETTER}"


def _llava_id(official: int | str) -> int | str:
    """LLaVA's files have a number wherever the official id is one."""
    text = str(official)
    return int(text) if text.isdecimal() else text


def _of_each(same: Sequence[Item], answers: Sequence[dict[str, Any]]) -> list[str]:
    """The answers to questions of one id: by their prompts where these tell them apart, else in order."""
    if len(answers) == 1:
        return [answers[0]["text"]] * len(same)
    by_prompt = {record.get("prompt"): record["text"] for record in answers}
    prompts = {item.text for item in same}
    if len(prompts) == len(same) and prompts == set(by_prompt):
        return [by_prompt[item.text] for item in same]
    return [record["text"] for record in answers]


if __name__ == "__main__":
    sys.exit(main(SeedBench))
