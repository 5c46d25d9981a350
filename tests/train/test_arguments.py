"""Configurations: the shipped ones, inheritance, variables, and everything that can be wrong in one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from llava_sp.config.arguments import load_config, split_global_batch
from llava_sp.model.configuration_llava_sp import PROJECTOR_SETTINGS, LlavaSPConfig
from llava_sp.train.preflight import check_inputs
from tests.messages import refused

CONFIGS = Path(__file__).parents[2] / "configs"
RUNS = sorted(path for path in CONFIGS.rglob("*.yaml") if "output_dir" in path.read_text())
RECIPE = {
    "pretrain": {"learning_rate": 1e-3, "projector_lr": 1e-3, "global": 256, "template": "plain"},
    "finetune_lora": {"learning_rate": 2e-4, "projector_lr": 2e-5, "global": 128, "template": "vicuna_v1"},
}


def write(folder: Path, name: str = "c.yaml", **keys) -> Path:
    (folder / name).write_text(yaml.safe_dump(keys))
    return folder / name


@pytest.mark.parametrize("path", RUNS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_shipped_config_parses(path, monkeypatch):
    """And its global batch can be split among 1 to 8 processes."""
    monkeypatch.setenv("LLAVA_SP_SHAPES", "/data")
    run = load_config(path, [])
    args = run.train
    assert args.output_dir and run.model.language_model and run.model.vision_tower
    assert run.data.mixture or run.data.data_path
    for processes in (1, 2, 4, 8):
        batch, steps = split_global_batch(args.global_batch_size, args.per_device_train_batch_size, processes)
        assert batch * steps * processes == args.global_batch_size


@pytest.mark.parametrize("size", ["7b", "13b"])
@pytest.mark.parametrize("variant", ["cropping", "pooling"])
@pytest.mark.parametrize("stage", RECIPE)
def test_paper_recipe(stage, variant, size):
    run = load_config(CONFIGS / f"{stage}_{size}_{variant}.yaml", [])
    model, data, args = run.model, run.data, run.train
    recipe = RECIPE[stage]
    assert model.language_model == f"lmsys/vicuna-{size}-v1.5"
    assert model.vision_tower == "openai/clip-vit-large-patch14-336"
    projector = model.projector
    assert (projector["spatial_variant"], projector["spatial_fusion"], args.stage) == (variant, True, stage)
    assert (args.learning_rate, args.projector_lr) == (recipe["learning_rate"], recipe["projector_lr"])
    assert args.global_batch_size == recipe["global"]
    assert (args.lr_scheduler_type.value, args.warmup_steps, args.weight_decay) == ("cosine", 0.03, 0.0)
    assert (args.num_train_epochs, args.max_grad_norm, args.bf16) == (1, 1.0, True)
    assert (args.recomputation_is_open, args.activation_checkpointing_kwargs) == (True, {"use_reentrant": False})
    assert (data.conversation_template, data.model_max_length, data.image_aspect_ratio) == (
        recipe["template"],
        2048,
        "pad",
    )
    assert (data.packing, data.group_by_modality_length) == (stage == "finetune_lora", False)
    if stage == "finetune_lora":
        assert (model.lora_r, model.lora_alpha, model.lora_dropout) == (128, 256, 0.05)
        assert model.projector_checkpoint == load_config(CONFIGS / f"pretrain_{size}_{variant}.yaml").train.output_dir


def test_later_wins(tmp_path):
    write(tmp_path, "base.yaml", learning_rate=1.0, seed=1, max_steps=1)
    middle = write(tmp_path, "middle.yaml", base="base.yaml", seed=2, max_steps=2)
    args = load_config(middle, ["--max_steps", "3"]).train
    assert (args.learning_rate, args.seed, args.max_steps) == (1.0, 2, 3)
    assert args.data_seed == 2


def test_words_and_dictionaries(tmp_path):
    path = write(tmp_path, spatial_scales=[4, 8], report_to="none")
    run = load_config(
        path, ["--spatial-variant=none", "--lora_target_modules", "a", "b", "--bf16", "no", "--tf32", "0"]
    )
    assert (run.model.projector["spatial_variant"], run.model.lora_target_modules) == ("none", ["a", "b"])
    assert (run.train.bf16, run.given["tf32"]) == (False, False)
    assert run.model.projector["spatial_scales"] == [4, 8]
    run = load_config(path, {"spatial_scales": None, "learning_rate": "3e-4", "report_to": ["tensorboard"]})
    assert (run.train.learning_rate, run.train.report_to) == (3e-4, ["tensorboard"])
    assert run.model.projector["spatial_scales"] is None
    words = ["--lora_target_modules", "a", "--run_name", "7", "--report_to", "null", "--max_steps=3", "--use_cpu"]
    run = load_config(path, [*words, "--gradient_checkpointing_kwargs", '{"use_reentrant": true}'])
    assert (run.model.lora_target_modules, run.train.run_name, run.train.report_to) == (["a"], "7", [])
    assert (run.train.max_steps, run.train.use_cpu) == (3, True)
    assert run.train.gradient_checkpointing_kwargs == {"use_reentrant": True}
    assert load_config(write(tmp_path, run_name=2024, max_grad_norm="inf")).train.run_name == "2024"


def test_the_keys_of_the_projector_are_those_of_the_configuration(tmp_path):
    """LlavaSPConfig declares them, with their defaults and types; nothing else spells them out."""
    follow_from_the_backbones = ("language_model_", "vision_tower_", "pad_token_id")
    declared = {name for name in LlavaSPConfig.__annotations__ if not name.startswith(follow_from_the_backbones)}
    assert set(PROJECTOR_SETTINGS) == declared | {"vision_feature_layer"}
    assert load_config(write(tmp_path)).model.projector == {
        name: getattr(LlavaSPConfig, name) for name in PROJECTOR_SETTINGS
    }
    path = write(tmp_path, fusion_kernel=8, vision_feature_layer=[-2, -3], spatial_projection_bias=True)
    projector = load_config(path, ["--fusion_stride", "4"]).model.projector
    assert (projector["fusion_kernel"], projector["fusion_stride"]) == (8, 4)
    assert (projector["vision_feature_layer"], projector["spatial_projection_bias"]) == ([-2, -3], True)
    run = load_config(
        path, ["--vision_feature_layer", "-4", "--spatial_projection_bias", "false", "--spatial_scales", "4"]
    )
    assert run.model.projector | {"vision_feature_layer": -4, "spatial_projection_bias": False} == run.model.projector
    assert run.model.projector["spatial_scales"] == [4]
    assert run.settings | run.model.projector == run.settings


def test_variables(tmp_path, monkeypatch):
    path = tmp_path / "c.yaml"
    path.write_text("data_path: ${HERE_D:-./d}/x.json\nmax_steps: ${HERE_N:-7}\nlanguage_model: ${config_dir}/llm\n")
    run = load_config(path)
    assert run.data.data_path == str(Path("d/x.json").resolve())
    assert (run.train.max_steps, run.model.language_model) == (7, str(tmp_path / "llm"))
    monkeypatch.setenv("HERE_D", "/data")
    monkeypatch.setenv("HERE_N", "9")
    run = load_config(path)
    assert (run.data.data_path, run.train.max_steps) == ("/data/x.json", 9)
    path.write_text("output_dir: ${NOT_SET_ANYWHERE}/x\n")
    with pytest.raises(ValueError, match=r"c\.yaml: output_dir .*NOT_SET_ANYWHERE"):
        load_config(path)


@pytest.mark.parametrize(
    ("keys", "words", "message"),
    [
        ({"lerning_rate": 1}, [], r"c\.yaml: unknown key 'lerning_rate'; did you mean 'learning_rate'"),
        ({}, ["--image_foldr", "x"], r"command line: unknown key 'image_foldr'; did you mean 'image_folder'"),
        ({"max_steps": "many"}, [], r"c\.yaml: max_steps is 'many'; expected a whole number"),
        ({}, ["--learning_rate", "fast"], r"command line: learning_rate is 'fast'; expected a number"),
        ({"lr_scheduler_type": "cosinus"}, [], r"c\.yaml: lr_scheduler_type is 'cosinus'; expected .*'cosine'"),
        ({"spatial_scales": [4, "x"]}, [], r"c\.yaml: spatial_scales is \[4, 'x'\]; expected a list of a whole number"),
        ({"spatial_scale": [4]}, [], r"c\.yaml: unknown key 'spatial_scale'; did you mean 'spatial_scales'"),
        (
            {"vision_feature_layer": "last"},
            [],
            r"c\.yaml: vision_feature_layer is 'last'; expected a whole number or a list",
        ),
        ({"base": "absent.yaml"}, [], r"c\.yaml: base: there is no configuration file .*absent\.yaml"),
        ({"base": "c.yaml"}, [], r"circular"),
        ({"deepspeed": "absent.json"}, [], r"c\.yaml: deepspeed: .*absent\.json does not exist"),
        ({}, ["stray"], r"expected --key value, found 'stray'"),
        ({"global_batch_size": 4, "gradient_accumulation_steps": 2}, [], r"follows from global_batch_size"),
        ({"global_batch_size": 10, "per_device_train_batch_size": 4}, [], r"10 is not a multiple .*= 2 is valid"),
        (
            {"fsdp": "full_shard"},
            [],
            r"c\.yaml: fsdp is 'full_shard'; expected its default, null \(use deepspeed",
        ),
        (
            {"save_only_model": True},
            [],
            r"save_only_model is True; expected its default, false \(a run cannot resume",
        ),
    ],
)
def test_mistakes_are_named(tmp_path, keys, words, message):
    with pytest.raises(ValueError, match=message):
        load_config(write(tmp_path, **keys), words)


def test_what_is_not_supported_may_be_off(tmp_path):
    assert not load_config(write(tmp_path), ["--save_only_model", "false"]).train.save_only_model


def test_files_that_are_no_configuration(tmp_path):
    for text, message in (
        ("a: [", "not valid YAML"),
        ("- a", "c.yaml is .*; expected an object"),
        ("", "c.yaml is empty"),
    ):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("batch", "processes", "per_device", "steps"),
    [(128, 1, 16, 8), (128, 2, 16, 4), (128, 8, 16, 1), (128, 16, 8, 1), (16, 2, 8, 1), (16, 16, 1, 1)],
)
def test_the_global_batch_is_split(batch, processes, per_device, steps):
    assert split_global_batch(batch, 16, processes) == (per_device, steps)


def test_a_global_batch_that_cannot_be_split():
    with pytest.raises(ValueError, match="per_device_train_batch_size = 12 is valid"):
        split_global_batch(24, 16, 1)
    with pytest.raises(ValueError, match="choose a global_batch_size that is a multiple of 3"):
        split_global_batch(128, 16, 3)


def test_resolved_settings_are_a_configuration(tmp_path):
    first = load_config(CONFIGS / "finetune_lora_7b_pooling.yaml", ["--max_steps", "10"])
    settings = first.settings
    json.dumps(settings)
    again = load_config(write(tmp_path, **settings, provenance={"seed": 42}))
    assert again.settings == settings
    assert again.train.gradient_accumulation_steps == first.train.gradient_accumulation_steps


def test_all_that_is_missing_in_one_message(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError) as caught:
        check_inputs(load_config(CONFIGS / "finetune_lora_7b_cropping.yaml"))
    message = str(caught.value)
    for word in (
        "language_model = lmsys/vicuna-7b-v1.5", "vision_tower = openai/clip-vit-large-patch14-336", "HF_HUB_OFFLINE",
        f"data_path = {tmp_path}/playground/data/llava_v1_5_mix665k.json", f"image_folder = {tmp_path}/playground/data",
        "huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K", "LLAVA_SP_DATA",
        f"projector_checkpoint = {tmp_path}/runs/llava-sp-7b-cropping-pretrain", "scripts/pretrain.sh",
    ):  # fmt: skip
        assert word in message, f"{word}\n{message}"


def test_missing_parts_of_a_mixture(tmp_path):
    (tmp_path / "mixture.yaml").write_text("- {annotations: a.json, images: b}\n- {annotations: c.json, images: .}\n")
    (tmp_path / "c.json").write_text("[]")
    path = write(tmp_path, mixture="mixture.yaml", output_dir=str(tmp_path / "o"), language_model="./llm")
    with pytest.raises(ValueError) as caught:
        check_inputs(load_config(path))
    message = str(caught.value)
    assert f"annotations: {tmp_path}/a.json does not exist" in message
    assert f"images: {tmp_path}/b does not exist" in message
    assert "c.json" not in message and "vision_tower is not set" in message and "no config.json" in message


def test_projector_of_an_unfinished_first_stage(tmp_path):
    (tmp_path / "stage1" / "checkpoint-7").mkdir(parents=True)
    path = write(tmp_path, stage="finetune_lora", projector_checkpoint=str(tmp_path / "stage1"))
    with pytest.raises(ValueError, match="stage 1 has only reached checkpoint-7"):
        check_inputs(load_config(path))
    with refused("projector_checkpoint", "not set", "stage 1"):
        check_inputs(load_config(path, ["--projector_checkpoint", "null"]))
