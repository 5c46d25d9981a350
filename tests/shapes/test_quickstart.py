"""The quickstart's plan, its table and its report, from a small made-up run folder; the shipped configurations."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from llava_sp.config.arguments import load_config
from llava_sp.shapes import quickstart
from llava_sp.shapes.make import Settings, make
from llava_sp.shapes.report import write_report
from llava_sp.shapes.results import load_results, majority_baseline, render_table

VARIANTS = ("none", "cropping", "pooling")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A quickstart folder with real data and made-up losses and answers."""
    output = tmp_path_factory.mktemp("quickstart")
    make(output / "data", Settings(captions=1, conversations=1, questions=36), log=lambda text: None)
    given = json.loads((output / "data/vqav2/v2_mscoco_val2014_annotations.json").read_text())["annotations"]
    asked = json.loads((output / "data/vqav2/v2_OpenEnded_mscoco_val2014_questions.json").read_text())["questions"]
    for number, variant in enumerate(VARIANTS):
        for stage in ("pretrain", "lora"):
            (output / variant / stage).mkdir(parents=True)
            lines = [{"step": s, "loss": 3 * math.exp(-s / 20) + 0.1 * number + 0.3} for s in range(1, 81)]
            text = "".join(json.dumps(line) + "\n" for line in [*lines, {"step": 80, "train_runtime": 1.0}])
            (output / variant / stage / "log.jsonl").write_text(text)
        (output / variant / "vqav2").mkdir()
        items = []
        for i, (question, annotation) in enumerate(zip(asked, given)):
            truth = annotation["multiple_choice_answer"]
            right = (i + number) % 3 > 0
            items.append(
                {
                    "question_id": question["question_id"],
                    "answer": truth if right else "<b>nothing</b>",
                    "score": 100.0 if right else 0.0,
                    "question": question["question"],
                    "image": f"COCO_val2014_{question['image_id']:012d}.jpg",
                    "question_type": annotation["question_type"],
                    "references": [answer["answer"] for answer in annotation["answers"]],
                }
            )
        text = "".join(json.dumps(item) + "\n" for item in items)
        (output / variant / "vqav2" / "per_item.jsonl").write_text(text)
        kinds = {item["question_type"] for item in items}
        metrics = {"score": 66.7, "metrics": {"per_question_type": dict.fromkeys(kinds, 66.7)}}
        (output / variant / "vqav2" / "metrics.json").write_text(json.dumps(metrics))
    return output


class Tags(HTMLParser):
    """Counts tags and checks that they close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_is_whole_and_self_contained(folder):
    results = load_results(folder, [(v, v) for v in VARIANTS])
    page = write_report(folder, results, {"seconds": 480.0, "peak_memory_gib": 1.5}).read_text()
    tags = Tags()
    tags.feed(page)
    assert not tags.open
    assert tags.count["svg"] == 2 and tags.count["polyline"] == 2 * 2 * len(VARIANTS)
    assert tags.count["table"] == 1 and tags.count["figure"] == tags.count["img"] == 12
    assert not re.search(r'(src|href)="(?!data:)', page) and "url(" not in page and "<script" not in page
    assert "<b>nothing</b>" not in page and "&lt;b&gt;nothing&lt;/b&gt;" in page
    assert "8.0 minutes" in page
    assert not re.search(r"\bnan\b", re.sub(r"data:image/jpeg;base64,[^\"]*", "", page).lower())


def test_table(folder):
    results = load_results(folder, [(v, v) for v in VARIANTS])
    lines = render_table(results).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split()[-5:] == [*VARIANTS, "majority", "answer"]
    assert lines[2].startswith("overall") and "66.7" in lines[2]
    assert [line.split("...")[0].strip() for line in lines[4:]] == sorted(
        {i["question_type"] for i in results[0].items}
    )


def test_table_over_seeds(folder):
    results = load_results(folder, [("none", "none"), ("cropping", "none")])
    assert "66.7 ±0.0" in render_table(results)


def test_majority_baseline():
    items = [{"question_type": "is", "references": [word] * 10} for word in ("yes", "yes", "yes", "no")]
    items += [{"question_type": "how many", "references": [word] * 10} for word in "1234"]
    overall, by_type = majority_baseline(items)
    assert (overall, by_type) == (50.0, {"is": 75.0, "how many": 25.0})


def test_an_unfinished_part_is_named(folder):
    with pytest.raises(ValueError, match=r"missing.*metrics\.json does not exist"):
        load_results(folder, [("missing", "none")])


def test_plan_and_commands(tmp_path):
    runs = quickstart.plan(tmp_path, ["none", "pooling"], [42, 7])
    assert [run.name for run in runs] == ["none", "pooling", "none-seed7", "pooling-seed7"]
    args = quickstart.parse(["--finetune-steps", "3"])
    stage1, stage2, score = quickstart.commands(runs[1], tmp_path / "data", args)
    assert [command.title for command in (stage1, stage2, score)] == ["stage 1", "stage 2", "score"]
    assert "--max_steps" not in stage1.words and stage2.words[-2:] == ["--max_steps", "3"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_commands_are_valid_configurations(tmp_path, variant):
    """What the quickstart runs is what configs/shapes says, and stage 2 builds the model of stage 1."""
    run = quickstart.plan(tmp_path, [variant], [quickstart.DEFAULT_SEED])[0]
    *stages, _ = quickstart.commands(run, tmp_path / "data", quickstart.parse([]))
    found = [load_config(stage.words[3], stage.words[4:]) for stage in stages]
    for run in found:
        model, data, training = run.model, run.data, run.train
        assert model.projector["spatial_variant"] == variant and training.deepspeed is None and training.max_steps > 0
        assert Path(model.language_model).is_dir() and Path(model.vision_tower).is_dir()
        assert Path(data.data_path).parent == tmp_path / "data"
    (first, stage1), (second, stage2) = [(run.model, run.train) for run in found]
    assert (stage1.stage, stage2.stage) == ("pretrain", "finetune_lora")
    assert first.projector == second.projector
    assert second.projector_checkpoint == stage1.output_dir
    assert stage2.projector_lr == stage1.learning_rate
