"""What a folder of weights is, told by its content: every format's tensors under our own names, nothing read but headers.

    llava_sp              our full checkpoint (transformers' own layout)
    llava_sp_adapter      our adapter checkpoint, see `adapter`
    original_lora         a released LLaVA-SP or LLaVA-1.5 LoRA folder: adapter_model.*, non_lora_trainables.bin
    original_full         LLaVA-1.5's or LLaVA-SP's full model, `model_type: llava_llama`, projector within or beside
    original_projector    what the first stage leaves: model.bin (LLaVA-SP), mm_projector.bin (LLaVA-1.5)
    llava_hf              transformers' LLaVA-1.5 (llava-hf on the hub)

The original's configuration does not say which variant its weights are; their names and shapes do.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from peft import LoraConfig

from llava_sp.checkpoints.reading.tensor_files import (
    WEIGHT_FILES,
    StoredTensor,
    read_index,
    read_json,
    shard_index,
    stored_tensors,
    weight_files,
)
from llava_sp.model.backbone_configs import told_as_value_error
from llava_sp.model.configuration_llava_sp import LlavaSPConfig
from llava_sp.model.modeling_llava_sp import ADAPTER_FILE

FORMATS = {
    "llava_sp": "LLaVA-SP, full checkpoint",
    "llava_sp_adapter": "LLaVA-SP, adapter checkpoint (projector, and LoRA after the second stage)",
    "original_lora": "original LLaVA code, LoRA folder",
    "original_full": "original LLaVA code, full checkpoint",
    "original_projector": "original LLaVA code, projector of the first stage",
    "llava_hf": "transformers' LLaVA, full checkpoint",
}
PROJECTOR = "model.multi_modal_projector."
LANGUAGE = "model.language_model."
TOWER = "model.vision_tower."
HEAD = "lm_head."
LORA = ".lora_"
ORIGINAL_SCALES = (4, 8, 12, 16, 20, 24)
ORIGINAL_GRID = 24
ADAPTER_NAME = "default"
LORA_FOLDER = "lora"

_LORA_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_NON_LORA_FILES = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")
_PROJECTOR_FILES = ("model.bin", "mm_projector.bin")
# Settings of the original's that change what a model does with an image, and what is understood of each; the first is usual.
_UNDERSTOOD: dict[str, tuple] = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_use_im_start_end": (False, None),
    "mm_use_im_patch_token": (False, None),
    "mm_patch_merge_type": ("flat", None),
    "image_aspect_ratio": ("pad", "square", "crop", None),
    "s2": (False, None),
}
# The same of transformers' LLaVA; whether the tower's first token is left out has to fit the tower.
_UNDERSTOOD_HF: dict[str, tuple] = {
    "projector_hidden_act": ("gelu",),
    "multimodal_projector_bias": (True,),
    "vision_feature_select_strategy": ("default", "full"),
}
# PEFT's settings: what each may be, and that in words.
_LORA_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (lambda value: type(value) is int and value > 0, "a whole number above 0"),
    "lora_alpha": (lambda value: type(value) in (int, float), "a number"),
    "lora_dropout": (lambda value: type(value) in (int, float) and 0 <= value <= 1, "a number from 0 to 1"),
    "target_modules": (
        lambda value: bool(value) and (isinstance(value, str) or _are_names(value)),
        "the names of linear layers",
    ),
    "use_rslora": (lambda value: type(value) is bool, "true or false"),
    "use_dora": (lambda value: type(value) is bool, "true or false"),
    "rank_pattern": (lambda value: isinstance(value, dict), "an object"),
    "alpha_pattern": (lambda value: isinstance(value, dict), "an object"),
}
# Those that plain LoRA on linear layers has, or that change nothing once it is trained; further ones have to be unset.
_LORA_PLAIN = (
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "loftq_config", "lora_alpha", "lora_dropout", "megatron_core", "peft_type", "peft_version", "r",
    "revision", "runtime_config", "target_modules", "task_type",
)  # fmt: skip
_LORA_BEGINNINGS = (True, False, "gaussian", "orthogonal", "eva")  # further ones change the base's weights too
_INTEGRATOR = {"query_projector": "query", "key_projector": "key", "value_projector": "value"}
_CONSTANTS = ("rotary_emb.inv_freq", "position_ids")  # in older files; no weights
_CONV = re.compile(r"conv_(\d+)(\.1)?\.weight")


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


class UnknownFormat(ValueError):
    """What stands there is none of `FORMATS`."""


@dataclass
class Checkpoint:
    """A recognised folder.

    Attributes:
        folder: where it is. format: a key of `FORMATS`. config: its config.json, {} where it has none.
        tensors: our parameter name -> where the tensor is; LoRA's without an adapter's name in it.
        unknown: keys that have no place in our model.
        missing: our names of tensors that the layout needs and no file holds.
        lora: PEFT's adapter_config.json, or None.
        spatial: keywords of `LlavaSPConfig` that the projector's tensors call for.
        language_model, vision_tower: what it records about its origin.
        copies: a file of these tensors -> another one beside it that has to hold the same.
    """

    folder: Path
    format: str
    config: dict[str, Any]
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    unknown: list[StoredTensor] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    lora: dict[str, Any] | None = None
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
        """PEFT's settings, where the checkpoint has LoRA."""
        return self.folder / (LORA_FOLDER if self.format == "llava_sp_adapter" else "") / "adapter_config.json"

    @property
    def holds_language_model(self) -> bool:
        return self.format in ("llava_sp", "original_full", "llava_hf")


