"""What of the lmms-eval integration can be tested where lmms-eval is not installed: entry point and example tasks."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from llava_sp.eval.vqav2 import VQAv2
from llava_sp.shapes.make import Settings, make


@pytest.fixture(scope="module")
def folder(repo, tmp_path_factory) -> Path:
    """The example tasks copied beside a little shapes world, as their README lines say."""
    data = tmp_path_factory.mktemp("lmms") / "shapes"
    make(data, Settings(questions=60, captions=1, conversations=1), log=lambda line: None)
    shutil.copytree(repo / "configs/lmms_eval", data / "tasks")
    return data / "tasks"


@pytest.fixture(scope="module")
def utils(folder):
    spec = importlib.util.spec_from_file_location("shapes_task_utils", folder / "utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_entry_point_is_there_and_imports_nothing_heavy(repo):
    lines = (repo / "pyproject.toml").read_text().splitlines()
    position = lines.index('[project.entry-points."lmms_eval.models"]')
    name, target = (part.strip().strip('"') for part in lines[position + 1].split("="))
    module, function = target.split(":")
    assert name == "llava_sp" and callable(getattr(importlib.import_module(module), function))
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'lmms_eval') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=repo)
    assert run.stdout.strip() == "[]", run.stderr


def test_only_one_module_needs_lmms_eval(repo):
    """...to be imported; the entry asks for it when lmms-eval calls."""
    needing = []
    for path in sorted((repo / "llava_sp").rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if any(name.split(".")[0] == "lmms_eval" for name in names):
                needing.append(path.relative_to(repo / "llava_sp").as_posix())
    assert set(needing) == {"eval/lmms_eval/model.py"}


def functions_of(file: Path) -> dict:
    """A task's settings, with `!function NAME` as its name."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    return yaml.load(file.read_text(), Loader)


def test_every_function_that_a_task_names_exists(folder, utils):
    named = set()
    for file in folder.glob("*.yaml"):
        task = functions_of(file)
        values = [*task.values(), *(metric["aggregation"] for metric in task["metric_list"])]
        named |= {value for value in values if isinstance(value, str) and value.startswith("utils.")}
        assert task["task"] == file.stem
    assert len(named) == 6
    for name in named:
        assert callable(getattr(utils, name.removeprefix("utils.")))


def test_the_task_asks_and_scores_as_vqav2(folder, utils):
    benchmark = VQAv2(split="val")
    items = benchmark.load(folder.parent / "vqav2")
    questions = folder / functions_of(folder / "shapes_vqa.yaml")["dataset_kwargs"]["data_files"]["val"]
    docs = json.loads(questions.read_text())["questions"]
    assert [utils.text(doc) for doc in docs] == [benchmark.prompt(item) for item in items]
    assert [Path(utils.visual(doc)[0]).read_bytes() for doc in docs] == [item.images[0].read_bytes() for item in items]
    answers = [utils.target(doc) if number % 3 else "A red thing." for number, doc in enumerate(docs)]
    scores = benchmark.score(items, answers)
    each = [utils.score(doc, [answer])["vqa_accuracy"] for doc, answer in zip(docs, answers)]
    assert utils.mean(each) == scores.score and 0 < scores.score < 100


def test_the_choices_hold_the_answer_and_differ_by_type(folder, utils):
    docs = json.loads((folder.parent / "vqav2" / "v2_OpenEnded_mscoco_val2014_questions.json").read_text())["questions"]
    for doc in docs:
        choices = utils.choices(doc)
        assert utils.target(doc) in choices and len(set(choices)) == len(choices) >= 2
    assert len({tuple(utils.choices(doc)) for doc in docs}) > 3
