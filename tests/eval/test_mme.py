"""MME without a model: the recorded official figures, results folder, both layouts, and bad input."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from llava_sp.eval.mme import COGNITION, MME, PERCEPTION, SUBTASKS, lmms_label, official_label
from llava_sp.eval.run.evaluate import check_images
from llava_sp.eval.scoring.yes_no import vlmevalkit
from tests.eval.commands import command_of, read_lines, write_lines

RECORDING = "mme"

QUESTIONS = "llava_mme.jsonl"
ROOT = "MME_Benchmark_release_version"


run = command_of(MME)


def scored(capsys, data: Path, *arguments: object) -> dict:
    status, out, err = run(capsys, "--answers", data / "answers" / "model.jsonl", "--data", data, *arguments)
    assert status == 0, err
    return json.loads(out)


def refused(capsys, data: Path) -> str:
    status, _, err = run(capsys, "--answers", data / "answers" / "model.jsonl", "--data", data)
    assert status == 2
    return err


def outputs(capsys, data: Path, output: Path, protocol: str = "llava15") -> tuple[dict, list[dict]]:
    answers = data / "answers" / "model.jsonl"
    assert run(capsys, "--answers", answers, "--data", data, "--output", output, "--protocol", protocol)[0] == 0
    return json.loads((output / "metrics.json").read_text()), read_lines(output / "per_item.jsonl")


def add_images(data: Path) -> None:
    for line in read_lines(data / QUESTIONS):
        (data / ROOT / line["image"]).write_bytes(b"")


def labels_by_item(per_item: list[dict]) -> dict[str, str]:
    """Two records of a picture follow each other: "image#0" and "image#1", as the recording names them."""
    return {f"{line['question_id']}#{i % 2}": line["answer"] for i, line in enumerate(per_item)}


def test_scores_as_calculation(tmp_path, data, recorded, capsys):
    result, per_item = outputs(capsys, data, tmp_path / "out")
    expected = recorded["expected"]["mme_calculation"]
    assert result["score"] == expected["aggregate"]["Perception"]["total"] == 1125.0
    metrics = result["metrics"]
    for part, names in (("Perception", PERCEPTION), ("Cognition", COGNITION)):
        official = expected["aggregate"][part]
        assert metrics[part.lower()] == official["total"]
        assert {name: metrics["subtasks"][name]["score"] for name in names} == official["subtasks"]
    for name, official in expected["per_subtask"].items():
        assert {key: metrics["subtasks"][name][key] for key in official} == official
    assert metrics["missing_subtasks"] == []
    labels = {name: [line["answer"] for line in per_item if line["category"] == name] for name in SUBTASKS}
    assert labels == expected["parsed_label_in_file_order"]
    assert tuple(result["categories"]) == SUBTASKS
    assert result["categories"]["position"] == {"score": 125.0, "count": 4, "highest": 200.0}
    assert MME.headline(per_item) == result["score"]


def test_scores_as_lmms_eval(tmp_path, data, recorded, capsys):
    result, per_item = outputs(capsys, data, tmp_path / "out", "lmms_eval")
    expected = recorded["expected"]["lmms_eval"]
    sums = {f"mme_{part}_score": result["metrics"][part] for part in ("perception", "cognition")}
    assert sums == expected["aggregate"] and result["score"] == sums["mme_perception_score"]
    assert labels_by_item(per_item) == expected["per_item"]


def test_scores_as_vlmevalkit(tmp_path, data, recorded, capsys):
    result, per_item = outputs(capsys, data, tmp_path / "out", "vlmevalkit")
    expected = recorded["expected"]["vlmevalkit"]
    metrics = result["metrics"]
    figures = {name: figures["score"] for name, figures in metrics["subtasks"].items()}
    figures |= {"perception": metrics["perception"], "reasoning": metrics["cognition"]}
    assert figures == expected["aggregate"] and result["score"] == 1000.0
    labels = {key: label.capitalize() for key, label in labels_by_item(per_item).items()}
    assert labels == expected["per_item"]
    assert MME.headline(per_item) == result["score"]


def test_the_same_answers_by_every_rule(data, capsys):
    assert scored(capsys, data)["scored_as"] == {"llava15": 1125.0, "lmms_eval": 1125.0, "vlmevalkit": 1000.0}


def test_results_folder_equals_the_converters(tmp_path, data, recorded, capsys):
    outputs(capsys, data, tmp_path / "out")
    files = {file.name: file.read_bytes() for file in (tmp_path / "out" / "mme_results").iterdir()}
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    assert hashes == recorded["expected"]["converted_lines_sha256"]


@pytest.mark.parametrize(
    "answer, official, lmms, kit",
    [
        ("Yes", "yes", "yes", "yes"),
        ("YES.", "yes", "yes", "yes"),
        ("No, it is", "no", "no", "no"),
        ("Know", "no", "no", "unknown"),
        ("None", "no", "no", "unknown"),
        ("not sure", "no", "no", "unknown"),
        ("snow", "no", "no", "unknown"),
        ("Eyes", "yes", "yes", "unknown"),
        ("yesterday", "yes", "yes", "unknown"),
        ("The answer is yes", "other", "other", "yes"),
        ("1. no", "other", "no", "no"),
        ("y", "other", "yes", "unknown"),
        ("N.", "other", "no", "unknown"),
        (" . no", "other", "no", "no"),
        ("", "other", "other", "unknown"),
        ("Yes and no", "yes", "yes", "unknown"),
    ],
)
def test_what_an_answer_says(answer, official, lmms, kit):
    assert (official_label(answer), lmms_label(answer), vlmevalkit(answer)) == (official, lmms, kit)


def test_prompts_and_generation_equal_llavas(data, recorded_prompts):
    """With LLaVA's question file and without: the same prompts, ids and order."""
    expected = recorded_prompts["mme"]
    assert asdict(MME().generation) == {k: v for k, v in expected["generate_kwargs"].items() if "image" not in k}
    add_images(data)
    lines = read_lines(data / QUESTIONS)
    for _ in ("with LLaVA's question file", "from the official text"):
        benchmark = MME()
        items = benchmark.load(data)
        assert [(item.id, benchmark.prompt(item)) for item in items] == [(r["question_id"], r["text"]) for r in lines]
        assert [item.images for item in items] == [(data / ROOT / line["image"],) for line in lines]
        for item, case in zip(items, expected["items"]):
            record = {**benchmark.record(item), "text": "decoded", "model_id": "llava-v1.5-7b", "metadata": {}}
            assert record == case["answer_record_without_answer_id"]
            assert benchmark.message(item) in case["prompt"]
        assert len({item.key for item in items}) == 56
        assert [item.key for item in items[:2]] == ["existence/exi_000.png#0", "existence/exi_000.png#1"]
        (data / QUESTIONS).unlink(missing_ok=True)


