"""Merging LoRA: the full checkpoint is the same model, is proven to be, and never half there."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear
from safetensors import SafetensorError
from safetensors.torch import load_file

from llava_sp import LlavaSPForCausalLM, LlavaSPProcessor
from llava_sp.checkpoints.merge import main
from llava_sp.checkpoints.opening.adapter import save_adapter
from llava_sp.checkpoints.reading.fingerprint import checkpoint_hash
from llava_sp.checkpoints.writing.merging import lora_layers, merge_layers
from llava_sp.checkpoints.writing.merging import merge as merge_adapter
from llava_sp.checkpoints.writing.proof import proof_sample, text_logits
from llava_sp.common.folders import new_folder
from tests.checkpoints.test_adapter import add_lora, assemble
from tests.released import LAYOUTS


@pytest.fixture(scope="module")
def adapter(golden, tmp_path_factory):
    """A checkpoint with LoRA, in float32."""
    torch.manual_seed(0)
    model = assemble(golden)
    add_lora(model)
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    save_adapter(model, LlavaSPProcessor.from_backbones(model.config), folder)
    return folder


@pytest.fixture(scope="module")
def merged(adapter, tmp_path_factory):
    """It merged: dtype -> (folder, record)."""
    folder = tmp_path_factory.mktemp("merged")
    return {
        name: (folder / name, merge_adapter(adapter, folder / name, dtype=name)) for name in ("float32", "bfloat16")
    }


def greedy(model, sample) -> torch.Tensor:
    return model.generate(**sample, max_new_tokens=20, min_new_tokens=20, do_sample=False)


@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 1e-5), ("bfloat16", 0.04)])
def test_the_merged_model_is_the_unmerged_one(adapter, merged, dtype, allowed):
    folder, record = merged[dtype]
    unmerged = LlavaSPForCausalLM.from_pretrained(adapter, dtype=dtype)
    opened, info = LlavaSPForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not lora_layers(opened)
    assert {parameter.dtype for parameter in opened.parameters()} == {getattr(torch, dtype)}
    sample = proof_sample(LlavaSPProcessor.from_pretrained(folder))
    before, after = text_logits(unmerged, sample), text_logits(opened, sample)
    words = slice(0, opened.config.image_token_id)
    difference = (before - after)[:, words].abs().max() / before[:, words].abs().max()
    assert difference <= allowed
    assert record["proof"]["logits"]["largest_relative_difference"] == pytest.approx(difference.item(), rel=1e-3)
    unmerged.disable_adapters()  # LoRA changes the answers by far more than what is allowed
    assert (before - text_logits(unmerged, sample))[:, words].abs().max() / before[:, words].abs().max() > 5 * allowed


def test_it_generates_the_same(adapter, merged):
    folder, _ = merged["float32"]
    sample = proof_sample(LlavaSPProcessor.from_pretrained(folder))
    unmerged, opened = (LlavaSPForCausalLM.from_pretrained(path) for path in (adapter, folder))
    assert torch.equal(greedy(unmerged, sample), greedy(opened, sample))
    assert opened.generation_config.to_diff_dict() == unmerged.generation_config.to_diff_dict()


def test_weights_are_rounded_once(adapter, merged):
    """PEFT by itself rounds LoRA's product to bfloat16 and then the sum."""
    unmerged = LlavaSPForCausalLM.from_pretrained(adapter, dtype="bfloat16")
    weights = LlavaSPForCausalLM.from_pretrained(merged["bfloat16"][0]).state_dict()
    errors = {"ours": 0.0, "PEFT's": 0.0}
    for name, layer in lora_layers(unmerged).items():
        weight, product = (
            layer.get_base_layer().weight.double(),
            layer.scaling["default"]
            * (layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()),
        )
        exact = weight + product
        ours = weights[f"{name}.weight"]
        assert (ours - exact).abs().le(exact.abs() * 2**-8 * 1.001).all()  # half a step at most
        layer.merge()
        errors["ours"] += (ours - exact).square().sum().item()
        errors["PEFT's"] += (layer.get_base_layer().weight - exact).square().sum().item()
    assert errors["ours"] < 0.9 * errors["PEFT's"]


