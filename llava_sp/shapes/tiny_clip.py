"""The tiny CLIP of the shapes world: a complete CLIPModel (text and vision towers) with tokenizer and image processor.

Trained like CLIP, images against captions, with one more term: every patch is matched against the phrases of the things
in the world ("a red circle", "the digit 7", "background"), so that patch features, and not only the pooled one, show what
stands where. Run by `python -m llava_sp.shapes.train_backbones`.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from llava_sp.shapes.language import caption, phrase, with_article
from llava_sp.shapes.world import COLORS, SHAPES, SIZE, Scene, draw, sample_scene

PATCH = 8
GRID = SIZE // PATCH
VISION = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
TEXT = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
PROJECTION = 64
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's own
STD = (0.26862954, 0.26130258, 0.27577711)
PHRASES = (
    "background",
    *(with_article(f"{color} {shape}") for color in COLORS for shape in SHAPES),
    *(f"the digit {value}" for value in range(10)),
)


@dataclass(frozen=True)
class Cycle:
    """One cycle of training: its steps, its highest rate, and the weight of patches that show handwriting."""

    steps: int
    rate: float
    handwriting: float


# Shapes first; then handwriting, which is the hardest and rare.
CYCLES = (Cycle(700, 2e-3, 1.0), Cycle(500, 1.5e-3, 3.0), Cycle(700, 1.5e-3, 8.0))


def phrase_grid(scene: Scene) -> np.ndarray:
    """Which phrase each patch shows, int64 [GRID, GRID]; a patch shows a thing when its centre lies within its box."""
    grid = np.zeros((GRID, GRID), dtype=np.int64)
    centres = (np.arange(GRID) + 0.5) * PATCH
    for thing in scene.things:
        rows = np.abs(centres - thing.y) <= thing.size / 2
        cols = np.abs(centres - thing.x) <= thing.size / 2
        grid[np.ix_(rows, cols)] = PHRASES.index(phrase(thing))
    return grid


def to_pixels(images: list) -> torch.Tensor:
    """PIL images of SIZE x SIZE -> normalised pixels [B, 3, SIZE, SIZE], as CLIP's image processor makes them."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def train_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """CLIP's byte-level BPE tokenizer with a vocabulary of the world's words."""
    tokenizer = CLIPTokenizer().train_new_from_iterator([*captions, *PHRASES], vocab_size=400)
    tokenizer.model_max_length = 77
    return tokenizer


