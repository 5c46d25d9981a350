"""Files with tensors, whole and broken: what is in them, and that nothing in them is executed."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from llava_sp.checkpoints.reading import tensor_files
from llava_sp.checkpoints.reading.tensor_files import (
    read_all,
    read_index,
    read_tensors,
    shard_index,
    stored_tensors,
    tensor_lines,
    value_problem,
    weight_files,
)
from llava_sp.common.files import read_json

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


class Code:
    """Unpickling it makes a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch '{self.target}'",)


@pytest.fixture(params=["x.safetensors", "x.bin"])
def file(request, tmp_path):
    path = tmp_path / request.param
    save_file(TENSORS, path) if path.suffix == ".safetensors" else torch.save(TENSORS, path)
    return path


def test_headers_and_content(file):
    tensors = read_tensors(file)
    assert tensors.keys() == TENSORS.keys() and all(torch.equal(tensors[key], TENSORS[key]) for key in TENSORS)
    assert list(read_tensors(file, ["b"])) == ["b"]
    stored = {tensor.key: tensor for tensor in stored_tensors(file)}
    assert {key: (t.shape, t.dtype) for key, t in stored.items()} == {
        "a.weight": ((2, 3), torch.float32),
        "b": ((4,), torch.bfloat16),
    }
    assert stored["a.weight"].numel == 6 and torch.equal(read_all({"c": stored["b"]})["c"], TENSORS["b"])


def test_the_same_lines_for_the_same_tensors(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    torch.save(TENSORS, tmp_path / "x.bin")
    assert sorted(tensor_lines(tmp_path / "x.safetensors")) == sorted(tensor_lines(tmp_path / "x.bin"))


@pytest.mark.parametrize("kept", [0, 5, 40, 0.5, -1])
def test_a_truncated_file_is_named(file, kept):
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * kept) if isinstance(kept, float) else kept])
    for read in (stored_tensors, read_tensors, tensor_lines):
        with pytest.raises(ValueError, match=f"{file.name}.*cut off"):
            read(file)


def header(path, content) -> None:
    """A safetensors file with this header and 8 bytes of tensors."""
    text = json.dumps(content).encode() if not isinstance(content, bytes) else content
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{not json", "invalid JSON"),
        ([1, 2], "sequence"),
        ({"w": {"dtype": "F32", "shape": [2]}}, "data_offsets"),
        ({"w": 3}, "integer `3`"),
        ({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, "shape.* or offset"),
        ({"w": {"dtype": "X9", "shape": [2], "data_offsets": [0, 8]}}, "X9"),
        ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "file not fully covered"),
    ],
)
def test_a_header_that_cannot_be_right(tmp_path, content, reason):
    header(tmp_path / "x.safetensors", content)
    for read in (stored_tensors, read_tensors, tensor_lines):
        with pytest.raises(ValueError, match=rf"{tmp_path / 'x.safetensors'} .*{reason}"):
            read(tmp_path / "x.safetensors")


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
def test_code_in_a_pickle_is_refused_and_not_executed(tmp_path, old):
    proof = tmp_path / "executed"
    torch.save({"w": torch.ones(2), "x": Code(proof)}, tmp_path / "x.bin", _use_new_zipfile_serialization=not old)
    assert zipfile.is_zipfile(tmp_path / "x.bin") is not old
    for read in (stored_tensors, read_tensors, tensor_lines):
        with pytest.raises(ValueError, match=r"x.bin holds code \((posix|nt).system\).*nothing in it was executed"):
            read(tmp_path / "x.bin")
    assert not proof.exists()
    torch.load(tmp_path / "x.bin", weights_only=False)  # the trap is armed: without weights_only it goes off
    assert proof.exists()


def test_the_headers_of_an_old_pickle_are_read_without_its_tensors(tmp_path, monkeypatch):
    file, shared = tmp_path / "x.bin", torch.randn(64, 64)
    tensors = {**TENSORS, "large": torch.randn(1000, 1000), "one": shared[:32], "two": shared.T}
    torch.save(tensors, file, _use_new_zipfile_serialization=False)
    read = []
    monkeypatch.setattr(torch.UntypedStorage, "_set_from_file", lambda *_: read.append(1))
    assert {t.key: (t.shape, t.dtype) for t in stored_tensors(file)} == {
        key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()
    }
    assert not read
    monkeypatch.undo()
    again = read_tensors(file)
    assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items())
    data = file.read_bytes()
    for kept in (-1, -5000, len(data) // 2, 40):
        file.write_bytes(data[:kept])
        for look in (stored_tensors, read_tensors, tensor_lines):
            with pytest.raises(ValueError, match="x.bin is cut off"):
                look(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], r"is \[tensor.*; expected an object"),
        (torch.ones(2), "is tensor.*; expected an object"),
        ({"w": torch.ones(2), "step": 3}, ": step is 3; expected Tensor"),
    ],
)
def test_a_pickle_of_something_else(tmp_path, content, message):
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(ValueError, match=f"x.bin:? ?{message.removeprefix(': ')}"):
        stored_tensors(tmp_path / "x.bin")


