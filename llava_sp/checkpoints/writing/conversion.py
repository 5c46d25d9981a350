"""Conversion between any supported formats that can hold the model; weights are copied bit for bit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from llava_sp.checkpoints.opening import open_model, open_processor
from llava_sp.checkpoints.opening.adapter import save_adapter
from llava_sp.checkpoints.opening.fit import check_fits
from llava_sp.checkpoints.reading.formats import OURS, Checkpoint, recognise
from llava_sp.checkpoints.reading.names import PROJECTOR, TOWER, with_adapter_name
from llava_sp.checkpoints.reading.places import fetch
from llava_sp.checkpoints.reading.tensor_files import read_checked
from llava_sp.checkpoints.writing.original_format import to_original
from llava_sp.common.folders import check_new, new_folder
from llava_sp.model.modeling_llava_sp import LlavaSPForCausalLM
from llava_sp.model.processing_llava_sp import LlavaSPProcessor

# Settings of ours for computations that transformers' LLaVA does not support.
_NOT_IN_LLAVA_HF = (
    "vision_tower_leading_tokens",
    "language_model_head_bias",
    "language_model_logit_scale",
    "language_model_logit_softcap",
)
_NAMES = {"llava_sp": "our own", "original": "the original's", "llava_hf": "transformers'"}


def convert(
    source: str | os.PathLike,
    to: str | os.PathLike,
    *,
    language_model: str | os.PathLike | None = None,
    vision_tower: str | os.PathLike | None = None,
    target: str | None = None,
    max_shard_size: str = "5GB",
) -> str:
    """Write the checkpoint `source` to the new folder `to` in the format `target`; returns what was written, as text.

    Raises:
        ValueError: the source cannot be opened, the format cannot hold this model, or `to` is not empty.
        OSError: `to` cannot be written; nothing is left there.
    """
    place, destination = fetch(source), Path(to).resolve()
    found = recognise(place)
    own = "llava_sp" if found.format in OURS else "original" if found.is_original else found.format
    target = target or ("original" if own == "llava_sp" else "llava_sp")
    if target == own:
        raise ValueError(f"{found.folder} is in {_NAMES[own]} format already")
    check_fits(found, None)
    check_new(destination, place)
    bases = {"language_model": language_model, "vision_tower": vision_tower}
    bases = {name: value for name, value in bases.items() if value is not None}
    write = {"llava_sp": _to_ours, "original": to_original, "llava_hf": _to_llava_hf}[target]
    with new_folder(destination, sum(file.stat().st_size for file in found.files)) as folder:
        return write(found, folder, bases, max_shard_size)


def _to_ours(found: Checkpoint, folder: Path, bases: dict[str, Any], max_shard_size: str) -> str:
    if found.part(TOWER) and not found.holds_language_model:
        raise ValueError(f"{found.folder} holds a trained vision tower, unlike an adapter checkpoint: merge it instead")
    model = open_model(LlavaSPForCausalLM, found, **bases)
    processor = open_processor(LlavaSPProcessor, found, **bases)
    if found.holds_language_model:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        processor.save_pretrained(folder)
        return "a full checkpoint"
    stored = {**found.part(PROJECTOR), **found.part("", lora=True)}
    state = {with_adapter_name(name): tensor.contiguous() for name, tensor in read_checked(stored).items()}
    save_adapter(model, processor, folder, state_dict=state, run={"converted_from": str(found.folder.resolve())})
    return "an adapter checkpoint" if found.lora else "an adapter checkpoint without LoRA (first stage)"


def _to_llava_hf(found: Checkpoint, folder: Path, bases: dict[str, Any], max_shard_size: str) -> str:
    if found.spatial.get("spatial_variant") != "none" or not found.holds_language_model:
        lacking = (
            "no language model: merge it first" if found.spatial.get("spatial_variant") == "none" else "spatial tokens"
        )
        raise ValueError(f"{found.folder} cannot be transformers' LLaVA: it has {lacking}")
    more = [name for name in _NOT_IN_LLAVA_HF if found.config.get(name)]
    if more:
        raise ValueError(
            f"{found.folder / 'config.json'}: transformers' LLaVA has no {', '.join(more)}; keep this format"
        )
    ours = open_model(LlavaSPForCausalLM, found, **bases)
    config = ours.config
    llava_config = LlavaConfig(  # type: ignore[call-arg]  # its stub lacks pad_token_id
        text_config=config.text_config,
        vision_config=config.vision_config,
        image_token_index=config.image_token_id,
        image_seq_length=config.num_image_tokens,
        pad_token_id=config.pad_token_id,
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        tie_word_embeddings=config.tie_word_embeddings,
    )
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(llava_config)
    for name in ("vision_tower", "multi_modal_projector", "language_model"):
        setattr(llava.model, name, getattr(ours.model, name))
    llava.lm_head, llava.generation_config = ours.lm_head, ours.generation_config
    llava.to(ours.dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    processor = open_processor(LlavaSPProcessor, found, **bases)
    LlavaProcessor(
        processor.image_processor,
        processor.tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1 if config.vision_feature_select_strategy == "default" else 0,
        chat_template=processor.chat_template,
    ).save_pretrained(folder)
    return "transformers' LLaVA (its processor crops where LLaVA-1.5 pads)"
