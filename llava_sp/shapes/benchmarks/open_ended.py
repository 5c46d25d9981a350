"""LLaVA-Bench (in the wild) and MM-Vet: answers in sentences, which a judge compares with the world's own."""

from __future__ import annotations

from pathlib import Path

from llava_sp.common.files import write_json, write_jsonl
from llava_sp.shapes.benchmarks.choices import CORNERS
from llava_sp.shapes.benchmarks.common import (
    SPLIT,
    EvenHanded,
    Gallery,
    Settings,
    Written,
    alone,
    digits,
    generator,
    llava_line,
    number_of,
    one_of,
    plural,
)
from llava_sp.shapes.benchmarks.short_answers import DIGIT_WORDS
from llava_sp.shapes.language import article, subjects
from llava_sp.shapes.world import SHAPES, Scene, Thing, sample_scene

PER_PICTURE = 3  # LLaVA-Bench: one question of each category on a picture
REFERENCE = "shapes-world"  # whose the reference answers are


def write_llava_bench(folder: Path, settings: Settings) -> Written:
    """questions.jsonl, context.jsonl (one line per picture; a caption, or a list of them), answers_gpt4.jsonl, images.

    The reference answers are the world's own sentences.
    """
    rng = generator("llava_bench", settings)
    gallery = Gallery(folder)
    questions, contexts, references = [], [], []
    while len(questions) < settings.questions:
        scene = sample_scene(rng, SPLIT)
        picture = f"{len(contexts):03d}"
        gallery.save(f"images/{picture}.jpg", scene)
        lines = _sentences(scene)
        told = lines if len(contexts) % 3 == 2 else " ".join(lines)
        contexts.append({"id": picture, "image": f"{picture}.jpg", "caption": told})
        for category, ask in _WILD.items():
            if len(questions) == settings.questions:
                break
            question, answer = one_of(rng, ask(scene))
            number = len(questions)
            questions.append({"question_id": number, "image": f"{picture}.jpg", "category": category, "text": question})
            reference = {"question_id": number, "prompt": question, "answer_id": f"{REFERENCE}-{number}"}
            references.append(reference | {"model_id": REFERENCE, "metadata": {}, "text": answer})
    write_jsonl(folder / "questions.jsonl", questions)
    write_jsonl(folder / "context.jsonl", contexts)
    write_jsonl(folder / "answers_gpt4.jsonl", references)
    return Written(len(questions), gallery.scenes)


def _sentences(scene: Scene) -> list[str]:
    """The scene in one sentence per thing."""
    return [f"At the {thing.place} there is {_one(thing)}." for thing in scene.things]


def _one(thing: Thing) -> str:
    return f"the {thing.label}" if thing.kind == "digit" else f"{article(thing.label)} {thing.label}"


def _conversation(scene: Scene) -> list[tuple[str, str]]:
    found = [(f"Where is the {thing.name}?", f"The {thing.name} is at the {thing.place}.") for thing in subjects(scene)]
    found += [(f"What color is the {thing.kind}?", f"The {thing.kind} is {thing.color}.") for thing in alone(scene)]
    count = len(scene.things)
    return [*found, ("How many things are there in the image?", f"There are {count} things in the image.")]


def _detail(scene: Scene) -> list[tuple[str, str]]:
    return [(f"Describe the image in detail{end}", " ".join(_sentences(scene))) for end in (".", ", thing by thing.")]


def _complex(scene: Scene) -> list[tuple[str, str]]:
    """What would be left, and why."""
    found = []
    for kind in SHAPES:
        gone = number_of(scene, kind)
        if gone:
            left = [thing for thing in scene.things if thing.kind != kind]
            what = ", ".join(f"{_one(thing)} at the {thing.place}" for thing in left) or "nothing"
            reason = f"{gone} of the {len(scene.things)} things {'is' if gone == 1 else 'are'} {plural(kind, gone)}"
            question = f"If every {kind} were taken away, what would be left, and why?"
            found.append((question, f"{what[0].upper()}{what[1:]} would be left, because {reason}."))
    return found


_WILD = {"conv": _conversation, "detail": _detail, "complex": _complex}


def write_mmvet(folder: Path, settings: Settings) -> Written:
    """mm-vet.json, LLaVA's question file, images. All that is joined by <AND> must be said, one of what is by <OR>.

    As in the official files an item may be asked of an earlier item's picture.
    """
    rng = generator("mmvet", settings)
    gallery = Gallery(folder)
    kinds = EvenHanded(rng)
    items: dict[str, dict] = {}
    while len(items) < settings.questions:
        scene = sample_scene(rng, SPLIT)
        image = f"v1_{len(items)}.png"
        asked = [kind for kind in kinds.order(_ABILITIES) if _ABILITIES[kind][1](scene)]
        for kind in asked[: 1 + int(rng.integers(3) == 0)][: settings.questions - len(items)]:
            kinds.picked[kind] += 1
            capabilities, ask = _ABILITIES[kind]
            question, answer = one_of(rng, ask(scene))
            record = {"imagename": image, "question": question, "answer": answer}
            items[f"v1_{len(items)}"] = record | {"imagesource": "shapes", "capability": list(capabilities)}
        gallery.save(f"images/{image}", scene)
    write_json(folder / "mm-vet.json", items)
    lines = [llava_line(i, item["imagename"], item["question"], "conv") for i, item in enumerate(items.values())]
    write_jsonl(folder / "llava-mm-vet.jsonl", lines)
    return Written(len(items), gallery.scenes)


def _number(value: int) -> str:
    return f"{value}<OR>{DIGIT_WORDS[value]}" if value < len(DIGIT_WORDS) else str(value)


def _colors(scene: Scene) -> list[tuple[str, str]]:
    return [(f"What color is the {thing.kind}?", thing.color) for thing in alone(scene)]


def _digits(scene: Scene) -> list[tuple[str, str]]:
    return [(f"What digit is at the {thing.place}?", _number(thing.value)) for thing in digits(scene)]


def _places(scene: Scene) -> list[tuple[str, str]]:
    return [(f"Where is the {thing.name}?", thing.place) for thing in subjects(scene)]


def _digit_and_place(scene: Scene) -> list[tuple[str, str]]:
    found = digits(scene)
    if len(found) != 1:
        return []
    return [("Which digit is in the image, and where?", f"{_number(found[0].value)}<AND>{found[0].place}")]


def _sum(scene: Scene) -> list[tuple[str, str]]:
    values = [thing.value for thing in digits(scene)]
    return [("What is the sum of the two digits?", _number(sum(values)))] if len(values) == 2 else []


def _corners(scene: Scene) -> list[tuple[str, str]]:
    asked = "How many corners does the shape at the {} have?"
    return [(asked.format(t.place), _number(CORNERS[t.kind])) for t in scene.things if t.kind in CORNERS]


def _all_of_it(scene: Scene) -> list[tuple[str, str]]:
    parts = [f"{_one(thing)} at the {thing.place}" for thing in scene.things]
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
