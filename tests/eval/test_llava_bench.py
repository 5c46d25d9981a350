"""LLaVA-Bench without a model: the recorded judge, how replies are read, LLaVA's rules and review files, bad input."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from llava_sp.eval.cli import main
from llava_sp.eval.llava_bench import RULE, LLaVABench, read_anywhere, read_strictly, relative
from llava_sp.eval.run.evaluate import check_images
from llava_sp.eval.scoring.judge import JUDGEMENTS
from tests.eval.commands import results_of
from tests.eval.judge_server import JudgeServer, user_text

RECORDING = "llavabench"

QUESTIONS, CONTEXT, REFERENCES = "questions.jsonl", "context.jsonl", "answers_gpt4.jsonl"


def run(capsys, data: Path, *arguments: object) -> tuple[int, str, str]:
    answers = data / "answers" / "model.jsonl"
    status = main(LLaVABench, ["--answers", str(answers), "--data", str(data), *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


def recorded_judge(recorded: dict):
    replies = recorded["files"]["judge_replies.json"]["data"]
    return lambda body: replies[int(re.search(r"Reference reply (\d+)\.", user_text(body))[1])]


def test_judged_as_llavas_review(tmp_path, data, recorded, capsys):
    expected = recorded["expected"]["llava_review"]
    output = tmp_path / "out"
    with JudgeServer(recorded_judge(recorded)) as server:
        status, out, err = run(capsys, data, "--output", output, *server.arguments)
    assert status == 0, err
    for body in server.requests:
        assert [message["role"] for message in body["messages"]] == expected["judge_request"]["roles"]
        assert {key: body[key] for key in ("temperature", "max_tokens")} == {"temperature": 0.2, "max_tokens": 1024}
    result, lines = results_of(output)
    rows = {
        name if name == "all" else f"llava_bench_{name}": list(result["metrics"][name].values())
        for name in ("all", "conv", "detail", "complex")
    }
    assert rows == expected["summary_rows"]
    assert result["score"] == expected["summary_rows"]["all"][0] == LLaVABench.headline(lines)
    ratings = {str(line["question_id"]): line["ratings"][0] for line in lines}
    assert ratings == expected["tuples"]
    unread = sum(pair == [-1, -1] for pair in expected["tuples"].values())
    assert result["metrics"]["unread_replies"] == unread == 8 and result["metrics"]["ratings_outside_1_to_10"] == 0
    assert list(result["categories"]) == ["conv", "detail", "complex"]
    assert result["categories"]["conv"] == {"score": 87.0, "count": 14, "highest": 100.0}
    assert lines[0]["score"] == 70.0 and lines[4]["score"] == 0.0 and lines[0]["judgements"] == ["8 7\nBoth fine."]
    assert lines[0]["references"] == ["Reference reply 0."] and lines[0]["image"] == "000.jpg"
    assert "LLaVA-Bench (in the wild) relative score: 78.4 (40 questions)" in out
    assert "8 replies could not be read; they count as -1 for both" in out and "judge: gpt-test" in out
    assert list(result["scored_as"]) == ["llava15", "lmms_eval", "vlmevalkit"]


def test_the_message_is_llavas(data, recorded):
    expected = recorded["expected"]["llava_review"]["judge_request"]["user_content_without_rule_text_first"]
    benchmark = LLaVABench()
    items = benchmark.load(data)
    answers = [line["text"] for line in recorded["files"]["answers/model.jsonl"]["data"]]
    (_, system), (_, user) = benchmark.request(items[0], answers[0], []).messages
    assert user == f"{expected}[System]\n{RULE}\n\n" and system
    (_, _), (_, user) = benchmark.request(items[3], answers[3], []).messages
    assert user.startswith("[Context]\nA grey harp on a table, picture 1.\n\n[Question]\n")
    assert benchmark.request(items[0], answers[0], ["8 7"]) is None


def test_protocols_read_and_add_up_in_their_own_ways(tmp_path, data, recorded, capsys):
    output = tmp_path / "out"
    with JudgeServer(recorded_judge(recorded)) as server:
        assert run(capsys, data, "--output", output, *server.arguments)[0] == 0
    replies = recorded["files"]["judge_replies.json"]["data"]
    scored = results_of(output)[0]["scored_as"]
    for protocol, read in {"lmms_eval": read_anywhere, "vlmevalkit": read_strictly}.items():
        pairs = [read(reply) for reply in replies]
        reference, model = (sum(pair[side] for pair in pairs) / 40 for side in (0, 1))
        digits = 1 if protocol == "lmms_eval" else 2
        assert scored[protocol] == round(model / reference * 100, digits)
        again = tmp_path / protocol
        arguments = ("--judgements", output / JUDGEMENTS, "--protocol", protocol, "--output", again)
        assert run(capsys, data, *arguments)[0] == 0
        result, lines = results_of(again)
        assert result["score"] == scored[protocol] == LLaVABench.headline(lines)
    assert scored["lmms_eval"] != scored["llava15"]


@pytest.mark.parametrize(
    "reply, strictly, anywhere",
    [
        ("8 7\nBoth fine.", (8, 7), (8, 7)),
        ("8.5,7.5", (8.5, 7.5), (8.5, 7.5)),
        ("8, 7\nok", (-1, -1), (8, 7)),
        ("8 7 \nok", (-1, -1), (8, 7)),
        ("8/10 7/10", (-1, -1), (8, 10)),
        ("Assistant 1: 8\nAssistant 2: 7", (-1, -1), (1, 8)),
        ("\n8 7", (-1, -1), (8, 7)),
        ("", (-1, -1), (-1, -1)),
        ("8", (-1, -1), (-1, -1)),
        ("8_0 1e1", (80, 10), (8, 0)),
        ("nan 7", (-1, -1), (-1, -1)),
        ("inf 7", (-1, -1), (-1, -1)),
        ("8  7", (-1, -1), (8, 7)),
        ("-1 7", (-1, 7), (-1, 7)),
    ],
)
def test_how_replies_are_read(reply, strictly, anywhere):
    assert read_strictly(reply) == strictly and read_anywhere(reply) == anywhere


def test_means():
    assert relative([(8.0, 7.0), (-1.0, -1.0)]) == (85.7, 35.0, 30.0)
    assert relative([(-1.0, -1.0)] * 3) == (0.0, -10.0, -10.0)  # LLaVA's formula would say 100
    assert relative([(9.0, 7.0), (8.0, 8.0), (8.0, 8.0)], rounded=False) == (92.0, 83.33, 76.67)


def test_runs_are_averaged_as_published(tmp_path, data, capsys):
    """65.4 is the mean of 64.7, 65.3 and 66.3."""
    output = tmp_path / "out"
    seen: dict[str, int] = {}

    def answer(body: dict) -> str:
        text = user_text(body)
        seen[text] = seen.get(text, -1) + 1
        return ("10 6.47", "10 6.53", "10 6.63")[seen[text]]

    with JudgeServer(answer) as server:
        arguments = [*server.arguments, "--judge-runs", 3, "--judge-concurrency", 1]
        status, out, _ = run(capsys, data, "--output", output, *arguments)
    result, lines = results_of(output)
    assert status == 0 and result["metrics"]["runs"] == [64.7, 65.3, 66.3] and result["score"] == 65.4
    assert LLaVABench.headline(lines) == 65.4 == LLaVABench.headline([lines[0], lines[0], lines[3]])
    assert "3 runs" in out


def test_the_headline_of_several_runs_under_each_protocol(data):
    benchmark = LLaVABench()
    items = benchmark.load(data)
    replies = [["9 7", "8 8.5", "7 8", "10 6.47"][n % 4] for n in range(43)]
    benchmark.judged = [{item.key: [replies[n + run]] for n, item in enumerate(items)} for run in range(3)]
    scores = {protocol: benchmark.under(protocol).score(items, ["x"] * 40) for protocol in LLaVABench.protocols}
    for found in scores.values():
        assert LLaVABench.headline(found.per_item) == found.score
    assert scores["vlmevalkit"].score == round(scores["vlmevalkit"].score, 2) != round(scores["vlmevalkit"].score, 1)


def review_file(path: Path, recorded: dict, replies: list[str]) -> Path:
    """A file as LLaVA's eval_gpt_review_bench.py writes it."""
    example = recorded["expected"]["llava_review"]["review_line_example"]
    records = [
        {**example, "id": number + 1, "question_id": number, "content": reply} for number, reply in enumerate(replies)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_llavas_review_files_are_read(tmp_path, data, recorded, capsys):
    replies = recorded["files"]["judge_replies.json"]["data"]
    first = review_file(tmp_path / "review1.jsonl", recorded, replies)
    second = review_file(tmp_path / "review2.jsonl", recorded, ["10 5"] * 40)
    status, out, _ = run(capsys, data, "--judgements", first)
    result = json.loads(out)
    assert status == 0 and result["score"] == 78.4
    assert result["metrics"]["judge"]["model"] == "not recorded"
    result = json.loads(run(capsys, data, "--judgements", first, second)[1])
    assert result["metrics"]["runs"] == [78.4, 50.0] and result["score"] == 64.2
    short = review_file(tmp_path / "review3.jsonl", recorded, replies[:-2])
    status, _, err = run(capsys, data, "--judgements", first, short)
    assert status == 2 and "no judgement: 2 (38, 39)" in err
    output = tmp_path / "out"
    with JudgeServer(recorded_judge(recorded)) as server:
        assert run(capsys, data, "--output", output, *server.arguments)[0] == 0
    status, _, err = run(capsys, data, "--judgements", first, output / JUDGEMENTS)
    assert status == 2 and "are not all of one kind" in err


def rules(**changes: object) -> dict:
    entries = {
        f"llava_bench_{category}": {"role": "Helper", "prompt": f"Rule of {category}."}
        for category in ("conv", "detail", "complex")
    }
    return {"coding": {"role": "Assistant", "prompt": "unused"}, **entries, **changes}


def test_other_rules_may_be_used(tmp_path, data, capsys):
    file = tmp_path / "rule.json"
    file.write_text(json.dumps(rules(system={"prompt": "Judge!"})))
    output = tmp_path / "out"
    with JudgeServer(lambda body: "8 7") as server:
        assert run(capsys, data, "--output", output, *server.arguments, "--rules", file)[0] == 0
    texts = list(map(user_text, server.requests))
    assert sum(text.endswith("[End of Helper 2]\n\n[System]\nRule of conv.\n\n") for text in texts) == 14
    assert {body["messages"][0]["content"] for body in server.requests} == {"Judge!"}
    result, _ = results_of(output)
    assert result["metrics"]["judge"]["prompt"].startswith(f"{file} (sha256 ")
    assert str(file) in result["provenance"]["data_files"]
    status, _, err = run(capsys, data, "--output", output)  # without the file, the replies are to other requests
    assert status == 2 and "judged with another prompt or setting, or incompletely: 40 questions" in err


@pytest.mark.parametrize(
    "content, message",
    [
        ({}, "has no llava_bench_conv, llava_bench_detail, llava_bench_complex"),
        (rules(llava_bench_detail={"role": "Assistant"}), "llava_bench_detail has no prompt"),
        (rules(llava_bench_detail="x"), "llava_bench_detail is 'x'"),
        (rules(system="x"), "system is 'x'; expected an object with prompt"),
    ],
)
def test_rules_that_are_none(tmp_path, data, capsys, content, message):
    (tmp_path / "rule.json").write_text(json.dumps(content))
    status, _, err = run(capsys, data, "--rules", tmp_path / "rule.json")
    assert status == 2 and "rule.json" in err and message in err


def test_prompts_records_and_generation_equal_llavas(data, recorded_prompts):
    expected = recorded_prompts["llavabench"]
    generation = asdict(LLaVABench.generation)
    assert generation == {key: value for key, value in expected["generate_kwargs"].items() if "image" not in key}
    benchmark = LLaVABench()
    items = {item.id: item for item in benchmark.load(data)}
    for case in expected["items"]:
        item = items[case["question_record"]["question_id"]]
        record = {**benchmark.record(item), "text": "decoded", "model_id": "llava-v1.5-7b", "metadata": {}}
        assert record == case["answer_record_without_answer_id"]
        assert benchmark.message(item) in case["prompt"]
        assert item.images == (data / "images" / case["question_record"]["image"],)
    lengths = {protocol: LLaVABench(protocol=protocol).generation.max_new_tokens for protocol in LLaVABench.protocols}
    assert lengths == {"llava15": 1024, "lmms_eval": 4096, "vlmevalkit": 1024}
    with pytest.raises(ValueError, match=r"14 image files are missing"):
        check_images(list(items.values()))
    assert LLaVABench(images=Path("/else")).load(data)[0].images == (Path("/else/000.jpg"),)


def test_without_a_judge(tmp_path, data, capsys):
    status, out, _ = run(capsys, data, "--output", tmp_path / "out")
    result, lines = results_of(tmp_path / "out")
    assert status == 0 and result["score"] is None and "scored_as" not in {key for key, v in result.items() if v}
    assert (
        "no judge was used, so there is no score; the same command with --judge MODEL" in out
        and "score" not in lines[0]
    )


def line(**changes: object) -> str:
    return json.dumps({"question_id": 0, "image": "000.jpg", "category": "conv", "text": "?"} | changes) + "\n"


@pytest.mark.parametrize(
    "name, content, message",
    [
        (QUESTIONS, "", "is empty"),
        (QUESTIONS, '{"question_id": 0, "im', "line 1 is not valid JSON"),
        (QUESTIONS, line(text=None), "questions.jsonl, line 1: text is None"),
        (QUESTIONS, line() * 2, "more than one record with the same question_id: 0 (0: line 1, line 2)"),
        (
            QUESTIONS,
            line(),
            "answers_gpt4.jsonl does not fit the questions: answer to a question that is not in the file: 39 (1, 2, 3",
        ),
        (CONTEXT, '{"image": "000.jpg"}', "line 1 has no caption"),
        (CONTEXT, '{"image": "000.jpg", "caption": [1]}', "context.jsonl, line 1: caption is [1]"),
        (
            CONTEXT,
            '{"image": "000.jpg", "caption": "x"}\n' * 2,
            "more than one record with the same image: 000.jpg (000.jpg: line 1, line 2)",
        ),
        (CONTEXT, '{"image": "000.jpg", "caption": "x"}', "question 3: context.jsonl has no caption of 001.jpg"),
        (
            REFERENCES,
            '{"question_id": 0, "text": "x"}',
            "answers_gpt4.jsonl does not fit the questions: no answer: 39 (1, 2, 3",
        ),
        (REFERENCES, '{"question_id": 0}', "line 1 has no text"),
    ],
)
def test_broken_data_files_are_named(data, capsys, name, content, message):
    (data / name).write_text(content)
    status, _, err = run(capsys, data)
    assert status == 2 and message in err and (name in err or name == QUESTIONS)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"category": "poem"}, "questions.jsonl, line 1: category is 'poem'"),
        ({"image": "../000.jpg"}, "context.jsonl has no caption of ../000.jpg"),
    ],
)
def test_questions_that_do_not_fit(data, capsys, changes, message):
    rest = (data / QUESTIONS).read_text().split("\n", 1)[1]
    (data / QUESTIONS).write_text(line(**changes) + rest)
    status, _, err = run(capsys, data)
    assert status == 2 and QUESTIONS in err and message in err


@pytest.mark.parametrize(
    "name, what", [(QUESTIONS, "questions"), (CONTEXT, "descriptions"), (REFERENCES, "answers of GPT-4")]
)
def test_missing_files_are_named(data, capsys, name, what):
    (data / name).unlink()
    status, _, err = run(capsys, data)
    assert status == 2 and f"has no {what}" in err and f"looked for {name}" in err


def test_answers_that_do_not_fit(data, capsys):
    file = data / "answers" / "model.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[2:], lines[5]]) + "\n")
    status, _, err = run(capsys, data)
    assert status == 2
    assert "(5)" in err and "(0, 1)" in err