def recognise(path: str | os.PathLike) -> Checkpoint:
    """What stands at `path`, a folder or the file of a first stage's projector.

    Raises:
        FileNotFoundError: nothing stands there.
        UnknownFormat: it is none of `FORMATS`; the message says what was found.
        ValueError: a file in it is broken, missing, or contradicts the others.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no folder {path}")
    folder = path if path.is_dir() else path.parent
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if path.is_file():
        return _original_projector(folder, path, config)
    if (folder / ADAPTER_FILE).is_file():
        return _adapter(folder, config)
    if config.get("model_type") == "llava_sp" and not _find(folder, _NON_LORA_FILES):
        return _full(folder, config, "llava_sp")
    if _find(folder, _LORA_FILES) or _find(folder, _NON_LORA_FILES):
        return _original_lora(folder, config)
    if _has_weights(folder):
        return _full_of_others(folder, config)
    projector = _find(folder, _PROJECTOR_FILES)
    if projector is not None:
        return _original_projector(folder, projector, config)
    found = ", ".join(sorted(file.name for file in folder.iterdir())[:12]) or "nothing"
    raise UnknownFormat(
        f"{folder} is no checkpoint that can be opened. It holds: {found}. Expected one of: model.safetensors or "
        f"pytorch_model.bin (or shards with an index), {ADAPTER_FILE}, adapter_model.safetensors or .bin with "
        f"non_lora_trainables.bin, {' or '.join(_PROJECTOR_FILES)}"
    )


def _find(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _has_weights(folder: Path) -> bool:
    return shard_index(folder) is not None or _find(folder, WEIGHT_FILES) is not None


# ---- our own


def _full(folder: Path, config: dict, kind: str) -> Checkpoint:
    check_generation_config(folder)
    found = Checkpoint(folder, kind, config)
    for tensor in all_stored(folder):
        _enter(found, tower_name(tensor.key), tensor)
    found.spatial = {key: value for key, value in config.items() if key.startswith(("spatial_", "fusion_"))}
    file = folder / "config.json"
    found.language_model = _recorded(config, "language_model_name_or_path", file)
    found.vision_tower = _recorded(config, "vision_tower_name_or_path", file)
    return found


def check_generation_config(folder: Path) -> None:
    """Raises `ValueError` for a file that transformers stumbles over when it opens a full checkpoint."""
    if (folder / "generation_config.json").is_file():
        read_json(folder / "generation_config.json")


def our_config(folder: Path) -> LlavaSPConfig:
    """config.json of a checkpoint of ours. Raises `ValueError` where a value in it cannot be."""
    with told_as_value_error(folder):
        return LlavaSPConfig.from_pretrained(folder)


def _adapter(folder: Path, config: dict) -> Checkpoint:
    found = Checkpoint(folder, "llava_sp_adapter", config)
    for tensor in stored_tensors(folder / ADAPTER_FILE):
        found.tensors[PROJECTOR + tensor.key] = tensor
    lora = folder / LORA_FOLDER
    if lora.is_dir():
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            if not (lora / name).is_file():
                raise ValueError(f"{lora / name} is not there: the copy is not complete")
        found.lora = read_json(found.lora_file)
        for tensor in stored_tensors(lora / "adapter_model.safetensors"):
            found.tensors[tensor.key.removeprefix("base_model.model.")] = tensor
    found.spatial = {key: value for key, value in config.items() if key.startswith(("spatial_", "fusion_"))}
    file = folder / "config.json"
    found.language_model = _recorded(config, "language_model_name_or_path", file)
    found.vision_tower = _recorded(config, "vision_tower_name_or_path", file)
    return found


# ---- the original code's


def bare(key: str) -> str:
    """An original key without the wrappers it was saved through: `base_model.model.model.conv_4.weight` -> `conv_4.weight`."""
    while (wrapper := re.match(r"(base_model|model|module)\.", key)) is not None:
        key = key[wrapper.end() :]
    return key


def our_projector_name(key: str) -> str | None:
    """A bare original key -> the name within our projector; None if it is no projector's."""
    if (conv := _CONV.fullmatch(key)) is not None:
        return f"spatial.extractor.projections.{conv.group(1)}.weight"
    stem, _, rest = key.partition(".")
    if stem in _INTEGRATOR:
        return f"spatial.integrator.{_INTEGRATOR[stem]}.{rest}"
    if stem == "mm_projector":
        return {"0": "linear_1.", "2": "linear_2."}.get(rest.partition(".")[0], "?") + rest.partition(".")[2]
    whole = {"conv_CM.weight": "spatial.integrator.context.weight"}
    whole |= {f"conv_linear.1.{leaf}": f"spatial.linear.{leaf}" for leaf in ("weight", "bias")}
    return whole.get(key)


