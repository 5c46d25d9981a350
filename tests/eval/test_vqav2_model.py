"""VQAv2 end to end with a real (tiny, random) model on real files: batching, resuming, processes, provenance, bad images."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image

from llava_sp import LlavaSPForCausalLM, LlavaSPProcessor
from llava_sp.checkpoints.opening.adapter import save_adapter
from llava_sp.checkpoints.reading.fingerprint import checkpoint_hash
from llava_sp.eval.cli import main
from llava_sp.eval.run.answer_log import read_logs
from llava_sp.eval.vqav2 import VQAv2
from llava_sp.inference import Source, render_prompt

NEW_TOKENS = 8


@pytest.fixture(scope="module")
def opened(golden):
    model = LlavaSPForCausalLM.from_backbones(golden / "base", golden / "clip", spatial_variant="cropping", seed=0)
    return model.eval(), LlavaSPProcessor.from_backbones(model.config)


@pytest.fixture(scope="module")
def checkpoint(opened, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    for part in opened:
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recorded(golden):
    return json.loads((golden / "eval" / "vqav2.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def data(recorded, tmp_path_factory) -> Path:
    """The recorded questions, with a picture of noise for each image, of many shapes."""
    folder = tmp_path_factory.mktemp("vqav2")
    for name in ("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"):
        (folder / name).write_text(json.dumps(recorded["files"][name]["data"]))
    (folder / "val2014").mkdir()
    rng = np.random.default_rng(0)
    for item in VQAv2(split="val").load(folder):
        width, height = rng.integers(20, 200, 2)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(item.images[0])
    return folder


def arguments(checkpoint: Path, data: Path, output: Path, *more: object) -> list[str]:
    given = ["--model", checkpoint, "--data", data, "--output", output, "--max-new-tokens", NEW_TOKENS]
    return [str(argument) for argument in (*given, "--device", "cpu", *more)]


@pytest.fixture(scope="module")
def whole(checkpoint, data, tmp_path_factory) -> Path:
    """The output of one undisturbed run with batches of 8."""
    output = tmp_path_factory.mktemp("whole") / "out"
    assert main(VQAv2, arguments(checkpoint, data, output)) == 0
    return output


def test_batch_of_eight_equals_one_by_one(opened, data, whole):
    """The runner's answers are those of plain `generate` calls on single prompts without any padding."""
    model, processor = opened
    answers = [json.loads(line) for line in (whole / "answers.jsonl").open()]
    items = VQAv2(split="val").load(data)
    assert [answer["question_id"] for answer in answers] == [item.id for item in items]
    for answer, item in list(zip(answers, items))[::3]:
        prompt = render_prompt(processor, "<image>\n" + answer["prompt"])
        inputs = processor(text=prompt, images=Image.open(item.images[0]), return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
        text = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer["text"] == text.strip()


def test_batch_size_does_not_change_the_file(checkpoint, data, whole, tmp_path):
    assert main(VQAv2, arguments(checkpoint, data, tmp_path / "out", "--batch-size", 1)) == 0
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == (whole / "answers.jsonl").read_bytes()


def test_result_and_provenance(checkpoint, data, whole):
    result = json.loads((whole / "metrics.json").read_text())
    assert isinstance(result["score"], float) and set(result["metrics"]["per_answer_type"]) == {
        "yes/no",
        "number",
        "other",
    }
    origin = result["provenance"]
    assert origin["checkpoint"] == checkpoint_hash(checkpoint)
    assert (
        origin["conversation_template"] == "vicuna_v1"
        and origin["image_aspect_ratio"] == "pad"
        and origin["protocol"] == "llava15"
    )
    assert (
        origin["dtype"] == "float32" and origin["count"] == 40 and origin["generation"]["max_new_tokens"] == NEW_TOKENS
    )
    assert origin["prompt_example"].endswith("single word or phrase. ASSISTANT:")
    assert len((whole / "per_item.jsonl").read_text().splitlines()) == 40
    assert {"torch", "transformers", "llava_sp", "python"} <= set(origin["versions"])


def test_answers_file_of_a_run_scores_the_same(data, whole, tmp_path):
    again = ["--answers", str(whole / "answers.jsonl"), "--data", str(data), "--output", str(tmp_path / "again")]
    assert main(VQAv2, again) == 0
    first, second = (json.loads((folder / "metrics.json").read_text()) for folder in (whole, tmp_path / "again"))
    assert (first["score"], first["metrics"]) == (second["score"], second["metrics"])


def test_prompts_are_llavas(opened, golden):
    expected = json.loads((golden / "eval" / "prompts.json").read_text(encoding="utf-8"))["expected"]["vqav2"]
    for case in expected["items"]:
        assert render_prompt(opened[1], "<image>\n" + case["question_record"]["text"]) == case["prompt"]
        assert render_prompt(opened[1], "<image>\n" + case["question_record"]["text"], "vicuna_v1") == case["prompt"]


def with_generation_config(checkpoint: Path, folder: Path, **changes: object) -> Path:
    """A copy of the checkpoint (by links) whose generation_config.json has these changes."""
    folder.mkdir()
    for file in checkpoint.iterdir():
        if file.name != "generation_config.json":
            os.link(file, folder / file.name)
    settings = json.loads((checkpoint / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | changes))
    return folder


def test_checkpoint_generation_defaults_are_not_used(checkpoint, data, whole, tmp_path):
    """Vicuna's generation_config samples; the protocol is greedy."""
    sampling = with_generation_config(checkpoint, tmp_path / "m", do_sample=True, temperature=0.9, top_p=0.6, top_k=3)
    assert main(VQAv2, arguments(sampling, data, tmp_path / "out", "--limit", 8)) == 0
    texts = [json.loads(line)["text"] for line in (tmp_path / "out" / "answers.jsonl").open()]
    assert texts == [json.loads(line)["text"] for line in (whole / "answers.jsonl").open()][:8]


def test_answers_of_different_lengths_in_one_batch(checkpoint, data, tmp_path):
    """With many end tokens the answers of a batch end at different steps; what follows an end is not in the answer."""
    early = with_generation_config(checkpoint, tmp_path / "m", eos_token_id=[2, *range(300, 500)])
    for size in (1, 8):
        assert main(VQAv2, arguments(early, data, tmp_path / str(size), "--limit", 16, "--batch-size", size)) == 0
    one, eight = ((tmp_path / size / "answers.jsonl").read_bytes() for size in ("1", "8"))
    assert one == eight
    assert len({len(json.loads(line)["text"].split()) for line in one.splitlines()}) > 1


def test_adapter_checkpoint_gives_the_same_answers(opened, data, whole, tmp_path):
    save_adapter(*opened, tmp_path / "adapter", run={})
    assert main(VQAv2, arguments(tmp_path / "adapter", data, tmp_path / "out", "--limit", 8)) == 0
    texts = [json.loads(line)["text"] for line in (tmp_path / "out" / "answers.jsonl").open()]
    assert texts == [json.loads(line)["text"] for line in (whole / "answers.jsonl").open()][:8]


def test_lora_is_merged_and_changes_nothing_but_rounding(golden, opened, tmp_path):
    model = LlavaSPForCausalLM.from_backbones(golden / "base", golden / "clip", spatial_variant="cropping", seed=0)
    targets = r"model\.language_model\..*\.(q_proj|v_proj|up_proj)"
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(model, opened[1], tmp_path / "lora", run={})
    inputs = opened[1](text="USER: What? ASSISTANT:", return_tensors="pt")
    with torch.inference_mode():
        unmerged = model.eval()(**inputs).logits
        merged = Source(str(tmp_path / "lora")).model("float32", torch.device("cpu"))
        without = opened[0](**inputs).logits
        torch.testing.assert_close(merged(**inputs).logits, unmerged, rtol=1e-4, atol=1e-4)
        assert (merged(**inputs).logits - without).abs().max() > 0.1


def command(*args: str) -> dict:
    repo = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": repo, "TQDM_DISABLE": "1", "DS_ACCELERATOR": "cpu"}
    return {"args": [sys.executable, *args], "env": environment}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_killed_and_resumed_equals_undisturbed(checkpoint, data, whole, tmp_path):
    output = tmp_path / "out"
    given = arguments(checkpoint, data, output, "--batch-size", 2)
    process = subprocess.Popen(**command("-m", "llava_sp.eval.vqav2", *given))
    deadline = time.monotonic() + 600
    while len(read_logs(output / "answers")) < 4 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 4 <= len(read_logs(output / "answers")) < 40
    assert not (output / "metrics.json").exists()
    assert main(VQAv2, given) == 0
    assert (output / "answers.jsonl").read_bytes() == (whole / "answers.jsonl").read_bytes()
    assert (output / "per_item.jsonl").read_bytes() == (whole / "per_item.jsonl").read_bytes()


LAUNCHERS = {
    "torchrun": (3, "torch.distributed.run --standalone --nproc-per-node 3 -m"),
    "accelerate launch": (
        2,
        "accelerate.commands.accelerate_cli launch --multi_gpu --num_processes 2 --main_process_port 0 -m",
    ),
    "deepspeed": (2, "deepspeed.launcher.runner --num_gpus 2 --master_port PORT --module"),
}


@pytest.mark.parametrize(
    "launcher", ["torchrun", pytest.param("accelerate launch", marks=pytest.mark.slow), "deepspeed"]
)
def test_several_processes_under_each_launcher(checkpoint, data, whole, tmp_path, launcher):
    output = tmp_path / "out"
    processes, words = LAUNCHERS[launcher]
    words = words.replace("PORT", str(free_port())).split()
    run = subprocess.run(**command("-m", *words, "llava_sp.eval.vqav2", *arguments(checkpoint, data, output)))
    assert run.returncode == 0
    assert (output / "answers.jsonl").read_bytes() == (whole / "answers.jsonl").read_bytes()
    assert json.loads((output / "metrics.json").read_text())["provenance"]["processes"] == processes


def test_a_bad_image_on_one_process_ends_all_and_loses_nothing(checkpoint, data, tmp_path):
    """The other process does its share first; once the image is mended, only what is missing is answered."""
    folder, output = tmp_path / "data", tmp_path / "out"
    shutil.copytree(data, folder)
    questions = folder / "v2_OpenEnded_mscoco_val2014_questions.json"
    content = json.loads(questions.read_text())
    content["questions"][1]["image_id"] = 900099  # a picture that only the second process meets
    questions.write_text(json.dumps(content))
    first, bad = (item.images[0] for item in VQAv2(split="val").load(folder)[:2])
    bad.write_bytes(first.read_bytes()[:100])
    words = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "llava_sp.eval.vqav2")
    given = arguments(checkpoint, folder, output)
    failed = subprocess.run(**command("-m", *words, *given), capture_output=True, text=True)
    assert failed.returncode != 0 and failed.stderr.count("error: question") == 1 and bad.name in failed.stderr
    assert len((output / "answers" / "rank-00000.jsonl").read_text().splitlines()) == 20
    bad.write_bytes(first.read_bytes())
    assert main(VQAv2, given) == 0
    assert main(VQAv2, arguments(checkpoint, folder, tmp_path / "again")) == 0
    assert (output / "answers.jsonl").read_bytes() == (tmp_path / "again" / "answers.jsonl").read_bytes()


