"""A LLaVA-SP model from its two backbones: a language model and a vision tower, by hub id or local folder.

All formats of `transformers`: safetensors or `.bin` shards, a SentencePiece or a JSON tokenizer, a whole CLIP
or SigLIP checkpoint (its text half is ignored), any ViT of timm. Nothing is converted on disk.
"""

from __future__ import annotations

import dataclasses
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
    PreTrainedTokenizerBase,
)
from transformers.integrations import deepspeed as integration
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging

from llava_sp.checkpoints.opening.fill import check_model, gathered, integer_weights
from llava_sp.checkpoints.opening.probes import (
    features_problem,
    head_problem,
    head_steps,
    leading_tokens,
    tower_problem,
)
from llava_sp.checkpoints.reading.fingerprint import weights_fingerprint
from llava_sp.checkpoints.reading.formats import recognise
from llava_sp.checkpoints.reading.places import fetch, hub_kwargs
from llava_sp.checkpoints.reading.settings import read_all_settings
from llava_sp.checkpoints.reading.tensor_files import stored_tensors, weight_files
from llava_sp.common.files import counted
from llava_sp.model.backbone_configs import (
    FULL_LLAVAS,
    as_value_error,
    is_original,
    language_config,
    load_tokenizer,
    read_settings,
    vision_config,
)
from llava_sp.model.configuration_llava_sp import PROJECTOR_SETTINGS, LlavaSPConfig
from llava_sp.model.modeling_llava_sp import LlavaSPForCausalLM, LlavaSPModel
from llava_sp.model.processing_llava_sp import add_special_tokens
from llava_sp.model.projector import SpatialProjector

# Enough for a paragraph; the default if neither the caller nor the checkpoint sets it.
DEFAULT_MAX_NEW_TOKENS = 512


def from_backbones(
    cls: type[PreTrainedModel],
    language_model: str | os.PathLike | None,
    vision_tower: str | os.PathLike | None,
    *,
    config: LlavaSPConfig | None = None,
    dtype: torch.dtype | str = "auto",
    seed: int = 0,
    language_model_revision: str | None = None,
    vision_tower_revision: str | None = None,
    **kwargs,
):
    """Assemble a model with a new projector; see also `warm_start.from_backbones`.

    Args:
        language_model, vision_tower: hub ids or local folders; also those within a full LLaVA.
        config: the configuration of an existing checkpoint, which replaces the settings below.
        dtype: of all weights; `"auto"` is the language model's own.
        seed: of the projector's new weights.
        language_model_revision, vision_tower_revision: of hub models; what was loaded is recorded by its fingerprint.
        kwargs: `PROJECTOR_SETTINGS`, as of `LlavaSPConfig`; the rest is passed to both backbones' `from_pretrained`
            (`device_map`, `attn_implementation`, `cache_dir`, ...), `quantization_config` only to the language model.

    Raises:
        ValueError: a backbone lacks weights, the tower has no square grid, or a spatial argument is invalid.
        OSError: a backbone does not exist (transformers' message names the path).
    """
    settings = {name: kwargs.pop(name) for name in PROJECTOR_SETTINGS if name in kwargs}
    if "revision" in kwargs:
        raise ValueError("revision= is ambiguous; use language_model_revision= and vision_tower_revision=")
    backbones = Backbones.find(language_model, vision_tower, language_model_revision, vision_tower_revision, **kwargs)
    return backbones.load(
        cls, config or backbones.config(**settings), dtype, seed, recorded=config is not None, **kwargs
    )


