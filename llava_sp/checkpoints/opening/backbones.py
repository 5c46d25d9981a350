"""A LLaVA-SP model from its two backbones: a language model and a vision tower, by hub id or local folder.

Formats are whatever `transformers` reads: safetensors or `.bin` shards, a SentencePiece or a JSON tokenizer, a whole CLIP
or SigLIP checkpoint (its text half is left aside), any ViT of timm. Nothing is converted on disk.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)
from transformers.integrations import deepspeed as integration
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging

from llava_sp.checkpoints.opening.fill import check_values, gathered
from llava_sp.checkpoints.reading.formats import check_generation_config, recognise
from llava_sp.checkpoints.reading.places import fetch, hub_kwargs
from llava_sp.checkpoints.reading.tensor_files import stored_tensors, tensor_lines, weight_files
from llava_sp.model.backbone_configs import (
    FULL_LLAVAS,
    is_original,
    language_config,
    load_tokenizer,
    read_config,
    read_settings,
    told_as_value_error,
)
from llava_sp.model.configuration_llava_sp import LlavaSPConfig
from llava_sp.model.modeling_llava_sp import LlavaSPForCausalLM
from llava_sp.model.processing_llava_sp import add_special_tokens
from llava_sp.model.projector import SpatialProjector

# Enough for a paragraph; only where neither the caller nor the checkpoint says otherwise.
DEFAULT_MAX_NEW_TOKENS = 512


def from_backbones(
    cls: type[PreTrainedModel],
    language_model: str | os.PathLike | None,
    vision_tower: str | os.PathLike | None,
    *,
    config: LlavaSPConfig | None = None,
    spatial_variant: str = "cropping",
    spatial_scales: list[int] | None = None,
    spatial_width: int | None = None,
    spatial_fusion: bool = True,
    spatial_projection_bias: bool | None = None,
    fusion_kernel: int | None = None,
    fusion_stride: int | None = None,
    vision_feature_layer: int | list[int] = -2,
    dtype: torch.dtype | str = "auto",
    seed: int = 0,
    language_model_revision: str | None = None,
    vision_tower_revision: str | None = None,
    **load_kwargs,
):
    """Assemble a model with a fresh projector; see also `warm_start.from_backbones`.

    Args:
        language_model, vision_tower: hub ids or local folders; also those within a full LLaVA.
        config: the configuration of an existing checkpoint; the `spatial_*` arguments are then taken from it.
        spatial_variant, ...: see `LlavaSPConfig`.
        dtype: of all weights; `"auto"` is the language model's own.
        seed: of the projector's fresh weights.
        language_model_revision, vision_tower_revision: of hub models; what was loaded is recorded by its fingerprint.
        load_kwargs: passed to both backbones' `from_pretrained` (`device_map`, `attn_implementation`, `cache_dir`,
            ...); `quantization_config` goes to the language model alone.

    Raises:
        ValueError: a backbone lacks weights, the tower has no square grid, or a spatial argument does not fit.
        OSError: a backbone is not there (transformers' message names the path).
    """
    dtype = _dtype(dtype)
    if language_model is None:
        raise ValueError("language_model is not set: a hub id or a folder")
    if vision_tower is None:
        raise ValueError("vision_tower is not set: a hub id or a folder")
    if "revision" in load_kwargs:
        raise ValueError("revision= would mean both backbones; use language_model_revision= and vision_tower_revision=")
    tower_kwargs = {name: value for name, value in load_kwargs.items() if name != "quantization_config"}
    if vision_tower_revision is not None:
        tower_kwargs["revision"] = vision_tower_revision
    if language_model_revision is not None:
        load_kwargs["revision"] = language_model_revision
    tower = load_vision_tower(vision_tower, dtype=dtype, **tower_kwargs)
    language = load_language_model(language_model, dtype=dtype, **load_kwargs)
    old_rows = language.get_input_embeddings().num_embeddings
    tokenizer, image_token_id, pad_token_id, rows = read_vocabulary(language_model, old_rows, **hub_kwargs(load_kwargs))
    grow_vocabulary(language, rows)
    if dtype == "auto":
        dtype = language.dtype
        tower.to(dtype)

    if config is None:
        config = _config(
            language,
            tower,
            image_token_id,
            pad_token_id,
            vision_feature_layer=vision_feature_layer,
            spatial_variant=spatial_variant,
            spatial_scales=spatial_scales,
            spatial_width=spatial_width,
            spatial_fusion=spatial_fusion,
            spatial_projection_bias=spatial_projection_bias,
            fusion_kernel=fusion_kernel,
            fusion_stride=fusion_stride,
            dtype=dtype,
        )
    config.language_model_name_or_path, config.vision_tower_name_or_path = (
        _recorded(language_model),
        _recorded(vision_tower),
    )
    config.language_model_fingerprint = weights_fingerprint(language_model, **hub_kwargs(load_kwargs))
    config.vision_tower_fingerprint = weights_fingerprint(vision_tower, **hub_kwargs(tower_kwargs))
    model = _assemble(cls, config, language, tower, fresh_projector(config, dtype, seed))
    model.generation_config = _generation_config(language, tokenizer, pad_token_id)
    return model.eval()


def from_llava_hf(
    cls: type[PreTrainedModel], path: str | os.PathLike, dtype: torch.dtype | str = "auto", **load_kwargs
):
    """Transformers' LLaVA-1.5 as a model of ours without spatial tokens; its three parts are taken over as they are.

    Raises `ValueError` where it lacks weights or is no LLaVA-1.5 (another projector, several tower layers).
    """
    llava = _load_llava(path, dtype=_dtype(dtype), **load_kwargs)
    old_rows = llava.get_input_embeddings().num_embeddings
    tokenizer, image_token_id, pad_token_id, rows = read_vocabulary(path, old_rows, **hub_kwargs(load_kwargs))
    language, tower = _language_half(llava), llava.model.vision_tower
    grow_vocabulary(language, rows)
    config = _config(
        language,
        tower,
        image_token_id,
        pad_token_id,
        spatial_variant="none",
        vision_feature_layer=llava.config.vision_feature_layer,
        dtype=llava.dtype,
    )
    projector = SpatialProjector(config).to(llava.dtype)
    projector.load_state_dict(llava.model.multi_modal_projector.state_dict())
    model = _assemble(cls, config, language, tower, projector)
    model.generation_config = _generation_config(language, tokenizer, pad_token_id)
    return model.eval()


def _config(
    language: PreTrainedModel, tower: PreTrainedModel, image_token_id: int, pad_token_id: int, **settings
) -> LlavaSPConfig:
    """The configuration of a model of these parts; `settings` are LlavaSPConfig's own."""
    text_config = language.config
    text_config.pad_token_id = pad_token_id
    return LlavaSPConfig(
        text_config=text_config,
        vision_config=tower.config,
        image_token_index=image_token_id,
        pad_token_id=pad_token_id,
        bos_token_id=text_config.bos_token_id,
        eos_token_id=text_config.eos_token_id,
        tie_word_embeddings=text_config.tie_word_embeddings,
        vision_feature_select_strategy="default" if _has_class_token(tower) else "full",
        **settings,
    )


def _dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    """A type by its name; "auto" and types as they are. Raises ValueError for a name that is none."""
    if not isinstance(dtype, str) or dtype == "auto":
        return dtype
    named = getattr(torch, dtype, None)
    if not isinstance(named, torch.dtype):
        raise ValueError(f'dtype is {dtype!r}; use a torch.dtype, its name ("bfloat16"), or "auto"')
    return named


def read_vocabulary(path: str | os.PathLike, old_rows: int = 0, **hub_kwargs) -> tuple[Any, int, int, int]:
    """A language model's tokenizer with image and padding token added, their ids, and the embedding rows to have.

    Raises `ValueError` where a word has an id after the placeholder's: ids from there on are never generated.
    """
    tokenizer = load_tokenizer(path, **hub_kwargs)
    image_token_id, pad_token_id, rows = add_special_tokens(tokenizer, old_rows)
    words = [
        token for token, number in tokenizer.get_vocab().items() if number > image_token_id and number != pad_token_id
    ]
    if words:
        raise ValueError(
            f"the tokenizer of {path} has {tokenizer.convert_ids_to_tokens(image_token_id)} as id {image_token_id} and "
            f"{len(words)} tokens after it, such as {words[0]!r}; the image placeholder must come after all words"
        )
    return tokenizer, image_token_id, pad_token_id, rows


def load_language_model(path: str | os.PathLike, **kwargs) -> PreTrainedModel:
    """A causal language model, or the one within a full LLaVA (the original's, transformers', ours)."""
    settings = read_settings(path, **hub_kwargs(kwargs))
    if is_original(settings):
        config = language_config(path, **hub_kwargs(kwargs))
        return _load_complete(AutoModelForCausalLM, path, zeros_allowed=False, config=config, **kwargs)
    if settings.get("model_type") in FULL_LLAVAS:
        return _language_half(_load_llava(path, **kwargs))
    return _load_complete(AutoModelForCausalLM, path, **kwargs)


def _load_llava(path: str | os.PathLike, **kwargs) -> LlavaForConditionalGeneration:
    """A full LLaVA, transformers' or ours. Raises `ValueError` for an adapter checkpoint of ours."""
    settings = read_settings(path, **hub_kwargs(kwargs))
    if settings["model_type"] == "llava":
        return _load_complete(LlavaForConditionalGeneration, path, zeros_allowed=False, **kwargs)
    if not recognise(fetch(path, **kwargs)).holds_language_model:
        raise ValueError(
            f"{path} is an adapter checkpoint, without a language model and a tower of its own: merge it first "
            "(python -m llava_sp.checkpoints.merge)"
        )
    return LlavaSPForCausalLM.from_pretrained(path, **kwargs)


def _language_half(llava: LlavaForConditionalGeneration) -> PreTrainedModel:
    """The language model of transformers' LLaVA as a model of its own; nothing is copied."""
    with torch.device("meta"):
        language = AutoModelForCausalLM.from_config(llava.config.text_config, dtype=llava.dtype)
    setattr(language, language.base_model_prefix, llava.model.language_model)
    language.set_output_embeddings(llava.lm_head)
    language.generation_config = llava.generation_config
    return language


def load_vision_tower(path: str | os.PathLike, **kwargs) -> PreTrainedModel:
    """The image half of a CLIP or SigLIP checkpoint, a bare vision model, or a timm ViT.

    The tower's `config` gets `hidden_size`, `image_size` and `patch_size` where it lacks them (timm).
    """
    config = read_config(path, **hub_kwargs(kwargs))
    if config.model_type in FULL_LLAVAS:
        tower = _load_llava(path, **kwargs).model.vision_tower
    else:
        tower = _load_complete(AutoModel, path, config=getattr(config, "vision_config", config), **kwargs)
    timm_model = getattr(tower, "timm_model", None)
    if timm_model is not None:
        embed = getattr(timm_model, "patch_embed", None)
        if embed is None or not hasattr(timm_model, "forward_intermediates"):
            raise ValueError(
                f"the timm model {tower.config.architecture!r} in {path} has no patch embedding or no intermediate "
                "features: the spatial tokens need a plain ViT"
            )
        tower.config.hidden_size = timm_model.embed_dim
        tower.config.image_size = list(embed.img_size)
        tower.config.patch_size = list(embed.patch_size)
    if not hasattr(tower.config, "patch_size"):
        raise ValueError(
            f"the vision tower {path} ({tower.config.model_type}) has no patch_size: it must give patch tokens on a "
            "square grid, as CLIP, SigLIP and timm's ViTs do"
        )
    return tower


def fresh_projector(config: LlavaSPConfig, dtype: torch.dtype, seed: int) -> SpatialProjector:
    """A projector with new weights, the same for the same seed; its parameters are split under ZeRO-3."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = SpatialProjector(config)
        projector.reset_parameters()
    projector.to(dtype)
    if is_deepspeed_zero3_enabled():
        import deepspeed
        from transformers.integrations.deepspeed import deepspeed_config

        deepspeed.zero.Init(module=projector, config_dict_or_path=deepspeed_config())
    return projector


@torch.no_grad()
def grow_vocabulary(language: PreTrainedModel, rows: int) -> None:
    """Bring embeddings and head to `rows` rows; each new row is the mean of the old ones, so the same every time."""
    old_rows = language.get_input_embeddings().num_embeddings
    if rows == old_rows:
        return
    language.resize_token_embeddings(rows, mean_resizing=False)
    for module in (language.get_input_embeddings(), language.get_output_embeddings()):
        with gathered([module.weight], modify=True):
            if module.weight.numel():
                module.weight[old_rows:] = module.weight[:old_rows].float().mean(dim=0).to(module.weight.dtype)


def weights_fingerprint(path: str | os.PathLike, **hub_kwargs) -> str:
    """Hash of every weight's name, shape, type and a few values, read without loading the tensors.

    The same for the same weights as safetensors or `.bin`, in any sharding; different for other weights.
    """
    folder = _local_folder(path, **hub_kwargs)
    digest = hashlib.sha256()
    for line in sorted(line for file in weight_files(folder) for line in tensor_lines(file)):
        digest.update(line.encode())
    return digest.hexdigest()[:16]


def _load_complete(auto_class, path: str | os.PathLike, zeros_allowed: bool = True, **kwargs) -> PreTrainedModel:
    """`from_pretrained`, but what the folder does not hold whole is an error, not random numbers or NaN.

    A matrix of zeros may be meant in a backbone, not in a LLaVA that was trained.

    Raises:
        ValueError: a file is cut off, missing or holds code; a tensor is missing, of another shape, or cannot be trained
            weights. Each is named.
    """
    stored = []
    if (Path(path) / "config.json").is_file():  # before anything is read; without one, transformers says what it is not
        check_generation_config(Path(path))
        stored = [tensor for file in weight_files(Path(path)) for tensor in stored_tensors(file)]
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # else a CLIP's text half is reported, key by key, as unexpected
    try:  # a wrong shape is then in `info`, with its name
        model, info = auto_class.from_pretrained(path, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
    finally:
        logging.set_verbosity(verbosity)
    problems = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if problems:
        raise ValueError(
            f"{path} does not hold all weights of {type(model).__name__}: {len(problems)} missing or of another shape, "
            f"such as {', '.join(problems[:5])}"
        )
    check_values(model, path, stored, zeros_allowed)
    return model


@contextmanager
def zero3_set_aside() -> Iterator[None]:
    """Keeps transformers from splitting (and gathering, and initialising) the parts of a model that is to stay empty."""
    current = integration._hf_deepspeed_config_weak_ref and integration._hf_deepspeed_config_weak_ref()
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if current is not None:
            integration.set_hf_deepspeed_config(current)


def _assemble(cls, config: LlavaSPConfig, language, tower, projector):
    """Put loaded parts into an empty model; nothing is copied."""
    with zero3_set_aside(), torch.device("meta"), told_as_value_error(config.name_or_path or "this model"):
        model = cls(config)
    model.model.vision_tower = tower
    model.model.multi_modal_projector = projector.to(tower.device)
    model.model.language_model = language.base_model
    model.lm_head = language.get_output_embeddings()
    for part in (language, tower):
        for name in ("hf_device_map", "quantization_method", "is_quantized", "hf_quantizer"):
            if hasattr(part, name) and not hasattr(model, name):
                setattr(model, name, getattr(part, name))
    model.tie_weights()
    return model


def _generation_config(language: PreTrainedModel, tokenizer, pad_token_id: int) -> GenerationConfig:
    """Greedy by default; ends where the language model ends."""
    eos = language.generation_config.eos_token_id
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id if eos is None else eos,
        pad_token_id=pad_token_id,
        max_new_tokens=DEFAULT_MAX_NEW_TOKENS,
    )


def _has_class_token(tower: PreTrainedModel) -> bool:
    """Whether the tower's hidden states begin with a class token (CLIP: yes; SigLIP and timm's spatial maps: no)."""
    return any(name.endswith("class_embedding") for name, _ in tower.named_parameters())


def _recorded(path: str | os.PathLike) -> str:
    """What a checkpoint remembers: an absolute path for a local folder, the id for a hub model."""
    return str(Path(path).resolve()) if Path(path).is_dir() else str(path)


def _local_folder(path: str | os.PathLike, **hub_kwargs) -> Path:
    if Path(path).is_dir():
        return Path(path)
    from transformers.utils import cached_file

    return Path(cached_file(str(path), "config.json", **hub_kwargs)).parent
