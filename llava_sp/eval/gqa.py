"""GQA (Hudson and Manning 2019): compositional questions about Visual Genome images, one answer each; testdev balanced.

    python -m llava_sp.eval.gqa --model M --data D --output O

D holds (in D itself or one folder below, such as LLaVA's gqa/data)
    testdev_balanced_questions.json          the official questions (12,578); testdev_all_questions.json does too
    images/n161313.jpg, ...                  the official images; --images names the folder if it is elsewhere
    llava_gqa_testdev_balanced.jsonl         LLaVA's question file; not needed, the prompts are the same without it
Only questions with `isBalanced` count and are asked; answers to others in an answers file are left out.

O/testdev_balanced_predictions.json holds the answers as LLaVA's converter writes them, for the official eval.py;
`--validate FILE --data D` checks such a file.

The score is eval.py's accuracy in percent. `metrics` has all else that it prints: binary and open questions, by structural
and by semantic type, by number of reasoning steps and of words, and `distribution`, a chi-square of the answers by group
(lower is better). Validity and plausibility are left out: eval.py prints 0.00 for them, since they need a file of choices
that LLaVA's set-up does not load.

Published for LLaVA-1.5-7B: 62.0 (LoRA 63.0), on testdev balanced as here.

Protocols, all with the same prompt (and the checkpoint's own conversation around it):
    llava15      trailing periods are stripped, letters made small, and the rest must equal the answer (the default). Nothing
                 else is forgiven: `bed .`, ` yes` and `a man` are wrong
    lmms_eval    at most 16 new tokens; ends stripped, letters small and ASCII punctuation removed, on both sides
    vlmevalkit   at most 512 new tokens; ends stripped and letters small, on both sides, so `Yes.` is wrong

Where ours differs from the official code: a missing answer names its question; figures of which there are no questions, and
the distribution where no question has a global group, are null (eval.py gives 0 for the first and divides by zero for the
second).
"""

from __future__ import annotations

import string
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava_sp.common.files import write_json
from llava_sp.decoding import Generation
from llava_sp.eval.base import LLAVA15, LLAVA15_LORA, LLAVA_SP, SHORT_ANSWER, Benchmark, Category, Item, Scores
from llava_sp.eval.cli import main
from llava_sp.eval.inputs.checks import (
    compare_ids,
    expect,
    expect_all,
    expect_once,
    find,
    find_one,
    first_folder,
    inside,
)

OFFICIAL = ("testdev_balanced_questions.json", "testdev_all_questions.json")
LLAVA = "llava_gqa_testdev_balanced.jsonl"
PREDICTIONS = "testdev_balanced_predictions.json"
_UNZIPPED = "questions1.2"  # the folder that the official questions1.2.zip may be unpacked into
_NO_STEP = ("exist", "query: name", "choose name")  # operations that only read off the answer
_QUESTION = {"question": str, "imageId": str, "answer": str, "semantic": list, "groups": dict, "types": dict}
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def llava_prediction(answer: str) -> str:
    """LLaVA's conversion: all trailing periods off, then small letters. Nothing else, also no stripping of spaces."""
    return answer.rstrip(".").lower()


def _without_punctuation(answer: str) -> str:
    return answer.strip().lower().translate(_NO_PUNCTUATION)


def _small_and_stripped(answer: str) -> str:
    return answer.strip().lower()


# protocol -> (what is done to an answer, what to the reference)
RULES: Mapping[str, tuple[Callable[[str], str], Callable[[str], str]]] = {
    "llava15": (llava_prediction, str),
    "lmms_eval": (_without_punctuation, _without_punctuation),
    "vlmevalkit": (_small_and_stripped, _small_and_stripped),
}


