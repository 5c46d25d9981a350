"""MMVP without a model: pairs, the recorded judge, the rules that need none, the prompts of each protocol, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava_sp.decoding import Generation
from llava_sp.eval.cli import main
from llava_sp.eval.inputs.checks import find
from llava_sp.eval.mmvp import MMVP, lmms_letter, parse_options
from llava_sp.eval.run.evaluate import check_images
from tests.eval.commands import results_of
from tests.eval.judge_server import JudgeServer, user_text
from tests.messages import names

RECORDING = "mmvp"

QUESTIONS = "Questions.csv"


@pytest.fixture
def data(official) -> Path:
    """The recorded files; the answers have `text` where the official script writes `response`."""
    _, folder = official("mmvp")
    lines = [json.loads(line) for line in (folder / "answers.jsonl").open()]
    renamed = [{("text" if key == "response" else key): value for key, value in line.items()} for line in lines]
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in renamed))
    return folder


def run(capsys, data: Path, *arguments: object) -> tuple[int, str, str]:
    status = main(MMVP, ["--answers", str(data / "answers.jsonl"), "--data", str(data), *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture
def fields_only(tmp_path) -> Path:
    """Other words for the judge's question."""
    file = tmp_path / "words.json"
    words = {"system": "yes or no?", "user": "[{question}, {answer}, {response}]"}
    file.write_text(json.dumps(words))
    return file


def test_judged_as_the_official_grader(tmp_path, data, recorded, capsys, monkeypatch):
    monkeypatch.setattr(MMVP, "user", '{question}"|"{answer}"|"{response}')
    expected = recorded["expected"]["gpt_grader"]
    given = {
        '"|"'.join((line["prompt"], line["answer"], line["response"])): reply
        for line, reply in zip(
            recorded["files"]["answers.jsonl"]["data"], recorded["files"]["judge_replies.json"]["data"]
        )
    }
    assert len(given) == 40
    output = tmp_path / "out"
    with JudgeServer(lambda body: given[user_text(body)]) as server:
        status, out, err = run(capsys, data, "--output", output, *server.arguments)
    assert status == 0, err
    assert {body["temperature"] for body in server.requests} == {expected["request"]["temperature"]}
    assert not any("max_tokens" in body for body in server.requests)
    result, lines = results_of(output)
    assert result["score"] == 100 * expected["pair_accuracy"]
    assert result["provenance"]["protocol"] == "official" and result["metrics"]["pairs"] == 20
    pairs: dict[str, list[float]] = {}
    for line in lines:
        pairs.setdefault(str(line["unit"]), []).append(line["score"])
    assert {pair: float(scores == [100.0, 100.0]) for pair, scores in pairs.items()} == expected["per_pair"]
    assert MMVP.headline(lines) == result["score"]
    assert MMVP.headline([*lines[2:4], *lines[2:4], *lines[:2]]) == 66.67  # units drawn with repetition
    assert result["scored_as"] == {"official": 50.0, "lmms_eval": 5.0, "vlmevalkit": 5.0}
    assert "MMVP pair accuracy in percent: 50.0 (20 pairs)" in out


@pytest.mark.parametrize("protocol", ["lmms_eval", "vlmevalkit"])
def test_protocols_that_need_no_judge(tmp_path, data, recorded, capsys, protocol):
    output = tmp_path / "out"
    assert run(capsys, data, "--output", output, "--protocol", protocol)[0] == 0
    result, lines = results_of(output)
    found = {str(line["question_id"]): line["score"] == 100 for line in lines}
    if protocol == "lmms_eval":
        expected = recorded["expected"]["lmms_eval"]
        assert result["score"] == 100 * expected["pair_accuracy"]
        assert result["metrics"]["accuracy"] == 100 * expected["accuracy"]
        assert found == {key: entry["correct"] for key, entry in expected["per_item"].items()}
        letters = {key: entry["letter"] or None for key, entry in expected["per_item"].items()}
        assert {str(line["question_id"]): line["answer"] for line in lines} == letters
    else:
        expected = recorded["expected"]["vlmevalkit_head.exact_matching"]
        assert result["score"] == 100 * expected["aggregate"]["Overall"]
        assert result["metrics"]["accuracy"] == 100 * expected["aggregate"]["Average"]
        assert found == {key: bool(hit) for key, hit in expected["per_item"].items()}
    assert result["scored_as"] == {protocol: 5.0, "vlmevalkit" if protocol == "lmms_eval" else "lmms_eval": 5.0}
    assert "judge" not in result["metrics"] and MMVP.headline(lines) == result["score"]


