"""Exact lengths: those of the samples, measured once, kept, and measured again where they cannot be used."""

from __future__ import annotations

import random

import numpy as np
import pytest

from llava_sp.data import lengths
from llava_sp.data.lengths import COLUMNS, measure
from tests.messages import names


@pytest.fixture
def records(make_record):
    return [
        make_record("What is it?", "A kite. " * 30),
        make_record("<image>\nWhat is it?", "A kite.", image="a.png"),
        make_record("<image>\n<image>\nWhat are they?", "Kites.", image=["a.png", "b.png"]),
        make_record("<image>\nWhat is it?", "A kite."),  # text there
        make_record("<image>\nWhat is it?", "A kite.", image=["a.png", "b.png"]),  # a mark is missing
        make_record("<image>\nWhat is it?", "A kite.", image="none.png"),  # not looked at
        make_record("Nothing", ""),
    ]


def kept(world) -> list:
    return sorted(world.folder.glob("data.json.lengths-*.npz"))


def same(one, other) -> bool:
    return one.reasons == other.reasons and all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in COLUMNS
    )


@pytest.mark.parametrize("limit", [2048, 64])
@pytest.mark.parametrize("template", ["vicuna_v1", "plain"])
def test_lengths_are_those_of_the_samples(world, records, limit, template):
    dataset = world(records, model_max_length=limit, conversation_template=template)
    (found,) = measure(dataset)
    for index in range(len(dataset)):
        try:
            encoded = dataset.encode(dataset.conversation(index))
        except ValueError as error:
            assert found.reasons[index] == str(error) and found.tokens[index] == 0
            continue
        row = [len(encoded.input_ids), encoded.uncut, sum(label >= 0 for label in encoded.labels)]
        assert [found.tokens[index], found.uncut[index], found.learned[index]] == row
    good = found.tokens > 0
    assert found.images[good].tolist() == dataset.per_sample([dataset.files[0].image_counts])[good].tolist()
    assert (found.marks[3] == 1 or not good[3]) and 4 in found.reasons and 6 in found.reasons


def test_measured_once(world, records, monkeypatch):
    (first,) = measure(world(records))
    (file,) = kept(world)
    stamp = file.stat().st_mtime_ns
    monkeypatch.setattr(lengths, "_tokenize", None)  # is not called again
    (again,) = measure(world(records, weight=2.5))
    assert same(first, again) and file.stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    "change",
    [{"model_max_length": 100}, {"conversation_template": "plain"}, "records", "tokens per image"],
    ids=str,
)
def test_measured_again_for_something_else(world, records, change, monkeypatch):
    measure(world(records))
    if change == "records":
        dataset = world(records[::-1])
    elif change == "tokens per image":
        dataset = world(records)
        monkeypatch.setattr(dataset.processor, "num_image_tokens", 9)
    else:
        dataset = world(records, **change)
    (found,) = measure(dataset)
    assert len(kept(world)) == 2
    assert found.tokens[1 if change != "records" else -2] == len(dataset.encode(dataset.conversation(1)).input_ids) or (
        change == "records"
    )


def test_workers_find_the_same(world, records, monkeypatch):
    (alone,) = measure(world(records * 40))
    kept(world)[0].unlink()
    monkeypatch.setattr(lengths, "WORTH_WORKERS", 0)
    (together,) = measure(world(records * 40), workers=2)
    assert same(alone, together)


def test_a_damaged_or_foreign_cache_is_measured_again(world, records, caplog):
    (first,) = measure(world(records))
    (file,) = kept(world)
    good, draw = file.read_bytes(), random.Random(0)
    spoilt = [b"", b"nonsense", good[:-40], good[: len(good) // 2], np.lib.format.magic(1, 0), b"\x80\x04]."]
    for _ in range(60):
        at = draw.randrange(len(good))
        spoilt.append(good[:at] + bytes([draw.randrange(256)]) + good[at + 1 :])
    measure(world(records, model_max_length=100))
    spoilt.append(next(other for other in kept(world) if other != file).read_bytes())
    said = 0
    for content in spoilt:
        file.write_bytes(content)
        caplog.clear()
        (again,) = measure(world(records))
        assert same(first, again)
        said += sum(names(record.message, file, "measured again") for record in caplog.records)
        assert len([record for record in caplog.records if record.levelname == "WARNING"]) <= 1
    assert said > 30  # the others changed what nobody reads


def test_folders_that_cannot_be_written(world, records, tmp_path, monkeypatch):
    spare, refuse = tmp_path / "out", lengths.replacing

    def replacing(path):
        if path.parent == world.folder:
            raise PermissionError(13, "Permission denied")
        return refuse(path)

    monkeypatch.setattr(lengths, "replacing", replacing)
    (first,) = measure(world(records))
    assert not kept(world)
    measure(world(records), spare=spare)
    assert not kept(world) and len(list(spare.glob("*.npz"))) == 1
    monkeypatch.setattr(lengths, "_tokenize", None)
    assert same(first, measure(world(records), spare=spare)[0])
