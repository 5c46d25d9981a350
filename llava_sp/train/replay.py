"""One step of a run again, alone: its batch forward and backward, and the loss of each of its samples.

    python -m llava_sp.train.replay --run runs/llava-sp-7b-cropping-lora --step 1234

The samples follow from the data order, the weights from the newest checkpoint before the step, or from the start of the
run: the step itself is repeated if the checkpoint before it is of the step before (`save_steps: 1`, or after a signal).
One process computes without dropout and without DeepSpeed, so figures equal the run's to rounding where it has no dropout.
Keys of the run may be changed (`--key value`), such as paths. Nothing is written.

Exit status: 0; 1 if a loss or a gradient is not finite; 2 for an error.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_sp.common.command import command_parser, count, run_command


def main(words: Sequence[str] | None = None) -> int:
    parser = command_parser(
        "llava_sp.train.replay", __doc__, usage="%(prog)s --run OUTPUT_DIR --step N [--key value ...]"
    )
    parser.add_argument("--run", type=Path, required=True, help="the output_dir of a run, finished or not")
    parser.add_argument("--step", type=count, required=True, help="from 1 on, as in log.jsonl")
    options, overrides = parser.parse_known_args(words)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)

    def action() -> int:
        return replay(options.run.absolute(), options.step, overrides)

    return run_command(action, traceback=options.traceback)


def replay(folder: Path, step: int, overrides: Sequence[str] = ()) -> int:
    """Prints the step's table; the exit status. Raises `ValueError` for a folder, step or key that cannot be."""
    from llava_sp.train.order import batches_of_step, samples_of

    trainer, data, checkpoint = _trainer_of(folder, step, overrides)
    accumulation = trainer.args.gradient_accumulation_steps
    loader = trainer.get_train_dataloader()
    last = _last_step(trainer, len(loader))
    if step > last:
        raise ValueError(f"--step is {step}, but the run in {folder} has {last} steps")
    batches = batches_of_step(loader, step, accumulation, 1)
    print(f"step {step} with the weights of {checkpoint or 'the start of the run'}")
    model = trainer.accelerator.prepare_model(trainer.model, evaluation_mode=True).eval()

    inputs = [trainer.data_collator([trainer.train_dataset[item] for item in batch]) for batch in batches]
    learned = sum(_learned(batch) for batch in inputs)
    total = [_pass(trainer, model, batch, learned) for batch in inputs]
    norm, loss = _gradient_norm(trainer.model), sum(total)
    bad = not _finite(loss, norm)

    print(f"{'loss':>10} {'gradient norm':>14} {'tokens':>7} {'learned':>8}  sample")
    for index in samples_of(batches):
        sample = trainer.data_collator([data[index]])
        file, record = data.origin(index)
        own = _pass(trainer, model, sample, _learned(sample))
        gradient = _gradient_norm(trainer.model)
        bad |= not _finite(own, gradient)
        mark = "" if _finite(own, gradient) else "   <- not finite"
        tokens = sample["input_ids"].numel()
        print(
            f"{own:10.4f} {gradient:14.4f} {tokens:7d} {_learned(sample):8d}  {file}, record {record}{mark}", flush=True
        )
    print(f"{loss:10.4f} {norm:14.4f} {sum(b['input_ids'].numel() for b in inputs):7d} {learned:8d}  the step")
    return int(bad)


def _trainer_of(folder: Path, step: int, overrides: Sequence[str]) -> tuple[Any, Any, Path | None]:
    """(trainer for one process that takes the steps of the run, with the weights before `step`; its data; their checkpoint)"""
    from llava_sp.checkpoints.opening.adapter import load_adapter
    from llava_sp.common.processes import Processes
    from llava_sp.config.arguments import Run, read_keys
    from llava_sp.data.build import build_datasets, build_processor
    from llava_sp.data.collator import Collator
    from llava_sp.data.packing import Packs
    from llava_sp.train.build import build_model
    from llava_sp.train.packing import plan_packs
    from llava_sp.train.run import same_data
    from llava_sp.train.run_folder import RunFolder
    from llava_sp.train.trainer import LlavaSPTrainer

    run_folder = RunFolder(folder)
    keys, samples_per_step = run_folder.recorded()
    keys = read_keys(
        None, keys | {"output_dir": str(folder), "deepspeed": None, "report_to": "none"} | _words(overrides)
    )
    keys["global_batch_size"] = samples_per_step or keys.get("global_batch_size")
    keys.pop("gradient_accumulation_steps", None)
    run = Run.of(keys)
    checkpoint = run_folder.checkpoint_before(step)
    processor = build_processor(run)
    data, _ = build_datasets(processor, run)
    same_data(data, checkpoint, Processes(), run.data)
    packs = plan_packs(run, data, Processes()) if run.data.packing else None
    model = build_model(run)
    if checkpoint is not None:
        load_adapter(model, checkpoint)
    trainer = LlavaSPTrainer(
        model=model,
        args=run.train,
        train_dataset=data if packs is None else Packs(data),
        data_collator=Collator(processor.pad_token_id, run.data.pad_to_multiple_of),
        processing_class=processor,
        folder=run_folder,
        group_by_modality_length=run.data.group_by_modality_length,
        packs=packs,
    )
    return trainer, data, checkpoint


def _words(overrides: Sequence[str]) -> dict[str, Any]:
    from llava_sp.config.files import split_command_line

    return split_command_line(overrides)


def _last_step(trainer: Any, batches: int) -> int:
    args = trainer.args
    updates = -(-batches // args.gradient_accumulation_steps)
    return args.max_steps if args.max_steps > 0 else int(-(-updates * args.num_train_epochs // 1))


def _pass(trainer: Any, model: Any, inputs: dict[str, Any], learned: int) -> float:
    """Forward and backward; the loss of a batch as its share of a step with `learned` learned tokens."""
    inputs = trainer._prepare_inputs(inputs)
    loss = trainer.compute_loss(model, inputs, num_items_in_batch=inputs["labels"].new_tensor(learned))
    trainer.accelerator.backward(loss)
    return float(loss.detach())


def _learned(inputs: dict[str, Any]) -> int:
    return int((inputs["labels"][:, 1:] != -100).sum())


def _gradient_norm(model: Any) -> float:
    """The norm over everything that trains; the gradients are gone then."""
    import torch

    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    model.zero_grad(set_to_none=True)
    return norm


def _finite(*figures: float) -> bool:
    import math

    return all(map(math.isfinite, figures))


if __name__ == "__main__":
    sys.exit(main())