def original_projector_name(name: str, variant: str, grid: int) -> str:
    """The inverse of `our_projector_name`; the variant decides where a convolution stands in its sequence."""
    parts = name.split(".")
    if parts[0] in ("linear_1", "linear_2"):
        return f"mm_projector.{'0' if parts[0] == 'linear_1' else '2'}.{parts[1]}"
    if parts[1] == "linear":
        return f"conv_linear.1.{parts[2]}"
    if parts[1] == "extractor":
        scale = parts[3]
        return f"conv_{scale}.1.weight" if variant == "pooling" and int(scale) != grid else f"conv_{scale}.weight"
    if parts[2] == "context":
        return "conv_CM.weight"
    theirs = {ours: name for name, ours in _INTEGRATOR.items()}
    return f"{theirs[parts[2]]}.{'.'.join(parts[3:])}"


def tower_name(name: str) -> str:
    """A parameter's name as `Checkpoint.tensors` has it: transformers before 5.20 has one level more in the tower."""
    return name.replace("vision_tower.vision_model.", "vision_tower.")


def _our_name(key: str) -> str | None:
    """An original key, wrapped or bare -> the name in our model; None if it has no place there."""
    key = bare(key)
    projector = our_projector_name(key)
    if projector is not None:
        return None if "?" in projector else PROJECTOR + projector
    if key.startswith(("layers.", "embed_tokens.", "norm.")):
        return LANGUAGE + key
    if key.startswith("vision_tower."):
        return TOWER + key.removeprefix("vision_tower.").removeprefix("vision_tower.").removeprefix("vision_model.")
    return key if key.startswith(HEAD) else None


def _place(found: Checkpoint, tensors: list[StoredTensor]) -> None:
    """Enter an original's tensors under our names. Raises `ValueError` where two claim one place."""
    for tensor in tensors:
        name = _our_name(tensor.key)
        if name is None:
            if not tensor.key.endswith(_CONSTANTS):
                found.unknown.append(tensor)
        elif not name.endswith(_CONSTANTS):
            _enter(found, name, tensor)
    found.spatial, found.missing = spatial_layout(found.part(PROJECTOR))


def _enter(found: Checkpoint, name: str, tensor: StoredTensor) -> None:
    other = found.tensors.setdefault(name, tensor)
    if other is not tensor:
        raise ValueError(
            f"{tensor.key} in {tensor.file} and {other.key} in {other.file} are the same part of the model: "
            "two checkpoints, perhaps of two variants, were mixed"
        )


def _original(folder: Path, config: dict, kind: str) -> Checkpoint:
    """The settings that the original code records, for all of its formats."""
    found = Checkpoint(folder, kind, config)
    file = folder / "config.json"
    found.language_model = _recorded(config, "_name_or_path", file)
    found.vision_tower = _recorded(config, "mm_vision_tower", file) or _recorded(config, "vision_tower", file)
    _check_understood(found, _UNDERSTOOD)
    return found


