"""The model of a run, from its arguments; processor and data come from `llava_sp.data.build`."""

from __future__ import annotations

import logging
import re
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from llava_sp import LlavaSPForCausalLM
from llava_sp.checkpoints.opening.adapter import load_projector
from llava_sp.checkpoints.opening.warm_start import start_from
from llava_sp.config.arguments import ModelArguments, Run, TrainArguments
from llava_sp.model.packed_attention import PER_SAMPLE, can_attend_per_sample
from llava_sp.train.kernels import use_liger
from llava_sp.train.stages import STAGES, apply_stage, table

SCRATCH = "scratch"
LANGUAGE_ONLY = ("flex_attention", PER_SAMPLE)  # attention implementations that the tower's few tokens do not need
logger = logging.getLogger(__name__)


def build_model(run: Run) -> LlavaSPForCausalLM:
    """Backbones, LoRA if the stage trains it, projector (fresh, a warm start's patch MLP, or stage 1's whole one); frozen as
    the stage requires."""
    arguments, args = run.model, run.train
    attention = arguments.attn_implementation
    options = {"attn_implementation": attention} if attention and attention not in LANGUAGE_ONLY else {}
    model = LlavaSPForCausalLM.from_backbones(
        language_model=arguments.language_model,
        vision_tower=arguments.vision_tower,
        **arguments.projector,
        dtype=torch.bfloat16 if args.bf16 else torch.float32,
        seed=args.seed,
        **options,
    )
    language = model.model.language_model
    if attention in LANGUAGE_ONLY:
        language.set_attn_implementation(str(attention))
    elif attention is None and run.data.packing and can_attend_per_sample(language):
        language.set_attn_implementation(PER_SAMPLE)
    if "lora" in STAGES[args.stage]:
        add_lora(model, arguments, args.seed)
    if arguments.warm_start is not None:
        parts = start_from(model, arguments.warm_start, check_base=arguments.check_base)
        logger.info("Starting from %s: its %s.", arguments.warm_start, " and ".join(parts))
    if arguments.projector_checkpoint not in (None, SCRATCH):
        load_projector(model, arguments.projector_checkpoint, check_base=arguments.check_base)
        logger.info("The projector starts from %s.", arguments.projector_checkpoint)
    prepare_stage(model, args)
    if args.use_liger_kernel:
        use_liger(model)
        args.use_liger_kernel = False  # Trainer's own does not know our model, and gives models another argument
    return model


def add_lora(model: LlavaSPForCausalLM, arguments: ModelArguments, seed: int = 0) -> None:
    """LoRA on the named linear layers of the language model, nowhere else; the same weights for the same seed.

    Raises ValueError for a name that the language model does not have, and a rank that none of its layers can have.
    """
    linear: dict[str, int] = {}  # name -> the largest rank that a layer of this name can have
    for name, module in model.model.language_model.named_modules():
        if isinstance(module, nn.Linear):
            leaf = name.rsplit(".", 1)[-1]
            linear[leaf] = max(linear.get(leaf, 0), min(module.in_features, module.out_features))
    unknown = [name for name in arguments.lora_target_modules if name not in linear]
    if unknown:
        raise ValueError(f"lora_target_modules names {', '.join(unknown)}; the model has {', '.join(sorted(linear))}")
    largest = max((linear[name] for name in arguments.lora_target_modules), default=arguments.lora_r)
    if arguments.lora_r > largest:
        raise ValueError(f"lora_r is {arguments.lora_r}; it must be at most {largest}, the largest rank of a layer")
    leaves = "|".join(map(re.escape, arguments.lora_target_modules))
    config = LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=rf"model\.language_model\..*\.({leaves})",
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):  # ZeRO-3 has drawn other numbers before than a single process
        torch.manual_seed(seed)
        model.add_adapter(config)


def autocast_casts_back(run: Run) -> bool:
    """Whether PEFT's cast of each LoRA layer's input to float32 is for nothing, as autocast makes it bfloat16 again.

    With dropout only on a GPU: on a CPU it rounds 1 / (1 - p) to the input's number format.
    """
    exact = run.model.lora_dropout == 0 or run.train.device.type == "cuda"
    return run.train.bf16 and not run.train.deepspeed and exact


def prepare_stage(model: LlavaSPForCausalLM, args: TrainArguments) -> None:
    """Freeze, keep the frozen tower in evaluation mode, cast trained parameters to float32, and log the table."""
    apply_stage(model, args.stage)
    tower = model.model.vision_tower
    if not any(parameter.requires_grad for parameter in tower.parameters()):
        tower.register_forward_pre_hook(_keep_evaluating)
    if not args.deepspeed:  # DeepSpeed keeps its own float32 copies
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    for line in [f"Stage {args.stage}:", *table(model, args.stage, args.rates)]:
        logger.info(line)


def _keep_evaluating(module: nn.Module, _inputs: Any) -> None:
    """A frozen tower has no dropout, even after `model.train()`."""
    if module.training:
        module.eval()
