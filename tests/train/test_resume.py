"""What a resumed run must find as it was (data, bases), what it logs, and how a run ends that cannot go on."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from llava_sp import LlavaSPForCausalLM
from llava_sp.checkpoints.opening.adapter import load_projector, save_adapter
from llava_sp.train import trainer as trainer_module
from llava_sp.train.__main__ import main
from llava_sp.train.intact import write_file_list
from llava_sp.train.run import train
from tests.messages import names
from tests.train.conftest import no_launcher
from tests.train.runs import GOLDEN, TINY, config, log, losses, run_here

SAMPLES = GOLDEN / "samples"
STEPS = {"save_steps": 2, "logging_steps": 3, "lora_dropout": 0.1, "save_total_limit": None}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of six steps on data and a language model of its own, saved every two steps, logged every three."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(SAMPLES, folder / "data")
    shutil.copytree(GOLDEN / "base", folder / "base")
    with no_launcher():
        run_here(folder, data_path=str(folder / "data" / "data.json"), image_folder=str(folder / "data" / "images"),
                 language_model=str(folder / "base"), **STEPS)  # fmt: skip
    return folder


@pytest.fixture
def stopped(whole, tmp_path):
    """A copy of that run as if it had ended after the checkpoint of a step; all its files may be changed."""

    def stop(step: int) -> Path:
        shutil.copytree(whole, tmp_path / "run")
        out = tmp_path / "run" / "out"
        for name in ("finished.json", "llava_sp.json"):
            (out / name).unlink()
        for later in range(step + 1, 7):
            shutil.rmtree(out / f"checkpoint-{later}", ignore_errors=True)
        moved = {
            "data_path": "data/data.json",
            "image_folder": "data/images",
            "language_model": "base",
            "output_dir": "out",
        }
        for file in (tmp_path / "run" / "run.yaml", *out.glob("**/run.yaml")):
            keys = yaml.safe_load(file.read_text())
            file.write_text(yaml.safe_dump(keys | {key: str(tmp_path / "run" / at) for key, at in moved.items()}))
        for checkpoint in out.glob("checkpoint-*"):
            write_file_list(checkpoint)
        return tmp_path / "run"

    return stop


def command(folder: Path, *words: str) -> int:
    return main(["--config", str(folder / "run.yaml"), *words])


# ---- what it logs


@pytest.mark.parametrize("step", [2, 4])
def test_the_log_of_a_resumed_run_is_that_of_an_undisturbed_one(whole, stopped, step):
    folder = stopped(step)
    assert command(folder) == 0
    ours, theirs = (log(place / "out") for place in (folder, whole))
    assert losses(ours) == losses(theirs) and sorted(losses(ours)) == [3, 6]
    assert [r["train_loss"] for r in ours if "train_loss" in r] == [
        r["train_loss"] for r in theirs if "train_loss" in r
    ]


# ---- what it learns from


def reorder(folder: Path) -> str:
    file = folder / "data" / "data.json"
    file.write_text(json.dumps(json.loads(file.read_text())[::-1]))
    return str(file)


def reword(folder: Path) -> str:
    file = folder / "data" / "data.json"
    file.write_text(file.read_text().replace("e", "a", 1))
    return str(file)


def an_image(folder: Path) -> Path:
    records = json.loads((folder / "data" / "data.json").read_text())
    return folder / "data" / "images" / next(record["image"] for record in records if "image" in record)


def other_image(folder: Path) -> str:
    file = an_image(folder)
    with Image.open(file) as image:
        size, other = file.stat().st_size, image.resize((31, 17))
    other.save(file)
    return f"{file} ({size} bytes, now {file.stat().st_size})"


def no_image(folder: Path) -> str:
    file = an_image(folder)
    size = file.stat().st_size
    file.unlink()
    return f"{file} ({size} bytes, now None)"


@pytest.mark.parametrize("change", [reorder, reword, other_image, no_image], ids=lambda how: how.__name__)
def test_other_data_under_the_same_names(stopped, capsys, change):
    folder = stopped(4)
    expected = change(folder)
    assert command(folder) == 2
    error = capsys.readouterr().err
    assert names(error, folder / "out" / "checkpoint-4", expected, "--check_data false")


def test_other_data_may_be_accepted(stopped, caplog):
    folder = stopped(4)
    expected = reorder(folder)
    assert command(folder, "--check_data", "false") == 0
    assert names(caplog.text, folder / "out" / "checkpoint-4", expected)


def test_another_weight_in_the_mixture(tmp_path, capsys):
    """The mixture's name is a key of the run; what is in that file is not."""
    entry = {"annotations": str(SAMPLES / "data.json"), "images": str(SAMPLES / "images")}
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(yaml.safe_dump([entry]))
    given = config(tmp_path, data_path=None, image_folder=None, mixture=str(mixture), max_steps=1)
    train(given, [])
    for name in ("finished.json", "llava_sp.json"):
        (tmp_path / "out" / name).unlink()
    mixture.write_text(yaml.safe_dump([entry | {"weight": 2.0}]))
    assert main(["--config", str(given)]) == 2
    assert names(capsys.readouterr().err, SAMPLES / "data.json", "weight", "2.0", "1.0")


