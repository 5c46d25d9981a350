"""One pass over all records, in order, by loader processes, with a progress bar."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def in_order(items: Any, workers: int, batch_size: int, what: str, unit: str = "record") -> Iterator[Any]:
    """`items[0]`, `items[1]`, ...

    Args:
        items: has a length and an item for each index; goes to the processes by pickle.
        workers: processes; 0 is this one.
        batch_size: items that a process hands over at once.
        what, unit: for the progress bar.
    """
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    with tqdm(total=len(items), unit=unit, desc=what, disable=None) as progress:
        for batch in DataLoader(items, batch_size=batch_size, num_workers=workers, collate_fn=list):
            yield from batch
            progress.update(len(batch))
