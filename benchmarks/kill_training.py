"""Kills training runs at random moments, lets the same command finish them, and compares with an undisturbed run.

    python benchmarks/kill_training.py                       20 kills of each way to train
    python benchmarks/kill_training.py --ways plain --kills 100 --minutes 10

Each run (eight steps of the recorded tiny model, LoRA dropout 0.1, a checkpoint and a log line at every step) is killed
`--per-run` times with SIGKILL and then finishes. Every other kill waits for a save and comes within it; of two processes,
one is killed and the other a moment later, or both at once. Equal means: the same final weights, and the same losses and
gradient norms in log.jsonl, bit for bit. Attempts are forked from one process that has imported everything, so that a
kill costs seconds. Results add up in the JSON file: run it in pieces, until `--kills` of each way are reached.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")

import torch
from frame import machine

import llava_sp.train.run
from llava_sp.train.__main__ import main as train

REPO = Path(__file__).resolve().parents[1]
GOLDEN = REPO / "tests" / "golden"
RUN = {
    "language_model": GOLDEN / "base",
    "vision_tower": GOLDEN / "clip",
    "spatial_width": 5,
    "data_path": GOLDEN / "samples" / "data.json",
    "image_folder": GOLDEN / "samples" / "images",
    "projector_checkpoint": "scratch",
    "lora_r": 8,
    "lora_dropout": 0.1,
    "learning_rate": 2e-3,
    "bf16": "false",
    "dataloader_num_workers": 0,
    "per_device_train_batch_size": 1,
    "global_batch_size": 2,
    "group_by_modality_length": "false",
    "gradient_checkpointing": "false",
    "packing": "false",
    "max_steps": 8,
    "save_steps": 1,
}
# way -> (processes, keys)
WAYS = {
    "plain": (1, {"deepspeed": "null"}),
    "two processes": (2, {"deepspeed": "null"}),
    "packed": (1, {"deepspeed": "null", "packing": "true", "pack_length": 1024}),
    "zero2": (2, {"deepspeed": REPO / "configs" / "deepspeed" / "zero2.json"}),
}
PATIENCE = 300.0  # seconds for one attempt


class Attempt:
    """The processes of one start of the command, forked from this one."""

    def __init__(self, processes: int, words: list[str], output: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        launcher = (
            {} if processes == 1 else {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        )
        self.status: dict[int, int | None] = {}
        for rank in range(processes):
            pid = os.fork()
            if pid == 0:
                self._become(
                    words, output, launcher | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if launcher else {})
                )
            self.status[pid] = None

    def _become(self, words: list[str], output: Path, variables: dict[str, str]) -> None:
        """In the child: the command; never returns."""
        status = 70
        try:
            stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(stream, 1)
            os.dup2(stream, 2)
            os.environ.update(variables)
            status = train(words)
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def running(self) -> list[int]:
        for pid, status in self.status.items():
            if status is None:
                ended, code = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.status[pid] = os.waitstatus_to_exitcode(code)
        return [pid for pid, status in self.status.items() if status is None]

    def kill(self, pids: list[int]) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        while set(pids) & set(self.running()):
            time.sleep(0.005)

    def finish(self, limit: float = PATIENCE) -> bool:
        """Whether all processes ended well."""
        end = time.monotonic() + limit
        while self.running() and time.monotonic() < end:
            if any(self.status.values()):  # one has failed: a launcher would end the others
                time.sleep(2.0)
                break
            time.sleep(0.02)
        self.kill(self.running())
        return not any(self.status.values())


def words(folder: Path, keys: dict) -> list[str]:
    given = RUN | keys | {"output_dir": folder}
    base = REPO / "configs" / "finetune_lora.yaml"
    return ["--config", str(base), *(word for key, value in given.items() for word in (f"--{key}", str(value)))]


def outcome(folder: Path) -> dict:
    """What must be equal: hashes of the weights, losses and norms."""
    files = ("projector.safetensors", "lora/adapter_model.safetensors")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {
        "finished": (folder / "finished.json").is_file(),
        "weights": {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files},
        "log": [[line["step"], line["loss"], line["grad_norm"]] for line in lines if "loss" in line],
    }


def clear_locks() -> None:
    """A process that is killed while torch loads an extension leaves a lock that later ones would wait for."""
    for lock in Path(os.environ["TORCH_EXTENSIONS_DIR"]).glob("*/lock"):
        lock.unlink()


def moment(attempt: Attempt, folder: Path, seconds: float, within_save: bool, chance: random.Random) -> bool:
    """Waits for the moment of a kill; False if the run ended before. `seconds`: of an undisturbed run."""
    end = time.monotonic() + (chance.random() * seconds if not within_save else PATIENCE)
    skip = chance.randrange(4)  # saves
    while time.monotonic() < end:
        if not attempt.running():
            return False
        if within_save and (folder / ".saving").is_dir():
            if skip == 0:
                time.sleep(chance.random() * 0.12)
                return True
            skip -= 1
            while (folder / ".saving").is_dir() and attempt.running():
                time.sleep(0.001)
        time.sleep(0.001)
    return True


def disturbed(way: str, per_run: int, seconds: float, folder: Path, chance: random.Random) -> tuple[int, int, str]:
    """(kills, of them within a save, problem) of one run; at the end it has finished, or there is a problem."""
    processes, keys = WAYS[way]
    output, kills, within = folder / "output.txt", 0, 0
    run = folder / "run"
    for number in range(per_run):
        attempt = Attempt(processes, words(run, keys), output)
        if not moment(attempt, run, seconds, bool(number % 2 == chance.randrange(2)), chance):
            if not attempt.finish():
                return kills, within, "ended by itself"
            break
        alive = attempt.running()
        attempt.kill([chance.choice(alive)] if chance.random() < 0.5 else alive)
        kills, within = kills + 1, within + (run / ".saving").is_dir()
        if attempt.running():
            time.sleep(chance.random())
            attempt.kill(attempt.running())
        clear_locks()
    if not Attempt(processes, words(run, keys), output).finish():
        return kills, within, "did not go on"
    return kills, within, ""


def measure(way: str, tally: dict, arguments: argparse.Namespace, end: float, folder: Path) -> None:
    """Adds kills to `tally` until there are enough, or the time is over."""
    processes, keys = WAYS[way]
    for name in ("first", "undisturbed"):  # DeepSpeed may compile in the first
        start = time.monotonic()
        if not Attempt(processes, words(folder / name, keys), folder / "output.txt").finish(5 * PATIENCE):
            raise SystemExit((folder / "output.txt").read_text()[-3000:])
    seconds, right = time.monotonic() - start, outcome(folder / "undisturbed")
    assert right == outcome(folder / "first"), "undisturbed runs differ"
    while tally["kills"] < arguments.kills and time.monotonic() < end:
        seed = arguments.seed + tally["runs"]
        place = folder / str(seed)
        place.mkdir()
        kills, within, problem = disturbed(way, arguments.per_run, seconds, place, random.Random(f"{way} {seed}"))
        if not problem:
            found = outcome(place / "run")
            problem = ", ".join(key for key in right if found[key] != right[key])
        tally["runs"] += 1
        tally["kills"] += kills
        tally["within_a_save"] += within
        tally["equal_runs"] += not problem
        tally["kills_of_equal_runs"] += 0 if problem else kills
        if problem:
            tally["unequal"].append(
                {"seed": seed, "problem": problem, "output": (place / "output.txt").read_text()[-1500:]}
            )
        show(way, tally)
        arguments.output.write_text(json.dumps(arguments.result, indent=1) + "\n")
        shutil.rmtree(place)


def show(way: str, tally: dict) -> None:
    print(
        f"{way:15} {tally['kills']:6d} {tally['within_a_save']:8d} {tally['runs']:6d} "
        f"{tally['kills_of_equal_runs']:6d} of {tally['kills']}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--kills", type=int, default=20, help="of each way, those in the JSON file included")
    parser.add_argument("--per-run", type=int, default=3, help="kills of a run before it may finish")
    parser.add_argument("--minutes", type=float, default=60.0, help="for each way; the next call goes on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "kill_training.json")
    arguments = parser.parse_args()
    extensions = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    arguments.result = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {"ways": {}}
    arguments.result |= {"machine": machine("cpu"), "per_run": arguments.per_run, "steps": RUN["max_steps"]}
    print(f"{'way':15} {'kills':>6} {'in saves':>8} {'runs':>6} equal, bit for bit")
    wrong = 0
    for way in arguments.ways:
        empty = {"kills": 0, "within_a_save": 0, "runs": 0, "equal_runs": 0, "kills_of_equal_runs": 0, "unequal": []}
        tally = arguments.result["ways"].setdefault(way, empty)
        with tempfile.TemporaryDirectory() as folder:
            own = Path(tempfile.gettempdir()) / "kill_training_extensions"  # a killed process leaves locks there
            if extensions.is_dir() and not own.is_dir():
                shutil.copytree(extensions, own)
            os.environ["TORCH_EXTENSIONS_DIR"] = str(next(own.glob("py*"), own))
            clear_locks()
            measure(way, tally, arguments, time.monotonic() + 60 * arguments.minutes, Path(folder))
        wrong += tally["runs"] - tally["equal_runs"]
    sys.exit(bool(wrong))


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert llava_sp.train.run  # imported once, for all attempts
    main()
