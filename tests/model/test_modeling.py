"""The whole model against the recorded outputs of the original, and its behaviour in transformers' tools."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, pipeline

from llava_sp import LlavaSPConfig, LlavaSPForCausalLM, LlavaSPProcessor
from tests.released import LAYOUTS, load_released


@pytest.fixture(scope="module", params=LAYOUTS)
def released(request, golden):
    layout = request.param
    record = json.loads((golden / f"checkpoint_{layout}" / "expected.json").read_text())
    return load_released(golden, layout), record, load_file(golden / f"checkpoint_{layout}" / "expected.safetensors")


@pytest.fixture(scope="module")
def model(golden) -> LlavaSPForCausalLM:
    return load_released(golden, "cropping", lora=False)


@pytest.fixture(scope="module")
def processor(model) -> LlavaSPProcessor:
    return LlavaSPProcessor.from_backbones(model.config)


@pytest.fixture(scope="module")
def images(golden) -> list[Image.Image]:
    return [Image.open(golden / "samples/images" / name) for name in ("wide.png", "tall.png", "square.png")]


@pytest.fixture(scope="module")
def saved(model, processor, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


# ---------------------------------------------------------------- equal to the original


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


# ---------------------------------------------------------------- sizes


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


# ---------------------------------------------------------------- loss


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


# ---------------------------------------------------------------- generation


PROMPTS = [
    "USER: <image>\nWhat is this? ASSISTANT:",
    "USER: Hi ASSISTANT:",
    "USER: <image>\n<image>\nWhich one is older, the first or the second picture? ASSISTANT:",
]


def new_tokens(model, inputs, **settings) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=8, **settings)[:, inputs["input_ids"].shape[1] :]


def test_a_left_padded_batch_answers_as_each_prompt_alone(model, processor, images):
    batch = new_tokens(model, processor(text=PROMPTS, images=images, padding=True))
    for row, (prompt, own) in enumerate(zip(PROMPTS, [images[:1], None, images[1:]])):
        alone = new_tokens(model, processor(text=prompt, images=own))[0]
        assert batch[row, : len(alone)].tolist() == alone.tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"repetition_penalty": 1.3},
        {"do_sample": True, "top_p": 0.9, "temperature": 0.7},
        {"do_sample": True, "temperature": 50.0, "top_k": 0},
    ],
)
def test_generation_modes_never_make_placeholders(model, processor, images, settings):
    torch.manual_seed(0)
    tokens = new_tokens(model, processor(text=PROMPTS, images=images, padding=True), **settings)
    assert tokens.shape[0] == 3 * settings.get("num_return_sequences", 1)
    unused = [token for token in tokens.flatten().tolist() if token >= 1000]
    # Rows that have ended are filled with padding; nothing else of the added ids may appear.
    assert all(token == processor.pad_token_id for token in unused)
    for row in tokens.tolist():
        assert processor.pad_token_id not in row or 2 in row[: row.index(processor.pad_token_id)]


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 3}])
def test_every_beam_sees_the_images_of_its_prompt(model, processor, images, settings):
    """What the decoder is given for the copies of a prompt is what it is given for the prompt itself."""
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].clone()), with_kwargs=True
    )
    try:
        inputs = processor(text=PROMPTS, images=images, padding=True)
        new_tokens(model, inputs)
        plain = seen[0]
        seen.clear()
        new_tokens(model, inputs, **settings)
    finally:
        hook.remove()
    copies = settings.get("num_beams", settings.get("num_return_sequences"))
    torch.testing.assert_close(seen[0], plain.repeat_interleave(copies, dim=0))


def test_streaming(model, processor, images):
    from transformers import TextStreamer

    pieces = []

    class Collect(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            pieces.append(text)

    inputs = processor(text=PROMPTS[0], images=images[:1])
    tokens = new_tokens(model, inputs, streamer=Collect(processor.tokenizer, skip_prompt=True))
    assert "".join(pieces) == processor.decode(tokens[0])


def test_a_padding_token_among_the_words_is_not_generated(model, processor, images, monkeypatch):
    """Some tokenizers have a padding token of their own, below the placeholder; unless it ends answers, it is no word."""
    inputs = processor(text=PROMPTS[0], images=images[:1])
    favourite = new_tokens(model, inputs)[0, 0].item()
    monkeypatch.setattr(model.config, "pad_token_id", favourite)
    with torch.no_grad():
        assert model(**inputs).logits[0, -1].argmax() != favourite
        monkeypatch.setattr(model.generation_config, "eos_token_id", [2, favourite])
        assert model(**inputs).logits[0, -1].argmax() == favourite


def test_unused_ids_are_least_likely_everywhere(model, processor, images):
    with torch.no_grad():
        logits = model(**processor(text=PROMPTS[0], images=images[:1])).logits
    assert (logits[..., 1000:] == torch.finfo(torch.float32).min).all()


def test_torch_compile_gives_the_same_logits(model, processor, images):
    inputs = processor(text=PROMPTS[0], images=images[:1])
    with torch.no_grad():
        expected = model(**inputs).logits
        actual = torch.compile(model, backend="aot_eager")(**inputs).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_bfloat16(golden, processor, images):
    model = LlavaSPForCausalLM.from_backbones(golden / "base", golden / "clip", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    inputs = processor(text=PROMPTS[0], images=images[:1])
    assert torch.isfinite(model(**inputs).logits).all()
    assert new_tokens(model, inputs).shape[1] <= 8


# ---------------------------------------------------------------- saving and the Auto classes


def test_save_and_load_is_bit_equal(model, saved):
    again = LlavaSPForCausalLM.from_pretrained(saved)
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert again.generation_config.pad_token_id == 1001


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto"])
def test_auto_classes_and_device_map(saved, images, device_map):
    model = AutoModelForImageTextToText.from_pretrained(saved, device_map=device_map)
    processor = AutoProcessor.from_pretrained(saved)
    assert type(model) is LlavaSPForCausalLM and type(processor) is LlavaSPProcessor
    assert type(AutoConfig.from_pretrained(saved)) is LlavaSPConfig
    assert new_tokens(model, processor(text=PROMPTS[0], images=images[:1])).shape[0] == 1


def test_pipeline(saved, images):
    answer = pipeline("image-text-to-text", model=str(saved))
    content = [{"type": "image", "image": images[0]}, {"type": "text", "text": "What is this?"}]
    result = answer(text=[{"role": "user", "content": content}], max_new_tokens=4, return_full_text=False)
    assert isinstance(result[0]["generated_text"], str)


def test_a_saved_folder_opens_where_the_package_is_not_installed(saved, tmp_path):
    """The folder carries its code: `trust_remote_code` in a process that cannot import llava_sp."""
    folder = tmp_path / "pushed"
    shutil.copytree(saved, folder)
    script = tmp_path / "open.py"
    script.write_text(
        "import importlib.util, torch\n"
        "assert importlib.util.find_spec('llava_sp') is None\n"
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        f"model = AutoModelForImageTextToText.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
        f"processor = AutoProcessor.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
        "from PIL import Image\n"
        "inputs = processor(text='USER: <image>\\nHi ASSISTANT:', images=Image.new('RGB', (50, 40)))\n"
        "print(type(model).__module__, model.generate(**inputs, max_new_tokens=3).shape[1])\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    # -I leaves out the working directory and PYTHONPATH; an editable install would still be found, hence -S and the paths
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    runner = f"import sys; sys.path += {libraries!r}; exec(open({str(script)!r}).read())"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", runner], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("transformers_modules.")


def test_import_is_light():
    """`import llava_sp` loads neither torch nor anything optional."""
    code = (
        "import sys, llava_sp; "
        "print([m for m in ('torch', 'transformers', 'timm', 'deepspeed', 'peft', 'wandb', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "statement",
    [
        "from llava_sp import LlavaSPForCausalLM",
        "import transformers.models.auto.modeling_auto; import llava_sp",
        "import llava_sp; from transformers import LlavaForConditionalGeneration",
    ],
)
def test_auto_classes_know_the_model_whatever_is_imported_first(statement):
    code = f"{statement}; from transformers import AutoConfig, AutoModelForImageTextToText as A, AutoProcessor; " + (
        "config = AutoConfig.for_model('llava_sp'); print(type(config).__name__, type(config) in A._model_mapping)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "LlavaSPConfig True", done.stderr


@pytest.mark.parametrize("as_adapter", [False, True])
def test_bitsandbytes(model, saved, processor, images, tmp_path, as_adapter):
    """The language model is loaded in 8 bits; tower, projector and head keep their precision."""
    pytest.importorskip("bitsandbytes", reason="the extra llava_sp[quantize] is not installed")
    from transformers import BitsAndBytesConfig

    from llava_sp.checkpoints.opening.adapter import save_adapter

    if as_adapter:
        save_adapter(model, processor, tmp_path)
    quantized = LlavaSPForCausalLM.from_pretrained(
        tmp_path if as_adapter else saved, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    )
    assert "8bit" in type(quantized.model.language_model.layers[0].mlp.up_proj).__name__
    assert type(quantized.model.multi_modal_projector.linear_1) is torch.nn.Linear
    assert type(quantized.lm_head) is torch.nn.Linear
    inputs = processor(text=PROMPTS[0], images=images[:1])
    with torch.no_grad():
        difference = (quantized(**inputs).logits - model(**inputs).logits)[..., :1000]
    assert difference.abs().mean() < 0.3  # the logits' standard deviation is 3
    assert new_tokens(quantized, inputs).shape[0] == 1


# ---------------------------------------------------------------- wrong input


def test_counts_that_do_not_fit(model, processor, images):
    pixels = processor.preprocess_images(images[:2])
    one = torch.tensor([[1, *[1000] * 582, 5]])
    with pytest.raises(
        ValueError, match=r"582 image placeholders \(1 images of 582.*pixel_values hold 2 images \(1164"
    ):
        model(input_ids=one, pixel_values=pixels)
    with pytest.raises(ValueError, match="hold 581 image placeholders"):
        model(input_ids=one[:, 1:-1][:, :581], pixel_values=pixels[:1])
    with pytest.raises(ValueError, match="pixel_values hold 0 images"):
        model(input_ids=one)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="pixel_values need input_ids"):
        model(inputs_embeds=torch.zeros(1, 584, 96), pixel_values=pixels[:1])
    with pytest.raises(ValueError, match="pixel_values hold 2 images"):
        model.generate(input_ids=one, pixel_values=pixels, num_beams=2, max_new_tokens=1)


def test_keywords_that_do_not_fit_the_checkpoint(saved, golden, model, tmp_path):
    with pytest.raises(ValueError, match="is a full checkpoint, with its own base: drop language_model="):
        LlavaSPForCausalLM.from_pretrained(saved, language_model=golden / "base")
    with pytest.raises(ValueError, match="language_model_revision= and vision_tower_revision="):
        LlavaSPForCausalLM.from_backbones(golden / "base", golden / "clip", revision="v2")
    llava = LlavaSPForCausalLM.from_backbones(golden / "base", golden / "clip", spatial_variant="none")
    llava.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="spatial_variant= cannot be chosen on opening, the weights decide"):
        LlavaSPForCausalLM.from_pretrained(tmp_path, spatial_variant="cropping")
    llava.config.spatial_variant = "cropping"
    with pytest.raises(ValueError, match='changed from "none" after the configuration was made'):
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
