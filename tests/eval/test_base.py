"""The seam for further benchmarks: the example in the docstring of `base` runs as it stands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap

import pytest
from PIL import Image

from llava_sp.common.files import write_json
from llava_sp.eval import base
from llava_sp.eval.base import Item
from llava_sp.eval.cli import main
from llava_sp.eval.run.output import exclusive
from llava_sp.inference import open_image

HEADER = "from llava_sp.eval.base import Benchmark, Item, Scores, SHORT_ANSWER\n"


@pytest.fixture
def colour_qa():
    """The class of the docstring's example."""
    example = base.__doc__.split("small file:")[1].split("if __name__")[0]
    scope: dict = {"__name__": __name__}
    exec(HEADER + textwrap.dedent(example), scope)
    return scope["ColourQA"]


@pytest.fixture
def data(tmp_path):
    rows = [
        {"id": f"q{i}", "q": "Which colour?", "image": f"{i}.png", "a": colour}
        for i, colour in enumerate(("red", "blue"))
    ]
    (tmp_path / "data" / "images").mkdir(parents=True)
    (tmp_path / "data" / "colourqa.json").write_text(json.dumps(rows))
    return tmp_path / "data"


def test_example_scores_an_answers_file(colour_qa, data, tmp_path, capsys):
    answers = tmp_path / "answers.jsonl"
    answers.write_text(
        "".join(json.dumps({"question_id": f"q{i}", "text": t}) + "\n" for i, t in ((1, "Blue."), (0, "green")))
    )
    assert main(colour_qa, ["--answers", str(answers), "--data", str(data), "--output", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert result["score"] == 50.0 and result["provenance"]["benchmark"] == "colourqa"
    assert list(result["provenance"]["data_files"]) == [str(data / "colourqa.json")]
    lines = [json.loads(line) for line in (tmp_path / "out" / "per_item.jsonl").open()]
    assert [line["score"] for line in lines] == [0.0, 1.0]


def test_example_has_no_submissions_to_validate(colour_qa, data, capsys):
    assert main(colour_qa, ["--validate", "x.json", "--data", str(data)]) == 1
    assert "colourqa has no submission files" in capsys.readouterr().err


@pytest.mark.parametrize(
    "ids, message",
    [
        (["q", "q", 1, "1"], r"2 keys of colourqa occur more than once \(q, 1\)"),
        ([], "holds no questions of colourqa"),
    ],
)
def test_items_with_the_same_key_are_refused(colour_qa, tmp_path, capsys, ids, message):
    rows = [{"id": i, "q": "Which colour?", "image": "x.png", "a": "red"} for i in ids]
    (tmp_path / "colourqa.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text('{"question_id": "q", "text": "red"}\n')
    assert main(colour_qa, ["--answers", str(tmp_path / "a.jsonl"), "--data", str(tmp_path)]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_half_a_surrogate_pair_is_written_as_json(colour_qa, data, tmp_path):
    text = json.loads('"\\ud83d red"')
    answers = [{"question_id": f"q{i}", "text": text} for i in range(2)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    out = tmp_path / "out"
    assert main(colour_qa, ["--answers", str(tmp_path / "a.jsonl"), "--data", str(data), "--output", str(out)]) == 0
    write_json(out / "x.json", {"text": text})
    assert json.loads((out / "x.json").read_text()) == {"text": text}


def test_a_folder_belongs_to_one_command_at_a_time(colour_qa, data, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"question_id": "q0", "text": "red"}\n{"question_id": "q1", "text": "red"}\n')
    out = tmp_path / "out"
    arguments = ["--answers", str(tmp_path / "a.jsonl"), "--data", str(data), "--output", str(out)]
    with exclusive(out):
        assert main(colour_qa, arguments) == 2
        assert "is being written by another process" in capsys.readouterr().err
        assert not (out / "run.json").exists()
    assert main(colour_qa, arguments) == 0


@pytest.mark.parametrize(
    "content", ["[]", "", '{"score": 1', "null", '{"provenance": []}', '{"provenance": {"count": "2"}}']
)
def test_damaged_results_are_named(colour_qa, data, tmp_path, capsys, content):
    (tmp_path / "a.jsonl").write_text('{"question_id": "q0", "text": "red"}\n{"question_id": "q1", "text": "red"}\n')
    arguments = ["--answers", str(tmp_path / "a.jsonl"), "--data", str(data), "--output", str(tmp_path / "out")]
    assert main(colour_qa, arguments) == 0
    metrics = tmp_path / "out" / "metrics.json"
    metrics.write_text(content)
    capsys.readouterr()
    assert main(colour_qa, arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: {metrics}") and metrics.read_text() == content


def test_arguments_are_not_abbreviated(colour_qa, data, capsys):
    with pytest.raises(SystemExit):
        main(colour_qa, ["--answ", "x", "--data", str(data)])
    assert "unrecognized arguments: --answ" in capsys.readouterr().err


def test_the_readmes_benchmark_is_one_file(repo, tmp_path):
    """The README's example, as a file of the package: model run, table, comparison."""
    package = tmp_path / "llava_sp"
    (package / "eval").mkdir(parents=True)
    for folder, own in ((repo / "llava_sp", package), (repo / "llava_sp" / "eval", package / "eval")):
        for path in folder.iterdir():
            if path.name not in ("eval", "__pycache__"):
                (own / path.name).symlink_to(path)
    blocks = (repo / "README.md").read_text().split("```python\n")
    example = next(block.split("```")[0] for block in blocks if "class ColourQA" in block)
    assert len(example.splitlines()) <= 36
    (package / "eval" / "colourqa.py").write_text(example)
    pictures = tmp_path / "data" / "colourqa" / "images"
    pictures.mkdir(parents=True)
    rows = []
    for number, colour in enumerate(("red", "blue", "green")):
        Image.new("RGB", (40, 30), colour).save(pictures / f"{number}.png")
        row = {"id": number, "question": "What color is the square?", "image": f"{number}.png", "colour": colour}
        rows.append(row)
    (pictures.parent / "colourqa.json").write_text(json.dumps(rows))

    def run(*arguments: object) -> str:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "TQDM_DISABLE": "1"}
        command = [sys.executable, "-m", *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    model = repo / "llava_sp" / "shapes" / "model"
    table = run("llava_sp.eval", "--only", "colourqa", "--data", tmp_path / "data", "--model", model, "--output", "out")
    assert "ColourQA accuracy in percent" in table and "\ncolourqa   llava15           3  100.00" in table
    answers = tmp_path / "out" / "colourqa" / "answers.jsonl"
    alone = run("llava_sp.eval.colourqa", "--answers", answers, "--data", pictures.parent, "--output", "again")
    assert "(3 questions)" in alone
    assert "B - A +0.00" in run("llava_sp.eval.compare", "out/colourqa", "again")


def test_message_has_one_mark_per_image(colour_qa):
    for count in (0, 1, 3):
        item = Item(id=1, text="Why?", images=(b"",) * count)
        assert colour_qa().message(item) == "<image>\n" * count + "Why?" + base.SHORT_ANSWER


def test_benchmarks_import_no_torch(repo):
    code = "import sys, llava_sp.eval.vqav2; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=repo).returncode == 0


def test_embedded_images(tmp_path):
    Image.new("RGB", (5, 4), (10, 20, 30)).save(tmp_path / "x.png")
    content = (tmp_path / "x.png").read_bytes()
    assert open_image(content, "question 3").getpixel((0, 0)) == (10, 20, 30)
    with pytest.raises(ValueError, match="question 3: embedded image of 9 bytes"):
        open_image(b"no image.", "question 3")
