"""Who trains: the stages against the recorded groups of the original."""

from __future__ import annotations

import json

import pytest
import torch

from llava_sp import LlavaSPForCausalLM
from llava_sp.config.arguments import ModelArguments, TrainArguments
from llava_sp.train import stages
from llava_sp.train.build import add_lora, prepare_stage
from tests.released import CONVOLUTION_WIDTH, our_name, variant

# The cases in which the original is not in error: where its switch fits the variant, without the unused newline token.
CASES = {
    "pooling_lora_shipped": ("pooling", "finetune_lora"),
    "cropping_lora_intended": ("cropping", "finetune_lora"),
    "pooling_pretrain_shipped": ("pooling", "pretrain"),
    "cropping_pretrain_intended": ("cropping", "pretrain"),
}


def tiny(golden, layout: str = "cropping", lora: bool = False, **lora_settings) -> LlavaSPForCausalLM:
    model = LlavaSPForCausalLM.from_backbones(
        golden / "base", golden / "clip", spatial_width=CONVOLUTION_WIDTH, dtype=torch.float32, **variant(layout)
    )
    if lora:
        add_lora(model, ModelArguments(lora_r=8, lora_alpha=16, **lora_settings))
    return model


def ours(original: str) -> str:
    """An original parameter's name -> ours in the whole model."""
    if ".lora_" in original:
        return original.replace("base_model.model.model.", "model.language_model.")
    return "model.multi_modal_projector." + our_name(original)


@pytest.mark.parametrize("case", CASES)
def test_groups_equal_the_recorded_ones(golden, case):
    layout, stage = CASES[case]
    recorded = json.loads((golden / "param_groups.json").read_text())["cases"][case]
    assert not recorded["frozen_projector_parameters"]
    expected = {
        ours(name): (group["lr"], group["weight_decay"]) for group in recorded["groups"] for name in group["params"]
    }
    model = tiny(golden, layout, lora=stage == "finetune_lora")
    stages.apply_stage(model, stage)
    rates = (
        {"learning_rate": 2e-4, "projector_lr": 2e-5}
        if stage == "finetune_lora"
        else dict.fromkeys(("learning_rate", "projector_lr"), 1e-3)
    )
    groups = stages.optimizer_groups(model, stage, rates, weight_decay=0.1)
    found = {name: (group.lr, group.weight_decay) for group in groups for name in group.parameters}
    assert found == expected
    assert found.keys() == stages.trained_names(model)
    assert sum(len(group.parameters) for group in groups) == len(found), "a parameter is in two groups"


def test_lora_is_on_the_language_model_only(golden):
    model = tiny(golden, lora=True)
    names = [name for name, _ in model.named_parameters() if ".lora_" in name]
    assert len(names) == 3 * 7 * 2
    assert all(name.startswith("model.language_model.layers.") for name in names)


def test_every_part_is_counted_once(golden):
    model = tiny(golden, "pooling_dfi", lora=True)
    parts = stages.by_part(model)
    assert sum(len(part) for part in parts.values()) == len(list(model.parameters()))
    lines = list(stages.table(model, "finetune_lora", {"learning_rate": 2e-4, "projector_lr": 2e-5}))
    lora = sum(p.numel() for p in parts["lora"].values())
    assert any(f"{lora:,}" in line and "trains at 0.0002" in line for line in lines)
    assert any("vision_tower" in line and "frozen" in line for line in lines)


def test_the_frozen_tower_stays_in_evaluation(golden):
    model = tiny(golden, lora=True)
    prepare_stage(model, TrainArguments(output_dir="unused", stage="finetune_lora", use_cpu=True))
    model.train()
    side = model.config.image_size
    assert not model.model.get_patch_features(torch.zeros(1, 3, side, side)).requires_grad
    assert not any(module.training for module in model.model.vision_tower.modules())
    assert model.model.language_model.training


def test_variant_none_has_no_spatial_part(golden):
    model = LlavaSPForCausalLM.from_backbones(
        golden / "base", golden / "clip", spatial_variant="none", dtype=torch.float32
    )
    stages.apply_stage(model, "pretrain")
    assert all("linear_" in name for name in stages.trained_names(model))
    groups = stages.optimizer_groups(model, "pretrain", {"learning_rate": 1.0}, 0.0)
    assert [group.name for group in groups] == ["patch_mlp", "patch_mlp, no decay"]


def test_mistakes(golden, monkeypatch):
    model = tiny(golden)
    with pytest.raises(ValueError, match="stage = 'third' is unknown"):
        stages.apply_stage(model, "third")
    with pytest.raises(ValueError, match="the model has no LoRA"):
        stages.apply_stage(model, "finetune_lora")
    monkeypatch.setitem(stages.STAGES, "tower", {"vision_tower": "learning_rate"})
    with pytest.raises(ValueError, match="trains vision_tower, but a checkpoint holds"):
        stages.apply_stage(model, "tower")
    with pytest.raises(ValueError, match=r"names qproj; .* has down_proj, gate_proj"):
        add_lora(model, ModelArguments(lora_target_modules=["qproj", "v_proj"]))
    largest = model.config.text_config.hidden_size
    with pytest.raises(ValueError, match=f"lora_r is 1000000; it must be at most {largest}"):
        add_lora(model, ModelArguments(lora_r=10**6))
    add_lora(model, ModelArguments(lora_r=largest))
