"""Putting a checkpoint's tensors into a model: names, shapes and values checked, also where ZeRO-3 has split the model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn

from llava_sp.checkpoints.reading.formats import ADAPTER_NAME, LORA, PROJECTOR, TOWER, Checkpoint, tower_name
from llava_sp.checkpoints.reading.tensor_files import StoredTensor, raise_problems, read_checked, value_problem

T = TypeVar("T")
_POOLED_NORM = f"{TOWER}post_layernorm"


def gathered(parameters: list[nn.Parameter], modify: bool = False):
    """A context in which parameters split by ZeRO-3 are whole; else nothing."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if modify else None)


# ---- names


def parameter_names(tensors: Mapping[str, T]) -> dict[str, T]:
    """A checkpoint's tensors under the model's names, in which LoRA's have the adapter's name."""
    return {(_with_adapter_name(name) if LORA in name else name): tensor for name, tensor in tensors.items()}


def without_adapter_name(name: str) -> str:
    """LoRA's parameter name in a model -> in a checkpoint."""
    return name.replace(f".{ADAPTER_NAME}.", ".")


def _with_adapter_name(name: str) -> str:
    stem, _, leaf = name.rpartition(".")
    return f"{stem}.{ADAPTER_NAME}.{leaf}"


def without_pooled_norm(needed: Mapping[str, T], held: Iterable[str]) -> dict[str, T]:
    """`needed` but for a norm of the tower that is not held: the original leaves it out, as only CLIP's pooled output uses it."""
    held = set(held)
    return {name: value for name, value in needed.items() if name in held or not name.startswith(_POOLED_NORM)}


# ---- tensors


def fill(model: nn.Module, found: Checkpoint) -> None:
    """Put projector, LoRA and, where an original checkpoint holds one, the tower into the model.

    Raises `ValueError`, with nothing changed, for what does not fit or cannot be trained weights.
    """
    tower = found.part(TOWER)
    tensors = parameter_names(read_checked({**found.part(PROJECTOR), **found.part("", lora=True), **tower}))
    parts = (PROJECTOR, TOWER) if tower else (PROJECTOR,)
    parameters = {tower_name(name): parameter for name, parameter in model.named_parameters()}
    own = {name: parameter for name, parameter in parameters.items() if name.startswith(parts) or LORA in name}
    copy_strictly(without_pooled_norm(own, tensors), tensors, f"the checkpoint {found.folder}")


@torch.no_grad()
def copy_strictly(
    own: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], what: str, differences: Iterable[str] = ()
) -> None:
    """Copy `tensors` into the parameters `own` of the same names.

    Raises `ValueError`, with nothing copied, where names or shapes are not the same, or there are `differences`, which are
    told first; `what` is the message's subject.
    """

    def shape(parameter: nn.Parameter) -> tuple[int, ...]:
        return tuple(getattr(parameter, "ds_shape", parameter.shape))

    problems = [f"lacks {name}" for name in own if name not in tensors]
    problems += [f"has {name}, which the model has not" for name in tensors if name not in own]
    problems += [
        f"{name} is {tuple(tensors[name].shape)}, the model's is {shape(own[name])}"
        for name in own
        if name in tensors and tuple(tensors[name].shape) != shape(own[name])
    ]
    if problems or differences:
        lines = "\n  ".join(
            [*differences, *problems[:8], *([f"and {len(problems) - 8} more"] if len(problems) > 8 else [])]
        )
        raise ValueError(f"{what} does not fit this model:\n  {lines}")
    for name, parameter in own.items():
        with gathered([parameter], modify=True):
            if parameter.numel():
                parameter.copy_(tensors[name])


def freeze(model: nn.Module) -> nn.Module:
    """A model as it is opened: nothing trains, LoRA is in the model's own type, dropout is off."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if LORA in name:
            parameter.data = parameter.data.to(model.dtype)
    return model.eval()


def check_values(
    model: nn.Module, path: str | os.PathLike, stored: Iterable[StoredTensor], zeros_allowed: bool = True
) -> None:
    """Raises `ValueError` for weights that cannot have been trained; some 4 GiB a second and core are looked at.

    Args:
        path, stored: where the model was read from and what is there, to name key and file.
        zeros_allowed: a matrix of zeros may be meant in a backbone and in what is ours.
    """
    stored = list(stored)
    problems = []
    for name, parameter in model.named_parameters():
        if parameter.is_meta or hasattr(parameter, "ds_id"):  # kept on the disk; split by ZeRO-3
            continue
        problem = value_problem(parameter.detach(), zeros_allowed)
        if problem:
            held = _held_as(name, stored)
            problems.append(f"{held.key} in {held.file} {problem}" if held else f"{name} in {path} {problem}")
    raise_problems(problems)


def _held_as(name: str, stored: list[StoredTensor]) -> StoredTensor | None:
    """The tensor that became a parameter: files are saved with and without prefixes, in one order or another."""
    tail, words = f".{'.'.join(name.split('.')[-5:])}", set(name.split("."))
    alike = [tensor for tensor in stored if f".{tensor.key}".endswith(tail)]  # a tower's layers end as a decoder's do
    return min(alike, key=lambda tensor: len(words ^ set(tensor.key.split("."))), default=None)
