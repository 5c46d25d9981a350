"""Writing again: the same bytes, alone or together; another seed; never over other files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from llava_sp.shapes.benchmarks import WRITERS, Settings, write_all
from llava_sp.shapes.benchmarks.__main__ import main
from tests.shapes.benchmarks.truth import read_json


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("name", WRITERS)
def test_one_alone_gives_the_bytes_of_all_together(world, tmp_path, name):
    settings = Settings(**read_json(world / "world.json")["settings"])
    written = WRITERS[name](tmp_path / "alone", settings)
    assert written.questions == 60
    assert digests(tmp_path / "alone") == digests(world / name)


def test_another_seed_gives_other_questions_and_one_question_is_enough(world, tmp_path):
    write_all(tmp_path, Settings(seed=1, questions=1), log=lambda text: None)
    counts = {name: entry["questions"] for name, entry in read_json(tmp_path / "world.json")["benchmarks"].items()}
    least = {"pope": 6, "mme": 22, "seedbench": 12, "mmvp": 2}  # the fewest with every category, subtask, type and pair
    assert counts == {name: least.get(name, 1) for name in WRITERS}
    for name in ("gqa/images/n900000.jpg", "mmvp/MMVP Images/1.jpg", "pope/val2014/COCO_val2014_000000000001.jpg"):
        assert (tmp_path / name).read_bytes() != (world / name).read_bytes()


def test_made_once_and_never_over_other_files(tmp_path, capsys):
    output = tmp_path / "made"
    assert main(["--output", str(output), "--questions", "2"]) == 0
    stamp = (output / "scenes.json").stat().st_mtime_ns
    assert main(["--output", str(output), "--questions", "2"]) == 0
    assert "nothing to make" in capsys.readouterr().out and (output / "scenes.json").stat().st_mtime_ns == stamp
    record = read_json(output / "world.json")
    (output / "world.json").write_text(json.dumps(record | {"complete": False}))
    (output / "mme/MME_Benchmark_release_version/count/9999.txt").write_text("left over from an interrupted call")
    assert main(["--output", str(output), "--questions", "2"]) == 0
    assert not list(output.rglob("9999.txt")) and read_json(output / "world.json") == record

    real = tmp_path / "eval"
    (real / "gqa").mkdir(parents=True)
    (real / "gqa/testdev_balanced_questions.json").write_text("the real ones")
    for world_file in (None, {"settings": {}, "held_out_answers": {}}, ["something else"]):
        if world_file is not None:
            (real / "world.json").write_text(json.dumps(world_file))
        assert main(["--output", str(real)]) == 2
        assert "other files" in capsys.readouterr().err
    assert (real / "gqa/testdev_balanced_questions.json").read_text() == "the real ones"
