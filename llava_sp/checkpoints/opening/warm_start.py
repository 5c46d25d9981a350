"""Starting from a trained LLaVA-1.5: its patch MLP, and its LoRA or whole language model; the spatial branch is fresh."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llava_sp.checkpoints.opening import backbones
from llava_sp.checkpoints.opening.adapter import check_bases, describe
from llava_sp.checkpoints.opening.fill import copy_strictly, gathered, parameter_names
from llava_sp.checkpoints.opening.foreign import check_complete, check_language_settings, check_tokenizers
from llava_sp.checkpoints.reading.formats import (
    ADAPTER_NAME,
    LORA,
    PROJECTOR,
    TOWER,
    Checkpoint,
    lora_config,
    recognise,
    tower_name,
)
from llava_sp.checkpoints.reading.places import base_kwargs, fetch, hub_kwargs
from llava_sp.checkpoints.reading.tensor_files import read_checked

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
            one's language model takes the place of `language_model`. The spatial branch is fresh.
        check_base: compare the bases' fingerprints with those that LoRA of ours records.
        settings: those of `backbones.from_backbones`, whose errors these are too.
    """
    given = hub_kwargs(base_kwargs(settings))
    language_model = language_model_within(warm_start, language_model, **given)
    model = backbones.from_backbones(cls, language_model, vision_tower, **settings)
    if warm_start is not None:
        start_from(model, warm_start, check_base=check_base, **given)
    return model.eval()


def language_model_within(
    path: str | os.PathLike | None, otherwise: str | os.PathLike | None, **hub_kwargs
) -> str | os.PathLike | None:
    """The language model that a run with this warm start has: the one within it, or `otherwise` where it holds none.

    Raises `ValueError` where there is neither.
    """
    if path is not None:
        found = recognise(fetch(path, **hub_kwargs))
        if found.format == "llava_sp" and found.spatial.get("spatial_variant") != "none":
            raise ValueError(
                f"warm_start: {found.folder} is a full checkpoint with spatial tokens, which would be lost; start from one "
                'without (spatial_variant "none"), or from its adapter'
            )
        if found.holds_language_model:
            return str(found.folder)
    if otherwise is None:
        raise ValueError("language_model is not set, and there is no warm_start that holds one")
    return otherwise


def holds_lora(path: str | os.PathLike) -> bool:
    """Whether a warm start from this checkpoint would bring LoRA."""
    return recognise(fetch(path)).lora is not None


def start_from(model: PreTrainedModel, path: str | os.PathLike, *, check_base: bool = True, **hub_kwargs) -> list[str]:
    """Put the patch MLP and the LoRA of a checkpoint into the model; returns what was taken, in words.

    A model without LoRA gets the checkpoint's own.

    Raises:
        ValueError: a tensor does not fit or cannot be trained weights; LoRA of another rank, scale or other layers, or
            that was trained on other bases; a full checkpoint's own tower, trained further.
    """
    found = recognise(fetch(path, **hub_kwargs))
    check_complete(found)
    if found.format == "llava_sp_adapter":
        describe(found.folder)
    if found.lora:
        _check_lora_base(model, found, check_base, **hub_kwargs)
    _check_tower(model, found)
    stored = {name: tensor for name, tensor in found.part(PROJECTOR).items() if name.startswith(PATCH_MLP)}
    parameters = dict(model.named_parameters())
    own = {name: parameter for name, parameter in parameters.items() if name.startswith(PATCH_MLP)}
    copy_strictly(own, read_checked(stored), f"the patch MLP of {found.folder}")
    taken = ["patch MLP"] + (["language model"] if found.holds_language_model else [])
    if found.lora:
        _start_lora(model, found)
        taken.append(f"LoRA (r {found.lora['r']})")
    return taken


def _check_lora_base(model: PreTrainedModel, found: Checkpoint, check_base: bool, **hub_kwargs) -> None:
    """Raises `ValueError` where LoRA was trained on other bases than the model's, as far as the checkpoint tells."""
    if found.format == "llava_sp_adapter":
        recorded = (found.config.get("language_model_fingerprint"), found.config.get("vision_tower_fingerprint"))
        if check_base:
            check_bases(found.folder, recorded, model.config, ("language_model", "vision_tower"))
    else:
        check_language_settings(found, model.config.text_config)
        check_tokenizers(found, model.config.language_model_name_or_path, **hub_kwargs)


def _check_tower(model: nn.Module, found: Checkpoint) -> None:
    """Raises `ValueError` where the checkpoint's own tower is not the one that the model has: only full ones keep a tower."""
    parameters = {tower_name(name): parameter for name, parameter in model.named_parameters()}
    for name, tensor in read_checked(found.part(TOWER)).items():
        own = parameters.get(name)
        if own is None:
            continue
        with gathered([own]):
            same = own.shape == tensor.shape and _same_but_for_rounding(own.detach().cpu(), tensor)
        if not same:
            raise ValueError(
                f"warm_start: {found.folder} holds a vision tower of its own ({name} differs), which would be lost; pass "
                "vision_tower=<that folder> if it is transformers' LLaVA or ours, else the tower it was trained from is not this one"
            )


def _same_but_for_rounding(one: Tensor, other: Tensor) -> bool:
    """Whether both may be the same numbers, rounded to types that need not be the same."""
    types = [torch.finfo(_held_precision(tensor)) for tensor in (one, other)]
    step = max(info.eps for info in types)
    smallest = max(info.smallest_normal * info.eps for info in types)  # below it float16 has nothing
    one, other = one.float(), other.float()
    allowed = step * torch.maximum(one.abs(), other.abs()) + smallest
    return bool(((one - other).abs() <= allowed).all())


def _held_precision(tensor: Tensor) -> torch.dtype:
    """The coarsest type that holds a tensor: of weights that were rounded once and then widened, the one before."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
            return dtype
    return tensor.dtype


def _start_lora(model: nn.Module, found: Checkpoint) -> None:
    theirs = lora_config(found)
    present = (getattr(model, "peft_config", None) or {}).get(ADAPTER_NAME)
    if present is None:
        model.add_adapter(theirs, adapter_name=ADAPTER_NAME)
    elif (present.r, present.lora_alpha, present.use_rslora) != (theirs.r, theirs.lora_alpha, theirs.use_rslora):
        raise ValueError(
            f"warm_start: the LoRA in {found.folder} has r {theirs.r} and alpha {theirs.lora_alpha}; this run has r "
            f"{present.r} and alpha {present.lora_alpha}. Set lora_r and lora_alpha to its values"
        )
    own = {name: parameter for name, parameter in model.named_parameters() if LORA in name}
    tensors = parameter_names(read_checked(found.part("", lora=True)))
    copy_strictly(own, tensors, f"the LoRA of {found.folder}")
