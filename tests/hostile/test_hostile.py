"""A few hundred hostile inputs, always the same ones; and that the framework itself would notice what is wrong."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from zlib import crc32

import pytest

from llava_sp.common.files import read_json
from llava_sp.eval import compare
from tests.hostile.__main__ import main
from tests.hostile.judge import WRONG, alike
from tests.hostile.mutations import Mutation, drawn, of_words, spoil_words
from tests.hostile.surfaces import SURFACES
from tests.hostile.surfaces.base import Surface, Workbench, through_command

# How many mutations of each surface; what takes long has few. A name without its own stands under its beginning.
COUNTS = {
    "checkpoint": 2, "data": 20, "config": 30, "run": 2, "resume": 2, "replay": 2, "eval": 8, "outputs": 20, "logs": 20, "features": 20, "command": 4,
    "command.train": 2, "command.checkpoints.merge": 2,
}  # fmt: skip
SLOW = 10  # times as many


@pytest.fixture(scope="session")
def bench(tmp_path_factory) -> Iterator[Callable[[str], Workbench]]:
    """A surface's workbench; it is built once."""
    root, built = tmp_path_factory.mktemp("hostile"), {}

    def find(name: str) -> Workbench:
        if name not in built:
            built[name] = Workbench(SURFACES[name], root / name)
        return built[name]

    yield find
    shutil.rmtree(root)


def wrong(bench: Workbench, times: int = 1) -> list[str]:
    """The failures among a surface's mutations: always the same ones, others than another surface's."""
    name = bench.surface.name
    count = times * COUNTS.get(name, COUNTS.get(name.split(".")[0], 0))
    cases = map(bench.attempt, drawn(bench.mutations, count, seed=crc32(name.encode())))
    return [str(case) for case in cases if case.failed]


@pytest.mark.parametrize("name", SURFACES)
def test_a_hostile_input_is_refused_or_does_not_matter(bench, name):
    found = wrong(bench(name))
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", SURFACES)
def test_many_hostile_inputs(bench, name):
    found = wrong(bench(name), SLOW)
    assert not found, "\n".join(found)


# ---- what is compared with


@pytest.mark.parametrize("name", [name for name in SURFACES if not name.startswith(("command", "run", "resume"))])
def test_the_same_again_gives_the_same(bench, name):
    """An input that is spoilt by nothing."""
    sound = bench(name).sound
    assert sound.result and sound.check in (None, 0)
    bench(name).fresh_copy()
    assert alike(sound.result, bench(name).act(SURFACES[name].words).result)


def test_the_results_are_the_recorded_ones(bench):
    """Scores of the original scorers; the same logits in the original format and in ours; a run that was never stopped."""
    assert bench("eval.pope").sound.result["score"] == 67.94
    assert bench("eval.vqav2").sound.result["score"] == 70.25
    results = [bench(f"checkpoint.{kind}").sound.result for kind in ("original_lora", "llava_sp_adapter")]
    assert alike(*(result[1:] for result in results))
    assert bench("resume").sound.result == SURFACES["resume"].whole


# ---- that defects are noticed


class Toy(Surface):
    """A settings file and a reader of it."""

    name, seconds = "toy", 5.0

    def __init__(self, read: Callable[[Path], object], check: Callable[[Path], int] | None = None):
        self.read, self.check = read, check

    def build(self, folder: Path) -> None:
        (folder / "settings.json").write_text(json.dumps({"rate": 0.5, "names": ["a", "b"]}))

    def act(self, folder, words):
        file = folder / "settings.json"
        return *through_command(lambda: self.read(file)), self.check and self.check(file)


SPEC = {"rate": float, "names": [str]}
SPOILT = Mutation("settings.json", "set", ("rate",), "text")


def only_sound(file: Path, otherwise: Callable[[], object]) -> object:
    settings = json.loads(file.read_text())
    return settings if settings["rate"] == 0.5 else otherwise()


def fail(error: Exception) -> object:
    raise error


