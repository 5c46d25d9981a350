"""The estimate of a step's memory against what torch's allocator gave: by its profiler on a CPU, by its statistics on a GPU."""

from __future__ import annotations

import gc

import pytest
import torch
from peft.helpers import disable_input_dtype_casting
from torch.profiler import ProfilerActivity, profile

from llava_sp import LlavaSPConfig, LlavaSPForCausalLM
from llava_sp.config.arguments import ModelArguments
from llava_sp.train.budget import CONTEXT, GAPS, Budget, Sharding
from llava_sp.train.build import add_lora
from llava_sp.train.memory import Batch, Setting, StepTrace
from llava_sp.train.stages import apply_stage, by_part, count

WITHIN = 0.1
LLAMA = {"model_type": "llama", "num_attention_heads": 4, "vocab_size": 2048}
# sliding and full layers take turns: run at full depth
GEMMA = {
    "model_type": "gemma2",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 2048,
}
QWEN = {
    "model_type": "qwen2",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
    "tie_word_embeddings": True,
}


def config(text: dict = LLAMA, width: int = 128, layers: int = 6, side: int = 112) -> LlavaSPConfig:
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
    return LlavaSPConfig(
        text_config={**text, **sizes},
        vision_config={"model_type": "clip_vision_model", **tower, "image_size": side, "patch_size": 14},
        image_token_index=2046,
        pad_token_id=2047,
        tie_word_embeddings=text.get("tie_word_embeddings", False),
    )


def lora(dropout: float = 0.05, r: int = 16) -> ModelArguments:
    return ModelArguments(lora_r=r, lora_alpha=2 * r, lora_dropout=dropout)


def build(
    sizes: LlavaSPConfig, arguments: ModelArguments, setting: Setting, every: int | None, device: str = "cpu"
) -> LlavaSPForCausalLM:
    """The model as `train.build` leaves it."""
    torch.manual_seed(0)
    with torch.device(device):
        model = LlavaSPForCausalLM(sizes).to(torch.bfloat16 if setting.bf16 else torch.float32)
    if setting.stage == "finetune_lora":
        add_lora(model, arguments)
    apply_stage(model, setting.stage)
    for parameter in model.parameters():
        if parameter.requires_grad and not setting.deepspeed:
            parameter.data = parameter.data.float()
    model.train()
    model.model.vision_tower.eval()
    if every:
        model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)
    return model


