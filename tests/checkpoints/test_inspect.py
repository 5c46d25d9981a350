"""The inspect command: what it says of every kind of checkpoint, whole and broken, and that its line of Python works."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from llava_sp import LlavaSPForCausalLM, LlavaSPProcessor
from llava_sp.checkpoints.inspect import main
from llava_sp.checkpoints.inspection.report import PLACEHOLDERS, inspect
from llava_sp.checkpoints.inspection.text import text
from llava_sp.checkpoints.reading import tensor_files
from llava_sp.checkpoints.reading.formats import FORMATS, UnknownFormat, recognise
from llava_sp.checkpoints.writing.conversion import convert
from llava_sp.checkpoints.writing.merging import merge
from llava_sp.model.configuration_llava_sp import LlavaSPConfig
from tests.checkpoints.kinds import NAMES, Kind, save, spoil
from tests.released import LAYOUTS

GOLDEN_TOWER = str(Path(__file__).parents[1] / "golden/clip")
VALUES = {
    "nan": "NaN or infinity",
    "inf": "NaN or infinity",
    "huge": "never initialised",
    "denormal": "never initialised",
    "zeros": "zero everywhere",
}


def follow(report: dict, golden, **keywords):
    """Evaluate the lines that the report gives, with backbones in place of the placeholders."""
    lines = "\n".join(report["call"])
    lines = lines.replace(PLACEHOLDERS["language_model"], str(golden / "base"))
    scope = {"LlavaSPForCausalLM": LlavaSPForCausalLM, "LlavaSPProcessor": LlavaSPProcessor}
    exec(lines.replace(PLACEHOLDERS["vision_tower"], str(golden / "clip")), scope)
    return scope["model"], scope["processor"]


def works(report: dict, golden) -> None:
    model, processor = follow(report, golden)
    assert isinstance(model, LlavaSPForCausalLM) and isinstance(processor, LlavaSPProcessor)
    assert processor.num_image_tokens == model.config.num_image_tokens
    spatial = report["spatial"]
    for name in spatial.keys() & {"spatial_variant", "spatial_scales", "spatial_width", "grid_size"}:
        assert getattr(model.config, name) == spatial[name], name


# ---------------------------------------------------------------- whole checkpoints


@pytest.mark.parametrize("layout", LAYOUTS)
def test_released_lora_folders(golden, layout):
    report = inspect(golden / f"checkpoint_{layout}/lora")
    assert (report["format"], report["loads"], report["problems"]) == ("original_lora", True, [])
    assert report["needs"] == ["language_model", "vision_tower"]  # "base" and "clip" are folders of their author's
    assert report["spatial"]["spatial_variant"] == layout.split("_")[0]
    assert report["spatial"]["spatial_fusion"] == (layout != "pooling")
    assert (report["spatial"]["num_spatial_tokens"], report["spatial"]["num_patch_tokens"]) == (6, 576)
    assert (report["lora"]["r"], report["lora"]["alpha"], report["lora"]["layers"]) == (8, 16, 21)
    assert len(report["lora"]["targets"]) == 7
    assert report["conversation_template"] == {"recorded": None, "image_aspect_ratio": "pad"}
    assert set(report["parts"]) == {"patch MLP", "spatial branch", "LoRA"}
    model, _ = follow(report, golden)
    trained = {name: p.numel() for name, p in model.named_parameters() if ".lora_" in name or "projector" in name}
    assert sum(part["parameters"] for part in report["parts"].values()) == sum(trained.values())
    works(report, golden)


@pytest.mark.parametrize("layout", ["cropping", "pooling"])
@pytest.mark.parametrize("file", ["", "model.bin"])
def test_first_stage(golden, layout, file):
    report = inspect(golden / "pretrain_artifacts" / layout / file)
    assert (report["format"], report["loads"]) == ("original_projector", True)
    assert report["spatial"]["spatial_variant"] == layout and report["lora"] is None
    works(report, golden)


@pytest.mark.parametrize(("layout", "missing"), [("cropping", 17), ("pooling", 5)])
def test_an_intermediate_first_stage(golden, layout, missing, capsys):
    folder = golden / "pretrain_artifacts" / layout / "checkpoint-1000"
    report = inspect(folder)
    assert not report["loads"] and len(report["missing"]) == missing
    conv = "conv_8.weight" if layout == "cropping" else "conv_8.1.weight"
    assert report["missing"][0] == {"key": f"model.{conv}", "file": "mm_projector.bin"}
    assert main([str(folder)]) == 1
    shown = capsys.readouterr().out
    assert f"model.{conv}  in mm_projector.bin" in shown and "its model.bin has all tensors" in shown


@pytest.mark.parametrize("name", NAMES)
def test_every_format(golden, kinds, name, capsys):
    report = inspect(kinds[name].folder)
    assert (report["format"], report["loads"], report["problems"]) == (name, True, [])
    assert not (report["missing"] or report["unexpected"] or report["wrong_shape"] or report["empty"])
    unchanged = "those that were saved, by their sha256"  # of the files that a manifest knows
    assert report["values"] == (unchanged if name == "llava_sp_adapter" else "not read; checked on opening")
    works(report, golden)
    assert main([str(kinds[name].folder)]) == 0
    shown = capsys.readouterr().out
    assert FORMATS[name].title in shown and report["call"][0] in shown
    assert main([str(kinds[name].folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(report, default=str))


@pytest.mark.parametrize("name", ["original_full", "llava_sp", "llava_hf"])
def test_counts_of_a_whole_model(golden, kinds, name):
    model = kinds[name].open()
    counts = {part: about["parameters"] for part, about in inspect(kinds[name].folder)["parts"].items()}
    grown = 2 * 96 * (len(model.lm_head.weight) - 1000) if name == "original_full" else 0  # on opening
    tower = sum(p.numel() for p in model.model.vision_tower.parameters()) if name != "original_full" else 0
    assert counts.get("vision tower", 0) == tower
    language = sum(p.numel() for p in model.model.language_model.parameters()) + model.lm_head.weight.numel()
    assert counts["language model"] == language - grown
    projector = sum(p.numel() for p in model.model.multi_modal_projector.parameters())
    assert counts["patch MLP"] + counts.get("spatial branch", 0) == projector


def test_our_own_record(kinds, golden):
    report = inspect(kinds["llava_sp_adapter"].folder)
    assert report["run"] == {"stage": "finetune_lora", "step": 7}
    assert report["conversation_template"] == {"recorded": "vicuna_v1", "image_aspect_ratio": "pad"}
    assert (report["language_model"]["status"], report["vision_tower"]["status"]) == ("there", "there")
    assert (
        report["language_model"]["recorded"] == str(golden / "base")
        and len(report["language_model"]["fingerprint"]) == 16
    )
    assert "run            stage finetune_lora, step 7" in text(report)
    assert inspect(kinds["llava_sp"].folder)["language_model"]["status"] == "within"


def test_a_merge_is_reported(kinds, tmp_path):
    copy = kinds["llava_sp"].copy(tmp_path / "x")
    record = {"adapter": {"path": "/some/adapter", "hash": "0123456789abcdef"}, "date": "2030-01-02T03:04:05+0000"}
    record["language_model"] = {"path": "/some/base", "fingerprint": "f" * 16}
    (copy.folder / "merged.json").write_text(json.dumps(record))
    report = inspect(copy.folder)
    assert report["merged_from"] == record
    assert "merged from    /some/adapter (0123456789abcdef) in /some/base, on 2030-01-02" in text(report)
    (copy.folder / "merged.json").write_text('{"adapter"')
    report = inspect(copy.folder)
    assert report["loads"] and "merged from    merged.json is not a valid record of a merge" in text(report)


def test_types_by_part(kinds, tmp_path):
    copy = kinds["original_lora"].copy(tmp_path / "x")
    copy.edit(lambda tensors: tensors.update({k: t.half() for k, t in tensors.items() if "mm_projector" in k}))
    copy.edit(lambda tensors: tensors.update({k: t.bfloat16() for k, t in tensors.items() if "conv_4." in k}))
    parts = inspect(copy.folder)["parts"]
    assert (parts["patch MLP"]["dtypes"], parts["LoRA"]["dtypes"]) == (["float16"], ["float32"])
    assert parts["spatial branch"]["dtypes"] == ["bfloat16", "float32"]


def test_without_our_processors_files(kinds, golden, tmp_path):
    copy = kinds["llava_sp_adapter"].copy(tmp_path / "x")
    (copy.folder / "processor_config.json").unlink()
    report = inspect(copy.folder)
    assert "no processor files" in text(report)
    works(report, golden)


# ---------------------------------------------------------------- backbones


@pytest.mark.parametrize(
    ("recorded", "status", "said"),
    [
        ("base", "missing", "base: not found; pass language_model="),
        ("/mnt/author/vicuna", "missing", "/mnt/author/vicuna: not found; pass language_model="),
        ("lmsys/vicuna-7b-v1.5", "hub", "lmsys/vicuna-7b-v1.5: on the hub, not in the cache"),
        ("beside", "there", "beside: there, in "),
        (None, "missing", "not recorded; pass language_model="),
    ],
)
def test_where_the_base_is(kinds, golden, tmp_path, monkeypatch, recorded, status, said):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    shutil.copytree(golden / "base", tmp_path / "beside")
    copy = kinds["original_projector"].copy(tmp_path / "x")
    config = json.loads((copy.folder / "config.json").read_text())
    (copy.folder / "config.json").write_text(json.dumps(config | {"_name_or_path": recorded}))
    report = inspect(copy.folder)
    assert report["loads"] and report["language_model"]["status"] == status and said in text(report)
    assert ("language_model" in report["needs"]) == (status == "missing")


def test_a_base_in_the_hubs_cache(kinds, golden, tmp_path, monkeypatch):
    snapshot = tmp_path / "cache/models--lmsys--vicuna/snapshots/0123"
    shutil.copytree(golden / "base", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    copy = kinds["original_projector"].copy(tmp_path / "x")
    config = json.loads((copy.folder / "config.json").read_text())
    (copy.folder / "config.json").write_text(json.dumps(config | {"_name_or_path": "lmsys/vicuna"}))
    report = inspect(copy.folder)
    assert (report["language_model"]["status"], report["needs"]) == ("cached", ["vision_tower"])
    shard = snapshot / "pytorch_model-00002-of-00002.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-300])
    assert not inspect(copy.folder)["loads"]
    shard.unlink()
    for files in ("a shard less", "config.json alone"):
        if files == "config.json alone":
            for file in snapshot.glob("*model*"):
                file.unlink()
        report = inspect(copy.folder)
        assert (report["language_model"]["status"], report["loads"]) == ("hub", True), files
        assert "loads          yes, given vision_tower=, after a download" in text(report), files


def test_a_base_that_lacks_a_shard(kinds, golden, tmp_path):
    shutil.copytree(golden / "base", tmp_path / "base")
    (tmp_path / "base/pytorch_model-00002-of-00002.bin").unlink()
    report = inspect(kinds["original_projector"].copy(tmp_path / "x").folder)
    assert not report["loads"] and "pytorch_model-00002-of-00002.bin, which does not exist" in report["problems"][0]


def test_a_base_of_another_width(kinds, golden, tmp_path):
    """The base decides what fits, not what the checkpoint's configuration copied of another one."""
    shutil.copytree(golden / "base", tmp_path / "base")
    config = json.loads((golden / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps(config | {"hidden_size": 128}))
    report = inspect(kinds["original_projector"].copy(tmp_path / "x").folder)
    wrong = {one["key"]: one["expected"] for one in report["wrong_shape"]}
    assert wrong["model.mm_projector.2.weight"] == (128, 128) and wrong["model.conv_linear.1.bias"] == (128,)


# ---------------------------------------------------------------- headers only


def test_no_tensor_is_read(kinds, monkeypatch):
    def read(*_, **__):
        raise AssertionError("a tensor was read")

    class Headers:
        """What safetensors opens, of which no tensor can be had."""

        def __init__(self, file, framework):
            self.opened = safe_open(file, framework)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def keys(self):
            return self.opened.keys()

        def get_slice(self, key):
            part = self.opened.get_slice(key)
            return SimpleNamespace(get_shape=part.get_shape, get_dtype=part.get_dtype)

    monkeypatch.setattr(tensor_files, "safe_open", Headers)
    for name in ("read_tensors", "value_problem", "tensor_lines"):
        monkeypatch.setattr(tensor_files, name, read)
    for kind in kinds.values():
        assert inspect(kind.folder)["loads"]


def test_seven_billion_parameters_take_seconds(kinds, tmp_path):
    """A full checkpoint of 7B: the headers are real, the tensors are a hole in the file."""
    copy = kinds["llava_sp"].copy(tmp_path / "x")
    for file in copy.folder.glob("model*"):
        file.unlink()
    text_config = {"model_type": "llama", "vocab_size": 32064}  # Llama's other defaults are those of 7B
    vision = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096}
    vision |= {"num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14}
    config = LlavaSPConfig(text_config=text_config, vision_config=vision)
    config.save_pretrained(copy.folder)
    with torch.device("meta"):
        model = LlavaSPForCausalLM(config)
    header, end = {}, 0
    for name, parameter in model.named_parameters():
        offsets = [end, end := end + 2 * parameter.numel()]
        header[name] = {"dtype": "F16", "shape": list(parameter.shape), "data_offsets": offsets}
    content = json.dumps(header).encode()
    with open(copy.folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(content)) + content)
        file.truncate(8 + len(content) + end)
    start = time.monotonic()
    report = inspect(copy.folder)
    assert time.monotonic() - start < 10
    assert report["loads"] and report["bytes"] > 15e9
    assert report["parts"]["language model"] == {"parameters": 6_738_939_904, "tensors": 291, "dtypes": ["float16"]}
    assert report["parts"]["patch MLP"]["parameters"] == 20_979_712
    assert report["parts"]["spatial branch"]["parameters"] == 763_363_328 + 134_217_728 + 3 * 263_680 + 4_198_400


