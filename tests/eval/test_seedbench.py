"""SEED-Bench: scores and prompts of LLaVA's code, its upload file, the id that is twice, and bad files."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from llava_sp.eval.base import LLAVA15, LLAVA_SP
from llava_sp.eval.run.evaluate import check_images
from llava_sp.eval.seedbench import SeedBench
from tests.eval.commands import command_of, read_lines, write_lines

RECORDING = "seed"

OFFICIAL, LLAVA = "SEED-Bench.json", "llava-seed-bench.jsonl"


run = command_of(SeedBench)


def change(data: Path, edit) -> None:
    """Edits the list of official questions."""
    content = json.loads((data / OFFICIAL).read_text())
    edit(content["questions"])
    (data / OFFICIAL).write_text(json.dumps(content))


def test_scores_equal_llavas(tmp_path, data, answers, recorded, capsys):
    output = tmp_path / "out"
    status, out, _ = run(capsys, "--answers", answers, "--data", data, "--output", output)
    expected = recorded["expected"]["llava_convert_seed"]
    result = json.loads((output / "metrics.json").read_text())
    lines = read_lines(output / "per_item.jsonl")
    assert status == 0 and "58.33 (48 questions)" in out
    assert result["score"] == float(expected["stdout_lines"]["Total"]) == SeedBench.headline(lines)
    printed = {name: float(value) for name, value in expected["stdout_lines"].items()}
    assert {name: c["score"] for name, c in result["categories"].items()} | {"Total": result["score"]} == printed
    assert list(result["categories"]) == [name for name in printed if name != "Total"]
    assert result["categories"]["image"]["count"] == 36 and result["categories"]["video"]["count"] == 12
    assert {str(line["question_id"]): line["score"] == 100 for line in lines} == expected["per_item_exact"]


def test_scores_equal_lmms_evals(tmp_path, data, answers, recorded, capsys):
    output = tmp_path / "out"
    assert run(capsys, "--answers", answers, "--data", data, "--output", output, "--protocol", "lmms_eval")[0] == 0
    expected = recorded["expected"]["lmms_eval"]
    result = json.loads((output / "metrics.json").read_text())
    lines = read_lines(output / "per_item.jsonl")
    assert {str(line["question_id"]): line["score"] / 100 for line in lines} == expected["per_item"]
    names = {"seed_all": "total", "seed_image": "image", "seed_video": "video"}
    assert {name: result["metrics"][ours] for name, ours in names.items()} == {
        name: round(100 * value, 2) for name, value in expected["aggregate"].items()
    }
    assert result["scored_as"] == {"lmms_eval": 62.5, "llava15": 58.33}


@pytest.mark.parametrize("own_prompts", [False, True])
def test_prompts_and_generation_equal_llavas(data, recorded_prompts, own_prompts):
    if own_prompts:
        (data / LLAVA).unlink()
    expected = recorded_prompts["seed"]
    generation = asdict(SeedBench.generation)
    assert generation == {key: value for key, value in expected["generate_kwargs"].items() if "image" not in key}
    benchmark = SeedBench()
    items = {item.id: item for item in benchmark.load(data)}
    for case in expected["items"]:
        item = items[case["question_record"]["question_id"]]
        record = {**benchmark.record(item), "text": "decoded", "model_id": "llava-v1.5-7b", "metadata": {}}
        assert record == case["answer_record_without_answer_id"]
        assert list(benchmark.record(item)) == ["question_id", "prompt"]
        assert f"USER: {benchmark.message(item)} ASSISTANT:" in case["prompt"]
        assert item.images == (data / case["question_record"]["image"],)


def test_both_sources_ask_the_same(data):
    with_file = SeedBench().load(data)
    (data / LLAVA).unlink()
    assert SeedBench().load(data) == with_file
    assert with_file[9].images[0] == data / "SEED-Bench-video-image" / "10_900009.png"


def test_the_parts_are_splits(tmp_path, data, answers, capsys):
    assert [len(SeedBench(split=split).load(data)) for split in ("all", "image", "video")] == [48, 36, 12]
    lines = read_lines(data / LLAVA)
    write_lines(data / LLAVA, [line for line in lines if "video" not in line["image"]])
    assert len(SeedBench(split="image").load(data)) == 36
    with pytest.raises(
        ValueError, match=r"llava-seed-bench.jsonl: question 900009 is not there; SEED-Bench.json has .What is object 9"
    ):
        SeedBench().load(data)
    by_id = {line["question_id"]: line for line in read_lines(answers)}
    wanted = [item.id for item in SeedBench(split="image").load(data)]
    write_lines(answers, [by_id[i] for i in wanted])
    status, out, _ = run(capsys, "--answers", answers, "--data", data, "--split", "image")
    result = json.loads(out)
    assert status == 0 and result["score"] == 58.33 and "video" not in result["categories"]
    change(data, lambda questions: [q.update(data_type="video") for q in questions])
    with pytest.raises(ValueError, match="has no questions of split image"):
        SeedBench(split="image").load(data)


def test_images_may_be_elsewhere(data):
    (data / "images").mkdir()
    assert SeedBench().load(data)[0].images[0].parent.parent == data
    items = SeedBench(images=Path("/elsewhere")).load(data)
    assert items[0].images[0] == Path("/elsewhere/SEED-Bench-image/img_0.jpg")
    with pytest.raises(ValueError, match=r"48 image files are missing \(.*img_0.jpg, .*question 900000"):
        check_images(items)


def test_upload_equals_llavas_and_validates(tmp_path, data, answers, recorded, capsys):
    output = tmp_path / "out"
    assert run(capsys, "--answers", answers, "--data", data, "--output", output)[0] == 0
    submission = output / "submission.jsonl"
    assert read_lines(submission) == recorded["expected"]["llava_convert_seed"]["upload"]
    status, out, _ = run(capsys, "--validate", submission, "--data", data)
    assert status == 0 and "answers all 48 questions of all once (2 of them empty)" in out


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda lines: lines[2:], "no answer: 2 (900000, 900001)"),
        (lambda lines: [*lines, lines[0]], "answer to a question that is not in the file: 1 (900000#2)"),
        (
            lambda lines: [*lines, {"question_id": "v7", "prediction": "A"}],
            "answer to a question that is not in the file: 1 (v7)",
        ),
        (
            lambda lines: [{**lines[0], "prediction": 3}, *lines[1:]],
            "upload.jsonl, line 1: prediction is 3",
        ),
        (lambda lines: [{"question_id": "900000", "answer": "A"}, *lines[1:]], "has no prediction"),
    ],
)
def test_validator_says_what_is_wrong(tmp_path, data, recorded, capsys, edit, message):
    file = tmp_path / "upload.jsonl"
    write_lines(file, edit(recorded["expected"]["llava_convert_seed"]["upload"]))
    status, _, err = run(capsys, "--validate", file, "--data", data)
    assert status == 1 and err.startswith("not valid: ") and message in err


def doubled(data: Path, **changes: object) -> None:
    """Gives the second question the id of the first, in both files, with `changes` to the official one."""
    change(data, lambda questions: questions[1].update(question_id="900000", **changes))
    lines = read_lines(data / LLAVA)
    lines[1]["question_id"] = 900000
    write_lines(data / LLAVA, lines)


def test_questions_of_one_id_keep_their_own_answers(tmp_path, data, answers, capsys):
    doubled(data)
    items = SeedBench().load(data)
    assert len({item.key for item in items}) == 48 and items[0].id == items[1].id
    assert [item.images[0].name for item in items[:2]] == ["img_0.jpg", "img_1.jpg"]
    lines = {line["question_id"]: line for line in read_lines(answers)}
    own = {900000: "first", 900001: "second"}
    texts = {i: {**line, "text": own.get(i, line["text"])} for i, line in lines.items()}
    texts[900001]["question_id"] = 900000
    benchmark = SeedBench(split="all")
    for records in (list(texts.values()), list(texts.values())[::-1]):  # told apart by the prompt
        assert benchmark.match(items, records)[:2] == ["first", "second"]
    without_prompts = [{"question_id": texts[i]["question_id"], "text": texts[i]["text"]} for i in sorted(texts)]
    assert benchmark.match(items, without_prompts)[:2] == ["first", "second"]  # by their order
    one = [record for record in without_prompts if record["text"] != "second"]
    assert benchmark.match(items, one)[:2] == ["first", "first"]  # as LLaVA's scorer, which knows ids alone
    with pytest.raises(ValueError, match=r"\(900000\)"):
        benchmark.match(items, [*without_prompts, without_prompts[0]])
    with pytest.raises(ValueError, match=r"no answer: 1 \(900000\)"):
        benchmark.match(items, [record for record in one if record["text"] != "first"])
    output = tmp_path / "out"
    write_lines(answers, list(texts.values()))
    assert run(capsys, "--answers", answers, "--data", data, "--output", output)[0] == 0
    assert [line["prediction"] for line in read_lines(output / "submission.jsonl")[:2]] == ["first", "second"]
    status, out, _ = run(capsys, "--validate", output / "submission.jsonl", "--data", data)
    assert status == 0 and "answers all 48 questions" in out


def test_equal_questions_of_one_id_have_their_own_lines(data):
    first = json.loads((data / OFFICIAL).read_text())["questions"][0]
    doubled(data, **{key: first[key] for key in first if key.startswith("choice") or key == "question"})
    lines = read_lines(data / LLAVA)
    lines[1]["text"] = lines[0]["text"]
    write_lines(data / LLAVA, lines)
    assert [item.images[0].name for item in SeedBench().load(data)[:2]] == ["img_0.jpg", "img_1.jpg"]


def test_ids_of_videos_are_text(data, answers, capsys):
    change(data, lambda questions: questions[9].update(question_id="v12"))
    (data / LLAVA).unlink()
    assert SeedBench().load(data)[9].images[0].name == "10_v12.png"
    lines = {line["question_id"]: line for line in read_lines(answers)}
    lines[900009]["question_id"] = "v12"
    write_lines(answers, list(lines.values()))
    status, out, _ = run(capsys, "--answers", answers, "--data", data)
    assert status == 0 and json.loads(out)["score"] == 58.33


def test_a_type_without_a_right_answer_has_zero(official_error, capsys):
    case, folder = official_error("seed", "a-type-with-no-correct-answer")
    assert case["official"]["message"] == "KeyError: 1"
    status, out, _ = run(capsys, "--answers", folder / "answers" / "merge.jsonl", "--data", folder)
    result = json.loads(out)
    assert status == 0 and result["score"] == 50.0
    assert result["metrics"]["by_type"] == {"Made-up dimension 01": 0.0, "Made-up dimension 10": 100.0}


def test_a_missing_prediction_is_an_error(official_error, capsys):
    case, folder = official_error("seed", "missing-prediction")
    assert case["official"]["message"] == "KeyError: 900009"
    status, _, err = run(capsys, "--answers", folder / "answers" / "merge.jsonl", "--data", folder)
    assert status == 2 and "(900009)" in err


def test_answers_of_other_questions(data, answers, capsys):
    write_lines(answers, [*read_lines(answers), {"question_id": "v1", "text": "A"}, {"question_id": 7, "text": "A"}])
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and "seedbench all" in err and "(v1, 7)" in err


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"answer": "E"}, "questions[0].answer is 'E'"),
        ({"answer": None}, "questions[0].answer is None"),
        ({"data_type": "sound"}, "questions[0].data_type is 'sound'"),
        ({"question_type_id": 13}, "question 900000: question_type_id is 13"),
        ({"question_type_id": [1]}, "questions[0].question_type_id is [1]"),
        ({"choice_c": 5}, "questions[0].choice_c is 5"),
        ({"question_id": [1]}, "questions[0].question_id is [1]"),
        ({"question": "Another?"}, "question 900000 asks 'What is object 0?"),
    ],
)
def test_wrong_fields_are_named(data, answers, capsys, changes, message):
    change(data, lambda questions: questions[0].update(changes))
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and OFFICIAL in err and message in err


@pytest.mark.parametrize(
    "kinds, message",
    [
        ({"Scene": [1]}, "question_type.Scene is [1]"),
        ({"Scene": {"id": 1}}, "question_type.Scene is {'id': 1}"),
        ({"Scene": None}, "question_type.Scene is None"),
        ({"Scene": 1, "Identity": 1}, "more than one record with the same number: 1 (1: record 0, record 1)"),
    ],
)
def test_kinds_of_questions_are_numbers(data, answers, capsys, kinds, message):
    content = json.loads((data / OFFICIAL).read_text())
    (data / OFFICIAL).write_text(json.dumps(content | {"question_type": kinds}))
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and OFFICIAL in err and message in err


def test_published_figures_are_those_of_the_split():
    everything, images, videos = (SeedBench(split=split) for split in (None, "image", "video"))
    assert everything.published == SeedBench.published == SeedBench(split="all").published
    assert everything.published[LLAVA15] == 58.6 and LLAVA_SP not in everything.published
    assert images.published == {LLAVA15: 66.2, LLAVA_SP: 67.9} and "TrustCLIP" in images.published_on
    assert videos.published == {} and not videos.published_on


def test_image_outside_the_folder_is_refused(data, answers, capsys):
    (data / LLAVA).unlink()
    change(data, lambda questions: questions[0].update(data_id="../../x"))
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and "question 900000: image 'SEED-Bench-image/../../x' is outside" in err


@pytest.mark.parametrize(
    "name, content, message",
    [
        (OFFICIAL, "", "is empty"),
        (OFFICIAL, '{"questions": [{"question_id": "9', "ends in the middle"),
        (OFFICIAL, "[]", "is []; expected an object with questions, question_type"),
        (
            OFFICIAL,
            '{"questions": [], "question_type": {}}',
            "questions is []; expected a list of an object with question_id, question_type_id, data_type, answer, question,",
        ),
        (LLAVA, '{"question_id": 900000, "te', "line 1 is not valid JSON"),
        (LLAVA, '{"question_id": 900000}', "llava-seed-bench.jsonl, line 1 has no image, text; it has question_id"),
        (LLAVA, '{"question_id": 900000, "text": "x", "image": "y"}', "question 900000 asks 'x'; SEED-Bench.json has"),
    ],
)
def test_broken_files_are_named(data, answers, capsys, name, content, message):
    (data / name).write_text(content)
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and name in err and message in err


def test_questions_must_be_there(data, answers, capsys):
    (data / OFFICIAL).unlink()
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and "has no questions: looked for SEED-Bench.json" in err
