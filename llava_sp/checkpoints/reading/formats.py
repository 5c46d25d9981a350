"""Recognises a checkpoint's format by its content: every format's tensors under our names, reading only headers.

    llava_sp              our full checkpoint (transformers' own layout)
    llava_sp_adapter      our adapter checkpoint, see `opening.adapter`
    original_lora         a released LLaVA-SP or LLaVA-1.5 LoRA folder: adapter_model.*, non_lora_trainables.bin
    original_full         LLaVA-1.5's or LLaVA-SP's full model, `model_type: llava_llama`, projector within or beside
    original_projector    what the first stage leaves: model.bin (LLaVA-SP), mm_projector.bin (LLaVA-1.5)
    llava_hf              transformers' LLaVA-1.5 (llava-hf on the hub)

The original's configuration does not record the variant of its weights; their names and shapes determine it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peft import LoraConfig

from llava_sp.checkpoints.reading.lora_settings import (
    OPENED,
    ORIGINAL_SETTINGS,
    check_plain_lora,
    original_lora_config,
    our_settings,
)
from llava_sp.checkpoints.reading.manifest import MANIFEST, describe
from llava_sp.checkpoints.reading.names import (
    CONSTANTS,
    HEAD,
    LANGUAGE,
    LORA,
    PEFT,
    PROJECTOR,
    TOWER,
    llava_hf_name,
    our_name,
    our_projector_name,
    spatial_layout,
    tower_name,
    unwrapped,
)
from llava_sp.checkpoints.reading.settings import read_all_settings
from llava_sp.checkpoints.reading.tensor_files import (
    WEIGHT_FILES,
    StoredTensor,
    folder_tensors,
    shard_index,
    stored_tensors,
)
from llava_sp.common.files import read_json
from llava_sp.common.schema import Check, expect, one_of
from llava_sp.model.modeling_llava_sp import ADAPTER_FILE


@dataclass(frozen=True)
class Format:
    """What a format is called, and which backbones its folders hold themselves."""

    title: str
    holds_language_model: bool = False
    holds_vision_tower: bool = False  # a whole one; the original's may hold a trained one beside its base's


# `recognise` decides among them, `opening._OPENERS` opens them.
FORMATS = {
    "llava_sp": Format("LLaVA-SP, full checkpoint", True, True),
    "llava_sp_adapter": Format("LLaVA-SP, adapter checkpoint (projector, and LoRA after the second stage)"),
    "original_lora": Format("original LLaVA code, LoRA folder"),
    "original_full": Format("original LLaVA code, full checkpoint", holds_language_model=True),
    "original_projector": Format("original LLaVA code, projector of the first stage"),
    "llava_hf": Format("transformers' LLaVA, full checkpoint", True, True),
}
OURS = ("llava_sp", "llava_sp_adapter")
LORA_FOLDER = "lora"
LORA_TENSORS = f"{LORA_FOLDER}/adapter_model.safetensors"

_LORA_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_NON_LORA_FILES = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")
_PROJECTOR_FILES = ("model.bin", "mm_projector.bin")
_PLACE = Check(lambda value: value is None or isinstance(value, str), "the hub id or folder of one model")
# The schema of the settings in config.json that are read, and of those that change how a model processes an image.
_ORIGINAL_CONFIG = {
    "_name_or_path?": _PLACE,
    "mm_vision_tower?": _PLACE,
    "vision_tower?": _PLACE,
    "mm_vision_select_layer?": int,
    "mm_vision_select_feature?": one_of("patch"),
    "mm_projector_type?": one_of("mlp2x_gelu"),
    "mm_use_im_start_end?": one_of(False, None),
    "mm_use_im_patch_token?": one_of(False, None),
    "mm_patch_merge_type?": one_of("flat", None),
    "image_aspect_ratio?": one_of("pad", "square", "crop", None),
    "s2?": one_of(False, None),
}
_LLAVA_HF_CONFIG = {
    "model_type": one_of("llava"),
    "projector_hidden_act?": one_of("gelu"),
    "multimodal_projector_bias?": one_of(True),
}


class UnknownFormat(ValueError):
    """The folder is not in one of `FORMATS`."""


@dataclass
class Checkpoint:
    """A recognised folder.

    Attributes:
        folder: where it is. format: a key of `FORMATS`. config: its config.json, {} if there is none.
        tensors: our parameter name -> where the tensor is; LoRA's without the adapter's name.
        unknown: tensors that the opened model does not have.
        missing: our names of tensors that the layout needs and that no file holds.
        lora: PEFT's adapter_config.json, or None. manifest: that of an adapter checkpoint of ours, or None.
        spatial: keywords of `LlavaSPConfig` that the projector's tensors imply.
        language_model, vision_tower: the recorded backbones.
        copies: a file of these tensors -> another one beside it that must hold the same.
    """

    folder: Path
    format: str
    config: dict[str, Any]
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    unknown: list[StoredTensor] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    lora: dict[str, Any] | None = None
    manifest: dict[str, Any] | None = None
    spatial: dict[str, Any] = field(default_factory=dict)
    language_model: str | None = None
    vision_tower: str | None = None
    copies: dict[Path, Path] = field(default_factory=dict)

    def part(self, prefix: str, lora: bool = False) -> dict[str, StoredTensor]:
        """The tensors below `prefix` under their whole names, LoRA's or the others."""
        return {n: t for n, t in self.tensors.items() if n.startswith(prefix) and (LORA in n) == lora}

    @property
    def files(self) -> list[Path]:
        return sorted({tensor.file for tensor in (*self.tensors.values(), *self.unknown)})

    @property
    def lora_file(self) -> Path:
        """PEFT's settings, if the checkpoint has LoRA."""
        return self.folder / (LORA_FOLDER if self.format == "llava_sp_adapter" else "") / "adapter_config.json"

    @property
    def holds_language_model(self) -> bool:
        return FORMATS[self.format].holds_language_model

    @property
    def holds_vision_tower(self) -> bool:
        return FORMATS[self.format].holds_vision_tower

    @property
    def is_original(self) -> bool:
        return self.format.startswith("original")

    @property
    def feature_layer(self) -> Any:
        """The tower's layer(s) that are read, for checkpoints of other code."""
        return self.config.get("mm_vision_select_layer" if self.is_original else "vision_feature_layer", -2)

    @property
    def dtype(self) -> str:
        """The name of the type of its weights that the original records, or "auto"."""
        return (self.config.get("torch_dtype") or self.config.get("dtype") or "auto").removeprefix("torch.")

    def lora_config(self) -> LoraConfig:
        """PEFT's settings of the checkpoint's LoRA; those of the original are restricted to the language model."""
        if self.is_original:
            return original_lora_config(self.lora or {})
        return LoraConfig.from_pretrained(str(self.lora_file.parent))

    def add(self, tensors: list[StoredTensor], named: Callable[[str], str | None]) -> None:
        """Add tensors under our names. Raises `ValueError` for two with the same name, and for integers."""
        for tensor in tensors:
            name = named(tensor.key)
            if tensor.key.endswith(CONSTANTS):
                continue
            if not tensor.dtype.is_floating_point and "quantization_config" not in self.config:
                raise ValueError(f"{tensor.key} in {tensor.file} holds {tensor.dtype}; expected floating-point weights")
            other = tensor if name is None else self.tensors.setdefault(name, tensor)
            self.unknown += [tensor] if name is None else []
            if other is not tensor:
                raise ValueError(
                    f"{tensor.key} in {tensor.file} and {other.key} in {other.file} are the same part of the model: "
                    "two checkpoints, perhaps of two variants, were mixed"
                )


