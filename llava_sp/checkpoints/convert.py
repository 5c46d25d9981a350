"""From any format that opens here to any that the same model can have; weights keep every bit.

    python -m llava_sp.checkpoints.convert --from SRC [--language-model B] [--vision-tower V] --to DST [--format FORMAT]

    llava_sp    an adapter checkpoint of ours from a LoRA folder or a first stage's projector, else a full one
    original    what the original code reads: a LoRA folder from an adapter checkpoint, model.bin (mm_projector.bin without
                spatial tokens) from one without LoRA, else a full model with everything within
    llava_hf    transformers' LLaVA, for full models without spatial tokens

Without --format: llava_sp, and original for what is ours. To `llava_sp` the source is opened on its backbones, so it is
known to open; to `original` tensors are renamed and copied, and no backbone is needed. Embedding rows from the placeholder on,
which are no words, stay: the original code leaves them out by itself when it opens a full model. `original` is what transformers 4.37 and
PEFT 0.4 to 0.8 read; a model that these cannot hold is refused.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedConfig

from llava_sp.checkpoints.opening.adapter import describe, save_adapter
from llava_sp.checkpoints.opening.fill import parameter_names
from llava_sp.checkpoints.opening.foreign import check_complete
from llava_sp.checkpoints.reading.formats import (
    LANGUAGE,
    LORA,
    ORIGINAL_SCALES,
    PROJECTOR,
    TOWER,
    Checkpoint,
    beyond_plain_lora,
    original_projector_name,
    our_config,
    recognise,
)
from llava_sp.checkpoints.reading.places import base_folder, fetch
from llava_sp.checkpoints.reading.tensor_files import read_all, read_checked, read_json
from llava_sp.common.folders import check_new, new_folder
from llava_sp.model.configuration_llava_sp import LlavaSPConfig
from llava_sp.model.modeling_llava_sp import LlavaSPForCausalLM
from llava_sp.model.processing_llava_sp import LlavaSPProcessor

TARGETS = ("llava_sp", "original", "llava_hf")
_WRAPPED = "base_model.model.model."  # what PEFT and LlavaLlamaForCausalLM put before a key
_TOWER_WITHIN = "model.vision_tower.vision_tower.vision_model."
_TOKENIZER = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def convert(
    source: str | os.PathLike,
    to: str | os.PathLike,
    *,
    language_model: str | os.PathLike | None = None,
    vision_tower: str | os.PathLike | None = None,
    target: str | None = None,
    max_shard_size: str = "5GB",
) -> str:
    """Write the checkpoint `source` to the new folder `to` in the format `target`; returns what was written, in words.

    Raises:
        ValueError: the source cannot be opened, the format cannot hold this model, or `to` is not empty.
        OSError: `to` cannot be written; nothing is left there then.
    """
    place, destination = fetch(source), Path(to).resolve()
    found = recognise(place)
    ours = found.format in ("llava_sp", "llava_sp_adapter")
    target = target or ("original" if ours else "llava_sp")
    if found.format == "llava_sp_adapter":
        describe(found.folder)
    if ours and target == "llava_sp":
        raise ValueError(f"{found.folder} is in our own format already")
    if target == "original" and found.format.startswith("original"):
        raise ValueError(f"{found.folder} is in the original's format already")
    if target == "llava_hf" and found.format == "llava_hf":
        raise ValueError(f"{found.folder} is in transformers' format already")
    check_complete(found)
    check_new(destination, place)
    bases = {"language_model": language_model, "vision_tower": vision_tower}
    bases = {name: value for name, value in bases.items() if value is not None}
    write: Callable[..., str] = {"llava_sp": _to_ours, "original": _to_original, "llava_hf": _to_llava_hf}[target]
    with new_folder(destination, sum(file.stat().st_size for file in found.files)) as folder:
        return write(found, folder, bases, max_shard_size)


# ---- to our own


def _to_ours(found: Checkpoint, folder: Path, bases: dict[str, Any], max_shard_size: str) -> str:
    if found.part(TOWER) and not found.holds_language_model:
        raise ValueError(
            f"{found.folder} holds a trained vision tower, which an adapter checkpoint has not: merge it instead "
            "(python -m llava_sp.checkpoints.merge)"
        )
    model = LlavaSPForCausalLM.from_pretrained(_path(found), **bases)
    processor = LlavaSPProcessor.from_pretrained(_path(found), **bases)
    if found.holds_language_model:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        processor.save_pretrained(folder)
        return "a full checkpoint"
    stored = {**found.part(PROJECTOR), **found.part("", lora=True)}
    state = {name: tensor.contiguous() for name, tensor in parameter_names(read_checked(stored)).items()}
    save_adapter(model, processor, folder, state_dict=state, run={"converted_from": str(found.folder.resolve())})
    return "an adapter checkpoint" if found.lora else "an adapter checkpoint without LoRA (first stage)"


def _path(found: Checkpoint) -> Path:
    """The folder, or where a file alone was recognised, that file."""
    if found.format != "original_projector":
        return found.folder
    return found.files[0]


# ---- to the original's


def _to_original(found: Checkpoint, folder: Path, bases: dict[str, Any], max_shard_size: str) -> str:
    config = _our_config(found)
    _check_original_can_hold(found, config)
    settings = _original_settings(found, config, bases)
    lora_settings = None if found.lora is None else _original_lora_settings(found, settings["_name_or_path"])
    _write_json(folder / "config.json", settings)
    source = _find_tokenizer(found, config, bases)
    if source is None and found.holds_language_model:
        raise ValueError(
            f"{found.folder} has no tokenizer.model, which the original code needs: give --language-model with one"
        )
    for name in _TOKENIZER:
        if source is not None and (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    projector = {_original_name(name, config): t for name, t in read_checked(found.part(PROJECTOR)).items()}
    if found.holds_language_model:
        state = {f"model.{key}": tensor for key, tensor in projector.items()}
        rest = {_full_name(name): tensor for name, tensor in found.tensors.items() if not name.startswith(PROJECTOR)}
        state |= read_all(rest)
        save_torch_state_dict(
            {key: tensor.contiguous() for key, tensor in state.items()},
            folder,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
        return "a full checkpoint for the original code"
    if not found.lora:
        name = "mm_projector.bin" if config.spatial_variant == "none" else "model.bin"
        torch.save({f"model.{key}": tensor for key, tensor in projector.items()}, folder / name)
        return f"{name} for the original code's --pretrain_mm_mlp_adapter"
    torch.save({_WRAPPED + key: tensor for key, tensor in projector.items()}, folder / "non_lora_trainables.bin")
    lora = {
        name.replace(LANGUAGE, _WRAPPED): tensor for name, tensor in read_checked(found.part("", lora=True)).items()
    }
    save_file(lora, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "adapter_config.json", lora_settings)
    return "a LoRA folder for the original code (its name must hold 'llava' and 'lora' there)"


def _our_config(found: Checkpoint) -> LlavaSPConfig:
    if found.format == "llava_hf":
        llava = LlavaConfig.from_pretrained(found.folder)
        shared = ("text_config", "vision_config", "image_token_index", "vision_feature_layer", "pad_token_id")
        return LlavaSPConfig(**{name: getattr(llava, name, None) for name in shared}, spatial_variant="none")
    return our_config(found.folder)


def _check_original_can_hold(found: Checkpoint, config: LlavaSPConfig) -> None:
    """The original's layers stand in its code; what that code does not have cannot be written for it."""
    problems = []
    problems += _llama_problems(config.text_config)
    if (config.projector_hidden_act, config.multimodal_projector_bias) != ("gelu", True):
        problems.append("its patch MLP is not two layers with biases and GELU between them")
    if config.vision_config.model_type != "clip_vision_model":
        problems.append(f"its vision tower is a {config.vision_config.model_type}, not a CLIP")
    if not isinstance(config.vision_feature_layer, int):
        problems.append(f"it reads several layers of the tower, {config.vision_feature_layer}")
    if config.spatial_variant != "none":
        pooling = config.spatial_variant == "pooling"
        if config.spatial_variant not in ("cropping", "pooling"):
            problems.append(f"its variant is {config.spatial_variant!r}, not cropping or pooling")
        if tuple(config.spatial_scales) != ORIGINAL_SCALES or config.grid_size != ORIGINAL_SCALES[-1]:
            problems.append(
                f"its scales are {config.spatial_scales} on a grid of {config.grid_size}, not 4 to 24 on 24"
            )
        if config.spatial_fusion and (config.fusion_kernel, config.fusion_stride) != (16, 2):
            problems.append(
                f"its integrator's windows are {config.fusion_kernel} by {config.fusion_stride}, not 16 by 2"
            )
        if not config.spatial_fusion and not pooling:
            problems.append("it is cropping without the integrator")
        if config.spatial_projection_bias == pooling:
            problems.append("the bias of its spatial layer is not where the variant has it")
    if problems:
        raise ValueError(f"{found.folder} cannot be written for the original code: {'; '.join(problems)}")


