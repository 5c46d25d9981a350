"""Inference with a checkpoint: its source, device and number format, images and prompts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from transformers import BatchEncoding

from llava_sp import LlavaSPForCausalLM, LlavaSPProcessor
from llava_sp.checkpoints.opening import open_model, open_processor
from llava_sp.checkpoints.reading.fingerprint import checkpoint_hash
from llava_sp.checkpoints.reading.formats import OURS, Checkpoint, recognise
from llava_sp.checkpoints.reading.places import checkpoints_hint, fetch
from llava_sp.common.files import counted, read_json
from llava_sp.data.images import decode_image
from llava_sp.decoding import Generation
from llava_sp.model.conversation import IMAGE_MARK

_PLACES = ("language_model_name_or_path", "vision_tower_name_or_path", "mm_vision_tower", "_name_or_path")
_VERSIONS = ("transformers_version", "_from_model_config")
_PROCESSOR_FILES = (("processor_config.json",), ("tokenizer.json", "tokenizer.model", "vocab.json"))  # one of each


@dataclass(frozen=True)
class Source:
    """A checkpoint: a directory, or a hub id that is downloaded (or found in the cache) when first needed."""

    path: str
    language_model: str | None = None
    vision_tower: str | None = None

    @property
    def name(self) -> str:
        return Path(self.path).resolve().name if Path(self.path).is_dir() else self.path

    @property
    def overrides(self) -> dict[str, Any]:
        """The backbones given instead of the recorded ones."""
        named = {"language_model": self.language_model, "vision_tower": self.vision_tower}
        return {name: value for name, value in named.items() if value is not None}

    @cached_property
    def folder(self) -> Path:
        """Raises ValueError: neither a directory nor a model on the hub; no config.json in it."""
        try:
            folder = fetch(self.path)
        except (OSError, ValueError) as error:  # ValueError: not the form of a hub id
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"model {self.path} is neither a directory nor a model on the hub ({reason})") from None
        if not (folder / "config.json").is_file():
            raise ValueError(f"model {folder} has no config.json: not a finished checkpoint{checkpoints_hint(folder)}")
        return folder

    @cached_property
    def found(self) -> Checkpoint:
        """The recognised folder, for model, processor and fingerprint. Raises ValueError if it is not a checkpoint."""
        try:
            return recognise(self.folder)
        except ValueError as error:
            raise ValueError(f"model {self.path} is not a LLaVA-SP checkpoint: {error}") from None

    @cached_property
    def fingerprint(self) -> str:
        """Identifies all weights. Our formats record their bases and reject others; for others the given ones count."""
        own = checkpoint_hash(self.found)
        if self.found.format in OURS or not self.overrides:
            return own
        parts = [checkpoint_hash(path) if Path(path).is_dir() else path for path in self.overrides.values()]
        return _hash("".join([own, *parts]))

    @property
    def config_hash(self) -> str:
        """Identifies the settings in config.json, without versions and paths."""
        return _hash(json.dumps(self._settings("config.json", but=_PLACES), sort_keys=True))

    @property
    def generation_config(self) -> dict[str, Any]:
        """The checkpoint's own settings for `generate`, which hold where `generate` is given no value."""
        return self._settings("generation_config.json")

    def _settings(self, name: str, but: Sequence[str] = ()) -> dict[str, Any]:
        file = self.folder / name
        found = read_json(file) if file.is_file() else {}
        return {key: value for key, value in found.items() if key not in (*but, *_VERSIONS)}

    def model(self, dtype: str, device: torch.device) -> Any:
        """The model in evaluation mode, LoRA merged. Raises ValueError for a backbone of the wrong kind, naming the argument."""
        try:
            model: Any = open_model(LlavaSPForCausalLM, self.found, dtype=getattr(torch, dtype), **self.overrides)
        except ValueError as error:
            raise ValueError(self._explained(str(error))) from error
        return merge_lora(model.to(device).eval())

    def _explained(self, message: str) -> str:
        """transformers' message about a model of the wrong kind without its list of all kinds, naming the argument."""
        if not message.startswith("Unrecognized "):
            return message
        message = message.splitlines()[0].split(", or contain one of")[0]  # "... model in PATH. Should have a ..."
        language = f" {self.language_model}." in message or "AutoModelForCausalLM" in message
        key = "language_model" if language else "vision_tower"
        value = self.overrides.get(key, f"of {self.path}")
        return f"{key} {value} cannot be used as a {key.replace('_', ' ')}: {message}"

    def processor(self, image_aspect_ratio: str | None = None) -> Any:
        """Raises ValueError: not a checkpoint, or processor files are missing from one of our formats."""
        missing = [names[0] for names in _PROCESSOR_FILES if not any((self.folder / name).is_file() for name in names)]
        if missing and self.found.format in OURS:  # for others it is built from what they record
            raise ValueError(
                f"model {self.path} has no {' and '.join(missing)}: copy them from the checkpoint it comes from, or write them: "
                f'LlavaSPProcessor.from_backbones(LlavaSPConfig.from_pretrained("{self.path}")).save_pretrained("{self.path}")'
            )
        processor = open_processor(LlavaSPProcessor, self.found, **self.overrides)
        if image_aspect_ratio is not None:
            processor.image_aspect_ratio = image_aspect_ratio
        return processor


