"""The configurations and tokenizers of backbones: standalone, in a CLIP or SigLIP checkpoint, in a LLaVA-1.5 one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerBase

FULL_LLAVAS = ("llava", "llava_sp")  # transformers' own and ours: with a text_config and a vision_config
# What a processor is read from, besides config.json
PROCESSOR_FILES = (
    "processor_config.json", "preprocessor_config.json", "chat_template.jinja", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "tokenizer.json", "tokenizer.model",
)  # fmt: skip
# Raised by transformers, PEFT and torch for invalid settings
_INVALID = (
    StrictDataclassError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, AssertionError, ValueError,
    MemoryError,
)  # fmt: skip


@contextmanager
def as_value_error(path: str | os.PathLike) -> Iterator[None]:
    """Turns transformers' errors for JSON files with invalid values into a `ValueError` that names the folder."""
    try:
        yield
    except _INVALID as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, ValueError) and (str(path) in reason or not os.path.exists(path)):
            raise
        raise ValueError(
            f"{path} cannot be read: its config.json, or another JSON file there, holds invalid values ({reason})"
        ) from error


def damaged_file(folder: str | os.PathLike, error: Exception) -> str:
    """The cause of `error`, which names no file: a file that is not text or not JSON, else one of those that are there."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    files = [file for file in (Path(folder, name) for name in PROCESSOR_FILES) if file.is_file()]
    for file in files:
        try:
            text = "" if file.suffix == ".model" else file.read_text(encoding="utf-8")
            if file.suffix == ".json":
                json.loads(text)
        except (ValueError, RecursionError, OSError) as cause:
            return f"{file}: {cause}"
    names = ", ".join(file.name for file in files) or "its files"
    return f"{names}: one of these is missing, cut off or invalid ({reason})"


def is_original(settings: dict[str, Any]) -> bool:
    """Whether a config.json was written by LLaVA's own code; transformers' "llava" has a text_config."""
    return settings.get("model_type") in ("llava_llama", "llava") and "text_config" not in settings


def read_settings(path: str | os.PathLike, **hub_kwargs) -> dict[str, Any]:
    """The content of a model's config.json. Raises `ValueError` or `OSError`."""
    with as_value_error(path):
        settings, _ = PreTrainedConfig.get_config_dict(path, **hub_kwargs)
    if not isinstance(settings, dict):
        raise ValueError(f"config.json of {path} holds a {type(settings).__name__}, not an object of settings")
    return settings


def read_config(path: str | os.PathLike, **hub_kwargs) -> PreTrainedConfig:
    """A model's configuration. Raises `ValueError` or `OSError`."""
    with as_value_error(path):  # without the keyword, transformers would ask on the terminal
        return AutoConfig.from_pretrained(path, **{"trust_remote_code": False, **hub_kwargs})


def language_config(path: str | os.PathLike, **hub_kwargs) -> PreTrainedConfig:
    """The configuration of a language model, or of the one within a full LLaVA (the original's, transformers', ours).

    Raises `ValueError` for a model without a vocabulary, such as a whole CLIP.
    """
    settings = read_settings(path, **hub_kwargs)
    if is_original(settings):
        with as_value_error(path):
            return LlamaConfig(**{key: value for key, value in settings.items() if key in _llama_settings()})
    config = read_config(path, **hub_kwargs)
    config = config.text_config if config.model_type in FULL_LLAVAS else config
    if not hasattr(config, "vocab_size"):
        raise ValueError(
            f"language_model {path} cannot be used as a language model: its model type is {config.model_type}"
        )
    return config


def _llama_settings() -> set[str]:
    """The Llama keys of a config.json: those of this transformers, and of 4, with two fields for rotary positions."""
    now = LlamaConfig().to_dict().keys() - {"model_type", "architectures", "auto_map", "transformers_version"}
    return {*now, "rope_theta", "rope_scaling"}


def vision_config(path: str | os.PathLike, **hub_kwargs) -> PreTrainedConfig:
    """The configuration of a vision tower, with `hidden_size`, `image_size` and `patch_size` for timm's too.

    Raises `ValueError` for a tower that is not a ViT.
    """
    config = read_config(path, **hub_kwargs)
    config = getattr(config, "vision_config", config)
    name = config.model_type
    if config.model_type == "timm_wrapper":  # only the network has them; built without weights
        import timm

        with torch.device("meta"):
            network: Any = timm.create_model(config.architecture, num_classes=0, **(config.model_args or {}))
        name, patches = config.architecture, getattr(network, "patch_embed", None)
        if patches is not None:
            config.hidden_size = network.embed_dim
            config.image_size, config.patch_size = list(patches.img_size), list(patches.patch_size)
    if not hasattr(config, "hidden_size"):
        raise ValueError(f"the vision tower {path}: {name} is not a ViT with patches")
    return config


def load_tokenizer(path: str | os.PathLike, **hub_kwargs) -> PreTrainedTokenizerBase:
    """A language model's tokenizer, also from a folder of LLaVA's own code, whose model type transformers does not know.

    Raises:
        ValueError: one of its files is missing, cut off or invalid.
        OSError: the folder or hub model does not exist.
    """
    try:
        settings = read_settings(path, **hub_kwargs)
    except OSError:  # a folder with only a tokenizer
        settings = {}
    known = {"config": language_config(path, **hub_kwargs)} if is_original(settings) else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **known, **hub_kwargs)
    except OSError:
        raise
    except Exception as error:  # tokenizers raises Exception itself
        raise ValueError(f"the tokenizer of {path} cannot be read: {damaged_file(path, error)}") from error
    if not has_words(tokenizer):
        raise ValueError(
            f"the tokenizer of {path} has no vocabulary: no tokenizer.json or tokenizer.model, or it is empty"
        )
    return tokenizer


def has_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """False for the empty tokenizer that transformers makes, without an error, where the vocabulary is missing."""
    return not tokenizer.get_vocab().keys() <= {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
