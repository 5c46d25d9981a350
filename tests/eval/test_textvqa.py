"""TextVQA without a model: official files, the join by image and question, protocols with and without OCR tokens, errors."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from llava_sp.decoding import Generation
from llava_sp.eval.base import LLAVA15, SHORT_ANSWER
from llava_sp.eval.run.evaluate import check_images
from llava_sp.eval.textvqa import TextVQA, question_of
from tests.eval.commands import command_of, read_lines, write_lines
from tests.messages import names, refused

RECORDING = "textvqa"

OFFICIAL = "TextVQA_0.5.1_val.json"
LLAVA = "llava_textvqa_val_v051_ocr.jsonl"
SCORERS = {"llava15": "llava_eval_textvqa", "lmms_eval": "lmms_eval", "vlmevalkit": "vlmevalkit"}
TWICE = "87835653f7f79d15"  # an image with two questions


run = command_of(TextVQA)


def change_rows(data: Path, edit) -> None:
    """Rewrites the official file after `edit` has changed its list of questions in place."""
    content = json.loads((data / OFFICIAL).read_text())
    edit(content["data"])
    (data / OFFICIAL).write_text(json.dumps(content))


@pytest.mark.parametrize("protocol", TextVQA.protocols)
@pytest.mark.parametrize("with_llava", [True, False])
def test_answers_file_scores_as_the_official_code(tmp_path, data, answers, recorded, capsys, protocol, with_llava):
    if not with_llava:  # scoring needs no OCR tokens
        (data / LLAVA).unlink()
    output = tmp_path / "out"
    status, out, _ = run(
        capsys, "--answers", answers, "--data", data, "--output", output, "--protocol", protocol
    )  # fmt: skip
    assert status == 0
    expected = recorded["expected"][SCORERS[protocol]]
    result = json.loads((output / "metrics.json").read_text())
    assert result["score"] == round(100 * expected["aggregate"], 2)
    lines = read_lines(output / "per_item.jsonl")
    assert {str(line["question_id"]): line["score"] for line in lines} == {
        i: round(100 * value, 2) for i, value in expected["per_item"].items()
    }
    assert TextVQA.headline(lines) == result["score"]
    if protocol == "llava15":
        assert f"Accuracy: {result['score']}%" in expected["stdout"] and "Samples: 40" in expected["stdout"]
        assert {str(line["question_id"]): line["answer"] for line in lines} == expected["processed_answer"]
        assert result["score"] == round(100 * recorded["expected"]["mmf"]["aggregate"], 2)
    assert result["scored_as"] == {"llava15": 69.25, "lmms_eval": 69.25, "vlmevalkit": 66.75}
    assert f"TextVQA accuracy in percent: {result['score']} (40 questions)" in out
    images = {row["image_id"] for row in json.loads((data / OFFICIAL).read_text())["data"]}
    assert result["metrics"] == {"questions": 40, "images": len(images)}


def test_per_item(data, answers):
    benchmark = TextVQA()
    items = benchmark.load(data)
    line = benchmark.score(items, benchmark.match(items, read_lines(answers))).per_item[0]
    assert line["question"] == "What colour is the teapot?" and line["image"] == "efc5a59c4958ae38.jpg"
    assert line["text"] == "Green." and line["answer"] == "green" and len(line["references"]) == 10


def test_prompts_and_generation_equal_llavas(data, recorded_prompts):
    expected = recorded_prompts["textvqa"]
    benchmark = TextVQA()
    items = {benchmark.prompt(item): item for item in benchmark.load(data)}
    for case in expected["items"]:
        item = items[case["question_record"]["text"]]
        record = {**benchmark.record(item), "text": "decoded", "model_id": "llava-v1.5-7b", "metadata": {}}
        assert record == case["answer_record_without_answer_id"]
        assert list(record) == list(case["answer_record_without_answer_id"])
        assert benchmark.message(item) in case["prompt"]
        assert item.images == (data / "train_images" / case["question_record"]["image"],)
    assert asdict(benchmark.generation) == {k: v for k, v in expected["generate_kwargs"].items() if "image" not in k}


def test_keys_are_unique_though_ids_are_not(data):
    items = TextVQA().load(data)
    assert len({item.key for item in items}) == 40 > len({item.id for item in items})
    assert [item.key for item in items if item.id == TWICE] == [f"{TWICE}/1", f"{TWICE}/2"]
    assert [item.key for item in TextVQA(protocol="lmms_eval").load(data)] == [item.key for item in items]


@pytest.mark.parametrize("with_llava", [True, False])
def test_protocols_without_ocr_tokens(data, with_llava):
    change_rows(data, lambda rows: rows[0].update(question="what does the SIGN say? Thanks"))
    lines = read_lines(data / LLAVA)
    lines[0]["text"] = "what does the SIGN say? Thanks\nReference OCR token: A, b" + SHORT_ANSWER
    write_lines(data / LLAVA, lines)
    if not with_llava:
        (data / LLAVA).unlink()
    for protocol, question, tokens in (
        ("lmms_eval", "What does the sign say? thanks", 1024),
        ("vlmevalkit", "what does the SIGN say? Thanks", 512),
    ):
        benchmark = TextVQA(protocol=protocol)
        items = benchmark.load(data)
        assert benchmark.prompt(items[0]) == question + SHORT_ANSWER
        assert not any("OCR" in benchmark.message(item) for item in items)
        assert benchmark.generation == Generation(max_new_tokens=tokens)
        own = [{**benchmark.record(item), "text": item.key} for item in items]  # our own answers find their questions
        assert benchmark.match(items, own) == [item.key for item in items]


def test_without_llavas_file_the_default_says_what_it_lacks(data, capsys):
    (data / LLAVA).unlink()
    benchmark = TextVQA()
    with refused("OCR", "TextVQA_0.5.1_val.json", "--protocol lmms_eval"):
        benchmark.message(benchmark.load(data)[0])


def test_join_is_by_image_and_question(data, answers, recorded, capsys):
    lines = read_lines(answers)
    write_lines(answers, lines[::-1])
    status, out, _ = run(capsys, "--answers", answers, "--data", data)
    assert status == 0 and json.loads(out)["score"] == 69.25
    first, second = (i for i, line in enumerate(lines) if line["question_id"] == TWICE)
    lines[first]["prompt"], lines[second]["prompt"] = lines[second]["prompt"], lines[first]["prompt"]
    write_lines(answers, lines)
    status, out, _ = run(capsys, "--answers", answers, "--data", data)
    assert status == 0 and json.loads(out)["score"] == round((69.25 * 40 - 200) / 40, 2)  # both were right before


def test_join_ignores_case(data, answers, capsys):
    change_rows(data, lambda rows: [row.update(question=row["question"].upper()) for row in rows])
    status, out, _ = run(capsys, "--answers", answers, "--data", data)
    assert status == 0 and json.loads(out)["score"] == 69.25


@pytest.mark.parametrize(
    "prompt, question",
    [
        ("What is it?\nAnswer the question using a single word or phrase.", "what is it?"),
        ("What is it?\nReference OCR token: A, b\nAnswer briefly.", "what is it?"),
        ("What is it?\nReference OCR token: \nAnswer briefly.", "what is it?"),
        ("Reference OCR token: A, b\nWhat is it?\nAnswer briefly.", "what is it?"),
        ("OCR tokens: a b. Question: What\nis it? Short answer:", "what\nis it?"),
        ("OCR tokens: a\nb", "ocr tokens: a"),
    ],
)
def test_question_is_read_back_from_the_prompt(prompt, question):
    assert question_of(prompt, "here") == question


@pytest.mark.parametrize("prompt", ["What is it?", "a\nb\nc", "What?\nReference OCR token: A\nb\nAnswer briefly."])
def test_prompt_without_a_question_is_named(data, answers, capsys, prompt):
    lines = read_lines(answers)
    lines[3]["prompt"] = prompt
    write_lines(answers, lines)
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and names(err, "answer 3", f"image {TWICE}", "prompt")


def test_answer_without_prompt(data, answers, capsys):
    lines = read_lines(answers)
    del lines[1]["prompt"]
    write_lines(answers, lines)
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and names(err, "answer 1", "image 3b42553c4e3241e8", "prompt None")


def test_the_same_question_twice_is_judged_by_the_last_answers(data, answers):
    """As in LLaVA's script, whose dictionary keeps the last; the harnesses judge each question by its own."""

    def edit(rows: list[dict]) -> None:
        rows.append({**rows[0], "question_id": 99, "answers": ["red"] * 10})

    change_rows(data, edit)
    lines = read_lines(data / LLAVA)
    write_lines(data / LLAVA, [*lines, lines[0]])
    found = read_lines(answers)
    found.append(found[0])
    for protocol, first, last in (("llava15", 0.0, 0.0), ("lmms_eval", 100.0, 0.0)):
        benchmark = TextVQA(protocol=protocol)
        items = benchmark.load(data)
        per_item = benchmark.score(items, benchmark.match(items, found)).per_item
        assert [per_item[i]["question_id"] for i in (0, 40)] == [70000, 99]
        assert [per_item[i]["score"] for i in (0, 40)] == [first, last]


