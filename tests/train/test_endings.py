"""How runs end: the proof of what was saved, full disks, errors of one process, a folder without locks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from llava_sp.common.processes import FailedHere
from llava_sp.data import images
from llava_sp.train import run_folder, verify
from llava_sp.train import trainer as trainer_module
from llava_sp.train.__main__ import main
from llava_sp.train.intact import damage
from llava_sp.train.run_folder import RunFolder
from tests.messages import names, refused
from tests.train.runs import GOLDEN, config, run_here

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
SAMPLES = json.loads((GOLDEN / "samples" / "data.json").read_text())


def data(folder: Path, records: list[dict]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.json").write_text(json.dumps(records))
    return str(folder / "data.json")


def proof(folder: Path) -> dict:
    return json.loads((folder / "out" / "finished.json").read_text())


def stopped(capsys, path: Path, words: list[str] = ()) -> str:
    assert main(["--config", str(path), *words]) == 2
    return capsys.readouterr().err


# ---- the proof


def test_the_proof_takes_a_good_sample_with_an_image(tmp_path):
    """The first is text, the second has no image file and is never drawn."""
    text = next(record for record in SAMPLES if "image" not in record)
    good = next(record for record in SAMPLES if "image" in record)
    records = [text, {**good, "image": "gone.png"}, good]
    seed = next(s for s in range(100) if order(3, s)[2] == 1)
    run_here(tmp_path, data_path=data(tmp_path, records), max_steps=1, save_steps=9, seed=seed, global_batch_size=1)
    assert proof(tmp_path)["relative_change_when_forgotten"] > verify.TOLERANCE
    assert "tensors_compared" not in proof(tmp_path)


def order(samples: int, seed: int) -> list[int]:
    """The samples of the first epoch."""
    generator = torch.Generator()
    generator.manual_seed(seed)
    return torch.randperm(samples, generator=generator).tolist()


@pytest.fixture
def text_alone(tmp_path) -> dict:
    """One step on text alone at a rate of zero: forgetting it changes no logit."""
    text = [record for record in SAMPLES if "image" not in record]
    return {"data_path": data(tmp_path, text), "max_steps": 1, "global_batch_size": 1, "learning_rate": 0.0}


def test_where_logits_prove_nothing_the_tensors_are_compared(tmp_path, text_alone, caplog):
    caplog.set_level("INFO", "llava_sp")
    run_here(tmp_path, **text_alone)
    assert proof(tmp_path)["tensors_compared"] > 10
    assert names(caplog.text, "tensors", "bit for bit")


def test_a_tensor_that_does_not_come_back_is_noticed(tmp_path, text_alone, monkeypatch):
    def spoilt(model, path):
        load(model, path)
        next(p for name, p in model.named_parameters() if "linear_2.weight" in name).data[0, 0] += 1.0

    load = verify.load_adapter
    monkeypatch.setattr(verify, "load_adapter", spoilt)
    with refused("1 of", "tensors differ", "linear_2.weight", error=RuntimeError):
        run_here(tmp_path, **text_alone)


# ---- full disks


def test_full_disk_at_the_last_save(tmp_path, monkeypatch, capsys):
    """Reported without a traceback; the same command, with room, finishes without training again."""
    path = config(tmp_path, max_steps=2, save_steps=2)
    save = trainer_module.save_adapter

    def full(*args, **kwargs):
        if Path(args[2]) == tmp_path / "out":
            raise FULL
        save(*args, **kwargs)

    monkeypatch.setattr(trainer_module, "save_adapter", full)
    message = stopped(capsys, path)
    assert names(message, "trained model", "No space left")
    assert "GiB free" in message and "checkpoint-2" in message
    monkeypatch.setattr(trainer_module, "save_adapter", save)
    main(["--config", str(path)])
    assert proof(tmp_path)["steps"] == 2


@pytest.mark.parametrize("name", ["run.yaml", "finished.json", "log.jsonl"])
def test_full_disk_at_a_small_file(tmp_path, monkeypatch, capsys, name):
    path = config(tmp_path, max_steps=1, save_steps=1)
    write = run_folder.write_atomic

    def full(target, text):
        if target.name == name:
            raise FULL
        write(target, text)

    monkeypatch.setattr(run_folder, "write_atomic", full)
    if name == "log.jsonl":
        (tmp_path / "out" / name).mkdir(parents=True)  # cannot be appended to either
    message = stopped(capsys, path)
    assert f"{name} could not be written to {tmp_path / 'out'}" in message
    assert ("No space left" in message) == (name != "log.jsonl")
    assert not list((tmp_path / "out").glob(f".{name}.*"))


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    message = stopped(capsys, config(tmp_path), ["--output_dir", str(tmp_path / "file" / "out")])
    assert "could not be written" in message and "Not a directory" in message


def test_full_disk_within_a_checkpoint(tmp_path, monkeypatch, capsys):
    """The one before stays whole and nothing of the new one is left; with room, the same command ends as it would have."""
    whole = config(tmp_path / "whole", max_steps=4, save_steps=2)
    assert main(["--config", str(whole)]) == 0
    capsys.readouterr()
    path = config(tmp_path, max_steps=4, save_steps=2)
    save = torch.save

    def full(value, file, *args, **kwargs):
        if "checkpoint-4" in str(file):
            Path(file).write_bytes(b"half")
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
        save(value, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    message = stopped(capsys, path)
    out = tmp_path / "out"
    assert names(message, "checkpoint-4", out, out / "checkpoint-2", "GiB free", "same command")
    assert damage(out / "checkpoint-2") is None and not (out / ".saving").exists()
    assert [entry.name for entry in out.glob("checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.setattr(torch, "save", save)
    assert main(["--config", str(path)]) == 0
    weights = [(place / "out" / "projector.safetensors").read_bytes() for place in (tmp_path, tmp_path / "whole")]
    assert weights[0] == weights[1]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_disk_that_is_really_full(tmp_path, capsys):
    """A file system of a few MiB: the first checkpoint fits, a later one does not."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=22m", "none", str(disk)], check=False).returncode:
        pytest.skip("cannot mount")
    try:
        path = config(tmp_path, output_dir=str(disk / "out"), max_steps=6, save_steps=1, save_total_limit=None)
        message = stopped(capsys, path)
        kept = sorted(entry.name for entry in (disk / "out").glob("checkpoint-*"))
        assert kept and names(message, "could not be written", "No space left", disk / "out" / kept[-1], "Make room")
        assert all(damage(disk / "out" / name) is None for name in kept)
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        assert main(["--config", str(path)]) == 0
        assert json.loads((disk / "out" / "finished.json").read_text())["steps"] == 6
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# ---- data that goes away


