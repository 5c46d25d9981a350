"""One training step and one generation at real size with random weights: time, tokens/s, memory.

    python benchmarks/real_size.py                         7B + CLIP-L/14-336 + spatial branch, bf16, on the first GPU
    python benchmarks/real_size.py --size tiny             the same code on a CPU, to see that it works

For each variant in one process and one run, beside the baseline `none` (LLaVA-1.5): a LoRA training step as stage 2 does it
(r 128, gradient checkpointing, AdamW on LoRA and projector, 582 + 118 tokens a sample), and greedy generation for batches of
prompts: milliseconds to the first token, and tokens/s after it. Prints tables with ratios against `none` and writes JSON to
`benchmarks/results/`.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_sp.common.command import command_parser, run_command

if TYPE_CHECKING:
    import torch

    from llava_sp import LlavaSPForCausalLM

TEXT_TOKENS = 118
TINY = {
    "text_config": {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 32064,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 168,
        "patch_size": 14,
    },
}
REAL = {"text_config": {"model_type": "llama", "vocab_size": 32064, "pad_token_id": 32001}}


def build(variant: str, size: str, device: str, dtype: torch.dtype) -> LlavaSPForCausalLM:
    """A model with random weights, made in place on the device."""
    import torch

    from llava_sp import LlavaSPConfig, LlavaSPForCausalLM

    backbones: dict[str, Any] = {"pad_token_id": 32001, **(TINY if size == "tiny" else REAL)}
    config = LlavaSPConfig(spatial_variant=variant, **backbones)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlavaSPForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    model.generation_config.pad_token_id = 32001
    return model


def make_batch(model: Any, size: int, device: str) -> dict[str, torch.Tensor]:
    import torch

    config = model.config
    text = torch.randint(3, 32000, (size, TEXT_TOKENS), device=device)
    images = torch.full((size, config.num_image_tokens), config.image_token_id, device=device)
    side = config.image_size
    return {
        "input_ids": torch.cat([text[:, :40], images, text[:, 40:]], dim=1),
        "pixel_values": torch.randn(size, 3, side, side, device=device, dtype=model.dtype),
    }


def median_seconds(action, repeats: int, device: str) -> float:
    import torch

    action()
    times = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        action()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(variant: str, arguments: Namespace) -> dict:
    import torch

    from llava_sp.config.arguments import ModelArguments
    from llava_sp.train.build import add_lora
    from llava_sp.train.stages import apply_stage

    device = arguments.device

    def peak_gib() -> float | None:
        return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model: Any = build(variant, arguments.size, device, torch.bfloat16)
    row = {"variant": variant, "parameters": sum(p.numel() for p in model.parameters())}

    model.eval()
    row["generate"] = []
    for size in arguments.generate_batch:
        batch = make_batch(model, size, device)
        seconds = {
            count: median_seconds(
                lambda: model.generate(**batch, max_new_tokens=count, min_new_tokens=count, do_sample=False),  # noqa: B023
                arguments.repeats,
                device,
            )
            for count in (1, arguments.new_tokens)
        }
        after = seconds[arguments.new_tokens] - seconds[1]
        row["generate"].append(
            {
                "batch": size,
                "first_token_ms": 1e3 * seconds[1],
                "tokens_per_second": size * (arguments.new_tokens - 1) / after,
                "peak_gib": peak_gib(),
            }
        )

    add_lora(model, ModelArguments(lora_r=128 if arguments.size == "7b" else 8, lora_alpha=256, lora_dropout=0.0))
    apply_stage(model, "finetune_lora")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(trained, lr=2e-5)
    batch = make_batch(model, arguments.train_batch, device)
    labels = batch["input_ids"].clone()
    labels[:, : -TEXT_TOKENS // 2] = -100

    def step() -> None:
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = median_seconds(step, arguments.repeats, device)
    row["train"] = {
        "seconds": seconds,
        "samples_per_second": arguments.train_batch / seconds,
        "tokens_per_second": batch["input_ids"].numel() / seconds,
        "trained_parameters": sum(p.numel() for p in trained),
        "peak_gib": peak_gib(),
    }
    return row


def main() -> int:
    parser = command_parser("", __doc__, usage="python benchmarks/real_size.py [options]")
    parser.add_argument("--size", choices=["7b", "tiny"], default="7b")
    parser.add_argument("--variants", nargs="+", default=["none", "cropping", "pooling"])
    parser.add_argument("--train-batch", type=int, default=16)
    parser.add_argument("--generate-batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", help="cuda or cpu; default: cuda if there is one")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    return run_command(lambda: compare(options), traceback=options.traceback)


def compare(arguments: Namespace) -> None:
    """Measure the variants, print the tables and write the JSON."""
    import torch
    from frame import device_of_size, write_results

    arguments.device = device_of_size(arguments.size, arguments.device)
    rows: list[dict[str, Any]] = []
    for variant in arguments.variants:
        rows.append(measure(variant, arguments))
        gc.collect()
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
    base = rows[0]
    print(f"{'variant':10} {'train samples/s':>16} {'ratio':>7} {'tokens/s':>10} {'peak GiB':>9}")
    for row in rows:
        train, ratio = row["train"], row["train"]["samples_per_second"] / base["train"]["samples_per_second"]
        cells = f"{train['samples_per_second']:16.2f} {ratio:6.3f}x {train['tokens_per_second']:10,.0f}"
        print(f"{row['variant']:10} {cells} {train['peak_gib'] or 0:9.1f}")
    print(
        f"{'variant':10} {'batch':>5} {'first token ms':>15} {'ratio':>7} {'tokens/s':>10} {'ratio':>7} {'peak GiB':>9}"
    )
    for row in rows:
        for one, of_base in zip(row["generate"], base["generate"], strict=True):
            first, after = (one[key] / of_base[key] for key in ("first_token_ms", "tokens_per_second"))
            cells = f"{one['first_token_ms']:15.1f} {first:6.3f}x {one['tokens_per_second']:10.1f} {after:6.3f}x"
            print(f"{row['variant']:10} {one['batch']:5} {cells} {one['peak_gib'] or 0:9.1f}")
    write_results(f"real_size_{arguments.size}", arguments, {"rows": rows})


if __name__ == "__main__":
    sys.exit(main())