def _check_understood(found: Checkpoint, understood: dict[str, tuple]) -> None:
    """Raises `ValueError` for a setting that would change the model and is not understood."""
    for key, allowed in understood.items():
        value = found.config.get(key, allowed[0])
        if value not in allowed:
            raise ValueError(
                f"{found.folder}: {key} is {value!r} in its config.json; only {allowed[0]!r} can be opened"
            )


def _recorded(settings: dict[str, Any], key: str, file: Path) -> str | None:
    """A hub id or a folder; None for nothing. Raises `ValueError` for anything else, such as a list of several towers."""
    value = settings.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{file}: {key} is {value!r}; expected the hub id or folder of one model")
    return value or None


def _original_lora(folder: Path, config: dict) -> Checkpoint:
    found = _original(folder, config, "original_lora")
    tensors = []
    for names in (_LORA_FILES, _NON_LORA_FILES):
        files = [folder / name for name in names if (folder / name).is_file()]
        if not files:
            raise ValueError(
                f"{folder} looks like a LoRA folder of the original code, but {' or '.join(names)} is missing"
            )
        held = stored_tensors(files[0])
        if not held:
            raise ValueError(f"{files[0]} holds no tensors: it was saved empty")
        tensors += held
        if len(files) > 1:
            _check_copy(held, stored_tensors(files[1]), *files)
            found.copies[files[0]] = files[1]
    if not found.lora_file.is_file():
        raise ValueError(f"{folder} has {tensors[0].file.name}, but no adapter_config.json to say what it is")
    found.lora = read_json(found.lora_file)
    found.language_model = _recorded(found.lora, "base_model_name_or_path", found.lora_file) or found.language_model
    _place(found, tensors)
    return found


def _check_copy(held: list[StoredTensor], copied: list[StoredTensor], file: Path, copy: Path) -> None:
    """Raises `ValueError` where two files that are there for the same thing do not look alike."""
    looks = [{tensor.key: (tensor.shape, tensor.dtype) for tensor in tensors} for tensors in (held, copied)]
    differing = [key for key in {**looks[0], **looks[1]} if looks[0].get(key) != looks[1].get(key)]
    if differing:
        raise_contradiction(file, copy, differing[0])


def raise_contradiction(file: Path, copy: Path, key: str) -> NoReturn:
    raise ValueError(
        f"{file} and {copy} are both there and are not the same: {key} differs. Remove the one that is not meant"
    )


def _original_projector(folder: Path, file: Path, config: dict) -> Checkpoint:
    found = _original(folder, config, "original_projector")
    _place(found, stored_tensors(file))
    if not found.part(PROJECTOR):
        keys = ", ".join(tensor.key for tensor in (*found.tensors.values(), *found.unknown)) or "nothing"
        raise UnknownFormat(f"{file} holds no projector but {keys[:200]}")
    return found


def _full_of_others(folder: Path, config: dict) -> Checkpoint:
    """A full model of the original code or of transformers, told apart by the names of its tensors."""
    tensors = all_stored(folder)
    if any("multi_modal_projector." in tensor.key for tensor in tensors):
        return _llava_hf(folder, config, tensors)
    found = _original(folder, config, "original_full")
    found.language_model = str(folder)
    beside = _find(folder, _PROJECTOR_FILES)
    within = any(our_projector_name(bare(tensor.key)) for tensor in tensors)
    if not within and beside is None:
        raise UnknownFormat(
            f"{folder} ({config.get('model_type', 'no model_type')}) holds a model without a projector: it is a backbone. "
            "LlavaSPForCausalLM.from_backbones(language_model=..., vision_tower=...) makes a model of it"
        )
    _place(found, tensors if within else [*tensors, *stored_tensors(beside)])
    if within and beside is not None:
        _check_beside(found, beside)
    return found


def _check_beside(found: Checkpoint, beside: Path) -> None:
    """LLaVA-1.5 is published with its projector twice, within and beside; raises `ValueError` where they are not alike."""
    for tensor in stored_tensors(beside):
        name = _our_name(tensor.key)
        own = found.tensors.get(name)
        if name is not None and (own is None or own.shape != tensor.shape):
            raise ValueError(
                f"{beside} holds {tensor.key} {tensor.shape}, but the model in {found.folder} "
                f"{'has no such tensor' if own is None else f'has it as {own.shape}'}: remove the one that is not meant"
            )