@dataclasses.dataclass(frozen=True)
class Backbones:
    """A language model and a vision tower, with only the tokenizer loaded.

    Attributes:
        language, tower: folders or hub ids. language_hub, tower_hub: keywords for getting them from the hub.
        tokenizer: the language model's, with image and padding token added; image_token_id, pad_token_id: their ids.
        rows: the number of embedding rows needed.
    """

    language: str
    tower: str
    language_hub: dict[str, Any]
    tower_hub: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    image_token_id: int
    pad_token_id: int
    rows: int

    @classmethod
    def find(
        cls,
        language_model: str | os.PathLike | None,
        vision_tower: str | os.PathLike | None,
        language_revision: str | None = None,
        tower_revision: str | None = None,
        **kwargs,
    ) -> Backbones:
        """Raises `ValueError` if one is not given, or the tokenizer has tokens after the placeholder."""
        if language_model is None or vision_tower is None:
            name = "language_model" if language_model is None else "vision_tower"
            raise ValueError(f"{name} is not set: a hub id or a folder")
        hub = hub_kwargs(kwargs)
        language_hub = hub if language_revision is None else hub | {"revision": language_revision}
        tower_hub = hub if tower_revision is None else hub | {"revision": tower_revision}
        rows = language_config(language_model, **language_hub).vocab_size
        vocabulary = read_vocabulary(language_model, rows, **language_hub)
        return cls(str(language_model), str(vision_tower), language_hub, tower_hub, *vocabulary)

    def config(self, **settings) -> LlavaSPConfig:
        """The configuration of a model on these, with the language model's rows; `settings` are LlavaSPConfig's."""
        text = language_config(self.language, **self.language_hub)
        return LlavaSPConfig(
            text_config=text,
            vision_config=vision_config(self.tower, **self.tower_hub),
            image_token_index=self.image_token_id,
            pad_token_id=self.pad_token_id,
            **{name: getattr(text, name) for name in ("bos_token_id", "eos_token_id", "tie_word_embeddings")},
            **settings,
        )

    def load(
        self,
        cls,
        config: LlavaSPConfig,
        dtype: torch.dtype | str = "auto",
        seed: int = 0,
        recorded: bool = False,
        **kwargs,
    ):
        """The model with a new projector. `recorded`: `config` is a checkpoint's, and is not changed."""
        dtype = _dtype(dtype)
        tower_kwargs = {name: value for name, value in kwargs.items() if name != "quantization_config"} | self.tower_hub
        tower: Any = load_vision_tower(self.tower, dtype=dtype, **tower_kwargs)
        language = load_language_model(self.language, dtype=dtype, **kwargs | self.language_hub)
        if isinstance(dtype, str):  # "auto"
            dtype = language.dtype
            tower.to(dtype)
        if not recorded:
            config.dtype = dtype
        tied = getattr(language.config, "tie_word_embeddings", False)  # a recorded value would overwrite the head
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
        config.language_model_name_or_path = _recorded(self.language)
        config.vision_tower_name_or_path = _recorded(self.tower)
        config.language_model_fingerprint = weights_fingerprint(self.language, **self.language_hub)
        config.vision_tower_fingerprint = weights_fingerprint(self.tower, **self.tower_hub)
        return self.assemble(cls, config, language, tower, fresh_projector(config, dtype, seed), recorded)

    def assemble(self, cls, config: LlavaSPConfig, language, tower, projector, recorded: bool = False):
        """Loaded parts in an empty model, nothing copied; unless `recorded`, `config` becomes that of the parts.

        Raises `ValueError` for a tower or language model that computes something else than our model would.
        """
        grow_vocabulary(language, self.rows)
        if not recorded:
            language.config.pad_token_id = self.pad_token_id
            config.text_config, config.vision_config = language.config, tower.config
            _record_ends(config, language, tower)
        if problem := tower_problem(tower, config) or (None if recorded else head_problem(language, self.language)):
            raise ValueError(problem)
        with zero3_set_aside(), torch.device("meta"), as_value_error(config.name_or_path or "this model"):
            model = cls(config)
            problem = features_problem(tower, model)
        if problem:
            raise ValueError(problem)
        model.model.vision_tower = tower
        model.model.multi_modal_projector = projector.to(tower.device)
        model.model.language_model = language.base_model
        model.lm_head = language.get_output_embeddings()
        for part in (language, tower):
            for name in ("hf_device_map", "quantization_method", "is_quantized", "hf_quantizer"):
                if hasattr(part, name) and not hasattr(model, name):
                    setattr(model, name, getattr(part, name))
        model.tie_weights()
        ends = language.generation_config.eos_token_id
        model.generation_config = GenerationConfig(  # greedy; ends where the language model ends
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id if ends is None else ends,
            pad_token_id=self.pad_token_id,
            max_new_tokens=DEFAULT_MAX_NEW_TOKENS,
        )
        return model.eval()


