"""A DeepSpeed checkpoint for another number of processes than wrote it, by DeepSpeed's own universal checkpoint.

DeepSpeed splits the optimizer's state among the processes. Its converter joins the shares into one file per parameter and
state, from which any number of processes loads. The copy lies in the checkpoint (4 bytes for each trained parameter and
state: 3 x 4 with Adam) and is removed when training begins.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from accelerate import Accelerator
from transformers import TrainerCallback

from llava_sp.common.files import write_atomic
from llava_sp.common.processes import FailedHere
from llava_sp.config.arguments import TrainArguments

_COPY = ".universal"
_LATEST, _LATEST_COPY = "latest", "latest_universal"  # files that name the folder to load: DeepSpeed's names
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def make_universal(checkpoint: Path, args: TrainArguments, processes: int) -> None:
    """Write the copy, on the main process.

    Raises:
        ValueError: ZeRO-3, of whose weights DeepSpeed loads others than it saved (tried: losses differ by 9 %).
        FailedHere: DeepSpeed failed; with its last words.
    """
    if args.hf_deepspeed_config.is_zero3():
        raise ValueError(
            f"{checkpoint} was written by {processes} processes under ZeRO-3 (deepspeed: zero_optimization: stage: 3), which "
            f"cannot resume with {args.world_size}: resume with {processes}, or use ZeRO-2 from the start"
        )
    remove_universal(checkpoint)
    part = checkpoint / f"{_COPY}.part"
    shares = checkpoint / (checkpoint / _LATEST).read_text(encoding="utf-8").strip()
    command = [
        sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state", "--num_extract_workers=1",
        "--num_merge_workers=1", f"--input_folder={shares}", f"--output_folder={part}",
    ]  # fmt: skip
    alone = {key: value for key, value in os.environ.items() if key not in _LAUNCHER}
    done = subprocess.run(command, env=alone, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        shutil.rmtree(part, ignore_errors=True)
        raise FailedHere(
            f"{checkpoint} could not be prepared for another number of processes by DeepSpeed: {said}. Make room (it needs "
            "a copy of the optimizer's state), or resume with as many processes as before"
        )
    os.rename(part, checkpoint / _COPY)
    write_atomic(checkpoint / _LATEST_COPY, _COPY)


def remove_universal(checkpoint: Path) -> None:
    (checkpoint / _LATEST_COPY).unlink(missing_ok=True)
    for name in (_COPY, f"{_COPY}.part"):
        shutil.rmtree(checkpoint / name, ignore_errors=True)


class LoadUniversal(TrainerCallback):
    """Makes DeepSpeed load the copy instead of the shares, once; to be made before the trainer."""

    def __init__(self, args: TrainArguments, checkpoint: Path):
        self.checkpoint = checkpoint
        settings = args.hf_deepspeed_config.config
        settings["checkpoint"] = {**settings.get("checkpoint", {}), "load_universal": True}

    def on_train_begin(self, args, state, control, **kwargs):
        Accelerator().wait_for_everyone()  # all have read it
        if state.is_world_process_zero:
            remove_universal(self.checkpoint)
