"""LlavaSPProcessor as transformers and its pipelines use it: calls, chat templates, saving, remote code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoProcessor, AutoTokenizer, CLIPImageProcessorPil, PreTrainedTokenizerFast

from llava_sp.model.processing_llava_sp import LlavaSPProcessor, add_special_tokens
from tests.messages import refused

GOLDEN = Path(__file__).parent.parent / "golden"


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
        ("<image> <image>", 1, r"<image> marks .*\[2\].* images 1"),
        ("no mark", 2, r"<image> marks .*\[0\].* images 2"),
        ("<image>", None, r"<image> marks .*\[1\].* images 0"),
    ],
)
def test_marks_and_images_must_agree(processor, text, images, message):
    pictures = None if images is None else [Image.new("RGB", (4, 4))] * images
    with pytest.raises(ValueError, match=message):
        processor(text=text, images=pictures)


def test_images_per_prompt_must_agree(processor):
    image = Image.new("RGB", (4, 4))
    with pytest.raises(ValueError, match=r"\[1, 1\].*\[2, 0\]"):
        processor(text=["<image>", "<image>"], images=[[image, image], []])


def test_what_a_call_refuses(processor):
    with pytest.raises(ValueError, match="return_length; it takes padding"):
        processor(text="hi", return_length=True, other=False)
    assert "pixel_values" in processor(text="<image>", images=Image.new("RGB", (4, 4)), do_normalize=False, other=None)
    with pytest.raises(ValueError, match="images or text"):
        processor()
    with pytest.raises(ValueError, match="not videos"):
        processor(text="hi", videos=[0])
    with pytest.raises(ValueError, match="by name"):
        processor("hi", Image.new("RGB", (4, 4)))


def test_constructor_checks(processor):
    parts = (processor.image_processor, processor.tokenizer)
    with pytest.raises(ValueError, match="num_image_tokens is None"):
        LlavaSPProcessor(*parts)
    with pytest.raises(ValueError, match="image_aspect_ratio is 'squash'.*pad or crop"):
        LlavaSPProcessor(*parts, num_image_tokens=1, image_aspect_ratio="squash")
    with pytest.raises(ValueError, match="unknown conversation template 'v2'"):
        LlavaSPProcessor(*parts, num_image_tokens=1, conversation_template="v2", chat_template="{{ bos_token }}")
    endless = byte_level_tokenizer()
    endless.eos_token = None
    with pytest.raises(ValueError, match="eos_token is None"):
        LlavaSPProcessor(parts[0], endless, num_image_tokens=1)
    with pytest.raises(ValueError, match="image_token is .<image>."):
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
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)


def test_remote_code_files_import_only_each_other(repo):
    folder = repo / "llava_sp" / "model"
    for name in ("processing_llava_sp.py", "conversation.py", "image_preprocessing.py", "tokenization.py"):
        for module in re.findall(r"^(?:from|import) (\S+)", (folder / name).read_text(encoding="utf-8"), re.M):
            assert not module.startswith("llava_sp") and not module.startswith("..")


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


ASK = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]


@pytest.mark.parametrize("conversation", [ASK, [ASK, ASK], [{"role": "user", "content": "<image>\nWhat is it?"}]])
@pytest.mark.parametrize("options", [{}, {"tokenize": True, "return_dict": True}])
def test_a_template_of_captions_drops_no_question(processor, conversation, options):
    words = r"'plain' \(captions, of stage 1\) would drop the question '.*What is it\?'"
    with pytest.raises(ValueError, match=words):
        processor.apply_chat_template(
            conversation, conversation_template="plain", add_generation_prompt=True, **options
        )
    caption = [{"role": "user", "content": [{"type": "image"}]}]
    for given in (caption, [{"role": "user", "content": "<image>"}]):
        assert (
            processor.apply_chat_template(given, conversation_template="plain", add_generation_prompt=True).strip()
            == "<image>"
        )


def test_another_template_of_a_call(processor):
    for name in ("vicuna_v1", "llava_v1", "llama_2"):
        other = LlavaSPProcessor(
            processor.image_processor, processor.tokenizer, processor.num_image_tokens, conversation_template=name
        )
        options = {"add_generation_prompt": True}
        assert processor.apply_chat_template(ASK, conversation_template=name, **options) == other.apply_chat_template(
            ASK, **options
        )
    with pytest.raises(ValueError, match="unknown conversation template 'v9'"):
        processor.apply_chat_template(ASK, conversation_template="v9")


BROKEN = {
    "{% if %}": "Expected an expression",
    "{% for message in messages %}{{ message.content }}": "Unexpected end of template",
    "{{ messages[0].nope.x }}": "has no attribute 'nope'",
    "{{ messages[9].content }}": "has no element 9",
    "{{ 1 / 0 }}": "division by zero",
    "{{ bos_token + 3 }}": "can only concatenate str",
    "{% include 'x' %}": "no loader",
    "{{ raise_exception('not for you') }}": "not for you",
    "{{ range(1000000000) | list }}": "Range too big",
    "{{ messages.__class__.__mro__ }}": "is unsafe",
    "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}": "recursion",
    "always the same": "makes 'always the same' of",
    "{% for message in messages %}{{ message.role }}{% endfor %}": "makes 'user' of",
}


@pytest.mark.parametrize("template", BROKEN)
def test_a_broken_chat_template_is_named_where_it_is_opened(processor, tmp_path, template):
    processor.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    with refused(tmp_path, "chat_template.jinja", BROKEN[template]):
        LlavaSPProcessor.from_pretrained(tmp_path)


def test_a_chat_template_that_is_no_text(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes("{{ messages }} é".encode("utf-16"))
    with refused(tmp_path, "processor", "decode"):
        LlavaSPProcessor.from_pretrained(tmp_path)


def test_a_template_that_refuses_a_conversation(processor):
    with refused("chat template", "turn 0", "assistant"):
        processor.apply_chat_template([{"role": "assistant", "content": "Hello"}])


@pytest.mark.parametrize("text", ["a \ud83d b", "\udcff", "<image>\ude00"])
def test_half_a_surrogate_pair_is_no_text(processor, text):
    image = Image.new("RGB", (4, 4)) if "<image>" in text else None
    with pytest.raises(ValueError, match=r"surrogate pair in '.*.u(d83d|dcff|de00)'"):
        processor(text=text, images=image)
    with pytest.raises(ValueError, match="half a surrogate pair"):
        processor.encode_conversation([{"role": "user", "content": text}, {"role": "assistant", "content": "x"}])
