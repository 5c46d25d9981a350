"""MME (Fu et al. 2023): two questions on every picture, one whose answer is yes and one whose answer is no.

    python -m llava_sp.eval.mme --model M --data D --output O

D holds the official folder MME_Benchmark_release_version (or is that folder) with its 14 subtasks. Each picture has a text
file of two lines, "question<tab>Yes|No", beside it, or, as in artwork, celebrity, landmark, posters and scene, text in
questions_answers_YN/ and pictures in images/; both layouts are understood everywhere. LLaVA's question file llava_mme.jsonl
is taken if it is in D (for the order of the questions); without it the same prompts are made from the official text:
"Please answer yes or no." gives way to LLaVA's request for a single word or phrase.

The score is the sum over the ten perception subtasks, 2000 at most: 1510.7 is published for LLaVA-1.5-7B. The sum over the
four cognition subtasks, 800 at most, is `cognition` in the metrics. A subtask's score, 200 at most, is 100 times its accuracy
plus 100 times the share of pictures with both answers right ("acc+"). Subtasks that D lacks are named in the metrics
(`missing_subtasks`) and when the score is printed: the sum is then not comparable. Without any perception subtask (D has
none, or a --limit) there is no score.

O/mme_results/ has the same answers as the official results folder, one text file per subtask ("picture.txt<tab>question<tab>
Yes|No<tab>answer"), for `calculation.py --results_dir`.

The two lines of a picture have one question_id in LLaVA's files. Answers are told apart by their `prompt`, and by their order
where they have none; the official scorer goes by order alone, and pairs any two lines that follow each other.

Protocols, which differ in what an answer is taken for
    llava15     calculation.py: "yes" if the first four characters hold "yes" in any case, else "no" if they hold "no", else
                neither. So "Know", "None" and "not sure" are no, "Eyes" is yes, "The answer is yes" and "1. no" are neither
    lmms_eval   the same after taking off white space around and all periods; "y" and "n" alone count. Up to 16 tokens are
                generated, and of a question with two spaces before "Please" one stays
    vlmevalkit  one of the words "yes" and "no" without the other, anywhere

Where the official scorer stops, here: a tab or a line break in an answer is a space, both in the results folder and for the
llava15 rule (calculation.py: ValueError); a picture with one answer, or three, is an error that counts and names such
pictures (calculation.py: AssertionError, or wrong pairs).
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from llava_sp.common.files import examples, read_text, write_atomic
from llava_sp.decoding import Generation
from llava_sp.eval.base import LLAVA15, LLAVA15_LORA, LLAVA_SP, SHORT_ANSWER, Benchmark, Category, Item, Scores
from llava_sp.eval.cli import main
from llava_sp.eval.inputs.checks import expect_all, find, inside
from llava_sp.eval.scoring import yes_no

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
_QUESTION = {"question_id": str, "image": str, "text": str}

Pair = list[tuple[str, str]]  # the two lines of a picture: question, Yes or No


class MME(Benchmark):
    name = "mme"
    submission_label = "for calculation.py"
    unscored = "none of them is of a perception subtask, and the score is the sum over those"
    title = "MME perception score"
    protocols = ("llava15", "lmms_eval", "vlmevalkit")
    generations: ClassVar = {"lmms_eval": Generation(max_new_tokens=16)}
    published: ClassVar = {LLAVA15: 1510.7, LLAVA15_LORA: 1476.9, LLAVA_SP: 1470.7}
    folders = ("MME",)

    def load(self, data: Path) -> list[Item]:
        root = _root(data)
        official = self._official(root)
        images = self.images or root
        found = find(data, QUESTIONS)
        if found:
            return self._llava_items(found[0], official, images)
        items = []
        for picture, pair in official.items():
            name = _image_name(images, root, picture)
            for number, line in enumerate(pair):
                text = _plain(line[0]) + SHORT_ANSWER
                items.append(_item(name, text, number, line, picture, images / name))
        return items

    def prompt(self, item: Item) -> str:
        if self.protocol == "lmms_eval":
            return item.metadata["official"].strip().replace(f" {YES_NO}", "") + SHORT_ANSWER
        return item.text if item.text.endswith(SHORT_ANSWER) else item.text + SHORT_ANSWER

    def match(self, items: Sequence[Item], records: Sequence[dict[str, Any]]) -> list[str]:
        given: dict[str, list[dict[str, Any]]] = {}
        for record in records:
            given.setdefault(_picture(record["question_id"]), []).append(record)
        asked = Counter(item.metadata["picture"] for item in items)
        found = {"which are not here (another data set?)": [picture for picture in given if picture not in asked]}
        for picture, count in asked.items():
            answers = len(given.get(picture, ()))
            if answers != count:
                found.setdefault(f"with {answers} answers for {count} questions", []).append(picture)
        problems = [f"{len(names)} pictures {what} ({examples(names)})" for what, names in found.items() if names]
        if problems:
            raise ValueError(f"the {len(records)} answers do not fit the questions of mme: {'; '.join(problems)}")
        return [_take_answer(item, given[item.metadata["picture"]]) for item in items]

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> Scores:
        judge = {"llava15": official_label, "lmms_eval": lmms_label, "vlmevalkit": yes_no.vlmevalkit}[self.protocol]
        per_item = []
        for item, text in zip(items, answers):
            prediction, right = judge(text), item.reference.lower()
            line = {"question_id": item.id, "score": 100.0 * (prediction == right), "answer": prediction, "text": text}
            line |= {"question": item.metadata["question"], "image": item.id, "references": [right]}
            per_item.append(line | {"category": item.metadata["subtask"], "unit": item.metadata["picture"]})
        figures = _by_subtask(per_item)
        sums = {
            name: sum(figures[s]["score"] for s in part if s in figures)
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
        figures = _by_subtask(per_item)
        return round(sum(figures[subtask]["score"] for subtask in PERCEPTION if subtask in figures), 2)

    def summary(self, scores: Scores) -> list[str]:
        lines = [f"cognition: {scores.metrics['cognition']:.2f}", *super().summary(scores)]
        missing = scores.metrics["missing_subtasks"]
        return lines + ([f"not comparable: no questions of {', '.join(missing)}"] if missing else [])

    def submission(self, items: Sequence[Item], answers: Sequence[str], output: Path) -> Path | None:
        """Writes the official results folder; there is no server, but people hand it to calculation.py."""
        lines: dict[str, list[str]] = {}
        for item, answer in zip(items, answers):
            name = f"{PurePosixPath(item.metadata['picture']).name}.txt"
            row = (name, item.metadata["official"], item.reference, one_line(answer))
            lines.setdefault(item.metadata["subtask"], []).append("\t".join(row) + "\n")
        for subtask, rows in lines.items():
            write_atomic(output / RESULTS / f"{subtask}.txt", "".join(rows))
        return output / RESULTS

    def _official(self, root: Path) -> dict[str, Pair]:
        """The official text, by picture (`subtask/name`), in the published order of the subtasks."""
        pairs = {}
        for subtask in SUBTASKS:
            for file in sorted(_text_folder(root, subtask).glob("[!.]*.txt")):
                self.files.append(file)
                pairs[f"{subtask}/{file.stem}"] = _read_pair(file)
        if not pairs:
            raise ValueError(
                f"{root} has no MME questions: no text files in {', '.join(SUBTASKS[:3])}, ... (nor in their "
                f"questions_answers_YN/); it should be the official {FOLDER}"
            )
        return pairs

    def _llava_items(self, file: Path, official: Mapping[str, Pair], images: Path) -> list[Item]:
        rows = self.read_jsonl(file)
        expect_all(rows, _QUESTION, file)
        left = {picture: list(pair) for picture, pair in official.items()}
        items = []
        for line, row in enumerate(rows):
            picture, text = _picture(row["question_id"]), _plain(row["text"])
            where = f"{file}: question {line} (counted from 0), {row['question_id']}"
            if picture not in left:
                raise ValueError(f"{where}: the official files have no {picture}.txt")
            pair = next((pair for pair in left[picture] if _plain(pair[0]) == text), None)
            if pair is None:
                known = " / ".join(_plain(question) for question, _ in left[picture]) or "its two questions came before"
                raise ValueError(f"{where}: {text!r} is not what {picture}.txt asks ({known})")
            number = len(official[picture]) - len(left[picture])
            left[picture].remove(pair)
            image = inside(images, row["image"], where)
            items.append(_item(row["question_id"], row["text"], number, pair, picture, image))
        unasked = [picture for picture, pairs in left.items() if pairs]
        if unasked:
            raise ValueError(
                f"{file} does not ask all questions on {len(unasked)} pictures ({examples(unasked)}): cut off?"
            )
        return items


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


def _by_subtask(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The figures of each subtask that occurs, in the published order."""
    groups: dict[str, list[Mapping[str, Any]]] = {subtask: [] for subtask in SUBTASKS}
    for record in records:
        groups[record["category"]].append(record)
    return {subtask: _figures(group) for subtask, group in groups.items() if group}


