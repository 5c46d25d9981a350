"""Training on packs is training on padded batches: losses, gradients, steps, checkpoints; and what cannot pack is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llava_sp.common.processes import Processes
from llava_sp.config.arguments import load_config
from llava_sp.data.build import build_datasets, build_processor
from llava_sp.data.collator import Collator
from llava_sp.model.packed_attention import KEEP_APART, PER_SAMPLE
from llava_sp.model.processing_llava_sp import IGNORE_INDEX
from llava_sp.train.__main__ import main
from llava_sp.train.build import build_model
from llava_sp.train.packing import plan_packs
from llava_sp.train.replay import main as replay
from llava_sp.train.trainer import LlavaSPTrainer
from tests.messages import names, refused
from tests.train.conftest import no_launcher
from tests.train.runs import GOLDEN, config, finish, log, losses, run_here, start

TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "llava_sp.train"]
WORDS = ["a", "kite", "and", "two", "dogs", "near", "the", "old", "wooden", "table", "under", "some", "red", "lamps"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    """Records of no, one and two images, of 40 to 1300 tokens."""
    folder = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    for name in "abc":
        Image.fromarray(draw.integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    made = []
    for index, images in enumerate([["a.png"], [], ["b.png", "c.png"], [], ["c.png"], [], ["a.png"], [], []]):
        answer = " ".join(draw.choice(WORDS, 3 + 7 * index))
        turns = [
            {"from": "human", "value": "<image>\n" * len(images) + "What is there?"},
            {"from": "gpt", "value": answer},
        ]
        made.append({"id": str(index), **({"image": images} if images else {}), "conversations": turns})
    (folder / "data.json").write_text(json.dumps(made))
    return {"data_path": str(folder / "data.json"), "image_folder": str(folder)}


PACKED = {"packing": True, "global_batch_size": 4, "pack_length": 1400}
PADDED = {"packing": False, "global_batch_size": 4, "per_device_train_batch_size": 4}


def built(folder: Path, data: dict, **settings):
    """Model and data of a run, before its trainer."""
    run = load_config(config(folder, **{**data, **PACKED, "lora_r": 4, **settings}))
    torch.manual_seed(0)
    model = build_model(run)
    for name, parameter in model.named_parameters():  # LoRA's B begins at 0
        if parameter.requires_grad and "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model, build_datasets(build_processor(run), run)[0]


def token_losses(model, batch: dict) -> torch.Tensor:
    """Of each learned token, row by row."""
    with torch.no_grad():
        logits = model(**batch, logits_to_keep=0).logits[:, :-1].float()
    targets = batch["labels"][:, 1:]
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")[targets != IGNORE_INDEX]


def gradients(model, batch: dict) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def assert_alike(ours: torch.Tensor, theirs: torch.Tensor, what: str = "") -> None:
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max() + 1e-9, what


MIXED, TEXT, MANY, ONE = (0, 1, 4), (1, 3), (2, 3, 0), (2,)


@pytest.mark.parametrize(
    "settings, indices",
    [
        ({"spatial_variant": "cropping"}, MIXED),
        ({"spatial_variant": "cropping"}, TEXT),
        ({"spatial_variant": "cropping"}, MANY),
        ({"spatial_variant": "cropping"}, ONE),
        ({"spatial_variant": "pooling"}, MIXED),
        ({"spatial_variant": "none"}, MIXED),
        ({"spatial_variant": "cropping", "attn_implementation": "sdpa"}, MIXED),
        ({"spatial_variant": "cropping", "attn_implementation": "eager"}, MIXED),
        ({"spatial_variant": "cropping", "recompute": True}, MIXED),
        ({"spatial_variant": "cropping", "stage": "pretrain", "conversation_template": "vicuna_v1"}, MIXED),
    ],
    ids=str,
)
def test_losses_and_gradients_are_those_of_the_padded_batch(tmp_path, data, settings, indices):
    """With `use_cache` left on in the language model's configuration, as Trainer leaves it."""
    settings = dict(settings)
    recompute = settings.pop("recompute", False)
    model, dataset = built(tmp_path, data, **settings)
    chosen = settings.get("attn_implementation", PER_SAMPLE)
    assert model.model.language_model.config._attn_implementation == chosen
    assert model.model.vision_tower.config._attn_implementation in ("sdpa", "eager")
    model.config.use_cache, model.config.text_config.use_cache = False, True
    model.train()
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    collate = Collator(dataset.processor.pad_token_id, pad_to_multiple_of=8)
    samples = [dataset[index] for index in indices]
    packed, padded = collate([samples]), collate(samples)
    assert packed["input_ids"].shape[0] == 1 and "attention_mask" not in packed
    assert_alike(token_losses(model, packed), token_losses(model, padded))
    ours, theirs = gradients(model, packed), gradients(model, padded)
    assert ours.keys() == theirs.keys() and len(ours) > 5
    scale = max(gradient.abs().max() for gradient in theirs.values())
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).abs().max() <= 1e-5 * max(gradient.abs().max(), 1e-2 * scale), name


