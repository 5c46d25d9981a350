"""SIGTERM, SIGINT and SIGUSR1 while training: a checkpoint at the next step boundary, then an exit that a scheduler knows.

The exit status is that of a process that the signal ended: 143 (SIGTERM), 130 (SIGINT, Ctrl-C), 138 (SIGUSR1, which SLURM
sends before a time limit). Before the first step and after the last one, nothing is unsaved: there the signals end the
process as they always do.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import TrainerCallback

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
logger = logging.getLogger(__name__)


class StopBySignal(TrainerCallback):
    """Saves and stops at the end of the step in which any process received a signal.

    All processes save the same step. Validation due at that step is left out: the time that is left may be short.

    Args:
        accelerator: of the trainer; it connects the processes.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.received = 0  # by this process
        self.stopped_by = 0  # after training: the signal that ended it, the same on all processes

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handles the signals in the block. Outside the main thread, where Python cannot, they stay as they are."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        process = os.getpid()

        def receive(number: int, _frame: Any) -> None:
            if os.getpid() != process:  # a forked data worker, before `_start_worker` runs
                return
            self.received = max(self.received, number)
            if number == signal.SIGINT:  # also while the process waits in a collective, where no handler runs
                signal.signal(signal.SIGINT, signal.SIG_DFL)
            name = signal.Signals(number).name
            again = "; Ctrl-C again ends at once, without it" if number == signal.SIGINT else ""
            os.write(2, f"{name}: a checkpoint at the end of this step, then the end{again}\n".encode())

        before = {number: signal.signal(number, receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(self, args, state, control, **kwargs):
        number = self.received
        if args.world_size > 1:
            mine = torch.tensor([number], device=args.device)
            number = int(self.accelerator.gather(mine).max())
        if number and state.global_step < state.max_steps:
            self.stopped_by = number
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def end(self, checkpoint: object) -> None:
        """Ends the process if a signal stopped the training. Raises `SystemExit` with the status of the signal."""
        if self.stopped_by:
            name = signal.Signals(self.stopped_by).name
            logger.info("Stopped by %s: %s is complete; the same command goes on from it.", name, checkpoint)
            raise SystemExit(128 + self.stopped_by)


def shielded(loader: DataLoader) -> DataLoader:
    """The loader, whose workers leave signals to the whole process group (Ctrl-C, a scheduler's) to their parent."""
    real = getattr(loader, "base_dataloader", loader)  # within accelerate's
    if real.num_workers:
        real.worker_init_fn = partial(_start_worker, start=real.worker_init_fn)
    return loader


def _start_worker(worker: int, start: Callable[[int], None] | None) -> None:
    if start is not None:
        start(worker)

    def first(_number: int, _frame: Any) -> None:
        """A second SIGTERM ends the worker: its parent sends several at its end."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, first)
