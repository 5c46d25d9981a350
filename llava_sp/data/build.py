"""Processor and datasets of a run from its configuration, without the weights of its backbones.

A run builds these before its model, so that what is wrong with them is told at once; `preview` and `check` look at them.
`model`, `data` and `args` are the three parts that `llava_sp.config.arguments.load_config` gives.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from llava_sp.data.dataset import ConversationDataset
from llava_sp.data.mixture import Source, load_mixture
from llava_sp.data.skipped import SampleReport
from llava_sp.model.backbone_configs import language_config, vision_config
from llava_sp.model.configuration_llava_sp import LlavaSPConfig
from llava_sp.model.processing_llava_sp import LlavaSPProcessor
from llava_sp.model.projector import SPATIAL_VARIANTS

if TYPE_CHECKING:
    from llava_sp.config.arguments import DataArguments, ModelArguments, TrainArguments


def build_processor(model: ModelArguments, data: DataArguments) -> LlavaSPProcessor:
    """The run's processor. Raises ValueError for a model, template or image mode that does not fit."""
    return LlavaSPProcessor.from_backbones(
        geometry(model),
        language_model=model.language_model,
        vision_tower=model.vision_tower,
        image_aspect_ratio=data.image_aspect_ratio,
        conversation_template=data.conversation_template,
    )


def build_datasets(
    processor: LlavaSPProcessor, data: DataArguments, args: TrainArguments
) -> tuple[ConversationDataset, ConversationDataset | None]:
    """Training data and, if asked for, validation data (a file of its own, or a fixed random share)."""

    def dataset(sources: list[Source], name: str) -> ConversationDataset:
        return ConversationDataset(
            sources,
            processor,
            conversation_template=data.conversation_template,
            model_max_length=data.model_max_length,
            on_bad_sample=data.on_bad_sample,
            skipped_path=Path(args.output_dir or ".") / f"skipped_{name}.jsonl",
            seed=args.data_seed,
        )

    train = dataset(training_sources(data), "train")
    if data.eval_data_path:
        images = data.eval_image_folder or data.image_folder
        return train, dataset(load_mixture([{"annotations": data.eval_data_path, "images": images}]), "eval")
    if data.validation_fraction:
        return train.split(data.validation_fraction, seed=args.data_seed)
    return train, None


def training_sources(data: DataArguments) -> list[Source]:
    """The annotation files of a run: those of its mixture, or its one data_path."""
    return load_mixture(data.mixture or [{"annotations": data.data_path, "images": data.image_folder}])


def dataset_of_config(path: str | PathLike, overrides: Sequence[str] = ()) -> ConversationDataset:
    """The training data of a run as the run will see it; a bad sample raises, whatever `on_bad_sample` says.

    Args:
        path: a training YAML, see `llava_sp.config.arguments`.
        overrides: command-line words such as `["--model_max_length", "1024"]`.

    Raises:
        ValueError, OSError: an unknown key, a missing file, a backbone that is not set, a warm start that cannot be read.
    """
    from llava_sp.config.arguments import load_config  # here alone: data is below train
    from llava_sp.train.build import settle_language_model

    model, data, args = load_config(path, list(overrides))
    settle_language_model(model)
    for key in ("language_model", "vision_tower"):
        if getattr(model, key) is None:
            raise ValueError(f"{path} sets no {key}")
        if os.path.isabs(getattr(model, key)) and not os.path.isdir(getattr(model, key)):
            raise ValueError(f"{key}: there is no folder {getattr(model, key)}")
    if data.mixture is None and data.data_path is None:
        raise ValueError(f"{path} sets neither mixture nor data_path")
    dataset, _ = build_datasets(build_processor(model, data), data, args)
    dataset.on_bad_sample, dataset.report = "fail", SampleReport(None)  # looking writes nothing
    return dataset


def geometry(model: ModelArguments) -> LlavaSPConfig:
    """A configuration with the run's token counts, from the backbones' own configurations.

    Raises ValueError for an unknown variant and for scales or windows that do not fit in the patch grid.
    """
    if model.spatial_variant not in ("none", *SPATIAL_VARIANTS):
        known = ", ".join(["none", *SPATIAL_VARIANTS])
        raise ValueError(f"spatial_variant is {model.spatial_variant!r}; it must be one of: {known}")
    return LlavaSPConfig(
        text_config=language_config(model.language_model),
        vision_config=vision_config(model.vision_tower),
        **spatial_settings(model),
    )


def spatial_settings(model: ModelArguments) -> dict:
    """The run's keys of the projector, as `LlavaSPConfig` and `from_backbones` take them."""
    layers = model.vision_feature_layer
    return {
        "spatial_variant": model.spatial_variant,
        "spatial_scales": model.spatial_scales,
        "spatial_width": model.spatial_width,
        "spatial_fusion": model.spatial_fusion,
        "spatial_projection_bias": model.spatial_projection_bias,
        "fusion_kernel": model.fusion_kernel,
        "fusion_stride": model.fusion_stride,
        "vision_feature_layer": layers[0] if len(layers) == 1 else list(layers),
    }