@pytest.mark.parametrize(
    "more, message",
    [
        (["--max-new-tokens", "9"], "generation.max_new_tokens was 8, now 9"),
        (["--dtype", "bfloat16"], "dtype was 'float32', now 'bfloat16'"),
    ],
)
def test_other_settings_in_a_used_directory_are_refused(checkpoint, data, whole, capsys, more, message):
    before = (whole / "metrics.json").read_bytes()
    assert main(VQAv2, arguments(checkpoint, data, whole, *more)) == 2
    err = capsys.readouterr().err
    assert "holds a run with other settings" in err and message in err
    assert (whole / "metrics.json").read_bytes() == before


def test_other_model_or_questions_in_a_used_directory_are_refused(golden, opened, data, whole, tmp_path, capsys):
    other = LlavaSPForCausalLM.from_backbones(golden / "base", golden / "clip", spatial_variant="pooling", seed=1)
    other.save_pretrained(tmp_path / "other")
    opened[1].save_pretrained(tmp_path / "other")
    assert main(VQAv2, arguments(tmp_path / "other", data, whole)) == 2
    assert "checkpoint was '" in capsys.readouterr().err
    for file in data.iterdir():
        (tmp_path / "data").mkdir(exist_ok=True)
        os.symlink(file, tmp_path / "data" / file.name)
    questions = tmp_path / "data" / "v2_OpenEnded_mscoco_val2014_questions.json"
    content = questions.read_text().replace("What colour is the teapot?", "Is there a teapot?")
    questions.unlink()
    questions.write_text(content)
    checkpoint = Path(json.loads((whole / "metrics.json").read_text())["provenance"]["model"])
    assert main(VQAv2, arguments(checkpoint, tmp_path / "data", whole)) == 2
    err = capsys.readouterr().err
    assert "prompt_example was" in err and "questions was" in err


