"""`inspect` says that a checkpoint would load exactly if it does, model and processor: whole ones, and spoilt in many ways."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from llava_sp import LlavaSPForCausalLM, LlavaSPProcessor
from llava_sp.checkpoints.inspection.report import inspect
from llava_sp.checkpoints.inspection.text import text
from llava_sp.checkpoints.reading.formats import UnknownFormat
from tests.checkpoints.kinds import NAMES, Kind

GOLDEN = Path(__file__).parents[1] / "golden"
SETTINGS = {  # of a config.json
    "original": [
        {"mm_vision_select_layer": 2},
        {"mm_vision_select_layer": -3},
        {"mm_vision_select_layer": 9},
        {"mm_vision_select_layer": -9},
        {"mm_vision_select_layer": "-2"},
        {"mm_vision_select_layer": None},
        {"mm_vision_select_feature": "cls_patch"},
        {"mm_vision_tower": None},
        {"mm_vision_tower": ["clip", "clip"]},
        {"mm_vision_tower": {"name": "clip"}},
        {"_name_or_path": 3},
        {"mm_projector_type": "linear"},
        {"mm_hidden_size": 7},
        {"image_aspect_ratio": "anyres"},
        {"image_aspect_ratio": "square"},
        {"torch_dtype": "float17"},
        {"torch_dtype": None},
        {"hidden_size": "many"},
        {"hidden_size": 128},
        {"num_hidden_layers": 2},
        {"vocab_size": 7},
        {"model_type": "llava"},
        {"model_type": "mistral"},
        {"vision_tower": ["a"]},
        {"rope_scaling": "much"},
        {"num_attention_heads": 0},
        {"hidden_act": "strange"},
        {"max_position_embeddings": "long"},
        {"rope_theta": 5e5},
        {"rope_theta": None},
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_scaling": {"type": "strange", "factor": 4.0}},
        {"rms_norm_eps": 1e-3},
    ],
    "llava_sp": [
        {"spatial_variant": "strange"},
        {"spatial_variant": "pooling"},
        {"spatial_scales": [4, 99]},
        {"spatial_scales": [4, 24]},
        {"spatial_fusion": False},
        {"fusion_kernel": 8},
        {"vision_feature_layer": 9},
        {"vision_feature_layer": -1},
        {"vision_feature_layer": "-2"},
        {"vision_config": {}},
        {"vision_config": 3},
        {"text_config": {"model_type": "llama"}},
        {"vision_tower_name_or_path": 3},
        {"language_model_name_or_path": "/no/longer/there"},
        {"dtype": "float17"},
        {"image_token_index": "<image>"},
        {"image_token_index": 7},
        {"model_type": "llava"},
        {"spatial_width": "wide"},
        {"pad_token_id": "<pad>"},
        {"tie_word_embeddings": True},
    ],
    "llava_hf": [
        {"vision_feature_layer": 9},
        {"vision_feature_layer": -1},
        {"vision_feature_layer": [-2, -1]},
        {"vision_config": {}},
        {"text_config": {"model_type": "llama"}},
        {"vision_feature_layer": "-2"},
        {"image_token_index": "<image>"},
        {"tie_word_embeddings": True},
        {"model_type": "llava_next"},
        {"projector_hidden_act": "relu"},
        {"vision_feature_select_strategy": "full"},
        {"multimodal_projector_bias": False},
        {"model_type": "llava_sp"},
        {"dtype": "float17"},
    ],
}


def agree(kind: Kind, what: str) -> bool:
    """Whether it loads, by opening it; the report must say the same, and give lines that work."""
    try:
        report = inspect(kind.folder)
        assert text(report)
        says = report["loads"]
        reason = report["problems"]
    except (UnknownFormat, FileNotFoundError) as error:
        says, reason = False, error
    scope = {"LlavaSPForCausalLM": LlavaSPForCausalLM, "LlavaSPProcessor": LlavaSPProcessor}
    try:
        if says:  # with the tests' backbones in place of the ones to be given
            lines = "\n".join(report["call"])
            for word, base in (("LANGUAGE_MODEL", "base"), ("VISION_TOWER", "clip")):
                lines = lines.replace(word, str(GOLDEN / base))
            exec(lines, scope)
        else:
            model = kind.open()
            if (kind.folder / "processor_config.json").is_file() or not report["format"].startswith("llava_sp"):
                LlavaSPProcessor.from_pretrained(kind.folder, **kind.keywords)
            else:
                LlavaSPProcessor.from_backbones(model.config)
        opens, error = True, None
    except (ValueError, OSError) as raised:  # and nothing else: a user's mistake is told in words
        opens, error = False, raised
    assert says == opens, f"{what}: inspect says {says} ({reason}), opening {opens} ({type(error).__name__}: {error})"
    return opens


def spoil(file: Path, how: str) -> None:
    if how == "missing":
        file.unlink()
    elif how != "[]" or file.suffix == ".json":
        data = file.read_bytes()
        file.write_bytes({"cut": data[: len(data) // 2], "[]": b"[]", "empty": b""}[how])


def with_bases(kind: Kind, to: Path) -> Kind:
    """A copy that needs no keywords: an original's base and tower are recorded where they are."""
    copy = kind.copy(to)
    settings = {"config.json": {"_name_or_path": "language_model", "mm_vision_tower": "vision_tower"}}
    settings["adapter_config.json"] = {"base_model_name_or_path": "language_model"}
    for name, keys in settings.items():
        file = copy.folder / name
        if copy.keywords and file.is_file():
            places = {key: str(copy.keywords[word]) for key, word in keys.items() if word in copy.keywords}
            file.write_text(json.dumps(json.loads(file.read_text()) | places))
    return Kind(to, copy.key)


