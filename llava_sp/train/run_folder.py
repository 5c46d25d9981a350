"""The folder of a run: which run it holds, where it can resume from, and a lock so that only one process writes to it.

OUT/run.yaml          settings and provenance; can be given to --config. Each checkpoint has a copy
OUT/log.jsonl         one line per log
OUT/checkpoint-N/     complete by construction: written in OUT/.saving, then renamed. See `intact` for damage done later
OUT/finished.json     the run is over; beside it the trained model itself (llava_sp.json, projector.safetensors, ...)
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from transformers.trainer_callback import TrainerState

from llava_sp.checkpoints.reading.formats import recognise
from llava_sp.checkpoints.reading.manifest import describe
from llava_sp.common.files import lock, write_atomic
from llava_sp.common.folders import sync, sync_folder
from llava_sp.common.processes import FailedHere, Processes
from llava_sp.config.arguments import RESERVED_KEY
from llava_sp.config.files import read_yaml
from llava_sp.train.intact import check_format, damage, write_file_list

logger = logging.getLogger(__name__)

RUN_FILE = "run.yaml"
FINISHED_FILE = "finished.json"
LOG_FILE = "log.jsonl"
STAGING = ".saving"
STATE_FILE = "trainer_state.json"
TOKEN_FILE = ".token"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
REPLACED = re.compile(r"\.(checkpoint-\d+)\.replaced")
WRITE_ERRORS = (OSError, SafetensorError)
# The schema of run.yaml besides settings, which are only compared. Provenance is last: a file without it is truncated.
RECORDED = {RESERVED_KEY: {"processes?": int, "samples_per_step?": int}}
OTHER_RUN = "Give the same settings to resume that run, or choose another output_dir."

# Keys that change output or speed, but not what is learned.
HARMLESS = (
    "output_dir", "report_to", "run_name", "project", "disable_tqdm", "use_cpu", "tf32", "data_source",
    "attn_implementation", "local_rank", "include_num_input_tokens_seen", "skip_memory_metrics", "push_to_hub",
    "on_bad_sample", "precompute_features", "use_liger_kernel", "on_non_finite", "longest_step_first", "check_base", "check_data", "data_manifest", "watchdog_minutes", "resume_from_checkpoint", "do_train", "do_eval", "do_predict", "remove_unused_columns", "torch_empty_cache_steps",
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing",
    "activation_checkpointing_kwargs", "per_device_eval_batch_size", "prediction_loss_only",
    "per_device_train_batch_size", "gradient_accumulation_steps",  # samples_per_step is compared
    "pack_length", "pad_to_multiple_of",  # a step has the same samples
)  # fmt: skip
HARMLESS_PREFIXES = (
    "logging_", "log_", "save_", "eval_", "hub_", "ddp_", "trackio_", "dataloader_num_", "dataloader_pin_",
    "dataloader_prefetch_", "dataloader_persistent_", "dataloader_multiprocessing_",
)  # fmt: skip


class RunFolder:
    """One run's output directory. Only the first process writes; reading is for all."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._lock: Any = None
        self._record: str | None = None  # content of run.yaml

    def conflicts(self, settings: Mapping[str, Any], samples_per_step: int) -> Iterator[str]:
        """Why a run with these settings cannot write here: the folder holds another run, or files not from a run.

        A run that left neither checkpoint nor model (its data could not be read, for example) does not own the folder.
        """
        file, checkpoint = self._record_file(), self.newest_checkpoint()
        weights = [
            e.name for e in self._entries() if e.suffix in (".safetensors", ".bin") or CHECKPOINT.fullmatch(e.name)
        ]
        if weights and not file.is_file():
            yield f"output_dir = {self.path} holds {', '.join(sorted(weights))} but no {RUN_FILE}: choose another folder"
        finished = (self.path / FINISHED_FILE).is_file()
        if not file.is_file() or not (finished or checkpoint):
            return
        if finished and not checkpoint and (problem := self._without_model()):
            yield f"{problem}, and there is no checkpoint to resume from. Restore it, or choose another output_dir"
        recorded, now = read_yaml(file, RECORDED), dict(settings)
        facts = recorded.pop(RESERVED_KEY, {})
        now["samples per step"] = samples_per_step
        recorded["samples per step"] = facts.get("samples_per_step", samples_per_step)
        lines = differences(recorded, now)
        if lines:
            yield "\n".join([f"output_dir = {self.path} belongs to another run, which differs in:", *lines, OTHER_RUN])

    def _entries(self) -> list[Path]:
        return list(self.path.iterdir()) if self.path.is_dir() else []

    def _record_file(self) -> Path:
        """The file that identifies the run: the copy in a checkpoint, unless it is damaged, else run.yaml."""
        copies = (checkpoint / RUN_FILE for checkpoint in self._checkpoints() if not damage(checkpoint, RUN_FILE))
        return next(copies, self.path / RUN_FILE)

    @property
    def is_finished(self) -> bool:
        """Whether the run is finished and its model valid."""
        if not (self.path / FINISHED_FILE).is_file():
            return False
        problem = self._without_model()
        if problem:
            logger.warning("%s; resuming from %s.", problem, self.newest_checkpoint())
        return not problem

    def _without_model(self) -> str | None:
        """Why a folder with finished.json has no valid model, or None if it has."""
        try:
            describe(self.path)
            recognise(self.path)
        except (ValueError, OSError) as error:
            return f"{self.path / FINISHED_FILE} marks the run as finished, but its model is invalid: {error}"
        return None

    def _checkpoints(self) -> list[Path]:
        """Newest first."""
        found = [(int(m.group(1)), entry) for entry in self._entries() if (m := CHECKPOINT.fullmatch(entry.name))]
        return [entry for _, entry in sorted(found, reverse=True)]

    def newest_checkpoint(self) -> Path | None:
        return next(iter(self._checkpoints()), None)

    def recorded(self) -> tuple[dict[str, Any], int | None]:
        """The settings of the run, and the samples of a step. Raises `ValueError` if the folder holds no run."""
        settings = read_yaml(self._record_file(), RECORDED)
        return settings, settings.pop(RESERVED_KEY, {}).get("samples_per_step")

    def checkpoint_before(self, step: int) -> Path | None:
        """The newest checkpoint that `step` (from 1) follows. Raises `ValueError` if it is damaged or of another version."""
        before = (entry for entry in self._checkpoints() if int(entry.name.split("-")[1]) < step)
        newest = next(before, None)
        if newest is not None:
            check_format(newest)
            if problem := damage(newest):
                raise ValueError(f"{newest} is damaged: {problem}. Move it away to use the one before")
        return newest

    def intact_checkpoint(self) -> Path | None:
        """The newest checkpoint whose files are as they were written, or None if there is no checkpoint at all.

        Logs the damage of newer ones and renames them: they must not count when the oldest checkpoints are deleted.
        Raises `ValueError` if none is intact, or one that it meets was written by another version.
        """
        damaged: dict[Path, str] = {}
        intact = None
        for checkpoint in self._checkpoints():
            check_format(checkpoint)
            problem = damage(checkpoint)
            if problem is None:
                intact = checkpoint
                break
            damaged[checkpoint] = problem
        problems = f"{'; '.join(damaged.values())}. Restore one, or choose another output_dir to begin again"
        if damaged and not intact:
            raise ValueError(f"output_dir = {self.path} has no intact checkpoint: {problems}")
        for entry, problem in damaged.items():
            aside = entry.with_suffix(".damaged")
            logger.warning("%s is damaged: %s. Renamed to %s and not used.", entry, problem, aside.name)
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(entry, aside)
        return intact

    def join(
        self, here: Processes, settings: Mapping[str, Any], provenance: Mapping[str, Any], patience: float = 60.0
    ) -> Path | None:
        """Open the folder on the main process; returns the checkpoint to resume from on all.

        Raises:
            ValueError: as `open` and `intact_checkpoint`; or, on all, if some do not see the main process's file within
                `patience` seconds (network file systems may show new files late).
        """
        token, name = secrets.token_hex(8), None
        with here.together():
            if here.is_main:
                self.open(settings, provenance, patience)
                with self.writing(TOKEN_FILE):
                    write_atomic(self.path / TOKEN_FILE, token)
                    checkpoint = self.intact_checkpoint()
                name = checkpoint and checkpoint.name
        token, name = here.from_main((token, name))
        blind = ", ".join(str(rank) for rank, sees in enumerate(here.gather(self._sees(token, patience))) if not sees)
        another = f"is another folder for process {blind} than for process 0: all machines must share its file system"
        if blind:
            raise ValueError(f"output_dir = {self.path} {another}")
        return self.path / name if name else None

    def _sees(self, token: str, patience: float) -> bool:
        end = time.monotonic() + patience
        while True:
            with contextlib.suppress(OSError):
                if (self.path / TOKEN_FILE).read_text() == token:
                    return True
            if time.monotonic() > end:
                return False
            time.sleep(0.1)

    def open(self, settings: Mapping[str, Any], provenance: Mapping[str, Any], patience: float = 60.0) -> None:
        """Lock the folder for this process, remove interrupted saves, and write run.yaml.

        Waits `patience` seconds for another process to end. Raises `ValueError` if it does not, or if nothing
        can be written here.
        """
        with self.writing("the folder of the run"):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "a+")  # noqa: SIM115  (held until close)
            self._wait_for_lock(patience)
        with self.writing(RUN_FILE):
            self._lock.truncate(0)
            self._lock.write(str(os.getpid()))
            self._lock.flush()
            self._clear_interrupted_saves()
            self._write_record(settings, provenance)

    def _write_record(self, settings: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
        """Write run.yaml as in the checkpoints, if there are any; else a new one."""
        file = self._record_file()
        if self.newest_checkpoint() and file.is_file():
            self._record = file.read_text(encoding="utf-8")
        else:
            parts = (dict(settings), {RESERVED_KEY: dict(provenance)})
            self._record = "".join(yaml.safe_dump(part, sort_keys=False, allow_unicode=True) for part in parts)
        own = self.path / RUN_FILE
        if not own.is_file() or own.read_bytes() != self._record.encode():
            write_atomic(own, self._record)

    def close(self) -> None:
        """Release the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _wait_for_lock(self, patience: float) -> None:
        end = time.monotonic() + patience
        while not lock(self._lock, self.path):
            self._lock.seek(0)
            holder = self._lock.read().strip() or "?"
            if time.monotonic() > end:
                raise ValueError(f"output_dir = {self.path} is in use by process {holder}: wait for it, or end it")
            logger.info("%s is in use by process %s; waiting for it to end.", self.path, holder)
            time.sleep(min(5.0, patience))

    def _clear_interrupted_saves(self) -> None:
        for entry in self._entries():
            match = REPLACED.fullmatch(entry.name)
            if match and not (self.path / match.group(1)).exists():  # killed between the two renames of publish
                os.rename(entry, self.path / match.group(1))
            elif match:
                shutil.rmtree(entry)
        shutil.rmtree(self.path / STAGING, ignore_errors=True)

    @contextlib.contextmanager
    def writing(self, name: str, errors: tuple[type[Exception], ...] = WRITE_ERRORS) -> Iterator[None]:
        """Around writing `name`: a full disk, missing rights and the like become a `FailedHere` naming what is left."""
        try:
            yield
        except errors as error:
            raise FailedHere(f"{name} could not be written to {self.path} {self._what_is_left(error)}") from error

    def _what_is_left(self, error: Exception) -> str:
        there = next(place for place in (self.path, *self.path.absolute().parents) if place.exists())
        return (
            f"({shutil.disk_usage(there).free / 2**30:.2f} GiB free there): {error}\nThe newest complete checkpoint is "
            f"{self.newest_checkpoint() or 'none yet'}; only the steps since then are lost. "
            "Make room (save_total_limit, output_dir) and run the same command again."
        )

    def publish(self, staged: Path) -> Path:
        """Give a completely written checkpoint its name; it is synced before it is renamed.

        One of that name (written by an earlier attempt at the same step) is deleted only when the new one is in place.
        """
        final, aside = self.path / staged.name, self.path / f".{staged.name}.replaced"
        if self._record is not None:
            write_atomic(staged / RUN_FILE, self._record)
        write_file_list(staged)
        sync(staged)
        if final.exists():
            os.rename(final, aside)
        os.rename(staged, final)
        staged.parent.rmdir()
        sync_folder(self.path)
        if aside.exists():
            shutil.rmtree(aside)
        return final

    def keep_newest(self, limit: int | None, protected: str | None = None) -> None:
        """Delete the oldest checkpoints beyond `limit`; `protected` (the best one) stays."""
        for entry in self._checkpoints()[limit:] if limit else ():
            if str(entry) != protected:
                shutil.rmtree(entry)

    def finish(self, result: Mapping[str, Any]) -> None:
        with self.writing(FINISHED_FILE):
            write_atomic(self.path / FINISHED_FILE, json.dumps(dict(result), indent=1) + "\n")


def differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Lines that name the keys in which two runs differ, except those that do not matter."""
    keys = [key for key in {**recorded, **now} if key not in HARMLESS and not key.startswith(HARMLESS_PREFIXES)]
    unset = "(default)"
    return [
        f"  {key}: {recorded.get(key, unset)} there, {now.get(key, unset)} now"
        for key in keys
        if recorded.get(key, unset) != now.get(key, unset)
    ]


def log_position(checkpoint: Path | None) -> int:
    """The step at which a checkpoint was written; 0 without one."""
    return TrainerState.load_from_json(str(checkpoint / STATE_FILE)).global_step if checkpoint else 0
