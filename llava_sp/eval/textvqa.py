"""TextVQA (Singh et al. 2019): questions about text in OpenImages photos, ten answers each; version 0.5.1, val.

    python -m llava_sp.eval.textvqa --model M --data D --output O

D holds (in D itself or one folder below)
    TextVQA_0.5.1_val.json                    the official questions with answers (5,000)
    llava_textvqa_val_v051_ocr.jsonl          LLaVA's question file (from its eval.zip), with OCR tokens in each prompt
    train_images/0054c91397f2fe05.jpg, ...    the official images of train and val; --images names another folder

**The OCR tokens are part of LLaVA's prompt** ("Reference OCR token: ...") and of its published figures: 58.2 for
LLaVA-1.5-7B, full and LoRA. TextVQA_0.5.1_val.json does not hold them, so without LLaVA's question file the protocol
`llava15` asks nothing and says so; it still scores existing answers (--answers). The protocols without OCR tokens run from
the official file alone; their scores are lower by many points and not comparable with 58.2.

Protocols (all with the checkpoint's own conversation around the prompt):
    llava15      prompts of LLaVA's question file; the EvalAI answer processor on answer and references (the default)
    lmms_eval    no OCR tokens; the question begins with a capital and goes on in small letters; at most 1024 new tokens; the
                 EvalAI answer processor on both sides
    vlmevalkit   no OCR tokens; at most 512 new tokens; the VQAv2 normalisation on both sides with another rule for periods
                 (`1984.` keeps its own, and is then not equal to `1984`)

LLaVA's question_id is the id of the *image*, and an image may have several questions. Answers are therefore joined, as in
LLaVA's eval_textvqa.py, by image id and the question in small letters, which is read back from the `prompt` of each answer.
In per_item.jsonl, `question_id` is the official one, which is unique.

Quirks kept on purpose: where the annotations have the same question of the same image twice, `llava15` judges both by the
answers of the last. Ours differs from the official code in what it refuses: missing, doubled and foreign answers are counted
and named (there: not noticed, not noticed, a bare KeyError), and so is a prompt from which no question can be read, such as
one with a line break in an OCR token (there: a bare AssertionError).
"""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava_sp.common.files import examples
from llava_sp.decoding import Generation
from llava_sp.eval.base import LLAVA15, LLAVA15_LORA, LLAVA_SP, SHORT_ANSWER, Item, Scores
from llava_sp.eval.cli import main
from llava_sp.eval.inputs.checks import expect_all, expect_once, find, find_one, first_folder, inside, place
from llava_sp.eval.scoring.vqa import (
    AccuracyBenchmark,
    evalai_answer,
    leave_one_out,
    percent_of_mean,
    vlmevalkit_answer,
)

OFFICIAL = "TextVQA_0.5.1_val.json"
LLAVA = "llava_textvqa_val_v051_ocr.jsonl"
ANNOTATORS = 10
PREPARE: Mapping[str, Callable[[str], str]] = {
    "llava15": evalai_answer,
    "lmms_eval": evalai_answer,
    "vlmevalkit": vlmevalkit_answer,
}
_ROW = {"question": str, "image_id": str, "question_id": int, "answers": list}
_OCR = "Reference OCR token:"
_OLD_PROMPT = re.compile("Question: (.*?) Short answer:", re.DOTALL)
Key = tuple[str, str]  # image id, question in small letters


