"""The model as the runner sees it: items in, texts out.

This is the place for everything that makes answering faster (encoding an image once for all its questions, another
engine): the runner and the benchmarks do not know how answers come about.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from llava_sp.data.images import load_image
from llava_sp.eval.base import IMAGE_MARK, Benchmark, Generation, Item


def open_image(source: Path | bytes, owner: str) -> Image.Image:
    """Opens and fully decodes an image as RGB.

    Raises:
        ValueError: naming `owner` (the question) and the file, if it is missing, empty, broken, or gigantic.
    """
    try:
        if isinstance(source, Path):
            return load_image(source.parent, source.name)
        with Image.open(io.BytesIO(source)) as image:
            return image.convert("RGB")
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        what = "" if isinstance(source, Path) else f"embedded image of {len(source)} bytes: "
        raise ValueError(f"{owner}: {what}{error}") from error


def render_prompt(processor: Any, message: str, template: str | None = None) -> str:
    """The whole text that the model continues: the user's `message` in the conversation template."""
    if template is not None and template != processor.conversation_template:
        turns = [{"role": "user", "content": message}, {"role": "assistant", "content": ""}]
        return "".join(text for text, _ in processor.render_conversation(turns, template))
    turns = [{"role": "user", "content": message}]
    return processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)


def generation_arguments(generation: Generation) -> dict[str, Any]:
    """Keyword arguments for `generate`: greedy decoding takes no sampling parameters (transformers warns)."""
    arguments: dict[str, Any] = {
        "do_sample": generation.do_sample,
        "num_beams": generation.num_beams,
        "max_new_tokens": generation.max_new_tokens,
        "use_cache": generation.use_cache,
    }
    if generation.do_sample:
        arguments |= {"temperature": generation.temperature, "top_p": generation.top_p}
    else:
        arguments |= {"temperature": None, "top_p": None, "top_k": None}  # not those of the checkpoint either
    return arguments


class ModelAnswerer:
    """Answers items in batches, left padded, with one call of `generate` per batch."""

    def __init__(self, model: Any, processor: Any, benchmark: Benchmark, generation: Generation, seed: int = 0):
        self.model, self.processor, self.benchmark = model, processor, benchmark
        self.generation, self.seed = generation, seed

    def prepare(self, items: Sequence[Item]) -> Any:
        """Prompts and pixels of a batch, on the CPU; safe to call in a thread."""
        prompts = [render_prompt(self.processor, self.benchmark.message(i), self.benchmark.conversation) for i in items]
        images = [[open_image(source, f"question {item.id}") for source in item.images] for item in items]
        for item, prompt in zip(items, prompts):
            if prompt.count(IMAGE_MARK) != len(item.images):
                raise ValueError(
                    f"question {item.id}: {prompt.count(IMAGE_MARK)} {IMAGE_MARK} marks for {len(item.images)} images"
                )
        return self.processor(
            text=prompts,
            images=images if any(images) else None,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )

    def answer(self, batch: Any) -> list[str]:
        """Generated texts without the prompt, special tokens or surrounding white space."""
        batch = batch.to(self.model.device)
        if "pixel_values" in batch:
            batch["pixel_values"] = batch["pixel_values"].to(self.model.dtype)
        if self.generation.do_sample:
            torch.manual_seed(self.seed)
        try:
            with torch.inference_mode():
                ids = self.model.generate(**batch, **generation_arguments(self.generation))
        except torch.OutOfMemoryError as error:
            count = len(batch["input_ids"])
            raise MemoryError(
                f"out of GPU memory with {count} questions at once; the same command with a smaller --batch-size goes "
                f"on where this one stopped ({str(error).splitlines()[0]})"
            ) from None
        texts = self.processor.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]
