"""Opening checkpoints of other code: the original's LoRA, full models and first-stage projectors, transformers' LLaVA.

Each opens on its backbones as our own adapter checkpoints do, tensor for tensor: nothing stays random, nothing is
omitted, and an invalid tensor is named with its file.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import PreTrainedConfig

from llava_sp.checkpoints.opening.backbones import Backbones, from_llava_hf
from llava_sp.checkpoints.opening.fill import fill, freeze
from llava_sp.checkpoints.opening.fit import check_fits
from llava_sp.checkpoints.reading.formats import Checkpoint
from llava_sp.checkpoints.reading.names import ADAPTER_NAME
from llava_sp.checkpoints.reading.places import base_kwargs, find_base, hub_kwargs
from llava_sp.model.backbone_configs import is_original, language_config, load_tokenizer
from llava_sp.model.configuration_llava_sp import LlavaSPConfig
from llava_sp.model.processing_llava_sp import add_special_tokens

# Language model settings that change its computation but no shape, with their keys in the original's config.json.
_LANGUAGE_SETTINGS = {
    "hidden_act": ("hidden_act",),
    "rms_norm_eps": ("rms_norm_eps",),
    "num_attention_heads": ("num_attention_heads",),
    "rope_parameters": ("rope_theta", "rope_scaling"),
}
_VOCABULARIES = ("tokenizer.model", "tokenizer.json")


def open_original(
    cls,
    found: Checkpoint,
    *,
    language_model: str | os.PathLike | None = None,
    vision_tower: str | os.PathLike | None = None,
    dtype: torch.dtype | str = "auto",
    is_trainable: bool = False,
    **load_kwargs,
):
    """Open a checkpoint of the original code.

    Args:
        language_model, vision_tower: instead of the recorded ones, which are often paths on their authors' machines.
        dtype: of all weights; `"auto"` is the one that the checkpoint records, else the language model's own.
        is_trainable: leaves LoRA and projector trainable, in float32; by default nothing trains.
        load_kwargs: for the backbones, see `from_backbones`.

    Raises:
        ValueError: a tensor is missing, left over, of another shape, or cannot be trained weights (with key and file);
            a backbone is not at its recorded path.
    """
    load_kwargs = base_kwargs(load_kwargs)
    backbones = Backbones.find(*bases_of(found, language_model, vision_tower, **hub_kwargs(load_kwargs)), **load_kwargs)
    config = foreign_config(found, backbones)
    check_fits(found, config)
    dtype = found.dtype if dtype == "auto" else dtype
    model = backbones.load(cls, config, dtype, **load_kwargs)
    if found.lora is not None:
        model.add_adapter(found.lora_config(), adapter_name=ADAPTER_NAME)
    fill(freeze(model, is_trainable), found)
    return model


def open_llava_hf(cls, found: Checkpoint, *, language_model=None, vision_tower=None, dtype="auto", **load_kwargs):
    """Open transformers' LLaVA-1.5 as a model without spatial tokens."""
    load_kwargs = base_kwargs(load_kwargs)
    backbones = Backbones.find(*bases_of(found, language_model, vision_tower), **load_kwargs)
    config = foreign_config(found, backbones)
    if "quantization_config" not in found.config:
        check_fits(found, config)
    return from_llava_hf(cls, backbones, config, dtype, **load_kwargs)


def bases_of(
    found: Checkpoint, language_model: str | os.PathLike | None, vision_tower: str | os.PathLike | None, **hub_kwargs
) -> tuple[str, str]:
    """Where language model and tower are: as given, else as recorded. Raises `ValueError` if one does not exist."""
    own = {"language_model": found.holds_language_model, "vision_tower": found.holds_vision_tower}
    given = {"language_model": language_model, "vision_tower": vision_tower}
    for keyword, value in given.items():
        if value is not None and own[keyword]:
            raise ValueError(f"{found.folder} is a full checkpoint, with its own base: {keyword}= is not supported")
    recorded = {keyword: found.folder if own[keyword] else getattr(found, keyword) for keyword in given}
    language, tower = (find_base(found.folder, k, value, recorded[k], **hub_kwargs) for k, value in given.items())
    return language, tower


def foreign_config(found: Checkpoint, backbones: Backbones) -> LlavaSPConfig:
    """The configuration of a checkpoint of other code on these backbones. Raises `ValueError` if they do not match."""
    config = backbones.config(vision_feature_layer=found.feature_layer, **found.spatial)
    check_language_model(found, config.text_config, (config.image_token_id, config.pad_token_id))
    return config


def check_language_model(found: Checkpoint, text: PreTrainedConfig, token_ids: tuple, **hub_kwargs) -> None:
    """Raises `ValueError` where the checkpoint's own copy of settings or tokenizer is not that of its language model.

    The original code reads both from the folder of LoRA or projector; here they are the base's.

    Args:
        text, token_ids: the language model's configuration; the ids of its image and padding tokens.
    """
    if found.holds_language_model:
        return
    other = "another language model than it was trained on; pass language_model="
    if is_original(found.config):
        own = language_config(found.folder)
        for name, keys in _LANGUAGE_SETTINGS.items():
            there, here = (_plain_rope(getattr(config, name, None)) for config in (own, text))
            if there != here and any(key in found.config for key in keys):
                raise ValueError(f"{found.folder / 'config.json'}: {name} is {there!r} there and {here!r} in {other}")
    if has_tokenizer(found):
        ids = add_special_tokens(load_tokenizer(found.folder, **hub_kwargs))[:2]
        if ids != token_ids:
            raise ValueError(
                f"{found.folder}: its tokenizer (tokenizer_config.json and its vocabulary) has <image>, <pad> at {ids}, "
                f"not {token_ids} as in {other}"
            )


def _plain_rope(value: Any) -> Any:
    """A setting; for rotary positions, without the type's older name."""
    return {key: one for key, one in value.items() if key != "type"} if isinstance(value, dict) else value


def has_tokenizer(found: Checkpoint) -> bool:
    return any((found.folder / name).is_file() for name in _VOCABULARIES)
