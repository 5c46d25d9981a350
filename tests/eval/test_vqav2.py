"""VQAv2 without a model: official files, scoring answers files, submission and validation, errors."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from llava_sp.decoding import Generation
from llava_sp.eval.base import LLAVA15
from llava_sp.eval.run.evaluate import check_images
from llava_sp.eval.vqav2 import VQAv2
from tests.eval.commands import command_of
from tests.messages import names, refused

RECORDING = "vqav2"

QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
ANNOTATIONS = "v2_mscoco_val2014_annotations.json"
LLAVA_TEST = "llava_vqav2_mscoco_test2015.jsonl"


run = command_of(VQAv2)


@pytest.mark.parametrize(
    "protocol, scorer", [("llava15", "llava_pipeline.vqaeval_py27"), ("official", "raw_answers.vqaeval_py27")]
)
def test_answers_file_scores_as_the_official_code(tmp_path, data, answers, recorded, capsys, protocol, scorer):
    output = tmp_path / "out"
    status, out, _ = run(
        capsys, "--answers", answers, "--data", data, "--output", output, "--protocol", protocol
    )  # fmt: skip
    assert status == 0
    expected = recorded["expected"][scorer]
    result = json.loads((output / "metrics.json").read_text())
    assert result["score"] == expected["aggregate"]["overall"]
    assert result["metrics"]["per_answer_type"] == expected["aggregate"]["perAnswerType"]
    assert result["metrics"]["per_question_type"] == expected["aggregate"]["perQuestionType"]
    lines = [json.loads(line) for line in (output / "per_item.jsonl").open()]
    assert {str(line["question_id"]): line["score"] for line in lines} == expected["per_item"]
    origin = result["provenance"]
    assert origin["protocol"] == protocol and origin["split"] == "val" and origin["count"] == 40
    assert origin["model_ids"] == ["synthetic-7b"] and len(origin["data_files"]) == 2
    assert f"{result['score']} (40 questions)" in out
    kinds = [line.split() for line in out.splitlines() if line.startswith("  ")]
    assert [kind[0] for kind in kinds] == ["yes/no", "number", "other"]
    assert {kind[0]: float(kind[1]) for kind in kinds} == result["metrics"]["per_answer_type"]
    assert str(output / "metrics.json") in out and str(output / "per_item.jsonl") in out


def test_lmms_eval_scores_as_recorded(tmp_path, data, answers, recorded, capsys):
    output = tmp_path / "out"
    status, _, _ = run(
        capsys, "--answers", answers, "--data", data, "--output", output, "--protocol", "lmms_eval"
    )  # fmt: skip
    assert status == 0
    expected = recorded["expected"]["raw_answers.lmms_eval"]
    result = json.loads((output / "metrics.json").read_text())
    assert result["score"] == round(100 * expected["aggregate"]["exact_match"], 2) == 72.75
    lines = [json.loads(line) for line in (output / "per_item.jsonl").open()]
    assert {str(line["question_id"]): line["score"] for line in lines} == {
        i: round(100 * value, 2) for i, value in expected["per_item"].items()
    }
    assert lines[0]["answer"] == "green" and lines[0]["text"] == "Green."
    assert result["scored_as"] == {"lmms_eval": 72.75, "llava15": 70.25, "official": 65.25}


@pytest.mark.parametrize("protocol", VQAv2.protocols)
def test_headline_follows_from_the_per_item_records(data, answers, protocol):
    benchmark = VQAv2(protocol=protocol)
    items = benchmark.load(data)
    scores = benchmark.score(items, [json.loads(line)["text"] for line in answers.open()])
    assert VQAv2.headline(scores.per_item) == scores.score
    assert VQAv2.headline([scores.per_item[0]] * 2 + [scores.per_item[6]]) == 66.67


def test_lmms_eval_normalises_where_annotators_agree(data):
    benchmark = VQAv2(protocol="lmms_eval")
    item = next(item for item in benchmark.load(data) if item.id == 900012000)  # ten times "a hat"
    assert benchmark.score([item], ["hat"]).score == 100.0
    assert benchmark.under("llava15").score([item], ["hat"]).score == 0.0


def test_without_output_the_result_is_printed(data, answers, capsys):
    status, out, _ = run(capsys, "--answers", answers, "--data", data)
    assert status == 0 and json.loads(out)["score"] == 70.25


def test_prompts_and_generation_equal_llavas(data, recorded_prompts):
    expected = recorded_prompts["vqav2"]
    generation = asdict(VQAv2.generation)
    assert generation == {key: value for key, value in expected["generate_kwargs"].items() if "image" not in key}
    for split, protocol in itertools.product(("val", "test"), VQAv2.protocols):
        benchmark = VQAv2(split, protocol)  # official questions and LLaVA's question file give the same prompts
        items = {item.id: item for item in benchmark.load(data)}
        for case in expected["items"]:
            item = items[case["question_record"]["question_id"]]
            record = {**benchmark.record(item), "text": "decoded", "model_id": "llava-v1.5-7b", "metadata": {}}
            assert record == case["answer_record_without_answer_id"]
            assert benchmark.message(item) in case["prompt"]
            if split == "test":
                assert item.images == (data / "test2015" / case["question_record"]["image"],)


def test_lmms_eval_generates_16_tokens():
    assert VQAv2(protocol="lmms_eval").generation == Generation(max_new_tokens=16)


def test_published_figures_are_of_the_server():
    assert VQAv2.published[LLAVA15] == 78.5 and "server" in VQAv2.published_on


def test_images_have_coco_names(data):
    assert VQAv2(split="val").load(data)[0].images[0] == data / "val2014" / "COCO_val2014_000000900001.jpg"
    (data / "images").mkdir()
    assert VQAv2(split="val").load(data)[0].images[0].parent == data / "images"
    elsewhere = VQAv2(split="val", images=Path("/elsewhere"))
    assert elsewhere.load(data)[0].images[0] == Path("/elsewhere/COCO_val2014_000000900001.jpg")


def test_missing_images_are_counted_before_anything_is_loaded(data):
    items = VQAv2(split="val").load(data)
    with refused("20 image files", "COCO_val2014_000000900001.jpg", "question 900001000"):
        check_images(items)


def test_submission_equals_llavas_and_validates(tmp_path, data, answers, recorded, capsys):
    output = tmp_path / "out"
    assert run(capsys, "--answers", answers, "--data", data, "--split", "test", "--output", output)[0] == 0
    submission = json.loads((output / "submission.json").read_text())
    assert submission == recorded["expected"]["llava_convert"]["upload"]
    assert json.loads((output / "metrics.json").read_text())["score"] is None
    status, out, _ = run(capsys, "--validate", output / "submission.json", "--data", data)
    assert status == 0 and names(out, output / "submission.json", "40 questions of test", "(2", "empty")


def test_test_dev_submission_covers_the_whole_test_set(tmp_path, data, answers, capsys):
    lines = (data / LLAVA_TEST).read_text().splitlines(keepends=True)
    (data / "llava_vqav2_mscoco_test-dev2015.jsonl").write_text("".join(lines[:10]))
    answers.write_text("".join(answers.read_text().splitlines(keepends=True)[:10]))
    output = tmp_path / "out"
    assert run(capsys, "--answers", answers, "--data", data, "--split", "test-dev", "--output", output)[0] == 0
    submission = json.loads((output / "submission.json").read_text())
    assert len(submission) == 40 and [line["answer"] for line in submission[10:]] == [""] * 30
    assert submission[0] == {"question_id": 900001000, "answer": "green"}
    status, out, _ = run(capsys, "--validate", output / "submission.json", "--data", data)
    assert status == 0 and "(30 of them empty)" in out


def test_questions_of_test_dev_that_the_whole_set_lacks(tmp_path, data, answers, capsys):
    lines = (data / LLAVA_TEST).read_text().splitlines(keepends=True)
    (data / "llava_vqav2_mscoco_test-dev2015.jsonl").write_text("".join(lines[:10]))
    (data / LLAVA_TEST).write_text("".join(lines[2:]))
    answers.write_text("".join(answers.read_text().splitlines(keepends=True)[:10]))
    arguments = ["--split", "test-dev", "--output", tmp_path / "out"]
    status, _, err = run(capsys, "--answers", answers, "--data", data, *arguments)
    assert status == 2 and not (tmp_path / "out").exists()
    assert f"{LLAVA_TEST} lacks 2 of the 10 questions of test-dev (900001000, 900001001)" in err


@pytest.mark.parametrize("protocol, answer", [("llava15", "green"), ("official", "Green."), ("lmms_eval", "green")])
def test_submission_follows_the_protocol(tmp_path, data, answers, capsys, protocol, answer):
    output = tmp_path / "out"
    arguments = ["--split", "test", "--output", output, "--protocol", protocol]
    assert run(capsys, "--answers", answers, "--data", data, *arguments)[0] == 0
    assert json.loads((output / "submission.json").read_text())[0]["answer"] == answer


def break_submission(kind: str, results: list):
    if kind == "missing":
        return results[3:]
    if kind == "doubled":
        return [*results, results[0]]
    if kind == "foreign":
        return [*results, {"question_id": 5, "answer": "x"}]
    if kind == "text id":
        return [{**results[0], "question_id": str(results[0]["question_id"])}, *results[1:]]
    if kind == "extra field":
        return [{**results[0], "image_id": 3}, *results[1:]]
    return {"results": results}


@pytest.mark.parametrize(
    "kind, parts",
    [
        ("missing", ("no answer: 3 (900001000, 900001001, 900002000)",)),
        ("doubled", ("one answer: 1 (900001000)",)),
        ("foreign", ("file: 1 (5)",)),
        ("text id", ("[0].question_id is '900001000'",)),
        ("extra field", ("[0] is {'question_id': 900001000, 'answer': 'green', 'image_id': 3}",)),
        ("dict", ("is {'results': [{'question_id': 900001000, 'answer': 'green'}, {'question_id': 9...",)),
    ],
)
def test_validator_says_what_is_wrong(tmp_path, data, recorded, capsys, kind, parts):
    file = tmp_path / "submission.json"
    file.write_text(json.dumps(break_submission(kind, recorded["expected"]["llava_convert"]["upload"])))
    status, _, err = run(capsys, "--validate", file, "--data", data)
    assert status == 1 and err.startswith("not valid: ") and names(err, *parts)


def test_half_a_last_line_is_left_out_and_said(data, answers, capsys):
    whole = answers.read_bytes()
    answers.write_bytes(whole[:-30])
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2
    assert "(900020001)" in err and "line 40 is cut off" in err
    answers.write_bytes(whole + b'{"question_id": 9000')
    status, out, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 0 and json.loads(out)["score"] == 70.25 and "line 41 is cut off" in err
    answers.write_bytes(whole.rstrip(b"\n"))
    assert run(capsys, "--answers", answers, "--data", data)[0] == 0


def test_half_last_line_cut_inside_a_character(data, answers, capsys):
    whole = answers.read_bytes()
    answers.write_bytes(whole + '{"question_id": 7, "text": "caf\u00e9'.encode()[:-1])
    status, out, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 0 and json.loads(out)["score"] == 70.25
    assert "line 41 is cut off" in err
    answers.write_bytes(b"\xef\xbb\xbf" + whole)  # a byte order mark is no harm
    assert run(capsys, "--answers", answers, "--data", data)[0] == 0
    for content in (b'{"text": "caf\xe9"}\n' + whole, whole + b'{"text": "caf\xe9"}', whole + b'{"text": "\xc3\n'):
        answers.write_bytes(content)
        status, _, err = run(capsys, "--answers", answers, "--data", data)
        assert status == 2 and "merge.jsonl is not UTF-8 text" in err and "at byte" in err


def test_broken_line_in_the_middle_is_named(data, answers, capsys):
    lines = answers.read_text().splitlines()
    lines[7] = lines[7][:-9]
    answers.write_text("\n".join(lines) + "\n")
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and names(err, "merge.jsonl, line 8", "JSON")


def test_duplicates_strangers_and_gaps_are_counted(data, answers, capsys):
    lines = answers.read_text().splitlines()
    foreign = json.dumps({**json.loads(lines[0]), "question_id": 7})
    answers.write_text("\n".join([*lines[2:], lines[5], foreign]) + "\n")
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2
    assert "(900003001)" in err
    assert "vqav2 val" in err and "(7)" in err
    assert "(900001000, 900001001)" in err


def test_answers_file_of_another_kind(tmp_path, data, recorded, capsys):
    upload = tmp_path / "upload.json"
    upload.write_text(json.dumps(recorded["expected"]["llava_convert"]["upload"]))
    status, _, err = run(capsys, "--answers", upload, "--data", data)
    assert status == 2 and "is a JSON list" in err
    upload.write_text('{"question_id": 3}\n')
    status, _, err = run(capsys, "--answers", upload, "--data", data)
    assert status == 2 and "line 1 has no " in err
    status, _, err = run(capsys, "--answers", tmp_path / "none.jsonl", "--data", data)
    assert status == 2 and "none.jsonl does not exist" in err


def annotation(**changes: object) -> str:
    """An annotations file with one record, changed."""
    record = {"question_id": 1, "answer_type": "other", "question_type": "what", "answers": [{"answer": "red"}]}
    return json.dumps({"annotations": [record | changes]})


@pytest.mark.parametrize(
    "name, content, parts",
    [
        (QUESTIONS, "", ("is empty",)),
        (QUESTIONS, '{"questions": [{"question_id": 1, "quest', ("ends",)),
        (QUESTIONS, "[]", ("is []", "object", "questions")),
        (
            QUESTIONS,
            '{"questions": []}',
            ("questions is []", "list", "question_id, image_id, question", "at least one"),
        ),
        (
            QUESTIONS,
            '{"questions": [{"question_id": 1, "question": "?"}]}',
            ("questions[0]", "no image_id", "question_id, question"),
        ),
        (QUESTIONS, '{"questions": [{"id": 1}]}', ("questions[0]", "no question_id, image_id, question", "id")),
        (ANNOTATIONS, '{"annotations": []}', ("no annotation: 40 (900001000, 900001001, 900002000, ...)",)),
        (
            ANNOTATIONS,
            '{"annotations": [{"question_id": 1}]}',
            ("annotations[0]", "no answers, answer_type, question_type", "question_id"),
        ),
        (ANNOTATIONS, '{"annotations": [5]}', ("annotations[0] is 5",)),
        (ANNOTATIONS, annotation(answers="red"), ("annotations[0].answers is 'red'",)),
        (ANNOTATIONS, annotation(answers=[]), ("annotations[0].answers is []",)),
        (ANNOTATIONS, annotation(answers=["x"]), ("annotations[0].answers[0] is 'x'",)),
        (
            ANNOTATIONS,
            annotation(answers=[{"answer": "a"}, {"id": 1}]),
            ("annotations[0].answers[1]", "no answer", "id"),
        ),
        (
            ANNOTATIONS,
            annotation(answers=[{"answer": "a", "answer_id": 1}, {"answer": "a", "answer_id": [2]}]),
            ("annotations[0].answers[1].answer_id is [2]",),
        ),
        (
            ANNOTATIONS,
            json.dumps({"annotations": json.loads(annotation())["annotations"] * 2}),
            ("one annotation: 1 (1)", "file: 1 (1)"),
        ),
        (ANNOTATIONS, annotation(answer_type=["a"]), ("annotations[0].answer_type is ['a']",)),
        (ANNOTATIONS, annotation(question_id=None), ("annotations[0].question_id is None",)),
        (
            QUESTIONS,
            '{"questions": [{"question_id": [1], "question": "?", "image_id": 3}]}',
            ("questions[0].question_id is [1]",),
        ),
        (
            QUESTIONS,
            '{"questions": [{"question_id": 1, "question": 2, "image_id": 3}]}',
            ("questions[0].question is 2",),
        ),
        (
            QUESTIONS,
            '{"questions": [{"question_id": 1, "question": "?", "image_id": "x"}]}',
            ("questions[0].image_id is 'x'",),
        ),
    ],
)
def test_broken_data_files_are_named(data, answers, capsys, name, content, parts):
    (data / name).write_text(content)
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and name in err and names(err, *parts)


def test_ids_may_be_zero(tmp_path, capsys):
    answers = [{"answer": "red", "answer_id": i} for i in range(10)]
    annotation = {"question_id": 0, "image_id": 0, "answer_type": "other", "question_type": "what", "answers": answers}
    (tmp_path / QUESTIONS).write_text('{"questions": [{"question_id": 0, "image_id": 0, "question": "?"}]}')
    (tmp_path / ANNOTATIONS).write_text(json.dumps({"annotations": [annotation]}))
    (tmp_path / "answers.jsonl").write_text('{"question_id": 0, "text": "Red"}')
    status, out, _ = run(capsys, "--answers", tmp_path / "answers.jsonl", "--data", tmp_path)
    assert status == 0 and json.loads(out)["score"] == 100.0


def test_missing_annotations_are_named(data, answers, capsys):
    (data / ANNOTATIONS).unlink()
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and names(err, "questions of val", ANNOTATIONS)


def test_files_one_folder_below_are_found(data, answers, capsys):
    (data / "annotations").mkdir()
    for name in (QUESTIONS, ANNOTATIONS):
        (data / name).rename(data / "annotations" / name)
    status, out, _ = run(capsys, "--answers", answers, "--data", data, "--split", "val")
    assert status == 0 and json.loads(out)["score"] == 70.25


def test_image_outside_the_folder_is_refused(data, answers, capsys):
    line = json.loads((data / LLAVA_TEST).read_text().splitlines()[0])
    (data / LLAVA_TEST).write_text(json.dumps({**line, "image": "../../x.jpg"}) + "\n")
    status, _, err = run(capsys, "--answers", answers, "--data", data, "--split", "test")
    assert status == 2 and "'../../x.jpg' is outside" in err


def test_output_of_another_run_is_refused(tmp_path, data, answers, capsys):
    output = tmp_path / "out"
    assert run(capsys, "--answers", answers, "--data", data, "--output", output)[0] == 0
    assert run(capsys, "--answers", answers, "--data", data, "--output", output)[0] == 0
    answers.write_text(answers.read_text().replace("Green.", "Red."))
    status, _, err = run(capsys, "--answers", answers, "--data", data, "--output", output)
    assert status == 2 and names(err, output, "settings", "answers_sha256", "--output")
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "metrics.json").write_text("{}")
    status, _, err = run(capsys, "--answers", answers, "--data", data, "--output", stranger)
    assert status == 2 and names(err, stranger, "metrics.json", "no run.json", "--output")


def test_without_arguments_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LLAVA_SP_DATA", raising=False)
    monkeypatch.delenv("LLAVA_SP_RUNS", raising=False)
    status, _, err = run(capsys)
    assert status == 2
    for part in (
        "llava-sp-7b-cropping-lora",
        "playground/data/eval/vqav2",
        "--model",
        "--data",
        "scripts/quickstart.sh",
    ):
        assert part in err


def test_default_model_is_what_the_fine_tuning_script_writes(repo):
    from llava_sp.eval.cli import DEFAULT_MODEL

    text = (repo / "configs" / "finetune_lora_7b_cropping.yaml").read_text()
    assert f"output_dir: ${{LLAVA_SP_RUNS:-./runs}}/{DEFAULT_MODEL}" in text


def test_answers_without_their_questions_are_no_test_split(data, answers, capsys):
    (data / "v2_OpenEnded_mscoco_val2014_questions.json").unlink()
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and names(err, data, "v2_mscoco_val2014_annotations.json", "--split test")
    status, out, err = run(capsys, "--answers", answers, "--data", data, "--split", "test")
    assert status == 0 and json.loads(out)["score"] is None and "note: no score: only the server" in err


def test_splits_and_protocols_are_checked():
    with refused("split 'dev'", "val, test-dev, test, train"):
        VQAv2(split="dev")
    with refused("protocol 'mine'", "llava15, official, lmms_eval"):
        VQAv2(protocol="mine")
    assert Generation() == VQAv2.generation


def test_script_runs_from_any_directory(repo, tmp_path):
    environment = {**os.environ, "LLAVA_SP_ENV": "current", "NPROC": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    for name in ("LLAVA_SP_DATA", "LLAVA_SP_RUNS"):
        environment.pop(name, None)
    script = ["bash", str(repo / "scripts" / "eval" / "vqav2.sh")]
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "bash scripts/quickstart.sh" in done.stderr and "Traceback" not in done.stderr
