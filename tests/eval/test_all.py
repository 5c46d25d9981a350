"""Every benchmark end to end: a real model on the shapes world in the official formats, then the table and the report."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from llava_sp.eval.__main__ import main
from llava_sp.eval.base import SOURCES
from llava_sp.eval.cli import main as run_one
from llava_sp.eval.compare import main as compare
from llava_sp.eval.report.html import worst_items
from llava_sp.eval.run.output import exclusive
from llava_sp.eval.run.registry import ORDER, load_benchmark
from llava_sp.shapes.benchmarks import Settings, write_all
from tests.messages import names

JUDGED = {"llava_bench", "mmvet", "mmvp"}
SMALL = ("--max-new-tokens", "8", "--device", "cpu", "--batch-size", "16")


@pytest.fixture(scope="module")
def model(repo) -> Path:
    return repo / "llava_sp" / "shapes" / "model"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    write_all(folder, Settings(questions=6), log=lambda _: None)
    return folder


@pytest.fixture(scope="module")
def results(model, data, tmp_path_factory) -> Path:
    """The output of `python -m llava_sp.eval --all`."""
    output = tmp_path_factory.mktemp("all") / "out"
    arguments = ["--all", "--data", data, "--model", model, "--output", output, *SMALL]
    environment = {**os.environ, "PYTHONPATH": str(model.parents[2]), "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "llava_sp.eval", *map(str, arguments)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (output / "printed.txt").write_text(run.stdout)
    return output


def test_every_benchmark_ran(results, data):
    found = json.loads((results / "results.json").read_text())
    assert tuple(found["benchmarks"]) == ORDER and found["limited"] is False
    for name, record in found["benchmarks"].items():
        benchmark = load_benchmark(name)
        metrics = json.loads((results / name / "metrics.json").read_text())
        lines = [json.loads(line) for line in (results / name / "per_item.jsonl").open()]
        assert record["score"] == metrics["score"] and 0 < record["count"] <= len(lines)
        assert record["published"] == dict(benchmark.published)
        if name in JUDGED:
            assert record["score"] is None and record["note"] and record["protocol"] not in metrics.get("scored_as", {})
            continue
        assert 0 <= record["score"] <= (2000 if name == "mme" else 100)
        assert benchmark.headline(lines) == record["score"]
        assert all(0 <= line["score"] <= 100 for line in lines)
        assert record["categories"] or name == "textvqa"
    assert set(found["sources"]) == set(SOURCES)


def test_answers_say_how_they_were_made(results):
    for name in ORDER:
        log = next((results / name / "answers").glob("rank-*.jsonl"))
        for line in map(json.loads, log.read_text().splitlines()):
            assert {"question_id", "text", "key", "generation", "seconds"} <= set(line)
            assert line["generation"]["max_new_tokens"] == 8


def test_printed_table_and_markdown(results):
    printed, markdown = (results / "printed.txt").read_text(), (results / "results.md").read_text()
    scores = {
        name: record["score"]
        for name, record in json.loads((results / "results.json").read_text())["benchmarks"].items()
    }
    for name, score in scores.items():
        cells = re.search(rf"^\| {name} \|(.*)\|$", markdown, re.MULTILINE).group(1).split("|")
        assert cells[2].strip() == ("-" if score is None else f"{score:.2f}")
        assert re.search(rf"^{name} +{cells[0].strip()} +{cells[1].strip()} +", printed, re.MULTILINE)
    assert (
        "| pope | llava15 |" in markdown
        and " 85.9 | 86.4 | 86.6 |" in markdown
        and "LLaVA docs/MODEL_ZOO.md" in markdown
    )


def test_report_needs_no_other_file(results):
    page = (results / "report.html").read_text()
    for name in ORDER:
        assert f'<h2 id="{name}">' in page
    assert page.count('src="data:image/jpeg;base64,') > 20
    assert not re.search(r'(?:src|href)="(?!data:|#)', page) and "http" not in page
    assert 'class="track"' in page and "Worst answers" in page


def test_the_same_command_again_answers_nothing(results, model, data, capsys):
    before = {name: (results / name / "answers.jsonl").read_bytes() for name in ORDER}
    logs = {path: path.read_bytes() for path in results.glob("*/answers/*.jsonl")}
    assert main(["--all", "--data", str(data), "--model", str(model), "--output", str(results), *SMALL]) == 0
    assert before == {name: (results / name / "answers.jsonl").read_bytes() for name in ORDER}
    assert logs == {path: path.read_bytes() for path in results.glob("*/answers/*.jsonl")}


def test_two_results_compare(results, capsys):
    assert compare([str(results), str(results), "--samples", "20"]) == 0
    out, err = capsys.readouterr()
    assert out.count("B - A +0.00") == len(ORDER) - len(JUDGED)
    assert err.count("note: left out: ") == len(JUDGED) and err.count("but no score") == len(JUDGED)
    assert compare([str(results / "mmvet"), str(results / "mmvet")]) == 2
    assert "but no score" in capsys.readouterr().err


def test_what_cannot_run_is_said_and_the_rest_runs(model, data, tmp_path, capsys):
    for name in ("pope", "gqa"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for file in (data / name).iterdir():
            os.symlink(file, tmp_path / "data" / name / file.name)
    questions = tmp_path / "data" / "gqa" / "testdev_balanced_questions.json"
    content = questions.read_bytes()
    questions.unlink()
    questions.write_bytes(content[: len(content) // 2])
    output = tmp_path / "out"
    arguments = ["--all", "--data", tmp_path / "data", "--model", model, "--output", output, *SMALL, "--limit", "4"]
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert "error: gqa: " in err and "testdev_balanced_questions.json is not valid JSON" in err
    assert "no data below" in err and "vqav2" in err
    found = json.loads((output / "results.json").read_text())
    assert found["limited"] and found["benchmarks"]["gqa"]["note"].startswith("not run: ")
    assert found["benchmarks"]["pope"]["count"] == 4 and "only the first questions" in out


def test_pictures_damaged_since_are_said_in_the_report(model, data, tmp_path, capsys):
    shutil.copytree(data / "qbench", tmp_path / "data" / "qbench")
    arguments = ["--all", "--data", tmp_path / "data", "--model", model, "--output", tmp_path / "out", *SMALL]
    arguments = [str(argument) for argument in arguments]
    assert main(arguments) == 0
    for picture in (tmp_path / "data" / "qbench" / "images").iterdir():
        size = picture.stat().st_size
        picture.write_bytes(b"x" * size)
    assert main(arguments) == 0
    assert "<p>question 0: " in (tmp_path / "out" / "report.html").read_text()


def test_protocol_goes_to_the_benchmarks_that_have_it(model, data, tmp_path, capsys):
    chosen = ["--only", "mmvet", "pope"]
    arguments = ["--data", str(data), "--model", str(model), "--output", str(tmp_path / "out"), *SMALL, "--limit", "2"]
    assert main([*chosen, *arguments, "--protocol", "lmms_eval"]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())["benchmarks"]
    assert {name: record["protocol"] for name, record in found.items()} == {"mmvet": "llava15", "pope": "lmms_eval"}
    assert main([*chosen, *arguments, "--protocol", "nothing"]) == 2
    assert names(capsys.readouterr().err, "'nothing'", "llava15", "lmms_eval")


def test_results_that_a_table_leaves_out_are_named(model, data, tmp_path, capsys):
    """The table is of the command that wrote it; the others' answers are kept, and one more command makes a table of all."""
    arguments = ["--data", data, "--model", model, "--output", tmp_path, *SMALL, "--limit", 2]
    arguments, file = [str(argument) for argument in arguments], tmp_path / "results.json"
    assert main(["--only", "pope", *arguments]) == 0
    assert "results.json" not in capsys.readouterr().err
    assert main(["--only", "mme", *arguments]) == 0
    assert names(capsys.readouterr().err, f"note: {file} held pope too", "--only pope mme")
    assert main(["--only", "mme", "pope", *arguments]) == 0
    assert "results.json" not in capsys.readouterr().err and list(json.loads(file.read_text())["benchmarks"]) == [
        "mme",
        "pope",
    ]
    file.write_text("{")
    assert main(["--only", "pope", *arguments]) == 0 and json.loads(file.read_text())


