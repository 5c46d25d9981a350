"""Steps that are not finite or whose loss is a spike; the samples of a step, and its replay."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections import deque
from itertools import chain
from pathlib import Path

import pytest
from torch.utils.data import BatchSampler, DistributedSampler

from llava_sp.data.dataset import ConversationDataset
from llava_sp.data.sampler import ModalityLengthSampler, WholeSteps
from llava_sp.train import guard
from llava_sp.train import trainer as trainer_module
from llava_sp.train.__main__ import main
from llava_sp.train.guard import MOST_SKIPPED, RECENT, Guard
from llava_sp.train.order import batches_of_step, samples_of
from llava_sp.train.replay import main as replay
from tests.messages import names
from tests.train.conftest import no_launcher
from tests.train.runs import GOLDEN, REPO, config, finish, log, losses, run_here, start

SAMPLES = json.loads((GOLDEN / "samples" / "data.json").read_text())
POISON = "poison"
NAN = float("nan")


# ---- the rule


def judged(*given: float, norm: float = 1.0) -> Guard:
    history = Guard()
    for loss in given:
        history.judge(loss, norm)
    return history


def test_a_spike_is_beyond_six_sigma_of_the_last_128():
    usual = [1.0, 3.0] * (RECENT // 2)  # mean 2, sigma 1
    assert judged(*usual).judge(8.0, 1.0) is None
    verdict = judged(*usual).judge(8.001, 1.0)
    assert verdict.kind == "spike" and names(verdict.what, "8.0010", "8.0000", "128")
    assert judged(*usual[1:]).judge(1000.0, 1.0) is None  # not yet 128
    assert judged(*[900.0] * 9, *usual).judge(8.001, 1.0).kind == "spike"  # older ones do not count


@pytest.mark.parametrize(("loss", "norm"), [(NAN, 1.0), (math.inf, 1.0), (1.0, NAN), (1.0, math.inf), (NAN, None)])
def test_what_is_not_finite(loss, norm):
    history = judged(1.0, 2.0)
    assert history.judge(loss, norm).kind == "non_finite" and list(history.recent) == [1.0, 2.0]


# ---- in a run


@pytest.fixture
def poisoned(tmp_path, monkeypatch) -> dict:
    """Data of 8 records; the loss of the sixth is NaN when its pixels are (as of a broken image)."""
    records = [record for record in SAMPLES if "image" in record][:2] * 4
    (tmp_path / "data.json").write_text(json.dumps(records))
    load = ConversationDataset._sample

    def broken(self, index):
        sample = load(self, index)
        if index == 5 and POISON in str(self.files[0].path):
            sample["pixel_values"] = sample["pixel_values"] * NAN
        return sample

    (tmp_path / POISON).mkdir()
    (tmp_path / POISON / "data.json").write_text(json.dumps(records))
    monkeypatch.setattr(ConversationDataset, "_sample", broken)
    return {
        "data_path": str(tmp_path / POISON / "data.json"),
        "max_steps": 4,
        "save_steps": 1,
        "save_total_limit": None,
    }


def weights(folder: Path) -> bytes:
    return (folder / "projector.safetensors").read_bytes() + (folder / "lora/adapter_model.safetensors").read_bytes()


def events(out: Path) -> list[dict]:
    return [record for record in log(out) if "event" in record]


def test_a_step_that_is_not_finite_ends_the_run_before_it_is_applied(tmp_path, poisoned, capsys):
    assert main(["--config", str(config(tmp_path, **poisoned))]) == 2
    error = capsys.readouterr().err
    (event,) = events(tmp_path / "out")
    step = event["step"]
    assert event["event"] == "non_finite" and event["step_loss"] is None and len(event["samples"]) == 2
    assert {"file": poisoned["data_path"], "record": 5} in event["samples"]
    assert names(
        error, "diverged", f"step {step}", poisoned["data_path"], "record 5", f"--step {step}", "on_non_finite: skip"
    )
    assert not (tmp_path / "out" / f"checkpoint-{step}").exists()
    with no_launcher():  # and again, as before: the samples are the same
        assert main(["--config", str(config(tmp_path, **poisoned))]) == 2
    assert [one["samples"] for one in events(tmp_path / "out")] == [event["samples"]]


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor", "rmsprop", "adagrad"])
def test_a_step_left_out_changes_nothing(tmp_path, poisoned, optim):
    records = run_here(tmp_path, **poisoned, on_non_finite="skip", weight_decay=0.1, optim=optim)
    (event,) = events(tmp_path / "out")
    step = event["step"]
    assert step > 1, "else there is no checkpoint before it"
    assert weights(tmp_path / "out" / f"checkpoint-{step}") == weights(tmp_path / "out" / f"checkpoint-{step - 1}")
    by_step = {record["step"]: record for record in records if "loss" in record}
    assert by_step[step]["skipped_steps"] == 1 and "grad_norm" not in by_step[step]
    assert all(map(math.isfinite, losses(records).values())) and len(losses(records)) == 4
    state = json.loads((tmp_path / "out" / "checkpoint-4" / "run_state.json").read_text())
    assert state["skipped_steps"] == 1 and len(state["recent_losses"]) == 3


POISONED = """
import sys
from llava_sp.data.dataset import ConversationDataset
load = ConversationDataset._sample
def broken(self, index):
    sample = load(self, index)
    if index == 5:
        sample["pixel_values"] = sample["pixel_values"] * float("nan")
    return sample
