"""The keys of a run: three dataclasses and the projector's settings, and `load_config`, which reads them.

A key of a YAML file is the name of a field below, of `transformers.TrainingArguments`, or of `LlavaSPConfig` (its
`PROJECTOR_SETTINGS`). A file may build on another (`base: other.yaml`, relative to the file); later files and the command
line (`--key value`) win. `${NAME}` and `${NAME:-default}` are replaced from the environment, `${config_dir}` by the folder of the file.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_tf32_available

from llava_sp.common.files import is_missing_folder, read_json
from llava_sp.common.processes import launcher_number
from llava_sp.config.files import nearest, read_with_bases, specs_of, split_command_line, typed
from llava_sp.config.keys import (
    DEEPSPEED,
    FORMER,
    HONOURED,
    INSTEAD,
    NEEDS,
    Count,
    Multiple,
    Names,
    Positive,
    Rate,
    Share,
    allowed,
)
from llava_sp.model.configuration_llava_sp import PROJECTOR_SETTINGS
from llava_sp.model.packed_attention import KEEP_APART

# transformers 5.17 to 5.22 know the second name alone
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in {f.name for f in fields(TrainingArguments)}
)


@dataclass
class ModelArguments:
    """The parts of the model: hub ids or folders."""

    language_model: str | None = None
    vision_tower: str | None = None
    projector: dict[str, Any] = field(default_factory=dict)  # values of PROJECTOR_SETTINGS
    # Output of stage 1, for stage 2. "scratch": random weights for what warm_start does not provide.
    projector_checkpoint: str | None = None
    # A trained LLaVA-1.5: its patch MLP and its LoRA or language model are kept, the spatial branch is new.
    warm_start: str | None = None
    # Compare the backbones' fingerprints with those that projector_checkpoint and warm_start record. False accepts, for
    # example, the same weights in another number format.
    check_base: bool = True
    attn_implementation: str | None = None  # sdpa, eager, flash_attention_2 ...
    lora_r: Count = 128
    lora_alpha: Count = 256  # LoRA is scaled by alpha / r
    lora_dropout: Share = 0.05
    # Names of the linear layers of the language model that get LoRA.
    lora_target_modules: Names = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


@dataclass
class DataArguments:
    """The training data."""

    mixture: str | None = None  # YAML with a list of {annotations, images, weight}
    data_path: str | None = None  # LLaVA JSON or JSONL, instead of a mixture
    image_folder: str | None = None  # of data_path's images
    data_source: str | None = None  # where the data comes from, for the message if it is missing
    eval_data_path: str | None = None  # LLaVA JSON or JSONL for the validation loss
    eval_image_folder: str | None = None  # of its images; default image_folder
    validation_fraction: Share = 0.0  # share of the training data kept for validation
    conversation_template: str = "vicuna_v1"
    image_aspect_ratio: Literal["pad", "crop"] = "pad"  # to a square, or "crop" from the centre
    model_max_length: Count = 2048  # longest sequence in tokens, image tokens included
    pad_to_multiple_of: Multiple = (
        1  # lengths of batches and packs: kernels are chosen by divisibility (benchmarks/lengths.py)
    )
    on_bad_sample: Literal["fail", "skip"] = "fail"  # "skip": counted and listed
    # Compare annotations and images with those that the run began with. False uses the current ones.
    check_data: bool = True
    data_manifest: str | None = (
        None  # what data.check --manifest wrote: a run whose data has changed since does not start
    )
    # Folder of the images' patch features, which the run reads instead; python -m llava_sp.data.precompute writes them.
    precompute_features: str | None = None
    group_by_modality_length: bool = False  # batches of one modality and of similar length
    # Several samples in one row without padding, balanced over processes; a step has global_batch_size samples as without.
    packing: bool = False
    pack_length: Count | None = None  # most tokens in a pack, which sets the memory; default 8 times model_max_length

    @property
    def longest_pack(self) -> int:
        """Most tokens in a pack, a multiple of `pad_to_multiple_of`."""
        length = 8 * self.model_max_length if self.pack_length is None else self.pack_length
        return length - length % self.pad_to_multiple_of


@dataclass
class TrainArguments(TrainingArguments):
    """Optimization: `transformers.TrainingArguments` and the keys that LLaVA-SP adds."""

    stage: str = "pretrain"  # which parts train: an entry of train/stages.py
    projector_lr: Rate | None = None  # default learning_rate; as of any key here that ends in _lr
    global_batch_size: Count | None = None  # samples per step over all processes; sets gradient_accumulation_steps
    # Time without progress after which the processes exit; null: never.
    watchdog_minutes: Positive | None = 10.0
    # A step whose loss or gradients are not finite ends the run, or is left out and counted (10 in a row at most).
    on_non_finite: Literal["stop", "skip"] = "stop"
    include_num_input_tokens_seen: Literal["all", "non_padding", "no"] | bool = "non_padding"
    # One pass over the largest batch before the first step: what does not fit fails at once.
    longest_step_first: bool = True

    def __post_init__(self) -> None:
        word = getattr(self, CHECKPOINTING)
        self.recomputation_is_open = word == "auto"  # until `recompute` is called; all layers till then
        if isinstance(word, str):
            number = re.fullmatch(r"every_(\d+)", word)
            self.recompute(int(number.group(1)) if number else None if word == "none" else 1)
        if not torch.accelerator.is_available():
            self.use_cpu = True
        if self.tf32 and not is_torch_tf32_available():
            self.tf32 = None
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every batch reaches every parameter, text-only ones too
        for name, rate in self.rates.items():
            if rate is None:
                setattr(self, name, self.learning_rate)
        if self.data_seed is None:
            self.data_seed = self.seed
        if self.report_to is None:
            self.report_to = "none"
        super().__post_init__()

    def recompute(self, every: int | None) -> None:
        """Have every n-th decoder layer computed again in the backward pass (1: each; None: none)."""
        options = {**(getattr(self, f"{CHECKPOINTING}_kwargs") or {})}
        options.pop("every_n_layers", None)
        if every is not None and every > 1:
            options["every_n_layers"] = every
        for name in (CHECKPOINTING, "gradient_checkpointing"):  # the second mirrors the first
            setattr(self, name, every is not None)
            setattr(self, f"{name}_kwargs", options or None)

    @property
    def recomputed(self) -> int | None:
        """Every how many decoder layers one is computed again; None: none."""
        options = getattr(self, f"{CHECKPOINTING}_kwargs") or {}
        return options.get("every_n_layers", 1) if getattr(self, CHECKPOINTING) else None

    @property
    def rates(self) -> dict[str, Any]:
        """The value of every learning rate that a stage may name."""
        names = [name for name in TrainArguments.__annotations__ if name.endswith("_lr")]
        return {name: getattr(self, name) for name in ("learning_rate", *names)}


def split_global_batch(global_batch_size: int, per_device: int, world_size: int) -> tuple[int, int]:
    """(batch per device, micro batches per optimizer step); the batch per device is `per_device`, or the
    process's share where that is smaller.

    Raises:
        ValueError: the global batch is not divisible; the message has the numbers and a valid choice.
    """
    share = global_batch_size // world_size
    if global_batch_size % world_size == 0:
        per_device = min(per_device, share)
    if per_device > 0 and share > 0 and global_batch_size % (per_device * world_size) == 0:
        return per_device, share // per_device
    sizes = [size for size in range(1, share + 1) if global_batch_size % (size * world_size) == 0]
    cure = f"choose a global_batch_size that is a multiple of {world_size} processes"
    if sizes:
        cure = f"per_device_train_batch_size = {max((s for s in sizes if s <= per_device), default=sizes[0])} is valid"
    raise ValueError(
        f"global_batch_size = {global_batch_size} is not a multiple of per_device_train_batch_size = {per_device} "
        f"times {world_size} processes; {cure}"
    )


@dataclass
class Run:
    """The configuration of a run. `given` are the keys that its files and the command line set."""

    model: ModelArguments
    data: DataArguments
    train: TrainArguments
    given: dict[str, Any]

    @classmethod
    def of(cls, given: dict[str, Any]) -> Run:
        """The run that these keys describe. Process group and devices are detected in this call."""

        def keys_of(kind: type) -> dict[str, Any]:
            return {f.name: given[f.name] for f in fields(kind) if f.name in given}

        projector = {key: given.get(key, f.default) for key, f in PROJECTOR_SETTINGS.items()}
        model = ModelArguments(**keys_of(ModelArguments), projector=projector)
        data, train = DataArguments(**keys_of(DataArguments)), keys_of(TrainArguments)
        whole = train.get("global_batch_size")
        if data.packing:  # a row is a pack; how many a step takes is planned from the data
            train["per_device_train_batch_size"] = 1
        elif whole is not None:
            per_device = train.get("per_device_train_batch_size", TrainArguments.per_device_train_batch_size)
            sizes = split_global_batch(whole, per_device, launcher_number("WORLD_SIZE"))
            train["per_device_train_batch_size"], train["gradient_accumulation_steps"] = sizes
        return cls(model, data, TrainArguments(**train), given)

    @property
    def settings(self) -> dict[str, Any]:
        """Every key of ours and every key that was set, as plain values: what `run.yaml` holds and `load_config` reads."""
        ours = {**vars(self.model), **vars(self.data), **self.model.projector}
        ours.pop("projector")
        changed = {*TrainArguments.__annotations__} | ({"per_device_train_batch_size"} & self.given.keys())
        return {**self.given, **ours, **{key: getattr(self.train, key) for key in sorted(changed)}}


RESERVED_KEY = "provenance"  # in run.yaml: facts about a run, not settings
# Paths in a YAML file are relative to the working directory, as in LLaVA's scripts; these, parts of a configuration, to
# the file that names them.
FILE_RELATIVE_KEYS = ("deepspeed", "mixture")
PATH_KEYS = (
    "mixture", "data_path", "image_folder", "eval_data_path", "eval_image_folder", "output_dir", "data_manifest",
    "precompute_features",
)  # fmt: skip
# A folder, or a name that is not a path.
MODEL_KEYS = ("language_model", "vision_tower", "projector_checkpoint", "warm_start")
RENAMED = {  # in transformers 5.23
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


def load_config(path: str | os.PathLike | None, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Run:
    """A run's configuration; see `read_keys`."""
    return Run.of(read_keys(path, overrides))


