"""The order: everything once, batches of one modality and similar length, the same for the same seed and epoch."""

from __future__ import annotations

import random
from itertools import islice

import pytest

from llava_sp.data.sampler import ModalityLengthSampler


def batched(items, size: int) -> list[tuple]:
    items = list(items)
    return [tuple(items[start : start + size]) for start in range(0, len(items), size)]


def lengths(count: int, text: int = 0, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    made = [draw.randint(1, 400) for _ in range(count)] + [-draw.randint(1, 400) for _ in range(text)]
    draw.shuffle(made)
    return made


@pytest.mark.parametrize("batch_size, world_size", [(1, 1), (4, 1), (4, 2), (3, 8), (16, 3)])
@pytest.mark.parametrize("count, text", [(1, 0), (0, 1), (5, 3), (100, 37), (0, 64), (64, 0), (500, 501)])
def test_every_index_once(batch_size, world_size, count, text):
    sampler = ModalityLengthSampler(lengths(count, text), batch_size, world_size, seed=1)
    assert sorted(sampler) == list(range(count + text)) and len(sampler) == count + text


def test_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        sampler = ModalityLengthSampler(lengths(200, 50), 4, 2, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 0) == order(0, 0) and order(0, 3) == order(0, 3)
    assert len({tuple(order(*pair)) for pair in ((0, 0), (0, 1), (1, 0), (1, 1))}) == 4


def test_a_resumed_run_goes_on_where_it_stopped():
    whole = list(ModalityLengthSampler(lengths(120), 4, 2, seed=5))
    again = iter(ModalityLengthSampler(lengths(120), 4, 2, seed=5))
    assert list(islice(again, 40, None)) == whole[40:]


def test_batches_are_of_one_modality_but_for_the_last():
    sizes = lengths(333, 222)
    steps = batched(ModalityLengthSampler(sizes, 4, 4, seed=2), 16)
    mixed = [step for step in steps if len({sizes[index] > 0 for index in step}) == 2]
    assert all(step in steps[-2:] for step in mixed)
    assert len({sizes[step[0]] > 0 for step in steps[:-2]}) == 2  # the modalities take turns


def test_batches_of_a_step_are_alike_in_load():
    sizes = lengths(640)
    sampled = list(ModalityLengthSampler(sizes, 8, 4, seed=3))
    spread, at_random = [], []
    for step in batched(sampled, 32):
        loads = [sum(sizes[index] for index in batch) for batch in batched(step, 8)]
        spread.append(max(loads) / min(loads))
        shuffled = random.Random(0).sample(step, 32)
        loads = [sum(sizes[index] for index in batch) for batch in batched(shuffled, 8)]
        at_random.append(max(loads) / min(loads))
    assert sum(spread) / len(spread) < 1.05 < sum(at_random) / len(at_random)


def test_bad_arguments():
    with pytest.raises(ValueError, match="batch_size is 0"):
        ModalityLengthSampler([1], 0)
    with pytest.raises(ValueError, match="0 lengths"):
        ModalityLengthSampler([], 1)
    with pytest.raises(ValueError, match="1 of them zero"):
        ModalityLengthSampler([3, 0], 1)
