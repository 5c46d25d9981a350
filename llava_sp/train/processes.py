"""How the processes of a run start; for their ranks and how they end, see `common.processes`."""

from __future__ import annotations

import os
import socket

import psutil
import torch
import torch.distributed as dist
from transformers import TrainerCallback

from llava_sp.common.processes import launcher_number
from llava_sp.common.watchdog import Watchdog
from llava_sp.config.arguments import TrainArguments


def samples_per_step(args: TrainArguments) -> int:
    """The samples of one optimizer step, over all processes."""
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return args.global_batch_size or rows  # a row may be a pack


def accumulate(args: TrainArguments, steps: int) -> None:
    """Set `gradient_accumulation_steps` where it is known only after the arguments were made, for DeepSpeed too."""
    args.gradient_accumulation_steps = steps
    if args.deepspeed:
        config = args.hf_deepspeed_config.config
        config["gradient_accumulation_steps"] = steps
        config["train_batch_size"] = args.per_device_train_batch_size * steps * args.world_size
        args.deepspeed_plugin.gradient_accumulation_steps = steps


def be_the_only_process() -> None:
    """Describe a plain `python` as a launcher's only process; before the arguments, which detect the devices, are made.

    DeepSpeed needs it, and so do several visible GPUs: Trainer would split each batch among them (nn.DataParallel), which
    does not map images to samples.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)


def start_deepspeed(args: TrainArguments) -> None:
    """Start the process group that DeepSpeed uses, if it is used: ZeRO-3 needs it to build the model."""
    if not args.deepspeed:
        return
    if args.use_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    deepspeed.init_distributed(dist_backend=get_accelerator().communication_backend_name(), auto_mpi_discovery=False)


def is_of_communication(error: RuntimeError) -> bool:
    """Whether an error comes from the processes' collectives: gloo raises plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


class Watch(TrainerCallback):
    """Reports training progress to a watchdog, from the first step to the last, as loading a model may be slow."""

    def __init__(self, watchdog: Watchdog):
        self.watchdog = watchdog

    def on_train_begin(self, args, state, control, **kwargs):
        self.watchdog.start()
        self.on_step_end(args, state, control)

    def on_step_begin(self, args, state, control, **kwargs):
        self.watchdog.progress(state.global_step + 1, "computing")

    on_substep_end = on_step_begin

    def on_step_end(self, args, state, control, **kwargs):
        self.watchdog.progress(state.global_step, "done, saving or loading data")

    on_save = on_evaluate = on_step_end

    def on_prediction_step(self, args, state, control, **kwargs):
        self.watchdog.progress(state.global_step, "validating")

    def on_train_end(self, args, state, control, **kwargs):
        self.watchdog.stop()


def memory_of_device(device: torch.device) -> int:
    """Bytes that this process may use: of its GPU, or its share of what is free on a CPU's machine."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    own = psutil.Process().memory_info().rss
    return psutil.virtual_memory().available // launcher_number("LOCAL_WORLD_SIZE") + own
