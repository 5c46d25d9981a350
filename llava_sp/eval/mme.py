"""MME (Fu et al. 2023): two questions on every image, one whose answer is yes and one whose answer is no.

    python -m llava_sp.eval.mme --model M --data D --output O

D holds the official folder MME_Benchmark_release_version (or is that folder) with its 14 subtasks. Each image has a text file
of two lines, "question<tab>Yes|No", beside it, or, as in artwork, celebrity, landmark, posters and scene, text in
questions_answers_YN/ and images in images/; both layouts are read everywhere. LLaVA's question file llava_mme.jsonl is used
if it is in D (for the order of the questions); without it the same prompts are made from the official text: LLaVA's request
for a single word or phrase replaces "Please answer yes or no."

The score is the sum over the ten perception subtasks, 2000 at most: 1510.7 is published for LLaVA-1.5-7B. The sum over the
four cognition subtasks, 800 at most, is `cognition` in the metrics. A subtask's score, 200 at most, is 100 times its accuracy
plus 100 times the share of images with both answers right ("acc+"). Subtasks that D lacks are named in the metrics
(`missing_subtasks`) and in the output: the sum is then not comparable. Without any perception subtask (D has none, or a
--limit) there is no score.

O/mme_results/ has the same answers as the official results folder, one text file per subtask ("image.txt<tab>question<tab>
Yes|No<tab>answer"), for `calculation.py --results_dir`.

The two lines of an image have one question_id in LLaVA's files. Answers are told apart by their `prompt`, and by their order
where they have none; the official scorer goes by order alone, and pairs any two lines that follow each other.

Protocols
    llava15     calculation.py: "yes" if the first four characters hold "yes" in any case, else "no" if they hold "no", else
                neither. So "Know", "None" and "not sure" are no, "Eyes" is yes, "The answer is yes" and "1. no" are neither
    lmms_eval   the same after removing outer white space and all periods; "y" and "n" alone count. Up to 16 tokens are
                generated, and of a question with two spaces before "Please" one stays
    vlmevalkit  one of the words "yes" and "no" without the other, anywhere

Where the official scorer stops, here: a tab or a line break in an answer is a space, in the results folder and for the
llava15 rule (calculation.py: ValueError); an image with one answer, or three, is an error that counts and names such images
(calculation.py: AssertionError, or wrong pairs).
"""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from llava_sp.common.files import examples, read_text, write_atomic
from llava_sp.common.schema import Check, expect, one_of
from llava_sp.decoding import Generation
from llava_sp.eval.base import LLAVA15, LLAVA15_LORA, LLAVA_SP, SHORT_ANSWER, Benchmark, Category, Item, Scores
from llava_sp.eval.cli import main
from llava_sp.eval.inputs.checks import LLAVA_LINE, find, inside, joined, numbered
from llava_sp.eval.scoring import yes_no
from llava_sp.eval.scoring.records import grouped, row

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SUBTASKS = PERCEPTION + COGNITION
FOLDER = "MME_Benchmark_release_version"
QUESTIONS = "llava_mme.jsonl"
RESULTS = "mme_results"
YES_NO = "Please answer yes or no."
_IMAGES = (".jpg", ".jpeg", ".png")

# the text file of an image
PAIR = Check(
    lambda pair: len(pair) == 2,
    "two lines of question, tab, and Yes or No",
    [{"question": str, "answer": one_of("Yes", "No")}],
)


