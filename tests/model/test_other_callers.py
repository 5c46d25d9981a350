"""What transformers' Trainer, TRL, generation modes, exporters and the Auto classes call, as they call it."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForMultimodalLM,
    BatchFeature,
    ProcessorMixin,
    Trainer,
    TrainingArguments,
)

from llava_sp import LlavaSPForCausalLM, LlavaSPModel, LlavaSPProcessor
from llava_sp.model.projector import DetailFeatureIntegrator, SpatialProjector
from tests.messages import refused
from tests.released import load_released

PROMPT = "USER: <image>\nWhat is this? ASSISTANT:"
CONVERSATION = [
    {"role": "user", "content": "<image>\nWhat is this?"},
    {"role": "assistant", "content": "A cat, no more."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]


@pytest.fixture(scope="module")
def tuned(golden) -> LlavaSPForCausalLM:
    """With LoRA."""
    return load_released(golden, "cropping")


@pytest.fixture(scope="module")
def adapter(tuned, processor, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    tuned.save_pretrained(folder, state_dict=None, is_main_process=True)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def inputs(processor, images) -> BatchFeature:
    return processor(text=PROMPT, images=images[:1])


def in_parts(image) -> list[dict]:
    """The conversation as TRL and pipelines give it."""
    question = [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]
    later = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in CONVERSATION[1:]]
    return [{"role": "user", "content": question}, *later]


# ---- saving and opening


def test_a_given_state_dict_is_saved(tuned, adapter, tmp_path):
    """Accelerate gathers it; the model's own is left alone."""
    state = {name: 2 * tensor for name, tensor in tuned.state_dict().items()}
    tuned.save_pretrained(tmp_path, state_dict=state, is_main_process=True, max_shard_size=None, push_to_hub=False)
    once, twice = LlavaSPForCausalLM.from_pretrained(adapter), LlavaSPForCausalLM.from_pretrained(tmp_path)
    doubled = 0
    for (name, one), two in zip(once.named_parameters(), twice.parameters()):
        changed = ".lora_" in name or "multi_modal_projector" in name
        doubled += changed
        assert torch.equal(two, 2 * one if changed else one), name
    assert doubled == 67
    with pytest.raises(ValueError, match="does not support variant"):
        tuned.save_pretrained(tmp_path, variant="fp16")


def test_transformers_trainer_with_lora(golden, processor, images, tmp_path):
    """Its first checkpoint is there, opens, and is the trained model."""
    model = LlavaSPForCausalLM.from_pretrained(
        golden / "checkpoint_cropping/lora",
        language_model=golden / "base",
        vision_tower=golden / "clip",
        is_trainable=True,
    )
    ids, labels = (torch.tensor(row)[None] for row in processor.encode_conversation(CONVERSATION))
    pixels = processor.preprocess_images(images[:1])
    args = TrainingArguments(
        str(tmp_path), max_steps=1, save_steps=1, report_to="none", use_cpu=True, learning_rate=1e-2
    )
    batch = {"input_ids": ids, "labels": labels, "pixel_values": pixels}
    trainer = Trainer(
        model, args, train_dataset=[batch], data_collator=lambda rows: rows[0], processing_class=processor
    )
    trainer.train()
    again = LlavaSPForCausalLM.from_pretrained(tmp_path / "checkpoint-1")
    with torch.no_grad():
        expected = model.eval()(input_ids=ids, pixel_values=pixels).logits
        assert torch.equal(again(input_ids=ids, pixel_values=pixels).logits, expected)
    assert LlavaSPProcessor.from_pretrained(tmp_path / "checkpoint-1").num_image_tokens == 582