@pytest.mark.slow  # compiles for a minute
def test_flex_attention_keeps_samples_apart(tmp_path, data):
    """Forward only: torch cannot train with it on a CPU."""
    model, dataset = built(tmp_path, data)
    model.model.language_model.set_attn_implementation("flex_attention")
    collate = Collator(dataset.processor.pad_token_id)
    model.config.text_config.use_cache = True
    with torch.no_grad():
        model.requires_grad_(False)
        short = [dataset[index] for index in (1, 3)]
        assert_alike(token_losses(model, collate([short])), token_losses(model, collate(short)))


@pytest.mark.parametrize("attention", ["sdpa", PER_SAMPLE, "eager"])
@pytest.mark.parametrize("use_cache", [True, False, None])
def test_a_sample_does_not_change_the_next_one(tmp_path, data, attention, use_cache):
    """Whatever the configuration and the call say of a cache, with labels or without."""
    model, _ = built(tmp_path, data, attn_implementation=attention)
    model.config.text_config.use_cache = True
    positions = torch.cat([torch.arange(9), torch.arange(6)])[None]
    last = torch.arange(40, 46)
    seen = []
    for first in (torch.arange(9) + 5, torch.arange(9) + 60):
        ids = torch.cat([first, last])[None]
        with torch.no_grad():
            output = model(
                input_ids=ids, position_ids=positions, use_cache=use_cache, logits_to_keep=6, output_hidden_states=True
            )
        seen.append(output.hidden_states[-1][0, 9:])
        assert output.past_key_values is None
    alone = model(input_ids=last[None], output_hidden_states=True).hidden_states[-1][0]
    assert torch.equal(*seen)
    assert_alike(seen[0], alone)


# ---- runs


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """A packed run of two epochs and a bit, of 9 samples in steps of 4, saved after each step; dropout on."""
    folder = tmp_path_factory.mktemp("runs")
    with no_launcher():
        run_here(folder, **{**data, **PACKED, "max_steps": 7, "lora_dropout": 0.1, "save_total_limit": None})
    return folder


def test_steps_are_those_of_the_padded_run(tmp_path, data):
    """Same samples in each step, so the same losses and norms; also of the last, short step."""
    ours = run_here(tmp_path / "packed", **{**data, **PACKED, "max_steps": 3, "dataloader_num_workers": 1})
    order = epoch_order(tmp_path / "packed", data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlavaSPTrainer, "_get_train_sampler", lambda *_: InOrder(order))
        theirs = run_here(tmp_path / "padded", **{**data, **PADDED, "max_steps": 3})
    for step in (1, 2, 3):
        one, other = ({r["step"]: r for r in records if "loss" in r}[step] for records in (ours, theirs))
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert one["num_input_tokens_seen"] == other["num_input_tokens_seen"]