@pytest.mark.parametrize("on_bad_sample", ["fail", "skip"])
@pytest.mark.parametrize("how", ["gone", "unmounted"])
def test_an_image_folder_that_goes_away(tmp_path, monkeypatch, capsys, how, on_bad_sample):
    """It is not a fault of the samples: none is skipped, and with the folder the same command goes on."""
    shutil.copytree(GOLDEN / "samples" / "images", tmp_path / "images")
    path = config(tmp_path, image_folder=str(tmp_path / "images"), on_bad_sample=on_bad_sample, max_steps=8)
    step = trainer_module.LlavaSPTrainer.training_step

    def unplugged(self, *args, **kwargs):
        if self.state.global_step == 2 and not (tmp_path / "away").exists():
            os.rename(tmp_path / "images", tmp_path / "away")
            if how == "unmounted":
                (tmp_path / "images").mkdir()
        return step(self, *args, **kwargs)

    monkeypatch.setattr(trainer_module.LlavaSPTrainer, "training_step", unplugged)
    message = stopped(capsys, path)
    assert names(message, "image folder", tmp_path / "images", "gone or empty", "same command")
    assert not (tmp_path / "out" / "skipped_train.jsonl").exists() and list((tmp_path / "out").glob("checkpoint-*"))
    shutil.rmtree(tmp_path / "images", ignore_errors=True)
    os.rename(tmp_path / "away", tmp_path / "images")
    assert main(["--config", str(path)]) == 0
    assert proof(tmp_path)["steps"] == 8


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE])
def test_storage_that_fails_is_not_a_bad_sample(tmp_path, monkeypatch, capsys, number):
    def failing(*_args, **_kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(images.Image, "open", failing)
    message = stopped(capsys, config(tmp_path, on_bad_sample="skip"))
    assert (
        names(message, os.strerror(number), "not the image") and not (tmp_path / "out" / "skipped_train.jsonl").exists()
    )


# ---- errors of one process


@pytest.mark.parametrize(
    ("error", "rank", "local_rank", "reported"),
    [
        (ValueError("alike"), 0, 0, "error: alike\n"),
        (ValueError("alike"), 3, 3, ""),
        (ValueError("alike"), 8, 0, "process 8: error: alike\n"),  # another machine may lack a file
        (FailedHere("here"), 0, 0, "error: here\n"),
        (FailedHere("here"), 3, 3, "process 3: error: here\n"),
    ],
)
def test_which_process_reports(monkeypatch, capsys, tmp_path, error, rank, local_rank, reported):
    def fail(*_):
        raise error

    monkeypatch.setattr("llava_sp.train.run.train", fail)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    assert stopped(capsys, tmp_path / "run.yaml") == reported


# ---- the folder


def test_on_bad_sample_may_change_between_attempts(tmp_path, capsys):
    """What the error recommends works in the same folder, where a checkpoint was left."""
    records = [*SAMPLES, {**SAMPLES[0], "image": "gone.png"}]
    path = config(tmp_path, data_path=data(tmp_path, records), save_steps=1, max_steps=5, global_batch_size=1)
    seed = next(s for s in range(100) if order(5, s)[4] == 4)
    words = ["--seed", str(seed)]
    assert "on_bad_sample: skip" in stopped(capsys, path, words)
    assert list((tmp_path / "out").glob("checkpoint-*"))
    main(["--config", str(path), *words, "--on_bad_sample", "skip"])
    assert proof(tmp_path)["steps"] == 5


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch, capsys, number):
    def unsupported(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    RunFolder(tmp_path / "out").open({}, {})
    assert (tmp_path / "out" / "run.yaml").is_file() and "has no file locks" in capsys.readouterr().err


def staged(folder: RunFolder, text: str) -> Path:
    path = folder.path / run_folder.STAGING / "checkpoint-3"
    path.mkdir(parents=True)
    (path / run_folder.STATE_FILE).write_text(text)
    return path


def test_a_checkpoint_is_replaced_by_a_whole_one(tmp_path, monkeypatch):
    """Killed at any moment of the exchange, the folder has the old one or the new one."""
    folder = RunFolder(tmp_path)
    folder.publish(staged(folder, "old"))
    rename = os.rename

    def killed(source, target):
        if run_folder.STAGING in str(source):
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.publish(staged(folder, "new"))
    monkeypatch.setattr(os, "rename", rename)
    RunFolder(tmp_path).open({}, {})
    state = tmp_path / "checkpoint-3" / run_folder.STATE_FILE
    assert state.read_text() == "old" and not (tmp_path / run_folder.STAGING).exists()

    folder.publish(staged(folder, "new"))
    assert state.read_text() == "new" and not list(tmp_path.glob(".*replaced"))
