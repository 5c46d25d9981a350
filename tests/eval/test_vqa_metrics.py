"""VQA accuracy against the recorded output of the official scorers, and each normalisation quirk on its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest

from llava_sp.eval.base import SHORT_ANSWER
from llava_sp.eval.cli import main
from llava_sp.eval.scoring.vqa import (
    CONTRACTIONS,
    PUNCTUATION,
    evalai_answer,
    leave_one_out,
    official_answer,
    percent,
    process_digits_and_articles,
    process_punctuation,
    vlmevalkit_answer,
    vqa_accuracy,
)
from llava_sp.eval.textvqa import TextVQA
from llava_sp.eval.vizwiz import VizWiz
from llava_sp.eval.vqav2 import VQAv2


@pytest.fixture(scope="module")
def recorded(golden):
    return json.loads((golden / "eval" / "vqav2.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "scorer, prepare",
    [
        ("llava_pipeline.vqaeval_py27", evalai_answer),
        ("llava_pipeline.vqaeval_py3", evalai_answer),
        ("raw_answers.vqaeval_py27", str),
        ("raw_answers.vqaeval_py3", str),
    ],
)
def test_equals_official_scorer(recorded, scorer, prepare):
    annotations = recorded["files"]["v2_mscoco_val2014_annotations.json"]["data"]["annotations"]
    raw = {item["id"]: item["raw"] for item in recorded["items"]}
    scores = [vqa_accuracy(prepare(raw[a["question_id"]]), a["answers"]) for a in annotations]
    expected = recorded["expected"][scorer]
    per_item = {str(a["question_id"]): round(100 * score, 2) for a, score in zip(annotations, scores)}
    assert per_item == expected["per_item"]
    assert percent(scores) == expected["aggregate"]["overall"]
    for kind, figures in (("answer_type", "perAnswerType"), ("question_type", "perQuestionType")):
        for name, figure in expected["aggregate"][figures].items():
            assert percent(s for a, s in zip(annotations, scores) if a[kind] == name) == figure


def test_always_normalising_equals_lmms_eval(recorded):
    annotations = recorded["files"]["v2_mscoco_val2014_annotations.json"]["data"]["annotations"]
    raw = {item["id"]: item["raw"] for item in recorded["items"]}
    scores = [vqa_accuracy(raw[a["question_id"]], a["answers"], always_normalise=True) for a in annotations]
    expected = recorded["expected"]["raw_answers.lmms_eval"]
    per_item = {str(a["question_id"]): round(100 * score, 2) for a, score in zip(annotations, scores)}
    assert per_item == {i: round(100 * value, 2) for i, value in expected["per_item"].items()}
    assert percent(scores) == round(100 * expected["aggregate"]["exact_match"], 2)


def test_evalai_equals_llava_upload(recorded):
    upload = {r["question_id"]: r["answer"] for r in recorded["expected"]["llava_convert"]["upload"]}
    assert {item["id"]: evalai_answer(item["raw"]) for item in recorded["items"]} == upload


def test_tables_have_the_official_size():
    assert len(CONTRACTIONS) == 120
    assert len(PUNCTUATION) == len(set(PUNCTUATION)) == 21


@pytest.mark.parametrize(
    "text, expected",
    [
        ("5.", "5"),
        ("a.b", "ab"),
        (".5", ".5"),
        ("3.5", "3.5"),
        ("t-shirt", "t shirt"),
        ("t- shirt", "t shirt"),
        ("5,x-ray", "5 x ray"),
        ("1,200 t-shirts", "1200 tshirts"),
        ("." * 40, "." * 8),
        ("it's: $5", "it's: $5"),
    ],
)
def test_punctuation(text, expected):
    assert process_punctuation(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The  Two dogs", "2 dogs"),
        ("None", "0"),
        ("dont", "don't"),
        ("somebody'd", "somebodyd"),
        ("yall'd've", "y'all'd've"),
        ("Im", "im"),
        ("a\u00a0cat", "cat"),
        ("\u200bthe", "\u200bthe"),
        ("", ""),
    ],
)
def test_digits_and_articles(text, expected):
    assert process_digits_and_articles(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [("The man's hat.", "man 's hat"), ("5,x-ray", "5x ray"), ("line one\nline\ttwo", "line 1 line 2"), ("  ", "")],
)
def test_evalai(text, expected):
    assert evalai_answer(text) == expected


@pytest.mark.parametrize(
    "text, official, vlmevalkit",
    [
        ("1984.", "1984", "1984."),
        ("5.x", "5x", "5.x"),
        ("St. James.", "st james", "st james"),
        ("3.5", "3.5", "3.5"),
        (".5", ".5", ".5"),
        ("The\tTwo\ncats!", "2 cats", "2 cats"),
        ("man's", "man's", "man's"),
        ("b." * 40, "b" * 32 + "b." * 8, "b" * 32 + "b." * 8),  # 32 at most
    ],
)
def test_all_steps_with_either_rule_for_periods(text, official, vlmevalkit):
    assert official_answer(text) == official
    assert vlmevalkit_answer(text) == vlmevalkit


@pytest.mark.parametrize("matches, expected", [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_leave_one_out_over_ten_answers(matches, expected):
    answers = ["yes"] * matches + ["no"] * (10 - matches)
    assert leave_one_out("yes", answers) == pytest.approx(expected)
    assert leave_one_out("yes", answers, identities=range(10)) == pytest.approx(expected)


def test_identical_annotations_switch_normalisation_off():
    same = [{"answer": "Blue", "answer_id": i} for i in range(10)]
    assert vqa_accuracy("blue", same) == 0
    assert vqa_accuracy("Blue", same) == 1
    assert vqa_accuracy("the blue", same, always_normalise=True) == 1


def test_records_without_distinct_ids_drop_out_together():
    answers = [{"answer": "cat"}] * 5 + [{"answer": "dog"}] * 5
    assert vqa_accuracy("cat", answers) == 0.5
    confident = [{"answer": "cat", "answer_confidence": "yes" if i else "no"} for i in range(5)]
    assert vqa_accuracy("cat", confident) == pytest.approx((1 + 4 * 1 / 3) / 5)


def test_imports_without_torch():
    code = "import sys, llava_sp.eval.scoring.vqa; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def ten_answers(matches: int) -> list[str]:
    return ["x"] * matches + [f"other{number}" for number in range(10 - matches)]


def vqav2_files(folder: Path, matches: list[int]) -> None:
    questions = [{"question_id": i, "image_id": i, "question": "?"} for i in range(len(matches))]
    kinds = {"answer_type": "other", "question_type": "what"}
    annotations = [
        {"question_id": i, "answers": [{"answer": a, "answer_id": j} for j, a in enumerate(ten_answers(n))], **kinds}
        for i, n in enumerate(matches)
    ]
    (folder / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps({"questions": questions}))
    (folder / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": annotations}))


def vizwiz_files(folder: Path, matches: list[int]) -> None:
    kinds = {"question": "?", "answer_type": "other", "answerable": 1}
    records = [
        {"image": f"{i}.jpg", "answers": [{"answer": a} for a in ten_answers(n)], **kinds}
        for i, n in enumerate(matches)
    ]
    (folder / "val.json").write_text(json.dumps(records))


def textvqa_files(folder: Path, matches: list[int]) -> None:
    rows = [
        {"question": "?", "image_id": str(i), "question_id": i, "answers": ten_answers(n)}
        for i, n in enumerate(matches)
    ]
    (folder / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": rows}))


ONE_TIE = [3, 4, 4, 4, 4] + [0] * 11  # 4.9 of 16 are 30.625 %; by the rounded scores of the questions it would be 30.62
OTHER_TIE = [3] + [4] * 24 + [0] * 23  # 24.9 of 48 are 51.875 %


@pytest.mark.parametrize(
    "benchmark, files, matches, score",
    [
        (VQAv2, vqav2_files, ONE_TIE, 30.63),
        (VizWiz, vizwiz_files, ONE_TIE, 30.63),
        (TextVQA, textvqa_files, ONE_TIE, 30.63),
        (VQAv2, vqav2_files, OTHER_TIE, 51.88),  # 100 * sum / count, as vqaEval.py has it
        (VizWiz, vizwiz_files, OTHER_TIE, 51.88),
        (TextVQA, textvqa_files, OTHER_TIE, 51.87),  # 100 * (sum / count), as eval_textvqa.py has it
    ],
)
def test_ties_are_rounded_as_the_official_code_does(tmp_path, capsys, benchmark, files, matches, score):
    files(tmp_path, matches)
    lines = [{"question_id": i, "prompt": f"?{SHORT_ANSWER}", "text": "x"} for i in range(len(matches))]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["--answers", tmp_path / "answers.jsonl", "--data", tmp_path, "--output", tmp_path / "out"]
    assert main(benchmark, [str(argument) for argument in arguments]) == 0
    capsys.readouterr()
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())
    per_item = [json.loads(line) for line in (tmp_path / "out" / "per_item.jsonl").open()]
    assert result["score"] == score == benchmark.headline(per_item)
    assert {category["score"] for category in result["categories"].values()} <= {score}
    assert [line["score"] for line in per_item] == [round(100 * line["accuracy"], 2) for line in per_item]
    if matches is ONE_TIE:
        assert round(fmean(line["score"] for line in per_item), 2) != score