class InOrder(torch.utils.data.Sampler):
    def __init__(self, order):
        self.order = order

    def __iter__(self):
        return iter(self.order)

    def __len__(self):
        return len(self.order)


def epoch_order(folder: Path, data: dict) -> list[int]:
    """The samples of the first epoch's steps."""
    run = load_config(config(folder, **{**data, **PACKED, "max_steps": 3}))
    packs = plan_packs(run, build_datasets(build_processor(run), run)[0], Processes())
    return [int(index) for step in packs.steps(0) for index in step]


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_resumed_run_is_bit_equal(whole, tmp_path, step):
    out = tmp_path / "out"
    shutil.copytree(whole / "out", out)
    for gone in ("finished.json", "llava_sp.json"):
        (out / gone).unlink()
    for later in range(step + 1, 8):
        shutil.rmtree(out / f"checkpoint-{later}")
    assert main(["--config", str(whole / "run.yaml"), "--output_dir", str(out)]) == 0
    assert losses(log(out)) == losses(log(whole / "out")) and len(losses(log(out))) == 7
    for name in ("projector.safetensors", "lora/adapter_model.safetensors"):
        assert (out / name).read_bytes() == (whole / "out" / name).read_bytes()


def test_a_step_is_replayed(whole, capsys):
    """Without dropout, which the run had: its samples, and the loss at a rate of 0 before the first step."""
    assert replay(["--run", str(whole / "out"), "--step", "1", "--lora_dropout", "0"]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) == 2 + 4 + 1
    first = next(record for record in log(whole / "out") if record["step"] == 1)
    assert float(text.splitlines()[-1].split()[0]) == pytest.approx(first["loss"], rel=1e-3)


def test_the_log_says_what_the_packs_are(data, tmp_path, caplog):
    run_here(tmp_path, **{**data, **PACKED, "max_steps": 1})
    assert names(
        caplog.text, "9 samples", "1 steps", "4 per step", "Packing", "packs per step", "padding", "1,400", "wait"
    )


def test_bad_samples_are_left_out_and_listed(data, tmp_path):
    records = json.loads(Path(data["data_path"]).read_text())
    records[1]["conversations"] = []
    records[4]["image"] = ["none.png"]
    (tmp_path / "data.json").write_text(json.dumps(records))
    own = {**data, "data_path": str(tmp_path / "data.json"), "on_bad_sample": "skip", "max_steps": 3}
    finished = run_here(tmp_path, **{**own, **PACKED})
    assert len(losses(finished)) == 3
    listed = [json.loads(line) for line in (tmp_path / "out" / "skipped_train.jsonl").read_text().splitlines()]
    assert sorted((entry["kind"], entry["index"]) for entry in listed) == [("skipped", 1), ("skipped", 4)]


@pytest.mark.parametrize("keep", [1, 2])
def test_one_sample_and_only_text(data, tmp_path, keep):
    records = [record for record in json.loads(Path(data["data_path"]).read_text()) if "image" not in record][:keep]
    (tmp_path / "data.json").write_text(json.dumps(records))
    own = {**data, "data_path": str(tmp_path / "data.json"), "max_steps": 2}
    assert len(losses(run_here(tmp_path, **{**own, **PACKED}))) == 2


def test_validation_is_padded_and_the_same(data, tmp_path):
    """The model of a packed run sees padded rows too."""
    own = {**data, "validation_fraction": 0.4, "max_steps": 1, "per_device_eval_batch_size": 3}
    one = run_here(tmp_path / "packed", **{**own, **PACKED, "learning_rate": 0.0, "projector_lr": 0.0})
    other = run_here(tmp_path / "padded", **{**own, **PADDED, "learning_rate": 0.0, "projector_lr": 0.0})
    found = [next(r["eval_loss"] for r in records if "eval_loss" in r) for records in (one, other)]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


# ---- what is refused


def error_of(tmp_path, capsys, settings: dict) -> str:
    assert main(["--config", str(config(tmp_path, **settings))]) == 2
    return capsys.readouterr().err


