"""Opening what other code wrote: the original's LoRA folders, full models and first-stage projectors, transformers' LLaVA.

Each opens on its backbones as our own adapter checkpoints do, tensor for tensor: nothing is left at random, nothing is
left out, and a tensor that cannot be right is named with its file.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from llava_sp.checkpoints.opening.adapter import config_differences, is_adapter, open_adapter
from llava_sp.checkpoints.opening.backbones import from_backbones, from_llava_hf
from llava_sp.checkpoints.opening.fill import fill, freeze
from llava_sp.checkpoints.opening.fit import OURS, check_fits
from llava_sp.checkpoints.reading.formats import (
    ADAPTER_NAME,
    FORMATS,
    HEAD,
    LANGUAGE,
    ORIGINAL_GRID,
    PROJECTOR,
    Checkpoint,
    feature_layer,
    lora_config,
    original_projector_name,
    our_config,
    raise_contradiction,
    recognise,
    recorded_dtype,
)
from llava_sp.checkpoints.reading.places import base_kwargs, fetch, find_base, find_config, from_hub, hub_kwargs
from llava_sp.checkpoints.reading.tensor_files import StoredTensor, read_json, read_tensors
from llava_sp.model.backbone_configs import is_original, language_config, load_tokenizer, vision_config
from llava_sp.model.configuration_llava_sp import LlavaSPConfig
from llava_sp.model.processing_llava_sp import LlavaSPProcessor, add_special_tokens

# A language model's settings that change what it computes and no shape, with their keys in the original's config.json.
_LANGUAGE_SETTINGS = {
    "hidden_act": ("hidden_act",),
    "rms_norm_eps": ("rms_norm_eps",),
    "num_attention_heads": ("num_attention_heads",),
    "rope_parameters": ("rope_theta", "rope_scaling"),
}
_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")


def format_of(path: str | os.PathLike, **kwargs) -> str:
    """The format (a key of `formats.FORMATS`) of a folder, file or hub id; reads no more than it must.

    Raises:
        ValueError: a folder that is none of them.
        OSError: neither a folder nor a model that can be had from the hub.
    """
    if is_adapter(path, **kwargs):
        return "llava_sp_adapter"
    if not Path(path).is_file():
        config = find_config(path, **kwargs)
        if config is not None and read_json(config).get("model_type") == "llava_sp":
            return "llava_sp"
    return recognise(fetch(path, **kwargs)).format


def opener(path: str | os.PathLike, **hub_kwargs) -> Callable | None:
    """What opens this checkpoint, as `f(model_class, path, **kwargs)`; None for transformers' own from_pretrained."""
    kind = format_of(path, **hub_kwargs)
    return None if kind == "llava_sp" else _OPENERS.get(kind, open_original)


def needs_processor(path: str | os.PathLike, **kwargs) -> bool:
    """Whether a checkpoint of other code stands at `path`, beside which there is no processor of ours."""
    if (Path(path) / "processor_config.json").is_file() and not (Path(path) / "config.json").is_file():
        return False  # a processor that stands alone
    if not Path(path).exists():
        ours = from_hub(path, "processor_config.json", **kwargs)
        if ours is not None and read_json(Path(ours)).get("processor_class") == "LlavaSPProcessor":
            return False
    return format_of(path, **kwargs) not in OURS


def open_original(
    cls,
    path: str | os.PathLike,
    *,
    language_model: str | os.PathLike | None = None,
    vision_tower: str | os.PathLike | None = None,
    dtype: torch.dtype | str = "auto",
    **load_kwargs,
):
    """Open a checkpoint of the original code; `LlavaSPForCausalLM.from_pretrained` calls this.

    Args:
        language_model, vision_tower: in place of the recorded ones, which are often paths on their authors' machines.
        dtype: of all weights; `"auto"` is the one that the checkpoint records, else the language model's own.
        load_kwargs: for the backbones, see `from_backbones`.

    Raises:
        ValueError: a tensor is missing, left over, of another shape, or cannot be trained weights (with key and file);
            a backbone is not where the checkpoint says.
    """
    found = recognise(fetch(path, **load_kwargs))
    check_complete(found)
    load_kwargs = base_kwargs(load_kwargs)
    language, tower = bases_of(found, language_model, vision_tower, **hub_kwargs(load_kwargs))
    config = full_config(found, language, tower, **hub_kwargs(load_kwargs))
    if found.holds_language_model:
        check_fits(found, config)
    check_tokenizers(found, language, **hub_kwargs(load_kwargs))
    dtype = recorded_dtype(found) if dtype == "auto" else dtype
    model = from_backbones(
        cls,
        language,
        tower,
        **found.spatial,
        vision_feature_layer=feature_layer(found),
        dtype=dtype,
        **load_kwargs,
    )
    if found.lora is not None:
        model.add_adapter(lora_config(found), adapter_name=ADAPTER_NAME)
    fill(model, found)
    return freeze(model)


