"""Show one training sample: the exact text with its learned part marked, and the image as the model receives it.

    python -m llava_sp.data.preview --config configs/finetune_lora_7b_cropping.yaml --index 0 [--output preview] [--key value]

Learned text is green on a terminal and is in [[double brackets]] otherwise.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llava_sp.common.command import command_parser, natural, run_command
from llava_sp.common.files import counted, writing
from llava_sp.data.annotations import BadSample

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from llava_sp.data.dataset import ConversationDataset

COLOUR = ("\033[1;32m", "\033[0m")
BRACKETS = ("[[", "]]")


def marked_text(dataset: ConversationDataset, index: int, marks: tuple[str, str] = BRACKETS) -> str:
    """The text of sample `index` as it is tokenized, each learned span between `marks`.

    An image's placeholders are shown as `<image>`, which in a record without images is text. Text beyond the limit becomes a
    note. Raises `BadSample`.
    """
    conversation = dataset.conversation(index)
    kept = len(dataset.encode(conversation).input_ids)
    processor = dataset.processor
    images = bool(conversation.images)
    segments = processor.render_conversation(conversation.turns, dataset.conversation_template, images)
    text = "".join(piece for piece, _ in segments)
    tokens = processor.align_segments(segments, images=images)
    learned = [False] * (len(text) + 1)
    for token in tokens[:kept]:
        if token.label == token.id:
            learned[token.start : token.end] = [True] * (token.end - token.start)
    end = len(text) if kept == len(tokens) else tokens[kept - 1].end
    prefix = [token.id for token in tokens if token.end == 0 and token.id in processor.tokenizer.all_special_ids]
    parts = [processor.tokenizer.decode(prefix)] if prefix else []
    inside = False
    for place in range(end):
        if learned[place] != inside:
            parts.append(marks[inside])
            inside = learned[place]
        parts.append(text[place])
    if inside:
        parts.append(marks[1])
    if kept < len(tokens):
        parts.append(f"\n... cut here: {counted(len(tokens) - kept, 'token')} beyond {dataset.model_max_length}")
    return "".join(parts)


def seen_images(dataset: ConversationDataset, pixel_values: torch.Tensor) -> list[Image.Image]:
    """Pixels [n, 3, H, W] back to images: normalisation undone, nothing else."""
    import torch
    from PIL import Image

    settings = dataset.processor.image_processor
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (settings.image_mean, settings.image_std))
    restored = ((pixel_values * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in restored]


def show(dataset: ConversationDataset, index: int, folder: Path, marks: tuple[str, str]) -> None:
    """Print sample `index` and save its images in `folder`. Raises `ValueError` for a bad sample."""
    if not 0 <= index < len(dataset):
        raise ValueError(f"--index {index}: the data has samples 0 to {len(dataset) - 1}")
    try:
        conversation = dataset.conversation(index)
        text = marked_text(dataset, index, marks)
        images = dataset.load_images(index, conversation)
    except BadSample as error:
        raise ValueError(f"{dataset.where(index)} is bad: {error}") from error
    encoded = dataset.encode(conversation)
    learned = sum(label >= 0 for label in encoded.labels)
    per_image = dataset.processor.num_image_tokens
    print(f"sample {index} of {len(dataset)}: {dataset.where(index)} (id {conversation.id!r})")
    print(f"{len(encoded.input_ids)} tokens, {len(images)} x {per_image} of them for images; {learned} learned")
    print("-" * 80, text, "-" * 80, sep="\n")
    if not images:
        return
    seen = seen_images(dataset, dataset.processor.preprocess_images(images))
    for number, (name, image, pixels) in enumerate(zip(conversation.images, images, seen, strict=True)):
        path = folder / f"sample_{index}_image_{number}.png"
        with writing(path):
            pixels.save(path)
        print(
            f"{name} ({image.width} x {image.height}) as the model sees it ({pixels.width} x {pixels.height}): {path}"
        )


def main(arguments: list[str] | None = None) -> int:
    parser = command_parser("llava_sp.data.preview", __doc__)
    parser.add_argument("--config", type=Path, required=True, help="training YAML")
    parser.add_argument("--index", type=natural, default=0, help="which sample")
    parser.add_argument("--output", type=Path, default=Path("preview"), help="folder for the images")
    options, overrides = parser.parse_known_args(arguments)
    marks = COLOUR if sys.stdout.isatty() and "NO_COLOR" not in os.environ else BRACKETS

    def action() -> None:
        from llava_sp.data.build import dataset_of_config

        show(dataset_of_config(options.config, overrides), options.index, options.output, marks)

    return run_command(action, traceback=options.traceback)


if __name__ == "__main__":
    sys.exit(main())
