"""The spatial projector against the recorded outputs and gradients of the original, and as algebra."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, LlamaConfig

from llava_sp import LlavaSPConfig
from llava_sp.model.projector import SPATIAL_VARIANTS, SpatialProjector, WindowProjection
from tests.released import LAYOUTS, our_name, projector_weights, variant


def make_config(grid: int = 24, width: int = 64, language: int = 96, **spatial) -> LlavaSPConfig:
    vision = CLIPVisionConfig(
        hidden_size=width, image_size=grid * 14, patch_size=14, num_hidden_layers=2, num_attention_heads=1
    )
    text = LlamaConfig(hidden_size=language, num_hidden_layers=1, num_attention_heads=1, vocab_size=64)
    return LlavaSPConfig(vision_config=vision, text_config=text, **spatial)


@pytest.fixture(scope="module")
def recipe(golden):
    spec = importlib.util.spec_from_file_location("recipe", golden / "recipe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recorded(golden, recipe, layout: str, suffix: str = ""):
    """Our projector with the recorded weights, the record, and what was recorded about it."""
    about = json.loads((golden / f"projector_{layout}{suffix}.json").read_text())
    tensors = load_file(golden / f"projector_{layout}{suffix}.safetensors")
    config = make_config(24, about["vision"], about["llm"], spatial_width=about["conv"], **variant(layout))
    projector = SpatialProjector(config)
    weights = recipe.weights(about["weight_seed"], layout, about["vision"], about["conv"], about["llm"])
    projector.load_state_dict(projector_weights(weights))
    return projector, tensors, about


def assert_within_noise(actual: torch.Tensor, expected: torch.Tensor, kind: str) -> None:
    """normal: 1e-5 absolute; wild: 1e-3 where values have size 40, so relative to the tensor's own size."""
    scale = 1.0 if kind == "normal" else max(1.0, expected.abs().max().item() / 40)
    noise = 1e-5 if kind == "normal" else 1e-3
    assert (actual - expected).abs().max().item() <= noise * scale