# ---------------------------------------------------------------- broken checkpoints


def refused(kind: Kind, said: str, *names: str) -> None:
    """Opening is an error that holds `said` and names all of `names`; no model comes back."""
    with pytest.raises(ValueError) as error:
        kind.open()
    assert all(name in str(error.value) for name in (said, *names)), str(error.value)


@pytest.mark.parametrize("how", VALUES)
@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("original_lora", "base_model.model.model.conv_8.weight"),
        ("original_lora", "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"),
        ("original_projector", "model.conv_8.weight"),
        ("original_full", "model.conv_8.weight"),
        ("original_full", "model.layers.1.mlp.up_proj.weight"),
        ("llava_sp_adapter", "spatial.linear.weight"),
        ("llava_sp", "model.multi_modal_projector.spatial.linear.weight"),
        ("llava_hf", "language_model.model.layers.1.mlp.up_proj.weight"),
    ],
)
def test_values_are_checked_on_opening(kinds, tmp_path, name, key, how):
    copy = kinds[name].copy(tmp_path / "x")
    copy.key = key
    file = copy.edit(lambda tensors: tensors.update({key: spoil(tensors[key], how)}))
    assert inspect(copy.folder)["loads"]  # and says that it read no values
    if how == "zeros" and name.startswith("llava_sp"):  # in what is ours it may be meant
        assert copy.open() is not None
    else:
        refused(copy, VALUES[how], key, file.name)