def read_keys(path: str | os.PathLike | None, overrides: Sequence[str] | Mapping[str, Any] = ()) -> dict[str, Any]:
    """The keys that a file, its bases and `overrides` set, with the types of their fields and absolute paths.

    `overrides` are command-line words (`["--max_steps", "10"]`) or a dictionary. Raises `ValueError` naming file and key
    for an unknown key (with the nearest valid one), a missing file, or a value of the wrong type.
    """
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for file, keys in read_with_bases(path) if path else []:
        keys.pop(RESERVED_KEY, None)
        for key in FILE_RELATIVE_KEYS:
            if isinstance(keys.get(key), str):
                keys[key] = str(file.parent / Path(keys[key]).expanduser())
        _replace(values, keys)
        origin |= dict.fromkeys(keys, str(file))
    words = dict(overrides) if isinstance(overrides, Mapping) else split_command_line(overrides)
    _replace(values, words)
    origin |= dict.fromkeys(words, "command line")

    known = _specs()
    unknown = [
        f"{origin[k]}: unknown key '{k}'; did you mean '{FORMER.get(k) or nearest(k, known)}'?"
        for k in values
        if k not in known
    ]
    if unknown:
        raise ValueError("\n".join(unknown))
    values = typed(values, known, origin)
    conflicts = list(_conflicts(values, origin))
    if conflicts:
        raise ValueError("\n".join(conflicts))
    for key in (*PATH_KEYS, *MODEL_KEYS):
        name = values.get(key)
        if name is not None and (key in PATH_KEYS or os.path.exists(name) or is_missing_folder(name)):
            values[key] = os.path.abspath(os.path.expanduser(name))
    name = values.get("deepspeed")
    if isinstance(name, str) and not name.startswith("{"):
        try:
            values["deepspeed"] = read_json(Path(name).expanduser(), DEEPSPEED)
        except ValueError as error:
            raise ValueError(f"{origin['deepspeed']}: deepspeed: {error}") from error
    for former, name in RENAMED.items():
        given = [values.pop(known_as) for known_as in (former, name) if known_as in values]
        if given:  # the former name loses
            values[name.replace("activation_checkpointing", CHECKPOINTING)] = given[-1]
    return values


