"""Comparing two runs: the difference, its bootstrap interval, the changed items, and what may not be compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from llava_sp.eval import compare as module
from llava_sp.eval.base import Benchmark, Item, Scores
from llava_sp.eval.compare import Run, bootstrap, compare, main
from llava_sp.eval.vqav2 import VQAv2
from tests.messages import names, refused


class Mean(Benchmark):
    name = "mean"
    title = "the mean"

    def load(self, data) -> list[Item]:
        return []

    def score(self, items, answers) -> Scores:
        return Scores(None, {}, [])


class AllOfUnit(Mean):
    """A unit counts if all its items are right."""

    @classmethod
    def headline(cls, per_item):
        units: dict = {}
        for number, record in enumerate(per_item):
            units.setdefault((record["unit"], number // 2), []).append(record["score"])
        return 100 * sum(min(scores) == 100 for scores in units.values()) / len(units)


def run_of(scores, benchmark=Mean, name="a", **changes) -> Run:
    items = [{"question_id": i, "score": float(s), "answer": str(s)} for i, s in enumerate(scores)]
    return Run(
        Path(name),
        benchmark,
        benchmark.headline(items),
        **{"protocol": "llava15", "split": None, **changes},
        items=items,
    )


def test_interval_is_that_of_the_normal_theory():
    """For means of many questions the bootstrap's interval is 1.96 standard errors of the paired differences."""
    rng = np.random.default_rng(0)
    a = 100 * (rng.random(2000) < 0.6)
    b = np.where(rng.random(2000) < 0.1, 100 - a, a)
    result = compare(run_of(a), run_of(b, name="b"), resamples=4000)
    half = 1.96 * np.std(b - a) / np.sqrt(len(a))
    assert result.difference == pytest.approx((b - a).mean(), abs=0.011)  # the headlines are rounded
    assert result.high - result.low == pytest.approx(2 * half, rel=0.06)
    assert result.low < result.difference < result.high
    assert result.better == (b > a).sum() and result.worse == (b < a).sum() and result.changed == (a != b).sum()
    assert len(result.items) == result.better + result.worse


def test_mean_and_general_headline_give_the_same_bootstrap(monkeypatch):
    class AlsoMean(Mean):
        @classmethod
        def headline(cls, per_item):
            return sum(record["score"] for record in per_item) / len(per_item)

    rng = np.random.default_rng(1)
    a, b = (run_of(100 * rng.integers(0, 2, 50)).items for _ in range(2))
    quick, general = (bootstrap(cls, a, b, 100, seed=3) for cls in (Mean, AlsoMean))
    assert np.allclose(quick, general)


