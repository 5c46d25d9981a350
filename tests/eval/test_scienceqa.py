"""ScienceQA: scores and prompts of LLaVA's code, with and without its question file, and bad files."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from llava_sp.eval.run.evaluate import check_images
from llava_sp.eval.scienceqa import ScienceQA
from tests.eval.commands import command_of

RECORDING = "scienceqa"

PROBLEMS, SPLITS, LLAVA = "problems.json", "pid_splits.json", "llava_test_CQM-A.json"
TABLE = {  # names of the official table
    "natural": "natural science",
    "social": "social science",
    "language": "language science",
    "has_text": "text context",
    "has_image": "image context",
    "no_context": "no context",
    "grade_1_6": "grades 1-6",
    "grade_7_12": "grades 7-12",
}


run = command_of(ScienceQA)


def change(file: Path, edit) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def test_scores_equal_llavas(tmp_path, data, answers, recorded, capsys):
    output = tmp_path / "out"
    status, out, _ = run(capsys, "--answers", answers, "--data", data, "--output", output)
    expected = recorded["expected"]["llava_eval_science_qa"]
    result = json.loads((output / "metrics.json").read_text())
    lines = [json.loads(line) for line in (output / "per_item.jsonl").open()]
    assert status == 0 and "45.0 (20 questions with an image)" in out
    assert result["score"] == expected["aggregate"]["img_acc"] == ScienceQA.headline(lines)
    metrics = result["metrics"]
    assert metrics["accuracy"] == round(expected["aggregate"]["acc"], 2)
    assert metrics["correct"] == expected["aggregate"]["correct"] and metrics["count"] == 40
    assert metrics["image_accuracy"] == 45.0 and metrics["image_count"] == expected["aggregate"]["img_count"]
    for line in lines:
        item = expected["per_item"][line["question_id"]]
        assert (line["answer"] or "FAILED", line["score"] == 100.0) == (item["parsed"], item["correct"])
        assert (line["image"] is not None) == item["is_multimodal"]
    assert metrics["not_understood"] == sum(i["parsed"] == "FAILED" for i in expected["per_item"].values())


def test_table_equals_the_official_one(tmp_path, data, answers, recorded, capsys):
    assert run(capsys, "--answers", answers, "--data", data, "--output", tmp_path / "out")[0] == 0
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())
    expected = recorded["expected"]["scienceqa_evaluate_acc"]["aggregate"]
    assert result["metrics"]["accuracy"] == float(expected["average"])
    table = {name: category["score"] for name, category in result["categories"].items()}
    assert table == {TABLE[name]: float(expected[name]) for name in TABLE}
    topics = {
        name: float(value) for name, value in expected.items() if name not in {*TABLE, "average"} and value != "-1"
    }
    assert result["metrics"]["by_topic"] == topics


def test_scores_equal_lmms_evals(tmp_path, data, answers, recorded, capsys):
    output = tmp_path / "out"
    assert run(capsys, "--answers", answers, "--data", data, "--output", output, "--protocol", "lmms_eval")[0] == 0
    expected = recorded["expected"]["lmms_eval"]["per_item"]
    lines = [json.loads(line) for line in (output / "per_item.jsonl").open()]
    assert {line["question_id"]: line["score"] / 100 for line in lines} == expected
    with_image = [expected[line["question_id"]] for line in lines if line["image"]]
    result = json.loads((output / "metrics.json").read_text())
    assert result["score"] == round(100 * sum(with_image) / len(with_image), 2)
    assert result["scored_as"] == {"lmms_eval": result["score"], "llava15": 45.0}


@pytest.mark.parametrize("own_prompts", [False, True])
def test_prompts_and_generation_equal_llavas(data, recorded_prompts, own_prompts):
    if own_prompts:
        (data / LLAVA).unlink()
    expected = recorded_prompts["scienceqa"]
    assert asdict(ScienceQA.generation).items() >= {
        (key, value) for key, value in expected["generate_kwargs"].items() if "image" not in key
    }
    benchmark = ScienceQA()
    items = {item.id: item for item in benchmark.load(data)}
    for case in expected["items"]:
        item = items[case["question_record"]["id"]]
        record = {**benchmark.record(item), "text": "decoded", "model_id": "llava-v1.5-7b", "metadata": {}}
        assert record == case["answer_record_without_answer_id"]
        assert list(benchmark.record(item)) == ["question_id", "prompt"]
        assert f"USER: {benchmark.message(item)} ASSISTANT:" in case["prompt"]
        assert bool(item.images) == (case["generate_images"] is not None)


def test_both_sources_ask_the_same(data):
    with_file = ScienceQA().load(data)
    (data / LLAVA).unlink()
    assert ScienceQA().load(data) == with_file
    assert [len(item.images) for item in with_file].count(1) == 20


def test_double_spaces_are_single_as_in_llavas_file(data):
    (data / LLAVA).unlink()
    change(data / PROBLEMS, lambda p: p["90000"].update(question="Which  one   is it? ", hint="See  this."))
    item = ScienceQA().load(data)[0]
    assert item.text == "Context: See this.\nWhich one is it? \nA. quiet lantern\nB. cold thimble\nC. warm anvil"


def test_images_are_looked_for_in_both_layouts(data):
    assert ScienceQA().load(data)[0].images[0] == data / "images" / "test" / "90000" / "image.png"
    (data / "test").mkdir()
    assert ScienceQA().load(data)[0].images[0] == data / "test" / "90000" / "image.png"
    items = ScienceQA(images=Path("/elsewhere")).load(data)
    assert items[0].images[0] == Path("/elsewhere/90000/image.png")
    with pytest.raises(ValueError, match=r"20 image files are missing \(/elsewhere/90000/image.png, .*question 90000"):
        check_images(items)


def test_other_splits(data, answers, capsys):
    change(data / SPLITS, lambda s: s.update(minitest=["90000", "90003"], val=[]))
    assert [item.id for item in ScienceQA(split="minitest").load(data)] == ["90000", "90003"]
    assert ScienceQA(split="minitest").load(data)[0].images[0].parts[-3] == "test"
    with pytest.raises(ValueError, match=r"pid_splits.json: val is \[\]"):
        ScienceQA(split="val").load(data)
    with pytest.raises(ValueError, match="pid_splits.json has no minival; it has train, test"):
        ScienceQA(split="minival").load(data)
    status, _, err = run(capsys, "--answers", answers, "--data", data, "--split", "minitest")
    assert status == 2 and "questions of scienceqa minitest" in err and "not in the file: 38 (" in err


def test_headline_of_a_resample_counts_pictures_alone():
    def line(score: float, image: str | None) -> dict:
        return {"score": score, "image": image}

    right, wrong, text = line(100.0, "a"), line(0.0, "b"), line(100.0, None)
    assert ScienceQA.headline([right, wrong, wrong, text, text]) == 33.33
    assert ScienceQA.headline([right, right, wrong]) == 66.67
    assert ScienceQA.headline([text]) == 0.0  # a sample without a picture; a whole run without one has no score


def test_a_split_without_a_picture_has_no_score(tmp_path, data, answers, capsys):
    pictures = {item.id: bool(item.images) for item in ScienceQA().load(data)}
    text_only = [i for i, has_one in pictures.items() if not has_one]
    change(data / SPLITS, lambda s: s.update(test=text_only))
    change(data / LLAVA, lambda lines: lines.__setitem__(slice(None), [x for x in lines if x["id"] in text_only]))
    lines = [json.loads(line) for line in answers.open()]
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines if line["question_id"] in text_only))
    status, out, _ = run(capsys, "--answers", answers, "--data", data, "--output", tmp_path / "out")
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert status == 0 and result["score"] is None and "scored_as" not in result
    assert result["metrics"]["image_accuracy"] is None and result["metrics"]["accuracy"] > 0
    assert "20 questions answered; the score is over questions with an image" in out


def test_a_group_without_questions_is_left_out(tmp_path, data, answers, capsys):
    change(data / PROBLEMS, lambda p: [problem.update(subject="social science") for problem in p.values()])
    status, out, _ = run(capsys, "--answers", answers, "--data", data)
    assert status == 0 and "natural science" not in json.loads(out)["categories"]


def test_missing_and_doubled_answers_are_counted(data, answers, capsys):
    lines = answers.read_text().splitlines()
    answers.write_text("\n".join([*lines[2:], lines[5]]) + "\n")
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2
    assert "(90000, 90003)" in err
    assert "(90015)" in err


@pytest.mark.parametrize("name, what", [(PROBLEMS, "no problems"), (SPLITS, "no list of problems per split")])
def test_files_must_be_there_and_whole(data, answers, capsys, name, what):
    content = (data / name).read_text()
    (data / name).write_text(content[:-20])
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and f"{name} is not valid JSON" in err and "ends in the middle" in err
    (data / name).unlink()
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and what in err and name in err


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"choices": "a"}, "problem 90000: choices is 'a'"),
        ({"choices": ["a"]}, "problem 90000: choices is ['a']"),
        ({"choices": ["a", 2]}, "problem 90000: choices[1] is 2"),
        ({"answer": 3}, "problem 90000: answer is 3"),
        ({"answer": "C"}, "problem 90000: answer is 'C'"),
        ({"hint": None}, "problem 90000: hint is None"),
        ({"image": 5}, "problem 90000: image is 5"),
        ({"image": "../x.png"}, "problem 90000: image '../x.png' is outside"),
        ({"image": None}, "the image or the layout differs"),
        ({"question": "Another?"}, "LLaVA's question file asks 'Which one is number 0?"),
    ],
)
def test_wrong_fields_are_named(data, answers, capsys, changes, message):
    change(data / PROBLEMS, lambda p: p["90000"].update(changes))
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and message in err and PROBLEMS in err


def test_problems_of_the_split_must_be_there_once(data, answers, capsys):
    change(data / PROBLEMS, lambda p: p.pop("90003"))
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and "problems.json lacks 1 problem of test (90003)" in err
    change(data / SPLITS, lambda s: s["test"].append("90000"))
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and "more than one record with the same problem: 90000 " in err


def test_llavas_file_must_fit(data, answers, recorded, capsys):
    first = recorded["expected"]["convert_sqa_to_llava_CQM-A"]["first_three"][0]
    change(data / LLAVA, lambda lines: lines.__setitem__(0, first))  # of LLaVA's own script: another layout
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and "layout differs" in err and "eval.zip" in err
    change(data / LLAVA, lambda lines: lines[0].pop("image"))
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and "problem 90000: LLaVA's question file asks" in err and "layout differs" in err
    change(data / LLAVA, lambda lines: lines.pop(0))
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and "pid_splits.json: no line: 1 (90000)" in err
    change(data / LLAVA, lambda lines: lines.insert(0, {"id": "90000", "conversations": []}))
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and "[0].conversations is []" in err
