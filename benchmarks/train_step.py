"""Training steps of stage 2 beside what else one would run: useful tokens/s, memory, MFU, and that the losses are equal.

    python benchmarks/train_step.py                        a small model at real lengths, float32, on the CPU
    python benchmarks/train_step.py --size 7b              Vicuna-7B's and CLIP-L/14-336's shapes, bfloat16, on the first GPU
    python benchmarks/train_step.py --ways transformers padded packed

In one process, on the same weights (`spatial_variant: none`, so that transformers' own LLaVA is the same function), the same
samples and LoRA on all seven projections:

    transformers   `LlavaForConditionalGeneration` with its own loss, samples padded as they come
    trl            the same through TRL's SFTTrainer, if it is installed
    padded         this package, batches of one modality and of similar lengths (`group_by_modality_length`)
    packed         this package, `packing: true`
    packed+X       with activation checkpointing of all layers (recomputed), or torch.compile of the language model (compiled)

Lengths are drawn from LLaVA-665k's distribution (`benchmarks/packing.py`). Before the timing every way runs one step on the
same samples; its loss, over words alone (but for TRL, whose head is fused into its loss), and gradient norm are printed. Useful tokens are those that are not padding; MFU counts 4 FLOPs for each
weight of the language model (and LoRA) a useful token passes (weights that do not train need no gradient), over the rate of
a large matrix product measured in the same run. Repeats take turns; medians.
Peak memory is above what weights, gradients and optimizer take. Writes JSON to `benchmarks/results/`.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_sp.common.command import command_parser, count, run_command

if TYPE_CHECKING:
    import torch

WAYS = ("transformers", "trl", "padded", "packed", "packed+recomputed", "packed+compiled")
VOCABULARY = 32064
TOKENIZER = Path(__file__).parent.parent / "llava_sp/shapes/backbones/llama"
# size -> (language model, vision tower, dtype, samples per step, samples per padded batch, pack length, LoRA rank)
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any], str, int, int, int, int]] = {
    "tiny": (
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56},
        "float32", 4, 2, 2048, 8,
    ),
    "small": (
        {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8},
        {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 336},
        "float32", 16, 4, 4096, 32,
    ),
    "7b": ({}, {"image_size": 336}, "bfloat16", 128, 16, 16384, 128),
}  # fmt: skip
CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}


def build(size: str, device: str) -> Any:
    """This package's model with random weights and LoRA, made in place on the device."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig

    from llava_sp import LlavaSPConfig, LlavaSPForCausalLM
    from llava_sp.config.arguments import ModelArguments
    from llava_sp.train.build import add_lora
    from llava_sp.train.stages import apply_stage

    language, tower, dtype, *_, rank = SIZES[size]
    config = LlavaSPConfig(
        spatial_variant="none",
        text_config=LlamaConfig(vocab_size=VOCABULARY, pad_token_id=32001, max_position_embeddings=4096, **language),
        vision_config=CLIPVisionConfig(patch_size=14, **(CLIP_L | tower)),
        pad_token_id=32001,
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            model = LlavaSPForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    add_lora(model, ModelArguments(lora_r=rank, lora_alpha=2 * rank, lora_dropout=0.0))
    apply_stage(model, "finetune_lora")
    return model.train()


def transformers_llava(model: Any) -> Any:
    """transformers' own model on the same tensors; LoRA stays in the modules that are taken over."""
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        text_config=model.config.text_config,
        vision_config=model.config.vision_config,
        image_token_index=model.config.image_token_id,
        image_seq_length=model.config.num_image_tokens,
    )
    with torch.device("meta"):
        other = LlavaForConditionalGeneration(config)
    other.lm_head = model.lm_head
    other.model.vision_tower = model.model.vision_tower
    other.model.multi_modal_projector = model.model.multi_modal_projector
    other.model.language_model = model.model.language_model
    return other.train()


