"""Writing checkpoints for the original code, if its layers can hold them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from transformers import LlavaConfig, PreTrainedConfig

from llava_sp.checkpoints.opening.full import recorded_config
from llava_sp.checkpoints.reading.formats import Checkpoint
from llava_sp.checkpoints.reading.lora_settings import check_plain_lora
from llava_sp.checkpoints.reading.names import (
    LORA,
    ORIGINAL_GRID,
    ORIGINAL_SCALES,
    PEFT,
    PROJECTOR,
    TOWER,
    original_name,
)
from llava_sp.checkpoints.reading.places import base_folder
from llava_sp.checkpoints.reading.tensor_files import read_all, read_checked
from llava_sp.common.files import read_json
from llava_sp.common.schema import Check, expect, one_of, only
from llava_sp.model.configuration_llava_sp import LlavaSPConfig

_TOKENIZER = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_FACTOR = Check(lambda value: value > 1, "a factor above 1", float)


def to_original(found: Checkpoint, folder: Path, bases: dict[str, Any], max_shard_size: str) -> str:
    """Write a checkpoint for the original code to `folder`; returns what was written, as text.

    Raises:
        ValueError: the original code cannot hold this model, or a file that it needs is missing.
    """
    config = _our_config(found)
    held = {**config.to_dict(), "grid_size": config.grid_size}
    held |= {name: getattr(config, name).to_dict() for name in ("text_config", "vision_config")}
    expect(held, _layers_of_the_original(config), f"{found.folder} cannot be written for the original code")
    settings = _settings(found, config, bases)
    _write_json(folder / "config.json", settings)
    source = _find_tokenizer(found, config, bases)
    if source is None and found.holds_language_model:
        raise ValueError(
            f"{found.folder} has no tokenizer.model, which the original needs: give --language-model with one"
        )
    for name in _TOKENIZER:
        if source is not None and (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    rest = {} if found.lora else {name: t for name, t in found.tensors.items() if not name.startswith(PROJECTOR)}
    projector, others = (
        {
            original_name(name, config.spatial_variant, config.grid_size): tensor.contiguous()
            for name, tensor in part.items()
        }
        for part in (read_checked(found.part(PROJECTOR)), read_all(rest))
    )
    if found.holds_language_model:
        pattern = "model{suffix}.safetensors"
        save_torch_state_dict(projector | others, folder, filename_pattern=pattern, max_shard_size=max_shard_size)
        return "a full checkpoint for the original code"
    if not found.lora:
        name = "mm_projector.bin" if config.spatial_variant == "none" else "model.bin"
        torch.save(projector, folder / name)
        return f"{name} for the original code's --pretrain_mm_mlp_adapter"
    _write_json(folder / "adapter_config.json", _lora_settings(found, found.lora, settings["_name_or_path"]))
    lora = read_checked(found.part("", lora=True))
    lora = {PEFT + original_name(name, config.spatial_variant): tensor for name, tensor in lora.items()}
    torch.save({PEFT + key: tensor for key, tensor in projector.items()}, folder / "non_lora_trainables.bin")
    save_file(lora, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return "a LoRA folder for the original code (its name must contain 'llava' and 'lora' there)"


def _our_config(found: Checkpoint) -> LlavaSPConfig:
    if found.format == "llava_hf":
        llava = LlavaConfig.from_pretrained(found.folder)
        names = ("text_config", "vision_config", "image_token_index", "vision_feature_layer", "pad_token_id")
        shared: dict[str, Any] = {name: getattr(llava, name, None) for name in names}
        return LlavaSPConfig(**shared, spatial_variant="none")
    return recorded_config(found)


def _layers_of_the_original(config: LlavaSPConfig) -> dict[str, Any]:
    """The schema of a configuration whose layers the original's code, which fixes them, and transformers 4.37 have."""
    text, pooling = config.text_config, config.spatial_variant == "pooling"
    spec: dict[str, Any] = {
        "text_config": {
            "model_type": one_of("llama"),
            "head_dim?": one_of(text.hidden_size // text.num_attention_heads, None),
            "mlp_bias?": one_of(False),
        },
        "vision_config": {"model_type": one_of("clip_vision_model")},
        "vision_feature_layer": int,
        "projector_hidden_act": one_of("gelu"),
        "multimodal_projector_bias": one_of(True),
    }
    if config.spatial_variant != "none":
        spec |= {
            "spatial_variant": one_of("cropping", "pooling"),
            "spatial_scales": one_of(list(ORIGINAL_SCALES)),
            "grid_size": one_of(ORIGINAL_GRID),
            "spatial_projection_bias": one_of(not pooling),
            "spatial_fusion": one_of(*((True, False) if pooling else (True,))),
        }
        if config.spatial_fusion:
            spec |= {"fusion_kernel": one_of(16), "fusion_stride": one_of(2)}
    return spec


def _rope(found: Checkpoint, text: PreTrainedConfig) -> dict[str, Any]:
    """How positions are rotated, in the two fields of transformers 4. Raises `ValueError` for other kinds."""
    rope = {**(text.rope_parameters or {})}
    theta = rope.pop("rope_theta", 10000.0)
    kind = rope.pop("rope_type", rope.get("type", "default"))
    rope.pop("type", None)
    if kind == "default" and not rope:
        return {"rope_theta": theta, "rope_scaling": None}
    where = f"{found.folder} cannot be written for the original code: rope_parameters {text.rope_parameters}"
    expect({"rope_type": kind, **rope}, only({"rope_type": one_of("linear", "dynamic"), "factor": _FACTOR}), where)
    return {"rope_theta": theta, "rope_scaling": {"type": kind, "factor": float(rope["factor"])}}


def _lora_settings(found: Checkpoint, lora: dict[str, Any], base: str) -> dict[str, Any]:
    """PEFT's adapter_config.json in the fields that PEFT 0.4 to 0.8 know; they fail on any other.

    Raises `ValueError` for a setting that is not plain LoRA.
    """
    check_plain_lora(lora, found.lora_file)
    leaves = sorted({name.split(LORA)[0].rpartition(".")[2] for name in found.part("", lora=True)})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora["r"],
        "lora_alpha": lora["lora_alpha"],
        "lora_dropout": lora.get("lora_dropout") or 0.0,
        "target_modules": leaves,
        "bias": "none",
        "fan_in_fan_out": False,
    }