def test_without_a_judge_other_rules_stand_under_their_own_names(tmp_path, data, capsys):
    status, out, _ = run(capsys, data, "--output", tmp_path / "out")
    result, lines = results_of(tmp_path / "out")
    assert status == 0 and result["score"] is None and result["metrics"] == {"judge": None}
    assert result["scored_as"] == {"lmms_eval": 5.0, "vlmevalkit": 5.0}
    assert names(out, "lmms_eval", "5.0")
    assert "score" not in lines[0] and lines[0]["answer"] == "(a)"


def test_answers_of_the_official_script_are_read(official, capsys):
    _, folder = official("mmvp")
    status, out, _ = run(capsys, folder, "--protocol", "lmms_eval")
    assert status == 0 and json.loads(out)["score"] == 5.0
    text = (folder / "answers.jsonl").read_text()
    (folder / "answers.jsonl").write_text(text.replace('"response": "b"', '"response": 3', 1))
    status, _, err = run(capsys, folder)
    assert status == 2 and "answers.jsonl, line 4: response is 3" in err


def test_runs_are_averaged(tmp_path, data, capsys):
    seen: dict[str, int] = {}

    def answer(body: dict) -> str:
        text = user_text(body)
        seen[text] = seen.get(text, 0) + 1
        return "yes" if seen[text] == 1 else "no"

    output = tmp_path / "out"
    with JudgeServer(answer) as server:
        arguments = [*server.arguments, "--judge-runs", 4, "--judge-concurrency", 1]
        assert run(capsys, data, "--output", output, *arguments)[0] == 0
    result, lines = results_of(output)
    assert result["score"] == 25.0 and result["metrics"]["runs"] == [100.0, 0.0, 0.0, 0.0]
    assert {line["score"] for line in lines} == {25.0} and MMVP.headline(lines) == 25.0


@pytest.mark.parametrize(
    "reply, right", [("YES", True), ("yes\n", False), ("Yes.", False), (" yes", False), ("", False)]
)
def test_only_yes_alone_is_right(data, reply, right):
    benchmark = MMVP()
    items = benchmark.load(data)
    benchmark.judged = [{item.key: [reply] for item in items}]
    scores = benchmark.score(items, ["(a)"] * 40)
    assert scores.score == 100.0 * right


def test_prompts_and_settings(data):
    official = MMVP()
    items = official.load(data)
    given = [json.loads(line) for line in (data / "answers.jsonl").open()]
    for item, line in zip(items, given):
        assert official.record(item) == {key: line[key] for key in ("question_id", "prompt", "answer")}
    assert official.message(items[0]) == "<image>\nWhich state is gadget 0 in? (a) Up (b) Down"
    assert official.generation == Generation(do_sample=True, temperature=0.2, max_new_tokens=1024)
    assert (official.conversation_template, official.image_aspect_ratio) == ("llava_v1", "crop")
    for protocol, longest in {"lmms_eval": 16, "vlmevalkit": 512}.items():
        benchmark = MMVP(protocol=protocol)
        text = benchmark.prompt(benchmark.load(data)[0])
        assert text == (
            "Which state is gadget 0 in?\nA. Up\nB. Down\nAnswer with the option's letter from the given choices directly."
        )
        assert benchmark.generation == Generation(max_new_tokens=longest)
        assert benchmark.conversation_template is None and benchmark.image_aspect_ratio is None


def test_the_judge_gets_question_truth_and_response(data):
    benchmark = MMVP()
    item = benchmark.load(data)[1]
    request = benchmark.request(item, "It is {question} (a).", [])
    system, user = (text for _, text in request.messages)
    assert '"yes" or "no"' in system
    for part in ("Which state is gadget 0 in? (a) Up (b) Down\n", "right answer: (a)\n", "It is {question} (a).\n"):
        assert part in user
    assert benchmark.request(item, "x", ["yes"]) is None


def test_the_judge_may_be_asked_in_other_words(tmp_path, data, capsys, fields_only):
    with JudgeServer(lambda body: "yes") as server:
        arguments = ["--output", tmp_path / "out", *server.arguments, "--grader-prompt", fields_only]
        assert run(capsys, data, *arguments)[0] == 0
    assert {body["messages"][0]["content"] for body in server.requests} == {"yes or no?"}
    assert "[Which state is gadget 0 in? (a) Up (b) Down, (b), (a)]" in map(user_text, server.requests)
    result, _ = results_of(tmp_path / "out")
    assert result["metrics"]["judge"]["prompt"].startswith(f"{fields_only} (sha256 ")
    assert str(fields_only) in result["provenance"]["data_files"]
    fields_only.write_text('{"system": "", "user": "{question} {answer}"}')
    status, _, err = run(capsys, data, "--grader-prompt", fields_only)
    assert status == 2 and "user is '{question} {answer}'" in err
    fields_only.write_text('{"user": "x"}')
    status, _, err = run(capsys, data, "--grader-prompt", fields_only)
    assert status == 2 and "words.json has no system" in err