def test_two_spaces_before_the_request(tmp_path, data, capsys):
    file = data / ROOT / "count" / "cou_000.txt"
    file.write_text(file.read_text().replace(" Please", "  Please"))
    assert scored(capsys, data)["score"] == 1125.0
    prompts = {p: MME(protocol=p) for p in MME.protocols}
    texts = {p: benchmark.prompt(benchmark.load(data)[4]) for p, benchmark in prompts.items()}
    short = "\nAnswer the question using a single word or phrase."
    assert texts["llava15"] == texts["vlmevalkit"] == f"Is item 0 of count tall?{short}"
    assert texts["lmms_eval"] == f"Is item 0 of count tall? {short}"
    assert prompts["lmms_eval"].generation.max_new_tokens == 16
    outputs(capsys, data, tmp_path / "out")
    line = (tmp_path / "out" / "mme_results" / "count.txt").read_text().splitlines()[0]
    assert line == "cou_000.txt\tIs item 0 of count tall?  Please answer yes or no.\tYes\tNo, it is not."


@pytest.mark.parametrize("case", ["answer-with-newline", "answer-with-tab"])
def test_tabs_and_line_breaks_are_spaces(tmp_path, official_error, capsys, case):
    recorded, data = official_error("mme", case)
    assert recorded["official"]["message"].startswith("ValueError")
    result, per_item = outputs(capsys, data, tmp_path / "out")
    position = 0 if "newline" in case else 3
    assert per_item[position]["answer"] == "yes" and per_item[position]["text"][:3] == "Yes"
    assert result["score"] == (1150.0 if position == 0 else 1125.0)
    lines = (tmp_path / "out" / "mme_results" / "existence.txt").read_text().splitlines()
    assert len(lines) == 4 and all(line.count("\t") == 3 for line in lines)
    assert lines[position].endswith("\tYes it is" if position == 0 else "\tYes indeed")


