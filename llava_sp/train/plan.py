"""What a run will need, before anything is loaded: parameters, memory by kind, steps, hours, disk.

    python -m llava_sp.train --config configs/finetune_lora_7b_cropping.yaml --plan --gpu h200 --processes 8
    python -m llava_sp.train.plan --table           the README's table

Memory is that of the largest micro batch by estimate (`memory.py`, `budget.py`). Hours count 4N FLOPs a token where the language
model is frozen and 6 for each value that trains; what recomputation adds is not counted as useful.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_sp.common.command import command_parser, run_command, share_of_peak
from llava_sp.train.known import GEOMETRY, GIB, GPUS, Data, Gpu, data_of, geometry_of, gpu_of

if TYPE_CHECKING:
    from llava_sp import LlavaSPConfig
    from llava_sp.config.arguments import Run
    from llava_sp.train.budget import Budget, Sharding
    from llava_sp.train.memory import Batch, StepTrace

MFU = 0.4


@dataclass(frozen=True)
class Plan:
    """A run, its data, and where it would run. `text()` is what `--plan` prints."""

    run: Run
    config: LlavaSPConfig
    data: Data
    gpu: Gpu
    gpu_name: str
    processes: int
    zero: Mapping[str, Any] | None  # DeepSpeed's configuration

    # ---- memory

    @property
    def sharding(self) -> Sharding:
        from llava_sp.train.budget import Sharding

        return Sharding.of(self.zero, self.processes, self.config.text_config.hidden_size)

    @property
    def batch(self) -> Batch:
        """The largest micro batch."""
        from llava_sp.train.memory import Batch

        rows, data, per_image = self.run.train.per_device_train_batch_size, self.data, self.config.num_image_tokens
        if self.run.data.packing:
            length, attention = self.run.data.longest_pack, self.run.model.attn_implementation
            images = math.ceil(data.images * length / data.mean)
            # packs mix samples; those of text alone, which most is learned from, are few
            return Batch(1, length, images, max(1, length // 2), masked=attention in ("sdpa", "eager"))
        # the longest samples may be text alone
        learned = max(data.longest - (data.most_images * per_image if data.images >= 1 else 0), 1)
        return Batch(rows, data.longest, rows * data.most_images, rows * learned, masked=rows > 1)

    @cached_property
    def budget(self) -> Budget:
        from llava_sp.train.budget import Budget

        return Budget.of(_trace(_Request.of(self)), self.sharding, self._optimizer)

    @property
    def _optimizer(self) -> str:
        from transformers.training_args import OptimizerNames

        return OptimizerNames(self.run.train.optim).value

    @cached_property
    def every(self) -> int | None:
        args = self.run.train
        return self.budget.least_recomputation(self.memory) if args.recomputation_is_open else args.recomputed

    @property
    def memory(self) -> float:
        return self.gpu.memory * GIB

    @property
    def fits(self) -> bool:
        from llava_sp.train.budget import fits

        return fits(self.budget.total(self.every), self.memory)

    def alternatives(self) -> Iterator[tuple[str, Plan]]:
        """Settings that need less memory, the cheapest first: full recomputation, smaller batches, ZeRO, more GPUs."""
        args = self.run.train
        plan = self._with(recompute=True)
        if args.recomputed != 1 and not args.recomputation_is_open:
            yield "activation_checkpointing: auto", plan
        smaller = list(self._smaller())
        for words, size in smaller:
            yield words, plan._with(size)
        for stage in (2, 3):
            if (self.sharding.stage or 0) < stage and (stage == 2 or self.processes > 1):
                zero = {"zero_optimization": {"stage": stage}}
                yield f"deepspeed: configs/deepspeed/zero{stage}.json", plan._with(zero=zero)
                for words, size in smaller:
                    yield f"deepspeed: configs/deepspeed/zero{stage}.json and {words}", plan._with(size, zero=zero)
        words, size = smaller[-1] if smaller else ("the same batch", 0)
        for processes in (2, 4, 8, 16):
            if processes > self.processes:
                zero = {"zero_optimization": {"stage": 3}}
                more = f"{processes} GPUs with deepspeed: configs/deepspeed/zero3.json and {words}"
                yield more, plan._with(size, zero=zero, processes=processes)

    def _smaller(self) -> Iterator[tuple[str, int]]:
        """Smaller micro batches: rows, or the length of packs."""
        data = self.run.data
        if data.packing:
            halves = [data.longest_pack >> shift for shift in range(1, 20)]
            yield from ((f"pack_length: {size}", size) for size in halves if size >= self.data.longest)
        else:
            rows = self.run.train.per_device_train_batch_size
            halves = [rows >> shift for shift in range(1, rows.bit_length())]
            yield from ((f"per_device_train_batch_size: {size}", size) for size in halves)

    def _with(self, size: int = 0, recompute: bool = False, **changed: Any) -> Plan:
        run = dataclasses.replace(self.run, train=copy.copy(self.run.train), data=copy.copy(self.run.data))
        if recompute:
            run.train.recomputation_is_open = True
        if size and run.data.packing:
            run.data.pack_length = size
        elif size:
            total = run.train.per_device_train_batch_size * run.train.gradient_accumulation_steps
            run.train.per_device_train_batch_size = size
            run.train.gradient_accumulation_steps = max(1, total // size)
        return dataclasses.replace(self, run=run, **changed)

    # ---- time

    @property
    def samples_per_step(self) -> int:
        args = self.run.train
        if self.run.data.packing and args.global_batch_size:
            return args.global_batch_size
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * self.processes

    @property
    def steps(self) -> int | None:
        args = self.run.train
        if args.max_steps > 0:
            return args.max_steps
        if self.data.samples is None:
            return None
        return math.ceil(math.ceil(self.data.samples / self.samples_per_step) * args.num_train_epochs)

    @property
    def flops_per_token(self) -> float:
        """Useful ones in the language model: 4 for a frozen value (forward, and backward to what comes before), 6 for one that
        trains. Embeddings are looked up, the head runs at the learned tokens alone."""
        counts, text = self.budget.trace.counts, self.config.text_config
        frozen = counts["language_model"] - 2 * text.vocab_size * text.hidden_size
        return 4 * frozen + 6 * counts["lora"]

    @property
    def flops_per_image(self) -> float:
        """The frozen tower's forward pass and the projector's three products."""
        counts = self.budget.trace.counts
        patches = self.config.num_image_tokens
        return 2 * counts["vision_tower"] * patches + 6 * (counts["patch_mlp"] * patches + counts["spatial"])

    @property
    def flops_per_sample(self) -> float:
        return self.data.mean * self.flops_per_token + self.data.images * self.flops_per_image

    def hours(self, mfu: float) -> float | None:
        if self.steps is None:
            return None
        total = self.steps * self.samples_per_step * self.flops_per_sample
        return total / (mfu * self.gpu.teraflops * 1e12 * self.processes) / 3600

    # ---- words

    def text(self, mfu: float = MFU, log: Path | None = None) -> str:
        return "\n".join([*self._what(), *self._memory(), *self._time(mfu, log)])

    def _what(self) -> Iterator[str]:
        from llava_sp.train.stages import STAGES

        args, model, counts = self.run.train, self.run.model, self.budget.trace.counts
        yield f"{args.stage}: {model.language_model} + {model.vision_tower}, {self.config.spatial_variant}"
        for part, number in counts.items():
            if number:
                rate = STAGES[args.stage].get(part)
                yield f"  {part:<15}{number:>16,}  {f'trains at {args.rates[rate]:g}' if rate else 'frozen'}"
        yield f"  {'trained':<15}{self.budget.trace.trained:>16,}  of {sum(counts.values()):,}"

    def _memory(self) -> Iterator[str]:
        from llava_sp.train.fit import in_words

        batch, every, sharding = self.batch, self.every, self.sharding
        how = "no DeepSpeed" if sharding.stage is None else f"ZeRO-{sharding.stage}"
        gpus = f"{self.processes} x {self.gpu.title}"
        yield f"Memory of each device ({gpus}, {how}, {'bf16' if self.run.train.bf16 else 'float32'}), in GiB:"
        shape = f"{batch.rows} x {batch.tokens} tokens, {batch.images} images"
        yield f"  largest micro batch {shape}; recomputation {in_words(every)}"
        for kind, size in self.budget.kinds(every).items():
            yield f"  {kind:<15}{size / GIB:>16.1f}"
        yield f"  {'all':<15}{self.budget.total(every) / GIB:>16.1f}  of {self.gpu.memory:.1f}: {self.verdict()}"

    def verdict(self) -> str:
        """Whether it fits, and if not, the first change with which it does."""
        if self.fits:
            return "fits"
        for words, plan in self.alternatives():
            if self._leaves_room(plan) and plan.fits:
                return f"does not fit; {words} would ({plan.budget.total(plan.every) / GIB:.1f})"
        return f"does not fit, with no setting on up to 16 of {self.gpu_name}"

    def _leaves_room(self, other: Plan) -> bool:
        """Whether what another plan of the same model holds throughout fits, which needs no trace of its own."""
        from llava_sp.train.budget import Budget, fits

        held = Budget.of(self.budget.trace, other.sharding, self._optimizer)
        return fits(held.weights + held.optimizer, self.memory)

    def _time(self, mfu: float, log: Path | None) -> Iterator[str]:
        data, steps, per_step = self.data, self.steps, self.samples_per_step
        args = self.run.train
        made = (
            "in packs"
            if self.run.data.packing
            else f"{args.per_device_train_batch_size} x {self.processes} x {args.gradient_accumulation_steps} accumulated"
        )
        yield f"Data: {data.source}"
        if data.samples is not None:
            yield f"  {data.samples:,} samples of {data.mean:.0f} tokens in the mean, {data.longest:,} at most"
        else:
            yield f"  samples: not known; {data.longest:,} tokens at most"
        if steps is None:
            yield f"  steps: not known; {per_step} samples each ({made})"
        else:
            tokens = steps * per_step * data.mean
            yield f"  {steps:,} steps of {per_step} samples ({made}), {tokens / 1e6:,.0f} M tokens"
            yield f"  padding left: {self.padding()}"
            words = f"{self.flops_per_token / 1e9:.1f} GFLOP a token, {self.flops_per_image / 1e9:.0f} an image"
            yield f"  {self.hours(mfu):.1f} h at {100 * mfu:.0f} % useful MFU ({words})"
            if log is not None:
                yield f"  {self._measured(log, tokens)}"
        yield f"Disk: {self.budget.checkpoint / GIB:.1f} GiB a checkpoint; save_total_limit {args.save_total_limit}"

    def padding(self) -> str:
        """The share of padding in an epoch, as far as it is known."""
        import numpy as np

        from llava_sp.data.sampler import ModalityLengthSampler

        args, lengths = self.run.train, self.data.lengths
        rows, batches = args.per_device_train_batch_size, self.processes * args.gradient_accumulation_steps
        if self.run.data.packing:
            return "none, but for multiples" if self.run.data.pad_to_multiple_of > 1 else "none, in packs"
        if rows == 1:
            return "none, with one sample a row"
        if lengths is None:
            return "not known without the data"
        if self.run.data.group_by_modality_length:
            order = np.array([*ModalityLengthSampler(lengths.tolist(), rows, batches, args.data_seed or 0)])
        else:
            order = np.random.default_rng(args.data_seed or 0).permutation(len(lengths))
        size = np.abs(lengths)[order[: len(order) - len(order) % rows]].reshape(-1, rows)
        return f"{100 * (1 - size.sum() / (size.max(axis=1) * rows).sum()):.1f} %" if len(size) else "none"

    def _measured(self, log: Path, tokens: float) -> str:
        speed = speed_of(log)
        mfu = speed * self.flops_per_sample / self.data.mean / (self.gpu.teraflops * 1e12 * self.processes)
        return f"{tokens / speed / 3600:.1f} h at the {speed:,.0f} tokens/s of {log} ({100 * mfu:.1f} % useful MFU of {self.gpu.title})"


@dataclass(frozen=True)
class _Request:
    """What a plan's trace depends on; compared by `key`."""

    plan: Plan = dataclasses.field(compare=False)
    key: tuple[Any, ...]

    @classmethod
    def of(cls, plan: Plan) -> _Request:
        args, model, deepspeed = plan.run.train, plan.run.model, plan.zero is not None
        accumulated = args.gradient_accumulation_steps > 1 and not deepspeed
        lora = (model.lora_r, model.lora_dropout, tuple(model.lora_target_modules), model.attn_implementation)
        key = (plan.config.to_json_string(), plan.batch, args.stage, args.bf16, deepspeed, accumulated, lora)
        return cls(plan, key)


