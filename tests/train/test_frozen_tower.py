"""The frozen vision tower in training: no autograd graph, no gradients, its own number format."""

from __future__ import annotations

import pytest
import torch

from llava_sp.config.arguments import load_config
from llava_sp.train.build import build_model
from tests.train.conftest import no_launcher
from tests.train.runs import config


@pytest.fixture(scope="module", params=["finetune_lora", "pretrain"])
def model(request, tmp_path_factory):
    with no_launcher():
        return build_model(load_config(config(tmp_path_factory.mktemp("run"), request.param))).train()


@pytest.fixture
def pixels(model) -> torch.Tensor:
    side = model.config.image_size
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("recomputing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_no_graph_through_a_frozen_tower(model, pixels, recomputing):
    """transformers' activation checkpointing makes every part's embeddings require gradients."""
    if recomputing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=recomputing)
    features = model.model.get_patch_features(pixels)
    model.activation_checkpointing_disable()
    assert features.grad_fn is None and not features.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_its_own_number_format_under_autocast(model, pixels, dtype):
    """So that a run with DeepSpeed (no autocast) and one without see the same features."""
    tower = model.model.vision_tower.to(dtype)
    plain = model.model.get_patch_features(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        features = model.model.get_patch_features(pixels)
    tower.float()
    assert features.dtype == dtype and torch.equal(features, plain)


def test_a_trained_tower_and_an_image_that_is_learned_keep_their_graph(model, pixels):
    learned = pixels.clone().requires_grad_()
    model.model.get_patch_features(learned).square().sum().backward()
    assert learned.grad.abs().sum() > 0
    weight = next(p for p in model.model.vision_tower.parameters() if p.ndim > 1)
    weight.requires_grad_()
    model.model.get_patch_features(pixels).square().sum().backward()
    weight.requires_grad_(False)
    assert weight.grad is not None
