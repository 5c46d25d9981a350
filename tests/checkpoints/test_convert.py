"""Conversion keeps every bit in both directions, and what it writes is what the original code reads."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from llava_sp import LlavaSPForCausalLM, LlavaSPProcessor
from llava_sp.checkpoints.convert import main
from llava_sp.checkpoints.opening.adapter import save_adapter
from llava_sp.checkpoints.reading.formats import recognise
from llava_sp.checkpoints.reading.tensor_files import read_all
from llava_sp.checkpoints.writing import conversion
from llava_sp.checkpoints.writing.conversion import convert
from tests.checkpoints.kinds import write_ours
from tests.checkpoints.test_original import PROMPT
from tests.released import LAYOUTS, bases, load_released, released_folder, variant


def stored(path) -> dict[str, torch.Tensor]:
    return read_all(recognise(path).tensors)


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_released_folder_to_ours_and_back(golden, tmp_path, layout):
    """Same keys, same tensors, same settings of LoRA; and both ends open as the same model."""
    source = released_folder(golden, layout)
    given = bases(golden)
    convert(source, tmp_path / "ours", **given)
    convert(tmp_path / "ours", tmp_path / "back")
    for name in ("adapter_model.safetensors", "non_lora_trainables.bin"):
        read = load_file if name.endswith("safetensors") else lambda file: torch.load(file, weights_only=True)
        assert_same(read(source / name), read(tmp_path / "back" / name))
    before, after = (json.loads((f / "adapter_config.json").read_text()) for f in (source, tmp_path / "back"))
    for key in ("r", "lora_alpha", "lora_dropout", "peft_type", "task_type", "bias"):
        assert before[key] == after[key], key
    assert sorted(before["target_modules"]) == after["target_modules"]
    assert after.keys() <= before.keys()  # PEFT of the original's time stumbles over a field that it does not know
    before, after = (json.loads((f / "config.json").read_text()) for f in (source, tmp_path / "back"))
    names = {"_name_or_path", "mm_vision_tower"}  # now where they stand
    differing = {key for key in before.keys() & after.keys() if before[key] != after[key]}
    assert differing <= names | {"transformers_version", "architectures", "max_position_embeddings"}
    assert {key for key in before if key.startswith("mm_")} <= after.keys() | {"mm_patch_merge_type", "mm_projector_lr"}
    again = LlavaSPForCausalLM.from_pretrained(tmp_path / "back")  # on the bases that it records
    for name, tensor in load_released(golden, layout).state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert (tmp_path / "back/tokenizer.model").is_file()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ours_to_the_original_and_back(golden, tmp_path, layout):
    """What we train may be in float32 on a 16-bit base; no bit of it is rounded."""
    model = load_released(golden, layout, dtype=torch.bfloat16)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_" in name or "multi_modal_projector" in name:
            parameter.data = torch.randn(parameter.shape)
    save_adapter(model, LlavaSPProcessor.from_backbones(model.config), tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "original")
    convert(tmp_path / "original", tmp_path / "again", **bases(golden))
    assert_same(stored(tmp_path / "ours"), stored(tmp_path / "again"))
    assert json.loads((tmp_path / "ours/config.json").read_text()) == json.loads(
        (tmp_path / "again/config.json").read_text()
    )


@pytest.mark.parametrize("kind", ["cropping", "none"])
def test_a_first_stage_both_ways(golden, tmp_path, kind):
    settings = variant(kind) if kind != "none" else {"spatial_variant": "none"}
    model = LlavaSPForCausalLM.from_backbones(golden / "base", golden / "clip", spatial_width=3, **settings)
    save_adapter(model, LlavaSPProcessor.from_backbones(model.config), tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "original")
    name = "mm_projector.bin" if kind == "none" else "model.bin"
    assert all(key.startswith("model.") for key in torch.load(tmp_path / "original" / name, weights_only=True))
    for start in (tmp_path / "original", tmp_path / "original" / name):
        convert(start, tmp_path / f"again-{start.name}", **bases(golden))
        assert_same(stored(tmp_path / "ours"), stored(tmp_path / f"again-{start.name}"))


@pytest.mark.parametrize("kind", ["pooling", "none"])
def test_a_full_checkpoint_both_ways(golden, tmp_path, kind):
    settings = variant(kind) if kind != "none" else {"spatial_variant": "none"}
    model = LlavaSPForCausalLM.from_backbones(golden / "base", golden / "clip", spatial_width=3, **settings)
    model.save_pretrained(tmp_path / "ours")
    LlavaSPProcessor.from_backbones(model.config).save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "original", max_shard_size="400KB")
    assert len(list((tmp_path / "original").glob("*.safetensors"))) > 1
    found = recognise(tmp_path / "original")
    assert found.format == "original_full" and not found.unknown and not found.missing
    assert found.tensors["lm_head.weight"].shape[0] == found.config["vocab_size"] == 1024  # no row is lost
    convert(tmp_path / "original", tmp_path / "again")
    assert_same(stored(tmp_path / "ours"), stored(tmp_path / "again"))


def test_transformers_llava_both_ways(golden, tmp_path, llava_hf, images):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    convert(llava_hf, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "hf", target="llava_hf")
    assert_same(stored(llava_hf), stored(tmp_path / "hf"))
    given = bases(golden)
    with pytest.raises(ValueError, match="give --vision-tower"):
        convert(llava_hf, tmp_path / "original", target="original", language_model=given["language_model"])
    with pytest.raises(ValueError, match="ours does not record a vision tower .* give --vision-tower"):
        convert(tmp_path / "ours", tmp_path / "original", language_model=given["language_model"])
    convert(llava_hf, tmp_path / "original", target="original", **given)
    convert(tmp_path / "original", tmp_path / "again")
    assert_same(stored(tmp_path / "ours"), stored(tmp_path / "again"))
    assert recognise(tmp_path / "original").format == "original_full"
    llava = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    inputs = AutoProcessor.from_pretrained(tmp_path / "hf")(text=PROMPT, images=images[0], return_tensors="pt")
    assert (inputs["input_ids"] == llava.config.image_token_index).sum() == 576
    with torch.no_grad():
        assert torch.isfinite(llava(**inputs).logits).all()


def test_the_original_needs_its_slow_tokenizer(golden, tmp_path, llava_hf):
    shutil.copytree(llava_hf, tmp_path / "hf")
    (tmp_path / "hf/tokenizer.model").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="hf has no tokenizer.model, which the original needs: give --language-model"):
        convert(tmp_path / "hf", tmp_path / "original", target="original", vision_tower=golden / "clip")
    assert not (tmp_path / "original").exists()


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"spatial_scales": [4, 24]}, r"spatial_scales is \[4, 24\]; expected \[4, 8, 12, 16, 20, 24\]"),
        ({"fusion_stride": 4}, "fusion_stride is 4; expected 2"),
        ({"spatial_fusion": False}, "spatial_fusion is False; expected True"),
        ({"spatial_projection_bias": False}, "spatial_projection_bias is False; expected True"),
    ],
)
def test_what_the_original_cannot_hold_is_said(golden, tmp_path, settings, complaint):
    model = LlavaSPForCausalLM.from_backbones(golden / "base", golden / "clip", spatial_width=3, **settings)
    save_adapter(model, LlavaSPProcessor.from_backbones(model.config), tmp_path / "ours")
    with pytest.raises(ValueError, match=f"cannot be written for the original code.*{complaint}"):
        convert(tmp_path / "ours", tmp_path / "original")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]


def test_wrong_ways(golden, tmp_path, llava_hf, capsys):
    source = released_folder(golden, "cropping")
    for words, complaint in (
        (["--from", source, "--to", tmp_path / "x", "--format", "original"], "in the original's format already"),
        (["--from", llava_hf, "--to", tmp_path / "x", "--format", "llava_hf"], "in transformers' format already"),
        (["--from", source, "--to", tmp_path / "x", "--format", "llava_hf"], "it has spatial tokens"),
        (["--from", source, "--to", tmp_path / "x"], "the checkpoint records, base, is not there"),
        (["--from", source, "--to", source], "which is read: choose a folder elsewhere"),
        (["--from", tmp_path / "none", "--to", tmp_path / "x"], "there is no folder"),
    ):
        assert main(list(map(str, words))) == 2
        told = capsys.readouterr().err
        assert told.startswith("error: ") and complaint in told and told.count("\n") == 1, told
    assert not list(tmp_path.iterdir())


def test_command(golden, tmp_path):
    words = ["--from", released_folder(golden, "pooling"), "--to", tmp_path / "x"]
    words += ["--language-model", golden / "base", "--vision-tower", golden / "clip"]
    done = subprocess.run(
        [sys.executable, "-m", "llava_sp.checkpoints.convert", *map(str, words)], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.endswith("an adapter checkpoint\n"), done.stderr
    assert LlavaSPForCausalLM.from_pretrained(tmp_path / "x").config.spatial_variant == "pooling"


@pytest.mark.parametrize("part", ["embed_tokens", "norm", "vision_tower"])
def test_what_an_adapter_cannot_keep_is_not_lost_silently(golden, tmp_path, monkeypatch, part):
    """Trained parts beside LoRA: of the language model they are refused; a tower's open, but do not become an adapter."""
    folder = tmp_path / "x"
    shutil.copytree(released_folder(golden, "pooling"), folder)
    file = folder / "non_lora_trainables.bin"
    added = {"embed_tokens.weight": torch.rand(1000, 96)} if part == "embed_tokens" else {"norm.weight": torch.rand(96)}
    if part == "vision_tower":
        tower = load_released(golden, "pooling").model.vision_tower.state_dict()
        prefix = "vision_tower.vision_tower.vision_model."
        added = {prefix + name.removeprefix("vision_model."): 1.5 * tensor for name, tensor in tower.items()}
    added = {f"base_model.model.model.{key}": tensor for key, tensor in added.items()}
    torch.save(torch.load(file, weights_only=True) | added, file)
    named = rf"non_lora_trainables.bin holds base_model.model.model.{part}.weight .*, which is unexpected"
    refusals = {"open": named, "convert": named, "warm start": named}
    if part == "vision_tower":
        refusals = {"convert": "holds a trained vision tower", "warm start": "has its own vision tower"}
        model = LlavaSPForCausalLM.from_pretrained(folder, **bases(golden))
        for name, tensor in model.model.vision_tower.state_dict().items():
            assert torch.equal(tensor, 1.5 * tower[name]), name
    ways = {
        "open": lambda: LlavaSPForCausalLM.from_pretrained(folder, **bases(golden)),
        "convert": lambda: convert(folder, tmp_path / "y", **bases(golden)),
        "warm start": lambda: LlavaSPForCausalLM.from_backbones(*bases(golden).values(), warm_start=folder),
    }
    for way, message in refusals.items():
        with pytest.raises(ValueError, match=message), monkeypatch.context() as patch:
            if way == "convert":  # told before a model is opened
                patch.setattr(conversion, "open_model", lambda *_, **__: pytest.fail("a model was opened"))
            ways[way]()