def _replace(values: dict[str, Any], keys: Mapping[str, Any]) -> None:
    """Later keys win, also over an earlier one of their former name."""
    for names in RENAMED.items():
        if keys.keys() & set(names):
            for name in names:
                values.pop(name, None)
    values |= keys


@cache
def _specs() -> dict[str, Any]:
    """The schema of every key."""
    hints = {key: f.type for key, f in PROJECTOR_SETTINGS.items()}
    for kind in (ModelArguments, DataArguments, TrainArguments):
        declared = HONOURED | get_type_hints(kind, include_extras=True)
        hints |= {name: declared[name] for name in kind.__annotations__ if name != "projector"}
    inherited = {f.name: f for f in fields(TrainingArguments) if f.init and f.name not in hints}
    refused = {
        name: allowed(f.default_factory() if callable(f.default_factory) else f.default, INSTEAD[name])
        for name, f in inherited.items()
        if name in INSTEAD
    }
    honoured = {name: HONOURED[name] for name in (*inherited, *RENAMED.values()) if name in HONOURED}
    return specs_of(hints | honoured) | refused


def _conflicts(values: Mapping[str, Any], origin: Mapping[str, str]) -> Iterator[str]:
    """Keys that are set but have no effect, or conflict."""
    for key, others in NEEDS.items():
        if values.get(key) not in (None, False, 0, "no") and not any(map(values.get, others)):
            yield f"{origin[key]}: {key} is {values[key]!r}; it needs {' or '.join(others)}"
    if values.get("lr_scheduler_kwargs") and values.get("lr_scheduler_type") in ("constant", "constant_with_warmup"):
        yield f"{origin['lr_scheduler_kwargs']}: lr_scheduler_kwargs is set, but {values['lr_scheduler_type']} takes none"
    word = next((key for key in ("activation_checkpointing", "gradient_checkpointing") if values.get(key)), "")
    kwargs = next((key for key in values if key in (*RENAMED, *RENAMED.values()) and key.endswith("_kwargs")), "")
    number = (values.get(kwargs) or {}).get("every_n_layers")
    if number and isinstance(values.get(word), str):
        yield (
            f"{origin[kwargs]}: {kwargs}.every_n_layers is {number}, but {word} is {values[word]!r} ({origin[word]}); "
            f"set {word} to every_{number}, and no every_n_layers"
        )
    batch, accumulated = values.get("global_batch_size"), "gradient_accumulation_steps"
    if batch is not None and accumulated in values:
        yield (
            f"{origin[accumulated]}: {accumulated} follows from global_batch_size ({batch}, {origin['global_batch_size']}); "
            "set one of them (--global_batch_size null leaves the accumulation to you)"
        )
    yield from _packing_conflicts(values, origin)
    if values.get("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        yield f"{origin['deepspeed']}: deepspeed is set but not installed (pip install deepspeed)"


def _packing_conflicts(values: Mapping[str, Any], origin: Mapping[str, str]) -> Iterator[str]:
    if not values.get("packing"):
        return
    where = f"packing is true ({origin['packing']})"
    if values.get("group_by_modality_length"):
        key = "group_by_modality_length"
        yield f"{origin[key]}: {key} is true, and {where}: a pack has no padding to save; set one of them to false"
    if (size := values.get("per_device_train_batch_size", 1)) != 1:
        key = "per_device_train_batch_size"
        yield (
            f"{origin[key]}: {key} is {size}, and {where}: a forward pass takes one pack, of pack_length tokens at most; "
            f"set {key} to 1 (and pack_length for the memory), or packing to false"
        )
    if (attention := values.get("attn_implementation")) not in (None, *KEEP_APART):
        yield (
            f"{origin['attn_implementation']}: attn_implementation is {attention!r}, and {where}: it is not known to keep the "
            f"samples of a pack apart; null chooses, and {', '.join(KEEP_APART)} do"
        )
    elif attention == "flex_attention" and not torch.accelerator.is_available():
        yield f"{origin['attn_implementation']}: attn_implementation is {attention!r}: it cannot train on a CPU; use sdpa"
