"""Starting from a trained LLaVA-1.5: its patch MLP, and its LoRA or whole language model; the spatial branch is new."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llava_sp.checkpoints.opening import backbones
from llava_sp.checkpoints.opening.adapter import check_bases
from llava_sp.checkpoints.opening.fill import copy_strictly, fill, gathered
from llava_sp.checkpoints.opening.fit import check_fits
from llava_sp.checkpoints.opening.foreign import check_language_model
from llava_sp.checkpoints.reading.formats import Checkpoint, recognise
from llava_sp.checkpoints.reading.names import ADAPTER_NAME, LORA, PROJECTOR, TOWER, tower_name
from llava_sp.checkpoints.reading.places import base_kwargs, fetch, hub_kwargs
from llava_sp.checkpoints.reading.tensor_files import read_checked
from llava_sp.model.modeling_llava_sp import LlavaSPForCausalLM

PATCH_MLP = (f"{PROJECTOR}linear_1.", f"{PROJECTOR}linear_2.")


def from_backbones(
    cls: type[PreTrainedModel],
    language_model: str | os.PathLike | None = None,
    vision_tower: str | os.PathLike | None = None,
    *,
    warm_start: str | os.PathLike | None = None,
    check_base: bool = True,
    **settings,
):
    """Assemble a model; `LlavaSPForCausalLM.from_backbones` calls this.

    Args:
        language_model, vision_tower: hub ids or local folders; also those within a full LLaVA.
        warm_start: a trained LLaVA-1.5 (any format, or its projector alone) whose patch MLP and LoRA are kept; a full
            one's language model replaces `language_model`. The spatial branch is new.
        check_base: compare the bases' fingerprints with those that an adapter of ours records.
        settings: those of `backbones.from_backbones`, whose errors are raised too.
    """
    start = None if warm_start is None else recognise(fetch(warm_start, **hub_kwargs(base_kwargs(settings))))
    model = backbones.from_backbones(cls, language_model_within(start, language_model), vision_tower, **settings)
    if start is not None:
        start_from(model, start, check_base=check_base)
    return model.eval()


def language_model_within(
    start: str | os.PathLike | Checkpoint | None, otherwise: str | os.PathLike | None
) -> str | os.PathLike:
    """The language model that a run with this warm start has: the one within it, else `otherwise`.

    Raises `ValueError` if neither is given, or a full checkpoint's spatial tokens would be lost.
    """
    found = start if isinstance(start, Checkpoint) or start is None else recognise(fetch(start))
    if found is not None and found.format == "llava_sp" and found.spatial.get("spatial_variant") != "none":
        raise ValueError(
            f"warm_start: {found.folder} is a full checkpoint with spatial tokens, which would be lost; start from one "
            'without (spatial_variant "none"), or from its adapter'
        )
    if found is not None and found.holds_language_model:
        return str(found.folder)
    if otherwise is None:
        raise ValueError("language_model is not set, and no warm_start contains one")
    return otherwise


def holds_lora(path: str | os.PathLike) -> bool:
    """Whether a warm start from this checkpoint includes LoRA."""
    return recognise(fetch(path)).lora is not None


def start_from(
    model: LlavaSPForCausalLM, start: str | os.PathLike | Checkpoint, *, check_base: bool = True
) -> list[str]:
    """Copy the patch MLP and the LoRA of a checkpoint into the model; returns the names of these parts.

    A model without LoRA gets the checkpoint's own.

    Raises:
        ValueError: a tensor does not fit or cannot be trained weights; LoRA of another rank, scale or other layers, or
            that was trained on other bases; a full checkpoint's own tower, trained further.
    """
    found = start if isinstance(start, Checkpoint) else recognise(fetch(start))
    check_fits(found, None)
    if found.manifest is not None:
        if check_base:
            check_bases(found, model.config)
    elif found.lora:
        check_language_model(found, model.config.text_config, (model.config.image_token_id, model.config.pad_token_id))
    _check_tower(model, found)
    stored = {name: tensor for name, tensor in found.part(PROJECTOR).items() if name.startswith(PATCH_MLP)}
    own = {name: parameter for name, parameter in model.named_parameters() if name.startswith(PATCH_MLP)}
    copy_strictly(own, read_checked(stored), f"the patch MLP of {found.folder}")
    parts = ["patch MLP"] + (["language model"] if found.holds_language_model else [])
    if found.lora:
        _start_lora(model, found)
        parts.append(f"LoRA (r {found.lora['r']})")
    return parts


def _check_tower(model: nn.Module, found: Checkpoint) -> None:
    """Raises `ValueError` if the checkpoint's own tower differs from the model's: only full checkpoints have one."""
    parameters = {tower_name(name): parameter for name, parameter in model.named_parameters()}
    for name, tensor in read_checked(found.part(TOWER)).items():
        own = parameters.get(name)
        if own is None:
            continue
        with gathered([own]):
            same = own.shape == tensor.shape and _same_but_for_rounding(own.detach().cpu(), tensor)
        if not same:
            raise ValueError(
                f"warm_start: {found.folder} has its own vision tower ({name} differs), which would be lost; pass "
                "vision_tower=<that folder> if it is transformers' LLaVA or ours, else the tower it was trained from"
            )


def _same_but_for_rounding(one: Tensor, other: Tensor) -> bool:
    """Whether both may be the same numbers, rounded to possibly different types."""
    types = [torch.finfo(_held_precision(tensor)) for tensor in (one, other)]
    step = max(info.eps for info in types)
    smallest = max(info.smallest_normal * info.eps for info in types)  # float16 has no smaller numbers
    one, other = one.float(), other.float()
    allowed = step * torch.maximum(one.abs(), other.abs()) + smallest
    return bool(((one - other).abs() <= allowed).all())


def _held_precision(tensor: Tensor) -> torch.dtype:
    """The coarsest type that holds a tensor exactly: for weights rounded once and then widened, the narrower one."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
            return dtype
    return tensor.dtype


def _start_lora(model: PreTrainedModel, found: Checkpoint) -> None:
    theirs = found.lora_config()
    present = (getattr(model, "peft_config", None) or {}).get(ADAPTER_NAME)
    if present is None:
        model.add_adapter(theirs, adapter_name=ADAPTER_NAME)
    elif (present.r, present.lora_alpha, present.use_rslora) != (theirs.r, theirs.lora_alpha, theirs.use_rslora):
        raise ValueError(
            f"warm_start: the LoRA in {found.folder} has r {theirs.r} and alpha {theirs.lora_alpha}; this run has r "
            f"{present.r} and alpha {present.lora_alpha}. Set lora_r and lora_alpha to its values"
        )
    fill(model, found, (LORA,))