@pytest.mark.parametrize("prefix", ["model.vision_tower.", "model.language_model."])
@pytest.mark.parametrize("name", ["llava_sp", "llava_hf"])
def test_a_tower_and_a_decoder_are_not_confused(kinds, tmp_path, name, prefix):
    """Their layers' names end alike."""
    copy = kinds[name].copy(tmp_path / "x")
    parts = recognise(copy.folder).part(prefix)
    copy.key = next(t.key for n, t in parts.items() if n.endswith("layers.1.self_attn.q_proj.weight"))
    file = copy.edit(lambda tensors: tensors.update({copy.key: spoil(tensors[copy.key], "nan")}))
    refused(copy, VALUES["nan"], f"{copy.key} in {file}")


@pytest.mark.parametrize("how", ["empty", "shape", "lacking", "unexpected"])
@pytest.mark.parametrize("name", NAMES)
def test_tensors_that_do_not_fit_are_listed(kinds, tmp_path, name, how):
    copy = kinds[name].copy(tmp_path / "x")
    index = copy.folder / "model.safetensors.index.json"

    def change(tensors):
        if how == "lacking":
            tensors.pop(copy.key)
        elif how == "unexpected":
            tensors["model.strange.weight"] = torch.ones(3)
        else:
            tensors[copy.key] = spoil(tensors[copy.key], how)

    file = copy.edit(change).name
    if how == "lacking" and index.is_file():  # else the index tells, see below
        shards = json.loads(index.read_text())
        shards["weight_map"].pop(copy.key)
        index.write_text(json.dumps(shards))
    report = inspect(copy.folder)
    assert not report["loads"]
    field, key = {
        "empty": ("empty", copy.key),
        "shape": ("wrong_shape", copy.key),
        "lacking": ("missing", copy.key.replace("language_model.model.", "model.language_model.")),
        "unexpected": ("unexpected", "model.strange.weight"),
    }[how]
    (entry,) = report[field]
    assert entry["key"] == key and entry["file"] in (file, str(copy.folder))
    assert f"{key}" in text(report)


