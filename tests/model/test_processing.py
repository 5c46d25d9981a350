"""LlavaSPProcessor against the original's recorded ids, labels and pixels, and its life as a transformers processor."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    TimmWrapperConfig,
)

from llava_sp.model.configuration_llava_sp import LlavaSPConfig
from llava_sp.model.processing_llava_sp import LlavaSPProcessor, add_special_tokens

GOLDEN = Path(__file__).parent.parent / "golden"
TOKENIZATION = json.loads((GOLDEN / "tokenization.json").read_text(encoding="utf-8"))
PREPROCESSED = json.loads((GOLDEN / "image_preprocess.json").read_text())
TEMPLATE = {"v1": "vicuna_v1", "plain": "plain", "llama_2": "llama_2"}
ROLE = {"human": "user", "gpt": "assistant", "system": "system"}
TOKENS = 7  # per image, in the tests of text

# The original's labels are lost to its "mismatch" bug (it counts tokens a second time and gives up when they differ): it
# ignores these samples whole, ours learns exactly this.
LEARNED_BY_US = {
    "eos_text_inside_answer": "one</s>two</s>",
    "separator_text_inside_question": "hello</s>",
    "unk_text_inside": "Nothing.</s>",
    "ends_with_human": "Hi!</s>",
}
# Different on purpose: the original merges the marks of one turn into one, whatever the number of images; ours keeps them (and
# the data set refuses the sample, which has one image).
MARKS_KEPT = {"two_image_marks_in_one_turn"}
# The original tokenizes the mark of a sample without image as plain text; ours is a placeholder (and the data set refuses
# it). The reverse, `image_key_but_no_mark`, has equal ids in vicuna_v1 and is refused by the data set too.
MARK_WITHOUT_IMAGE = {"mark_but_no_image_key"}
# Errors on both sides, and one that is an error only there: a system turn is the system text here.
ERRORS = {("image_key_but_no_mark", "plain"), ("two_human_turns_in_a_row", "v1")}
SYSTEM_TURN = {"unknown_role"}


def tiny_config(**vision) -> LlavaSPConfig:
    scales = None if "image_size" not in vision else [2, 4]
    vision = {"hidden_size": 64, "num_attention_heads": 4, "image_size": 336, "patch_size": 14, **vision}
    return LlavaSPConfig(
        text_config=LlamaConfig(vocab_size=1024, hidden_size=96),
        vision_config=CLIPVisionConfig(**vision),
        spatial_scales=scales,
    )


def text_processor(legacy: bool = False, template: str = "vicuna_v1", tokens: int = TOKENS) -> LlavaSPProcessor:
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "base", legacy=legacy)
    add_special_tokens(tokenizer)
    return LlavaSPProcessor(CLIPImageProcessorPil(), tokenizer, num_image_tokens=tokens, conversation_template=template)


@pytest.fixture(scope="module", params=[False, True], ids=["new", "legacy"])
def either(request) -> LlavaSPProcessor:
    return text_processor(request.param)


@pytest.fixture(scope="module")
def processor() -> LlavaSPProcessor:
    return LlavaSPProcessor.from_backbones(tiny_config(), GOLDEN / "base", GOLDEN / "clip")


def conversation(case: dict) -> list[dict[str, str]]:
    return [{"role": ROLE[turn["from"]], "content": turn["value"]} for turn in case["sample"]["conversations"]]


def expanded(processor: LlavaSPProcessor, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    out_ids, out_labels = [], []
    for token, label in zip(ids, labels, strict=True):
        times = processor.num_image_tokens if token == -200 else 1
        out_ids += [processor.image_token_id if token == -200 else token] * times
        out_labels += [label] * times
    return out_ids, out_labels


CASES = [
    pytest.param(case, result, id=f"{case['name']}-{result['mode']}-{'legacy' if result['legacy'] else 'new'}")
    for case in TOKENIZATION["cases"]
    for result in case["results"]
]


@pytest.fixture(scope="module")
def by_legacy() -> dict[bool, LlavaSPProcessor]:
    return {legacy: text_processor(legacy) for legacy in (False, True)}


@pytest.mark.parametrize("case, result", CASES)
def test_ids_and_labels_of_the_original(by_legacy, case, result):
    processor, name = by_legacy[result["legacy"]], case["name"]
    template = TEMPLATE[result["mode"]]
    if (name, result["mode"]) in ERRORS:
        assert "error" in result
        with pytest.raises(ValueError):
            processor.encode_conversation(conversation(case), template)
        return
    ids, labels = processor.encode_conversation(conversation(case), template)
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    if name in SYSTEM_TURN:
        assert result["error"] == "KeyError" and "Be nice. USER: Hello." in processor.tokenizer.decode(ids)
        return
    expected_ids, expected_labels = expanded(processor, result["input_ids"], result["labels"])
    if name in MARKS_KEPT | MARK_WITHOUT_IMAGE:
        kept = [label for label in labels if label != -100]
        assert kept == [label for label in expected_labels if label != -100] and ids != expected_ids
        return
    if len(expected_ids) == case["model_max_length"]:  # the original cut it while tokenizing
        ids, labels = ids[: len(expected_ids)], labels[: len(expected_ids)]
    assert ids == expected_ids
    if name in LEARNED_BY_US:
        assert result["mismatch_warning"] and result["all_labels_ignored"]
        learned = processor.tokenizer.decode([label for label in labels if label != -100])
        # decoding puts a space after a special token of the legacy kind
        assert learned.replace("</s> ", "</s>").strip() == LEARNED_BY_US[name]
        assert labels[-1] == ids[-1] or name == "ends_with_human"
    else:
        assert labels == expected_labels


def test_every_mismatch_is_named():
    lost = {
        case["name"] for case in TOKENIZATION["cases"] for result in case["results"] if result.get("mismatch_warning")
    }
    assert lost == set(LEARNED_BY_US) | {"empty_answer"}  # there is nothing to learn in an empty answer


def test_training_batch_of_the_original(golden, processor):
    expected = load_file(golden / "checkpoint_cropping" / "expected.safetensors")
    for index, record in enumerate(json.loads((golden / "samples" / "data.json").read_text(encoding="utf-8"))):
        ids, labels = processor.encode_conversation(conversation({"sample": record}))
        length = int(expected["train.attention_mask"][index].sum())
        golden_ids = expected["train.input_ids"][index][:length].tolist()
        golden_labels = expected["train.labels"][index][:length].tolist()
        assert (ids, labels) == expanded(processor, golden_ids, golden_labels)


def sentencepiece_reference(legacy: bool):
    """The original's tokenizer (transformers 4, slow): its rules around the sentencepiece library."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((GOLDEN / "base" / "tokenizer.model").read_bytes())
    model.normalizer_spec.add_dummy_prefix = legacy
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    unknown = pieces.encode("<unk>")

    def stretch(text: str) -> list[int]:
        if legacy or not text.startswith((" ", "▁")):
            return pieces.encode(text)
        return pieces.encode("<unk>" + text)[len(unknown) :]

    def encode(text: str) -> list[int]:
        if not legacy and text:
            text = "▁" + text.replace("▁", " ")
        ids = []
        for part in filter(None, re.split("(<s>|</s>|<unk>)", text)):
            ids += [pieces.piece_to_id(part)] if part in ("<s>", "</s>", "<unk>") else stretch(part)
        if not legacy and ids[:1] == [pieces.piece_to_id("▁")] and ids[1:2] and ids[1] in (0, 1, 2):
            ids = ids[1:]
        return ids

    return encode