def test_duplicates_strangers_and_gaps_are_counted(data, answers, capsys):
    lines = read_lines(answers)
    write_lines(answers, [*lines[2:], lines[5], {**lines[0], "question_id": "0000"}])
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and names(err, "40 lines", OFFICIAL)
    assert names(err, "2 (ba4eafa3686ac767: is the gate open?#2, 0000: what colour is the teapot?)")
    assert names(err, "no answer: 2 (efc5a59c4958ae38: what colour is the teapot?, 3b42553c4e3241e8:")


def test_answers_to_other_questions_of_the_image_are_strangers(data, answers, capsys):
    lines = read_lines(answers)
    lines[0]["prompt"] = "What else?" + SHORT_ANSWER
    write_lines(answers, lines)
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and names(err, "1 (efc5a59c4958ae38: what else?)")


def row(**changes: object) -> str:
    record = {"question": "What?", "image_id": "a", "question_id": 1, "answers": ["x"] * 10} | changes
    return json.dumps({"data": [record]})


def llava_line(**changes: object) -> str:
    text = "What colour is the teapot?\nReference OCR token: A\nAnswer briefly."
    return json.dumps({"question_id": "efc5a59c4958ae38", "image": "efc5a59c4958ae38.jpg", "text": text} | changes)


@pytest.mark.parametrize(
    "name, content, parts",
    [
        (OFFICIAL, "", ("is empty",)),
        (OFFICIAL, row()[:-9], ("ends",)),
        (OFFICIAL, "[]", ("is []", "object", "data")),
        (OFFICIAL, '{"data": []}', ("data is []", "list", "question, image_id, question_id, answers", "at least one")),
        (OFFICIAL, '{"data": [{"question": "?"}]}', ("data[0]", "no image_id, question_id, answers", "question")),
        (OFFICIAL, row(image_id=5), ("data[0].image_id is 5",)),
        (OFFICIAL, row(answers=["x"] * 9), ("data[0].answers is ['x', 'x', 'x', 'x', 'x', 'x', 'x', 'x', 'x']",)),
        (OFFICIAL, row(answers=["x"] * 9 + [None]), ("data[0].answers[9] is None",)),
        (OFFICIAL, row(), ("file: 40 (efc5a59c4958ae38: what colour",)),
        (LLAVA, llava_line(), ("no line: 39 (3b42553c4e3241e8: what colour is the lid",)),
        (LLAVA, llava_line(text="What?"), ("line 1", "prompt 'What?'")),
        (LLAVA, llava_line(question_id=5), ("llava_textvqa_val_v051_ocr.jsonl, line 1: question_id is 5",)),
        (LLAVA, llava_line(image=None), ("llava_textvqa_val_v051_ocr.jsonl, line 1: image is None",)),
        (LLAVA, llava_line()[:-5], (f"{LLAVA}, line 1", "JSON")),
        (
            LLAVA,
            llava_line() + "\n" + llava_line(),
            ("file: 1 (efc5a59c4958ae38: what colour is the teapot?#2)",),
        ),
    ],
)
def test_broken_data_files_are_named(data, answers, capsys, name, content, parts):
    (data / name).write_text(content)
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and name in err and names(err, *parts)


