"""Processor and dataset of a training YAML without its weights: what `preview` and `check` look at."""

from __future__ import annotations

import os
from collections.abc import Sequence
from os import PathLike

from transformers import AutoConfig, AutoModel

from ..model.configuration_llava_sp import LlavaSPConfig
from ..model.processing_llava_sp import LlavaSPProcessor
from .dataset import ConversationDataset
from .mixture import load_mixture


def dataset_of_config(path: str | PathLike, overrides: Sequence[str] = ()) -> ConversationDataset:
    """The training data of a run as the run will see it; a bad sample raises, whatever `on_bad_sample` says.

    Args:
        path: a training YAML, see `llava_sp.train.arguments`.
        overrides: command-line words such as `["--model_max_length", "1024"]`.

    Raises:
        ValueError: an unknown key, a missing file, a backbone that is not set.
    """
    from llava_sp.train.arguments import load_config  # here alone: data is below train

    model, data, training = load_config(path, list(overrides))
    for key in ("language_model", "vision_tower"):
        if getattr(model, key) is None:
            raise ValueError(f"{path} sets no {key}")
        if os.path.isabs(getattr(model, key)) and not os.path.isdir(getattr(model, key)):
            raise ValueError(f"{key}: there is no folder {getattr(model, key)}")
    if data.mixture is None and data.data_path is None:
        raise ValueError(f"{path} sets neither mixture nor data_path")
    processor = LlavaSPProcessor.from_backbones(
        _geometry(model),
        model.language_model,
        model.vision_tower,
        image_aspect_ratio=data.image_aspect_ratio,
        conversation_template=data.template,
    )
    sources = data.mixture or [{"annotations": data.data_path, "images": data.image_folder}]
    return ConversationDataset(
        load_mixture(sources),
        processor,
        template=data.template,
        model_max_length=data.model_max_length,
        seed=training.seed if training.data_seed is None else training.data_seed,
    )


def _geometry(model) -> LlavaSPConfig:
    """A configuration with the run's token counts, from the backbones' own configurations."""
    vision = AutoConfig.from_pretrained(model.vision_tower)
    vision = getattr(vision, "vision_config", vision)
    if vision.model_type == "timm_wrapper":  # only the built network knows
        network = AutoModel.from_config(vision).timm_model
        vision.hidden_size = network.embed_dim
        vision.image_size, vision.patch_size = list(network.patch_embed.img_size), list(network.patch_embed.patch_size)
    return LlavaSPConfig(
        text_config=AutoConfig.from_pretrained(model.language_model),
        vision_config=vision,
        spatial_variant=model.spatial_variant,
        spatial_scales=model.spatial_scales,
        spatial_width=model.spatial_width,
        spatial_fusion=model.spatial_fusion,
    )
