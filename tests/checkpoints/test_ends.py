"""A language model that never learns to stop: training's data, their check and the inspection say so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llava_sp import LlavaSPForCausalLM, LlavaSPProcessor
from llava_sp.checkpoints.inspect import main as inspect
from llava_sp.checkpoints.opening.ends import never_stops
from llava_sp.config.arguments import load_config
from llava_sp.data import check
from llava_sp.data.build import build_processor


def with_ends(golden: Path, folder: Path, ends: object) -> Path:
    """The recorded language model, which says so of its end of sequence."""
    shutil.copytree(golden / "base", folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return folder


@pytest.fixture
def config(golden, tmp_path) -> list[str]:
    path = tmp_path / "run.yaml"
    samples = golden / "samples"
    path.write_text(
        f"vision_tower: {golden / 'clip'}\ndata_path: {samples / 'data.json'}\nimage_folder: {samples / 'images'}\n"
    )
    return [str(path), "--output_dir", str(tmp_path / "out")]


@pytest.mark.parametrize("template", ["vicuna_v1", "llava_v1", "llama_2", "plain"])
@pytest.mark.parametrize("ends", [None, 2, [2], [7, 2], 7, [7, 8]])
def test_the_warning_names_template_end_and_ids(golden, tmp_path, config, capsys, template, ends):
    language = with_ends(golden, tmp_path / "language", ends)
    path, *words = config
    run = load_config(path, [*words, "--language_model", str(language), "--conversation_template", template])
    build_processor(run)  # as training and its check do
    err = capsys.readouterr().err
    if ends in (None, 2, [2], [7, 2]) or template == "plain":
        assert err == ""
        return
    (line,) = err.splitlines()
    end = {"llama_2": "' </s>'"}.get(template, "'</s>'")
    assert line.startswith(f"warning: the conversation template '{template}' ends an answer with {end}, ")
    assert f"of {language}, which are 7 (" in line and "never learns to stop" in line


def test_without_generation_settings_the_configuration_counts(golden, tmp_path):
    language = with_ends(golden, tmp_path / "language", 7)
    model = LlavaSPForCausalLM.from_backbones(golden / "base", golden / "clip", seed=0)
    processor = LlavaSPProcessor.from_backbones(model.config)
    assert "which are 7 (" in never_stops(processor, language)
    (language / "generation_config.json").unlink()
    assert never_stops(processor, language) is None
    settings = json.loads((language / "config.json").read_text())
    (language / "config.json").write_text(json.dumps(settings | {"eos_token_id": 9}))
    assert "which are 9 (" in never_stops(processor, language)


def test_check_and_inspect_say_so(golden, tmp_path, config, capsys):
    language = with_ends(golden, tmp_path / "language", [7, 8])
    path, *words = config
    assert check.main(["--config", path, *words, "--language_model", str(language), "--workers", "0"]) == 0
    out, err = capsys.readouterr()
    assert "warning: the conversation template 'vicuna_v1'" in err and "4 good" in out
    for base, said in ((golden / "base", False), (language, True)):
        model = LlavaSPForCausalLM.from_backbones(base, golden / "clip", seed=0)
        folder = tmp_path / str(said)
        model.save_pretrained(folder)
        LlavaSPProcessor.from_backbones(model.config).save_pretrained(folder)
        capsys.readouterr()
        assert inspect([str(folder)]) == 0
        shown = capsys.readouterr().out
        assert ("  warning        the conversation template 'vicuna_v1' ends an answer with '</s>'" in shown) == said
        assert inspect([str(folder), "--json"]) == 0
        assert len(json.loads(capsys.readouterr().out)["warnings"]) == said