@pytest.mark.parametrize("kind", ["normal", "wild"])
@pytest.mark.parametrize("suffix", ["", "_c32"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_equal_the_original(golden, recipe, layout, suffix, kind):
    projector, tensors, about = recorded(golden, recipe, layout, suffix)
    patches = torch.from_numpy(recipe.features(about["input_seed"], about["batch"], about["vision"], kind))
    with torch.no_grad():
        output = projector(patches)
        features = projector.spatial.extractor(patches.unflatten(1, (24, 24)))
    assert_within_noise(features, tensors[f"{kind}.spatial_conv"], kind)
    if suffix:
        assert_within_noise(output[:, about["kept_positions"]], tensors[f"{kind}.output_kept"], kind)
    else:
        assert output.shape == (2, 582, 96)
        assert_within_noise(output, tensors[f"{kind}.output"], kind)


@pytest.mark.parametrize("kind", ["normal", "wild"])
@pytest.mark.parametrize("layout", ["cropping", "pooling_dfi"])
def test_fusion_equals_the_original(golden, recipe, layout, kind):
    projector, tensors, about = recorded(golden, recipe, layout)
    patches = torch.from_numpy(recipe.features(about["input_seed"], about["batch"], about["vision"], kind))
    with torch.no_grad():
        fused = projector.spatial.integrator(tensors[f"{kind}.spatial_conv"], patches.unflatten(1, (24, 24)))
    assert_within_noise(fused, tensors[f"{kind}.fused"], kind)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_equal_the_original(golden, recipe, layout):
    projector, tensors, about = recorded(golden, recipe, layout)
    patches = torch.from_numpy(recipe.features(about["input_seed"], about["batch"], about["vision"]))
    cotangent = recipe.generator(about["input_seed"], "cotangent").standard_normal((2, 582, 96)).astype("float32")
    (projector(patches) * torch.from_numpy(cotangent)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in projector.named_parameters()}
    recorded_names = {our_name(name) for name in about["grad_l2"]}
    assert recorded_names == set(gradients)
    for name, norm in about["grad_l2"].items():
        # Some norms are zero in exact arithmetic (a key's bias shifts all scores alike): hence the absolute part.
        assert gradients[our_name(name)].norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-3), name
    for key, expected in tensors.items():
        if key.startswith("grad."):
            actual = gradients[our_name(key.removeprefix("grad."))]
        elif key.startswith("grad_first_row."):
            actual = gradients[our_name(key.removeprefix("grad_first_row."))][0]
        else:
            continue
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("window", [1, 3, 8])
def test_a_window_projection_is_the_convolution(window):
    torch.manual_seed(window)
    projection = WindowProjection(5, 7, window)
    torch.nn.init.normal_(projection.weight)
    windows = torch.randn(2, window, window, 5, dtype=torch.float64)
    projection.double()
    expected = F.conv2d(windows.permute(0, 3, 1, 2), projection.weight)[..., 0, 0]
    torch.testing.assert_close(projection(windows), expected)


@pytest.mark.parametrize("grid", [12, 16, 24, 27, 32])
@pytest.mark.parametrize("fusion", [True, False])
@pytest.mark.parametrize("name", ["cropping", "pooling", "none"])
def test_every_grid_and_switch(name, fusion, grid):
    config = make_config(grid, 16, 32, spatial_variant=name, spatial_fusion=fusion)
    projector = SpatialProjector(config)
    projector.reset_parameters()
    tokens = projector(torch.randn(2, grid**2, 16))
    assert tokens.shape == (2, config.num_image_tokens, 32)
    assert config.num_image_tokens == grid**2 + (0 if name == "none" else 6)
    assert torch.isfinite(tokens).all()
    if name != "none":
        assert config.spatial_scales[-1] == grid


@pytest.mark.parametrize("name", ["cropping", "pooling"])
def test_any_scales_and_widths(name):
    config = make_config(12, 16, 32, spatial_variant=name, spatial_scales=[1, 5, 12, 7], spatial_width=9)
    projector = SpatialProjector(config)
    projector.reset_parameters()
    assert config.num_spatial_tokens == 4
    assert projector.spatial.linear.in_features == 18
    assert projector(torch.randn(1, 144, 16)).shape == (1, 148, 32)


@pytest.mark.parametrize("grid", [1, 2, 4, 5, 7])
def test_small_grids_have_fewer_scales(grid):
    scales = make_config(grid, 16, 32).spatial_scales
    assert len(set(scales)) == len(scales) == min(6, grid) and scales[-1] == grid


def test_cropping_sees_the_centre_and_pooling_the_whole():
    grid = torch.arange(24.0)
    patches = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), dim=-1)[None]  # each patch is its (row, column)
    config = make_config(24, 2, 8)
    crop = SPATIAL_VARIANTS["cropping"](config).window(patches, 4)
    assert crop[0, :, 0, 0].tolist() == [10, 11, 12, 13]
    assert crop[0, 0, :, 1].tolist() == [10, 11, 12, 13]
    pool = SPATIAL_VARIANTS["pooling"](config).window(patches, 4)
    assert pool[0, :, 0, 0].tolist() == [2.5, 8.5, 14.5, 20.5]
    assert SPATIAL_VARIANTS["pooling"](config).window(patches, 24) is patches


@pytest.mark.parametrize(
    "layer", ["spatial.extractor.projections.24", "spatial.integrator.context", "spatial.linear", "linear_1"]
)
def test_fresh_weights_have_the_spread_of_their_fan_in(layer):
    projector = SpatialProjector(make_config(24, 32, 256, spatial_width=64))
    projector.reset_parameters()
    weight = projector.get_submodule(layer).weight
    fan_in = weight[0].numel()
    assert weight.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.05)
    assert weight.abs().max().item() <= fan_in**-0.5


def test_a_new_variant_is_one_class():
    class Corner(SPATIAL_VARIANTS["cropping"]):
        def window(self, patches_BGGC, scale):
            return patches_BGGC[:, :scale, :scale]

    SPATIAL_VARIANTS["corner"] = Corner
    try:
        projector = SpatialProjector(make_config(12, 16, 32, spatial_variant="corner"))
        projector.reset_parameters()
        assert projector(torch.randn(1, 144, 16)).shape == (1, 150, 32)
    finally:
        del SPATIAL_VARIANTS["corner"]


def test_unknown_variant():
    with pytest.raises(ValueError, match="spatial_variant is 'croping'.*none, cropping, pooling"):
        SpatialProjector(make_config(24, spatial_variant="croping"))


def test_patches_that_are_not_the_grid():
    projector = SpatialProjector(make_config(12, 16, 32))
    with pytest.raises(ValueError, match="100 patch tokens.*12 x 12 = 144"):
        projector(torch.randn(1, 100, 16))