@pytest.mark.parametrize("legacy", [False, True])
def test_ids_of_sentencepiece_for_random_texts(by_legacy, legacy):
    reference, processor, draw = sentencepiece_reference(legacy), by_legacy[legacy], random.Random(0)
    pieces = [*"aé▁图\n\t", " ", "  ", "   ", "the", "cat", ".", "'s", "USER:", "😀", "</s>", "<unk>", "\u3000", "\r\n"]
    for _ in range(1500):
        text = "".join(draw.choice(pieces) + draw.choice(["", " "]) for _ in range(draw.randint(1, 6)))
        assert processor.encode_segments([(text, False)])[0] == [1, *reference(text)], repr(text)


def test_text_after_an_image_starts_a_text_of_its_own(either):
    tokens = either.tokenizer.convert_ids_to_tokens(either.encode_segments([("<image>\nhi<image> and", False)])[0])
    marks = ["<image>"] * TOKENS
    assert tokens[: TOKENS + 3] == ["<s>", *marks, "▁", "<0x0A>"]
    after = tokens[-tokens[::-1].index("<image>") :]
    assert after[0] == "▁" and after[1].startswith("▁") and "".join(after) == "▁▁and"


def test_tokens_are_aligned_with_the_text(either):
    segments = [("Look at <image> and say: ", False), ("naïve 😀 words", True), ("</s>", True), ("\nrest", False)]
    text = "".join(piece for piece, _ in segments)
    tokens = either.align_segments(segments)
    start, end = len("Look at <image> and say: "), len(text) - len("\nrest")
    for token in tokens[1:]:
        assert 0 <= token.start <= token.end <= len(text)
        if token.id == either.image_token_id:
            assert text[token.start : token.end] == "<image>"
        assert (token.label == token.id) == (start < token.end <= end)
    covered = {place for token in tokens for place in range(token.start, token.end)}
    assert covered == set(range(len(text)))


