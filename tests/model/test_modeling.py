"""The whole model against the recorded outputs of the original: features, logits, loss; its sizes; wrong input."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from llava_sp import LlavaSPConfig, LlavaSPForCausalLM
from tests.released import LAYOUTS, load_released


@pytest.fixture(scope="module", params=LAYOUTS)
def released(request, golden):
    layout = request.param
    record = json.loads((golden / f"checkpoint_{layout}" / "expected.json").read_text())
    return load_released(golden, layout), record, load_file(golden / f"checkpoint_{layout}" / "expected.safetensors")


def test_image_features_equal_the_original(released, processor, images):
    model, _, expected = released
    pixels = processor.preprocess_images(images)
    with torch.no_grad():
        patches = model.model.get_patch_features(pixels[:1])[0]
        features = model.model.get_image_features(pixels).pooler_output
    assert (patches - expected["vision_patch_features.0"]).abs().max() <= 1e-4
    for index, feature in enumerate(features):
        assert (feature - expected[f"image_features.{index}"]).abs().max() <= 2e-4


def test_logits_and_answers_equal_the_original(released, processor, images):
    model, record, expected = released
    for name, sample in record["samples"].items():
        inputs = processor(text=sample["prompt"], images=[images[i] for i in sample["images"]] or None)
        assert inputs["input_ids"].shape[1] == sample["length_after_splice"]
        with torch.no_grad():
            logits = model(**inputs).logits[0, :, :1000]
        assert (logits[expected[f"positions.{name}"]] - expected[f"logits.{name}"]).abs().max() <= 2e-3, name
        generated = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        assert generated[0, inputs["input_ids"].shape[1] :].tolist() == sample["generated_ids"], name


def test_none_is_llava(golden, processor, images):
    """Without spatial tokens the weights, key for key, and the outputs are those of transformers' LLaVA-1.5."""
    ours = LlavaSPForCausalLM.from_backbones(golden / "base", golden / "clip", spatial_variant="none")
    settings = ours.config.to_dict()
    known = {
        "text_config",
        "vision_config",
        "image_token_index",
        "vision_feature_layer",
        "vision_feature_select_strategy",
    }
    llava = LlavaForConditionalGeneration(
        LlavaForConditionalGeneration.config_class(**{name: settings[name] for name in known})
    ).eval()
    llava.load_state_dict(ours.state_dict())
    ids = torch.tensor([[1, 5, *[1000] * 576, 7, 8]])
    pixels = processor.preprocess_images(images[:1])
    with torch.no_grad():
        expected = llava(input_ids=ids, pixel_values=pixels).logits
        actual = ours(input_ids=ids, pixel_values=pixels).logits
    torch.testing.assert_close(actual[..., :1000], expected[..., :1000], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "spatial"),
    [
        # six convolutions, integrator's convolution, its three projections, linear layer
        ({"spatial_variant": "cropping"}, 763_363_328 + 134_217_728 + 3 * 263_680 + 4_198_400),
        ({"spatial_variant": "pooling"}, 763_363_328 + 134_217_728 + 3 * 263_680 + 4_194_304),
        ({"spatial_variant": "pooling", "spatial_fusion": False}, 763_363_328 + 2_097_152),
        ({"spatial_variant": "none"}, 0),
    ],
)
def test_parameter_counts_at_real_size(settings, spatial):
    with torch.device("meta"):
        model = LlavaSPForCausalLM(LlavaSPConfig(**settings))
    projector = model.model.multi_modal_projector
    patch_mlp = sum(p.numel() for part in (projector.linear_1, projector.linear_2) for p in part.parameters())
    assert patch_mlp == 20_979_712
    assert sum(p.numel() for p in projector.parameters()) - patch_mlp == spatial
    if spatial:
        scales = [p.weight.numel() for p in projector.spatial.extractor.projections.values()]
        assert scales == [8_388_608, 33_554_432, 75_497_472, 134_217_728, 209_715_200, 301_989_888]
    assert model.config.num_image_tokens == (582 if spatial else 576)


def test_lora_count_and_13b_at_real_size():
    from peft import LoraConfig

    with torch.device("meta"):
        model = LlavaSPForCausalLM(LlavaSPConfig())
        leaves = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
        model.add_adapter(LoraConfig(r=128, target_modules=rf"model\.language_model\..*\.({leaves})"))
        assert sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n) == 319_815_680
        text = {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 13824}
        large = LlavaSPForCausalLM(LlavaSPConfig(text_config={"model_type": "llama", **text}))
    assert large.model.multi_modal_projector.spatial.linear.out_features == 5120
    assert sum(p.numel() for p in large.model.language_model.parameters()) > 12.8e9