def files(kind: Kind) -> list[str]:
    return sorted(
        str(file.relative_to(kind.folder))
        for file in kind.folder.rglob("*")
        if file.is_file() and file.suffix != ".py"  # those are for the hub
    )


@pytest.mark.parametrize("name", NAMES)
def test_each_file_missing(kinds, tmp_path, name):
    opened = []
    for number, file in enumerate(files(kinds[name])):
        copy = with_bases(kinds[name], tmp_path / str(number))
        (copy.folder / file).unlink()
        opened.append(agree(copy, f"without {file}"))
    assert not all(opened)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("content", ["cut", "[]", "empty"])
def test_each_file_broken(kinds, tmp_path, name, content):
    opened = []
    for number, file in enumerate(files(kinds[name])):
        if content == "[]" and not file.endswith(".json"):
            continue
        copy = with_bases(kinds[name], tmp_path / str(number))
        spoil(copy.folder / file, content)
        opened.append(agree(copy, f"{content} {file}"))
    assert not all(opened)


@pytest.mark.parametrize("name", NAMES)
def test_settings(kinds, tmp_path, name):
    changes = SETTINGS["original" if name.startswith("original") else name.removesuffix("_adapter")]
    opened = []
    for number, change in enumerate(changes):
        copy = with_bases(kinds[name], tmp_path / str(number))
        file = copy.folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        opened.append(agree(copy, str(change)))
    assert any(opened) and not all(opened)


@pytest.mark.parametrize("how", ["missing", "cut", "empty", "[]"])
@pytest.mark.parametrize("base", ["base", "clip"])
@pytest.mark.parametrize("name", ["original_projector", "llava_sp_adapter"])
def test_a_base_with_each_file_missing_or_broken(kinds, tmp_path, name, base, how):
    opened = []
    keys = {
        "base": ("_name_or_path", "language_model_name_or_path"),
        "clip": ("mm_vision_tower", "vision_tower_name_or_path"),
    }[base]
    for number, file in enumerate(sorted(file.name for file in (GOLDEN / base).iterdir())):
        copy = with_bases(kinds[name], tmp_path / str(number))
        shutil.copytree(GOLDEN / base, copy.folder.with_suffix(".base"), copy_function=shutil.copyfile)
        config = copy.folder / "config.json"
        places = dict.fromkeys(keys, str(copy.folder.with_suffix(".base")))
        config.write_text(json.dumps(json.loads(config.read_text()) | places))
        spoil(copy.folder.with_suffix(".base") / file, how)
        opened.append(agree(copy, f"{file} {how}"))
    assert not all(opened)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_no_tokenizer(kinds, tmp_path, name, recorded):
    copy = with_bases(kinds[name], tmp_path / "x") if recorded else kinds[name].copy(tmp_path / "x")
    for file in copy.folder.glob("*token*"):
        file.unlink()
    assert agree(copy, "no tokenizer") == (name in ("original_lora", "original_projector"))  # the base has one


@pytest.mark.parametrize("name", ["llava_sp", "llava_sp_adapter"])
def test_neither_a_processor_nor_the_bases_that_it_was_made_of(kinds, tmp_path, name):
    copy = kinds[name].copy(tmp_path / "x")
    (copy.folder / "processor_config.json").unlink()
    config = copy.folder / "config.json"
    lost = {"language_model_name_or_path": "/no/longer/there", "vision_tower_name_or_path": "../clip"}
    config.write_text(json.dumps(json.loads(config.read_text()) | lost))
    assert agree(copy, "no processor, no bases")


@pytest.mark.parametrize("name", NAMES)
def test_another_tokenizer(kinds, golden, tmp_path, name):
    """Words are where the base has its image and padding tokens."""
    tokenizer = AutoTokenizer.from_pretrained(golden / "base")
    tokenizer.add_tokens(["<one>", "<two>"])
    copy = with_bases(kinds[name], tmp_path / "x")
    tokenizer.save_pretrained(copy.folder)
    assert agree(copy, "another tokenizer") == (name in ("original_full", "llava_hf"))  # their only one


@pytest.mark.parametrize("name", NAMES)
def test_tensors(kinds, tmp_path, name):
    changes = {
        "gone": lambda tensors, key: tensors.pop(key),
        "new": lambda tensors, key: tensors.update({"model.strange.weight": torch.ones(3)}),
        "renamed": lambda tensors, key: tensors.update({f"{key}s": tensors.pop(key)}),
        "turned": lambda tensors, key: tensors.update({key: tensors[key].transpose(0, -1)[:1].contiguous()}),
        "in 16 bit": lambda tensors, key: tensors.update({key: tensors[key].half()}),
        "all gone": lambda tensors, key: tensors.clear(),
    }
    opened = {}
    for what, change in changes.items():
        copy = kinds[name].copy(tmp_path / what)
        copy.edit(lambda tensors, change=change, key=copy.key: change(tensors, key))
        opened[what] = agree(copy, what)
    assert opened == {**dict.fromkeys(changes, False), "in 16 bit": True}