def test_padding_token_in_a_text_is_never_learned(processor):
    ids, labels = processor.encode_segments([("say ", False), ("<pad> now", True)])
    assert processor.pad_token_id in ids and processor.pad_token_id not in labels


# ---------------------------------------------------------------------------------------------------------- pixels


@pytest.mark.parametrize("mode", ["pad", "default"])
@pytest.mark.parametrize("entry", PREPROCESSED["images"], ids=lambda entry: entry["name"])
def test_pixels_of_the_original(golden, processor, entry, mode):
    ours = LlavaSPProcessor(
        processor.image_processor, processor.tokenizer, 582, image_aspect_ratio="pad" if mode == "pad" else "crop"
    )
    pixels = ours.preprocess_images([Image.open(golden / entry["file"])])[0]
    assert pixels.shape == (3, 336, 336) and pixels.dtype == torch.float32
    picture = np.array(Image.open(golden / "images" / f"{entry['name']}.{mode}.processed.png")).transpose(2, 0, 1)
    assert np.array_equal(pixels.numpy(), normalised(picture, processor))
    expected = load_file(golden / "image_preprocess.safetensors")[f"pixel_values_s8.{entry['name']}.{mode}"]
    assert torch.equal(pixels[:, ::8, ::8], expected)


def normalised(picture: np.ndarray, processor: LlavaSPProcessor) -> np.ndarray:
    settings = processor.image_processor
    mean, std = (
        np.array(values, dtype=np.float32)[:, None, None] for values in (settings.image_mean, settings.image_std)
    )
    return ((picture * (1 / 255)).astype(np.float32) - mean) / std


@pytest.mark.parametrize("layout", ["cropping", "pooling", "pooling_dfi"])
def test_pixels_of_the_recorded_checkpoints(golden, processor, layout):
    expected = load_file(golden / f"checkpoint_{layout}" / "expected.safetensors")
    for index, name in enumerate(("wide", "tall", "square")):
        pixels = processor.preprocess_images([Image.open(golden / "samples" / "images" / f"{name}.png")])[0]
        assert torch.equal(pixels[:, ::4, ::4], expected[f"pixel_values_s4.{index}"])
        picture = np.array(Image.open(golden / "samples" / "images" / f"processed_{index}.png").convert("RGB"))
        assert np.array_equal(pixels.numpy(), normalised(picture.transpose(2, 0, 1), processor))


def test_siglip_settings_at_the_configs_size(tmp_path):
    SiglipImageProcessorPil(size={"height": 224, "width": 224}).save_pretrained(tmp_path)
    ours = LlavaSPProcessor.from_backbones(tiny_config(image_size=112, patch_size=16), GOLDEN / "base", tmp_path)
    assert type(ours.image_processor) is SiglipImageProcessorPil
    pixels = ours.preprocess_images([Image.new("RGB", (50, 20), "white")])
    assert pixels.shape == (1, 3, 112, 112) and pixels.max() == 1 and list(ours.image_processor.image_mean) == [0.5] * 3