def inputs_of(sizes: LlavaSPConfig, batch: Batch, device: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 1000, (batch.rows, batch.tokens))
    per_image, side = sizes.num_image_tokens, sizes.image_size
    for image in range(batch.images):
        start = 1 + per_image * (image // batch.rows)
        ids[image % batch.rows, start : start + per_image] = sizes.image_token_id
    labels = torch.full_like(ids, -100)
    labels[:, -(batch.learned // batch.rows) :] = 5
    mask = torch.ones_like(ids)
    mask[0, -1] = 0 if batch.masked else 1
    inputs = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    if batch.images:
        inputs["pixel_values"] = torch.randn(batch.images, 3, side, side)
    return {name: value.to(device) for name, value in inputs.items()}


def step(model: LlavaSPForCausalLM, inputs: dict[str, torch.Tensor], setting: Setting) -> None:
    device = model.device.type
    own = {name: value.clone() for name, value in inputs.items()}
    autocast = setting.bf16 and not setting.deepspeed
    with disable_input_dtype_casting(model, autocast and device == "cuda"):  # as a run does
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            loss = model(**own).loss
        own.clear()
        loss.backward()


def allocated(action) -> int:
    """The most bytes that an action has allocated beyond what there was, by the CPU allocator's own events."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        action()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


CASES = {
    "LoRA, float32": ("finetune_lora", LLAMA, None, Batch(2, 200, 2, 80), False),
    "LoRA, all layers again": ("finetune_lora", LLAMA, 1, Batch(2, 300, 2, 80), False),
    "LoRA, every second, bf16": ("finetune_lora", LLAMA, 2, Batch(3, 200, 3, 120), True),
    "LoRA, every fourth": ("finetune_lora", LLAMA, 4, Batch(1, 400, 2, 80, masked=False), False),
    "LoRA, only text, bf16": ("finetune_lora", LLAMA, None, Batch(1, 400, 0, 300, masked=False), True),
    "pretraining, bf16": ("pretrain", LLAMA, None, Batch(4, 120, 4, 80), True),
    "pretraining, all layers again": ("pretrain", LLAMA, 1, Batch(2, 200, 2, 40), False),
    "grouped queries, tied head": ("finetune_lora", QWEN, None, Batch(2, 150, 2, 80), False),
    "layers of two kinds": ("finetune_lora", GEMMA, 2, Batch(2, 150, 2, 80), False),
}


@pytest.mark.parametrize("case", CASES)
def test_a_pass_takes_what_was_estimated(case):
    stage, text, every, batch, bf16 = CASES[case]
    sizes, setting = config(text, layers=4 if text is GEMMA else 6), Setting(stage, bf16, kind="cpu")
    model = build(sizes, lora(), setting, every)
    inputs = inputs_of(sizes, batch, "cpu")
    step(model, inputs, setting)  # caches are filled
    model.zero_grad()
    measured = allocated(lambda: step(model, inputs, setting))
    assert StepTrace(sizes, lora(), batch, setting).peak(every).total == pytest.approx(measured, rel=WITHIN)


@pytest.mark.parametrize("r, rows, accumulated", [(4, 1, False), (64, 1, True), (64, 3, False)])
def test_a_run_takes_what_was_estimated(r, rows, accumulated):
    """Weights, gradients and optimizer too, in the step that takes most."""
    sizes, batch = config(width=96), Batch(rows, 100, rows, 20 * rows)
    setting = Setting("finetune_lora", False, accumulated=accumulated, kind="cpu")
    model = build(sizes, lora(r=r), setting, None)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    inputs = inputs_of(sizes, batch, "cpu")

    def run() -> None:
        for _ in range(2):
            for _ in range(1 + accumulated):
                step(model, inputs, setting)
            optimizer.step()
            optimizer.zero_grad()

    measured = sum(parameter.nbytes for parameter in model.parameters()) + allocated(run)
    budget = Budget.of(StepTrace(sizes, lora(r=r), batch, setting), Sharding(), "adamw_torch")
    assert budget.total(None) == pytest.approx(measured, rel=WITHIN)
    assert sum(budget.kinds(None).values()) == budget.total(None)


@pytest.mark.parametrize("text", [LLAMA, QWEN, GEMMA], ids=lambda text: text["model_type"])
def test_parameters_are_those_of_the_whole_model(text):
    sizes, setting = config(text, layers=5), Setting("finetune_lora", kind="cpu")
    trace = StepTrace(sizes, lora(), Batch(1, 100, 1, 10), setting)
    model = build(sizes, lora(), setting, None)
    assert trace.counts == {part: sum(map(count, found.values())) for part, found in by_part(model).items()}
    assert trace.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_less_memory_means_more_recomputation():
    trace = StepTrace(config(layers=12), lora(), Batch(2, 300, 2, 60), Setting("finetune_lora", False, kind="cpu"))
    budget = Budget.of(trace, Sharding(), "adamw_torch")
    needed = {every: budget.total(every) for every in (None, 12, 6, 4, 3, 2, 1)}
    assert list(needed.values()) == sorted(needed.values(), reverse=True) and needed[None] > 2 * needed[1]
    enough = {every: GAPS * size + CONTEXT + 1 for every, size in needed.items()}
    for every, memory in enough.items():
        chosen = budget.least_recomputation(memory)
        assert sum(trace.recomputed(chosen)) == sum(trace.recomputed(every))
    assert budget.least_recomputation(0) == 1


def test_zero_divides_what_it_should():
    trace = StepTrace(config(), lora(), Batch(2, 200, 2, 80), Setting("finetune_lora", deepspeed=True))
    trained, total = trace.trained, sum(trace.counts.values())
    of = {
        (stage, n): Budget.of(trace, Sharding(n, stage, live=0), "adamw_torch")
        for stage in (0, 1, 2, 3)
        for n in (1, 8)
    }
    for n in (1, 8):
        assert [of[stage, n].weights for stage in (0, 2, 3)] == [2 * total, 2 * total, 2 * total // n]
        assert [of[stage, n].gradients for stage in (0, 1, 2)] == [2 * trained, 2 * trained, 2 * (trained // n)]
        assert [of[stage, n].optimizer for stage in (0, 2, 3)] == [12 * trained, *[12 * (trained // n)] * 2]
    both = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    offloaded = Budget.of(trace, Sharding.of({"zero_optimization": both}, 8, 128), "adamw_torch")
    assert offloaded.optimizer == 0 and offloaded.weights == 2 * min(total, 10**9)


def test_a_frozen_tower_keeps_no_graph():
    """PEFT with activation checkpointing has every embedding's output require gradients, the tower's too."""
    sizes, setting = config(), Setting("finetune_lora", False)
    model = build(sizes, lora(), setting, 1)
    pixels = torch.randn(1, 3, sizes.image_size, sizes.image_size)
    assert not model.model.get_patch_features(pixels).requires_grad
    assert model.model.get_patch_features(pixels.requires_grad_()).requires_grad
    model.model.vision_tower.requires_grad_(True)
    assert model.model.get_patch_features(pixels.detach()).requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("deepspeed", [False, True], ids=["autocast", "bf16 weights"])
@pytest.mark.parametrize("every", [None, 2, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_a_gpu_takes_what_was_estimated(every, deepspeed, masked):
    sizes = config(width=1024, layers=8, side=224)
    setting = Setting("finetune_lora", deepspeed=deepspeed)
    batch = Batch(4, 700, 4, 400, masked)
    model = build(sizes, lora(r=64), setting, every, "cuda")
    inputs = inputs_of(sizes, batch, "cuda")
    if deepspeed:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    step(model, inputs, setting)
    model.zero_grad()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(model, inputs, setting)
    measured = torch.cuda.max_memory_allocated() - before
    assert StepTrace(sizes, lora(r=64), batch, setting).peak(every).total == pytest.approx(measured, rel=WITHIN)
