"""Copying a checkpoint's tensors into a model, with names, shapes and values checked, also under ZeRO-3."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llava_sp.checkpoints.reading.formats import Checkpoint
from llava_sp.checkpoints.reading.names import LORA, PROJECTOR, TOWER, tower_name, with_adapter_name
from llava_sp.checkpoints.reading.tensor_files import StoredTensor, check_values, read_checked

T = TypeVar("T")
_POOLED_NORM = f"{TOWER}post_layernorm"


def gathered(parameters: list[nn.Parameter], modify: bool = False):
    """A context in which parameters split by ZeRO-3 are gathered; else a null context."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if modify else None)


def without_pooled_norm(needed: Mapping[str, T], held: Iterable[str]) -> dict[str, T]:
    """`needed` without a tower norm that is not held: the original omits it, as only CLIP's pooled output uses it."""
    held = set(held)
    return {name: value for name, value in needed.items() if name in held or not name.startswith(_POOLED_NORM)}


def fill(
    model: nn.Module, found: Checkpoint, parts: tuple[str, ...] = (PROJECTOR, LORA), differences: Iterable[str] = ()
) -> None:
    """Copy these parts of a checkpoint into the model; by default projector, LoRA and an original's tower.

    Raises `ValueError`, with nothing changed, if they do not fit or cannot be trained weights; see `copy_strictly`.
    """
    if found.is_original and found.part(TOWER):
        parts = (*parts, TOWER)
    ours = found.format == "llava_sp_adapter"  # where a matrix of zeros may be intended
    stored = {name: tensor for name, tensor in found.tensors.items() if _within(name, parts)}
    tensors = {with_adapter_name(name): tensor for name, tensor in read_checked(stored, zeros_allowed=ours).items()}
    own = {tower_name(name): p for name, p in model.named_parameters() if _within(tower_name(name), parts)}
    copy_strictly(without_pooled_norm(own, tensors), tensors, f"the checkpoint {found.folder}", differences)


def _within(name: str, parts: tuple[str, ...]) -> bool:
    """LoRA is a separate part, wherever in the model it is."""
    return LORA in parts if LORA in name else name.startswith(parts)


@torch.no_grad()
def copy_strictly(
    own: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], what: str, differences: Iterable[str] = ()
) -> None:
    """Copy `tensors` into the parameters `own` of the same names.

    Raises `ValueError`, with nothing copied, where names or shapes are not the same, or there are `differences`, which the
    message lists first; `what` is its subject.
    """
    shapes = {name: tuple(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in own.items()}
    problems = [*differences]
    problems += [f"lacks {name}" for name in own if name not in tensors]
    problems += [f"has {name}, which the model does not have" for name in tensors if name not in own]
    problems += [
        f"{name} is {tuple(tensor.shape)}, the model's is {shapes[name]}"
        for name, tensor in tensors.items()
        if name in own and tuple(tensor.shape) != shapes[name]
    ]
    if problems:
        more = [f"and {len(problems) - 12} more"] if len(problems) > 12 else []
        raise ValueError(f"{what} does not fit this model:\n  " + "\n  ".join(problems[:12] + more))
    for name, parameter in own.items():
        with gathered([parameter], modify=True):
            if parameter.numel():
                parameter.copy_(tensors[name])


def freeze(model: PreTrainedModel, is_trainable: bool = False) -> PreTrainedModel:
    """Freeze an opened model: nothing trains, LoRA has the model's dtype, dropout is off.

    With `is_trainable`, LoRA and projector train, in float32; call it before they are filled.
    """
    dtype = model.dtype
    for name, parameter in model.named_parameters():
        trains = is_trainable and _within(tower_name(name), (PROJECTOR, LORA))
        parameter.requires_grad_(trains)
        if trains or LORA in name:
            parameter.data = parameter.data.to(torch.float32 if trains else dtype)
    return model.eval()


def check_model(model: nn.Module, path: object, stored: Iterable[StoredTensor], zeros_allowed: bool = True) -> None:
    """Raises `ValueError` for weights that cannot have been trained; checks about 4 GiB per second and core.

    Args:
        path, stored: where the model was read from and its tensors there, to name key and file.
        zeros_allowed: a matrix of zeros may be intended in a backbone and in our formats.
    """
    stored = list(stored)
    check_values(
        (_described(name, path, stored), parameter.detach(), zeros_allowed)
        for name, parameter in model.named_parameters()
        if not parameter.is_meta
        and not hasattr(parameter, "ds_id")  # offloaded to disk; split by ZeRO-3
        and type(parameter.detach()) is torch.Tensor  # else quantized: its values cannot be checked
    )


def integer_weights(model: PreTrainedModel, stored: list[StoredTensor]) -> list[str]:
    """Stored integers, by key and file, that an unquantized model loaded as floating-point weights."""
    floating = tuple(_tail(name) for name, parameter in model.named_parameters() if parameter.is_floating_point())
    integers = [] if getattr(model, "is_quantized", False) else [t for t in stored if not t.dtype.is_floating_point]
    return [f"{t.key} in {t.file} ({t.dtype})" for t in integers if f".{t.key}".endswith(floating)]


def _described(name: str, path: object, stored: list[StoredTensor]) -> str:
    """The tensor that became a parameter, with its file: files have prefixes or not, in one order or another."""
    tail, words = _tail(name), set(name.split("."))
    alike = [tensor for tensor in stored if f".{tensor.key}".endswith(tail)]  # a tower's layers end as a decoder's do
    held = min(alike, key=lambda tensor: len(words ^ set(tensor.key.split("."))), default=None)
    return f"{held.key} in {held.file}" if held else f"{name} in {path}"


def _tail(name: str) -> str:
    return f".{'.'.join(name.split('.')[-5:])}"