class MME(Benchmark):
    name = "mme"
    submission_label = "for calculation.py"
    unscored = "the score is the sum over perception subtasks, which have no questions here"
    title = "MME perception score"
    protocols = ("llava15", "lmms_eval", "vlmevalkit")
    generations: ClassVar = {"lmms_eval": Generation(max_new_tokens=16)}
    published: Mapping[str, float] = {LLAVA15: 1510.7, LLAVA15_LORA: 1476.9, LLAVA_SP: 1470.7}
    folders = ("MME",)

    def load(self, data: Path) -> list[Item]:
        root = source = _root(data)
        folder = self.images or root
        official = [(pair, image) for image, pairs in self._official(root).items() for pair in pairs]
        keys = numbered(f"{image}: {_plain(pair['question'])}" for pair, image in official)
        questions = dict(zip(keys, official))
        asked: dict[str, dict[str, Any]] = {}
        for source in find(data, QUESTIONS)[:1]:
            lines = self.read_jsonl(source, {**LLAVA_LINE, "question_id": str})
            keys = numbered(f"{_image_of(line['question_id'])}: {_plain(line['text'])}" for line in lines)
            asked = joined(list(keys), lines, questions, source, "line", root)
        items = []
        seen: Counter[str] = Counter()  # questions of an image
        for key in asked or questions:
            pair, image = questions[key]
            name = _file_name(folder, root, image)
            line = asked.get(key) or {"question_id": name, "image": name, "text": _plain(pair["question"])}
            about = {"question": _plain(line["text"]), "official": pair["question"], "image": image}
            path = inside(folder, line["image"], f"{source}: {line['question_id']}")
            text, key = line["text"].removesuffix(SHORT_ANSWER), f"{line['question_id']}#{seen[image]}"
            items.append(Item(line["question_id"], text, (path,), pair["answer"], about, key))
            seen[image] += 1
        return items

    def prompt(self, item: Item) -> str:
        if self.protocol == "lmms_eval":
            return item.metadata["official"].strip().replace(f" {YES_NO}", "") + SHORT_ANSWER
        return item.text + SHORT_ANSWER

    def match(self, items: Sequence[Item], records: Sequence[dict[str, Any]]) -> list[str]:
        given, asked = [_image_of(r["question_id"]) for r in records], [item.metadata["image"] for item in items]
        where = f"the answers file ({len(records)} lines)"
        joined(list(numbered(given)), records, list(numbered(asked)), where, questions="the questions of mme")
        left: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for image, record in zip(given, records):
            left[image].append(record)
        return [_take_answer(item, left[item.metadata["image"]]) for item in items]

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> Scores:
        judge = {"llava15": official_label, "lmms_eval": lmms_label, "vlmevalkit": yes_no.vlmevalkit}[self.protocol]
        per_item = []
        for item, text in zip(items, answers):
            prediction, right, image = judge(text), item.reference.lower(), item.metadata["image"]
            about = {"image": item.id, "references": [right], "category": image.split("/")[0], "unit": image}
            per_item.append(row(item, prediction, text, 100.0 * (prediction == right), **about))
        figures = {name: _figures(records) for name, records in grouped(per_item, "category", SUBTASKS).items()}
        sums = {
            name: sum(figures[subtask]["score"] for subtask in part if subtask in figures)
            for name, part in (("perception", PERCEPTION), ("cognition", COGNITION))
        }
        missing = [subtask for subtask in SUBTASKS if subtask not in figures]
        categories = {name: Category(round(f["score"], 2), f["count"], 200.0) for name, f in figures.items()}
        metrics = {**sums, "missing_subtasks": missing, "subtasks": figures}
        count = sum(figures[subtask]["count"] for subtask in PERCEPTION if subtask in figures)
        score = self.headline(per_item) if count else None
        return Scores(score, metrics, per_item, categories, count, "perception questions")

    @classmethod
    def headline(cls, per_item: Sequence[Mapping[str, Any]]) -> float:
        """The sum over the perception subtasks that occur."""
        groups = grouped([record for record in per_item if record["category"] in PERCEPTION], "category", PERCEPTION)
        return round(sum(_figures(records)["score"] for records in groups.values()), 2)

    def summary(self, scores: Scores) -> list[str]:
        lines = [f"cognition: {scores.metrics['cognition']:.2f}", *super().summary(scores)]
        missing = scores.metrics["missing_subtasks"]
        return lines + ([f"not comparable: no questions of {', '.join(missing)}"] if missing else [])

    def submission(self, items: Sequence[Item], answers: Sequence[str], output: Path) -> Path | None:
        """Writes the official results folder; there is no server, but calculation.py reads it."""
        lines: dict[str, list[str]] = defaultdict(list)
        for item, answer in zip(items, answers):
            subtask, name = item.metadata["image"].split("/")
            fields = (f"{name}.txt", item.metadata["official"], item.reference, one_line(answer))
            lines[subtask].append("\t".join(fields) + "\n")
        for subtask, rows in lines.items():
            write_atomic(output / RESULTS / f"{subtask}.txt", "".join(rows))
        return output / RESULTS

    def _official(self, root: Path) -> dict[str, list[dict[str, str]]]:
        """The two lines of each image (`subtask/name`), in the published order of the subtasks."""
        pairs = {}
        for subtask in SUBTASKS:
            apart = root / subtask / "questions_answers_YN"
            for file in sorted((apart if apart.is_dir() else root / subtask).glob("[!.]*.txt")):
                self.files.append(file)
                lines = [line.strip().partition("\t") for line in read_text(file).splitlines() if line.strip()]
                pair = [{"question": question, "answer": answer} for question, _, answer in lines]
                pairs[f"{subtask}/{file.stem}"] = expect(pair, PAIR, file)
        if not pairs:
            raise ValueError(
                f"{root} has no MME questions: no text files in {', '.join(SUBTASKS[:3])}, ... (nor in their "
                f"questions_answers_YN/); it should be the official {FOLDER}"
            )
        return pairs


