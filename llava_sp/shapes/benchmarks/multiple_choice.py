"""ScienceQA, MMBench (English and Chinese) and SEED-Bench: questions with lettered options."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import permutations
from pathlib import Path

from PIL import Image

from llava_sp.common.files import write_atomic
from llava_sp.shapes.benchmarks.choices import CORNERS, WORDINGS, Choice, choices
from llava_sp.shapes.benchmarks.common import (
    ALL_PLACES,
    LETTER_ANSWER,
    LETTERS,
    Benchmark,
    EvenHanded,
    Settings,
    Written,
    draw_options,
    lettered,
    llava_line,
    others,
)
from llava_sp.shapes.images import JPEG
from llava_sp.shapes.language import caption, with_article
from llava_sp.shapes.world import SIDES, SIZE, Scene, Thing, draw

# ScienceQA: kind of question -> subject, topic
SUBJECTS = {
    "count": ("natural science", "physics"),
    "left over": ("natural science", "physics"),
    "corners": ("natural science", "physics"),
    "place": ("social science", "geography"),
    "side": ("social science", "geography"),
    "neighbour": ("social science", "geography"),
    "caption": ("language science", "reading-comprehension"),
    "digit": ("language science", "reading-comprehension"),
    "existence": ("language science", "vocabulary"),
}
_FORMS = ("image", "hint", "text", "nothing", "image")
# MMBench: kind of question -> category, l2-category
CATEGORIES = {
    "caption": ("image_topic", "coarse_perception"),
    "existence": ("object_localization", "finegrained_perception (instance-level)"),
    "color": ("attribute_recognition", "finegrained_perception (instance-level)"),
    "count": ("object_localization", "finegrained_perception (instance-level)"),
    "place": ("object_localization", "finegrained_perception (instance-level)"),
    "digit": ("ocr", "finegrained_perception (instance-level)"),
    "side": ("spatial_relationship", "finegrained_perception (cross-instance)"),
    "more": ("attribute_comparison", "finegrained_perception (cross-instance)"),
    "neighbour": ("physical_relation", "relation_reasoning"),
    "left over": ("future_prediction", "logic_reasoning"),
    "sum": ("structuralized_imagetext_understanding", "logic_reasoning"),
    "corners": ("physical_property_reasoning", "attribute_reasoning"),
}
MMBENCH_COLUMNS = (
    *("index", "question", "hint", "A", "B", "C", "D", "answer"),
    *("category", "image", "source", "l2-category", "comment", "split"),
)
HINTS = ("There are {} things in the picture.", "图中有{}个东西。")
# SEED-Bench: official dimension -> kind of question; a kind in `_MOTIONS` is asked of a video
DIMENSIONS = {
    "Scene Understanding": "caption",
    "Instance Identity": "identity",
    "Instance Location": "place",
    "Instance Attributes": "color",
    "Instances Counting": "count",
    "Spatial Relation": "side",
    "Instance Interaction": "neighbour",
    "Visual Reasoning": "left over",
    "Text Understanding": "digit",
    "Action Recognition": "motion",
    "Action Prediction": "next place",
    "Procedure Understanding": "order",
}


class _Asker:
    """Makes choices about new scenes, as many of each kind as of another."""

    def __init__(self, out: Benchmark) -> None:
        self.out, self.even = out, EvenHanded(out.rng)

    def ask(self, kinds: Iterable[str], most: int = 4) -> tuple[Scene, Choice]:
        kind = self.even.pick(kinds)
        while True:
            scene = self.out.scene()
            choice = choices(scene, kind, self.out.rng, most)
            if choice is not None:
                return scene, choice


def write_scienceqa(folder: Path, settings: Settings) -> Written:
    """problems.json, pid_splits.json, LLaVA's llava_test_CQM-A.json and the images images/test/<id>/image.png.

    Two of five questions have an image, one an image and a hint, one the image in words as its hint, and one nothing
    (and nothing is needed). Some problems belong to the train split, which LLaVA's file leaves out.
    """
    out = Benchmark("scienceqa", folder, settings)
    asker = _Asker(out)
    problems: dict[str, dict] = {}
    ids: dict[str, list[str]] = {"train": [], "test": []}
    for i in range(settings.questions + 3):
        split = "test" if i < settings.questions else "train"
        pid = str(90_000 + 3 * i)
        ids[split].append(pid)
        most = int(out.rng.integers(2, len(LETTERS) + 1))
        form = _FORMS[i % len(_FORMS)] if split == "test" else "text"
        hint = ""
        if form == "nothing":
            choice = _general_choice(out, most)
        else:
            kinds = [kind for kind in SUBJECTS if form != "text" or "image" not in WORDINGS[kind][0]]
            scene, choice = asker.ask(kinds, most)
            hints = {"hint": HINTS[0].format(len(scene.things)), "text": f"There is {caption(scene)}"}
            hint = hints.get(form, "")
        with_image = form in ("image", "hint")
        problems[pid] = _problem(choice, hint, with_image, split, int(out.rng.integers(1, 13)))
        if with_image:
            out.save(f"images/{split}/{pid}/image.png", scene)
    out.json("problems.json", problems)
    out.json("pid_splits.json", ids)
    out.json("llava_test_CQM-A.json", [_scienceqa_line(pid, problems[pid]) for pid in ids["test"]])
    return out.written(len(ids["test"]))


def _general_choice(out: Benchmark, most: int) -> Choice:
    """A question that needs neither an image nor a text."""
    kind = out.one_of(list(CORNERS))
    answer = str(CORNERS[kind])
    options = draw_options(out.rng, answer, others(answer, map(str, range(7))), most)
    return Choice(
        "corners",
        (f"How many corners does {with_article(kind)} have?", ""),
        (tuple(options), ()),
        options.index(answer),
    )


def _problem(choice: Choice, hint: str, with_image: bool, split: str, grade: int) -> dict:
    subject, topic = SUBJECTS[choice.kind]
    return {
        "question": choice.texts[0],
        "choices": list(choice.options[0]),
        "answer": choice.answer,
        "hint": hint,
        "image": "image.png" if with_image else None,
        "task": "yes or no" if choice.kind == "existence" else "closed choice",
        "grade": f"grade{grade}",
        "subject": subject,
        "topic": topic,
        "category": "Shapes",
        "skill": choice.kind.capitalize(),
        "lecture": "",
        "solution": f"The answer is {choice.right.rstrip('.')}.",
        "split": split,
    }


def _scienceqa_line(pid: str, problem: dict) -> dict:
    context = f"Context: {problem['hint']}\n" if problem["hint"] else ""
    question = f"{context}{problem['question']}\n{lettered(problem['choices'])}"
    turns = [
        {"from": "human", "value": f"<image>\n{question}" if problem["image"] else question},
        {"from": "gpt", "value": LETTERS[problem["answer"]]},
    ]
    image = {"image": f"{pid}/{problem['image']}"} if problem["image"] else {}
    return {"id": pid, **image, "conversations": turns}


def write_mmbench(folder: Path, settings: Settings) -> Written:
    """mmbench_dev_20230712.tsv: every question once per option, circular; images are in the table, as base64."""
    return _write_mmbench(folder, "mmbench_dev_20230712.tsv", settings, language=0)


def write_mmbench_cn(folder: Path, settings: Settings) -> Written:
    """mmbench_dev_cn_20231003.tsv: the same scenes and questions, in Chinese."""
    return _write_mmbench(folder, "mmbench_dev_cn_20231003.tsv", settings, language=1)


def _write_mmbench(folder: Path, name: str, settings: Settings, language: int) -> Written:
    """The rows of the first round, then those with the options rotated left by one (index + 1,000,000), and so on."""
    out = Benchmark("mmbench", folder, settings)
    asker = _Asker(out)
    rows = []
    for i in range(settings.questions):
        scene, choice = asker.ask(CATEGORIES, most=3 + int(out.rng.integers(3) > 0))
        out.record(f"{name}:{i + 1}", scene)
        hint = HINTS[language].format(len(scene.things)) if out.rng.random() < 0.3 else ""
        image = base64.b64encode(_encoded(scene, large=i == 0)).decode()
        rows += _circular(i + 1, choice, language, hint, image)
    rows.sort(key=lambda row: row["index"])
    table = io.StringIO()
    writer = csv.DictWriter(table, MMBENCH_COLUMNS, delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(folder / name, table.getvalue())
    return out.written(settings.questions)


def _encoded(scene: Scene, large: bool) -> bytes:
    """The bytes of an image file. Real images are larger than the default limit of Python's csv module (131,072
    characters), so one image is."""
    file = io.BytesIO()
    if large:
        big = draw(scene).resize((2 * SIZE, 2 * SIZE), Image.Resampling.BICUBIC)
        big.save(file, format="BMP")
    else:
        draw(scene).save(file, format="JPEG", **JPEG)
    return file.getvalue()


def _circular(index: int, choice: Choice, language: int, hint: str, image: str) -> list[dict]:
    options = choice.options[language]
    category, level2 = CATEGORIES[choice.kind]
    common = {"question": choice.texts[language], "hint": hint, "category": category, "image": image}
    common |= {"source": "shapes", "l2-category": level2, "comment": "", "split": "dev"}
    rows = []
    for by in range(len(options)):
        rotated = options[by:] + options[:by]
        answer = LETTERS[(choice.answer - by) % len(options)]
        rows.append({"index": index + by * 1_000_000, **dict(zip("ABCD", rotated)), "answer": answer, **common})
    return rows


def write_seedbench(folder: Path, settings: Settings) -> Written:
    """SEED-Bench.json, LLaVA's question file, SEED-Bench-image and SEED-Bench-video-image.

    Images have names without a suffix, as the official ones. A video is three scenes in which one thing moves; as
    LLaVA does, only its middle frame is written (the answers about it are luck for a model that sees no more). All three
    are recorded beside the scene of that frame.
    """
    out = Benchmark("seedbench", folder, settings)
    asker = _Asker(out)
    records, lines = [], []
    for i in range(max(len(DIMENSIONS), settings.questions)):
        kind = list(DIMENSIONS.values())[i % len(DIMENSIONS)]
        type_id = i % len(DIMENSIONS) + 1
        line_id: int | str
        if kind in _MOTIONS:
            frames, record = _video_question(out, kind)
            line_id = f"v{i}"
            record |= {"data_id": f"moves/{i}.webm", "data_type": "video"}
            image = f"SEED-Bench-video-image/{type_id}_v{i}.png"
            out.save(image, frames[1], frames=[asdict(frame) for frame in frames])
        else:
            scene, choice = asker.ask([kind])
            line_id = 900_000 + i
            record = _seed_record(choice.texts[0], choice.options[0], choice.answer)
            record |= {"data_id": f"{1_000_000 + i}_{i:04d}", "data_type": "image"}
            image = out.save(f"SEED-Bench-image/{record['data_id']}", scene)
        records.append(record | {"question_id": str(line_id), "question_type_id": type_id})
        text = f"{record['question']}\n{lettered([record[f'choice_{letter}'] for letter in 'abcd'])}{LETTER_ANSWER}"
        lines.append(llava_line(line_id, image, text))
    numbers = {name: number for number, name in enumerate(DIMENSIONS, 1)}
    out.json("SEED-Bench.json", {"questions": records, "question_type": numbers})
    out.jsonl("llava-seed-bench.jsonl", lines)
    return out.written(len(records))


def _seed_record(question: str, options: Sequence[str], answer: int) -> dict:
    named = {f"choice_{letter}": option for letter, option in zip("abcd", options, strict=True)}
    return {"answer": LETTERS[answer], **named, "question": question}


def _video_question(out: Benchmark, kind: str) -> tuple[list[Scene], dict]:
    """The three frames of a video, and what is asked about it."""
    scene = out.scene(_moves)
    thing, side = out.one_of(_moves(scene))
    down, right = SIDES[side]
    moved = [thing.moved(by * down, by * right) for by in (-1, 0, 1)]
    wording, answer_of, segment = _MOTIONS[kind]
    answer, wrong = answer_of(side, [one.place for one in moved])
    options = draw_options(out.rng, answer, wrong, 4)
    record = _seed_record(wording.format(thing.name), options, options.index(answer))
    return [scene.exchange(thing, one) for one in moved], record | ({} if segment is None else {"segment": segment})


def _moves(scene: Scene) -> list[tuple[Thing, str]]:
    """(thing, side): the thing can come from the free cell opposite and go on to the free cell at that side."""
    free = set(scene.free_cells())
    return [
        (thing, side)
        for thing in scene.subjects()
        for side, (down, right) in SIDES.items()
        if {thing.moved(by * down, by * right).cell for by in (-1, 1)} <= free
    ]


def _motion(side: str, places: list[str]) -> tuple[str, list[str]]:
    ways = dict(zip(SIDES, ("moves up", "moves down", "moves to the left", "moves to the right")))
    return ways[side], others(ways[side], ways.values())


def _next_place(side: str, places: list[str]) -> tuple[str, list[str]]:
    return places[2], others(places[2], ALL_PLACES)


def _order(side: str, places: list[str]) -> tuple[str, list[str]]:
    orders = [", ".join(order) for order in permutations(places)]
    return orders[0], orders[1:]


# Kind of question about a video -> wording, answer and wrong answers, segment (seconds for predictions, frames for orders)
_MOTIONS = {
    "motion": ("What does the {} do in the video?", _motion, None),
    "next place": ("Where will the {} be next?", _next_place, [0.0, 2.0]),
    "order": ("In which order does the {} pass these places in the video?", _order, [0, 45]),
}
