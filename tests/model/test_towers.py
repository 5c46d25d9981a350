"""Assembling from backbones in the real formats: sharded .bin, safetensors, whole CLIP, SigLIP, timm."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionModel,
    GenerationConfig,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
)

from llava_sp import LlavaSPForCausalLM, LlavaSPProcessor
from llava_sp.checkpoints.reading.fingerprint import weights_fingerprint


def check_answers(model) -> None:
    ids = torch.tensor([[1, 5, *[model.config.image_token_id] * model.config.num_image_tokens, 7]])
    side = model.config.image_size
    out = model.generate(input_ids=ids, pixel_values=torch.randn(1, 3, side, side), max_new_tokens=3)
    assert out.shape[1] > ids.shape[1]


def test_vicuna_like_shards_and_whole_clip(golden):
    model = LlavaSPForCausalLM.from_backbones(language_model=golden / "base", vision_tower=golden / "clip")
    assert model.config.vision_feature_select_strategy == "default"
    assert (model.config.image_token_id, model.config.pad_token_id, model.config.text_config.vocab_size) == (
        1000,
        1001,
        1024,
    )
    old = torch.load(golden / "base/pytorch_model-00001-of-00002.bin", weights_only=True)["model.embed_tokens.weight"]
    rows = model.get_input_embeddings().weight
    assert torch.equal(rows[:1000], old)
    torch.testing.assert_close(rows[1000:], old.mean(0).expand(24, -1))
    check_answers(model)


def test_same_seed_same_projector(golden):
    def projector(seed):
        model = LlavaSPForCausalLM.from_backbones(golden / "base", golden / "clip", spatial_width=4, seed=seed)
        return torch.cat([p.detach().flatten() for p in model.model.multi_modal_projector.parameters()])

    assert torch.equal(projector(1), projector(1))
    assert not torch.equal(projector(1), projector(2))


def test_safetensors_have_the_fingerprint_of_the_bin_files(golden, tmp_path):
    language = AutoModelForCausalLM.from_pretrained(golden / "base")
    language.generation_config = GenerationConfig()  # Vicuna's sets a temperature without sampling: not savable
    language.save_pretrained(tmp_path / "language")
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(golden / "base" / name, tmp_path / "language")
    assert weights_fingerprint(tmp_path / "language") == weights_fingerprint(golden / "base")
    CLIPVisionModel.from_pretrained(golden / "clip").save_pretrained(tmp_path / "tower")
    check_answers(LlavaSPForCausalLM.from_backbones(tmp_path / "language", tmp_path / "tower", spatial_width=4))


def test_siglip(golden, tmp_path):
    vision = {
        "hidden_size": 48,
        "image_size": 96,
        "patch_size": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    text = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 100,
    }
    SiglipModel(SiglipConfig(vision_config=vision, text_config=text)).save_pretrained(tmp_path)
    model = LlavaSPForCausalLM.from_backbones(golden / "base", tmp_path, spatial_variant="pooling", spatial_width=4)
    assert isinstance(model.model.vision_tower.config, SiglipVisionConfig)
    assert model.config.vision_feature_select_strategy == "full"
    assert model.config.grid_size == 12 and model.config.num_image_tokens == 150
    check_answers(model)


def test_timm(golden, tmp_path):
    pytest.importorskip("timm", reason="the extra llava_sp[timm] is not installed")
    from transformers import TimmWrapperConfig, TimmWrapperModel

    settings = {"img_size": 64, "patch_size": 4, "embed_dim": 48, "depth": 3, "num_heads": 2}
    TimmWrapperModel(TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=settings)).save_pretrained(
        tmp_path / "vit"
    )
    model = LlavaSPForCausalLM.from_backbones(golden / "base", tmp_path / "vit", spatial_width=4)
    assert model.config.grid_size == 16 and model.config.vision_width == 48
    check_answers(model)
    processor = LlavaSPProcessor.from_backbones(model.config)
    assert processor.num_image_tokens == 262
    model.save_pretrained(tmp_path / "saved")
    check_answers(LlavaSPForCausalLM.from_pretrained(tmp_path / "saved"))


def test_missing_weights_are_an_error(golden, tmp_path):
    shutil.copytree(golden / "clip", tmp_path / "clip")
    weights = torch.load(tmp_path / "clip/pytorch_model.bin", weights_only=True)
    del weights["vision_model.encoder.layers.2.mlp.fc1.weight"]
    torch.save(weights, tmp_path / "clip/pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"does not hold all weights of CLIPVisionModel: 1 missing.*layers\.2\.mlp\.fc1"
    ):
        LlavaSPForCausalLM.from_backbones(golden / "base", tmp_path / "clip")


def test_a_missing_shard_is_named(golden, tmp_path):
    shutil.copytree(golden / "base", tmp_path / "base")
    (tmp_path / "base/pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises((OSError, ValueError), match="pytorch_model-00002-of-00002.bin"):
        LlavaSPForCausalLM.from_backbones(tmp_path / "base", golden / "clip")


def test_a_missing_backbone_is_named(golden, tmp_path):
    with pytest.raises(OSError, match="no-such-model"):
        LlavaSPForCausalLM.from_backbones(tmp_path / "no-such-model", golden / "clip")


def test_words_after_the_placeholder_are_refused(golden, tmp_path):
    from transformers import AutoTokenizer

    shutil.copytree(golden / "base", tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(golden / "base")
    tokenizer.add_tokens(["<image>", "word"])
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="<image> as id 1000 and 1 token after it .such as 'word'"):
        LlavaSPForCausalLM.from_backbones(tmp_path / "base", golden / "clip")
