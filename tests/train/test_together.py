"""Two processes (gloo, torchrun): of two machines without a shared folder, one stopped, or where one process was before."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.messages import names
from tests.train.runs import GOLDEN, REPO, config, finish, log, losses, run_here, start, wait_for_step

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TWO = [*TORCHRUN, "--standalone", "--nproc-per-node=2", "-m", "llava_sp.train"]

pytestmark = pytest.mark.slow


def ended(process, folder: Path) -> str:
    try:
        assert process.wait(180) == 1, (folder / "output.txt").read_text()[-4000:]  # torchrun's, of any failure
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return (folder / "output.txt").read_text()


@pytest.mark.parametrize("zero", [None, 2])
def test_the_number_of_processes_may_change_between_attempts(tmp_path, zero):
    """2, 1, 2 processes, each stopped by SIGTERM: the losses are one process's. Five samples in steps of two: the last step
    of an epoch is filled up. DeepSpeed's optimizer state is split anew."""
    samples = json.loads((GOLDEN / "samples" / "data.json").read_text())
    (tmp_path / "data.json").write_text(json.dumps([*samples, samples[0]]))
    settings = {
        "data_path": str(tmp_path / "data.json"),
        "max_steps": 12,
        "save_steps": 50,
        "per_device_train_batch_size": 2,
    }
    whole = run_here(tmp_path / "whole", **settings)
    deepspeed = {"deepspeed": str(REPO / "configs" / "deepspeed" / f"zero{zero}.json")} if zero else {}
    path = config(tmp_path, **settings, **deepspeed)
    one = [sys.executable, "-m", "llava_sp.train"]
    reached = 0
    for command in (TWO, one):
        process = start([*command, "--config", str(path)], tmp_path)
        wait_for_step(process, tmp_path, reached + 2)
        for worker in psutil.Process(process.pid).children(recursive=True) or [psutil.Process(process.pid)]:
            if "RANK" in worker.environ() or command is one:
                worker.terminate()
        assert process.wait(180) in (1, 143), (tmp_path / "output.txt").read_text()[-4000:]
        newest = max((tmp_path / "out").glob("checkpoint-*"), key=lambda entry: int(entry.name.split("-")[1]))
        assert int(newest.name.split("-")[1]) > reached
        reached = int(newest.name.split("-")[1])
    text = finish(start([*TWO, "--config", str(path)], tmp_path), tmp_path)
    assert names(text, f"checkpoint-{reached} (step {reached})", "gives the same logits")
    assert losses(log(tmp_path / "out")) == pytest.approx(losses(whole), rel=1e-4)
    assert not list((tmp_path / "out").glob("checkpoint-*/*universal*"))


def test_zero_3_refuses_another_number_of_processes(tmp_path):
    """DeepSpeed would load other weights than it saved."""
    zero = str(REPO / "configs" / "deepspeed" / "zero3.json")
    path = config(tmp_path, max_steps=2, save_steps=1, deepspeed=zero)
    finish(start([*TWO, "--config", str(path)], tmp_path), tmp_path)
    for gone in ("finished.json", "llava_sp.json"):
        (tmp_path / "out" / gone).unlink()
    process = start([sys.executable, "-m", "llava_sp.train", "--config", str(path)], tmp_path)
    assert process.wait(180) == 2
    (said,) = (line for line in (tmp_path / "output.txt").read_text().splitlines() if line.startswith("error: "))
    assert names(said, tmp_path / "out" / "checkpoint-2", "2 processes", "stage: 3", "resume with 1")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_process_ends_the_run(tmp_path, rank):
    path = config(tmp_path, max_steps=500, save_steps=500, watchdog_minutes=0.1)
    process = start([*TWO, "--config", str(path)], tmp_path)
    wait_for_step(process, tmp_path, 2)
    workers = [w for w in psutil.Process(process.pid).children(recursive=True) if "llava_sp.train" in w.cmdline()]
    next(worker for worker in workers if worker.environ()["RANK"] == str(rank)).suspend()
    text = ended(process, tmp_path)
    said = [line for line in text.splitlines() if "error: no progress for 0.1 minutes at step" in line]
    assert len(said) == 1 and f"waiting for process {rank} (step " in said[0] and "silent: stopped or dead" in said[0]
    assert said[0].startswith("process 1: " if rank == 0 else "error: ")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_run(tmp_path, rank):
    """The other one names it, long before the watchdog's time."""
    path = config(tmp_path, max_steps=500, save_steps=500, watchdog_minutes=1)
    process = start([*TWO, "--config", str(path)], tmp_path)
    wait_for_step(process, tmp_path, 2)
    time.sleep(6)  # two beats of the watchdog
    workers = [w for w in psutil.Process(process.pid).children(recursive=True) if "llava_sp.train" in w.cmdline()]
    since = time.monotonic()
    next(worker for worker in workers if worker.environ()["RANK"] == str(rank)).kill()
    text = ended(process, tmp_path)
    assert time.monotonic() - since < 40
    (said,) = (line for line in text.splitlines() if "error: lost process" in line)
    assert names(said, f"lost process {rank}", "step", "ended or silent", "same command")
    assert said.startswith("process 1: " if rank == 0 else "error: ")


def two_nodes(folders: list[Path], paths: list[Path]) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    nodes = [
        start(
            [*TORCHRUN, "--nnodes=2", f"--node-rank={rank}", "--nproc-per-node=1", "--master-addr=127.0.0.1",
             f"--master-port={port}", "-m", "llava_sp.train", "--config", str(path)], folder
        )
        for rank, (folder, path) in enumerate(zip(folders, paths))
    ]  # fmt: skip
    return [ended(process, folder) for process, folder in zip(nodes, folders)]


@pytest.mark.parametrize("begun", [False, True])
def test_two_machines_without_a_shared_folder(tmp_path, begun):
    """One of them may even have a checkpoint, and resume, while the other begins."""
    folders = [tmp_path / "first", tmp_path / "second"]
    paths = [config(folder, max_steps=4, save_steps=1) for folder in folders]
    if begun:
        run_here(folders[1], max_steps=4, save_steps=1)
        for gone in ("finished.json", "llava_sp.json"):
            (folders[1] / "out" / gone).unlink()
    for text in two_nodes(folders, paths):
        assert names(text, "output_dir", "process 1", "process 0", "file system")
        assert text.count("Traceback") == 1  # torchrun's own
    assert not list(folders[0].glob("out/checkpoint-*"))