@pytest.mark.parametrize(
    ("verdict", "otherwise"),
    [
        ("refused", lambda: fail(ValueError("settings.json: rate is 'x'"))),
        ("silently different", lambda: {"rate": 0.1}),
        ("traceback", lambda: fail(KeyError("rate"))),
        ("traceback", lambda: print("Traceback (most recent call last)\nKeyError: 1", file=sys.stderr)),
        ("traceback", lambda: os.kill(os.getpid(), signal.SIGSEGV)),
        ("refused without a name", lambda: fail(ValueError("expected non-negative integer"))),
        ("refused without a name", lambda: bytearray(2**40)),
        ("wrong status", lambda: sys.exit(3)),
        ("wrong status", lambda: print("settings.json") or sys.exit(2)),
        ("traceback", lambda: [subprocess.Popen(["sleep", "60"]) for _ in range(40)] and time.sleep(60)),
        ("hung", lambda: time.sleep(60)),
    ],
)  # fmt: skip
def test_a_defect_has_its_name(tmp_path, monkeypatch, verdict, otherwise):
    monkeypatch.setattr(Toy, "seconds", 1.0)
    bench = Workbench(Toy(lambda file: only_sound(file, otherwise)), tmp_path / "toy")
    assert bench.attempt(SPOILT).verdict == verdict
    assert bench.attempt(Mutation("settings.json", "delete", ("names",))).verdict == "silently different"


def test_a_check_must_agree(tmp_path):
    bench = Workbench(Toy(lambda file: read_json(file, SPEC), check=lambda file: 0), tmp_path / "toy")
    assert bench.attempt(SPOILT).verdict == "check disagrees"
    assert bench.attempt(Mutation("settings.json", "add", ("rate",), "text")).verdict == "silently different"


def test_a_careful_reader_is_right_about_everything(tmp_path):
    sound = {"rate": 0.5, "names": ["a", "b"]}

    def read(file: Path) -> object:
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, OSError, RecursionError) as error:
            raise ValueError(f"{file}: {error}") from error
        known = {key: settings[key] for key in sound if key in settings} if isinstance(settings, dict) else None
        return sound if known == sound else fail(ValueError(f"{file}: other settings"))

    bench = Workbench(Toy(read), tmp_path / "toy")
    cases = [bench.attempt(mutation) for mutation in drawn(bench.mutations, 20)]
    assert len(cases) > 10 and {case.verdict for case in cases} <= {"refused", "same"}


def test_a_defect_of_the_program_is_noticed(bench, monkeypatch):
    """Without the comparison of protocols, runs by different rules are compared."""
    mutation = Mutation("a/metrics.json", "set", ("provenance", "protocol"), "text")
    assert bench("outputs").attempt(mutation).verdict == "refused"
    monkeypatch.setattr(compare, "_difference", lambda a, b: None)
    assert bench("outputs").attempt(mutation).verdict == "silently different"


# ---- mutations and the command


def test_a_mutation_can_be_written_down(bench):
    found = [*drawn(bench("config").mutations, 50), *drawn(of_words(["--a", "b"]), 50)]
    assert [Mutation.read(str(mutation)) for mutation in found] == found
    assert drawn(of_words(["--a", "b"]), 50) == found[-len(drawn(of_words(["--a", "b"]), 50)) :]
    assert len(drawn(of_words(["--a", "b"]), 50, seed=1)) > 20
    assert spoil_words(["--a", "b"], Mutation("", "before", (1,), "nothing")) == ["--a", "", "b"]


def test_the_command_saves_failures_as_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SURFACES, "toy", Toy(lambda file: read_json(file)["rate"]))
    file = tmp_path / "failures.txt"
    assert main(["--surface", "toy", "--minutes", "0.03", "--seed", "1", "--failures", str(file)]) == 1
    out = capsys.readouterr().out
    assert "silently different" in out and "traceback" in out and "distinct failures" in out
    saved = [shlex.split(line) for line in file.read_text().splitlines() if line.startswith("    python")]
    assert saved
    for words in saved[:3]:
        assert words[:3] == ["python", "-m", "tests.hostile"] and main(words[3:]) == 1
        assert capsys.readouterr().out.splitlines()[-1].startswith(WRONG)
