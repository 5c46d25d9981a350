"""A run that starts from a trained LLaVA-1.5: what is kept is what is there at step 0, and the run can be opened."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer

from llava_sp import LlavaSPForCausalLM
from llava_sp.checkpoints.opening.adapter import save_adapter
from llava_sp.data.build import dataset_of_config
from tests.checkpoints.kinds import llava_15, write_original, write_ours
from tests.released import load_released, released_folder
from tests.train.runs import GOLDEN, config, run_here


def test_lora_and_patch_mlp_are_kept(tmp_path):
    """At rate 0 the trained checkpoint holds what the warm start gave."""
    start = released_folder(GOLDEN, "pooling")
    run_here(tmp_path, warm_start=str(start), spatial_width=3, max_steps=1, learning_rate=0.0, projector_lr=0.0)
    trained = LlavaSPForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    kept = [name for name in trained if ".lora_" in name or ".linear_1." in name or ".linear_2." in name]
    original = load_released(GOLDEN, "pooling").state_dict()
    assert len(kept) == 42 + 4
    for name in kept:
        assert torch.equal(trained[name], original[name]), name
    assert LlavaSPForCausalLM.from_pretrained(tmp_path / "out").config.spatial_variant == "cropping"


@pytest.mark.parametrize("format", ["original", "ours"])
def test_a_full_llava_is_the_language_model(tmp_path, golden, format):
    if format == "ours":
        write_ours(tmp_path / "llava", llava_15(golden))
    else:
        write_original(tmp_path / "llava", llava_15(golden), golden, tower=False, beside=False)
    run_here(tmp_path, warm_start=str(tmp_path / "llava"), max_steps=1, language_model=None)
    saved = json.loads((tmp_path / "out/config.json").read_text())
    assert saved["language_model_name_or_path"] == str(tmp_path / "llava")


def test_preview_and_check_read_what_training_reads(tmp_path, golden):
    """The tokenizer is the one within the warm start, also where a language model is named beside it."""
    write_original(tmp_path / "llava", llava_15(golden), golden, tower=False, beside=False)
    tokenizer = AutoTokenizer.from_pretrained(golden / "base")
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(tmp_path / "llava")
    for named in (str(golden / "base"), None):
        path = config(tmp_path / "run", warm_start=str(tmp_path / "llava"), language_model=named)
        assert dataset_of_config(path).processor.image_token_id == 1002
    assert (
        dataset_of_config(
            path, ["--warm_start", "null", "--language_model", str(golden / "base")]
        ).processor.image_token_id
        == 1000
    )
    with pytest.raises(OSError, match="no folder .*nowhere"):
        dataset_of_config(path, ["--warm_start", str(tmp_path / "nowhere")])


def test_what_does_not_go_together(tmp_path, monkeypatch):
    start = str(released_folder(GOLDEN, "pooling"))
    with pytest.raises(ValueError, match=r"r 8 and alpha 16; this run has r 4 and alpha 16. Set lora_r"):
        run_here(tmp_path / "1", warm_start=start, lora_r=4)
    save_adapter(load_released(GOLDEN, "pooling"), None, tmp_path / "ours")
    settings = json.loads((tmp_path / "ours/config.json").read_text())
    (tmp_path / "ours/config.json").write_text(
        json.dumps(settings | {"language_model_fingerprint": "0123456789abcdef"})
    )
    with pytest.raises(ValueError, match="trained on a language model with the fingerprint .* these are other weights"):
        run_here(tmp_path / "4", warm_start=str(tmp_path / "ours"))
    run_here(tmp_path / "5", warm_start=str(tmp_path / "ours"), check_base=False, spatial_width=3, max_steps=1)
    monkeypatch.setattr("llava_sp.train.run.build_model", lambda *_: pytest.fail("a model was built"))
    with pytest.raises(ValueError, match="has LoRA, which the stage pretrain does not train: merge it first"):
        run_here(tmp_path / "2", "pretrain", warm_start=start)
    with pytest.raises(ValueError, match="warm_start = .*nowhere does not exist"):
        run_here(tmp_path / "3", warm_start=str(tmp_path / "nowhere"))
    shutil.rmtree(tmp_path)
