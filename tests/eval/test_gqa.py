"""GQA without a model: official files, scoring answers files, the predictions file of eval.py, errors."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest

from llava_sp.decoding import Generation
from llava_sp.eval.base import LLAVA15
from llava_sp.eval.gqa import GQA, distribution, llava_prediction, steps
from llava_sp.eval.inputs.answers_file import read_answers
from llava_sp.eval.run.evaluate import check_images
from tests.eval.commands import command_of

RECORDING = "gqa"

QUESTIONS = "testdev_balanced_questions.json"
LLAVA = "llava_gqa_testdev_balanced.jsonl"
PREDICTIONS = "testdev_balanced_predictions.json"


run = command_of(GQA)


def change(file: Path, edit) -> None:
    """Rewrites a JSON file after `edit` has changed its content in place."""
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def test_answers_file_scores_as_the_official_code(tmp_path, data, answers, recorded, capsys):
    output = tmp_path / "out"
    status, out, _ = run(capsys, "--answers", answers, "--data", data, "--output", output)
    assert status == 0
    expected = recorded["expected"]["gqa_eval"]["aggregate"]
    result = json.loads((output / "metrics.json").read_text())
    metrics = result["metrics"]
    assert f"{result['score']:.2f}" == expected["accuracy"] == "55.00"
    for name in ("binary", "open", "distribution"):
        assert f"{metrics[name]:.2f}" == expected[name]
    for ours, theirs in (
        ("structural", "structural type"),
        ("semantic", "semantic type"),
        ("steps", "steps number"),
        ("words", "words number"),
    ):
        figures = {name: [f"{f['accuracy']:.2f}", f["count"]] for name, f in metrics[f"per_{ours}"].items()}
        assert figures == expected[f"Accuracy / {theirs}"]
        assert list(figures) == list(expected[f"Accuracy / {theirs}"])
    lines = [json.loads(line) for line in (output / "per_item.jsonl").open()]
    per_item = recorded["expected"]["gqa_eval"]["per_item"]
    assert {line["question_id"]: line["score"] for line in lines} == {i: 100 * v for i, v in per_item.items()}
    assert GQA.headline(lines) == result["score"]
    assert lines[0]["references"] == ["yes"] and lines[0]["image"] == "n900000.jpg" and lines[0]["text"] == "Yes."
    assert list(result["categories"])[:4] == ["binary", "open", "choose", "compare"]
    assert result["categories"]["about attr"] == {"score": 77.78, "count": 9, "highest": 100.0}
    assert result["provenance"]["model_ids"] == ["synthetic-7b"]
    assert "GQA accuracy in percent: 55.0 (40 questions)" in out and "the same answers scored as lmms_eval does" in out


def test_predictions_equal_llavas_and_validate(tmp_path, data, answers, recorded, capsys):
    expected = recorded["expected"]["llava_convert"]["predictions"]
    for protocol in GQA.protocols:  # the official eval.py compares as llava15 does, so the file is always LLaVA's
        output = tmp_path / protocol
        run(capsys, "--answers", answers, "--data", data, "--output", output, "--protocol", protocol)
        assert json.loads((output / PREDICTIONS).read_text()) == expected
    status, out, _ = run(capsys, "--validate", output / PREDICTIONS, "--data", data)
    assert status == 0 and "answers all 40 balanced questions once (1 of them empty)" in out


@pytest.mark.parametrize(
    "text, predicted",
    [("white..", "white"), ("bed .", "bed "), ("cat\n", "cat\n"), ("a.b.", "a.b"), (" Yes", " yes"), ("", "")],
)
def test_llavas_conversion(text, predicted):
    assert llava_prediction(text) == predicted


@pytest.mark.parametrize(
    "protocol, right",
    [
        ("llava15", {"White.", "white..", "WHITE"}),
        ("lmms_eval", {"White.", "white..", "WHITE", " white\n", "white!", "(white)"}),
        ("vlmevalkit", {"WHITE", " white\n"}),
    ],
)
def test_what_each_protocol_forgives(data, protocol, right):
    benchmark = GQA(protocol=protocol)
    item = next(item for item in benchmark.load(data) if item.reference == "white")
    texts = ["White.", "white..", "WHITE", " white\n", "white!", "(white)", "white .", "the white"]
    scores = [benchmark.score([item], [text]).score for text in texts]
    assert {text for text, score in zip(texts, scores) if score == 100.0} == right


def test_punctuation_within_references_goes_too(data):
    change(data / QUESTIONS, lambda q: q["200900000"].update(answer="t-shirt"))
    expected = {"llava15": 0.0, "lmms_eval": 100.0, "vlmevalkit": 0.0}
    for protocol, score in expected.items():
        benchmark = GQA(protocol=protocol)
        assert benchmark.score(benchmark.load(data)[:1], ["Tshirt"]).score == score


def test_scored_as_holds_every_protocol(data, answers, capsys):
    _, out, _ = run(capsys, "--answers", answers, "--data", data)
    result = json.loads(out)
    assert result["scored_as"] == {"llava15": 55.0, "lmms_eval": 60.0, "vlmevalkit": 27.5}
    _, out, _ = run(capsys, "--answers", answers, "--data", data, "--protocol", "vlmevalkit")
    assert json.loads(out)["score"] == 27.5


@pytest.mark.parametrize("with_llava", [True, False])
def test_prompts_and_generation_equal_llavas(data, recorded_prompts, with_llava):
    expected = recorded_prompts["gqa"]
    if not with_llava:
        (data / LLAVA).unlink()
    for protocol in GQA.protocols:
        benchmark = GQA(protocol=protocol)
        items = {item.id: item for item in benchmark.load(data)}
        for case in expected["items"]:
            item = items[case["question_record"]["question_id"]]
            record = {**benchmark.record(item), "text": "decoded", "model_id": "llava-v1.5-7b", "metadata": {}}
            assert record == case["answer_record_without_answer_id"]
            assert list(record) == list(case["answer_record_without_answer_id"])
            assert benchmark.message(item) in case["prompt"]
            assert item.images == (data / "images" / case["question_record"]["image"],)
    assert asdict(GQA().generation) == {k: v for k, v in expected["generate_kwargs"].items() if "image" not in k}
    assert GQA(protocol="lmms_eval").generation == Generation(max_new_tokens=16)
    assert GQA(protocol="vlmevalkit").generation == Generation(max_new_tokens=512)


def test_order_is_that_of_llavas_file(data):
    lines = (data / LLAVA).read_text().splitlines()
    (data / LLAVA).write_text("\n".join(reversed(lines)))
    assert [item.id for item in GQA().load(data)] == [json.loads(line)["question_id"] for line in reversed(lines)]


def test_image_folders(data):
    (data / "data" / "images").mkdir(parents=True)
    assert GQA().load(data)[0].images[0].parent == data / "data" / "images"
    assert GQA(images=Path("/elsewhere")).load(data)[0].images[0] == Path("/elsewhere/n900000.jpg")
    with pytest.raises(ValueError, match=r"40 image files are missing \(.*n900000\.jpg, .*question 200900000"):
        check_images(GQA().load(data))


@pytest.mark.parametrize("folder", ["data", "questions1.2", "data/questions1.2"])
def test_questions_are_found_where_they_get_unzipped(data, answers, capsys, folder):
    (data / folder).mkdir(parents=True)
    (data / QUESTIONS).rename(data / folder / QUESTIONS)
    status, out, _ = run(capsys, "--answers", answers, "--data", data)
    assert status == 0 and json.loads(out)["score"] == 55.0


@pytest.mark.parametrize("with_llava", [True, False])
def test_only_balanced_questions_count(tmp_path, data, answers, recorded, capsys, with_llava):
    dropped = ["200900000", "200900001"]  # both were right
    change(data / QUESTIONS, lambda q: [q[i].update(isBalanced=False) for i in dropped])
    if not with_llava:
        (data / LLAVA).unlink()
    output = tmp_path / "out"
    assert run(capsys, "--answers", answers, "--data", data, "--output", output)[0] == 0
    result = json.loads((output / "metrics.json").read_text())
    assert result["score"] == round(100 * 20 / 38, 2) and result["provenance"]["count"] == 38
    assert {p["questionId"] for p in json.loads((output / PREDICTIONS).read_text())}.isdisjoint(dropped)
    full = tmp_path / "full.json"  # eval.py accepts predictions of the others too
    full.write_text(json.dumps(recorded["expected"]["llava_convert"]["predictions"]))
    assert run(capsys, "--validate", full, "--data", data)[0] == 0
    (data / QUESTIONS).rename(data / "testdev_all_questions.json")
    assert json.loads(run(capsys, "--answers", answers, "--data", data)[1])["score"] == result["score"]


def test_no_balanced_question_at_all(data, answers, capsys):
    change(data / QUESTIONS, lambda q: [question.update(isBalanced=False) for question in q.values()])
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and f"{QUESTIONS}: isBalanced is false for all 40 questions" in err


def test_steps_leave_out_what_only_reads_off_the_answer():
    operations = [("select", "lamp (1)"), ("relate", "on"), ("exist", "?"), ("query", "name"), ("choose name", "x")]
    assert steps({"operation": o, "argument": a} for o, a in operations) == 2
    assert steps([{"operation": "query", "argument": "color"}]) == 1
    assert steps([{"operation": "filter", "argument": "existing"}]) == 0  # eval.py looks for the letters anywhere


def test_distribution_by_hand():
    groups, gold, predicted = ["c", "c", "c", None], ["red", "red", "blue", "x"], ["red", "blue", "blue", "y"]
    assert distribution(groups, gold, predicted) == round(((1 - 2) ** 2 / 2 + (2 - 1) ** 2 / 1) / 100, 2)
    assert distribution(["c"] * 300, ["red"] * 300, ["blue"] * 300) == 3.0
    two = ["c"] * 300 + ["d"] * 100, ["red"] * 400, ["blue"] * 300 + ["red"] * 100
    assert distribution(*two) == 2.25  # (300 * 300 + 100 * 0) / 400 / 100
    assert distribution([None], ["x"], ["x"]) is None


def test_error_case_no_group(official_error, capsys):
    case, folder = official_error("gqa", "no-group-at-all-makes-distribution-divide-by-zero")
    assert case["official"]["outcome"] == "exception"
    status, out, _ = run(capsys, "--answers", folder / "answers" / "merge.jsonl", "--data", folder)
    result = json.loads(out)
    assert status == 0 and result["score"] == 100.0 and result["metrics"]["distribution"] is None
    assert result["metrics"]["binary"] is None and result["metrics"]["open"] == 100.0  # no binary question
    assert "binary" not in result["categories"]


def test_error_case_missing_prediction(official_error, capsys):
    case, folder = official_error("gqa", "missing-prediction")
    assert case["official"]["outcome"] == "exception"
    status, _, err = run(capsys, "--answers", folder / "answers" / "merge.jsonl", "--data", folder)
    assert status == 2 and "(200900001)" in err


def test_duplicates_strangers_and_gaps_are_counted(data, answers, capsys):
    lines = answers.read_text().splitlines()
    foreign = json.dumps({**json.loads(lines[0]), "question_id": "7"})
    answers.write_text("\n".join([*lines[2:], lines[5], foreign]) + "\n")
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2
    assert "(200900005)" in err
    assert "gqa" in err and "(7)" in err
    assert "(200900000, 200900001)" in err


def question(**changes: object) -> str:
    record = {
        "question": "Is it red?",
        "imageId": "n1",
        "isBalanced": True,
        "answer": "yes",
        "semantic": [{"operation": "select", "argument": "lamp (1)", "dependencies": []}],
        "groups": {"global": None, "local": "x"},
        "types": {"structural": "verify", "semantic": "attr", "detailed": "x"},
    }
    return json.dumps({"5": record | changes})


@pytest.mark.parametrize(
    "name, content, message",
    [
        (QUESTIONS, "", "is empty"),
        (QUESTIONS, question()[:-30], "ends in the middle"),
        (QUESTIONS, "[]", "is []; expected an object"),
        (QUESTIONS, "{}", "is {}; expected questions by id"),
        (
            QUESTIONS,
            '{"5": 3}',
            "5 is 3; expected an object with question, imageId, answer, isBalanced, semantic, groups, types",
        ),
        (
            QUESTIONS,
            '{"5": {"question": "?"}}',
            "5 has no imageId, answer, isBalanced, semantic, groups, types; it has question",
        ),
        (QUESTIONS, question(answer=1), "5.answer is 1; expected text"),
        (QUESTIONS, question(isBalanced=None), "5.isBalanced is None"),
        (QUESTIONS, question(isBalanced=1), "5.isBalanced is 1; expected true or false"),
        (QUESTIONS, question(types={"structural": "query"}), "5.types has no semantic; it has structural"),
        (QUESTIONS, question(groups={}), "5.groups has no global; it has nothing"),
        (QUESTIONS, question(semantic=[{"operation": "x"}]), "5.semantic[0] has no argument; it has operation"),
        (QUESTIONS, question(), "line to a question that is not in the file: 40 (200900000"),
        (
            LLAVA,
            '{"question_id": "200900000", "image": "a.jpg", "text": "?"}',
            "no line: 39 (200900001, 200900002, 200900003",
        ),
        (LLAVA, '{"question_id": "200900000", "image": "a.jpg"}', "line 1 has no text"),
        (
            LLAVA,
            '{"question_id": 1.5, "image": "a", "text": ""}',
            "llava_gqa_testdev_balanced.jsonl, line 1: question_id is 1.5",
        ),
        (LLAVA, '{"question_id": "2', f"{LLAVA}, line 1 is not valid JSON"),
    ],
)
def test_broken_data_files_are_named(data, answers, capsys, name, content, message):
    (data / name).write_text(content)
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and name in err and message in err


def test_repeated_lines_and_images_outside_are_refused(data, answers, capsys):
    lines = (data / LLAVA).read_text().splitlines()
    (data / LLAVA).write_text("\n".join([*lines, lines[3]]))
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and LLAVA in err and f"{QUESTIONS}: more than one line: 1 (200900003)" in err
    (data / LLAVA).write_text("\n".join([json.dumps({**json.loads(lines[0]), "image": "../x.jpg"}), *lines[1:]]))
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and f"{LLAVA}: question 200900000: image '../x.jpg' is outside" in err


def test_missing_questions_are_named(data, answers, capsys):
    (data / QUESTIONS).unlink()
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and f"{data} has no GQA questions: looked for {QUESTIONS}, " in err


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda p: p[3:], "no answer: 3 (200900000, 200900001, 200900002)"),
        (lambda p: [*p, p[0]], "more than one answer: 1 (200900000)"),
        (lambda p: [*p, {"questionId": "5", "prediction": "x"}], "answer to a question that is not in the file: 1 (5)"),
        (lambda p: [{**p[0], "questionId": 200900000}, *p[1:]], "[0].questionId is 200900000"),
        (lambda p: [{"questionId": "200900000"}, *p[1:]], "[0] has no prediction; it has questionId"),
        (lambda p: {"a": 1}, "is {'a': 1}; expected a list of an object with questionId, prediction"),
    ],
)  # fmt: skip
def test_validator_says_what_is_wrong(tmp_path, data, recorded, capsys, edit, message):
    file = tmp_path / PREDICTIONS
    file.write_text(json.dumps(edit(recorded["expected"]["llava_convert"]["predictions"])))
    status, _, err = run(capsys, "--validate", file, "--data", data)
    assert status == 1 and err.startswith("not valid: ") and message in err


def test_headline_of_a_resample(data, answers):
    benchmark = GQA()
    items = benchmark.load(data)
    per_item = benchmark.score(items, benchmark.match(items, read_answers(answers)[0])).per_item
    sample = [per_item[i] for i in (0, 0, 3, 7)]
    assert GQA.headline(sample) == 75.0
    assert Counter(line["score"] for line in per_item) == {100.0: 22, 0.0: 18}


def test_published():
    assert GQA.published[LLAVA15] == 62.0 and not GQA.published_on


def test_imports_without_torch(repo):
    code = "import sys, llava_sp.eval.gqa; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=repo).returncode == 0
