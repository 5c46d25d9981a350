"""GQA: compositional questions with the program that answers each, in the official format of testdev_balanced.

Objects are numbered in the order of the scene: "select: circle (2)" is the scene's third thing, "(-)" is nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path

from llava_sp.shapes.benchmarks.common import ALL_NAMES, Benchmark, EvenHanded, Settings, Written, short_line
from llava_sp.shapes.language import with_article
from llava_sp.shapes.world import COLORS, SHAPES, Scene, Thing

PER_IMAGE = 4
OPPOSITES = {"to the left of": "to the right of", "above": "below"}
MIRROR = OPPOSITES | {second: first for first, second in OPPOSITES.items()}


@dataclass(frozen=True)
class _Step:
    """One operation of a program; `needs` are the positions of the steps whose results it takes."""

    operation: str
    argument: str
    needs: tuple[int, ...] = ()

    def __str__(self) -> str:
        needs = f" [{', '.join(map(str, self.needs))}]" if self.needs else ""
        return f"{self.operation}: {self.argument}{needs}"


@dataclass(frozen=True)
class _Asked:
    """A question. `fact` is what it asks for in a form that equivalent questions share; `known` are facts that follow
    from its answer; `mentions` are (words, number of the thing) pairs."""

    question: str
    answer: str
    full_answer: str
    program: tuple[_Step, ...]
    structural: str
    semantic: str
    detailed: str
    group: str
    fact: Hashable
    global_group: str | None = None
    known: tuple[Hashable, ...] = ()
    mentions: tuple[tuple[str, int], ...] = ()


def write_gqa(folder: Path, settings: Settings) -> Written:
    """testdev_balanced_questions.json, LLaVA's question file and the images, several questions on each."""
    out = Benchmark("gqa", folder, settings)
    kinds, answers = EvenHanded(out.rng), EvenHanded(out.rng)
    records: dict[str, dict] = {}
    while len(records) < settings.questions:
        scene = out.scene()
        asked = []
        for kind in kinds.order(_KINDS)[:PER_IMAGE]:
            if found := _KINDS[kind](scene):
                kinds.picked[kind] += 1
                asked.append(answers.pick(found, key=lambda one: (one.detailed, one.answer)))
        together = {str(200_900_000 + len(records) + i): one for i, one in enumerate(asked)}
        together = dict(list(together.items())[: settings.questions - len(records)])
        if together:
            image_id = f"n{900_000 + len(out.scenes)}"
            out.save(f"images/{image_id}.jpg", scene)
            records |= {id: _record(one, together, id, image_id) for id, one in together.items()}
    out.json("testdev_balanced_questions.json", records)
    lines = [short_line(id, f"{record['imageId']}.jpg", record["question"]) for id, record in records.items()]
    out.jsonl("llava_gqa_testdev_balanced.jsonl", lines)
    return out.written(len(records))


def _record(one: _Asked, together: dict[str, _Asked], own_id: str, image_id: str) -> dict:
    """The official record; `together` are all questions on the same image."""
    same = [id for id, other in together.items() if other.fact == one.fact]
    entailed = [id for id, other in together.items() if id != own_id and other.fact in (one.fact, *one.known)]
    return {
        "semantic": [
            {"operation": s.operation, "dependencies": list(s.needs), "argument": s.argument} for s in one.program
        ],
        "entailed": entailed,
        "equivalent": same,
        "question": one.question,
        "imageId": image_id,
        "isBalanced": True,
        "groups": {"global": one.global_group, "local": one.group},
        "answer": one.answer,
        "semanticStr": "->".join(map(str, one.program)),
        "annotations": {
            "answer": _positions(one.answer, one.mentions),
            "question": _positions(one.question, one.mentions),
            "fullAnswer": _positions(one.full_answer, one.mentions),
        },
        "types": {"detailed": one.detailed, "semantic": one.semantic, "structural": one.structural},
        "fullAnswer": one.full_answer,
    }


def _positions(text: str, mentions: tuple[tuple[str, int], ...]) -> dict[str, str]:
    """Where the text names a thing: position of the word, or "first:end" of several, -> number of the thing."""
    words = re.findall(r"\w+", text.lower())
    found = {}
    for phrase, number in mentions:
        wanted = phrase.split()
        starts = [i for i in range(len(words) - len(wanted) + 1) if words[i : i + len(wanted)] == wanted]
        for start in starts[:1]:
            found[str(start) if len(wanted) == 1 else f"{start}:{start + len(wanted)}"] = str(number)
    return found


