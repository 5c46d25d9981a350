"""The JSON files of a checkpoint: values out of range, settings that are lost, and files that cannot be read are named."""

from __future__ import annotations

import json
import shutil
from functools import reduce
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_sp import LlavaSPConfig, LlavaSPForCausalLM, LlavaSPProcessor
from llava_sp.checkpoints.inspection.report import inspect
from llava_sp.checkpoints.opening.full import recorded_config
from llava_sp.checkpoints.reading.formats import recognise
from llava_sp.checkpoints.reading.settings import read_all_settings
from llava_sp.model.backbone_configs import PROCESSOR_FILES
from tests.checkpoints.kinds import Kind
from tests.messages import names, refused
from tests.released import load_released

NAN, INF = float("nan"), float("inf")
ADAPTER = "lora/adapter_config.json"
WRONG = {  # file, key -> values that are never right
    ("config.json", "image_token_index"): (-5, 1024, 10**30, NAN, "x", None),
    ("config.json", "pad_token_id"): (-5, 1024, 7.5, [1]),
    ("config.json", "eos_token_id"): (-1, [2, 5000], "x", NAN),
    ("config.json", "spatial_scales"): ([0], [4, 99], [NAN], [], 4, "x"),
    ("config.json", "spatial_width"): (0, -1, 10**30, NAN, "x"),
    ("config.json", "fusion_stride"): (0, -2, NAN, 1e30, False),
    ("config.json", "vision_feature_layer"): (9, 10**30, NAN, "x", None),
    ("config.json", "text_config.num_hidden_layers"): (0, -1, 10**9, NAN),
    ("config.json", "dtype"): ("float17", 0.5, 10**30, {}),
    ("config.json", "text_config.pad_token_id"): (-5, 1024, 10**30),
    ("config.json", "text_config.vocab_size"): (0, -5, None, 10**30),
    ("config.json", "text_config.rms_norm_eps"): (0, -1e-5, NAN, INF, "x"),
    ("config.json", "text_config.rope_parameters.rope_theta"): (0, -1, NAN),
    ("config.json", "text_config.attention_dropout"): (-0.1, 1.5, NAN),
    ("config.json", "vision_config.image_size"): (0, -336, NAN, [336, 0]),
    ("config.json", "vision_config.layer_norm_eps"): (0, NAN),
    ("generation_config.json", "max_new_tokens"): (0, -1, NAN, 1.5, "x"),
    ("generation_config.json", "eos_token_id"): (-5, 1024, [NAN]),
    ("generation_config.json", "pad_token_id"): (-5, 1024),
    ("generation_config.json", "temperature"): (-1, NAN, INF, "x"),
    ("generation_config.json", "top_p"): (-0.1, 2, NAN),
    ("generation_config.json", "num_beams"): (0, -1),
    ("generation_config.json", "repetition_penalty"): (0, -1, NAN),
    (ADAPTER, "lora_alpha"): (NAN, INF, 0, -16, None, "x", 2**31),
    (ADAPTER, "r"): (0, -8, NAN, 1.5, True, 10**30),
    (ADAPTER, "lora_dropout"): (-0.1, 1.5, NAN),
    (ADAPTER, "alpha_pattern"): ({"q_proj": NAN}, {"q_proj": -1}, [1]),
    (ADAPTER, "rank_pattern"): ({"q_proj": 0}, {"q_proj": 2.5}),
    (ADAPTER, "bias"): ("all",),
    (ADAPTER, "trainable_token_indices"): (0, False, [3]),
    (ADAPTER, "alora_invocation_tokens"): ([5],),
    ("processor_config.json", "num_image_tokens"): (0, -5, NAN, "x"),
    ("processor_config.json", "image_processor.image_mean"): ([NAN] * 3, ["x"], 3),
    ("processor_config.json", "image_processor.image_std"): ([0, 0, 0], [-1, 1, 1], [NAN] * 3),
    ("processor_config.json", "image_processor.resample"): (7, -1, "x", NAN),
    ("processor_config.json", "image_processor.size"): (10**6, {"height": 10**6, "width": 16}),
    ("processor_config.json", "image_processor.do_normalize"): (0, "x", {}),
    ("processor_config.json", "image_processor.rescale_factor"): (0, -1, NAN),
    ("tokenizer_config.json", "model_max_length"): (0, -1, NAN),
    ("llava_sp.json", "files"): ([], {}, {"lora/adapter_model.safetensors": {"bytes": 181000, "sha256": "x"}}),
}
FILES = sorted({file for file, _ in WRONG})
UNREADABLE = {
    "deep": (b"[" * 100_000, "too deep"),
    "digits": (b'{"bos_token_id": ' + b"1" * 5000 + b"}", "limit"),
    "list": (b"[]", "expected an object"),
    "empty": (b"", "is empty"),
    "zeroed": (bytes(100), "not valid JSON"),
    "another encoding": ("{}".encode("utf-16"), "not UTF-8"),
}


