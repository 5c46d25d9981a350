"""Steps that would hurt the model: not finite (not applied), or with a loss far above the last ones (logged).

A step that is not finite ends the run, or is left out and counted (`on_non_finite: skip`). Without DeepSpeed neither kind
changes the weights. Under DeepSpeed, which applies a step before it can be judged here, DeepSpeed itself leaves out a step
whose gradients are not finite; one with finite gradients and an infinite loss is applied.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean, pstdev
from typing import Any, NoReturn

import torch
from transformers import Trainer

from llava_sp.common.files import counted, examples

RECENT = 128  # losses, for the mean and the standard deviation that a spike exceeds
SIGMAS = 6
MOST_SKIPPED = 10  # steps in a row; more are not the data's fault
logger = logging.getLogger(__name__)


@dataclass
class Verdict:
    """What is wrong with a step."""

    kind: str  # "non_finite", "spike"
    what: str

    def record(self, loss: float, samples: list[tuple[str, int]]) -> dict[str, Any]:
        """A line of log.jsonl; `samples` are (file, record)."""
        return {
            "event": self.kind,
            "what": self.what,
            "step_loss": loss if math.isfinite(loss) else None,
            "samples": [{"file": file, "record": record} for file, record in samples],
        }


@dataclass
class Guard:
    """Judges each step by its loss, the mean over all samples and processes, and the norm of its gradients."""

    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    skipped: int = 0
    skipped_in_a_row: int = 0

    def judge(self, loss: float, norm: float | None) -> Verdict | None:
        """None if nothing is wrong."""
        if norm is not None and not math.isfinite(norm):
            return Verdict(
                "non_finite", f"the gradient norm is {norm}" + ("" if math.isfinite(loss) else f", the loss {loss}")
            )
        if not math.isfinite(loss):
            return Verdict("non_finite", f"the loss is {loss}")
        self.skipped_in_a_row = 0
        limit = self._limit()
        self.recent.append(loss)
        if loss <= limit:
            return None
        return Verdict("spike", f"the loss {loss:.4f} is above {limit:.4f}, mean + {SIGMAS} sigma of the last {RECENT}")

    def _limit(self) -> float:
        full = len(self.recent) == RECENT
        return fmean(self.recent) + SIGMAS * pstdev(self.recent) if full else math.inf

    def may_skip(self) -> bool:
        """Counts a step that is left out; False if they are too many in a row."""
        self.skipped += 1
        self.skipped_in_a_row += 1
        return self.skipped_in_a_row <= MOST_SKIPPED

    @property
    def usual(self) -> float:
        """The loss that stands for that of a step left out in the means of the log."""
        return fmean(self.recent) if self.recent else 0.0


class StepGuard:
    """Judges the steps of a trainer, on all processes alike, and acts on the verdict.

    Args:
        trainer: whose steps these are.
        skip: leave out steps that are not finite instead of stopping.
        samples: of a step, as (file, record).
        write: appends a record to the log, for a step.
        stop: ends the run: what is wrong, the step, and its samples.
    """

    def __init__(
        self,
        trainer: Trainer,
        skip: bool,
        samples: Callable[[int], list[tuple[str, int]]],
        write: Callable[[int, dict[str, Any]], None],
        stop: Callable[[str, int, str], NoReturn],
    ):
        self.trainer, self.skip, self.samples, self.write, self.stop = trainer, skip, samples, write, stop
        self.history = Guard()
        self._loss: torch.Tensor | None = None  # of this process, over the micro batches so far
        self._logged_before = torch.tensor(0.0)

    def add(self, loss: torch.Tensor) -> None:
        """The loss of a micro batch, before Trainer adds it to those of the log."""
        if self._loss is None:
            self._logged_before = self.trainer._tr_loss.clone()
            self._loss = torch.zeros_like(loss)
        self._loss = self._loss + loss

    def judge(self, norm: Any) -> Any:
        """To be called between the last backward pass of a step and its update. Returns the norm for the log, None for none."""
        assert self._loss is not None, "a step without a micro batch"
        loss = float(self.trainer.accelerator.gather(self._loss.detach().reshape(1)).mean())
        self._loss = None
        verdict = self.history.judge(loss, None if norm is None else float(norm))
        if verdict is None:
            return norm
        step = self.trainer.state.global_step + 1
        samples = self.samples(step)
        if self.trainer.state.is_world_process_zero:
            self.write(step, verdict.record(loss, samples))
        words = f"It learned from {counted(len(samples), 'sample')} (log.jsonl lists them): {_named(samples)}"
        if verdict.kind == "spike":
            logger.warning("Step %s: %s. %s.", step, verdict.what, words)
            return norm
        if not self.skip or not self.history.may_skip():
            row = f" ({MOST_SKIPPED + 1} steps in a row)" if self.skip else ""
            self.stop(verdict.what + row, step, words)
        logger.warning("Step %s is left out: %s. %s.", step, verdict.what, words)
        assert self.trainer.model is not None
        self.trainer.model.zero_grad(set_to_none=True)  # optimizers pass over parameters without a gradient
        self.trainer._tr_loss.copy_(self._logged_before + self.history.usual)
        return None


def _named(samples: list[tuple[str, int]]) -> str:
    return examples((f"{file}, record {record}" for file, record in samples), 4)
