"""Opening a checkpoint for evaluation or generation: where it is, on what device, in which number format."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image

from llava_sp import LlavaSPForCausalLM, LlavaSPProcessor
from llava_sp.checkpoints.opening import open_model, open_processor
from llava_sp.checkpoints.reading.fingerprint import checkpoint_hash
from llava_sp.checkpoints.reading.formats import OURS, Checkpoint, recognise
from llava_sp.checkpoints.reading.places import checkpoints_hint, fetch, is_missing_folder
from llava_sp.common.files import read_json
from llava_sp.data.images import load_image

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

    @cached_property
    def folder(self) -> Path:
        """Raises ValueError if there is neither such a directory nor such a model on the hub."""
        local = Path(self.path)
        if local.is_dir():
            if not (local / "config.json").is_file():
                raise ValueError(f"--model {local} has no config.json: no finished checkpoint{checkpoints_hint(local)}")
            return local
        if local.exists() or is_missing_folder(self.path):
            raise ValueError(f"--model {self.path} is not a directory")
        try:
            return fetch(self.path)
        except OSError as error:
            raise ValueError(f"--model {self.path} is neither a directory nor a model on the hub: {error}") from None

    @cached_property
    def found(self) -> Checkpoint:
        """What the folder holds; model and processor are opened from it. Raises ValueError if that is not a checkpoint."""
        try:
            return recognise(self.folder)
        except ValueError as error:
            raise ValueError(f"--model {self.path} is not a LLaVA-SP checkpoint: {error}") from None

    @cached_property
    def fingerprint(self) -> str:
        """Stands for all weights. Ours record their base and refuse another; for others the named backbones count too."""
        own = checkpoint_hash(self.found)
        if self.found.format in OURS or not self.overrides:
            return own
        parts = [checkpoint_hash(path) if Path(path).is_dir() else path for path in self.overrides.values()]
        return hashlib.sha256("".join([own, *parts]).encode()).hexdigest()[:16]

    @property
    def config_hash(self) -> str:
        """Stands for the settings in config.json, without versions and paths."""
        found = self._settings("config.json", but=_PLACES)
        return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def generation_config(self) -> dict[str, Any]:
        """The checkpoint's own settings for `generate`, which hold where the benchmark says nothing."""
        return self._settings("generation_config.json")

    def _settings(self, name: str, but: Sequence[str] = ()) -> dict[str, Any]:
        file = self.folder / name
        found = read_json(file) if file.is_file() else {}
        return {key: value for key, value in found.items() if key not in (*but, *_VERSIONS)}

    @property
    def overrides(self) -> dict[str, str]:
        """The backbones that were named in place of the recorded ones."""
        named = {"language_model": self.language_model, "vision_tower": self.vision_tower}
        return {name: value for name, value in named.items() if value is not None}

    def model(self, dtype: str, device: torch.device) -> Any:
        try:
            model = open_model(LlavaSPForCausalLM, self.found, dtype=getattr(torch, dtype), **self.overrides)
        except ValueError as error:
            raise ValueError(self._explained(str(error))) from error
        return merge_lora(model.to(device).eval())

    def _explained(self, message: str) -> str:
        """transformers' message about a model of the wrong kind without its list of all kinds, naming the argument."""
        if not message.startswith("Unrecognized "):
            return message
        message = message.splitlines()[0]
        if "configuration class" in message:  # Unrecognized configuration class <...> for this kind of AutoModel: ...
            language = "AutoModelForCausalLM" in message
        else:  # Unrecognized model in PATH. Should have ...
            message = message.split(", or contain one of")[0]
            language = self.language_model is not None and f" {self.language_model}." in message
        flag, value = ("--language-model", self.language_model) if language else ("--vision-tower", self.vision_tower)
        what = "language model" if language else "vision tower"
        given = f"{flag} {value}" if value else f"the {what} that --model {self.path} records ({flag} names another)"
        return f"{given} cannot be used as a {what}: {message}"