def test_timm_settings_come_from_the_towers_config(tmp_path):
    settings = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear", "crop_pct": 0.9}
    vision = TimmWrapperConfig(architecture="vit_tiny_patch16_224", pretrained_cfg=settings)
    vision.hidden_size, vision.image_size, vision.patch_size = 48, [64, 64], [16, 16]
    config = LlavaSPConfig(text_config=LlamaConfig(vocab_size=1024), vision_config=vision, spatial_scales=[2, 4])
    ours = LlavaSPProcessor.from_backbones(config, GOLDEN / "base", tmp_path)
    assert list(ours.image_processor.image_std) == [0.4, 0.5, 0.6]
    assert ours.image_processor.resample == Image.Resampling.BILINEAR
    assert ours.preprocess_images([Image.new("L", (50, 20))]).shape == (1, 3, 64, 64)


def test_tower_without_image_settings_gets_clips(tmp_path):
    ours = LlavaSPProcessor.from_backbones(tiny_config(image_size=56), GOLDEN / "base", tmp_path)
    assert ours.preprocess_images([Image.new("RGB", (9, 30))]).shape == (1, 3, 56, 56)
    assert tuple(ours.image_processor.image_mean) == tuple(CLIPImageProcessorPil().image_mean)


def test_a_torchvision_image_processor_is_replaced():
    pytest.importorskip("torchvision")
    from transformers import CLIPImageProcessor

    settings = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    ours = LlavaSPProcessor(CLIPImageProcessor(**settings), text_processor().tokenizer, num_image_tokens=4)
    assert type(ours.image_processor) is CLIPImageProcessorPil and ours.image_processor.size["shortest_edge"] == 56


# ------------------------------------------------------------------------------------- as a transformers processor


def test_call_pads_on_the_left(processor):
    image = Image.new("RGB", (20, 10), "red")
    batch = processor(text=["USER: <image>\nhi ASSISTANT:", "hello"], images=[image])
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["pixel_values"].shape == (1, 3, 336, 336)
    short = int(batch["attention_mask"][1].sum())
    assert batch["attention_mask"][1].tolist() == [0] * (batch["input_ids"].shape[1] - short) + [1] * short
    assert set(batch["input_ids"][1][:-short].tolist()) == {processor.pad_token_id}
    assert int((batch["input_ids"][0] == processor.image_token_id).sum()) == processor.num_image_tokens == 582
    right = processor(text=["hello", "a longer text"], padding_side="right")
    assert right["attention_mask"][0, -1] == 0 and "pixel_values" not in right


def test_call_gives_the_ids_of_training(processor):
    turns = [{"role": "user", "content": "<image>\nIs there a cat?"}, {"role": "assistant", "content": "Yes."}]
    prompt = processor.apply_chat_template(turns[:1], add_generation_prompt=True)
    ids = processor(text=prompt, images=Image.new("RGB", (5, 5)))["input_ids"][0].tolist()
    assert processor.encode_conversation(turns)[0][: len(ids)] == ids


def test_prompts_of_the_recorded_checkpoints(golden, processor):
    expected = load_file(golden / "checkpoint_cropping" / "expected.safetensors")
    samples = json.loads((golden / "checkpoint_cropping" / "expected.json").read_text(encoding="utf-8"))["samples"]
    for name, sample in samples.items():
        text = sample["prompt"]
        ids = expected[f"input_ids.{name}"].flatten().tolist()
        assert processor.encode_segments([(text, False)])[0] == expanded(processor, ids, [-100] * len(ids))[0]


def test_images_by_prompt_path_and_array(processor, golden):
    path = golden / "samples" / "images" / "square.png"
    opened = Image.open(path)
    texts = ["<image><image>", "none", "<image>"]
    nested = processor(text=texts, images=[[opened, str(path)], [], [np.array(opened.convert("RGB"))]])
    flat = processor(text=texts, images=[opened, opened, opened])
    assert nested["pixel_values"].shape[0] == 3 and torch.equal(nested["pixel_values"], flat["pixel_values"])


@pytest.mark.parametrize(
    "text, images, message",
    [
        ("<image> <image>", 1, r"2 <image> mark\(s\) in the text, but 1 image\(s\) given"),
        ("no mark", 2, r"0 <image> mark\(s\) in the text, but 2 image\(s\) given"),
        ("<image>", None, r"1 <image> mark\(s\) in the text, but 0 image\(s\) given"),
    ],
)
def test_marks_and_images_must_agree(processor, text, images, message):
    pictures = None if images is None else [Image.new("RGB", (4, 4))] * images
    with pytest.raises(ValueError, match=message):
        processor(text=text, images=pictures)


