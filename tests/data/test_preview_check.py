"""The two commands: what they print, what they save, and how they end."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from llava_sp.config.arguments import load_config
from llava_sp.data import check, preview
from llava_sp.data.build import build_datasets, dataset_of_config
from tests.messages import names, refused


def test_preview_shows_text_and_image(golden, run_yaml, tmp_path, capsys):
    preview.main(["--config", str(run_yaml), "--index", "1", "--output", str(tmp_path / "seen")])
    out = capsys.readouterr().out
    assert "sample 1 of 4: " in out and "samples/data.json, record 1 (id 'b')" in out
    assert names(out, "656 tokens", "1 x 582", "22 learned")
    assert (
        "\n<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
        "and polite answers to the user's questions. USER: <image>\nWhat is this? ASSISTANT:[[ A tall lamp.</s>]]"
        "USER: And the color? ASSISTANT:[[ Green and blue, naïve style 😀.</s>]]\n"
    ) in out
    assert names(out, "tall.png (190 x 400)", "(336 x 336)")
    picture = np.array(Image.open(tmp_path / "seen" / "sample_1_image_0.png"))
    assert np.array_equal(
        picture, np.array(Image.open(golden / "samples" / "images" / "processed_1.png").convert("RGB"))
    )


def test_preview_of_a_text_sample_and_of_a_cut_one(run_yaml, tmp_path, capsys):
    preview.main(["--config", str(run_yaml), "--index", "2", "--output", str(tmp_path / "seen")])
    assert "[[ Once upon a time,\n\nthere was a horse.</s>]]" in capsys.readouterr().out
    assert not (tmp_path / "seen").exists()
    preview.main(
        ["--config", str(run_yaml), "--index", "2", "--model_max_length", "60", "--output", str(tmp_path / "seen")]
    )
    out = capsys.readouterr().out
    assert "[[ Once" in out and "... cut here: 8 tokens beyond 60" in out and "horse" not in out


def test_preview_of_another_template(run_yaml, tmp_path, capsys):
    preview.main(["--config", str(run_yaml), "--conversation_template", "plain", "--output", str(tmp_path)])
    assert "\n<s><image>[[Yes, the cat is sitting on top of a wooden table.\n]]" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--index", "4"], ("--index 4", "samples 0 to 3")),
        (["--index", "0", "--model_max_length", "600"], ("record 0", "last image", "token 616")),
        (["--data_path", "nothing.json"], ("annotation file", "nothing.json")),
        (["--image_folder", "nowhere"], ("image folder", "nowhere", "gone or empty")),
        (["--templat", "plain"], ("'templat'",)),
        (["--language_model", "/nowhere/vicuna"], ("folder /nowhere/vicuna",)),
        (["--vision_tower", "null"], ("run.yaml", "vision_tower is None", "text")),
    ],
)
def test_preview_errors(run_yaml, tmp_path, capsys, arguments, parts):
    assert preview.main(["--config", str(run_yaml), "--output", str(tmp_path), *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and names(err, *parts)


def test_check_of_good_data(run_yaml, capsys):
    assert check.main(["--config", str(run_yaml), "--workers", "0"]) == 0
    out = capsys.readouterr().out
    assert "4 records: 4 good (3 with images), 0 bad" in out
    assert "tokens per sample: 68 to 656, median 644" in out and "0 cut at 2048" in out
    assert "learned: 74 of 2011 tokens" in out


@pytest.mark.parametrize("workers", ["0", "2"])
def test_check_lists_what_is_bad(run_yaml, tmp_path, capsys, workers):
    listed = tmp_path / "bad.jsonl"
    limit = ["--model_max_length", "640", "--image_folder", str(tmp_path)]
    words = ["--full", "--workers", workers, "--output", str(listed), "--show", "1", *limit]
    status = check.main(["--config", str(run_yaml), *words])
    out = capsys.readouterr().out
    assert status == 1 and "4 records: 1 good (0 with images), 3 bad" in out
    assert "record 0: image" in out and "... and 2 more" in out
    entries = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [entry["index"] for entry in entries] == [0, 1, 3] and "cannot be opened" in entries[0]["reason"]


@pytest.mark.parametrize(
    "record, reason",
    [
        ({"video": "clip.mp4"}, "video is 'clip.mp4': media that are not used"),
        ({"images": ["nothing.png"]}, "0 <image> marks in the text, but 1 image in the record"),
        (
            {"conversations": [{"from": "human", "value": "\ud83d"}]},
            "conversations[0].value is '\\ud83d'; expected text",
        ),
        ({"image": "\udcff.png"}, "image is '\\udcff.png'; expected null or a path"),
        ({"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "<image>"}]}, ""),
    ],
)
def test_check_preview_and_training_agree(run_yaml, tmp_path, capsys, record, reason):
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"id": "x", "conversations": turns} | record] * 2))
    arguments = ["--config", str(run_yaml), "--data_path", str(data)]
    bad = 1 if reason else 0
    assert check.main([*arguments, "--workers", "0"]) == bad
    out, err = capsys.readouterr()
    assert f"2 records: {0 if bad else 2} good (0 with images), {2 * bad} bad" in out and "Traceback" not in err
    assert out.count(reason) == 2 if bad else names(out, "2 good records", "<image>", "text")
    assert preview.main([*arguments, "--index", "1"]) == 2 * bad
    out, err = capsys.readouterr()
    assert (
        f"error: {data}, record 1 is bad: " in err and reason in err
        if bad
        else "USER: <image> ASSISTANT:[[ <image>" in out
    )
    skipped = ["--on_bad_sample", "skip", "--output_dir", str(tmp_path)]
    dataset, _ = build_datasets(
        dataset_of_config(run_yaml, arguments[2:]).processor, load_config(run_yaml, [*arguments[2:], *skipped])
    )
    if not bad:
        assert dataset.processor.image_token_id not in dataset[0]["input_ids"]
        return
    with refused("2 bad samples", "record 0", reason):
        dataset[0]
    assert dataset.close_report()["skipped"] == 2


def test_check_counts_what_is_cut(run_yaml, capsys):
    check.main(["--config", str(run_yaml), "--workers", "0", "--model_max_length", "640"])
    assert "3 cut at 640" in capsys.readouterr().out


def test_check_of_a_broken_file(run_yaml, tmp_path, capsys):
    (tmp_path / "cut.json").write_text('[{"id": 1}, {"id"')
    assert check.main(["--config", str(run_yaml), "--data_path", str(tmp_path / "cut.json")]) == 2
    assert names(capsys.readouterr().err, "cut.json, line 1, column 18:", "record 1", "cut off")