def test_units_are_drawn_whole():
    items = [{"question_id": i, "unit": str(i // 2), "score": 100.0 * (i % 4 != 3)} for i in range(40)]
    none = [record | {"score": 0.0} for record in items]
    differences = bootstrap(AllOfUnit, none, items, 200, seed=0)
    assert set(np.round(differences * 20 / 100, 6)) <= set(range(21))
    assert abs(differences.mean() - 50) < 5


def test_the_same_run_differs_by_nothing():
    run = run_of([100, 0, 30, 60])
    result = compare(run, run)
    assert (result.difference, result.low, result.high, result.better, result.worse, result.items) == (
        0,
        0,
        0,
        0,
        0,
        [],
    )


def test_runs_that_do_not_compare():
    a = run_of([1, 2])
    with refused("a and b", "protocol", "llava15", "lmms_eval"):
        compare(a, run_of([1, 2], name="b", protocol="lmms_eval"))
    with refused("a and b", "judge", "None", "gpt-x"):
        compare(a, run_of([1, 2], name="b", judge="gpt-x"))
    with refused("a and b", "benchmark", "mean", "vqav2"):
        compare(a, Run(Path("b"), VQAv2, 1.0, "llava15", None, a.items))
    other = Run(Path("b"), Mean, 1.5, "llava15", None, [record | {"question": "else?"} for record in a.items])
    with refused("a and b", "ids", "asked"):
        compare(a, other)
    with refused("a and b", "2 and 3", "1", "(2)"):
        compare(a, run_of([1, 2, 3], name="b"))


@pytest.fixture
def outputs(official, tmp_path):
    """Two scored answer files of VQAv2: as recorded, and with some answers made right."""
    from llava_sp.eval.cli import main as run

    recorded, data = official("vqav2")
    lines = recorded["files"]["answers/merge.jsonl"]["data"]
    annotations = recorded["files"]["v2_mscoco_val2014_annotations.json"]["data"]["annotations"]
    right = {a["question_id"]: a["multiple_choice_answer"] for a in annotations}
    changed = [line | {"text": right.get(line["question_id"], line["text"])} for line in lines]
    for name, answers in (("a", lines), ("b", changed)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in answers))
        arguments = ["--answers", file, "--data", data, "--output", tmp_path / name / "vqav2"]
        assert run(VQAv2, [str(argument) for argument in arguments]) == 0
    return tmp_path / "a", tmp_path / "b"


@pytest.mark.parametrize("inner", ["", "vqav2"])
def test_command(outputs, tmp_path, capsys, inner):
    a, b = (folder / inner for folder in outputs)
    capsys.readouterr()
    assert main([str(a), str(b), "--samples", "200", "--show", "1", "--output", str(tmp_path / "c.json")]) == 0
    out = capsys.readouterr().out
    assert "vqav2, val (llava15, 40 questions)" in out and "A 70.25" in out and "more; --show N" in out
    (result,) = json.loads((tmp_path / "c.json").read_text())["results"]
    assert result["a"] == 70.25 and result["b"] > 85 and result["low"] > 0 and result["better"] > result["worse"]
    first = result["items"][0]
    assert first["scores"][0] < first["scores"][1] and len(first["answers"]) == 2 and first["question"]


def test_command_says_what_is_missing(outputs, tmp_path, capsys):
    assert main([str(outputs[0]), str(tmp_path / "nothing")]) == 2
    assert names(capsys.readouterr().err, outputs[0], tmp_path / "nothing", "common", "metrics.json")
    assert main([str(outputs[0] / "vqav2"), str(tmp_path / "nothing")]) == 2
    assert names(capsys.readouterr().err, tmp_path / "nothing" / "metrics.json")


def test_one_bad_pair_of_many_does_not_stop_the_others(outputs, capsys):
    for folder in outputs:
        shutil.copytree(folder / "vqav2", folder / "pope")
        (folder / "pope" / "metrics.json").write_text("[]")
    shutil.copytree(outputs[0] / "vqav2", outputs[0] / "gqa")
    assert main([*map(str, outputs), "--samples", "20"]) == 2
    out, err = capsys.readouterr()
    assert (
        "vqav2, val" in out
        and f"{outputs[0] / 'pope' / 'metrics.json'} is []; expected an object with score" in err
        and f"only {outputs[0]} holds gqa" in err
    )


def test_run_without_a_score(outputs):
    file = outputs[0] / "vqav2" / "metrics.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"score": None}))
    with refused(outputs[0] / "vqav2", "answers of vqav2", "score"):
        module.read_run(outputs[0] / "vqav2")


DAMAGE = {
    "metrics.json": {
        "[]": "is []; expected an object with score",
        "": "is empty",
        '{"score": 70.25, "metr': "ends in the middle",
        "null": "is None; expected an object",
        '{"score": "70", "metrics": {}, "provenance": {}}': "score is '70'; expected a number or null",
        '{"score": NaN, "metrics": {}, "provenance": {}}': "score is nan; expected a number or null",
        '{"score": 1, "metrics": {}, "provenance": {"benchmark": "vqav2"}}': "provenance has no protocol",
        '{"score": 1, "metrics": {}, "provenance": {"benchmark": "x", "protocol": "p", "split": null, "count": 40}}': "no benchmark 'x'",
    },
    "per_item.jsonl": {
        "[]": "line 1 is []; expected an object",
        "": "is empty",
        '{"question_id": 1, "score": "a"}': "line 1: score is 'a'; expected a number",
        '{"question_id": 1, "score": NaN}': "line 1: score is nan; expected a number",
        '{"question_id": null, "score": 1}': "line 1: question_id is None",
        '{"question_id": 1, "score": 1, "unit": [2]}': "line 1: unit is [2]",
        '{"question_id": 1}': "line 1 has no score",
        '{"question_id": 1, "score": 1}': "has 1 questions, which make the score None, metrics.json has 40 and 70.25",
    },
}  # fmt: skip


@pytest.mark.parametrize("file, content", [(file, content) for file in DAMAGE for content in DAMAGE[file]])
def test_damaged_results_are_named(outputs, capsys, file, content):
    a, b = (str(folder / "vqav2") for folder in outputs)
    (outputs[0] / "vqav2" / file).write_text(content)
    capsys.readouterr()
    assert main([a, b, "--samples", "20"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and DAMAGE[file][content] in err
    assert a in err or "no benchmark 'x'" in err


def test_results_of_which_lines_were_lost(outputs, capsys):
    for folder in outputs:
        file = folder / "vqav2" / "per_item.jsonl"
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:-3]))
    assert main([*map(str, outputs), "--samples", "20"]) == 2
    assert "vqav2/per_item.jsonl has 37 questions" in capsys.readouterr().err


def test_lone_surrogates_are_printed(outputs, monkeypatch):
    """Python's standard output takes no half of a pair; a file, or a pipe, is such an output."""
    for folder in outputs:
        file = folder / "vqav2" / "per_item.jsonl"
        file.write_text(file.read_text().replace('"question": "', '"question": "\\ud83d '))
    with (outputs[0] / "printed.txt").open("w", encoding="utf-8") as printed, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", printed)
        assert main([*map(str, outputs), "--samples", "20"]) == 0
    assert "\\ud83d " in (outputs[0] / "printed.txt").read_text()