def test_a_missing_answer_is_named(official_error, capsys):
    recorded, data = official_error("mme", "odd-number-of-lines")
    assert recorded["official"]["message"] == "AssertionError"
    assert "no answer: 1 (code_reasoning/cod_001#2)" in refused(capsys, data)


def test_answers_are_told_apart_by_their_prompts(data, capsys):
    answers = data / "answers" / "model.jsonl"
    lines = read_lines(answers)
    write_lines(answers, lines[::-1])
    assert scored(capsys, data)["score"] == 1125.0
    for line in lines:
        del line["prompt"]
    write_lines(answers, lines)  # in the order of the questions where there are no prompts
    assert scored(capsys, data)["score"] == 1125.0
    write_lines(answers, lines[::-1])
    assert scored(capsys, data)["score"] != 1125.0


def test_answers_that_do_not_fit(data, capsys):
    answers = data / "answers" / "model.jsonl"
    lines = read_lines(answers)
    write_lines(answers, [*lines[2:], lines[5], lines[5] | {"question_id": 7}])
    err = refused(capsys, data)
    assert "not in the file: 2 (count/cou_000#3, 7)" in err
    assert "no answer: 2 (existence/exi_000, existence/exi_000#2)" in err
    write_lines(answers, [lines[0], lines[0], *lines[2:]])
    assert "no answer on existence/exi_000 has the question 'Is item 0 of existence short?'" in refused(capsys, data)


def test_headline_of_a_sample(tmp_path, data, capsys):
    """Whole pictures drawn once, twice or not at all."""
    _, per_item = outputs(capsys, data, tmp_path / "out")
    count = [line for line in per_item if line["category"] == "count"]
    assert [line["score"] for line in count] == [0.0, 0.0, 100.0, 100.0]
    assert len({line["unit"] for line in count}) == 2
    assert MME.headline(count) == 100.0
    assert MME.headline([*count, *count[2:]]) == round(100 * 4 / 6 + 100 * 2 / 3, 2)
    assert MME.headline(count[2:]) == 200.0
    assert MME.headline([line for line in per_item if line["category"] in COGNITION]) == 0


def test_without_perception_there_is_no_score(tmp_path, data, capsys):
    """As with a small --limit: LLaVA's question file begins with cognition."""
    for subtask in PERCEPTION:
        shutil.rmtree(data / ROOT / subtask)
    for file in (data / QUESTIONS, data / "answers" / "model.jsonl"):
        write_lines(file, [line for line in read_lines(file) if line["question_id"].split("/")[0] in COGNITION])
    answers = data / "answers" / "model.jsonl"
    status, out, _ = run(capsys, "--answers", answers, "--data", data, "--output", tmp_path / "out")
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert status == 0 and result["score"] is None and result["metrics"]["cognition"] > 0
    assert "16 questions answered; the score is the sum over perception subtasks" in out


def test_folder_itself_or_nested(tmp_path, data, capsys):
    answers = data / "answers" / "model.jsonl"
    shutil.copytree(data / ROOT, tmp_path / "nested" / ROOT / "MME_Benchmark")
    for folder in (data / ROOT, tmp_path / "nested"):
        status, out, _ = run(capsys, "--answers", answers, "--data", folder)
        assert status == 0 and json.loads(out)["score"] == 1125.0


def test_layouts_do_not_depend_on_the_subtask(data, capsys):
    texts = data / ROOT / "posters" / "questions_answers_YN"
    for file in texts.iterdir():
        file.rename(file.parent.parent / file.name)
    texts.rmdir()
    (data / ROOT / "count" / "questions_answers_YN").mkdir()
    for file in (data / ROOT / "count").glob("*.txt"):
        file.rename(file.parent / "questions_answers_YN" / file.name)
    assert scored(capsys, data)["score"] == 1125.0


