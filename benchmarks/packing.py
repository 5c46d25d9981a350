"""Packs against batches that are grouped by length and padded: padding left, time of the plan, useful tokens per second.

    python benchmarks/packing.py                  the plan for 665k samples, and training steps of a small model on a CPU
    python benchmarks/packing.py --steps 0        the plan only

The plan is made for the lengths of LLaVA-1.5's fine-tuning mixture as far as they are published: the samples of each part
(LLaVA-1.5, arXiv 2310.03744, table 7, and the files on the hub), one image of 582 tokens in all but ShareGPT, nothing over
2048 tokens, questions about the same image in one conversation (5.4 of VQAv2, 13 of GQA, 5 of OCR-VQA, 10 boxes of Visual
Genome). Text tokens follow from these numbers and, for LLaVA's own parts, from the sizes of their files (126, 20.5 and 79.6 MB).
The sum of the parts is compared with the size of the whole file, 1.03 GB. Within a part, lengths are log-normal (sigma 0.35,
ShareGPT 0.7), which is assumed.

The steps compare, in one process and in turns, on the same samples: batches of 16 as `group_by_modality_length` makes them; packs
with the dense mask of `sdpa`; packs with `sdpa_per_sample`. Loss and gradient norm of each step must agree. Random weights: two
layers of width 512 with LoRA 16, a narrow tower on 336 pixels; forward and backward, float32. Prints tables, writes JSON to
`benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from frame import machine
from transformers import CLIPVisionConfig, LlamaConfig

from llava_sp import LlavaSPConfig, LlavaSPForCausalLM
from llava_sp.config.arguments import ModelArguments
from llava_sp.data.collator import Collator
from llava_sp.data.packing import PackSampler
from llava_sp.data.sampler import ModalityLengthSampler
from llava_sp.model.packed_attention import PER_SAMPLE
from llava_sp.train.build import add_lora
from llava_sp.train.stages import apply_stage

IMAGE, LONGEST, TEMPLATE, ROUND = 582, 2048, 45, 10  # tokens; of the template's beginning, of a round's roles
# part: thousands of samples, rounds, tokens of text in a round
MIXTURE = {
    "LLaVA conversation": (58, 4.4, 90), "LLaVA detail": (23, 1, 165), "LLaVA reasoning": (77, 1, 195),
    "ShareGPT": (40.7, 3, 340), "VQAv2": (83, 5.4, 13), "GQA": (72, 13, 12), "OKVQA": (9, 1, 25), "OCR-VQA": (80, 5, 14),
    "A-OKVQA": (66, 1, 55), "TextCaps": (22, 1, 45), "RefCOCO": (48, 5, 42), "Visual Genome": (86, 10, 47),
}  # fmt: skip
TOTAL_BYTES = 1.03e9


def mixture(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, images) of each sample."""
    random, tokens, images = np.random.default_rng(seed), [], []
    for part, (thousands, rounds, each) in MIXTURE.items():
        count, has_image = round(1000 * thousands), part != "ShareGPT"
        sigma = 0.35 if has_image else 0.7
        text = TEMPLATE + rounds * (ROUND + each) * random.lognormal(-(sigma**2) / 2, sigma, count)
        tokens.append(np.minimum(text.astype(int) + IMAGE * has_image, LONGEST))
        images.append(np.full(count, int(has_image)))
    return np.concatenate(tokens), np.concatenate(images)


def estimated_bytes() -> float:
    """The size of the annotation file that the table implies: 4.2 bytes a token, 110 of keys a record, 45 a turn."""
    sizes = (1000 * n * (110 + rounds * (90 + 4.2 * each)) for n, rounds, each in MIXTURE.values())
    return sum(sizes)


def plans(tokens: np.ndarray, images: np.ndarray) -> list[dict]:
    """What is left of padding and waiting for several numbers of processes."""
    rows = []
    modality = np.where(images > 0, tokens - IMAGE, -tokens)
    for processes, length in ((1, 16384), (2, 16384), (8, 16384), (8, 8192)):
        started = time.perf_counter()
        packs = PackSampler(tokens, images, 128, length, processes)
        found = packs.summary(multiple=8)
        grouped = list(ModalityLengthSampler(modality, 16, 8))
        batches = [tokens[grouped[at : at + 16]] for at in range(0, len(grouped), 16)]
        padded = 1 - sum(map(np.sum, batches)) / sum(len(b) * b.max() for b in batches)
        rows.append({
            "processes": processes, "pack_length": length, "packs_per_step": packs.packs_per_step,
            "tokens_per_pack": round(found.tokens), "longest": found.longest, "padding": found.padding,
            "waiting": found.waiting, "grouped_padding": float(padded), "seconds": time.perf_counter() - started,
        })  # fmt: skip
    return rows


def small_model(seed: int = 0) -> LlavaSPForCausalLM:
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=336, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1376, num_hidden_layers=2, num_attention_heads=8
    )
    torch.manual_seed(seed)
    config = LlavaSPConfig(vision_config=vision, text_config=text, spatial_width=8, image_token_id=4000)
    model = LlavaSPForCausalLM(config)
    add_lora(model, ModelArguments(lora_r=16, lora_alpha=32, lora_dropout=0.0))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    apply_stage(model, "finetune_lora")
    return model.train()


