"""Makes a run fit its device: chooses the recomputation, tries the largest batch first, explains what did not fit."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.training_args import OptimizerNames

from llava_sp import LlavaSPConfig
from llava_sp.common.processes import FailedHere, Processes
from llava_sp.config.arguments import Run
from llava_sp.model.packed_attention import PER_SAMPLE
from llava_sp.train.budget import OPTIMIZERS, Budget, Sharding
from llava_sp.train.known import GIB
from llava_sp.train.logs import peak_memory
from llava_sp.train.memory import Batch, Setting, StepTrace
from llava_sp.train.processes import memory_of_device

# Attention implementations that need no mask of all pairs of tokens
NO_MASK = ("flash_attention_2", "flash_attention_3", "flex_attention")
logger = logging.getLogger("llava_sp.train")


def trace_of(config: LlavaSPConfig, run: Run, batch: Batch, deepspeed: bool, kind: str) -> StepTrace:
    """A pass of a run's model by estimate. Raises `ValueError` if the model cannot be run without numbers."""
    args = run.train
    accumulated = args.gradient_accumulation_steps > 1 and not deepspeed
    try:
        return StepTrace(config, run.model, batch, Setting(args.stage, args.bf16, deepspeed, accumulated, kind))
    except (RuntimeError, TypeError, AttributeError) as error:  # operations that need values, in a model's own code
        name = f"{config.text_config.model_type} with {config.vision_config.model_type}"
        raise ValueError(f"the memory of {name} cannot be estimated: {str(error).strip().splitlines()[0]}") from error


def in_words(every: int | None) -> str:
    """A setting of `activation_checkpointing`, as text."""
    return "none" if every is None else "full" if every == 1 else f"every_{every}"


def shape_of(inputs: dict[str, Tensor], attention: str | None) -> Batch:
    """The shape of a collated batch, for a language model of this attention implementation."""
    rows, tokens = inputs["input_ids"].shape
    images = len(inputs.get("patch_features", inputs.get("pixel_values", ())))
    padded = "attention_mask" in inputs and not bool(inputs["attention_mask"].all())
    masked = attention not in NO_MASK and (padded or ("position_ids" in inputs and attention != PER_SAMPLE))
    return Batch(rows, tokens, images, max(1, int((inputs["labels"][:, 1:] >= 0).sum())), masked)


class Fit:
    """A run's largest batch on its device.

    Args:
        inputs: the batch, collated; None if the data has no good sample among its largest.
    """

    def __init__(self, run: Run, config: LlavaSPConfig, inputs: dict[str, Tensor] | None, here: Processes):
        self.run, self.config, self.inputs, self.here = run, config, inputs, here
        self.batch = Batch(1, 1, 0, 1) if inputs is None else shape_of(inputs, config.text_config._attn_implementation)
        self.memory = memory_of_device(run.train.device)
        self.sharding = Sharding.of(run.train.deepspeed, here.world_size, config.text_config.hidden_size)

    @cached_property
    def budget(self) -> Budget:
        kind = "cpu" if self.run.train.use_cpu else "cuda"
        trace = trace_of(self.config, self.run, self.batch, self.sharding.stage is not None, kind)
        return Budget.of(trace, self.sharding, OptimizerNames(self.run.train.optim).value)

    def settle(self) -> None:
        """Choose what `activation_checkpointing: auto` leaves open, the same on all processes."""
        args = self.run.train
        if not args.recomputation_is_open:
            return
        with self.here.together():
            try:
                memory = min(self.here.gather(self.memory))
                every = self.here.from_main(self.budget.least_recomputation(memory))
                words = f"{self.budget.total(every) / GIB:.2f} of {memory / GIB:.2f} GiB by estimate"
            except ValueError as error:
                every, words = 1, str(error)
        args.recompute(every)
        logger.info("activation_checkpointing auto: %s (%s).", in_words(every), words)

    def words(self) -> str:
        """The largest batch, and what it needs by estimate."""
        batch, every = self.batch, self.run.train.recomputed
        shape = f"the largest batch ({batch.rows} x {batch.tokens} tokens, {batch.images} images)"
        try:
            kinds = self.budget.kinds(every)
        except ValueError as error:
            return f"{shape}; {error}"
        parts = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in kinds.items() if size)
        total = sum(kinds.values()) / GIB
        return f"{shape} needs {total:.2f} GiB by estimate ({parts}) of {self.memory / GIB:.2f}"

    def advice(self) -> str:
        """The settings that need less memory, the cheapest first."""
        args, choices = self.run.train, []
        if args.recomputed != 1:
            choices.append("activation_checkpointing: full")
        if self.run.data.packing:
            choices.append(f"pack_length: {self.run.data.longest_pack // 2}")
        elif args.per_device_train_batch_size > 1:
            rows = args.per_device_train_batch_size // 2
            choices.append(f"per_device_train_batch_size: {rows} (global_batch_size stays)")
        choices.append(f"model_max_length: {self.run.data.model_max_length // 2}")
        if self.sharding.stage != 3:
            choices.append("deepspeed: configs/deepspeed/zero3.json on more devices")
        return "; ".join(choices)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Running out of memory becomes one line that says what is needed and which setting to change."""
        try:
            yield
        except RuntimeError as error:
            if not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
                raise
            raise FailedHere(f"out of memory: {self.words()}. Change {self.advice()}") from error


class LongestFirst(TrainerCallback):
    """Runs the largest batch forward and backward before the first step; weights, gradients, optimizer, random numbers and
    the order of the data stay as they are."""

    def __init__(self, trainer: Trainer, fit: Fit):
        self.trainer, self.fit = trainer, fit

    def on_train_begin(self, args, state, control, **kwargs):
        options = getattr(args, "activation_checkpointing_kwargs", None) or args.gradient_checkpointing_kwargs or {}
        if self.fit.inputs is None or (
            args.recomputed and options.get("use_reentrant")
        ):  # which needs whole backward passes
            return
        device = [args.device] if args.device.type == "cuda" else []
        with torch.random.fork_rng(device), _room_for_optimizer(self.trainer):
            self._try(self.trainer.model)
        estimate = f", {self.fit.budget.total(args.recomputed) / GIB:.2f} estimated" if self._is_estimated() else ""
        holder = "the GPU" if device else "the process"
        words = "The largest batch fits: %s rows x %s tokens, %s images; %s held at most %.2f GiB%s."
        batch = self.fit.batch
        logger.info(words, batch.rows, batch.tokens, batch.images, holder, peak_memory() / GIB, estimate)

    def _is_estimated(self) -> bool:
        return "budget" in vars(self.fit)

    def _try(self, model: torch.nn.Module) -> None:
        """The gradients are returned instead of kept, which leaves those of DeepSpeed and of DistributedDataParallel alone."""
        trainer = self.trainer
        training = model.training
        model.train()
        inputs = trainer._prepare_inputs(dict(self.fit.inputs or {}))
        with trainer.compute_loss_context_manager():
            loss = model(**inputs).loss
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        torch.autograd.grad(loss, trained, allow_unused=True)
        model.train(training)


@contextlib.contextmanager
def _room_for_optimizer(trainer: Trainer) -> Iterator[None]:
    """Holds, on a GPU, the memory that the optimizer will take at its first step."""
    optimizer = trainer.optimizer
    if trainer.args.device.type != "cuda" or trainer.is_deepspeed_enabled or optimizer is None or optimizer.state:
        yield
        return
    trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    state, _ = OPTIMIZERS[OptimizerNames(trainer.args.optim).value]
    held = torch.empty(state * trained, dtype=torch.uint8, device=trainer.args.device)
    yield
    del held
