"""benchmarks/gpu.sh: all of it on a CPU, so that it works on the day that there is a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.messages import names

REPO = Path(__file__).parents[1]
PARTS = (
    "tests",
    "stage_1",
    "stage_2_packed",
    "stage_2_padded",
    "steps",
    "generation",
    "evaluation",
    "projector",
    "merging",
)


def gpu(*words: object) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", str(REPO / "benchmarks/gpu.sh"), *map(str, words)]
    return subprocess.run(command, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False)


def test_the_parts_are_listed_and_others_refused():
    assert names(gpu("--list").stdout, *PARTS)
    wrong = gpu("--part", "speed", "--device", "cpu")
    assert wrong.returncode == 2 and names(wrong.stderr, "--part speed", *PARTS)


@pytest.mark.slow
def test_all_parts_on_a_cpu(tmp_path):
    words = ("--size", "tiny", "--device", "cpu", "--work", tmp_path / "work", "--results", tmp_path / "results")
    done = gpu(*words)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert names(done.stdout, *PARTS, "lora-packed", "lora-padded", "pretrain")
    steps = json.loads((tmp_path / "results/train_step_tiny_cpu.json").read_text())["rows"]
    first = steps[0]
    for row in steps:
        assert row["gradient_norm"] == pytest.approx(first["gradient_norm"], rel=1e-4)
        assert row["way"] == "trl" or row["loss"] == pytest.approx(first["loss"], rel=1e-6)
    assert "== part" not in gpu(*words).stdout  # what is done is not run again
