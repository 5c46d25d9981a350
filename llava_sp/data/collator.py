"""Samples -> one padded batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llava_sp.model.processing_llava_sp import IGNORE_INDEX


class Collator:
    """Pads on the right, to a multiple of `pad_to_multiple_of`; the attention mask marks padding by length, never by the
    padding id.

    Returns:
        `input_ids`, `labels` (-100 at padding), `attention_mask` [B, L], and, if any sample has images, `pixel_values`
        [images of the batch, 3, H, W] in the order of the placeholders, or `patch_features` [images of the batch, N, C].
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int = 1):
        self.pad_token_id, self.pad_to_multiple_of = pad_token_id, pad_to_multiple_of

    def __call__(self, samples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        def padded(rows: list[torch.Tensor], value: int) -> torch.Tensor:
            batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
            return torch.nn.functional.pad(batch, (0, -batch.shape[1] % self.pad_to_multiple_of), value=value)

        ids = [sample["input_ids"] for sample in samples]
        batch = {
            "input_ids": padded(ids, self.pad_token_id),
            "labels": padded([sample["labels"] for sample in samples], IGNORE_INDEX),
            "attention_mask": padded([torch.ones_like(row) for row in ids], 0),
        }
        for images in ("pixel_values", "patch_features"):
            if given := [sample[images] for sample in samples if images in sample]:
                batch[images] = torch.cat(given)
        return batch
