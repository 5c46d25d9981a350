"""Runs of the recorded tiny model for the tests: in this process, or in processes of their own under a launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from llava_sp.train.run import train

REPO = Path(__file__).parents[2]
PATIENCE = 1200  # seconds; the first DeepSpeed run of an environment compiles an extension, minutes on two cores
GOLDEN = REPO / "tests" / "golden"
LAUNCHER_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_DEEPSPEED",
)  # fmt: skip
TINY = {
    "language_model": str(GOLDEN / "base"),
    "vision_tower": str(GOLDEN / "clip"),
    "spatial_width": 5,
    "data_path": str(GOLDEN / "samples" / "data.json"),
    "image_folder": str(GOLDEN / "samples" / "images"),
    "projector_checkpoint": "scratch",
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "learning_rate": 2e-3,
    "bf16": False,
    "deepspeed": None,
    "dataloader_num_workers": 0,
    "per_device_train_batch_size": 1,
    "global_batch_size": 2,
    "group_by_modality_length": False,
    "packing": False,
    "gradient_checkpointing": False,
    "max_steps": 6,
    "save_steps": 1,
}


def config(folder: Path, stage: str = "finetune_lora", **settings) -> Path:
    """A YAML file for a tiny run that writes to folder/out."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = {"base": str(REPO / "configs" / f"{stage}.yaml"), **TINY, "output_dir": str(folder / "out"), **settings}
    if stage == "pretrain":
        keys["projector_checkpoint"] = settings.get("projector_checkpoint")
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(keys))
    return path


def run_here(folder: Path, stage: str = "finetune_lora", words: list[str] = (), **settings) -> list[dict]:
    """The run in this process; its log."""
    train(config(folder, stage, **settings), list(words))
    return log(folder / "out")


def log(out: Path) -> list[dict]:
    file = out / "log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def losses(records: list[dict]) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def environment() -> dict[str, str]:
    clean = {key: value for key, value in os.environ.items() if key not in LAUNCHER_VARIABLES}
    return {
        **clean,
        "PYTHONPATH": str(REPO),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def start(command: list[str], folder: Path) -> subprocess.Popen:
    """A command in a session of its own, its output in folder/output.txt."""
    with open(folder / "output.txt", "a") as output:
        return subprocess.Popen(
            command, cwd=folder, env=environment(), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )


def finish(process: subprocess.Popen, folder: Path, timeout: float = PATIENCE) -> str:
    """Wait for a command; its output. Fails when it fails."""
    try:
        code = process.wait(timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    text = (folder / "output.txt").read_text()
    assert code == 0, text[-4000:]
    return text


def wait_for_step(process: subprocess.Popen, folder: Path, step: int, timeout: float = PATIENCE) -> None:
    """Until the log has reached a step."""
    end = time.time() + timeout
    while time.time() < end:
        if any(record["step"] >= step for record in log(folder / "out")):
            return
        assert process.poll() is None, (folder / "output.txt").read_text()[-4000:]
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached in {timeout} s")
