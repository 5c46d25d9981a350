"""GQA (Hudson and Manning 2019): compositional questions about Visual Genome images, one answer each; testdev balanced.

    python -m llava_sp.eval.gqa --model M --data D --output O

D holds (in D itself or one folder below, such as LLaVA's gqa/data)
    testdev_balanced_questions.json      the official questions (12,578); testdev_all_questions.json does too
    images/n161313.jpg, ...              the official images; --images names another folder
    llava_gqa_testdev_balanced.jsonl     LLaVA's question file; not needed, the prompts are the same without it
Only questions with `isBalanced` are asked and count; answers to others in an answers file are left out.
O/testdev_balanced_predictions.json holds the answers as LLaVA's converter writes them, for the official eval.py;
`--validate FILE --data D` checks such a file.

The score is eval.py's accuracy in percent; 62.0 (LoRA 63.0) is published for LLaVA-1.5-7B on testdev balanced, as here.
`metrics` has its other figures: binary and open questions, by structural and semantic type, by number of reasoning steps and
of words, and `distribution`, a chi-square of the answers by group (lower is better); not validity and plausibility, 0.00 in
LLaVA's set-up. Figures of no questions, or the distribution of no global group, are null (there 0, or a division by zero).

Protocols, all with the same prompt (and the checkpoint's own conversation around it):
    llava15      trailing periods stripped, lower case; must then equal the answer (default): `bed .`, ` yes`, `a man` do not
    lmms_eval    at most 16 new tokens; ends stripped, lower case and ASCII punctuation removed, on both sides
    vlmevalkit   at most 512 new tokens; ends stripped and lower case, on both sides, so `Yes.` is wrong
"""

from __future__ import annotations

import string
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava_sp.common.files import write_json
from llava_sp.common.schema import Check, some
from llava_sp.decoding import Generation
from llava_sp.eval.base import LLAVA15, LLAVA15_LORA, LLAVA_SP, SHORT_ANSWER, Benchmark, Item, Scores
from llava_sp.eval.cli import main
from llava_sp.eval.inputs.checks import LLAVA_LINE, compare_ids, find, find_one, first_folder, inside, joined, verdict
from llava_sp.eval.scoring.records import categories, grouped, row

OFFICIAL = ("testdev_balanced_questions.json", "testdev_all_questions.json")
NAMES = [f"{folder}{name}" for name in OFFICIAL for folder in ("", "questions1.2/")]  # as questions1.2.zip unpacks
LLAVA = "llava_gqa_testdev_balanced.jsonl"
PREDICTIONS = "testdev_balanced_predictions.json"
_NO_STEP = ("exist", "query: name", "choose name")  # operations that only read off the answer
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)

QUESTION = {
    **dict.fromkeys(("question", "imageId", "answer"), str),
    "isBalanced": bool,
    "semantic": [{"operation": str, "argument": str}],
    "groups": {"global": (str, None)},
    "types": {"structural": str, "semantic": str},
}
QUESTIONS = Check(bool, "questions by id", {str: QUESTION})
SUBMISSION = some({"questionId": str, "prediction": str})


def llava_prediction(answer: str) -> str:
    """LLaVA's conversion: all trailing periods off, then lower case. Spaces are not stripped."""
    return answer.rstrip(".").lower()


# what is done to an answer and, but for llava15, to the reference
RULES: Mapping[str, Callable[[str], str]] = {
    "llava15": llava_prediction,
    "lmms_eval": lambda text: text.strip().lower().translate(_NO_PUNCTUATION),
    "vlmevalkit": lambda text: text.strip().lower(),
}