def spatial_layout(projector: dict[str, StoredTensor]) -> tuple[dict[str, Any], list[str]]:
    """`(keywords of LlavaSPConfig, names that this layout needs and that are missing)`, from an original's projector.

    The variant of the original shows in its keys: a pooled convolution stands behind its pooling, at `conv_k.1`.

    Raises:
        ValueError: some convolutions are one variant's, some the other's.
    """
    shapes = {name.removeprefix(PROJECTOR): tensor.shape for name, tensor in projector.items()}
    prefix = "spatial.extractor.projections."
    scales = sorted(int(name.removeprefix(prefix).split(".")[0]) for name in shapes if name.startswith(prefix))
    needed = [f"linear_{i}.{leaf}" for i in (1, 2) for leaf in ("weight", "bias")]
    if not any(name.startswith("spatial.") for name in shapes):
        return {"spatial_variant": "none"}, [PROJECTOR + name for name in needed if name not in shapes]
    pooled = _is_pooled(projector)
    context = shapes.get("spatial.integrator.context.weight")
    fusion = context is not None or any(name.startswith("spatial.integrator.") for name in shapes)
    settings: dict[str, Any] = {
        "spatial_variant": "pooling" if pooled else "cropping",
        "spatial_fusion": fusion,
        "spatial_projection_bias": "spatial.linear.bias" in shapes,
    }
    if scales:
        settings["spatial_width"] = shapes[f"{prefix}{scales[0]}.weight"][0]
    if context is not None:
        settings["fusion_kernel"] = context[2]
    wanted = ORIGINAL_SCALES if set(scales) < set(ORIGINAL_SCALES) else tuple(scales)
    settings["spatial_scales"] = list(wanted)
    needed += [f"{prefix}{scale}.weight" for scale in wanted] + ["spatial.linear.weight"]
    if not pooled:
        needed.append("spatial.linear.bias")
        settings["spatial_projection_bias"] = True
    if fusion:
        needed.append("spatial.integrator.context.weight")
        needed += [
            f"spatial.integrator.{part}.{layer}.{leaf}"
            for part in _INTEGRATOR.values()
            for layer in (0, 1)
            for leaf in ("weight", "bias")
        ]
    return settings, [PROJECTOR + name for name in needed if name not in shapes]


def _is_pooled(projector: dict[str, StoredTensor]) -> bool:
    keys = {bare(tensor.key): tensor for tensor in projector.values()}
    convolutions = {key: match for key in keys if (match := _CONV.fullmatch(key)) is not None}
    pooled = [key for key, match in convolutions.items() if match.group(2)]
    cropped = [
        key for key, match in convolutions.items() if not match.group(2) and match.group(1) != str(ORIGINAL_GRID)
    ]
    if pooled and cropped:
        raise ValueError(
            f"{keys[pooled[0]].file} holds {pooled[0]}, of the pooling variant, and {keys[cropped[0]].file} {cropped[0]}, "
            "of the cropping variant: two checkpoints were mixed"
        )
    return bool(pooled)


# ---- transformers' LLaVA


def _llava_hf(folder: Path, config: dict, tensors: list[StoredTensor]) -> Checkpoint:
    """Both of its namings: `language_model.model.layers` on disk, `model.language_model.layers` in memory."""
    if config.get("model_type") != "llava":
        raise ValueError(
            f"{folder}: model_type is {config.get('model_type')!r} in its config.json; only 'llava' can be opened"
        )
    check_generation_config(folder)
    found = Checkpoint(folder, "llava_hf", config, spatial={"spatial_variant": "none"})
    for tensor in tensors:
        if tensor.key.endswith(_CONSTANTS):
            continue
        key = tensor.key.removeprefix("model.")
        key = key.replace("language_model.lm_head.", HEAD).replace("language_model.model.", "language_model.")
        key = tower_name(key)
        if key.startswith(HEAD):
            _enter(found, key, tensor)
        elif key.startswith(("language_model.", "vision_tower.", "multi_modal_projector.")):
            _enter(found, f"model.{key}", tensor)
        else:
            found.unknown.append(tensor)
    _check_understood(found, _UNDERSTOOD_HF)
    _check_select_strategy(found)
    found.language_model = found.vision_tower = str(folder)
    return found


