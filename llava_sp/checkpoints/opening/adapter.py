"""Adapter checkpoints: LoRA and projector, without base weights or embeddings, in a folder that says what it is.

    config.json                 LlavaSPConfig, with the base models and the fingerprints of their weights
    projector.safetensors       patch MLP and spatial branch; its presence makes the folder an adapter checkpoint
    lora/adapter_config.json    PEFT's own format; absent after the first stage
    lora/adapter_model.safetensors
    generation_config.json and the processor's files
    llava_sp.json               format, contents, sizes and hashes; written last, so a save that was cut off has none

Every file is written beside its place and renamed, so no file is ever half there.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llava_sp.checkpoints.opening.backbones import from_backbones, weights_fingerprint
from llava_sp.checkpoints.opening.fill import copy_strictly, freeze, gathered, parameter_names, without_adapter_name
from llava_sp.checkpoints.reading.formats import (
    ADAPTER_NAME,
    LORA,
    LORA_FOLDER,
    PROJECTOR,
    UnknownFormat,
    lora_config,
    our_config,
    recognise,
)
from llava_sp.checkpoints.reading.places import base_kwargs, fetch, find_base, from_hub
from llava_sp.checkpoints.reading.tensor_files import read_checked, read_json, tensor_lines
from llava_sp.common.files import replacing, sha256
from llava_sp.model.configuration_llava_sp import LlavaSPConfig
from llava_sp.model.modeling_llava_sp import ADAPTER_FILE

MANIFEST = "llava_sp.json"
FORMAT = 1
_PEFT = "base_model.model."  # PEFT's files name parameters as seen from its wrapper

# What must agree for one model's projector to fit into another.
_SHAPE_FIELDS = (
    "spatial_variant",
    "spatial_scales",
    "spatial_width",
    "spatial_fusion",
    "spatial_projection_bias",
    "fusion_kernel",
    "fusion_stride",
    "vision_width",
    "grid_size",
)


def trainable_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """LoRA and projector as whole tensors on the CPU, under the model's own parameter names.

    Under ZeRO-3 every process must call this; each parameter is gathered in turn.
    """
    state = {}
    for name, parameter in model.named_parameters():
        if name.startswith(PROJECTOR) or LORA in name:
            with gathered([parameter]):
                state[name] = parameter.detach().cpu().clone().contiguous()
    return state


def save_adapter(
    model,
    processor,
    path: str | os.PathLike,
    *,
    run: dict | None = None,
    state_dict: dict[str, Tensor] | None = None,
    write: bool = True,
) -> None:
    """Write LoRA and projector, their configuration and (if given) the processor to `path`.

    Args:
        run: what the manifest keeps about the run that made the weights (stage, step, ...).
        state_dict: as from `trainable_state_dict`; by default taken from the model now.
        write: false on processes that only help gathering (all but the main one).

    Raises:
        ValueError: a tensor is empty or not finite; nothing is written then.
        OSError: the disk is full or `path` cannot be written; what stood there before is not a checkpoint any more
            only if its files had been replaced already, and then has no manifest.
    """
    state = trainable_state_dict(model) if state_dict is None else state_dict
    if not write:
        return
    _check_tensors(state)
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    (path / MANIFEST).unlink(missing_ok=True)

    projector = {name.removeprefix(PROJECTOR): t for name, t in state.items() if name.startswith(PROJECTOR)}
    lora = {_PEFT + without_adapter_name(name): tensor for name, tensor in state.items() if LORA in name}
    with replacing(path / ADAPTER_FILE) as file:
        save_file(projector, file, metadata={"format": "pt"})
    if lora:
        _write_lora(model, lora, path / LORA_FOLDER)
    _save_config(model, path)
    if processor is not None:
        processor.save_pretrained(path)

    manifest = {
        "format": FORMAT,
        "contents": {"projector": len(projector), "lora": len(lora)},
        "parameters": {"projector": _count(projector), "lora": _count(lora)},
        "language_model": [model.config.language_model_name_or_path, model.config.language_model_fingerprint],
        "vision_tower": [model.config.vision_tower_name_or_path, model.config.vision_tower_fingerprint],
        "files": {
            str(file.relative_to(path)): {"bytes": file.stat().st_size, "sha256": sha256(file)}
            for file in _tensor_files(path)
        },
        "run": run or {},
    }
    with replacing(path / MANIFEST) as file:
        file.write_text(json.dumps(manifest, indent=2) + "\n")


def is_adapter(path: str | os.PathLike, **hub_kwargs) -> bool:
    """Whether `path` (a folder or a hub id) is an adapter checkpoint."""
    if Path(path).exists():
        return (Path(path) / ADAPTER_FILE).is_file()
    return from_hub(path, MANIFEST, **hub_kwargs) is not None


def describe(path: str | os.PathLike) -> dict:
    """The manifest of an adapter checkpoint, after a check that the save was not cut off.

    Raises:
        ValueError: no manifest, or a tensor file is not there or not as long as the manifest says.
    """
    manifest = Path(path) / MANIFEST
    if not manifest.is_file():
        raise ValueError(
            f"{path} has no {MANIFEST}: it is not an adapter checkpoint, or saving it was cut off. Use an earlier one "
            "(checkpoint-* beside it), or run the same training command again."
        )
    described = read_json(manifest)
    _check_manifest(described, manifest)
    for name, expected in described["files"].items():
        file = Path(path) / name
        found = file.stat().st_size if file.is_file() else None
        if found != expected["bytes"]:
            raise ValueError(
                f"{file} is {found} bytes long, but {MANIFEST} says {expected['bytes']}: the copy is cut off"
            )
    return described


def _check_manifest(described: dict, file: Path) -> None:
    """Raises `ValueError` where what is read from a manifest is not there, or is of another kind."""
    files = described.get("files")
    if not isinstance(files, dict) or not files:
        raise ValueError(
            f"{file} is no manifest of an adapter checkpoint: files is {files!r}; expected names and sizes"
        )
    for name, about in files.items():
        kinds = {"bytes": int, "sha256": str}
        if not isinstance(about, dict) or any(type(about.get(key)) is not kind for key, kind in kinds.items()):
            raise ValueError(f"{file}: files has {about!r} under {name!r}; expected its bytes and sha256")
    for key in ("language_model", "vision_tower"):
        if not isinstance(described.get(key), list) or len(described[key]) != 2:
            raise ValueError(f"{file}: {key} is {described.get(key)!r}; expected a place and a fingerprint")


def checkpoint_hash(path: str | os.PathLike) -> str:
    """16 hex digits that stand for the weights in a checkpoint folder of any format, for provenance."""
    path = Path(path)
    if is_adapter(path):
        described = describe(path)
        parts = [file["sha256"] for _, file in sorted(described["files"].items())]
        parts += [str(described["language_model"][1]), str(described["vision_tower"][1])]
        return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]
    try:
        files = recognise(path).files
    except UnknownFormat:  # a backbone
        return weights_fingerprint(path)
    lines = sorted(line for file in files for line in tensor_lines(file))
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def open_adapter(
    cls,
    path: str | os.PathLike,
    *,
    config: LlavaSPConfig | None = None,
    language_model: str | os.PathLike | None = None,
    vision_tower: str | os.PathLike | None = None,
    check_base: bool = True,
    dtype: torch.dtype | str = "auto",
    **load_kwargs,
):
    """Open an adapter checkpoint on its base models; `LlavaSPForCausalLM.from_pretrained` calls this.

    Args:
        language_model, vision_tower: in place of the recorded ones, for instance on another machine.
        check_base: compare the base weights' fingerprints with the recorded ones.

    Raises:
        ValueError: the save was cut off, a base model is not where the checkpoint says, its weights are not those
            that the adapter was trained on, or tensors do not fit. The message says what would be right.
    """
    path = fetch(path, **load_kwargs)
    load_kwargs = base_kwargs(load_kwargs)
    describe(path)
    read_json(path / "config.json")  # what is wrong with the file itself, said with its name
    config = our_config(path) if config is None else config
    found = recognise(path)
    lora = None if found.lora is None else lora_config(found)
    recorded = (config.language_model_fingerprint, config.vision_tower_fingerprint)
    language = find_base(
        path, language_model, config.language_model_name_or_path, "language_model", "language model", **load_kwargs
    )
    tower = find_base(
        path, vision_tower, config.vision_tower_name_or_path, "vision_tower", "vision tower", **load_kwargs
    )
    if dtype == "auto" and config.dtype is not None:
        dtype = config.dtype
    model = from_backbones(cls, language, tower, config=config, dtype=dtype, **load_kwargs)
    if check_base:
        check_bases(path, recorded, config)
    if lora is not None:
        model.add_adapter(lora, adapter_name=ADAPTER_NAME)
    load_adapter(model, path)
    return freeze(model)


def load_adapter(model: nn.Module, path: str | os.PathLike) -> None:
    """Load LoRA and projector of a checkpoint into a model that has the same parts.

    Raises:
        ValueError: a tensor is missing, left over or of another shape; nothing is loaded then.
    """
    path = Path(path)
    describe(path)
    tensors = parameter_names(read_checked(recognise(path).tensors, zeros_allowed=True))
    own = {n: p for n, p in model.named_parameters() if n.startswith(PROJECTOR) or LORA in n}
    copy_strictly(own, tensors, f"the checkpoint {path}", config_differences(path, model.config))


def load_projector(model: nn.Module, path: str | os.PathLike) -> None:
    """Load a first stage's whole projector (patch MLP and spatial branch) into a model.

    Raises:
        ValueError: the projector is of another variant, width or grid (the message lists the differing settings and
            tensors), or the save was cut off.
    """
    path = Path(path)
    describe(path)
    tensors = read_checked(recognise(path).part(PROJECTOR), zeros_allowed=True)
    own = {name: parameter for name, parameter in model.named_parameters() if name.startswith(PROJECTOR)}
    copy_strictly(own, tensors, f"the projector in {path}", config_differences(path, model.config))


def config_differences(path: Path, config: LlavaSPConfig) -> list[str]:
    """What a projector saved at `path` was made for and a model of `config` is not, in words."""
    saved = LlavaSPConfig.from_pretrained(path)
    return [
        f"{field} is {getattr(saved, field)!r} there and {getattr(config, field)!r} here"
        for field in _SHAPE_FIELDS
        if getattr(saved, field) != getattr(config, field)
    ]


def check_bases(
    path: Path,
    recorded: tuple[str | None, str | None],
    config: LlavaSPConfig,
    keywords: tuple[str, str] = ("language_model", "vision_tower"),
) -> None:
    """Raises `ValueError` where the fingerprints that a checkpoint records are not those of the bases in `config`.

    `keywords`: under which the caller was given the bases.
    """
    found = (config.language_model_fingerprint, config.vision_tower_fingerprint)
    places = (config.language_model_name_or_path, config.vision_tower_name_or_path)
    for what, place, was, now, keyword in zip(("language model", "vision tower"), places, recorded, found, keywords):
        if was is not None and was != now:
            raise ValueError(
                f"{path} was trained on a {what} with the fingerprint {was}, but {place} has {now}: these are other "
                f"weights. Pass {keyword}=<the right one>, or check_base=False to go on with these."
            )


def _save_config(model, path: Path) -> None:
    with replacing(path / "config.json") as file:
        model.config.architectures = [type(model).__name__]
        file.write_text(model.config.to_json_string())
    with replacing(path / "generation_config.json") as file:
        model.generation_config.to_json_file(file)


def _write_lora(model, lora: dict[str, Tensor], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    with replacing(folder / "adapter_model.safetensors") as file:
        save_file(lora, file, metadata={"format": "pt"})
    settings = model.peft_config[ADAPTER_NAME].to_dict()
    settings["base_model_name_or_path"] = model.config.language_model_name_or_path
    settings["inference_mode"] = True
    with replacing(folder / "adapter_config.json") as file:
        file.write_text(json.dumps(settings, indent=2, default=_json_default, sort_keys=True))


def _json_default(value):
    if isinstance(value, set):
        return sorted(value)
    return str(value)


def _check_tensors(state: dict[str, Tensor]) -> None:
    if not state:
        raise ValueError("the model has neither a projector nor LoRA: there is nothing to save")
    empty = [name for name, tensor in state.items() if tensor.numel() == 0]
    wild = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if empty:
        raise ValueError(f"{len(empty)} tensors are empty (not gathered under ZeRO-3?), such as {empty[0]}: not saved")
    if wild:
        raise ValueError(f"{len(wild)} tensors hold NaN or infinity, such as {wild[0]}: not saved")


def _tensor_files(path: Path) -> list[Path]:
    return [file for file in (path / ADAPTER_FILE, path / LORA_FOLDER / "adapter_model.safetensors") if file.is_file()]


def _count(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())
