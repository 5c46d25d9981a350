"""The folder of a run: damage is noticed and named, its record is restored, its processes agree on it."""

from __future__ import annotations

import json
import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from llava_sp.common.processes import Processes, ReportedElsewhere
from llava_sp.train import run_folder
from llava_sp.train.run_folder import RunFolder
from tests.messages import names, refused

FILES = (
    "optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_1.pth", "trainer_state.json", "run_state.json",
    "projector.safetensors", "lora/adapter_model.safetensors", "llava_sp.json", "config.json", "run.yaml",
    "global_step2/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
)  # fmt: skip
SETTINGS = {"learning_rate": 0.1, "max_steps": 4, "per_device_train_batch_size": 2}
FACTS = {"processes": 1, "samples_per_step": 2}


def save(folder: RunFolder, step: int) -> None:
    staged = folder.path / run_folder.STAGING / f"checkpoint-{step}"
    for name in FILES[:-2] + FILES[-1:]:
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        (staged / name).write_bytes(f"{name} of step {step}".encode() * 20)
    folder.publish(staged)


@pytest.fixture
def out(tmp_path) -> Path:
    """A run with the checkpoints 2 and 4."""
    folder = RunFolder(tmp_path / "out")
    assert folder.join(Processes(), SETTINGS, FACTS) is None
    save(folder, 2)
    save(folder, 4)
    folder.close()
    return folder.path


def join(out: Path) -> Path | None:
    folder = RunFolder(out)
    try:
        return folder.join(Processes(), SETTINGS, FACTS, patience=0.3)
    finally:
        folder.close()


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def altered(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def zeroed(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def emptied(file: Path) -> None:
    file.write_bytes(b"")


DAMAGE = (Path.unlink, truncated, altered, zeroed, emptied)


# ---- damage


@pytest.mark.parametrize(
    ("name", "damage"),
    [*((name, Path.unlink) for name in FILES), *((n, how) for n in ("optimizer.pt", "files.json") for how in DAMAGE)],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(out, caplog, name, damage):
    damage(out / "checkpoint-4" / name)
    assert join(out) == out / "checkpoint-2"
    (line,) = [record.message for record in caplog.records]
    assert line.startswith(f"{out / 'checkpoint-4'} is damaged: {out / 'checkpoint-4'}/") and "\n" not in line
    if name != "files.json":
        assert str(out / "checkpoint-4" / name) in line
    assert (out / "checkpoint-4.damaged").is_dir()  # does not count where the oldest ones are deleted
    assert join(out) == out / "checkpoint-2"


def test_intact_checkpoints_are_used_as_they_are(out, caplog):
    assert join(out) == out / "checkpoint-4" and not caplog.records


def test_without_an_intact_checkpoint_nothing_is_begun_again(out):
    for step in (2, 4):
        zeroed(out / f"checkpoint-{step}" / "optimizer.pt")
    with refused(out, *(out / f"checkpoint-{step}" / "optimizer.pt" for step in (4, 2)), "sha256"):
        join(out)
    assert (out / "checkpoint-4").is_dir() and (out / "checkpoint-2").is_dir()


def test_a_checkpoint_under_another_name(out, caplog):
    shutil.copytree(out / "checkpoint-2", out / "checkpoint-9")
    assert join(out) == out / "checkpoint-4" and names(caplog.text, "checkpoint-9/files.json", "checkpoint-2")


@pytest.mark.parametrize("number", [None, 1, 3])
def test_a_checkpoint_of_another_version_is_refused_and_stays(out, number):
    file = out / "checkpoint-4" / "files.json"
    listed = json.loads(file.read_text())
    was = listed.pop("format")
    file.write_text(json.dumps(listed | ({} if number is None else {"format": number})))
    with refused(out / "checkpoint-4", file, number or 1, was, "version", "output_dir"):
        join(out)
    assert (out / "checkpoint-4").is_dir() and (out / "checkpoint-2").is_dir()


# ---- run.yaml


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda how: how.__name__)
def test_run_yaml_is_restored_from_a_checkpoint(out, damage):
    recorded = (out / "run.yaml").read_bytes()
    damage(out / "run.yaml")
    assert list(RunFolder(out).conflicts(SETTINGS, 2)) == []
    (problem,) = RunFolder(out).conflicts({**SETTINGS, "learning_rate": 0.5}, 2)
    assert "learning_rate: 0.1 there, 0.5 now" in problem and "max_steps" not in problem
    join(out)
    assert (out / "run.yaml").read_bytes() == recorded


def test_run_yaml_without_a_checkpoint_is_written_anew(tmp_path):
    (tmp_path / "run.yaml").write_bytes(bytes(100))
    assert join(tmp_path) is None
    assert yaml.safe_load((tmp_path / "run.yaml").read_text())["learning_rate"] == 0.1


# ---- other numbers of processes


@pytest.mark.parametrize(
    ("settings", "samples", "problem"),
    [
        ({"per_device_train_batch_size": 1}, 2, None),
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}, 2, None),
        ({}, 4, "samples per step: 2 there, 4 now"),
    ],
)
def test_what_a_step_learns_from_is_compared_not_how_it_is_shared_out(out, settings, samples, problem):
    problems = "".join(RunFolder(out).conflicts({**SETTINGS, **settings}, samples))
    assert problem in problems if problem else not problems


# ---- processes on machines that may not share the folder


@dataclass(frozen=True)
class Thread(Processes):
    """A process of a command, played by a thread."""

    box: dict = field(default_factory=dict)
    barrier: threading.Barrier = None  # type: ignore[assignment]

    def gather(self, value):
        self.barrier.wait(10)
        self.box[self.rank] = value
        self.barrier.wait(10)
        return [self.box[rank] for rank in range(self.world_size)]

    def from_main(self, value):
        return self.gather(value)[0]


def join_together(*folders: Path) -> list:
    """What each process gets: a checkpoint, or the error."""
    box, barrier, outcomes = {}, threading.Barrier(len(folders)), {}

    def run(rank: int) -> None:
        folder = RunFolder(folders[rank])
        try:
            here = Thread(rank, len(folders), rank, box, barrier)
            outcomes[rank] = folder.join(here, SETTINGS, FACTS, patience=0.5)
        except ValueError as error:
            outcomes[rank] = error
        folder.close()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(folders))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [outcomes[rank] for rank in range(len(folders))]


def test_processes_of_one_folder_agree(out, tmp_path):
    assert join_together(out, out) == [out / "checkpoint-4"] * 2
    (tmp_path / "other").symlink_to(out)  # mounted elsewhere
    assert join_together(out, tmp_path / "other") == [out / "checkpoint-4", tmp_path / "other" / "checkpoint-4"]


@pytest.mark.parametrize("there", ["nothing", "an older token", "a checkpoint"])
def test_processes_of_two_folders_end_at_the_start(out, tmp_path, there):
    """A run would resume on one of them, and begin anew on the other."""
    other = tmp_path / "other"
    if there != "nothing":
        shutil.copytree(out, other)
        (other / ".token").write_text("0")
    first, second = (tmp_path / "new", other) if there == "a checkpoint" else (out, other)
    for outcome in join_together(first, second, first):
        assert names(str(outcome), "output_dir", "process 1", "process 0")
        assert names(str(outcome), second) or names(str(outcome), first)


def test_damage_is_reported_by_the_main_process_and_ends_all(out):
    for step in (2, 4):
        zeroed(out / f"checkpoint-{step}" / "optimizer.pt")
    main, other = join_together(out, out)
    assert "no intact checkpoint" in str(main) and isinstance(other, ReportedElsewhere)
