"""The command that answers one question about images."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from llava_sp import LlavaSPConfig, LlavaSPForCausalLM, LlavaSPProcessor  # noqa: F401 - one in a message's code
from llava_sp.checkpoints.opening.adapter import save_adapter
from llava_sp.generate import main
from llava_sp.inference import place_images


@pytest.fixture(scope="module")
def checkpoint(golden, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model = LlavaSPForCausalLM.from_backbones(golden / "base", golden / "clip", spatial_variant="pooling", seed=0)
    model.save_pretrained(folder)
    LlavaSPProcessor.from_backbones(model.config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def image(golden) -> Path:
    return golden / "samples" / "images" / "wide.png"


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in (*arguments, "--device", "cpu")])
    out, err = capsys.readouterr()
    return status, out, err


def expected(checkpoint: Path, images: list[Path], message: str, **arguments) -> str:
    model, processor = (kind.from_pretrained(checkpoint) for kind in (LlavaSPForCausalLM, LlavaSPProcessor))
    turns = [{"role": "user", "content": message}]
    prompt = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=prompt, images=[Image.open(i) for i in images] or None, return_tensors="pt")
    with torch.inference_mode():
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=8, **arguments)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("count", [0, 1, 2])
def test_streams_the_greedy_answer(checkpoint, image, golden, capsys, count):
    images = [image, golden / "samples" / "images" / "tall.png"][:count]
    flags = [part for path in images for part in ("--image", path)]
    status, out, _ = run(capsys, "--model", checkpoint, *flags, "--prompt", "What?", "--max-new-tokens", 8)
    assert status == 0
    assert out.strip() == expected(checkpoint, images, "<image>\n" * count + "What?")


def test_beams_and_repetition_penalty(checkpoint, image, capsys):
    flags = ["--max-new-tokens", 8, "--num-beams", 2, "--repetition-penalty", 1.3]
    status, out, _ = run(capsys, "--model", checkpoint, "--image", image, "--prompt", "What?", *flags)
    assert status == 0
    assert out.strip() == expected(checkpoint, [image], "<image>\nWhat?", num_beams=2, repetition_penalty=1.3)


def test_sampling_repeats_with_the_seed(checkpoint, image, capsys):
    flags = ["--max-new-tokens", 12, "--temperature", 1.5, "--top-p", 0.95]
    question = ["--model", checkpoint, "--image", image, "--prompt", "What?"]
    answers = [run(capsys, *question, *flags, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_images_stand_where_the_prompt_says():
    assert place_images("What?", 2, "x") == "<image>\n<image>\nWhat?"
    assert place_images("Is <image> like <image>?", 2, "x") == "Is <image> like <image>?"
    assert place_images("What?", 0, "x") == "What?"
    with pytest.raises(ValueError, match="--prompt has 1 <image> mark for 2 images"):
        place_images("<image> What?", 2, "--prompt")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--image", "/nowhere/x.jpg"], "--image is /nowhere/x.jpg; it must be a file"),
        (["--image", "/"], "--image is /; it must be a file"),
        (["--model", "/nowhere/model"], "model /nowhere/model is neither a directory nor a model on the hub"),
        (["--conversation-template", "nope"], "unknown conversation template 'nope'"),
        (["--device", "toaster"], "--device toaster"),
        (
            ["--conversation-template", "plain"],
            "the conversation template 'plain' (captions, of stage 1) would drop the question",
        ),
    ],
)
def test_errors_are_one_clear_line(checkpoint, capsys, flags, message):
    arguments = ["--model", str(checkpoint), "--prompt", "What?", "--device", "cpu", *flags]
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert f"error: {message}" in err and "Traceback" not in err


@pytest.mark.parametrize("template", [[], ["--conversation-template", "llama_2"]])
@pytest.mark.parametrize("prompt", ["What is <image>?", "<image>", "<image> and <image>"])
def test_without_images_a_mark_is_text(checkpoint, capsys, prompt, template):
    """The letters of it, as the original tokenizes a text without an image: no placeholder."""
    seen = []
    generate = LlavaSPForCausalLM.generate

    def spy(self, **inputs):
        seen.append(inputs)
        return generate(self, **inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlavaSPForCausalLM, "generate", spy)
        status, _, err = run(capsys, "--model", checkpoint, "--prompt", prompt, "--max-new-tokens", 2, *template)
    assert status == 0, err
    processor = LlavaSPProcessor.from_pretrained(checkpoint)
    ids = seen[0]["input_ids"][0]
    assert processor.image_token_id not in ids and "pixel_values" not in seen[0]
    assert processor.decode(ids).count("<image>") == prompt.count("<image>")


def test_a_prompt_that_is_not_utf8(checkpoint, repo):
    words = [sys.executable, "-m", "llava_sp.generate", "--model", str(checkpoint), "--prompt", b"caf\xe9"]
    ended = subprocess.run(words, cwd=repo, capture_output=True, text=True)
    assert ended.returncode == 2 and "UTF-8" in ended.stderr and "caf" in ended.stderr
    assert "error: " in ended.stderr and "Traceback" not in ended.stderr


def test_a_checkpoint_of_stage_1_captions_and_answers_no_question(checkpoint, image, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model, ignore=shutil.ignore_patterns("chat_template.jinja"))
    processor = LlavaSPProcessor.from_pretrained(checkpoint)
    LlavaSPProcessor(
        processor.image_processor, processor.tokenizer, processor.num_image_tokens, conversation_template="plain"
    ).save_pretrained(model)
    line = one_error(capsys, "--model", model, "--image", image)
    assert "the conversation template 'plain'" in line and "'What?'" in line and "stage 2" in line
    assert run(capsys, "--model", model, "--image", image, "--prompt", "", "--max-new-tokens", 2)[0] == 0
    (model / "chat_template.jinja").write_text("{% if %}")
    line = one_error(capsys, "--model", model)
    assert str(model) in line and "chat template" in line and "Expected an expression" in line


def one_error(capsys, *arguments: object) -> str:
    status, _, err = run(capsys, "--prompt", "What?", *arguments)
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and err.endswith(line + "\n") and "Traceback" not in err
    return line


def test_folder_without_processor(checkpoint, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model, ignore=shutil.ignore_patterns("processor_config.json", "tokenizer*"))
    line = one_error(capsys, "--model", model)
    assert f"model {model} has no processor_config.json and tokenizer.json: copy" in line
    exec(line[line.index("LlavaSPProcessor.from_backbones") :])  # what the message says to do
    assert run(capsys, "--model", model, "--prompt", "What?", "--max-new-tokens", 2)[0] == 0


def test_other_kinds_of_model_are_named(golden, capsys):
    for folder, kind in (("base", "llama"), ("clip", "clip")):
        line = one_error(capsys, "--model", golden / folder)
        assert f"is not a LLaVA-SP checkpoint: {golden / folder} ({kind}) holds a model without a projector" in line


def test_wrong_backbones_are_one_short_line(checkpoint, golden, tmp_path, capsys):
    model, processor = (kind.from_pretrained(checkpoint) for kind in (LlavaSPForCausalLM, LlavaSPProcessor))
    save_adapter(model, processor, tmp_path / "adapter", run={})
    clip, empty = golden / "clip", tmp_path / "empty"
    empty.mkdir()
    line = one_error(capsys, "--model", tmp_path / "adapter", "--language-model", clip)
    assert (
        f"language_model {clip} cannot be used as a language model: its model type is clip" in line and len(line) < 400
    )
    for flag, key in (("--language-model", "language_model"), ("--vision-tower", "vision_tower")):
        line = one_error(capsys, "--model", tmp_path / "adapter", flag, empty)
        assert f"{key} {empty} cannot be used as a {key.replace('_', ' ')}: Unrecognized model in" in line


def test_broken_image_is_named(checkpoint, tmp_path, capsys):
    bad = tmp_path / "x.jpg"
    bad.write_text("this is text")
    status, _, err = run(capsys, "--model", checkpoint, "--image", bad, "--prompt", "What?")
    assert status == 2 and "x.jpg is not an image" in err


def test_help_needs_no_torch(repo):
    code = "import sys, llava_sp.generate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=repo).returncode == 0
