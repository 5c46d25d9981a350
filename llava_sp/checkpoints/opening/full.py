"""Opening our full checkpoints: by transformers, after checking that the folder holds the whole model."""

from __future__ import annotations

import dataclasses
from typing import Any

import transformers
from transformers import PreTrainedConfig

from llava_sp.checkpoints.opening.fill import check_model
from llava_sp.checkpoints.opening.fit import check_fits
from llava_sp.checkpoints.opening.foreign import bases_of
from llava_sp.checkpoints.opening.probes import tower_problem
from llava_sp.checkpoints.reading.formats import Checkpoint
from llava_sp.common.schema import expect
from llava_sp.model.backbone_configs import as_value_error
from llava_sp.model.configuration_llava_sp import PROJECTOR_SETTINGS, LlavaSPConfig

# Written together: if one is missing, logits or patches would differ.
_STEPS = (
    "vision_tower_leading_tokens",
    *(f"language_model_{step}" for step in ("head_bias", "logit_scale", "logit_softcap")),
)
# Must agree for one model's projector to fit into another.
_SHAPE_FIELDS = (*(name for name in PROJECTOR_SETTINGS if name != "vision_feature_layer"), "vision_width", "grid_size")


def open_full(cls, found: Checkpoint, *args, config=None, output_loading_info: bool = False, **kwargs):
    """Open a full checkpoint of ours; raises for tensors missing, unexpected, of another shape, or untrained."""
    bases_of(found, kwargs.pop("language_model", None), kwargs.pop("vision_tower", None))
    of_all_models = {field.name for field in dataclasses.fields(PreTrainedConfig)} - {"dtype"}
    settings = {name: kwargs.pop(name) for name in of_all_models & kwargs.keys()}
    config = recorded_config(found, config, **settings)
    quantized = "quantization_config" in found.config
    if not quantized:
        check_fits(found, config)
    model, info = cls.from_full(found.folder, *args, config=config, output_loading_info=True, **kwargs)
    if not quantized:
        check_model(model, found.folder, found.tensors.values())
    problem = tower_problem(model.model.vision_tower, config)
    if problem:
        raise ValueError(problem)
    return (model, info) if output_loading_info else model


def recorded_config(found: Checkpoint, given: LlavaSPConfig | None = None, **settings) -> LlavaSPConfig:
    """config.json of a checkpoint in our formats, or `given`.

    Raises `ValueError` for invalid values, missing settings, or contradictions.
    """
    differences = [] if given is None else config_differences(found, given)
    if differences:  # the Auto classes turn the keywords into a configuration
        raise ValueError(f"{found.folder}: the configuration is not that of the weights: {'; '.join(differences)}")
    if given is not None:
        return given
    with as_value_error(found.folder):
        config = LlavaSPConfig.from_pretrained(found.folder, **settings)
    for part, made in {"": config, "text_config": config.text_config, "vision_config": config.vision_config}.items():
        stated = found.config.get(part, {}) if part else found.config
        needed = dict.fromkeys(_decisive(made, found.config.get("transformers_version")), Any)
        if not part and not stated.keys().isdisjoint(_STEPS):
            needed |= dict.fromkeys(_STEPS, Any)
        expect(stated, needed, f"{found.folder / 'config.json'}: {part}".removesuffix(": "))
    return config


def _decisive(config: PreTrainedConfig, version: str | None) -> set[str]:
    """The settings that a config.json must have if saved by this version of transformers, or by another one.

    If one is missing, a default would silently change the model.
    """
    ours = isinstance(config, LlavaSPConfig)
    of_this = config.to_dict().keys() - PreTrainedConfig().to_dict().keys()
    if ours:  # later versions of this package may add some
        of_this -= set(LlavaSPConfig.__annotations__)
    settings = set(PROJECTOR_SETTINGS) if ours else set()
    return settings | (of_this if version in (None, transformers.__version__) else set())


def config_differences(found: Checkpoint, config: LlavaSPConfig) -> list[str]:
    """The differences between the configuration of a checkpoint's projector and `config`, as text."""
    saved = recorded_config(found)
    return [
        f"{field} is {getattr(saved, field)!r} there and {getattr(config, field)!r} here"
        for field in _SHAPE_FIELDS
        if getattr(saved, field) != getattr(config, field)
    ]