def drawn(count: int, seed: int) -> list[tuple[int, int, int]]:
    """(tokens of text, learned among them, images) of samples of LLaVA-665k; that half the text is learned is assumed."""
    import numpy as np
    from packing import IMAGE, mixture

    tokens, images = mixture()
    chosen = np.random.default_rng(seed).choice(len(tokens), count, replace=False)
    texts = (tokens - IMAGE * images)[chosen]
    return [(int(text), int(text) // 2, int(images[place])) for text, place in zip(texts, chosen, strict=True)]


def make_samples(count: int, seed: int, model: Any) -> list[dict[str, torch.Tensor]]:
    """Random tokens and pictures; lengths and the share of learned tokens are LLaVA-665k's."""
    import torch

    config, generator = model.config, torch.Generator().manual_seed(seed)
    samples = []
    for text, learned, images in drawn(count, seed):
        ids = torch.randint(3, 32000, (text,), generator=generator)
        labels = torch.where(torch.arange(text) < text - learned, -100, ids)
        sample = {"input_ids": ids, "labels": labels}
        if images:
            places = torch.full((config.num_image_tokens,), config.image_token_id)
            sample["input_ids"] = torch.cat([ids[:1], places, ids[1:]])
            sample["labels"] = torch.cat([labels[:1], torch.full_like(places, -100), labels[1:]])
            shape = (1, 3, config.image_size, config.image_size)
            sample["pixel_values"] = torch.randn(shape, generator=generator, dtype=model.dtype)
        samples.append(sample)
    return samples


def arrange(way: str, samples: Sequence[dict[str, torch.Tensor]], size: str, seed: int) -> list[list[dict]]:
    """The batches of each step, as a run of this kind has them."""
    import numpy as np

    from llava_sp.data.collator import Collator
    from llava_sp.data.packing import PackSampler
    from llava_sp.data.sampler import ModalityLengthSampler

    per_step, per_batch, pack_length = SIZES[size][3:6]
    collate = Collator(pad_token_id=32001)
    lengths = np.array([len(sample["input_ids"]) for sample in samples])
    images = np.array(["pixel_values" in sample for sample in samples])
    if way.startswith("packed"):
        sampler = PackSampler(lengths, images, per_step, pack_length, seed=seed)
        rows = [collate([[samples[place] for place in pack]]) for pack in sampler]
        return _chunks(rows, sampler.packs_per_step)
    if way == "padded":
        order = [*ModalityLengthSampler(np.where(images, lengths, -lengths), per_batch, per_step // per_batch, seed)]
    else:
        order = np.random.default_rng(seed).permutation(len(samples)).tolist()
    rows = [collate([samples[place] for place in places]) for places in _chunks(order, per_batch)]
    return _chunks(rows, per_step // per_batch)


def _chunks(items: Sequence[Any], size: int) -> list[Any]:
    return [items[start : start + size] for start in range(0, len(items), size)]


class Runner:
    """Steps of one way, on weights that all ways share."""

    def __init__(self, way: str, ours: Any, arguments: Namespace):
        import torch

        self.device, self.option = arguments.device, way.partition("+")[2]
        self.model = transformers_llava(ours) if way in ("transformers", "trl") else ours
        self.loss = sft_loss(self.model) if way == "trl" else self._plain_loss
        self.compiled = torch.compile(ours.model.language_model.forward, dynamic=True)  # runs when it is first called
        self.trained = [parameter for parameter in ours.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=0.0)  # the ways take turns on the same weights

    def _plain_loss(self, batch: dict[str, torch.Tensor], learned: int) -> torch.Tensor:
        return self.model(**batch, num_items_in_batch=learned, use_cache=False).loss

    def run(self, steps: Sequence[Sequence[dict[str, torch.Tensor]]]) -> tuple[float, float]:
        """(loss, norm of the gradients) of the last of these steps."""

        language = self.model.model.language_model
        if self.option == "recomputed":
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        elif self.option == "compiled":
            language.forward = self.compiled
        try:
            return [self._step(batches) for batches in steps][-1]
        finally:
            if self.option == "recomputed":
                self.model.gradient_checkpointing_disable()
            elif self.option == "compiled":
                del language.forward

    def _step(self, batches: Sequence[dict[str, torch.Tensor]]) -> tuple[float, float]:
        import torch

        learned = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        loss = 0.0
        for batch in batches:
            part = self.loss({name: tensor.to(self.device) for name, tensor in batch.items()}, learned)
            part.backward()
            loss += float(part.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(self.trained, 1e9))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss, norm


def sft_loss(model: Any) -> Any:
    """The loss of TRL's SFTTrainer for a batch that is collated already."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    folder = tempfile.mkdtemp()
    settings = SFTConfig(
        output_dir=folder,
        report_to="none",
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        activation_checkpointing=False,
        use_cpu=model.device.type == "cpu",
    )
    trainer = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list([{"input_ids": [1], "labels": [1]}]),
        processing_class=AutoTokenizer.from_pretrained(TOKENIZER),
        data_collator=list,
    )
    return lambda batch, learned: trainer.compute_loss(model, dict(batch), num_items_in_batch=learned)


def measure(arguments: Namespace) -> dict[str, Any]:
    """The rows of the table, and what they rest on."""
    from frame import GIB, peak_and_seconds

    ours = build(arguments.size, arguments.device)
    per_step = SIZES[arguments.size][3]
    runners = {way: Runner(way, ours, arguments) for way in arguments.ways}
    common = make_samples(per_step, 0, ours)
    samples = make_samples(per_step * arguments.steps, 1, ours)
    rate = product_rate(arguments.device, ours.dtype)
    weights = weights_per_token(ours)
    rows = []
    words = ours.lm_head.register_forward_hook(partial(_words_only, ours.config.image_token_id))
    for way, runner in runners.items():
        loss, norm = runner.run(arrange(way, common, arguments.size, 0))
        rows.append({"way": way, "loss": loss, "gradient_norm": norm, "seconds": [], "peak_gib": 0.0})
    words.remove()
    for _ in range(arguments.repeats):
        for row, runner in zip(rows, runners.values(), strict=True):
            steps = arrange(row["way"], samples, arguments.size, 1)
            peak, took = peak_and_seconds(partial(runner.run, steps), arguments.device)
            row["seconds"].append(took)
            row["peak_gib"] = max(row["peak_gib"], peak / GIB)
            row["padding"] = 1 - sum(map(useful, chain(*steps))) / sum(b["input_ids"].numel() for b in chain(*steps))
    tokens = sum(len(sample["input_ids"]) for sample in samples)
    for row in rows:
        row["tokens_per_second"] = tokens / statistics.median(row["seconds"])
        row["ratio"] = row["tokens_per_second"] / rows[0]["tokens_per_second"]
        row["mfu"] = 4 * weights * row["tokens_per_second"] / rate
    return {"rows": rows, "tokens": tokens, "weights": weights, "product_tflops": rate / 1e12}


def _words_only(first: int, _head: Any, _inputs: Any, logits: torch.Tensor) -> torch.Tensor:
    """This package gives no probability to rows of the head that are no words; for equal losses, nor may the others."""
    return logits.index_fill(-1, logits.new_tensor(range(first, logits.shape[-1])).long(), float("-inf"))


def useful(batch: dict[str, torch.Tensor]) -> int:
    """Tokens that are not padding."""
    mask = batch.get("attention_mask")
    return int(batch["input_ids"].numel() if mask is None else mask.sum())


def weights_per_token(model: Any) -> int:
    """Weights of the linear layers, with LoRA's, that a token passes in the language model."""
    from torch import nn

    layers = [*model.model.language_model.modules(), *model.lm_head.modules()]
    return sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear))


def product_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product: the best of five."""
    import torch
    from frame import seconds

    side = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / min(seconds(lambda: a @ b, device) for _ in range(5))


def main() -> int:
    parser = command_parser("", __doc__, usage="python benchmarks/train_step.py [options]")
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["transformers", "padded", "packed"])
    parser.add_argument("--steps", type=count, default=2, help="of a repeat")
    parser.add_argument("--repeats", type=count, default=3)
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/train_step_SIZE_DEVICE.json")
    options = parser.parse_args()
    return run_command(lambda: compare(options), traceback=options.traceback)


def compare(arguments: Namespace) -> None:
    """Measure, print the table and write the JSON."""
    from frame import device_of_size, write_results

    arguments.device = device_of_size(arguments.size, arguments.device)
    found = measure(arguments)
    columns = ("loss", "gradient norm", "padding", "useful tokens/s", "ratio", "MFU", "peak GiB")
    print(f"{'way':18}" + "".join(f"{column:>17}" for column in columns))
    for row in found["rows"]:
        print(
            f"{row['way']:18}{row['loss']:17.6f}{row['gradient_norm']:17.5f}{row['padding']:17.1%}"
            f"{row['tokens_per_second']:17,.0f}{row['ratio']:16.2f}x{row['mfu']:17.1%}{row['peak_gib']:17.2f}"
        )
    write_results(f"train_step_{arguments.size}", arguments, found)


if __name__ == "__main__":
    sys.exit(main())