def test_the_record_says_what_was_merged(adapter, merged):
    folder, record = merged["bfloat16"]
    assert json.loads((folder / "merged.json").read_text()) == record
    config = LlavaSPForCausalLM.config_class.from_pretrained(adapter)
    assert record["adapter"] == {"path": str(adapter.resolve()), "hash": checkpoint_hash(adapter)}
    assert record["language_model"]["fingerprint"] == config.language_model_fingerprint
    assert record["vision_tower"]["fingerprint"] == config.vision_tower_fingerprint
    lora = {"layers": 6, "r": 4, "alpha": 8, "rslora": False, "targets": ["q_proj", "v_proj"]}
    assert record["lora"] == lora and record["dtype"] == "bfloat16"
    assert record["weights"]["fingerprint"] == checkpoint_hash(folder)
    proof = record["proof"]
    assert proof["logits"]["tokens"] > 40 and proof["layers"]["found"] == 6
    assert 0.99 < proof["layers"]["least_share"] <= proof["layers"]["largest_share"] < 1.01


def test_shards(adapter, merged, tmp_path):
    record = merge_adapter(adapter, tmp_path / "shards", max_shard_size="500KB")
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 5 and record["weights"]["files"] == {file.name: file.stat().st_size for file in files}
    shards = {name: tensor for file in files for name, tensor in load_file(file).items()}
    whole = load_file(merged["float32"][0] / "model.safetensors")
    assert shards.keys() == whole.keys() and all(torch.equal(shards[name], whole[name]) for name in whole)
    with pytest.raises(ValueError, match="max_shard_size is '5 gigs'; give a number and KB, MB, GB or TB"):
        merge_adapter(adapter, tmp_path / "other", max_shard_size="5 gigs")


def test_a_checkpoint_without_its_processor_gets_one(golden, adapter, tmp_path):
    LlavaSPForCausalLM.from_pretrained(adapter).save_pretrained(tmp_path / "bare")
    assert not (tmp_path / "bare/processor_config.json").exists()
    merge_adapter(tmp_path / "bare", tmp_path / "out")
    ours, theirs = LlavaSPProcessor.from_pretrained(tmp_path / "out"), LlavaSPProcessor.from_pretrained(adapter)
    assert torch.equal(proof_sample(ours)["input_ids"], proof_sample(theirs)["input_ids"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_released_lora(golden, tmp_path, layout):
    """A folder of the original code, whose recorded base is a path on its authors' machine."""
    bases = {"language_model": golden / "base", "vision_tower": golden / "clip"}
    released = golden / f"checkpoint_{layout}/lora"
    record = merge_adapter(released, tmp_path / "out", dtype="float32", **bases)
    assert record["lora"]["layers"] == 21 and record["lora"]["r"] == 8 and record["lora"]["alpha"] == 16
    assert record["adapter"]["hash"] == checkpoint_hash(released)
    unmerged = LlavaSPForCausalLM.from_pretrained(released, dtype="float32", **bases)
    sample = proof_sample(LlavaSPProcessor.from_pretrained(tmp_path / "out"))
    theirs = proof_sample(LlavaSPProcessor.from_pretrained(released, **bases))
    assert all(torch.equal(sample[name], theirs[name]) for name in theirs)
    merged = LlavaSPForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(text_logits(merged, sample), text_logits(unmerged, sample), atol=1e-4, rtol=1e-5)
    assert torch.equal(greedy(merged, sample), greedy(unmerged, sample))


# ---- refused


def test_a_merged_checkpoint_is_not_merged_again(adapter, merged, tmp_path):
    folder, record = merged["float32"]
    with pytest.raises(
        ValueError, match=rf"is merged already, from {adapter} \({record['adapter']['hash']}\) into .*base"
    ):
        merge_adapter(folder, tmp_path / "again")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "merged.json has no adapter, language_model, date"),
        ('{"adapter": 3}', "merged.json has no language_model, date"),
        ("{", "merged.json is not valid JSON"),
        ("[]", r"merged.json is \[\]; expected an object"),
    ],
)
def test_a_broken_record_is_named(adapter, merged, tmp_path, content, message):
    shutil.copytree(merged["float32"][0], tmp_path / "merged")
    (tmp_path / "merged/merged.json").write_text(content)
    for source, target in ((tmp_path / "merged", tmp_path / "again"), (adapter, tmp_path / "merged")):
        with pytest.raises(ValueError, match=message):
            merge_adapter(source, target)