@cache
def _trace(request: _Request) -> StepTrace:
    from llava_sp.train.fit import trace_of

    plan = request.plan
    return trace_of(plan.config, plan.run, plan.batch, plan.zero is not None, "cuda")


# ---- from the configuration of a run


def plan_of(
    config: Path | None, words: Sequence[str], gpu: str | None, processes: int = 1, assume: bool = False
) -> Plan:
    """The plan of a run. `assume` takes published counts even where the data is.

    Raises:
        ValueError, OSError: an unknown key, stage or GPU; a model, or a warm start, that is not there.
    """
    from llava_sp.checkpoints.opening.warm_start import language_model_within
    from llava_sp.common.schema import expect, one_of
    from llava_sp.config.arguments import Run, read_keys, split_global_batch
    from llava_sp.train.preflight import missing_model
    from llava_sp.train.stages import STAGES

    name, device = gpu_of(gpu)
    keys = read_keys(config, words)
    zero = keys.pop("deepspeed", None)
    whole = keys.get("global_batch_size")
    if whole is not None and not keys.get("packing"):
        del keys["global_batch_size"]
        sizes = split_global_batch(whole, keys.get("per_device_train_batch_size", 8), processes)
        keys["per_device_train_batch_size"], keys["gradient_accumulation_steps"] = sizes
    run = Run.of({**keys, "use_cpu": True})
    expect({"stage": run.train.stage}, {"stage": one_of(*STAGES)}, config or "this run")
    model = run.model
    if model.warm_start is not None:
        model.language_model = str(language_model_within(model.warm_start, model.language_model))
    backbones = {key: getattr(model, key) for key in ("language_model", "vision_tower")}
    problems = [missing_model(key, name) for key, name in backbones.items() if name not in GEOMETRY]
    if any(problems):
        raise ValueError("this run cannot be planned: " + " ".join(filter(None, problems)))
    geometry = geometry_of(run)
    return Plan(run, geometry, data_of(run, geometry, assume), device, name, processes, zero)


