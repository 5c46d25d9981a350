"""A checkpoint's tensors compared with its configuration's, by names and shapes, before it is opened."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from llava_sp.checkpoints.opening.backbones import zero3_set_aside
from llava_sp.checkpoints.opening.fill import without_pooled_norm
from llava_sp.checkpoints.reading.formats import OURS, Checkpoint, contradiction
from llava_sp.checkpoints.reading.names import (
    ADAPTER_NAME,
    HEAD,
    LANGUAGE,
    LORA,
    PEFT,
    PROJECTOR,
    TOWER,
    original_name,
    tower_name,
    unwrapped,
    without_adapter_name,
)
from llava_sp.checkpoints.reading.tensor_files import StoredTensor, read_tensors
from llava_sp.model.backbone_configs import as_value_error
from llava_sp.model.configuration_llava_sp import LlavaSPConfig
from llava_sp.model.modeling_llava_sp import LlavaSPForCausalLM


@dataclass
class Comparison:
    """The differences between a checkpoint's tensors and its configuration's; keys are those of its files."""

    missing: list[dict[str, Any]] = field(default_factory=list)
    unexpected: list[dict[str, Any]] = field(default_factory=list)
    wrong_shape: list[dict[str, Any]] = field(default_factory=list)
    empty: list[dict[str, Any]] = field(default_factory=list)

    def lines(self) -> list[str]:
        return [
            *(f"{one['file']} lacks {one['key']}" for one in self.missing),
            *(f"{one['file']} holds {one['key']} {one['shape']}, which is unexpected" for one in self.unexpected),
            *(f"{one['key']} in {one['file']} is {one['shape']}, not {one['expected']}" for one in self.wrong_shape),
            *(f"{one['key']} in {one['file']} is empty, {one['shape']}" for one in self.empty),
        ]


def check_fits(found: Checkpoint, config: LlavaSPConfig | None) -> None:
    """Raises `ValueError` with every tensor, and its file, that is missing, unexpected or of another shape.

    Weights stored twice, as `.bin` and as safetensors, must agree bit for bit.
    """
    for file, copy in found.copies.items():
        held, copied = read_tensors(file), read_tensors(copy)
        differing = next((key for key, tensor in held.items() if not torch.equal(tensor, copied[key])), None)
        if differing is not None:
            raise contradiction(file, copy, differing)
    result = compare(found, config)
    lines = result.lines()
    if lines:
        more = [f"and {len(lines) - 8} more"] if len(lines) > 8 else []
        lines = [*lines[:8], *more, *hints(found.format, result)]
        raise ValueError(f"{found.folder} does not match its configuration:\n  " + "\n  ".join(lines))


def hints(kind: str | None, result: Comparison) -> list[str]:
    if kind == "original_projector" and result.missing:
        return ["an intermediate checkpoint of the original's first stage is incomplete; its model.bin has all tensors"]
    return []


def compare(found: Checkpoint, config: LlavaSPConfig | None) -> Comparison:
    """Names and shapes against those of `config`'s model; with None, only the projector's layout is checked.

    Raises:
        ValueError: no such model can be built.
    """
    needed, known = ({}, set(found.tensors)) if config is None else _wanted(found, config)
    result = Comparison(unexpected=[_entry(found, tensor) for tensor in found.unknown])
    for name in dict.fromkeys((*found.missing, *needed)):
        if name not in found.tensors:
            result.missing.append({"key": _their_key(found, name), "file": _their_file(found, name)})
    for name, tensor in found.tensors.items():
        if tensor.numel == 0:
            result.empty.append(_entry(found, tensor))
        elif name not in known:
            result.unexpected.append(_entry(found, tensor))
        elif name in needed and tensor.shape != needed[name]:
            result.wrong_shape.append(_entry(found, tensor) | {"expected": needed[name]})
    return result


def _wanted(found: Checkpoint, config: LlavaSPConfig) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """`(name -> shape of what the checkpoint must hold, names that it may hold)`, under our names."""
    text_is_known = config.text_config.num_hidden_layers > 0
    with zero3_set_aside(), torch.device("meta"), as_value_error(found.folder):
        model = LlavaSPForCausalLM(config)
        if found.lora is not None and text_is_known:
            model.add_adapter(found.lora_config(), adapter_name=ADAPTER_NAME)
    brought = [PROJECTOR]
    any_shape: list[str] = []
    if found.lora is not None:
        (brought if text_is_known else any_shape).append(LORA)
    if found.holds_language_model:
        brought += [LANGUAGE, HEAD]
    if found.holds_vision_tower:
        brought.append(TOWER)
    elif found.part(TOWER):  # an original's trained tower; only its own folder has its shapes
        (brought if getattr(config.vision_config, "num_hidden_layers", 1) else any_shape).append(TOWER)
    shapes = {_plain(name): tuple(parameter.shape) for name, parameter in model.named_parameters()}
    needed = {name: shape for name, shape in shapes.items() if _part(name).startswith(tuple(brought))}
    if found.format == "original_full" or (found.is_original and found.part(TOWER)):
        needed = without_pooled_norm(needed, found.tensors)
    known = {name for name in map(_plain, model.state_dict()) if _part(name).startswith(tuple(brought))}
    return needed, known | {name for name in found.tensors if _part(name).startswith(tuple(any_shape))}


def _part(name: str) -> str:
    """LoRA is a part of its own, wherever in the model it is."""
    return LORA if LORA in name else name


def _plain(name: str) -> str:
    """A parameter's name in the model -> as `Checkpoint.tensors` has it, for every version of transformers and without PEFT."""
    name = tower_name(name).replace(".base_layer.", ".")
    return without_adapter_name(name) if LORA in name else name


def _entry(found: Checkpoint, tensor: StoredTensor) -> dict[str, Any]:
    return {"key": tensor.key, "shape": tensor.shape, "file": str(tensor.file.relative_to(found.folder))}


def _their_key(found: Checkpoint, name: str) -> str:
    """Our name -> the key under which the checkpoint's own files would hold it."""
    if LORA in name:
        return PEFT + (name if found.format in OURS else original_name(name, ""))
    if found.format == "llava_sp_adapter":
        return name.removeprefix(PROJECTOR)
    if not found.is_original:
        return name
    key = original_name(name, found.spatial.get("spatial_variant", "none"))
    held = [tensor.key for tensor in found.part(PROJECTOR).values()]
    wrapper = held[0].removesuffix(unwrapped(held[0])) if held and name.startswith(PROJECTOR) else "model."
    return wrapper + unwrapped(key) if key.startswith("model.") else key


def _their_file(found: Checkpoint, name: str) -> str:
    """The file with its sibling tensors; the folder if there are several such files."""
    part = found.part("", lora=True) if LORA in name else found.part(PROJECTOR if name.startswith(PROJECTOR) else "")
    files = {tensor.file for tensor in part.values()}
    return str(files.pop().relative_to(found.folder)) if len(files) == 1 else str(found.folder)