# ---------------------------------------------------------------- what the original's language model has and has not


def with_language_settings(golden, tmp_path, **changes) -> LlavaSPForCausalLM:
    """A model without spatial tokens whose language model has these settings, with trained-like weights."""
    base = tmp_path / "base"
    base.mkdir()
    for file in golden.glob("base/*token*"):
        shutil.copyfile(file, base / file.name)
    torch.manual_seed(0)
    (base / "config.json").write_text(json.dumps(json.loads((golden / "base/config.json").read_text()) | changes))
    language = LlamaForCausalLM(LlamaConfig.from_pretrained(base))
    for parameter in language.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    language.save_pretrained(base)
    return LlavaSPForCausalLM.from_backbones(base, golden / "clip", spatial_variant="none", dtype=torch.float32)


def text_logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.arange(3, 60)[None]).logits


LINEAR = {"type": "linear", "factor": 4.0}
ROPES = [
    ({"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_scaling": None}),
    ({"rope_theta": 5e5, "rope_scaling": LINEAR}, {"rope_theta": 5e5, "rope_scaling": LINEAR}),
    (
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2}, "max_position_embeddings": 20},
        {"rope_theta": 10000.0, "rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 20},
    ),
    ({"attention_bias": True}, {"attention_bias": True}),
]


@pytest.mark.parametrize(("changes", "written"), ROPES)
def test_positions_and_biases_stay(golden, tmp_path, changes, written):
    """Ours -> the original's, in the fields of transformers 4 -> ours: at each end the same logits."""
    model = with_language_settings(golden, tmp_path, **changes)
    convert(write_ours(tmp_path / "ours", model), tmp_path / "original")
    settings = json.loads((tmp_path / "original/config.json").read_text())
    assert settings.items() >= written.items() and "rope_parameters" not in settings
    convert(tmp_path / "original", tmp_path / "again")
    for folder in ("original", "again"):
        opened = LlavaSPForCausalLM.from_pretrained(tmp_path / folder)
        assert torch.equal(text_logits(opened), text_logits(model)), folder
    if "attention_bias" not in changes:
        plain = {key: value for key, value in settings.items() if key not in ("rope_theta", "rope_scaling")}
        (tmp_path / "original/config.json").write_text(json.dumps(plain))
        opened = LlavaSPForCausalLM.from_pretrained(tmp_path / "original")
        assert not torch.allclose(text_logits(opened), text_logits(model), atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"head_dim": 32}, "text_config.head_dim is 32; expected 24"),
        ({"mlp_bias": True}, "text_config.mlp_bias is True; expected False"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "ours cannot be written for the original code: .*rope_type is 'yarn'; expected 'linear' or 'dynamic'",
        ),
    ],
)
def test_a_llama_that_the_original_cannot_hold(golden, tmp_path, changes, complaint):
    write_ours(tmp_path / "ours", with_language_settings(golden, tmp_path, **changes))
    with pytest.raises(ValueError, match=complaint):
        convert(tmp_path / "ours", tmp_path / "original")
    assert not (tmp_path / "original").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 2}},
        {"init_lora_weights": "pissa"},
        {"lora_bias": True},
        {"unheard_of": 3},
    ],
)
def test_lora_that_the_original_cannot_hold(kinds, tmp_path, changes):
    copy = kinds["llava_sp_adapter"].copy(tmp_path / "ours")
    file = copy.folder / "lora/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    ((key, value),) = changes.items()
    with pytest.raises(ValueError, match=re.escape(f"{file}: {key} is {value!r}; expected plain LoRA")):
        convert(copy.folder, tmp_path / "original")