def spoil(folder: Path) -> None:
    """Other weights of the same shapes in a model's folder."""
    for file in folder.glob("*.bin"):
        torch.save({name: tensor * 1.01 for name, tensor in torch.load(file).items()}, file)


def test_another_language_model_under_the_same_name(stopped, capsys):
    folder = stopped(4)
    spoil(folder / "base")
    assert command(folder) == 2
    error = capsys.readouterr().err
    assert names(error, folder / "out" / "checkpoint-4", "language model", "fingerprint", folder / "base", "check_base")


# ---- stage 2 on other bases than stage 1's


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, dict]:
    """Bases of equal shapes as stage 1's, by the key that differs."""
    folder = tmp_path_factory.mktemp("bases")
    given = {key: TINY[key] for key in ("language_model", "vision_tower", "spatial_width")}
    for key in ("language_model", "vision_tower"):
        shutil.copytree(given[key], folder / key)
        spoil(folder / key)
    return {
        "the same": given,
        "language_model": given | {"language_model": str(folder / "language_model")},
        "vision_tower": given | {"vision_tower": str(folder / "vision_tower")},
        "vision_feature_layer": given | {"vision_feature_layer": -1},
        "the same layer": given | {"vision_feature_layer": 3},
    }


@pytest.fixture(scope="module")
def stage1(bases, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stage1")
    save_adapter(LlavaSPForCausalLM.from_backbones(**bases["the same"]), None, folder)
    return folder


@pytest.mark.parametrize("key", ["language_model", "vision_tower", "vision_feature_layer"])
def test_stage_2_on_other_bases_than_stage_1(bases, stage1, key):
    model = LlavaSPForCausalLM.from_backbones(**bases[key])
    with pytest.raises(ValueError, match=rf"(?s){stage1} was trained.*{key.replace('_', '.')}.*check_base"):
        load_projector(model, stage1)
    load_projector(model, stage1, check_base=False)


@pytest.mark.parametrize("key", ["the same", "the same layer"])
def test_stage_2_on_the_same_bases(bases, stage1, key):
    load_projector(LlavaSPForCausalLM.from_backbones(**bases[key]), stage1)


def test_check_base_reaches_the_projector(bases, stage1, tmp_path, capsys):
    given = bases["vision_feature_layer"] | {"projector_checkpoint": str(stage1), "max_steps": 1}
    assert main(["--config", str(config(tmp_path, **given))]) == 2
    assert names(capsys.readouterr().err, "vision_feature_layer", "-2", "-1")
    assert main(["--config", str(config(tmp_path, **given, check_base=False))]) == 0


# ---- endings


def test_finished_without_its_model_goes_on(whole, tmp_path, caplog):
    shutil.copytree(whole / "out", tmp_path / "out")
    (tmp_path / "out" / "projector.safetensors").unlink()
    main(["--config", str(whole / "run.yaml"), "--output_dir", str(tmp_path / "out")])
    assert names(caplog.text, tmp_path / "out" / "finished.json", "projector.safetensors")
    assert (tmp_path / "out" / "projector.safetensors").is_file()


def test_finished_without_model_and_checkpoints_is_refused(whole, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    for name in ("finished.json", "run.yaml"):
        shutil.copy(whole / "out" / name, tmp_path / "out")
    assert main(["--config", str(whole / "run.yaml"), "--output_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert names(error, tmp_path / "out" / "finished.json", "no checkpoint", "output_dir")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ends_the_run_at_its_step(tmp_path, monkeypatch, capsys, value):
    compute = trainer_module.LlavaSPTrainer.compute_loss

    def spoilt(self, *args, **kwargs):
        loss = compute(self, *args, **kwargs)
        return loss * value if self.state.global_step == 2 else loss

    monkeypatch.setattr(trainer_module.LlavaSPTrainer, "compute_loss", spoilt)
    assert main(["--config", str(config(tmp_path, logging_steps=5))]) == 2
    error = capsys.readouterr().err
    assert (
        names(error, "diverged", "step 3", "gradient norm", "nan", tmp_path / "out" / "checkpoint-2")
        and "lora 0.00" in error
    )
    monkeypatch.undo()
    with no_launcher():
        assert main(["--config", str(config(tmp_path, logging_steps=5))]) == 0


def test_weights_that_opening_would_refuse_are_not_saved(tmp_path, monkeypatch, capsys):
    """The same message each time, and the good checkpoint stays."""
    compute = trainer_module.LlavaSPTrainer.compute_loss
    monkeypatch.setattr(trainer_module.LlavaSPTrainer, "compute_loss", lambda *a, **k: compute(*a, **k) * 1e3)
    given = config(tmp_path, learning_rate=1e3, max_grad_norm=0.0, warmup_steps=3, save_steps=1, optim="sgd")
    for _ in range(2):
        assert main(["--config", str(given)]) == 2
        error = capsys.readouterr().err
        assert names(error, "diverged", "step 2", "values", tmp_path / "out" / "checkpoint-1")
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-1"]
    LlavaSPForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-1")


@pytest.mark.parametrize("workers", [0, 1])
def test_all_samples_bad_under_skip(tmp_path, capsys, workers):
    (tmp_path / "data.json").write_text(json.dumps([{"conversations": []}] * 5))
    settings = {"data_path": str(tmp_path / "data.json"), "on_bad_sample": "skip", "dataloader_num_workers": workers}
    assert main(["--config", str(config(tmp_path, **settings))]) == 2
    error = capsys.readouterr().err
    assert error.count("error: 5 bad samples in a row from") == 1 and "skipped_train.jsonl lists them" in error
    assert "on_bad_sample: skip" not in error and os.linesep not in error.split("error: ")[1].strip()


def test_data_that_is_replaced_while_training(tmp_path, monkeypatch, capsys):
    def replaced(self, index):
        raise ValueError(f"{self.files[0].path} was changed while it was in use; restart the command")

    monkeypatch.setattr(trainer_module.ConversationDataset, "__getitem__", replaced)
    assert main(["--config", str(config(tmp_path))]) == 2
    assert f"error: {TINY['data_path']} was changed while it was in use" in capsys.readouterr().err


def test_ctrl_c(tmp_path, monkeypatch, capsys):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer_module.LlavaSPTrainer, "training_step", interrupted)
    assert main(["--config", str(config(tmp_path))]) == 130
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("interrupted; the same command resumes")