@pytest.mark.parametrize(
    "file, change, message",
    [
        (
            "generation_config.json",
            {"repetition_penalty": 1.3},
            "checkpoint_generation.repetition_penalty was None, now 1.3",
        ),
        ("config.json", {"vision_feature_layer": -1}, "config was "),
        ("processor_config.json", None, "processor was "),
    ],
)
def test_other_files_of_the_checkpoint_count_too(checkpoint, data, whole, tmp_path, capsys, file, change, message):
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    content = json.loads((other / file).read_text())
    if change is None:
        content["image_processor"]["image_mean"] = [0.1, 0.2, 0.3]
    (other / file).write_text(json.dumps(content | (change or {})))
    assert main(VQAv2, arguments(other, data, whole)) == 2
    assert message in capsys.readouterr().err


def test_another_base_is_another_model(golden, opened, tmp_path):
    """A folder of the original code does not say which weights it belongs to: the named ones count."""
    opened[0].model.language_model.save_pretrained(tmp_path / "other")
    released = str(golden / "checkpoint_cropping" / "lora")
    base, tower = str(golden / "base"), str(golden / "clip")
    first, again, moved = (
        Source(released, language_model=named, vision_tower=tower).fingerprint
        for named in (base, base, tmp_path / "other")
    )
    assert first == again != moved


