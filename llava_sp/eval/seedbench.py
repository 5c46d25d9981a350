"""SEED-Bench (Li et al. 2023): questions with four options about images and videos, in twelve dimensions.

    python -m llava_sp.eval.seedbench --model M --data D --output O [--split all|image|video]

D holds (in D itself or one folder below) SEED-Bench.json, and (in D or D/images) SEED-Bench-image/<data_id> and
SEED-Bench-video-image/<type>_<question id>.png: of each video its middle frame, as LLaVA's extract_video_frames.py
writes it. LLaVA's question file llava-seed-bench.jsonl is used if it is there; without it the same prompts are made from
SEED-Bench.json. Without the videos use `--split image`; its score is what tables call SEED-I.

Published for LLaVA-1.5-7B: 58.6, images and videos together, by generated letters; 66.2 on the images alone (SEED-I;
LLaVA-SP-7B 67.9; both as TrustCLIP, table 3, has them). The benchmark's own eval.py compares the options' likelihoods
instead: do not compare with its leaderboard.

Protocols, with the same prompts: `llava15` counts an answer that is exactly the letter ("B." is wrong); `lmms_eval`
counts the first character, in either case (it gives eight frames of a video, though, where LLaVA and this command give
one).

O/submission.jsonl is the file for the leaderboard, as LLaVA writes it.

The official annotations have one question id twice. LLaVA's scorer finds answers by id, so that the last answer to it
counts for both; here each question keeps its own answer (told apart by the prompt, else by the order of the lines), and
a single answer to such an id counts for both as LLaVA's does. LLaVA's scorer stops with a KeyError where a kind of
question has no right answer (here 0) or an answer is missing (here an error that counts them).
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava_sp.common.files import read_jsonl, write_jsonl
from llava_sp.common.schema import expect, one_of, some
from llava_sp.decoding import Generation
from llava_sp.eval.base import LLAVA15, LLAVA15_LORA, LLAVA_SP, OPTION_LETTER, Benchmark, Item, Scores
from llava_sp.eval.cli import main
from llava_sp.eval.inputs.answers_file import match_by_question_id
from llava_sp.eval.inputs.checks import (
    ID,
    LLAVA_LINE,
    by_id,
    compare_ids,
    find,
    find_one,
    first_folder,
    inside,
    numbered,
    verdict,
)
from llava_sp.eval.scoring.letters import by_letter, lettered, lmms_seedbench, not_in
from llava_sp.eval.scoring.records import categories, grouped, row, share_right

FOLDERS = {"image": "SEED-Bench-image", "video": "SEED-Bench-video-image"}
ALL = "all"
CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")
QUESTION = {
    "question_id": ID,
    "question_type_id": int,
    "data_type": one_of(*FOLDERS),
    "answer": one_of(*"ABCD"),
    **dict.fromkeys(("question", "data_id", *CHOICES), str),
}
QUESTIONS = {"questions": some(QUESTION), "question_type": {str: int}}


class SeedBench(Benchmark):
    name = "seedbench"
    title = "SEED-Bench accuracy in percent"
    splits = (ALL, *FOLDERS)
    protocols = ("llava15", "lmms_eval")
    generations: ClassVar = {"lmms_eval": Generation(max_new_tokens=1024)}
    published: Mapping[str, float] = {LLAVA15: 58.6, LLAVA15_LORA: 60.1}
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
        self.split = self.split or ALL
        file = find_one(data, "SEED-Bench.json", what="questions")
        content = self.read_json(file, QUESTIONS)
        types = by_id([{"name": name, "number": n} for name, n in content["question_type"].items()], file, "number")
        questions = [q for q in content["questions"] if self.split in (ALL, q["data_type"])]
        if not questions:
            raise ValueError(f"{file} has no questions of split {self.split}")
        asked = [{"text": _text(question), "image": _image(question)} for question in questions]
        for llava in find(data, "llava-seed-bench.jsonl")[:1]:
            asked = _llava_lines(questions, self.read_jsonl(llava, LLAVA_LINE), llava)
        places = [place / name for place in (data, data / "images") for name in FOLDERS.values()]
        folder = self.images or first_folder(places).parent
        items = []
        keys = numbered(question["question_id"] for question in questions)
        for question, line, key in zip(questions, asked, keys):
            where = f"{file}: question {question['question_id']}"
            expect(question, {"question_type_id": one_of(*types)}, where)
            facts = {
                "question": question["question"],
                "options": _options(question),
                "data_type": question["data_type"],
            }
            facts |= {"type": types[question["question_type_id"]]["name"], "type_id": question["question_type_id"]}
            facts |= {"official_id": str(question["question_id"])}
            image = inside(folder, line["image"], where)
            items.append(
                Item(_llava_id(question["question_id"]), line["text"], (image,), question["answer"], facts, key)
            )
        return items

    def match(self, items: Sequence[Item], records: Sequence[dict[str, Any]]) -> list[str]:
        """By question id, a number or its text; see the module's docstring for the id that is twice."""
        items_of, records_of = defaultdict(list), defaultdict(list)
        for item in items:
            items_of[item.id].append(item)
        for record in records:
            records_of[_llava_id(record["question_id"])].append(record)
        texts: dict[str, str] = {}
        for i, same in items_of.items():
            if len(same) > 1 and len(records_of[i]) in (1, len(same)):
                texts |= zip((item.key for item in same), _of_each(same, records_of.pop(i)))
        others = [item for item in items if item.key not in texts]
        left = [{**record, "question_id": i} for i, same in records_of.items() for record in same]
        found = match_by_question_id(others, left, what=f"{self.name} {self.split}")
        texts |= zip((item.key for item in others), found)
        return [texts[item.key] for item in items]

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> Scores:
        infer = lmms_seedbench if self.protocol == "lmms_eval" else str
        per_item = [
            row(item, infer(text), text, 100.0 * (infer(text) == item.reference), **item.metadata)
            for item, text in zip(items, answers)
        ]
        by_type = {records[0]["type"]: records for records in grouped(per_item, "type_id").values()}
        kinds = grouped(per_item, "data_type", FOLDERS)
        found = categories(by_type | kinds, share_right)
        metrics: dict[str, Any] = {"total": self.headline(per_item), "count": len(per_item)}
        metrics |= {kind: found[kind].score for kind in kinds}
        metrics["by_type"] = {name: found[name].score for name in by_type}
        return Scores(self.headline(per_item), metrics, per_item, found)

    @classmethod
    def headline(cls, per_item: Sequence[Mapping[str, Any]]) -> float:
        return share_right(per_item)

    def submission(self, items: Sequence[Item], answers: Sequence[str], output: Path) -> Path | None:
        path = output / "submission.jsonl"
        ids = [item.metadata["official_id"] for item in items]
        write_jsonl(path, [{"question_id": i, "prediction": text} for i, text in zip(ids, answers)])
        return path

    def validate(self, file: Path, data: Path) -> str:
        items = self.load(data)
        lines = read_jsonl(file, {"question_id": ID, "prediction": str})
        trouble = compare_ids(numbered(line["question_id"] for line in lines), [item.key for item in items])
        return verdict(file, [line["prediction"] for line in lines], [(f"questions of {self.split}", trouble)])


