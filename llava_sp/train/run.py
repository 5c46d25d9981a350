"""A training run: configuration, checks, model, data, trainer, training, proof.

    python -m llava_sp.train --config configs/finetune_lora_7b_cropping.yaml --max_steps 10
    deepspeed scripts/finetune_lora.sh --max_steps 10
    torchrun --nproc-per-node 8 -m llava_sp.train --config ...

The same command again goes on where the run was; a finished run says so.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from transformers import IntervalStrategy, set_seed

from llava_sp.config.arguments import (
    DataArguments,
    ModelArguments,
    TrainArguments,
    is_local_path,
    load_config,
    settings_of,
)
from llava_sp.config.files import FailedHere, UsageError
from llava_sp.data.build import build_datasets, build_processor
from llava_sp.data.collator import Collator
from llava_sp.data.records import BadSample
from llava_sp.train.build import build_model, settle_language_model
from llava_sp.train.preflight import check_inputs
from llava_sp.train.processes import (
    become_a_group_of_one,
    end_group,
    is_first,
    is_first_of_machine,
    is_launched,
    process_name,
    start_group,
)
from llava_sp.train.provenance import collect
from llava_sp.train.run_folder import RunFolder, log_position
from llava_sp.train.trainer import LlavaSPTrainer
from llava_sp.train.verify import told, verify_saved

logger = logging.getLogger("llava_sp.train")

USAGE = """usage: {program} [--config FILE.yaml] [--key value ...]

Keys are the fields of llava_sp/config/arguments.py and of transformers.TrainingArguments; configs/ holds the shipped runs.
default: --config {default}
"""


def main(words: Sequence[str] | None = None, default_config: str | Path | None = None) -> None:
    """Entry point of the scripts and of `python -m llava_sp.train`. Exits with 2 for what the user can put right."""
    words = list(sys.argv[1:] if words is None else words)
    logging.basicConfig(format="%(message)s", level=logging.INFO if _speaks() else logging.ERROR)
    logging.getLogger("llava_sp").setLevel(logging.INFO if _speaks() else logging.ERROR)
    if "--help" in words or "-h" in words:
        print(USAGE.format(program=Path(sys.argv[0]).name, default=default_config))
        return
    try:
        train(*_split(words, default_config))
    except FailedHere as error:  # perhaps on this process alone
        _complain(error)
    except UsageError as error:  # on all processes alike, or on all of a machine that lacks a file
        if is_first_of_machine():
            _complain(error)
        raise SystemExit(2) from error
    except BadSample as error:  # met while training, on the process whose turn it was
        reason = str(error).strip().splitlines()[-1]  # a loader's worker puts its whole traceback before it
        _complain(error, f"{reason}\non_bad_sample: skip leaves such samples out.")


def _complain(error: Exception, text: str | None = None) -> NoReturn:
    print(f"{process_name()}error: {text or error}", file=sys.stderr, flush=True)
    raise SystemExit(2) from error


def train(config: str | Path | None, words: Sequence[str]) -> dict[str, Any]:
    """One run from its configuration. Returns what `finished.json` holds."""
    launched = is_launched()
    model_args, data_args, args = load_config(config, words)
    if become_a_group_of_one(args):  # the arguments find their devices when they are made
        model_args, data_args, args = load_config(config, words)
    start = model_args.warm_start
    if start is not None and (Path(start).exists() or not is_local_path(start)):
        with _explained():
            settle_language_model(model_args)
    check_inputs(model_args, data_args, args)

    with contextlib.closing(RunFolder(args.output_dir)) as folder:
        return _train_in(folder, model_args, data_args, args, launched)


def _train_in(
    folder: RunFolder, model_args: ModelArguments, data_args: DataArguments, args: TrainArguments, launched: bool
) -> dict[str, Any]:
    """The run itself: what is cheap to check comes first, then the weights, training, and the proof."""
    settings = settings_of(model_args, data_args, args)
    folder.check(settings, args.world_size)
    if folder.is_finished:
        logger.info("%s is a finished run; nothing to do. Another output_dir starts a new one.", folder.path)
        end_group()
        return {}
    provenance = collect(args)
    if is_first():
        folder.open(settings, provenance)
    args.distributed_state.wait_for_everyone()  # an earlier attempt may have been writing until now
    checkpoint = folder.newest_checkpoint()

    with _explained():
        processor = build_processor(model_args, data_args)
        train_data, eval_data = build_datasets(processor, data_args, args)
    start_group(args)
    set_seed(args.seed)
    with _explained():
        model = build_model(model_args, args)
    assert processor.num_image_tokens == model.config.num_image_tokens, "processor and model disagree"
    assert processor.image_token_id == model.config.image_token_id, "processor and model disagree"
    trainer = make_trainer(model, processor, train_data, eval_data, data_args, args, folder, provenance, launched)

    _announce(args, len(train_data), eval_data, checkpoint)
    start = time.time()
    outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    with folder.writing("the trained model"):
        trainer.save_model()
    proof = verify_saved(trainer, folder.path, train_data.first_good())
    result = {**outcome.metrics, **proof, "steps": trainer.state.global_step, "seconds": round(time.time() - start, 1)}
    if is_first():
        folder.finish(result)
    logger.info("Finished: %s holds the model; %s.", folder.path, told(proof))
    _report_skipped(train_data, eval_data)
    end_group()
    return result


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """The ValueErrors of model, checkpoints and data are about what was given; OSErrors about what cannot be read."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error