@dataclass(frozen=True)
class Engine:
    """A checkpoint on a device: opened when first needed, and once for all benchmarks of a command."""

    source: Source
    dtype: str
    device: torch.device

    @classmethod
    def choose(cls, source: Source, dtype: str, device: str | None, local_rank: int = 0) -> Engine:
        """`dtype` and `device` as on the command line; see `choose_dtype` and `choose_device`."""
        chosen = choose_device(device, local_rank)
        return cls(source, choose_dtype(dtype, chosen), chosen)

    @cached_property
    def model(self) -> Any:
        return self.source.model(self.dtype, self.device)

    def processor(self, image_aspect_ratio: str | None = None) -> Any:
        """The checkpoint's processor in this image mode (None: its own), read once for all benchmarks that use it."""
        if image_aspect_ratio not in self._processors:
            self._processors[image_aspect_ratio] = load_processor(self.source, image_aspect_ratio)
        return self._processors[image_aspect_ratio]

    @cached_property
    def _processors(self) -> dict[str | None, Any]:
        return {}


def processor_hash(processor: Any) -> str:
    """Stands for what turns text and pictures into tokens and pixels: tokenizer, templates, image settings."""
    tokenizer = getattr(processor.tokenizer, "backend_tokenizer", None)
    parts = [
        processor.image_processor.to_json_string(),
        str(processor.chat_template),
        tokenizer.to_str() if tokenizer is not None else json.dumps(processor.tokenizer.get_vocab(), sort_keys=True),
        str(processor.num_image_tokens),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def merge_lora(model: Any) -> Any:
    """Adds LoRA's products to the weights they belong to, as LLaVA does before it evaluates: fewer matrix products per
    token, and the rounding of the published numbers. In place, in memory only."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    return model


def load_processor(source: Source, image_aspect_ratio: str | None = None) -> Any:
    _check_processor_files(source)
    processor = open_processor(LlavaSPProcessor, source.found, **source.overrides)
    if image_aspect_ratio is not None:
        processor.image_aspect_ratio = image_aspect_ratio
    return processor


def _check_processor_files(source: Source) -> None:
    """Raises ValueError if the folder is no checkpoint that can be opened, or one of ours without its processor."""
    folder = source.folder
    if source.found.format not in OURS:
        return  # what other code wrote; its processor is made from what it records
    missing = [names[0] for names in _PROCESSOR_FILES if not any((folder / name).is_file() for name in names)]
    if missing:
        raise ValueError(
            f"--model {source.path} has a model but not its whole processor ({' and '.join(missing)} missing): copy the "
            "processor's files from the checkpoint the model comes from, or write them there with "
            f'LlavaSPProcessor.from_backbones(LlavaSPConfig.from_pretrained("{source.path}")).save_pretrained("{source.path}")'
        )


def choose_device(wanted: str | None, local_rank: int = 0) -> torch.device:
    """This process's GPU if there is one, else the CPU; `wanted` as on the command line.

    Raises:
        ValueError: a device that torch does not know or that is not there.
    """
    if wanted is None or wanted == "cuda":
        count = torch.cuda.device_count()
        if count:
            return torch.device("cuda", local_rank % count)
        if wanted is None:
            return torch.device("cpu")
        raise ValueError("--device cuda: there is no CUDA GPU here (use --device cpu)")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ValueError(f"--device {wanted}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {wanted}: there are {torch.cuda.device_count()} CUDA GPUs here")
    return device


def choose_dtype(wanted: str, device: torch.device) -> str:
    if wanted != "auto":
        return wanted
    return "float16" if device.type == "cuda" else "float32"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def open_image(source: Path | bytes, owner: str) -> Image.Image:
    """Opens and fully decodes an image as RGB.

    Raises:
        ValueError: naming `owner` (the question) and the file, if it is missing, empty, broken, or gigantic.
    """
    try:
        if isinstance(source, Path):
            return load_image(source.parent, source.name)
        with Image.open(io.BytesIO(source)) as image:
            return image.convert("RGB")
    except (ValueError, OSError, SyntaxError, RuntimeError, Image.DecompressionBombError) as error:
        what = "" if isinstance(source, Path) else f"embedded image of {len(source)} bytes: "
        raise ValueError(f"{owner}: {what}{error}") from error


def render_prompt(processor: Any, message: str, conversation_template: str | None = None) -> str:
    """The whole text that the model continues: the user's `message` in the conversation template."""
    if conversation_template is not None and conversation_template != processor.conversation_template:
        turns = [{"role": "user", "content": message}, {"role": "assistant", "content": ""}]
        return "".join(text for text, _ in processor.render_conversation(turns, conversation_template))
    turns = [{"role": "user", "content": message}]
    return processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
