"""Adapter checkpoints: what is in them, what opens them, and every way in which they can be wrong."""

from __future__ import annotations

import errno
import json
import shutil

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from llava_sp import LlavaSPForCausalLM, LlavaSPProcessor
from llava_sp.checkpoints.inspection.report import inspect
from llava_sp.checkpoints.opening import adapter
from llava_sp.checkpoints.opening.adapter import (
    load_adapter,
    load_projector,
    save_adapter,
)
from llava_sp.checkpoints.opening.warm_start import start_from
from llava_sp.checkpoints.reading.fingerprint import checkpoint_hash
from llava_sp.checkpoints.reading.formats import UnknownFormat, recognise
from llava_sp.checkpoints.reading.manifest import describe
from llava_sp.checkpoints.writing.conversion import convert
from llava_sp.checkpoints.writing.merging import merge
from llava_sp.common.files import sha256
from llava_sp.common.schema import expect, one_of
from tests.released import variant


def assemble(golden, layout: str = "cropping", width: int = 3) -> LlavaSPForCausalLM:
    return LlavaSPForCausalLM.from_backbones(
        golden / "base", golden / "clip", spatial_width=width, dtype=torch.float32, **variant(layout)
    )


def add_lora(model, **settings) -> None:
    target = r"model\.language_model\..*\.(q_proj|v_proj)"
    model.add_adapter(LoraConfig(r=4, target_modules=target, init_lora_weights=False, **settings))


@pytest.fixture(scope="module")
def trained(golden):
    torch.manual_seed(0)
    model = assemble(golden)
    add_lora(model)
    return model.eval()


@pytest.fixture(scope="module")
def saved(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(trained, LlavaSPProcessor.from_backbones(trained.config), folder, run={"stage": "finetune_lora"})
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def logits(model) -> torch.Tensor:
    ids = torch.tensor([[1, 5, *[1000] * model.config.num_image_tokens, 7]])
    pixels = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels).logits


def test_holds_lora_and_projector_and_nothing_else(saved):
    assert recognise(saved).format == "llava_sp_adapter"
    assert all(".lora_" in name for name in load_file(saved / "lora/adapter_model.safetensors"))
    assert {name.split(".")[0] for name in load_file(saved / "projector.safetensors")} == {
        "linear_1",
        "linear_2",
        "spatial",
    }
    about = describe(saved)
    assert about["contents"]["lora"] == 12 and about["run"] == {"stage": "finetune_lora"}
    assert not list(saved.glob("**/*.part"))


def test_opens_in_one_call_bit_equal(trained, saved):
    opened = LlavaSPForCausalLM.from_pretrained(saved)
    assert torch.equal(logits(opened), logits(trained))
    ours, theirs = trained.state_dict(), opened.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert type(LlavaSPProcessor.from_pretrained(saved)) is LlavaSPProcessor


def test_dtype_by_name(saved):
    opened = LlavaSPForCausalLM.from_pretrained(saved, dtype="bfloat16")
    assert {parameter.dtype for parameter in opened.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="dtype is 'bf17'"):
        LlavaSPForCausalLM.from_pretrained(saved, dtype="bf17")


def test_auto_class_opens_it(trained, saved):
    from transformers import AutoModelForImageTextToText

    assert torch.equal(logits(AutoModelForImageTextToText.from_pretrained(saved)), logits(trained))


def test_save_pretrained_of_a_lora_model_loses_nothing(trained, tmp_path):
    trained.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(LlavaSPForCausalLM.from_pretrained(tmp_path / "again")), logits(trained))


def test_the_lora_folder_is_a_peft_adapter(golden, trained, saved):
    model = assemble(golden)
    load_projector(model, saved)
    assert torch.equal(logits(PeftModel.from_pretrained(model, str(saved / "lora")).base_model.model), logits(trained))


def test_bases_can_be_elsewhere(golden, trained, copy, tmp_path):
    shutil.copytree(golden / "base", tmp_path / "moved")
    config = json.loads((copy / "config.json").read_text())
    config["language_model_name_or_path"] = "/no/longer/there"
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError,
        match="language model that the checkpoint records, /no/longer/there, is not there; pass language_model=",
    ):
        LlavaSPForCausalLM.from_pretrained(copy)
    opened = LlavaSPForCausalLM.from_pretrained(copy, language_model=tmp_path / "moved")
    assert torch.equal(logits(opened), logits(trained))
    config["language_model_name_or_path"] = "../moved"  # relative to the checkpoint
    (copy / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(LlavaSPForCausalLM.from_pretrained(copy)), logits(trained))


