"""Configurations made by hand: defaults, a model that runs from them, and values that do not fit."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig

from llava_sp import LlavaSPConfig, LlavaSPForCausalLM

VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "intermediate_size": 16,
    "patch_size": 14,
}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 64}


def by_hand(image_size=56, text: dict | None = None, **settings) -> LlavaSPConfig:
    vision = CLIPVisionConfig(**VISION, image_size=image_size)
    return LlavaSPConfig(vision_config=vision, text_config=LlamaConfig(**TEXT, **(text or {})), **settings)


@pytest.mark.parametrize(
    ("text", "settings", "pad"),
    [
        ({}, {}, None),
        ({"pad_token_id": 3}, {}, 3),
        ({}, {"pad_token_id": 61}, 61),
        ({"pad_token_id": 3}, {"pad_token_id": 4}, 4),
    ],
)
def test_a_model_from_a_configuration_runs(text, settings, pad, tmp_path):
    """Forward, loss and generation, padded and not, without any checkpoint; saved and read, it is the same."""
    config = by_hand(text=text, image_token_index=60, **settings)
    assert config.pad_token_id == pad
    torch.manual_seed(0)
    model = LlavaSPForCausalLM(config).eval()
    ids = torch.tensor([[1, 5, *[60] * config.num_image_tokens, 7, 8]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 56, 56)}
    logits = model(**inputs).logits
    assert torch.isfinite(logits).all() and (logits[..., 60:] == torch.finfo(logits.dtype).min).all()
    assert pad is None or (logits[..., pad] == torch.finfo(logits.dtype).min).all()
    loss = model(**inputs, labels=ids.where(ids < 60, -100)).loss
    loss.backward()
    assert torch.isfinite(loss) and 2 < loss < 8  # ln(60) is 4.1
    new = model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=62)[0, ids.shape[1] :].tolist()
    assert len(new) == 3 and all(token < 60 and token != pad for token in new)
    config.save_pretrained(tmp_path)
    assert LlavaSPConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize("layer", ["spatial.extractor.projections.4", "spatial.integrator.context", "linear_1"])
def test_a_model_from_a_configuration_has_the_spread_of_its_fan_in(layer):
    weight = LlavaSPForCausalLM(by_hand(image_token_index=60)).model.multi_modal_projector.get_submodule(layer).weight
    fan_in = weight[0].numel()
    assert weight.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.1)


@pytest.mark.parametrize(
    ("settings", "key", "right"),
    [
        ({"spatial_scales": [4, 25]}, r"spatial_scales is \[4, 25\]", "from 1 to 24"),
        ({"spatial_scales": [0]}, r"spatial_scales is \[0\]", "from 1 to 24"),
        ({"spatial_scales": [4, 4]}, r"spatial_scales is \[4, 4\]", "different"),
        ({"spatial_scales": []}, r"spatial_scales is \[\]", 'spatial_variant="none"'),
        ({"spatial_width": 0}, "spatial_width is 0", "at least 1"),
        ({"fusion_kernel": 25}, "fusion_kernel is 25", "from 1 to 24"),
        ({"fusion_stride": 0}, "fusion_stride is 0", "at least 1"),
        ({"vision_feature_layer": 3}, "vision_feature_layer is 3", "-3 to 2"),
        ({"vision_feature_layer": [-2, -4]}, r"vision_feature_layer is \[-2, -4\]", "-3 to 2"),
        ({"image_size": [336, 224]}, r"image_size is .336, 224.", "a square"),
        ({"image_size": 0}, "image_size is 0", "a square, in pixels"),
    ],
)
def test_values_that_do_not_fit_are_named(settings, key, right):
    with pytest.raises(ValueError, match=f"{key}; .*{right}"):
        by_hand(**{"image_size": 336, **settings})


def test_values_that_are_not_used_are_not_checked():
    assert by_hand(336, spatial_variant="none", spatial_width=0).num_image_tokens == 24 * 24
    assert by_hand(336, spatial_fusion=False, fusion_kernel=99).num_image_tokens == 24 * 24 + 6
