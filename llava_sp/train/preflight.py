"""Checks before anything is loaded: missing inputs and conflicts of a run, in one message."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from transformers import SchedulerType, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from llava_sp.checkpoints.opening.warm_start import holds_lora
from llava_sp.common.files import is_missing_folder
from llava_sp.common.schema import expect, one_of
from llava_sp.config.arguments import DataArguments, ModelArguments, Run, TrainArguments
from llava_sp.data.mixture import load_mixture
from llava_sp.data.sources import missing
from llava_sp.train.build import SCRATCH
from llava_sp.train.kernels import liger_problem
from llava_sp.train.processes import samples_per_step
from llava_sp.train.run_folder import RunFolder
from llava_sp.train.stages import FIRST_STAGES, STAGES

MODEL_SOURCES = {
    "language_model": "a hub id such as lmsys/vicuna-7b-v1.5, or a folder with a causal language model",
    "vision_tower": "a hub id such as openai/clip-vit-large-patch14-336, or a folder with a vision model",
}
HELP = """
Set a key by --key VALUE or in the YAML file. To try the whole recipe on data that comes with the project: \
bash scripts/quickstart.sh"""
VARIABLES = {
    "language_model": "LLAVA_SP_LANGUAGE_MODEL",
    "vision_tower": "LLAVA_SP_VISION_TOWER",
    "data_path": "LLAVA_SP_DATA",
    "image_folder": "LLAVA_SP_DATA",
    "projector_checkpoint": "LLAVA_SP_RUNS",
}


def check_inputs(run: Run) -> None:
    """Raises `ValueError` that names every missing or conflicting input, the key that sets it, and its source."""
    model, data, args = run.model, run.data, run.train
    expect({"stage": args.stage}, {"stage": one_of(*STAGES)}, "This run cannot start")
    problems = [
        *_warm_start(model, args),
        *_models(model),
        *_projector(model, args),
        *_data(data),
        *_kernels(model, args),
        *_trainer(args),
        *_output(run),
    ]
    if problems:
        raise ValueError("\n- ".join(["This run cannot start yet; what is missing or wrong:", *problems]) + HELP)


def _named(key: str, value: object) -> str:
    variable = f" (environment: {VARIABLES[key]})" if key in VARIABLES else ""
    return f"{key} = {value}{variable}"


def _warm_start(model: ModelArguments, args: TrainArguments) -> Iterator[str]:
    start = model.warm_start
    if start is None:
        return
    if is_missing_folder(start):
        yield f"warm_start = {start} does not exist; give a trained LLaVA-1.5 (folder, file or hub id), or null."
    elif "lora" not in STAGES[args.stage] and holds_lora(start):
        yield (
            f"warm_start = {start} has LoRA, which the stage {args.stage} does not train: merge it first "
            "(python -m llava_sp.checkpoints.merge), and start from the merged model."
        )


def _models(model: ModelArguments) -> Iterator[str]:
    yield from filter(None, (missing_model(key, getattr(model, key)) for key in MODEL_SOURCES))


def missing_model(key: str, name: str | None) -> str | None:
    """Why the model that `key` names cannot be opened; None if it is there."""
    source = MODEL_SOURCES[key]
    if name is None:
        return f"{key} is not set: {source}."
    if Path(name).is_absolute():  # as every local path is by now
        if (Path(name) / "config.json").is_file():
            return None
        return f"{_named(key, name)}: there is no model (no config.json) in this folder; give {source}."
    reason = _unreachable(name)
    return f"{_named(key, name)}: {reason}; give {source}." if reason else None


def _unreachable(name: str) -> str | None:
    """Why a hub model is not available, asking the hub once and only for a model that is not in the cache; else None."""
    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return None
        if constants.HF_HUB_OFFLINE:
            return (
                f"HF_HUB_OFFLINE is set and this model is not in the cache ({constants.HF_HUB_CACHE}); download it first "
                f"(hf download {name})"
            )
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=10)
    except HFValidationError:
        return "this is neither a folder nor a model's name"
    except HfHubHTTPError as error:
        return f"there is no such folder, and {constants.ENDPOINT} has no readable model of this name ({_short(error)})"
    except HTTPError as error:
        return f"this model is not in the cache ({constants.HF_HUB_CACHE}), and {constants.ENDPOINT} cannot be reached ({error})"
    return None


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _projector(model: ModelArguments, args: TrainArguments) -> Iterator[str]:
    path = model.projector_checkpoint
    if path == SCRATCH:
        return
    if path is None:
        if args.stage not in FIRST_STAGES:
            yield (
                "projector_checkpoint is not set: give the output folder of stage 1 (scripts/pretrain.sh), whose whole "
                f"projector this stage starts from; '{SCRATCH}' starts from random weights."
            )
    elif not Path(path).is_dir():
        yield (
            f"{_named('projector_checkpoint', path)}: there is no such folder; it is the output of stage 1: run "
            "scripts/pretrain.sh first, or give its output_dir."
        )
    elif not (Path(path) / "llava_sp.json").is_file():
        steps = sorted(entry.name for entry in Path(path).glob("checkpoint-*"))
        hint = (
            f"stage 1 has only reached {steps[-1]}; finish it" if steps else "give the output_dir of a finished stage 1"
        )
        yield f"{_named('projector_checkpoint', path)}: this folder holds no finished projector (no llava_sp.json); {hint}."


def _data(data: DataArguments) -> Iterator[str]:
    source = f"\n  The data comes from {data.data_source}." if data.data_source else ""
    if data.mixture and data.data_path:
        yield "mixture and data_path are both set; leave one out (--data_path null)."
    elif data.mixture:
        yield from _mixture(Path(data.mixture))
    elif data.data_path is None:
        yield "data_path is not set: give a LLaVA JSON or JSONL file (or mixture, a YAML file that lists several)."
    else:
        problems = []
        if not Path(data.data_path).is_file():
            problems.append(f"{_named('data_path', data.data_path)}: there is no such file.")
        if data.image_folder is not None and not Path(data.image_folder).is_dir():
            problems.append(f"{_named('image_folder', data.image_folder)}: there is no such folder.")
        if problems:
            problems[-1] += source
        yield from problems
    if data.data_manifest and not Path(data.data_manifest).is_file():
        yield f"data_manifest = {data.data_manifest}: there is no such file; python -m llava_sp.data.check --manifest writes it."
    if data.eval_data_path and not Path(data.eval_data_path).is_file():
        yield f"eval_data_path = {data.eval_data_path}: there is no such file."
    if data.eval_data_path and data.validation_fraction:
        yield "eval_data_path and validation_fraction are both set; leave one out."


def _mixture(file: Path) -> Iterator[str]:
    try:
        sources = load_mixture(file)
    except ValueError as error:
        yield f"mixture = {file}: {error}."
        return
    for source in sources:
        for key, path in missing(source):
            yield f"mixture = {file}: {key}: {path} does not exist."


def _kernels(model: ModelArguments, args: TrainArguments) -> Iterator[str]:
    if not args.use_liger_kernel:
        return
    known = model.language_model is not None and not is_missing_folder(model.language_model)  # else another message
    if problem := liger_problem(model.language_model if known else None):
        yield f"use_liger_kernel = true: {problem}."


def _trainer(args: TrainArguments) -> Iterator[str]:
    """Creates trackers and schedule as Trainer does, to raise its errors now instead of hours later."""
    try:
        for tracker in get_reporting_integration_callbacks(args.report_to):
            tracker()
    except (RuntimeError, ImportError, ValueError) as error:  # its package is not installed
        yield f"report_to = {args.report_to}: {_short(error).rstrip('.')}."
    steps = args.max_steps if args.max_steps > 0 else 10**6
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
    kind, kwargs = SchedulerType(args.lr_scheduler_type), cast("dict | None", args.lr_scheduler_kwargs)
    try:
        schedule: Any = get_scheduler(kind, optimizer, args.get_warmup_steps(steps), steps, kwargs)
        rates = [share(step) for share in schedule.lr_lambdas for step in (0, steps // 2, steps - 1)]
        wrong = "" if all(map(math.isfinite, rates)) else f"the rate becomes {rates} times learning_rate"
    except (TypeError, ValueError, ArithmeticError) as error:
        wrong = _short(error)
    if wrong:
        yield f"lr_scheduler_kwargs = {kwargs}: {wrong} (lr_scheduler_type = {kind.value})."


def _output(run: Run) -> Iterator[str]:
    folder = run.train.output_dir
    if folder in (None, "trainer_output"):
        yield "output_dir is not set: give the folder that this run writes to."
    else:
        yield from RunFolder(folder).conflicts(run.settings, samples_per_step(run.train))
