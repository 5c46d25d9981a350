"""Checkpoints of the original code, of LLaVA-1.5 and of transformers' LLaVA: one call, and the original's own answers.

Features, logits and answers of the three recorded layouts are compared in tests/model/test_modeling.py, which opens them
in the same way.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from llava_sp import LlavaSPForCausalLM, LlavaSPProcessor
from llava_sp.checkpoints.opening.processors import is_saved
from llava_sp.data.collator import Collator
from llava_sp.data.dataset import ConversationDataset
from llava_sp.data.mixture import load_mixture
from llava_sp.model.backbone_configs import language_config
from tests.checkpoints.kinds import llava_15, write_original, write_ours
from tests.released import LAYOUTS, bases, load_released, our_name, released_folder

PROMPT = "USER: <image>\nWhat is this? ASSISTANT:"


def logits(model, processor, images) -> torch.Tensor:
    with torch.no_grad():
        return model(**processor(text=PROMPT, images=images[:1])).logits


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items()}


# ---------------------------------------------------------------- released LLaVA-SP folders


@pytest.mark.parametrize("layout", LAYOUTS)
def test_processor_pixels_ids_and_training_batch(golden, images, layout):
    """The processor that comes with a released folder, on prompts and on training samples."""
    folder = released_folder(golden, layout)
    processor = LlavaSPProcessor.from_pretrained(folder, **bases(golden))
    expected = load_file(golden / f"checkpoint_{layout}" / "expected.safetensors")
    record = json.loads((golden / f"checkpoint_{layout}" / "expected.json").read_text())
    assert (processor.image_aspect_ratio, processor.conversation_template) == ("pad", "vicuna_v1")
    pixels = processor.preprocess_images(images)
    for index in range(3):
        assert torch.equal(pixels[index][:, ::4, ::4], expected[f"pixel_values_s4.{index}"])
    for name, sample in record["samples"].items():
        ids = processor(text=sample["prompt"], images=[images[i] for i in sample["images"]] or None)["input_ids"][0]
        assert collapse(ids, processor) == expected[f"input_ids.{name}"].tolist(), name

    model = load_released(golden, layout).eval()
    batch = Collator(processor.pad_token_id)(list(samples(golden, processor)))
    for row, kept in enumerate(expected["train.attention_mask_after_splice"].bool()):
        mine = batch["attention_mask"][row].bool()
        labels = batch["labels"][row][mine]
        assert labels.tolist() == expected["train.labels_after_splice"][row][kept].tolist()
        assert collapse(batch["input_ids"][row][mine], processor) == [
            number for number, real in zip(expected["train.input_ids"][row].tolist(), rows(expected, row)) if real
        ]
    with torch.no_grad():
        loss = model(**batch).loss
        assert loss.item() == pytest.approx(record["train"]["loss"], rel=1e-4)
        for sample, known in zip(samples(golden, processor), record["train"]["per_sample"], strict=True):
            alone = Collator(processor.pad_token_id)([sample])
            assert (alone["labels"][:, 1:] >= 0).sum() == known["tokens"]
            assert model(**alone).loss.item() * known["tokens"] == pytest.approx(known["sum_nll"], rel=1e-4)


def samples(golden, processor) -> ConversationDataset:
    folder = golden / "samples"
    sources = load_mixture([{"annotations": folder / "data.json", "images": folder / "images"}])
    return ConversationDataset(sources, processor, "vicuna_v1")


def collapse(ids: torch.Tensor, processor) -> list[int]:
    """Ids with the placeholders of an image as the one -200 of the original."""
    found: list[int] = []
    count = 0
    for number in ids.tolist():
        if number != processor.image_token_id:
            found.append(number)
        elif count % processor.num_image_tokens == 0:
            found.append(-200)
        count += number == processor.image_token_id
    return found


def rows(expected, row: int) -> list[bool]:
    return expected["train.attention_mask"][row].bool().tolist()


def test_recorded_bases_beside_the_checkpoint_are_found(golden, tmp_path):
    """ "base" and "clip" are recorded relative to the folder above."""
    for name in ("base", "clip"):
        (tmp_path / name).symlink_to(golden / name)
    shutil.copytree(released_folder(golden, "pooling"), tmp_path / "anything")
    model = LlavaSPForCausalLM.from_pretrained(tmp_path / "anything")
    assert model.config.spatial_variant == "pooling" and model.config.spatial_fusion is False
    assert LlavaSPProcessor.from_pretrained(tmp_path / "anything").num_image_tokens == 582


@pytest.mark.parametrize("key", ["language_model", "vision_tower"])
def test_a_private_path_says_what_was_recorded_and_what_to_pass(golden, tmp_path, key):
    folder = tmp_path / "copy"
    shutil.copytree(released_folder(golden, "cropping"), folder)
    recorded = {"adapter_config.json": "base_model_name_or_path", "config.json": "mm_vision_tower"}
    for file, field in recorded.items():
        settings = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(settings | {field: f"/mnt/private/{field}"}))
    given = {name: place for name, place in bases(golden).items() if name != key}
    for opens in (LlavaSPForCausalLM, LlavaSPProcessor):
        with pytest.raises(ValueError, match=rf"/mnt/private/.* is not there; pass {key}="):
            opens.from_pretrained(folder, **given)


def test_a_hub_id_that_cannot_be_reached_is_said_to_be_so(golden):
    """Whatever else is passed: nothing is known of its format."""
    for opens in (LlavaSPForCausalLM, LlavaSPProcessor):
        for given in ({}, bases(golden), {**bases(golden), "local_files_only": True}):
            with pytest.raises(OSError, match="there is no folder someone/llava-sp-lora, and no model of that name"):
                opens.from_pretrained("someone/llava-sp-lora", **given)


def test_a_hub_id_in_the_cache(golden, tmp_path):
    """A released folder, and a processor of ours that stands alone."""
    snapshot = tmp_path / "models--someone--lora/snapshots/0123"
    shutil.copytree(released_folder(golden, "pooling"), snapshot)
    processor = LlavaSPProcessor.from_pretrained(snapshot, **bases(golden))
    processor.save_pretrained(tmp_path / "models--someone--processor/snapshots/0123")
    for folder in tmp_path.iterdir():
        (folder / "refs").mkdir()
        (folder / "refs/main").write_text("0123")
    given = {**bases(golden), "cache_dir": tmp_path, "local_files_only": True}
    assert LlavaSPForCausalLM.from_pretrained("someone/lora", **given).config.spatial_variant == "pooling"
    again = LlavaSPProcessor.from_pretrained("someone/lora", **given)
    assert again.num_image_tokens == processor.num_image_tokens
    assert is_saved("someone/processor", **given) and not is_saved("someone/lora", **given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("binary", [False, True])
def test_types_and_bin_adapters(golden, tmp_path, images, dtype, binary):
    """A folder in 16 bit, its adapter as safetensors or .bin, gives the model of its rounded weights."""
    folder = tmp_path / "copy"
    shutil.copytree(released_folder(golden, "cropping"), folder)
    lora = {k: v.to(dtype) for k, v in load_file(folder / "adapter_model.safetensors").items()}
    (folder / "adapter_model.safetensors").unlink()
    if binary:
        torch.save(lora, folder / "adapter_model.bin")
    else:
        save_file(lora, folder / "adapter_model.safetensors")
    others = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    torch.save({k: v.to(dtype) for k, v in others.items()}, folder / "non_lora_trainables.bin")
    model = LlavaSPForCausalLM.from_pretrained(folder, **bases(golden), dtype=torch.float32)
    exact = load_released(golden, "cropping").eval()
    for name, tensor in state(exact).items():
        if ".lora_" in name or "multi_modal_projector" in name:
            assert torch.equal(state(model)[name], tensor.to(dtype).float()), name
    small = LlavaSPForCausalLM.from_pretrained(folder, **bases(golden), dtype=dtype)
    assert {parameter.dtype for parameter in small.parameters()} == {dtype}
    processor = LlavaSPProcessor.from_pretrained(folder, **bases(golden))
    difference = logits(small, processor, images).float() - logits(exact, processor, images)
    assert difference[..., :1000].abs().mean() < (0.05 if dtype == torch.float16 else 0.4)


@pytest.mark.parametrize("variant", ["cropping", "pooling"])
def test_first_stage_projector(golden, variant):
    folder = golden / "pretrain_artifacts" / variant
    originals = torch.load(folder / "model.bin", weights_only=True)
    for path in (folder, folder / "model.bin"):
        model = LlavaSPForCausalLM.from_pretrained(path, **bases(golden))
        projector = dict(model.model.multi_modal_projector.named_parameters())
        assert len(projector) == len(originals)
        for key, tensor in originals.items():
            assert torch.equal(projector[our_name(key)], tensor), key
    with pytest.raises(
        ValueError, match=r"mm_projector.bin lacks model.conv_8.*\n(.*\n)*.*its model.bin has all tensors"
    ):
        LlavaSPForCausalLM.from_pretrained(folder / "checkpoint-1000", **bases(golden))


# ---------------------------------------------------------------- LLaVA-1.5


@pytest.mark.parametrize(
    ("tower", "beside", "safetensors"), [(False, False, True), (True, False, False), (True, True, True)]
)
def test_llava_15_full(golden, none, images, tmp_path, tower, beside, safetensors):
    write_original(tmp_path / "m", none, golden, tower, beside, safetensors)
    model = LlavaSPForCausalLM.from_pretrained(tmp_path / "m")
    assert model.config.spatial_variant == "none"
    processor = LlavaSPProcessor.from_pretrained(tmp_path / "m")
    assert processor.num_image_tokens == 576 and processor.image_aspect_ratio == "pad"
    for name, tensor in state(none).items():
        assert torch.equal(state(model)[name], tensor), name
    assert torch.equal(logits(model, processor, images), logits(none, processor, images))
    with pytest.raises(ValueError, match="full checkpoint.*language_model= is not supported"):
        LlavaSPForCausalLM.from_pretrained(tmp_path / "m", language_model=golden / "base")


def test_a_tower_within_the_checkpoint_is_the_one_that_counts(golden, none, tmp_path):
    write_original(tmp_path / "m", none, golden, tower=True, beside=False)
    keys = load_file(tmp_path / "m/model.safetensors")
    name = next(key for key in keys if key.endswith("patch_embedding.weight"))
    keys[name] = keys[name] * 2
    save_file(keys, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    ours = state(LlavaSPForCausalLM.from_pretrained(tmp_path / "m"))
    changed = next(key for key in ours if key.endswith("patch_embedding.weight"))
    assert torch.equal(ours[changed], 2 * state(none)[changed])


def test_every_setting_of_a_llama_arrives(golden, tmp_path):
    """All that transformers 4 writes, none at its default."""
    theirs = json.loads((released_folder(golden, "cropping") / "config.json").read_text())
    given = {"attention_bias": True, "attention_dropout": 0.25, "bos_token_id": 3, "eos_token_id": 4}
    given |= {"hidden_act": "gelu", "hidden_size": 64, "initializer_range": 0.5, "intermediate_size": 77}
    given |= {"max_position_embeddings": 99, "num_attention_heads": 8, "num_hidden_layers": 5, "vocab_size": 70}
    given |= {"num_key_value_heads": 2, "pad_token_id": 9, "pretraining_tp": 2, "rms_norm_eps": 0.001}
    given |= {"tie_word_embeddings": True, "use_cache": False, "rope_theta": 5e5}
    given |= {"rope_scaling": {"type": "linear", "factor": 4.0}}
    usual = json.loads(json.dumps(given))
    (tmp_path / "config.json").write_text(json.dumps(theirs | given))
    arrived = language_config(tmp_path)
    rope = arrived.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("linear", 4.0, usual.pop("rope_theta"))
    del usual["rope_scaling"]
    assert {key: getattr(arrived, key) for key in usual} == usual
    of_llava = ("mm_", "tune_mm", "freeze_mm", "use_mm", "tokenizer_", "image_aspect_ratio")
    named = ("_name_or_path", "architectures", "model_type", "torch_dtype", "transformers_version")
    assert {key for key in theirs if not key.startswith(of_llava)} - {*named} <= given.keys()  # none was forgotten


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_theta": 5e5}, "rope_parameters is {'rope_theta': 500000.0, 'rope_type': 'default'} there"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_parameters is .*linear.* there"),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps is 0.001 there and 1e-05 in"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu' there"),
    ],
)
def test_lora_of_a_language_model_with_other_settings(golden, tmp_path, change, message):
    """The original code takes them from the LoRA folder; they are not lost silently."""
    folder = tmp_path / "lora"
    shutil.copytree(released_folder(golden, "pooling"), folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | change))
    for opening in (
        lambda: LlavaSPForCausalLM.from_pretrained(folder, **bases(golden)),
        lambda: LlavaSPForCausalLM.from_backbones(*bases(golden).values(), warm_start=folder, spatial_width=3),
    ):
        with pytest.raises(ValueError, match=f"config.json: {message}.*another language model than it was trained on"):
            opening()


def test_llava_15_lora(golden, tmp_path):
    """A LoRA folder of LLaVA-1.5 itself: no spatial keys, so no spatial tokens."""
    shutil.copytree(released_folder(golden, "cropping"), tmp_path / "m")
    file = tmp_path / "m/non_lora_trainables.bin"
    kept = {k: v for k, v in torch.load(file, weights_only=True).items() if "mm_projector" in k}
    torch.save(kept, file)
    model = LlavaSPForCausalLM.from_pretrained(tmp_path / "m", **bases(golden))
    assert model.config.spatial_variant == "none" and model.config.num_image_tokens == 576
    assert any(".lora_B" in name and parameter.any() for name, parameter in model.named_parameters())


def test_llava_hf(golden, none, images, llava_hf):
    model = LlavaSPForCausalLM.from_pretrained(llava_hf)
    processor = LlavaSPProcessor.from_pretrained(llava_hf)
    assert type(model) is LlavaSPForCausalLM and model.config.spatial_variant == "none"
    assert processor.num_image_tokens == 576 and processor.image_aspect_ratio == "pad"
    for name, tensor in state(none).items():
        assert torch.equal(state(model)[name], tensor), name
    llava = LlavaForConditionalGeneration.from_pretrained(llava_hf, dtype=torch.float32).eval()
    torch.testing.assert_close(
        logits(model, processor, images)[..., :1000], logits(llava, processor, images)[..., :1000], rtol=0, atol=1e-5
    )
    assert LlavaSPProcessor.from_pretrained(llava_hf, image_aspect_ratio="crop").image_aspect_ratio == "crop"
    with pytest.raises(ValueError, match="vision_tower= is not supported"):
        LlavaSPForCausalLM.from_pretrained(llava_hf, vision_tower=golden / "clip")


def test_a_full_llava_is_a_language_model_to_start_from(golden, none, llava_hf, tmp_path):
    """`from_backbones` takes the language model and the tower out of either kind of full LLaVA-1.5."""
    write_original(tmp_path / "m", none, golden, tower=False, beside=False)
    ours = write_ours(tmp_path / "ours", none)
    for language, tower in ((tmp_path / "m", golden / "clip"), (llava_hf, llava_hf), (ours, ours)):
        model = LlavaSPForCausalLM.from_backbones(language, tower, spatial_width=3)
        assert model.config.spatial_variant == "cropping"
        for name, tensor in state(none).items():
            if "multi_modal_projector" not in name:
                assert torch.equal(state(model)[name], tensor), name


# ---------------------------------------------------------------- a warm start


def patch_mlp(model) -> dict[str, torch.Tensor]:
    return {n: t for n, t in state(model).items() if ".linear_1." in n or ".linear_2." in n}


def test_warm_start_keeps_patch_mlp_and_language_model_or_lora(golden, none, llava_hf, tmp_path):
    write_original(tmp_path / "full", none, golden, tower=False, beside=False)
    fresh = LlavaSPForCausalLM.from_backbones(golden / "base", golden / "clip", spatial_width=3, seed=5)
    ours = write_ours(tmp_path / "ours", none)
    for start in (tmp_path / "full", llava_hf, ours):
        model = LlavaSPForCausalLM.from_backbones(
            vision_tower=golden / "clip", warm_start=start, spatial_width=3, seed=5
        )
        assert model.config.language_model_name_or_path == str(start.resolve())
        for name, tensor in patch_mlp(none).items():
            assert torch.equal(state(model)[name], tensor), name
        for name, tensor in state(fresh).items():
            if ".spatial." in name:
                assert torch.equal(state(model)[name], tensor), name
    released = load_released(golden, "pooling")
    model = LlavaSPForCausalLM.from_backbones(
        golden / "base", golden / "clip", warm_start=released_folder(golden, "pooling"), spatial_width=3
    )
    assert model.config.spatial_variant == "cropping"
    for name, tensor in state(released).items():
        if ".lora_" in name or name in patch_mlp(released):
            assert torch.equal(state(model)[name], tensor), name
    write_ours(tmp_path / "spatial", fresh)
    with pytest.raises(ValueError, match="spatial is a full checkpoint with spatial tokens, which would be lost"):
        LlavaSPForCausalLM.from_backbones(vision_tower=golden / "clip", warm_start=tmp_path / "spatial")
    with pytest.raises(ValueError, match="language_model is not set"):
        LlavaSPForCausalLM.from_backbones(vision_tower=golden / "clip")


def test_a_full_checkpoint_of_ours_keeps_its_own_tower_as_a_warm_start(golden, tmp_path):
    """As transformers' LLaVA does: another tower is an error, its own is taken from its folder."""
    model = llava_15(golden)
    weight = next(p for name, p in model.named_parameters() if name.endswith("patch_embedding.weight"))
    weight.data *= 2
    ours = write_ours(tmp_path / "ours", model)
    with pytest.raises(ValueError, match="ours has its own vision tower .*patch_embedding.weight differs"):
        LlavaSPForCausalLM.from_backbones(vision_tower=golden / "clip", warm_start=ours, spatial_width=3)
    started = LlavaSPForCausalLM.from_backbones(vision_tower=ours, warm_start=ours, spatial_width=3)
    for name, tensor in state(model).items():
        assert torch.equal(state(started)[name], tensor), name
    assert LlavaSPProcessor.from_backbones(started.config).num_image_tokens == 582