@pytest.mark.parametrize("how", ["empty", "shape", "lacking", "unexpected"])
@pytest.mark.parametrize("name", ["original_lora", "original_projector", "original_full", "llava_sp_adapter"])
def test_tensors_that_do_not_fit_are_refused(kinds, tmp_path, name, how):
    copy = kinds[name].copy(tmp_path / "x")
    ours = {"llava_sp_adapter": "spatial.linear.weight"}.get(name, "conv_8.weight")
    if how == "lacking":
        copy.edit(lambda tensors: tensors.pop(copy.key))
    elif how == "unexpected":
        ours = "strange"
        copy.edit(lambda tensors: tensors.update({"model.strange.weight": torch.ones(3)}))
    else:
        copy.edit(lambda tensors: tensors.update({copy.key: spoil(tensors[copy.key], how)}))
    refused(copy, ours, str(copy.folder))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
@pytest.mark.parametrize("name", NAMES)
def test_whole_numbers_are_no_weights(kinds, tmp_path, name, dtype):
    """They would be cast without a word."""
    copy = kinds[name].copy(tmp_path / "x")
    file = copy.edit(lambda tensors: tensors.update({copy.key: (100 * tensors[copy.key]).to(dtype)}))
    refused(copy, "expected floating-point weights", copy.key, file.name)
    report = inspect(copy.folder)
    assert not report["loads"] and copy.key in report["problems"][0]