def open_llava_hf(cls, path: str | os.PathLike, **load_kwargs):
    """Open transformers' LLaVA-1.5 as a model without spatial tokens; `LlavaSPForCausalLM.from_pretrained` calls this."""
    for keyword in ("language_model", "vision_tower"):
        if load_kwargs.pop(keyword, None) is not None:
            raise ValueError(f"{path} is a full checkpoint, with its own backbones: drop {keyword}=")
    found = recognise(fetch(path, **load_kwargs))
    if "quantization_config" not in found.config:
        check_fits(found, full_config(found, found.folder, found.folder))
    return from_llava_hf(cls, found.folder, **base_kwargs(load_kwargs))


def check_full(path: str | os.PathLike, **load_kwargs) -> list[StoredTensor] | None:
    """Whether our full checkpoint at `path` is whole, before it is opened; its tensors, for `check_values` afterwards.

    None where there is nothing to look at: quantised weights, weights that come from elsewhere.

    Raises:
        ValueError: a tensor is missing, left over or of another shape; a file is cut off.
    """
    elsewhere = ("state_dict", "subfolder", "variant", "gguf_file")
    if any(load_kwargs.get(name) for name in elsewhere):
        return None
    found = recognise(fetch(path, **load_kwargs))
    if "quantization_config" in found.config:
        return None
    config = load_kwargs.get("config")
    differences = config_differences(found.folder, config) if isinstance(config, LlavaSPConfig) else []
    if differences:  # of the Auto classes, which make a configuration of the keywords
        raise ValueError(
            f"{path}: the configuration is not that of the weights, which decide: {'; '.join(differences)}"
        )
    check_fits(found, our_config(found.folder))
    return list(found.tensors.values())


def full_config(
    found: Checkpoint, language: str | os.PathLike, tower: str | os.PathLike, **hub_kwargs
) -> LlavaSPConfig:
    """What a checkpoint of other code is on these backbones. Raises `ValueError` where it cannot be one."""
    layer = found.config.get("vision_feature_layer", -2) if found.format == "llava_hf" else feature_layer(found)
    text_config = language_config(language, **hub_kwargs)
    check_language_settings(found, text_config)
    return LlavaSPConfig(
        text_config=text_config,
        vision_config=vision_config(tower, **hub_kwargs),
        vision_feature_layer=layer,
        **found.spatial,
    )


_OPENERS = {"llava_sp_adapter": open_adapter, "llava_hf": open_llava_hf}


def open_processor(
    path: str | os.PathLike,
    *,
    language_model: str | os.PathLike | None = None,
    vision_tower: str | os.PathLike | None = None,
    image_aspect_ratio: str | None = None,
    conversation_template: str = "vicuna_v1",
    **kwargs,
) -> LlavaSPProcessor:
    """The processor of a checkpoint that other code wrote; `LlavaSPProcessor.from_pretrained` calls this.

    Args:
        image_aspect_ratio: "pad" or "crop"; None is what the checkpoint records, and for transformers' LLaVA, which
            records nothing, LLaVA-1.5's own "pad" (transformers' processor crops).
        conversation_template: no checkpoint of the original code records it; LLaVA-1.5's and LLaVA-SP's is vicuna_v1.
    """
    found = recognise(fetch(path, **kwargs))
    kwargs = hub_kwargs(base_kwargs(kwargs))
    language, tower = bases_of(found, language_model, vision_tower, **kwargs)
    check_tokenizers(found, language, **kwargs)
    if image_aspect_ratio is None:
        recorded = found.config.get("image_aspect_ratio")
        image_aspect_ratio = "pad" if found.format == "llava_hf" or recorded == "pad" else "crop"
    return LlavaSPProcessor.from_backbones(
        LlavaSPConfig(vision_config=vision_config(tower, **kwargs), **found.spatial),
        language_model=found.folder if has_tokenizer(found) else language,
        vision_tower=tower,
        image_aspect_ratio=image_aspect_ratio,
        conversation_template=conversation_template,
        **kwargs,
    )


