"""Two processes (gloo, torchrun): of two machines without a shared folder, one stopped, or where one process was before."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
from pathlib import Path

import psutil
import pytest

from tests.messages import names
from tests.train.runs import config, finish, log, losses, run_here, start, wait_for_step

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


def test_one_process_resumed_by_two(tmp_path):
    """per_device_train_batch_size follows from the number of processes; a step learns from the same samples."""
    settings = {"per_device_train_batch_size": 2, "max_steps": 4, "save_steps": 2}
    whole = run_here(tmp_path, **settings)
    out = tmp_path / "out"
    for gone in ("finished.json", "llava_sp.json"):
        (out / gone).unlink()
    shutil.rmtree(out / "checkpoint-4")
    text = finish(start([*TWO, "--config", str(tmp_path / "run.yaml")], tmp_path), tmp_path)
    assert "1 per process x 2 processes x 1 accumulated" in text and "checkpoint-2 (step 2)" in text
    assert losses(log(out)) == pytest.approx(losses(whole), rel=1e-4)


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