def test_from_a_file_to_a_folder_beside_it(golden, tmp_path):
    for name in ("model.bin", "config.json"):
        shutil.copyfile(golden / "pretrain_artifacts/pooling" / name, tmp_path / name)
    convert(tmp_path / "model.bin", tmp_path / "ours", **bases(golden))
    assert recognise(tmp_path / "ours").format == "llava_sp_adapter"
    with pytest.raises(ValueError, match="which is read: choose a folder elsewhere"):
        convert(tmp_path, tmp_path / "more", **bases(golden))


def test_a_broken_file_of_the_processor_is_named(kinds, tmp_path):
    copy = kinds["llava_sp_adapter"].copy(tmp_path / "ours")
    (copy.folder / "processor_config.json").write_text("{")
    with pytest.raises(ValueError, match="processor_config.json is not valid JSON"):
        convert(copy.folder, tmp_path / "original")


def test_files_are_as_the_umask_has_them(kinds, tmp_path):
    """Also in a folder that everybody may write to."""
    tmp_path.chmod(0o777)
    convert(kinds["llava_sp_adapter"].folder, tmp_path / "original")
    model = kinds["llava_sp_adapter"].open()
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours").chmod(0o777)
    save_adapter(model, None, tmp_path / "ours")
    (tmp_path / "plain").touch()
    usual = (tmp_path / "plain").stat().st_mode
    files = [file for name in ("original", "ours") for file in (tmp_path / name).rglob("*") if file.is_file()]
    assert len(files) > 8 and {file.stat().st_mode for file in files} == {usual}