ConversationDataset._sample = broken
from llava_sp.train.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_leaves_the_step_out(tmp_path, poisoned, stage):
    """It applies a step itself, before it can be judged: one whose gradients are not finite it does not."""
    zero = str(REPO / "configs" / "deepspeed" / f"zero{stage}.json")
    path = config(tmp_path, **poisoned, on_non_finite="skip", weight_decay=0.1, deepspeed=zero)
    finish(start([sys.executable, "-c", POISONED, "--config", str(path)], tmp_path), tmp_path)
    (event,) = events(tmp_path / "out")
    step = event["step"]
    assert {"file": poisoned["data_path"], "record": 5} in event["samples"] and step > 1
    assert weights(tmp_path / "out" / f"checkpoint-{step}") == weights(tmp_path / "out" / f"checkpoint-{step - 1}")
    assert all(map(math.isfinite, losses(log(tmp_path / "out")).values()))
    assert weights(tmp_path / "out" / "checkpoint-4") != weights(tmp_path / "out" / f"checkpoint-{step}") or step == 4


def test_too_many_in_a_row_end_the_run(tmp_path, monkeypatch, capsys):
    compute = trainer_module.LlavaSPTrainer.compute_loss
    monkeypatch.setattr(trainer_module.LlavaSPTrainer, "compute_loss", lambda *a, **k: compute(*a, **k) * NAN)
    path = config(tmp_path, max_steps=20, save_steps=50, on_non_finite="skip")
    assert main(["--config", str(path)]) == 2
    assert names(capsys.readouterr().err, f"step {MOST_SKIPPED + 1}", f"{MOST_SKIPPED + 1} steps in a row")


