"""Patch features computed once: runs that train from them are the same, and what does not fit is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from llava_sp.data.build import dataset_of_config
from llava_sp.data.precompute import main
from tests.messages import names, refused
from tests.train.conftest import no_launcher
from tests.train.runs import GOLDEN, config, losses, run_here

IMAGES = 3  # distinct ones of the golden samples


def features(folder: Path, *words: str, **settings) -> Path:
    """Precomputed for a tiny run with these settings, two images to a shard."""
    out = folder / "features"
    path = config(folder, precompute_features=str(out), **settings)
    options = ["--config", str(path), "--workers", "0", "--images-per-shard", "2", *words]
    assert main(options) == 0
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    with no_launcher():
        return features(tmp_path_factory.mktemp("made"))


@pytest.fixture
def copied(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "features"))


def read_all(folder: Path, **settings) -> list[dict]:
    """The samples of a run on the features of a folder."""
    dataset = dataset_of_config(config(folder.parent, precompute_features=str(folder), **settings))
    return [dataset[index] for index in range(len(dataset))]


def test_size_is_told_first_and_files_are_whole(tmp_path, capsys):
    out = features(tmp_path)
    assert names(capsys.readouterr().out, f"{IMAGES} images", out, "complete")
    shards = sorted(out.glob("*.safetensors"))
    assert [len(load_file(shard)) for shard in shards] == [2, 1]
    assert json.loads((out / "features.json").read_text())["images"] == IMAGES


@pytest.mark.parametrize(
    "stage, settings",
    [
        ("finetune_lora", {"gradient_checkpointing": True}),  # text alone in some batches
        ("finetune_lora", {"packing": True, "pack_length": 2048}),
        ("pretrain", {"spatial_variant": "pooling", "per_device_train_batch_size": 2, "validation_fraction": 0.25}),
    ],
)
def test_losses_are_equal_bit_for_bit(made, tmp_path, stage, settings):
    settings |= {"max_steps": 2, "conversation_template": "vicuna_v1"}
    images = run_here(tmp_path / "images", stage, **settings)
    stored = run_here(tmp_path / "features", stage, precompute_features=str(made), **settings)
    assert losses(stored) == losses(images) and len(losses(images)) == 2
    assert [r.get("eval_loss") for r in stored] == [r.get("eval_loss") for r in images]
    for file in (tmp_path / "images" / "out").glob("**/*.safetensors"):
        other = load_file(tmp_path / "features" / "out" / file.relative_to(tmp_path / "images" / "out"))
        assert all(torch.equal(tensor, other[name]) for name, tensor in load_file(file).items()), file


def test_no_image_is_decoded(made, tmp_path, monkeypatch):
    monkeypatch.setattr("llava_sp.data.record_file.load_image", lambda *_: pytest.fail("an image was opened"))
    samples = read_all(made)
    assert sorted(len(sample["patch_features"]) for sample in samples) == [0, 1, 1, 1]


def test_in_the_number_format_of_the_run(tmp_path):
    samples = read_all(features(tmp_path, bf16=True), bf16=True)
    assert {sample["patch_features"].dtype for sample in samples} == {torch.bfloat16}


@pytest.mark.parametrize(
    "key, settings",
    [
        ("vision_feature_layer", {"vision_feature_layer": -3}),
        ("image_aspect_ratio", {"image_aspect_ratio": "crop"}),
        ("number_format", {"bf16": True}),
    ],
)
def test_those_of_other_settings_are_refused(made, key, settings):
    with refused(made, key, *map(str, settings.values()) if key != "number_format" else ["bfloat16"]):
        read_all(made, **settings)


def test_those_of_another_tower_are_refused(made, tmp_path):
    tower = Path(shutil.copytree(GOLDEN / "clip", tmp_path / "clip"))
    weights = torch.load(tower / "pytorch_model.bin", weights_only=True)
    weights["vision_model.embeddings.class_embedding"] += 1
    torch.save(weights, tower / "pytorch_model.bin")
    with refused(made, "vision_tower"):
        read_all(made, vision_tower=str(tower))


def test_those_of_other_data_are_refused(made, tmp_path):
    records = json.loads((GOLDEN / "samples" / "data.json").read_text())
    file = tmp_path / "data.json"
    file.write_text(json.dumps(records[1:]))
    with refused(made, file):
        read_all(made, data_path=str(file))


def test_a_folder_without_features(tmp_path):
    with refused("precompute_features", tmp_path / "none", "features.json"):
        read_all(tmp_path / "none")


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def alter(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, alter, Path.unlink, lambda file: file.write_bytes(b"")])
def test_a_damaged_shard_is_named_and_made_again(made, copied, damage, capsys):
    shard = copied / "features-00001.safetensors"
    damage(shard)
    with refused(shard):
        read_all(copied)
    if damage is alter:  # seen when it is read; as the message says
        shard.unlink()
    options = ["--config", str(copied.parent / "run.yaml"), "--workers", "0", "--precompute_features", str(copied)]
    assert main(options) == 0
    for name in ("features-00000.safetensors", "features-00001.safetensors"):
        ours, theirs = load_file(copied / name), load_file(made / name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_bad_image_ends_it_or_is_left_out(tmp_path, capsys):
    images = Path(shutil.copytree(GOLDEN / "samples" / "images", tmp_path / "images"))
    records = json.loads((GOLDEN / "samples" / "data.json").read_text())
    broken = images / next(record["image"] for record in records if "image" in record)
    broken.write_bytes(broken.read_bytes()[:40])
    settings = {"image_folder": str(images), "precompute_features": str(tmp_path / "features")}
    path = config(tmp_path, **settings)
    assert main(["--config", str(path), "--workers", "0"]) == 2
    assert names(capsys.readouterr().err, broken)
    words = ["--config", str(path), "--workers", "0", "--on_bad_sample", "skip"]
    assert main(words) == 0
    with refused(broken.name, tmp_path / "features"):
        read_all(tmp_path / "features", image_folder=str(images))


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"precompute_features": None}, ["precompute_features"]),
        ({"data_path": "text.json"}, ["images"]),
    ],
)
def test_what_cannot_be_precomputed(tmp_path, capsys, settings, named):
    records = [{"id": "a", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}]
    (tmp_path / "text.json").write_text(json.dumps(records))
    path = config(tmp_path, **{"precompute_features": str(tmp_path / "features"), **settings})
    keys = yaml.safe_load(path.read_text())
    keys["data_path"] = str(tmp_path / "text.json")
    path.write_text(yaml.safe_dump(keys))
    assert main(["--config", str(path)]) == 2
    assert names(capsys.readouterr().err, *named)


def test_another_folders_files_are_left_alone(tmp_path, capsys):
    (tmp_path / "features").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "features" / "model.safetensors")
    path = config(tmp_path, precompute_features=str(tmp_path / "features"))
    assert main(["--config", str(path)]) == 2
    assert names(capsys.readouterr().err, tmp_path / "features", "model.safetensors")