def test_a_wrong_base_is_refused(golden, copy, tmp_path):
    shutil.copytree(golden / "base", tmp_path / "other")
    file = tmp_path / "other/pytorch_model-00001-of-00002.bin"
    weights = torch.load(file, weights_only=True)
    weights["model.layers.0.mlp.up_proj.weight"] += 0.1
    torch.save(weights, file)
    with pytest.raises(ValueError, match="trained on a language model with the fingerprint .* these are other weights"):
        LlavaSPForCausalLM.from_pretrained(copy, language_model=tmp_path / "other")
    LlavaSPForCausalLM.from_pretrained(copy, language_model=tmp_path / "other", check_base=False)


@pytest.mark.parametrize(
    ("layout", "width", "message"),
    [
        ("pooling_dfi", 3, "spatial_variant is 'cropping' there and 'pooling' here"),
        ("cropping", 4, "spatial_width is 3 there and 4 here"),
    ],
)
def test_a_projector_of_another_variant_or_width(golden, saved, layout, width, message):
    model = assemble(golden, layout, width)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_projector(model, saved)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_lora_that_does_not_fit(golden, saved):
    model = assemble(golden)
    with pytest.raises(
        ValueError, match=r"has model.language_model.*lora_A.default.weight, which the model does not have"
    ):
        load_adapter(model, saved)


def test_missing_and_renamed_tensors_are_named(copy):
    tensors = load_file(copy / "projector.safetensors")
    tensors["spatial.linear.wait"] = tensors.pop("spatial.linear.weight")
    save_file(tensors, copy / "projector.safetensors")
    about = json.loads((copy / "llava_sp.json").read_text())
    file = copy / "projector.safetensors"
    about["files"]["projector.safetensors"] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    (copy / "llava_sp.json").write_text(json.dumps(about))
    with pytest.raises(
        ValueError,
        match=r"projector.safetensors lacks spatial.linear.weight\n.*projector.safetensors holds spatial.linear.wait",
    ):
        LlavaSPForCausalLM.from_pretrained(copy)


@pytest.mark.parametrize("file", ["projector.safetensors", "lora/adapter_model.safetensors"])
def test_a_truncated_file_is_named_with_its_sizes(copy, file):
    data = (copy / file).read_bytes()
    (copy / file).write_bytes(data[:-100])
    with pytest.raises(
        ValueError, match=f"{file} is {len(data) - 100} bytes long, but llava_sp.json records {len(data)}"
    ):
        LlavaSPForCausalLM.from_pretrained(copy)


WAYS = {  # every way in which an adapter's files are read
    "open": lambda copy, model, to: LlavaSPForCausalLM.from_pretrained(copy),
    "resume": lambda copy, model, to: load_adapter(model, copy),
    "second stage": lambda copy, model, to: load_projector(model, copy),
    "warm start": lambda copy, model, to: start_from(model, copy),
    "convert": lambda copy, model, to: convert(copy, to, target="original"),
    "merge": lambda copy, model, to: merge(copy, to),
    "inspect": lambda copy, model, to: expect(inspect(copy), {"loads": one_of(True)}, inspect(copy)["problems"]),
}


@pytest.mark.parametrize("file", ["projector.safetensors", "lora/adapter_model.safetensors"])
@pytest.mark.parametrize("way", WAYS)
def test_other_bytes_of_the_same_length(trained, copy, tmp_path, way, file):
    """Such as those of another run: all that is there is well, but it is not what was saved."""
    tensors = load_file(copy / file)
    key = "linear_1.weight" if "linear_1.weight" in tensors else next(iter(tensors))
    tensors[key] *= 2
    save_file(tensors, copy / file, {"format": "pt"})
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    if (way, file) == ("second stage", "lora/adapter_model.safetensors"):
        load_projector(trained, copy)  # reads the projector alone
        return
    with pytest.raises(
        ValueError, match=f"{file} is not the file that was saved: its sha256 is .*; expected .*, as in llava_sp.json"
    ):
        WAYS[way](copy, trained, tmp_path / "to")
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.state_dict().items())
    assert not (tmp_path / "to").exists()


def test_a_file_that_the_manifest_does_not_know(copy):
    about = json.loads((copy / "llava_sp.json").read_text())
    del about["files"]["lora/adapter_model.safetensors"]
    (copy / "llava_sp.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"llava_sp.json: files has no lora/adapter_model.safetensors"):
        LlavaSPForCausalLM.from_pretrained(copy)


def test_two_checkpoints_in_one_folder(golden, copy):
    """A whole model saved where an adapter was: neither is the one that is meant."""
    shutil.copyfile(golden / "projector_cropping.safetensors", copy / "model.safetensors")
    with pytest.raises(ValueError, match=f"{copy} holds a whole model beside projector.safetensors"):
        LlavaSPForCausalLM.from_pretrained(copy)


# ---- adapters beside the one that is saved


@pytest.fixture
def two(saved):
    """Opened, with a second adapter, which is active."""
    model = LlavaSPForCausalLM.from_pretrained(saved)
    target = r"model\.language_model\..*\.k_proj"
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(r=2, target_modules=target, init_lora_weights=False), adapter_name="weight")
    return model


