"""PEFT's adapter_config.json: its schema, and PEFT's settings of a checkpoint's LoRA."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from peft import LoraConfig

from llava_sp.checkpoints.reading.names import LANGUAGE
from llava_sp.checkpoints.reading.settings import COUNT, UNIT
from llava_sp.common.schema import Check, expect, fits, one_of

_ALPHA = Check(lambda alpha: 0 < alpha <= 10**6, "a number above 0, up to a million", float)
SETTINGS = {
    "peft_type": one_of("LORA"),
    "r": COUNT,
    "lora_alpha": _ALPHA,
    "lora_dropout?": (UNIT, None),
    "target_modules": Check(lambda value: bool(value) and fits(value, (str, [str])), "the names of linear layers"),
    "use_rslora?": (bool, None),
    "use_dora?": (bool, None),
    "rank_pattern?": ({str: COUNT}, None),
    "alpha_pattern?": ({str: _ALPHA}, None),
    "base_model_name_or_path?": (str, None),
}
# An expression may name layers of the tower too.
ORIGINAL_SETTINGS = SETTINGS | {
    "target_modules": Check(
        lambda value: bool(value) and (fits(value, [str]) or str(value).startswith(re.escape(LANGUAGE))),
        "the names of the language model's linear layers",
    )
}
OPENED = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
)
# Allowed in our formats as well: their tensors are saved, or they only affect initialization.
_OURS = (
    *OPENED, "init_lora_weights", "eva_config", "corda_config", "lora_ga_config", "layers_to_transform", "layers_pattern", "lora_bias",
)  # fmt: skip
# Settings of plain LoRA on linear layers, or without effect once it is trained; any others must be unset.
_PLAIN = (
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "loftq_config", "lora_alpha", "lora_dropout", "megatron_core", "peft_type", "peft_version", "r",
    "revision", "runtime_config", "target_modules", "task_type",
)  # fmt: skip
_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")  # others change the base's weights too


def check_plain_lora(settings: dict[str, Any], file: Path, allowed: tuple[str, ...] = ()) -> None:
    """Raises `ValueError` for a setting, but for those `allowed`, that is not plain LoRA."""
    usual = LoraConfig().to_dict()
    for key, value in settings.items():
        unset = fits(value, one_of(None, usual[key]) if key in usual else one_of(None, False, [], {}, "none"))
        plain = key in _PLAIN and (key != "init_lora_weights" or value in (*_INITIALISATIONS, None))
        if not (unset or plain or key in allowed):
            raise ValueError(f"{file}: {key} is {value!r}; expected plain LoRA on linear layers, without it")


def our_settings(settings: Any, file: Path) -> dict[str, Any]:
    """An adapter_config.json. Raises `ValueError` for anything but LoRA on linear layers, all of whose tensors are saved."""
    expect(settings, {"peft_type": SETTINGS["peft_type"]}, file)  # first; other kinds lack the other settings
    check_plain_lora(expect(settings, SETTINGS, file), file, _OURS)
    return settings


def original_lora_config(settings: dict[str, Any]) -> LoraConfig:
    """PEFT's settings of an original's LoRA, restricted to the language model: `q_proj` alone would be the tower's too."""
    targets = settings["target_modules"]
    if not isinstance(targets, str):
        leaves = "|".join(sorted(re.escape(target) for target in targets))
        targets = rf"{re.escape(LANGUAGE)}.*\.({leaves})"
    kept = {key: settings[key] for key in (*OPENED, "fan_in_fan_out") if settings.get(key) is not None}
    return LoraConfig(**kept | {"target_modules": targets}, bias="none", task_type="CAUSAL_LM")
