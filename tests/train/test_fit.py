"""Recomputation by estimate, the largest batch first, and what running out of memory says."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file

from llava_sp.config.arguments import load_config
from llava_sp.train import fit
from llava_sp.train.__main__ import main
from llava_sp.train.run import train
from llava_sp.train.trainer import LlavaSPTrainer
from tests.messages import names, refused
from tests.train.runs import config, log, losses, run_here

SETTINGS = {"max_steps": 2, "lora_dropout": 0.1, "per_device_train_batch_size": 2, "save_steps": 2}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run that recomputes nothing and does not try the largest batch first."""
    from tests.train.conftest import no_launcher

    folder = tmp_path_factory.mktemp("plain")
    with no_launcher():
        run_here(folder, **SETTINGS, activation_checkpointing="none", longest_step_first=False)
    return folder


def weights(folder) -> dict[str, torch.Tensor]:
    files = ("projector.safetensors", "lora/adapter_model.safetensors")
    return {name: value for file in files for name, value in load_file(folder / "out" / file).items()}


def same(folder, other) -> bool:
    ours, theirs = weights(folder), weights(other)
    return losses(log(folder / "out")) == losses(log(other / "out")) and all(
        torch.equal(ours[name], value) for name, value in theirs.items()
    )


@pytest.mark.parametrize("free, chosen", [(2**40, "none"), (0, "full")])
def test_auto_is_exact(plain, tmp_path, monkeypatch, caplog, free, chosen):
    """The same weights to the bit, whatever is recomputed; with dropout, and the largest batch tried first."""
    caplog.set_level("INFO", "llava_sp")
    monkeypatch.setattr(fit, "memory_of_device", lambda device: free)
    run_here(tmp_path, **SETTINGS, activation_checkpointing="auto")
    assert names(caplog.text, "activation_checkpointing", f"auto: {chosen}", "GiB by estimate")
    assert names(caplog.text, "The largest batch fits", "2 rows", "estimated")
    assert same(tmp_path, plain)


def test_every_second_layer_is_exact(plain, tmp_path):
    run_here(tmp_path, **SETTINGS, activation_checkpointing="every_2")
    assert same(tmp_path, plain)


def test_the_largest_pack(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "llava_sp")
    monkeypatch.setattr(fit, "memory_of_device", lambda device: 2**40)
    packs = {"packing": True, "global_batch_size": 4, "pack_length": 1400}
    run_here(tmp_path, **packs, max_steps=1, activation_checkpointing="auto")
    assert names(caplog.text, "auto: none", "GiB by estimate", "The largest batch fits: 1 rows", "estimated")


def test_the_largest_batch_first_in_a_resumed_run(tmp_path):
    quiet = {**SETTINGS, "max_steps": 4, "longest_step_first": False}
    run_here(tmp_path / "whole", **quiet)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    out = tmp_path / "resumed" / "out"
    shutil.rmtree(out / "checkpoint-4")
    (out / "finished.json").unlink()
    words = ["--output_dir", str(out), "--longest_step_first", "true"]
    train(config(tmp_path / "again", **quiet), words)
    assert same(tmp_path / "resumed", tmp_path / "whole")


def out_of_memory(*_args, **_kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has ...")


@pytest.mark.parametrize("first", [True, False], ids=["largest batch first", "in a step"])
def test_out_of_memory_is_one_line(tmp_path, monkeypatch, capsys, first):
    if first:
        monkeypatch.setattr(torch.autograd, "grad", out_of_memory)
    else:
        monkeypatch.setattr(LlavaSPTrainer, "compute_loss", out_of_memory)
    path = config(tmp_path, **SETTINGS, longest_step_first=first)
    assert main(["--config", str(path)]) == 2
    error = capsys.readouterr().err
    line = error[error.index("error: ") :]
    assert line.startswith("error: out of memory: ") and line.count("\n") == 1
    assert names(line, "2 x 645 tokens", "2 images", "GiB by estimate", "weights", "activations")
    assert names(line, "activation_checkpointing: full", "per_device_train_batch_size: 1", "model_max_length: 1024")
    assert log(tmp_path / "out") == []


def test_another_runtime_error_keeps_its_traceback(tmp_path, monkeypatch):
    def broken(*_args, **_kwargs):
        raise RuntimeError("a kernel of its own")

    monkeypatch.setattr(torch.autograd, "grad", broken)
    with pytest.raises(RuntimeError, match="a kernel of its own"):
        run_here(tmp_path, **SETTINGS)


@pytest.mark.parametrize(
    "words, every, is_open",
    [
        (["--activation_checkpointing", "auto"], 1, True),
        (["--activation_checkpointing", "none"], None, False),
        (["--activation_checkpointing", "false"], None, False),
        (["--activation_checkpointing", "full"], 1, False),
        (["--activation_checkpointing", "true"], 1, False),
        (["--gradient_checkpointing"], 1, False),
        (["--gradient_checkpointing", "no"], None, False),
        (["--activation_checkpointing", "every_4"], 4, False),
        (["--gradient_checkpointing", "true", "--gradient_checkpointing_kwargs", '{"every_n_layers": 3}'], 3, False),
    ],
)
def test_the_key(repo, words, every, is_open):
    """On top of a recipe that says auto: the later word wins, also by its former name."""
    args = load_config(repo / "configs" / "pretrain_7b_cropping.yaml", [*words, "--deepspeed", "null"]).train
    assert (args.recomputed, args.recomputation_is_open) == (every, is_open)
    assert args.activation_checkpointing == (every is not None) == args.gradient_checkpointing


@pytest.mark.parametrize(
    "words, parts",
    [
        (["--activation_checkpointing", "some"], ("activation_checkpointing is 'some'", "every_N")),
        (["--activation_checkpointing", "every_0"], ("activation_checkpointing is 'every_0'", "every_4")),
        (["--activation_checkpointing", "every_n"], ("activation_checkpointing is 'every_n'", "auto")),
        (
            ["--activation_checkpointing_kwargs", '{"every_n_layers": 4}'],
            ("activation_checkpointing_kwargs.every_n_layers is 4", "'auto'", "every_4"),
        ),
    ],
)
def test_a_key_that_cannot_be(repo, words, parts):
    with refused(*parts):
        load_config(repo / "configs" / "pretrain_7b_cropping.yaml", [*words, "--deepspeed", "null"])
