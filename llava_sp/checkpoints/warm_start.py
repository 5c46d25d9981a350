"""Starting from a trained LLaVA-1.5: its patch MLP, and its LoRA or whole language model; the spatial branch is fresh."""

from __future__ import annotations

import os

import torch
from torch import nn

from .adapter import _copy_strictly, _fetch, _with_adapter_name, describe
from .backbones import gathered
from .formats import ADAPTER_NAME, PROJECTOR, TOWER, Checkpoint, lora_config, recognise
from .original import check_complete
from .tensor_files import read_checked

PATCH_MLP = (f"{PROJECTOR}linear_1.", f"{PROJECTOR}linear_2.")


def language_model_within(
    path: str | os.PathLike | None, otherwise: str | os.PathLike | None
) -> str | os.PathLike | None:
    """The language model that a run with this warm start has: the one within it, or `otherwise` where it holds none.

    Raises `ValueError` where there is neither.
    """
    if path is not None:
        found = recognise(_fetch(path))
        if found.format in ("original_full", "llava_hf"):
            return str(found.folder)
        if found.holds_language_model:
            raise ValueError(
                f"warm_start: {found.folder} is a full checkpoint in our own format; start from its adapter, or where it has no "
                "spatial tokens, convert it first (python -m llava_sp.checkpoints.convert --format llava_hf)"
            )
    if otherwise is None:
        raise ValueError("language_model is not set, and there is no warm_start that holds one")
    return otherwise


def start_from(model: nn.Module, path: str | os.PathLike) -> str:
    """Put the patch MLP and the LoRA of a checkpoint into the model; returns what was taken, in words.

    A model without LoRA gets the checkpoint's own.

    Raises:
        ValueError: a tensor does not fit or cannot be trained weights; LoRA of another rank, scale or other layers.
    """
    found = recognise(_fetch(path))
    check_complete(found)
    if found.format == "llava_sp_adapter":
        describe(found.folder)
    _check_tower(model, found)
    stored = {name: tensor for name, tensor in found.part(PROJECTOR).items() if name.startswith(PATCH_MLP)}
    parameters = dict(model.named_parameters())
    own = {name: parameter for name, parameter in parameters.items() if name.startswith(PATCH_MLP)}
    _copy_strictly(own, read_checked(stored), f"the patch MLP of {found.folder}", [])
    taken = ["patch MLP"] + (["language model"] if found.holds_language_model else [])
    if found.lora:
        _start_lora(model, found)
        taken.append(f"LoRA (r {found.lora['r']})")
    return " and ".join(taken)


def _check_tower(model: nn.Module, found: Checkpoint) -> None:
    """Raises `ValueError` where the checkpoint's own tower is not the one that the model has: only full ones keep a tower."""
    parameters = {n.replace("vision_tower.vision_model.", "vision_tower."): p for n, p in model.named_parameters()}
    for name, tensor in read_checked(found.part(TOWER)).items():
        own = parameters.get(name)
        if own is None:
            continue
        with gathered([own]):
            same = own.shape == tensor.shape and torch.equal(own.detach().cpu(), tensor.to(own.dtype))
        if not same:
            raise ValueError(
                f"warm_start: {found.folder} holds a vision tower of its own ({name} differs), which would be lost; pass "
                "vision_tower=<that folder> if it is transformers' LLaVA, else the tower it was trained from is not this one"
            )


def _start_lora(model: nn.Module, found: Checkpoint) -> None:
    theirs = lora_config(found.lora)
    present = (getattr(model, "peft_config", None) or {}).get(ADAPTER_NAME)
    if present is None:
        model.add_adapter(theirs, adapter_name=ADAPTER_NAME)
    elif (present.r, present.lora_alpha, present.use_rslora) != (theirs.r, theirs.lora_alpha, theirs.use_rslora):
        raise ValueError(
            f"warm_start: the LoRA in {found.folder} has r {theirs.r} and alpha {theirs.lora_alpha}; this run has r "
            f"{present.r} and alpha {present.lora_alpha}. Set lora_r and lora_alpha to its values"
        )
    own = {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    tensors = read_checked(found.part("", lora=True))
    _copy_strictly(own, {_with_adapter_name(n): t for n, t in tensors.items()}, f"the LoRA of {found.folder}", [])