def _figures(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What calculation.py has of a subtask. Precision and recall are of "yes" among the answers that say yes or no, and 0
    where nothing is to divide by. In a sample a picture may occur more than once, always with both questions."""
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


def _text_folder(root: Path, subtask: str) -> Path:
    apart = root / subtask / "questions_answers_YN"
    return apart if apart.is_dir() else root / subtask


def _read_pair(file: Path) -> Pair:
    lines = [line for line in read_text(file).splitlines() if line.strip()]
    pair = []
    for number, line in enumerate(lines, 1):
        question, tab, answer = line.strip().partition("\t")
        if not tab or answer not in ("Yes", "No"):
            raise ValueError(f"{file}, line {number} is {line[:80]!r}, not a question, a tab, and Yes or No")
        pair.append((question, answer))
    if len(pair) != 2:
        raise ValueError(f"{file} has {len(pair)} questions; a picture of MME has two (is the file cut off?)")
    return pair


def _image_name(images: Path, root: Path, picture: str) -> str:
    """The picture's file below the image folder, which is also LLaVA's question_id; .jpg where there is no such file."""
    subtask, stem = picture.split("/")
    folder = f"{subtask}/images" if (root / subtask / "images").is_dir() else subtask
    names = [f"{folder}/{stem}{suffix}" for suffix in _IMAGES]
    return next((name for name in names if (images / name).is_file()), names[0])


def _item(question_id: str, text: str, number: int, pair: tuple[str, str], picture: str, image: Path) -> Item:
    about = {"question": _plain(text), "official": pair[0], "picture": picture, "subtask": picture.split("/")[0]}
    return Item(question_id, text, (image,), pair[1], about, key=f"{question_id}#{number}")


def _picture(question_id: Any) -> str:
    """`subtask/name`, from "subtask/name.png" or "subtask/images/name.png"; anything else as it is."""
    path = PurePosixPath(str(question_id))
    return f"{path.parts[0]}/{path.stem}" if len(path.parts) > 1 else str(question_id)


def _plain(text: str) -> str:
    """The question without the request for a short answer."""
    return text.removesuffix(SHORT_ANSWER).strip().removesuffix(YES_NO).strip()


def _take_answer(item: Item, records: list[dict[str, Any]]) -> str:
    """Takes the item's answer out of those left for its picture: by the prompt, or the first where none has a prompt."""
    prompts = [record.get("prompt") for record in records]
    if not any(isinstance(prompt, str) for prompt in prompts):
        return records.pop(0)["text"]
    for position, prompt in enumerate(prompts):
        if isinstance(prompt, str) and _plain(prompt) == item.metadata["question"]:
            return records.pop(position)["text"]
    raise ValueError(
        f"no answer on {item.metadata['picture']} has the question {item.metadata['question']!r} as its prompt; what is "
        f"left has {examples(map(repr, prompts))}"
    )


if __name__ == "__main__":
    sys.exit(main(MME))
