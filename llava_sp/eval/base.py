"""The base class of benchmarks. Shared code is here, in `cli` (arguments) and in `run` (from questions to results); a
benchmark itself is one small file:

    class ColourQA(Benchmark):
        name = "colourqa"                       # of the file, eval/colourqa.py, and of the folder in ./playground/data/eval
        title = "ColourQA accuracy"             # what the headline figure is

        def load(self, data):                   # official files in the folder `data` -> items, in their order
            rows = self.read_json(data / "colourqa.json")
            return [Item(id=r["id"], text=r["q"], images=(data / "images" / r["image"],), reference=r["a"]) for r in rows]

        def prompt(self, item):                 # the user's message, without the image marks
            return item.text + SHORT_ANSWER

        def score(self, items, answers):        # answers in the order of the items, exactly one each
            right = [float(a.strip(" .").lower() == i.reference) for i, a in zip(items, answers)]
            per_item = [{"question_id": i.id, "score": s, "answer": a} for i, s, a in zip(items, right, answers)]
            return Scores(score=round(100 * sum(right) / len(right), 2), metrics={}, per_item=per_item)

    if __name__ == "__main__":
        sys.exit(main(ColourQA))                # from llava_sp.eval.cli import main

`python -m llava_sp.eval.colourqa --model M --data D --output O`, `--answers FILE`, resuming, several processes, provenance,
the hash of every file read through `self.read_*`, a row in the table of `python -m llava_sp.eval --all`, and
`python -m llava_sp.eval.compare` follow from that. What else can be overridden, each only where a benchmark needs it:
`generation`, `conversation_template`, `image_aspect_ratio`, `splits`, `protocols` (with `generations`), `published`, `folders`,
`add_arguments`, `record` (fields of an answer line), `read_answers`, `match` (which answer belongs to which item; by
default `question_id`), `judge`, `headline` (how the score follows from the per-item records), `summary`, `submission`,
`validate`.

Neither torch nor transformers is imported here.
"""

from __future__ import annotations

import argparse
import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, TypeVar

from llava_sp.common.files import Line, read_json, read_jsonl, read_table
from llava_sp.common.schema import Spec
from llava_sp.decoding import Generation
from llava_sp.eval.inputs.answers_file import check_questions, match_by_question_id, read_answers
from llava_sp.model.conversation import IMAGE_MARK

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
OPTION_LETTER = "\nAnswer with the option's letter from the given choices directly."

