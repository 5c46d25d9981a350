"""transformers' Trainer with LLaVA-SP's optimizer groups, data order and checkpoints; all else is Trainer's own.

A checkpoint holds LoRA and projector (like any adapter checkpoint, it can be opened), the optimizer's and the
scheduler's state, the random number generators and the trainer's state. It is written in a staging folder and renamed.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DistributedSampler, Sampler
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

from llava_sp import LlavaSPForCausalLM
from llava_sp.checkpoints.opening.adapter import load_adapter, save_adapter, trainable_state_dict
from llava_sp.common.processes import FailedHere
from llava_sp.config.arguments import TrainArguments
from llava_sp.data.dataset import ConversationDataset
from llava_sp.data.sampler import ModalityLengthSampler
from llava_sp.train.logs import Console, JsonLines, Meter
from llava_sp.train.run_folder import STAGING, STATE_FILE, WRITE_ERRORS, RunFolder
from llava_sp.train.stages import optimizer_groups, trained_names

SCHEDULER_FILE = "scheduler.pt"
logger = logging.getLogger(__name__)


class LlavaSPTrainer(Trainer):
    """Trainer for one stage.

    Args:
        model, args, train_dataset, ...: as for `transformers.Trainer`; `args` is a TrainArguments.
        folder: the run's folder.
        provenance: facts about the run that every checkpoint repeats.
        group_by_modality_length: batches of one modality and of similar lengths.
    """

    args: TrainArguments
    model: LlavaSPForCausalLM
    model_wrapped: Any
    train_dataset: ConversationDataset

    def __init__(
        self,
        *,
        folder: RunFolder,
        provenance: dict[str, Any] | None = None,
        group_by_modality_length: bool = False,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.folder = folder
        self.provenance = provenance or {}
        self.group_by_modality_length = group_by_modality_length
        self.samples_per_step = (
            self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        )
        self.meter = Meter(self.samples_per_step)
        self._staging: Path | None = None
        for unwanted in (ProgressCallback, PrinterCallback):
            self.remove_callback(unwanted)
        for callback in (self.meter, JsonLines(folder), Console()):
            self.add_callback(callback)
        self.model.register_load_state_dict_post_hook(allow_missing_frozen)

    # ---- data order: a function of (seed, epoch), the same for any number of processes

    def _get_train_sampler(self, train_dataset=None) -> Sampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        sampler: ModalityLengthSampler | DistributedSampler
        if self.group_by_modality_length:
            sampler = ModalityLengthSampler(
                dataset.modality_lengths,
                batch_size=self.args.train_batch_size,
                world_size=self.args.world_size * self.args.gradient_accumulation_steps,
                seed=self.args.data_seed or 0,
            )
        else:  # one replica: a shuffle with set_epoch; accelerate gives each process its batches
            sampler = DistributedSampler(dataset, num_replicas=1, rank=0, shuffle=True, seed=self.args.data_seed or 0)
        self.add_callback(SetEpoch(sampler))
        return sampler

    # ---- optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            groups = optimizer_groups(
                self.model if model is None else model, self.args.stage, self.args.rates, self.args.weight_decay
            )
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = kind(
                [
                    {"params": list(g.parameters.values()), "lr": g.lr, "weight_decay": g.weight_decay, "name": g.name}
                    for g in groups
                ],
                **options,
            )
        return self.optimizer

    # ---- log

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self.meter.read(self.state))
        super().log(logs)  # without start_time: the meter logs the speed

    # ---- checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write LoRA, projector, configuration and processor; every process must call this."""
        run = {**self.provenance, "stage": self.args.stage, "step": self.state.global_step}
        state = trainable_state_dict(self.model)  # all processes: ZeRO-3 gathers
        unsaved = trained_names(self.model) - set(state)
        assert not unsaved, f"trained, but not in the checkpoint: {sorted(unsaved)[:3]}"
        save_adapter(
            self.model,
            self.processing_class,
            str(self.args.output_dir if output_dir is None else output_dir),
            run=run,
            state_dict=state,
            write=self.args.should_save,
        )
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._staging = self.folder.path / STAGING
        name = f"checkpoint-{self.state.global_step}"
        try:
            with self.folder.writing(name, (*WRITE_ERRORS, RuntimeError)):  # torch.save's error is a RuntimeError
                self._write_and_publish(name, model, trial)
        except FailedHere:
            if self.args.should_save:  # the other ranks' files are in it; they may still be writing them
                shutil.rmtree(self._staging, ignore_errors=True)
            raise
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()

    def _write_and_publish(self, name: str, model: nn.Module, trial: Any) -> None:
        assert self._staging is not None
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            if best is not None and Path(best).parent == self._staging:
                self.state.best_model_checkpoint = str(self.folder.path / name)
                self.state.save_to_json(str(self._staging / name / STATE_FILE))
            self.folder.publish(self._staging / name)
            self.folder.keep_newest(self.args.save_total_limit, self.state.best_model_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        assert self.lr_scheduler is not None
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_adapter(self.model if model is None else model, resume_from_checkpoint)


def allow_missing_frozen(model: nn.Module, keys: Any) -> None:
    """After `load_state_dict`: frozen weights come from the base models, so a checkpoint without them is complete."""
    trained = trained_names(model)
    keys.missing_keys[:] = [name for name in keys.missing_keys if name in trained]


class SetEpoch(TrainerCallback):
    """Sets the sampler's epoch; accelerate does not reach it in the first epoch of a resumed run."""

    def __init__(self, sampler: ModalityLengthSampler | DistributedSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int(state.epoch or 0))
