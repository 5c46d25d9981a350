"""A training run: configuration, checks, model, data, trainer, training, proof."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import platform
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft.helpers import disable_input_dtype_casting
from transformers import IntervalStrategy, TrainerCallback, set_seed

from llava_sp.checkpoints.opening.adapter import check_bases
from llava_sp.checkpoints.opening.warm_start import language_model_within
from llava_sp.checkpoints.reading.formats import recognise
from llava_sp.common import provenance
from llava_sp.common.files import is_missing_folder
from llava_sp.common.processes import FailedHere, Processes, leave_group
from llava_sp.common.watchdog import Watchdog
from llava_sp.config.arguments import DataArguments, Run, TrainArguments, read_keys
from llava_sp.data.annotations import BadSample
from llava_sp.data.build import build_datasets, build_processor
from llava_sp.data.collator import Collator
from llava_sp.data.dataset import ConversationDataset
from llava_sp.data.fingerprint import changes, fingerprint
from llava_sp.data.manifest import changes_since
from llava_sp.data.packing import PackSampler
from llava_sp.train.build import autocast_casts_back, build_model
from llava_sp.train.fit import Fit, LongestFirst
from llava_sp.train.logs import EndWithLauncher
from llava_sp.train.packing import describe, plan_packs, rows_of
from llava_sp.train.preflight import check_inputs
from llava_sp.train.processes import Watch, be_the_only_process, is_of_communication, samples_per_step, start_deepspeed
from llava_sp.train.run_folder import RunFolder, log_position
from llava_sp.train.signals import StopBySignal
from llava_sp.train.trainer import Diverged, LlavaSPTrainer, read_run_state
from llava_sp.train.universal import LoadUniversal, make_universal
from llava_sp.train.verify import in_words, verify_saved

logger = logging.getLogger("llava_sp.train")


def train(config: str | Path | None, words: Sequence[str]) -> dict[str, Any]:
    """One run from its configuration. Returns what `finished.json` holds."""
    callbacks: list[TrainerCallback] = []
    keys = read_keys(config, words)
    if "WORLD_SIZE" in os.environ:
        callbacks.append(EndWithLauncher())
    elif keys.get("deepspeed") or (torch.cuda.device_count() > 1 and not keys.get("use_cpu")):
        be_the_only_process()
    run = Run.of(keys)
    start = run.model.warm_start
    if start is not None and not is_missing_folder(start):
        run.model.language_model = str(language_model_within(start, run.model.language_model))
    here = Processes.from_environment()
    with here.together():
        check_inputs(run)
    with contextlib.closing(RunFolder(str(run.train.output_dir))) as folder:
        return _train_in(folder, run, here, callbacks)


def _train_in(folder: RunFolder, run: Run, here: Processes, callbacks: list[TrainerCallback]) -> dict[str, Any]:
    """The run itself: cheap checks first, then the weights, training, and the proof."""
    args = run.train
    if here.from_main(here.is_main and folder.is_finished):
        logger.info("%s is a finished run; nothing to do. Another output_dir starts a new one.", folder.path)
        leave_group()
        return {}
    facts = _facts(args)
    checkpoint = folder.join(here, run.settings, facts)
    watchdog = Watchdog(folder.path / ".alive", here, args.watchdog_minutes)
    callbacks.append(Watch(watchdog))

    with here.together():
        processor = build_processor(run)
        train_data, eval_data = build_datasets(processor, run)
    data = same_data(train_data, checkpoint, here, run.data)
    packs = plan_packs(run, train_data, here) if run.data.packing else None
    if eval_data is not None and args.eval_strategy == "no":  # as often as checkpoints are saved
        args.eval_strategy = IntervalStrategy.STEPS if args.save_strategy == "steps" else IntervalStrategy.EPOCH
        args.do_eval, args.eval_steps = True, args.eval_steps or args.save_steps
    if checkpoint and args.deepspeed:
        callbacks += _for_these_processes(checkpoint, args, here)
    start_deepspeed(args)
    set_seed(args.seed)
    model = build_model(run)
    if checkpoint and run.model.check_base:  # the backbones may have changed since the checkpoint
        check_bases(recognise(checkpoint), model.config)
    assert processor.num_image_tokens == model.config.num_image_tokens, "processor and model disagree"
    assert processor.image_token_id == model.config.image_token_id, "processor and model disagree"
    collator = Collator(processor.pad_token_id, run.data.pad_to_multiple_of)
    rows, largest = rows_of(train_data, packs, args.per_device_train_batch_size)
    fit = Fit(run, model.config, collator(largest) if largest else None, here)
    fit.settle()
    trainer = LlavaSPTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=eval_data,
        data_collator=collator,
        processing_class=processor,
        callbacks=callbacks,
        folder=folder,
        provenance=facts,
        data=data,
        group_by_modality_length=run.data.group_by_modality_length,
        packs=packs,
    )

    if args.longest_step_first:
        trainer.add_callback(LongestFirst(trainer, fit))
    _log_plan(args, train_data, eval_data, checkpoint, packs)
    if packs is not None and here.is_main:
        logger.info(describe(packs, run.data.pad_to_multiple_of))
    start = time.time()
    stop = StopBySignal(trainer.accelerator)
    trainer.add_callback(stop)
    with (
        stop.listening(),
        fit.explained(),
        _training_errors(run, watchdog),
        disable_input_dtype_casting(model, autocast_casts_back(run)),
    ):
        outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.stopped_by:
        leave_group()
        stop.end(folder.newest_checkpoint())
    result = _finish(trainer, folder, outcome.metrics, train_data.first_good(), start)
    for dataset in filter(None, (train_data, eval_data)):
        report = dataset.close_report()
        if report["skipped"] or report["cut"]:
            logger.info("%(skipped)s bad samples skipped, %(cut)s cut to the length limit: %(file)s", report)
    leave_group()
    return result


def _for_these_processes(checkpoint: Path, args: TrainArguments, here: Processes) -> list[TrainerCallback]:
    """Prepares DeepSpeed's checkpoint of another number of processes, and returns what loads it."""
    before = len(read_run_state(checkpoint)["losses"])
    if before == here.world_size:
        return []
    with here.together():
        if here.is_main:
            make_universal(checkpoint, args, before)
    return [LoadUniversal(args, checkpoint)]


