"""Q-Bench: prompts of LLaVA's script, scores by the rules of other programs, LLaVA's odd answers file."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from llava_sp import LlavaSPProcessor
from llava_sp.eval.qbench import QBench
from llava_sp.eval.run.evaluate import check_images
from llava_sp.inference import render_prompt
from tests.eval.commands import command_of
from tests.messages import names, refused

RECORDING = "qbench"

QUESTIONS, ANSWERS = "llvisionqa_dev.json", "llvisionqa_dev_answers.json"


@pytest.fixture
def answers(data, recorded) -> Path:
    """The recorded answers as this command writes them."""
    lines = [{"question_id": item["id"], "text": item["raw"]} for item in recorded["items"]]
    (data / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return data / "answers.jsonl"


run = command_of(QBench)


def change(data: Path, edit) -> None:
    content = json.loads((data / QUESTIONS).read_text())
    edit(content)
    (data / QUESTIONS).write_text(json.dumps(content))


@pytest.mark.parametrize("protocol", ["llava15", "vlmevalkit"])
def test_scores_equal_vlmevalkits(tmp_path, data, answers, recorded, capsys, protocol):
    output = tmp_path / "out"
    status, out, _ = run(capsys, "--answers", answers, "--data", data, "--output", output, "--protocol", protocol)
    expected = recorded["expected"]["vlmevalkit_head.exact_matching"]
    result = json.loads((output / "metrics.json").read_text())
    lines = [json.loads(line) for line in (output / "per_item.jsonl").open()]
    assert status == 0 and "75.0 (40 questions)" in out
    assert result["score"] == round(100 * expected["aggregate"]["Overall"], 2) == QBench.headline(lines)
    assert {str(line["question_id"]): line["answer"] for line in lines} == expected["per_item_parsed"]
    assert {str(line["question_id"]): line["score"] / 100 for line in lines} == expected["per_item_hit"]
    concerns = ("global distortion", "global others", "local distortion", "local others")
    found = {f"concern{number}": result["categories"][name]["score"] for number, name in enumerate(concerns)}
    assert found == {name: round(100 * v, 2) for name, v in expected["aggregate"].items() if name != "Overall"}
    assert list(result["categories"]) == ["yes/no", "how", "what", *concerns]
    assert sum(result["categories"][name]["count"] for name in ("yes/no", "how", "what")) == 40


def test_llavas_answers_file_is_scored(tmp_path, data, capsys):
    (data / ANSWERS).write_text(as_llava(json.loads((data / ANSWERS).read_text())))
    status, out, _ = run(capsys, "--answers", data / ANSWERS, "--data", data, "--output", tmp_path / "out")
    assert status == 0 and "75.0 (40 questions)" in out


def test_parses_as_lmms_eval(tmp_path, data, answers, recorded, capsys):
    output = tmp_path / "out"
    assert run(capsys, "--answers", answers, "--data", data, "--output", output, "--protocol", "lmms_eval")[0] == 0
    lines = [json.loads(line) for line in (output / "per_item.jsonl").open()]
    expected = recorded["expected"]["lmms_eval"]["per_item_parsed"]
    assert {str(line["question_id"]): line["answer"] or "RANDOM" for line in lines} == expected
    right = [expected[str(item["id"])] == item["gold"] for item in recorded["items"]]
    result = json.loads((output / "metrics.json").read_text())
    assert result["score"] == round(100 * sum(right) / 40, 2)  # where it would guess, the answer is wrong
    assert result["scored_as"] == {"lmms_eval": result["score"], "llava15": 75.0, "vlmevalkit": 75.0}


def test_prompts_and_generation_equal_llavas(data, recorded_prompts):
    expected = recorded_prompts["qbench"]
    generation = asdict(QBench.generation)
    recorded = {key: v for key, v in expected["generate_kwargs"].items() if key not in ("images", "stopping_criteria")}
    assert generation.items() >= recorded.items()
    benchmark = QBench()
    items = benchmark.load(data)
    for case, item in zip(expected["items"], items):
        assert f"USER: {benchmark.message(item)} ASSISTANT:" in case["prompt"]
        assert "a curious human and" in case["prompt"] and benchmark.conversation_template == "llava_v1"
        assert item.images == (data / case["question_record"]["img_path"],)
    assert benchmark.image_aspect_ratio == "crop"
    options = "A. grainy\nB. noisy\nC. bright\nD. vivid\n"
    prompt = f"How does region 0 look?\nChoose between one of the options as follows:\n{options}"
    assert benchmark.record(items[0]) == {"question_id": 0, "prompt": prompt, "img_path": "m_0.jpg"}


def test_other_programs_ask_for_the_letter(data):
    asked = (
        "How does region 2 look?\nA. faded\nB. dark\nAnswer with the option's letter from the given choices directly."
    )
    vlmevalkit, lmms_eval = QBench(protocol="vlmevalkit"), QBench(protocol="lmms_eval")
    assert vlmevalkit.prompt(vlmevalkit.load(data)[2]) == asked
    assert lmms_eval.prompt(lmms_eval.load(data)[2]) == asked + "\n"
    assert (vlmevalkit.conversation_template, vlmevalkit.image_aspect_ratio, vlmevalkit.generation.max_new_tokens) == (
        "llava_v1",
        "pad",
        512,
    )
    assert (lmms_eval.conversation_template, lmms_eval.image_aspect_ratio, lmms_eval.generation.max_new_tokens) == (
        None,
        None,
        32,
    )


def test_the_conversation_is_rendered_with_the_line_break_at_the_end(data, recorded_prompts):
    from llava_sp.model.conversation import TEMPLATES

    item = QBench().load(data)[0]
    template = TEMPLATES["llava_v1"]
    text = template.system_text.format(system=template.system) + template.first_user + QBench().message(item)
    assert text + template.after_user + template.before_answer == recorded_prompts["qbench"]["items"][0]["prompt"]


def test_images_are_looked_for_in_the_usual_places(data):
    with refused("40 image files", "m_0.jpg", "question 0"):
        check_images(QBench().load(data))
    (data / "LLVisionQA-QBench" / "images").mkdir(parents=True)
    assert QBench().load(data)[0].images[0].parent == data / "LLVisionQA-QBench" / "images"
    (data / "images").mkdir()
    assert QBench().load(data)[0].images[0].parent == data / "images"
    assert QBench(images=Path("/elsewhere")).load(data)[0].images[0] == Path("/elsewhere/m_0.jpg")
    (data / "LLVisionQA-QBench" / QUESTIONS).write_text((data / QUESTIONS).read_text())
    (data / QUESTIONS).unlink()
    assert QBench().load(data)[0].images[0].parent == data / "LLVisionQA-QBench" / "images"


def as_llava(records: list[dict], between: str = "") -> str:
    return between.join(json.dumps(record) for record in records)


@pytest.mark.parametrize("kind", ["one after another", "lines", "list", "other order"])
def test_llavas_answers_file_is_read(data, kind):
    file = data / ANSWERS
    records = json.loads(file.read_text())
    wanted = [record["response"] for record in records]
    if kind in ("one after another", "lines"):
        file.write_text(as_llava(records, "\n" if kind == "lines" else ""))
    elif kind == "other order":
        file.write_text(as_llava(records[::-1]))
    benchmark = QBench()
    items = benchmark.load(data)
    answers, note = benchmark.read_answers(file)
    assert benchmark.match(items, answers) == wanted and note is None
    assert benchmark.score(items, benchmark.match(items, answers)).score == 75.0


def test_own_answers_file_is_read_too(data, answers, recorded):
    benchmark = QBench()
    records, _ = benchmark.read_answers(answers)
    assert benchmark.match(benchmark.load(data), records) == [item["raw"] for item in recorded["items"]]


@pytest.mark.parametrize(
    "edit, parts",
    [
        (lambda text: text[:-40], ("record 39 (counted from 0)", "cut off")),
        (lambda text: "[" + text, ("JSON",)),
        (lambda text: text.replace('"response": "C"', '"response": 5', 1), ("[0].response is 5", "text")),
        (
            lambda text: text.replace('"response": "C."', '"text": "C."', 1),
            ("[1]", "no response", "img_path, question, candidates, correct_ans, type, concern, text"),
        ),
        (lambda text: "[]", ("is []", "list", "img_path, question, response", "at least one")),
        (lambda text: '{"question_id": 5}', ("line 1", "no ")),
        (lambda text: "nothing", ("line 1", "cut off")),
    ],
)
def test_broken_answers_files(data, edit, parts):
    file = data / ANSWERS
    file.write_text(edit(as_llava(json.loads(file.read_text()))))
    try:
        note = QBench().read_answers(file)[1]
    except ValueError as error:
        note = str(error)
    assert ANSWERS in note and names(note, *parts)


def test_answers_must_fit(data, answers, capsys):
    file = data / ANSWERS
    records = json.loads(file.read_text())
    benchmark = QBench()
    items = benchmark.load(data)
    file.write_text(as_llava([*records[1:], records[5], {**records[0], "question": "Another?"}]))
    twice, absent = "1 (m_5.jpg: How does region 5", "no answer: 1 (m_0.jpg: How does region 0 look?)"
    with refused("41 records", "qbench dev", twice, absent):
        benchmark.match(items, benchmark.read_answers(file)[0])
    answers.write_text(
        "".join(answers.read_text().splitlines(keepends=True)[2:]) + '{"question_id": 99, "text": "A"}\n'
    )
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and "(0, 1)" in err and "qbench dev" in err


def split_files(folder: Path, split: str, images: str, question: str = "How is it?") -> Path:
    """A split of four questions, and answers to it as this command writes them."""
    folder.mkdir(exist_ok=True)
    about = {"question": question, "candidates": ["red", "green"], "correct_ans": "red"}
    rows = [{"img_path": f"{images}{number}.jpg", **about} for number in range(4)]
    (folder / f"llvisionqa_{split}.json").write_text(json.dumps(rows))
    benchmark = QBench(split)
    lines = [{**benchmark.record(item), "text": "A"} for item in benchmark.load(folder)]
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / f"{split}.jsonl"


@pytest.mark.parametrize(
    "other, parts",
    [
        ({"question": "Where is it?"}, ("question 0", "'Where is it?")),
        ({"images": "t"}, ("4 of 4 answers", "qbench dev")),
    ],
)
def test_answers_of_another_split_with_the_same_numbers(tmp_path, capsys, other, parts):
    split_files(tmp_path, "dev", "d")
    answers = split_files(tmp_path, "test", **{"images": "d", **other})
    status, _, err = run(capsys, "--answers", answers, "--data", tmp_path, "--split", "dev")
    assert status == 2 and names(err, *parts)
    assert run(capsys, "--answers", answers, "--data", tmp_path, "--split", "test")[0] == 0
    status, out, _ = run(capsys, "--validate", answers, "--data", tmp_path)
    assert status == 0 and "4 questions of test once" in out
    status, _, err = run(capsys, "--validate", answers, "--data", tmp_path, "--split", "dev")
    assert status == 1 and names(err, *parts)


def test_other_options_are_another_question(tmp_path, capsys):
    answers = split_files(tmp_path, "dev", "d")
    answers.write_text(answers.read_text().replace("B. green", "B. blue", 1))
    status, _, err = run(capsys, "--answers", answers, "--data", tmp_path)
    assert status == 2 and names(err, "1 of 4 answers", "question 0", "'How is it?")
    lines = [json.loads(line) for line in answers.open()]
    answers.write_text("".join(json.dumps({k: line[k] for k in ("question_id", "text")}) + "\n" for line in lines))
    assert run(capsys, "--answers", answers, "--data", tmp_path)[0] == 0  # lines that do not say what was asked
    for protocol in QBench.protocols:  # whatever the prompt was
        benchmark = QBench(protocol=protocol)
        own = [{**benchmark.record(item), "text": "A"} for item in benchmark.load(tmp_path)]
        default = QBench()
        assert default.match(default.load(tmp_path), own) == ["A"] * 4


def test_writes_llavas_file_and_validates_it(tmp_path, data, answers, capsys):
    output = tmp_path / "out"
    assert run(capsys, "--answers", answers, "--data", data, "--output", output)[0] == 0
    assert json.loads((output / ANSWERS).read_text()) == json.loads((data / ANSWERS).read_text())
    status, out, _ = run(capsys, "--validate", output / ANSWERS, "--data", data)
    assert status == 0 and names(out, output / ANSWERS, "40 questions of dev", "(0", "empty")
    (output / ANSWERS).write_text(json.dumps(json.loads((output / ANSWERS).read_text())[1:]))
    status, _, err = run(capsys, "--validate", output / ANSWERS, "--data", data)
    assert status == 1 and names(err, "no answer: 1", "m_0.jpg: How does region 0 look?")


def test_the_test_split_is_sent_away(tmp_path, data, answers, capsys):
    questions = json.loads((data / QUESTIONS).read_text())
    for question in questions:
        del question["correct_ans"]
    (data / "llvisionqa_test.json").write_text(json.dumps(questions))
    output = tmp_path / "out"
    status, out, _ = run(capsys, "--answers", answers, "--data", data, "--output", output, "--split", "test")
    assert status == 0 and names(out, "40 questions", "authors")
    assert json.loads((output / "metrics.json").read_text())["score"] is None
    sent = json.loads((output / "llvisionqa_test_answers.json").read_text())
    assert sent[0] == {**questions[0], "response": "C"}
    other = [{**question, "question": f"And here: {question['question']}"} for question in questions]
    (data / "llvisionqa_test.json").write_text(json.dumps(other))
    sent = [{**question, "response": "C"} for question in other]
    (output / "sent.json").write_text(json.dumps(sent))
    status, out, _ = run(capsys, "--validate", output / "sent.json", "--data", data)
    assert status == 0 and "40 questions of test once" in out  # dev is there too
    (data / QUESTIONS).unlink()
    assert len(QBench().load(data)) == 40


def test_unknown_numbers_keep_their_number(data, answers, capsys):
    change(data, lambda questions: questions[0].update(type=9, concern=-1))
    status, out, _ = run(capsys, "--answers", answers, "--data", data)
    categories = json.loads(out)["categories"]
    assert status == 0 and categories["type 9"]["count"] == categories["concern -1"]["count"] == 1
    assert sum(categories[name]["count"] for name in ("yes/no", "how", "what")) == 39


@pytest.mark.parametrize("key", ["type", "concern"])
def test_kinds_are_of_all_questions_or_of_none(data, answers, capsys, key):
    change(data, lambda questions: questions[1].pop(key))
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and names(err, data / QUESTIONS, f"1 of 40 questions have no {key} (1)")
    change(data, lambda questions: [question.pop(key, None) for question in questions])
    status, out, _ = run(capsys, "--answers", answers, "--data", data)
    assert status == 0 and json.loads(out)["score"]


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"concern": "x"}, ("[0].concern is 'x'",)),
        ({"type": False}, ("[0].type is False",)),
        ({"candidates": "ab"}, ("[0].candidates is 'ab'",)),
        ({"candidates": ["a"]}, ("[0].candidates is ['a']",)),
        ({"candidates": ["a", 1]}, ("[0].candidates[1] is 1",)),
        ({"correct_ans": "green"}, ("question 0 (counted from 0)", "correct_ans is 'green'", "['grainy', ")),
        ({"correct_ans": None}, ("1 of 40 questions", "no correct_ans (0)")),
        ({"img_path": 5}, ("[0].img_path is 5", "text")),
        ({"img_path": "../x.jpg"}, ("question 0 (counted from 0)", "image '../x.jpg'", "outside")),
    ],
)
def test_wrong_fields_are_named(data, answers, capsys, changes, parts):
    change(data, lambda questions: questions[0].update(changes))
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and QUESTIONS in err and names(err, *parts)


def test_files_must_be_there_and_whole(data, answers, capsys):
    text = (data / QUESTIONS).read_text()
    (data / QUESTIONS).write_text(text[:-30])
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and names(err, QUESTIONS, "JSON", "ends")
    (data / QUESTIONS).unlink()
    status, _, err = run(capsys, "--answers", answers, "--data", data)
    assert status == 2 and names(err, data, "llvisionqa_dev.json, llvisionqa_test.json")


def test_the_whole_prompt_is_the_recorded_one(recorded_prompts, repo):
    """The line break behind the last option too: in another template than the checkpoint's, it was once lost."""
    processor = LlavaSPProcessor.from_pretrained(repo / "llava_sp" / "shapes" / "model")
    whole = recorded_prompts["qbench"]["items"][0]["prompt"]
    message = whole.partition("USER: ")[2].removesuffix(" ASSISTANT:")
    assert message.endswith("\n") and render_prompt(processor, message, "llava_v1") == whole
