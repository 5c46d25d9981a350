"""The allowed values of keys, as types; and which keys of `transformers.TrainingArguments` a run honours.

`HONOURED` has the values of those that work as in transformers. The others accept only their default: transformers'
Trainer would apply or ignore them, but the data, model or checkpoints of this project do not support them. `INSTEAD`
gives the replacement of each.
"""

from __future__ import annotations

import json
import math
import re
from typing import Annotated, Any, Literal

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import IntervalStrategy

from llava_sp.common.schema import NOT_NEGATIVE, POSITIVE, SHARE, TEXT, Check, fits, only, some, whole

Count = Annotated[int, whole(1)]
Multiple = Annotated[int, whole(1, 1024)]
Seed = Annotated[int, whole(0, 2**32 - 1)]
Positive = Annotated[float, POSITIVE]
Rate = Annotated[float, Check(lambda rate: 0 <= rate <= 1000, "a number from 0 to 1000", float)]
NotNegative = Annotated[float, NOT_NEGATIVE]
Share = Annotated[float, SHARE]
Text = Annotated[str, TEXT]
Names = Annotated[list[str], some(TEXT)]


def _is_count(number: float) -> bool:
    return 1 <= number <= 10**9 and number == int(number)


_STEPS = "a whole number of steps, or a share of all steps below 1"
Steps = Annotated[float, Check(lambda n: 0 < n < 1 or _is_count(n), f"{_STEPS}, above 0", float)]
_RECOMPUTING = {"use_reentrant?": bool, "preserve_rng_state?": bool, "every_n_layers?": whole(1), "offload?": bool}
DEEPSPEED = Check(bool, "an object with settings", {"zero_optimization?": dict})  # an empty one would be no DeepSpeed
Recomputing = Annotated[dict, only(_RECOMPUTING)]


# Which decoder layers are computed again in the backward pass instead of being kept
Recomputed = (
    bool
    | Annotated[
        str,
        Check(
            re.compile(r"auto|full|none|every_[1-9]\d{0,2}").fullmatch,
            "auto, full, none or every_N (every N-th layer, such as every_4)",
            str,
        ),
    ]
)


def _is_tracker(name: object) -> bool:
    return name in INTEGRATION_TO_CALLBACK


_TRACKERS = f"none, all, or one or several (--report_to a b) of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
Trackers = Annotated[
    list,
    Check(
        lambda names: (
            names in ("none", "all", ["none"], ["all"])
            or all(map(_is_tracker, names if isinstance(names, list) else [names]))
        ),
        _TRACKERS,
        (TEXT, [TEXT]),
    ),
]

HONOURED: dict[str, Any] = {
    # how much
    "output_dir": Text | None,
    "max_steps": Annotated[int, Check(lambda n: n == -1 or 1 <= n <= 10**9, "a whole number from 1 on, or -1 "
        "to use num_train_epochs", int)],
    "num_train_epochs": Positive,
    "per_device_train_batch_size": Count,
    "gradient_accumulation_steps": Count,
    # how it learns
    "learning_rate": Rate,
    "lr_scheduler_type": Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
        "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay",
    ],
    "lr_scheduler_kwargs": dict[str, float | str | None] | None,
    "warmup_steps": Annotated[float, Check(lambda n: 0 <= n < 1 or _is_count(n), _STEPS, float)],
    "optim": Literal["adamw_torch", "adamw_torch_fused", "adafactor", "adagrad", "rmsprop", "sgd"],
    "weight_decay": NotNegative,
    "adam_beta1": Share,
    "adam_beta2": Share,
    "adam_epsilon": Positive,
    "max_grad_norm": Annotated[float, Check(lambda n: n == math.inf or fits(n, NOT_NEGATIVE), "a number, 0 or more (0 and inf: no limit)", float)],
    "average_tokens_across_devices": bool,
    "seed": Seed,
    "data_seed": Seed | None,
    "full_determinism": bool,
    # numbers and memory
    "bf16": bool,
    "tf32": bool | None,
    "use_cpu": bool,
    "activation_checkpointing": Recomputed | None,
    "activation_checkpointing_kwargs": Recomputing | None,
    "gradient_checkpointing": Recomputed | None,
    "gradient_checkpointing_kwargs": Recomputing | None,
    "torch_empty_cache_steps": Count | None,
    "use_liger_kernel": bool,
    # processes
    "deepspeed": Annotated[Any, (DEEPSPEED, Check(lambda text: "{" not in text, "the name of a file", TEXT), None)],
    "ddp_backend": Literal["nccl", "gloo", "mpi", "xccl", "hccl", "cncl", "mccl"] | None,
    "ddp_broadcast_buffers": bool | None,
    "ddp_bucket_cap_mb": Count | None,
    "ddp_find_unused_parameters": bool | None,
    "ddp_static_graph": bool | None,
    "ddp_timeout": Count,
    "local_rank": Annotated[int, whole(-1)],
    # data
    "dataloader_multiprocessing_context": Literal["fork", "spawn", "forkserver"] | None,
    "dataloader_num_workers": Annotated[int, whole(0, 1024)],
    "dataloader_persistent_workers": bool,
    "dataloader_pin_memory": bool,
    "dataloader_prefetch_factor": Count | None,
    "remove_unused_columns": bool,
    # validation, checkpoints
    "eval_strategy": IntervalStrategy,
    "eval_steps": Steps | None,
    "eval_delay": NotNegative,
    "eval_on_start": bool,
    "per_device_eval_batch_size": Count,
    "prediction_loss_only": bool,
    "save_strategy": IntervalStrategy,
    "save_steps": Steps,
    "save_total_limit": Count | None,
    "do_train": bool,
    "do_eval": bool,
    # logs
    "logging_strategy": IntervalStrategy,
    "logging_steps": Steps,
    "logging_first_step": bool,
    "logging_nan_inf_filter": bool,
    "log_level": Literal["detail", "debug", "info", "warning", "error", "critical", "passive"],
    "log_level_replica": Literal["detail", "debug", "info", "warning", "error", "critical", "passive"],
    "log_on_each_node": bool,
    "include_num_input_tokens_seen": Literal["all", "non_padding", "no"] | bool,
    "skip_memory_metrics": bool,
    "disable_tqdm": bool | None,
    "report_to": Trackers | None,
    "run_name": Text | None,
    "project": Text,
    "trackio_space_id": Text | None,
    "trackio_bucket_id": Text | None,
    "trackio_static_space_id": Text | Literal[False] | None,
}  # fmt: skip

