"""transformers' Trainer with LLaVA-SP's optimizer groups, data order and checkpoints; all else is Trainer's own.

A checkpoint holds LoRA and projector (like any adapter checkpoint, it can be opened), the optimizer's and the
scheduler's state, the random number generators and the trainer's state. It is written in a staging folder and renamed.
"""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, Sampler
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

from llava_sp import LlavaSPForCausalLM
from llava_sp.checkpoints.opening.adapter import load_adapter, save_adapter, trainable_state_dict
from llava_sp.common.files import read_json, write_json
from llava_sp.common.processes import FailedHere
from llava_sp.config.arguments import TrainArguments
from llava_sp.data.annotations import BadSample
from llava_sp.data.dataset import ConversationDataset
from llava_sp.data.fingerprint import FINGERPRINT
from llava_sp.data.packing import Packs, PackSampler
from llava_sp.data.sampler import ModalityLengthSampler, WholeSteps
from llava_sp.train.guard import StepGuard
from llava_sp.train.logs import Console, JsonLines, Meter
from llava_sp.train.order import batches_of_step, samples_of
from llava_sp.train.packing import KeptApart
from llava_sp.train.processes import samples_per_step
from llava_sp.train.run_folder import STAGING, STATE_FILE, WRITE_ERRORS, RunFolder
from llava_sp.train.signals import shielded
from llava_sp.train.stages import optimizer_groups, trained_names

SCHEDULER_FILE = "scheduler.pt"
RUN_STATE_FILE = "run_state.json"  # in a checkpoint: state that Trainer's own files lack
RUN_STATE = {
    "losses": [float],
    "last_logged": int,
    "total_loss": float,
    "data": (None, FINGERPRINT),
    "recent_losses": [float],
    "skipped_steps": int,
}
logger = logging.getLogger(__name__)


class Diverged(ValueError):
    """Losses, gradients or weights are no longer finite; raised on all processes."""