def bases_of(
    found: Checkpoint, language_model: str | os.PathLike | None, vision_tower: str | os.PathLike | None, **kwargs
) -> tuple[str, str]:
    """Where language model and tower are: as given, else as recorded. Raises `ValueError` for what is not there."""
    if language_model is not None and found.holds_language_model:
        raise ValueError(f"{found.folder} is a full checkpoint, with its own language model: drop language_model=")
    language = find_base(
        found.folder, language_model, found.language_model, "language_model", "language model", **kwargs
    )
    tower = find_base(found.folder, vision_tower, found.vision_tower, "vision_tower", "vision tower", **kwargs)
    return language, tower


def check_language_settings(found: Checkpoint, language: PreTrainedConfig) -> None:
    """Raises `ValueError` where a LoRA folder or projector of the original has its base compute otherwise than it does.

    The original code reads the settings of the language model from that folder; here they are the base's.
    """
    if found.holds_language_model or not is_original(found.config):
        return
    own = language_config(found.folder)
    for field, keys in _LANGUAGE_SETTINGS.items():
        there, here = (_plain_rope(getattr(config, field, None)) for config in (own, language))
        if there != here and any(key in found.config for key in keys):
            raise ValueError(
                f"{found.folder / 'config.json'}: {field} is {there!r} there and {here!r} in the language model: they are not of "
                "one model; give the language model that it was trained on (language_model=, or language_model= with a warm start)"
            )


def _plain_rope(value: Any) -> Any:
    """A setting; that of the positions without the type's older name."""
    return {key: one for key, one in value.items() if key != "type"} if isinstance(value, dict) else value


def check_tokenizers(found: Checkpoint, language: str | os.PathLike, **hub_kwargs) -> None:
    """Raises `ValueError` where a checkpoint's tokenizer and its base's put image and padding at different ids."""
    if found.holds_language_model or not has_tokenizer(found):
        return
    ids = [
        add_special_tokens(load_tokenizer(folder, **hub_kwargs))[:2] for folder in (str(found.folder), str(language))
    ]
    if ids[0] != ids[1]:
        raise ValueError(
            f"the tokenizer in {found.folder} has its image and padding tokens at {ids[0]}, that of {language} at {ids[1]}: "
            "they are not of one model; give the language model that it was trained on (language_model=, or language_model= with a warm start)"
        )


def has_tokenizer(found: Checkpoint) -> bool:
    return any((found.folder / name).is_file() for name in _TOKENIZER_FILES)


def check_complete(found: Checkpoint) -> None:
    """Raises `ValueError` naming what is missing, has no place, cannot be LoRA, or stands twice and differs, with the file."""
    for file, copy in found.copies.items():
        held, copied = read_tensors(file), read_tensors(copy)
        differing = next((key for key, tensor in held.items() if not torch.equal(tensor, copied[key])), None)
        if differing is not None:
            raise_contradiction(file, copy, differing)
    if found.lora is not None:
        lora_config(found)
    if found.missing:
        more = f" and {len(found.missing) - 4} more" if len(found.missing) > 4 else ""
        file = next((tensor.file for tensor in found.part(PROJECTOR).values()), found.folder)
        names = [name.removeprefix(PROJECTOR) for name in found.missing[:4]]
        keys = [original_projector_name(name, found.spatial["spatial_variant"], ORIGINAL_GRID) for name in names]
        raise ValueError(
            f"{file} holds part of a projector only ({_layout(found)}): it lacks {', '.join(keys)}{more}. An intermediate checkpoint of "
            "the original's first stage does; its model.bin holds all"
        )
    if not found.holds_language_model:
        trained = {**found.part(LANGUAGE), **found.part(HEAD)}
        for tensor in trained.values():
            raise ValueError(
                f"{tensor.file} holds {tensor.key}, a trained part of the language model beside LoRA; the base's own would take "
                "its place, so it is not opened"
            )
    if found.unknown:
        odd = found.unknown[0]
        raise ValueError(f"{odd.file} holds {odd.key} {odd.shape}, which has no place in LLaVA-SP ({_layout(found)})")


def _layout(found: Checkpoint) -> str:
    variant = found.spatial.get("spatial_variant")
    fusion = {True: " with", False: " without"}.get(found.spatial.get("spatial_fusion"))
    return f"{FORMATS[found.format]}, variant {variant}" + (f"{fusion} integrator" if fusion else "")
