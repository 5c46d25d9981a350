"""Records that are there twice, and records whose answers are empty: one pass without tokenizing or opening an image."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_sp.data.annotations import BadSample

if TYPE_CHECKING:
    from llava_sp.data.dataset import ConversationDataset

BATCH = 512


@dataclass(frozen=True)
class Repeats:
    """`same`: (place, place of the first of its kind) of each record that repeats another; `empty`: places of records
    whose answers hold no text, from which only the end of an answer is learned."""

    same: list[tuple[int, int]]
    empty: list[int]


class _Digests:
    """`[i]` is (a hash of turns and images of sample `i`, whether its answers are empty); 0 for a bad record."""

    def __init__(self, dataset: ConversationDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, bool]:
        try:
            conversation = self.dataset.conversation(index)
        except BadSample:
            return 0, False
        content = json.dumps([conversation.turns, conversation.images], sort_keys=True)
        digest = hashlib.blake2b(content.encode("utf-8", "backslashreplace"), digest_size=8).digest()
        answers = [turn["content"] for turn in conversation.turns if turn["role"] == "assistant"]
        return int.from_bytes(digest, "little", signed=True), not any(answer.strip() for answer in answers)


def find_repeats(dataset: ConversationDataset, workers: int = 0) -> Repeats:
    """Compares all records of `dataset`; 9 bytes are kept of each."""
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    digests, empty = np.zeros(len(dataset), dtype=np.int64), np.zeros(len(dataset), dtype=bool)
    records: Any = _Digests(dataset)
    done = 0
    with tqdm(total=len(dataset), unit="record", desc="comparing", disable=None) as progress:
        for batch in DataLoader(records, batch_size=BATCH, num_workers=workers, collate_fn=list):
            for digest, without_text in batch:
                digests[done], empty[done] = digest, without_text
                done += 1
            progress.update(len(batch))
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    earlier = first[inverse]
    again = np.flatnonzero((earlier != np.arange(len(digests))) & (digests != 0))
    return Repeats([(int(place), int(earlier[place])) for place in again], np.flatnonzero(empty).tolist())