def test_loss_is_the_mean_over_learned_tokens(model, processor, images):
    inputs = processor(text=["USER: <image>\nHi ASSISTANT: A dog.</s>", "Hi there"], images=images[:1], padding=True)
    labels = inputs["input_ids"].clone()
    labels[:, :-6] = -100
    labels[1, -2:] = -100
    assert (labels == processor.pad_token_id).any()  # padding is never learned, also where the labels name it
    with torch.no_grad():
        logits = model(**inputs).logits[:, :-1, :1000]
        expected = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.where(labels < 1000, -100)[:, 1:].flatten()
        )
        output = model(**inputs, labels=labels)
        half = model(
            **inputs, labels=labels, num_items_in_batch=2 * ((labels[:, 1:] >= 0) & (labels[:, 1:] < 1000)).sum()
        )
        with_logits = model(**inputs, labels=labels, logits_to_keep=0)
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(half.loss, expected / 2)
    assert output.logits is None
    assert with_logits.logits.shape == (*inputs["input_ids"].shape, 1024)


@pytest.mark.parametrize("learned", [True, False])
def test_a_text_only_batch_trains(model, processor, learned):
    inputs = processor(text="USER: Hi ASSISTANT: Hello.</s>")
    labels = inputs["input_ids"] if learned else torch.full_like(inputs["input_ids"], -100)
    model.zero_grad()
    model(**inputs, labels=labels).loss.backward()
    for name, parameter in model.model.multi_modal_projector.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name
    model.zero_grad()


def test_every_projector_parameter_gets_a_gradient(model, processor, images):
    inputs = processor(text="USER: <image>\nHi ASSISTANT: Hello.</s>", images=images[:1])
    model.zero_grad()
    model(**inputs, labels=inputs["input_ids"].where(inputs["input_ids"] < 1000, -100)).loss.backward()
    for name, parameter in model.model.multi_modal_projector.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all() and parameter.grad.any(), name
    model.zero_grad()


def test_gradient_checkpointing_gives_the_same_gradients(golden, processor, images):
    gradients = []
    for checkpointing in (False, True):
        model = load_released(golden, "pooling", lora=False).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        inputs = processor(text="USER: <image>\nHi ASSISTANT: Hello.</s>", images=images[:1])
        # The pooling model's own token count differs in nothing but the projector, so the processor fits.
        model(**inputs, labels=inputs["input_ids"].where(inputs["input_ids"] < 1000, -100)).loss.backward()
        gradients.append([p.grad.clone() for p in model.model.multi_modal_projector.parameters()])
    for plain, checkpointed in zip(*gradients):
        torch.testing.assert_close(plain, checkpointed)


def test_counts_that_do_not_fit(model, processor, images):
    pixels = processor.preprocess_images(images[:2])
    one = torch.tensor([[1, *[1000] * 582, 5]])
    with pytest.raises(ValueError, match="input_ids hold 582 .*pixel_values hold 2 x 582"):
        model(input_ids=one, pixel_values=pixels)
    with pytest.raises(ValueError, match="input_ids hold 581"):
        model(input_ids=one[:, 1:-1][:, :581], pixel_values=pixels[:1])
    with pytest.raises(ValueError, match="pixel_values hold 0 x 582"):
        model(input_ids=one)
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="pixel_values need input_ids"):
        model(inputs_embeds=torch.zeros(1, 584, 96), pixel_values=pixels[:1])
    with pytest.raises(ValueError, match="pixel_values hold 2 x 582"):
        model.generate(input_ids=one, pixel_values=pixels, num_beams=2, max_new_tokens=1)


def test_keywords_that_do_not_fit_the_checkpoint(saved, golden, model, tmp_path):
    with pytest.raises(ValueError, match="is a full checkpoint, with its own base: language_model= is not supported"):
        LlavaSPForCausalLM.from_pretrained(saved, language_model=golden / "base")
    with pytest.raises(ValueError, match="language_model_revision= and vision_tower_revision="):
        LlavaSPForCausalLM.from_backbones(golden / "base", golden / "clip", revision="v2")
    llava = LlavaSPForCausalLM.from_backbones(golden / "base", golden / "clip", spatial_variant="none")
    llava.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="spatial_variant= cannot be set on opening"):
        LlavaSPForCausalLM.from_pretrained(tmp_path, spatial_variant="cropping")
    llava.config.spatial_variant = "cropping"
    with pytest.raises(ValueError, match='spatial_variant was "none", now .cropping.'):
        LlavaSPForCausalLM(llava.config)


def test_half_precision_keeps_a_text_only_batch_finite(golden, processor):
    model = LlavaSPForCausalLM.from_backbones(golden / "base", golden / "clip", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.mul_(30.0)
    model.model.vision_tower.half()
    model.model.multi_modal_projector.half()
    assert model.model.blank_image_edge() == 0.0


@pytest.mark.parametrize("path", ["runs/no/such/folder", "./nothing", "/nothing/here"])
def test_a_missing_folder_is_said(path):
    with pytest.raises(FileNotFoundError, match=f"there is no folder {path}"):
        LlavaSPForCausalLM.from_pretrained(path)