def test_repeated_question_ids_are_refused(data, answers, capsys):
    change_rows(data, lambda rows: rows[4].update(question_id=70000))
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and names(err, OFFICIAL, "more than one", "question_id: 70000")


def test_image_outside_the_folder_is_refused(data, answers, capsys):
    lines = read_lines(data / LLAVA)
    lines[0]["image"] = "/etc/x.jpg"
    write_lines(data / LLAVA, lines)
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and names(err, LLAVA, f"question 70000 of {OFFICIAL}", "'/etc/x.jpg'", "outside")


def test_images(data):
    with refused("image files", "efc5a59c4958ae38.jpg", "question efc5a59c4958ae38"):
        check_images(TextVQA().load(data))
    (data / "train_val_images" / "train_images").mkdir(parents=True)
    assert TextVQA().load(data)[0].images[0].parent == data / "train_val_images" / "train_images"
    assert TextVQA(images=Path("/x")).load(data)[0].images[0] == Path("/x/efc5a59c4958ae38.jpg")


def test_missing_annotations_are_named(data, answers, capsys):
    (data / OFFICIAL).unlink()
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and names(err, data, "TextVQA", OFFICIAL)


def test_published_figures_are_comparable():
    assert TextVQA.published[LLAVA15] == 58.2 and not TextVQA.published_on


def test_imports_without_torch(repo):
    code = "import sys, llava_sp.eval.textvqa; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=repo).returncode == 0