def _llama_problems(text: PreTrainedConfig) -> list[str]:
    """What transformers 4.37, which the original code works with, has not in a Llama (it has biases in the attention)."""
    if text.model_type != "llama":
        return [f"its language model is a {text.model_type}, not a llama"]
    problems = []
    if text.head_dim != text.hidden_size // text.num_attention_heads:
        problems.append(f"its heads are {text.head_dim} wide, not {text.hidden_size // text.num_attention_heads}")
    if text.mlp_bias:
        problems.append("its MLPs have biases")
    return problems


def _original_rope(found: Checkpoint, text: PreTrainedConfig) -> dict[str, Any]:
    """How positions are rotated, in the two fields of transformers 4. Raises `ValueError` for a way that it has not."""
    rope = {**(text.rope_parameters or {})}
    theta = rope.pop("rope_theta", 10000.0)
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    if kind == "default" and not rope:
        return {"rope_theta": theta, "rope_scaling": None}
    if kind in ("linear", "dynamic") and rope.keys() == {"factor"} and rope["factor"] > 1:
        return {"rope_theta": theta, "rope_scaling": {"type": kind, "factor": float(rope["factor"])}}
    raise ValueError(
        f"{found.folder} rotates its positions by {text.rope_parameters}; the original code can scale them by linear or "
        "dynamic, with a factor above 1 and nothing else"
    )