def test_a_pack_shorter_than_the_longest_sample(data, tmp_path, capsys):
    error = error_of(tmp_path, capsys, {**data, **PACKED, "pack_length": 300})
    assert names(error, "pack_length = 300", data["data_path"], "record 2", "model_max_length", 2048)


def test_bad_records_are_found_before_the_model_is_loaded(data, tmp_path, capsys):
    (tmp_path / "data.json").write_text(json.dumps([{"conversations": []}] * 3))
    own = {**data, **PACKED, "data_path": str(tmp_path / "data.json")}
    assert names(error_of(tmp_path, capsys, own), tmp_path / "data.json", "record 0", "conversations")
    error = error_of(tmp_path, capsys, {**own, "on_bad_sample": "skip"})
    assert names(error, "3 bad samples", "skipped_train.jsonl")


@pytest.mark.parametrize(
    "settings, parts",
    [
        ({"group_by_modality_length": True}, ["group_by_modality_length", "packing"]),
        ({"per_device_train_batch_size": 4}, ["per_device_train_batch_size", 4, "pack_length", "packing"]),
        ({"global_batch_size": None}, ["packing", "global_batch_size"]),
        ({"attn_implementation": "paged|eager"}, ["attn_implementation", "paged|eager", "packing", *KEEP_APART]),
        ({"attn_implementation": "flex_attention"}, ["attn_implementation", "flex_attention", "CPU"]),
        ({"packing": False, "pack_length": 64}, ["pack_length", 64, "packing"]),
        ({"pack_length": 0}, ["pack_length", 0]),
        ({"pad_to_multiple_of": 0}, ["pad_to_multiple_of", 0]),
    ],
    ids=str,
)
def test_conflicts_are_refused_by_name(data, tmp_path, settings, parts):
    path = config(tmp_path, **{**data, **PACKED, **settings})
    with refused(path, *parts):
        load_config(path)


def test_attention_that_does_not_keep_samples_apart_is_found_out(data, tmp_path, capsys):
    """Proved on the model before the first step, whatever its name promises."""

    def blind(module, query, key, value, attention_mask, **kwargs):
        return sdpa_attention_forward(module, query, key, value, None, **kwargs)

    was = AttentionInterface()[PER_SAMPLE]
    AttentionInterface.register(PER_SAMPLE, blind)
    try:
        error = error_of(tmp_path, capsys, {**data, **PACKED, "max_steps": 1})
    finally:
        AttentionInterface.register(PER_SAMPLE, was)
    assert names(error, "packing", PER_SAMPLE, "LlamaModel", "apart")


# ---- two processes


def two(folder: Path, **settings) -> tuple[dict[int, float], str]:
    path = config(folder, **settings)
    text = finish(start([*TWO, "--config", str(path)], folder), folder)
    return losses(log(folder / "out")), text


def test_two_processes(data, tmp_path):
    """9 samples in steps of 3 by two processes; a pack of a step may be empty."""
    settings = {**data, **PACKED, "global_batch_size": 3, "max_steps": 4, "save_steps": 4}
    one = losses(run_here(tmp_path / "one", **settings))
    both, text = two(tmp_path / "two", **settings)
    assert both == pytest.approx(one, rel=1e-5) and "2 processes x" in text


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("recompute", [False, True])
def test_deepspeed(data, tmp_path, stage, recompute):
    pytest.importorskip("deepspeed")
    settings = {**data, **PACKED, "max_steps": 4, "save_steps": 4, "global_batch_size": 3}
    one = losses(run_here(tmp_path / "one", **settings))
    deepspeed = str(GOLDEN.parents[1] / "configs" / "deepspeed" / f"zero{stage}.json")
    both, _ = two(tmp_path / "two", **settings, deepspeed=deepspeed, gradient_checkpointing=recompute)
    assert both == pytest.approx(one, rel=1e-4)
