"""The model as the runner sees it: items in, texts out.

What makes answering faster belongs here (an image's tokens are computed once for all its questions): runner and benchmarks
do not depend on how answers are generated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BatchEncoding

from llava_sp.decoding import Generation
from llava_sp.eval.base import Benchmark, Item
from llava_sp.inference import Engine, answering, encode_prompt, open_image, pad_left, positions, render_prompt


@dataclass(frozen=True)
class Batch:
    """What `ModelAnswerer.answer` needs of some items, on the CPU.

    Attributes:
        heads: `input_ids` and `attention_mask` [heads, L], left padded: each prompt up to its last image, every distinct one
            once; None if no two items begin alike.
        head_of: for each item, which head it has.
        prompts: `input_ids` and `attention_mask` [items, L], left padded: what follows the head, or the whole prompt.
        pixel_values: [images, 3, H, W], in the order of the placeholders in `heads`, or else in `prompts`.
    """

    prompts: BatchEncoding
    pixel_values: torch.Tensor | None
    heads: BatchEncoding | None = None
    head_of: torch.Tensor | None = None


class ModelAnswerer:
    """Answers items in batches, left padded, with one call of `generate` per batch; the model is opened with the first.

    Questions about the same images begin with the same tokens: system text, then the images. Within a batch that beginning
    goes through vision tower, projector and language model once, and all questions continue from its key-value cache.
    """

    def __init__(
        self,
        engine: Engine,
        processor: Any,
        benchmark: Benchmark,
        generation: Generation,
        seed: int = 0,
        share_images: bool = True,
    ):
        self.engine, self.processor, self.benchmark = engine, processor, benchmark
        self.generation, self.seed = generation, seed
        self.share_images = share_images and generation.num_beams == 1

    def prepare(self, items: Sequence[Item]) -> Batch:
        """Prompts and pixels of a batch, on the CPU; safe to call in a thread."""
        rows = [self._encode(item) for item in items]
        pixels = {}
        for item in items:
            for image in item.images:
                if image not in pixels:
                    opened = open_image(image, f"question {item.id}")
                    pixels[image] = self.processor.preprocess_images([opened])[0]
        cuts = [self._head_length(row) for row in rows]
        heads: dict[tuple, int] = {}  # (images, ids) -> number
        head_of = [heads.setdefault((i.images, *row[:cut]), len(heads)) for i, row, cut in zip(items, rows, cuts)]
        if not self.share_images or len(heads) == len(items) or not all(cuts):
            return Batch(
                pad_left(self.processor, rows), _stack(pixels[image] for item in items for image in item.images)
            )
        return Batch(
            prompts=pad_left(self.processor, [row[cut:] for row, cut in zip(rows, cuts)]),
            pixel_values=_stack(pixels[image] for images, *_ in heads for image in images),
            heads=pad_left(self.processor, [ids for _, *ids in heads]),
            head_of=torch.tensor(head_of),
        )

    def answer(self, batch: Batch) -> list[str]:
        """Generated texts without the prompt, special tokens or surrounding white space."""
        count = len(batch.prompts["input_ids"])
        with answering(
            f"with {count} questions at once; the same command with a smaller --batch-size continues where this one stopped"
        ):
            inputs = self._inputs(batch)
            if self.generation.do_sample:
                # seeded by run and prompt: the same draw whatever was answered before
                digest = hashlib.sha256(f"{self.seed}/{inputs['input_ids'].tolist()}".encode()).digest()
                torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            ids = self.engine.model.generate(**inputs, **self.generation.arguments())
        texts = self.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _encode(self, item: Item) -> list[int]:
        prompt = render_prompt(self.processor, self.benchmark.message(item), self.benchmark.conversation_template)
        return encode_prompt(self.processor, prompt, len(item.images), f"question {item.id}")

    def _head_length(self, row: list[int]) -> int:
        """How many tokens there are up to the last image; 0 without images."""
        mark = self.processor.image_token_id
        return len(row) - row[::-1].index(mark) if mark in row else 0

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        """Arguments of `generate`; where heads are shared, their key-value cache is among them."""
        model = self.engine.model
        device = model.device
        inputs = dict(batch.prompts.to(device))
        pixels = {}
        if batch.pixel_values is not None:
            pixels["pixel_values"] = batch.pixel_values.to(device, model.dtype)
        if batch.heads is None or batch.head_of is None:
            return inputs | pixels
        heads, head_of = batch.heads.to(device), batch.head_of.to(device)
        places = positions(heads["attention_mask"])
        output = model(**heads, **pixels, position_ids=places, use_cache=True, logits_to_keep=1)
        output.past_key_values.batch_select_indices(head_of)
        whole = {name: torch.cat([heads[name][head_of], inputs[name]], dim=1) for name in inputs}
        return whole | {"past_key_values": output.past_key_values}


def _stack(pixels: Iterable[torch.Tensor]) -> torch.Tensor | None:
    pixels = list(pixels)
    return torch.stack(pixels) if pixels else None