def _original_lora_settings(found: Checkpoint, base: str) -> dict[str, Any]:
    """PEFT's adapter_config.json in the fields that PEFT of the original's time knows: it stumbles over any other.

    Raises `ValueError` for a setting that makes something else than plain LoRA.
    """
    beyond = beyond_plain_lora(found.lora)
    if beyond:
        told = " and ".join(f"{key} is {found.lora[key]!r}" for key in beyond)
        raise ValueError(f"{found.lora_file}: {told}; the original code knows plain LoRA only")
    leaves = sorted({name.split(LORA)[0].rpartition(".")[2] for name in found.part("", lora=True)})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": found.lora["r"],
        "lora_alpha": found.lora["lora_alpha"],
        "lora_dropout": found.lora.get("lora_dropout") or 0.0,
        "target_modules": leaves,
        "bias": "none",
        "fan_in_fan_out": False,
    }


def _original_settings(found: Checkpoint, config: LlavaSPConfig, bases: dict[str, Any]) -> dict[str, Any]:
    """The original's config.json: the language model's fields and its own. Raises `ValueError` for what has no field."""
    tower = bases.get("vision_tower") or (None if found.format == "llava_hf" else found.vision_tower)
    if tower is None:
        raise ValueError(
            f"{found.folder} does not record a vision tower that the original code could read: give --vision-tower (a CLIP "
            "folder or hub id)"
        )
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
    return text | _original_rope(found, config.text_config)


def _aspect_ratio(found: Checkpoint) -> str:
    """What the processor beside a checkpoint of ours says; "pad" is LLaVA-1.5's own. The original has no word for crop."""
    file = found.folder / "processor_config.json"
    kept = read_json(file).get("image_aspect_ratio", "pad") if file.is_file() else "pad"
    return "pad" if kept == "pad" else "square"


def _find_tokenizer(found: Checkpoint, config: LlavaSPConfig, bases: dict[str, Any]) -> Path | None:
    """A folder with the original's slow tokenizer, if there is one here: a hub id is left to the reader."""
    for place in (bases.get("language_model"), found.folder, config.language_model_name_or_path):
        folder = None if place is None else base_folder(found.folder, place)
        if folder is not None and (folder / "tokenizer.model").is_file():
            return folder
    return None


def _original_name(name: str, config: LlavaSPConfig) -> str:
    return original_projector_name(name.removeprefix(PROJECTOR), config.spatial_variant, config.grid_size)


def _full_name(name: str) -> str:
    if name.startswith(TOWER):
        return _TOWER_WITHIN + name.removeprefix(TOWER).removeprefix("vision_model.")
    return name.replace(LANGUAGE, "model.")


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True, default=str) + "\n")


# ---- to transformers'


def _to_llava_hf(found: Checkpoint, folder: Path, bases: dict[str, Any], max_shard_size: str) -> str:
    if found.spatial.get("spatial_variant") != "none":
        raise ValueError(f"{found.folder} has spatial tokens, which transformers' LLaVA has not")
    if not found.holds_language_model:
        raise ValueError(f"{found.folder} has no language model: merge it first (python -m llava_sp.checkpoints.merge)")
    ours = LlavaSPForCausalLM.from_pretrained(found.folder, **bases)
    config = ours.config
    llava_config = LlavaConfig(
        text_config=config.text_config,
        vision_config=config.vision_config,
        image_token_index=config.image_token_id,
        pad_token_id=config.pad_token_id,
        image_seq_length=config.num_image_tokens,
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
    processor = LlavaSPProcessor.from_pretrained(found.folder, **bases)
    LlavaProcessor(
        processor.image_processor,
        processor.tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1 if config.vision_feature_select_strategy == "default" else 0,
        chat_template=processor.chat_template,
    ).save_pretrained(folder)
    return "transformers' LLaVA (its processor crops where LLaVA-1.5 pads)"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llava_sp.checkpoints.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--from", dest="source", required=True, metavar="SRC", help="a checkpoint: folder, file or hub id"
    )
    parser.add_argument("--to", required=True, metavar="DST", help="new folder")
    parser.add_argument("--format", choices=TARGETS, help="default: llava_sp, and original for what is ours")
    parser.add_argument("--language-model", help="language model, in place of the recorded one")
    parser.add_argument("--vision-tower", help="vision tower, in place of the recorded one")
    parser.add_argument("--max-shard-size", default="5GB", help="of one file with weights (default: %(default)s)")
    args = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the staging folder is removed
    try:
        written = convert(
            args.source,
            args.to,
            language_model=args.language_model,
            vision_tower=args.vision_tower,
            target=args.format,
            max_shard_size=args.max_shard_size,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{args.to}: {written}")


if __name__ == "__main__":
    main()
