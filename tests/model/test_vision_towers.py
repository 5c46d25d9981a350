"""Towers of every kind that transformers has: the patches are those of the tower, whatever tokens lead them, or it is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

from llava_sp import LlavaSPForCausalLM
from tests.messages import refused

SIDE, PATCH, GRID = 28, 7, 4
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": SIDE,
    "patch_size": PATCH,
}
SQUARE = {"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]}
# model type, its own settings, tokens before the patches
TOWERS = [
    ("clip_vision_model", {}, 1),
    ("siglip_vision_model", {}, 0),
    ("dinov2", {}, 1),
    ("dinov2_with_registers", {"num_register_tokens": 4}, 5),
    ("dinov3_vit", {"num_register_tokens": 4}, 5),
    ("vit", {}, 1),
    ("deit", {}, 2),
    ("beit", {}, 1),
    ("data2vec-vision", {}, 1),
    ("internvl_vision", SQUARE, 1),
    ("ijepa", {}, 0),
    ("vit_msn", {}, 1),
    ("aimv2_vision_model", {}, 0),
    ("mlcd_vision_model", {}, 1),
    ("chinese_clip_vision_model", {}, 1),
    ("radio", {}, 10),
    ("idefics3_vision", {}, 0),
]
REFUSED = [
    ("vit_mae", {}, ("vision tower", "ViTMAEModel", "4 x 4")),
    ("pixtral", {}, ("vision tower", "PixtralVisionModel", "4 x 4")),
    (
        "swin",
        {"embed_dim": 16, "depths": [1, 1, 1], "num_heads": [2, 2, 2], "window_size": 2},
        ("vision tower", "SwinModel"),
    ),
    ("convnext", {}, ("tower", "convnext", "ViT")),
    ("siglip2_vision_model", {"num_patches": 16}, ("image_size", "None")),
]


def save_tower(folder: Path, kind: str, settings: dict) -> Path:
    cls = CONFIG_MAPPING[kind]
    known = {field.name for field in dataclasses.fields(cls)}
    torch.manual_seed(0)
    tower = AutoModel.from_config(cls(**{key: value for key, value in (SIZES | settings).items() if key in known}))
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tower.save_pretrained(folder)
    return folder


def patches_of(model: LlavaSPForCausalLM) -> torch.Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return model.model.get_patch_features(torch.randn(2, 3, SIDE, SIDE))


@pytest.mark.parametrize("kind, settings, leading", TOWERS, ids=[tower[0] for tower in TOWERS])
def test_leading_tokens_are_left_out(golden, tmp_path, kind, settings, leading):
    tower = save_tower(tmp_path / "tower", kind, settings)
    variant = "cropping" if leading > 1 else "none"
    model = LlavaSPForCausalLM.from_backbones(golden / "base", tower, spatial_variant=variant)
    assert model.config.num_leading_tokens == leading
    assert model.config.vision_feature_select_strategy == ("default" if leading else "full")
    torch.manual_seed(1)
    with torch.no_grad():
        whole = model.model.vision_tower(torch.randn(2, 3, SIDE, SIDE), output_hidden_states=True).hidden_states[-2]
    assert whole.shape[1] == leading + GRID**2
    assert torch.equal(patches_of(model), whole[:, leading:])
    model.save_pretrained(tmp_path / "full")
    assert torch.equal(patches_of(LlavaSPForCausalLM.from_pretrained(tmp_path / "full")), patches_of(model))


@pytest.mark.parametrize("kind, settings, parts", REFUSED, ids=[tower[0] for tower in REFUSED])
def test_what_gives_no_grid_is_refused(golden, tmp_path, kind, settings, parts):
    tower = save_tower(tmp_path / "tower", kind, settings)
    with refused(*parts):
        LlavaSPForCausalLM.from_backbones(golden / "base", tower, spatial_variant="none")


def test_columns_first_are_refused(golden, tmp_path, monkeypatch):
    """The order of the patches counts, not their number alone."""
    embed = CLIPVisionEmbeddings

    def turned(self, pixel_values, **kwargs):
        return forward(self, pixel_values.transpose(-1, -2), **kwargs)

    forward = embed.forward
    monkeypatch.setattr(embed, "forward", turned)
    with pytest.raises(ValueError, match="row by row"):
        LlavaSPForCausalLM.from_backbones(golden / "base", golden / "clip", spatial_variant="none")


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_a_recorded_count_that_is_not_the_towers_is_refused(golden, tmp_path, kind):
    from llava_sp.checkpoints.opening.adapter import save_adapter

    tower = save_tower(tmp_path / "tower", "dinov2_with_registers", {"num_register_tokens": 4})
    model = LlavaSPForCausalLM.from_backbones(golden / "base", tower, spatial_variant="none")
    if kind == "full":
        model.save_pretrained(tmp_path / "saved")
    else:
        save_adapter(model, None, tmp_path / "saved")
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert config.pop("vision_tower_leading_tokens") == 5
    (tmp_path / "saved/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json.* vision_tower_leading_tokens"):
        LlavaSPForCausalLM.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(
    "architecture, settings",
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_small_patch14_reg4_dinov2", {"init_values": 1.0}),
        ("vit_base_patch16_siglip_224", {}),
        ("deit_tiny_distilled_patch16_224", {}),
    ],
)
def test_timm(golden, tmp_path, architecture, settings):
    pytest.importorskip("timm", reason="the extra llava_sp[timm] is not installed")
    from transformers import TimmWrapperConfig, TimmWrapperModel

    sizes = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": 32, "depth": 3, "num_heads": 2, **settings}
    TimmWrapperModel(TimmWrapperConfig(architecture=architecture, model_args=sizes)).save_pretrained(tmp_path)
    model = LlavaSPForCausalLM.from_backbones(golden / "base", tmp_path, spatial_variant="none")
    network = model.model.vision_tower.timm_model
    torch.manual_seed(1)
    with torch.no_grad():
        tokens = network.forward_intermediates(torch.randn(2, 3, SIDE, SIDE), indices=3, output_fmt="NLC")[1][-2]
    assert torch.equal(patches_of(model), tokens)
