"""What `--plan` knows without asking anyone: GPUs, the geometry of the recipe's backbones, the size of its data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """Memory in GiB as torch reports it, and the dense bf16 peak (float32 accumulation) in TFLOP/s."""

    title: str
    memory: float
    teraflops: float


# Peaks: NVIDIA's data sheets, without sparsity. Memory: `torch.cuda.get_device_properties(0).total_memory`, a little less
# than the data sheet's.
GPUS = {
    "b200": Gpu("NVIDIA B200", 178.3, 2250),
    "h200": Gpu("NVIDIA H200", 139.8, 989),
    "h100": Gpu("NVIDIA H100 SXM", 79.1, 989),
    "h100-pcie": Gpu("NVIDIA H100 PCIe", 79.1, 756),
    "a100-80": Gpu("NVIDIA A100 80 GB", 79.1, 312),
    "a100-40": Gpu("NVIDIA A100 40 GB", 39.4, 312),
    "a6000-48": Gpu("NVIDIA RTX A6000", 47.4, 155),
    "l40s-48": Gpu("NVIDIA L40S", 44.4, 362),
    "a10-24": Gpu("NVIDIA A10", 22.0, 125),
    "l4-24": Gpu("NVIDIA L4", 22.0, 121),
    "5090-32": Gpu("NVIDIA GeForce RTX 5090", 31.4, 209),
    "4090-24": Gpu("NVIDIA GeForce RTX 4090", 23.6, 165),
    "3090-24": Gpu("NVIDIA GeForce RTX 3090", 23.6, 71),
}

_VICUNA: dict[str, Any] = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096}
# config.json of the backbones that configs/ names, as far as it sets shapes
GEOMETRY: dict[str, dict[str, Any]] = {
    "lmsys/vicuna-7b-v1.5": _VICUNA
    | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "lmsys/vicuna-13b-v1.5": _VICUNA
    | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "openai/clip-vit-large-patch14-336": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    },
}


@dataclass(frozen=True)
class KnownData:
    """Published counts of an annotation file; `words` are the mean and the most of a sample, as white space separates them."""

    samples: int
    with_image: int
    words: tuple[int, int]


# Samples: LLaVA-1.5 (arXiv 2310.03744), tables 7 and 8, and the files' own lengths. Words: rounded; ShareGPT's longest
# conversations go beyond every length limit.
DATA = {
    "llava_v1_5_mix665k.json": KnownData(665_298, 624_610, (150, 4000)),
    "blip_laion_cc_sbu_558k.json": KnownData(558_128, 558_128, (20, 60)),
}