def _check_select_strategy(found: Checkpoint) -> None:
    """Raises `ValueError` where a class token would stay among the patches, or a patch be left out for one."""
    tower = found.part(TOWER)
    fits = "default" if any(name.endswith("class_embedding") for name in tower) else "full"
    value = found.config.get("vision_feature_select_strategy", "default")
    if tower and value != fits:
        raise ValueError(
            f"{found.folder}: vision_feature_select_strategy is {value!r} in its config.json; with this tower only {fits!r}, "
            "the patches without a class token, can be opened"
        )


def all_stored(folder: Path) -> list[StoredTensor]:
    """The tensors of all of a folder's weight files. Raises `ValueError` for a shard that is missing or lacks a tensor."""
    files = weight_files(folder)
    tensors = [tensor for file in files for tensor in stored_tensors(file)]
    index = shard_index(folder)
    if index is not None:
        lacking = read_index(index).keys() - {tensor.key for tensor in tensors}
        if lacking:
            raise ValueError(f"{index} promises {min(lacking)}, which no shard holds ({len(lacking)} such tensors)")
    return tensors


# ---- what its settings mean


def feature_layer(found: Checkpoint) -> int:
    """The tower's layer that the original reads. Raises `ValueError` where it also keeps the class token."""
    kept = found.config.get("mm_vision_select_feature", "patch")
    if kept != "patch":
        raise ValueError(f"{found.folder}: mm_vision_select_feature is {kept!r}; the patch grid alone can be opened")
    layer = found.config.get("mm_vision_select_layer", -2)
    if type(layer) is not int:
        raise ValueError(
            f"{found.folder / 'config.json'}: mm_vision_select_layer is {layer!r}; expected a whole number"
        )
    return layer


def recorded_dtype(found: Checkpoint) -> str:
    """The name of the type of its weights, or "auto". Raises `ValueError` for a name that is none."""
    key = "torch_dtype" if found.config.get("torch_dtype") else "dtype"
    name = str(found.config.get(key) or "auto").removeprefix("torch.")
    if name != "auto" and not isinstance(getattr(torch, name, None), torch.dtype):
        raise ValueError(
            f"{found.folder / 'config.json'}: {key} is {found.config[key]!r}; expected float16 or the like"
        )
    return name


def lora_config(found: Checkpoint) -> LoraConfig:
    """PEFT's settings of a checkpoint's LoRA; those that the original saved are held to the language model.

    Raises `ValueError`, with file and key, for a kind of adapter that is not plain LoRA on linear layers.
    """
    settings, file = found.lora, found.lora_file
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type is {settings.get('peft_type')!r}; only 'LORA' can be opened")
    _check_lora_values(settings, file)
    targets = settings["target_modules"]
    if found.format == "llava_sp_adapter":
        return LoraConfig.from_pretrained(str(file.parent))
    if isinstance(targets, str) and not targets.startswith(re.escape(LANGUAGE)):
        raise ValueError(
            f"{file}: target_modules is {targets!r}; expected a list of the language model's linear layers"
        )
    for key in beyond_plain_lora(settings):
        if key not in _LORA_VALUES:
            raise ValueError(f"{file}: {key} is {settings[key]!r}; only plain LoRA on linear layers can be opened")
    if not isinstance(targets, str):
        leaves = "|".join(sorted(re.escape(target) for target in targets))
        targets = rf"{re.escape(LANGUAGE)}.*\.({leaves})"
    kept = {key: settings[key] for key in (*_LORA_VALUES, "fan_in_fan_out") if settings.get(key) is not None}
    return LoraConfig(**kept | {"target_modules": targets}, bias="none", task_type="CAUSAL_LM")


def beyond_plain_lora(settings: dict[str, Any]) -> list[str]:
    """The keys of PEFT's settings that make something else of LoRA than plain LoRA on linear layers."""
    usual = LoraConfig().to_dict()
    unset = (None, False, [], {}, "none")
    keys = [key for key, value in settings.items() if key not in _LORA_PLAIN and value not in (*unset, usual.get(key))]
    if settings.get("init_lora_weights", True) not in _LORA_BEGINNINGS:
        keys.append("init_lora_weights")
    return keys


def _check_lora_values(settings: dict[str, Any], file: Path) -> None:
    for key, (fits, expected) in _LORA_VALUES.items():
        value = settings.get(key)
        if value is None and key not in ("r", "lora_alpha", "target_modules"):
            continue
        if not fits(value):
            given = f"is {value!r}" if key in settings else "is not there"
            raise ValueError(f"{file}: {key} {given}; expected {expected}")