@pytest.mark.parametrize("assistant_only", [True, False])
def test_trl(golden, processor, images, tmp_path, assistant_only):
    """SFTTrainer with its defaults: it truncates, saves, and asks for the assistant's mask."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from datasets import Dataset

    model = LlavaSPForCausalLM.from_pretrained(
        golden / "checkpoint_cropping/lora",
        language_model=golden / "base",
        vision_tower=golden / "clip",
        is_trainable=True,
    )
    turns = [{**turn, "content": turn["content"].removeprefix("<image>\n")} for turn in CONVERSATION]
    data = Dataset.from_list([{"messages": turns, "images": [images[0].convert("RGB")]}] * 2)
    args = trl.SFTConfig(
        str(tmp_path),
        max_steps=1,
        save_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        assistant_only_loss=assistant_only,
    )
    trl.SFTTrainer(model=model, args=args, train_dataset=data, processing_class=processor).train()
    ids = torch.arange(3, 30)[None]
    again = LlavaSPForCausalLM.from_pretrained(tmp_path / "checkpoint-1")
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("trainable", [True, False])
def test_is_trainable(adapter, inputs, trainable):
    model = LlavaSPForCausalLM.from_pretrained(adapter, dtype=torch.bfloat16, is_trainable=trainable)
    for name, parameter in model.named_parameters():
        part = ".lora_" in name or "multi_modal_projector" in name
        assert parameter.requires_grad == (trainable and part), name
        assert parameter.dtype == (torch.float32 if trainable and part else torch.bfloat16), name
    assert torch.isfinite(model(**inputs).logits).all()


def test_a_full_model_takes_is_trainable(saved):
    model = LlavaSPForCausalLM.from_pretrained(saved, is_trainable=True)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_auto_classes(model, saved, adapter, inputs):
    assert type(AutoModelForMultimodalLM.from_pretrained(saved)) is LlavaSPForCausalLM
    for folder in (saved, adapter):
        inner = AutoModel.from_pretrained(folder)
        assert type(inner) is LlavaSPModel
        assert json.loads((folder / "config.json").read_text())["auto_map"] == {
            "AutoConfig": "configuration_llava_sp.LlavaSPConfig",
            "AutoModel": "modeling_llava_sp.LlavaSPModel",
            "AutoModelForImageTextToText": "modeling_llava_sp.LlavaSPForCausalLM",
            "AutoModelForMultimodalLM": "modeling_llava_sp.LlavaSPForCausalLM",
        }
        for name in ("configuration", "modeling", "processing"):
            assert (folder / f"{name}_llava_sp.py").is_file()
    with torch.no_grad():
        expected = model.model(**inputs).last_hidden_state
        assert torch.equal(AutoModel.from_pretrained(saved)(**inputs).last_hidden_state, expected)


def test_torchao(saved, adapter, inputs, model):
    """Quantised values are not checked; tower, projector and head keep their precision."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    from transformers import TorchAoConfig

    for folder in (saved, adapter):
        config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
        quantized = LlavaSPForCausalLM.from_pretrained(folder, quantization_config=config)
        assert "Int8" in type(quantized.model.language_model.layers[0].mlp.up_proj.weight).__name__
        for weight in (quantized.lm_head.weight, quantized.model.multi_modal_projector.linear_1.weight):
            assert type(weight.detach()) is torch.Tensor
        assert quantized.generate(**inputs, max_new_tokens=4).shape[0] == 1


