"""What trains, defined once: a stage names the parts of the model that train and the key of each one's learning rate.

Freezing, the optimizer's groups, what a checkpoint must hold and the log's table all follow from `STAGES`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

SAVED_PARTS = ("lora", "patch_mlp", "spatial")  # what an adapter checkpoint holds
PARTS = (*SAVED_PARTS, "vision_tower", "language_model")

# stage -> {part that trains: key of its learning rate}. Parts that are not named are frozen.
STAGES: dict[str, dict[str, str]] = {
    "pretrain": {"patch_mlp": "learning_rate", "spatial": "learning_rate"},
    "finetune_lora": {"lora": "learning_rate", "patch_mlp": "projector_lr", "spatial": "projector_lr"},
}
FIRST_STAGES = (
    "pretrain",
)  # their projector is fresh unless the run says otherwise; the others' comes from a stage before


@dataclass(frozen=True)
class Group:
    """One optimizer group: parameters of one part, decayed or not."""

    name: str  # "lora", "lora, no decay" ...
    part: str
    lr: float
    weight_decay: float
    parameters: dict[str, nn.Parameter]  # by name in the model


def part_of(name: str) -> str:
    """The part that a parameter belongs to, by its path in the module tree."""
    path = name.split(".")
    if "vision_tower" in path:
        return "vision_tower"
    if "multi_modal_projector" in path:
        return "spatial" if "spatial" in path else "patch_mlp"
    if any(step.startswith("lora_") for step in path):
        return "lora"
    assert "language_model" in path or path[0] == "lm_head", f"parameter {name} belongs to no part"
    return "language_model"


def by_part(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """All parameters, {part: {name: parameter}}."""
    parts: dict[str, dict[str, nn.Parameter]] = {part: {} for part in PARTS}
    for name, parameter in model.named_parameters():
        parts[part_of(name)][name] = parameter
    return parts


def apply_stage(model: nn.Module, stage: str) -> None:
    """Set `requires_grad` of every parameter for the stage. Raises ValueError for an unknown or empty stage."""
    if stage not in STAGES:
        raise ValueError(f"stage = {stage!r} is unknown; there are {', '.join(STAGES)}")
    unsaved = ", ".join(part for part in STAGES[stage] if part not in SAVED_PARTS)
    if unsaved:
        raise ValueError(f"stage = {stage!r} trains {unsaved}, but a checkpoint holds {', '.join(SAVED_PARTS)}")
    parts = by_part(model)
    for part, parameters in parts.items():
        for parameter in parameters.values():
            parameter.requires_grad_(part in STAGES[stage])
    if "lora" in STAGES[stage] and not parts["lora"]:
        raise ValueError(f"stage = {stage!r} trains LoRA, but the model has no LoRA: add the adapter first")


def trained_names(model: nn.Module) -> set[str]:
    """Names of the parameters that train."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def optimizer_groups(model: nn.Module, stage: str, rates: Mapping[str, float], weight_decay: float) -> list[Group]:
    """The stage's optimizer groups, empty ones left out.

    `rates` gives the value of every rate key (`{"learning_rate": 2e-4, "projector_lr": 2e-5}`). Matrices and kernels are
    decayed; vectors (biases, the gains of norms) are not.
    """
    groups = []
    parts = by_part(model)
    for part, rate_key in STAGES[stage].items():
        trained = {name: p for name, p in parts[part].items() if p.requires_grad}
        for decayed in (True, False):
            chosen = {name: p for name, p in trained.items() if (dimensions(p) > 1) == decayed}
            if chosen:
                name = part if decayed else f"{part}, no decay"
                groups.append(Group(name, part, rates[rate_key], weight_decay if decayed else 0.0, chosen))
    return groups


def dimensions(parameter: nn.Parameter) -> int:
    """Number of dimensions, of the whole parameter, of which ZeRO-3 holds only a share."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def count(parameter: nn.Parameter) -> int:
    """Number of values, of the whole parameter, of which ZeRO-3 holds only a share."""
    return getattr(parameter, "ds_numel", parameter.numel())


def table(model: nn.Module, stage: str, rates: Mapping[str, float]) -> Iterator[str]:
    """Lines for the log: every part, its parameter count, and its learning rate or 'frozen'."""
    total = trained = 0
    for part, parameters in by_part(model).items():
        number = sum(count(p) for p in parameters.values())
        total += number
        if part in STAGES[stage]:
            trained += number
            state = f"trains at {rates[STAGES[stage][part]]:g}"
        else:
            state = "frozen"
        if parameters:
            yield f"  {part:<15}{number:>16,}  {state}"
    yield f"  {'trained':<15}{trained:>16,}  of {total:,} ({100 * trained / max(total, 1):.2f} %)"
