"""The keys of a run: three dataclasses, and `load_config`, which fills them from a YAML file and the command line.

A key of a YAML file is the name of a field below or of `transformers.TrainingArguments`. A file may build on another
(`base: other.yaml`, relative to the file); later files and the command line (`--key value`) win. `${NAME}` and
`${NAME:-default}` are replaced from the environment, `${config_dir}` by the folder of the file.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.utils import is_torch_tf32_available

from llava_sp.config.files import UsageError, nearest, read_json, read_yaml, split_command_line


@dataclass
class ModelArguments:
    """What the model is made of."""

    language_model: str | None = field(default=None, metadata={"help": "Hub id or folder of the language model."})
    vision_tower: str | None = field(default=None, metadata={"help": "Hub id or folder of the vision tower."})
    spatial_variant: str = field(default="cropping", metadata={"help": "cropping, pooling, or none (LLaVA-1.5)."})
    spatial_scales: list[int] | None = field(default=None, metadata={"help": "Scales; default six up to the grid."})
    spatial_width: int | None = field(default=None, metadata={"help": "Width of the spatial feature extractor."})
    spatial_fusion: bool = field(default=True, metadata={"help": "Detail feature integrator on or off."})
    spatial_projection_bias: bool | None = field(
        default=None, metadata={"help": "Bias behind the integrator; default: cropping has one."}
    )
    fusion_kernel: int | None = field(default=None, metadata={"help": "Side of the integrator's windows in patches."})
    fusion_stride: int | None = field(default=None, metadata={"help": "Step from one such window to the next."})
    vision_feature_layer: list[int] = field(
        default_factory=lambda: [-2], metadata={"help": "Layers of the tower that are looked at, side by side."}
    )
    projector_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Output of stage 1, for stage 2. 'scratch' starts what warm_start does not give from random weights."
        },
    )
    warm_start: str | None = field(
        default=None,
        metadata={
            "help": "A trained LLaVA-1.5: its patch MLP and its LoRA or language model are kept, the spatial branch is fresh."
        },
    )
    check_base: bool = field(
        default=True,
        metadata={
            "help": "Compare the bases' fingerprints with those that the LoRA of warm_start records; false takes, say, the same "
            "weights in another number format."
        },
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager, flash_attention_2 ..."})
    lora_r: int = field(default=128, metadata={"help": "Rank of the LoRA matrices."})
    lora_alpha: int = field(default=256, metadata={"help": "Scale of LoRA: alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the LoRA matrices."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        metadata={"help": "Names of the linear layers of the language model that get LoRA."},
    )


@dataclass
class DataArguments:
    """What the model learns from."""

    mixture: str | None = field(default=None, metadata={"help": "YAML with a list of {annotations, images, weight}."})
    data_path: str | None = field(default=None, metadata={"help": "LLaVA JSON or JSONL, instead of a mixture."})
    image_folder: str | None = field(default=None, metadata={"help": "Folder of data_path's images."})
    data_source: str | None = field(default=None, metadata={"help": "Where the data comes from, told if missing."})
    eval_data_path: str | None = field(default=None, metadata={"help": "LLaVA JSON or JSONL for the validation loss."})
    eval_image_folder: str | None = field(default=None, metadata={"help": "Its images; default image_folder."})
    validation_fraction: float = field(default=0.0, metadata={"help": "Share of the training data kept for that."})
    conversation_template: str = field(default="vicuna_v1", metadata={"help": "Conversation template."})
    image_aspect_ratio: str = field(default="pad", metadata={"help": "pad (to a square) or crop (from the centre)."})
    model_max_length: int = field(default=2048, metadata={"help": "Longest sequence in tokens, image tokens included."})
    on_bad_sample: str = field(default="fail", metadata={"help": "fail, or skip (counted and listed)."})
    group_by_modality_length: bool = field(
        default=False, metadata={"help": "Batches of one modality, alike in length."}
    )


@dataclass
class TrainArguments(TrainingArguments):
    """How it learns: `transformers.TrainingArguments` and what a LLaVA-SP run states besides."""

    output_dir: str | None = field(default=None, metadata={"help": "Folder of the run."})
    stage: Literal["pretrain", "finetune_lora"] = field(
        default="pretrain", metadata={"help": "What trains: an entry of train/stages.py."}
    )
    projector_lr: float | None = field(default=None, metadata={"help": "Rate of the projector; default learning_rate."})
    global_batch_size: int | None = field(
        default=None,
        metadata={"help": "Samples per optimizer step over all processes; sets gradient_accumulation_steps."},
    )
    data_seed: int | None = field(default=None, metadata={"help": "Seed of the data order; default seed."})
    # Here with one type: the parser cannot read transformers' `str | bool`.
    include_num_input_tokens_seen: str = field(default="non_padding", metadata={"help": "all, non_padding or no."})

    given_keys: ClassVar[tuple[str, ...]] = ()  # what file and command line set; load_config fills it in

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            self.use_cpu = True
        if self.fsdp:
            raise ValueError("fsdp is not supported here; use deepspeed (configs/deepspeed/zero2.json or zero3.json).")
        if self.load_best_model_at_end:
            raise ValueError("load_best_model_at_end is not supported; the checkpoints and log.jsonl let you choose.")
        if self.save_only_model:
            raise ValueError("save_only_model is not supported: a run could not go on from such a checkpoint.")
        if self.tf32 and not is_torch_tf32_available():
            self.tf32 = None
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every batch reaches every parameter, text-only ones too
        if self.projector_lr is None:
            self.projector_lr = self.learning_rate
        if self.data_seed is None:
            self.data_seed = self.seed
        if self.global_batch_size is not None:
            self.per_device_train_batch_size, self.gradient_accumulation_steps = split_global_batch(
                self.global_batch_size, self.per_device_train_batch_size, int(os.environ.get("WORLD_SIZE", "1"))
            )
        super().__post_init__()


def split_global_batch(global_batch_size: int, per_device: int, world_size: int) -> tuple[int, int]:
    """(batch per device, micro batches per optimizer step); the batch per device is `per_device` or, where the processes
    need less, their share.

    Raises:
        ValueError: the global batch cannot be divided so; the message has the numbers and what would do.
    """
    if min(global_batch_size, per_device) < 1:
        raise ValueError(
            f"global_batch_size = {global_batch_size} and per_device_train_batch_size = {per_device} must be positive."
        )
    if global_batch_size % world_size == 0:
        per_device = min(per_device, global_batch_size // world_size)
    if global_batch_size % (per_device * world_size) == 0:
        return per_device, global_batch_size // (per_device * world_size)
    share = global_batch_size // world_size
    fits = [size for size in range(1, share + 1) if global_batch_size % (size * world_size) == 0]
    cure = (
        f"per_device_train_batch_size = {max((s for s in fits if s <= per_device), default=fits[0])} would do"
        if fits
        else f"choose a global_batch_size that {world_size} processes divide"
    )
    raise ValueError(
        f"global_batch_size = {global_batch_size} is not a multiple of per_device_train_batch_size = {per_device} "
        f"times {world_size} processes; {cure}."
    )


ARGUMENTS = (ModelArguments, DataArguments, TrainArguments)
# Paths in a YAML file are relative to the working directory, as in LLaVA's scripts; these, parts of a configuration, to
# the file that names them.
FILE_RELATIVE_KEYS = ("deepspeed", "mixture")
PATH_KEYS = ("mixture", "data_path", "image_folder", "eval_data_path", "eval_image_folder", "output_dir")
# A folder, or a name that is no path.
MODEL_KEYS = ("language_model", "vision_tower", "projector_checkpoint", "warm_start")
RESERVED_KEY = "provenance"  # in run.yaml: facts about a run, no settings


def load_config(
    path: str | Path | None, overrides: Sequence[str] | Mapping[str, Any] = ()
) -> tuple[ModelArguments, DataArguments, TrainArguments]:
    """Read a run's configuration.

    `overrides` are command-line words (`["--max_steps", "10"]`) or a dictionary. Raises UsageError (a ValueError) that
    names file and key for an unknown key (with the nearest valid one), a missing file, or a value of the wrong type.
    """
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for file, settings in read_yaml(path) if path else []:
        settings.pop(RESERVED_KEY, None)
        for key in FILE_RELATIVE_KEYS:
            if isinstance(settings.get(key), str):
                settings[key] = str(file.parent / Path(settings[key]).expanduser())
        values.update(settings)
        origin.update(dict.fromkeys(settings, str(file)))
    words = dict(overrides) if isinstance(overrides, Mapping) else split_command_line(overrides)
    values.update(words)
    origin.update(dict.fromkeys(words, "command line"))

    _check_keys(values, origin)
    _resolve_values(values, origin)
    arguments = _parse(values, origin)
    arguments[2].given_keys = tuple(values)
    return arguments


def _check_keys(values: Mapping[str, Any], origin: Mapping[str, str]) -> None:
    known = [f.name for arguments in ARGUMENTS for f in fields(arguments)]
    unknown = [key for key in values if key not in known]
    if unknown:
        lines = [f"  {origin[key]}: unknown key '{key}'; did you mean '{nearest(key, known)}'?" for key in unknown]
        raise UsageError("The configuration cannot be read:\n" + "\n".join(lines))
    if values.get("global_batch_size") is not None and "gradient_accumulation_steps" in values:
        raise UsageError(
            f"{origin['gradient_accumulation_steps']}: gradient_accumulation_steps follows from global_batch_size "
            f"({values['global_batch_size']}, {origin['global_batch_size']}); state one of them "
            "(--global_batch_size null leaves the accumulation to you)."
        )


def _resolve_values(values: dict[str, Any], origin: dict[str, str]) -> None:
    """Absolute paths, DeepSpeed's JSON in place of its name, the names of this transformers version."""
    for key in PATH_KEYS:
        if isinstance(values.get(key), str):
            values[key] = os.path.abspath(os.path.expanduser(values[key]))
    for key in MODEL_KEYS:
        if isinstance(values.get(key), str) and is_local_path(values[key]):
            values[key] = os.path.abspath(os.path.expanduser(values[key]))
    if isinstance(values.get("deepspeed"), str) and not values["deepspeed"].startswith("{"):
        values["deepspeed"] = read_json(values["deepspeed"], origin["deepspeed"])
    if values.get("deepspeed") is not None and importlib.util.find_spec("deepspeed") is None:
        raise UsageError(
            f"{origin['deepspeed']}: deepspeed is set, but DeepSpeed is not installed (pip install deepspeed)."
        )
    for old, new in (
        ("gradient_checkpointing", "activation_checkpointing"),  # renamed in transformers 5.23
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
    ):
        if old in values and new not in values and any(f.name == new for f in fields(TrainingArguments)):
            values[new], origin[new] = values.pop(old), origin[old]


