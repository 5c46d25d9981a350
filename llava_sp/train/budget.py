"""Bytes that each device of a run needs, by kind, and the least recomputation with which a run fits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llava_sp.train.known import GIB
from llava_sp.train.memory import StepTrace

# Of an optimizer, in bytes for each trained value: its state in float32, and what a step allocates for a moment on a GPU
# (torch updates all parameters at once there: AdamW holds the roots of all second moments).
OPTIMIZERS = {
    "adamw_torch": (8, 4),
    "adamw_torch_fused": (8, 0),
    "adagrad": (4, 4),
    "rmsprop": (4, 4),
    "adafactor": (0, 8),
    "sgd": (0, 0),
    "adamw_8bit": (2, 0),
    "paged_adamw_8bit": (2, 0),
}
# A GPU must also hold what is not counted: the CUDA context, NCCL, kernels' own memory; and torch's allocator cannot use
# every gap.
CONTEXT = 1.5 * GIB
GAPS = 1.06
ZERO3_LIVE = 1_000_000_000  # DeepSpeed's default of stage3_max_live_parameters


@dataclass(frozen=True)
class Sharding:
    """How a run spreads its state: `stage` of ZeRO, None without DeepSpeed; `processes` one for each device."""

    processes: int = 1
    stage: int | None = None
    bucket: int = 0  # values in ZeRO's buffer of gradients, of which there are two
    live: int = ZERO3_LIVE
    offloads_optimizer: bool = False
    offloads_weights: bool = False

    @classmethod
    def of(cls, deepspeed: Mapping[str, Any] | str | None, processes: int, hidden_size: int) -> Sharding:
        """From a DeepSpeed configuration, in which `auto` means what transformers makes of it."""
        if not deepspeed:
            return cls(processes)
        content = json.loads(deepspeed) if isinstance(deepspeed, str) else deepspeed
        zero = content.get("zero_optimization", {})

        def number(key: str, default: int) -> int:
            value = zero.get(key, default)
            return default if value == "auto" else int(value)

        def offloads(what: str) -> bool:
            return zero.get(f"offload_{what}", {}).get("device", "none") != "none"

        return cls(
            processes,
            int(zero.get("stage", 0)),
            number("reduce_bucket_size", hidden_size**2),
            number("stage3_max_live_parameters", ZERO3_LIVE),
            offloads("optimizer"),
            offloads("param"),
        )


@dataclass(frozen=True)
class Budget:
    """The device's memory in a run: what stays, by kind, and what the optimizer's step adds for a moment."""

    trace: StepTrace
    sharding: Sharding
    weights: int
    optimizer: int
    gradients: int  # buffers that are there throughout
    step: int  # gradients complete, and the optimizer's temporary values
    checkpoint: int  # on the disk: trained weights, their float32 copies under DeepSpeed, optimizer state

    @classmethod
    def of(cls, trace: StepTrace, sharding: Sharding, optimizer: str) -> Budget:
        setting, n = trace.setting, sharding.processes
        low, trained, total = 2 if setting.bf16 else 4, trace.trained, sum(trace.counts.values())
        state, moment = OPTIMIZERS[optimizer]
        together = trained if setting.kind == "cuda" else trace.largest  # a CPU updates one tensor after the other
        moment *= together if setting.kind == "cuda" else 2 * together
        if sharding.stage is None:
            complete = 4 * trained
            copies = 4 * trained if n > 1 else 0  # DistributedDataParallel's buckets
            resident = copies + (complete if setting.accumulated else 0)
            weights = low * (total - trained) + 4 * trained
            step = copies + complete + moment
            return cls(trace, sharding, weights, state * trained, resident, step, (4 + state) * trained)
        share = n if sharding.stage >= 1 else 1
        own = trained // share
        weights = low * total
        if sharding.stage == 3:
            weights = (0 if sharding.offloads_weights else weights // n) + low * min(sharding.live, total)
        gradients = low * (own if sharding.stage >= 2 else trained) + 2 * sharding.bucket * low
        stored = (2 * low + 4 + state) * trained  # DeepSpeed has the weights once more
        if sharding.offloads_optimizer:
            return cls(trace, sharding, weights, 0, gradients, gradients, stored)
        step = gradients + 4 * own + moment // share
        return cls(trace, sharding, weights, (4 + state) * own, gradients, step, stored)

    def kinds(self, every: int | None) -> dict[str, int]:
        """Bytes by kind at the moment when the device holds most, recomputing every n-th layer (None: none)."""
        peak = self.trace.peak(every)
        resident = {"weights": self.weights, "optimizer": self.optimizer}
        if self.gradients + peak.total < self.step:
            return {**resident, "gradients": self.step, "activations": 0, "logits": 0}
        rest = peak.total - peak.gradients - peak.logits
        return {
            **resident,
            "gradients": self.gradients + peak.gradients,
            "activations": rest,
            "logits": peak.logits,
        }

    def total(self, every: int | None) -> int:
        return sum(self.kinds(every).values())

    def least_recomputation(self, memory: float) -> int | None:
        """The largest n, or None, with which the run fits when every n-th layer is recomputed; 1 if none does."""
        share = {every: sum(self.trace.recomputed(every)) for every in (None, *range(self.trace.layers, 0, -1))}
        for every in sorted(share, key=lambda choice: share[choice]):
            if fits(self.total(every), memory):
                return every
        return 1


def fits(total: float, memory: float) -> bool:
    """Whether a device of `memory` bytes holds an estimate of `total` bytes."""
    return total * GAPS + CONTEXT <= memory
