"""Guards of the project's structure: who may import whom, what stands where, what no file may hold."""

from __future__ import annotations

import ast
import re
import subprocess

import pytest

# A package of ours -> the packages of ours it may import.
ALLOWED = {
    "model": set(),
    "checkpoints": {"model"},
    "data": {"model", "train"},  # data.preview and data.check read a training configuration
    "train": {"model", "checkpoints", "data"},
    "eval": {"model", "checkpoints", "data", "train"},
    "shapes": {"model", "checkpoints", "data", "train", "eval"},
    "": {"model", "checkpoints", "data", "eval"},  # modules at the top: _auto, generate
}


def imported_packages(path, package: tuple[str, ...]) -> set[str]:
    """Packages of ours that a file imports, also inside functions; relative imports resolved."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1]
                names = (
                    [".".join([*base, node.module or ""])]
                    if node.module
                    else [".".join([*base, a.name]) for a in node.names]
                )
            elif node.module == "llava_sp":
                names = [
                    "llava_sp.model" if alias.name.startswith("LlavaSP") else f"llava_sp.{alias.name}"
                    for alias in node.names
                ]
            else:
                names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("llava_sp.")}
    return found


def test_import_directions(repo):
    wrong = []
    for path in sorted((repo / "llava_sp").rglob("*.py")):
        package = path.relative_to(repo).parent.parts
        own = package[1] if len(package) > 1 else ""
        names = {name for name in imported_packages(path, package) if name in ALLOWED}
        wrong += [f"{path.relative_to(repo)} imports {name}" for name in names - ALLOWED[own] - {own}]
    assert not wrong


def test_the_model_imports_only_its_siblings_and_public_packages(repo):
    """model/ is pushed to the hub as it stands, so it must not need what is not there."""
    for path in (repo / "llava_sp/model").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1, f"{path.name}: relative import out of model/"
            elif isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("llava_sp"), path.name


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