def official_label(answer: str) -> str:
    """What calculation.py takes an answer for."""
    return _label_of_start(one_line(answer).lower())


def lmms_label(answer: str) -> str:
    text = answer.lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(text) or _label_of_start(text)


def _label_of_start(text: str) -> str:
    return "yes" if "yes" in text[:4] else "no" if "no" in text[:4] else "other"


def one_line(answer: str) -> str:
    """The answer as it fits into a line of the results folder."""
    return re.sub(r"[\t\r\n]+", " ", answer)


def _figures(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What calculation.py has of a subtask. Precision and recall are of "yes" among the answers that say yes or no, and 0
    where there is nothing to divide by. In a sample an image may occur more than once, always with both questions."""
    pairs = Counter((record["references"][0], record["answer"]) for record in records)
    true_yes, false_no = pairs["yes", "yes"], pairs["yes", "no"]
    true_no, false_yes = pairs["no", "no"], pairs["no", "yes"]
    wrong = {record["unit"] for record in records if not record["score"]}
    acc = (true_yes + true_no) / len(records)
    acc_plus = sum(record["unit"] not in wrong for record in records) / len(records)
    return {
        "score": 100 * acc + 100 * acc_plus,
        "acc": acc,
        "acc_plus": acc_plus,
        "precision": true_yes / ((true_yes + false_yes) or 1),
        "recall": true_yes / ((true_yes + false_no) or 1),
        **{"TP": true_yes, "FN": false_no, "TN": true_no, "FP": false_yes},
        "other_num": len(records) - true_yes - false_no - true_no - false_yes,
        "count": len(records),
    }


def _root(data: Path) -> Path:
    """The folder of the subtasks: D, the official folder in it, or what its archive may nest in that."""
    places = [data / FOLDER, data / FOLDER / "MME_Benchmark", data]
    return next((place for place in places if any((place / s).is_dir() for s in SUBTASKS)), places[0])


def _file_name(folder: Path, root: Path, image: str) -> str:
    """The image's file below the image folder, which is also LLaVA's question_id; .jpg where there is no such file."""
    subtask, stem = image.split("/")
    below = f"{subtask}/images" if (root / subtask / "images").is_dir() else subtask
    names = [f"{below}/{stem}{suffix}" for suffix in _IMAGES]
    return next((name for name in names if (folder / name).is_file()), names[0])


def _image_of(question_id: Any) -> str:
    """`subtask/name`, from "subtask/name.png" or "subtask/images/name.png"; anything else as it is."""
    path = PurePosixPath(str(question_id))
    return f"{path.parts[0]}/{path.stem}" if len(path.parts) > 1 else str(question_id)


def _plain(text: str) -> str:
    """The question without the request for a short answer."""
    return text.removesuffix(SHORT_ANSWER).strip().removesuffix(YES_NO).strip()


def _take_answer(item: Item, records: list[dict[str, Any]]) -> str:
    """Takes the item's answer out of those left for its image: by the prompt, or the first where none has a prompt."""
    prompts = [record.get("prompt") for record in records]
    if not any(isinstance(prompt, str) for prompt in prompts):
        return records.pop(0)["text"]
    for position, prompt in enumerate(prompts):
        if isinstance(prompt, str) and _plain(prompt) == item.metadata["question"]:
            return records.pop(position)["text"]
    raise ValueError(
        f"no answer on {item.metadata['image']} has the question {item.metadata['question']!r} as its prompt; left are "
        f"{examples(map(repr, prompts))}"
    )


if __name__ == "__main__":
    sys.exit(main(MME))
