"""The files: LLaVA's and VQAv2's formats, complete, the same bytes again, made only once."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from llava_sp.shapes.benchmarks.__main__ import main as benchmarks
from llava_sp.shapes.language import FAMILIES, SUFFIX, questions
from llava_sp.shapes.make import ANNOTATIONS_FILE, QUESTIONS_FILE, Settings, main, make
from llava_sp.shapes.world import Scene, Thing, digit_instances, split_of

SMALL = Settings(captions=30, conversations=60, questions=120)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    make(folder, SMALL, log=lambda text: None)
    return folder


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_same_settings_same_bytes(data, tmp_path):
    make(tmp_path, SMALL, log=lambda text: None)
    assert digests(data) == digests(tmp_path)


def test_llava_files(data):
    pretrain, finetune = (json.loads((data / name).read_text()) for name in ("pretrain.json", "finetune.json"))
    assert (len(pretrain), len(finetune)) == (SMALL.captions, SMALL.conversations)
    for record in pretrain + finetune:
        speakers = [turn["from"] for turn in record["conversations"]]
        assert speakers == ["human", "gpt"] * (len(speakers) // 2) and speakers
        marks = sum(turn["value"].count("<image>") for turn in record["conversations"])
        assert marks == int("image" in record)
        if "image" in record:
            with Image.open(data / "images" / record["image"]) as image:
                assert image.mode == "RGB" and image.size == (96, 96)
    assert all(record["conversations"][0]["value"].endswith(SUFFIX) for record in finetune)
    assert any("image" not in record for record in finetune)
    assert any(len(record["conversations"]) > 2 for record in finetune)


def test_vqav2_files(data):
    asked = json.loads((data / "vqav2" / QUESTIONS_FILE).read_text())
    given = json.loads((data / "vqav2" / ANNOTATIONS_FILE).read_text())
    assert asked["data_subtype"] == given["data_subtype"] == "val2014" and asked["task_type"] == "Open-Ended"
    assert len(asked["questions"]) == len(given["annotations"]) == SMALL.questions
    ids = [question["question_id"] for question in asked["questions"]]
    assert len(set(ids)) == len(ids) and ids == [annotation["question_id"] for annotation in given["annotations"]]
    for question, annotation in zip(asked["questions"], given["annotations"]):
        assert question["image_id"] == annotation["image_id"] == question["question_id"] // 1000
        assert (data / "vqav2" / "val2014" / f"COCO_val2014_{question['image_id']:012d}.jpg").is_file()
        answers = annotation["answers"]
        assert [answer["answer_id"] for answer in answers] == list(range(1, 11))
        assert {answer["answer"] for answer in answers} == {annotation["multiple_choice_answer"]}
        assert all(answer["answer_confidence"] == "yes" for answer in answers)
        assert annotation["answer_type"] in ("yes/no", "number", "other")
        assert question["question"].lower().startswith(annotation["question_type"])
    kinds = Counter(annotation["question_type"] for annotation in given["annotations"])
    assert len(kinds) == len(FAMILIES) and max(kinds.values()) - min(kinds.values()) <= 2


def test_answers_can_be_derived_again_from_the_scene_file(data):
    graphs = json.loads((data / "scenes.json").read_text())
    asked = json.loads((data / "vqav2" / QUESTIONS_FILE).read_text())["questions"]
    given = json.loads((data / "vqav2" / ANNOTATIONS_FILE).read_text())["annotations"]
    for question, annotation in zip(asked, given):
        graph = graphs[f"COCO_val2014_{question['image_id']:012d}.jpg"]
        scene = Scene(tuple(Thing(**thing) for thing in graph["things"]), tuple(graph["background"]))
        answers = {q.text: q.answer for family in FAMILIES for q in questions(scene, family)}
        assert answers[question["question"]] == annotation["multiple_choice_answer"]


def test_held_out(data):
    """No scene and no handwritten digit of the scored pictures occurs in training."""
    graphs = json.loads((data / "scenes.json").read_text())
    scored = {name for name in graphs if name.startswith("COCO_val2014")}
    assert scored and scored == {path.name for path in (data / "vqav2" / "val2014").iterdir()}
    seen: dict[bool, tuple[set, set]] = {True: (set(), set()), False: (set(), set())}
    for name, graph in graphs.items():
        scene = Scene(tuple(Thing(**thing) for thing in graph["things"]), tuple(graph["background"]))
        signatures, instances = seen[name in scored]
        signatures.add(scene.signature())
        instances.update(thing.instance for thing in scene.things if thing.kind == "digit")
        assert split_of(scene.signature()) == ("val" if name in scored else "train")
    assert not seen[True][0] & seen[False][0] and not seen[True][1] & seen[False][1]
    assert seen[False][1] <= {i for group in digit_instances("train").values() for i in group}


def test_made_once_and_never_over_other_files(data, tmp_path, capsys):
    assert main(["--output", str(data), "--captions", "30", "--conversations", "60", "--questions", "120"]) == 0
    assert "nothing to make" in capsys.readouterr().out
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main(["--output", str(tmp_path)]) == 2
    assert "other files" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["--output", str(tmp_path / "new"), "--captions", "0"])
    assert "error: --captions is '0'" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_a_full_disk_is_one_line_with_the_file(tmp_path, capsys):
    """/dev/full takes no byte."""
    small = ["--captions", "1", "--conversations", "1", "--questions", "3"]
    for file in ("images/caption_000000.jpg", "vqav2/val2014/COCO_val2014_000000000001.jpg"):
        output = tmp_path / file.partition("/")[0]
        (output / "images").mkdir(parents=True)
        (output / file).parent.mkdir(parents=True, exist_ok=True)
        (output / file).symlink_to("/dev/full")
        assert main(["--output", str(output), *small]) == 2
        assert capsys.readouterr().err == f"error: cannot write {output / file}: No space left on device\n"
        assert not (output / "world.json").exists()
        (output / file).unlink(missing_ok=True)
        assert main(["--output", str(output), *small]) == 0


@pytest.mark.parametrize("content", ["", "[]", "{", '{"settings": 3}', "null", "\xff"])
@pytest.mark.parametrize("command", [main, benchmarks])
def test_a_damaged_record_is_named(command, content, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "world.json").write_text(content, encoding="latin-1")
    assert command(["--output", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and str(tmp_path) in err and "Traceback" not in err
    assert (tmp_path / "world.json").read_text(encoding="latin-1") == content