def test_quantised_tensors_pass_the_check_of_values(golden, monkeypatch):
    """A tensor of another class, as torchao's, allows no arithmetic."""
    from llava_sp.checkpoints.opening.fill import check_model

    class Quantised(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function in (torch.aminmax, torch.isfinite, torch.Tensor.float, torch.Tensor.flatten):
                raise NotImplementedError(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(torch.ones(2, 2).as_subclass(Quantised))
    check_model(layer, "here", [])


# ---- calls of the model


@pytest.mark.parametrize("labels", [False, True])
def test_return_dict_false(model, inputs, labels):
    more = {"labels": inputs["input_ids"], "logits_to_keep": 0} if labels else {}
    with torch.no_grad():
        named, plain = model(**inputs, **more), model(**inputs, **more, return_dict=False)
        inner = model.model(**inputs, return_dict=False)
        features = model.get_image_features(inputs["pixel_values"], return_dict=False)
    assert type(plain) is type(inner) is type(features) is tuple
    assert torch.equal(plain[int(labels)], named.logits)
    assert not labels or torch.equal(plain[0], named.loss)
    by_config = copy.copy(model.config)
    by_config.return_dict = False
    model.config, whole = by_config, model.config
    try:
        with torch.no_grad():
            assert torch.equal(model(**inputs)[0], model(**inputs, return_dict=True).logits)
    finally:
        model.config = whole


@pytest.mark.parametrize(
    "settings", [{"prefill_chunk_size": 100}, {"prompt_lookup_num_tokens": 3}, {"assistant": True}]
)
@pytest.mark.parametrize("batch", [False, True])
def test_other_ways_to_decode_give_the_same(model, tuned, processor, images, settings, batch):
    if batch and "prefill_chunk_size" not in settings:
        pytest.skip("transformers' assisted decoding takes one prompt")
    prompts = [PROMPT, "USER: Hi ASSISTANT:", "USER: <image>\n<image>\nWhich? ASSISTANT:"] if batch else PROMPT
    given = processor(text=prompts, images=images if batch else images[:1])
    settings = {"assistant_model": tuned} if "assistant" in settings else settings
    expected = model.generate(**given, max_new_tokens=12)
    assert torch.equal(model.generate(**given, max_new_tokens=12, **settings), expected)


def test_a_missing_image_is_still_noticed(model, inputs):
    for settings in ({}, {"prefill_chunk_size": 100}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(ValueError, match="pixel_values hold 0 x 582"):
            model.generate(input_ids=inputs["input_ids"], max_new_tokens=4, **settings)


# ---- calls of the processor


def test_truncation_cuts_text_alone(processor, images):
    longer = processor(text=PROMPT, images=images[:1])["input_ids"][0].tolist()
    assert processor(text=PROMPT, images=images[:1], truncation=True)["input_ids"][0].tolist() == longer
    cut = processor(text=PROMPT, images=images[:1], truncation=True, max_length=len(longer) - 3)
    assert cut["input_ids"][0].tolist() == longer[:-3] and cut["attention_mask"].shape == (1, len(longer) - 3)
    with refused("max_length 500", "image placeholders", f"{len(longer)} tokens"):
        processor(text=PROMPT, images=images[:1], truncation="longest_first", max_length=500)
    left = copy.deepcopy(processor)
    left.tokenizer.truncation_side = "left"
    words = left(text="USER: Hi ASSISTANT:")["input_ids"][0].tolist()
    assert left(text="USER: Hi ASSISTANT:", truncation=True, max_length=4)["input_ids"][0].tolist() == [
        words[0],
        *words[-3:],
    ]


def test_what_the_inherited_call_returns(processor, images):
    """Types, replacements and places are those of transformers' own processors, but for the ids' own rule for spaces."""
    texts = [PROMPT, "USER: <image>\n<image>\nWhich? ASSISTANT:", "USER: Hi ASSISTANT:"]
    asked = {"return_mm_token_type_ids": True, "return_text_replacement_offsets": True, "return_offsets_mapping": True}
    ours = processor(text=texts, images=images, **asked)
    theirs = ProcessorMixin.__call__(processor, text=texts, images=images, padding=True, padding_side="left", **asked)
    assert ours["text_replacement_offsets"] == theirs["text_replacement_offsets"]
    assert ours["offset_mapping"].shape == (*ours["input_ids"].shape, 2)
    expanded = [text.replace("<image>", "<image>" * processor.num_image_tokens) for text in texts]
    for row, text in enumerate(expanded):
        types = ours["mm_token_type_ids"][row]
        assert torch.equal(types == 1, ours["input_ids"][row] == processor.image_token_id)
        assert int(types.sum()) == sum(theirs["mm_token_type_ids"][row])
        places = ours["offset_mapping"][row]
        assert {text[a:b] for a, b in places[types == 1].tolist()} <= {"<image>"}
        covered = {place for a, b in places.tolist() for place in range(a, b)}
        assert covered == set(range(len(text)))  # SentencePiece's word-start piece shares a place with what follows
        assert places.tolist()[-1] == [len(text) - 1, len(text)]
    assert "mm_token_type_ids" not in processor(text=texts, images=images)


def test_generate_takes_the_token_types(model, processor, images):
    plain, typed = (processor(text=PROMPT, images=images[:1], return_mm_token_type_ids=on) for on in (False, True))
    assert torch.equal(model.generate(**plain, max_new_tokens=4), model.generate(**typed, max_new_tokens=4))


@pytest.mark.parametrize("template", ["vicuna_v1", "llava_v1", "llama_2"])
def test_the_assistants_mask_is_what_training_learns(golden, tiny_config, images, template):
    """As TRL's `assistant_only_loss` asks for it, truncation and all."""
    processor = LlavaSPProcessor.from_backbones(
        tiny_config(), golden / "base", golden / "clip", conversation_template=template
    )
    kwargs = {
        "padding": True,
        "padding_side": "right",
        "truncation": True,
        "max_length": 1024,
        "add_special_tokens": False,
    }
    turns = [in_parts(images[0]), [{**turn} for turn in CONVERSATION[2:]]]
    out = processor.apply_chat_template(
        turns,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs=kwargs,
    )
    for row, conversation in enumerate((CONVERSATION, CONVERSATION[2:])):
        ids, labels = processor.encode_segments(processor.render_conversation(conversation), add_special_tokens=False)
        assert out["input_ids"][row, : len(ids)].tolist() == ids
        learned = [label != -100 for label in labels]
        assert out["assistant_masks"][row].bool().tolist() == learned + [False] * (out["input_ids"].shape[1] - len(ids))


# ---- export


@pytest.mark.parametrize("variant", ["cropping", "pooling", "none"])
def test_the_projector_exports(tiny_config, variant):
    config = tiny_config(image_size=28, patch_size=7)
    config = type(config)(
        text_config=config.text_config, vision_config=config.vision_config, spatial_variant=variant, spatial_width=8
    )
    projector = SpatialProjector(config).eval()
    projector.reset_parameters()
    patches = torch.randn(2, config.num_patch_tokens, config.vision_width)
    exported = torch.export.export(projector, (patches,))
    assert torch.equal(exported.module()(patches), projector(patches))
    if importlib.util.find_spec("onnxscript") and importlib.util.find_spec("onnxruntime"):
        torch.onnx.export(projector, (patches,), dynamo=True, verbose=False)


def test_attention_has_the_four_dimensions_of_onnx(tiny_config, monkeypatch):
    """Bit-equal to three dimensions, which ONNX's exporter does not take."""
    config = tiny_config(image_size=28, patch_size=7)
    integrator, attend, seen = DetailFeatureIntegrator(config), nn.functional.scaled_dot_product_attention, []
    for parameter in integrator.parameters():
        nn.init.normal_(parameter)

    def attention(*parts):
        seen.append([part.ndim for part in parts])
        return attend(*parts)

    patches = torch.randn(2, 4, 4, config.vision_width)
    features = torch.randn(2, 3, config.spatial_width)
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attention)
    found = integrator(features, patches)
    monkeypatch.setattr(
        nn.functional, "scaled_dot_product_attention", lambda *p: attend(*(x[:, 0] for x in p)).unsqueeze(1)
    )
    assert seen == [[4, 4, 4]] and torch.equal(integrator(features, patches), found)