def in_16_bit(folder, dtype: torch.dtype):
    """A folder's weights rounded, as they are published."""
    file = folder / "model.safetensors"
    save_file({key: tensor.to(dtype) for key, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    settings.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(settings | {"torch_dtype": str(dtype).removeprefix("torch.")}))
    return folder


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format", ["original", "llava_hf"])
def test_a_warm_start_whose_own_tower_is_rounded(golden, none, llava_hf, tmp_path, format, stored):
    """The same tower in other types is the same tower; one that was trained a little further is not."""
    if format == "original":
        write_original(tmp_path / "m", none, golden, tower=True, beside=False)
    else:
        shutil.copytree(llava_hf, tmp_path / "m")
    start = in_16_bit(tmp_path / "m", stored)
    given = {"vision_tower": golden / "clip", "warm_start": start, "spatial_width": 3}
    for dtype in ("auto", torch.float16, torch.bfloat16, torch.float32):
        model = LlavaSPForCausalLM.from_backbones(**given, dtype=dtype)
        for name, tensor in patch_mlp(none).items():
            assert torch.equal(state(model)[name], tensor.to(stored).to(model.dtype)), name
    tensors = load_file(start / "model.safetensors")
    key = next(key for key in tensors if "vision" in key and key.endswith("layers.1.mlp.fc1.weight"))
    tensors[key][3, 3] *= 1.03
    save_file(tensors, start / "model.safetensors", metadata={"format": "pt"})
    for dtype in ("auto", torch.bfloat16, torch.float32):
        with pytest.raises(ValueError, match="its own vision tower .*fc1.weight differs"):
            LlavaSPForCausalLM.from_backbones(**given, dtype=dtype)


def other_base(golden, folder):
    """The base with one matrix changed."""
    shutil.copytree(golden / "base", folder, copy_function=shutil.copyfile)
    file = folder / "pytorch_model-00001-of-00002.bin"
    weights = torch.load(file, weights_only=True)
    weights["model.layers.0.mlp.up_proj.weight"] += 0.1
    torch.save(weights, file)
    return folder


def test_lora_is_no_warm_start_on_another_base(golden, kinds, tmp_path):
    given = {"vision_tower": golden / "clip", "spatial_width": 3}
    base = other_base(golden, tmp_path / "other")
    ours = kinds["llava_sp_adapter"].folder
    assert LlavaSPForCausalLM.from_backbones(golden / "base", **given, warm_start=ours).peft_config
    message = "trained on a language model with the fingerprint .* Pass language_model=<the right one>"
    with pytest.raises(ValueError, match=message):
        LlavaSPForCausalLM.from_backbones(base, **given, warm_start=ours)
    assert LlavaSPForCausalLM.from_backbones(base, **given, warm_start=ours, check_base=False).peft_config
    released = tmp_path / "released"
    shutil.copytree(released_folder(golden, "pooling"), released)
    tokenizer = AutoTokenizer.from_pretrained(golden / "base")
    tokenizer.add_tokens(["<im_start>", "<im_end>"])
    tokenizer.save_pretrained(released)
    with pytest.raises(
        ValueError, match=r"released: its tokenizer has <image>, <pad> at \(1002, 1003\), not \(1000, 1001\)"
    ):
        LlavaSPForCausalLM.from_backbones(golden / "base", **given, warm_start=released)


def test_a_warm_start_in_the_hubs_cache(golden, tmp_path):
    """The keywords that say where it is hold for it too."""
    shutil.copytree(released_folder(golden, "pooling"), tmp_path / "models--someone--lora/snapshots/0123")
    (tmp_path / "models--someone--lora/refs").mkdir()
    (tmp_path / "models--someone--lora/refs/main").write_text("0123")
    model = LlavaSPForCausalLM.from_backbones(
        golden / "base",
        golden / "clip",
        warm_start="someone/lora",
        spatial_width=3,
        cache_dir=tmp_path,
        local_files_only=True,
    )
    assert model.peft_config


def test_an_adapter_is_no_language_model(golden, kinds):
    adapter = kinds["llava_sp_adapter"].folder
    for given in ((adapter, golden / "clip"), (golden / "base", adapter)):
        with pytest.raises(ValueError, match=f"{adapter} is an adapter checkpoint: merge it first"):
            LlavaSPForCausalLM.from_backbones(*given)
