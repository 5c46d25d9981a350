"""The commands: help at once, errors in one line with their exit status, and with a traceback where it is asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

from llava_sp.shapes import ship


@pytest.mark.parametrize("name", ["make", "benchmarks", "quickstart", "ship", "train_backbones"])
def test_help_needs_neither_torch_nor_transformers(name, repo):
    code = (
        f"import runpy, sys\nsys.argv = ['{name}', '--help']\n"
        f"try: runpy.run_module('llava_sp.shapes.{name}', run_name='__main__')\n"
        "except SystemExit as end: print(end.code, [m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=repo)
    assert f"python -m llava_sp.shapes.{name}" in done.stdout and done.stdout.endswith("0 []\n"), done.stderr


def test_a_problem_is_one_line(capsys):
    arguments, problem = ["--run", "no/run/lora"], "no/run/vqav2/metrics.json does not exist"
    assert ship.main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: {problem}")
    with pytest.raises(ValueError, match=problem):
        ship.main([*arguments, "--traceback"])
