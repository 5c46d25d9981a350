"""`--plan`: what it prints for the shipped recipes without network, for other models, and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess

import pytest

from llava_sp.data.sampler import ModalityLengthSampler
from llava_sp.train.__main__ import main
from llava_sp.train.budget import fits
from llava_sp.train.known import GIB, GPUS
from llava_sp.train.plan import plan_of, table
from tests.messages import names, refused
from tests.train.runs import config, environment, log, run_here

UNPACKED = ["--packing", "false", "--per_device_train_batch_size", "16"]


@pytest.fixture
def recipe(repo, monkeypatch):
    for name in ("DATA", "RUNS", "LANGUAGE_MODEL", "VISION_TOWER"):
        monkeypatch.delenv(f"LLAVA_SP_{name}", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return lambda name: repo / "configs" / f"{name}.yaml"


def test_a_recipe_without_network_and_data(recipe, capsys):
    assert (
        main(["--config", str(recipe("finetune_lora_7b_cropping")), "--plan", "--gpu", "h200", "--processes", "8"]) == 0
    )
    out = capsys.readouterr().out
    # Vicuna-7B with 64 more rows, r 128 on seven projections, the released projector's sizes
    assert names(out, "6,738,939,904  frozen", "319,815,680  trains at 0.0002", "902,570,496  trains at 2e-05")
    assert names(out, "8 x NVIDIA H200, ZeRO-2, bf16", "of 139.8: fits", "1 x 16384 tokens")
    assert names(
        out, "llava_v1_5_mix665k.json is not there", "assumed", "665,298 samples", "5,198 steps of 128 samples"
    )
    assert re.search(r"\d+\.\d h at 40 % useful MFU \(27\.8 GFLOP a token", out)
    rows = re.findall(r"^  (\w+) +([\d.]+)(?:  of .*)?$", out, re.MULTILINE)
    sizes = {kind: float(size) for kind, size in rows}
    parts = [sizes[kind] for kind in ("weights", "optimizer", "gradients", "activations", "logits")]
    assert sum(parts) == pytest.approx(sizes["all"], abs=0.3)


@pytest.mark.parametrize("size, trained", [("7b", 923_550_208), ("13b", 935_087_616)])
def test_other_recipes(recipe, size, trained):
    plan = plan_of(recipe(f"pretrain_{size}_cropping"), [], "h100", 8)
    assert plan.budget.trace.trained == trained and plan.samples_per_step == 256
    assert plan.sharding.stage == 2 and "558,128 samples" in plan.text()


@pytest.mark.parametrize(
    "key, words",
    [("pack_length", []), pytest.param("per_device_train_batch_size", UNPACKED, marks=pytest.mark.slow)],
)
def test_what_does_not_fit_says_what_would(recipe, key, words):
    plan = plan_of(recipe("finetune_lora_7b_cropping"), words, "4090-24", 8)
    assert not plan.fits
    change = re.fullmatch(rf"does not fit; {key}: (\d+) would \((.+)\)", plan.verdict())
    assert change
    smaller = plan_of(recipe("finetune_lora_7b_cropping"), [*words, f"--{key}", change[1]], "4090-24", 8)
    assert smaller.fits and smaller.samples_per_step == plan.samples_per_step
    assert float(change[2]) == pytest.approx(smaller.budget.total(smaller.every) / GIB, abs=0.1)


@pytest.mark.slow
def test_what_does_not_fit_on_one_gpu(recipe):
    plan = plan_of(recipe("finetune_lora_13b_cropping"), ["--deepspeed", "null"], "3090-24", 1)
    assert names(plan.verdict(), "does not fit", "GPUs", "zero3.json")


def test_the_table_of_the_readme(repo):
    assert table() in (repo / "README.md").read_text()


def test_data_that_is_there(tmp_path, capsys):
    path = config(tmp_path, per_device_train_batch_size=2, global_batch_size=4, group_by_modality_length=True)
    plan = plan_of(path, ["--max_steps", "-1", "--num_train_epochs", "3"], "4090-24")
    assert (plan.data.samples, plan.steps, plan.samples_per_step) == (4, 3, 4)
    lengths = plan.data.lengths
    order = list(ModalityLengthSampler(lengths.tolist(), 2, 2, 42))
    rows = [sorted(abs(int(lengths[i])) for i in order[start : start + 2]) for start in (0, 2)]
    padding = 1 - sum(map(sum, rows)) / sum(2 * row[1] for row in rows)
    assert f"padding left: {100 * padding:.1f} %" in plan.text()


def test_the_hours_of_a_log_and_the_disk(tmp_path):
    run_here(tmp_path, max_steps=2, save_steps=2)
    plan = plan_of(tmp_path / "run.yaml", ["--max_steps", "1000"], "h100")
    text = plan.text(log=tmp_path / "out" / "log.jsonl")
    speeds = [record["tokens_per_second"] for record in log(tmp_path / "out") if "tokens_per_second" in record]
    assert re.search(r"h at the [\d,]+ tokens/s of .*log\.jsonl \([\d.]+ % useful MFU", text) and len(speeds) == 2
    written = tmp_path / "out" / "checkpoint-2"
    heavy = [path for path in written.rglob("*") if path.suffix in (".safetensors", ".pt")]
    size = sum(path.stat().st_size for path in heavy if not path.name.startswith("rng"))
    assert plan.budget.checkpoint == pytest.approx(size, rel=0.1)
    empty = tmp_path / "log.jsonl"
    empty.write_text(json.dumps({"step": 1}) + "\n")
    with refused(empty, "tokens_per_second"):
        plan.text(log=empty)


@pytest.mark.parametrize(
    "words, parts",
    [
        (["--gpu", "h300"], ("--gpu is 'h300'", *GPUS)),
        (["--gpu", "h200", "--language_model", "/nowhere/vicuna"], ("language_model = /nowhere/vicuna", "config.json")),
        (["--gpu", "h200", "--vision_tower", "nobody/nothing"], ("vision_tower = nobody/nothing", "HF_HUB_OFFLINE")),
        (["--gpu", "h200", "--language_model", "null"], ("language_model is not set",)),
        (["--gpu", "h200", "--stage", "third"], ("stage is 'third'", "pretrain", "finetune_lora")),
        (["--gpu", "h200", "--lora_target_modules", "c_attn"], ("lora_target_modules", "c_attn", "q_proj")),
        (["--gpu", "h200", "--lerning_rate", "1"], ("lerning_rate", "learning_rate")),
        (["--gpu", "h200", "--processes", "3", *UNPACKED], ("global_batch_size = 128", "3 processes")),
        (["--gpu", "h200", "--log", "/nowhere/log.jsonl"], ("/nowhere/log.jsonl",)),
    ],
)
def test_what_cannot_be_planned(recipe, capsys, monkeypatch, words, parts):
    monkeypatch.setattr("llava_sp.train.preflight.constants.HF_HUB_OFFLINE", True)
    assert main(["--config", str(recipe("finetune_lora_7b_cropping")), "--plan", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and names(error, *parts)


def test_a_plan_needs_a_gpu_by_name_or_here(recipe, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["--config", str(recipe("pretrain_7b_cropping")), "--plan"]) == 2
    assert names(capsys.readouterr().err, "--gpu is not given", *GPUS)
    with pytest.raises(SystemExit):
        main(["--config", str(recipe("pretrain_7b_cropping")), "--gpu", "h200"])
    assert names(capsys.readouterr().err, "--gpu needs --plan")


def test_data_of_which_nothing_is_known(recipe):
    text = plan_of(recipe("pretrain_7b_cropping"), ["--data_path", "/nowhere/mine.json"], "h200").text()
    assert (
        names(text, "/nowhere/mine.json is not there", "assumed", "steps: not known", "2048 at most") or "2,048" in text
    )
    assert " h at " not in text


def test_by_the_scripts(repo, tmp_path):
    words = ["bash", str(repo / "scripts/finetune_lora.sh"), "--plan", "--gpu", "h200"]
    done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "ZeRO-2" in done.stdout and "of 139.8" in done.stdout, done.stderr


def test_gpus_have_room():
    assert fits(100 * GIB, GPUS["h200"].memory * GIB) and not fits(139 * GIB, GPUS["h200"].memory * GIB)
