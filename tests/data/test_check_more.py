"""What `data.check` writes and counts besides bad samples: page, manifest, repeats; and what it does not decode."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from llava_sp.data import check
from llava_sp.data.manifest import changes_since
from tests.messages import names, refused
from tests.train.runs import config, run_here

Q, A = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}


def records(path, *contents) -> list[str]:
    path.write_text(json.dumps([{"id": str(i), **content} for i, content in enumerate(contents)]))
    return ["--data_path", str(path), "--workers", "0"]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_repeats_and_empty_answers(run_yaml, tmp_path, capsys, workers):
    other = {"conversations": [Q, {"from": "gpt", "value": "b"}]}
    empty = {"conversations": [Q, {"from": "gpt", "value": " "}]}
    words = records(tmp_path / "d.json", {"conversations": [Q, A]}, other, {"conversations": [Q, A]}, empty, {"x": 1})
    assert check.main(["--config", str(run_yaml), *words, "--workers", workers]) == 1  # the last has no conversation
    out = capsys.readouterr().out
    file = tmp_path / "d.json"
    assert f"there twice: 1 record; {file}, record 2 is {file}, record 0 again" in out
    assert f"answers without text: 1 record; {file}, record 3\n" in out
    assert re.search(r"\([\d,]+ records/s; images not decoded: --full\)", out)


def test_only_full_decodes(run_yaml, golden, tmp_path, capsys):
    images = shutil.copytree(golden / "samples" / "images", tmp_path / "images")
    file = images / "tall.png"
    file.write_bytes(file.read_bytes()[:-2000])
    words = ["--config", str(run_yaml), "--image_folder", str(images), "--workers", "0"]
    assert check.main(words) == 0
    assert check.main([*words, "--full"]) == 1
    assert names(capsys.readouterr().out, "tall.png", "damaged or cut off")
    file.write_bytes(b"no image")
    assert check.main(words) == 1
    assert names(capsys.readouterr().out, "tall.png", "not an image")
    file.unlink()
    assert check.main(words) == 1
    assert names(capsys.readouterr().out, "tall.png", "cannot be opened")


def test_the_page_is_one_file(run_yaml, tmp_path):
    page = tmp_path / "page.html"
    assert check.main(["--config", str(run_yaml), "--workers", "0", "--html", str(page)]) == 0
    text = page.read_text()
    bars = re.findall(r"<title>(\d+) to (\d+) tokens: ([\d,]+) samples</title>", text)
    assert sum(int(number) for *_, number in bars) == 4 and int(bars[0][0]) == 68 and int(bars[-1][1]) == 656
    assert not re.search(r"(src|href)=\"(?!data:)", text) and "<script" not in text
    words = ["--model_max_length", "640", "--image_folder", str(tmp_path)]
    check.main(["--config", str(run_yaml), "--workers", "0", "--html", str(page), *words])
    assert "cannot be opened" in page.read_text()


def test_a_run_is_held_to_its_manifest(tmp_path, golden):
    samples = shutil.copytree(golden / "samples", tmp_path / "samples")
    data = {"data_path": str(samples / "data.json"), "image_folder": str(samples / "images"), "max_steps": 1}
    manifest = tmp_path / "manifest.json"
    path = config(tmp_path, **data)
    assert check.main(["--config", str(path), "--workers", "0", "--manifest", str(manifest)]) == 0
    written = json.loads(manifest.read_text())
    assert written["records"][0]["records"] == 4 and written["findings"]["good"] == 4
    assert written["records"][0]["bytes"] == (samples / "data.json").stat().st_size

    (samples / "data.json").write_text((samples / "data.json").read_text().replace("cat", "dog"))
    with refused("manifest.json", "data.json has different content", "check_data"):
        run_here(tmp_path, **data, data_manifest=str(manifest))
    run_here(tmp_path, **data, data_manifest=str(manifest), check_data=False)
    with refused("data_manifest", tmp_path / "none.json", "data.check --manifest"):
        run_here(tmp_path / "b", **data, data_manifest=str(tmp_path / "none.json"))


def test_a_manifest_that_is_none(tmp_path):
    file = tmp_path / "m.json"
    file.write_text("{}")
    with refused(file, "fingerprint"):
        changes_since(file, {})
    empty = {"annotations": [], "images": {}}
    content = {"llava_sp_data": 2, "checked": "", "records": [], "findings": {}, "fingerprint": empty}
    file.write_text(json.dumps(content))
    with refused(file, "llava_sp_data is 2", "reads 1"):
        changes_since(file, empty)