class GQA(Benchmark):
    name = "gqa"
    title = "GQA accuracy in percent"
    protocols = tuple(RULES)
    generations: ClassVar = {"lmms_eval": Generation(max_new_tokens=16), "vlmevalkit": Generation(max_new_tokens=512)}
    submission_label = "for eval.py"
    published: ClassVar = {LLAVA15: 62.0, LLAVA15_LORA: 63.0, LLAVA_SP: 62.7}

    def load(self, data: Path) -> list[Item]:
        file, questions = self._questions(data)
        balanced = {i: question for i, question in questions.items() if question["isBalanced"]}
        self.not_counted = questions.keys() - balanced.keys()
        if not balanced:
            raise ValueError(
                f"{file}: none of the {len(questions)} questions has isBalanced true, and only those count"
            )
        folder = self.images or first_folder([data / "images", data / "data" / "images"])
        llava = find(data, LLAVA)
        if llava:
            lines = [line for line in self._llava_lines(llava[0]) if str(line["question_id"]) not in self.not_counted]
            trouble = compare_ids([str(line["question_id"]) for line in lines], balanced, "line")
            if trouble:
                raise ValueError(f"{llava[0]} does not fit {file}: {trouble}")
        else:
            lines = [_as_llava(i, question) for i, question in balanced.items()]
        source = llava[0] if llava else file
        return [_item(line, balanced[str(line["question_id"])], folder, source) for line in lines]

    def prompt(self, item: Item) -> str:
        return item.text if item.text.endswith(SHORT_ANSWER) else item.text + SHORT_ANSWER

    def match(self, items: Sequence[Item], records: Sequence[dict[str, Any]]) -> list[str]:
        return super().match(items, [r for r in records if str(r["question_id"]) not in self.not_counted])

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> Scores:
        of_answer, of_reference = RULES[self.protocol]
        predicted = [of_answer(answer) for answer in answers]
        gold = [of_reference(item.reference) for item in items]
        per_item = [
            {
                "question_id": item.id,
                "score": 100.0 * (prediction == truth),
                "answer": prediction,
                "text": text,
                "image": item.images[0].name,
                "references": [item.reference],
                "category": item.metadata["structural"],
                **item.metadata,
            }
            for item, prediction, truth, text in zip(items, predicted, gold, answers)
        ]
        by = {kind: _by(kind, per_item) for kind in ("structural", "semantic", "steps", "words")}
        answered = {
            "binary": _category(line["score"] for line in per_item if line["structural"] != "query"),
            "open": _category(line["score"] for line in per_item if line["structural"] == "query"),
        }
        answered = {name: category for name, category in answered.items() if category.count}
        metrics: dict[str, Any] = {name: getattr(answered.get(name), "score", None) for name in ("binary", "open")}
        metrics["distribution"] = distribution([item.metadata["group"] for item in items], gold, predicted)
        for kind, categories in by.items():
            metrics[f"per_{kind}"] = {name: {"accuracy": c.score, "count": c.count} for name, c in categories.items()}
        categories = answered | by["structural"] | {f"about {name}": c for name, c in by["semantic"].items()}
        return Scores(self.headline(per_item), metrics, per_item, categories)

    def submission(self, items: Sequence[Item], answers: Sequence[str], output: Path) -> Path | None:
        path = output / PREDICTIONS
        lines = [{"questionId": str(i.id), "prediction": llava_prediction(a)} for i, a in zip(items, answers)]
        write_json(path, lines)
        return path

    def validate(self, file: Path, data: Path) -> str:
        _, questions = self._questions(data)
        results = self.read_json(file)
        expect_all(results, {"questionId": str, "prediction": str}, file, "prediction")
        balanced = {i for i, question in questions.items() if question["isBalanced"]}
        found = [result["questionId"] for result in results]
        trouble = compare_ids([i for i in found if i in balanced or i not in questions], balanced)
        if trouble:
            raise ValueError(f"{file} {trouble}")
        return f"{file} answers all {len(balanced)} balanced questions once"

    def _questions(self, data: Path) -> tuple[Path, dict[str, dict[str, Any]]]:
        names = [name for plain in OFFICIAL for name in (plain, f"{_UNZIPPED}/{plain}")]
        file = find_one(data, *names, what="GQA questions")
        questions = self.read_json(file)
        if not isinstance(questions, dict) or not questions:
            raise ValueError(f"{file} is not an official questions file: no object {{question id: question}}")
        for i, question in questions.items():
            _check_question(question, f"{file}: question {i}")
        return file, questions

    def _llava_lines(self, file: Path) -> list[dict[str, Any]]:
        lines = self.read_jsonl(file)
        expect_all(lines, {"question_id": (int, str), "image": str, "text": str}, file)
        expect_once(lines, file, key="question_id")
        return lines