class TextVQA(AccuracyBenchmark):
    name = "textvqa"
    title = "TextVQA accuracy in percent"
    protocols = tuple(PREPARE)
    generations: ClassVar = {"lmms_eval": Generation(max_new_tokens=1024), "vlmevalkit": Generation(max_new_tokens=512)}
    published: ClassVar = {LLAVA15: 58.2, LLAVA15_LORA: 58.2, LLAVA_SP: 58.5}
    mean_in_percent = staticmethod(percent_of_mean)

    def load(self, data: Path) -> list[Item]:
        file = find_one(data, OFFICIAL, what="TextVQA annotations")
        rows = self._rows(file)
        by_key: dict[Key, list[dict[str, Any]]] = defaultdict(list)
        for row in rows:
            by_key[row["image_id"], row["question"].lower()].append(row)
        folder = self.images or first_folder(
            [data / "train_images", data / "train_val_images" / "train_images", data / "images"]
        )
        llava = find(data, LLAVA)
        asked = self._joined(llava[0], file, by_key) if llava else [(None, row) for row in rows]
        source = llava[0] if llava else file
        number: Counter[str] = Counter()  # of the questions of an image
        items = []
        for line, row in asked:
            number[row["image_id"]] += 1
            last = by_key[row["image_id"], row["question"].lower()][-1]
            image = line["image"] if line else f"{row['image_id']}.jpg"
            path = inside(folder, image, f"{source}: question {row['question_id']} of {OFFICIAL}")
            items.append(_item(line, row, last, path, number[row["image_id"]]))
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
                "eval.zip) beside it, or choose --protocol lmms_eval, which asks without them (lower scores, not comparable "
                "with LLaVA's)"
            )
        return item.metadata["llava"]

    def match(self, items: Sequence[Item], records: Sequence[dict[str, Any]]) -> list[str]:
        """By image id and question in small letters, which the `prompt` of each answer tells."""
        found: dict[Key, list[str]] = defaultdict(list)
        for number, record in enumerate(records):
            where = f"answer {number} (counted from 0, image {record['question_id']})"
            found[str(record["question_id"]), question_of(record.get("prompt"), where)].append(record["text"])
        wanted = Counter(_key(item) for item in items)
        trouble = _compare_keys({key: len(texts) for key, texts in found.items()}, wanted, "answer")
        if trouble:
            raise ValueError(
                f"the {len(records)} answers do not fit the {len(items)} questions of {OFFICIAL}: {trouble}"
            )
        in_order = {key: iter(texts) for key, texts in found.items()}
        return [next(in_order[_key(item)]) for item in items]

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> Scores:
        prepare = PREPARE[self.protocol]
        per_item = []
        for item, text in zip(items, answers):
            references = item.metadata["last_answers"] if self.protocol == "llava15" else item.reference
            answer = prepare(text)
            accuracy = leave_one_out(answer, [prepare(reference) for reference in references])
            per_item.append(
                {
                    "question_id": item.metadata["question_id"],
                    "score": round(100 * accuracy, 2),
                    "accuracy": accuracy,
                    "answer": answer,
                    "text": text,
                    "question": item.metadata["question"],
                    "image": item.images[0].name,
                    "references": references,
                }
            )
        metrics = {"questions": len(items), "images": len({item.id for item in items})}
        return Scores(self.headline(per_item), metrics, per_item)

    def _rows(self, file: Path) -> list[dict[str, Any]]:
        content = self.read_json(file)
        if not isinstance(content, dict) or not isinstance(content.get("data"), list):
            raise ValueError(f'{file} is not an official TextVQA file: it has no list "data"')
        rows = content["data"]
        expect_all(rows, _ROW, file)
        expect_once(rows, file, key="question_id")
        for row in rows:
            texts = [answer for answer in row["answers"] if isinstance(answer, str)]
            if len(texts) != ANNOTATORS or len(row["answers"]) != ANNOTATORS:
                raise ValueError(
                    f"{file}: question {row['question_id']} has {len(texts)} answers that are text among "
                    f"{len(row['answers'])}; the scorer needs {ANNOTATORS}"
                )
        return rows

    def _joined(
        self, llava: Path, file: Path, by_key: Mapping[Key, list[dict[str, Any]]]
    ) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """LLaVA's lines in their order, each with its annotation."""
        lines = self.read_jsonl(llava)
        expect_all(lines, {"question_id": str, "image": str, "text": str}, llava)
        where = [place(llava, "question", line, number) for number, line in enumerate(lines)]
        keys = [(line["question_id"], question_of(line["text"], w)) for line, w in zip(lines, where)]
        trouble = _compare_keys(Counter(keys), {key: len(rows) for key, rows in by_key.items()}, "line")
        if trouble:
            raise ValueError(f"{llava} does not fit {file}: {trouble}")
        in_order = {key: iter(rows) for key, rows in by_key.items()}
        return [(line, next(in_order[key])) for line, key in zip(lines, keys)]


def question_of(prompt: Any, where: str) -> str:
    """The question in small letters, read back from a prompt as LLaVA's eval_textvqa.py does.

    Raises:
        ValueError: naming `where`, if the prompt has none of the known forms.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"{where} has no prompt, which tells the question that it answers")
    lines = prompt.split("\n")
    old = _OLD_PROMPT.search(prompt) if prompt.startswith("OCR tokens: ") else None
    if old:
        return old[1].lower()
    if len(lines) == 3 and f"{_OCR} " in prompt:
        return lines[1 if prompt.startswith(_OCR) else 0].lower()
    if len(lines) == 2:
        return lines[0].lower()
    raise ValueError(
        f"{where}: no question can be read from the prompt {prompt[:120]!r}; it needs 2 lines, or 3 with {_OCR!r} (an OCR "
        "token with a line break?)"
    )


def _compare_keys(found: Mapping[Key, int], wanted: Mapping[Key, int], noun: str) -> str:
    """What is wrong with the numbers of answers (or lines) by question, with counts and examples."""
    problems = [
        (f"questions have more than one {noun}", [k for k, n in found.items() if k in wanted and n > wanted[k]]),
        (f"{noun}s are for questions that are not in the file", [k for k in found if k not in wanted]),
        (f"questions have no {noun}", [k for k, n in wanted.items() if found.get(k, 0) < n]),
    ]
    shown = [(trouble, [f"{image}: {question}" for image, question in keys]) for trouble, keys in problems if keys]
    return ", ".join(f"{len(keys)} {trouble} ({examples(keys)})" for trouble, keys in shown)


def _key(item: Item) -> Key:
    return str(item.id), item.metadata["question"].lower()


def _item(line: dict[str, Any] | None, row: dict[str, Any], last: dict[str, Any], image: Path, number: int) -> Item:
    """Item of an annotation, with LLaVA's line where there is one; `number` counts the questions of the image."""
    metadata = {
        "question": row["question"],
        "question_id": row["question_id"],
        "llava": line["text"] if line else None,
        "last_answers": last["answers"],
    }
    return Item(row["image_id"], row["question"], (image,), row["answers"], metadata, f"{row['image_id']}/{number}")


if __name__ == "__main__":
    sys.exit(main(TextVQA))
