"""Processor and datasets of a run from its configuration, without the weights of its backbones.

A run builds these before its model, so that errors come before minutes of loading; `preview` and `check` use them too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import torch

from llava_sp.checkpoints.opening.ends import never_stops
from llava_sp.checkpoints.opening.warm_start import language_model_within
from llava_sp.common.files import is_missing_folder
from llava_sp.common.processes import Processes
from llava_sp.common.schema import expect
from llava_sp.config.arguments import Run, load_config
from llava_sp.data.dataset import ConversationDataset
from llava_sp.data.features import PatchFeatures, made_of
from llava_sp.data.mixture import Source, load_mixture
from llava_sp.data.skipped import SampleReport
from llava_sp.model.backbone_configs import language_config, vision_config
from llava_sp.model.configuration_llava_sp import LlavaSPConfig
from llava_sp.model.processing_llava_sp import LlavaSPProcessor
from llava_sp.model.projector import SpatialProjector


def build_processor(run: Run) -> LlavaSPProcessor:
    """The run's processor; its token counts come from the backbones' own configurations.

    Warns if the language model would not learn to stop. Raises `ValueError` for an invalid model, projector, template or
    image aspect ratio.
    """
    config = config_of(run)
    assert run.model.language_model, "checked before"
    with torch.device("meta"):
        SpatialProjector(config)  # only for its errors
    processor = LlavaSPProcessor.from_backbones(
        config,
        language_model=run.model.language_model,
        vision_tower=run.model.vision_tower,
        image_aspect_ratio=run.data.image_aspect_ratio,
        conversation_template=run.data.conversation_template,
    )
    warning = never_stops(processor, run.model.language_model)
    if warning and Processes.from_environment().is_main:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    return processor


def config_of(run: Run) -> LlavaSPConfig:
    """The configuration of the run's model, from those of its backbones."""
    assert run.model.language_model and run.model.vision_tower, "checked before"
    return LlavaSPConfig(
        text_config=language_config(run.model.language_model),
        vision_config=vision_config(run.model.vision_tower),
        **run.model.projector,
    )


def build_datasets(processor: LlavaSPProcessor, run: Run) -> tuple[ConversationDataset, ConversationDataset | None]:
    """Training data and, if asked for, validation data (a file of its own, or a fixed random share)."""
    data, seed = run.data, run.train.data_seed or 0

    def dataset(sources: list[Source], name: str) -> ConversationDataset:
        return ConversationDataset(
            sources,
            processor,
            conversation_template=data.conversation_template,
            model_max_length=data.model_max_length,
            on_bad_sample=data.on_bad_sample,
            skipped_path=Path(run.train.output_dir or ".") / f"skipped_{name}.jsonl",
            seed=seed,
        )

    train = dataset(
        load_mixture(data.mixture or [{"annotations": data.data_path, "images": data.image_folder}]), "train"
    )
    if data.precompute_features:
        train.features = PatchFeatures(Path(data.precompute_features), made_of(train, run, config_of(run)))
    if data.eval_data_path:
        images = data.eval_image_folder or data.image_folder
        return train, dataset(load_mixture([{"annotations": data.eval_data_path, "images": images}]), "eval")
    if data.validation_fraction:
        return train.split(data.validation_fraction, seed=seed)
    return train, None


def run_of_config(path: str | PathLike, overrides: Sequence[str] = ()) -> Run:
    """The run of a configuration that names its backbones and data.

    Args:
        path: a training YAML, see `llava_sp.config.arguments`.
        overrides: command-line words such as `["--model_max_length", "1024"]`.

    Raises:
        ValueError, OSError: an unknown key, a missing file, a backbone that is not set, a warm start that cannot be read.
    """
    run = load_config(path, list(overrides))
    if run.model.warm_start is not None:
        run.model.language_model = str(language_model_within(run.model.warm_start, run.model.language_model))
    model, data = run.model, run.data.data_path or run.data.mixture
    backbones = {"language_model": model.language_model, "vision_tower": model.vision_tower}
    expect({**backbones, "data_path or mixture": data}, {str: str}, path)
    if missing := [name for name in backbones.values() if is_missing_folder(str(name))]:
        raise FileNotFoundError(f"there is no folder {missing[0]}, and it is not a valid hub id")
    return run


def dataset_of_config(path: str | PathLike, overrides: Sequence[str] = ()) -> ConversationDataset:
    """The training data of a run as the run uses it; a bad sample raises, regardless of `on_bad_sample`.

    Arguments and errors are those of `run_of_config`.
    """
    run = run_of_config(path, overrides)
    dataset, _ = build_datasets(build_processor(run), run)
    dataset.on_bad_sample, dataset.report = "fail", SampleReport(None)  # checking writes nothing
    return dataset