def _select(scene: Scene, name: str, at: int = 0) -> tuple[_Step, ...]:
    """The steps that find the thing of this name; the first of them is step `at` of the program."""
    numbers = ",".join(str(i) for i, thing in enumerate(scene.things) if thing.name == name) or "-"
    color, _, kind = name.rpartition(" ")
    select = _Step("select", f"{kind} ({numbers})")
    return (select, _Step("filter color", color, (at,))) if color else (select,)


def _exists(scene: Scene) -> list[_Asked]:
    found = []
    for name in ALL_NAMES:
        numbers = [i for i, thing in enumerate(scene.things) if thing.name == name]
        color, shape = name.split()
        is_there = f"there is {with_article(name) if numbers else f'no {name}'} in the image"
        found.append(
            _Asked(
                question=f"Is there {with_article(name)} in the image?",
                answer="yes" if numbers else "no",
                full_answer=f"{'Yes' if numbers else 'No'}, {is_there}.",
                program=(*_select(scene, name), _Step("exist", "?", (1,))),
                structural="verify",
                semantic="obj",
                detailed="existAttr" if numbers else "existAttrC",
                group=f"04-{shape}_{color}",
                fact=("exist", name),
                mentions=((name, numbers[0]),) if len(numbers) == 1 else (),
            )
        )
    return found


def _color(scene: Scene) -> list[_Asked]:
    return [
        _Asked(
            question=f"What color is the {thing.kind}?",
            answer=thing.color,
            full_answer=f"The {thing.kind} is {thing.color}.",
            program=(_Step("select", f"{thing.kind} ({scene.things.index(thing)})"), _Step("query", "color", (0,))),
            structural="query",
            semantic="attr",
            detailed="directWhich",
            group=f"10q-{thing.kind}_color",
            global_group="color",
            fact=("color", thing.kind),
            known=tuple(("exist", f"{color} {thing.kind}") for color in COLORS),
            mentions=((thing.kind, scene.things.index(thing)),),
        )
        for thing in scene.alone()
    ]


def _category(scene: Scene) -> list[_Asked]:
    found = []
    for color in COLORS:
        colored = [thing for thing in scene.things if thing.color == color]
        if len(colored) == 1:
            kind, number = colored[0].kind, scene.things.index(colored[0])
            found.append(
                _Asked(
                    question=f"Which kind of shape is {color}?",
                    answer=kind,
                    full_answer=f"The {kind} is {color}.",
                    program=(
                        _Step("select", f"shape ({number})"),
                        _Step("filter color", color, (0,)),
                        _Step("query", "name", (1,)),
                    ),
                    structural="query",
                    semantic="cat",
                    detailed="categoryThat",
                    group="11q-shape",
                    global_group="shape",
                    fact=("kind", color),
                    known=tuple(("exist", f"{color} {shape}") for shape in SHAPES),
                    mentions=((kind, number), ("shape", number)),
                )
            )
    return found


def _pairs(scene: Scene) -> list[tuple[Thing, Thing, str]]:
    """(a, b, relation) for which "a is (relation) b" is true."""
    found = []
    for a in scene.subjects():
        for b in scene.subjects():
            if a.col != b.col:
                found.append((a, b, "to the left of" if a.col < b.col else "to the right of"))
            if a.row != b.row:
                found.append((a, b, "above" if a.row < b.row else "below"))
    return found


def _fact(a: Thing, b: Thing, relation: str) -> tuple[str, str, str]:
    """ "a is to the right of b" is the fact "b is to the left of a"."""
    return (a.name, relation, b.name) if relation in OPPOSITES else (b.name, MIRROR[relation], a.name)


def _related(scene: Scene) -> list[_Asked]:
    found = []
    for a, b, true in _pairs(scene):
        for relation in (true, MIRROR[true]):
            first = _select(scene, a.name)
            verify = _Step("verify rel", f"{b.name},{relation},o ({scene.things.index(b)})", (len(first) - 1,))
            found.append(
                _Asked(
                    question=f"Is the {a.name} {relation} the {b.name}?",
                    answer="yes" if relation == true else "no",
                    full_answer=f"{'Yes' if relation == true else 'No'}, the {a.name} is {true} the {b.name}.",
                    program=(*first, verify),
                    structural="verify",
                    semantic="rel",
                    detailed="relVerify" if relation == true else "relVerifyCr",
                    group=f"13-{a.kind}_{b.kind}",
                    fact=_fact(a, b, relation),
                    known=(_fact(a, b, MIRROR[relation]), ("exist", a.name), ("exist", b.name)),
                    mentions=((a.name, scene.things.index(a)), (b.name, scene.things.index(b))),
                )
            )
    return found