# Rows of published figures; `SOURCES` says where each was read.
LLAVA15 = "LLaVA-1.5-7B"
LLAVA15_LORA = "LLaVA-1.5-7B LoRA"
LLAVA_SP = "LLaVA-SP-7B"
SOURCES: Mapping[str, str] = {
    LLAVA15: "LLaVA docs/MODEL_ZOO.md",
    LLAVA15_LORA: "LLaVA docs/MODEL_ZOO.md",
    LLAVA_SP: "TrustCLIP, table 3 (variant not stated)",
}


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        id: the official question id, as the official files have it (number or text); goes into answer files.
        text: the question as the official file has it.
        images: paths, or the bytes of an encoded image file; none for a text-only question.
        reference: what `score` needs to judge an answer; None where the answers are secret.
        metadata: whatever else `score`, `record` or `submission` need.
        key: unique within the benchmark; the id, except where official ids repeat.
    """

    id: int | str
    text: str
    images: tuple[Path | bytes, ...] = ()
    reference: Any = None
    metadata: dict[str, Any] = field(default_factory=dict)
    key: str = ""

    def __post_init__(self) -> None:
        if not self.key:
            object.__setattr__(self, "key", str(self.id))

    @property
    def image_name(self) -> str | None:
        """The file name of the first image, if that is a file."""
        return getattr(self.images[0], "name", None) if self.images else None


@dataclass(frozen=True)
class Category:
    """A figure on a part of the questions, on the scale 0 to `highest`."""

    score: float
    count: int
    highest: float = 100.0


@dataclass(frozen=True)
class Scores:
    """What `score` returns.

    Attributes:
        score: the headline as it is published; None where only a server or a judge knows.
        metrics: all other figures.
        per_item: one record per item, in order, with `question_id`, `score` (0 to 100) and the `answer` that was judged;
            `unit` where items are only judged together (the two questions on an image, the rotations of a question):
            equal units are drawn together by `llava_sp.eval.compare`.
        categories: figures by category, for tables and bars.
        count, counted: how many of what the headline is over, where that is not the number of items:
            1176, "questions", of MMBench's 4377 rows.
    """

    score: float | None
    metrics: dict[str, Any]
    per_item: list[dict[str, Any]]
    categories: dict[str, Category] = field(default_factory=dict)
    count: int | None = None
    counted: str = "questions"


B = TypeVar("B", bound="Benchmark")


class Benchmark(ABC):
    """Base class; see the module's docstring for a whole example."""

    name: ClassVar[str]
    title: ClassVar[str]
    splits: ClassVar[tuple[str, ...]] = ()  # of --split; () where there is only one
    protocols: ClassVar[tuple[str, ...]] = ("llava15",)  # whose rules for prompt and score; the first is the default
    generation: Generation = Generation()
    generations: ClassVar[Mapping[str, Generation]] = {}  # of protocols that have their own
    published: Mapping[str, float] = {}  # row of SOURCES -> headline
    published_on: str = ""  # of what, where a local score is not comparable: "test-dev, from the server"
    folders: ClassVar[tuple[str, ...]] = ()  # other names of the data folder than `name`, as in LLaVA's layout
    submission_label: ClassVar[str] = "to submit"  # what the file of `submission` is for
    unscored: str = "only the server can score them"
    conversation_template: str | None = None  # None is the checkpoint's own
    image_aspect_ratio: str | None = None  # "pad" or "crop"; None is the checkpoint's own

    # Set by `load`, for `score`, `submission` and the provenance. What else a benchmark's `load` finds out, it declares in its
    # own class body in the same way.
    split: str  # None until `load` has chosen it from what the data folder holds, where `--split` did not
    data: Path  # the folder itself, where the benchmark reads it again later
    files: list[Path]  # what was read through `self.read_*`; their hashes go into the provenance

    def __init__(self, split: str | None = None, protocol: str | None = None, images: Path | None = None):
        """Args: split, one of `splits`, None to take what the data folder holds; protocol, one of `protocols`; images,
        the folder of the images where it is not in its usual place beside the data."""
        for what, value, allowed in (("split", split, self.splits), ("protocol", protocol, self.protocols)):
            if value is not None and value not in allowed:
                right = f"use one of {', '.join(allowed)}" if allowed else "it has only one"
                raise ValueError(f"{self.name} has no {what} {value!r}: {right}")
        self.split = split  # type: ignore[assignment]
        self.protocol = protocol or self.protocols[0]
        self.generation = self.generations.get(self.protocol, type(self).generation)
        self.images = images
        self.files = []

    @classmethod  # noqa: B027 - most benchmarks have none
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Adds the benchmark's own command-line arguments, for `from_arguments` to use."""

    @classmethod
    def from_arguments(cls: type[B], args: argparse.Namespace) -> B:
        return cls(split=args.split, protocol=args.protocol, images=args.images)

    def read_json(self, path: Path, spec: Spec = Any) -> Any:
        """The content of a JSON file that fits `spec` (see `llava_sp.common.schema`)."""
        self.files.append(path)
        return read_json(path, spec)

    def read_jsonl(self, path: Path, spec: Spec = dict) -> list[Line]:
        """The lines of a JSONL file, each of which fits `spec`; at least one."""
        self.files.append(path)
        return read_jsonl(path, spec)

    def read_table(self, path: Path, delimiter: str, spec: Spec = dict) -> list[Line]:
        """The rows of a CSV or TSV file with a header, {column: text}, each of which fits `spec`; at least one."""
        self.files.append(path)
        return read_table(path, delimiter, spec)

    def under(self: B, protocol: str) -> B:
        """The same benchmark, with what was loaded, under another protocol's rule for scores."""
        other = copy.copy(self)
        other.protocol = protocol
        return other

    @abstractmethod
    def load(self, data: Path) -> list[Item]:
        """Reads the official (or LLaVA's) files in folder `data`; called once, before everything else but `validate`, which is
        called alone. Raises ValueError naming what is missing or wrong."""

    def prompt(self, item: Item) -> str:
        """The user's message without image marks."""
        return item.text

    def message(self, item: Item) -> str:
        """The user's message as the model gets it: LLaVA puts the images first, each on a line of its own."""
        return f"{IMAGE_MARK}\n" * len(item.images) + self.prompt(item)

    def record(self, item: Item) -> dict[str, Any]:
        """The fields of the item's answer line that do not depend on the answer."""
        return {"question_id": item.id, "prompt": self.prompt(item)}

    def read_answers(self, path: Path) -> tuple[Sequence[dict[str, Any]], str | None]:
        """The lines of a finished answers file, and a note if one had to be left out; see `answers_file.read_answers`."""
        return read_answers(path)

    def match(self, items: Sequence[Item], records: Sequence[dict[str, Any]]) -> list[str]:
        """The answers in the order of the items, from the lines of an answers file.

        Raises:
            ValueError: ids that occur twice, are missing or are not of these items; other questions under the same ids.
        """
        texts = match_by_question_id(items, records, what=f"{self.name} {self.split or ''}".strip())
        check_questions(items, [self.question(item) for item in items], records)
        return texts

    def question(self, item: Item) -> str:
        """The part of the item's text that is in every prompt, whatever the protocol."""
        return str(item.metadata.get("question", item.text.split("\n")[0]))

    def judge(  # noqa: B027 - most benchmarks need none
        self, items: Sequence[Item], answers: Sequence[str], output: Path | None
    ) -> None:
        """Asks a judge for what `score` needs; called once before it. See `llava_sp.eval.scoring.judge`."""

    @abstractmethod
    def score(self, items: Sequence[Item], answers: Sequence[str]) -> Scores:
        """Judges `answers`, which are in the order of the items, exactly one each, by the rule of `self.protocol`."""

    @classmethod
    def headline(cls, per_item: Sequence[Mapping[str, Any]]) -> float:
        """The headline that follows from these records (all of a run, or a sample of their units): their mean score."""
        return round(fmean(record["score"] for record in per_item), 2)

    def summary(self, scores: Scores) -> list[str]:
        """Lines to print under the headline figure, for a person; all figures are in `metrics.json` anyway."""
        width = max(map(len, scores.categories), default=0)
        return [f"{name:{width}}  {c.score:6.2f}  ({c.count} questions)" for name, c in scores.categories.items()]

    def submission(self, items: Sequence[Item], answers: Sequence[str], output: Path) -> Path | None:
        """Writes the file that the evaluation server expects into folder `output`; None if there is no server."""
        return None

    def validate(self, file: Path, data: Path) -> str:
        """Checks a finished submission file: one line on what it holds. Raises ValueError with all errors."""
        raise ValueError(f"{self.name} has no submission files to validate")
