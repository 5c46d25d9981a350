"""Records that are there twice, and records whose answers are empty: one pass without tokenizing or opening an image."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llava_sp.data.annotations import BadSample
from llava_sp.data.passes import in_order

if TYPE_CHECKING:
    from llava_sp.data.dataset import ConversationDataset

BATCH = 512


@dataclass(frozen=True)
class Repeats:
    """How many records repeat an earlier one, and how many have answers without text, from which only the end of an answer is
    learned; with the first of each in words."""

    same: int
    empty: int
    first_same: str
    first_empty: str


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
    digests, empty = np.zeros(len(dataset), dtype=np.int64), np.zeros(len(dataset), dtype=bool)
    for index, (digest, without_text) in enumerate(in_order(_Digests(dataset), workers, BATCH, "comparing")):
        digests[index], empty[index] = digest, without_text
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    earlier = first[inverse]
    again = np.flatnonzero((earlier != np.arange(len(digests))) & (digests != 0))
    blank = np.flatnonzero(empty)
    return Repeats(
        len(again),
        len(blank),
        f"{dataset.where(again[0])} is {dataset.where(earlier[again[0]])} again" if len(again) else "",
        dataset.where(blank[0]) if len(blank) else "",
    )