def _chosen_side(scene: Scene) -> list[_Asked]:
    found = []
    for a, b, true in _pairs(scene):
        if not true.startswith("to the "):
            continue
        first = _select(scene, a.name)
        sides = ("to the left of", "to the right of")
        choose = _Step("choose rel", f"{b.name},{'|'.join(sides)},o ({scene.things.index(b)})", (len(first) - 1,))
        found.append(
            _Asked(
                question=f"Is the {a.name} to the left or to the right of the {b.name}?",
                answer=true.split()[2],
                full_answer=f"The {a.name} is {true} the {b.name}.",
                program=(*first, choose),
                structural="choose",
                semantic="rel",
                detailed="relChooser",
                group=f"13c-{a.kind}_{b.kind}",
                fact=("side", a.name, b.name),
                known=(
                    *(_fact(a, b, side) for side in sides),
                    ("side", b.name, a.name),
                    ("exist", a.name),
                    ("exist", b.name),
                ),
                mentions=((a.name, scene.things.index(a)), (b.name, scene.things.index(b))),
            )
        )
    return found


def _same_color(scene: Scene) -> list[_Asked]:
    found = []
    for a in scene.alone():
        for b in scene.alone():
            if a.kind == b.kind:
                continue
            same = a.color == b.color
            numbers = scene.things.index(a), scene.things.index(b)
            differ = f"the {a.kind} is {a.color} and the {b.kind} is {b.color}"
            found.append(
                _Asked(
                    question=f"Are the {a.kind} and the {b.kind} the same color?",
                    answer="yes" if same else "no",
                    full_answer=f"{'Yes, both are ' + a.color if same else 'No, ' + differ}.",
                    program=(
                        _Step("select", f"{a.kind} ({numbers[0]})"),
                        _Step("select", f"{b.kind} ({numbers[1]})"),
                        _Step("same color", "?", (0, 1)),
                    ),
                    structural="compare",
                    semantic="attr",
                    detailed="twoSame" if same else "twoSameC",
                    group=f"09-{a.kind}_{b.kind}_color",
                    fact=("same color", frozenset((a.kind, b.kind))),
                    mentions=((a.kind, numbers[0]), (b.kind, numbers[1])),
                )
            )
    return found


def _logic(scene: Scene) -> list[_Asked]:
    """ "either ... or" (is there one of them at least?) and "both ... and", about names of two shapes."""
    present = {thing.name for thing in scene.things}
    found = []
    for a in ALL_NAMES:
        for b in ALL_NAMES:
            if a.split()[1] == b.split()[1] or not present & {a, b}:
                continue
            for words, operation, is_so in (
                (("either", "or"), "or", True),
                (("both", "and"), "and", {a, b} <= present),
            ):
                found.append(_logic_question(scene, a, b, words, operation, is_so))
    absent = [name for name in ALL_NAMES if name not in present]
    for a, b in zip(absent, reversed(absent)):
        if a.split()[1] != b.split()[1]:
            found.append(_logic_question(scene, a, b, ("either", "or"), "or", False))
    return found


def _logic_question(scene: Scene, a: str, b: str, words: tuple[str, str], operation: str, is_so: bool) -> _Asked:
    detailed = f"exist{operation.capitalize()}"
    is_there = {name: any(thing.name == name for thing in scene.things) for name in (a, b)}
    because = " and ".join(f"{'' if is_so else 'no '}{name}s" for name in (a, b) if is_there[name] == is_so)
    return _Asked(
        question=f"Are there {words[0]} {a}s {words[1]} {b}s in the image?",
        answer="yes" if is_so else "no",
        full_answer=f"{'Yes' if is_so else 'No'}, there are {because}.",
        program=(
            *_select(scene, a),
            _Step("exist", "?", (1,)),
            *_select(scene, b, at=3),
            _Step("exist", "?", (4,)),
            _Step(operation, "", (2, 5)),
        ),
        structural="logical",
        semantic="obj",
        detailed=detailed if is_so else f"{detailed}C",
        group=f"05-{a.replace(' ', '_')}_{operation}_{b.replace(' ', '_')}",
        fact=(operation, frozenset((a, b))),
        known=tuple(("exist", name) for name in (a, b)) if is_so == (operation == "and") else (),
    )


_KINDS: dict[str, Callable[[Scene], list[_Asked]]] = {
    "exists": _exists,
    "color": _color,
    "category": _category,
    "related": _related,
    "side": _chosen_side,
    "same color": _same_color,
    "logic": _logic,
}