def _llava_lines(
    questions: Sequence[dict[str, Any]], lines: Sequence[dict[str, Any]], file: Path
) -> list[dict[str, Any]]:
    """The lines of LLaVA's question file that ask the questions."""
    of_id = defaultdict(list)
    for line in lines:
        of_id[_llava_id(line["question_id"])].append(line)
    chosen = []
    for question in questions:
        parts = (question["question"], *_options(question).values())
        same = of_id[_llava_id(question["question_id"])]
        fitting = [line for line in same if not_in(line["text"], parts) is None]
        if not fitting:
            asks = f"asks {same[0]['text'][:60]!r}" if same else "is not there"
            raise ValueError(
                f"{file}: question {question['question_id']} {asks}; SEED-Bench.json has {' / '.join(parts)[:120]!r}: is one "
                "of another version?"
            )
        if len(same) > 1:
            same.remove(fitting[0])  # the next question of this id has the next line
        chosen.append(fitting[0])
    return chosen


def _options(question: Mapping[str, Any]) -> dict[str, str]:
    return by_letter(question[choice] for choice in CHOICES)


def _image(question: Mapping[str, Any]) -> str:
    """The image's file, as LLaVA names the frames of videos."""
    video = f"{question['question_type_id']}_{question['question_id']}.png"
    return f"{FOLDERS[question['data_type']]}/{question['data_id'] if question['data_type'] == 'image' else video}"


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
