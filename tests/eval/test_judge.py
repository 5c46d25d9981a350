"""Asking a judge, on a local server: requests, retries, concurrency, SIGKILL and resume, recorded replies, keys.

MMVP's recorded files are the vehicle: forty answers, one request each.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from email.utils import formatdate
from pathlib import Path

import pytest

from llava_sp.eval.cli import main
from llava_sp.eval.mmvp import MMVP
from llava_sp.eval.run.answer_log import AnswerLog
from llava_sp.eval.scoring import judge_client
from llava_sp.eval.scoring.judge import JUDGEMENTS, read_judgements
from llava_sp.eval.scoring.judge_client import JudgeOptions
from tests.eval.judge_server import JudgeServer, Reply, user_text
from tests.messages import names

KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(judge_client, "FIRST_WAIT", 0.01)


@pytest.fixture
def data(official) -> Path:
    """MMVP's recorded files, the answers as LLaVA writes them."""
    _, folder = official("mmvp")
    lines = [json.loads(line) for line in (folder / "answers.jsonl").open()]
    write_lines(folder / "answers.jsonl", [{**line, "text": line["response"]} for line in lines])
    return folder


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def run(capsys, data: Path, *arguments: object) -> tuple[int, str, str]:
    status = main(MMVP, ["--answers", str(data / "answers.jsonl"), "--data", str(data), *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


def metrics(output: Path) -> dict:
    return json.loads((output / "metrics.json").read_text())


def always(text: str | Reply):
    return lambda body: text


def by_answer(body: dict) -> str:
    """A judge that says yes to some answers."""
    return "yes" if len(user_text(body)) % 3 else "No"


def test_replies_are_kept_and_named(tmp_path, data, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    output = tmp_path / "out"
    with JudgeServer(by_answer) as server:
        status, out, err = run(capsys, data, "--output", output, *server.arguments)
    assert status == 0, err
    assert len(server.requests) == 40 and server.keys == {f"Bearer {KEY}"}
    assert {tuple(sorted(body)) for body in server.requests} == {("messages", "model", "temperature")}
    assert {body["model"] for body in server.requests} == {"gpt-test"}
    assert {body["temperature"] for body in server.requests} == {0.2}
    assert [message["role"] for message in server.requests[0]["messages"]] == ["system", "user"]
    lines = read_judgements(output / JUDGEMENTS)
    assert len(lines) == len({line["key"] for line in lines}) == 40
    assert set(lines[0]) == {
        *("key", "question_id", "run", "attempt", "request_sha256", "answer_sha256", "judge", "url", "temperature"),
        *("max_tokens", "reply", "answered_by", "finish_reason", "refusal", "usage", "date", "seconds"),
    }
    assert {line["reply"] for line in lines} == {"yes", "No"} and lines[0]["usage"]["total_tokens"] == 10
    about = metrics(output)["metrics"]["judge"]
    assert about["model"] == "gpt-test" and about["answered_by"] == ["gpt-test-0613"] and about["url"] == server.url
    assert about["date"][:2] == "20" and about["replies"] == 40 and about["tokens"] == 400 and about["runs"] == 1
    assert about["prompt"] == "llava_sp"
    assert f"judge: gpt-test, {about['date'][:10]}, 1 run, prompt: llava_sp" in out
    written = "".join(path.read_text() for path in output.rglob("*") if path.is_file())
    assert KEY not in written + out + err


def test_the_same_command_again_asks_nothing(tmp_path, data, capsys):
    output = tmp_path / "out"
    with JudgeServer(by_answer) as server:
        assert run(capsys, data, "--output", output, *server.arguments)[0] == 0
        before = metrics(output)["score"], (output / JUDGEMENTS).read_bytes()
        assert run(capsys, data, "--output", output, *server.arguments)[0] == 0
        assert len(server.requests) == 40
    assert (metrics(output)["score"], (output / JUDGEMENTS).read_bytes()) == before
    status, _, err = run(capsys, data, "--output", output)  # nor does it without --judge
    assert status == 0 and f"scored by the replies in {output / JUDGEMENTS}" in err
    assert metrics(output)["score"] == before[0]


def test_killed_in_the_middle_only_what_is_missing_is_asked(tmp_path, data, capsys, repo):
    output = tmp_path / "out"

    def slowly(body: dict) -> Reply:
        return Reply(by_answer(body), seconds=0.1)

    with JudgeServer(slowly) as server:
        arguments = ["--answers", data / "answers.jsonl", "--data", data, "--output", output, *server.arguments]
        command = [sys.executable, "-m", "llava_sp.eval.mmvp", *map(str, arguments), "--judge-concurrency", "3"]
        process = subprocess.Popen(command, cwd=repo, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        log = output / JUDGEMENTS
        deadline = time.monotonic() + 60
        while not (log.is_file() and log.read_bytes().count(b"\n") >= 9) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        kept = log.read_bytes().count(b"\n")
        assert 9 <= kept < 40
        with log.open("ab") as stream:
            stream.write(b'{"key": "7", "reply": "ye')  # what a killed write leaves
        time.sleep(0.2)
        asked = len(server.requests)
        assert asked <= kept + 3  # those in flight
        assert run(capsys, data, "--output", output, *server.arguments)[0] == 0
        assert len(server.requests) == asked + 40 - kept
    lines = read_judgements(log)
    assert len(lines) == len({line["key"] for line in lines}) == 40
    other = tmp_path / "other"
    with JudgeServer(by_answer) as server:
        assert run(capsys, data, "--output", other, *server.arguments)[0] == 0
    assert metrics(other)["score"] == metrics(output)["score"]


def test_requests_are_sent_at_once(tmp_path, data, capsys):
    for at_once in (1, 5):
        with JudgeServer(always(Reply("yes", seconds=0.03))) as server:
            arguments = ["--output", tmp_path / str(at_once), *server.arguments, "--judge-concurrency", at_once]
            assert run(capsys, data, *arguments)[0] == 0
        assert server.most_at_once == at_once


def failing_first(times: int, failure: Reply, reply: str = "yes"):
    """A judge that fails the first `times` times for each question."""
    seen: dict[str, int] = {}

    def answer(body: dict) -> str | Reply:
        text = user_text(body)
        seen[text] = seen.get(text, 0) + 1
        return failure if seen[text] <= times else reply

    return answer


@pytest.mark.parametrize(
    "failure",
    [
        Reply("slow down", status=429),
        Reply("slow down", status=429, headers={"Retry-After": "soon"}),
        Reply("oops", status=500),
        Reply("oops", status=503),
        Reply("conflict", status=409),
        Reply(body='{"id": "x", "cho'),
        Reply(body='{"id": "x", "choices": []}'),
        Reply(body='{"error": {"message": "overloaded"}}'),
        Reply(body='{"choices": [{"message": {"role": "assistant", "content": {"a": 1}}}], "model": "m"}'),
        Reply(body="[1]"),
        Reply(body=""),
        Reply(body="<html>gateway</html>", headers={"Content-Type": "text/html"}),
    ],
    ids=lambda failure: f"{failure.status} {failure.body or failure.headers or ''}",
)
def test_passing_failures_are_tried_again(tmp_path, data, capsys, failure):
    with JudgeServer(failing_first(2, failure)) as server:
        status, _, err = run(capsys, data, "--output", tmp_path / "out", *server.arguments)
    assert status == 0, err
    questions = len({user_text(body) for body in server.requests})
    assert len(server.requests) == 40 + 2 * questions and metrics(tmp_path / "out")["score"] == 100.0


def test_retry_after_is_honoured(tmp_path, data, capsys):
    waited = Reply("slow down", status=429, headers={"Retry-After": "0.6"})
    with JudgeServer(failing_first(1, waited)) as server:
        arguments = ["--output", tmp_path / "out", *server.arguments, "--judge-concurrency", 40]
        assert run(capsys, data, *arguments)[0] == 0
    first: dict[str, float] = {}
    gaps = []
    for body, moment in zip(server.requests, server.times):
        text = user_text(body)
        gaps += [moment - first[text]] if text in first else []
        first.setdefault(text, moment)
    assert len(gaps) >= 30 and min(gaps) > 0.55


def test_slow_replies_are_asked_for_again(tmp_path, data, capsys):
    with JudgeServer(failing_first(1, Reply("late", seconds=1.5))) as server:
        arguments = ["--output", tmp_path / "out", *server.arguments]
        status, _, err = run(capsys, data, *arguments, "--judge-timeout", 0.4, "--judge-concurrency", 40)
    assert status == 0, err
    assert {line["reply"] for line in read_judgements(tmp_path / "out" / JUDGEMENTS)} == {"yes"}


@pytest.mark.parametrize(
    "failure, parts",
    [
        (Reply("oops", status=500), ("500: oops", "8 times")),
        (Reply(body="<html>"), ("chat completion",)),
        (Reply("late", seconds=0.3), ("0.1 seconds", "--judge-timeout", "8 times")),
    ],
    ids=["500", "html", "timeout"],
)
def test_lasting_failures_end_the_run_and_keep_what_is_done(tmp_path, data, capsys, failure, parts):
    def answer(body: dict) -> str | Reply:
        return failure if "gadget 15 " in user_text(body) else "yes"

    output = tmp_path / "out"
    with JudgeServer(answer) as server:
        arguments = ["--output", output, *server.arguments, "--judge-timeout", 0.1 if failure.seconds else 30]
        status, _, err = run(capsys, data, *arguments, "--judge-concurrency", 2)
    assert status == 2 and names(err, *parts, "gpt-test", "http://127.0.0.1")
    assert names(err, "question 31:") or names(err, "question 32:")
    assert names(err, "same command") and "Traceback" not in err
    kept = {line["question_id"] for line in read_judgements(output / JUDGEMENTS)}
    assert kept >= set(range(1, 31)) and not kept & {31, 32} and not (output / "metrics.json").exists()
    with JudgeServer(always("no")) as server:
        assert run(capsys, data, "--output", output, *server.arguments)[0] == 0
    assert len(server.requests) == 40 - len(kept)


@pytest.mark.parametrize(
    "failure, parts",
    [
        (Reply(f"wrong key {KEY}", status=401), ("401: wrong key ***", "MY_KEY")),
        (Reply("no", status=403), ("403: no", "MY_KEY")),
        (Reply("no such model", status=404), ("404: no such model", "gpt-test")),
        (Reply("max_tokens is unknown", status=400), ("400: max_tokens is unknown", "request")),
        (Reply(status=429, body='{"error": {"message": "pay", "code": "insufficient_quota"}}'), ("429: pay", "quota")),
        (Reply("wait", status=429, headers={"Retry-After": "3600"}), ("429: wait", "3600 seconds")),
    ],
    ids=["401", "403", "404", "400", "quota", "an hour"],
)
def test_what_cannot_help_is_said_at_once(tmp_path, data, capsys, monkeypatch, failure, parts):
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    with JudgeServer(always(failure)) as server:
        arguments = ["--output", tmp_path / "out", *server.arguments, "--judge-key-env", "MY_KEY"]
        status, out, err = run(capsys, data, *arguments, "--judge-concurrency", 2)
    assert status == 2 and names(err, *parts) and KEY not in out + err
    assert len(server.requests) <= 6  # two at once, and what began before the first was seen to fail
    assert run(capsys, data, "--output", tmp_path / "out")[0] == 0  # nothing was judged: unscored, no error


def test_refusals_to_judge_count_as_replies(tmp_path, data, capsys):
    with JudgeServer(always(Reply(text=None))) as server:
        assert run(capsys, data, "--output", tmp_path / "out", *server.arguments)[0] == 0
    assert metrics(tmp_path / "out")["score"] == 0.0
    assert {line["reply"] for line in read_judgements(tmp_path / "out" / JUDGEMENTS)} == {""}


def test_nobody_listens(tmp_path, data, capsys):
    with JudgeServer(always("yes")) as server:
        arguments = server.arguments
    status, _, err = run(capsys, data, "--output", tmp_path / "out", *arguments)
    assert status == 2 and "no connection (" in err and "refused" in err


def test_judges_are_never_mixed(tmp_path, data, capsys):
    output = tmp_path / "out"
    with JudgeServer(always("yes")) as server:
        assert run(capsys, data, "--output", output, *server.arguments)[0] == 0
        assert metrics(output)["score"] == 100.0
    with JudgeServer(always("no")) as server:
        arguments = ["--judge", "another", "--judge-url", server.url]
        assert run(capsys, data, "--output", output, *arguments)[0] == 0
    assert len(server.requests) == 40
    assert metrics(output)["score"] == 0.0 and metrics(output)["metrics"]["judge"]["model"] == "another"
    log = output / JUDGEMENTS
    assert len(read_judgements(log)) == 80
    status, _, err = run(capsys, data, "--judgements", log)
    assert status == 2 and names(err, log, "another and gpt-test", "--judge NAME")
    for name, score in {"gpt-test": 100.0, "another": 0.0}.items():
        status, out, _ = run(capsys, data, "--judgements", log, "--judge", name)
        assert status == 0 and json.loads(out)["score"] == score
        assert json.loads(out)["metrics"]["judge"]["model"] == name
    status, _, err = run(capsys, data, "--judgements", log, "--judge", "third")
    assert status == 2 and names(err, log, "another and gpt-test", "third")


def test_another_answer_is_judged_anew(tmp_path, data):
    with JudgeServer(by_answer) as server:
        benchmark = MMVP()
        items = benchmark.load(data)
        benchmark.options = JudgeOptions(model="gpt-test", url=server.url)
        answers = ["(a)"] * 40
        benchmark.judge(items, answers, tmp_path)
        answers[3] = "(b) indeed"
        benchmark.judge(items, answers, tmp_path)
        assert len(server.requests) == 41
        assert "(b) indeed" in user_text(server.requests[-1])
        benchmark.user = benchmark.user + " Really?"  # so is every answer by another prompt
        benchmark.judge(items, answers, tmp_path)
        assert len(server.requests) == 81


def test_recorded_replies_are_scored_without_a_judge(tmp_path, data, capsys):
    output = tmp_path / "out"
    with JudgeServer(by_answer) as server:
        assert run(capsys, data, "--output", output, *server.arguments, "--judge-runs", 2)[0] == 0
        assert len(server.requests) == 80
    log = output / JUDGEMENTS
    status, out, _ = run(capsys, data, "--judgements", log)
    result = json.loads(out)
    assert status == 0 and result["score"] == metrics(output)["score"]
    about = result["metrics"]["judge"]
    assert about["runs"] == 2 and list(about["files"]) == [str(log)] and len(about["files"][str(log)]) == 64
    status, out, _ = run(capsys, data, "--judgements", log, "--judge-runs", 1)
    assert json.loads(out)["metrics"]["judge"]["runs"] == 1
    status, _, err = run(capsys, data, "--judgements", log, "--judge-runs", 3)
    assert status == 2 and "--judge-runs is 3, but" in err and "hold 2" in err
    lines = read_judgements(log)
    write_lines(tmp_path / "a.jsonl", [line for line in lines if line["run"] == 0])
    write_lines(tmp_path / "b.jsonl", [line for line in lines if line["run"] == 1])
    status, out, _ = run(capsys, data, "--judgements", tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert json.loads(out)["metrics"]["runs"] == result["metrics"]["runs"] and len(result["metrics"]["runs"]) == 2


def test_recorded_replies_that_do_not_fit(tmp_path, data, capsys):
    output = tmp_path / "out"
    with JudgeServer(by_answer) as server:
        assert run(capsys, data, "--output", output, *server.arguments)[0] == 0
    log = output / JUDGEMENTS
    lines = sorted(read_judgements(log), key=lambda line: line["question_id"])

    def refused(changed: list[dict], **answers: str) -> str:
        write_lines(tmp_path / "changed.jsonl", changed)
        given = [json.loads(line) for line in (data / "answers.jsonl").open()]
        write_lines(data / "answers.jsonl", [{**line, "text": answers.get("text", line["text"])} for line in given])
        status, _, err = run(capsys, data, "--judgements", tmp_path / "changed.jsonl")
        assert status == 2
        return err

    err = refused(lines[:-3])
    assert names(err, "changed.jsonl, run 0", "3 questions (38, 39, 40)", "--judge gpt-test", "--output")
    other = [{**line, "request_sha256": "0" * 64} for line in lines[:2]]
    err = refused([*other, *lines[2:]])
    assert names(err, "another prompt", "2 questions (1, 2)")
    err = refused([lines[0], {**lines[1], "run": "x"}])
    assert names(err, "changed.jsonl, line 2", "run is 'x'", "whole number")
    err = refused([{key: value for key, value in lines[0].items() if key != "reply"}])
    assert names(err, "changed.jsonl, line 1", "no reply")
    assert names(refused(lines, text="something else"), "another answer", "40 questions (1, 2, 3, ...)")


def test_half_a_last_line_is_left_out(tmp_path, data, capsys):
    output = tmp_path / "out"
    with JudgeServer(by_answer) as server:
        assert run(capsys, data, "--output", output, *server.arguments)[0] == 0
    log = output / JUDGEMENTS
    whole = log.read_bytes()
    log.write_bytes(whole + b'{"key": "1", "re')
    status, out, err = run(capsys, data, "--judgements", log)
    assert status == 0 and names(err, log, "line 41", "cut off")
    log.write_bytes(whole.rstrip(b"\n"))
    assert json.loads(run(capsys, data, "--judgements", log)[1])["score"] == json.loads(out)["score"]
    log.write_bytes(whole.replace(b"\n", b"\n{broken\n", 1))
    status, _, err = run(capsys, data, "--judgements", log)
    assert status == 2 and names(err, "judgements.jsonl, line 2", "JSON")
    status, _, err = run(capsys, data, "--judgements", tmp_path / "none.jsonl")
    assert status == 2 and "none.jsonl does not exist" in err


def test_without_a_judge_the_command_for_later_is_said_and_works(tmp_path, data, capsys):
    output = tmp_path / "out"
    status, out, _ = run(capsys, data, "--output", output)
    assert status == 0 and metrics(output)["score"] is None and "official" not in metrics(output)["scored_as"]
    assert names(out, "40 questions", "no judge")
    command = next(line for line in out.splitlines() if line.startswith("  python -m "))
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "llava_sp.eval.mmvp"] and words[-2:] == ["--judge", "MODEL"]
    with JudgeServer(by_answer) as server:
        status = main(MMVP, [*words[3:-2], *server.arguments])
    assert status == 0 and metrics(output)["score"] is not None


def test_the_command_for_later_after_a_run_of_the_model(tmp_path):
    benchmark = MMVP()
    benchmark.data = tmp_path / "my data"
    benchmark.judge([], [], tmp_path / "out")
    command = shlex.split(benchmark.unscored.splitlines()[-1])
    assert command[command.index("--answers") + 1] == f"{tmp_path}/out/answers.jsonl"
    assert command[command.index("--output") + 1] == f"{tmp_path}/out/judged"
    assert command[command.index("--data") + 1] == f"{tmp_path}/my data"


def test_what_is_missing_is_said_before_anything_is_answered(tmp_path, data, capsys, monkeypatch):
    def refused(*arguments: object) -> str:
        status, _, err = run(capsys, data, *arguments)
        assert status == 2
        return err

    err = refused("--judge", "m", "--judge-url", "http://localhost:1/v1")
    assert names(err, "--output is None", "directory", "--judge")
    output = ("--output", tmp_path / "out")
    assert names(refused(*output, "--judge", "m"), "--judge-key-env is OPENAI_API_KEY", "variable")
    err = refused(*output, "--judge", "m", "--judge-url", "http://localhost:1/v1", "--judge-key-env", "NONE")
    assert names(err, "--judge-key-env is NONE", "variable")
    err = refused(*output, "--judge", "m", "--judge-url", "localhost:8000")
    assert names(err, "--judge-url is localhost:8000", "http://")
    err = refused(*output, "--judge", "m", "--judge-url", "http://me:pass@localhost:8000/v1/chat/completions")
    assert names(err, "--judge-url is http://localhost:8000/v1/chat/completions;", "before /chat/completions")
    assert "pass" not in err
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "openai" else real(name, *rest)
    )
    err = refused(*output, "--judge", "m", "--judge-url", "http://localhost:1/v1")
    assert names(err, "--judge", "openai", "pip install llava_sp[eval]")
    assert not (tmp_path / "out").exists()


def test_the_address_of_the_environment_is_used(tmp_path, data, capsys, monkeypatch):
    with JudgeServer(always("yes")) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        assert run(capsys, data, "--output", tmp_path / "out", "--judge", "m")[0] == 0
    assert server.keys == {"Bearer none"}


def test_one_command_at_a_time(tmp_path, data, capsys):
    output = tmp_path / "out"
    with JudgeServer(always("yes")) as server, AnswerLog(output / JUDGEMENTS):
        status, _, err = run(capsys, data, "--output", output, *server.arguments)
    assert status == 2 and names(err, output / JUDGEMENTS, "process") and not server.requests


def test_nothing_heavy_is_imported_without_a_judge(repo):
    code = (
        "import sys, llava_sp.eval.mmvp, llava_sp.eval.mmvet, llava_sp.eval.llava_bench\n"
        "print([name for name in ('openai', 'torch', 'transformers') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(repo)}
    done = subprocess.run([sys.executable, "-c", code], cwd=repo, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_retry_after_as_number_and_date():
    assert judge_client.retry_after({"retry-after": "2.5"}) == 2.5
    assert judge_client.retry_after({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    assert 25 < judge_client.retry_after({"retry-after": formatdate(time.time() + 30, usegmt=True)}) <= 30
    assert judge_client.retry_after({"retry-after": formatdate(time.time() - 30, usegmt=True)}) == 0.0
    for said in ({}, {"retry-after": ""}, {"retry-after": "later"}):
        assert judge_client.retry_after(said) is None


MISSING = object()


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"date": 5}, ("line 2: date is 5", "text")),
        ({"url": ["x"]}, ("line 2: url is ['x']", "text")),
        ({"answered_by": {"a": 1}}, ("line 2: answered_by is ",)),
        ({"usage": [3]}, ("line 2: usage is [3]", "an object with total_tokens or null")),
        ({"usage": {"total_tokens": "7"}}, ("line 2: usage.total_tokens is '7'", "a whole number")),
        ({"usage": {"total_tokens": -1}}, ("line 2: usage.total_tokens is -1", "a whole number from 0")),
        ({"usage": {}}, ("line 2: usage has no total_tokens",)),
        *(({name: MISSING}, (f"line 2 has no {name};",)) for name in ("usage", "url", "date", "answered_by")),
        ({"run": None}, ("line 2: run is None", "whole number")),
    ],
)
def test_recorded_fields_of_another_kind_are_named(tmp_path, data, capsys, changes, parts):
    with JudgeServer(by_answer) as server:
        assert run(capsys, data, "--output", tmp_path / "out", *server.arguments)[0] == 0
    file = tmp_path / "judgements.jsonl"
    lines = [json.loads(line) for line in (tmp_path / "out" / JUDGEMENTS).open()]
    spoilt = {key: value for key, value in (lines[1] | changes).items() if value is not MISSING}
    write_lines(file, [lines[0], spoilt, *lines[2:]])
    status, _, err = run(capsys, data, "--judgements", file)
    assert status == 2 and names(err, f"{file}, {parts[0]}", *parts[1:])
    write_lines(file, [lines[0] | {"usage": None, "answered_by": None}, *lines[1:]])  # as where the server does not say
    status, out, _ = run(capsys, data, "--judgements", file)
    assert status == 0 and json.loads(out)["metrics"]["judge"]["tokens"] is None


def test_replies_that_say_little_of_themselves(tmp_path, data, capsys):
    body = {"choices": [{"message": {"role": "assistant", "content": "yes"}}]}
    for name, more in {"none": {}, "number": {"model": 7}}.items():
        with JudgeServer(always(Reply(body=json.dumps(body | more)))) as server:
            assert run(capsys, data, "--output", tmp_path / name, *server.arguments)[0] == 0
        status, _, err = run(capsys, data, "--output", tmp_path / name)  # what was recorded can be read back
        assert status == 0 and metrics(tmp_path / name)["score"] == 100.0, err