def from_llava_hf(cls: type[PreTrainedModel], backbones: Backbones, config: LlavaSPConfig, dtype, **load_kwargs):
    """Transformers' LLaVA-1.5 as a model of ours without spatial tokens; its three parts are used unchanged."""
    llava = load_llava(backbones.language, dtype=_dtype(dtype), **load_kwargs)
    config.dtype = llava.dtype
    projector = SpatialProjector(config).to(llava.dtype)
    projector.load_state_dict(llava.model.multi_modal_projector.state_dict())
    model = backbones.assemble(cls, config, _language_half(llava), llava.model.vision_tower, projector)
    if model.config.vision_tower_leading_tokens is not None:
        raise ValueError(f"{backbones.tower}: transformers' LLaVA treats registers of this tower as patches")
    model.config.language_model_logit_scale = model.config.language_model_logit_softcap = None  # it has no such steps
    return model


def _dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    """A type by its name; "auto" and types unchanged. Raises ValueError for a name that is not a type's."""
    named = dtype if dtype == "auto" or not isinstance(dtype, str) else getattr(torch, dtype, None)
    if named != "auto" and not isinstance(named, torch.dtype):
        raise ValueError(f'dtype is {dtype!r}; use a torch.dtype, its name ("bfloat16"), or "auto"')
    return named


def read_vocabulary(path: str | os.PathLike, old_rows: int = 0, **hub_kwargs) -> tuple[Any, int, int, int]:
    """A language model's tokenizer with image and padding token added, their ids, and the embedding rows needed.

    Raises `ValueError` if a token has an id after the placeholder's: ids from there on are never generated.
    """
    tokenizer = load_tokenizer(path, **hub_kwargs)
    image_token_id, pad_token_id, rows = add_special_tokens(tokenizer, old_rows)
    words = [word for word, i in tokenizer.get_vocab().items() if i > image_token_id and i != pad_token_id]
    if words:
        raise ValueError(
            f"the tokenizer of {path} has <image> as id {image_token_id} and {counted(len(words), 'token')} after it "
            f"(such as {words[0]!r}); the image placeholder must come after all tokens"
        )
    return tokenizer, image_token_id, pad_token_id, rows


def load_language_model(path: str | os.PathLike, **kwargs) -> PreTrainedModel:
    """A causal language model, or the one within a full LLaVA (the original's, transformers', ours)."""
    settings = read_settings(path, **hub_kwargs(kwargs))
    if is_original(settings):
        config = language_config(path, **hub_kwargs(kwargs))
        return _load_complete(AutoModelForCausalLM, path, zeros_allowed=False, config=config, **kwargs)
    if settings.get("model_type") in FULL_LLAVAS:
        return _language_half(load_llava(path, **kwargs))
    return _load_complete(AutoModelForCausalLM, path, **kwargs)


def load_llava(path: str | os.PathLike, **kwargs) -> LlavaForConditionalGeneration:
    """A full LLaVA, transformers' or ours. Raises `ValueError` for an adapter checkpoint of ours."""
    if read_settings(path, **hub_kwargs(kwargs))["model_type"] == "llava":
        return _load_complete(LlavaForConditionalGeneration, path, zeros_allowed=False, **kwargs)
    if not recognise(fetch(path, **kwargs)).holds_language_model:
        raise ValueError(f"{path} is an adapter checkpoint: merge it first (python -m llava_sp.checkpoints.merge)")
    return LlavaSPForCausalLM.from_pretrained(path, **kwargs)


def _language_half(llava: LlavaForConditionalGeneration) -> PreTrainedModel:
    """The language model of transformers' LLaVA as a separate model; nothing is copied."""
    with torch.device("meta"):
        language = AutoModelForCausalLM.from_config(llava.config.text_config, dtype=llava.dtype)
    setattr(language, language.base_model_prefix, llava.model.language_model)
    language.set_output_embeddings(llava.lm_head)
    language.generation_config = llava.generation_config
    return language


