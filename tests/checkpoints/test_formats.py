"""What a folder is, told by what is in it: never by its name, and with an error where its parts contradict each other."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from llava_sp import LlavaSPForCausalLM, LlavaSPProcessor
from llava_sp.checkpoints import opening
from llava_sp.checkpoints.inspection.report import inspect
from llava_sp.checkpoints.reading import formats, tensor_files
from llava_sp.checkpoints.reading.formats import UnknownFormat, recognise
from llava_sp.checkpoints.reading.names import original_projector_name, our_projector_name, unwrapped
from llava_sp.checkpoints.reading.tensor_files import read_all
from llava_sp.checkpoints.writing.conversion import convert
from llava_sp.model.configuration_llava_sp import LlavaSPConfig
from tests.checkpoints.kinds import NAMES, Kind, load, save, spoil
from tests.released import LAYOUTS, bases

LAYOUT = {
    "cropping": {"spatial_variant": "cropping", "spatial_fusion": True, "spatial_projection_bias": True},
    "pooling_dfi": {"spatial_variant": "pooling", "spatial_fusion": True, "spatial_projection_bias": False},
    "pooling": {"spatial_variant": "pooling", "spatial_fusion": False, "spatial_projection_bias": False},
}


@pytest.mark.parametrize("misleading", ["llava_sp", "llava-v1.5-7b", "llava-sp-pooling-lora", "checkpoint-1000"])
@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_a_folder_says_nothing(kinds, tmp_path, name, misleading):
    assert recognise(kinds[name].copy(tmp_path / misleading).folder).format == name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_three_layouts(golden, layout):
    found = recognise(golden / f"checkpoint_{layout}/lora")
    assert found.format == "original_lora" and not found.missing and not found.unknown
    assert LAYOUT[layout].items() <= found.spatial.items()
    assert (found.spatial["spatial_width"], found.spatial["spatial_scales"]) == (5, [4, 8, 12, 16, 20, 24])
    assert (found.language_model, found.vision_tower, found.lora["r"]) == ("base", "clip", 8)


@pytest.mark.parametrize(("layout", "lacking"), [("cropping", 17), ("pooling", 5)])
def test_first_stage_folders_and_files(golden, layout, lacking):
    folder = golden / "pretrain_artifacts" / layout
    for place in (folder, folder / "model.bin"):
        found = recognise(place)
        assert found.format == "original_projector" and not found.missing
        assert LAYOUT[layout].items() <= found.spatial.items()
    partial = recognise(folder / "checkpoint-1000")
    assert len(partial.missing) == lacking and partial.spatial["spatial_variant"] == layout


@pytest.mark.parametrize("prefix", ["base_model.model.model.", "module.base_model.model.model.", "model.", ""])
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_same_weights_under_any_wrapper(kinds, tmp_path, prefix, suffix, dtype):
    copy = kinds["original_lora"].copy(tmp_path / "x")
    for stem in ("adapter_model", "non_lora_trainables"):
        (file,) = copy.folder.glob(f"{stem}.*")
        tensors = {prefix + unwrapped(key): tensor.to(dtype) for key, tensor in load(file).items()}
        file.unlink()
        save(tensors, file.with_suffix(suffix))
    found, original = recognise(copy.folder), recognise(kinds["original_lora"].folder)
    assert (found.format, found.spatial, found.unknown) == ("original_lora", original.spatial, [])
    assert {name: tensor.shape for name, tensor in found.tensors.items()} == {
        name: tensor.shape for name, tensor in original.tensors.items()
    }
    opened, reference = copy.open(dtype="float32").state_dict(), kinds["original_lora"].open(dtype=dtype).state_dict()
    part = [name for name in reference if ".lora_" in name or "projector" in name]
    assert part and all(torch.equal(opened[name], reference[name].float()) for name in part)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_there_and_back(golden, layout):
    keys = [unwrapped(key) for key in load(golden / f"checkpoint_{layout}/lora/non_lora_trainables.bin")]
    assert keys
    for key in keys:
        assert original_projector_name(our_projector_name(key), layout.split("_")[0], 24) == key
    assert our_projector_name("layers.0.mlp.up_proj.weight") is None


# ---------------------------------------------------------------- parts that contradict each other


def both_refuse(kind: Kind, message: str) -> None:
    for look in (lambda: recognise(kind.folder), kind.open):
        with pytest.raises(ValueError, match=message):
            look()


def test_convolutions_of_two_variants(kinds, tmp_path):
    copy = kinds["original_lora"].copy(tmp_path / "x")
    key = copy.key.replace("conv_8.weight", "conv_8.1.weight")
    copy.edit(lambda tensors: tensors.update({key: tensors.pop(copy.key)}))
    both_refuse(
        copy, r"holds \S*conv_8.1.weight, of the pooling variant, and .*conv_\d+.weight, of the cropping variant"
    )


def test_two_tensors_for_one_place(kinds, tmp_path):
    copy = kinds["original_lora"].copy(tmp_path / "x")
    key = copy.key.replace("conv_8.weight", "conv_8.1.weight")
    copy.edit(lambda tensors: tensors.update({key: tensors[copy.key] + 1}))
    both_refuse(copy, r"conv_8.1.weight in .*non_lora_trainables.bin and .*conv_8.weight in .* are the same part")


def test_another_variants_keys_beside_a_whole_projector(golden, kinds, tmp_path):
    """A pooling projector without integrator, with the integrator of another checkpoint in it."""
    copy = kinds["original_projector"].copy(tmp_path / "x")
    pooling = load(golden / "pretrain_artifacts/pooling/model.bin")
    stranger = load(copy.file)["model.conv_CM.weight"]
    copy.edit(lambda tensors: (tensors.clear(), tensors.update(pooling | {"model.conv_CM.weight": stranger})))
    with pytest.raises(ValueError, match="model.bin lacks model.query_projector.0.weight"):
        copy.open()


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "non_lora_trainables.bin", "adapter_config.json"])
def test_half_a_lora_folder(kinds, tmp_path, file):
    copy = kinds["original_lora"].copy(tmp_path / "x")
    (copy.folder / file).unlink()
    both_refuse(copy, file.split(".")[0])


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_half_an_adapter_of_ours(kinds, tmp_path, file):
    copy = kinds["llava_sp_adapter"].copy(tmp_path / "x")
    (copy.folder / "lora" / file).unlink()
    both_refuse(copy, f"lora/{file} (does not exist|is None bytes long)")


def test_another_kind_of_projector(kinds, tmp_path):
    copy = kinds["original_projector"].copy(tmp_path / "x")
    config = json.loads((copy.folder / "config.json").read_text())
    (copy.folder / "config.json").write_text(json.dumps(config | {"mm_projector_type": "linear"}))
    both_refuse(copy, "mm_projector_type is 'linear'")


def test_an_index_that_promises_what_no_shard_holds(kinds, tmp_path):
    copy = kinds["original_full"].copy(tmp_path / "x")
    copy.edit(lambda tensors: tensors.pop(copy.key))
    both_refuse(copy, rf"index.json names {copy.key}, which no shard holds \(1 such")


@pytest.mark.parametrize(
    ("content", "message"), [('{"model_type": "lla', "not valid JSON"), ("[1]", r"is \[1\]; expected an object")]
)
@pytest.mark.parametrize("name", NAMES)
def test_a_config_that_is_not_valid(kinds, tmp_path, name, content, message):
    copy = kinds[name].copy(tmp_path / "x")
    (copy.folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"config.json.*{message}"):
        recognise(copy.folder)
    with pytest.raises((ValueError, OSError), match="config.json"):
        copy.open()


# ---------------------------------------------------------------- none of the formats


def test_what_is_no_checkpoint(golden, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "tokenizer").mkdir()
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(golden / "base" / name, tmp_path / "tokenizer" / name)
    places = {
        tmp_path / "empty": "is not a checkpoint that can be opened. It holds: nothing",
        tmp_path / "tokenizer": "It holds: tokenizer.model, tokenizer_config.json. Expected one of",
        golden / "base": r"base \(llama\) holds a model without a projector: it is a backbone.*from_backbones",
        golden / "clip": r"clip \(clip\) holds a model without a projector",
        golden / "base/pytorch_model-00001-of-00002.bin": "holds no projector, only",
    }
    for place, message in places.items():
        with pytest.raises(UnknownFormat, match=message):
            recognise(place)
        with pytest.raises(ValueError, match=message):
            LlavaSPForCausalLM.from_pretrained(place)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        recognise(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"mm_use_im_start_end": True}, "config.json: mm_use_im_start_end is True; expected False"),
        (
            "config.json",
            {"image_aspect_ratio": "anyres"},
            "config.json: image_aspect_ratio is 'anyres'; expected 'pad'",
        ),
        (
            "config.json",
            {"mm_patch_merge_type": "spatial_unpad"},
            "config.json: mm_patch_merge_type is 'spatial_unpad'; expected 'flat'",
        ),
        (
            "config.json",
            {"mm_vision_tower": ["a", "b"]},
            r"config.json: mm_vision_tower is \['a', 'b'\]; expected the hub id",
        ),
        ("config.json", {"_name_or_path": 7}, "config.json: _name_or_path is 7; expected the hub id"),
        ("config.json", {"mm_vision_select_layer": "-2"}, "config.json: mm_vision_select_layer is '-2'; expected"),
        ("config.json", {"torch_dtype": "float17"}, "config.json: torch_dtype is 'float17'"),
        ("adapter_config.json", {"base_model_name_or_path": {}}, "adapter_config.json: base_model_name_or_path is {}"),
        ("adapter_config.json", {"bias": "all"}, "adapter_config.json: bias is 'all'"),
        ("adapter_config.json", {"modules_to_save": ["lm_head"]}, "adapter_config.json: modules_to_save is"),
        ("adapter_config.json", {"init_lora_weights": "pissa"}, "adapter_config.json: init_lora_weights is 'pissa'"),
        ("adapter_config.json", {"layer_replication": [[0, 2]]}, "adapter_config.json: layer_replication is"),
    ],
)
def test_settings_that_would_change_the_model_are_refused(kinds, tmp_path, file, change, message):
    copy = kinds["original_lora"].copy(tmp_path / "x")
    settings = json.loads((copy.folder / file).read_text())
    (copy.folder / file).write_text(json.dumps(settings | change))
    with pytest.raises(ValueError, match=message):
        copy.open()
    assert not inspect(copy.folder)["loads"]


@pytest.mark.parametrize("kind", ["original_lora", "llava_sp_adapter"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": "eight"}, "r is 'eight'; expected a whole number"),
        ({"r": 0}, "r is 0; expected a whole number"),
        ({"lora_alpha": None}, "lora_alpha is None; expected a number"),
        ({"lora_dropout": "much"}, "lora_dropout is 'much'; expected a number from 0 to 1"),
        ({"target_modules": ...}, "has no target_modules; it has "),
        ({"target_modules": [1]}, r"target_modules is \[1\]; expected the names"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; expected 'LORA'"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'; expected true or false"),
        (None, "is .*; expected an object"),
    ],
)
def test_settings_of_lora_that_cannot_be_are_named(kinds, tmp_path, kind, change, message):
    """With the file and the key, before a backbone is opened."""
    copy = kinds[kind].copy(tmp_path / "x")
    (file,) = copy.folder.rglob("adapter_config.json")
    settings = json.loads(file.read_text()) | (change or {})
    settings = {key: value for key, value in settings.items() if value is not ...}
    file.write_text(json.dumps([settings] if change is None else settings))
    with pytest.raises(ValueError, match=f"adapter_config.json:? {message}"):
        copy.open()
    report = inspect(copy.folder)
    assert not report["loads"] and str(file) in report["problems"][0]


@pytest.mark.parametrize(("name", "emptied"), [("non_lora_trainables.bin", {}), ("adapter_model.safetensors", {})])
def test_a_file_that_was_saved_empty(kinds, tmp_path, name, emptied):
    copy = kinds["original_lora"].copy(tmp_path / "x")
    save(emptied, copy.folder / name)
    both_refuse(copy, f"{name} holds no tensors")
    (copy.folder / name).write_bytes(b"")
    both_refuse(copy, f"{name}.*cut off")


# ---------------------------------------------------------------- the same thing twice


@pytest.mark.parametrize("name", ["adapter_model", "non_lora_trainables"])
def test_both_a_bin_and_safetensors(kinds, tmp_path, name):
    """The same in both is fine; otherwise nobody knows which is meant."""
    copy = kinds["original_lora"].copy(tmp_path / "x")
    (file,) = copy.folder.glob(f"{name}.*")
    other = file.with_suffix(".bin" if file.suffix == ".safetensors" else ".safetensors")
    tensors = load(file)
    save(tensors, other)
    assert inspect(copy.folder)["loads"] and copy.open() is not None
    both = rf"{name}.safetensors and .*{name}.bin are not the same: "
    key = next(key for key, tensor in tensors.items() if tensor.numel() > 400)
    changed = tensors[key].clone()
    changed.view(-1)[200] += 1  # not among the first nor the last values
    save(tensors | {key: changed}, other)
    ways = {"open": copy.open, "convert": lambda: convert(copy.folder, tmp_path / "y", **copy.keywords)}
    ways["warm start"] = lambda: LlavaSPForCausalLM.from_backbones(*copy.keywords.values(), warm_start=copy.folder)
    for way in ways.values():
        with pytest.raises(ValueError, match=f"{both}{key} differs; remove the wrong one"):
            way()
    for spoilt in ({key: tensors[key].half()}, {key: tensors[key][..., 1:].clone()}, {"more": torch.ones(2)}):
        save(tensors | spoilt, other)
        both_refuse(copy, f"{both}{next(iter(spoilt))} differs")  # by headers alone
        assert not inspect(copy.folder)["loads"]


def test_another_tokenizer_than_the_bases(kinds, tmp_path):
    copy = kinds["original_lora"].copy(tmp_path / "x")
    tokenizer = AutoTokenizer.from_pretrained(copy.keywords["language_model"])
    tokenizer.add_tokens(["<im_start>", "<im_end>"])
    tokenizer.save_pretrained(copy.folder)
    with pytest.raises(ValueError, match=r"x: its tokenizer has <image>, <pad> at \(1002, 1003\), not \(1000, 1001\)"):
        copy.open()


def test_a_hub_checkpoint_is_never_half_loaded(kinds, tmp_path):
    """What is missing in it is an error, and what cannot be trained weights."""
    copy = kinds["llava_sp"].copy(tmp_path / "models--me--mine/snapshots/abc")
    copy.edit(lambda tensors: tensors.pop(copy.key))
    index = copy.folder / "model.safetensors.index.json"
    if index.is_file():
        shards = json.loads(index.read_text())
        shards["weight_map"].pop(copy.key)
        index.write_text(json.dumps(shards))
    refs = tmp_path / "models--me--mine/refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    with pytest.raises(ValueError, match="does not match its configuration:\n.* lacks .*spatial.linear.weight"):
        LlavaSPForCausalLM.from_pretrained("me/mine", cache_dir=tmp_path)
    shutil.rmtree(copy.folder)
    copy = kinds["llava_sp"].copy(copy.folder)
    assert LlavaSPForCausalLM.from_pretrained("me/mine", cache_dir=tmp_path).config.spatial_variant == "cropping"
    file = copy.edit(lambda tensors: tensors.update({copy.key: spoil(tensors[copy.key], "nan")}))
    with pytest.raises(ValueError, match=f"{copy.key} in .*{file.name} holds NaN"):
        LlavaSPForCausalLM.from_pretrained("me/mine", cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut", "{shard}.*cut off"),
        ("gone", "{shard}.*does not exist"),
        ("nan", "layers.0.mlp.up_proj.weight in .*{shard} holds NaN or infinity in 1 of"),
        ("shape", "does not hold all weights.*layers.0.mlp.up_proj.weight"),
    ],
)
def test_a_broken_base_is_named(kinds, golden, tmp_path, how, message):
    shutil.copytree(golden / "base", tmp_path / "base")
    key = "model.layers.0.mlp.up_proj.weight"
    shard = next(file for file in sorted((tmp_path / "base").glob("*.bin")) if key in load(file))
    tensors = load(shard)
    if how == "cut":
        shard.write_bytes(shard.read_bytes()[:-300])
    elif how == "gone":
        shard.unlink()
    else:
        tensors[key] = tensors[key].clone() if how == "nan" else tensors[key][:, 1:].clone()
        tensors[key][3, 3] = float("nan") if how == "nan" else 0.0
        save(tensors, shard)
    with pytest.raises(ValueError, match=message.format(shard=shard.name)):
        LlavaSPForCausalLM.from_pretrained(
            kinds["original_lora"].folder, language_model=tmp_path / "base", vision_tower=golden / "clip"
        )


def test_a_projector_beside_that_is_another_one(kinds, golden, tmp_path):
    """Within and beside may both be there, as LLaVA-1.5 is published; then they must be alike."""
    copy = kinds["original_full"].copy(tmp_path / "x")
    projector = recognise(copy.folder).part("model.multi_modal_projector.").values()
    within = read_all({tensor.key: tensor for tensor in projector})
    torch.save(within, copy.folder / "mm_projector.bin")
    assert recognise(copy.folder).spatial["spatial_variant"] == "cropping"
    pooling = torch.load(golden / "pretrain_artifacts/pooling/model.bin", weights_only=True)
    torch.save(pooling, copy.folder / "mm_projector.bin")
    with pytest.raises(ValueError, match=r"mm_projector.bin and .* are not the same: model.conv_\S+ differs"):
        recognise(copy.folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"projector_hidden_act": "relu"}, "config.json: projector_hidden_act is 'relu'; expected 'gelu'"),
        ({"multimodal_projector_bias": False}, "config.json: multimodal_projector_bias is False; expected True"),
        (
            {"vision_feature_select_strategy": "full"},
            "config.json: vision_feature_select_strategy is 'full'; expected 'default'",
        ),
        ({"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy is 'cls'"),
    ],
)
def test_settings_of_transformers_llava_that_would_change_the_model(kinds, tmp_path, change, message):
    copy = kinds["llava_hf"].copy(tmp_path / "x")
    file = copy.folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    both_refuse(copy, message)
    assert not inspect(copy.folder)["loads"]


# ---------------------------------------------------------------- keywords of opening


@pytest.mark.parametrize("name", NAMES)
def test_what_the_weights_decide_is_no_keyword(kinds, name):
    given = {"spatial_variant": "pooling", "fusion_stride": 1, "vision_feature_layer": -1, "seed": 3}
    given |= {"image_token_index": 7, "text_config": {}, "spatial_scales": [4]}
    for keyword, value in given.items():
        with pytest.raises(ValueError, match=f"{keyword}= cannot be set on opening"):
            kinds[name].open(**{keyword: value})


@pytest.mark.parametrize("name", ["llava_sp", "llava_sp_adapter"])
def test_nor_through_an_auto_class(kinds, name):
    """It makes a configuration of the keywords."""
    with pytest.raises(ValueError, match="spatial_variant is 'cropping' there and 'pooling' here"):
        AutoModelForImageTextToText.from_pretrained(kinds[name].folder, spatial_variant="pooling")


@pytest.mark.parametrize("name", NAMES)
def test_a_report_of_loading_where_there_is_one(kinds, name):
    if name == "llava_sp":
        model, info = kinds[name].open(output_loading_info=True)
        assert isinstance(model, LlavaSPForCausalLM) and not info["missing_keys"]
    else:
        with pytest.raises(
            ValueError, match="is not a full checkpoint of LLaVA-SP.* output_loading_info is not supported"
        ):
            kinds[name].open(output_loading_info=True)


@pytest.mark.parametrize("name", NAMES)
def test_the_older_name_of_dtype(kinds, name):
    for given in ("bfloat16", torch.bfloat16):
        assert {parameter.dtype for parameter in kinds[name].open(torch_dtype=given).parameters()} == {torch.bfloat16}


def test_the_older_name_of_dtype_for_a_new_model(golden):
    model = LlavaSPForCausalLM.from_backbones(golden / "base", golden / "clip", spatial_width=3, torch_dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("path", ["/no/such/folder", "./nowhere", "~/nowhere", "a/b/c"])
def test_a_folder_that_is_not_there(path):
    for opens in (LlavaSPForCausalLM, LlavaSPProcessor):
        with pytest.raises(FileNotFoundError, match=f"there is no folder {path}"):
            opens.from_pretrained(path)


# ---------------------------------------------------------------- one value through one door


@pytest.mark.parametrize("opens", [LlavaSPForCausalLM, LlavaSPProcessor])
def test_a_released_folder_is_looked_at_once(golden, monkeypatch, opens):
    """One look at the folder, one at each tensor file's header, one configuration."""
    calls = Counter()

    def counted(name, function):
        def call(*args, **kwargs):
            calls[f"{name} {args[0].name}" if name == "header of" else name] += 1
            return function(*args, **kwargs)

        return call

    for place in (opening, opening.processors):
        monkeypatch.setattr(place, "recognise", counted("recognise", recognise))
    header = counted("header of", tensor_files.stored_tensors)
    for place in (formats, tensor_files, opening.backbones):
        monkeypatch.setattr(place, "stored_tensors", header)
    monkeypatch.setattr(LlavaSPConfig, "__post_init__", counted("configuration", LlavaSPConfig.__post_init__))
    opens.from_pretrained(golden / "checkpoint_cropping/lora", **bases(golden))
    files = ["adapter_model.safetensors", "non_lora_trainables.bin"]
    if opens is LlavaSPForCausalLM:
        files += [file.name for base in ("base", "clip") for file in (golden / base).glob("pytorch_model*.bin")]
    assert calls == {"recognise": 1, "configuration": 1, **{f"header of {file}": 1 for file in files}}


def test_model_and_processor_from_one_look(golden):
    found = recognise(golden / "checkpoint_cropping/lora")
    model = opening.open_model(LlavaSPForCausalLM, found, **bases(golden))
    processor = opening.open_processor(LlavaSPProcessor, found, **bases(golden))
    assert processor.num_image_tokens == model.config.num_image_tokens
