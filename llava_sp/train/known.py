"""What a plan knows of GPUs, models and data before anything is loaded; those of the shipped recipes without network and files."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from llava_sp import LlavaSPConfig
    from llava_sp.config.arguments import Run

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

# Tokens of a text, from its words as white space separates them: Vicuna's on English, and what the template adds.
TOKENS_PER_WORD, TEMPLATE_TOKENS = 1.4, 45


@dataclass(frozen=True)
class Data:
    """The training data by estimate: `mean` and `longest` in tokens, `images` of a mean sample.

    `lengths` [samples] are negative for text alone, as `ModalityLengthSampler` has them; None if they are not known.
    """

    samples: int | None
    mean: float
    longest: int
    images: float
    most_images: int
    source: str
    lengths: np.ndarray | None = None


def gpu_of(name: str | None) -> tuple[str, Gpu]:
    """A GPU of the table, or for None the one here. Raises `ValueError` for an unknown name, or if none is here."""
    if name is not None:
        if name.lower() not in GPUS:
            raise ValueError(f"--gpu is {name!r}; it must be one of {', '.join(GPUS)}")
        return name.lower(), GPUS[name.lower()]
    import torch

    if not torch.cuda.is_available():
        raise ValueError(f"--gpu is not given, and there is no CUDA GPU here; it must be one of {', '.join(GPUS)}")
    title, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory / GIB
    like = [gpu for gpu in GPUS.values() if title.startswith(gpu.title) and abs(gpu.memory / memory - 1) < 0.1]
    if not like:
        raise ValueError(f"the peak of the GPU here, {title}, is not known; give a similar one: --gpu {'|'.join(GPUS)}")
    return title, dataclasses.replace(like[0], memory=memory)


def geometry_of(run: Run) -> LlavaSPConfig:
    from transformers import AutoConfig

    from llava_sp import LlavaSPConfig
    from llava_sp.model.backbone_configs import language_config, vision_config

    def known(name: str | None) -> Any:
        return AutoConfig.for_model(**GEOMETRY[name]) if name in GEOMETRY else None

    text: Any = known(run.model.language_model) or language_config(str(run.model.language_model))
    # two tokens are added, and rows up to a multiple of 64
    if text.vocab_size % 64 or text.vocab_size == 32000:
        text.vocab_size = -(-(text.vocab_size + 2) // 64) * 64
    tower = known(run.model.vision_tower) or vision_config(str(run.model.vision_tower))
    return LlavaSPConfig(
        text_config=text, vision_config=tower, image_token_index=text.vocab_size - 2, **run.model.projector
    )


def data_of(run: Run, config: LlavaSPConfig, assume: bool) -> Data:
    import numpy as np

    from llava_sp.data.mixture import load_mixture
    from llava_sp.data.sources import open_records

    data, limit, per_image = run.data, run.data.model_max_length, config.num_image_tokens
    name = Path(data.data_path or "").name
    if data.mixture or (data.data_path and Path(data.data_path).is_file() and not assume):
        sources = load_mixture(data.mixture or [{"annotations": data.data_path, "images": data.image_folder}])
        records = [open_records(source) for source in sources]
        weights = np.concatenate([np.full(len(r), s.weight) for r, s in zip(records, sources, strict=True)])
        images = np.concatenate([r.image_counts for r in records]).astype(float)
        lengths = token_estimate(
            np.concatenate([r.words for r in records]), images * per_image, limit, data.conversation_template
        )
        samples = round(float(weights.sum()) * (1 - data.validation_fraction))
        mean, shown = float(np.average(lengths, weights=weights)), float(np.average(images, weights=weights))
        source = f"{data.mixture or data.data_path}, lengths by estimate from its words"
        signed = np.where(images > 0, lengths, -lengths).astype(np.int64)
        return Data(samples, mean, int(lengths.max()), shown, int(images.max()), source, signed)
    if name in DATA:
        known, template = DATA[name], data.conversation_template
        share = known.with_image / known.samples
        mean, most = (
            float(token_estimate(np.array([n]), images * per_image, limit, template)[0])
            for n, images in zip(known.words, (share, 1.0), strict=True)
        )
        there = (
            "published counts"
            if assume
            else f"{data.data_path} is not there; the published counts of {name} are assumed"
        )
        return Data(known.samples, mean, int(most), share, 1, there)
    what = f"{data.data_path} is not there" if data.data_path else "data_path is not set"
    return Data(None, limit, limit, 1.0, 1, f"{what}; samples of model_max_length with an image are assumed")


def token_estimate(words: np.ndarray, image_tokens: np.ndarray | float, limit: int, template: str) -> np.ndarray:
    """Tokens of samples by their words, cut at the limit."""
    import numpy as np

    around = 2 if template == "plain" else TEMPLATE_TOKENS
    return np.minimum(np.ceil(words * TOKENS_PER_WORD) + around + image_tokens, limit)