@dataclass(frozen=True)
class Engine:
    """A checkpoint on a device, opened once, when first needed."""

    source: Source
    dtype: str
    device: torch.device

    @classmethod
    def choose(cls, source: Source, dtype: str, device: str | None, local_rank: int = 0) -> Engine:
        """`dtype` ("auto": float16 on a GPU, else float32) and `device` as on the command line; see `choose_device`."""
        chosen = choose_device(device, local_rank)
        auto = "float16" if chosen.type == "cuda" else "float32"
        return cls(source, auto if dtype == "auto" else dtype, chosen)

    @cached_property
    def model(self) -> Any:
        return self.source.model(self.dtype, self.device)

    def processor(self, image_aspect_ratio: str | None = None) -> Any:
        """The checkpoint's processor with this image aspect ratio (None: its own), read once for each."""
        if image_aspect_ratio not in self._processors:
            self._processors[image_aspect_ratio] = self.source.processor(image_aspect_ratio)
        return self._processors[image_aspect_ratio]

    def answer(
        self,
        message: str,
        images: Sequence[Image.Image],
        generation: Generation,
        conversation_template: str | None = None,
        **options: Any,
    ) -> str:
        """The answer to one message, whose marks place the images (`place_images`); without images they are text.

        `options` are further arguments of `generate`, such as a streamer. One call at a time: it holds the device.
        """
        processor = self.processor()
        prompt = render_prompt(processor, message, conversation_template)
        inputs = pad_left(processor, [encode_prompt(processor, prompt, len(images), "the message", spell=True)]).to(
            self.device
        )
        if images:
            inputs["pixel_values"] = processor.preprocess_images(list(images)).to(self.device, self.model.dtype)
        with answering("with one question; try --dtype bfloat16"):
            ids = self.model.generate(**inputs, **generation.arguments(), **options)
        return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    @cached_property
    def _processors(self) -> dict[str | None, Any]:
        return {}

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type


def processor_hash(processor: Any) -> str:
    """Identifies what turns text and images into tokens and pixels: tokenizer, templates, image settings."""
    tokenizer = getattr(processor.tokenizer, "backend_tokenizer", None)
    parts = [
        processor.image_processor.to_json_string(),
        str(processor.chat_template),
        tokenizer.to_str() if tokenizer is not None else json.dumps(processor.tokenizer.get_vocab(), sort_keys=True),
        str(processor.num_image_tokens),
    ]
    return _hash("\n".join(parts))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def merge_lora(model: Any) -> Any:
    """Merges LoRA into its base weights, as LLaVA does before it evaluates: fewer matrix products per
    token, and the rounding of the published numbers. In place, in memory only."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    return model


def choose_device(name: str | None, local_rank: int = 0) -> torch.device:
    """This process's GPU for "cuda", and for None if there is one; else the CPU or the device of that name.

    Raises:
        ValueError: a device that torch does not know or that does not exist.
    """
    count = torch.cuda.device_count()
    if count and name in (None, "cuda"):
        return torch.device("cuda", local_rank % count)
    try:
        device = torch.device(name or "cpu")
    except RuntimeError as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"--device {name}: this machine has {counted(count, 'CUDA GPU')} (--device cpu needs none)")
    return device


def open_image(source: Path | bytes, owner: str) -> Image.Image:
    """Opens and fully decodes an image as RGB.

    Raises:
        ValueError: naming `owner` (the question) and the file, if it is missing, empty, broken, or too large.
    """
    what = f"image {source}" if isinstance(source, Path) else f"embedded image of {len(source)} bytes"
    try:
        return decode_image(source, what)
    except ValueError as error:
        raise ValueError(f"{owner}: {error}") from error


def place_images(text: str, count: int, owner: str) -> str:
    """The user's message: `count` images in front, each on a line of its own, unless the text has marks for them.

    Raises:
        ValueError: naming `owner`, if the text holds marks, but not one per image.
    """
    marks = text.count(IMAGE_MARK)
    if marks not in (0, count):
        raise ValueError(
            f"{owner} has {counted(marks, f'{IMAGE_MARK} mark')} for {counted(count, 'image')}: give one each, or none"
        )
    return text if marks else f"{IMAGE_MARK}\n" * count + text


def render_prompt(processor: Any, message: str, conversation_template: str | None = None) -> str:
    """The whole text that the model continues: the user's `message` in the conversation template (None: the processor's).

    Raises:
        ValueError: the template cannot render it, or would drop the question.
    """
    turns, template = [{"role": "user", "content": message}], {"conversation_template": conversation_template}
    return processor.apply_chat_template(turns, **template, add_generation_prompt=True, tokenize=False)


def encode_prompt(processor: Any, prompt: str, images: int, owner: str, spell: bool = False) -> list[int]:
    """The ids of a rendered prompt about so many images; `spell` encodes marks as text if there are no images.

    Raises:
        ValueError: naming `owner`, if marks and images differ in number, or the text is not Unicode.
    """
    marks = prompt.count(IMAGE_MARK)
    if marks != images and (images or not spell):
        raise ValueError(f"{owner}: {counted(marks, f'{IMAGE_MARK} mark')} for {counted(images, 'image')}")
    try:
        return processor.encode_segments([(prompt, False)], images=images > 0)[0]
    except ValueError as error:
        raise ValueError(f"{owner}: {error}") from None


def pad_left(processor: Any, rows: Sequence[Sequence[int]]) -> BatchEncoding:
    """`input_ids` and `attention_mask` [rows, L]."""
    columns = {"input_ids": list(rows), "attention_mask": [[1] * len(row) for row in rows]}
    return processor.tokenizer.pad(columns, padding_side="left", return_tensors="pt")


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position ids [rows, L] of left-padded rows."""
    return (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)


@contextmanager
def answering(advice: str) -> Iterator[None]:
    """Inference mode. Raises MemoryError that ends with `advice` if the GPU's memory does not suffice."""
    try:
        with torch.inference_mode():
            yield
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"out of GPU memory {advice} ({str(error).splitlines()[0]})") from None
