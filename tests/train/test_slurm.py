"""The SLURM scripts, with `srun` and `scontrol` of this file on PATH: a job that is warned saves, is requeued, and goes on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.messages import names
from tests.train.runs import REPO, config, environment, log

SCRIPTS = sorted((REPO / "scripts" / "slurm").iterdir())
TASKS = 2

SRUN = """#!{python}
import os, pathlib, signal, subprocess, sys, time
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
tasks = int(os.environ["TASKS"])
shared = {{"SLURM_NTASKS": str(tasks), "SLURM_STEP_TASKS_PER_NODE": f"{{tasks}}(x1)"}}
running = [
    subprocess.Popen(words, env={{**os.environ, **shared, "SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)}})
    for n in range(tasks)
]
warn = os.environ.get("WARN")
log = pathlib.Path(os.environ["OUT"]) / "log.jsonl"
def lines():
    return len(log.read_text().splitlines()) if log.is_file() else 0
before = lines()
while warn and lines() < before + 2:
    assert running[0].poll() is None
    time.sleep(0.02)
for task in running if warn else ():
    task.send_signal(getattr(signal, warn))
sys.exit(max(status if status >= 0 else 128 - status for status in [task.wait() for task in running]))
"""
SCONTROL = """#!/bin/sh
case "$1" in
  show) echo 127.0.0.1; echo other ;;
  requeue) echo "$2" >>"$REQUEUED" ;;
esac
"""


@pytest.fixture
def cluster(tmp_path) -> dict[str, str]:
    """The environment of a job."""
    (tmp_path / "bin").mkdir()
    programs = {"srun": SRUN.format(python=sys.executable), "scontrol": SCONTROL}
    programs["python3"] = f'#!/bin/sh\nexec {sys.executable} "$@"\n'
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    own = {"SLURM_SUBMIT_DIR": REPO, "SLURM_JOB_ID": os.getpid(), "SLURM_JOB_NODELIST": "first,other"}
    own |= {"OUT": tmp_path / "out", "REQUEUED": tmp_path / "requeued", "VIRTUAL_ENV": "none"}
    clean = environment()
    return {**clean, **{key: str(value) for key, value in own.items()}, "PATH": f"{tmp_path}/bin:{clean['PATH']}"}


def job(cluster: dict[str, str], path: Path, tasks: int, warn: str = "") -> subprocess.CompletedProcess:
    script = REPO / "scripts" / "slurm" / "finetune_lora.sbatch"
    command = ["bash", str(script), "--config", str(path)]
    variables = {**cluster, "TASKS": str(tasks), "WARN": warn}
    return subprocess.run(
        command, env=variables, cwd=path.parent, capture_output=True, text=True, timeout=600, check=False
    )


def requeued(cluster: dict[str, str]) -> list[str]:
    file = Path(cluster["REQUEUED"])
    return file.read_text().split() if file.is_file() else []


def requeues_until_finished(cluster: dict[str, str], tmp_path: Path, tasks: int, steps: int) -> None:
    path = config(tmp_path, max_steps=steps, save_steps=100)
    for number, warn in enumerate(("USR1", "TERM"), 1):  # as long as there is something to go on with
        before = len(log(tmp_path / "out"))
        ended = job(cluster, path, tasks, f"SIG{warn}")
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert requeued(cluster) == [cluster["SLURM_JOB_ID"]] * number
        assert names(ended.stdout, 138 if warn == "USR1" else 143, "requeued") and len(log(tmp_path / "out")) > before
    ended = job(cluster, path, tasks)
    assert ended.returncode == 0 and len(requeued(cluster)) == 2, ended.stdout + ended.stderr
    assert names(ended.stderr, "Resuming from") and (tmp_path / "out" / "finished.json").is_file()
    assert [line["step"] for line in log(tmp_path / "out") if "loss" in line] == list(range(1, steps + 1))


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [1, TASKS])
def test_a_warned_job_is_requeued_and_goes_on(cluster, tmp_path, tasks):
    requeues_until_finished(cluster, tmp_path, tasks, steps=40)


def test_a_job_that_fails_is_not_requeued(cluster, tmp_path):
    ended = job(cluster, config(tmp_path, learning_rate="much"), 1)
    assert ended.returncode == 2 and not requeued(cluster) and names(ended.stderr, "learning_rate", "much")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    if script.suffix == ".sbatch":
        options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", text, re.MULTILINE))
        assert options["signal"].startswith("USR1@") and "requeue" in options and options["open-mode"] == "append"
        assert (REPO / re.findall(r"run\.sh\" (\S+)", text)[0]).is_file()
        assert options["gpus-per-node"] == options["ntasks-per-node"]