def is_local_path(name: str) -> bool:
    """True for a folder, or what is written like one; False for a hub id such as `lmsys/vicuna-7b-v1.5`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or os.path.isdir(name)


def _parse(
    values: Mapping[str, Any], origin: Mapping[str, str]
) -> tuple[ModelArguments, DataArguments, TrainArguments]:
    parser = HfArgumentParser(ARGUMENTS, allow_abbrev=False, add_help=False, exit_on_error=False)
    words = []
    for key, value in values.items():
        if key == "report_to" and value is None:
            value = "none"
        many = isinstance(value, list)
        if value is None or (many and (not value or key == "report_to")):
            parser.set_defaults(**{key: value})
        elif many:
            words += [f"--{key}", *map(str, value)]
        elif isinstance(value, Mapping):
            parser.set_defaults(**{key: dict(value)})
        else:
            words.append(f"--{key}={value}")
    try:
        return parser.parse_args_into_dataclasses(words, look_for_args_file=False)
    except ArgumentError as error:
        key = (error.argument_name or "").split("/")[0].lstrip("-")
        raise UsageError(f"{origin.get(key, 'configuration')}: {key} = {values.get(key)!r}: {error.message}") from error
    except ValueError as error:  # from the dataclasses' own checks
        raise UsageError(str(error)) from error


def settings_of(model: ModelArguments, data: DataArguments, train: TrainArguments) -> dict[str, Any]:
    """Every key that was set and every key of ours, as plain values: what `run.yaml` holds and `load_config` reads."""
    own = {f.name for f in fields(TrainArguments)} - {f.name for f in fields(TrainingArguments)}
    keys = [*(f.name for f in fields(model)), *(f.name for f in fields(data)), *sorted(own | set(train.given_keys))]
    settings = {}
    for key in dict.fromkeys(keys):
        holder = next(part for part in (model, data, train) if hasattr(part, key))
        settings[key] = _plain(getattr(holder, key))
    if train.global_batch_size is not None:
        settings.pop("gradient_accumulation_steps", None)
    return settings


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value