@pytest.mark.parametrize("base", ["base", "clip"])
def test_whole_numbers_in_a_backbone(golden, tmp_path, base):
    shutil.copytree(golden / base, tmp_path / base, copy_function=shutil.copyfile)
    file = next((tmp_path / base).glob("pytorch_model*.bin"))
    tensors = torch.load(file, weights_only=True)
    tensors["vision_model.embeddings.position_ids"] = torch.arange(577)  # older files have it: no weight
    torch.save(tensors, file)
    places = {"base": golden / "base", "clip": golden / "clip"} | {base: tmp_path / base}
    LlavaSPForCausalLM.from_backbones(*places.values(), spatial_width=1)
    key = next(key for key in tensors if key.endswith(("mlp.up_proj.weight", "encoder.layers.1.mlp.fc1.weight")))
    torch.save(tensors | {key: (100 * tensors[key]).to(torch.int16)}, file)
    with pytest.raises(ValueError, match=rf"1 missing, integers or of another shape, such as {key} in {file}"):
        LlavaSPForCausalLM.from_backbones(*places.values(), spatial_width=1)


@pytest.mark.parametrize("name", ["llava_sp", "llava_hf"])
def test_a_stranger_in_a_full_checkpoint_is_refused(kinds, tmp_path, name):
    copy = kinds[name].copy(tmp_path / "x")
    file = copy.edit(lambda tensors: tensors.update({"model.strange.weight": torch.ones(3)}))
    refused(copy, "model.strange.weight", file.name)


@pytest.mark.parametrize("name", NAMES)
def test_a_truncated_file_is_named(kinds, tmp_path, name):
    copy = kinds[name].copy(tmp_path / "x")
    file = copy.file
    file.write_bytes(file.read_bytes()[:-200])
    report = inspect(copy.folder)
    assert not report["loads"] and file.name in report["problems"][0] and "cut off" in report["problems"][0]
    refused(copy, "cut off", file.name)