_METRICS = "validation only computes the loss"
_BEST = "choose among the checkpoints by log.jsonl"
_FUSED = "use_liger_kernel: true fuses rope, RMSNorm and SwiGLU on a GPU"
_HUB = "hf upload NAME OUTPUT_DIR"
_SAME_RUN = "the same command resumes data and model from the newest checkpoint in output_dir"
_ORDER = "every epoch has all samples, in an order set by seed and epoch; see group_by_modality_length"

INSTEAD = {
    "accelerator_config": _ORDER,
    "auto_find_batch_size": "global_batch_size with a smaller per_device_train_batch_size takes the same steps",
    "batch_eval_metrics": _METRICS,
    "bf16_full_eval": "validation computes as training does",
    "dataloader_drop_last": _ORDER,
    "dataloader_in_order": _ORDER,
    "debug": "log_level, --traceback",
    "do_predict": "python -m llava_sp.eval scores a model",
    "enable_jit_checkpoint": _SAME_RUN,
    "eval_accumulation_steps": _METRICS,
    "eval_do_concat_batches": _METRICS,
    "eval_use_gather_object": _METRICS,
    "fp16": "use bf16, or neither for float32",
    "fp16_full_eval": "validation computes as training does",
    "fsdp": "use deepspeed (configs/deepspeed/zero2.json or zero3.json)",
    "fsdp_config": "use deepspeed (configs/deepspeed/zero2.json or zero3.json)",
    "greater_is_better": _BEST,
    "hub_always_push": _HUB,
    "hub_model_id": _HUB,
    "hub_private_repo": _HUB,
    "hub_revision": _HUB,
    "hub_strategy": _HUB,
    "hub_token": _HUB,
    "ignore_data_skip": _SAME_RUN,
    "include_for_metrics": _METRICS,
    "label_names": "the conversation template sets the labels",
    "label_smoothing_factor": "the loss covers the learned tokens; Trainer would compare them with the wrong logits",
    "length_column_name": _ORDER,
    "liger_kernel_config": _FUSED,
    "load_best_model_at_end": _BEST,
    "metric_for_best_model": _BEST,
    "neftune_noise_alpha": "lora_dropout",
    "optim_args": "adam_beta1, adam_beta2 and adam_epsilon are separate keys",
    "optim_target_modules": "lora_target_modules",
    "parallelism_config": "use deepspeed (configs/deepspeed/zero3.json)",
    "push_to_hub": _HUB,
    "restore_callback_states_from_checkpoint": _SAME_RUN,
    "resume_from_checkpoint": _SAME_RUN,
    "save_on_each_node": "all nodes share output_dir",
    "save_only_model": "a run cannot resume from such a checkpoint",
    "torch_compile": _FUSED,
    "torch_compile_backend": _FUSED,
    "torch_compile_mode": _FUSED,
    "train_sampling_strategy": _ORDER,
    "use_cache": "training needs no cache",
}

FORMER = {  # names in other versions and in LLaVA's scripts
    "evaluation_strategy": "eval_strategy",
    "fp16_backend": "bf16",
    "group_by_length": "group_by_modality_length",
    "half_precision_backend": "bf16",
    "lora_enable": "stage",
    "mm_projector_lr": "projector_lr",
    "mm_vision_select_layer": "vision_feature_layer",
    "model_name_or_path": "language_model",
    "no_cuda": "use_cpu",
    "pretrain_mm_mlp_adapter": "projector_checkpoint",
    "tune_mm_mlp_adapter": "stage",
    "version": "conversation_template",
    "warmup_ratio": "warmup_steps",  # below 1 it is a share
}

# A key has no effect, or Trainer rejects it, without at least one of these.
NEEDS = {
    "dataloader_multiprocessing_context": ("dataloader_num_workers",),
    "dataloader_persistent_workers": ("dataloader_num_workers",),
    "dataloader_prefetch_factor": ("dataloader_num_workers",),
    "do_eval": ("eval_data_path", "validation_fraction"),
    "eval_image_folder": ("eval_data_path",),
    "eval_on_start": ("eval_data_path", "validation_fraction"),
    "eval_strategy": ("eval_data_path", "validation_fraction"),
    "pack_length": ("packing",),
    "packing": ("global_batch_size",),
}


def allowed(default: Any, instead: str) -> Check:
    """The schema of a key that is not honoured."""
    return Check(lambda value: value == default, f"its default, {json.dumps(default)} ({instead})")