def build(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A fresh CLIPModel; its text tower pools at the end token."""
    both = {"initializer_factor": 2.0, "projection_dim": PROJECTION}
    text = {**TEXT, **both, "vocab_size": len(tokenizer), "max_position_embeddings": 77}
    text |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    vision = {**VISION, **both, "image_size": SIZE, "patch_size": PATCH}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=PROJECTION))
    with torch.no_grad():  # positions that start as waves let patches find their neighbours from the first step
        model.vision_model.embeddings.position_embedding.weight[1:] = waves(VISION["hidden_size"])
    return model


def waves(width: int) -> torch.Tensor:
    """Two-dimensional sine and cosine positions of the grid, [GRID * GRID, width], of size about 0.5."""
    frequencies = 1.0 / 100 ** (torch.arange(width // 4) / (width // 4))
    angles = torch.arange(GRID)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, cols = line[:, None].expand(-1, GRID, -1), line[None].expand(GRID, -1, -1)
    return 0.7 * torch.cat([rows, cols], dim=2).reshape(GRID * GRID, width)


def _embed_text(model: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Texts -> unit vectors [B, PROJECTION]."""
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    pooled = model.text_model(**batch).pooler_output
    return F.normalize(model.text_projection(pooled), dim=-1)


def losses(
    model: CLIPModel, tokenizer: CLIPTokenizer, scenes: list[Scene], handwriting: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """CLIP's symmetric contrastive loss, the patch-phrase loss, and the accuracy on patches that show a thing.

    The patches are those of the last layer but one, which LLaVA reads. Those that show a digit weigh
    `handwriting` times as much as those that show a shape.
    """
    pixels = to_pixels([draw(scene) for scene in scenes])
    vision = model.vision_model(pixel_values=pixels, output_hidden_states=True)
    image_BP = F.normalize(model.visual_projection(vision.pooler_output), dim=-1)
    text = _embed_text(model, tokenizer, [caption(scene) for scene in scenes] + list(PHRASES))
    caption_BP, phrase_KP = text[: len(scenes)], text[len(scenes) :]
    scale = model.logit_scale.exp().clamp(max=100)
    logits = scale * image_BP @ caption_BP.T
    target = torch.arange(len(scenes))
    contrastive = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    patches = model.vision_model.post_layernorm(vision.hidden_states[-2][:, 1:])
    patch_BNP = F.normalize(model.visual_projection(patches), dim=-1)
    phrase_logits = (scale * patch_BNP @ phrase_KP.T).flatten(0, 1)
    shown = torch.from_numpy(np.stack([phrase_grid(scene) for scene in scenes])).flatten()
    per_patch = F.cross_entropy(phrase_logits, shown, reduction="none")
    inside, written = shown > 0, shown >= PHRASES.index("the digit 0")
    weights = inside + (handwriting - 1) * written
    dense = (per_patch * weights).sum() / weights.sum() + per_patch[~inside].mean()
    accuracy = (phrase_logits.argmax(-1) == shown)[inside].float().mean()
    return contrastive, dense, accuracy


def start(seed: int, path: Path) -> CLIPModel:
    """A fresh model, and its tokenizer trained and written to `path`."""
    rng = np.random.default_rng([seed, 1])
    torch.manual_seed(seed)
    tokenizer = train_tokenizer([caption(sample_scene(rng, "train")) for _ in range(2000)])
    tokenizer.save_pretrained(path)
    return build(tokenizer)


def train(model: CLIPModel, path: Path, seed: int, number: int, steps: int, batch_size: int, log=print) -> dict:
    """Cycle `number` of the training, on scenes of the train split that are drawn as they are needed.

    Uses the tokenizer in `path`; returns figures of held-out scenes.
    """
    cycle = CYCLES[number]
    tokenizer = CLIPTokenizer.from_pretrained(path)
    rng = np.random.default_rng([seed, 1, number])
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=cycle.rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=cycle.rate, total_steps=steps, pct_start=0.1)
    started = time.time()
    for step in range(steps):
        scenes = [sample_scene(rng, "train") for _ in range(batch_size)]
        contrastive, dense, accuracy = losses(model, tokenizer, scenes, cycle.handwriting)
        optimizer.zero_grad()
        (contrastive + dense).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == steps - 1:
            log(
                f"clip cycle {number} step {step:4d}/{steps}  contrastive {contrastive.item():.3f}  "
                f"patches {dense.item():.3f}  patch accuracy {accuracy.item():.3f}  {time.time() - started:.0f} s"
            )
    return evaluate(model, tokenizer, seed) | {"seconds": round(time.time() - started)}


@torch.no_grad()
def evaluate(model: CLIPModel, tokenizer: CLIPTokenizer, seed: int) -> dict:
    """Losses on held-out scenes and unseen handwriting."""
    rng = np.random.default_rng([seed, 2])
    model.eval()
    rows = [losses(model, tokenizer, [sample_scene(rng, "val") for _ in range(128)]) for _ in range(4)]
    model.train()
    names = ("contrastive loss, 128 pairs", "patch loss", "patch accuracy on things")
    return {name: round(float(torch.stack(column).mean()), 4) for name, column in zip(names, zip(*rows))}


def load(path: Path) -> CLIPModel:
    """What `save` wrote, ready to be trained on."""
    return CLIPModel.from_pretrained(path, dtype=torch.float32).train()


def save(model: CLIPModel, path: Path) -> None:
    """Write 16-bit weights and an old-style preprocessor_config.json, as CLIP's, beside the tokenizer."""
    model.half().save_pretrained(path)
    processor = {
        "crop_size": SIZE,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "resample": 3,
        "size": SIZE,
    }
    (path / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