def make_trainer(
    model: Any,
    processor: Any,
    train_data: Any,
    eval_data: Any,
    data_args: DataArguments,
    args: TrainArguments,
    folder: RunFolder,
    provenance: dict[str, Any] | None = None,
    launched: bool = False,
) -> LlavaSPTrainer:
    """The trainer of a run; a validation set is evaluated as often as checkpoints are saved unless stated otherwise."""
    if eval_data is not None and args.eval_strategy == "no":
        args.eval_strategy = IntervalStrategy.STEPS if args.save_strategy == "steps" else IntervalStrategy.EPOCH
        args.do_eval, args.eval_steps = True, args.eval_steps or args.save_steps
    return LlavaSPTrainer(
        model=model,
        args=args,
        train_dataset=train_data,
        eval_dataset=eval_data,
        data_collator=Collator(processor.pad_token_id),
        processing_class=processor,
        folder=folder,
        provenance=provenance,
        group_by_modality_length=data_args.group_by_modality_length,
        launched=launched,
    )


def _speaks() -> bool:
    return is_first()


def _split(words: list[str], default_config: str | Path | None) -> tuple[str | Path | None, list[str]]:
    """Take --config out of the command line."""
    config, rest = default_config, []
    position = 0
    while position < len(words):
        word = words[position]
        if word == "--config":
            if position + 1 == len(words):
                raise UsageError("command line: --config needs a file.")
            config, position = words[position + 1], position + 1
        elif word.startswith("--config="):
            config = word.partition("=")[2]
        else:
            rest.append(word)
        position += 1
    if config is None:
        raise UsageError("command line: --config FILE.yaml is missing; configs/ holds the shipped ones.")
    return config, rest


def _announce(args: TrainArguments, samples: int, eval_data: Any, checkpoint: Path | None) -> None:
    per_step = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    steps = args.max_steps if args.max_steps > 0 else math.ceil(math.ceil(samples / per_step) * args.num_train_epochs)
    logger.info(
        "%s samples%s, %s steps; %s per step = %s per process x %s processes x %s accumulated.",
        f"{samples:,}",
        f", {len(eval_data):,} for validation" if eval_data is not None else "",
        f"{steps:,}",
        per_step,
        args.per_device_train_batch_size,
        args.world_size,
        args.gradient_accumulation_steps,
    )
    if checkpoint:
        logger.info("Going on from %s (step %s).", checkpoint, log_position(checkpoint))
    else:
        logger.info("Starting in %s.", args.output_dir)


def _report_skipped(*datasets: Any) -> None:
    for dataset in datasets:
        facts = dataset.close_report() if dataset is not None else {}
        if facts.get("skipped") or facts.get("cut"):
            logger.info(
                "%s bad samples skipped, %s cut to the length limit: %s", *map(facts.get, ("skipped", "cut", "file"))
            )
