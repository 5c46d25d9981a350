"""SIGTERM, SIGINT and SIGUSR1 while training: a checkpoint at the next step boundary, an exit status, and the same command goes on."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from llava_sp.train import trainer as trainer_module
from llava_sp.train.__main__ import main
from llava_sp.train.run import train
from tests.messages import names
from tests.train.conftest import no_launcher
from tests.train.runs import config, finish, log, run_here, start, wait_for_step

STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 138}
STEPS = {"save_steps": 4, "logging_steps": 3, "lora_dropout": 0.1}
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "llava_sp.train"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An undisturbed run of six steps."""
    folder = tmp_path_factory.mktemp("whole")
    with no_launcher():
        run_here(folder, **STEPS)
    return folder / "out"


def weights(out: Path) -> list[bytes]:
    return [(out / name).read_bytes() for name in ("projector.safetensors", "lora/adapter_model.safetensors")]


def figures(out: Path) -> list[dict]:
    """The log without what depends on the machine."""
    shown = ("step", "loss", "grad_norm", "train_loss", "eval_loss")
    return [{key: record[key] for key in shown if key in record} for record in log(out)]


@pytest.mark.parametrize("number", STATUS, ids=lambda number: number.name)
def test_a_signal_saves_the_step_and_the_same_command_goes_on(tmp_path, monkeypatch, whole, caplog, number):
    """In the middle of a step of several micro batches, at a step that is neither saved nor logged."""
    caplog.set_level("INFO", "llava_sp")
    step = trainer_module.LlavaSPTrainer.training_step

    sent = []

    def signalled(self, *args, **kwargs):
        if self.state.global_step == 1 and not sent:
            sent.append(os.kill(os.getpid(), number))
        return step(self, *args, **kwargs)

    path = config(tmp_path, **STEPS)
    before = signal.getsignal(number)
    monkeypatch.setattr(trainer_module.LlavaSPTrainer, "training_step", signalled)
    with pytest.raises(SystemExit) as ended:
        train(path, [])
    assert ended.value.code == STATUS[number] and signal.getsignal(number) == before
    assert names(caplog.text, number.name, tmp_path / "out" / "checkpoint-2", "same command")
    assert not (tmp_path / "out" / "finished.json").exists()
    monkeypatch.setattr(trainer_module.LlavaSPTrainer, "training_step", step)
    with no_launcher():
        assert main(["--config", str(path)]) == 0
    assert weights(tmp_path / "out") == weights(whole) and figures(tmp_path / "out") == figures(whole)


def test_at_the_last_step_the_run_finishes(tmp_path, monkeypatch):
    step = trainer_module.LlavaSPTrainer.training_step

    def signalled(self, *args, **kwargs):
        if self.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(trainer_module.LlavaSPTrainer, "training_step", signalled)
    run_here(tmp_path, max_steps=2)
    assert json.loads((tmp_path / "out" / "finished.json").read_text())["steps"] == 2


def test_validation_does_not_delay_the_end(tmp_path, monkeypatch):
    def evaluated(*_args, **_kwargs):
        raise AssertionError("validated")

    step = trainer_module.LlavaSPTrainer.training_step

    def signalled(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(trainer_module.LlavaSPTrainer, "training_step", signalled)
    monkeypatch.setattr(trainer_module.LlavaSPTrainer, "evaluate", evaluated)
    with pytest.raises(SystemExit):
        run_here(tmp_path, validation_fraction=0.5, eval_strategy="steps", eval_steps=1)
    assert (tmp_path / "out" / "checkpoint-1").is_dir()


def test_outside_the_main_thread_signals_stay_as_they_are(tmp_path):
    before = [signal.getsignal(number) for number in STATUS]
    thread = threading.Thread(target=run_here, args=(tmp_path,), kwargs={"max_steps": 1})
    thread.start()
    thread.join()
    assert (tmp_path / "out" / "finished.json").is_file() and before == [signal.getsignal(n) for n in STATUS]


def test_a_signal_to_the_whole_group_leaves_the_workers_working(tmp_path, monkeypatch):
    """As Ctrl-C in a terminal and a scheduler send it; a worker that ended would end the step."""
    step = trainer_module.LlavaSPTrainer.training_step
    others = set(multiprocessing.active_children())  # of tests before

    def signalled(self, *args, **kwargs):
        if not (tmp_path / "sent").exists():
            (tmp_path / "sent").touch()
            workers = set(multiprocessing.active_children()) - others
            assert len(workers) == 2
            processes = [*(worker.pid for worker in workers), os.getpid()]
            subprocess.run(["kill", "-TERM", *map(str, processes)], check=True)  # a worker obeys its parent
            time.sleep(0.5)
        return step(self, *args, **kwargs)

    path = config(tmp_path, **STEPS, dataloader_num_workers=2, group_by_modality_length=True)
    monkeypatch.setattr(trainer_module.LlavaSPTrainer, "training_step", signalled)
    with pytest.raises(SystemExit):
        train(path, [])
    assert (tmp_path / "out" / "checkpoint-1").is_dir()
    for worker in set(multiprocessing.active_children()) - others:
        worker.join(10)
    assert set(multiprocessing.active_children()) <= others


def workers_of(process) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return sorted(
        (one for one in children if "llava_sp.train" in one.cmdline() and "RANK" in one.environ()),
        key=lambda one: one.environ()["RANK"],
    )


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    """Also where the first one cannot be followed: the process waits for another one that is stopped."""
    path = config(tmp_path, max_steps=500, save_steps=500)
    process = start([*TWO, "--config", str(path)], tmp_path)
    try:
        wait_for_step(process, tmp_path, 2)
        _, second = workers_of(process)
        second.send_signal(signal.SIGINT)
        psutil.wait_procs([second], timeout=0.3)
        second.send_signal(signal.SIGINT)
        psutil.wait_procs([second], timeout=30)
        assert not second.is_running() or second.status() == psutil.STATUS_ZOMBIE
        process.wait(60)
        assert "Ctrl-C again ends at once" in (tmp_path / "output.txt").read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_two_processes_agree_on_the_step(tmp_path, number):
    """One of them received the signal; torchrun ends with its own status."""
    settings = {"max_steps": 20, "save_steps": 20, "lora_dropout": 0.1}
    path = config(tmp_path, **settings)
    process = start([*TWO, "--config", str(path)], tmp_path)
    wait_for_step(process, tmp_path, 2)
    workers_of(process)[1].send_signal(number)
    assert process.wait(120) == 1
    text = (tmp_path / "output.txt").read_text()
    assert f"exitcode  : {STATUS[number]}" in text and f"Stopped by {number.name}" in text
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert len(list(checkpoint.glob("rng_state_*.pth"))) == 2
    finish(start([*TWO, "--config", str(path)], tmp_path), tmp_path)
    assert [record["step"] for record in log(tmp_path / "out") if "loss" in record] == list(range(1, 21))
