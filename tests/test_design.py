"""Guards of the project's structure: who may import whom, what is where, what no file may hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.house import DIRECTIONS, House


@pytest.fixture(scope="module")
def house(repo) -> House:
    return House(repo / "llava_sp")


def test_imports_go_down_only(house):
    """Imports inside functions and names of modules in strings count; `benchmarks/house.py` has the directions."""
    assert house.wrong_directions() == []


def test_there_are_no_circles(house):
    assert house.circles() == []


def test_no_private_name_is_imported(house):
    assert house.private == []


def test_every_part_has_a_direction(house):
    assert {house.part(module) for module in house.paths} == set(DIRECTIONS)


def test_the_guards_see_what_they_guard_against(tmp_path):
    """A package that breaks every rule: an arrow up at the top, inside a function and in a string, a circle, a private name."""
    files = {
        "__init__.py": "",
        "model/__init__.py": "",
        "model/up.py": "import importlib\nimportlib.import_module('llava_sp.checkpoints')\n",
        "checkpoints/__init__.py": "from llava_sp.model import up\n",
        "data/__init__.py": "",
        "data/late.py": "def f():\n    from ..train import run\n",
        "train/__init__.py": "",
        "train/run.py": "from llava_sp.data.late import _hidden\nimport subprocess\ncall = ['-m', 'llava_sp.eval']\n",
        "eval/__init__.py": "",
    }
    for name, text in files.items():
        path = tmp_path / "llava_sp" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    house = House(tmp_path / "llava_sp")
    assert house.wrong_directions() == [
        "llava_sp.data.late -> llava_sp.train",
        "llava_sp.data.late -> llava_sp.train.run",
        "llava_sp.model.up -> llava_sp.checkpoints",
    ]
    assert house.circles() == [
        ["llava_sp.checkpoints", "llava_sp.model.up"],
        ["llava_sp.data.late", "llava_sp.train.run"],
    ]
    assert house.private == ["llava_sp.train.run: _hidden"]


def test_guards_stay_few(house):
    assert house.guard_share <= 5.0, "lines of refusals; declare what a file must hold with llava_sp.common.schema"


def test_the_tops_hold_what_a_user_types_or_an_author_subclasses(repo):
    def top(folder: str) -> set[str]:
        return {path.stem for path in (repo / "llava_sp" / folder).glob("*.py")} - {"__init__"}

    assert top("checkpoints") == {"convert", "inspect", "merge"}
    assert top("eval") - set(House(repo / "llava_sp").benchmarks()) == {"__main__", "base", "cli", "compare"}


def test_the_model_imports_only_its_siblings_and_public_packages(repo):
    """model/ is pushed to the hub as it is, so it must not need what is not there."""
    for path in (repo / "llava_sp/model").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1, f"{path.name}: relative import out of model/"
            elif isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("llava_sp"), path.name


def commands() -> list[str]:
    """Modules that `python -m` runs."""
    root = Path(__file__).parents[1]
    found = []
    for path in sorted((root / "llava_sp").rglob("*.py")):
        if re.search('^if __name__ == "__main__":', path.read_text(), re.MULTILINE):
            found.append(".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__main__"))
    return found


@pytest.mark.parametrize("module", commands())
def test_help_loads_nothing_heavy(module, repo):
    """So it takes a fraction of a second; torch and transformers take several."""
    code = f"""
import contextlib, io, runpy, sys
sys.argv = [{module!r}, "--help"]
with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
    runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
heavy = {{"torch", "transformers", "peft", "sklearn"}} & set(sys.modules)
sys.exit(f"loads {{', '.join(sorted(heavy))}}" if heavy else None if "usage" in out.getvalue() else "prints no usage")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def tracked(repo) -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=repo, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.split("\0") if name and (repo / name).is_file()]


def test_the_tree_stays_small(repo):
    size = sum((repo / name).stat().st_size for name in tracked(repo))
    assert size < 40 * 2**20, f"the tracked files are {size / 2**20:.1f} MiB"


def test_no_private_paths_or_keys(repo):
    private = re.compile(r"(/home/\w+/|/root/|hf_[A-Za-z0-9]{30}|wandb_api_key\s*=)", re.IGNORECASE)
    for name in tracked(repo):
        if name.endswith((".py", ".sh", ".yaml", ".md", ".toml", ".ipynb", ".cff", ".txt")) and not name.startswith(
            "tests/golden"
        ):
            found = private.search((repo / name).read_text())
            assert not found or name == "tests/test_design.py", f"{name}: {found and found.group(0)}"
