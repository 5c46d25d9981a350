"""The README's table "you have ... -> call ...": every row is run on a tiny checkpoint of its kind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llava_sp import LlavaSPForCausalLM, LlavaSPProcessor
from llava_sp.checkpoints.inspect import main
from tests.checkpoints.kinds import NAMES
from tests.released import LAYOUTS

README = (Path(__file__).parents[2] / "README.md").read_text()
TABLE = README.split("| you have | format | call |\n|---|---|---|\n")[1].split("\n\n")[0]
ROWS = [re.fullmatch(r"\| (.*?) \| `?(\w*)`? ?\| `(.*)` \|", line).groups() for line in TABLE.splitlines()]


def test_every_format_has_a_row():
    assert {kind for _, kind, _ in ROWS} == {*NAMES, ""}


@pytest.mark.parametrize(("what", "kind", "call"), ROWS, ids=[row[0] for row in ROWS])
def test_the_call_opens_it(kinds, golden, what, kind, call):
    paths = {
        '"PATH"': str(kinds[kind].folder) if kind else "",
        '"B"': str(golden / "base"),
        '"V"': str(golden / "clip"),
    }
    for word, path in paths.items():
        call = call.replace(word, repr(path))
    model = eval(call)
    assert isinstance(model, LlavaSPForCausalLM)
    if "from_pretrained" in call:
        processor = eval(call.replace("LlavaSPForCausalLM", "LlavaSPProcessor"))
        assert isinstance(processor, LlavaSPProcessor)
        assert processor.num_image_tokens == model.config.num_image_tokens


GOLDEN = [
    *(f"checkpoint_{layout}/lora" for layout in LAYOUTS),
    *(f"pretrain_artifacts/{variant}{end}" for variant in ("cropping", "pooling") for end in ("", "/checkpoint-1000")),
]


@pytest.mark.parametrize("folder", GOLDEN)
def test_the_inspections_shown_are_those_printed(repo, monkeypatch, capsys, folder):
    monkeypatch.chdir(repo)
    status = main([f"tests/golden/{folder}"])
    assert status == int(folder.endswith("-1000"))  # an intermediate checkpoint lacks most of the projector
    assert capsys.readouterr().out.strip() in README