@pytest.mark.parametrize("folder", ["MMVP Images", "MMVP Imgaes", "images"])
def test_pictures_are_found(data, folder):
    (data / folder).mkdir()
    items = MMVP().load(data)
    assert items[0].images == (data / folder / "1.jpg",) and items[39].images == (data / folder / "40.jpg",)
    with pytest.raises(ValueError, match=r"40 image files are missing"):
        check_images(items)
    assert MMVP(images=Path("/else")).load(data)[1].images == (Path("/else/2.jpg"),)


def test_files_one_folder_below(data, capsys):
    (data / "MMVP").mkdir()
    (data / QUESTIONS).rename(data / "MMVP" / QUESTIONS)
    assert find(data, QUESTIONS) and run(capsys, data, "--protocol", "lmms_eval")[0] == 0


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("A", "A"), ("(b)", "B"), ("b.", "B"), ("A. Open", "A"), ("b\nbecause", "B"), ("The answer is (B)", "B"),
        ("I take option a", "A"), ("Shut it, Barb", "B"), ("Open", None), ("", None), ("absent!", "A"), ("Answer is Boo", "B"),
        ("(c) a", "A"), ("It is open\nthe answer  is\nb!", "B"),
    ],
)  # fmt: skip
def test_letters_of_lmms_eval(answer, letter):
    assert lmms_letter(answer) == letter


def test_options():
    assert parse_options("(a) Up (b) Down") == ["Up", "Down"]
    assert parse_options("(A)Yes, it is (B)  No ") == ["Yes, it is", "No"]


def official_rows(first: str = "Is the butterfly open?") -> str:
    rows = "".join(f"{n},{first if n < 3 else f'Which, {n}?'!r},(a) x (b) y,(a)\n" for n in range(1, 301))
    return "Index,Question,Options,Correct Answer\n" + rows.replace("'", '"')


@pytest.mark.parametrize("first, corrected", [("Is the butterfly open?", {99, 279}), ("Is the square red?", set())])
def test_four_labels_of_the_official_file_are_corrected_by_lmms_eval_only(tmp_path, first, corrected):
    (tmp_path / QUESTIONS).write_text(official_rows(first))
    benchmark = MMVP(protocol="lmms_eval")
    items = benchmark.load(tmp_path)
    lines = benchmark.score(items, ["A"] * 300).per_item
    assert {line["question_id"] for line in lines if not line["score"]} == corrected
    assert benchmark.under("vlmevalkit").score(items, ["A"] * 300).score == 100.0


def test_an_odd_number_of_questions_by_limit(data):
    benchmark = MMVP(protocol="lmms_eval")
    items = benchmark.load(data)
    right = [item.metadata["label"] for item in items]
    assert benchmark.score(items[:3], right[:3]).score == 100.0
    scores = benchmark.score(items[:1], right[:1])
    assert scores.score == 0.0 and scores.metrics["accuracy"] == 100.0 and scores.metrics["pairs"] == 0


@pytest.mark.parametrize(
    "change, parts",
    [
        (lambda text: "", ("Questions.csv is empty",)),
        (lambda text: text.splitlines()[0] + "\n", ("no rows",)),
        (lambda text: text.rsplit("\n", 2)[0] + "\n", ("39 rows", "pairs")),
        (lambda text: text[:-8], ("line 41 has 3 fields, not 4",)),
        (lambda text: text.replace("Correct Answer", "Answer"), ("line 2", "no Correct Answer", "Index, Question")),
        (lambda text: text.replace("Down,(b)", "Down,(c)", 1), ("Questions.csv, line 2: Correct Answer is '(c)'",)),
        (
            lambda text: text.replace("(a) Up (b) Down", "Up or down", 1),
            ("Questions.csv, line 2: Options is 'Up or down'",),
        ),
        (lambda text: text.replace("Which state is gadget 0 in?", "", 1), ("Questions.csv, line 2: Question is ''",)),
    ],
)
def test_broken_questions_are_named(data, capsys, change, parts):
    text = (data / QUESTIONS).read_text()
    (data / QUESTIONS).write_text(change(text))
    status, _, err = run(capsys, data)
    assert status == 2 and QUESTIONS in err and names(err, *parts)


def test_answers_that_do_not_fit(data, capsys):
    lines = (data / "answers.jsonl").read_text().splitlines()
    foreign = json.dumps({**json.loads(lines[0]), "question_id": 301})
    (data / "answers.jsonl").write_text("\n".join([*lines[2:], lines[5], foreign]) + "\n")
    status, _, err = run(capsys, data)
    assert status == 2
    assert "(6)" in err and "(1, 2)" in err
    assert "questions of mmvp" in err and "not in the file: 1 (301)" in err
    (data / QUESTIONS).unlink()
    assert names(run(capsys, data)[2], data, "MMVP", "Questions.csv")
