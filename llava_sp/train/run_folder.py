"""The folder of a run: whose it is, where it can go on from, and that only one run writes to it.

OUT/run.yaml          settings and provenance; can be given to --config
OUT/log.jsonl         one line per log
OUT/checkpoint-N/     complete by construction: written in OUT/.saving, then renamed
OUT/finished.json     the run is over; beside it the trained model itself (llava_sp.json, projector.safetensors, ...)
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from transformers.trainer_callback import TrainerState

from llava_sp.common.files import lock, write_atomic
from llava_sp.common.folders import sync, sync_folder
from llava_sp.config.arguments import RESERVED_KEY
from llava_sp.config.files import FailedHere, UsageError

logger = logging.getLogger(__name__)

RUN_FILE = "run.yaml"
FINISHED_FILE = "finished.json"
LOG_FILE = "log.jsonl"
STAGING = ".saving"
STATE_FILE = "trainer_state.json"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
REPLACED = re.compile(r"\.(checkpoint-\d+)\.replaced")
WRITE_ERRORS = (OSError, SafetensorError)

# Keys that change what is written, shown or how fast, but not what is learned.
HARMLESS = (
    "output_dir", "report_to", "run_name", "project", "disable_tqdm", "use_cpu", "tf32", "data_source",
    "attn_implementation", "local_rank", "include_num_input_tokens_seen", "skip_memory_metrics", "push_to_hub",
    "on_bad_sample", "resume_from_checkpoint", "do_train", "do_eval", "do_predict", "remove_unused_columns", "torch_empty_cache_steps",
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing",
    "activation_checkpointing_kwargs", "per_device_eval_batch_size", "prediction_loss_only",
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

    def check(self, settings: Mapping[str, Any], processes: int) -> None:
        """Raise UsageError if the folder holds another run, or something that is no run.

        A run that left neither checkpoint nor model (its data could not be read, say) has no claim to the folder.
        """
        if not (self.path / RUN_FILE).is_file():
            strange = [entry.name for entry in self._entries() if entry.suffix in (".safetensors", ".bin")]
            strange += [entry.name for entry in self._entries() if CHECKPOINT.fullmatch(entry.name)]
            if strange:
                raise UsageError(
                    f"output_dir = {self.path} holds {', '.join(sorted(strange))} but no {RUN_FILE}: it is not the folder "
                    "of a run. Choose another output_dir."
                )
            return
        if not self.is_finished and self.newest_checkpoint() is None:
            return
        recorded = yaml.safe_load((self.path / RUN_FILE).read_text(encoding="utf-8"))
        facts = recorded.pop(RESERVED_KEY, {})
        lines = differences(recorded, settings)
        if settings.get("deepspeed") and facts.get("processes") != processes and self.newest_checkpoint() is not None:
            lines.append(
                f"  number of processes: {facts.get('processes')} there, {processes} now (DeepSpeed's state is split)"
            )
        if lines:
            raise UsageError(
                f"output_dir = {self.path} belongs to another run, which differs in:\n"
                + "\n".join(lines)
                + "\nGive the same settings to go on with that run, or choose another output_dir."
            )

    def _entries(self) -> list[Path]:
        return list(self.path.iterdir()) if self.path.is_dir() else []

    @property
    def is_finished(self) -> bool:
        return (self.path / FINISHED_FILE).is_file()

    def newest_checkpoint(self) -> Path | None:
        """The last complete checkpoint, or None."""
        found = [
            (int(match.group(1)), entry)
            for entry in self._entries()
            if (match := CHECKPOINT.fullmatch(entry.name)) and (entry / STATE_FILE).is_file()
        ]
        return max(found)[1] if found else None

    def open(self, settings: Mapping[str, Any], provenance: Mapping[str, Any], patience: float = 60.0) -> None:
        """Take the folder for this process, clear what a killed save left, and write run.yaml.

        Another process that is still ending gets `patience` seconds for it. Raises UsageError if it stays, or if nothing
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
            if not (self.path / RUN_FILE).is_file() or self.newest_checkpoint() is None:
                text = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
                text += yaml.safe_dump({RESERVED_KEY: dict(provenance)}, sort_keys=False, allow_unicode=True)
                write_atomic(self.path / RUN_FILE, text)

    def close(self) -> None:
        """Let others have the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _wait_for_lock(self, patience: float) -> None:
        end = time.monotonic() + patience
        while not self._locked():
            self._lock.seek(0)
            holder = self._lock.read().strip() or "?"
            if time.monotonic() > end:
                raise UsageError(
                    f"output_dir = {self.path} is in use by process {holder}; wait for it to end, or end it."
                )
            logger.info("%s is in use by process %s; waiting for it to end.", self.path, holder)
            time.sleep(min(5.0, patience))

    def _locked(self) -> bool:
        return lock(self._lock, self.path)

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
        """Around writing `name`: a full disk, missing rights and the like become a UsageError that says what is left."""
        try:
            yield
        except errors as error:
            raise FailedHere(self._write_failure(name, error)) from error

    def _write_failure(self, name: str, error: Exception) -> str:
        there = next(place for place in (self.path, *self.path.absolute().parents) if place.exists())
        last = self.newest_checkpoint()
        return (
            f"{name} could not be written to {self.path} ({shutil.disk_usage(there).free / 2**30:.2f} GiB free there): "
            f"{error}\nThe newest complete checkpoint is {last or 'none yet'}; nothing was lost but the steps since. "
            "Make room (save_total_limit, output_dir) and give the same command again."
        )

    def publish(self, staged: Path) -> Path:
        """Give a completely written checkpoint its name; it is on the disk before it has one.

        One of that name (written by an earlier attempt at the same step) is deleted only when the new one is in place.
        """
        final, aside = self.path / staged.name, self.path / f".{staged.name}.replaced"
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
        steps = sorted(
            (int(match.group(1)), entry) for entry in self._entries() if (match := CHECKPOINT.fullmatch(entry.name))
        )
        surplus = max(0, len(steps) - limit) if limit else 0
        for _, entry in steps[:surplus]:
            if str(entry) != protected:
                shutil.rmtree(entry)

    def finish(self, result: Mapping[str, Any]) -> None:
        with self.writing(FINISHED_FILE):
            write_atomic(self.path / FINISHED_FILE, json.dumps(dict(result), indent=1) + "\n")


def differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Lines that name the keys in which two runs differ, leaving out those that do not matter."""
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