def test_images_per_prompt_must_agree(processor):
    image = Image.new("RGB", (4, 4))
    with pytest.raises(ValueError, match=r"\[2, 0\].*\[1, 1\]"):
        processor(text=["<image>", "<image>"], images=[[image, image], []])


def test_what_a_call_refuses(processor):
    with pytest.raises(ValueError, match="truncation=True could cut image placeholders"):
        processor(text="hi", truncation=True)
    with pytest.raises(ValueError, match="neither images nor text"):
        processor()
    with pytest.raises(ValueError, match="no videos"):
        processor(text="hi", videos=[0])
    with pytest.raises(ValueError, match="by name"):
        processor("hi", Image.new("RGB", (4, 4)))


def test_constructor_checks(processor):
    parts = (processor.image_processor, processor.tokenizer)
    with pytest.raises(ValueError, match="num_image_tokens is None"):
        LlavaSPProcessor(*parts)
    with pytest.raises(ValueError, match="'squash'; use one of pad, crop"):
        LlavaSPProcessor(*parts, num_image_tokens=1, image_aspect_ratio="squash")
    with pytest.raises(ValueError, match="unknown conversation template 'v2'"):
        LlavaSPProcessor(*parts, num_image_tokens=1, conversation_template="v2")
    with pytest.raises(ValueError, match="no <image> token"):
        LlavaSPProcessor(parts[0], AutoTokenizer.from_pretrained(GOLDEN / "base"), num_image_tokens=1)


def test_special_tokens(golden):
    tokenizer = AutoTokenizer.from_pretrained(golden / "base")  # its padding token is <unk>
    assert add_special_tokens(tokenizer) == (1000, 1001, 1024)
    assert add_special_tokens(tokenizer) == (1000, 1001, 1024)
    assert add_special_tokens(tokenizer, base_rows=2000) == (1000, 1001, 2000)
    assert add_special_tokens(tokenizer, base_rows=1001) == (1000, 1001, 1024)


def test_chat_template_with_images(processor):
    image = Image.new("RGB", (8, 8))
    ask = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]}]
    assert processor.apply_chat_template(ask, add_generation_prompt=True).endswith("USER: <image>\nWhat? ASSISTANT:")
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    one = processor.apply_chat_template(ask, **options)
    two = processor.apply_chat_template([ask, ask], **options)
    assert two["input_ids"].shape == (2, one["input_ids"].shape[1]) and two["pixel_values"].shape[0] == 2
    assert processor.batch_decode(two["input_ids"], skip_special_tokens=True)[0].endswith("What? ASSISTANT:")