def test_the_active_adapter_is_the_one_that_is_saved(two, trained, tmp_path):
    two.save_pretrained(tmp_path)
    assert recognise(tmp_path).lora["r"] == 2
    assert torch.equal(logits(LlavaSPForCausalLM.from_pretrained(tmp_path)), logits(two))
    two.set_adapter("default")
    two.save_pretrained(tmp_path)
    assert torch.equal(logits(LlavaSPForCausalLM.from_pretrained(tmp_path)), logits(trained))


def test_two_active_adapters_are_not_saved(two, tmp_path):
    two.set_adapter(["default", "weight"])
    with pytest.raises(ValueError, match=r"the adapters default, weight are active; .* model.set_adapter\(NAME\)"):
        two.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


TARGET = r"model\.language_model\..*\.(q_proj|v_proj)"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "peft_type is 'IA3'; expected 'LORA'"),
        (LoraConfig(target_modules=TARGET, bias="all"), "bias is 'all'"),
        (LoraConfig(target_modules=TARGET, modules_to_save=["lm_head"]), r"modules_to_save is \['lm_head'\]"),
        (LoraConfig(target_modules=TARGET, trainable_token_indices=[3]), "trainable_token_indices is"),
    ],
)
def test_an_adapter_that_would_not_open_again_is_not_saved(golden, tmp_path, settings, message):
    model = assemble(golden)
    model.add_adapter(settings)
    with pytest.raises(ValueError, match=f"adapter_config.json: {message}"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 3}}]
)
def test_kinds_of_lora_that_open_again(golden, tmp_path, settings):
    model = assemble(golden)
    add_lora(model, **settings)
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(logits(LlavaSPForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_a_save_without_lora_leaves_no_older_one(golden, copy):
    save_adapter(assemble(golden), None, copy)
    assert recognise(copy).lora is None and not (copy / "lora").exists()


def test_a_save_that_was_cut_off_is_not_opened(copy):
    (copy / "llava_sp.json").unlink()
    with pytest.raises(ValueError, match="saving was interrupted"):
        LlavaSPForCausalLM.from_pretrained(copy)


def test_disk_full_leaves_no_half_file(trained, tmp_path, monkeypatch):
    """The write fails in the middle: the error names it, and nothing that looks like a checkpoint remains."""

    def full(tensors, file, metadata=None):
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(adapter, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(trained, None, tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())
    with pytest.raises(UnknownFormat, match="It holds: nothing"):
        recognise(tmp_path / "out")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tensor: tensor.fill_(float("nan")), "model.multi_modal_projector.linear_1.bias .*NaN"),
        (lambda tensor: tensor.resize_(0), "model.multi_modal_projector.linear_1.bias .*(empty|no values)"),
    ],
)
def test_broken_tensors_are_not_saved(trained, tmp_path, spoil, message):
    state = adapter.trainable_state_dict(trained)
    spoil(state["model.multi_modal_projector.linear_1.bias"])
    with pytest.raises(ValueError, match=message):
        save_adapter(trained, None, tmp_path / "out", state_dict=state)
    assert not (tmp_path / "out").exists()


def test_the_hash_follows_the_weights(golden, trained, saved, tmp_path):
    save_adapter(trained, None, tmp_path / "same")
    assert checkpoint_hash(tmp_path / "same") == checkpoint_hash(saved)
    other = assemble(golden)
    add_lora(other)
    save_adapter(other, None, tmp_path / "other")
    assert checkpoint_hash(tmp_path / "other") != checkpoint_hash(saved)
    other.disable_adapters()
    assert len(checkpoint_hash(golden / "base")) == 16


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "has no files, language_model, vision_tower"),
        ({"files": []}, r"files is \[\]; expected an object"),
        ({"files": {"projector.safetensors": {}}}, "files.projector.safetensors has no bytes, sha256"),
        ({"files": {"projector.safetensors": {"bytes": 3}}}, "files.projector.safetensors has no sha256; it has bytes"),
        ({"language_model": None}, "language_model is None; expected a list"),
        ({"vision_tower": ["a", "b", "c"]}, r"vision_tower is \['a', 'b', 'c'\]; expected a path and a fingerprint"),
        ([], r"is \[\]; expected an object"),
    ],
)
def test_a_broken_manifest_is_named(copy, content, message):
    file = copy / "llava_sp.json"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps(whole | content if content and isinstance(content, dict) else content))
    for read in (describe, checkpoint_hash, LlavaSPForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=f"{file}:? {message}"):
            read(copy)
    assert not inspect(copy)["loads"]