def _finish(
    trainer: LlavaSPTrainer,
    folder: RunFolder,
    metrics: dict[str, float],
    sample: dict[str, torch.Tensor] | None,
    start: float,
) -> dict[str, Any]:
    """Save the model, read it back and compare it, and mark the run as finished. Returns what `finished.json` holds."""
    with folder.writing("the trained model"):
        trainer.save_model()
    proof = verify_saved(trainer, folder.path, sample)
    result = {**metrics, **proof, "steps": trainer.state.global_step, "seconds": round(time.time() - start, 1)}
    if trainer.args.process_index == 0:
        folder.finish(result)
    logger.info("Finished: %s holds the model; %s.", folder.path, in_words(proof))
    return result


def same_data(
    dataset: ConversationDataset, checkpoint: Path | None, here: Processes, data: DataArguments
) -> dict[str, Any]:
    """The fingerprint of the data. Raises `ValueError` if it differs between processes or from the checkpoint's."""
    now = fingerprint(dataset)
    differing = [
        f"process {rank}: {', '.join(found)}"
        for rank, found in enumerate(here.gather(changes(here.from_main(now), now)))
        if found
    ]
    if differing:
        raise ValueError(f"the processes do not see the same data as process 0: {'; '.join(differing)}")
    since = {}
    if checkpoint:
        since[f"{checkpoint} was written"] = changes(read_run_state(checkpoint)["data"], now)
    if data.data_manifest:
        since[f"{data.data_manifest} was written"] = changes_since(data.data_manifest, now)
    for when, found in since.items():
        what = f"the data has changed since {when}: {'; '.join(found)}"
        if found and data.check_data:
            cure = "Restore it, choose another output_dir, or use the current data: --check_data false"
            raise ValueError(f"{what}. {cure}")
        if found:
            logger.warning("%s.", what)
    return now


@contextlib.contextmanager
def _training_errors(run: Run, watchdog: Watchdog) -> Iterator[None]:
    """While training, a bad sample, a failed write or a lost process is reported; any other error keeps its traceback."""
    try:
        yield
    except BadSample as error:
        advice = "" if run.data.on_bad_sample == "skip" else "\non_bad_sample: skip leaves such samples out"
        reason = str(error).strip().splitlines()[-1]  # a loader's worker prepends its whole traceback
        raise FailedHere(reason.removeprefix(f"{BadSample.__module__}.{BadSample.__name__}: ") + advice) from error
    except (FailedHere, Diverged):
        raise
    except (ValueError, OSError, MemoryError) as error:
        raise RuntimeError(f"training ended: {error}") from error
    except RuntimeError as error:
        lost = watchdog.lost() if is_of_communication(error) else ""
        if not lost:
            raise
        what = " ".join(str(error).split())[:200]
        raise FailedHere(f"lost {lost}: {what}. The same command resumes from the newest checkpoint") from error


def _facts(args: TrainArguments) -> dict[str, Any]:
    """Facts about a run besides its settings, for run.yaml and the checkpoints' manifests."""
    return {
        "started": provenance.now(),
        "command": provenance.command(),
        "commit": provenance.git_commit(Path(__file__).parent),
        "seed": args.seed,
        "processes": args.world_size,
        "samples_per_step": samples_per_step(args),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "versions": provenance.versions(),
    }


def _log_plan(
    args: TrainArguments,
    data: ConversationDataset,
    eval_data: ConversationDataset | None,
    checkpoint: Path | None,
    packs: PackSampler | None,
) -> None:
    per_step, samples = samples_per_step(args), len(data) if packs is None else len(packs.samples)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(math.ceil(samples / per_step) * args.num_train_epochs)
    validation = "" if eval_data is None else f", {len(eval_data):,} for validation"
    rows = (
        f"{args.per_device_train_batch_size} per process x {args.world_size} processes x "
        f"{args.gradient_accumulation_steps} accumulated"
    )
    how = f" = {rows}" if packs is None else ", in packs"
    logger.info(f"{samples:,} samples{validation}, {steps:,} steps; {per_step} per step{how}.")
    if checkpoint:
        logger.info("Resuming from %s (step %s).", checkpoint, log_position(checkpoint))
    else:
        logger.info("Starting in %s.", args.output_dir)
