"""MM-Vet without a model: the recorded judge and its aggregates, asking again, the grader's file, bad input."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from llava_sp.eval.cli import main
from llava_sp.eval.mmvet import AGAIN, PROMPT, MMVet, final_grade, one_decimal, read_grade
from llava_sp.eval.scoring.judge import JUDGEMENTS, read_judgements
from tests.eval.commands import results_of
from tests.eval.judge_server import JudgeServer, user_text

RECORDING = "mmvet"

OFFICIAL, LLAVAS = "mm-vet.json", "llava-mm-vet.jsonl"


def run(capsys, data: Path, *arguments: object) -> tuple[int, str, str]:
    answers = data / "answers" / "model.jsonl"
    status = main(MMVet, ["--answers", str(answers), "--data", str(data), *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


def name_of(body: dict) -> str:
    return "v1_" + re.findall(r"What about thing (\d+)\?", user_text(body))[-1]


def replies_of(replies: dict[str, list[str]]) -> Callable[[dict], str]:
    """A judge that gives the replies to a question one after the other."""
    left = {name: list(texts) for name, texts in replies.items()}
    return lambda body: left[name_of(body)].pop(0)


def test_judged_as_the_official_evaluator(tmp_path, data, recorded, capsys):
    expected = recorded["expected"]["mmvet_evaluator"]
    replies = recorded["files"]["judge_replies.json"]["data"]
    output = tmp_path / "out"
    with JudgeServer(replies_of({name: runs[0] for name, runs in replies.items()})) as server:
        status, out, err = run(capsys, data, "--output", output, *server.arguments)
    assert status == 0, err
    temperatures: dict[str, list[float]] = {}
    for body in server.requests:
        temperatures.setdefault(name_of(body), []).append(body["temperature"])
        assert body["max_tokens"] == expected["request"]["max_tokens"] and len(body["messages"]) == 1
    assert temperatures == expected["request_temperatures"]
    result, lines = results_of(output)
    found = result["metrics"]
    for names, figures in (("capabilities", "cap_score"), ("combinations", "cap_int_score_names_sorted")):
        shown = {name: str(value) for name, value in found[names].items()}
        shown |= {"total": str(found["total"]), "std": str(found["std"]), "runs": str(found["runs"])}
        assert shown == expected[figures]
    assert result["score"] == found["total"] == float(expected["cap_score"]["total"])
    grades = {f"v1_{line['question_id']}": line["grades"] for line in lines}
    assert grades == expected["scores"]
    assert MMVet.headline(lines) == result["score"]
    assert list(result["categories"]) == ["rec", "ocr", "know", "gen", "spat", "math"]
    assert result["categories"]["rec"] == {"score": 47.3, "count": 22, "highest": 100.0}
    assert lines[6]["score"] == 40.0 and lines[6]["judgements"] == ["0.4"] and lines[6]["references"]
    assert f"MM-Vet total: {result['score']} (40 questions)" in out and "judge: gpt-test" in out


def test_the_first_message_ends_in_the_official_row(data, recorded):
    benchmark = MMVet()
    item = benchmark.load(data)[0]
    request = benchmark.request(item, "Reply 0", [])
    text = request.messages[0][1]
    assert text.splitlines()[-1] == recorded["expected"]["mmvet_evaluator"]["request"]["last_line_of_first_prompt"]
    assert text.startswith(PROMPT + "\n") and request.temperature == 0.0 and request.max_tokens == 3


def test_what_is_no_grade_is_asked_again(data):
    benchmark = MMVet()
    item = benchmark.load(data)[0]
    replies, temperatures = [], []
    while (request := benchmark.request(item, "x", replies)) is not None:
        temperatures.append(request.temperature)
        assert request.messages[0][1].endswith(AGAIN) == bool(replies)
        replies.append("good")
    assert temperatures == [0.0, 0.0, 0.5, 1.0, 1.5, 2.0]
    assert final_grade(replies) == 0.0
    assert final_grade([*replies[:-1], "0.9"]) == 0.0  # the last reply is not read
    assert final_grade([*replies[:-2], "0.9"]) == 0.9
    assert benchmark.request(item, "x", ["0.5"]) is None and benchmark.request(item, "x", ["a", "1"]) is None


@pytest.mark.parametrize(
    "reply, grade",
    [
        ("0.5", 0.5), ("1", 1.0), ("0.7\n", 0.7), ("0.3 because", 0.3), ("1.0.", None), ("1.5", None), ("-0.1", None),
        ("nan", None), ("inf", None), (" 0.5", None), ("", None), ("Grade: 0.5", None),
    ],
)  # fmt: skip
def test_grades(reply, grade):
    assert read_grade(reply) == grade


def test_rounding_is_numpys():
    assert one_decimal(5.55) == 5.6 and round(5.55, 1) == 5.5
    assert one_decimal(45.25) == 45.2


def test_runs_are_averaged_and_their_spread_said(tmp_path, data, capsys):
    order: dict[str, int] = {}

    def answer(body: dict) -> str:
        run = order[name_of(body)] = order.get(name_of(body), -1) + 1
        return ("0.0", "1.0", "0.5")[run]

    output = tmp_path / "out"
    with JudgeServer(answer) as server:
        arguments = [*server.arguments, "--judge-runs", 3, "--judge-concurrency", 1]
        assert run(capsys, data, "--output", output, *arguments)[0] == 0
    result, lines = results_of(output)
    found = result["metrics"]
    assert result["score"] == 50.0 and found["runs"] == [0.0, 100.0, 50.0] and found["std"] == 40.8
    assert found["capabilities"]["rec"] == 50.0 and found["judge"]["runs"] == 3
    assert MMVet.headline(lines) == 50.0 and MMVet.headline([*lines[:3], lines[0]]) == 50.0


def test_prompts_records_and_generation_equal_llavas(data, recorded_prompts):
    expected = recorded_prompts["mmvet"]
    generation = asdict(MMVet.generation)
    assert generation == {key: value for key, value in expected["generate_kwargs"].items() if "image" not in key}
    for question_file in (LLAVAS, OFFICIAL):
        benchmark = MMVet()
        items = {item.id: item for item in benchmark.load(data)}
        assert list(items) == list(range(40))
        for case in expected["items"]:
            item = items[case["question_record"]["question_id"]]
            record = {**benchmark.record(item), "text": "decoded", "model_id": "llava-v1.5-7b", "metadata": {}}
            assert record == case["answer_record_without_answer_id"]
            assert benchmark.message(item) in case["prompt"]
            assert item.images[0].name == case["question_record"]["image"]
        if question_file == LLAVAS:
            (data / LLAVAS).unlink()


def test_pictures_stand_beside_the_official_file(data):
    (data / "mm-vet").mkdir()
    (data / OFFICIAL).rename(data / "mm-vet" / OFFICIAL)
    assert MMVet().load(data)[0].images[0].parent == data / "mm-vet" / "images"
    (data / "images").mkdir()
    assert MMVet().load(data)[0].images[0].parent == data / "images"
    assert MMVet(images=Path("/else")).load(data)[0].images == (Path("/else/v1_0.png"),)


def test_submission_equals_llavas_and_validates(tmp_path, data, recorded, capsys):
    output = tmp_path / "out"
    status, out, _ = run(capsys, data, "--output", output)
    assert status == 0 and "40 questions answered; no judge was used" in out and "to submit:" in out
    result, lines = results_of(output)
    assert result["score"] is None and result["metrics"] == {"judge": None} and "score" not in lines[0]
    submission = output / "submission.json"
    assert json.loads(submission.read_text()) == recorded["expected"]["llava_convert"]
    status, out, _ = run(capsys, data, "--validate", submission)
    assert status == 0 and "answers all 40 questions once (0 of them empty)" in out


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda results: {k: v for k, v in results.items() if k != "v1_7"}, "no answer: 1 (v1_7)"),
        (lambda results: results | {"v1_99": "x"}, "answer to a question that is not in the file: 1 (v1_99)"),
        (lambda results: results | {"v1_0": 3}, "v1_0 is 3; expected text"),
        (list, "is ['v1_0', 'v1_1', 'v1_2', 'v1_3', 'v1_4', 'v1_5', 'v1_6', 'v1_7', 'v1_8', 'v1_"),
    ],
)
def test_validator_says_what_is_wrong(tmp_path, data, recorded, capsys, change, message):
    file = tmp_path / "submission.json"
    file.write_text(json.dumps(change(recorded["expected"]["llava_convert"])))
    status, _, err = run(capsys, data, "--validate", file)
    assert status == 1 and err.startswith("not valid: ") and message in err


def grade_file(tmp_path: Path, recorded: dict, **changes: object) -> Path:
    """A file as the official code writes it: the recorded grades, twice."""
    expected = recorded["expected"]["mmvet_evaluator"]
    grades = {
        name: {"model": ["gpt-4-0613"] * 2, "content": expected["last_content"][name] * 2, "score": scores * 2}
        for name, scores in expected["scores"].items()
    }
    file = tmp_path / "model_gpt-4-0613-grade-2runs.json"
    file.write_text(json.dumps(grades | changes, indent=4))
    return file


def test_official_grades_are_read(tmp_path, data, recorded, capsys):
    file = grade_file(tmp_path, recorded)
    status, out, _ = run(capsys, data, "--judgements", file)
    result = json.loads(out)
    assert status == 0 and result["score"] == 53.5 and result["metrics"]["runs"] == [53.5, 53.5]
    about = result["metrics"]["judge"]
    assert about["model"] == "gpt-4-0613" and about["runs"] == 2 and about["prompt"] == "not recorded"
    result = json.loads(run(capsys, data, "--judgements", file, "--judge-runs", 1)[1])
    assert result["metrics"]["runs"] == [53.5]


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"v1_3": {"model": [], "content": [], "score": [1.0]}},
            "questions have 1, 2 scores each; is the run unfinished",
        ),
        ({"v1_3": {"score": [float("nan"), 1.0], "model": []}}, "v1_3.score[0] is nan"),
        ({"v1_3": {"score": [7, 1.0], "model": []}}, "v1_3.score[0] is 7; expected a number from 0 to 1"),
        ({"v1_3": {"model": []}}, "v1_3 has no score"),
        ({"v1_300": {"score": [1, 1], "model": []}}, "judgement to a question that is not in the file: 1 (v1_300)"),
    ],
)
def test_official_grades_that_do_not_fit(tmp_path, data, recorded, capsys, changes, message):
    status, _, err = run(capsys, data, "--judgements", grade_file(tmp_path, recorded, **changes))
    assert status == 2 and "grade-2runs.json" in err and message in err


def test_own_judgements_are_read_again_with_every_attempt(tmp_path, data, recorded, capsys):
    replies = recorded["files"]["judge_replies.json"]["data"]
    output = tmp_path / "out"
    with JudgeServer(replies_of({name: runs[0] for name, runs in replies.items()})) as server:
        assert run(capsys, data, "--output", output, *server.arguments)[0] == 0
    log = output / JUDGEMENTS
    assert [line["reply"] for line in read_judgements(log) if line["question_id"] == 6] == ["good", "0.4"]
    assert json.loads(run(capsys, data, "--judgements", log)[1])["score"] == 53.5
    lines = [line for line in read_judgements(log) if (line["question_id"], line["attempt"]) != (6, 1)]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, _, err = run(capsys, data, "--judgements", log)
    assert status == 2 and "judged with another prompt or setting, or incompletely: 1 question (6)" in err
    with JudgeServer(replies_of({"v1_6": ["0.4"]})) as server:  # going on asks for the second attempt only
        assert run(capsys, data, "--output", output, *server.arguments)[0] == 0
    assert len(server.requests) == 1 and user_text(server.requests[0]).endswith(AGAIN)
    assert results_of(output)[0]["score"] == 53.5


def test_the_official_table_may_be_used(tmp_path, data, capsys):
    file = tmp_path / "table.txt"
    file.write_text("The table.\n")
    with JudgeServer(lambda body: "1.0") as server:
        arguments = ["--output", tmp_path / "out", *server.arguments, "--judge-prompt", file]
        assert run(capsys, data, *arguments)[0] == 0
    assert "The table.\n\nWhat about thing 0? | a <AND> b | Reply 0 | " in map(user_text, server.requests)
    result, _ = results_of(tmp_path / "out")
    assert result["metrics"]["judge"]["prompt"].startswith(f"{file} (sha256 ")
    assert str(file) in result["provenance"]["data_files"]
    status, _, err = run(capsys, data, "--judge-prompt", tmp_path / "none.txt")
    assert status == 2 and "none.txt does not exist" in err


def entry(**changes: object) -> dict:
    return {"imagename": "v1_0.png", "question": "?", "answer": "a", "capability": ["rec"]} | changes


@pytest.mark.parametrize(
    "name, content, message",
    [
        (OFFICIAL, "", "is empty"),
        (OFFICIAL, '{"v1_0": {"question": "a', "ends in the middle"),
        (OFFICIAL, "[]", "is []; expected an object"),
        (OFFICIAL, "{}", "is {}; expected questions by name"),
        (OFFICIAL, json.dumps({"v2_0": entry()}), "[0] is 'v2_0'; expected v1_ and a number"),
        (OFFICIAL, json.dumps({"v1_0": entry(answer=3)}), "v1_0.answer is 3; expected text"),
        (OFFICIAL, json.dumps({"v1_0": entry(capability=[])}), "v1_0.capability is []"),
        (OFFICIAL, json.dumps({"v1_0": entry(imagename="../x.png")}), "does not fit"),
        (OFFICIAL, json.dumps({"v1_0": entry()}), "line to a question that is not in the file: 39 (v1_1"),
        (LLAVAS, '{"question_id": 0, "image": "v1_0.png"}', "line 1 has no text"),
        (
            LLAVAS,
            '{"question_id": "0", "image": "v1_0.png", "text": "?"}',
            "llava-mm-vet.jsonl, line 1: question_id is '0'",
        ),
        (LLAVAS, '{"question_id": 0, "image": "v1_0.png", "text": "?"}', "no line: 39 (v1_1, v1_2, v1_3"),
        (
            LLAVAS,
            '{"question_id": 0, "image": "a", "text": ""}\n' * 2,
            "more than one line: 1 (v1_0), no line: 39 (v1_1, v1_2, v1_3",
        ),
        (LLAVAS, '{"question_id": 0, "im', "line 1 is not valid JSON"),
    ],
)
def test_broken_data_files_are_named(data, capsys, name, content, message):
    (data / name).write_text(content)
    status, _, err = run(capsys, data)
    assert status == 2 and name in err and message in err


def test_picture_outside_the_folder_is_refused(data, capsys):
    (data / LLAVAS).unlink()
    (data / OFFICIAL).write_text(json.dumps({"v1_0": entry(imagename="../x.png")}))
    status, _, err = run(capsys, data)
    assert status == 2 and "v1_0: image '../x.png' is outside" in err


def test_answers_that_do_not_fit(data, capsys):
    file = data / "answers" / "model.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[2:], lines[5]]) + "\n")
    status, _, err = run(capsys, data)
    assert status == 2
    assert "(5)" in err and "(0, 1)" in err
    (data / OFFICIAL).unlink()
    assert "has no official questions of MM-Vet: looked for mm-vet.json" in run(capsys, data)[2]
