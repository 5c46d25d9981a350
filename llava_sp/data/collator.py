"""Samples -> one padded batch, or one row that holds them all."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llava_sp.model.processing_llava_sp import IGNORE_INDEX

Sample = dict[str, torch.Tensor]


class Collator:
    """Pads on the right, to a multiple of `pad_to_multiple_of`; the attention mask marks padding by length, never by the
    padding id.

    A list in place of a sample is a pack (see `data.packing`): one row of its samples, one after the other.

    Args:
        pad_token_id: what `input_ids` are padded with.
        pad_to_multiple_of: lengths of rows.

    Returns:
        `input_ids`, `labels` (-100 at padding), `attention_mask` [B, L]; of a pack, `input_ids`, `labels` and
        `position_ids` [1, L], which start again at 0 with each sample. If any sample has images, `pixel_values`
        [images of the batch, 3, H, W] in the order of the placeholders, or `patch_features` [images of the batch, N, C].
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int = 1):
        self.pad_token_id, self.multiple = pad_token_id, pad_to_multiple_of

    def __call__(self, samples: Sequence[Sample] | Sequence[list[Sample]]) -> Sample:
        first = samples[0]
        if isinstance(first, list):
            assert len(samples) == 1, "a row is a pack"
            return _with_images(self._pack(first), first)
        batch: list[Sample] = [sample for sample in samples if isinstance(sample, dict)]
        return _with_images(self._padded(batch), batch)

    def _padded(self, samples: list[Sample]) -> Sample:
        ids = [sample["input_ids"] for sample in samples]
        length = max(map(len, ids))
        length += -length % self.multiple

        def padded(rows: list[torch.Tensor], value: int) -> torch.Tensor:
            return torch.stack([torch.nn.functional.pad(row, (0, length - len(row)), value=value) for row in rows])

        return {
            "input_ids": padded(ids, self.pad_token_id),
            "labels": padded([sample["labels"] for sample in samples], IGNORE_INDEX),
            "attention_mask": padded([torch.ones_like(row) for row in ids], 0),
        }

    def _pack(self, samples: list[Sample]) -> Sample:
        length = sum(len(sample["input_ids"]) for sample in samples)
        padding = -length % self.multiple if length else self.multiple  # an empty pack is a row of padding
        filler = torch.full((padding,), self.pad_token_id)
        ids = [sample["input_ids"] for sample in samples] + [filler]
        labels = torch.cat([sample["labels"] for sample in samples] + [torch.full_like(filler, IGNORE_INDEX)])
        starts = torch.tensor([0] + [len(row) for row in ids]).cumsum(0)[:-1]
        labels[starts[starts < len(labels)]] = IGNORE_INDEX  # else the sample before would predict it
        positions = torch.cat([torch.arange(len(row)) for row in ids])
        rows = {"input_ids": torch.cat(ids), "labels": labels, "position_ids": positions}
        return {name: row.unsqueeze(0) for name, row in rows.items()}


def _with_images(batch: Sample, samples: list[Sample]) -> Sample:
    for images in ("pixel_values", "patch_features"):
        if given := [sample[images] for sample in samples if images in sample]:
            batch[images] = torch.cat(given)
    return batch