def sample(tokens: int, images: int, seed: int) -> dict[str, torch.Tensor]:
    """Random text of which half is learned, behind the image."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 3900, (tokens,), generator=random)
    labels = ids.clone()
    labels[: TEMPLATE + IMAGE * images] = -100
    labels[torch.rand(tokens, generator=random) < 0.5] = -100
    labels[-1] = ids[-1]
    if not images:
        return {"input_ids": ids, "labels": labels}
    ids[5 : 5 + IMAGE] = 4000
    return {"input_ids": ids, "labels": labels, "pixel_values": torch.randn(1, 3, 336, 336, generator=random)}


def train_step(model: LlavaSPForCausalLM, batches: list[dict]) -> tuple[float, float, float]:
    """(loss, gradient norm, seconds) of forward and backward over the batches of a step."""
    model.zero_grad()
    learned = sum(int((batch["labels"][:, 1:] >= 0).sum()) for batch in batches)
    started, loss = time.perf_counter(), 0.0
    for batch in batches:
        part = model(**batch, num_items_in_batch=learned).loss
        part.backward()
        loss += part.item()
    seconds = time.perf_counter() - started
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    return loss, float(torch.stack(norms).norm()), seconds


def training_steps(tokens: np.ndarray, images: np.ndarray, steps: int, per_step: int, repeats: int) -> list[dict]:
    model = small_model()
    language = model.model.language_model
    chosen = np.random.default_rng(1).choice(len(tokens), 2000, replace=False)
    tokens, images = tokens[chosen], images[chosen]
    modality = np.where(images > 0, tokens - IMAGE, -tokens)
    order = list(ModalityLengthSampler(modality, 16, per_step // 16))
    collate = Collator(0)
    rows = []
    for step in range(steps):
        own = np.array(order[step * per_step : (step + 1) * per_step])
        samples = [sample(int(tokens[i]), int(images[i]), int(i)) for i in own]
        packs = PackSampler(tokens[own], images[own], per_step, 16384)
        methods = {
            "padded": ("sdpa", [collate(samples[at : at + 16]) for at in range(0, per_step, 16)]),
            "packed, dense mask": ("sdpa", [collate([[samples[i] for i in pack]]) for pack in packs]),
            "packed": (PER_SAMPLE, [collate([[samples[i] for i in pack]]) for pack in packs]),
        }
        times: dict[str, list[float]] = {name: [] for name in methods}
        outcome = {}
        for turn in range(repeats):
            for name, (attention, batches) in methods.items():
                if turn and name == "packed, dense mask":  # slow, and beside the point
                    continue
                language.set_attn_implementation(attention)
                loss, norm, seconds = train_step(model, batches)
                outcome[name] = (loss, norm)
                times[name].append(seconds)
        for name, (loss, norm) in outcome.items():
            expected = outcome["padded"]
            assert np.allclose((loss, norm), expected, rtol=1e-4), f"{name}: {loss}, {norm}; padded: {expected}"
            rows.append({
                "step": step, "method": name, "samples": per_step, "tokens": int(tokens[own].sum()), "loss": loss, "norm": norm,
                "tokens_computed": sum(batch["input_ids"].numel() for batch in methods[name][1]),
                "seconds": min(times[name]), "speedup": min(times["padded"]) / min(times[name]),
            })  # fmt: skip
            print(f"{step:>4}  {name:<20}{rows[-1]['tokens'] / min(times[name]):>10,.0f} useful tokens/s"
                  f"{1 - rows[-1]['tokens'] / rows[-1]['tokens_computed']:>8.1%} padding  loss {loss:.6f}  norm {norm:.5f}"
                  f"  x {rows[-1]['speedup']:.2f}", flush=True)  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--samples", type=int, default=16, help="in a step, a multiple of 16")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "packing_cpu.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokens, images = mixture()
    print(f"{len(tokens):,} samples, {tokens.mean():.0f} tokens on average; the table implies an annotation file of "
          f"{estimated_bytes() / 1e9:.2f} GB (published: {TOTAL_BYTES / 1e9:.2f})")  # fmt: skip
    planned = plans(tokens, images)
    print(f"{'processes':>9}{'pack_length':>12}{'packs/step':>11}{'tokens/pack':>12}{'longest':>9}{'padding':>9}{'waiting':>9}"
          f"{'grouped: padding':>18}{'seconds':>9}")  # fmt: skip
    for row in planned:
        print(f"{row['processes']:>9}{row['pack_length']:>12}{row['packs_per_step']:>11}{row['tokens_per_pack']:>12,}"
              f"{row['longest']:>9,}{row['padding']:>9.2%}{row['waiting']:>9.2%}{row['grouped_padding']:>18.1%}"
              f"{row['seconds']:>9.1f}")  # fmt: skip
    rows = training_steps(tokens, images, arguments.steps, arguments.samples, arguments.repeats)
    speedup = {
        name: statistics.median(row["speedup"] for row in rows if row["method"] == name)
        for name in {row["method"] for row in rows}
    }
    for name, ratio in sorted(speedup.items()):
        print(f"{name:<20} x {ratio:.2f} useful tokens/s")
    result = {"machine": machine("cpu"), "mixture": MIXTURE, "plans": planned, "steps": rows, "speedup": speedup}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