@pytest.mark.parametrize("content", [b"", b"no picture at all", None])
def test_bad_image_is_named_with_its_question(checkpoint, data, tmp_path, capsys, content):
    folder = tmp_path / "val2014"
    folder.mkdir()
    for file in (data / "val2014").iterdir():
        os.symlink(file, folder / file.name)
    bad = folder / "COCO_val2014_000000900001.jpg"
    good = bad.read_bytes()
    bad.unlink()
    bad.write_bytes(good[: len(good) // 2] if content is None else content)
    given = arguments(checkpoint, data, tmp_path / "out", "--images", folder, "--limit", 4)
    assert main(VQAv2, given) == 2
    err = capsys.readouterr().err
    assert "question 90000100" in err and bad.name in err
    given += ["--batch-size", "4"]  # nothing was answered, so the settings may still change
    given[given.index("--max-new-tokens") + 1] = "5"
    bad.write_bytes(good)
    assert main(VQAv2, given) == 0


def test_not_a_checkpoint(data, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(VQAv2, arguments(tmp_path / "empty", data, tmp_path / "out")) == 2
    assert "has no config.json: not a finished checkpoint" in capsys.readouterr().err
    assert main(VQAv2, arguments(tmp_path / "none", data, tmp_path / "out")) == 2
    assert f"model {tmp_path / 'none'} is neither a directory nor" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu(checkpoint, data, whole, tmp_path):
    """float32: any batch size gives the same answers. The default is float16, as LLaVA evaluates."""
    given = [
        str(v) for v in ("--model", checkpoint, "--data", data, "--max-new-tokens", NEW_TOKENS, "--device", "cuda")
    ]
    for size in ("1", "8"):
        more = ["--dtype", "float32", "--batch-size", size, "--output", str(tmp_path / size)]
        assert main(VQAv2, [*given, *more]) == 0
    assert (tmp_path / "1" / "answers.jsonl").read_bytes() == (tmp_path / "8" / "answers.jsonl").read_bytes()
    assert main(VQAv2, [*given, "--output", str(tmp_path / "half")]) == 0
    origin = json.loads((tmp_path / "half" / "metrics.json").read_text())["provenance"]
    assert origin["dtype"] == "float16" and origin["device"] == torch.cuda.get_device_name()
