"""Whole runs: resumed after SIGKILL, finished, of another configuration, with a full disk, in both stages."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from llava_sp import LlavaSPForCausalLM
from llava_sp.data.images import load_image
from llava_sp.train import trainer as trainer_module
from llava_sp.train import verify
from llava_sp.train.__main__ import main
from llava_sp.train.run import train
from tests.messages import names, refused
from tests.train.conftest import no_launcher
from tests.train.runs import config, finish, log, losses, run_here, start, wait_for_step

SAME = 1e-6  # relative: the same arithmetic in the same order


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run with dropout, three epochs of two steps."""
    folder = tmp_path_factory.mktemp("whole")
    with no_launcher():
        run_here(folder, lora_dropout=0.1, save_steps=2)
    return folder


def test_a_run_leaves_what_it_should(whole):
    out = whole / "out"
    assert (out / "finished.json").is_file() and (out / "llava_sp.json").is_file()
    assert sorted(path.name for path in out.glob("checkpoint-*")) == [
        "checkpoint-4",
        "checkpoint-6",
    ]  # save_total_limit
    assert not (out / ".saving").exists()
    names = set(load_file(out / "projector.safetensors")) | set(load_file(out / "lora" / "adapter_model.safetensors"))
    assert not any("embed" in name or "lm_head" in name or "vision" in name for name in names)
    recorded = yaml.safe_load((out / "run.yaml").read_text())
    facts = recorded["provenance"]
    assert facts["seed"] == 42 and facts["versions"]["torch"] and "commit" in facts
    for record in (record for record in log(out) if "loss" in record):
        for key in (
            "learning_rate/lora",
            "learning_rate/patch_mlp",
            "samples_per_second",
            "tokens_per_second",
            "memory_gib",
        ):
            assert key in record
    model = LlavaSPForCausalLM.from_pretrained(out / "checkpoint-4")  # every checkpoint can be opened
    assert any(".lora_" in name for name, _ in model.named_parameters())


def test_resumes_after_sigkill(whole, tmp_path, caplog):
    path = config(tmp_path, lora_dropout=0.1, save_steps=2)
    process = start([sys.executable, "-m", "llava_sp.train", "--config", str(path)], tmp_path)
    wait_for_step(process, tmp_path, 3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "finished.json").exists()

    (tmp_path / "out" / ".saving" / "checkpoint-9").mkdir(parents=True, exist_ok=True)  # as if killed while saving
    caplog.set_level("INFO", "llava_sp")
    train(path, [])
    assert "Resuming from" in caplog.text
    records = log(tmp_path / "out")
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4, 5, 6]
    assert losses(records) == pytest.approx(losses(log(whole / "out")), rel=SAME)
    for file in ("projector.safetensors", "lora/adapter_model.safetensors"):
        ours, theirs = (load_file(folder / "out" / file) for folder in (tmp_path, whole))
        assert all(torch.allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-7) for name in theirs)