@pytest.fixture
def copy(kinds, tmp_path) -> Kind:
    return kinds["llava_sp_adapter"].copy(tmp_path / "x")


def put(file: Path, key: str, value: Any) -> None:
    """Set a key of a JSON file; with dots, one further down."""
    content = json.loads(file.read_text())
    *parents, leaf = key.split(".")
    reduce(dict.__getitem__, parents, content)[leaf] = value
    file.write_text(json.dumps(content))


def problems(folder: Path, refused: type = LlavaSPForCausalLM) -> str:
    """Why the report says that it would not load; opening refuses it too."""
    report = inspect(folder)
    assert not report["loads"]
    with pytest.raises(ValueError):
        refused.from_pretrained(folder)
    return "\n".join(report["problems"])


@pytest.mark.parametrize("file, key", WRONG, ids=lambda value: value.rpartition("/")[2])
def test_values_out_of_range_are_named(copy, file, key):
    whole = (copy.folder / file).read_text()
    for value in WRONG[file, key]:
        (copy.folder / file).write_text(whole)
        put(copy.folder / file, key, value)
        said = problems(copy.folder)
        leaf = key.rpartition(".")[2]
        assert str(copy.folder) in said and leaf in said, (value, said)


@pytest.mark.parametrize("how", UNREADABLE)
def test_json_that_cannot_be_read(copy, how):
    content, reason = UNREADABLE[how]
    for file in FILES:
        shutil.copyfile(copy.folder / file, copy.folder / "kept")
        (copy.folder / file).write_bytes(content)
        said = problems(copy.folder)
        assert str(copy.folder / file) in said and reason in said
        shutil.move(copy.folder / "kept", copy.folder / file)
    assert inspect(copy.folder)["loads"]


# ---- what decides the model is stated


@pytest.mark.parametrize("layout", ["cropping", "pooling"])
def test_a_setting_that_is_lost_is_named(golden, tmp_path, layout):
    """A default in its place would be another model of the same shapes, such as cropping for pooling."""
    load_released(golden, layout).save_pretrained(tmp_path)
    found = recognise(tmp_path)
    whole = found.config
    recorded_config(found)
    lost = ["spatial_variant", "spatial_scales", "spatial_width", "spatial_fusion", "fusion_stride"]
    lost += ["vision_feature_layer", "vision_feature_select_strategy", "image_token_index", "projector_hidden_act"]
    lost += [f"text_config.{key}" for key in ("rms_norm_eps", "hidden_act", "rope_parameters", "num_attention_heads")]
    lost += [f"vision_config.{key}" for key in ("hidden_act", "layer_norm_eps")]
    for key in [*lost, "text_config", "vision_config"]:
        part, _, leaf = key.rpartition(".")
        left = {name: value for name, value in (whole[part] if part else whole).items() if name != leaf}
        (tmp_path / "config.json").write_text(json.dumps(whole | {part: left} if part else left))
        with pytest.raises(ValueError, match=rf"{tmp_path / 'config.json'}.* has no .*{leaf}"):
            LlavaSPForCausalLM.from_pretrained(tmp_path)
        assert not inspect(tmp_path)["loads"]


def test_another_version_of_transformers_has_other_settings(copy):
    """But what decides the projector is stated by all."""
    file = copy.folder / "config.json"
    content = json.loads(file.read_text())
    content["transformers_version"] = "5.99.0"
    del content["text_config"]["mlp_bias"]
    file.write_text(json.dumps(content))
    assert inspect(copy.folder)["loads"]
    del content["spatial_variant"]
    file.write_text(json.dumps(content))
    assert "has no spatial_variant" in problems(copy.folder)