class GQA(Benchmark):
    name = "gqa"
    title = "GQA accuracy in percent"
    protocols = tuple(RULES)
    generations: ClassVar = {"lmms_eval": Generation(max_new_tokens=16), "vlmevalkit": Generation(max_new_tokens=512)}
    submission_label = "for eval.py"
    published: Mapping[str, float] = {LLAVA15: 62.0, LLAVA15_LORA: 63.0, LLAVA_SP: 62.7}
    not_counted: Iterable[str] = ()  # set by load: ids of questions that are not balanced

    def load(self, data: Path) -> list[Item]:
        file = source = find_one(data, *NAMES, what="GQA questions")
        questions = self.read_json(file, QUESTIONS)
        balanced = {i: question for i, question in questions.items() if question["isBalanced"]}
        self.not_counted = questions.keys() - balanced.keys()
        if not balanced:
            raise ValueError(f"{file}: isBalanced is false for all {len(questions)} questions, and only others count")
        lines: dict[str, dict[str, Any]] = {i: {} for i in balanced}
        for source in find(data, LLAVA)[:1]:
            asked = [x for x in self.read_jsonl(source, LLAVA_LINE) if str(x["question_id"]) not in self.not_counted]
            lines = joined([str(line["question_id"]) for line in asked], asked, balanced, source, "line", file)
        folder = self.images or first_folder([data / "images", data / "data" / "images"])
        items = []
        for i, line in lines.items():
            question = balanced[i]
            about = {
                "question": question["question"],
                **{key: question["types"][key] for key in ("structural", "semantic")},
                "steps": steps(question["semantic"]),
                "words": len(question["question"].split()),
                "group": question["groups"]["global"],
            }
            image = inside(folder, line.get("image", f"{question['imageId']}.jpg"), f"{source}: question {i}")
            text = line.get("text", question["question"]).removesuffix(SHORT_ANSWER)
            items.append(Item(line.get("question_id", i), text, (image,), question["answer"], about))
        return items

    def prompt(self, item: Item) -> str:
        return item.text + SHORT_ANSWER

    def match(self, items: Sequence[Item], records: Sequence[dict[str, Any]]) -> list[str]:
        return super().match(items, [r for r in records if str(r["question_id"]) not in self.not_counted])

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> Scores:
        rule = RULES[self.protocol]
        predicted = [rule(answer) for answer in answers]
        gold = [item.reference if self.protocol == "llava15" else rule(item.reference) for item in items]
        per_item = []
        for item, prediction, truth, text in zip(items, predicted, gold, answers):
            kind, right = item.metadata["structural"], 100.0 * (prediction == truth)
            answered = "open" if kind == "query" else "binary"
            per_item.append(row(item, prediction, text, right, category=kind, answered=answered, **item.metadata))
        kinds = ("answered", "structural", "semantic", "steps", "words")
        by = {kind: categories(grouped(per_item, kind), self.headline) for kind in kinds}
        metrics: dict[str, Any] = {"binary": None, "open": None} | {name: c.score for name, c in by["answered"].items()}
        metrics["distribution"] = distribution([item.metadata["group"] for item in items], gold, predicted)
        for kind in kinds[1:]:
            metrics[f"per_{kind}"] = {name: {"accuracy": c.score, "count": c.count} for name, c in by[kind].items()}
        found = by["answered"] | by["structural"] | {f"about {name}": c for name, c in by["semantic"].items()}
        return Scores(self.headline(per_item), metrics, per_item, found)

    def submission(self, items: Sequence[Item], answers: Sequence[str], output: Path) -> Path | None:
        path = output / PREDICTIONS
        write_json(path, [{"questionId": str(i.id), "prediction": llava_prediction(a)} for i, a in zip(items, answers)])
        return path

    def validate(self, file: Path, data: Path) -> str:
        questions = self.read_json(find_one(data, *NAMES, what="GQA questions"), QUESTIONS)
        others = {i for i, question in questions.items() if not question["isBalanced"]}
        results = [r for r in self.read_json(file, SUBMISSION) if r["questionId"] not in others]
        trouble = compare_ids([r["questionId"] for r in results], [i for i in questions if i not in others])
        return verdict(file, [r["prediction"] for r in results], [("balanced questions", trouble)])


def distribution(groups: Sequence[str | None], gold: Sequence[str], predicted: Sequence[str]) -> float | None:
    """How far the answers to a group of questions are from the true ones, as a chi-square over the true answers, averaged
    over the groups by their numbers of questions and divided by 100. None if no question is in a group."""
    by_group: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for group, truth, answer in zip(groups, gold, predicted):
        if group is not None:
            by_group[group].append((truth, answer))
    total = 0.0
    for pairs in by_group.values():
        truths, given = map(Counter, zip(*pairs))
        total += sum((given[answer] - n) ** 2 / n for answer, n in truths.items()) * len(pairs)
    return round(total / sum(map(len, by_group.values())) / 100, 2) if by_group else None


def steps(semantic: Iterable[Mapping[str, Any]]) -> int:
    """Reasoning steps of a question: its operations without those that only read off the answer."""
    said = (f"{step['operation']}: {step['argument']}" for step in semantic)
    return sum(not any(name in operation for name in _NO_STEP) for operation in said)


if __name__ == "__main__":
    sys.exit(main(GQA))
