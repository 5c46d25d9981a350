"""Two processes (gloo) plainly and under ZeRO-2 and ZeRO-3 train as one does at the same global batch; the scripts and launchers."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.train.conftest import no_launcher
from tests.train.runs import REPO, config, environment, finish, log, losses, run_here, start, wait_for_step

SCRIPTS = [REPO / "scripts" / name for name in ("pretrain.sh", "finetune_lora.sh")]
DEEPSPEED = {2: str(REPO / "configs/deepspeed/zero2.json"), 3: str(REPO / "configs/deepspeed/zero3.json")}

LAUNCHERS = {
    "deepspeed": ["deepspeed", "--num_gpus", "2", str(REPO / "scripts" / "finetune_lora.sh")],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "llava_sp.train"],
    "accelerate": [
        sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "--num_machines=1",
        "--mixed_precision=no", "--dynamo_backend=no", "-m", "llava_sp.train",
    ],
}  # fmt: skip
# In every epoch of the four samples (one of them is text only) one step has a process with text and one with an image.
SETTINGS = {"max_steps": 4, "save_steps": 2, "gradient_checkpointing": True}


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> list[dict]:
    """The log of one process."""
    with no_launcher():
        return run_here(tmp_path_factory.mktemp("one"), **SETTINGS)


def compare(two: list[dict], one: list[dict]) -> None:
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    norms = [[record["grad_norm"] for record in records if "grad_norm" in record] for records in (two, one)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


@pytest.mark.parametrize(
    ("stage", "launcher"),
    [
        pytest.param(0, "torchrun", marks=pytest.mark.slow),
        (2, "deepspeed"),
        (3, "torchrun"),
        pytest.param(3, "deepspeed", marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_as_one(one, tmp_path, stage, launcher):
    path = config(tmp_path, deepspeed=DEEPSPEED.get(stage), **SETTINGS)
    text = finish(start([*LAUNCHERS[launcher], "--config", str(path)], tmp_path), tmp_path)
    assert "1 per process x 2 processes x 1 accumulated" in text and "gives the same logits" in text
    compare(log(tmp_path / "out"), one)
    assert (tmp_path / "out" / "finished.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("stage", DEEPSPEED)
def test_resumes_after_sigkill_of_one_of_two(one, tmp_path, stage):
    """Under DeepSpeed, with a process killed while the run is between two checkpoints."""
    command = [*LAUNCHERS["deepspeed"], "--config", str(config(tmp_path, deepspeed=DEEPSPEED[stage], **SETTINGS))]
    process = start(command, tmp_path)
    wait_for_step(process, tmp_path, 3)
    workers = psutil.Process(process.pid).children(recursive=True)
    next(worker for worker in workers if "--local_rank=1" in worker.cmdline()).kill()
    assert process.wait(120) != 0
    text = finish(start(command, tmp_path), tmp_path)
    assert "Resuming from" in text and "gives the same logits" in text
    compare(log(tmp_path / "out"), one)


@pytest.mark.slow
def test_resumes_after_sigkill_of_the_launcher(one, tmp_path):
    """Its processes stop by themselves; the next attempt waits for them and goes on from what they saved."""
    command = [*LAUNCHERS["deepspeed"], "--config", str(config(tmp_path, deepspeed=DEEPSPEED[2], **SETTINGS))]
    process = start(command, tmp_path)
    wait_for_step(process, tmp_path, 1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    text = finish(start(command, tmp_path), tmp_path)
    assert "The launcher of this process ended" in text and text.count("gives the same logits") == 1
    compare(log(tmp_path / "out"), one)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "stage"), [([sys.executable, "-m", "llava_sp.train"], 2), (LAUNCHERS["accelerate"], 0)]
)
def test_other_ways_to_start_one_process(one, tmp_path, command, stage):
    """DeepSpeed without its launcher; accelerate's launcher, which starts one process on a CPU."""
    path = config(tmp_path, deepspeed=DEEPSPEED.get(stage), **SETTINGS)
    finish(start([*command, "--config", str(path)], tmp_path), tmp_path)
    compare(log(tmp_path / "out"), one)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash_and_python(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    ast.parse(script.read_text())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_without_data_say_what_is_missing(script, tmp_path):
    """From another directory, without deepspeed on the path: bash starts Python on the same file."""
    (tmp_path / "bin").mkdir()
    for name in ("bash", "dirname", "env"):
        (tmp_path / "bin" / name).symlink_to(Path("/usr/bin") / name)
    (tmp_path / "bin" / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "bin" / "python3").chmod(0o755)
    run = subprocess.run(
        ["bash", str(script)],
        cwd=tmp_path,
        env={**environment(), "PATH": str(tmp_path / "bin"), "VIRTUAL_ENV": "none"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2, run.stderr
    assert f"data_path = {tmp_path}/playground/data/" in run.stderr and "scripts/quickstart.sh" in run.stderr
    assert ("projector_checkpoint" in run.stderr) == ("finetune" in script.name)
