"""TextVQA (Singh et al. 2019): questions about text in OpenImages photos, ten answers each; version 0.5.1, val.

    python -m llava_sp.eval.textvqa --model M --data D --output O

D holds (in D itself or one folder below)
    TextVQA_0.5.1_val.json                    the official questions with answers (5,000)
    llava_textvqa_val_v051_ocr.jsonl          LLaVA's question file (from its eval.zip), with OCR tokens in each prompt
    train_images/0054c91397f2fe05.jpg, ...    the official images of train and val; --images names another folder

**The OCR tokens are part of LLaVA's prompt** ("Reference OCR token: ...") and of its published figures: 58.2 for
LLaVA-1.5-7B, full and LoRA. The official file lacks them, so without LLaVA's the protocol `llava15` can only score existing
answers (--answers). The other protocols need the official file alone; their scores are lower by many points and not
comparable with 58.2.

Protocols (all with the checkpoint's own conversation around the prompt):
    llava15      prompts of LLaVA's question file; the EvalAI answer processor on answer and references (the default)
    lmms_eval    no OCR tokens; the question begins with a capital, the rest is lower case; at most 1024 new tokens; the EvalAI
                 answer processor on both sides
    vlmevalkit   no OCR tokens; at most 512 new tokens; the VQAv2 normalisation on both sides with another rule for periods
                 (`1984.` keeps its own, and is then not equal to `1984`)

LLaVA's question_id is the id of the *image*, which may have several questions. Answers are joined, as in LLaVA's
eval_textvqa.py, by image id and the question in lower case, which is read back from the `prompt` of each answer. In
per_item.jsonl, `question_id` is the official one, which is unique.

Quirk kept on purpose: where the annotations have the same question of the same image twice, `llava15` judges both by the
answers of the last. Unlike there, missing, doubled and foreign answers are counted and named, as is a prompt from which no
question can be read, such as one with a line break in an OCR token.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava_sp.common.schema import Check, some
from llava_sp.decoding import Generation
from llava_sp.eval.base import LLAVA15, LLAVA15_LORA, LLAVA_SP, SHORT_ANSWER, Item, Scores
from llava_sp.eval.cli import main
from llava_sp.eval.inputs.checks import LLAVA_LINE, by_id, find, find_one, first_folder, inside, joined, numbered
from llava_sp.eval.scoring.records import row
from llava_sp.eval.scoring.vqa import (
    AccuracyBenchmark,
    evalai_answer,
    leave_one_out,
    percent_of_mean,
    vlmevalkit_answer,
)

OFFICIAL = "TextVQA_0.5.1_val.json"
LLAVA = "llava_textvqa_val_v051_ocr.jsonl"
PREPARE = {"llava15": evalai_answer, "lmms_eval": evalai_answer, "vlmevalkit": vlmevalkit_answer}
_OCR = "Reference OCR token:"
_OLD_PROMPT = re.compile("Question: (.*?) Short answer:", re.DOTALL)

ANSWERS = Check(lambda answers: len(answers) == 10, "a list of ten texts", [str])
QUESTIONS = {"data": some({"question": str, "image_id": str, "question_id": int, "answers": ANSWERS})}


class TextVQA(AccuracyBenchmark):
    name = "textvqa"
    title = "TextVQA accuracy in percent"
    protocols = tuple(PREPARE)
    generations: ClassVar = {"lmms_eval": Generation(max_new_tokens=1024), "vlmevalkit": Generation(max_new_tokens=512)}
    published: Mapping[str, float] = {LLAVA15: 58.2, LLAVA15_LORA: 58.2, LLAVA_SP: 58.5}

    def load(self, data: Path) -> list[Item]:
        file = source = find_one(data, OFFICIAL, what="TextVQA annotations")
        records = by_id(self.read_json(file, QUESTIONS)["data"], file).values()
        keys = [_key(record["image_id"], record["question"].lower()) for record in records]
        last = {key: record["answers"] for key, record in zip(keys, records)}
        questions = dict(zip(numbered(keys), records))
        asked: dict[str, dict[str, Any]] = {join: {} for join in questions}
        for source in find(data, LLAVA)[:1]:
            lines = self.read_jsonl(source, {**LLAVA_LINE, "question_id": str})
            keys = [_key(x["question_id"], question_of(x["text"], f"{source}, line {x.number}")) for x in lines]
            asked = joined(list(numbered(keys)), lines, questions, source, "line", file)
        names = ("train_images", "train_val_images/train_images", "images")
        folder = self.images or first_folder([data / name for name in names])
        items = []
        seen: Counter[str] = Counter()  # questions of an image
        for join, line in asked.items():
            question, image_id = questions[join], questions[join]["image_id"]
            seen[image_id] += 1
            metadata = {
                "question": question["question"],
                "question_id": question["question_id"],
                "llava": line.get("text"),
                "last_answers": last[_key(image_id, question["question"].lower())],
                "join": join,
            }
            where = f"{source}: question {question['question_id']} of {OFFICIAL}"
            image = inside(folder, line.get("image", f"{image_id}.jpg"), where)
            key = f"{image_id}/{seen[image_id]}"
            items.append(Item(image_id, question["question"], (image,), question["answers"], metadata, key))
        return items

    def prompt(self, item: Item) -> str:
        question = item.metadata["question"]
        if self.protocol == "lmms_eval":
            return question.capitalize() + SHORT_ANSWER
        if self.protocol == "vlmevalkit":
            return question + SHORT_ANSWER
        if item.metadata["llava"] is None:
            raise ValueError(
                f"the prompts of protocol llava15 hold OCR tokens, which {OFFICIAL} does not: put LLaVA's {LLAVA} (from its "
                "eval.zip) beside it, or use --protocol lmms_eval, without them (lower scores, not comparable with LLaVA's)"
            )
        return item.metadata["llava"]

    def match(self, items: Sequence[Item], records: Sequence[dict[str, Any]]) -> list[str]:
        """By image id and question in lower case, which is read back from the `prompt` of each answer."""
        keys = []
        for index, record in enumerate(records):
            where = f"answer {index} (counted from 0, image {record['question_id']})"
            keys.append(_key(record["question_id"], question_of(record.get("prompt"), where)))
        joins = [item.metadata["join"] for item in items]
        where = f"the answers file ({len(records)} lines)"
        found = joined(list(numbered(keys)), records, joins, where, questions=OFFICIAL)
        return [found[join]["text"] for join in joins]

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> Scores:
        prepare, per_item = PREPARE[self.protocol], []
        for item, text in zip(items, answers):
            references = item.metadata["last_answers"] if self.protocol == "llava15" else item.reference
            answer = prepare(text)
            accuracy = leave_one_out(answer, [prepare(reference) for reference in references])
            about = {"question_id": item.metadata["question_id"], "accuracy": accuracy, "references": references}
            per_item.append(row(item, answer, text, round(100 * accuracy, 2), **about))
        metrics = {"questions": len(items), "images": len({item.id for item in items})}
        return Scores(self.headline(per_item), metrics, per_item)

    @classmethod
    def headline(cls, per_item: Sequence[Mapping[str, Any]]) -> float:
        return percent_of_mean(record["accuracy"] for record in per_item)


def question_of(prompt: Any, where: str) -> str:
    """The question in lower case, read back from a prompt as LLaVA's eval_textvqa.py does.

    Raises:
        ValueError: naming `where`, if the prompt has none of the known forms.
    """
    text = prompt if isinstance(prompt, str) else ""
    lines = text.split("\n")
    old = _OLD_PROMPT.search(text) if text.startswith("OCR tokens: ") else None
    if old:
        return old[1].lower()
    if len(lines) == 2 or (len(lines) == 3 and f"{_OCR} " in text):
        return lines[1 if len(lines) == 3 and text.startswith(_OCR) else 0].lower()
    raise ValueError(
        f"{where}: no question can be read from the prompt {repr(prompt)[:120]}; it needs 2 lines, or 3 with {_OCR!r} (an OCR "
        "token with a line break?)"
    )


def _key(image_id: Any, question: str) -> str:
    return f"{image_id}: {question}"


if __name__ == "__main__":
    sys.exit(main(TextVQA))