def test_a_missing_shard_and_an_empty_promise(kinds, tmp_path):
    for name in ("original_full", "llava_sp"):
        copy = kinds[name].copy(tmp_path / name)
        file = copy.edit(lambda tensors, key=copy.key: tensors.pop(key))
        (problem,) = inspect(copy.folder)["problems"]
        assert f"names {copy.key}, which no shard holds" in problem
        file.unlink()
        (problem,) = inspect(copy.folder)["problems"]
        assert file.name in problem and "does not exist" in problem
        with pytest.raises((ValueError, OSError), match=file.name):
            copy.open()


def test_no_part_of_our_full_checkpoint_is_left_at_random(kinds, tmp_path):
    copy = kinds["llava_sp"].copy(tmp_path / "x")
    copy.edit(lambda tensors: tensors.pop(copy.key))
    refused(copy, copy.key, "index.json")


@pytest.mark.parametrize("name", ["original_lora", "original_projector", "original_full"])
def test_code_in_a_checkpoint_is_not_executed(kinds, tmp_path, name):
    class Code:
        def __reduce__(self):
            return os.system, (f"touch '{tmp_path / 'executed'}'",)

    copy = kinds[name].copy(tmp_path / "x")
    if name == "original_full":  # as shards of .bin
        for file in copy.folder.glob("model*"):
            file.unlink()
        copy.key, file = "x", copy.folder / "pytorch_model.bin"
        save({"model.norm.weight": torch.ones(96)}, file)
    torch.save({"x": Code()}, copy.file if name != "original_full" else file)
    (problem,) = inspect(copy.folder)["problems"]
    assert "holds code" in problem and ".system" in problem and "nothing in it was executed" in problem
    refused(copy, "holds code")
    assert not (tmp_path / "executed").exists()
    assert main([str(copy.folder)]) == 1


@pytest.mark.parametrize("base", ["base", "clip"])
@pytest.mark.parametrize("way", ["inspect", "open", "warm start", "convert", "merge"])
def test_a_base_with_code_is_not_executed(kinds, golden, tmp_path, way, base):
    class Code:
        def __reduce__(self):
            return os.system, (f"touch '{tmp_path / 'executed'}'",)

    bases = {"language_model": golden / "base", "vision_tower": golden / "clip"}
    keyword = {"base": "language_model", "clip": "vision_tower"}[base]
    bases[keyword] = tmp_path / "spoilt"
    shutil.copytree(golden / base, bases[keyword])
    file = max(bases[keyword].glob("pytorch_model*.bin"))
    torch.save({"model.norm.weight": Code()}, file)
    lora = kinds["original_lora"].copy(tmp_path / "lora").folder
    settings = json.loads((lora / "config.json").read_text()) | {"mm_vision_tower": str(bases["vision_tower"])}
    (lora / "config.json").write_text(json.dumps(settings))
    settings = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(
        json.dumps(settings | {"base_model_name_or_path": str(bases["language_model"])})
    )
    ways = {
        "inspect": lambda: LlavaSPForCausalLM.from_pretrained(lora),
        "open": lambda: LlavaSPForCausalLM.from_pretrained(kinds["original_projector"].folder, **bases),
        "warm start": lambda: LlavaSPForCausalLM.from_backbones(*bases.values(), warm_start=lora),
        "convert": lambda: convert(lora, tmp_path / "out", **bases),
        "merge": lambda: merge(lora, tmp_path / "out", **bases),
    }
    if way == "inspect":
        (problem,) = inspect(lora)["problems"]
        assert f"{file} holds code" in problem
    with pytest.raises(ValueError, match=rf"{file} holds code \((posix|nt).system\).*nothing in it was executed"):
        ways[way]()
    assert not (tmp_path / "executed").exists()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["lora", "spoilt"]  # nothing is left half written
    torch.load(file, weights_only=False)  # the trap is armed
    assert (tmp_path / "executed").exists()


