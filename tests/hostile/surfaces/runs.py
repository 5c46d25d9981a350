"""Training: the keys of a run, a run of one step, and a run resumed after its second step."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file

from llava_sp.config.arguments import TrainArguments, load_config
from llava_sp.data.build import build_processor, dataset_of_config
from llava_sp.data.precompute import main as precompute
from llava_sp.train.__main__ import main
from llava_sp.train.preflight import check_inputs
from llava_sp.train.replay import main as replay
from tests.hostile.judge import LARGEST, MISSING, Spoilt, differences, plausible
from tests.hostile.mutations import Mutation
from tests.hostile.sandbox import contained
from tests.hostile.surfaces.base import REPO, Answer, Surface, plain, through_command
from tests.hostile.surfaces.data import samples, write_samples
from tests.train.runs import TINY

# Zero has a special meaning in these: nothing, never, or the first.
ZERO = {
    "adam_beta1", "adam_beta2", "adam_epsilon", "data_seed", "dataloader_num_workers", "gradient_accumulation_steps", "learning_rate",
    "lora_dropout", "max_grad_norm", "projector_lr", "seed", "validation_fraction", "warmup_steps", "weight_decay",
}  # fmt: skip
# As large as one likes: it never comes to that, or goes on until it is stopped.
LARGE = {"eval_steps", "logging_steps", "max_steps", "model_max_length", "save_steps", "save_total_limit"}
PATHS = {"data_path": "data.json", "image_folder": "images", "output_dir": "out"}


def write_run(folder: Path, **keys: Any) -> None:
    """A tiny run's configuration with its data, in a folder, to which its paths are relative."""
    write_samples(folder)
    (folder / "data.json").write_text(json.dumps(samples(), indent=1, ensure_ascii=False))
    for name in ("finetune_lora", "base"):
        shutil.copyfile(REPO / "configs" / f"{name}.yaml", folder / f"{name}.yaml")
    settings = {"base": "finetune_lora.yaml", **TINY, **PATHS, **keys}
    (folder / "run.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))


def other_settings(spoilt: Spoilt) -> bool:
    """The run has other settings than the sound one, all of which are plausible; what it computes follows from them."""
    before, after = (result["settings"] for result in (spoilt.sound, spoilt.now))
    found = list(differences(before, after))
    if spoilt.differences and all(new is MISSING for _, _, new in spoilt.differences):
        return (
            True  # keys that are left out, or cut off between two lines, have the value of the base, or their default
        )
    return bool(found) and all(_fits(*difference) for difference in found)


def _fits(path: tuple[Any, ...], old: Any, new: Any) -> bool:
    if new is None or new is MISSING:
        return True  # the schema says where null may be
    if old is MISSING:
        old = new
    if isinstance(new, float) and not math.isfinite(new):
        return False
    if isinstance(new, int) and not isinstance(new, bool) and path[-1] in ("seed", "data_seed"):
        return 0 <= new < 2**32
    if new == -1 and path[-1] == "max_steps":  # num_train_epochs counts
        return True
    if new == 0 and path[-1] in ZERO:
        return True
    if isinstance(old, list) and isinstance(new, str):  # one name for a list of them
        return bool(new.strip())
    if (
        path[-1] in LARGE and type(new) in (int, float) and (new > LARGEST or 0 < new < 1)
    ):  # below 1: a share of all steps
        return True
    return plausible(old, new)


def settings_of(run: Any) -> dict[str, Any]:
    arguments = {f.name: getattr(run.train, f.name, None) for f in fields(TrainArguments)}
    changing = ("logging_dir", "run_name", "distributed_state", "accelerator_config", "output_dir")
    return plain({**{k: v for k, v in arguments.items() if k not in changing}, **run.settings})


class ConfigSurface(Surface):
    """Every key that a run may have. Result: what it comes to."""

    name = "config"
    weight = 3.0
    rules = (("*", other_settings),)
    seconds = 20.0

    def build(self, folder: Path) -> None:
        write_run(folder)
        known = {f.name: f.default for f in fields(TrainArguments) if f.init and plain(f.default) == f.default}
        keys = yaml.safe_load((folder / "run.yaml").read_text())
        for key, default in known.items():
            if key not in keys and _accepted(folder, {**keys, key: default}):
                keys[key] = default
        (folder / "run.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))

    def targets(self, folder: Path) -> list[str]:
        return ["run.yaml"] * 4 + ["finetune_lora.yaml", "base.yaml"]

    def act(self, folder: Path, words: Sequence[str]) -> Answer:
        def read() -> dict[str, Any]:
            run = load_config(folder / "run.yaml")
            run.train.output_dir = "out"
            check_inputs(run)
            build_processor(run)
            return {"settings": settings_of(run)}

        return *through_command(read), None


def _accepted(folder: Path, keys: dict[str, Any]) -> bool:
    file = folder / "try.yaml"
    file.write_text(yaml.safe_dump(keys))
    try:
        load_config(file)
    except (ValueError, OSError, TypeError, ImportError):
        return False
    finally:
        file.unlink()
    return True


class RunSurface(Surface):
    """A run of one step. Result: its settings, its loss and a digest of what it trained."""

    name = "run"
    weight = 4.0
    rules = (("*", other_settings),)
    keys: dict[str, Any] = {"max_steps": 1, "save_steps": 1, "logging_steps": 1}  # noqa: RUF012

    def build(self, folder: Path) -> None:
        write_run(folder, **self.keys)
        (folder / "finetune_lora.yaml").write_text(_flattened(folder / "finetune_lora.yaml"))

    def targets(self, folder: Path) -> list[str]:
        return ["run.yaml"]

    def may_take_long(self, mutation: Mutation) -> bool:
        return "max_steps" in mutation.at

    def act(self, folder: Path, words: Sequence[str]) -> Answer:
        status = train(folder)
        return status, {"settings": recorded(folder), **trained(folder)} if status == 0 else None, None


def _flattened(file: Path) -> str:
    """The file with its bases in it."""
    keys = yaml.safe_load(file.read_text())
    base = keys.pop("base", None)
    return yaml.safe_dump({**(yaml.safe_load(_flattened(file.parent / base)) if base else {}), **keys})


def train(folder: Path) -> int:
    logging.getLogger("llava_sp").handlers.clear()
    return main(["--config", str(folder / "run.yaml")])


def recorded(folder: Path) -> dict[str, Any]:
    """The settings in run.yaml; nothing where another folder was named."""
    file = folder / "out" / "run.yaml"
    settings = yaml.safe_load(file.read_text()) if file.is_file() else {}
    settings.pop("provenance", None)
    return plain(settings)


def trained(folder: Path) -> dict[str, Any]:
    """Losses by step, and a digest of projector and LoRA."""
    out = folder / "out"
    files = [out / "projector.safetensors", out / "lora" / "adapter_model.safetensors"]
    digest = hashlib.sha256()
    for file in (file for file in files if file.is_file()):
        for name, tensor in sorted(load_file(file).items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    log = out / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    return {"losses": [line["loss"] for line in lines if "loss" in line], "weights": digest.hexdigest()}


class ResumeSurface(Surface):
    """A run that was stopped after step 2 of 4; the same command again. Result: a digest of what it trained in the end.

    Only the weights count, and they must be those of the run that was never stopped, to the bit.
    """

    name = "resume"
    weight = 4.0
    keys: dict[str, Any] = {"max_steps": 4, "save_steps": 1, "logging_steps": 1, "save_total_limit": None}  # noqa: RUF012

    def build(self, folder: Path) -> None:
        write_run(folder, **self.keys)
        code = _in_child(folder)
        assert code == 0, "the run that is to be resumed did not end well"
        self.whole = trained(folder)["weights"]
        kept = ("run.yaml", "log.jsonl", "checkpoint-1", "checkpoint-2")
        for entry in (folder / "out").iterdir():
            if entry.name not in kept:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def targets(self, folder: Path) -> list[str]:
        newest = [
            target for target in super().targets(folder) if target.startswith("out/") and "checkpoint-1" not in target
        ]
        return [*newest, *newest, *super().targets(folder / ".")]

    def act(self, folder: Path, words: Sequence[str]) -> Answer:
        status = train(folder)
        return status, trained(folder)["weights"] if status == 0 else None, None


class ReplaySurface(ResumeSurface):
    """The third step of that run again, alone. Result: its table."""

    name = "replay"
    weight = 1.0

    def targets(self, folder: Path) -> list[str]:
        return [target for target in super().targets(folder) if target.startswith("out/")]

    def act(self, folder: Path, words: Sequence[str]) -> Answer:
        with contextlib.redirect_stdout(io.StringIO()) as table:
            status = replay(["--run", str(folder / "out"), "--step", "3"])
        return status, table.getvalue().replace(str(folder), "") if status == 0 else None, None


def _in_child(folder: Path) -> int | None:
    return contained(lambda: (train(folder), None, None), folder, 120).status


class FeaturesSurface(Surface):
    """A folder of patch features, one image to a shard. Result: a digest of those of every sample."""

    name = "features"

    def build(self, folder: Path) -> None:
        write_run(folder, precompute_features="features")
        command = ["--config", "run.yaml", "--workers", "0", "--images-per-shard", "1"]
        assert contained(lambda: (precompute(command), None, None), folder, 120).status == 0

    def targets(self, folder: Path) -> list[str]:
        return sorted(str(file.relative_to(folder)) for file in (folder / "features").glob("features*"))

    def act(self, folder: Path, words: Sequence[str]) -> Answer:
        def digests() -> list[str]:
            dataset = dataset_of_config("run.yaml")
            samples = (dataset[index] for index in range(len(dataset)))
            return [hashlib.sha256(sample["patch_features"].numpy().tobytes()).hexdigest() for sample in samples]

        return *through_command(digests), None


SURFACES: list[Surface] = [ConfigSurface(), RunSurface(), ResumeSurface(), ReplaySurface(), FeaturesSurface()]