@pytest.mark.parametrize("data", [b"a text, no weights", pickle.dumps({"w": 1})], ids=["text", "plain pickle"])
def test_a_file_of_something_else(tmp_path, data):
    (tmp_path / "x.bin").write_bytes(data)
    with pytest.raises(ValueError, match="x.bin"):
        stored_tensors(tmp_path / "x.bin")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_weights(dtype):
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-4, 0.02, 30.0):
        assert value_problem((torch.randn(64, 64, generator=generator) * scale).to(dtype)) is None
    assert value_problem(torch.zeros(64, dtype=dtype)) is None  # a bias may be
    assert value_problem(torch.zeros(8, 8, dtype=dtype), zeros_allowed=True) is None
    half = torch.randn(64, 64, generator=generator)
    half[:32] = 0  # much of it never used
    assert value_problem(half.to(dtype)) is None
    assert value_problem(torch.zeros(3, dtype=torch.int64)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_are_none(dtype):
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    for value in (float("nan"), float("inf"), -float("inf")):
        spoilt = weight.clone()
        spoilt[3, 4] = spoilt[5, 6] = value
        assert "holds NaN or infinity in 2 of its 4,096 values" in value_problem(spoilt)
    assert "is empty" in value_problem(weight[:0])
    assert "is zero everywhere" in value_problem(torch.zeros_like(weight))
    assert "never initialised" in value_problem(weight * -1e6)
    assert "below 1e-30" in value_problem(torch.full_like(weight, 1e-38))
    assert "below 1e-30" in value_problem(torch.full_like(weight, 1e-38), zeros_allowed=True)


def test_the_kinds_of_garbage_that_memory_holds():
    """Random bits, in each type, are never taken for weights."""
    bits = torch.randint(-(2**31), 2**31 - 1, (256, 256), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert value_problem(bits.view(dtype)) is not None


def test_a_sample_shows_what_most_of_a_large_tensor_is(monkeypatch):
    """What is looked at value by value is a sample, whatever the size."""
    weight = torch.randn(512, 1024)
    monkeypatch.setattr(tensor_files, "_SAMPLE", 100)
    assert value_problem(weight) is None
    weight[:500] = 1e-38
    assert "below 1e-30" in value_problem(weight)


# ---------------------------------------------------------------- shards


@pytest.fixture
def shards(tmp_path):
    for name, key in (("m-1.safetensors", "a"), ("m-2.safetensors", "b")):
        save_file({key: torch.ones(2), f"{key}.bias": torch.ones(1)}, tmp_path / name)
    held = {"a": "m-1.safetensors", "b": "m-2.safetensors", "b.bias": "m-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": held}))
    return tmp_path


def test_the_files_of_an_index(shards):
    assert [file.name for file in weight_files(shards)] == ["m-1.safetensors", "m-2.safetensors"]
    assert shard_index(shards) == shards / "model.safetensors.index.json"
    torch.save({}, shards / "pytorch_model.bin")
    assert [file.name for file in weight_files(shards)] == ["m-1.safetensors", "m-2.safetensors"]  # the preferred
    save_file({"a": torch.ones(1)}, shards / "model.safetensors")
    assert [file.name for file in weight_files(shards)] == ["model.safetensors"] and shard_index(shards) is None


def test_a_missing_shard_is_named_with_a_key(shards):
    (shards / "m-2.safetensors").unlink()
    with pytest.raises(ValueError, match="index.json names m-2.safetensors, which does not exist; b is in it"):
        weight_files(shards)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_not_valid(shards, content):
    index = shards / "model.safetensors.index.json"
    index.write_text(content)
    with pytest.raises(ValueError, match=r"index.json.* (weight_map|metadata)"):
        read_index(index)


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(ValueError, match="holds no weights"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b'{"a": {"b"', "not valid JSON"), (b"\xff\xfe", "not UTF-8"), (b"[1, 2]", r"is \[1, 2\]; expected an object")],
)
def test_json_that_is_not_valid(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"config.json.*{message}"):
        read_json(tmp_path / "config.json", dict)
