"""Batches: right padding, masks by length, pixels in the order of the placeholders; the original's batch."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from llava_sp.data.collator import Collator
from llava_sp.data.dataset import ConversationDataset
from llava_sp.data.mixture import load_mixture


def sample(*ids: int, images: int = 0) -> dict[str, torch.Tensor]:
    made = {"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)}
    return made | ({"pixel_values": torch.full((images, 3, 2, 2), float(ids[0]))} if images else {})


def test_padding_and_pixels():
    batch = Collator(pad_token_id=9)([sample(1, 2, 9), sample(3, images=2), sample(4, 5, images=1)])
    assert batch["input_ids"].tolist() == [[1, 2, 9], [3, 9, 9], [4, 5, 9]]
    assert batch["labels"].tolist() == [[1, 2, 9], [3, -100, -100], [4, 5, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [3, 3, 4]


def test_padding_to_a_multiple():
    samples = [sample(1, 2, 3), sample(4, 5, 6, 7, 8, images=1)]
    batch, shorter = Collator(9, pad_to_multiple_of=4)(samples), Collator(9)(samples)
    for key, filler in (("input_ids", 9), ("labels", -100), ("attention_mask", 0)):
        assert batch[key].shape == (2, 8)
        assert torch.equal(batch[key][:, :5], shorter[key]) and (batch[key][:, 5:] == filler).all()
    assert Collator(9, pad_to_multiple_of=5)(samples)["input_ids"].shape == (2, 5)


def test_text_only_batch_has_no_pixels():
    assert set(Collator(0)([sample(1), sample(2, 3)])) == {"input_ids", "labels", "attention_mask"}


def test_batch_of_the_original(golden, processor):
    sources = load_mixture([{"annotations": golden / "samples" / "data.json", "images": golden / "samples" / "images"}])
    dataset = ConversationDataset(sources, processor)
    batch = Collator(processor.pad_token_id)([dataset[i] for i in range(4)])
    expected = load_file(golden / "checkpoint_cropping" / "expected.safetensors")
    per_image = processor.num_image_tokens
    for row in range(4):
        length = int(expected["train.attention_mask"][row].sum())
        ids = expected["train.input_ids"][row][:length]
        images = int((ids == -200).sum())
        assert int(batch["attention_mask"][row].sum()) == length + images * (per_image - 1)
        learned = expected["train.labels"][row][expected["train.labels"][row] != -100]
        assert torch.equal(batch["labels"][row][batch["labels"][row] != -100], learned)
    assert batch["pixel_values"].shape == (3, 3, 28, 28)