def speed_of(log: Path) -> float:
    """Tokens/s, not counting padding, of a run's log.jsonl: the median after its first records.

    Raises `ValueError` if it has none.
    """
    from llava_sp.common.files import read_jsonl

    speeds = [record["tokens_per_second"] for record in read_jsonl(log, {"step": int}) if "tokens_per_second" in record]
    if not speeds:
        raise ValueError(f"{log} holds no tokens_per_second; give the log.jsonl of a run that has logged a step")
    return statistics.median(speeds[len(speeds) // 10 :])


# ---- the README's table

CONFIGS = Path(__file__).parents[2] / "configs"


def table(gpu: str = "h200", mfu: float = MFU) -> str:
    """The shipped recipes on 1, 2 and 8 GPUs: memory, recomputation, hours."""
    from llava_sp.train.fit import in_words

    numbers = (1, 2, 8)
    title = GPUS[gpu].title.removeprefix("NVIDIA ")
    lines = [
        f"| recipe (cropping) | trained | {' | '.join(f'{n} x {title}' for n in numbers)} | checkpoint |",
        "|---" * (len(numbers) + 3) + "|",
    ]
    for size in ("7b", "13b"):
        for stage in ("pretrain", "finetune_lora"):
            cells = []
            for n in numbers:
                plan = plan_of(CONFIGS / f"{stage}_{size}_cropping.yaml", [], gpu, n, assume=True)
                budget = plan.budget
                memory = f"{budget.total(plan.every) / GIB:.0f} GiB" if plan.fits else plan.verdict()
                cells.append(f"{memory}, {in_words(plan.every)}, {plan.hours(mfu):.1f} h")
            trained = f"{budget.trace.trained / 1e6:,.0f} M"
            lines.append(f"| {stage} {size} | {trained} | {' | '.join(cells)} | {budget.checkpoint / GIB:.1f} GiB |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = command_parser("llava_sp.train.plan", __doc__)
    parser.add_argument("--table", action="store_true", required=True, help="print the README's table")
    parser.add_argument("--gpu", default="h200", choices=list(GPUS))
    parser.add_argument("--mfu", type=share_of_peak, default=MFU)
    options = parser.parse_args(arguments)
    return run_command(lambda: print(table(options.gpu, options.mfu)), traceback=options.traceback)


if __name__ == "__main__":
    sys.exit(main())