def load_vision_tower(path: str | os.PathLike, **kwargs) -> PreTrainedModel:
    """The image half of a CLIP or SigLIP checkpoint, a vision model, a timm ViT, or the tower of a full LLaVA."""
    if read_settings(path, **hub_kwargs(kwargs)).get("model_type") in FULL_LLAVAS:
        return load_llava(path, **kwargs).model.vision_tower
    return _load_complete(AutoModel, path, config=vision_config(path, **hub_kwargs(kwargs)), **kwargs)


def open_tower(config: LlavaSPConfig, path: str | os.PathLike, **kwargs) -> LlavaSPModel:
    """A frozen model of `config` of which only the vision tower is loaded: for `get_patch_features`.

    Raises `ValueError` for a tower without a square grid of patches.
    """
    tower = load_vision_tower(path, **kwargs)
    config.vision_config = tower.config
    _record_leading(config, tower)
    if problem := tower_problem(tower, config):
        raise ValueError(problem)
    with torch.device("meta"), as_value_error(path):
        model = LlavaSPModel(config)
    model.vision_tower = tower
    return model.eval().requires_grad_(False)


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
    """Resize embeddings and head to `rows` rows; each new row is the mean of the old ones, so it is deterministic."""
    old_rows = language.get_input_embeddings().num_embeddings
    if rows == old_rows:
        return
    language.resize_token_embeddings(rows, mean_resizing=False)
    for module in (language.get_input_embeddings(), language.get_output_embeddings()):
        weight: Any = module.weight
        with gathered([weight], modify=True):
            if weight.numel():
                weight[old_rows:] = weight[:old_rows].float().mean(dim=0).to(weight.dtype)


def _load_complete(auto_class, path: str | os.PathLike, zeros_allowed: bool = True, **kwargs) -> Any:
    """`from_pretrained`, but raises for incomplete weights instead of leaving random numbers or NaN.

    A matrix of zeros may be intended in a backbone, not in a trained LLaVA.

    Raises:
        ValueError: a file is cut off, missing or holds code; a tensor is missing, of another shape, or cannot be trained
            weights. Each is named.
    """
    stored = []
    if (Path(path) / "config.json").is_file():  # before anything is read; without it, transformers' own message
        read_all_settings(Path(path))
        stored = [tensor for file in weight_files(Path(path)) for tensor in stored_tensors(file)]
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # else the keys of a CLIP's text half are reported as unexpected
    try:  # `info` then names a wrong shape
        model, info = auto_class.from_pretrained(path, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
    finally:
        logging.set_verbosity(verbosity)
    problems = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    problems += integer_weights(model, stored)
    if problems:
        raise ValueError(
            f"{path} does not hold all weights of {type(model).__name__}: {len(problems)} missing, integers or of another "
            f"shape, such as {', '.join(problems[:5])}"
        )
    check_model(model, path, stored, zeros_allowed)
    return model


@contextmanager
def zero3_set_aside() -> Iterator[None]:
    """Keeps transformers from splitting (and gathering, and initialising) the parts of a model that must stay empty."""
    current = integration._hf_deepspeed_config_weak_ref and integration._hf_deepspeed_config_weak_ref()
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if current is not None:
            integration.set_hf_deepspeed_config(current)


def _record_ends(config: LlavaSPConfig, language: PreTrainedModel, tower: PreTrainedModel) -> None:
    """Record the tower's tokens before its patches, and the language model's steps after its head."""
    _record_leading(config, tower)
    config.language_model_logit_scale, config.language_model_logit_softcap = head_steps(language) or (None, None)
    config.language_model_head_bias = getattr(language.get_output_embeddings(), "bias", None) is not None


def _record_leading(config: LlavaSPConfig, tower: PreTrainedModel) -> None:
    leading = leading_tokens(tower, config) or 0
    config.vision_feature_select_strategy = "default" if leading else "full"
    config.vision_tower_leading_tokens = leading if leading > 1 else None


def _recorded(path: str) -> str:
    """The recorded path: absolute for a local folder, the id for a hub model."""
    return str(Path(path).resolve()) if Path(path).is_dir() else path