def distribution(groups: Sequence[str | None], gold: Sequence[str], predicted: Sequence[str]) -> float | None:
    """How far the answers to a group of questions are from the true ones, as a chi-square over the true answers, averaged
    over the groups by their numbers of questions and divided by 100. None if no question is in a group."""
    truth: dict[str, Counter[str]] = defaultdict(Counter)
    given: dict[str, Counter[str]] = defaultdict(Counter)
    for group, right, answer in zip(groups, gold, predicted):
        if group is not None:
            truth[group][right] += 1
            given[group][answer] += 1
    if not truth:
        return None
    total = 0.0
    for group, counts in truth.items():
        total += sum((given[group][a] - n) ** 2 / n for a, n in counts.items()) * counts.total()
    return round(total / sum(counts.total() for counts in truth.values()) / 100, 2)


def steps(semantic: Iterable[Mapping[str, Any]]) -> int:
    """Reasoning steps of a question: its operations without those that only read off the answer."""
    said = (f"{step['operation']}: {step['argument']}" for step in semantic)
    return sum(not any(name in operation for name in _NO_STEP) for operation in said)


def _as_llava(i: str, question: dict[str, Any]) -> dict[str, Any]:
    """The line that LLaVA's question file has for an official question."""
    return {"question_id": i, "image": f"{question['imageId']}.jpg", "text": question["question"] + SHORT_ANSWER}


def _item(line: dict[str, Any], question: dict[str, Any], folder: Path, file: Path) -> Item:
    metadata = {
        "question": question["question"],
        "structural": question["types"]["structural"],
        "semantic": question["types"]["semantic"],
        "steps": steps(question["semantic"]),
        "words": len(question["question"].split()),
        "group": question["groups"]["global"],
    }
    image = inside(folder, line["image"], f"{file}: question {line['question_id']}")
    return Item(line["question_id"], line["text"], (image,), question["answer"], metadata)


def _check_question(question: Any, where: str) -> None:
    expect(question, _QUESTION, where)
    if not isinstance(question.get("isBalanced"), bool):
        raise ValueError(f"{where}: isBalanced is {question.get('isBalanced')!r}, not true or false")
    expect(question["types"], {"structural": str, "semantic": str}, f"{where}, types")
    group = question["groups"].get("global", 0)
    if group is not None and not isinstance(group, str):
        raise ValueError(f"{where}: the global one of groups is {group!r}, not text or null")
    for number, step in enumerate(question["semantic"]):
        expect(step, {"operation": str, "argument": str}, f"{where}, semantic {number} (counted from 0)")


def _by(kind: str, per_item: Sequence[Mapping[str, Any]]) -> dict[Any, Category]:
    """Accuracy by type, or by number, in sorted order as eval.py prints them."""
    groups: dict[Any, list[float]] = defaultdict(list)
    for line in per_item:
        groups[line[kind]].append(line["score"])
    return {name: _category(groups[name]) for name in sorted(groups)}


def _category(scores: Iterable[float]) -> Category:
    scores = list(scores)
    return Category(round(sum(scores) / len(scores), 2) if scores else 0.0, len(scores))


if __name__ == "__main__":
    sys.exit(main(GQA))
