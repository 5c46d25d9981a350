"""What a run logs: rates of every optimizer group, speed and memory, on the console and in OUT/log.jsonl."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from typing import Any

import psutil
import torch
from tqdm import tqdm
from transformers import TrainerCallback

from llava_sp.common.files import parse_line, write_atomic
from llava_sp.common.schema import NUMBER
from llava_sp.train.run_folder import LOG_FILE, RunFolder

GIB = 2**30
SHOWN_WAIT = 0.05  # share of the time; dataloader_num_workers is too low then, or the disk too slow


class Meter(TrainerCallback):
    """Rates, samples/s, tokens/s, waiting for data and peak memory since the last reading; time spent saving or evaluating
    is not counted. `waited`: seconds spent waiting for batches, which the trainer adds."""

    def __init__(self, samples_per_step: int):
        self.samples_per_step = samples_per_step
        self.rates: dict[str, float] = {}
        self._steps = self._tokens = 0
        self._busy = self.waited = 0.0
        self._since = time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        self._steps, self._tokens = state.global_step, state.num_input_tokens_seen
        self._busy, self.waited, self._since = 0.0, 0.0, time.perf_counter()

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        """Called before the scheduler's step: the rates of this step."""
        self.rates = {group["name"]: float(group["lr"]) for group in optimizer.param_groups}

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self._busy += now - self._since
        self._since = now

    def on_save(self, args, state, control, **kwargs):
        self._since = time.perf_counter()

    on_evaluate = on_save

    def read(self, state) -> dict[str, float]:
        """The figures since the last reading, which are then reset."""
        steps, tokens = state.global_step - self._steps, state.num_input_tokens_seen - self._tokens
        busy = max(self._busy, 1e-9)
        figures = {f"learning_rate/{name}": rate for name, rate in self.rates.items() if "no decay" not in name}
        figures["samples_per_second"] = round(steps * self.samples_per_step / busy, 3)
        if tokens:
            figures["tokens_per_second"] = round(tokens / busy, 1)
        figures["data_wait_seconds"] = round(self.waited / max(steps, 1), 4)  # of each step
        figures["data_wait_share"] = round(self.waited / busy, 3)
        figures["memory_gib"] = round(peak_memory() / GIB, 3)
        self._steps, self._tokens, self._busy, self.waited = state.global_step, state.num_input_tokens_seen, 0.0, 0.0
        return figures


def peak_memory() -> int:
    """Bytes: the most that this process had allocated on its GPU, or resident without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class JsonLines(TrainerCallback):
    """Appends every log to a file. A resumed run first drops the lines after the step that it resumes from."""

    def __init__(self, folder: RunFolder):
        self.folder, self.path = folder, folder.path / LOG_FILE

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and self.path.is_file():
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
            # a run that was stopped has logged its end, too
            kept = [line for line in lines if _step(line) <= state.global_step and '"train_loss":' not in line]
            kept = kept if state.global_step else []
            with self.folder.writing(LOG_FILE):
                write_atomic(self.path, "".join(line + "\n" for line in kept))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            self.write(state.global_step, logs or {})

    def write(self, step: int, record: dict[str, Any]) -> None:
        """Append a record. On the main process only: `RunFolder` holds the folder's lock there."""
        line = json.dumps({"step": step, "time": round(time.time(), 3), **record}) + "\n"
        with self.folder.writing(LOG_FILE), open(self.path, "a", encoding="utf-8") as file:
            file.write(line)


def _step(line: str) -> float:
    """The step of a log line; infinity for a damaged one, such as the half that a killed process may leave."""
    try:
        return parse_line(line, LOG_FILE, {"step": NUMBER})["step"]
    except ValueError:
        return float("inf")


class Console(TrainerCallback):
    """A progress bar (on a terminal) and one line per log, on the first process."""

    def __init__(self):
        self.bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            quiet = args.disable_tqdm or not sys.stderr.isatty()
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, disable=quiet, dynamic_ncols=True)

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs and ("loss" in logs or "eval_loss" in logs):
            self.bar.write(line(state.global_step, state.max_steps, logs)) if self.bar else print(
                line(state.global_step, state.max_steps, logs), flush=True
            )

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            tqdm.write(f"saved {os.path.join(args.output_dir, f'checkpoint-{state.global_step}')}")

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def line(step: int, steps: int, logs: dict[str, Any]) -> str:
    """One log as a line: `step 10/5197  loss 1.2345  ...`."""
    words = [f"step {step}/{steps}"]
    for key, name, form in (
        ("loss", "loss", ".4f"),
        ("eval_loss", "validation loss", ".4f"),
        ("grad_norm", "gradient norm", ".3f"),
    ):
        if key in logs:
            words.append(f"{name} {logs[key]:{form}}")
    rates = {key.split("/")[1]: value for key, value in logs.items() if key.startswith("learning_rate/")}
    if rates:
        words.append("rates " + " ".join(f"{name} {rate:.3g}" for name, rate in rates.items()))
    for key, name, form in (
        ("samples_per_second", "samples/s", ".2f"),
        ("tokens_per_second", "tokens/s", ",.0f"),
        ("memory_gib", "GiB", ".2f"),
    ):
        if key in logs:
            words.append(f"{logs[key]:{form}} {name}")
    if logs.get("data_wait_share", 0) > SHOWN_WAIT:
        words.append(f"waited {logs['data_wait_seconds']:.2f} s a step for data ({logs['data_wait_share']:.0%})")
    return "  ".join(words)


class EndWithLauncher(TrainerCallback):
    """Stops a process whose launcher was killed: it must not keep writing to the folder of the next attempt."""

    def __init__(self):
        self.launchers = launchers()

    def on_step_end(self, args, state, control, **kwargs):
        for launcher in self.launchers:
            if not launcher.is_running() or launcher.status() == psutil.STATUS_ZOMBIE:
                raise SystemExit("The launcher of this process ended; stopping. The same command resumes.")


def launchers() -> list[psutil.Process]:
    """The processes above this one that belong to its launcher (deepspeed has two)."""
    names = ("deepspeed", "torchrun", "torch.distributed", "accelerate")
    found = []
    for process in psutil.Process().parents()[:2]:
        with contextlib.suppress(psutil.Error):
            if any(name in word for name in names for word in process.cmdline()[:4]):
                found.append(process)
    return found
