"""The configurations and tokenizers of backbones, wherever they stand: alone, in a CLIP or SigLIP checkpoint, in a LLaVA-1.5 one."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerBase

FULL_LLAVAS = ("llava", "llava_sp")  # transformers' own and ours: with a text_config and a vision_config


def is_original(settings: dict[str, Any]) -> bool:
    """Whether a config.json was written by LLaVA's own code; transformers' "llava" has a text_config."""
    return settings.get("model_type") in ("llava_llama", "llava") and "text_config" not in settings


def language_config(path: str | os.PathLike, **hub_kwargs) -> PreTrainedConfig:
    """The configuration of a language model, or of the one within a full LLaVA (the original's, transformers', ours)."""
    settings, _ = PreTrainedConfig.get_config_dict(path, **hub_kwargs)
    if is_original(settings):
        known = LlamaConfig().to_dict().keys() - {"model_type", "architectures", "auto_map", "transformers_version"}
        return LlamaConfig(**{key: value for key, value in settings.items() if key in known})
    config = AutoConfig.from_pretrained(path, **hub_kwargs)
    return config.text_config if config.model_type in FULL_LLAVAS else config


def vision_config(path: str | os.PathLike, **hub_kwargs) -> PreTrainedConfig:
    """The configuration of a vision tower, with `hidden_size`, `image_size` and `patch_size` for timm's too.

    Raises `ValueError` for a timm model that is no ViT.
    """
    config = AutoConfig.from_pretrained(path, **hub_kwargs)
    config = getattr(config, "vision_config", config)
    if config.model_type == "timm_wrapper":  # only the network knows; built without weights
        import timm

        with torch.device("meta"):
            network = timm.create_model(config.architecture, num_classes=0, **(config.model_args or {}))
        if getattr(network, "patch_embed", None) is None:
            raise ValueError(f"the vision tower {path}: {config.architecture} is no ViT with patches")
        config.hidden_size = network.embed_dim
        config.image_size, config.patch_size = list(network.patch_embed.img_size), list(network.patch_embed.patch_size)
    return config


def load_tokenizer(path: str | os.PathLike, **hub_kwargs) -> PreTrainedTokenizerBase:
    """A language model's tokenizer, also from a folder of LLaVA's own code, whose model type transformers does not know."""
    try:
        settings, _ = PreTrainedConfig.get_config_dict(path, **hub_kwargs)
    except OSError:  # a folder of a tokenizer alone
        settings = {}
    known = {"config": language_config(path, **hub_kwargs)} if is_original(settings) else {}
    return AutoTokenizer.from_pretrained(path, **known, **hub_kwargs)