def _settings(found: Checkpoint, config: LlavaSPConfig, bases: dict[str, Any]) -> dict[str, Any]:
    """The original's config.json: the language model's fields and its own. Raises `ValueError` for others."""
    tower = bases.get("vision_tower") or (None if found.format == "llava_hf" else found.vision_tower)
    if tower is None:
        raise ValueError(f"{found.folder} does not record a vision tower of the original's: give --vision-tower")
    text = config.text_config.to_dict()
    dtype = config.dtype or next(iter(found.part(PROJECTOR).values())).dtype
    text |= {
        "_name_or_path": str(bases.get("language_model") or found.language_model or ""),
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vocab_size": config.text_config.vocab_size if found.holds_language_model else config.image_token_id,
        "pad_token_id": 0,
        "image_aspect_ratio": _aspect_ratio(found),
        "mm_hidden_size": config.vision_width,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_tower": str(tower),
        # The tower's weights are within a full model; with this the original code reads them there.
        "unfreeze_mm_vision_tower": found.holds_language_model and bool(found.part(TOWER)),
        "tune_mm_mlp_adapter": not found.holds_language_model and not found.lora,
        "use_mm_proj": True,
    }
    for newer in ("rope_parameters", "dtype"):
        text.pop(newer, None)
    return text | _rope(found, config.text_config)


def _aspect_ratio(found: Checkpoint) -> str:
    """The value in the processor of a checkpoint of ours; "pad" is LLaVA-1.5's own. The original has no crop."""
    file = found.folder / "processor_config.json"
    kept = read_json(file, dict).get("image_aspect_ratio", "pad") if file.is_file() else "pad"
    return "pad" if kept == "pad" else "square"


def _find_tokenizer(found: Checkpoint, config: LlavaSPConfig, bases: dict[str, Any]) -> Path | None:
    """A folder with the original's slow tokenizer, if it is local; a hub id is not downloaded."""
    for place in (bases.get("language_model"), found.folder, config.language_model_name_or_path):
        folder = None if place is None else base_folder(found.folder, place)
        if folder is not None and (folder / "tokenizer.model").is_file():
            return folder
    return None


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True, default=str) + "\n")
