"""VizWiz without a model: official files, scoring answers files, submission and validation, errors."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from llava_sp.decoding import Generation
from llava_sp.eval.base import LLAVA15
from llava_sp.eval.run.evaluate import check_images
from llava_sp.eval.vizwiz import SUFFIX, VizWiz, unanswerability
from tests.eval.commands import command_of

RECORDING = "vizwiz"

SCORERS = {
    "llava15": "llava_pipeline.vizwiz_vqaeval",
    "official": "raw_answers.vizwiz_vqaeval",
    "lmms_eval": "raw_answers.lmms_eval",
}


@pytest.fixture
def only_test(data) -> Path:
    """The recorded questions as a test split: no answers, and only LLaVA's question file."""
    (data / "llava_val.jsonl").rename(data / "llava_test.jsonl")
    (data / "val.json").unlink()
    return data


run = command_of(VizWiz)


def official_test_file(data: Path) -> None:
    """Writes test.json as it is published: image and question only."""
    records = json.loads((data / "val.json").read_text())
    (data / "test.json").write_text(json.dumps([{k: r[k] for k in ("image", "question")} for r in records]))


@pytest.mark.parametrize("protocol", VizWiz.protocols)
@pytest.mark.parametrize("with_llava", [True, False])
def test_answers_file_scores_as_the_official_code(tmp_path, data, answers, recorded, capsys, protocol, with_llava):
    if not with_llava:
        (data / "llava_val.jsonl").unlink()
    output = tmp_path / "out"
    status, out, _ = run(
        capsys, "--answers", answers, "--data", data, "--output", output, "--protocol", protocol
    )  # fmt: skip
    assert status == 0
    expected = recorded["expected"][SCORERS[protocol]]
    scale = 100 if protocol == "lmms_eval" else 1  # the others are recorded in percent
    overall = expected["aggregate"] if scale == 100 else expected["aggregate"]["overall"]
    result = json.loads((output / "metrics.json").read_text())
    assert result["score"] == round(scale * overall, 2)
    lines = [json.loads(line) for line in (output / "per_item.jsonl").open()]
    per_item = {image: round(scale * value, 2) for image, value in expected["per_item"].items()}
    assert {line["image"]: line["score"] for line in lines} == per_item
    assert VizWiz.headline(lines) == result["score"]
    if "unanswerability" in expected:
        metrics = result["metrics"]["unanswerability"]
        assert {key: metrics[key] for key in expected["unanswerability"]} == expected["unanswerability"]
        assert (metrics["unanswerable"], metrics["answered_unanswerable"]) == (8, 4)
    assert result["provenance"]["split"] == "val" and result["provenance"]["protocol"] == protocol
    assert result["scored_as"] == {"llava15": 68.75, "official": 68.75, "lmms_eval": 75.75}
    assert f"VizWiz accuracy in percent, val: {result['score']} (40 questions)" in out


def test_per_item_and_categories(data, answers, capsys):
    benchmark = VizWiz()
    items = benchmark.load(data)
    texts = [json.loads(line)["text"] for line in answers.open()]
    scores = benchmark.score(items, texts)
    line = scores.per_item[19]
    assert line["text"] == "pears, plums" and line["answer"] == "pears plums" and line["score"] == 0.0
    assert line["references"][0] == "pears, plums" and line["answerable"] == 1 and line["category"] == "other"
    assert sum(category.count for category in scores.categories.values()) == 40
    mean = sum(category.score * category.count for category in scores.categories.values()) / 40
    assert mean == pytest.approx(scores.score, abs=0.01)


@pytest.mark.parametrize("with_llava", [True, False])
def test_prompts_and_generation_equal_llavas(data, recorded_prompts, with_llava):
    expected = recorded_prompts["vizwiz"]
    if not with_llava:
        (data / "llava_val.jsonl").unlink()
    for protocol in ("llava15", "official"):
        benchmark = VizWiz(protocol=protocol)
        items = {item.id: item for item in benchmark.load(data)}
        for case in expected["items"]:
            item = items[case["question_record"]["question_id"]]
            record = {**benchmark.record(item), "text": "decoded", "model_id": "llava-v1.5-7b", "metadata": {}}
            assert record == case["answer_record_without_answer_id"]
            assert list(record) == list(case["answer_record_without_answer_id"])
            assert benchmark.message(item) in case["prompt"]
            assert item.images == (data / "val" / case["question_record"]["image"],)
        assert asdict(benchmark.generation) == {
            k: v for k, v in expected["generate_kwargs"].items() if "image" not in k
        }


