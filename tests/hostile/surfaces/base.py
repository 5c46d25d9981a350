"""What a surface is, and the workbench that tries one spoilt copy of it after another."""

from __future__ import annotations

import contextlib
import importlib
import json
import shlex
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from hypothesis.strategies import SearchStrategy

from llava_sp.common.command import run_command
from tests.hostile.judge import WRONG, Rules, Spoilt, exact, judge
from tests.hostile.mutations import DOCUMENTS, Mutation, of_files, of_words, read_document, spoil, spoil_words
from tests.hostile.sandbox import HUNG, Outcome, contained

REPO = Path(__file__).parents[3]
GOLDEN = REPO / "tests" / "golden"
Answer = tuple[int | None, Any, int | None]


class Surface(ABC):
    """Something that reads files or words which may be hostile. `words` is the command line where that is what is spoilt."""

    name: str
    rules: Rules = ()  # by which another result is right; `exact` where none fits
    seconds: ClassVar[float] = 60.0
    words: Sequence[str] = ()
    is_check: bool = False  # whether exit status 1 means that it found something
    weight: ClassVar[float] = 1.0  # its share of the time
    names: Sequence[str] = ()  # by which an error may name what is wrong, besides files and keys

    @abstractmethod
    def build(self, folder: Path) -> None:
        """Write the sound files into an empty folder, which is where they will be tried."""

    @abstractmethod
    def act(self, folder: Path, words: Sequence[str]) -> Answer:
        """(exit status, result as plain values, exit status of the check that goes before, if there is one)."""

    def targets(self, folder: Path) -> list[str]:
        """The files to spoil."""
        return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())

    def may_take_long(self, mutation: Mutation) -> bool:
        """Whether it asks for more than there is time for."""
        return False

    def may_differ(self, spoilt: Spoilt, words: Sequence[str]) -> bool:
        """Whether a spoilt command line may give another result."""
        return exact(spoilt)


@dataclass(frozen=True)
class Case:
    """One mutation and its outcome; `verdict` is one of `judge.RIGHT` and `judge.WRONG`."""

    surface: str
    mutation: Mutation
    verdict: str
    shown: str
    outcome: Outcome | None = None

    @property
    def failed(self) -> bool:
        return self.verdict in WRONG

    @property
    def command(self) -> str:
        return f"python -m tests.hostile --surface {self.surface} --case {shlex.quote(str(self.mutation))}"

    def __str__(self) -> str:
        return f"{self.verdict}: {self.shown}\n    {self.command}"


class Workbench:
    """A surface in a folder of its own. All cases have the same place, one after the other: files hold absolute paths."""

    def __init__(self, surface: Surface, root: Path):
        self.surface, self.folder, self.kept = surface, root / "case", root / "sound"
        shutil.rmtree(root, ignore_errors=True)
        self.folder.mkdir(parents=True)
        surface.build(self.folder)
        self.folder.rename(self.kept)
        self.targets = surface.targets(self.kept)
        self.names = [*surface.names, *sorted({Path(target).name for target in self.targets})]

    @cached_property
    def sound(self) -> Outcome:
        """What the unspoilt files and words give. Raises `AssertionError` if that is an error."""
        self.fresh_copy()
        self._import_what_it_imports()
        self.fresh_copy()
        outcome = self.act(self.surface.words)
        assert outcome.status == 0 and not outcome.trace, f"{self.surface.name}: {outcome}"
        return outcome

    @property
    def mutations(self) -> SearchStrategy[Mutation]:
        return of_words(self.surface.words) if self.surface.words else of_files(self.kept, self.targets)

    def attempt(self, mutation: Mutation) -> Case:
        """Spoil a copy, use it, and judge."""
        sound, words = self.sound, self.surface.words
        self.fresh_copy()
        if mutation.target:
            spoil(self.folder, mutation)
        else:
            words = spoil_words(words, mutation)
        before, after = (self._document(folder, mutation) for folder in (self.kept, self.folder))
        now = self.act(words)
        spoilt = Spoilt(mutation, before, after, sound.result, now.result)
        rules = self.surface.rules if mutation.target else [("", lambda spoilt: self.surface.may_differ(spoilt, words))]
        changed = [str(key) for path, *_ in spoilt.differences for key in path if isinstance(key, str)]
        names = [*self.names, *changed, *self._named_by(mutation, words)]
        if now.trace == HUNG and self.surface.may_take_long(mutation):
            return Case(self.surface.name, mutation, "another valid input", "", now)
        verdict, shown = judge(mutation, spoilt, sound, now, rules, names, self.surface.is_check)
        return Case(self.surface.name, mutation, verdict, shown, now)

    def _named_by(self, mutation: Mutation, words: Sequence[str]) -> list[str]:
        """What an error may name it by, besides the names of files."""
        if not mutation.target:
            flags = [word.partition("=")[0] for word in (*words, *self.surface.words) if word.startswith("--")]
            quoted = [form for word in words for form in (repr(word), repr(word)[1:-1]) if form]
            shown = [
                f"{before}{form}{after}" for form in quoted for before, after in ((": ", ""), (" ", "\n"), (" ", ","))
            ]
            long = [form for form in quoted if len(form) > 2]
            keys = [flag.strip("-").replace("-", "_") for flag in flags]
            return [*flags, *keys, *shown, *long, "arguments are required: ", str(self.folder)]
        gone = [str(self.folder)] if mutation.action in ("remove", "folder") else []
        keys = [form for key in mutation.keys for form in (key, key.replace("_", " "))]
        return [*keys, *gone, f"{self.folder}/"]

    def _document(self, folder: Path, mutation: Mutation) -> Any:
        file = folder / (mutation.target or "-")
        try:
            return read_document(file) if file.suffix in DOCUMENTS else None
        except ValueError:
            return None

    def fresh_copy(self) -> None:
        """The sound files, in the place of the last case."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.kept, self.folder)

    def _import_what_it_imports(self) -> None:
        """Here and once, rather than in the process of every case."""

        def imported() -> Answer:
            torch.set_num_threads(1)
            self.surface.act(self.folder, self.surface.words)
            return 0, sorted(sys.modules), None

        for name in contained(imported, self.folder, self.surface.seconds).result or ():
            with contextlib.suppress(Exception):
                importlib.import_module(name)

    def act(self, words: Sequence[str]) -> Outcome:
        """Use the files as they are."""

        def action() -> Answer:
            torch.set_num_threads(1)  # a fork does not inherit threads
            return self.surface.act(self.folder, words)

        return contained(action, self.folder, self.surface.seconds)


def through_command(action: Callable[[], Any]) -> tuple[int, Any]:
    """(exit status, what `action` returns), with errors as a command reports them."""
    box: list[Any] = [None]

    def run() -> None:
        box[0] = action()

    return run_command(run), box[0]


def plain(value: Any) -> Any:
    """As JSON has it."""
    return json.loads(json.dumps(value, default=str))