def test_spikes_are_logged_with_their_samples_also_after_resuming(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(guard, "RECENT", 3)
    monkeypatch.setattr(Guard, "__init__", small_history(Guard.__init__))
    compute = trainer_module.LlavaSPTrainer.compute_loss

    def spiking(self, *args, **kwargs):
        return compute(self, *args, **kwargs) * (1e3 if self.state.global_step == 4 else 1)

    monkeypatch.setattr(trainer_module.LlavaSPTrainer, "compute_loss", spiking)
    run_here(tmp_path, max_steps=6, save_total_limit=None)
    whole = events(tmp_path / "out")
    assert [(event["event"], event["step"]) for event in whole] == [("spike", 5)] and len(whole[0]["samples"]) == 2
    assert names(caplog.text, "Step 5", "6 sigma")
    out = tmp_path / "out"
    for gone in ("finished.json", "llava_sp.json"):
        (out / gone).unlink()
    for step in (4, 5, 6):
        shutil.rmtree(out / f"checkpoint-{step}")
    with no_launcher():
        assert main(["--config", str(tmp_path / "run.yaml")]) == 0
    again = events(out)
    assert [{**event, "time": 0} for event in again] == [{**event, "time": 0} for event in whole]


def small_history(init):
    def made(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.recent = deque(maxlen=3)

    return made


# ---- which samples


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_every_number_of_processes_has_the_same_samples_in_a_step(processes, grouped):
    """Of 13 samples in steps of 4, two epochs: the last step of an epoch is filled up."""
    batch = 4 // processes
    lengths = [n + 1 if n % 3 else -n - 1 for n in range(13)]
    order = (
        ModalityLengthSampler(lengths, batch, processes, seed=3)
        if grouped
        else DistributedSampler(range(13), num_replicas=1, rank=0, seed=3)
    )
    sampler = WholeSteps(order, 4)

    class Loader:
        batch_sampler = BatchSampler(sampler, batch, drop_last=False)

    steps = [sorted(samples_of(batches_of_step(Loader, step, 1, processes))) for step in range(1, 9)]
    assert all(len(step) == 4 for step in steps) and sampler.epoch == 0
    sampler.set_epoch(1)
    indices = list(sampler)
    assert [sorted(indices[start : start + 4]) for start in range(0, 16, 4)] == steps[4:]
    assert set(chain(*steps[:4])) == set(range(13)) and steps[:4] != steps[4:]


# ---- replay


def made(folder: Path, **settings) -> Path:
    """A finished run of four steps of four of the five samples."""
    folder.mkdir(exist_ok=True)
    (folder / "data.json").write_text(json.dumps([*SAMPLES, SAMPLES[0]]))
    steps = {"save_total_limit": None, "global_batch_size": 4, "save_steps": 2, "max_steps": 4}
    with no_launcher():
        run_here(folder, data_path=str(folder / "data.json"), **steps, **settings)
    return folder / "out"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return made(tmp_path_factory.mktemp("finished"), per_device_train_batch_size=2)


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    return made(tmp_path_factory.mktemp("packed"), packing=True, pack_length=1024)


def table(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()[2:]]


@pytest.mark.parametrize("kind", ["finished", "packed"])
@pytest.mark.parametrize("step", [1, 3])
def test_a_replayed_step_is_the_runs(request, capsys, step, kind):
    out = request.getfixturevalue(kind)
    capsys.readouterr()
    assert replay(["--run", str(out), "--step", str(step)]) == 0
    text = capsys.readouterr().out
    assert names(text, "the start of the run" if step == 1 else out / "checkpoint-2")
    *samples, whole = table(text)
    logged = next(record for record in log(out) if record["step"] == step)
    assert float(whole[0]) == pytest.approx(logged["loss"], abs=1e-3)
    assert float(whole[1]) == pytest.approx(logged["grad_norm"], rel=1e-3)
    assert len(samples) == 4 and all(str(out.parent / "data.json") in " ".join(row) for row in samples)
    learned = [int(row[3]) for row in samples]
    mean = sum(float(row[0]) * n for row, n in zip(samples, learned)) / sum(learned)
    assert mean == pytest.approx(logged["loss"], abs=1e-3) and int(whole[3]) == sum(learned)


def test_replay_finds_the_sample_that_is_not_finite(tmp_path, poisoned, capsys):
    assert main(["--config", str(config(tmp_path, **poisoned))]) == 2
    (event,) = events(tmp_path / "out")
    capsys.readouterr()
    assert replay(["--run", str(tmp_path / "out"), "--step", str(event["step"])]) == 1
    marked = [line for line in capsys.readouterr().out.splitlines() if "not finite" in line]
    assert len(marked) == 1 and names(marked[0], poisoned["data_path"], "record 5")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--step", "5"], ["--step", "5", "4 steps"]),
        (["--step", "0"], ["--step", "0"]),
        (["--step", "1", "--learning_rat", "1"], ["learning_rat", "learning_rate"]),
    ],
)
def test_what_cannot_be_replayed(finished, capsys, words, parts):
    try:
        status = replay(["--run", str(finished), *words])
    except SystemExit as end:
        status = end.code
    assert status == 2 and names(capsys.readouterr().err, *parts)


def test_replay_with_a_damaged_checkpoint(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "out")
    file = tmp_path / "out" / "checkpoint-2" / "projector.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert replay(["--run", str(tmp_path / "out"), "--step", "4"]) == 2
    assert names(capsys.readouterr().err, file, "damaged")


def test_replay_of_other_data_or_of_no_run(finished, tmp_path, capsys):
    (tmp_path / "data.json").write_text(json.dumps(SAMPLES[::-1]))
    assert replay(["--run", str(finished), "--step", "3", "--data_path", str(tmp_path / "data.json")]) == 2
    assert names(capsys.readouterr().err, finished / "checkpoint-2", tmp_path / "data.json", "check_data")
    assert replay(["--run", str(tmp_path), "--step", "1"]) == 2
    assert names(capsys.readouterr().err, tmp_path / "run.yaml")
