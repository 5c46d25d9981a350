"""Opening our full checkpoints: by transformers, after checking that the folder holds the whole model."""

from __future__ import annotations

import dataclasses

from transformers import PreTrainedConfig

from llava_sp.checkpoints.opening.fill import check_model
from llava_sp.checkpoints.opening.fit import check_fits
from llava_sp.checkpoints.opening.foreign import bases_of
from llava_sp.checkpoints.reading.formats import Checkpoint
from llava_sp.model.backbone_configs import as_value_error
from llava_sp.model.configuration_llava_sp import LlavaSPConfig

# Must agree for one model's projector to fit into another.
_SHAPE_FIELDS = (
    "spatial_variant",
    "spatial_scales",
    "spatial_width",
    "spatial_fusion",
    "spatial_projection_bias",
    "fusion_kernel",
    "fusion_stride",
    "vision_width",
    "grid_size",
)


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
    return (model, info) if output_loading_info else model


def recorded_config(found: Checkpoint, given: LlavaSPConfig | None = None, **settings) -> LlavaSPConfig:
    """config.json of a checkpoint of ours, or `given`. Raises `ValueError` for invalid values or contradictions."""
    differences = [] if given is None else config_differences(found, given)
    if differences:  # the Auto classes turn the keywords into a configuration
        raise ValueError(f"{found.folder}: the configuration is not that of the weights: {'; '.join(differences)}")
    if given is not None:
        return given
    with as_value_error(found.folder):
        return LlavaSPConfig.from_pretrained(found.folder, **settings)


def config_differences(found: Checkpoint, config: LlavaSPConfig) -> list[str]:
    """The differences between the configuration of a checkpoint's projector and `config`, as text."""
    saved = recorded_config(found)
    return [
        f"{field} is {getattr(saved, field)!r} there and {getattr(config, field)!r} here"
        for field in _SHAPE_FIELDS
        if getattr(saved, field) != getattr(config, field)
    ]