def test_missing_subtasks_are_said(tmp_path, data, capsys):
    shutil.rmtree(data / ROOT / "artwork")
    shutil.rmtree(data / ROOT / "code_reasoning")
    gone = ("artwork", "code_reasoning")
    for file in (data / QUESTIONS, data / "answers" / "model.jsonl"):
        write_lines(file, [line for line in read_lines(file) if line["question_id"].split("/")[0] not in gone])
    answers = data / "answers" / "model.jsonl"
    status, out, _ = run(capsys, "--answers", answers, "--data", data, "--output", tmp_path / "out")
    assert status == 0 and "not comparable: no questions of artwork, code_reasoning" in out
    assert "cognition: 350.00" in out and "MME perception score: 925.0" in out
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert result["metrics"]["missing_subtasks"] == list(gone) and "artwork" not in result["categories"]


def test_missing_images_are_counted(data):
    with pytest.raises(ValueError, match=r"28 image files are missing \(.*existence/exi_000\.png, .*existence/exi_000"):
        check_images(MME().load(data))
    (data / QUESTIONS).unlink()
    with pytest.raises(ValueError, match=r"28 image files are missing \(.*existence/exi_000\.jpg"):
        check_images(MME().load(data))
    assert MME(images=Path("/pictures")).load(data)[0].images == (Path("/pictures/existence/exi_000.jpg"),)


@pytest.mark.parametrize(
    "content, message",
    [
        (
            "Is it? Please answer yes or no.\tYes\n",
            "is [{'question': 'Is it? Please answer yes or no.', 'answer': 'Yes'}]",
        ),
        (
            "Is it?\tYes\nIs it not?\tNo\nIs it?\tNo\n",
            "is [{'question': 'Is it?', 'answer': 'Yes'}, {'question': 'Is it not?', 'answer'",
        ),
        ("Is it?\tYes\nIs it not?\tMaybe\n", "[1].answer is 'Maybe'"),
        ("Is it? Yes\nIs it not?\tNo\n", "[0].answer is ''; expected 'Yes' or 'No'"),
        ("Is it?\tYes\nIs it no", "[1].answer is ''; expected 'Yes' or 'No'"),
        ("", "is empty"),
    ],
)
def test_broken_text_files_are_named(data, capsys, content, message):
    file = data / ROOT / "count" / "cou_000.txt"
    file.write_text(content)
    err = refused(capsys, data)
    assert str(file) in err and message in err


def test_windows_line_ends_and_other_files(data, capsys):
    file = data / ROOT / "count" / "cou_000.txt"
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    (data / ROOT / "count" / "._cou_000.txt").write_bytes(b"\x00\x05\x16\x07")  # what an Apple leaves behind
    assert scored(capsys, data)["score"] == 1125.0


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"question_id": "count/zzz.png"},
            "not in the file: 1 (count/zzz: Is item 0 of existence short?)",
        ),
        ({"text": "Is it?"}, "not in the file: 1 (existence/exi_000: Is it?)"),
        ({"text": None}, "llava_mme.jsonl, line 2: text is None"),
        ({"image": "../../x.png"}, "image '../../x.png' is outside"),
    ],
)
def test_wrong_question_files_are_named(data, capsys, change, message):
    lines = read_lines(data / QUESTIONS)
    write_lines(data / QUESTIONS, [lines[0], lines[1] | change, *lines[2:]])
    err = refused(capsys, data)
    assert str(data / QUESTIONS) in err and message in err


def test_cut_off_and_doubled_question_files(data, capsys):
    lines = read_lines(data / QUESTIONS)
    write_lines(data / QUESTIONS, lines[:-3])
    assert "no line: 3 (code_reasoning/cod_000: Is item 0 of code_reasoning short?" in refused(capsys, data)
    write_lines(data / QUESTIONS, [*lines, lines[0]])
    assert "not in the file: 1 (existence/exi_000: Is item 0 of existence tall?#2)" in refused(capsys, data)


def test_no_questions_at_all(tmp_path, data, capsys):
    answers = data / "answers" / "model.jsonl"
    status, _, err = run(capsys, "--answers", answers, "--data", tmp_path)
    assert status == 2 and f"{tmp_path / ROOT} has no MME questions" in err