def test_killed_between_last_checkpoint_and_proof(whole, tmp_path):
    shutil.copytree(whole / "out", tmp_path / "out")
    for name in ("finished.json", "llava_sp.json", "projector.safetensors"):
        (tmp_path / "out" / name).unlink()
    train(whole / "run.yaml", ["--output_dir", str(tmp_path / "out")])
    assert (tmp_path / "out" / "finished.json").is_file()
    assert losses(log(tmp_path / "out")) == losses(log(whole / "out"))
    ours, theirs = (load_file(folder / "out" / "projector.safetensors") for folder in (tmp_path, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_finished_run_says_so(whole, caplog, monkeypatch):
    monkeypatch.setattr("llava_sp.train.run.build_model", lambda *_: pytest.fail("a model was built"))
    main(["--config", str(whole / "run.yaml")])
    assert names(caplog.text, whole / "out", "finished")


def test_another_runs_folder(whole, capsys):
    words = ["--learning_rate", "1e-3", "--logging_steps", "5", "--seed", "7"]
    assert main(["--config", str(whole / "run.yaml"), *words]) == 2
    message = capsys.readouterr().err
    assert "belongs to another run" in message
    assert "learning_rate: 0.002 there, 0.001 now" in message and "seed: 42 there, 7 now" in message
    assert "logging_steps" not in message


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda content: content[: content.index(b"provenance")], "has no provenance; it has "),
        (lambda content: content[:100], "(has no provenance|is not valid YAML)"),
        (lambda content: bytes(len(content)), "is not valid YAML: .*#x0000"),
        (lambda content: b"", "is empty"),
        (lambda content: content.decode().encode("utf-16"), "is not UTF-8 text"),
    ],
    ids=["cut", "cut short", "zeroed", "empty", "UTF-16"],
)
def test_a_damaged_run_file(whole, tmp_path, capsys, damage, message):
    """Without a checkpoint, whose copy would be used."""
    shutil.copytree(whole / "out", tmp_path / "out", ignore=shutil.ignore_patterns("checkpoint-*"))
    file = tmp_path / "out" / "run.yaml"
    file.write_bytes(damage(file.read_bytes()))
    assert main(["--config", str(whole / "run.yaml"), "--output_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert re.search(rf"^error: {re.escape(str(file))} {message}", error) and error.count("\n") == 1


def test_a_launcher_that_counts_in_words(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "first")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as end:
        main(["--config", "c.yaml"])
    assert end.value.code == 2
    assert (
        capsys.readouterr().err == "error: RANK is 'first' in the environment; it must be a whole number, 0 or more\n"
    )


def test_a_folder_that_is_no_run(whole, tmp_path):
    (tmp_path / "out").mkdir()
    shutil.copy(whole / "out" / "projector.safetensors", tmp_path / "out")
    with refused(tmp_path / "out", "projector.safetensors", "no run.yaml"):
        run_here(tmp_path)


def test_one_run_at_a_time(tmp_path):
    from llava_sp.train.run_folder import RunFolder

    first, second = RunFolder(tmp_path / "out"), RunFolder(tmp_path / "out")
    first.open({}, {})
    with pytest.raises(ValueError, match=f"in use by process {os.getpid()}"):
        second.open({}, {}, patience=0)


def test_full_disk_while_saving(tmp_path, monkeypatch):
    """The second checkpoint cannot be written: a clear error, the first one intact, and the run goes on from it."""
    save = trainer_module.save_adapter

    def full(*args, **kwargs):
        if kwargs["run"]["step"] == 4:
            (args[2] if hasattr(args[2], "write_text") else trainer_module.Path(args[2])).mkdir(parents=True)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(*args, **kwargs)

    monkeypatch.setattr(trainer_module, "save_adapter", full)
    with refused("checkpoint-4", "GiB free", "No space left", "checkpoint-2"):
        run_here(tmp_path, save_steps=2)
    out = tmp_path / "out"
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"] and not (out / ".saving").exists()
    monkeypatch.setattr(trainer_module, "save_adapter", save)
    records = run_here(tmp_path, save_steps=2)
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4, 5, 6]


def test_wrong_weights_on_disk_are_noticed(tmp_path, monkeypatch):
    def spoilt(model, path):
        load(model, path)
        next(p for name, p in model.named_parameters() if "linear_2.weight" in name).data.mul_(2.0)

    load = verify.load_adapter
    monkeypatch.setattr(verify, "load_adapter", spoilt)
    with refused("reproduce", "trained model", error=RuntimeError):
        run_here(tmp_path, max_steps=1)
    assert not (tmp_path / "out" / "finished.json").exists()


def test_both_stages_and_validation(tmp_path):
    """Stage 2 starts from stage 1's whole projector; validation from a file and from a share of the data."""
    captions = tmp_path / "captions.json"
    caption = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A picture."}]
    captions.write_text(
        json.dumps([{"image": f"{name}.png", "conversations": caption} for name in ("wide", "tall", "square")])
    )
    first = run_here(
        tmp_path / "1", "pretrain", data_path=str(captions), max_steps=2, save_steps=2, validation_fraction=0.34
    )
    assert "eval_loss" in {key for record in first for key in record}
    trained = load_file(tmp_path / "1" / "out" / "projector.safetensors")
    assert not (tmp_path / "1" / "out" / "lora").exists()

    stage1 = str(tmp_path / "1" / "out")
    samples = {"eval_data_path": yaml.safe_load(config(tmp_path / "2").read_text())["data_path"]}
    second = run_here(
        tmp_path / "2", max_steps=1, projector_checkpoint=stage1, projector_lr=0.0, eval_steps=1, **samples
    )
    assert sum("eval_loss" in record for record in second) == 1
    started_from = load_file(tmp_path / "2" / "out" / "projector.safetensors")
    assert trained.keys() == started_from.keys()
    assert all(torch.equal(trained[name], started_from[name]) for name in trained)

    for settings, word in (
        ({"spatial_variant": "pooling"}, "spatial_variant"),
        ({"spatial_width": 6}, "spatial_width"),
    ):
        with pytest.raises(ValueError, match=word):
            run_here(tmp_path / word, projector_checkpoint=stage1, **settings)


def test_text_only_data_trains(tmp_path):
    """Text alone: LoRA learns, the projector gets zero gradients and keeps its weights."""
    data = tmp_path / "text.json"
    data.write_text('[{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello you."}]}]')
    records = losses(run_here(tmp_path, data_path=str(data), global_batch_size=1, max_steps=4))
    assert records[4] < records[1]


def test_bf16_with_gradient_checkpointing(tmp_path):
    """What trains stays in float32 under autocast; the rest is bf16."""
    records = losses(run_here(tmp_path, bf16=True, gradient_checkpointing=True, max_steps=3))
    assert records[3] < records[1]
    assert {t.dtype for t in load_file(tmp_path / "out" / "projector.safetensors").values()} == {torch.float32}


def test_gradient_checkpointing_changes_nothing(whole, tmp_path):
    plain = losses(run_here(tmp_path / "a", max_steps=2))
    checkpointed = losses(run_here(tmp_path / "b", max_steps=2, gradient_checkpointing=True))
    assert checkpointed == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("seconds", [0.0, 1.0])
def test_waiting_for_data_is_logged(tmp_path, monkeypatch, capsys, seconds):
    def slow(*where):
        time.sleep(seconds)
        return load_image(*where)

    monkeypatch.setattr("llava_sp.data.record_file.load_image", slow)
    records = [r for r in run_here(tmp_path, max_steps=2) if "loss" in r]
    assert all(0 <= r["data_wait_share"] <= 1 for r in records)
    assert any(r["data_wait_seconds"] >= seconds for r in records)
    assert not seconds or "s a step for data" in capsys.readouterr().out


def test_padding_to_a_multiple_changes_nothing(tmp_path):
    plain = run_here(tmp_path / "a", max_steps=2)
    padded = run_here(tmp_path / "b", max_steps=2, pad_to_multiple_of=128)
    assert losses(padded) == pytest.approx(losses(plain), rel=1e-5)


def test_bad_data_is_reported_without_a_traceback(tmp_path, capsys):
    broken = tmp_path / "broken.json"
    for text in ("", "[]", '[{"conversations": [{"from": "hum'):
        broken.write_text(text)
        assert main(["--config", str(config(tmp_path)), "--data_path", str(broken)]) == 2
        assert "broken.json" in capsys.readouterr().err
    main(["--config", str(config(tmp_path)), "--max_steps", "1"])  # the same folder, with good data
    assert (tmp_path / "out" / "finished.json").is_file()
    assert yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["data_path"].endswith("data.json")


def test_a_bad_sample_met_while_training_is_reported_without_a_traceback(tmp_path, capsys):
    data = tmp_path / "data.json"
    record = {
        "image": "gone.png",
        "conversations": [{"from": "human", "value": "<image>\nHi"}, {"from": "gpt", "value": "Yes."}],
    }
    data.write_text(json.dumps([record, record]))
    assert main(["--config", str(config(tmp_path)), "--data_path", str(data)]) == 2
    reported = capsys.readouterr().err
    assert "data.json" in reported and "gone.png" in reported and "on_bad_sample: skip" in reported


def test_command_line_of_a_plain_process(tmp_path):
    """`python -m llava_sp.train` in an environment without any launcher's variables."""
    path = config(tmp_path, max_steps=1)
    text = finish(
        start([sys.executable, "-m", "llava_sp.train", "--config", str(path), "--seed=3"], tmp_path), tmp_path
    )
    assert names(text, "Stage finetune_lora", "loaded back", "same logits", "step 1/1")


def test_the_run_keys_of_the_spatial_branch_reach_the_model(tmp_path):
    run_here(
        tmp_path,
        "pretrain",
        max_steps=1,
        conversation_template="vicuna_v1",
        vision_feature_layer=[-2, -1],
        fusion_kernel=8,
        fusion_stride=8,
        spatial_projection_bias=False,
    )
    config = LlavaSPForCausalLM.from_pretrained(tmp_path / "out").config
    assert list(config.vision_feature_layer) == [-2, -1] and config.spatial_projection_bias is False
    assert (config.fusion_kernel, config.fusion_stride) == (8, 8)


def test_a_tracker_gets_what_is_logged(tmp_path, monkeypatch):
    """report_to names a tracker of transformers; it sees the same figures as log.jsonl."""
    seen: dict[int, dict] = {}

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.setdefault(state.global_step, {}).update(logs)

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
    records = run_here(tmp_path, max_steps=2, report_to="tensorboard")
    assert {step: seen[step]["loss"] for step in (1, 2)} == losses(records)
    assert seen[2]["learning_rate/lora"] == records[1]["learning_rate/lora"]


def test_tensorboard(tmp_path, monkeypatch):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    records = run_here(tmp_path, max_steps=2, report_to="tensorboard")
    reader = events.EventAccumulator(str(tmp_path / "events"))
    reader.Reload()
    written = {event.step: event.value for event in reader.Scalars("train/loss")}
    assert written == pytest.approx(losses(records), rel=1e-6)