def test_a_full_checkpoint_has_nothing_to_merge(golden, tmp_path):
    assemble(golden).save_pretrained(tmp_path / "full")
    with pytest.raises(ValueError, match=r"full \(LLaVA-SP, full checkpoint\) has no LoRA apart from its weights"):
        merge_adapter(tmp_path / "full", tmp_path / "out")


def test_a_first_stage_has_nothing_to_merge(golden, tmp_path):
    save_adapter(assemble(golden), None, tmp_path / "stage1")
    with pytest.raises(ValueError, match="stage1 .* has no LoRA .* nothing to merge"):
        merge_adapter(tmp_path / "stage1", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["stage1"]


def test_where_it_must_not_go(golden, adapter, merged, tmp_path):
    with pytest.raises(ValueError, match="holds a model merged from .*: choose a new folder"):
        merge_adapter(adapter, merged["float32"][0])
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("")
    with pytest.raises(ValueError, match="full holds files: choose a new folder"):
        merge_adapter(adapter, tmp_path / "full")
    with pytest.raises(ValueError, match=r"thesis.tex is a file"):
        merge_adapter(adapter, tmp_path / "full/thesis.tex")
    for source in (adapter, golden / "base", golden / "clip"):
        with pytest.raises(ValueError, match=f"is inside {source}, which is read"):
            merge_adapter(adapter, source / "merged")
        assert not (source / "merged").exists()
    being_written = pytest.raises(ValueError, match=r"\.out\.part is being written by another command")
    with new_folder(tmp_path / "out", 0), being_written:
        merge_adapter(adapter, tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="there is no folder ./nowhere"):
        merge_adapter("./nowhere", tmp_path / "out")


def test_what_a_killed_merge_left_is_removed(adapter, tmp_path):
    (tmp_path / ".out.part/deep").mkdir(parents=True)
    (tmp_path / ".out.part/deep/model.safetensors").write_bytes(b"half")
    merge_adapter(adapter, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not list((tmp_path / "out").glob(".*"))


def test_an_empty_folder_and_missing_parents_are_fine(adapter, tmp_path):
    (tmp_path / "empty").mkdir()
    merge_adapter(adapter, tmp_path / "empty")
    merge_adapter(adapter, tmp_path / "a/b/c")
    assert (tmp_path / "empty/merged.json").is_file() and (tmp_path / "a/b/c/merged.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "empty"]


# ---- a wrong merge is caught


def scaled(factor: float, first_only: bool = False):
    """PEFT's `get_delta_weight` with LoRA's product times `factor`, in all layers or in the first."""
    right, calls = LoraLinear.get_delta_weight, itertools.count()

    def wrong(self, name):
        return right(self, name) * (factor if next(calls) == 0 or not first_only else 1)

    return wrong


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("factor", "first_only"), [(0.0, False), (2.0, False), (-1.0, False), (1.1, True), (0.0, True)]
)
def test_a_wrong_merge_is_caught(adapter, tmp_path, monkeypatch, dtype, factor, first_only):
    monkeypatch.setattr(LoraLinear, "get_delta_weight", scaled(factor, first_only))
    with pytest.raises(ValueError, match="is not the unmerged one: its logits differ|of LoRA is in the merged weight"):
        merge_adapter(adapter, tmp_path / "out", dtype=dtype)
    assert not any(tmp_path.iterdir())


def test_in_16_bit_a_layer_that_logits_do_not_show(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(LoraLinear, "get_delta_weight", scaled(1.05, first_only=True))
    with pytest.raises(
        ValueError, match=r"layers.0.self_attn.q_proj: 1.05\d of LoRA is in the merged weight; 1 is expected"
    ):
        merge_adapter(adapter, tmp_path / "out", dtype="bfloat16")
    assert not any(tmp_path.iterdir())


def test_weights_that_were_written_wrong_are_caught(adapter, tmp_path, monkeypatch):
    """What counts is what stands on the disk: here another weight than LoRA's goes wrong while it is saved."""
    save = LlavaSPForCausalLM.save_pretrained

    def spoilt(self, folder, **kwargs):
        self.model.language_model.layers[1].mlp.up_proj.weight.mul_(1.01)
        save(self, folder, **kwargs)

    monkeypatch.setattr(LlavaSPForCausalLM, "save_pretrained", torch.inference_mode()(spoilt))
    with pytest.raises(ValueError, match=r"its logits differ by .* float32 allows 0.0001; nothing was written"):
        merge_adapter(adapter, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_small_lora_in_16_bit_is_counted_not_claimed(golden, tmp_path):
    """LoRA far below the rounding of bfloat16 cannot be found again there, in float32 it can."""
    model = assemble(golden)
    add_lora(model)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.mul_(1e-5)
    save_adapter(model, LlavaSPProcessor.from_backbones(model.config), tmp_path / "small")
    found = {
        dtype: merge_adapter(tmp_path / "small", tmp_path / dtype, dtype=dtype)["proof"]["layers"]
        for dtype in ("bfloat16", "float32")
    }
    assert found["bfloat16"] == {"found": 0, "below_rounding": 6, "least_share": None, "largest_share": None}
    assert found["float32"]["found"] == 6


def test_a_weight_too_large_for_the_type_is_named(adapter):
    model = LlavaSPForCausalLM.from_pretrained(adapter, dtype="float16")
    layer = lora_layers(model)["model.language_model.layers.2.self_attn.v_proj"]
    layer.lora_A["default"].weight.data.fill_(1)
    layer.lora_B["default"].weight.data.fill_(6e4)
    with pytest.raises(
        ValueError, match=r"layers.2.self_attn.v_proj: the merged weight holds NaN or infinity in float16"
    ):
        merge_layers(model)


# ---- memory, and nothing half there


def test_the_first_model_is_gone_before_the_second_is_opened(adapter, tmp_path, monkeypatch):
    opened, alive = [], []

    def watched(model, sample):
        alive.append([first() is not None for first in opened])
        opened.append(weakref.ref(model))
        return text_logits(model, sample)

    for module in ("merging", "proof"):
        monkeypatch.setattr(f"llava_sp.checkpoints.writing.{module}.text_logits", watched)
    merge_adapter(adapter, tmp_path / "out")
    assert alive == [[], [False]]


def test_too_small_a_disk_is_known_before(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**20))
    with pytest.raises(OSError, match=r"out needs 4.1 MiB, but .* has 1.0 MiB free"):
        merge_adapter(adapter, tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("failure", "seen"),
    [
        (SafetensorError("No space left on device"), OSError),
        (OSError(28, "No space left on device"), OSError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_failure_on_the_way_leaves_nothing(adapter, tmp_path, monkeypatch, failure, seen):
    save = LlavaSPForCausalLM.save_pretrained

    def failing(self, folder, **kwargs):
        save(self, folder, **kwargs)
        raise failure

    monkeypatch.setattr(LlavaSPForCausalLM, "save_pretrained", failing)
    with pytest.raises(seen, match="No space left" if seen is OSError else None):
        merge_adapter(adapter, tmp_path / "a/out")
    assert not any(tmp_path.iterdir())


# ---- the command


def test_the_command(adapter, tmp_path, repo):
    command = [
        sys.executable,
        "-m",
        "llava_sp.checkpoints.merge",
        adapter,
        "--to",
        tmp_path / "out",
        "--dtype",
        "float16",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=repo)
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert "merged  6 layers, r 4, alpha 8: q_proj, v_proj" in said and "layers  6 hold" in said
    assert f"done    {tmp_path / 'out'}: 2.1 MiB in 1 files" in said
    assert LlavaSPForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{merged}", "--to", "{new}"], "{merged} is merged already, from {adapter}"),
        (["{adapter}", "--to", "{merged}"], "{merged} holds a model merged from {adapter}"),
        (
            ["{adapter}", "--to", "{new}", "--language-model", "/no/base"],
            "language model passed as language_model, /no/base, is",
        ),
        (["/nowhere/at/all", "--to", "{new}"], "there is no folder /nowhere/at/all"),
    ],
)
def test_errors_are_one_line(adapter, merged, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("signal.signal", lambda *_: None)
    places = {"adapter": adapter, "merged": merged["float32"][0], "new": tmp_path / "new"}
    assert main([argument.format(**places) for argument in arguments]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(said) == 1 and message.format(**places) in said[0]
    assert not any(tmp_path.iterdir())