def test_lmms_eval_asks_with_a_capital_and_small_letters(data):
    records = json.loads((data / "val.json").read_text())
    records[0]["question"] = "what does the LABEL say?  Thanks"
    (data / "val.json").write_text(json.dumps(records))
    (data / "llava_val.jsonl").unlink()
    benchmark = VizWiz(protocol="lmms_eval")
    assert benchmark.prompt(benchmark.load(data)[0]) == "What does the label say?  thanks" + SUFFIX
    assert benchmark.generation == Generation(max_new_tokens=1024)


def test_without_val_the_only_test_is_taken(only_test):
    benchmark = VizWiz()
    assert benchmark.load(only_test)[0].reference is None and benchmark.split == "test"


def test_val_comes_before_test(data):
    official_test_file(data)
    benchmark = VizWiz()
    benchmark.load(data)
    assert benchmark.split == "val"


def test_images(data):
    with pytest.raises(ValueError, match=r"40 image files are missing \(.*val_00000000\.jpg, .*question 0;"):
        check_images(VizWiz().load(data))
    (data / "images").mkdir()
    assert VizWiz().load(data)[0].images[0].parent == data / "images"
    assert VizWiz(images=Path("/x")).load(data)[0].images[0] == Path("/x/VizWiz_val_00000000.jpg")


@pytest.mark.parametrize("file", ["llava_test.jsonl", "test.json"])
def test_submission_equals_llavas_and_validates(tmp_path, data, answers, recorded, capsys, file):
    official_test_file(data)
    (data / "llava_val.jsonl").rename(data / "llava_test.jsonl")
    (data / ({"llava_test.jsonl", "test.json"} - {file}).pop()).unlink()
    output = tmp_path / "out"
    status, out, _ = run(capsys, "--answers", answers, "--data", data, "--output", output, "--split", "test")
    assert status == 0 and "only the server can score them" in out
    submission = json.loads((output / "submission.json").read_text())
    assert submission == recorded["expected"]["llava_convert"]["upload"]
    result = json.loads((output / "metrics.json").read_text())
    assert result["score"] is None and "scored_as" not in result
    status, out, _ = run(capsys, "--validate", output / "submission.json", "--data", data)
    assert status == 0 and "answers all 40 questions of test once (2 of them empty)" in out


def test_submission_is_in_the_order_of_the_question_file(tmp_path, only_test, answers, capsys):
    lines = (only_test / "llava_test.jsonl").read_text().splitlines()
    (only_test / "llava_test.jsonl").write_text("\n".join(reversed(lines)))
    output = tmp_path / "out"
    assert run(capsys, "--answers", answers, "--data", only_test, "--output", output)[0] == 0
    images = [result["image"] for result in json.loads((output / "submission.json").read_text())]
    assert images == [json.loads(line)["image"] for line in reversed(lines)]


def test_submission_follows_the_protocol(tmp_path, only_test, answers, capsys):
    output = tmp_path / "out"
    run(capsys, "--answers", answers, "--data", only_test, "--output", output, "--protocol", "official")
    assert json.loads((output / "submission.json").read_text())[0]["answer"] == "Tomato soup."


def test_val_has_no_submission(tmp_path, data, answers, capsys):
    run(capsys, "--answers", answers, "--data", data, "--output", tmp_path / "out")
    assert not (tmp_path / "out" / "submission.json").exists()


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda r: r[3:], "no answer: 3 (VizWiz_val_00000000.jpg, VizWiz_val_00000001.jpg, VizWiz_val_00000002.jpg)"),
        (lambda r: [*r, r[0]], "more than one answer: 1 (VizWiz_val_00000000.jpg)"),
        (lambda r: [*r, {"image": "y.jpg", "answer": ""}], "answer to a question that is not in the file: 1 (y.jpg)"),
        (lambda r: [{**r[0], "id": 1}, *r[1:]], "[0] is {'image': 'VizWiz_val_00000000.jpg', 'answer': 'tomato soup', 'id': 1}"),
        (lambda r: [{"image": "x.jpg"}], "[0] has no answer; it has image"),
        (lambda r: [{"image": "x.jpg", "answer": 3}], "[0].answer is 3; expected text"),
        (lambda r: {"results": r}, "is {'results': [{'image': 'VizWiz_val_00000000.jpg', 'answer': 'tomato soup'}, {"),
    ],
)  # fmt: skip
def test_validator_says_what_is_wrong(tmp_path, only_test, recorded, capsys, edit, message):
    file = tmp_path / "submission.json"
    file.write_text(json.dumps(edit(recorded["expected"]["llava_convert"]["upload"])))
    status, _, err = run(capsys, "--validate", file, "--data", only_test)
    assert status == 1 and err.startswith("not valid: ") and message in err