class LlavaSPTrainer(Trainer):
    """Trainer for one stage.

    Args:
        model, args, train_dataset, ...: as for `transformers.Trainer`; `args` is a TrainArguments.
        folder: the run's folder.
        provenance: facts about the run that every checkpoint repeats.
        data: the fingerprint of the training data, which every checkpoint keeps.
        group_by_modality_length: batches of one modality and of similar lengths.
        packs: the packs that `train_dataset`, a `Packs`, is read by.
    """

    args: TrainArguments
    model: LlavaSPForCausalLM
    model_wrapped: Any
    train_dataset: ConversationDataset | Packs

    def __init__(
        self,
        *,
        folder: RunFolder,
        provenance: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        group_by_modality_length: bool = False,
        packs: PackSampler | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.folder = folder
        self.provenance, self.data = provenance or {}, data
        self.group_by_modality_length, self.packs = group_by_modality_length, packs
        self.args.logging_nan_inf_filter = False  # it would log the mean of earlier losses instead of NaN
        self.meter, self.journal = Meter(samples_per_step(self.args)), JsonLines(folder)
        self.guard = StepGuard(
            self, self.args.on_non_finite == "skip", self.samples_of_step, self.journal.write, self._diverged
        )
        self._staging: Path | None = None
        for unwanted in (ProgressCallback, PrinterCallback):
            self.remove_callback(unwanted)
        for callback in (self.meter, self.journal, Console(), RestoreState(self)):
            self.add_callback(callback)
        if packs is not None:
            self.add_callback(KeptApart(self))
        self.model.register_load_state_dict_post_hook(allow_missing_frozen)

    # ---- data order: a function of (seed, epoch), the same for any number of processes

    def _get_train_sampler(self, train_dataset=None) -> Sampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.packs is not None:
            self.add_callback(SetEpoch(self.packs))
            return self.packs
        order: ModalityLengthSampler | DistributedSampler
        if self.group_by_modality_length:
            assert isinstance(dataset, ConversationDataset)
            order = ModalityLengthSampler(
                dataset.modality_lengths,
                batch_size=self.args.train_batch_size,
                world_size=self.args.world_size * self.args.gradient_accumulation_steps,
                seed=self.args.data_seed or 0,
            )
        else:  # one replica: a shuffle with set_epoch; accelerate gives each process its batches
            order = DistributedSampler(dataset, num_replicas=1, rank=0, shuffle=True, seed=self.args.data_seed or 0)
        sampler = WholeSteps(order, samples_per_step(self.args))
        self.add_callback(SetEpoch(sampler))
        return sampler

    def get_total_train_batch_size(self, args: Any) -> int:
        return samples_per_step(self.args)

    def get_train_dataloader(self) -> DataLoader:
        return shielded(super().get_train_dataloader())

    def samples_of_step(self, step: int) -> list[tuple[str, int]]:
        """(file, record) of what a step learns from. With `on_bad_sample: skip`, the next good record replaces a bad one."""
        loader = self.callback_handler.train_dataloader
        batches = batches_of_step(loader, step, self.args.gradient_accumulation_steps, self.args.world_size)
        return [self.train_dataset.origin(index) for index in samples_of(batches)]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; the user can correct errors in the data (for example, an annotation file was replaced)."""
        start = time.perf_counter()
        try:
            return super().get_batch_samples(*args, **kwargs)
        except (ValueError, OSError) as error:
            if isinstance(error, BadSample):
                raise
            raise FailedHere(str(error).strip().splitlines()[-1]) from error
        finally:
            self.meter.waited += time.perf_counter() - start

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

    # ---- steps, log

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.guard.add(loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm over all processes, at each step before the weights change (DeepSpeed: just after)."""
        return self.guard.judge(super()._get_grad_norm(model, grad_norm))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self.meter.read(self.state))
            if self.guard.history.skipped:
                logs["skipped_steps"] = self.guard.history.skipped
        if "train_loss" in logs:  # Trainer's mean covers only the steps since the run was resumed
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs)  # without start_time: the meter logs the speed

    def _diverged(self, what: object, step: int, samples: str = "") -> NoReturn:
        assert self.optimizer is not None
        rates = ", ".join(
            f"{g['name']} {g['lr']:.3g}" for g in self.optimizer.param_groups if "no decay" not in g["name"]
        )
        advice = "Try a lower learning_rate (and projector_lr) or a longer warmup, in another output_dir"
        if samples:
            advice = (
                f"{samples}. python -m llava_sp.train.replay --run {self.folder.path} --step {step} shows the loss of "
                f"each. on_non_finite: skip leaves such steps out. {advice}"
            )
        raise Diverged(
            f"training diverged at step {step}: {what}. The rates are {rates}; the last good "
            f"checkpoint is {self.folder.newest_checkpoint() or 'none yet'}. {advice}"
        )

    # ---- checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write LoRA, projector, configuration and processor; every process must call this."""
        run = {**self.provenance, "stage": self.args.stage, "step": self.state.global_step}
        state = trainable_state_dict(self.model)  # all processes: ZeRO-3 gathers
        unsaved = trained_names(self.model) - set(state)
        assert not unsaved, f"trained, but not in the checkpoint: {sorted(unsaved)[:3]}"
        path = str(self.args.output_dir if output_dir is None else output_dir)
        try:
            save_adapter(
                self.model, self.processing_class, path, run=run, state_dict=state, write=self.args.should_save
            )
        except ValueError as error:  # invalid values
            self._diverged(error, self.state.global_step)
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._staging = self.folder.path / STAGING
        name = f"checkpoint-{self.state.global_step}"
        try:
            with self.folder.writing(name, (*WRITE_ERRORS, RuntimeError)):  # torch.save's error is a RuntimeError
                self._write_and_publish(name, model, trial)
        except (FailedHere, Diverged):
            if self.args.should_save:  # the other ranks' files are in it; they may still be writing them
                shutil.rmtree(self._staging, ignore_errors=True)
            raise
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()

    def _write_and_publish(self, name: str, model: nn.Module, trial: Any) -> None:
        assert self._staging is not None
        super()._save_checkpoint(model, trial)
        losses = self.accelerator.gather(self._tr_loss.reshape(1)).tolist()
        if self.args.should_save:
            state = {
                "losses": losses,
                "last_logged": self._globalstep_last_logged,
                "total_loss": self._total_loss_scalar,
                "data": self.data,
                "recent_losses": list(self.guard.history.recent),
                "skipped_steps": self.guard.history.skipped,
            }
            write_json(self._staging / name / RUN_STATE_FILE, state)
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


class RestoreState(TrainerCallback):
    """Restores from the checkpoint what Trainer does not save: losses since the last log, and the guard's history."""

    def __init__(self, trainer: LlavaSPTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            return
        saved = read_run_state(self.trainer.folder.path / f"checkpoint-{state.global_step}")
        losses = saved["losses"]
        own = losses[args.process_index] if len(losses) == args.world_size else sum(losses) / len(losses)
        if len(losses) != args.world_size:
            words = "The checkpoint was written with a process count of %s, now %s: dropout uses other random numbers."
            logger.warning(words, len(losses), args.world_size)
        self.trainer._tr_loss.fill_(own)
        self.trainer._globalstep_last_logged = saved["last_logged"]
        self.trainer._total_loss_scalar = saved["total_loss"]
        history = self.trainer.guard.history
        history.recent.extend(saved["recent_losses"])
        history.skipped = saved["skipped_steps"]


def read_run_state(checkpoint: Path) -> dict[str, Any]:
    return read_json(checkpoint / RUN_STATE_FILE, RUN_STATE)


class SetEpoch(TrainerCallback):
    """Sets the sampler's epoch; accelerate does not reach it in the first epoch of a resumed run."""

    def __init__(self, sampler: WholeSteps | PackSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int(state.epoch or 0))
