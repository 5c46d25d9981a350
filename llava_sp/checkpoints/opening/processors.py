"""The processor of a checkpoint in any format: the one saved beside it, or one built from its records and its bases."""

from __future__ import annotations

import math
import os
from pathlib import Path

from PIL import Image

from llava_sp.checkpoints.opening.foreign import bases_of, check_language_model, has_tokenizer
from llava_sp.checkpoints.reading.formats import OURS, Checkpoint, recognise
from llava_sp.checkpoints.reading.places import base_kwargs, fetch, fetch_config, hub_kwargs
from llava_sp.checkpoints.reading.settings import read_all_settings
from llava_sp.common.files import read_json
from llava_sp.common.schema import Check, expect, one_of
from llava_sp.model.backbone_configs import as_value_error, language_config, load_tokenizer, vision_config
from llava_sp.model.configuration_llava_sp import LlavaSPConfig
from llava_sp.model.processing_llava_sp import LlavaSPProcessor, add_special_tokens


def open_processor(
    cls: type[LlavaSPProcessor],
    checkpoint: str | os.PathLike | Checkpoint,
    *args,
    language_model: str | os.PathLike | None = None,
    vision_tower: str | os.PathLike | None = None,
    **kwargs,
) -> LlavaSPProcessor:
    """The processor of a checkpoint; `LlavaSPProcessor.from_pretrained` calls this.

    Args:
        checkpoint: a folder, a hub id, or the result of `recognise`.
        language_model, vision_tower: instead of the recorded ones, if the processor is built from them.

    Raises like `LlavaSPProcessor.from_pretrained`.
    """
    if not isinstance(checkpoint, Checkpoint):
        if is_saved(checkpoint, **kwargs):
            return _saved(cls, checkpoint, *args, **kwargs)
        checkpoint = recognise(fetch(checkpoint, **kwargs))
    if checkpoint.format in OURS or is_saved(checkpoint.folder):
        return _saved(cls, checkpoint.folder, *args, **kwargs)
    return make_processor(cls, checkpoint, language_model, vision_tower, **kwargs)


def _saved(cls: type[LlavaSPProcessor], path: str | os.PathLike, *args, **kwargs) -> LlavaSPProcessor:
    """The processor saved in a folder or on the hub; runs it and compares it with the model's configuration there.

    Raises `ValueError` if the first image and text would fail, or give other tokens than the model's.
    """
    if Path(path).is_dir():
        read_all_settings(Path(path), "ours")
    processor = cls.from_saved(path, *args, **kwargs)
    config = fetch_config(path, **hub_kwargs(kwargs))
    if config is None or read_json(config, dict).get("model_type") != LlavaSPConfig.model_type:
        return processor
    with as_value_error(path):
        model = LlavaSPConfig.from_pretrained(config.parent)
        pixels = processor(images=Image.new("RGB", (48, 32)), text=f"{processor.image_token} a")["pixel_values"]
    made = {name: getattr(processor, name) for name in ("image_token_id", "pad_token_id", "num_image_tokens")}
    spec = {name: one_of(getattr(model, name)) for name in made} | {
        "image": one_of([1, 3, model.image_size, model.image_size]),
        "pixels": Check(math.isfinite, "numbers"),
        "tokens": Check(lambda count: count <= model.text_config.vocab_size, "no more than the model has"),
    }
    made |= {"image": [*pixels.shape], "pixels": pixels.sum().item(), "tokens": len(processor.tokenizer)}
    expect(
        made,
        spec,
        f"the processor of {path} (processor_config.json and the tokenizer's files) is not that of its model",
    )
    return processor


def is_saved(path: str | os.PathLike, **kwargs) -> bool:
    """Whether a folder or hub model holds a processor of ours, or only a processor."""
    file = None if Path(path).is_file() else fetch_config(path, "processor_config.json", **kwargs)
    if file is None:
        return False
    ours = read_json(file, dict).get("processor_class") == "LlavaSPProcessor"
    return ours or (Path(path).is_dir() and not (Path(path) / "config.json").is_file())


def make_processor(
    cls: type[LlavaSPProcessor],
    found: Checkpoint,
    language_model: str | os.PathLike | None = None,
    vision_tower: str | os.PathLike | None = None,
    image_aspect_ratio: str | None = None,
    conversation_template: str = "vicuna_v1",
    **kwargs,
) -> LlavaSPProcessor:
    """The processor of a checkpoint that other code wrote.

    Args:
        image_aspect_ratio: "pad" or "crop"; None is what the original's config.json records (without one, an error),
            and for transformers' LLaVA, which records nothing, LLaVA-1.5's own "pad" (its processor crops).
        conversation_template: no checkpoint of the original code records it; LLaVA-1.5's and LLaVA-SP's is vicuna_v1.
    """
    kwargs = hub_kwargs(base_kwargs(kwargs))
    language, tower = bases_of(found, language_model, vision_tower, **kwargs)
    if not found.holds_language_model and has_tokenizer(found):
        token_ids = add_special_tokens(load_tokenizer(language, **kwargs))[:2]
        check_language_model(found, language_config(language, **kwargs), token_ids, **kwargs)
    if image_aspect_ratio is None:
        image_aspect_ratio = "pad" if found.format == "llava_hf" else recorded_aspect_ratio(found)
    return cls.from_backbones(
        LlavaSPConfig(vision_config=vision_config(tower, **kwargs), **found.spatial),
        language_model=found.folder if has_tokenizer(found) else language,
        vision_tower=tower,
        image_aspect_ratio=image_aspect_ratio,
        conversation_template=conversation_template,
        **kwargs,
    )


def recorded_aspect_ratio(found: Checkpoint) -> str:
    """How the original prepared the images of training. Raises `ValueError` where its config.json does not state it."""
    stated = {"image_aspect_ratio": one_of("pad", "square", "crop")}
    expect(found.config, stated, f"{found.folder / 'config.json'} (add it, or pass image_aspect_ratio=)")
    return "pad" if found.config["image_aspect_ratio"] == "pad" else "crop"