def test_a_manifest_that_is_gone(kinds, tmp_path):
    copy = kinds["llava_sp_adapter"].copy(tmp_path / "x")
    (copy.folder / "llava_sp.json").unlink()
    report = inspect(copy.folder)
    assert not report["loads"] and "saving was interrupted" in report["problems"][0]
    refused(copy, "saving was interrupted")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature is 'cls_patch'"),
        ({"hidden_size": "many"}, "config.json: hidden_size is 'many'; expected a whole number"),
        (
            {"mm_vision_select_layer": 9, "mm_vision_tower": GOLDEN_TOWER},
            "vision_feature_layer is 9; it must be -5 to 4: embeddings and 4 layers",
        ),
        (
            {"mm_vision_select_layer": -6, "mm_vision_tower": GOLDEN_TOWER},
            "vision_feature_layer is -6; it must be -5 to 4",
        ),
        ({"mm_vision_tower": ["clip"]}, "config.json: mm_vision_tower is ['clip']; expected the hub id or folder"),
    ],
)
def test_settings_that_cannot_be_opened(kinds, tmp_path, settings, said):
    copy = kinds["original_projector"].copy(tmp_path / "x")
    config = json.loads((copy.folder / "config.json").read_text())
    (copy.folder / "config.json").write_text(json.dumps(config | settings))
    report = inspect(copy.folder)
    assert not report["loads"] and said in report["problems"][0]
    assert report.keys() == inspect(kinds["llava_sp"].folder).keys()  # also where nothing was recognised
    if "configuration" not in said:
        refused(copy, said)


@pytest.mark.parametrize("content", [None, b""])
def test_a_full_model_without_the_words_of_its_tokenizer(kinds, tmp_path, content):
    """Of the settings alone transformers makes a tokenizer that knows its special tokens and nothing else."""
    copy = kinds["original_full"].copy(tmp_path / "x")
    words = copy.folder / "tokenizer.model"
    words.unlink() if content is None else words.write_bytes(content)
    report = inspect(copy.folder)
    assert not report["loads"] and "x has no vocabulary: no tokenizer.json or tokenizer.model" in report["problems"][0]
    refused(copy, "x has no vocabulary", str(copy.folder))


# ---------------------------------------------------------------- no checkpoint; the command


def test_no_checkpoint_at_all(golden, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for place, said in (
        (tmp_path / "empty", "nothing"),
        (tmp_path / "nowhere", "no folder"),
        (golden / "clip", "clip"),
    ):
        assert main([str(place)]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.startswith("error: ") and said in captured.err
        assert captured.err.count("\n") == 1
    with pytest.raises(UnknownFormat):
        inspect(golden / "base")


def test_as_a_command(golden, repo):
    folder = "tests/golden/checkpoint_pooling/lora"
    run = subprocess.run(
        [sys.executable, "-m", "llava_sp.checkpoints.inspect", folder], cwd=repo, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0] == folder and all(line.startswith("  ") and line[16] == " " for line in lines[1:])
    assert "  variant        pooling, without integrator" in lines


# ---------------------------------------------------------------- nothing is downloaded

OFFLINE = """
import json, socket, sys
tried = []
def refuse(*arguments, **keywords):
    tried.append(str(arguments[-1]))
    raise OSError("no network here")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = refuse

from llava_sp import LlavaSPForCausalLM, LlavaSPProcessor
from llava_sp.checkpoints.inspection.report import inspect
import huggingface_hub.constants
assert not huggingface_hub.constants.HF_HUB_OFFLINE
for folder, keywords in json.loads(sys.argv[1]):
    assert inspect(folder)["loads"]
    LlavaSPForCausalLM.from_pretrained(folder, **keywords)
    LlavaSPProcessor.from_pretrained(folder, **keywords)
    print("opened", folder)
assert not tried, tried
"""


def test_nothing_is_downloaded_when_all_is_local(kinds, repo):
    """In a process of its own: HF_HUB_OFFLINE, which the tests set, is read on import."""
    offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    environment = {name: value for name, value in os.environ.items() if name not in offline}
    places = [[str(k.folder), {n: str(v) for n, v in k.keywords.items()}] for k in kinds.values()]
    run = subprocess.run(
        [sys.executable, "-c", OFFLINE, json.dumps(places)],
        cwd=repo, env=environment | {"PYTHONPATH": str(repo)}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("opened") == len(kinds)
