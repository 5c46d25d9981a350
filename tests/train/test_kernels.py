"""What makes a step cheaper and must not change it: Liger's kernels, casts of LoRA's inputs that are left out."""

from __future__ import annotations

import contextlib
import copy
import sys
import types
from collections.abc import Iterator

import pytest
import torch

from llava_sp.config.arguments import load_config
from llava_sp.train.build import autocast_casts_back, build_model
from llava_sp.train.kernels import liger_problem, use_liger
from llava_sp.train.preflight import check_inputs
from tests.messages import names, refused
from tests.train.runs import GOLDEN, config, losses, run_here


@pytest.fixture
def installed(monkeypatch) -> dict:
    """A package that stands for Liger, and what it was called with."""
    called: dict = {}
    patches = types.ModuleType("liger_kernel.transformers.monkey_patch")
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": called.update}
    for name, module in (
        ("liger_kernel", types.ModuleType("liger_kernel")),
        ("liger_kernel.transformers", types.ModuleType("liger_kernel.transformers")),
        (patches.__name__, patches),
    ):
        module.__spec__ = types.SimpleNamespace(name=name)
        monkeypatch.setitem(sys.modules, name, module)
    return called


def test_refused_where_it_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with refused("use_liger_kernel", "liger-kernel"):
        check_inputs(load_config(config(tmp_path, use_liger_kernel=True)))


def test_refused_without_a_gpu(tmp_path, installed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with refused("use_liger_kernel", "CUDA"):
        check_inputs(load_config(config(tmp_path, use_liger_kernel=True)))


def test_refused_for_another_language_model(tmp_path, installed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert liger_problem(str(GOLDEN / "base")) is None
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert names(liger_problem(str(tmp_path)), "gpt2", "llama")


def test_its_three_kernels_on_the_language_model_alone(tmp_path, installed):
    run = load_config(config(tmp_path, use_liger_kernel=True))
    model = build_model(run)
    assert installed.pop("model") is model.model.language_model
    on = {"rope", "rms_norm", "swiglu"}
    assert installed == {**dict.fromkeys(on, True), "cross_entropy": False, "fused_linear_cross_entropy": False}
    assert not run.train.use_liger_kernel  # Trainer applies nothing of its own
    assert run.settings["use_liger_kernel"] is True


@contextlib.contextmanager
def llama_restored() -> Iterator[None]:
    """Liger replaces names in transformers' module."""
    from transformers.models.llama import modeling_llama

    before = copy.copy(vars(modeling_llama))
    yield
    vars(modeling_llama).update(before)


def test_the_installed_liger_replaces_norms_and_products(tmp_path):
    pytest.importorskip("liger_kernel")
    model = build_model(load_config(config(tmp_path)))
    tower = [type(module) for module in model.model.vision_tower.modules()]
    with llama_restored():
        use_liger(model)
        from transformers.models.llama import modeling_llama

        assert "liger" in modeling_llama.apply_rotary_pos_emb.__module__
    block = model.model.language_model.layers[0]
    for module in (block.mlp, block.input_layernorm, block.post_attention_layernorm, model.model.language_model.norm):
        assert "liger" in module.forward.__func__.__module__
    assert [type(module) for module in model.model.vision_tower.modules()] == tower
    assert "llava_sp" in type(model).forward.__module__ and "forward" not in vars(model)


@pytest.mark.gpu
def test_liger_gives_the_same_losses(tmp_path):
    pytest.importorskip("liger_kernel")
    with llama_restored():
        plain = losses(run_here(tmp_path / "plain", max_steps=3))
        fused = losses(run_here(tmp_path / "fused", max_steps=3, use_liger_kernel=True))
    assert fused == pytest.approx(plain, rel=1e-4)


def test_inputs_of_lora_are_not_cast_to_what_autocast_casts_back(tmp_path, monkeypatch):
    """The losses stay the same to the bit."""
    shared = losses(run_here(tmp_path / "shared", bf16=True, max_steps=2, gradient_checkpointing=True))
    monkeypatch.setattr("llava_sp.train.run.autocast_casts_back", lambda _: False)
    cast = losses(run_here(tmp_path / "cast", bf16=True, max_steps=2, gradient_checkpointing=True))
    assert shared == cast and len(shared) == 2


@pytest.mark.parametrize(
    "settings, exact",
    [
        ({"bf16": True}, True),
        ({"bf16": True, "lora_dropout": 0.05}, False),  # on a CPU
        ({"bf16": False}, False),
        ({"bf16": True, "deepspeed": {"zero_optimization": {"stage": 2}}}, False),
    ],
)
def test_where_that_is_exact(tmp_path, settings, exact, monkeypatch):
    run = load_config(config(tmp_path, **{key: value for key, value in settings.items() if key != "deepspeed"}))
    run.train.deepspeed = settings.get("deepspeed")
    assert autocast_casts_back(run) is exact
