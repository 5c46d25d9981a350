"""Packs: every sample once, the same steps for any number of processes, balanced, never too long, one row each."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from torch.utils.data import BatchSampler

from llava_sp.data.annotations import BadSample
from llava_sp.data.collator import Collator
from llava_sp.data.packing import Packs, PackSampler
from tests.messages import refused

TURN = {"from": "human", "value": "Say it."}


def lengths(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(20, 700, count)


def sampler(count: int = 300, per_step: int = 16, processes: int = 1, length: int = 2048, **more) -> PackSampler:
    tokens = lengths(count)
    return PackSampler(tokens, tokens > 300, per_step, length, processes, **more)


def steps(packs: PackSampler) -> list[set[int]]:
    """The samples of each step, from the packs in order."""
    order = list(packs)
    size = packs.packs_per_step
    return [{index for pack in order[at : at + size] for index in pack} for at in range(0, len(order), size)]


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("count, per_step", [(1, 1), (1, 16), (5, 16), (16, 16), (17, 16), (300, 16), (64, 1), (7, 2)])
def test_every_sample_once_and_no_pack_too_long(count, per_step, processes):
    packs = sampler(count, per_step, processes)
    order = list(packs)
    assert sorted(index for pack in order for index in pack) == list(range(count))
    assert len(order) == len(packs) == -(-count // per_step) * packs.packs_per_step
    assert packs.packs_per_step % processes == 0
    assert max(packs.tokens[list(pack)].sum() for pack in order) <= 2048
    assert [len(step) for step in steps(packs)[:-1]] == [per_step] * (-(-count // per_step) - 1)


def test_steps_are_a_function_of_seed_and_epoch_alone():
    reference = steps(sampler())
    for processes, length in ((2, 2048), (3, 700), (8, 16384)):
        assert steps(sampler(processes=processes, length=length)) == reference
    seen = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1)):
        packs = sampler(seed=seed)
        packs.set_epoch(epoch)
        seen.append(list(packs))
    assert seen[0] == list(sampler()) and len({tuple(order) for order in seen}) == 4


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_no_pack_twice_and_none_lost_as_accelerate_gives_them_out(processes):
    """Also of the last, short step, and after a resumed run has skipped what was used."""
    packs = sampler(count=34, processes=processes)
    per_process = packs.packs_per_step // processes
    seen = []
    for rank in range(processes):
        shard = BatchSamplerShard(BatchSampler(packs, 1, False), processes, rank)
        own = [pack for (pack,) in shard]
        assert len(own) == len(shard) == packs.steps_per_epoch * per_process
        assert [pack for (pack,) in SkipBatchSampler(shard, per_process)] == own[per_process:]
        seen += own
    assert sorted(seen) == sorted(packs)


def test_as_few_packs_as_every_step_of_the_run_allows():
    packs = sampler(count=64, per_step=16, length=1500)
    most = max(packs.tokens[step].sum() for step in packs.steps(0))
    assert packs.packs_per_step == -(-most // 1500)
    many = [sampler(count=64, per_step=16, length=1500, steps=steps).packs_per_step for steps in (1, 4, 400)]
    assert many == sorted(many) and many[0] < many[-1]


@pytest.mark.parametrize(
    "tokens, length, packs", [([5, 5, 4, 4, 3, 3], 8, 3), ([3, 3, 2, 2, 2], 6, 2), ([8] * 5, 8, 5)]
)
def test_a_tight_fit(tokens, length, packs):
    """Longest processing time first alone fails with some of these."""
    assert PackSampler(tokens, [0] * len(tokens), len(tokens), length).packs_per_step == packs


def test_packs_are_balanced_and_those_of_a_moment_alike():
    found = sampler(count=4000, per_step=128, processes=8, length=8192).summary(multiple=64)
    assert found.padding < 0.02 and found.waiting < 0.02 and found.longest <= 8192


def test_what_cannot_be_packed():
    with refused(1, 700, 699):
        PackSampler([5, 700, 699], [0, 0, 0], 2, 699)
    with refused("2 samples"):
        PackSampler([0, 0], [0, 0], 2, 699)
    assert sorted(sum(PackSampler([0, 3, 0, 4], [0] * 4, 2, 8), ())) == [1, 3]


# ---- rows


def sample(ids: list[int], images: int = 0) -> dict[str, torch.Tensor]:
    row = torch.tensor(ids)
    pixels = {"pixel_values": torch.full((images, 3, 2, 2), float(ids[0]))} if images else {}
    return {"input_ids": row, "labels": row * 10, **pixels}


def test_a_pack_is_a_row():
    batch = Collator(0, pad_to_multiple_of=4)([[sample([1, 2, 3], 2), sample([4]), sample([5, 6], 1)]])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 20, 30, -100, -100, 60, -100, -100]]
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [1, 1, 5] and "attention_mask" not in batch


@pytest.mark.parametrize("multiple", [1, 8])
def test_an_empty_pack_is_padding(multiple):
    batch = Collator(7, multiple)([[]])
    assert batch["input_ids"].tolist() == [[7] * multiple] and batch["position_ids"].tolist() == [list(range(multiple))]
    assert (batch["labels"] == -100).all() and "pixel_values" not in batch


def test_padded_batches_have_a_multiple_too():
    batch = Collator(9, pad_to_multiple_of=4)([sample([1, 2, 3, 4, 5]), sample([6])])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 9, 9, 9], [6] + [9] * 7]
    assert batch["attention_mask"].sum(1).tolist() == [5, 1] and (batch["labels"][1, 1:] == -100).all()


def test_bad_images_leave_a_pack_and_are_listed(world, make_record):
    missing = make_record("<image>\nWhat?", "It.", image="none.png")
    records = [make_record("a", "b"), missing, make_record("<image>\nc", "d", image="a.png"), missing, missing]
    skipped = world.folder / "skipped.jsonl"
    packs = Packs(world(records, on_bad_sample="skip", skipped_path=skipped))
    assert [len(packs[pack]) for pack in ((0, 1, 2), (), (3, 4))] == [2, 0, 1]
    assert {json.loads(line)["index"] for line in skipped.read_text().splitlines()} == {1, 3, 4}
    with pytest.raises(BadSample, match=r"data.json, record 1: .*none.png"):
        Packs(world(records))[(0, 1)]
