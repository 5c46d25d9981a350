"""What is reported before anything is loaded: models that cannot be had, broken mixtures, settings that do not fit."""

from __future__ import annotations

import pytest

from llava_sp.config.arguments import load_config
from llava_sp.train import preflight as check
from llava_sp.train.__main__ import main
from tests.train.runs import config


def message_of(path, words=()) -> str:
    with pytest.raises(ValueError) as caught:
        check.check_inputs(load_config(path, words))
    return str(caught.value)


class Refused(check.HTTPError):
    def __init__(self, message: str):
        Exception.__init__(self, message)


class Unknown(check.HfHubHTTPError):
    def __init__(self, message: str):
        Exception.__init__(self, message)


@pytest.fixture
def hub(monkeypatch):
    """A hub that is online and answers with `hub.error`; `hub.asked` lists the questions."""

    class Hub:
        error: Exception | None = None
        asked: list[str]

    def answer(url, **_):
        Hub.asked.append(url)
        if Hub.error is not None:
            raise Hub.error

    Hub.asked = []
    monkeypatch.setattr(check.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(check, "get_hf_file_metadata", answer)
    return Hub


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (Refused("Connection refused"), ("cannot be reached (Connection refused)", "not in the cache")),
        (Unknown("404 Client Error"), ("has no readable model of this name (404 Client Error)", "no such folder")),
    ],
)
def test_a_hub_model_that_cannot_be_had(tmp_path, hub, error, words):
    hub.error = error
    message = message_of(config(tmp_path), ["--language_model", "someone/vicunna-7b", "--data_path", "gone.json"])
    for word in (
        "language_model = someone/vicunna-7b",
        "LLAVA_SP_LANGUAGE_MODEL",
        "give a hub id such as lmsys/",
        *words,
    ):
        assert word in message
    assert "gone.json" in message and "vision_tower" not in message
    assert len(hub.asked) == 1 and hub.asked[0].endswith("someone/vicunna-7b/resolve/main/config.json")


def test_what_is_no_models_name(tmp_path, hub):
    assert "neither a folder nor a model's name" in message_of(config(tmp_path), ["--vision_tower", "my tower"])


def test_a_hub_model_that_is_there(tmp_path, hub):
    check.check_inputs(load_config(config(tmp_path), ["--language_model", "someone/vicuna"]))
    assert len(hub.asked) == 1


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("- {annotations: [", "is not valid YAML"),
        ("annotations: a.json", "expected a list"),
        ("- a.json", "entry 0 (counted from 0) is 'a.json'; expected an object with annotations"),
        ("- annotations: 5", "annotations is 5; expected a path"),
        ("- {annotations: a.json, images: [b]}", "images is ['b']; expected a path"),
        ("- {annotations: a.json, wight: 2}", "'wight': 2}; expected an object with only annotations, images, weight"),
        ("- {annotations: a.json, weight: no}", "weight is False"),
        ("\x00", "is not valid YAML"),
    ],
)
def test_broken_mixtures(tmp_path, text, word):
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(text)
    message = message_of(config(tmp_path, data_path=None, mixture=str(mixture)))
    assert f"mixture = {mixture}: " in message and word in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stage", "third"], "stage is 'third'; expected 'pretrain' or 'finetune_lora'"),
        (["--conversation_template", "vicunna"], "vicunna"),
        (["--image_aspect_ratio", "squash"], "squash"),
        (["--on_bad_sample", "ignore"], "on_bad_sample is 'ignore'"),
        (["--spatial_variant", "crop"], "spatial_variant is 'crop'; it must be one of: none, cropping, pooling"),
        (["--spatial_scales", "4", "25"], "spatial_scales is [4, 25]"),
        (["--fusion_kernel", "30"], "fusion_kernel is 30"),
    ],
)
def test_cheap_mistakes_are_reported_before_the_weights_are_loaded(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.setattr("llava_sp.train.run.build_model", lambda *_: pytest.fail("a model was built"))
    assert main(["--config", str(config(tmp_path)), *words]) == 2
    assert message in capsys.readouterr().err


def test_weights_that_cannot_be_read(tmp_path, monkeypatch, capsys):
    def gone(*_):
        raise OSError("pytorch_model.bin is not there")

    monkeypatch.setattr("llava_sp.train.run.build_model", gone)
    assert main(["--config", str(config(tmp_path))]) == 2
    assert "error: pytorch_model.bin is not there" in capsys.readouterr().err
