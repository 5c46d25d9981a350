"""MMBench-CN: what differs from MMBench."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from llava_sp.eval.cli import default_data, main
from llava_sp.eval.mmbench_cn import MMBenchCN
from tests.eval.test_mmbench import SCORERS, check_scores, sheet
from tests.messages import refused

RECORDING = "mmbench_cn"

FIRST = "请看图。\n第0张图中最显眼的东西是什么？\nA. 铁砧\nB. 书包\nC. 望远镜"


@pytest.mark.parametrize("protocol", SCORERS)
def test_scores_equal_those_of_other_programs(tmp_path, data, recorded, protocol):
    arguments = [
        "--answers",
        data / "answers" / "model.jsonl",
        "--data",
        data,
        "--output",
        tmp_path,
        "--protocol",
        protocol,
    ]
    (tmp_path / "run.json").unlink(missing_ok=True)
    assert main(MMBenchCN, [str(argument) for argument in arguments]) == 0
    result = json.loads((tmp_path / "metrics.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "per_item.jsonl").open()]
    check_scores(result, lines, recorded["expected"][SCORERS[protocol]])
    assert MMBenchCN.headline(lines) == result["score"]
    expected = recorded["expected"]["llava_convert"]
    header, *rows = sheet(tmp_path / "submission.xlsx")
    assert list(header) == expected["columns"]
    assert {str(row[0]): row[6] or "" for row in rows} == expected["prediction"]


def test_prompts_and_generation_equal_llavas(data, recorded_prompts):
    expected = recorded_prompts["mmbench_cn"]
    generation = asdict(MMBenchCN.generation)
    assert generation == {key: value for key, value in expected["generate_kwargs"].items() if "image" not in key}
    benchmark = MMBenchCN()
    items = {item.id: item for item in benchmark.load(data)}
    for case in expected["items"]:
        item = items[int(case["question_record"]["index"])]
        record = {**benchmark.record(item), "text": "decoded", "model_id": "llava-v1.5-7b", "metadata": {}}
        assert record == case["answer_record_without_answer_id"]
        assert list(record) == list(case["answer_record_without_answer_id"])
        assert f"USER: {benchmark.message(item)} ASSISTANT:" in case["prompt"]
    first = next(iter(items.values()))
    assert benchmark.prompt(first) == f"{FIRST}\n请直接回答选项字母。"


def test_lmms_evals_prompt(data):
    benchmark = MMBenchCN(protocol="lmms_eval")
    options = "There are several options:\nA. 铁砧\nB. 书包\nC. 望远镜"
    asked = f"请看图。 第0张图中最显眼的东西是什么？ {options}\n\n请直接使用所提供的选项字母作为答案回答。"
    assert benchmark.prompt(benchmark.load(data)[0]) == asked and benchmark.generation.max_new_tokens == 256


def test_the_table_may_lie_with_the_english_one(tmp_path):
    for name in ("mmbench", "mmbench_cn"):
        (tmp_path / "eval" / name).mkdir(parents=True)
    assert default_data(MMBenchCN, tmp_path / "eval").name == "mmbench_cn"
    (tmp_path / "eval" / "mmbench_cn").rmdir()
    assert default_data(MMBenchCN, tmp_path / "eval").name == "mmbench"


def test_the_english_table_is_not_taken(data):
    (data / "mmbench_dev_cn.tsv").rename(data / "mmbench_dev.tsv")
    with refused(data, "mmbench_cn", "mmbench_dev_cn_20231003.tsv, MMBench_DEV_CN"):
        MMBenchCN().load(data)