@pytest.mark.parametrize("text", ["llama", "qwen2", "gemma2", "mistral", "phi", "gpt_neox"])
@pytest.mark.parametrize("tower", ["clip_vision_model", "siglip_vision_model", "dinov2"])
def test_all_that_decides_is_saved(tmp_path, text, tower):
    config = LlavaSPConfig(
        text_config={"model_type": text, "vocab_size": 33000},
        vision_config={"model_type": tower, "image_size": 224, "patch_size": 14},
    )
    config.save_pretrained(tmp_path)
    read_all_settings(tmp_path, "ours")
    whole = json.loads((tmp_path / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        made = getattr(config, part).to_dict()
        assert made.keys() - whole[part].keys() <= {"output_attentions", "output_hidden_states", "return_dict"} | {
            "_name_or_path", "architectures", "chunk_size_feed_forward", "dtype", "id2label", "is_encoder_decoder",
            "label2id", "problem_type", "transformers_version",
        }  # fmt: skip


def test_the_processor_is_the_models(copy):
    for file, key, value in (
        ("config.json", "image_token_index", 7),
        ("config.json", "pad_token_id", 7),
        ("processor_config.json", "num_image_tokens", 576),
        ("processor_config.json", "image_processor.crop_size", {"height": 224, "width": 224}),
    ):
        whole = (copy.folder / file).read_text()
        put(copy.folder / file, key, value)
        assert names(problems(copy.folder, LlavaSPProcessor), "not that of its model")
        (copy.folder / file).write_text(whole)
    for key in ("image_aspect_ratio", "conversation_template", "image_processor.image_mean", "image_processor.size"):
        whole = (copy.folder / "processor_config.json").read_text()
        content = json.loads(whole)
        *parents, leaf = key.split(".")
        del reduce(dict.__getitem__, parents, content)[leaf]
        (copy.folder / "processor_config.json").write_text(json.dumps(content))
        assert f"has no {leaf}" in problems(copy.folder)
        (copy.folder / "processor_config.json").write_text(whole)


def test_settings_of_generate_are_those_of_the_adapter(copy):
    put(copy.folder / "generation_config.json", "max_new_tokens", 3)
    assert LlavaSPForCausalLM.from_pretrained(copy.folder).generation_config.max_new_tokens == 3


def test_the_base_decides_whether_its_head_is_its_embedding(copy):
    head = copy.open().lm_head.weight.clone()
    for key in ("tie_word_embeddings", "text_config.tie_word_embeddings"):
        put(copy.folder / "config.json", key, True)
        assert torch.equal(copy.open().lm_head.weight, head)


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        *product(["original_lora", "original_projector", "original_full"], ["the key", "its value"]),
        *product(["original_lora", "original_projector"], ["the file"]),
    ],
)
def test_the_original_must_state_how_images_are_prepared(kinds, tmp_path, name, lost):
    copy = kinds[name].copy(tmp_path / "copy")
    file = copy.folder / "config.json"
    settings = json.loads(file.read_text())
    if lost == "the file":
        file.unlink()
    elif lost == "the key":
        del settings["image_aspect_ratio"]
    else:
        settings["image_aspect_ratio"] = None
    if lost != "the file":
        file.write_text(json.dumps(settings))
    with refused(file, "image_aspect_ratio"):
        LlavaSPProcessor.from_pretrained(copy.folder, **copy.keywords)
    given = LlavaSPProcessor.from_pretrained(copy.folder, **copy.keywords, image_aspect_ratio="crop")
    assert given.image_aspect_ratio == "crop"


@pytest.mark.parametrize("name", ["llava_sp", "llava_sp_adapter", "original_full", "llava_hf"])
@pytest.mark.parametrize("damage", [b"\xe9\xff", b'{"a": ', b"[" * 100_000, b'{"added_tokens": [{"id": "x"}]}'])
def test_a_damaged_tokenizer_or_template_is_named(kinds, tmp_path, name, damage):
    for file in kinds[name].folder.iterdir():
        if file.name not in PROCESSOR_FILES or file.name.endswith("config.json") or file.suffix == ".model":
            continue
        copy = kinds[name].copy(tmp_path / file.name)
        (copy.folder / file.name).write_bytes(damage)
        try:
            LlavaSPProcessor.from_pretrained(copy.folder, **copy.keywords)
        except ValueError as error:
            assert names(str(error), file.name), error
        else:  # transformers does not need a special_tokens_map.json, or its keys
            assert file.name in ("special_tokens_map.json", "chat_template.jinja")