def recognise(path: str | os.PathLike) -> Checkpoint:
    """The checkpoint at `path`, a folder or the file of a first stage's projector.

    Raises:
        FileNotFoundError: `path` does not exist.
        UnknownFormat: it is not one of `FORMATS`; the message lists what was found.
        ValueError: a file in it is broken, missing, or contradicts the others.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no folder {path}")
    found = _recognise(path, path if path.is_dir() else path.parent)
    kind = "ours" if found.format in OURS else "model" if found.format == "llava_hf" else "backbone"
    read_all_settings(found.folder, kind)
    return found


def _recognise(path: Path, folder: Path) -> Checkpoint:
    config = read_json(folder / "config.json", dict) if (folder / "config.json").is_file() else {}
    if path.is_file():
        return _original_projector(folder, path, config)
    whole = shard_index(folder) is not None or bool(_find(folder, WEIGHT_FILES))
    if (folder / ADAPTER_FILE).is_file():
        if whole:
            raise ValueError(
                f"{folder} holds a whole model beside {ADAPTER_FILE}: two checkpoints were saved in one folder"
            )
        return _adapter(folder, config)
    if config.get("model_type") == "llava_sp" and not _find(folder, _NON_LORA_FILES):
        return _full(folder, config)
    if _find(folder, _LORA_FILES) or _find(folder, _NON_LORA_FILES):
        return _original_lora(folder, config)
    if whole:
        return _full_of_others(folder, config)
    if _find(folder, _PROJECTOR_FILES):
        return _original_projector(folder, _find(folder, _PROJECTOR_FILES)[0], config)
    found = ", ".join(sorted(file.name for file in folder.iterdir())[:12]) or "nothing"
    raise UnknownFormat(
        f"{folder} is not a checkpoint that can be opened. It holds: {found}. Expected one of: {', '.join(WEIGHT_FILES)}, "
        f"an index of shards, {ADAPTER_FILE}, {_LORA_FILES[0]} and {_NON_LORA_FILES[1]}, {', '.join(_PROJECTOR_FILES)}"
    )


def _find(folder: Path, names: tuple[str, ...]) -> list[Path]:
    return [folder / name for name in names if (folder / name).is_file()]


# ---- our own


def _ours(folder: Path, config: dict, kind: str) -> Checkpoint:
    found = Checkpoint(folder, kind, config)
    found.spatial = {key: value for key, value in config.items() if key.startswith(("spatial_", "fusion_"))}
    found.language_model = config.get("language_model_name_or_path") or None
    found.vision_tower = config.get("vision_tower_name_or_path") or None
    return found


def _full(folder: Path, config: dict) -> Checkpoint:
    found = _ours(folder, config, "llava_sp")
    found.add(folder_tensors(folder), tower_name)
    return found


def _adapter(folder: Path, config: dict) -> Checkpoint:
    found = _ours(folder, config, "llava_sp_adapter")
    found.manifest = describe(folder)
    found.add(_recorded(found, ADAPTER_FILE), lambda key: PROJECTOR + key)
    if (folder / LORA_FOLDER).is_dir():
        found.lora = our_settings(read_json(found.lora_file), found.lora_file)
        found.add(_recorded(found, LORA_TENSORS), lambda key: key.removeprefix(PEFT))
    return found


def _recorded(found: Checkpoint, name: str) -> list[StoredTensor]:
    """The tensors of a file that the manifest must list; its hash is checked when it is read."""
    assert found.manifest is not None
    files = expect(found.manifest["files"], {name: dict}, f"{found.folder / MANIFEST}: files")
    return [replace(tensor, sha256=files[name]["sha256"]) for tensor in stored_tensors(found.folder / name)]


# ---- the original code's


def _original(folder: Path, config: dict, kind: str, tensors: list[StoredTensor]) -> Checkpoint:
    """The tensors and the settings that the original code saves, for all of its formats."""
    expect(config, _ORIGINAL_CONFIG, folder / "config.json")
    found = Checkpoint(folder, kind, config)
    found.language_model = config.get("_name_or_path") or None
    found.vision_tower = config.get("mm_vision_tower") or config.get("vision_tower") or None
    found.add(tensors, our_name)
    found.spatial, found.missing = spatial_layout(found.part(PROJECTOR))
    if not found.holds_language_model:  # trained with LoRA; the base's own would replace it
        for name in (*found.part(LANGUAGE), *found.part(HEAD)):
            found.unknown.append(found.tensors.pop(name))
    return found


def _original_lora(folder: Path, config: dict) -> Checkpoint:
    tensors, copies = [], {}
    for names in (_LORA_FILES, _NON_LORA_FILES):
        files = _find(folder, names)
        held = [stored_tensors(file) for file in files]
        if not held or not held[0]:
            raise ValueError(f"{files[0]} holds no tensors" if files else f"{folder} lacks {' or '.join(names)}")
        tensors += held[0]
        if len(files) > 1:
            copies[files[0]] = files[1]
            one, other = ({tensor.key: (tensor.shape, tensor.dtype) for tensor in tensors} for tensors in held)
            differing = [key for key in one | other if one.get(key) != other.get(key)]
            if differing:
                raise contradiction(files[0], files[1], differing[0])
    found = _original(folder, config, "original_lora", tensors)
    found.copies = copies
    found.lora = read_json(found.lora_file, ORIGINAL_SETTINGS)
    check_plain_lora(found.lora, found.lora_file, OPENED)
    found.language_model = found.lora.get("base_model_name_or_path") or found.language_model
    return found


def contradiction(file: Path, copy: Path, key: str) -> ValueError:
    return ValueError(f"{file} and {copy} are not the same: {key} differs; remove the wrong one")


def _original_projector(folder: Path, file: Path, config: dict) -> Checkpoint:
    tensors = stored_tensors(file)
    if not any(our_projector_name(unwrapped(tensor.key)) for tensor in tensors):
        keys = ", ".join(tensor.key for tensor in tensors) or "nothing"
        raise UnknownFormat(f"{file} holds no projector, only {keys[:200]}")
    return _original(folder, config, "original_projector", tensors)


def _full_of_others(folder: Path, config: dict) -> Checkpoint:
    """A full model of the original code or of transformers; the names of its tensors tell which."""
    tensors = folder_tensors(folder)
    if any("multi_modal_projector." in tensor.key for tensor in tensors):
        return _llava_hf(folder, config, tensors)
    beside = [tensor for file in _find(folder, _PROJECTOR_FILES)[:1] for tensor in stored_tensors(file)]
    within = any(our_projector_name(unwrapped(tensor.key)) for tensor in tensors)
    if not within and not beside:
        raise UnknownFormat(
            f"{folder} ({config.get('model_type', 'no model_type')}) holds a model without a projector: it is a backbone. "
            "LlavaSPForCausalLM.from_backbones(language_model=..., vision_tower=...) makes a model from it"
        )
    found = _original(folder, config, "original_full", tensors if within else [*tensors, *beside])
    found.language_model = str(folder)
    for tensor in beside if within else ():  # LLaVA-1.5 is published with its projector twice
        name = our_name(tensor.key)
        own = found.tensors.get(name or "")
        if name is not None and (own is None or own.shape != tensor.shape):
            raise contradiction(tensor.file, own.file if own else folder, tensor.key)
    return found


# ---- transformers' LLaVA


def _llava_hf(folder: Path, config: dict, tensors: list[StoredTensor]) -> Checkpoint:
    found = Checkpoint(folder, "llava_hf", config, spatial={"spatial_variant": "none"})
    found.add(tensors, llava_hf_name)
    tower = found.part(TOWER)
    # Else a class token would stay among the patches, or a patch be left out for one.
    selected = (
        "default" if any(name.endswith(("class_embedding", "cls_token")) for name in tower) or not tower else "full"
    )
    expect(config, _LLAVA_HF_CONFIG | {"vision_feature_select_strategy?": one_of(selected)}, folder / "config.json")
    found.language_model = found.vision_tower = str(folder)
    return found