@pytest.mark.parametrize("template, ratio", [("vicuna_v1", "pad"), ("llama_2", "crop"), ("plain", "pad")])
def test_save_and_load(processor, tmp_path, template, ratio):
    saved = LlavaSPProcessor(processor.image_processor, processor.tokenizer, 582, ratio, template)
    saved.save_pretrained(tmp_path)
    for loaded in (LlavaSPProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is LlavaSPProcessor
        assert (loaded.num_image_tokens, loaded.image_aspect_ratio, loaded.conversation_template) == (
            582,
            ratio,
            template,
        )
        assert loaded.chat_template == saved.chat_template
        assert type(loaded.image_processor) is CLIPImageProcessorPil
        inputs = {"text": "See <image> and this:\n x", "images": Image.new("RGB", (30, 20), "blue")}
        first, second = saved(**inputs), loaded(**inputs)
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_remote_code_where_the_package_is_not_installed(processor, tmp_path):
    processor.save_pretrained(tmp_path / "model")
    script = (
        "import sys\nfrom PIL import Image\nfrom transformers import AutoProcessor\n"
        "p = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "assert 'llava_sp' not in sys.modules\n"
        "b = p(text='<image> hi', images=Image.new('RGB', (9, 5)))\n"
        "print(type(p).__name__, tuple(b['pixel_values'].shape), int((b['input_ids'] == p.image_token_id).sum()))"
    )
    done = run_python(script, tmp_path, str(tmp_path / "model"))
    assert done.stdout.split("\n")[0] == "LlavaSPProcessor (1, 3, 336, 336) 582", done.stderr


def test_works_without_torchvision(processor, tmp_path, repo):
    processor.save_pretrained(tmp_path / "model")
    script = (
        "import sys\nsys.modules['torchvision'] = None\nfrom PIL import Image\n"
        "from transformers.utils import is_torchvision_available\nassert not is_torchvision_available()\n"
        "from llava_sp import LlavaSPProcessor\n"
        "p = LlavaSPProcessor.from_pretrained(sys.argv[1])\n"
        "print(tuple(p(text='<image>', images=Image.new('RGB', (9, 5)))['pixel_values'].shape))"
    )
    done = run_python(script, tmp_path, str(tmp_path / "model"), PYTHONPATH=str(repo))
    assert done.stdout.strip() == "(1, 3, 336, 336)", done.stderr


def run_python(script: str, folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": "", "HF_MODULES_CACHE": str(folder / "modules"), **environment}
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_remote_code_files_import_only_each_other(repo):
    folder = repo / "llava_sp" / "model"
    for name in ("processing_llava_sp.py", "conversation.py", "image_preprocessing.py"):
        for module in re.findall(r"^(?:from|import) (\S+)", (folder / name).read_text(encoding="utf-8"), re.M):
            assert not module.startswith("llava_sp") and not module.startswith("..")


# ------------------------------------------------------------------------------------------- chat-template models

CHATML = (
    "{% for message in messages %}{% if loop.first and message.role != 'system' %}<|im_start|>system\nBe nice.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        ["the cat is on the mat"], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_tokens(["<|im_start|>"], special_tokens=True)
    tokenizer.chat_template = chat_template
    add_special_tokens(tokenizer)
    return tokenizer


def test_chatml_learns_answer_and_end_token():
    tokenizer = byte_level_tokenizer()
    assert tokenizer.pad_token == "<|endoftext|>"  # its own stays
    ours = LlavaSPProcessor(CLIPImageProcessorPil(), tokenizer, num_image_tokens=3, conversation_template="chatml")
    turns = [
        {"role": "user", "content": "What is <image>"},
        {"role": "assistant", "content": "the cat"},
        {"role": "user", "content": "Where? the cat"},
        {"role": "assistant", "content": "the mat"},
    ]
    ids, labels = ours.encode_conversation(turns)
    assert ids.count(ours.image_token_id) == 3
    learned = tokenizer.decode([label for label in labels if label != -100])
    assert learned == "the cat<|im_end|>the mat<|im_end|>"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "<image>\nWhat is"}, *turns[1:]], tokenize=False, chat_template=CHATML
    )
    assert "".join(piece for piece, _ in ours.render_conversation(turns)) == text
    prompt = ours.apply_chat_template(turns[:1], add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>assistant\n") and prompt.startswith("<|im_start|>system\nBe nice.")


def test_chatml_survives_saving(tmp_path):
    saved = LlavaSPProcessor(CLIPImageProcessorPil(), byte_level_tokenizer(), 3, conversation_template="chatml")
    saved.save_pretrained(tmp_path)
    loaded = LlavaSPProcessor.from_pretrained(tmp_path)
    turns = [{"role": "user", "content": "<image>\nhi"}, {"role": "assistant", "content": "the cat"}]
    assert loaded.encode_conversation(turns) == saved.encode_conversation(turns)
    ask = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hi"}]}]
    assert "<image>\nhi<|im_end|>" in loaded.apply_chat_template(ask)


def test_chat_template_that_rewrites_history_is_refused():
    rewriting = "{% for message in messages %}{{ loop.length }}{{ message.content }}{% endfor %}"
    ours = LlavaSPProcessor(CLIPImageProcessorPil(), byte_level_tokenizer(rewriting), 3, conversation_template="chatml")
    with pytest.raises(ValueError, match="rewrites earlier text at turn 1"):
        ours.encode_conversation([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])


def test_byte_level_text_is_not_touched_by_the_space_rule():
    ours = LlavaSPProcessor(CLIPImageProcessorPil(), byte_level_tokenizer(), 3)
    assert ours.tokenizer.decode(ours.encode_segments([(" the cat", False)])[0]) == " the cat"
