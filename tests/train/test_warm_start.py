"""A run that starts from a trained LLaVA-1.5: what is kept is what is there at step 0, and the run can be opened."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from llava_sp import LlavaSPForCausalLM
from llava_sp.train.config_files import UsageError
from tests.checkpoints.test_original import none, write_original  # noqa: F401 (fixture)
from tests.released import load_released, released_folder
from tests.train.runs import GOLDEN, run_here


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


def test_a_full_llava_is_the_language_model(none, tmp_path, golden):  # noqa: F811
    write_original(tmp_path / "llava", none, golden, tower=False, beside=False)
    run_here(tmp_path, warm_start=str(tmp_path / "llava"), max_steps=1, language_model=None)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["base_language_model"] == str(tmp_path / "llava")


def test_what_does_not_go_together(tmp_path):
    start = str(released_folder(GOLDEN, "pooling"))
    with pytest.raises(UsageError, match=r"r 8 and alpha 16; this run has r 4 and alpha 16. Set lora_r"):
        run_here(tmp_path / "1", warm_start=start, lora_r=4)
    with pytest.raises(UsageError, match="has LoRA, which the stage pretrain does not train: merge it first"):
        run_here(tmp_path / "2", "pretrain", warm_start=start)
    with pytest.raises(UsageError, match="warm_start = .*nowhere: it is not there"):
        run_here(tmp_path / "3", warm_start=str(tmp_path / "nowhere"))
    shutil.rmtree(tmp_path)
