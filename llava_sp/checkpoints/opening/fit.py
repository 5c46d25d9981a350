"""What a checkpoint holds against what its configuration asks for, by names and shapes, before it is opened."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from llava_sp.checkpoints.opening.backbones import zero3_set_aside
from llava_sp.checkpoints.opening.fill import without_adapter_name, without_pooled_norm
from llava_sp.checkpoints.reading.formats import (
    ADAPTER_NAME,
    HEAD,
    LANGUAGE,
    LORA,
    ORIGINAL_GRID,
    PROJECTOR,
    TOWER,
    Checkpoint,
    bare,
    lora_config,
    original_projector_name,
    tower_name,
)
from llava_sp.checkpoints.reading.tensor_files import StoredTensor
from llava_sp.model.backbone_configs import told_as_value_error
from llava_sp.model.configuration_llava_sp import LlavaSPConfig
from llava_sp.model.modeling_llava_sp import LlavaSPForCausalLM

OURS = ("llava_sp", "llava_sp_adapter")


@dataclass
class Comparison:
    """What a checkpoint holds against what its configuration asks for; keys are those of its files."""

    missing: list[dict[str, Any]] = field(default_factory=list)
    unexpected: list[dict[str, Any]] = field(default_factory=list)
    wrong_shape: list[dict[str, Any]] = field(default_factory=list)
    empty: list[dict[str, Any]] = field(default_factory=list)

    def lines(self) -> list[str]:
        return [
            *(f"{one['file']} lacks {one['key']}" for one in self.missing),
            *(f"{one['file']} holds {one['key']} {one['shape']}, which has no place" for one in self.unexpected),
            *(f"{one['key']} in {one['file']} is {one['shape']}, not {one['expected']}" for one in self.wrong_shape),
            *(f"{one['key']} in {one['file']} is empty, {one['shape']}" for one in self.empty),
        ]


def compare(found: Checkpoint, config: LlavaSPConfig | None) -> Comparison:
    """Names and shapes against those of `config`'s model; None leaves the layout of the projector to go by.

    Raises:
        ValueError: no such model can be made.
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
    """`(name -> shape of what the checkpoint has to bring, names that it may bring)`, under our names."""
    text_is_known = config.text_config.num_hidden_layers > 0
    with zero3_set_aside(), torch.device("meta"), told_as_value_error(found.folder):
        model = LlavaSPForCausalLM(config)
        if found.lora is not None and text_is_known:
            model.add_adapter(lora_config(found), adapter_name=ADAPTER_NAME)
    brought, untold = [PROJECTOR], []
    if found.lora is not None:
        (brought if text_is_known else untold).append(LORA)
    if found.holds_language_model:
        brought += [LANGUAGE, HEAD]
    if found.format in ("llava_sp", "llava_hf"):
        brought.append(TOWER)
    elif found.part(TOWER):  # of the original, a tower that was trained; its shapes stand in its own folder only
        (brought if getattr(config.vision_config, "num_hidden_layers", 1) else untold).append(TOWER)
    shapes = {_plain(name): tuple(parameter.shape) for name, parameter in model.named_parameters()}
    needed = {name: shape for name, shape in shapes.items() if _part(name).startswith(tuple(brought))}
    if found.format == "original_full":
        needed = without_pooled_norm(needed, found.tensors)
    known = {name for name in map(_plain, model.state_dict()) if _part(name).startswith(tuple(brought))}
    return needed, known | {name for name in found.tensors if _part(name).startswith(tuple(untold))}


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
        wrapped = name if found.format in OURS else name.replace(LANGUAGE, "model.")
        return f"base_model.model.{wrapped}"
    if found.format == "llava_sp_adapter":
        return name.removeprefix(PROJECTOR)
    if not found.format.startswith("original"):
        return name
    if name.startswith(PROJECTOR):
        held = [tensor.key for tensor in found.part(PROJECTOR).values()]
        wrapper = held[0].removesuffix(bare(held[0])) if held else "model."
        variant = found.spatial.get("spatial_variant", "none")
        return wrapper + original_projector_name(name.removeprefix(PROJECTOR), variant, ORIGINAL_GRID)
    return name.replace(TOWER, "model.vision_tower.vision_tower.vision_model.").replace(LANGUAGE, "model.")


def _their_file(found: Checkpoint, name: str) -> str:
    """The file that holds its like; the folder, where several do."""
    part = found.part("", lora=True) if LORA in name else found.part(PROJECTOR if name.startswith(PROJECTOR) else "")
    files = {tensor.file for tensor in part.values()}
    return str(files.pop().relative_to(found.folder)) if len(files) == 1 else str(found.folder)


def check_fits(found: Checkpoint, config: LlavaSPConfig) -> None:
    """Raises `ValueError` with every tensor, and its file, that a full checkpoint lacks, has too many, or in another shape."""
    lines = compare(found, config).lines()
    if lines:
        more = f"\n  and {len(lines) - 8} more" if len(lines) > 8 else ""
        raise ValueError(f"{found.folder} is not the model that it describes:\n  " + "\n  ".join(lines[:8]) + more)