def test_error_case_missing_prediction(official_error, capsys):
    case, folder = official_error("vizwiz", "missing-prediction")
    assert case["official"]["outcome"] == "exception"
    status, _, err = run(capsys, "--answers", folder / "answers" / "model.jsonl", "--data", folder)
    assert status == 2 and "vizwiz val" in err and "(1)" in err


def test_duplicates_and_answers_of_another_split_are_counted(data, answers, capsys):
    lines = answers.read_text().splitlines()
    foreign = json.dumps({**json.loads(lines[0]), "question_id": 7999})
    answers.write_text("\n".join([*lines, lines[5], foreign]) + "\n")
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and "(5)" in err
    assert "vizwiz val" in err and "(7999)" in err


def record(**changes: object) -> str:
    answers = [{"answer": "red", "answer_confidence": "yes"}]
    whole = {"image": "a.jpg", "question": "?", "answers": answers, "answer_type": "other", "answerable": 1}
    return json.dumps([whole | changes])


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("val.json", "", "is empty"),
        ("val.json", record()[:-30], "ends in the middle"),
        ("val.json", "{}", "is {}; expected a list of an object with image, answers, answer_type, answerable"),
        ("val.json", "[]", "is []; expected a list of an object with image, answers, answer_type, answerable, at least one"),
        ("val.json", '[{"image": "a.jpg", "question": "?"}]', "[0] has no answers, answer_type, answerable; it has image, question"),
        ("val.json", record(answers="red"), "[0].answers is 'red'"),
        ("val.json", record(answers=[]), "[0].answers is []; expected a list of an object with answer, at least one"),
        ("val.json", record(answers=[{"text": "red"}]), "[0].answers[0] has no answer; it has text"),
        ("val.json", record(answerable=2), "[0].answerable is 2"),
        ("val.json", record(answerable="1"), "[0].answerable is '1'"),
        ("val.json", record(), "annotation to a question that is not in the file: 1 (a.jpg), no annotation: 40 (VizWiz_val_00000000.jpg, VizWi"),
        ("llava_val.jsonl", '{"question_id": 0, "image": "a.jpg"}', "line 1 has no text"),
        ("llava_val.jsonl", '{"question_id": 0', "llava_val.jsonl, line 1 is not valid JSON"),
    ],
)  # fmt: skip
def test_broken_data_files_are_named(data, answers, capsys, name, content, message):
    (data / name).write_text(content)
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and name in err and message in err


def test_image_outside_the_folder_is_refused(only_test, answers, capsys):
    (only_test / "llava_test.jsonl").write_text('{"question_id": 0, "image": "../a.jpg", "text": "?"}\n')
    status, _, err = run(capsys, "--answers", answers, "--data", only_test)
    assert status == 2 and "llava_test.jsonl: question 0: image '../a.jpg' is outside" in err


@pytest.mark.parametrize("field", ["question_id", "image"])
def test_repeated_lines_are_refused(data, answers, capsys, field):
    lines = [json.loads(line) for line in (data / "llava_val.jsonl").open()]
    lines[1][field] = lines[0][field]
    (data / "llava_val.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and f"more than one record with the same {field}: {lines[0][field]} " in err


def test_missing_files_are_named(data, answers, capsys):
    (data / "val.json").unlink()
    status, _, err = run(capsys, "--answers", answers, "--data", data, "--split", "val")
    assert status == 2 and "has no answers to the questions of val: looked for val.json" in err
    (data / "llava_val.jsonl").unlink()
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and "has no VizWiz questions: looked for val.json, test.json, llava_test.jsonl" in err
    status, _, err = run(capsys, "--answers", answers, "--data", data, "--split", "test")
    assert status == 2 and "has no test questions: looked for llava_test.jsonl, test.json" in err


@pytest.mark.parametrize(
    "truth, said, average_precision, f1",
    [
        ([1, 1, 0, 0], [1, 1, 0, 0], 100.0, 100.0),
        ([1, 1, 0, 0], [0, 0, 0, 0], 50.0, 0.0),
        ([1, 1, 0, 0], [1, 0, 1, 0], 50.0, 50.0),
        ([1, 0, 0, 0], [1, 1, 1, 1], 25.0, 40.0),
        ([1, 1, 1, 0], [1, 0, 0, 0], 83.33, 50.0),
        ([0, 0], [1, 0], None, None),
    ],
)
def test_unanswerability_by_hand(truth, said, average_precision, f1):
    found = unanswerability([bool(t) for t in truth], [bool(s) for s in said])
    assert (found["average_precision"], found["f1_score"]) == (average_precision, f1)


def test_published_figures_are_of_the_server():
    assert VizWiz.published[LLAVA15] == 50.0 and "server" in VizWiz.published_on


def test_imports_without_torch(repo):
    code = "import sys, llava_sp.eval.vizwiz; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=repo).returncode == 0
