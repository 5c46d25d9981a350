"""LLaVA-Bench (in the wild) and MM-Vet: answers in sentences, which a judge compares with the world's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_sp.shapes.benchmarks.choices import CORNERS
from llava_sp.shapes.benchmarks.common import NUMBERS, Benchmark, EvenHanded, Settings, Written, llava_line
from llava_sp.shapes.language import phrase, plural
from llava_sp.shapes.world import SHAPES, Scene

REFERENCE = "shapes-world"  # whose the reference answers are


def write_llava_bench(folder: Path, settings: Settings) -> Written:
    """questions.jsonl, context.jsonl (one line per image; a caption, or a list of them), answers_gpt4.jsonl, images.

    The reference answers are the world's own sentences.
    """
    out = Benchmark("llava_bench", folder, settings)
    questions: list[dict[str, Any]] = []
    contexts: list[dict[str, Any]] = []
    references = []
    while len(questions) < settings.questions:
        scene = out.scene()
        name = f"{len(contexts):03d}"
        image = f"{name}.jpg"
        out.save(f"images/{image}", scene)
        lines = _sentences(scene)
        contexts.append({"id": name, "image": image, "caption": lines if len(contexts) % 3 == 2 else " ".join(lines)})
        for category, ask in list(_WILD.items())[: settings.questions - len(questions)]:
            question, answer = out.one_of(ask(scene))
            number = len(questions)
            questions.append({"question_id": number, "image": image, "category": category, "text": question})
            reference = {"question_id": number, "prompt": question, "answer_id": f"{REFERENCE}-{number}"}
            references.append(reference | {"model_id": REFERENCE, "metadata": {}, "text": answer})
    out.jsonl("questions.jsonl", questions)
    out.jsonl("context.jsonl", contexts)
    out.jsonl("answers_gpt4.jsonl", references)
    return out.written(len(questions))


def _sentences(scene: Scene) -> list[str]:
    """The scene in one sentence per thing."""
    return [f"At the {thing.place} there is {phrase(thing)}." for thing in scene.things]


def _conversation(scene: Scene) -> list[tuple[str, str]]:
    found = [
        (f"Where is the {thing.name}?", f"The {thing.name} is at the {thing.place}.") for thing in scene.subjects()
    ]
    found += [(f"What color is the {thing.kind}?", f"The {thing.kind} is {thing.color}.") for thing in scene.alone()]
    count = len(scene.things)
    return [*found, ("How many things are there in the image?", f"There are {count} things in the image.")]


def _detail(scene: Scene) -> list[tuple[str, str]]:
    return [(f"Describe the image in detail{end}", " ".join(_sentences(scene))) for end in (".", ", thing by thing.")]


def _complex(scene: Scene) -> list[tuple[str, str]]:
    """What would be left, and why."""
    found = []
    for kind in SHAPES:
        gone = scene.count(kind)
        if gone:
            left = [thing for thing in scene.things if thing.kind != kind]
            what = ", ".join(f"{phrase(thing)} at the {thing.place}" for thing in left) or "nothing"
            reason = f"{gone} of the {len(scene.things)} things {'is' if gone == 1 else 'are'} {plural(kind, gone)}"
            question = f"If every {kind} were taken away, what would be left, and why?"
            found.append((question, f"{what[0].upper()}{what[1:]} would be left, because {reason}."))
    return found


_WILD = {"conv": _conversation, "detail": _detail, "complex": _complex}


def write_mmvet(folder: Path, settings: Settings) -> Written:
    """mm-vet.json, LLaVA's question file, images. All that is joined by <AND> must be said, one of what is by <OR>.

    As in the official files an item may be about an earlier item's image.
    """
    out = Benchmark("mmvet", folder, settings)
    kinds = EvenHanded(out.rng)
    items: dict[str, dict] = {}
    while len(items) < settings.questions:
        scene = out.scene()
        image = f"v1_{len(items)}.png"
        asked = [kind for kind in kinds.order(_ABILITIES) if _ABILITIES[kind][1](scene)]
        for kind in asked[: 1 + int(out.rng.integers(3) == 0)][: settings.questions - len(items)]:
            kinds.picked[kind] += 1
            capabilities, ask = _ABILITIES[kind]
            question, answer = out.one_of(ask(scene))
            record = {"imagename": image, "question": question, "answer": answer}
            items[f"v1_{len(items)}"] = record | {"imagesource": "shapes", "capability": list(capabilities)}
        out.save(f"images/{image}", scene)
    out.json("mm-vet.json", items)
    lines = [llava_line(i, item["imagename"], item["question"], "conv") for i, item in enumerate(items.values())]
    out.jsonl("llava-mm-vet.jsonl", lines)
    return out.written(len(items))


def _number(value: int) -> str:
    return f"{value}<OR>{NUMBERS[value]}" if value < len(NUMBERS) else str(value)


def _colors(scene: Scene) -> list[tuple[str, str]]:
    return [(f"What color is the {thing.kind}?", thing.color) for thing in scene.alone()]


def _digits(scene: Scene) -> list[tuple[str, str]]:
    return [(f"What digit is at the {thing.place}?", _number(thing.digit)) for thing in scene.digits()]


def _places(scene: Scene) -> list[tuple[str, str]]:
    return [(f"Where is the {thing.name}?", thing.place) for thing in scene.subjects()]


def _digit_and_place(scene: Scene) -> list[tuple[str, str]]:
    found = scene.digits()
    asked = "Which digit is in the image, and where?"
    return [(asked, f"{_number(thing.digit)}<AND>{thing.place}") for thing in found if len(found) == 1]


def _sum(scene: Scene) -> list[tuple[str, str]]:
    values = [thing.digit for thing in scene.digits()]
    return [("What is the sum of the two digits?", _number(sum(values)))] if len(values) == 2 else []


def _corners(scene: Scene) -> list[tuple[str, str]]:
    asked = "How many corners does the shape at the {} have?"
    return [(asked.format(t.place), _number(CORNERS[t.kind])) for t in scene.things if t.kind in CORNERS]


def _all_of_it(scene: Scene) -> list[tuple[str, str]]:
    parts = [f"{phrase(thing)} at the {thing.place}" for thing in scene.things]
    return [("Describe the image, everything and where it stands.", "<AND>".join(parts))]


# Kind of item -> capabilities, and (question, answer) pairs about a scene
_ABILITIES = {
    "color": (("rec",), _colors),
    "digit": (("ocr",), _digits),
    "place": (("rec", "spat"), _places),
    "digit and place": (("ocr", "spat"), _digit_and_place),
    "sum": (("ocr", "math"), _sum),
    "corners": (("rec", "know"), _corners),
    "all of it": (("rec", "ocr", "gen", "spat"), _all_of_it),
}