def test_one_command_at_a_time_in_a_root(model, data, tmp_path, capsys):
    """Two of them would leave out what the other one holds, each in its own results."""
    output = tmp_path / "out"
    arguments = ["--only", "pope", "--data", data, "--model", model, "--output", output, *SMALL, "--limit", 2]
    arguments = [str(argument) for argument in arguments]
    with exclusive(output):
        assert main(arguments) == 2
    err = capsys.readouterr().err
    assert names(err, "error:", output / ".lock", "process")
    assert [path.name for path in output.iterdir()] == [".lock"]
    assert main(arguments) == 0
    (output / "pope" / "metrics.json").write_text("[]")
    assert main(arguments) == 2
    assert f"error: pope: {output / 'pope' / 'metrics.json'} is []; expected" in capsys.readouterr().err


@pytest.mark.parametrize("size", [1, 8])
def test_a_checkpoint_of_stage_1_is_not_asked_questions(model, data, tmp_path, capsys, size):
    stage1 = tmp_path / "stage1"
    shutil.copytree(model, stage1, ignore=shutil.ignore_patterns("chat_template.jinja"))
    settings = json.loads((stage1 / "processor_config.json").read_text())
    (stage1 / "processor_config.json").write_text(json.dumps(settings | {"conversation_template": "plain"}))
    arguments = [
        "--model",
        stage1,
        "--data",
        data / "vqav2",
        "--output",
        tmp_path / "out",
        *SMALL,
        "--batch-size",
        size,
    ]
    assert run_one(load_benchmark("vqav2"), [str(argument) for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert names(err, "error:", "template 'plain'", "stage 1", "stage 2") and not list(
        (tmp_path / "out").glob("**/rank-*.jsonl")
    )


def test_fewer_questions_do_not_replace_more(model, data, tmp_path, capsys):
    arguments = [
        "--only",
        "pope",
        "--data",
        str(data),
        "--model",
        str(model),
        "--output",
        str(tmp_path / "out"),
        *SMALL,
    ]
    assert main(arguments) == 0
    assert main([*arguments, "--limit", "2"]) == 2
    assert names(capsys.readouterr().err, "6 questions", "2", "--output")


def test_chinese_tables_in_the_english_folder(model, data, tmp_path, capsys):
    """As LLaVA's documents have it; an English folder alone is none of MMBench-CN."""
    folder = tmp_path / "data" / "mmbench"
    folder.mkdir(parents=True)
    for name in ("mmbench", "mmbench_cn"):
        arguments = ["--all", "--data", tmp_path / "data", "--model", model, "--output", tmp_path / name, *SMALL]
        for file in (data / name).iterdir():
            (folder / file.name).symlink_to(file)
        assert main([str(argument) for argument in (*arguments, "--limit", 2)]) == 0
        found = list(json.loads((tmp_path / name / "results.json").read_text())["benchmarks"])
        assert found == (["mmbench"] if name == "mmbench" else ["mmbench", "mmbench_cn"])


@pytest.mark.parametrize(
    "more, parts",
    [
        (["--only", "nothing"], ("'nothing'", "vqav2")),
        (["--all", "--batchsize", "3"], ("--batchsize 3",)),
        (["--all", "--split", "val"], ("--split", "single")),
        (["--all", "--outp", "x"], ("--outp x",)),
        (["--all", "--answers", "x"], ("--answers", "single")),
        (["--only", "gqa", "--model", "nowhere/at/all"], ("nowhere/at/all",)),
    ],
)
def test_bad_arguments(model, data, tmp_path, capsys, more, parts):
    assert main(["--data", str(data), "--model", str(model), "--output", str(tmp_path / "out"), *more]) == 2
    assert names(capsys.readouterr().err, *parts)
    assert not (tmp_path / "out").exists()


def test_empty_root(model, tmp_path, capsys):
    assert main(["--all", "--data", str(tmp_path), "--model", str(model)]) == 2
    assert f"{tmp_path} has no folder for vqav2" in capsys.readouterr().err


def test_list(capsys):
    assert main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(ORDER)


def test_worst_items_are_spread():
    items = [
        {"score": s, "category": c, "image": i}
        for s, c, i in ((100, "a", 1), (0, "a", 1), (0, "a", 1), (0, "b", 2), (50, "c", 3))
    ]
    assert worst_items(items, 3) == [1, 3, 2]
    assert worst_items(items, 9) == [1, 3, 2, 4]
    assert worst_items([{"score": None}, {"score": 100}]) == []


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_process_ends_the_evaluation(model, data, tmp_path, rank):
    """Two processes under torchrun; the other one answers its share, waits, and says for whom."""
    words = [
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "llava_sp.eval.pope",
        "--model",
        model,
        "--data",
        data / "pope",
    ]
    words += ["--output", tmp_path, *SMALL, "--watchdog-minutes", "0.1"]
    environment = {**os.environ, "PYTHONPATH": str(model.parents[2]), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *map(str, words)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as run:
        end = time.monotonic() + 120
        while len(list((tmp_path / ".alive").glob("[01]"))) < 2:
            assert run.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        workers = [w for w in psutil.Process(run.pid).children() if "llava_sp.eval.pope" in w.cmdline()]
        next(worker for worker in workers if worker.environ()["RANK"] == str(rank)).suspend()
        error = run.communicate(timeout=180)[1]
    said = [line for line in error.splitlines() if "error: no progress for 0.1 minutes at step" in line]
    assert run.returncode == 1 and len(said) == 1, error
    assert f"waiting for process {rank} (step " in said[0] and "silent: stopped or dead" in said[0]
    assert said[0].startswith("process 1: " if rank == 0 else "error: ")
